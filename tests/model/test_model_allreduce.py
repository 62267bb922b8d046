"""Sums of several ranks in Triton's interpreter, by processes that share memory."""

from __future__ import annotations

from pathlib import Path

import model_oneshot
import model_row_shares
import model_split_ranks
import pytest
from model_checkpoints import qwen3, write

from diptych.model.kernels.gated import _first_rows


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_drift_apart_sum_in_rank_order(world: int, tmp_path: Path) -> None:
    assert model_oneshot.run_ranks(tmp_path, world) == ["[]\n"] * world


@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_rows_have_the_bits_of_a_sum_and_a_norm_of_all(world: int, tmp_path: Path) -> None:
    assert model_row_shares.run(tmp_path, world) == ["[]\n"] * world


def test_steps_of_two_ranks_have_the_same_bits_by_shares_of_rows(tmp_path: Path) -> None:
    write(tmp_path / "model", qwen3())
    first, second = model_split_ranks.run(tmp_path)
    assert first == second == "[True, True] 45 12 12\n"


def test_the_first_rows_of_a_product_fill_turns_of_tiles() -> None:
    assert _first_rows(4096, 8192, 12800, 132) == 29 * 128  # 22 turns and 27; halves would take 25 each
    assert _first_rows(2048, 4096, 12800, 132) == 13 * 128  # 10 and 15; halves 13 each
    for own in (1, 127, 128, 2050):
        assert own // 2 <= _first_rows(own, 4500, 12800, 132) <= own
