"""The steps before the first request: plans as a scheduler could make them, but for slots, of which they have none."""

from __future__ import annotations

import numpy as np
import pytest

from diptych.model.kernels.schedule import decode_rows, prefill_tiles
from diptych.model.warm_up import COMPANY, PROMPTS, warm_up_plans


def rows_and_tokens(page_size: int, most_tokens: int, most_rows: int) -> list[tuple[int, int]]:
    return [(len(plan.rows), len(plan.token_ids)) for plan in warm_up_plans(page_size, most_tokens, most_rows)]


def test_there_are_prompts_alone_and_rows_that_decode_with_and_without_one() -> None:
    prompts = [(1, length) for length in PROMPTS]
    company = [(count + rows, count + tokens) for count in COMPANY for rows, tokens in ((0, 0), (1, 2))]
    assert rows_and_tokens(64, 8192, 256) == prompts + company


@pytest.mark.parametrize("most_rows", [2, 16, 31, 256])
def test_some_hold_a_prompt_beside_rows_that_decode(most_rows: int) -> None:
    plans = warm_up_plans(64, 8192, most_rows)
    assert any(len(decode_rows(plan)) and len(prefill_tiles(plan, 16)) for plan in plans)


@pytest.mark.parametrize("most_rows", [1, 2, 19, 20, 256])
@pytest.mark.parametrize("most_tokens", [1, 16, 64, 512, 8192])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_they_keep_the_bounds_and_fit_together(page_size: int, most_tokens: int, most_rows: int) -> None:
    for plan in warm_up_plans(page_size, most_tokens, most_rows):
        new = np.diff(plan.q_starts)
        assert len(plan.rows) <= most_rows and sum(new) == len(plan.token_ids) <= max(most_tokens, most_rows)
        assert [row.num_new for row in plan.rows] == list(new)
        assert [row.num_cached + row.num_new for row in plan.rows] == list(plan.kv_lens)
        ends = plan.positions[plan.q_starts[1:] - 1]
        assert list(ends + 1) == list(plan.kv_lens)
        assert plan.pages.shape == (len(plan.rows), -(-max(plan.kv_lens) // page_size)) and not plan.pages.any()
        assert len(plan.slots) == len(plan.token_ids) and (plan.slots == -1).all()
