"""Which transports a server uses, from --disaggregation-transfer-backend."""

from __future__ import annotations

from diptych.errors import ConfigError
from diptych.transfer.link import Transport
from diptych.transfer.shm import ShmTransport
from diptych.transfer.tcp import TcpTransport


def data_transports(backend: str) -> list[Transport]:
    """For pages, in order of preference. A prefill rank takes the first that reaches the decode rank.

    `auto`: shared memory where one kernel runs both, else TCP. `fake` moves no pages. Raises ConfigError.
    """
    match backend:
        case "auto":
            return [ShmTransport(), TcpTransport()]
        case "shm":
            return [ShmTransport()]
        case "tcp":
            return [TcpTransport()]
        case "nixl":
            from diptych.transfer.nixl import NixlTransport  # the optional package is imported only when asked for

            return [NixlTransport()]
        case "fake":
            return []
        case _:
            raise ConfigError(f"--disaggregation-transfer-backend: {backend} is not known")
