"""Pages from one GPU to another through CUDA's inter-process handles: is it right, how fast, and what if a side dies.

    python -m benchmarks.gpu.ipc [--json FILE] [--big GIB]

Two processes, with a pool each, shaped as Qwen3-32B's (pages of 64 tokens, 16 MiB). What copies is the server's own
code. With one GPU both sit on it: then the speed is the memory's. Parts:

    visibility  each process sees its own GPU alone, or both see both
    copies      prompts of 1k, 4k and 16k tokens; pages in a row or scattered; TP and PP sizes that differ; every byte
                that was copied is compared, and no other byte may change
    busy        the same while both GPUs multiply matrices on their default streams
    store       the store's read and write (for other transports) against the pool, also while the GPU computes
    big         how long mapping a large pool takes
    death       the process that lends is killed while its memory is copied: what the copies say, whether the borrower's
                GPU still computes, when the memory is free again
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diptych.errors import TransferError
from diptych.kv.extents import Block, Extent, PoolShape, extents
from diptych.kv.store import LentPool
from diptych.model.gpu_store import GpuStore
from diptych.model.pool import KVPool

HEADS, LAYERS, PAGE_TOKENS, DIM = 8, 64, 64, 128
PAGES = 320
LAYER_BYTES = 2 * PAGE_TOKENS * DIM * 2
WHOLE = PoolShape(PAGES, HEADS, LAYERS, LAYER_BYTES)
HALF_HEADS = PoolShape(2 * PAGES, HEADS // 2, LAYERS, LAYER_BYTES)  # the same memory as a rank of TP 2 has it
HALF_LAYERS = PoolShape(2 * PAGES, HEADS, LAYERS // 2, LAYER_BYTES)
# name: (to, its first head and layer, from, its first head and layer, heads, layers)
SHARES: dict[str, tuple[PoolShape, int, int, PoolShape, int, int, int, int]] = {
    "equal TP": (WHOLE, 0, 0, WHOLE, 0, 0, HEADS, LAYERS),
    "TP 1 to one rank of TP 2": (HALF_HEADS, 0, 0, WHOLE, 4, 0, HEADS // 2, LAYERS),
    "one rank of TP 2 to TP 1": (WHOLE, 4, 0, HALF_HEADS, 0, 0, HEADS // 2, LAYERS),
    "one stage of PP 2 to one": (WHOLE, 0, 32, HALF_LAYERS, 0, 0, HEADS, LAYERS // 2),
}
TURNS = 7
POISON = 0x5A
CHECK_BYTES = 64 << 20


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def hear() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(sys.stdin.readline() or '{"do": "end"}')
    return found


def pattern(start: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """What the lender's pool holds from byte `start` on (a multiple of 4): each word differs from those near it."""
    at = torch.arange(start // 4, (start + num_bytes) // 4, device=device, dtype=torch.int64)
    return ((at * 2654435761 + (at >> 16) * 40503) & 0x7FFFFFFF).to(torch.int32)


def new_store(device: int, num_pages: int = PAGES) -> tuple[GpuStore, torch.Tensor]:
    """A pool's store, and the pool's bytes."""
    torch.cuda.set_device(device)
    pool = KVPool(num_pages, PAGE_TOKENS, HEADS, LAYERS, DIM, torch.bfloat16, f"cuda:{device}")
    return GpuStore(pool, LAYERS), pool.pages.view(-1).view(torch.uint8)


def lender(device: int) -> None:
    """Fills a pool, lends it, computes if told to, until the end of its input."""
    store, memory = new_store(device)
    words = memory.view(torch.int32)
    for start in range(0, memory.nbytes, CHECK_BYTES):
        size = min(CHECK_BYTES, memory.nbytes - start)
        words[start // 4 : (start + size) // 4] = pattern(start, size, memory.device)
    torch.cuda.synchronize()
    say(handle=store.lend().hex(), num_bytes=memory.nbytes, gpu=torch.cuda.get_device_name(), seen=count())
    load: Load | None = None
    while (message := hear())["do"] != "end":
        if message["do"] == "compute":
            load = Load(memory.device)
        elif message["do"] == "rest" and load is not None:
            load.end()
        elif message["do"] == "lend big":
            big = torch.empty(message["num_bytes"], dtype=torch.uint8, device=memory.device)
            say(handle=gpu_export(device, big).hex(), num_bytes=big.nbytes)


def gpu_export(device: int, tensor: torch.Tensor) -> bytes:
    from diptych.model.gpu_ipc import export

    return export(device, tensor.data_ptr(), tensor.nbytes)


def count() -> int:
    return torch.cuda.device_count()


class Load:
    """Matrix products on this thread's default stream, without a pause."""

    def __init__(self, device: torch.device) -> None:
        self._going = True
        self._thread = threading.Thread(target=self._run, args=(device,))
        self._thread.start()
        time.sleep(0.3)

    def _run(self, device: torch.device) -> None:
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        while self._going:
            for _ in range(8):
                torch.mm(a, a)
            torch.cuda.current_stream(device).synchronize()

    def end(self) -> None:
        self._going = False
        self._thread.join()


def plan(share: str, tokens: int, scattered: bool) -> list[Extent]:
    to, head, layer, source, from_head, from_layer, heads, layers = SHARES[share]
    num_pages, rng = tokens // PAGE_TOKENS, random.Random(tokens)
    dst: Sequence[int] = range(3, 3 + num_pages)
    src: Sequence[int] = range(7, 7 + num_pages)
    if scattered:
        dst, src = rng.sample(range(to.num_pages), num_pages), rng.sample(range(source.num_pages), num_pages)
    return extents(to, Block(dst, head, layer), source, Block(src, from_head, from_layer), heads, layers)


def wrong_bytes(memory: torch.Tensor, copies: list[Extent]) -> int:
    """Bytes that are not what they should be, in `memory` that was poisoned before. Puts the poison back."""
    wrong = 0
    for copy in copies:
        for row in range(copy.rows):
            for at in range(0, copy.width, CHECK_BYTES):
                size = min(CHECK_BYTES, copy.width - at)
                here = memory[copy.to + row * copy.to_pitch + at :][:size]
                expected = pattern(copy.source + row * copy.source_pitch + at, size, memory.device)
                wrong += int((here.view(torch.int32) != expected).sum()) * 4
                here.fill_(POISON)
    for start in range(0, memory.nbytes, CHECK_BYTES):
        wrong += int((memory[start : start + CHECK_BYTES] != POISON).sum())
    return wrong


def timed(pool: LentPool, copies: list[Extent]) -> dict[str, Any]:
    times = []
    for _ in range(TURNS):
        started = time.perf_counter()
        pool.copy(copies)
        times.append(time.perf_counter() - started)
    num_bytes = sum(copy.width * copy.rows for copy in copies)
    seconds = statistics.median(times)
    return {
        "copies": len(copies),
        "mib": num_bytes >> 20,
        "ms": round(seconds * 1e3, 3),
        "gb_per_s": round(num_bytes / seconds / 1e9, 1),
        "slowest_gb_per_s": round(num_bytes / max(times) / 1e9, 1),
    }


def borrower(device: int, visibility: str, big_bytes: int) -> None:
    """Maps what it is told to and copies."""
    store, memory = new_store(device)
    memory.fill_(POISON)
    torch.cuda.synchronize()
    lent = hear()
    started = time.perf_counter()
    try:
        pool = store.borrow(bytes.fromhex(lent["handle"]), lent["num_bytes"])
    except TransferError as error:
        say(row={"part": "visibility", "what": visibility, "error": error.message})
        return
    say(row={"part": "visibility", "what": visibility, "map_ms": ms(started), "seen": [lent["seen"], count()]})
    for share in SHARES:
        for scattered in (False, True):
            for tokens in (1024, 4096, 16384):
                copies = plan(share, tokens, scattered)
                pool.copy(copies)
                row = {"part": "copies", "what": f"{visibility}: {share}", "tokens": tokens, "scattered": scattered}
                say(row=row | {"wrong_bytes": wrong_bytes(memory, copies)} | timed(pool, copies))
                memory.fill_(POISON)
                torch.cuda.synchronize()
    two_at_once(store, lent, visibility)
    busy(pool, memory, visibility)
    check_store(store, memory)
    pool.close()
    if big_bytes:
        say(do="lend big")
        lent = hear()
        started = time.perf_counter()
        pool = store.borrow(bytes.fromhex(lent["handle"]), lent["num_bytes"])
        big: dict[str, Any] = {"part": "big", "what": f"{lent['num_bytes'] >> 30} GiB", "map_ms": ms(started)}
        started = time.perf_counter()
        pool.copy([Extent(0, lent["num_bytes"] - (64 << 20), 64 << 20)])
        big["first_copy_ms"] = ms(started)
        started = time.perf_counter()
        pool.close()
        say(row=big | {"unmap_ms": ms(started)})


def ms(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 2)


def two_at_once(store: GpuStore, lent: dict[str, Any], visibility: str) -> None:
    """4k tokens in two halves, each over a mapping and a stream of its own: does a second stream help?"""
    pools = [store.borrow(bytes.fromhex(lent["handle"]), lent["num_bytes"]) for _ in range(2)]
    copies = plan("equal TP", 4096, True)
    times = []
    for _ in range(TURNS):
        threads = [threading.Thread(target=p.copy, args=(copies[i::2],)) for i, p in enumerate(pools)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        times.append(time.perf_counter() - started)
    for pool in pools:
        pool.close()
    num_bytes = sum(copy.width for copy in copies)
    rate = num_bytes / statistics.median(times) / 1e9
    say(row={"part": "copies", "what": f"{visibility}: two streams", "tokens": 4096, "gb_per_s": round(rate, 1)})


def busy(pool: LentPool, memory: torch.Tensor, visibility: str) -> None:
    say(do="compute")
    load = Load(memory.device)
    copies = plan("equal TP", 4096, True)
    pool.copy(copies)
    row = timed(pool, copies)
    load.end()
    say(do="rest")
    say(row={"part": "busy", "what": visibility, "tokens": 4096} | row | {"wrong_bytes": wrong_bytes(memory, copies)})


def check_store(store: GpuStore, memory: torch.Tensor) -> None:
    """read and write give and take the pool's own bytes, of all heads and layers or some."""
    pages = memory.view(PAGES, HEADS, LAYERS, LAYER_BYTES)
    generator = torch.Generator(device=memory.device).manual_seed(5)
    for name, places, heads, layers in (
        ("whole pages", [5, 2, 9], (0, HEADS), None),
        ("some heads", [300, 1], (3, 7), None),
        ("some heads and layers", [4, 8], (2, 5), range(10, 40)),
    ):
        some = slice(0, LAYERS) if layers is None else slice(layers.start, layers.stop)
        place = torch.tensor(places, device=memory.device), slice(*heads), some
        shape = pages[place].shape
        given = torch.randint(0, 256, shape, dtype=torch.uint8, device=memory.device, generator=generator)
        data = given.cpu().numpy().reshape(-1).data
        load = Load(memory.device)
        started = time.perf_counter()
        store.write(places, *heads, data, layers)
        write_ms, started = ms(started), time.perf_counter()
        found = store.read(places, *heads, layers)
        read_ms = ms(started)
        load.end()
        right = torch.equal(pages[place], given) and bytes(found) == bytes(data)
        pages[place] = POISON
        untouched = bool((memory == POISON).all())
        row = {"mib": len(found) >> 20, "write_ms": write_ms, "read_ms": read_ms, "ok": right and untouched}
        say(row={"part": "store", "what": name} | row)


def mourner(device: int) -> None:
    """Copies while the lender is killed, and says what became of it."""
    store, memory = new_store(device)
    lent = hear()
    pool = store.borrow(bytes.fromhex(lent["handle"]), lent["num_bytes"])
    copies = plan("equal TP", 16384, True)
    pool.copy(copies)
    say(do="kill")
    error, num_after = "", 0
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline and not error:
        try:
            pool.copy(copies)
            num_after += 1
        except TransferError as failure:
            error = failure.message
    row: dict[str, Any] = {"part": "death", "copies": num_after, "error": error}
    try:
        if not error:
            memory.fill_(POISON)
            torch.cuda.synchronize()
            pool.copy(copies)
            row["wrong_bytes"] = wrong_bytes(memory, copies)
        say(do="memory", when="mapped")
        hear()
        pool.close()
        say(do="memory", when="unmapped")
        hear()
        a = torch.ones(512, 512, device=memory.device)
        row["still_computes"] = float((a @ a).sum()) == 512.0**3
    except Exception as failure:  # whatever a GPU says whose context is gone
        row["still_computes"], row["then"] = False, f"{type(failure).__name__}: {failure}"[:200]
    say(row=row)


# ---- the parent: starts both, carries their messages -------------------------------------------------------------


class Child:
    def __init__(self, what: str, device: int, visible: str, *more: str) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu.ipc", "--child", what, str(device), *more]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def hear(self) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def tell(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def end(self) -> int:
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def converse(lending: Child, borrowing: Child, on_row: Callable[[dict[str, Any]], None], big_bytes: int) -> None:
    lent = lending.hear()
    if lent is None:
        on_row({"part": "lender", "error": "it ended before it could lend"})
        return
    borrowing.tell(lent)
    used: list[int] = []
    while (message := borrowing.hear()) is not None:
        match message.get("do"):
            case None:
                row = message["row"]
                if row["part"] == "death":
                    row["mib_used_before_mapped_unmapped"] = used
                on_row(row)
            case "lend big":
                lending.tell({"do": "lend big", "num_bytes": big_bytes})
                borrowing.tell(lending.hear() or {})
            case "kill":
                used.append(used_mib())
                time.sleep(0.2)
                lending.process.send_signal(signal.SIGKILL)
                lending.process.wait()
            case "memory":
                used.append(used_mib())
                borrowing.tell({"do": "go on"})
            case other:
                lending.tell({"do": other})


def used_mib() -> int:
    """On the lender's GPU, the first one."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", nargs="+")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--big", type=int, default=90, help="GiB of the large pool; 0: leave it out")
    parser.add_argument("--deaths", type=int, default=3)
    options = parser.parse_args()
    if options.child:
        what, device, *more = options.child
        if what == "lender":
            lender(int(device))
        elif what == "borrower":
            borrower(int(device), more[0], int(more[1]))
        else:
            mourner(int(device))
        return
    gpus = int(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout.count("GPU "))
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)

    big_bytes = options.big << 30
    two = gpus > 1
    ways = [("own GPU each", "0", "1", 0), ("both visible", "0,1", "0,1", 1)] if two else [("one GPU", "0", "0", 0)]
    for name, lenders, borrowers, device in ways:
        lending = Child("lender", 0, lenders)
        borrowing = Child("borrower", device, borrowers, name, str(big_bytes if name == ways[0][0] else 0))
        converse(lending, borrowing, keep, big_bytes)
        codes = borrowing.end(), lending.end()
        if any(codes):
            keep({"part": "exit", "what": name, "borrower, lender": codes})
    for _ in range(options.deaths):
        lending, mourning = Child("lender", 0, "0"), Child("mourner", 0, "1" if two else "0")
        converse(lending, mourning, keep, 0)
        mourning.end(), lending.end()
    good = all(not row.get("wrong_bytes") and "error" not in row for row in rows if row["part"] != "death")
    good = good and all(row.get("ok", True) and row.get("still_computes", True) for row in rows)
    print("all right" if good else "SOMETHING IS WRONG: see above")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
