"""A step's metadata: arrays of int32, gathered in pinned memory and copied to the device at once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from diptych.types import I32

ALIGN = 16  # int32 numbers: sections start at multiples of 64 bytes, so that kernels are compiled for one alignment


class DeviceArrays:
    """Named arrays in one tensor on the device, at places that `capacities` (numbers of int32, by name) fix."""

    def __init__(self, capacities: Mapping[str, int], device: torch.device) -> None:
        self.capacities = dict(capacities)
        self.offsets: dict[str, int] = {}
        size = 0
        for name, capacity in capacities.items():
            self.offsets[name] = size
            size += -(-capacity // ALIGN) * ALIGN
        self.whole = torch.empty(size, dtype=torch.int32, device=device)

    def __getitem__(self, name: str) -> Tensor:
        """All that there is room for: what lies beyond the latest upload is stale."""
        return self.whole[self.offsets[name] :][: self.capacities[name]]

    def holds(self, arrays: Mapping[str, I32]) -> bool:
        return all(len(array) <= self.capacities[name] for name, array in arrays.items())


class _Host:
    """Memory that arrays are gathered in. `copied`: when the latest copy of it is done."""

    def __init__(self, size: int, pinned: bool) -> None:
        self.whole = torch.empty(size, dtype=torch.int32, pin_memory=pinned)
        self.numbers: np.ndarray = self.whole.numpy()
        self.copied = torch.cuda.Event() if pinned else None


class Uploader:
    """Copies arrays to the device without waiting for it. Two host buffers take turns; one is written again only when
    its copy is done, which a loop one step ahead of the device never has to wait for."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._hosts = [_Host(0, self._pinned) for _ in range(2)]

    def upload(self, arrays: Mapping[str, I32], target: DeviceArrays) -> None:
        """In one copy on the current stream. `arrays` fit and come in the target's order, the largest last."""
        self._hosts.reverse()
        host = self._hosts[0]
        if host.copied is not None:
            host.copied.synchronize()
        used = max(target.offsets[name] + len(array) for name, array in arrays.items())
        if len(host.numbers) < used:
            host = self._hosts[0] = _Host(2 * used, self._pinned)
        for name, array in arrays.items():
            start = target.offsets[name]
            host.numbers[start : start + len(array)] = array
        target.whole[:used].copy_(host.whole[:used], non_blocking=True)
        if host.copied is not None:
            host.copied.record()
