"""Programmatic dependent launch: a kernel starts while the one before it ends, and waits where it needs its results.

Between a layer's products are short kernels; without this, memory idles while each starts and ends. A kernel lets its
successor start at once and waits before it reads anything that another kernel writes. Every kernel of ours waits, so
when one is past its wait, all before it are complete. (CUDA programming guide, "programmatic dependent launch".)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Of a multiprocessor of compute capability 9.0: registers and warps; shared memory in bytes.
SM_REGISTERS, REGISTER_UNIT, SM_WARPS = 65536, 256, 64
SM_SHARED, SHARED_OVERHEAD = 228 << 10, 1 << 10
_overlaps = _products_overlap = False


def set_overlap(on: bool, products: bool | None = None) -> None:
    """Whether kernels launched from now on overlap with the one before, as only Hopper GPUs and newer ones can; whether
    products do (default: as the others). At first none does."""
    global _overlaps, _products_overlap
    _overlaps, _products_overlap = on, on if products is None else products


def can_overlap() -> bool:
    """Whether the GPU knows this kind of launch: a Hopper or a newer one."""
    return torch.cuda.get_device_capability() >= (9, 0)


def options(*, product: bool = False) -> dict[str, bool]:
    """Arguments of every launch."""
    overlaps = _products_overlap if product else _overlaps
    return {"OVERLAP": True, "launch_pdl": True} if overlaps else {"OVERLAP": False}


def resident(compiled: Any) -> int:
    """How many programs of a kernel (what its launch returned) a multiprocessor of a Hopper GPU holds at once."""
    warps = compiled.metadata.num_warps
    registers = -(-compiled.n_regs * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = 4 * (SM_REGISTERS // 4 // registers) // warps  # warps are spread over four schedulers
    return max(1, min(by_registers, SM_SHARED // (compiled.metadata.shared + SHARED_OVERHEAD), SM_WARPS // warps))


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch(places, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ask for the cache lines at these pointers, before waiting: into the second-level cache."""
    if OVERLAP:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [places.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
