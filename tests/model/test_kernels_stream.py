"""The product that gates, through the tensor memory accelerator, against float64; rows in other company."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.model.kernels.fused import silu_mul
from diptych.model.kernels.stream import BLOCK_N, PIECES, ROWS, stream_gated, stream_wins
from diptych.model.kernels.tiles import wins

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter has no products of bfloat16
ERROR = {torch.float16: 1e-2, torch.bfloat16: 8e-2}[HALF]


def _inputs(rows: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + n)
    x, weight = torch.randn(rows, k, generator=generator), torch.randn(n, k, generator=generator) / k**0.5
    return x.to(DEVICE, HALF), weight.to(DEVICE, HALF), torch.zeros(2, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(("n", "k"), [(256, 384), (104, 200)])  # what fits the tiles; what does not
@pytest.mark.parametrize("rows", [1, 17, 64])
def test_products(n: int, k: int, rows: int) -> None:
    x, weight, arrivals = _inputs(rows, n, k)
    product = (x.double() @ weight.double().T).to(HALF)
    gate, up = product.double().chunk(2, 1)
    found = stream_gated(x, weight, arrivals)
    torch.testing.assert_close(found.double(), F.silu(gate) * up, rtol=0, atol=ERROR)
    torch.testing.assert_close(found, silu_mul(product, HALF), rtol=0, atol=ERROR)


@pytest.mark.parametrize(("n", "k", "pieces"), [(640, 640, 2), (616, 1000, 3)])  # 5 and 8 blocks; the latter 3 + 3 + 2
@pytest.mark.parametrize("rows", [1, 33, 64])
def test_tiles_that_are_shared(n: int, k: int, pieces: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tiles on three processors: the last two have several programs each, whoever of them arrives last."""
    monkeypatch.setattr("diptych.model.kernels.stream.PROCESSORS", 3)
    x, weight, arrivals = _inputs(rows, n, k)
    gate, up = (x.double() @ weight.double().T).chunk(2, 1)
    found = stream_gated(x, weight, arrivals, pieces)
    assert not arrivals.any()
    torch.testing.assert_close(found.double(), F.silu(gate) * up, rtol=0, atol=ERROR)
    assert torch.equal(found[:, : 3 * BLOCK_N], stream_gated(x, weight, arrivals, 1)[:, : 3 * BLOCK_N])
    assert torch.equal(found, stream_gated(x, weight, arrivals, pieces))


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_row_does_not_depend_on_the_others(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych.model.kernels.stream.PROCESSORS", 2)  # a tile of three is shared
    x, weight, arrivals = _inputs(64, 384, 256)
    some = stream_gated(x[3:40].contiguous(), weight, arrivals, pieces)
    assert torch.equal(some, stream_gated(x, weight, arrivals, pieces)[3:40])


def test_more_rows_are_refused() -> None:
    x, weight, arrivals = _inputs(ROWS.stop, 64, 64)
    with pytest.raises(ValueError, match="rows"):
        stream_gated(x, weight, arrivals)


def test_it_has_what_the_other_tiles_leave() -> None:
    for n, k in PIECES:
        assert all(stream_wins(rows, n, k) and wins(rows, n, k) is None for rows in ROWS)
        assert not stream_wins(ROWS.start - 1, n, k)
        assert not stream_wins(ROWS.stop, n, k)
    assert not stream_wins(40, 300, 200)
