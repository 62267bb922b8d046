"""Each kernel against float64 on the device, on fresh random inputs, and each row against itself in other company."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.layers import WAYS, Layers, launched
from benchmarks.gpu.shapes import QWEN3_32B, QWEN3_600M, TINY, Shape, num_pages, plan_of
from benchmarks.gpu.timing import Bench
from diptych.model.attention_tiles import PLAIN_TILES, AttentionTiles
from diptych.model.kernels import fused
from diptych.model.kernels.matmul import MAX_ROWS, product
from diptych.model.pool import KVPool
from diptych.model.triton_attention import TritonAttention

MOST = 0.03  # error of a number, over its own size plus the root mean square of its row; 16 bits round to 2^-9 or less


Case = tuple[Shape, int, bool, int, float, bool]


def run(bench: Bench, seed: int) -> tuple[dict[str, float | bool], list[str]]:
    """Errors by name, and the names of those that are too large. What should be equal bit by bit is only reported."""
    generator = torch.Generator(bench.device).manual_seed(seed)
    found: dict[str, float | bool] = {}
    for case in cases(bench):
        found |= attention(bench, generator, *case)
    for shape in [TINY] if bench.rehearse else [QWEN3_32B, QWEN3_600M]:
        found |= _products(bench, generator, shape) | _fused(bench, generator, shape)
        if not bench.rehearse:
            found[f"{shape.name} overlapped launches change nothing"] = _overlap(bench, generator, shape)
            found[f"{shape.name} whoever combines splits"] = _combines(bench, generator, shape)
    for name, value in found.items():
        print(f"{name:72} {value:.2e}" if isinstance(value, float) else f"{name:72} {value}", flush=True)
    return found, [name for name, value in found.items() if isinstance(value, float) and not value < MOST]


def cases(bench: Bench) -> list[Case]:
    """(shape, page size, fixed, window, softcap, fp8)."""
    shapes, pages = ([TINY], [16]) if bench.rehearse else ([QWEN3_32B, QWEN3_600M], [16, 64, 128])
    return [
        (shape, page_size, fixed, window, softcap, fp8)
        for shape in shapes
        for page_size in pages
        for fixed in (False, True)
        for window, softcap, fp8 in ((0, 0.0, False), (50, 3.0, False), (0, 0.0, True))
    ]


def _randn(bench: Bench, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=bench.device).to(bench.dtype)


def _error(found: Tensor, exact: Tensor) -> float:
    size = exact.abs() + exact.square().mean(-1, keepdim=True).sqrt()
    return float(((found.double() - exact).abs() / size).max())


def attention(
    bench: Bench,
    generator: torch.Generator,
    shape: Shape,
    page_size: int,
    fixed: bool,
    window: int,
    softcap: float,
    fp8: bool,
) -> dict[str, float | bool]:
    """One sequence whole, then the same one in a crowd of chunks and decode steps."""
    name = f"{shape.name} attention page {page_size} fixed {fixed} window {window}{' fp8' * fp8}"
    length = 70 if bench.rehearse else 1100
    cached = [0, length // 3, length - 1, length - 1, length // 2]
    plan = plan_of([(c, length - c) for c in cached], page_size, 1)
    stored = torch.float8_e4m3fn if fp8 else bench.dtype
    pool = KVPool(num_pages(plan, page_size), page_size, shape.kv_heads, 2, shape.dim, stored, bench.device)
    scale = shape.dim**-0.5
    tiles = PLAIN_TILES if window and not fixed else None
    backend = TritonAttention(pool, shape.heads, scale, fixed=fixed, tiles=tiles)
    q = _randn(bench, generator, length, shape.heads, shape.dim)
    k, v = (_randn(bench, generator, length, shape.kv_heads, shape.dim) for _ in range(2))
    for row in range(len(cached)):  # every sequence has the same tokens
        whole = plan_of([(0, length)], page_size)
        count = whole.pages.shape[1]
        whole.pages = plan.pages[row : row + 1, :count]
        whole.slots = whole.pages[0, whole.positions // page_size].astype("int64") * page_size
        whole.slots += whole.positions % page_size
        backend.begin(whole)
        alone = backend.attend(1, q, k, v, window, softcap).view(q.shape)
    page, slot = (torch.from_numpy(x).to(bench.device) for x in (whole.slots // page_size, whole.slots % page_size))
    kept = [pool.pages[:, :, 1, kind].transpose(1, 2).float()[page, slot].to(bench.dtype) for kind in (0, 1)]
    exact = _exact(q, kept[0], kept[1], scale, window, softcap)
    backend.begin(plan)
    parts = [torch.cat([t[c:] for c in cached]) for t in (q, k, v)]
    crowd = backend.attend(1, parts[0], parts[1], parts[2], window, softcap).view(-1, shape.heads, shape.dim)
    pieces = crowd.split([length - c for c in cached])
    equal = all(torch.equal(piece, alone[c:]) for piece, c in zip(pieces, cached, strict=True) if length - c > 1)
    return {
        f"{name}: prefill": _error(alone, exact),
        f"{name}: crowd": max(_error(piece, exact[c:]) for piece, c in zip(pieces, cached, strict=True)),
        f"{name}: stored as torch would": all(
            torch.equal(kept[i], t.to(stored).to(bench.dtype)) for i, t in enumerate((k, v))
        ),
        f"{name}: chunks equal the whole": equal,
        f"{name}: decode steps equal one another": torch.equal(pieces[2], pieces[3]),
        f"{name}: a decode step equals prefill": torch.equal(pieces[2], alone[-1:]),
    }


def _exact(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    position = torch.arange(len(q), device=q.device)
    hidden = position[None, :] > position[:, None]
    if window:
        hidden |= position[None, :] <= position[:, None] - window
    heads = []
    for head in range(q.shape[1]):  # one by one: float64 scores are large
        scores = q[:, head].double() @ k[:, head // group].double().T * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        heads.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, head // group].double())
    return torch.stack(heads, 1)


def _products(bench: Bench, generator: torch.Generator, shape: Shape) -> dict[str, float | bool]:
    found: dict[str, float | bool] = {}
    for name, (n, k) in shape.products.items():
        x, weight = _randn(bench, generator, MAX_ROWS, k), _randn(bench, generator, n, k)
        whole = product(x, weight)
        found[f"{shape.name} {name} product"] = _error(whole, x.double() @ weight.double().T)
        equal = all(torch.equal(product(x[:rows], weight), whole[:rows]) for rows in (1, 7, 16, 32))
        found[f"{shape.name} {name} product: rows equal in any batch"] = equal
    return found


def _fused(bench: Bench, generator: torch.Generator, shape: Shape) -> dict[str, float | bool]:
    rows, heads = 5, shape.heads + shape.kv_heads
    x, delta = (_randn(bench, generator, rows, shape.hidden) for _ in range(2))
    weight = _randn(bench, generator, shape.hidden)
    total = x + delta
    out = fused.add_norm(x, delta, weight, 1e-6)
    found: dict[str, float | bool] = {f"{shape.name} add": torch.equal(x, total)}
    exact = F.rms_norm(total.double(), (shape.hidden,), weight.double(), 1e-6)
    found[f"{shape.name} add_norm"] = _error(out, exact)
    gate_up = _randn(bench, generator, rows, 2 * shape.inner)
    gate, up = gate_up.double().chunk(2, -1)
    found[f"{shape.name} silu_mul"] = _error(fused.silu_mul(gate_up, bench.dtype), F.silu(gate) * up)
    pool = KVPool(2, 16, shape.kv_heads, 2, shape.dim, bench.dtype, bench.device)
    qkv = _randn(bench, generator, rows, (heads + shape.kv_heads) * shape.dim)
    norm, cos, sin = (_randn(bench, generator, n, shape.dim) for n in (heads, rows, rows))
    index = torch.arange(rows, dtype=torch.int32, device=bench.device)
    q = fused.norm_rotate_store(qkv, norm, 1e-6, cos, sin, index, index + 14, pool.pages[:, :, 1], shape.heads)
    x3 = qkv.double().view(rows, -1, shape.dim)
    qk = F.rms_norm(x3[:, :heads], (shape.dim,), None, 1e-6) * norm.double()
    swapped = torch.cat(qk.chunk(2, -1)[::-1], -1)
    qk = qk * cos.double()[:, None] + swapped * sin.double()[:, None]
    stored = pool.pages[:, :, 1].permute(2, 0, 3, 1, 4).reshape(2, 32, shape.kv_heads, shape.dim)[:, 14 : 14 + rows]
    found[f"{shape.name} qkv: q"] = _error(q, qk[:, : shape.heads])
    found[f"{shape.name} qkv: k"] = _error(stored[0], qk[:, shape.heads :])
    found[f"{shape.name} qkv: v"] = _error(stored[1], x3[:, heads:])
    return found


def _decoding(bench: Bench, generator: torch.Generator, shape: Shape, batch: int, context: int) -> KVPool:
    plan = plan_of([(context - 1, 1)] * batch, 64)
    pool = KVPool(num_pages(plan, 64), 64, shape.kv_heads, 2, shape.dim, bench.dtype, bench.device)
    pool.pages.copy_(_randn(bench, generator, *pool.pages.shape))
    return pool


def _combines(bench: Bench, generator: torch.Generator, shape: Shape) -> bool:
    """Decode gives the same again and again, whichever program is the last to arrive."""
    batch, context = 48, 2500
    pool, plan = _decoding(bench, generator, shape, batch, context), plan_of([(context - 1, 1)] * batch, 64)
    q = _randn(bench, generator, batch, shape.heads, shape.dim)
    backend = TritonAttention(pool, shape.heads, 0.1)
    backend.begin(plan)
    first = backend.attend_stored(1, q)
    return all(torch.equal(backend.attend_stored(1, q), first) for _ in range(100))


def _overlap(bench: Bench, generator: torch.Generator, shape: Shape) -> bool:
    """Some layers, each kernel reading what the one before writes, with and without overlapping launches."""
    pool, plan = _decoding(bench, generator, shape, 4, 500), plan_of([(499, 1)] * 4, 64)
    attention = TritonAttention(pool, shape.heads, shape.dim**-0.5, tiles=AttentionTiles(run_new=True))
    attention.begin(plan)
    layers, results = Layers(bench, shape, 2), []
    for way in (*WAYS, "all overlap"):
        torch.manual_seed(0)
        with launched(bench, way):
            calls = layers.calls(attention, 2, 4)
            for _ in range(25):
                results.append([call() for call in calls][-1].clone())
    return all(torch.equal(result, results[i % 25]) for i, result in enumerate(results))
