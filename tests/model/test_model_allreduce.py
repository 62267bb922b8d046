"""The one-shot sum in Triton's interpreter, by processes that share memory; what ranks exchange over gloo besides."""

from __future__ import annotations

from pathlib import Path

import model_oneshot


def test_two_ranks_that_drift_apart_sum_alike(tmp_path: Path) -> None:
    assert model_oneshot.run_ranks(tmp_path, 2) == ["[] [0, 1, 2] True\n"] * 2


def test_three_ranks_sum_in_rank_order(tmp_path: Path) -> None:
    for printed in model_oneshot.run_ranks(tmp_path, 3):
        assert printed.startswith("[] [0, 1, 2]")
