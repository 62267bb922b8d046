"""Small arrays on their way to the device and back, without waiting for it.

A plain copy to a GPU waits for all that was enqueued before it; one from pinned memory does not, and the pinned
memory's allocator gives it out again only when the copy is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor


def to_device(values: Sequence[Any] | np.ndarray, dtype: DTypeLike, device: torch.device | str) -> Tensor:
    """`values` as a tensor on `device`, in order with what the current stream does."""
    host = torch.from_numpy(np.asarray(values, dtype))
    if torch.device(device).type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """A copy in the host's memory, to be read once an event recorded after this call is done."""
    if values.device.type == "cpu":
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
