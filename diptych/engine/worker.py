"""An engine process: `python -m diptych.engine.worker`, one a rank, its Spec on standard input.

Rank 0 talks to the API process, plans, and leads the other ranks; they run what they are told. A worker ends when the
channel to its leader closes, so none outlives its server.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import SystemRandom
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import msgspec
import psutil
import torch
import uvloop

from diptych import mounts
from diptych.config import ServerConfig
from diptych.engine.channel import Channel
from diptych.engine.handover import Site, attach_decode, attach_prefill
from diptych.engine.loop import Engine
from diptych.engine.ranks import Follower, PagesMoved, RankReady, Ranks, ToRank
from diptych.engine.roles.unified import UnifiedRole
from diptych.errors import ConfigError, DiptychError
from diptych.kv.share import Grid
from diptych.model import parallel
from diptych.model.runner import Runner, device_of
from diptych.obs import logs
from diptych.sched.state import SchedConfig, new_state
from diptych.text.grammar import GrammarCompiler
from diptych.transfer.bootstrap import Registration, fetch_route, register
from diptych.transfer.commands import AnyCommand, AnyEvent
from diptych.transfer.plane import DataPlane
from diptych.transfer.receive_hub import ReceiveHub
from diptych.transfer.room import HubOptions
from diptych.transfer.send_hub import SendHub
from diptych.transfer.tcp import TcpTransport
from diptych.transfer.transports import data_transports
from diptych.types import Failed, FromEngine, Outputs, Ready, ToEngine

if TYPE_CHECKING:
    from diptych.testing.faults import Faults

log = logging.getLogger(__name__)

TRANSFER_THREADS = 2  # one gathers and sums the next frame while the other does the last one
PULSE_S = 1.0
REGISTER_TIMEOUT_S = 10.0
LAST_WORDS_S = 5.0  # of rank 0, while the others wait to end
LOAD_TIMEOUT_S = 1800.0  # the followers' weights come from the same store as ours


class Spec(msgspec.Struct):
    """What a worker is told at its start. File descriptors are inherited socket ends."""

    config: ServerConfig
    rank: int
    store_path: str  # file store of the rank group
    leader_fd: int  # to the API process (rank 0) or to rank 0
    follower_fds: list[int] = []  # rank 0 only: to ranks 1…
    bootstrap_host: str = ""  # prefill, rank 0: where to register
    bootstrap_port: int = 0
    bootstrap_key: str = ""


def take_gpu(spec: Spec) -> None:
    """Leave this rank one GPU of those that its server may use: CUDA_VISIBLE_DEVICES, or else all there are.

    It is number --base-gpu-id + rank. Before CUDA starts, which reads the variable once. Does nothing without GPUs.
    Raises ConfigError, on every rank, if there are too few for all.
    """
    config = spec.config
    if config.device == "cpu":
        return
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:  # a container has no list; asked is the management library, which does not start CUDA
        gpus = [str(gpu) for gpu in range(torch.cuda.device_count())]
    else:
        gpus = [gpu for gpu in listed.split(",") if gpu]
    if not gpus:
        return
    if config.base_gpu_id + config.num_ranks > len(gpus):
        raise ConfigError(
            f"{config.num_ranks} GPUs from --base-gpu-id {config.base_gpu_id} on are needed, one for each rank of --tp "
            f"and --pp-size; this machine, or CUDA_VISIBLE_DEVICES, has {len(gpus)}"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[config.base_gpu_id + spec.rank]


def load(spec: Spec) -> Runner:
    """Join the other ranks and load this rank's part of the model. What this machine lacks is said before that."""
    progress = partial(tell_progress, spec.rank, psutil.Process().create_time())
    progress("libraries are imported")
    take_gpu(spec)
    device = device_of(spec.config)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch finds no GPU here that it can use; choose --device cpu, or see its driver"
        )
    config = spec.config = spec.config.on_device(device)
    if config.disaggregation_mode != "null":
        data_transports(config.disaggregation_transfer_backend, device_of(config))
    torch.set_num_threads(config.cpu_threads)
    place = None
    if config.num_ranks > 1:
        meet = f"file://{spec.store_path}"
        place = parallel.init(spec.rank, config.tp_size, config.pp_size, meet, device)
        progress("the ranks have met")
    return Runner(config, place, progress)


def tell_progress(rank: int, started: float, what: str) -> None:
    """Log what the start is at, and how long after the process began (`started`, seconds since the epoch)."""
    log.info("rank %d, %.1f s: %s", rank, time.time() - started, what)


def load_faults(spec: Spec) -> Faults | None:
    """What tests want to go wrong here. Only a server started with the variable loads that code."""
    if "DIPTYCH_TEST_FAULTS" not in os.environ:
        return None
    from diptych.testing.faults import Faults

    return Faults.from_environment(spec.rank)


async def follow(spec: Spec, runner: Runner) -> None:
    """Ranks 1…: run plans and move pages as rank 0 says, until it is gone."""
    gone = asyncio.Event()

    def move(command: AnyCommand) -> None:
        assert plane is not None
        plane.execute(command)

    follower = Follower(runner, move)
    channel = Channel(ToRank, follower.hear, gone.set)
    plane = make_plane(spec, runner, lambda event: channel.send(PagesMoved(event)), load_faults(spec))
    addresses = await plane.start(spec.config.host) if plane else []
    await channel.open(spec.leader_fd)
    channel.send(RankReady(addresses))
    obeying, leaderless = asyncio.create_task(follower.obey()), asyncio.create_task(gone.wait())
    await asyncio.wait({obeying, leaderless}, return_when=asyncio.FIRST_COMPLETED)
    if plane:
        await plane.close()
    follower.close()
    leaderless.cancel()
    if obeying.done():
        obeying.result()
    obeying.cancel()


def make_plane(
    spec: Spec, runner: Runner, on_event: Callable[[AnyEvent], None], faults: Faults | None
) -> DataPlane | None:
    """This rank's data plane, or None on a server that hands nothing over."""
    if spec.config.disaggregation_mode == "null":
        return None
    transports = data_transports(spec.config.disaggregation_transfer_backend, device_of(spec.config))
    if faults is not None:
        transports, on_event = faults.transports(transports), faults.events(on_event)
    return DataPlane(
        runner.store,
        transports,
        spec.rank,
        Grid(runner.info.num_kv_heads, runner.info.num_layers, spec.config.tp_size, spec.config.pp_size),
        on_event,
        secret=spec.config.pd_secret,
        executor=ThreadPoolExecutor(TRANSFER_THREADS, thread_name_prefix="transfer"),
        send_timeout_s=spec.config.disaggregation_heartbeat_timeout,
    )


async def lead(spec: Spec, runner: Runner, load_s: float) -> None:
    """Rank 0: the engine loop."""
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
    state = new_state(
        SchedConfig(
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
        ),
        runner.num_pages,
    )
    grammars = None
    if config.grammar_backend != "none":
        tokenizer = mounts.resolve(config.tokenizer_path or config.model_path)
        grammars = GrammarCompiler(tokenizer, runner.info.vocab_size, runner.info.eos_token_ids)
    engine = Engine(
        state,
        ranks,
        channel.send,
        grammars=grammars,
        watchdog_s=config.watchdog_timeout,
        disturb=faults.disturb if faults else None,
    )
    engine.facts = {"exact": runner.exact, "fingerprint": runner.info.fingerprint}

    await ranks.connect(spec.follower_fds, LOAD_TIMEOUT_S)
    if ranks.plane is not None:
        ranks.addresses.insert(0, await ranks.plane.start(config.host))
    hub = await attach_role(spec, runner, engine, ranks)
    engine.census = partial(census, ranks, hub)
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
            "counters": msgspec.to_builtins(ranks.plane.counters),
        }
    engine = {
        "num_fds": process.num_fds(),
        "num_tasks": len(asyncio.all_tasks()),
        "rss_bytes": process.memory_info().rss,
    }
    return {**held, "engine": engine}


async def attach_role(spec: Spec, runner: Runner, engine: Engine, ranks: Ranks) -> SendHub | ReceiveHub | None:
    """Give the engine its role, and start the hand-over's control plane."""
    config, plane = spec.config, ranks.plane
    if plane is None:
        UnifiedRole(engine)
        return None
    site = Site(
        info=runner.info,
        layout=runner.store.layout,
        page_size=config.page_size,
        addresses=ranks.addresses,
        pp_size=config.pp_size,
        broadcast=ranks.broadcast,
        counters=plane.counters,
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


def main() -> None:
    """Entry point. Exits 0 when the leader went away, 1 after an error (which it has logged and reported)."""
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=Spec)
    # The server process decides when its engines end: signals to the process group (Ctrl-C) are not for them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logs.set_up(spec.config.log_level, f"engine{spec.rank}" if spec.config.num_ranks > 1 else "engine")
    try:
        code = run(spec)
    except Exception:
        log.exception("the engine failed")
        code = 1
    logging.shutdown()
    os._exit(code)  # nothing is left to save, and taking torch apart costs a second of CPU


def run(spec: Spec) -> int:
    """Load and serve. Returns the exit status."""
    started = time.monotonic()
    try:
        runner = load(spec)
    except DiptychError as error:
        report_failure(spec, error.message)
        return 1
    load_s = time.monotonic() - started
    gc.collect()
    gc.freeze()  # what is there now stays; looking at it takes a tenth of a second each time
    try:
        uvloop.run(lead(spec, runner, load_s) if spec.rank == 0 else follow(spec, runner))
    except DiptychError as error:
        log.error("%s", error.message)
        return 1
    return 0


def report_failure(spec: Spec, message: str) -> None:
    """Tell the API process why this engine does not start (rank 0); it shows the reason.

    The API process takes the first end of a process for the reason, and hears it from rank 0 alone. What fails here
    most often fails there too, so the other ranks let rank 0 end first; only if it does not, their log has the reason.
    """

    async def tell() -> None:
        channel: Channel = Channel(ToEngine, lambda _: None, lambda: None)
        await channel.open(spec.leader_fd)
        reply: FromEngine = Failed(message)
        channel.send(reply)
        channel.close()
        await asyncio.sleep(0)

    if spec.rank == 0:
        asyncio.run(tell())
    elif not select.select([spec.leader_fd], [], [], LAST_WORDS_S)[0]:
        log.error("%s", message)


if __name__ == "__main__":
    main()
