"""Settings of the router, and the two command lines that set them: SGLang's mini_lb and its launch_router.

`--prefill URL URL --prefill-bootstrap-ports 34000 34000` and `--prefill URL 34000 --prefill URL 34000` say the same. A
flag that is not in the table is refused by name; nothing is ignored.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass, fields
from typing import Any, NoReturn
from urllib.parse import urlsplit

from diptych.config import flag
from diptych.errors import ConfigError

POLICIES = ("random", "round_robin", "power_of_two", "least_load", "cache_aware")
REQUEST_ID_HEADERS = ("x-request-id", "x-correlation-id", "x-trace-id", "request-id")


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server listens. `bootstrap_port` is a prefill server's; None: it uses its own setting."""

    host: str  # as in the URL, an IPv6 address without its brackets
    port: int
    bootstrap_port: int | None = None

    @property
    def bootstrap_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def url(self) -> str:
        return f"http://{self.bootstrap_host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Everything `diptych route` can be told. Fields that end in `_secs` are seconds, `_ms` milliseconds."""

    # servers; either prefill and decode, or workers
    prefill: tuple[ServerAddress, ...] = ()
    decode: tuple[ServerAddress, ...] = ()
    workers: tuple[ServerAddress, ...] = ()
    # where
    host: str = flag("127.0.0.1", "address to listen on")
    port: int = flag(30000, "port to listen on; 0 lets the kernel choose")
    # who serves
    policy: str = flag("", "how servers are chosen (default: cache_aware, decode: power_of_two)", choices=POLICIES)
    prefill_policy: str = flag("", "how prefill servers are chosen (default: --policy)", choices=POLICIES)
    decode_policy: str = flag("", "how decode servers are chosen (default: --policy)", choices=POLICIES)
    mini_lb: bool = flag(False, "choose at random unless a policy is given, as SGLang's mini load balancer does")
    cache_threshold: float = flag(0.3, "cache_aware: least part of a prompt that must have been routed before")
    balance_abs_threshold: int = flag(64, "cache_aware: balance loads when they differ by more requests than this")
    balance_rel_threshold: float = flag(1.5, "cache_aware: ... and by more than this factor")
    max_tree_size: int = flag(16 << 20, "cache_aware: bytes of routed prompts to remember")
    # limits
    request_timeout_secs: float = flag(1800.0, "longest time one request may take")
    body_timeout_secs: float = flag(60.0, "longest time for a request's body to arrive, in seconds; then 408")
    max_concurrent_requests: int = flag(-1, "requests served at a time; -1: no limit")
    queue_size: int = flag(100, "requests that may wait beyond --max-concurrent-requests; beyond that 429")
    queue_timeout_secs: float = flag(60.0, "longest wait in that queue; then 408")
    hold_timeout_secs: float = flag(
        10.0, "longest time a request is held while no server can take it, in seconds; then 503. 0: 503 at once"
    )
    hold_size: int = flag(1000, "requests that may be held at a time, of 256 MiB in all; beyond that 503 at once")
    max_payload_size: int = flag(32 << 20, "largest body of a request, and of an answer that is not streamed, in bytes")
    disable_prefill_fallback: bool = flag(
        False, "let no decode server do the prefill while no prefill server is healthy: requests wait, then 503"
    )
    # retries
    disable_retries: bool = flag(False, "answer with the first failure")
    retry_max_retries: int = flag(5, "how often a request is sent to other servers at most")
    retry_initial_backoff_ms: float = flag(50.0, "wait before the first retry")
    retry_max_backoff_ms: float = flag(30000.0, "longest wait before a retry")
    retry_backoff_multiplier: float = flag(1.5, "by how much the wait grows")
    retry_jitter_factor: float = flag(0.2, "part of the wait that is random")
    # circuit breakers
    disable_circuit_breaker: bool = flag(False, "go on sending to servers that fail")
    cb_failure_threshold: int = flag(10, "failures within the window that open a server's circuit")
    cb_success_threshold: int = flag(3, "successes that close it again")
    cb_timeout_duration_secs: float = flag(60.0, "how long it stays open before the server is tried again")
    cb_window_duration_secs: float = flag(120.0, "how long a failure counts")
    # health
    disable_health_check: bool = flag(False, "take every server as healthy until a request cannot reach it")
    health_failure_threshold: int = flag(3, "failed checks after which a server gets no requests")
    health_success_threshold: int = flag(2, "good checks after which it gets requests again")
    health_check_timeout_secs: float = flag(5.0, "longest wait for a check")
    health_check_interval_secs: float = flag(
        10.0, "time between checks of a healthy server; others are checked each second"
    )
    health_check_endpoint: str = flag("/health", "path of the check")
    worker_startup_timeout_secs: float = flag(1800.0, "longest wait for one server of each role at the start")
    worker_startup_check_interval: float = flag(1.0, "time between checks of servers that have not answered yet")
    # life
    shutdown_delay_secs: float = flag(
        0.0, "how long new requests are still served after SIGTERM, while load balancers learn that the router leaves"
    )
    shutdown_grace_period_secs: float = flag(180.0, "longest wait for running requests after SIGTERM")
    # edges
    api_key: str = flag("", "bearer key clients must show, also shown to the servers (or env DIPTYCH_API_KEY)")
    prometheus_host: str = flag("127.0.0.1", "address of the separate metrics port")
    prometheus_port: int = flag(-1, "also serve /metrics on this port, without a key; -1: only on --port")
    request_id_headers: tuple[str, ...] = flag(REQUEST_ID_HEADERS, "headers that may carry a request's id")
    cors_allowed_origins: tuple[str, ...] = flag((), "origins whose pages may call the router; * for all")
    log_level: str = flag("info", "lowest level that is logged", choices=("debug", "info", "warning", "error"))

    @property
    def disaggregated(self) -> bool:
        return bool(self.decode)

    @property
    def key(self) -> str:
        return self.api_key or os.environ.get("DIPTYCH_API_KEY", "")

    def policy_of(self, role: str) -> str:
        """The policy for servers of `role`. Decode servers keep no prefixes, so that by default their load decides."""
        own = {"prefill": self.prefill_policy, "decode": self.decode_policy}.get(role, "")
        default = "random" if self.mini_lb else "power_of_two" if role == "decode" else "cache_aware"
        return own or self.policy or default

    def check(self) -> None:
        """Raise ConfigError, naming the flag, for values that cannot work."""
        for name, low in _AT_LEAST.items():
            if not low <= getattr(self, name) < math.inf:
                raise ConfigError(f"{_flag_name(name)} must be at least {low}, not {getattr(self, name)}")
        for name in ("port", "prometheus_port"):
            if getattr(self, name) > 65535:
                raise ConfigError(f"{_flag_name(name)} must be a port number, not {getattr(self, name)}")
        if not 0 <= self.cache_threshold <= 1:
            raise ConfigError(f"--cache-threshold must be between 0 and 1, not {self.cache_threshold}")
        if self.max_concurrent_requests == 0:
            raise ConfigError("--max-concurrent-requests must be positive, or -1 for no limit, not 0")
        if not all(" " < letter < "\x7f" for letter in self.key):
            raise ConfigError("--api-key (or DIPTYCH_API_KEY) may hold visible ASCII characters only")
        if not self.health_check_endpoint.startswith("/"):
            raise ConfigError(f"--health-check-endpoint must start with /, not {self.health_check_endpoint}")


_AT_LEAST: dict[str, float] = {
    "port": 0,
    "prometheus_port": -1,
    "balance_abs_threshold": 0,
    "balance_rel_threshold": 1,
    "max_tree_size": 0,
    "request_timeout_secs": 0.001,
    "body_timeout_secs": 0.001,
    "max_concurrent_requests": -1,
    "queue_size": 0,
    "queue_timeout_secs": 0,
    "hold_timeout_secs": 0,
    "hold_size": 0,
    "max_payload_size": 1,
    "retry_max_retries": 0,
    "retry_initial_backoff_ms": 0,
    "retry_max_backoff_ms": 0,
    "retry_backoff_multiplier": 1,
    "retry_jitter_factor": 0,
    "cb_failure_threshold": 1,
    "cb_success_threshold": 1,
    "cb_timeout_duration_secs": 0,
    "cb_window_duration_secs": 0,
    "health_failure_threshold": 1,
    "health_success_threshold": 1,
    "health_check_timeout_secs": 0.001,
    "health_check_interval_secs": 0.001,
    "worker_startup_timeout_secs": 0,
    "worker_startup_check_interval": 0.001,
    "shutdown_delay_secs": 0,
    "shutdown_grace_period_secs": 0,
}


def _flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser() -> _Parser:
    parser = _Parser(
        prog="diptych route", description="Route requests to prefill and decode servers.", allow_abbrev=False
    )
    servers: dict[str, Any] = {"action": "append", "nargs": "+", "default": []}
    parser.add_argument(
        "--prefill",
        metavar="URL [PORT|none]",
        help="prefill servers, each with its bootstrap port; may repeat",
        **servers,
    )
    parser.add_argument("--decode", metavar="URL", help="decode servers; may repeat", **servers)
    parser.add_argument("--worker-urls", metavar="URL", help="servers that do both phases; may repeat", **servers)
    parser.add_argument(
        "--prefill-bootstrap-ports", metavar="PORT", help="one port for all prefill servers, or one each", **servers
    )
    parser.add_argument(
        "--pd-disaggregation",
        action="store_true",
        help="prefill and decode on different servers (--prefill says it too)",
    )
    for item in fields(RouterConfig):
        if item.metadata:
            _add_flag(parser, item.name, item.default, item.metadata)
    return parser


def _add_flag(parser: _Parser, name: str, default: Any, meta: Any) -> None:
    shown = (
        ""
        if default in ("", False, ())
        else f" (default: {' '.join(default) if name.endswith('headers') else default})"
    )
    if isinstance(default, bool):
        parser.add_argument(_flag_name(name), action="store_true", help=meta["help"])
    elif isinstance(default, tuple):
        parser.add_argument(_flag_name(name), nargs="+", default=default, help=meta["help"] + shown)
    else:
        parser.add_argument(
            _flag_name(name), type=type(default), default=default, choices=meta["choices"], help=meta["help"] + shown
        )


def parse_router_args(argv: list[str]) -> RouterConfig:
    """Flags to settings. Raises ConfigError that names an unknown flag or a bad value; `--help` prints and exits 0."""
    known, unknown = _parser().parse_known_args(argv)
    if unknown:
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")] or unknown[:1]
        raise ConfigError(f"unknown flag {', '.join(flags)}; `diptych route --help` lists what is supported")
    given = vars(known)
    pd = given.pop("pd_disaggregation")
    prefill = _addresses("--prefill", given.pop("prefill"), ports=True)
    decode = _addresses("--decode", given.pop("decode"))
    workers = _addresses("--worker-urls", given.pop("worker_urls"))
    prefill = _with_ports(prefill, _numbers("--prefill-bootstrap-ports", given.pop("prefill_bootstrap_ports")))
    _check_servers(pd, prefill, decode, workers)
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    config = RouterConfig(prefill=prefill, decode=decode, workers=workers, **values)
    config.check()
    return config


def _check_servers(pd: bool, prefill: Any, decode: Any, workers: Any) -> None:
    if workers and (pd or prefill or decode):
        raise ConfigError("--worker-urls names servers that do both phases; it cannot go with --prefill and --decode")
    if not workers and not (prefill and decode):
        missing = "--prefill" if decode else "--decode" if prefill else "--prefill and --decode, or --worker-urls,"
        raise ConfigError(f"{missing} must name at least one server, such as http://127.0.0.1:8001")
    for name, servers in (("--prefill", prefill), ("--decode", decode), ("--worker-urls", workers)):
        urls = [server.url for server in servers]
        twice = next((url for url in urls if urls.count(url) > 1), None)
        if twice:
            raise ConfigError(f"{name} names {twice} twice; name each server once")


def _addresses(name: str, groups: list[list[str]], *, ports: bool = False) -> tuple[ServerAddress, ...]:
    """Servers of one flag: URLs separated by spaces or commas, each followed by its bootstrap port if `ports`."""
    found: list[ServerAddress] = []
    has_port = True
    for word in (word for group in groups for text in group for word in text.split(",") if word):
        if "://" in word:
            found.append(_address(name, word))
            has_port = False
        elif ports and not has_port:
            port = None if word.lower() == "none" else _number(name, word)
            found[-1] = ServerAddress(found[-1].host, found[-1].port, port)
            has_port = True
        else:
            raise ConfigError(f"{name}: {word} is no URL; write it as http://host:port")
    return tuple(found)


def _address(name: str, url: str) -> ServerAddress:
    try:
        parts = urlsplit(url)
        port = parts.port or 80
    except ValueError:
        raise ConfigError(f"{name}: {url} is no URL; write it as http://host:port") from None
    if parts.scheme != "http":
        raise ConfigError(f"{name}: {url} must start with http://; other schemes are not supported")
    if not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment or parts.username:
        raise ConfigError(f"{name}: {url} must be http://host:port and nothing more")
    return ServerAddress(parts.hostname, port)


def _numbers(name: str, groups: list[list[str]]) -> list[int | None]:
    words = [word for group in groups for text in group for word in text.split(",") if word]
    return [None if word.lower() == "none" else _number(name, word) for word in words]


def _number(name: str, word: str) -> int:
    if not (word.isascii() and word.isdigit() and 0 < int(word) < 65536):
        raise ConfigError(f"{name}: {word} is no bootstrap port; give a number from 1 to 65535, or none")
    return int(word)


def _with_ports(prefill: tuple[ServerAddress, ...], ports: list[int | None]) -> tuple[ServerAddress, ...]:
    if not ports:
        return prefill
    if any(server.bootstrap_port is not None for server in prefill):
        raise ConfigError("--prefill-bootstrap-ports: the ports are in --prefill already; give them once")
    if len(ports) == 1:
        ports = ports * len(prefill)
    if len(ports) != len(prefill):
        raise ConfigError(
            f"--prefill-bootstrap-ports has {len(ports)} ports for {len(prefill)} servers; give one, or one each"
        )
    return tuple(ServerAddress(s.host, s.port, port) for s, port in zip(prefill, ports, strict=True))
