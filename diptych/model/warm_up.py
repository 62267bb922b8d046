"""Steps that nobody asked for, when a runner starts: what runs for the first time on a GPU is compiled or loaded, and
would take seconds of the first requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from diptych.types import LogprobSpec, Plan, Row, Sampling

# Kernels of few rows are compiled by powers of two of rows from 16 to 64, and others run above, and from 1,024 on.
PROMPTS = (5, 17, 33, 65, 1024)  # tokens: rows of the layers
COMPANY = (1, 19, 39)  # decoding rows beside a prompt: rows of what follows the last layer's attention
CACHED = 4  # tokens that such a row has
GREEDY, ASKED = Sampling(temperature=0.0), LogprobSpec()


def warm_up_plans(page_size: int, most_tokens: int, most_rows: int) -> Iterator[Plan]:
    """Prompts alone, decoding rows alone, and both together; up to so many tokens and rows, which all sample. They
    store nothing: what they read is whatever page 0 holds, and what comes of them means nothing."""
    for length in sorted({min(length, most_tokens) for length in PROMPTS}):
        yield _plan([(0, length)], page_size)
    for company in sorted({min(company, most_rows) for company in COMPANY}):
        yield _plan([(CACHED, 1)] * company, page_size)
        if company < most_rows and company + 2 <= most_tokens:  # a prompt of one token would decode
            yield _plan([(CACHED, 1)] * company + [(0, 2)], page_size)


def _plan(parts: Sequence[tuple[int, int]], page_size: int) -> Plan:
    """A row for each (cached, new)."""
    lengths = [cached + new for cached, new in parts]
    num_tokens = sum(new for _, new in parts)
    return Plan(
        step=0,
        rows=[
            Row(rid="", num_new=new, num_cached=cached, samples=True, sampling=GREEDY, position=0, logprobs=ASKED)
            for cached, new in parts
        ],
        token_ids=np.zeros(num_tokens, np.int32),
        positions=np.concatenate([np.arange(cached, cached + new, dtype=np.int32) for cached, new in parts]),
        slots=np.full(num_tokens, -1, np.int64),
        q_starts=np.cumsum([0, *(new for _, new in parts)], dtype=np.int32),
        kv_lens=np.array(lengths, np.int32),
        pages=np.zeros((len(parts), -(-max(lengths) // page_size)), np.int32),
    )
