"""Products of few rows, and what they do besides, against float64; each row against itself in other company."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diptych.model.kernels.fused import silu_mul
from diptych.model.kernels.matmul import MAX_ROWS, gated_product, product, product_add, product_parts
from diptych.model.kernels.tiles import TILES, ProductTiles, tiles_for, wins

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter has no products of bfloat16
ERROR = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
SHAPES = [(64, 320), (100, 200), (192, 384)]  # N, K: 5 blocks in 3 splits; what fits no tile; what fits


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("splits", [1, 3])
def test_products(n: int, k: int, splits: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n + splits)
    tiles = ProductTiles(block_n=64, block_k=64, splits=splits)
    weight = (torch.randn(n, k, generator=generator) / k**0.5).to(DEVICE, dtype)
    wide = torch.randn(32, k + 16, generator=generator).to(DEVICE, dtype)
    x = wide[:, :k]  # rows with gaps between them
    whole = product(x, weight, tiles)
    torch.testing.assert_close(whole.double(), x.double() @ weight.double().T, rtol=0, atol=ERROR[dtype])
    assert torch.equal(product(x[5:6], weight, tiles)[0], whole[5])
    assert torch.equal(product(x[7:10], weight, tiles), whole[7:10])
    assert torch.equal(product(x[3:20], weight, tiles), whole[3:20])


def test_parts_are_sums_over_their_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 200, generator=generator), torch.randn(64, 200, generator=generator)
    parts = product_parts(x.to(DEVICE), weight.to(DEVICE), ProductTiles(block_n=64, block_k=32, splits=3)).cpu()
    assert parts.shape == (3, 4, 64)  # 7 blocks of 32: 3 + 3 + 1
    for part, span in zip(parts, (slice(0, 96), slice(96, 192), slice(192, 200)), strict=True):
        torch.testing.assert_close(part.double(), x[:, span].double() @ weight[:, span].double().T, rtol=0, atol=1e-4)


def test_splits_without_inputs_are_not_made() -> None:
    x, weight = torch.ones(1, 128, device=DEVICE), torch.ones(16, 128, device=DEVICE)
    assert product_parts(x, weight, ProductTiles(block_n=16, block_k=64, splits=8)).shape == (2, 1, 16)


def test_too_many_rows_are_refused() -> None:
    x, weight = torch.ones(MAX_ROWS + 1, 128, device=DEVICE), torch.ones(16, 128, device=DEVICE)
    with pytest.raises(ValueError, match="rows"):
        product_parts(x, weight)


@pytest.mark.parametrize(
    ("n", "k", "splits", "stages"), [(51264, 5120, 1, 4), (5120, 25664, 4, 3), (10304, 5120, 2, 3), (16, 1024, 2, 4)]
)
def test_each_processor_has_work(n: int, k: int, splits: int, stages: int) -> None:
    tiles = tiles_for(n, k)
    assert (tiles.splits, tiles.num_stages) == (splits, stages)


def test_cublas_has_the_many_rows() -> None:
    for (n, k), classes in TILES.items():
        rows = 0
        assert tiles_for(n, k) == classes[0][1]
        for most, tiles in classes:
            assert wins(rows + 1, n, k) == wins(most, n, k) == tiles
            rows = most
        assert rows <= MAX_ROWS
        assert wins(rows + 1, n, k) is None
        assert most <= MAX_ROWS
        assert tiles.splits * tiles.block_k <= k
    assert wins(16, 30000, 512) == wins(32, 4096, 512) == ProductTiles(splits=1) == tiles_for(30000, 512)
    assert wins(17, 30000, 512) is None
    assert wins(33, 4096, 512) is None


def randn(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("hidden", "k"), [(128, 256), (200, 136)])  # what fits the tiles; what does not
@pytest.mark.parametrize("splits", [1, 3])
def test_add_and_the_halves_of_a_norm(hidden: int, k: int, splits: int, dtype: torch.dtype) -> None:
    """x += a product; another product of the norm of x; each row in any company."""
    tiles, rows, eps = ProductTiles(block_n=32, block_k=32, splits=splits), 19, 1e-6
    inputs, weight = randn(rows, k, seed=1, dtype=dtype), randn(hidden, k, seed=2, dtype=dtype, scale=k**-0.5)
    norm, reader = randn(hidden, seed=3, dtype=dtype), randn(96, hidden, seed=4, dtype=dtype, scale=hidden**-0.5)
    before = randn(rows, hidden, seed=5, dtype=dtype, scale=3.0)
    arrivals = torch.zeros(hidden, dtype=torch.int32, device=DEVICE)
    x = before.clone()
    scaled = product_add(x, inputs, weight, norm, eps, arrivals, tiles)
    assert torch.equal(x, before + product(inputs, weight, tiles))
    assert torch.equal(scaled.values, x * norm)
    exact = x.double().square()
    torch.testing.assert_close(scaled.squares.double().sum(0), exact.sum(1), rtol=1e-5, atol=0)
    assert not arrivals.any()
    found = product(scaled, reader, tiles)
    normed = F.rms_norm(x.double(), (hidden,), norm.double(), eps)
    torch.testing.assert_close(found.double(), normed @ reader.double().T, rtol=0, atol=3 * ERROR[dtype])
    for at in (slice(2, 3), slice(3, 18)):
        alone = before[at].clone()
        part = product_add(alone, inputs[at], weight, norm, eps, arrivals, tiles)
        assert torch.equal(alone, x[at])
        company = 0.0 if DEVICE == "cpu" else ERROR[dtype]  # a GPU adds a tile's squares in an order of its size
        torch.testing.assert_close(product(part, reader, tiles), found[at], rtol=0, atol=company)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("inner", "k", "pieces"), [(64, 128, 1), (100, 136, 1), (100, 136, 3)])
def test_gates(inner: int, k: int, pieces: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles that have one program, and with some of them that several programs share."""
    monkeypatch.setattr("diptych.model.kernels.matmul.PROCESSORS", 3)
    tiles = ProductTiles(block_n=64, block_k=32, pieces=pieces)
    x, weight = randn(17, k, seed=6, dtype=dtype), randn(2 * inner, k, seed=7, dtype=dtype, scale=2 * k**-0.5)
    arrivals = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    found = gated_product(x, weight, arrivals, tiles)
    assert not arrivals.any()
    whole = silu_mul(product(x, weight, tiles), dtype)
    same = inner if pieces == 1 else 96  # columns of whole tiles: the bits of a product and silu_mul
    assert torch.equal(found[:, :same], whole[:, :same])
    gate, up = (x.double() @ weight.double().T).chunk(2, -1)
    torch.testing.assert_close(found.double(), F.silu(gate) * up, rtol=0, atol=8 * ERROR[dtype])
    assert torch.equal(gated_product(x[4:5], weight, arrivals, tiles)[0], found[4])
