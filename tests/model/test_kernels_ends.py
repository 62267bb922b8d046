"""Embedding with the first norm, and argmax, against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diptych.model.kernels.ends import BLOCK, argmax, embed_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cuts bfloat16 off, it does not round


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("width", [48, 1280])
def test_embedding_and_norm(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    table = torch.randn(50, width, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(width, generator=generator).to(DEVICE, dtype)
    ids = torch.tensor([3, -1, 49, -3, 0], dtype=torch.int32, device=DEVICE)
    last = torch.tensor([7, 8, 9], device=DEVICE)
    x, normed = embed_norm(ids, last, table, weight, 1e-6)
    assert torch.equal(x, table[torch.tensor([3, 7, 49, 9, 0], device=DEVICE)])
    exact = F.rms_norm(x.double(), (width,), weight.double(), 1e-6)
    error = 1e-6 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(normed.double(), exact, rtol=error, atol=error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_argmax(dtype: torch.dtype) -> None:
    rows, width = 9, 2 * BLOCK + 300
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(rows, width + 4, generator=generator).to(DEVICE, dtype)
    logits = wide[:, :width]  # rows with gaps between them, in which larger numbers stand
    wide[:, width:] = 1e4
    logits[1] = -logits[1].abs() - 1  # all negative
    logits[2] = -torch.inf
    logits[3, 5000] = torch.inf
    logits[4, [17, BLOCK + 3, width - 1]] = 9.0  # equals, over several blocks
    logits[5] = logits[5].clamp(max=-1)
    logits[5, 4000], logits[5, 30] = 0.0, -0.0
    logits[6] = 2.5
    logits[7, width - 1] = 100.0
    arrivals = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    first = [int((row == row.max()).nonzero()[0, 0]) for row in logits]
    assert first[2:8] == [0, 5000, 17, 30, 0, width - 1]
    for _ in range(2):  # the second time with the arrivals that the first one left
        assert argmax(logits, arrivals).tolist() == first
    assert not arrivals.any()
    logits[0] = torch.nan
    logits[1] = -logits[0]
    found = argmax(logits, arrivals).tolist()
    assert found[2:] == first[2:]
    assert all(0 <= token < width for token in found)
