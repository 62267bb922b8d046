"""Starts real servers of the demo model, and puts them together."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from diptych.testing.processes import ServerProcess

MODEL = ("--model-path", "models/demo", "--port", "0", "--enable-metrics")


def start_prefill(stack: ExitStack, *flags: str, env: dict[str, str] | None = None) -> ServerProcess:
    """A prefill server; not yet ready."""
    mode = ("--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", "0")
    return stack.enter_context(ServerProcess("serve", *MODEL, *mode, *flags, env=env))


def start_decode(stack: ExitStack, *flags: str, env: dict[str, str] | None = None) -> ServerProcess:
    """A decode server; not yet ready."""
    return stack.enter_context(ServerProcess("serve", *MODEL, "--disaggregation-mode", "decode", *flags, env=env))


def start_router(
    stack: ExitStack, prefill: list[ServerProcess], decode: list[ServerProcess], *flags: str
) -> ServerProcess:
    """A router in front of servers that are ready."""
    args = ["route", "--pd-disaggregation", "--port", "0", "--policy", "round_robin"]
    for server in prefill:
        args += ["--prefill", server.url, str(bootstrap_port(server))]
    for server in decode:
        args += ["--decode", server.url]
    return stack.enter_context(ServerProcess(*args, *flags)).wait_ready()


def bootstrap_port(server: ServerProcess) -> int:
    return int(server.get("/server_info")["disaggregation_bootstrap_port"])


@dataclass
class PDCluster:
    prefill: list[ServerProcess]
    decode: list[ServerProcess]
    router: ServerProcess

    @property
    def servers(self) -> list[ServerProcess]:
        return [*self.prefill, *self.decode]

    def bootstrap(self, room: int, prefill: int = 0) -> dict[str, Any]:
        """The three fields that send a request's prefill to `self.prefill[prefill]`."""
        port = bootstrap_port(self.prefill[prefill])
        return {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": room}


def start_cluster(stack: ExitStack, num_prefill: int = 2, *flags: str, **options: Any) -> PDCluster:
    """`options`: prefill_flags, decode_flags, prefill_env, decode_env, router_flags."""
    prefill = [
        start_prefill(stack, *flags, *options.get("prefill_flags", ()), env=options.get("prefill_env"))
        for _ in range(num_prefill)
    ]
    decode = [start_decode(stack, *flags, *options.get("decode_flags", ()), env=options.get("decode_env"))]
    for server in [*prefill, *decode]:
        server.wait_ready()
    return PDCluster(prefill, decode, start_router(stack, prefill, decode, *options.get("router_flags", ())))


def assert_idle(server: ServerProcess) -> dict[str, Any]:
    """Nothing is held for any request, and the page ledger adds up. Returns the audit."""
    report: dict[str, Any] = server.get("/audit")
    assert report["ok"], report
    held = {name: report[name] for name in ("requests", "held", "grammars", "rooms", "transfers", "sequences")}
    assert not any(held.values()), f"{server.args}: {held}"
    assert report["free"] + report["cached"] == report["pages"], report
    return report
