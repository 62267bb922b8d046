"""Products for deterministic mode: against float64, and a row's bits among any others."""

from __future__ import annotations

import pytest
import torch

from diptych.model.kernels.fixed import fixed_product
from diptych.model.pool import KVPool
from diptych.model.selftest import attention_is_exact
from diptych.model.triton_attention import TritonAttention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter has no products of bfloat16
ERROR = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("n", "k"), [(128, 192), (100, 200)])
def test_products_of_few_rows_and_of_many(n: int, k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    weight = (torch.randn(n, k, generator=generator) / k**0.5).to(DEVICE, dtype)
    wide = torch.randn(1300, k + 16, generator=generator).to(DEVICE, dtype)
    x = wide[:, :k]  # rows with gaps between them; 11 tiles: more than a group
    whole = fixed_product(x, weight)
    torch.testing.assert_close(whole.double(), x.double() @ weight.double().T, rtol=0, atol=ERROR[dtype])
    for rows in (slice(5, 6), slice(7, 10), slice(3, 60), slice(1000, 1200)):
        assert torch.equal(fixed_product(x[rows], weight), whole[rows])


@pytest.mark.parametrize("stored", [HALF, torch.float8_e4m3fn])
def test_attention_is_tried_over_a_pool_of_the_servers_type(stored: torch.dtype) -> None:
    pools: list[KVPool] = []

    def backend(pool: KVPool) -> TritonAttention:
        pools.append(pool)
        return TritonAttention(pool, 4, 0.1, fixed=True)

    assert attention_is_exact(4, 2, 16, 16, HALF, DEVICE, backend, stored)
    assert [pool.pages.dtype for pool in pools] == [stored]
