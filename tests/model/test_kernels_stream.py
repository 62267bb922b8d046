"""The product that gates, through the tensor memory accelerator, against float64; rows in other company."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.model.kernels.fused import silu_mul
from diptych.model.kernels.stream import MAX_ROWS, ROWS, stream_gated, stream_wins
from diptych.model.kernels.tiles import wins

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter has no products of bfloat16
ERROR = {torch.float16: 1e-2, torch.bfloat16: 8e-2}[HALF]


def _inputs(rows: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + n)
    x, weight = torch.randn(rows, k, generator=generator), torch.randn(n, k, generator=generator) / k**0.5
    return x.to(DEVICE, HALF), weight.to(DEVICE, HALF)


@pytest.mark.parametrize(("n", "k"), [(256, 384), (104, 200)])  # what fits the tiles; what does not
@pytest.mark.parametrize("rows", [1, 17, 64])
def test_products(n: int, k: int, rows: int) -> None:
    x, weight = _inputs(rows, n, k)
    product = (x.double() @ weight.double().T).to(HALF)
    gate, up = product.double().chunk(2, 1)
    found = stream_gated(x, weight)
    torch.testing.assert_close(found.double(), F.silu(gate) * up, rtol=0, atol=ERROR)
    torch.testing.assert_close(found, silu_mul(product, HALF), rtol=0, atol=ERROR)


def test_a_row_does_not_depend_on_the_others() -> None:
    x, weight = _inputs(64, 128, 256)
    assert torch.equal(stream_gated(x[3:40].contiguous(), weight), stream_gated(x, weight)[3:40])


def test_more_rows_are_refused() -> None:
    x, weight = _inputs(MAX_ROWS + 1, 64, 64)
    with pytest.raises(ValueError, match="rows"):
        stream_gated(x, weight)


def test_it_has_what_the_other_tiles_leave() -> None:
    for (n, k), rows in ROWS.items():
        assert all(stream_wins(count, n, k) and wins(count, n, k) is None for count in rows)
        assert not stream_wins(rows.start - 1, n, k)
        assert rows.stop <= MAX_ROWS + 1
    assert not stream_wins(40, 300, 200)
