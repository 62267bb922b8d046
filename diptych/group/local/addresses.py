"""Loopback addresses of pods: 127.77.SLOT.HOST, one slot a group, so that no two groups of this machine collide.

A slot is held by binding an abstract Unix socket: the kernel keeps that per network namespace, exactly as it keeps
loopback addresses, and frees it when the last process that has it is gone. Keepers inherit it, so a slot stays taken
while a pod lives.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable

from diptych.errors import ConfigError

PREFIX = "127.77"
SLOTS = range(1, 255)
HOSTS = range(1, 255)


class Slot:
    """A held /24. Pods count up from .1, Services down from .254; an address stays with its name until `release`."""

    def __init__(self, number: int, hold: socket.socket) -> None:
        self.number = number
        self._hold = hold
        self._by_name: dict[str, int] = {}

    def fileno(self) -> int:
        return self._hold.fileno()

    def pod_address(self, name: str) -> str:
        return self._address(name, HOSTS)

    def service_address(self, name: str) -> str:
        return self._address(f"service/{name}", reversed(HOSTS))

    def _address(self, name: str, order: Iterable[int]) -> str:
        if name not in self._by_name:
            used = set(self._by_name.values())
            free = next((host for host in order if host not in used), None)
            if free is None:
                raise ConfigError(f"a group on one machine has at most {len(HOSTS)} pods and services; scale it down")
            self._by_name[name] = free
        return f"{PREFIX}.{self.number}.{self._by_name[name]}"

    def release(self, name: str) -> None:
        self._by_name.pop(name, None)

    def close(self) -> None:
        self._hold.close()


def claim_slot() -> Slot:
    """The first free slot. Raises ConfigError when all are taken or the addresses cannot be bound (not Linux)."""
    for number in SLOTS:
        hold = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            hold.bind(f"\0diptych/slot/{number}")
        except OSError:
            hold.close()
            continue
        try:
            _check_bindable(f"{PREFIX}.{number}.1")
        except ConfigError:
            hold.close()
            raise
        return Slot(number, hold)
    raise ConfigError(f"all {len(SLOTS)} address slots of this machine are taken; `diptych down` a group")


def _check_bindable(address: str) -> None:
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            raise ConfigError(
                f"cannot bind {address} ({error.strerror}): a local group needs Linux, with 127.0.0.0/8 on loopback"
            ) from None
