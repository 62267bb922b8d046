"""Sums of several ranks in Triton's interpreter, by processes that share memory."""

from __future__ import annotations

from pathlib import Path

import model_oneshot
import model_row_shares
import pytest


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_drift_apart_sum_in_rank_order(world: int, tmp_path: Path) -> None:
    assert model_oneshot.run_ranks(tmp_path, world) == ["[]\n"] * world


@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_rows_have_the_bits_of_a_sum_and_a_norm_of_all(world: int, tmp_path: Path) -> None:
    assert model_row_shares.run(tmp_path, world) == ["[]\n"] * world
