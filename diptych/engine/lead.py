"""Rank 0 of an engine: puts scheduler, loop, ranks and hand-over together, and serves."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from random import SystemRandom
from secrets import token_hex
from typing import Any

import msgspec
import psutil

from diptych import mounts
from diptych.config import ServerConfig
from diptych.engine.channel import Channel
from diptych.engine.handover import Site, attach_decode, attach_prefill
from diptych.engine.load import Spec, load_faults, make_plane
from diptych.engine.loop import Engine
from diptych.engine.ranks import Ranks
from diptych.engine.roles.unified import UnifiedRole
from diptych.errors import DiptychError
from diptych.model.runner import Runner
from diptych.sched.state import SchedConfig, new_state
from diptych.text.grammar import GrammarCompiler
from diptych.transfer.bootstrap import Registration, fetch_route, register
from diptych.transfer.commands import AnyEvent
from diptych.transfer.receive_hub import ReceiveHub
from diptych.transfer.room import HubOptions
from diptych.transfer.send_hub import SendHub
from diptych.transfer.tcp import TcpTransport
from diptych.types import Failed, Outputs, Ready, ToEngine

log = logging.getLogger(__name__)

PULSE_S = 1.0
REGISTER_TIMEOUT_S = 10.0
LOAD_TIMEOUT_S = 1800.0  # the followers' weights come from the same store as ours


async def lead(spec: Spec, runner: Runner, load_s: float) -> None:
    """Serve until the API process or another rank is gone. `load_s`: how long loading took."""
    config = spec.config
    ended = asyncio.Event()
    channel: Channel = Channel(ToEngine, lambda message: engine.deliver(message), ended.set)
    hub: SendHub | ReceiveHub | None = None
    lost: list[int] = []

    def on_event(rank: int, event: AnyEvent) -> None:
        assert hub is not None
        hub.handle_event(rank, event)

    def on_death(rank: int) -> None:
        lost.append(rank)
        ended.set()

    faults = load_faults(spec)
    ranks = Ranks(runner, on_event, on_death, overlap=not config.disable_overlap_schedule)
    ranks.plane = make_plane(spec, runner, partial(on_event, 0), faults)
    engine = Engine(
        new_state(sched_config(config, runner), runner.num_pages),
        ranks,
        channel.send,
        grammars=grammar_compiler(config, runner),
        watchdog_s=config.watchdog_timeout,
        disturb=faults.disturb if faults else None,
    )
    engine.console.facts = {"exact": runner.exact, "fingerprint": runner.info.fingerprint}

    await ranks.connect(spec.follower_fds, LOAD_TIMEOUT_S)
    if ranks.plane is not None:
        ranks.addresses.insert(0, await ranks.plane.start(config.host))
    hub = await attach_role(spec, runner, engine, ranks)
    engine.console.census = partial(census, ranks, hub)
    await channel.open(spec.leader_fd)
    pool_tokens = runner.num_pages * config.page_size
    channel.send(Ready(runner.info, pool_tokens, config.of_device, load_s))
    log.info("ready: %d tokens of KV cache, %s", pool_tokens, runner.info.architecture)

    loop_task = asyncio.create_task(engine.run())
    pulse_task = asyncio.create_task(pulse(channel))
    end_task = asyncio.create_task(ended.wait())
    done, _ = await asyncio.wait({loop_task, end_task}, return_when=asyncio.FIRST_COMPLETED)
    engine.stop()
    if lost:
        channel.send(Failed(f"engine rank {lost[0]} died"))
    elif loop_task in done and loop_task.exception() is not None:
        channel.send(Failed(f"the engine stopped: {loop_task.exception()}"))
    if hub is not None:
        await hub.close()
    if ranks.plane is not None:
        await ranks.plane.close()
    ranks.close()
    end_task.cancel()
    pulse_task.cancel()
    if loop_task in done:
        loop_task.result()
    if lost:
        raise DiptychError(f"engine rank {lost[0]} died")


def sched_config(config: ServerConfig, runner: Runner) -> SchedConfig:
    return SchedConfig(
        max_running=config.max_running_requests,
        max_queued=config.max_queued_requests,
        chunk_tokens=config.chunked_prefill_size,
        policy=config.schedule_policy,
        context_len=runner.info.context_len,
        page_size=config.page_size,
        radix=not config.disable_radix_cache
        and (config.disaggregation_mode != "decode" or config.disaggregation_decode_enable_radix_cache),
        reserved_decode_tokens=config.num_reserved_decode_tokens,
        eos_token_ids=runner.info.eos_token_ids,
    )


def grammar_compiler(config: ServerConfig, runner: Runner) -> GrammarCompiler | None:
    """None on a server without grammars."""
    if config.grammar_backend == "none":
        return None
    tokenizer = mounts.resolve(config.tokenizer_path or config.model_path)
    return GrammarCompiler(tokenizer, runner.info.vocab_size, runner.info.eos_token_ids)


async def attach_role(spec: Spec, runner: Runner, engine: Engine, ranks: Ranks) -> SendHub | ReceiveHub | None:
    """Give the engine its role, and start the hand-over's control plane."""
    config, plane = spec.config, ranks.plane
    if plane is None:
        UnifiedRole(engine.requests)
        return None
    site = Site(
        info=runner.info,
        layout=runner.store.layout,
        page_size=config.page_size,
        addresses=ranks.addresses,
        pp_size=config.pp_size,
        broadcast=ranks.broadcast,
        counters=ranks.counters,
        transport=TcpTransport(),
        options=HubOptions(
            secret=config.pd_secret,
            bootstrap_timeout_s=config.disaggregation_bootstrap_timeout,
            heartbeat_timeout_s=config.disaggregation_heartbeat_timeout,
        ),
        boot_id=token_hex(16),
        rng=SystemRandom(),
    )
    fake = config.disaggregation_transfer_backend == "fake"
    if config.disaggregation_mode == "decode":
        return attach_decode(engine, site, fetch_route, fake=fake)

    async def announce(registration: Registration) -> None:
        await register(spec.bootstrap_host, spec.bootstrap_port, registration, spec.bootstrap_key, REGISTER_TIMEOUT_S)

    return await attach_prefill(engine, site, config.host, config.port, announce, fake=fake)


async def pulse(channel: Channel) -> None:
    """Let the API process know that this one is alive, whatever the compute thread does."""
    while True:
        channel.send(Outputs([]))
        await asyncio.sleep(PULSE_S)


def census(ranks: Ranks, hub: SendHub | ReceiveHub | None) -> dict[str, Any]:
    """What this process holds besides pages: for leak hunts."""
    process = psutil.Process()
    held: dict[str, Any] = {"rooms": 0, "transfers": 0}
    if hub is not None and ranks.plane is not None:
        held = {
            "rooms": hub.snapshot()["rooms"],
            "transfers": ranks.plane.snapshot()["rooms"],
            "counters": msgspec.to_builtins(ranks.counters()),
        }
    engine = {
        "num_fds": process.num_fds(),
        "num_tasks": len(asyncio.all_tasks()),
        "rss_bytes": process.memory_info().rss,
    }
    return {**held, "engine": engine}
