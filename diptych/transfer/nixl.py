"""NIXL, an optional package: the decode rank reads pages straight out of the prefill rank's pool, from GPU to GPU or
from memory to memory, over whatever UCX finds between them (RDMA, NVLink, TCP).

Only messages travel over the link, a TCP connection. Each rank has one agent, with which its whole pool is registered
at the start. The agent has no progress thread, which would spin: who reads drives its own, and who is read from drives
its own while pages are out and for a minute after, as UCX needs where the hardware cannot read by itself (over TCP,
say): a read that was given up here may still go on there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from diptych.errors import ConfigError, TransferError
from diptych.kv.store import PlacedStore
from diptych.transfer.tcp import TcpTransport

if TYPE_CHECKING:
    from diptych.kv.extents import Extent
    from diptych.kv.store import Memory, PageStore

log = logging.getLogger(__name__)

_POLL_S, _LATE_POLL_S = 0.0001, 0.005
_LATE_S = 60.0  # for which an agent is driven after the last frame


class NixlTransport(TcpTransport):
    """Raises ConfigError if the package is not installed."""

    scheme = "nixl"

    def __init__(self) -> None:
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
        try:
            from nixl._api import nixl_agent, nixl_agent_config
        except ImportError:
            raise ConfigError(
                "--disaggregation-transfer-backend nixl: the package is not installed; pip install 'diptych[nixl]'"
            ) from None
        self._new_agent = lambda: nixl_agent(os.urandom(12).hex(), nixl_agent_config(enable_prog_thread=False))

    def lending(self, store: PageStore) -> NixlLending:
        """Registers the pool. Raises ConfigError."""
        if not isinstance(store, PlacedStore):
            raise ConfigError("--disaggregation-transfer-backend nixl: this pool is not one piece of memory")
        try:
            return NixlLending(self._new_agent(), store.memory)
        except TransferError as error:
            raise ConfigError(f"--disaggregation-transfer-backend nixl: {error.message}") from None


class _Lent(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What another agent must know of a pool."""

    address: int
    num_bytes: int
    gpu: int | None
    metadata: bytes


class NixlLending:
    """See Lending (diptych/kv/store.py). The agent is used by one thread at a time."""

    def __init__(self, agent: Any, memory: Memory) -> None:
        self.agent, self.memory = agent, memory
        self.turn = threading.Lock()
        self._readers, self._driving, self._until_s = 0, False, 0.0
        self._borrowed: Counter[Any] = Counter()  # pools that are known here, by agent
        with _nixl_errors("register this pool"):
            place = (memory.address, memory.num_bytes, memory.gpu or 0, "")
            self._registered = agent.register_memory([place], _kind(memory.gpu))  # held for the life of the process

    def lend(self) -> bytes:
        with self.turn, _nixl_errors("describe this pool"):
            return msgspec.msgpack.encode(_Lent(*self.memory, self.agent.get_agent_metadata()))

    def borrow(self, handle: bytes, num_bytes: int) -> NixlPool:
        try:
            lent = msgspec.msgpack.decode(handle, type=_Lent)
        except msgspec.MsgspecError:
            raise TransferError("not a pool that NIXL knows") from None
        if num_bytes > lent.num_bytes:
            raise TransferError("the other side's memory is smaller than its pool")
        with self.turn, _nixl_errors("reach the other side's pool"):
            name = self.agent.add_remote_agent(lent.metadata)
            self._borrowed[name] += 1
            return NixlPool(self, lent, name)

    def give_back(self, name: Any) -> None:
        """One pool of that agent is not read any more; two links may have borrowed it. `turn` is held."""
        self._borrowed[name] -= 1
        if not self._borrowed[name]:
            del self._borrowed[name]
            self.agent.remove_remote_agent(name)

    @contextmanager
    def serving(self) -> Iterator[None]:
        with self.turn:
            self._readers += 1
            if not self._driving:
                self._driving = True
                threading.Thread(target=self._drive, name="nixl-progress").start()
        try:
            yield
        finally:
            with self.turn:
                self._readers -= 1
                self._until_s = time.monotonic() + _LATE_S

    def _drive(self) -> None:
        """Until nobody can be reading any more, or the process ends: no thread may be within NIXL then."""
        while threading.main_thread().is_alive():
            with self.turn:
                busy = self._readers > 0
                if not busy and time.monotonic() > self._until_s:
                    self._driving = False
                    return
                try:
                    self.agent.get_new_notifs()
                except Exception as error:  # of one peer that is gone; the others go on reading
                    log.debug("NIXL: %s", error)
            time.sleep(_POLL_S if busy else _LATE_POLL_S)


class NixlPool:
    """A LentPool (diptych/kv/store.py), read through our agent."""

    def __init__(self, ours: NixlLending, lent: _Lent, name: Any) -> None:
        self._ours, self._lent, self._name = ours, lent, name
        self._copying = threading.Lock()
        self._closed = False

    def copy(self, extents: Sequence[Extent]) -> None:
        with self._copying:
            if self._closed:
                raise TransferError("the other side's memory is not known any more")
            with _nixl_errors("read the other side's pool"):
                self._read(extents)

    def _read(self, extents: Sequence[Extent]) -> None:
        agent, memory = self._ours.agent, self._ours.memory
        here, there = [], []
        for extent in extents:
            for row in range(extent.rows):
                to, source = extent.to + row * extent.to_pitch, extent.source + row * extent.source_pitch
                here.append((memory.address + to, extent.width, memory.gpu or 0))
                there.append((self._lent.address + source, extent.width, self._lent.gpu or 0))
        with self._ours.turn:
            local = agent.get_xfer_descs(here, _kind(memory.gpu))
            remote = agent.get_xfer_descs(there, _kind(self._lent.gpu))
            reading = agent.initialize_xfer("READ", local, remote, self._name)
            state = agent.transfer(reading)
        try:
            while state == "PROC":
                time.sleep(_POLL_S)
                with self._ours.turn:
                    state = agent.check_xfer_state(reading)
        finally:
            with self._ours.turn:
                reading.release()
        if state != "DONE":
            raise TransferError(f"NIXL could not read the other side's pool ({state})")

    def close(self) -> None:
        with self._copying:
            if self._closed:
                return
            self._closed = True
            with self._ours.turn, _nixl_errors("forget the other side's pool"):
                self._ours.give_back(self._name)


def _kind(gpu: int | None) -> str:
    return "DRAM" if gpu is None else "VRAM"


@contextmanager
def _nixl_errors(what: str) -> Iterator[None]:
    """NIXL's errors have no common root."""
    try:
        yield
    except TransferError:
        raise
    except Exception as error:
        raise TransferError(f"NIXL could not {what} ({type(error).__name__})") from error
