"""Log-probabilities: log_softmax of the raw logits in float32, before any change that sampling makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from diptych.model.order import ordered_top
from diptych.model.staging import to_device, to_host
from diptych.types import LogprobSpec, TokenLogprob

Reader = Callable[[], list[TokenLogprob]]


def token_logprobs(logits: Tensor, tokens: Tensor, specs: Sequence[LogprobSpec]) -> Reader:
    """What each row of `[rows, vocab]` says of its token (`tokens` int64 `[rows]`, on the same device), with the
    alternatives that its spec asks for, equal ones in the order of their ids.

    Enqueues the work; what comes back reads it, once the device has done it.
    """
    table = torch.log_softmax(logits.float(), -1)
    own = to_host(table.gather(1, tokens.unsqueeze(1)).squeeze(1))
    count = min(max(spec.top for spec in specs), table.shape[1])
    best = tuple(map(to_host, ordered_top(table, count))) if count else None
    chosen = {
        row: to_host(table[row].index_select(0, to_device(spec.token_ids, np.int64, table.device)))
        for row, spec in enumerate(specs)
        if spec.token_ids
    }
    ids = to_host(tokens)

    def read() -> list[TokenLogprob]:
        tops: list[list[tuple[float, int]]] = [[]] * len(specs)
        if best is not None:
            tops = [list(zip(v, i, strict=True)) for v, i in zip(best[0].tolist(), best[1].tolist(), strict=True)]
        found = []
        for row, (logprob, token, spec) in enumerate(zip(own.tolist(), ids.tolist(), specs, strict=True)):
            asked = list(zip(chosen[row].tolist(), spec.token_ids, strict=True)) if row in chosen else []
            found.append(TokenLogprob(logprob, token, tops[row][: spec.top], asked))
        return found

    return read
