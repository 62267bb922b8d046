"""Programmatic dependent launch: a kernel starts while the one before it ends, and waits where it needs its results.

Between a layer's products are short kernels; without this, memory idles while each starts and ends. A kernel lets its
successor start at once and waits before it reads anything that another kernel writes. Every kernel of ours waits, so
when one is past its wait, all before it are complete. (CUDA programming guide, "programmatic dependent launch".)
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_overlaps = False


def set_overlap(on: bool) -> None:
    """Whether kernels launched from now on overlap. Off until it is measured; needs a Hopper GPU or a newer one."""
    global _overlaps
    _overlaps = on


def options() -> dict[str, bool]:
    """Arguments of every launch."""
    return {"OVERLAP": True, "launch_pdl": True} if _overlaps else {"OVERLAP": False}


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
