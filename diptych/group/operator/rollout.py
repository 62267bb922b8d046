"""`diptych rollout history | diff | undo | status | pause | resume`: a person's view of a group's revisions."""

from __future__ import annotations

import argparse
import difflib
import sys
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from diptych.errors import ConfigError, DeadlineExceeded, NotFound, Overloaded, Unavailable
from diptych.group import names
from diptych.group.operator.api import REQUEST_TIMEOUT_S, Api, Conflict
from diptych.group.operator.cache import controller_of
from diptych.group.operator.main import connect
from diptych.group.operator.metrics import Metrics
from diptych.group.operator.resources import GROUP, REVISION, Json
from diptych.group.revision import restore, revision_data, spec_revision

POLL_S = 1.0
MAX_TRIES = 10  # of a change


class Target:
    """One group of a cluster."""

    def __init__(self, api: Api, namespace: str, name: str) -> None:
        self.api, self.namespace, self.name = api, namespace, name

    @cached_property
    def group(self) -> Json:
        """As it was when first asked for. Raises ConfigError if it is not there."""
        return self.read()

    def read(self, timeout_s: float = REQUEST_TIMEOUT_S) -> Json:
        try:
            return self.api.within(timeout_s).get(GROUP, self.namespace, self.name)
        except NotFound:
            raise ConfigError(f"there is no RoleBasedGroup {self.name} in namespace {self.namespace}") from None

    def revisions(self) -> dict[int, Json]:
        """By number, oldest first."""
        uid = self.group["metadata"]["uid"]
        found, _ = self.api.list(REVISION, self.namespace, f"{names.PREFIX}/name={self.name}")
        own = [each for each in found if controller_of(each).get("uid") == uid]
        return {int(each["revision"]): each for each in sorted(own, key=lambda each: int(each["revision"]))}

    def choose(self, number: int | None) -> Json:
        known = self.revisions()
        if number is None:
            number = sorted(known)[-2] if len(known) > 1 else None
            if number is None:
                raise ConfigError(f"group {self.name} has no earlier revision")
        if number not in known:
            raise ConfigError(f"group {self.name} has no revision {number}; it has {', '.join(map(str, known))}")
        return known[number]

    def change_spec(self, change: Callable[[Json], Mapping[str, Any]]) -> None:
        """Raises Conflict if each time somebody else wrote the group meanwhile, as the operator may at any moment."""
        for left in reversed(range(MAX_TRIES)):
            try:
                self.api.replace(GROUP, {"metadata": self.group["metadata"], "spec": change(self.group["spec"])})
                return
            except Conflict:
                if not left:
                    raise
            self.group = self.read()


def run_rollout(args: argparse.Namespace) -> int:
    configuration, namespace = connect(args.kubeconfig)
    api = Api(configuration, Metrics())
    try:
        return ACTIONS[args.action](Target(api, args.namespace or namespace, args.group), args)
    finally:
        api.close()


def history(target: Target, args: argparse.Namespace) -> int:
    table = Table("REVISION", "NAME", "CREATED", "IMAGES")
    newest = spec_revision(target.group["spec"]).hash
    for number, each in target.revisions().items():
        name, metadata = each["metadata"]["name"], each["metadata"]
        mark = " (now)" if name.endswith(f"-{newest}") else ""
        images = ", ".join(_images(revision_data(each["data"])))
        table.add_row(f"{number}{mark}", name, metadata["creationTimestamp"], images)
    Console().print(table)
    return 0


def diff(target: Target, args: argparse.Namespace) -> int:
    revision = target.choose(args.revision)
    now, then = spec_revision(target.group["spec"]).data, revision_data(revision["data"])
    lines = difflib.unified_diff(_yaml(now), _yaml(then), "now", f"revision {revision['revision']}", lineterm="")
    print("\n".join(lines) or "no difference")
    return 0


def undo(target: Target, args: argparse.Namespace) -> int:
    revision = target.choose(args.revision)
    target.change_spec(lambda spec: restore(spec, revision_data(revision["data"])))
    print(
        f"{target.name}: back to revision {revision['revision']}; watch it with: diptych rollout status {target.name}"
    )
    return 0


def status(target: Target, args: argparse.Namespace) -> int:
    """Waits until the spec is carried out and Ready; the conditions' messages are shown as they change."""
    deadline, shown = time.monotonic() + args.timeout, ""
    while True:
        group = _read_by(deadline, target)
        conditions = {each["type"]: each for each in (group.get("status") or {}).get("conditions") or []}
        generation = group["metadata"]["generation"]
        current = {name: each for name, each in conditions.items() if each.get("observedGeneration") == generation}
        text = _told(current)
        if text != shown:
            print(text, flush=True)
            shown = text
        states = {name: each["status"] for name, each in current.items()}
        at_work = states.get("RollingUpdateInProgress") == "True" or states.get("Progressing") == "False"
        if states.get("Ready") == "True" and not at_work:
            return 0
        if current.get("Progressing", {}).get("reason") in ("ProgressDeadlineExceeded", "InvalidSpec"):
            return 1
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"group {target.name} was not as its spec wants it within {args.timeout:g} s: {text or 'no status'}"
            )
        time.sleep(POLL_S)


def _told(conditions: Mapping[str, Json]) -> str:
    """What they say; of a refusal only that: it is what a person has to mend."""
    progressing = conditions.get("Progressing", {})
    if progressing.get("reason") == "FailedReconcile":
        return f"refused, and tried again: {progressing['message']}"
    return "; ".join(each["message"] for each in conditions.values() if each["message"])


def _read_by(deadline: float, target: Target) -> Json:
    """The group, as soon as the API server answers. That it is away is told once. Raises Unavailable."""
    told = False
    while True:
        try:
            return target.read(min(REQUEST_TIMEOUT_S, max(POLL_S, deadline - time.monotonic())))
        except (Unavailable, Overloaded) as error:
            if time.monotonic() > deadline:
                raise
            if not told:
                print(f"{error.message}; trying until --timeout is over", file=sys.stderr, flush=True)
            told = True
            time.sleep(POLL_S)


def pause(target: Target, args: argparse.Namespace) -> int:
    target.change_spec(lambda spec: {**spec, "paused": True})
    return 0


def resume(target: Target, args: argparse.Namespace) -> int:
    target.change_spec(lambda spec: {**spec, "paused": False})
    return 0


def _images(data: Json) -> list[str]:
    templates = [role.get("template") or {} for role in data["roles"]]
    templates += [each["template"] for each in data.get("roleTemplates") or []]
    containers = [each for template in templates for each in (template.get("spec") or {}).get("containers") or []]
    return sorted({each["image"] for each in containers if each.get("image")})


def _yaml(data: Json) -> list[str]:
    text: str = yaml.safe_dump(data, sort_keys=True)
    return text.splitlines()


ACTIONS: dict[str, Callable[[Target, argparse.Namespace], int]] = {
    "history": history,
    "diff": diff,
    "undo": undo,
    "status": status,
    "pause": pause,
    "resume": resume,
}
