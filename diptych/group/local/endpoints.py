"""Which pods a Service sends its connections to. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from diptych.group.spec import Service


class Candidate(msgspec.Struct, frozen=True):
    """A pod that runs. `labels`: those of its template, its role and itself."""

    name: str
    labels: Mapping[str, str]
    ready: bool


def endpoints(services: Iterable[Service], pods: Sequence[Candidate]) -> dict[str, tuple[str, ...]]:
    """Names of the pods behind each Service, in the order given; an empty selector matches nothing."""
    return {
        service.name: tuple(
            pod.name
            for pod in pods
            if (pod.ready or service.spec.publish_not_ready_addresses) and _selects(service.spec.selector, pod.labels)
        )
        for service in services
    }


def _selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return bool(selector) and all(labels.get(key) == value for key, value in selector.items())
