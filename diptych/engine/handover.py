"""Gives an engine its role: puts the hand-over's parts together, for the worker process and for simulations alike."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import msgspec

from diptych.engine.loop import Engine
from diptych.engine.roles.decode import DecodeRole
from diptych.engine.roles.prefill import PrefillRole
from diptych.transfer.bootstrap import Registration
from diptych.transfer.commands import AnyCommand
from diptych.transfer.incoming import Counters
from diptych.transfer.link import Transport
from diptych.transfer.receive_hub import FetchRoute, ReceiveHub
from diptych.transfer.room import HubOptions
from diptych.transfer.send_hub import SendHub
from diptych.transfer.wire import Terms
from diptych.types import ModelInfo

Announce = Callable[[Registration], Awaitable[None]]


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """Where and what this server is, in a hand-over.

    `broadcast` hands a command to every rank's data plane; `addresses` are where each rank receives, stage by stage
    (`pp_size` of them); `counters` are all ranks'.
    """

    info: ModelInfo
    layout: str
    page_size: int
    addresses: list[list[str]]
    pp_size: int = 1
    broadcast: Callable[[AnyCommand], None]
    counters: Callable[[], Counters]
    transport: Transport  # of the control links
    options: HubOptions
    boot_id: str
    rng: random.Random

    @property
    def terms(self) -> Terms:
        return Terms(self.layout, self.info.fingerprint, self.page_size, self.info.num_kv_heads, self.info.num_layers)


def attach_decode(engine: Engine, site: Site, fetch_route: FetchRoute, *, fake: bool = False) -> ReceiveHub:
    """Make `engine` a decode server. `fake`: every request is received from nobody."""
    hub = ReceiveHub(
        site.terms,
        site.addresses,
        site.broadcast,
        lambda room: engine.wake.set(),
        boot_id=site.boot_id,
        vocab_size=site.info.vocab_size,
        pp_size=site.pp_size,
        transport=site.transport,
        fetch_route=fetch_route,
        options=site.options,
        fake=fake,
        rng=site.rng,
    )
    DecodeRole(engine.requests, hub, site.counters)
    return hub


async def attach_prefill(
    engine: Engine, site: Site, host: str, http_port: int, announce: Announce, *, fake: bool = False
) -> SendHub:
    """Make `engine` a prefill server: listen for decode servers on `host`, and announce all ranks.

    `fake`: every request is handed to nobody.
    """
    hub = SendHub(
        site.terms,
        len(site.addresses),
        site.broadcast,
        lambda room: engine.wake.set(),
        boot_id=site.boot_id,
        options=site.options,
        fake=fake,
        rng=site.rng,
    )
    PrefillRole(engine.requests, hub, site.counters)
    address = await hub.start(site.transport, host)
    ip, _, port = address.rpartition("://")[2].rpartition(":")
    tp_size = len(site.addresses) // site.pp_size
    for rank in range(len(site.addresses)):
        await announce(
            Registration(
                attn_tp_size=tp_size,
                attn_tp_rank=rank % tp_size,
                pp_size=site.pp_size,
                pp_rank=rank // tp_size,
                rank_ip=ip.strip("[]"),  # decode reaches all ranks through rank 0
                rank_port=int(port) if port.isdigit() else 0,
                page_size=site.page_size,
                kv_cache_dtype=site.info.kv_dtype,
                kv_layout=site.layout,
                prefill_http_port=http_port,
                control_address=address,
                boot_id=site.boot_id,
                fingerprint=site.info.fingerprint,
            )
        )
    return hub
