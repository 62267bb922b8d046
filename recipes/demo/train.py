"""Train the demo model: `python -m recipes.demo.train --out /tmp/demo`.

The schedule runs on the clock: the learning rate reaches zero when the minutes are over. Worker processes make the rows.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import queue
import random
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from recipes.demo.chat import MODEL_DIR
from recipes.demo.data import LENGTHS, Microbatch, Rows
from recipes.demo.model import DemoModel
from recipes.demo.muon import Muon

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SHORT = {64: 0.3, 128: 0.2, 256: 0.25, 512: 0.25}
LONG = {1024: 0.4, 2048: 0.25, 4352: 0.35}
OPENS = {1024: 0.06, 2048: 0.14, 4352: 0.22}  # the share of the time after which rows of a length come in
POOL = 300  # microbatches kept of each length, to be seen again when no fresh one is there


def produce(seed: int, out: multiprocessing.Queue) -> None:
    """A worker: microbatches into `out`, for ever."""
    for batch in Rows(seed):
        out.put(batch)


class Feed:
    """Microbatches by length: fresh ones first, else one seen before."""

    def __init__(self, workers: int, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.source: multiprocessing.Queue = context.Queue(maxsize=4 * workers)
        self.processes = [
            context.Process(target=produce, args=(seed * 1000 + n, self.source), daemon=True) for n in range(workers)
        ]
        for process in self.processes:
            process.start()
        self.fresh: dict[int, queue.SimpleQueue[Microbatch]] = {length: queue.SimpleQueue() for length in LENGTHS}
        self.seen: dict[int, list[Microbatch]] = {length: [] for length in LENGTHS}
        self.rng = random.Random(seed)
        self.num_fresh = self.num_again = 0
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        while True:
            batch = self.source.get()
            waiting = self.fresh[batch.ids.shape[1]]
            if waiting.qsize() < POOL:
                waiting.put(batch)

    def take(self, length: int) -> Microbatch:
        """A microbatch of rows of `length`; waits (a minute at most) only for the very first."""
        seen, fresh = self.seen[length], self.fresh[length]
        if seen and fresh.empty():
            self.num_again += 1
            return self.rng.choice(seen)
        batch = fresh.get(timeout=60)
        self.num_fresh += 1
        if len(seen) < POOL:
            seen.append(batch)
        else:
            seen[self.rng.randrange(POOL)] = batch
        return batch

    def close(self) -> None:
        for process in self.processes:
            process.terminate()


def lengths(rng: random.Random, progress: float) -> tuple[int, int]:
    """The row lengths of a step's two microbatches: a short one and, once they are open, a long one."""
    first = rng.choices(list(SHORT), list(SHORT.values()))[0]
    table = {length: share for length, share in LONG.items() if progress >= OPENS[length]} or SHORT
    return first, rng.choices(list(table), list(table.values()))[0]


def rate(progress: float) -> float:
    """The learning rate as a share of its peak: a short warm-up, a plateau, a cosine to zero."""
    if progress < 0.01:
        return max(0.05, progress / 0.01)
    if progress < 0.35:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.35) / 0.65)))


def train(model: DemoModel, feed: Feed, device: torch.device, args: argparse.Namespace) -> None:
    """Run until the minutes are over; prints a line every few seconds."""
    flat = [p for p in model.parameters() if p.ndim == 1]
    embedding = model.weight("model.embed_tokens.weight")
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(
        [embedding, *flat], lr=args.adam_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda"
    )
    rng = random.Random(args.seed)
    start = last = time.monotonic()
    step, losses = 0, dict.fromkeys(LENGTHS, 0.0)
    recent: list[tuple[int, torch.Tensor]] = []
    while (progress := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        for length in lengths(rng, progress + args.skip):
            batch = feed.take(length)
            ids = torch.from_numpy(batch.ids.astype(np.int64)).to(device, non_blocking=True)
            weights = torch.from_numpy(batch.weights.astype(np.float32)).to(device, non_blocking=True)
            loss = model(ids, weights)
            (loss / 2).backward()
            recent.append((length, loss.detach()))
        share = rate(progress)
        torch.nn.utils.clip_grad_norm_([embedding, *flat], 1.0)
        for group in adam.param_groups:
            group["lr"] = args.adam_rate * share
        adam.step()
        adam.zero_grad(set_to_none=True)
        muon.step(args.rate * share)
        step += 1
        if step % 20 == 0:
            for length, value in recent:
                losses[length] = value.item()
            recent.clear()
        if step == 1:
            start = time.monotonic() if args.compile else start  # compiling is not training
        if time.monotonic() - last > args.report:
            last = time.monotonic()
            shown = " ".join(f"{length}:{value:.3f}" for length, value in losses.items())
            print(
                f"{last - start:6.1f}s step {step} rate {share:.3f} fresh {feed.num_fresh} again {feed.num_again} loss {shown}",
                flush=True,
            )
    print(f"{step} steps in {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=18.0, help="time to train, after compiling")
    parser.add_argument("--init", type=Path, help="a model.safetensors to go on from")
    parser.add_argument(
        "--skip", type=float, default=0.0, help="start the growth of row lengths at this share of the time"
    )
    parser.add_argument("--rate", type=float, default=0.02, help="peak learning rate of Muon")
    parser.add_argument(
        "--adam-rate", type=float, default=0.003, help="peak learning rate of the embedding and the norms"
    )
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=float, default=10.0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    args = parser.parse_args()
    feed = Feed(args.workers, args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = DemoModel(MODEL_DIR / "config.json", compute, args.compile).to(device)
    if args.init:
        model.load(load_file(args.init))
    train(model, feed, device, args)
    feed.close()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if args.out.resolve() != MODEL_DIR:
            shutil.copy(MODEL_DIR / name, args.out / name)
    save_file(model.export(), args.out / "model.safetensors", metadata={"format": "pt"})
    (args.out / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    print(f"{sum(p.numel() for p in model.parameters())} parameters -> {args.out}", flush=True)


if __name__ == "__main__":
    main()
