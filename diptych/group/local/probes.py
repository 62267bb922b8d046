"""Probes of a local pod: readiness, liveness and startup, as Kubernetes defines them, asked sooner at the start.

See docs/decisions/local-probes.md. Until a container has been ready for the first time it is asked every
`fast_period_s`, whatever the manifest's initialDelaySeconds and periodSeconds say; afterwards every periodSeconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Mapping, Sequence

import msgspec

from diptych.group.pod import Container, ExecAction, HttpGetAction, Probe, TcpSocketAction, port_number

HTTP_HEAD_LIMIT_BYTES = 16 * 1024


class Probing(msgspec.Struct, frozen=True):
    """How eagerly a starting container is asked. Starting a process costs more than opening a connection."""

    fast_period_s: float = 0.25
    fast_exec_period_s: float = 1.0


class Target(msgspec.Struct, frozen=True):
    """Whom a probe asks: the pod's address, and what an exec probe runs with."""

    ip: str
    container: Container
    environment: Mapping[str, str]
    expand: Callable[[str], str]
    cwd: str


async def ask(probe: Probe, target: Target) -> str:
    """One probe: empty if it succeeded, else why not. Never longer than timeoutSeconds."""
    action = probe.actions[0]
    try:
        async with asyncio.timeout(probe.timeout_seconds):
            if isinstance(action, ExecAction):
                return await _exec([target.expand(each) for each in action.command], target)
            if isinstance(action, TcpSocketAction):
                return await _tcp(action, target)
            return await _http(action, target)
    except TimeoutError:
        return f"no answer within {probe.timeout_seconds} s"
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__


async def _tcp(action: TcpSocketAction, target: Target) -> str:
    _, writer = await asyncio.open_connection(action.host or target.ip, port_number(target.container, action.port))
    await _close(writer)
    return ""


async def _http(action: HttpGetAction, target: Target) -> str:
    host, port = action.host or target.ip, port_number(target.container, action.port)
    tls = _unverified() if action.scheme.upper() == "HTTPS" else None
    reader, writer = await asyncio.open_connection(host, port, ssl=tls, limit=HTTP_HEAD_LIMIT_BYTES)
    try:
        headers = {"host": f"{host}:{port}", "user-agent": "diptych-probe", "connection": "close", "accept": "*/*"}
        headers |= {each.name.lower(): each.value for each in action.http_headers}
        path = action.path if action.path.startswith("/") else f"/{action.path}"
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        writer.write("\r\n".join(lines).encode())
        await writer.drain()
        try:
            status = (await reader.readline()).split()
        except ValueError:
            return "the answer is no HTTP"
        if len(status) < 2 or not status[1].isdigit():
            return "the answer is no HTTP"
        return "" if 200 <= int(status[1]) < 400 else f"HTTP status {int(status[1])}"
    finally:
        await _close(writer)


def _unverified() -> ssl.SSLContext:
    """A kubelet does not check the certificate of a probe either."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def _exec(command: Sequence[str], target: Target) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        env=dict(target.environment),
        cwd=target.cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        code = await process.wait()
        return "" if code == 0 else f"{command[0]} ended with {code}"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class Health:
    """Follows one container's probes: `on_ready(bool)` at each change, `on_failed(why)` when it has to restart.

    Without a readiness probe a container is ready as soon as its startup probe, if any, has succeeded.
    """

    def __init__(
        self,
        target: Target,
        readiness: Probe | None,
        probing: Probing,
        on_ready: Callable[[bool], None],
        on_failed: Callable[[str], None],
    ) -> None:
        self._target = target
        self._readiness = readiness
        self._probing = probing
        self._on_ready = on_ready
        self._on_failed = on_failed

    async def follow(self) -> None:
        """Runs until cancelled, or until the container has failed."""
        container = self._target.container
        if container.startup_probe is not None and not await self._startup(container.startup_probe):
            return
        async with asyncio.TaskGroup() as tasks:
            if self._readiness is None:
                self._on_ready(True)
            else:
                tasks.create_task(self._follow_readiness(self._readiness))
            if container.liveness_probe is not None:
                tasks.create_task(self._follow_liveness(container.liveness_probe))

    async def _startup(self, probe: Probe) -> bool:
        """Asks fast, and gives up when Kubernetes would: after the delay and failureThreshold periods."""
        limit_s = probe.initial_delay_seconds + probe.failure_threshold * probe.period_seconds
        try:
            async with asyncio.timeout(limit_s):
                while await ask(probe, self._target):  # noqa: ASYNC110 - it is another process's state
                    await asyncio.sleep(self._fast(probe))
        except TimeoutError:
            self._on_failed(f"startup probe: no success within {limit_s} s")
            return False
        return True

    async def _follow_readiness(self, probe: Probe) -> None:
        ready, been_ready, streak = False, False, 0
        while True:
            success = not await ask(probe, self._target)
            streak = streak + 1 if success != ready else 0
            if streak >= (probe.failure_threshold if ready else probe.success_threshold):
                ready, streak = success, 0
                been_ready = been_ready or ready
                self._on_ready(ready)
            await asyncio.sleep(probe.period_seconds if been_ready else self._fast(probe))

    async def _follow_liveness(self, probe: Probe) -> None:
        await asyncio.sleep(probe.initial_delay_seconds)
        failures = 0
        while True:
            why = await ask(probe, self._target)
            failures = failures + 1 if why else 0
            if failures >= probe.failure_threshold:
                self._on_failed(f"liveness probe failed {failures} times: {why}")
                return
            await asyncio.sleep(probe.period_seconds)

    def _fast(self, probe: Probe) -> float:
        fast = self._probing.fast_exec_period_s if probe.exec else self._probing.fast_period_s
        return min(fast, float(probe.period_seconds))
