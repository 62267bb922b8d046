"""Logs of a group's pods: printed, followed, and the last lines of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from diptych.errors import ConfigError
from diptych.group.local.paths import GroupFolder

POLL_S = 0.2
CHUNK_BYTES = 64 * 1024


def log_files(folder: GroupFolder, role: str = "", index: str = "") -> list[Path]:
    """The logs of a group, a role or one pod. Raises ConfigError that lists what there is."""
    files = sorted(path for path in folder.logs.glob("*.log") if path != folder.supervisor_log)
    wanted = f"{folder.group}-{role}-{index}" if index else f"{folder.group}-{role}-" if role else ""
    found = [path for path in files if (path.stem == wanted if index else _is_pod_of(path.stem, wanted))]
    if not found:
        there = ", ".join(path.stem for path in files) or "none; has the group ever run?"
        raise ConfigError(
            f"no logs of {'/'.join(part for part in (folder.group, role, index) if part)}; there are: {there}"
        )
    return found


def _is_pod_of(name: str, prefix: str) -> bool:
    return not prefix or (name.startswith(prefix) and name.removeprefix(prefix).isdigit())


def last_lines(path: Path, count: int) -> list[str]:
    """At most `count` lines from the end of a log; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - CHUNK_BYTES))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except FileNotFoundError:
        return []


def print_logs(files: Sequence[Path], write: Callable[[str], None], tail: int | None) -> None:
    """Whole logs, or `tail` lines of each; with the pod's name before each line if there are several."""
    for path in files:
        prefix = f"{path.stem} | " if len(files) > 1 else ""
        lines = path.read_text(errors="replace").splitlines() if tail is None else last_lines(path, tail)
        for line in lines:
            write(prefix + line)


def follow_logs(
    find: Callable[[], Sequence[Path]], write: Callable[[str], None], tail: int | None, alive: Callable[[], bool]
) -> None:
    """Prints what is there and what comes, of pods that appear later too, until `alive` says no."""
    readers: dict[Path, _Follower] = {}
    while True:
        last = not alive()
        files = find()
        for path in files:
            if path not in readers:
                readers[path] = _Follower(path, tail if not readers or path in files else None)
            for line in readers[path].lines():
                write((f"{path.stem} | " if len(files) > 1 else "") + line)
        if last:
            return
        time.sleep(POLL_S)


class _Follower:
    """Whole lines of a growing file."""

    def __init__(self, path: Path, tail: int | None) -> None:
        self._file = path.open("rb")
        self._rest = b""
        self._first = None if tail is None else last_lines(path, tail)
        if self._first is not None:
            self._file.seek(0, 2)

    def lines(self) -> list[str]:
        first, self._first = self._first or [], None
        data = self._rest + self._file.read()
        *whole, self._rest = data.split(b"\n")
        return [*first, *(line.decode(errors="replace") for line in whole)]
