"""Dependencies between roles: which come first, and whether they can at all. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def find_cycle(dependencies: Mapping[str, Sequence[str]]) -> list[str]:
    """A circle of names, its first repeated at the end; empty if there is none. Unknown names have no dependencies."""
    done: set[str] = set()
    for start in dependencies:
        trail: list[str] = []
        found = _walk(start, dependencies, trail, done)
        if found:
            return found
    return []


def _walk(name: str, dependencies: Mapping[str, Sequence[str]], trail: list[str], done: set[str]) -> list[str]:
    if name in trail:
        return [*trail[trail.index(name) :], name]
    if name in done:
        return []
    trail.append(name)
    for other in dependencies.get(name, ()):
        found = _walk(other, dependencies, trail, done)
        if found:
            return found
    trail.pop()
    done.add(name)
    return []


def start_order(dependencies: Mapping[str, Sequence[str]]) -> list[str]:
    """Names so that each comes after those it depends on; otherwise in the order given. There must be no cycle."""
    ordered: list[str] = []
    rest = list(dependencies)
    while rest:
        ready = [name for name in rest if all(other not in rest for other in dependencies[name])]
        if not ready:
            raise ValueError(f"dependencies go in a circle: {' -> '.join(find_cycle(dependencies))}")
        ordered += ready
        rest = [name for name in rest if name not in ready]
    return ordered
