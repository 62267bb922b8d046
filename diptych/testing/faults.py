"""Faults in a real server, for tests: an engine worker loads this only when DIPTYCH_TEST_FAULTS is set.

The variable holds a FaultPlan as JSON, such as `{"fail_transfers": 0.05, "seed": 1}`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
from collections.abc import Callable

import msgspec
from msgspec.structs import replace

from diptych.errors import ConfigError, TransferError
from diptych.sched.queue import retract
from diptych.sched.state import SchedState
from diptych.transfer import wire
from diptych.transfer.commands import AnyEvent, Sent, TransferFailed
from diptych.transfer.link import Link, Listener, Transport

VARIABLE = "DIPTYCH_TEST_FAULTS"
LIES = ("an old room", "an old epoch", "an old generation")
NO_TOKEN = 1 << 30  # no vocabulary has it: to raise its logit raises IndexError, and so does to look it up


class FaultPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What goes wrong. Shares are probabilities from 0 to 1, each drawn from a sequence of its own, which follows from
    `seed`, the rank and the field's name: the third room to be sent fails or not, however many frames there were.
    """

    seed: int = 0
    fail_transfers: float = 0.0  # rooms that fail on the sending side when all their pages have left
    corrupt_frames: float = 0.0  # data frames with one flipped bit
    stale_frames: float = 0.0  # data frames that the pages of the room before precede once more
    frame_delay_s: float = 0.0  # wait before each data frame: keeps a transfer under way
    retract_every: int = 0  # steps after which all that runs loses its pages; 0: never
    poison_token: int = -1  # a step that samples after a prompt which has it fails, when all its KV is stored
    senseless_token: int = -1  # a forward pass over it fails, but for tensor parallelism, where no rank has all tokens
    deadly_token: int = -1  # the process is killed when it has a request whose prompt has it


class Faults:
    """One rank's."""

    def __init__(self, plan: FaultPlan, rank: int) -> None:
        self.plan = plan
        self.rngs = {name: random.Random(f"{plan.seed} {rank} {name}") for name in plan.__struct_fields__}
        self._retracted_at = 0

    @classmethod
    def from_environment(cls, rank: int) -> Faults:
        """Raises ConfigError if the variable holds no FaultPlan."""
        try:
            return cls(msgspec.json.decode(os.environ[VARIABLE], type=FaultPlan), rank)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{VARIABLE}: {error}") from None

    def strikes(self, name: str) -> bool:
        """Does the fault `name` happen this time?"""
        return self.rngs[name].random() < getattr(self.plan, name)

    def transports(self, transports: list[Transport]) -> list[Transport]:
        """The same transports; links opened through them corrupt and delay what they send."""
        return [FaultyTransport(transport, self) for transport in transports]

    def events(self, on_event: Callable[[AnyEvent], None]) -> Callable[[AnyEvent], None]:
        """A listener for the data plane that hears of failures where there were none."""

        def hear(event: AnyEvent) -> None:
            if isinstance(event, Sent) and self.strikes("fail_transfers"):
                event = TransferFailed(event.room, event.epoch, "injected failure of a transfer", TransferError.code)
            on_event(event)

        return hear

    def disturb(self, state: SchedState, now: float) -> None:
        """Before a step: spoil what is to be computed, and take memory away."""
        for seq in state.seqs.values():
            if self.plan.deadly_token in seq.request.prompt:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.plan.senseless_token in seq.tokens:
                seq.tokens[seq.tokens.index(self.plan.senseless_token)] = NO_TOKEN
            if self.plan.poison_token in seq.request.prompt:
                seq.request = replace(seq.request, sampling=replace(seq.request.sampling, logit_bias={NO_TOKEN: 1.0}))
        self._retract(state, now)

    def _retract(self, state: SchedState, now: float) -> None:
        """Everything, youngest first, as memory pressure would."""
        every = self.plan.retract_every
        if every and state.step - self._retracted_at >= every and state.running:
            self._retracted_at = state.step
            for seq in reversed(list(state.running)):
                retract(state, seq, now)


class FaultyTransport:
    """`inner`, with faults on the links that this side opens."""

    def __init__(self, inner: Transport, faults: Faults) -> None:
        self.scheme, self.lending = inner.scheme, inner.lending
        self._inner = inner
        self._faults = faults

    async def listen(self, host: str, on_link: Callable[[Link], None]) -> Listener:
        return await self._inner.listen(host, on_link)

    async def connect(self, address: str, timeout_s: float) -> Link:
        return FaultyLink(await self._inner.connect(address, timeout_s), self._faults)


class FaultyLink:
    """`inner`, with faults in messages that carry a payload: handshakes carry none."""

    def __init__(self, inner: Link, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults
        self._turn = asyncio.Lock()  # sends of several tasks keep their order
        self._before: tuple[wire.Frame, bytes] | None = None  # the last data frame
        self._lies = itertools.cycle(LIES)
        self.recv = inner.recv
        self.close = inner.close

    @property
    def max_header_bytes(self) -> int:
        return self._inner.max_header_bytes

    @max_header_bytes.setter
    def max_header_bytes(self, value: int) -> None:
        self._inner.max_header_bytes = value

    @property
    def max_payload_bytes(self) -> int:
        return self._inner.max_payload_bytes

    @max_payload_bytes.setter
    def max_payload_bytes(self, value: int) -> None:
        self._inner.max_payload_bytes = value

    async def send(self, header: bytes, payload: memoryview | None = None) -> None:
        async with self._turn:
            if payload is not None and len(payload):
                if self._faults.plan.frame_delay_s:
                    await asyncio.sleep(self._faults.plan.frame_delay_s)
                if self._faults.plan.stale_frames:
                    await self._send_stale(wire.unpack_frame(header), bytes(payload))
                if self._faults.strikes("corrupt_frames"):
                    payload = _flip(payload, self._faults.rngs["corrupt_frames"])
            await self._inner.send(header, payload)

    async def _send_stale(self, frame: wire.Frame, payload: bytes) -> None:
        """The pages of the frame before, as late as this one and for its pages, by one of LIES in turn."""
        if self._before is not None and self._before[0].room != frame.room and self._faults.strikes("stale_frames"):
            old, old_payload = self._before
            stale = {
                "an old room": old,
                "an old epoch": replace(frame, epoch=old.epoch),
                "an old generation": replace(frame, generations=[number - 1 for number in frame.generations]),
            }[next(self._lies)]
            stale = replace(stale, payload_crc=wire.crc(memoryview(old_payload)))
            await self._inner.send(wire.pack_frame(stale), memoryview(old_payload))
        self._before = frame, payload


def _flip(payload: memoryview, rng: random.Random) -> memoryview:
    """A copy with one bit changed."""
    changed = bytearray(payload)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return memoryview(changed)
