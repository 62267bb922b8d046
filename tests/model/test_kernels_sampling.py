"""Draws by kernels against the same by torch: the same tokens, whatever the distribution and whoever is beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.model import draws
from diptych.model.draws import draw
from diptych.model.sampling import sample
from diptych.types import Row, Sampling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 700
CUTS: list[dict[str, Any]] = [
    {},
    {"top_k": 5},
    {"top_p": 0.3},
    {"top_p": 0.95, "temperature": 0.6},
    {"min_p": 0.05},
    {"top_k": 60, "top_p": 0.9, "min_p": 0.01, "temperature": 1.7},
    {"top_k": VOCAB - 1, "top_p": 0.999},
    {"top_p": 0.0},
    {"min_p": 1.0},
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them in a small vocabulary; a list that takes several steps."""
    monkeypatch.setattr(draws, "BLOCK", 256)
    monkeypatch.setattr(draws, "DRAWN", 256)
    monkeypatch.setattr(draws, "LISTED", 128)


def rows_of(count: int, cuts: Sequence[dict[str, Any]] = CUTS) -> list[Row]:
    settings = [Sampling(seed=i, **cuts[i % len(cuts)]) for i in range(count)]
    return [Row(rid="r", num_new=1, num_cached=0, samples=True, sampling=s, position=i) for i, s in enumerate(settings)]


def randn(rows: int, spread: float, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def drawn(rows: list[Row], logits: Tensor) -> list[int]:
    tokens = torch.full((len(rows),), -1, device=DEVICE)
    draw(rows, range(len(rows)), logits.to(DEVICE), tokens)
    return tokens.tolist()


def peaked(logits: Tensor) -> Tensor:
    return logits - 12 + 24 * (torch.arange(VOCAB) % 97 == 0)


@pytest.mark.parametrize(
    ("change", "dtype"),
    [(torch.clone, torch.float32), (peaked, torch.float16), (torch.round, torch.bfloat16)],
    ids=["flat", "peaked", "ties"],
)
def test_tokens_are_those_of_the_torch_path(change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    rows = rows_of(len(CUTS))
    logits = change(randn(len(rows), 2.0)).to(dtype)
    assert drawn(rows, logits) == sample(rows, logits, ()).tolist()


def test_equal_logits_are_cut_by_id() -> None:
    rows = rows_of(6, [{"top_k": 3}, {"top_p": 0.01}, {"top_k": 300, "top_p": 0.5}])
    logits = torch.zeros(6, VOCAB)
    logits[3:] = -0.0
    logits[3:, ::2] = 0.0  # equal all the same
    found = drawn(rows, logits)
    assert found == sample(rows, logits, ()).tolist()
    assert all(token < (3, 7, 150)[i % 3] for i, token in enumerate(found))


def test_tokens_that_cannot_be_are_never_drawn() -> None:
    rows = rows_of(len(CUTS))
    logits = torch.full((len(CUTS), VOCAB), -torch.inf)
    logits[:, [3, 299, 640]] = torch.tensor([-2e4, -2e4 - 1, -2e4 - 2])
    found = drawn(rows, logits)
    assert found == sample(rows, logits, ()).tolist()
    assert set(found) <= {3, 299, 640}


def test_a_draw_depends_on_its_own_row_alone() -> None:
    rows = rows_of(len(CUTS))
    logits = randn(len(rows), 1.0, seed=3)
    together = drawn(rows, logits)
    assert together == [drawn([row], logits[i : i + 1])[0] for i, row in enumerate(rows)]


def test_only_the_rows_that_are_drawn_change() -> None:
    rows, logits = rows_of(3), randn(5, 1.0, seed=4)
    tokens = torch.full((5,), -1, device=DEVICE)
    draw(rows, [4, 0, 2], logits.to(DEVICE), tokens)
    expected = sample(rows, logits[[4, 0, 2]], ()).tolist()
    assert tokens.tolist() == [expected[1], -1, expected[2], -1, expected[0]]


def test_logits_that_are_no_numbers_still_give_a_token() -> None:
    rows = rows_of(len(CUTS))
    assert all(0 <= token < VOCAB for token in drawn(rows, torch.full((len(CUTS), VOCAB), torch.nan)))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_sampling_never_waits_for_the_device() -> None:
    cuts = [*CUTS, {"temperature": 0.0}, {"presence_penalty": 0.5, "repetition_penalty": 1.2, "logit_bias": {5: 4.0}}]
    rows = rows_of(len(cuts), cuts)
    rows[-1].history, rows[-1].num_prompt = [1, 2, 5, 5], 1
    logits = randn(len(rows), 2.0, seed=5)
    on_device = logits.to(DEVICE)
    sample(rows, on_device, (3,))  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = sample(rows, on_device, (3,))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens.tolist() == sample(rows, logits, (3,)).tolist()
