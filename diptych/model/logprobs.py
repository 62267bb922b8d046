"""Log-probabilities: log_softmax of the raw logits in float32, before any change that sampling makes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diptych.model.order import ordered_top
from diptych.types import LogprobSpec, TokenLogprob


def token_logprobs(logits: Tensor, tokens: Sequence[int], specs: Sequence[LogprobSpec]) -> list[TokenLogprob]:
    """What each row of float32 `[rows, vocab]` says of its token, with the alternatives that its spec asks for.

    Equal alternatives come in the order of their ids.
    """
    table = torch.log_softmax(logits, -1)
    own = table.gather(1, torch.tensor(tokens, device=table.device).unsqueeze(1)).squeeze(1).tolist()
    count = min(max(spec.top for spec in specs), table.shape[1])
    best: list[list[tuple[float, int]]] = [[]] * len(specs)
    if count:
        values, ids = ordered_top(table, count)
        best = [list(zip(v, i, strict=True)) for v, i in zip(values.tolist(), ids.tolist(), strict=True)]
    return [
        TokenLogprob(logprob, token, top[: spec.top], _chosen(table[row], spec))
        for row, (logprob, token, top, spec) in enumerate(zip(own, tokens, best, specs, strict=True))
    ]


def _chosen(row: Tensor, spec: LogprobSpec) -> list[tuple[float, int]]:
    if not spec.token_ids:
        return []
    return list(zip(row[list(spec.token_ids)].tolist(), spec.token_ids, strict=True))
