"""What every rank has before it serves: what it was told, a GPU of its own, its part of the model, its data plane."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import psutil
import torch

from diptych.config import ServerConfig
from diptych.errors import ConfigError
from diptych.kv.share import Grid
from diptych.model import parallel
from diptych.model.runner import Runner, device_of
from diptych.transfer.commands import AnyEvent
from diptych.transfer.plane import DataPlane
from diptych.transfer.transports import data_transports

if TYPE_CHECKING:
    from diptych.testing.faults import Faults

log = logging.getLogger(__name__)

TRANSFER_THREADS = 2  # one gathers and sums the next frame while the other does the last one


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


def tell_progress(rank: int, started: float, what: str) -> None:
    """Log what the start is at, and how long after the process began (`started`, seconds since the epoch)."""
    log.info("rank %d, %.1f s: %s", rank, time.time() - started, what)


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


def load_faults(spec: Spec) -> Faults | None:
    """What tests want to go wrong here. Only a server started with the variable loads that code."""
    if "DIPTYCH_TEST_FAULTS" not in os.environ:
        return None
    from diptych.testing.faults import Faults

    return Faults.from_environment(spec.rank)
