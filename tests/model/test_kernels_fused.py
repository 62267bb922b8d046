"""The kernels between a layer's products against the same in float64, and each row against itself in other company."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.model.kernels.fused import add_norm, norm_rotate_store, silu_mul, store_kv
from diptych.model.pool import KVPool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cuts bfloat16 off, it does not round
DTYPES = [torch.float32, HALF]
ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}  # of a number, relative
EPS = 1e-6


def close(found: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    tolerance = ERROR[found.dtype]
    torch.testing.assert_close(found.double().cpu(), expected.double().cpu(), rtol=tolerance, atol=max(atol, tolerance))


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def cut(whole: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """`[parts, rows, columns]` float32 as a split product leaves them, and what they add up to in `whole`'s type."""
    if parts == 1:
        return whole, whole
    pieces = torch.stack([randn(*whole.shape, seed=100 + i) for i in range(parts - 1)])
    pieces = torch.cat((whole.float()[None], pieces))
    total = pieces[0].clone()
    for piece in pieces[1:]:
        total += piece
    return pieces, total.to(whole.dtype)


def tables(dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.arange(200)[:, None] * 10 ** (-torch.arange(dim // 2) / dim)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(DEVICE, dtype), torch.cat((-sin, sin), -1).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "normed", "parts"), [(4, 2, 16, True, 1), (7, 3, 64, False, 3)])
def test_norm_rotary_and_the_write(
    heads: int, kv_heads: int, dim: int, normed: bool, parts: int, dtype: torch.dtype
) -> None:
    page_size, rows = 16, 6
    pool = KVPool(4, page_size, kv_heads, 2, dim, dtype, DEVICE)
    qkv, total = cut(randn(rows, (heads + 2 * kv_heads) * dim, seed=1, dtype=dtype), parts)
    norm = randn(heads + kv_heads, dim, seed=2, dtype=dtype) if normed else None
    cos, sin = tables(dim, dtype)
    positions = torch.tensor([3, 0, 199, 77, 5, 0], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([17, 63, 0, 16, 40, -1], dtype=torch.int32, device=DEVICE)
    q = norm_rotate_store(qkv, norm, EPS, cos, sin, positions, slots, pool.pages[:, :, 1], heads)

    x = total.double().view(rows, -1, dim)
    qk, v = x[:, : heads + kv_heads], x[:, heads + kv_heads :]
    if norm is not None:
        qk = F.rms_norm(qk, (dim,), None, EPS) * norm.double()
    index = positions.long()
    swapped = torch.cat((qk[..., dim // 2 :], qk[..., : dim // 2]), -1)
    qk = qk * cos.double()[index].unsqueeze(1) + swapped * sin.double()[index].unsqueeze(1)
    close(q, qk[:, :heads], 2 * ERROR[dtype])
    expected = torch.zeros_like(pool.pages, dtype=torch.float64)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // page_size, :, 1, 0, slot % page_size] = qk[row, heads:]
            expected[slot // page_size, :, 1, 1, slot % page_size] = v[row]
    close(pool.pages, expected, 2 * ERROR[dtype])
    again = KVPool(4, page_size, kv_heads, 2, dim, dtype, DEVICE)
    for row in range(5):
        part = qkv[..., row : row + 1, :].contiguous()
        at = slice(row, row + 1)
        alone = norm_rotate_store(part, norm, EPS, cos, sin, positions[at], slots[at], again.pages[:, :, 1], heads)
        assert torch.equal(alone[0], q[row])
    assert torch.equal(again.pages, pool.pages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_what_the_pool_would_have_written(dtype: torch.dtype) -> None:
    kv_heads, dim, page_size = 3, 16, 32
    pool, reference = (KVPool(3, page_size, kv_heads, 2, dim, dtype, DEVICE) for _ in range(2))
    both = randn(5, 2 * kv_heads, dim, seed=3, dtype=dtype)
    both[0, 1, :3] = both[2, 4, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    k, v = both[:, :kv_heads], both[:, kv_heads:]
    slots = torch.tensor([40, 2, 95, 31], dtype=torch.int32, device=DEVICE)  # the fifth row is padding
    store_kv(k, v, slots, pool.pages[:, :, 1])
    reference.write(1, slots.long() // page_size, slots.long() % page_size, k[:4], v[:4])
    assert torch.equal(pool.pages, reference.pages)
    q_heads = 2
    cos, sin = torch.ones(1, dim, device=DEVICE, dtype=dtype), torch.zeros(1, dim, device=DEVICE, dtype=dtype)
    qkv = torch.cat((both[:, :q_heads], both), 1).view(5, -1)
    qkv = qkv.masked_fill(qkv.isinf(), 1.0)  # times a sine of 0 they would be no number
    reference.write(1, slots.long() // page_size, slots.long() % page_size, *qkv.view(5, -1, dim)[:4, 2:].split(3, 1))
    norm_rotate_store(qkv, None, EPS, cos, sin, torch.zeros_like(slots), slots, pool.pages[:, :, 1], q_heads)
    reference_keys = reference.pages[:, :, 1, 0]
    wrong = pool.pages[:, :, 1, 0] != reference_keys
    assert wrong.sum() == 1  # the partner of a not-a-number in a rotation is none either
    assert torch.equal(pool.pages[:, :, 1, 1], reference.pages[:, :, 1, 1])


def test_a_pool_of_8_bits_saturates() -> None:
    """Infinities and large numbers become 448, e4m3's largest; a not-a-number 0."""
    fp8 = torch.float8_e4m3fn
    x = torch.zeros(6, 1, 16, dtype=HALF, device=DEVICE)
    numbers = torch.tensor([torch.inf, -torch.inf, torch.nan, 449.0, -1000.0, 60000.0, 448.0, 1.5, -0.25])
    x[2:5, 0, :9] = numbers.to(DEVICE, HALF)
    slots = torch.arange(6, dtype=torch.int32, device=DEVICE)
    expected = torch.tensor([448, -448, 0, 448, -448, 448, 448, 1.5, -0.25], device=DEVICE)
    cos, sin = torch.ones(1, 16, device=DEVICE, dtype=HALF), torch.zeros(1, 16, device=DEVICE, dtype=HALF)
    pools = [KVPool(1, 16, 1, 2, 16, fp8, DEVICE) for _ in range(2)]
    store_kv(x, x, slots, pools[0].pages[:, :, 1])
    qkv = x.clamp(-60000, 60000).repeat(1, 3, 1).view(6, -1)  # infinities times a sine of 0 would be no numbers
    norm_rotate_store(qkv, None, EPS, cos, sin, slots * 0, slots, pools[1].pages[:, :, 1], 1)
    assert torch.equal(pools[0].pages[0, 0, 1, :, 2:5, :9].float(), expected.expand(2, 3, 9))
    assert torch.equal(pools[1].pages[0, 0, 1, 1, 2:5, :9].float(), expected.expand(3, 9))  # values are not rotated
    assert pools[1].pages[0, 0, 1, 0].float().isfinite().all()
    assert not pools[0].pages[:, :, 0].float().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "parts"), [(48, 1), (1024, 1), (1280, 4)])
def test_add_and_norm(width: int, parts: int, dtype: torch.dtype) -> None:
    rows = 5
    x, weight = randn(rows, width, seed=4, dtype=dtype), randn(width, seed=5, dtype=dtype)
    delta, total = cut(randn(rows, width, seed=6, dtype=dtype), parts)
    before = x.clone()
    out = add_norm(x, delta, weight, EPS)
    assert torch.equal(x, before + total)
    close(out, F.rms_norm(x.double(), (width,), weight.double(), EPS))
    for row in range(rows):
        alone = before[row : row + 1].clone()
        assert torch.equal(add_norm(alone, delta[..., row : row + 1, :].contiguous(), weight, EPS)[0], out[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "parts"), [(48, 1), (3000, 1), (1025, 2)])
def test_silu_times_up(width: int, parts: int, dtype: torch.dtype) -> None:
    gate_up, total = cut(8 * randn(3, 2 * width, seed=7, dtype=dtype), parts)
    out = silu_mul(gate_up, dtype)
    gate, up = total.double().chunk(2, -1)
    close(out, F.silu(gate) * up)
    for row in range(3):
        assert torch.equal(silu_mul(gate_up[..., row : row + 1, :].contiguous(), dtype)[0], out[row])
