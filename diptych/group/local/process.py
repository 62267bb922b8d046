"""One pod: its containers' processes, their probes, and how it ended."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Literal

import msgspec

from diptych.errors import ConfigError
from diptych.group import expand
from diptych.group.actions import Phase
from diptych.group.expand import PodFacts
from diptych.group.local import keeper
from diptych.group.local.environment import Command, container_command, pod_folder, volume_folders
from diptych.group.local.paths import GroupFolder
from diptych.group.local.probes import Health, Probing, Target
from diptych.group.local.strays import kill_strays
from diptych.group.pod import Container, PodSpec, Probe

PodPhase = Phase | Literal["gone"]
KEEPER_MARGIN_S = 5.0  # beyond the grace period a keeper needs no longer than this


class PodSetup(msgspec.Struct, frozen=True):
    """What a pod is made from. `readiness` by container name, implied probes included."""

    facts: PodFacts
    revision: str
    spec: PodSpec
    folder: GroupFolder
    claims: Mapping[str, str]
    take_gpus: Callable[[], Sequence[str]]  # raises ConfigError when others have them
    readiness: Mapping[str, Probe]
    probing: Probing
    cwd: str
    lent_fds: Sequence[int]  # what keepers hold as long as they live


class LocalPod:
    """A pod from its first start to its last end. `changed` is called whenever something below has changed.

    `phase` is `running` until all containers have ended; then `exited`, and it may be run again, or `gone` if it was
    stopped. `reason`: why it last ended. `ready_since` and `ended_at` are the loop's times, `since` is Unix time.
    """

    def __init__(self, setup: PodSetup, changed: Callable[[], None]) -> None:
        self.setup = setup
        self.phase: PodPhase = "exited"
        self.reason = ""
        self.restarts = -1
        self.been_ready = False
        self.gpus: tuple[str, ...] = ()
        self.since = time.time()
        self.ready_since = self.ended_at = 0.0
        self._changed = changed
        self._ready: dict[str, bool] = {}
        self._keepers: dict[str, asyncio.subprocess.Process] = {}
        self._stop_requested = False
        self._failure = ""

    @property
    def name(self) -> str:
        return self.setup.facts.name

    @property
    def ready(self) -> bool:
        return self.phase == "running" and bool(self._ready) and all(self._ready.values())

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self._keepers.values())

    async def run(self, fresh: bool) -> None:
        """Starts the pod and returns when it has ended and nothing of it is left. `begin` comes first."""
        loop = asyncio.get_running_loop()
        try:
            self.gpus = tuple(self.setup.take_gpus())
            self._make_folders(fresh)
            commands = self._commands()
            self._log(f"started, attempt {self.restarts + 1}")
            for container in self.setup.spec.containers:
                self._keepers[container.name] = await self._spawn(commands[container.name])
            self._changed()
            if self._stop_requested:
                self._signal(signal.SIGTERM)
            ended = await self._until_ended(commands)
        except (OSError, ConfigError) as error:
            ended = f"cannot start: {getattr(error, 'message', None) or getattr(error, 'strerror', None) or error}"
            await self._end_keepers()
        self._keepers.clear()
        self._ready.clear()
        self.ended_at = loop.time()
        self._log(ended)
        self._set("gone" if self._stop_requested else "exited", self._failure or ended)

    def begin(self) -> None:
        """Marks the pod as running; `run` follows in a task."""
        self.restarts += 1
        self._failure = ""
        self.been_ready = False
        self._ready = {container.name: False for container in self.setup.spec.containers}
        self._set("running", self.reason)  # why it ended before is worth knowing while it runs again

    def stop(self) -> None:
        """Asks a running pod to end; its keepers kill it after the grace period."""
        self._stop_requested = True
        self._set("stopping", "")
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends a running pod without a grace period."""
        self._stop_requested = True
        if self.phase == "running":
            self._set("stopping", "")
        self._signal(signal.SIGINT)

    def _set(self, phase: PodPhase, reason: str) -> None:
        self.phase, self.reason, self.since = phase, reason, time.time()
        self._changed()

    def _make_folders(self, fresh: bool) -> None:
        own = pod_folder(self.setup.folder, self.name)
        if fresh:
            shutil.rmtree(own, ignore_errors=True)
        volumes = self._volumes()
        for volume in self.setup.spec.volumes:
            if volume.empty_dir is not None:
                Path(volumes[volume.name]).mkdir(mode=0o700, parents=True, exist_ok=True)

    def _volumes(self) -> dict[str, str]:
        return volume_folders(self.setup.folder, self.name, self.setup.spec, self.setup.claims)

    def _commands(self) -> dict[str, Command]:
        setup, volumes = self.setup, self._volumes()
        return {
            each.name: container_command(each, setup.facts, volumes, setup.folder, self.gpus, os.environ, setup.cwd)
            for each in setup.spec.containers
        }

    async def _spawn(self, command: Command) -> asyncio.subprocess.Process:
        with self._open_log() as log:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", keeper.__file__),
                str(self.setup.spec.termination_grace_period_seconds),
                *command.argv,
                env=dict(command.environment),
                cwd=command.cwd,
                stdin=asyncio.subprocess.PIPE,  # never written to: its end tells the keeper that we are gone
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=tuple(self.setup.lent_fds),
            )

    async def _until_ended(self, commands: Mapping[str, Command]) -> str:
        """Follows probes and processes until a container ends; ends the others; says which one it was and how."""
        try:
            async with asyncio.TaskGroup() as tasks:  # a defect in a probe ends the group too, and is not lost
                waits = {tasks.create_task(process.wait()): name for name, process in self._keepers.items()}
                health = [
                    tasks.create_task(self._health(each, commands[each.name]).follow())
                    for each in self.setup.spec.containers
                ]
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for task in (*health, *waits):
                    task.cancel()
            first = next(task for task in waits if task in done)
            return f"{waits[first]} {_how(first.result())}"
        finally:
            await self._end_keepers()

    async def _end_keepers(self) -> None:
        self._signal(signal.SIGTERM)
        limit_s = self.setup.spec.termination_grace_period_seconds + KEEPER_MARGIN_S
        for process in self._keepers.values():
            try:
                async with asyncio.timeout(limit_s):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        if any((process.returncode or 0) < 0 for process in self._keepers.values()):
            kill_strays(self.setup.folder, self.setup.facts.ip)  # a keeper was killed: what it kept is nobody's now

    def _health(self, container: Container, command: Command) -> Health:
        expander = partial(expand.expand, variables=command.variables)
        target = Target(self.setup.facts.ip, container, command.environment, expander, command.cwd)
        readiness = self.setup.readiness.get(container.name)
        return Health(target, readiness, self.setup.probing, partial(self._on_ready, container.name), self._on_failed)

    def _on_ready(self, container: str, ready: bool) -> None:
        was_ready = self.ready
        self._ready[container] = ready
        if self.ready and not was_ready:
            self.been_ready = True
            self.ready_since = asyncio.get_running_loop().time()
        self.since = time.time()
        self._changed()

    def _on_failed(self, why: str) -> None:
        self._failure = why
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._keepers.values():
            if process.returncode is None:
                process.send_signal(number)

    def _open_log(self) -> IO[bytes]:
        return (self.setup.folder.logs / f"{self.name}.log").open("ab", buffering=0)

    def _log(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with (self.setup.folder.logs / f"{self.name}.log").open("a") as log:
            log.write(f"--- {stamp} {self.name} {text}\n")


def _how(code: int) -> str:
    """An exit status as a sentence."""
    if code > 128:
        try:
            return f"was ended by {signal.Signals(code - 128).name}"
        except ValueError:
            pass
    if code < 0:
        return f"was killed with its keeper (signal {-code})"
    return f"ended with exit code {code}"
