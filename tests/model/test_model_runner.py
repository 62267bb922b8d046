"""What the runner makes of a device that fails."""

from __future__ import annotations

import pytest
import torch

from diptych.errors import EngineBroken
from diptych.model.runner import watch_gpu


def refuse() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nMore lines")


def fail(device: str) -> None:
    with watch_gpu(device):
        raise torch.OutOfMemoryError("out of memory")


def test_an_engine_whose_gpu_is_lost_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    with pytest.raises(EngineBroken, match=r"nothing more .*\(CUDA error: an illegal memory access was encountered\)$"):
        fail("cuda")


def test_other_errors_are_the_requests_own(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[None] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
    with pytest.raises(torch.OutOfMemoryError):
        fail("cuda")
    assert len(waits) == 1
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        fail("cpu")
