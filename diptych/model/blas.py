"""Products of some rows through cublasLt, where its heuristics choose a better kernel than those of cuBLAS, which torch
asks unless it is told otherwise. The kernels are of one library: for many rows the choices are as good.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.model.layers import Linear

# By (N, K) of 16-bit weights: with how many rows. Measured on one H200 at up to 128 rows, beside our tiles too; for the
# other products of these models the two are as fast.
LT: dict[tuple[int, int], range] = {
    (5120, 8192): range(33, 113),  # Qwen3-32B: o, down
    (5120, 25600): range(33, 129),
    (5120, 12800): range(33, 129),  # half of down, for two ranks
    (4096, 4096): range(65, 97),  # Qwen3-8B: o, down
    (4096, 12288): range(33, 97),
}


def lt_wins(rows: int, n: int, k: int) -> bool:
    return rows in LT.get((n, k), ())


def blas_product(linear: Linear, x: Tensor) -> Tensor:
    """`linear(x)` by the library of the two that has the faster kernel."""
    if linear.bias is not None or x.element_size() != 2 or not x.is_cuda or not lt_wins(len(x), *linear.weight.shape):
        return linear(x)
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        return linear(x)
    finally:
        torch.backends.cuda.preferred_blas_library(before)
