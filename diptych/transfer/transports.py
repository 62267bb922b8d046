"""Which transports a server uses, from --disaggregation-transfer-backend."""

from __future__ import annotations

from diptych.errors import ConfigError
from diptych.transfer.cuda import CudaTransport
from diptych.transfer.link import Transport
from diptych.transfer.shm import ShmTransport
from diptych.transfer.tcp import TcpTransport


def data_transports(backend: str, device: str = "cpu") -> list[Transport]:
    """For pages of a pool on `device` ("cpu" or "cuda"), in order of preference. A prefill rank takes the first that
    reaches the decode rank.

    `auto`: from GPU to GPU where one kernel runs both servers, else shared memory there, else TCP. `fake` moves no
    pages. Raises ConfigError.
    """
    match backend:
        case "auto":
            between: list[Transport] = [ShmTransport(), TcpTransport()]
            return [CudaTransport(), *between] if device == "cuda" else between
        case "cuda":
            if device != "cuda":
                raise ConfigError("--disaggregation-transfer-backend cuda: this server has no GPU; choose auto")
            return [CudaTransport()]
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
