"""The commands of a local group: up, status, logs, scale, down; and of manifests: validate, crds."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
from rich.console import Console

from diptych.errors import ConfigError, DeadlineExceeded
from diptych.group import spec
from diptych.group.crds import crds_yaml
from diptych.group.local import up
from diptych.group.local.control import ScaleRequest, StatusRequest, UpdateRequest
from diptych.group.local.launch import prepare, read_launch
from diptych.group.local.logs import follow_logs, log_files, print_logs
from diptych.group.local.paths import GroupFolder, known_groups, state_root
from diptych.group.local.progress import Progress
from diptych.group.local.state import Snapshot
from diptych.group.validate import check

Handler = Callable[[argparse.Namespace], int]
UP_TIMEOUT_S, SCALE_TIMEOUT_S, DOWN_TIMEOUT_S = 600.0, 300.0, 120.0


def add_commands(subparsers: Any) -> None:
    """Adds the commands; each sets `handler`, which takes the parsed arguments and returns an exit status."""
    parser = _command(subparsers, "up", run_up, "run a RoleBasedGroup manifest as processes on this machine")
    parser.add_argument("file", metavar="FILE", help="manifest: one RoleBasedGroup and its Services, YAML")
    parser.add_argument(
        "--claim",
        metavar="NAME=DIR",
        action="append",
        default=[],
        help="folder of a persistentVolumeClaim; --update keeps those it knows (repeatable)",
    )
    parser.add_argument(
        "--service-port",
        metavar="NAME=PORT",
        action="append",
        default=[],
        help="port of 127.0.0.1 for a Service; NAME is its name, or NAME:PORTNAME if it has several ports; 0: any free"
        " one (default: the Service's own port; repeatable)",
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="change a group that runs to what FILE says, by rolling updates, and return when that is done",
    )
    parser.add_argument("--detach", action="store_true", help="return when all roles are ready and leave them running")
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=_seconds,
        default=UP_TIMEOUT_S,
        help=f"seconds until all roles must be ready (default: {UP_TIMEOUT_S:g})",
    )
    parser = _command(subparsers, "status", run_status, "show the groups of this machine, or one of them with its pods")
    parser.add_argument("group", metavar="GROUP", nargs="?", help="name of a group (default: all)")
    parser.add_argument("--json", action="store_true", help="as JSON, one line a group")
    parser = _command(subparsers, "logs", run_logs, "print what the pods of a group have written")
    parser.add_argument("target", metavar="GROUP[/ROLE[/INDEX]]", help="a group, a role or one pod; or a pod's name")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the group ends or Ctrl-C")
    parser.add_argument(
        "--tail", metavar="N", type=_count, default=None, help="only the last N lines of each (default: all)"
    )
    parser = _command(subparsers, "scale", run_scale, "change the number of pods of a role")
    parser.add_argument("target", metavar="GROUP/ROLE", help="the role")
    parser.add_argument("replicas", metavar="N", type=_count, help="number of pods; the highest indices end first")
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=_seconds,
        default=SCALE_TIMEOUT_S,
        help=f"seconds to wait until the group is ready again; 0: do not wait (default: {SCALE_TIMEOUT_S:g})",
    )
    parser = _command(subparsers, "down", run_down, "end a group, dependents first")
    parser.add_argument("group", metavar="GROUP", help="name of the group")
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=_seconds,
        default=DOWN_TIMEOUT_S,
        help=f"seconds to wait for its end (default: {DOWN_TIMEOUT_S:g})",
    )
    parser = _command(subparsers, "validate", run_validate, "check manifests as the API server and the operator would")
    parser.add_argument("files", metavar="FILE", nargs="+", help="YAML; all kinds of workloads.x-k8s.io, and Services")
    _command(subparsers, "crds", run_crds, "print the custom resource definitions, YAML")


def _command(subparsers: Any, name: str, handler: Handler, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=text, description=text[:1].upper() + text[1:] + "."
    )
    parser.set_defaults(handler=handler)
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must be 0 or more seconds")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def run_up(args: argparse.Namespace) -> int:
    launch = read_launch(args.file, args.claim, args.service_port)
    if args.update:
        name = spec.parse(launch.manifest).group.name
        return _change(GroupFolder(state_root(), name), UpdateRequest(launch), args.timeout)
    prepared = prepare(launch)
    folder = GroupFolder(state_root(), prepared.group)
    lock = folder.take_lock()
    name = prepared.group
    hint = f"`diptych status {name}` shows it, `diptych down {name}` ends it" if args.detach else "Ctrl-C ends it"
    progress = Progress(Console(stderr=True), hint)
    for note in (up.recover(folder), *prepared.notes):
        if note:
            progress.line(f"note: {note}")
    try:
        if args.detach:
            up.start_detached(prepared, folder, lock, progress.show, args.timeout)
        else:
            asyncio.run(up.run_in_foreground(prepared, folder, progress.show, args.timeout))
            os.close(lock)
    except KeyboardInterrupt:
        progress.line(f"{name} is {'going down' if folder.running() else 'down'}")
        raise
    finally:
        progress.settle()
    return 0


def run_status(args: argparse.Namespace) -> int:
    root = state_root()
    names = [args.group] if args.group else known_groups(root)
    if not names:
        print("no groups are running")
    status = 0
    for name in names:
        snapshot = _current(GroupFolder(root, name))
        if snapshot is None:
            status = 1 if args.group else status
        elif args.json:
            print(msgspec.json.encode(snapshot).decode())
        else:
            print(_table(snapshot))
    return status


def _current(folder: GroupFolder) -> Snapshot | None:
    """The group as it is; None, said on standard error, if it does not run. Cleans up after a dead supervisor."""
    if folder.running():
        snapshot = up.ask(folder, StatusRequest())
        if snapshot is not None:
            return snapshot
        print(f"group {folder.group} is starting or ending; ask again", file=sys.stderr)
        return None
    if not folder.path.exists():
        raise ConfigError(f"there is no group {folder.group}")
    lock = folder.take_lock()
    try:
        print(up.recover(folder) or f"group {folder.group} is not running", file=sys.stderr)
    finally:
        os.close(lock)
    return None


def _table(snapshot: Snapshot) -> str:
    lines = [f"{snapshot.group}: {snapshot.status}, for {_age(snapshot.started_at)}, from {snapshot.source}"]
    for service in snapshot.services:
        port = f":{service.port_name}" if service.port_name else ""
        pods = ", ".join(service.pods) or "nothing ready"
        lines.append(f"  service {service.name}{port}  http://{service.address}  ->  {pods}")
    for role in snapshot.roles:
        waits = f"  waits for {', '.join(role.waiting_for)}" if role.waiting_for else ""
        lines.append(f"  role {role.name}  {role.ready}/{role.replicas} ready{waits}")
    rows = [("POD", "STATUS", "FOR", "RESTARTS", "PID", "ADDRESS", "GPUS", "REASON")]
    rows += [
        (
            *(pod.name, pod.status, _age(pod.since), str(pod.restarts), ",".join(map(str, pod.pids)) or "-"),
            *(pod.ip, ",".join(pod.gpus) or "-", pod.reason),
        )
        for pod in snapshot.pods
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(lines)


def _age(since: float) -> str:
    seconds = max(0, int(time.time() - since))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def run_logs(args: argparse.Namespace) -> int:
    group, role, index = _pod(args.target) or _target(args.target, 3)
    folder = GroupFolder(state_root(), group)
    files = log_files(folder, role, index)
    try:
        if args.follow:
            follow_logs(lambda: log_files(folder, role, index), _print_now, args.tail, folder.running)
        else:
            print_logs(files, print, args.tail)
    except KeyboardInterrupt:
        pass  # the reader has seen enough
    return 0


def _print_now(line: str) -> None:
    print(line, flush=True)


def run_scale(args: argparse.Namespace) -> int:
    group, role, _ = _target(args.target, 2)
    if not role:
        raise ConfigError(f"{args.target}: must have the form GROUP/ROLE")
    return _change(GroupFolder(state_root(), group), ScaleRequest(role, args.replicas), args.timeout)


def _change(folder: GroupFolder, request: ScaleRequest | UpdateRequest, timeout_s: float) -> int:
    """Asks a running group for a change and shows it until the group is ready; 0 s: does not wait."""
    if not folder.running():
        raise ConfigError(f"group {folder.group} is not running")
    progress = Progress(Console(stderr=True))
    progress.start_from(_asked(folder, StatusRequest()))
    snapshot = _asked(folder, request)
    deadline = time.monotonic() + timeout_s
    try:
        while timeout_s and snapshot.status != "ready":
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"group {folder.group} is not ready after {timeout_s:g} s; see `diptych status {folder.group}`"
                )
            progress.show(snapshot)
            time.sleep(up.POLL_S)
            snapshot = _asked(folder, StatusRequest())
        progress.show(snapshot)
    finally:
        progress.settle()
    if snapshot.message:
        raise DeadlineExceeded(snapshot.message)
    return 0


def _asked(folder: GroupFolder, message: StatusRequest | ScaleRequest | UpdateRequest) -> Snapshot:
    snapshot = up.ask(folder, message)
    if snapshot is None:
        raise ConfigError(f"group {folder.group} is starting or ending; try again")
    return snapshot


def run_down(args: argparse.Namespace) -> int:
    folder = GroupFolder(state_root(), args.group)
    progress = Progress(Console(stderr=True))
    before = up.ask(folder, StatusRequest()) if folder.running() else None
    if before is not None:
        progress.start_from(before)
    try:
        if up.take_down(folder, progress.show, timeout_s=args.timeout):
            progress.line(f"{args.group} is down")
            return 0
    finally:
        progress.settle()
    _current(folder)
    return 1


def run_validate(args: argparse.Namespace) -> int:
    """A line for each document on standard output, or its mistakes in a ConfigError, all at once."""
    wrong: list[str] = []
    for each in check(args.files):
        wrong += [f"{each}: {problem}" for problem in each.problems]
        if not each.problems:
            print(f"ok  {each}" if each.known else f"--  {each}: not checked, no kind of workloads.x-k8s.io")
            if each.note:
                print(f"note  {each}: {each.note}")
    if wrong:
        raise ConfigError(f"{len(wrong)} {'mistake' if len(wrong) == 1 else 'mistakes'}:\n  " + "\n  ".join(wrong))
    return 0


def run_crds(args: argparse.Namespace) -> int:
    print(crds_yaml(), end="")
    return 0


def _target(text: str, parts: int) -> tuple[str, str, str]:
    """GROUP[/ROLE[/INDEX]] as three strings, empty where nothing was given."""
    given = text.split("/")
    if len(given) > parts or not all(given) or (len(given) == 3 and not given[2].isdigit()):
        raise ConfigError(f"{text}: must have the form {'GROUP[/ROLE[/INDEX]]' if parts == 3 else 'GROUP/ROLE'}")
    group, role, index = (*given, "", "")[:3]
    return group, role, index


def _pod(name: str) -> tuple[str, str, str] | None:
    """(group, role, index) of a pod that has written a log, by its name."""
    for log in state_root().glob("*/logs/*.log"):
        group = log.parents[1].name
        if log.stem == name and name.startswith(f"{group}-"):
            role, _, index = name.removeprefix(f"{group}-").rpartition("-")
            return group, role, index
    return None
