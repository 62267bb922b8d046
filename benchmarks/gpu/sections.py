"""What is timed: each function goes through shapes and variants of one kind of kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product as pairs
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import checks, draws
from benchmarks.gpu.draws import sampling as sampling
from benchmarks.gpu.layers import WAYS, Layers, launched
from benchmarks.gpu.shapes import HALVES, QWEN3_8B, QWEN3_32B, QWEN3_600M, TINY, Shape, num_pages, plan_of
from benchmarks.gpu.timing import Bench
from diptych.model.attention_tiles import FIXED_TILES, AttentionTiles
from diptych.model.kernels import fused as kernels
from diptych.model.kernels.matmul import product, product_parts
from diptych.model.kernels.tiles import ProductTiles, tiles_for, wins
from diptych.model.pool import KVPool
from diptych.model.triton_attention import TritonAttention

PAGE = 64
EPS = 1e-6
CUTS = [  # block_n, block_k, warps, stages
    (64, 64, 4, 5), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 4, 3),
]  # fmt: skip
DECODE = [
    AttentionTiles(),
    AttentionTiles(run_rows=0),
    AttentionTiles(run_rows=0, split=256),
    AttentionTiles(run_rows=0, split=512),
    AttentionTiles(run_rows=0, decode_n=32, decode_warps=1),
    AttentionTiles(run_rows=1 << 30),
    FIXED_TILES,
]
NARROW = AttentionTiles(flash=False)
WIDE = replace(NARROW, prefill_m=128, prefill_warps=8)
PREFILL = [AttentionTiles(), NARROW, WIDE]
FP8_PREFILL = [NARROW, WIDE, replace(WIDE, prefill_n=128, prefill_stages=2)]
FP8 = torch.float8_e4m3fn
FP8_DECODE = [AttentionTiles(run_rows=0), AttentionTiles(run_rows=1 << 30)]


def shapes_of(bench: Bench) -> list[Shape]:
    return [TINY] if bench.rehearse else [QWEN3_32B, QWEN3_600M]


def randn(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(*shape, device=bench.device, dtype=bench.dtype) / shape[-1] ** 0.5


# ---- products ----------------------------------------------------------------------------------------------------


def product_variants(n: int, k: int) -> list[ProductTiles]:
    """Every cut, with as many splits as the default has, and half and twice as many."""
    usual = tiles_for(n, k).splits
    splits = sorted({max(1, usual // 2), usual, min(8, 2 * usual)})
    return [ProductTiles(bn, bk, s, warps, stages) for (bn, bk, warps, stages), s in pairs(CUTS, splits)]


def all_products(shape: Shape) -> dict[str, tuple[int, int]]:
    return shape.products | {"head": (shape.vocab, shape.hidden)}


def product_cases(bench: Bench) -> list[tuple[str, tuple[int, int], tuple[int, ...]]]:
    """(name, (N, K), numbers of rows)."""
    if bench.rehearse:
        return [(f"tiny {name}", size, (3,)) for name, size in all_products(TINY).items()]
    models = [(QWEN3_32B.name, all_products(QWEN3_32B), (16, 32, 64)), ("half of Qwen3-32B", HALVES, (8, 32, 64))]
    models += [(s.name, all_products(s), (8, 32, 64)) for s in (QWEN3_8B, QWEN3_600M)]
    return [(f"{model} {name}", size, rows) for model, sizes, rows in models for name, size in sizes.items()]


def products(bench: Bench) -> None:
    """The parts alone (`parts`: the following kernel adds them), and cuBLAS."""
    for name, (n, k), all_rows in product_cases(bench):
        weights = [randn(bench, n, k) for _ in range(bench.copies(2 * n * k))]
        for rows in all_rows:
            x, what = randn(bench, rows, k), f"{name} {n}x{k}, {rows} rows"
            num_bytes = 2 * (n * k + rows * (n + k))
            bench.add(what, "cuBLAS", [partial(F.linear, x, w) for w in weights], num_bytes)
            variants = product_variants(n, k)
            for tiles in variants[:2] if bench.rehearse else variants:
                cut = f"n {tiles.block_n} k {tiles.block_k} splits {tiles.splits} "
                cut += f"warps {tiles.num_warps} stages {tiles.num_stages}"
                bench.add(what, cut, [partial(product_parts, x, w, tiles) for w in weights], num_bytes)


# ---- attention ---------------------------------------------------------------------------------------------------


class Attend:
    """One step's attention of a plan, layer after layer, over a pool of `dtype` (default: the model's)."""

    def __init__(
        self, bench: Bench, shape: Shape, spans: list[tuple[int, int]], dtype: torch.dtype | None = None
    ) -> None:
        self.bench, self.shape, self.plan = bench, shape, plan_of(spans, PAGE)
        dtype = dtype or bench.dtype
        self.kv_bytes = sum(c + n for c, n in spans) * shape.kv_heads * shape.dim * 2 * dtype.itemsize
        self.layers = min(shape.layers, bench.copies(self.kv_bytes))
        pages = num_pages(self.plan, PAGE)
        self.pool = KVPool(pages, PAGE, shape.kv_heads, self.layers, shape.dim, dtype, bench.device)
        for page in self.pool.pages.split(max(1, (64 << 20) // self.pool.pages[0].numel())):
            page.copy_(torch.randn(page.shape, device=bench.device))
        tokens = len(self.plan.slots)
        self.q = torch.randn(tokens, shape.heads, shape.dim, device=bench.device).to(bench.dtype)
        self.k = torch.randn(tokens, shape.kv_heads, shape.dim, device=bench.device).to(bench.dtype)

    def calls(self, tiles: AttentionTiles, fixed: bool = False) -> list[Callable[[], Tensor]]:
        attention = TritonAttention(self.pool, self.shape.heads, self.shape.dim**-0.5, fixed=fixed, tiles=tiles)
        attention.begin(self.plan)
        return [partial(attention.attend_stored, layer, self.q) for layer in range(self.layers)]


def decode_cases(shape: Shape) -> list[tuple[int, int]]:
    """(batch, context)."""
    if shape is TINY:
        return [(2, 40)]
    if shape is QWEN3_600M:
        return [(1, 1024), (32, 1024), (256, 512)]
    return [(1, 1024), (8, 1024), (32, 1024), (64, 1024), (128, 1024), (1, 16384), (32, 4096)]


def decode(bench: Bench) -> None:
    """Splits and combination of one layer, whose keys and values are there; SDPA's are contiguous."""
    for shape in shapes_of(bench):
        for batch, context in decode_cases(shape):
            what = f"{shape.name} decode {batch} x {context}"
            for dtype in (bench.dtype, FP8):
                attend = Attend(bench, shape, [(context - 1, 1)] * batch, dtype)
                kind = "fp8 " if dtype == FP8 else ""
                for tiles in DECODE[:1] if bench.rehearse else FP8_DECODE if kind else DECODE:
                    bench.add(what, kind + attention_cut(tiles, "decode"), attend.calls(tiles), attend.kv_bytes)
            kv_bytes = 2 * attend.kv_bytes
            calls = [sdpa(bench, shape, batch, 1, context, causal=False) for _ in range(bench.copies(kv_bytes))]
            bench.add(what, "SDPA, contiguous", calls, kv_bytes)


def prefill(bench: Bench) -> None:
    for shape in shapes_of(bench):
        for cached, new, count in [(20, 17, 2)] if bench.rehearse else [(0, 1024, 8), (0, 4096, 1), (4096, 1024, 4)]:
            attend = Attend(bench, shape, [(cached, new)] * count)
            scores = count * (new * cached + new * (new + 1) / 2)
            flops = 4 * scores * shape.heads * shape.dim
            what = f"{shape.name} prefill {count} x {new} after {cached}"
            for tiles in PREFILL[:1] if bench.rehearse else PREFILL:
                bench.add(what, attention_cut(tiles, "prefill"), attend.calls(tiles), flops=flops)
            bench.add(what, "fixed", attend.calls(FIXED_TILES, fixed=True), flops=flops)
            if not bench.rehearse:
                low = Attend(bench, shape, [(cached, new)] * count, FP8)
                for tiles in FP8_PREFILL:
                    bench.add(what, "fp8 " + attention_cut(tiles, "prefill"), low.calls(tiles), flops=flops)
            if not cached:
                bench.add(what, "SDPA, contiguous", [sdpa(bench, shape, count, new, new, causal=True)], flops=flops)


def attention_cut(tiles: AttentionTiles, kind: str) -> str:
    if kind == "decode":
        cut = f"split {tiles.split or 'share'} m {tiles.decode_m} n {tiles.decode_n} warps {tiles.decode_warps} "
        return cut + f"stages {tiles.decode_stages}, runs up to {tiles.run_rows} rows"
    if tiles.flash:
        return "flash"
    return f"m {tiles.prefill_m} n {tiles.prefill_n} warps {tiles.prefill_warps} stages {tiles.prefill_stages}"


def sdpa(bench: Bench, shape: Shape, batch: int, queries: int, keys: int, causal: bool) -> Callable[[], Tensor]:
    q = randn(bench, batch, shape.heads, queries, shape.dim)
    k, v = (randn(bench, batch, shape.kv_heads, keys, shape.dim) for _ in range(2))
    return partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal, enable_gqa=True)


# ---- what lies between -------------------------------------------------------------------------------------------


def fused(bench: Bench) -> None:
    for shape in shapes_of(bench):
        for rows in (3,) if bench.rehearse else (1, 32, 256, 4096):
            for name, call, num_bytes in fused_calls(bench, shape, rows):
                bench.add(f"{shape.name} {name}, {rows} rows", "ours", [call], num_bytes)
            x, weight = randn(bench, rows, shape.hidden), randn(bench, shape.hidden)
            norm = partial(F.rms_norm, x, (shape.hidden,), weight, EPS)
            bench.add(f"{shape.name} norm alone, {rows} rows", "torch", [norm], 4 * x.numel())


def fused_calls(bench: Bench, shape: Shape, rows: int) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """(name, call, bytes)."""
    x, delta, weight = (randn(bench, n, shape.hidden) for n in (rows, rows, 1))
    yield "add_norm", partial(kernels.add_norm, x, delta, weight[0], EPS), 8 * x.numel()
    gate_up = randn(bench, rows, 2 * shape.inner)
    yield "silu_mul", partial(kernels.silu_mul, gate_up, bench.dtype), 3 * gate_up.numel()
    qkv = randn(bench, rows, shape.products["qkv"][0])
    pool = KVPool(-(-rows // PAGE), PAGE, shape.kv_heads, 2, shape.dim, bench.dtype, bench.device)
    norm, cos, sin = (randn(bench, n, shape.dim) for n in (shape.heads + shape.kv_heads, rows, rows))
    index = torch.arange(rows, dtype=torch.int32, device=bench.device)
    pages = pool.pages[:, :, 1]
    call = partial(kernels.norm_rotate_store, qkv, norm, EPS, cos, sin, index, index, pages, shape.heads)
    yield "qkv: norm, rotary, write", call, 4 * qkv.numel()


# ---- a decode layer ----------------------------------------------------------------------------------------------


def layer_batches(bench: Bench, shape: Shape) -> tuple[int, ...]:
    if bench.rehearse:
        return (3,)
    return (1, 8, 16, 32, 64, 128, 256) if shape is QWEN3_600M else (1, 8, 16, 32, 64, 128)


def layer(bench: Bench) -> None:
    """All of a decode layer at context 1,024; `ms_per_step` is all layers and the head, what comes before and after
    them left out."""
    for shape in shapes_of(bench):
        heads = [randn(bench, shape.vocab, shape.hidden) for _ in range(2)]
        num_bytes = 2 * sum(n * k for n, k in shape.products.values())
        layers = Layers(bench, shape, bench.copies(num_bytes))
        for batch in layer_batches(bench, shape):
            attend = Attend(bench, shape, [(39 if bench.rehearse else 1023, 1)] * batch)
            attention = TritonAttention(attend.pool, shape.heads, shape.dim**-0.5)
            attention.begin(attend.plan)
            x = randn(bench, batch, shape.hidden)
            head_s = bench.add(f"{shape.name} head, {batch} rows", "chosen", [partial(chosen, x, h) for h in heads])
            what = f"{shape.name} layer, batch {batch}, context 1024"
            for way in list(WAYS)[:1] if bench.rehearse else WAYS:
                with launched(bench, way):
                    calls = layers.calls(attention, attend.layers, batch)
                    seconds = bench.add(what, way, calls, num_bytes + attend.kv_bytes)
                    if seconds is not None and head_s is not None:
                        bench.rows[-1]["ms_per_step"] = round((seconds * shape.layers + head_s) * 1e3, 3)
                        print(f"{'':44} {bench.rows[-1]['ms_per_step']} ms for a step", flush=True)
                    if batch in (1, 32, 64, 128):
                        bench.trace(f"{what}, {way}", [calls[i % len(calls)] for i in range(10)])


def chosen(x: Tensor, w: Tensor) -> Tensor:
    """`x @ w.T` by whom the table names."""
    tiles = wins(x.shape[0], *w.shape)
    return F.linear(x, w) if tiles is None else product(x, w, tiles)


# ---- compiling ---------------------------------------------------------------------------------------------------


def compile_part(only: list[str], part: int, parts: int) -> tuple[int, list[str]]:
    """Run every `parts`-th variant of these sections and of the checks once, so that Triton's cache has it. How many
    there were, and the errors."""
    bench = Bench(rehearse=False, bandwidth=1.0)
    jobs = list(compile_jobs(bench, only))[part::parts]
    errors = []
    for job in jobs:
        try:
            job()
        except Exception as error:  # it will show again where it is timed
            errors.append(f"{type(error).__name__}: {error}")
    return len(jobs), errors


def compile_jobs(bench: Bench, only: list[str]) -> Iterator[Callable[[], Any]]:
    generator = torch.Generator(bench.device)
    for case in checks.cases(bench):
        yield partial(checks.attention, bench, generator, *case)
    for shape in shapes_of(bench):
        for tiles in DECODE if "decode" in only else ():
            yield partial(compile_attention, bench, shape, tiles, [(99, 1)] * 2)
        for tiles in FP8_DECODE if "decode" in only else ():
            yield partial(compile_attention, bench, shape, tiles, [(99, 1)] * 2, FP8)
        for tiles in PREFILL if "prefill" in only else ():
            yield partial(compile_attention, bench, shape, tiles, [(0, 100)])
        for tiles in FP8_PREFILL if "prefill" in only else ():
            yield partial(compile_attention, bench, shape, tiles, [(0, 100)], FP8)
        for batch in layer_batches(bench, shape) if "layer" in only else ():
            for way in WAYS:
                yield partial(compile_layer, bench, shape, batch, way)
    if "sampling" in only:
        yield from draws.compile_jobs(bench)
    if "products" in only:
        for _, (n, k), all_rows in product_cases(bench):
            for rows, cut in pairs(all_rows, product_variants(n, k)):
                yield partial(compile_product, bench, n, k, rows, cut)


def compile_layer(bench: Bench, shape: Shape, batch: int, way: str) -> None:
    attend = Attend(bench, shape, [(99, 1)] * batch)
    attention = TritonAttention(attend.pool, shape.heads, shape.dim**-0.5)
    attention.begin(attend.plan)
    with launched(bench, way):
        for call in Layers(bench, shape, 2).calls(attention, attend.layers, batch)[:2]:
            call()


def compile_product(bench: Bench, n: int, k: int, rows: int, tiles: ProductTiles) -> None:
    x, weight = (torch.empty(size, k, dtype=bench.dtype, device=bench.device) for size in (rows, n))
    product_parts(x, weight, tiles)


def compile_attention(
    bench: Bench, shape: Shape, tiles: AttentionTiles, spans: list[tuple[int, int]], dtype: torch.dtype | None = None
) -> None:
    Attend(bench, shape, spans, dtype).calls(tiles)[0]()
