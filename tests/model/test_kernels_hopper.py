"""Kernels that only Hopper GPUs run: that they compile, wherever a compiler is; that they are right, on such a GPU."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch
from test_kernels_attention import ERROR, Sequences
from test_model_attention import naive

from diptych.model.attention_tiles import AttentionTiles
from diptych.model.kernels import gated

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout
from diptych.model.kernels import flash, gated

layout = NVMMASharedLayout(128, 16, rank=2)
types = {"q": "*bf16", "out": "*bf16", "table": "*i32", "tiles": "*i32", "sizes": "*i32", "scale": "fp32"}
types |= {"pool": f"tensordesc<bf16[64, 64],{layout!r}>"}
types |= {name: f"tensordesc<bf16[128, 64],{layout!r}>" for name in ("x", "weight")}
kernel, numbers = {
    "flash": (
        flash.flash_kernel,
        dict(KV_HEADS=8, GROUP=8, PAD=8, LAYERS=64, PAGE=64, DIM=128, STAGES=flash.STAGES),
    ),
    "gated": (gated.gated_kernel, dict(K=5120, STAGES=gated.STAGES, TALL=gated.TALL)),
}[sys.argv[1]]
names = kernel.arg_names
signature = {name: "constexpr" if name in numbers else types.get(name, "i32") for name in names}
even = ("q", "out", "q_stride", "out_stride", "width")
aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in even}
source = GluonASTSource(kernel, signature, {(names.index(k),): v for k, v in numbers.items()}, aligned)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
print(compiled.metadata.shared, compiled.asm["ptx"].count("wgmma.mma_async"))
"""


@pytest.mark.parametrize(("kernel", "products"), [("flash", 2 * 6 * 8), ("gated", 2 * 4)])
def test_they_compile_for_hopper_and_fit(kernel: str, products: int) -> None:
    """The tensor cores' instructions are there, once for each warpgroup, product and 16 of its depth."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, kernel]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    shared, found = map(int, run.stdout.split())
    assert shared <= 227 << 10
    assert found == products


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("heads", "kv_heads"), [(64, 8), (16, 8), (5, 1), (6, 2), (64, 1)])
@pytest.mark.parametrize("page_size", [64, 128])
def test_chunks_and_decode_rows_are_a_softmax_over_the_sequence(heads: int, kv_heads: int, page_size: int) -> None:
    rnd = random.Random(heads + page_size)
    lengths = [1, 2, 128, 129, rnd.randrange(130, 400), rnd.randrange(400, 1500), rnd.randrange(60, 70)]
    s = Sequences(heads, lengths, heads, kv_heads, 128, page_size)
    attention = s.backend(torch.bfloat16, AttentionTiles())
    assert attention._flash is not None
    cached = [0, 0, 127, 0, rnd.randrange(1, 129), rnd.randrange(200, 399), 1]
    steps = [[(i, 0, c) for i, c in enumerate(cached) if c], [(i, c, lengths[i] - c) for i, c in enumerate(cached)]]
    for spans in steps:
        for (i, start, new), out in zip(spans, s.attend(attention, spans), strict=True):
            q, k, v = (t[i].to(torch.bfloat16) for t in (s.q, s.k, s.v))
            stop = start + new
            expected = naive(q[start:stop], k[:stop], v[:stop], start, 128**-0.5, 0, 0.0)
            torch.testing.assert_close(out.double().cpu(), expected, rtol=0, atol=ERROR[torch.bfloat16])


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_windows_and_caps_have_the_other_kernel() -> None:
    s = Sequences(3, [300], 8, 2, 128, 64)
    attention = s.backend(torch.bfloat16, AttentionTiles())
    q, k, v = (t[0].to(torch.bfloat16) for t in (s.q, s.k, s.v))
    for window, softcap in ((40, 0.0), (0, 5.0)):
        [out] = s.attend(attention, [(0, 0, 300)], window, softcap)
        expected = naive(q, k, v, 0, 128**-0.5, window, softcap)
        torch.testing.assert_close(out.double().cpu(), expected, rtol=0, atol=ERROR[torch.bfloat16])


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("rows", "width", "depth"), [(1024, 1024, 256), (1, 16, 64), (300, 1000, 192), (1500, 12800, 640)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gated_product_is_one_of_float64(rows: int, width: int, depth: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, depth, generator=generator).to("cuda", dtype)
    weight = (torch.randn(2 * width, depth, generator=generator) * depth**-0.5).to("cuda", dtype)
    assert gated.takes(weight)
    gate, up = (x.double() @ weight.double().T).chunk(2, 1)
    expected = torch.nn.functional.silu(gate) * up
    error = (gated.silu_product(x, weight).double() - expected).abs()
    bits = 2**-8 if dtype is torch.bfloat16 else 2**-11
    assert (error <= 4 * bits * (1 + expected.abs() + gate.abs() + up.abs())).all()
