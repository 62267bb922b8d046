"""Which library multiplies: cublasLt has only what our tiles leave, and the preference is as it was."""

from __future__ import annotations

import pytest
import torch

from diptych.model.blas import LT, blas_product, lt_wins
from diptych.model.kernels.tiles import wins
from diptych.model.layers import Linear


def test_our_tiles_leave_these_rows() -> None:
    for (n, k), rows in LT.items():
        for count in rows:
            assert lt_wins(count, n, k)
            assert wins(count, n, k) is None
        assert not lt_wins(rows.stop, n, k)
    assert not lt_wins(64, 300, 200)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cublasLt is for GPUs")
@pytest.mark.parametrize(("n", "k"), LT)
def test_products_through_cublaslt(n: int, k: int) -> None:
    generator = torch.Generator("cuda").manual_seed(n)
    linear = Linear(torch.randn(n, k, device="cuda", generator=generator).to(torch.bfloat16) / k**0.5, None)
    before = torch.backends.cuda.preferred_blas_library()
    for rows in (1, 64):
        x = torch.randn(rows, k, device="cuda", generator=generator).to(torch.bfloat16)
        exact = x.double() @ linear.weight.double().T
        torch.testing.assert_close(blas_product(linear, x).double(), exact, rtol=0, atol=4e-2)
        assert torch.backends.cuda.preferred_blas_library() == before
