"""From logits to tokens. Each row depends on its own logits and request alone, never on the rows beside it.

A token is drawn by the Gumbel-max trick: argmax of logit / temperature + noise, with noise a function of (seed,
position, token id); that is a draw from the softmax (Gumbel 1954; Maddison, Tarlow, Minka, arXiv:1411.0030). Order of
the changes: repetition, frequency and presence penalties, logit_bias, min_new_tokens, grammar mask; then greedy, or
temperature, top_k, top_p (of what top_k left, renormalized), min_p.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diptych.model.noise import gumbel, row_key
from diptych.model.order import ordered_top
from diptych.model.staging import to_device
from diptych.types import Row, Sampling

FIRST_LOOK = 256  # candidates that top_p and min_p look at before they look at all tokens


def sample(rows: Sequence[Row], logits: Tensor, eos_token_ids: Sequence[int], greedy: Tensor | None = None) -> Tensor:
    """The token of each row: `[rows]` int64, on the device of `logits` `[rows, vocab]`, which are not changed.
    `greedy`: their argmax, where it is known.

    Never waits for a GPU: rows that draw do so in kernels (model/draws.py).
    """
    changed = [index for index, row in enumerate(rows) if _changes_logits(row)]
    if changed:
        logits = logits.to(torch.float32, copy=True)
        for index in changed:
            change_logits(rows[index], logits[index], eos_token_ids)
    tokens = logits.argmax(-1) if greedy is None or changed else greedy.clone()  # the lowest id among equals
    drawn = [index for index, row in enumerate(rows) if not row.sampling.greedy]
    if drawn and logits.device.type == "cuda":
        from diptych.model.draws import draw  # Triton is imported only where it is used

        draw([rows[i] for i in drawn], drawn, logits, tokens)
    elif drawn:
        where = to_device(drawn, np.int64, logits.device)
        tokens[where] = _draw([rows[i] for i in drawn], logits.index_select(0, where).float())
    return tokens


# ---- changes of the logits ---------------------------------------------------------------------------------------


def _changes_logits(row: Row) -> bool:
    return bool(
        row.mask is not None
        or row.sampling.logit_bias
        or row.num_output < row.sampling.min_new_tokens
        or row.sampling.penalized
    )


def change_logits(row: Row, logits: Tensor, eos_token_ids: Sequence[int]) -> None:
    """Apply all that comes before temperature to one row `[vocab]`, in place."""
    sampling = row.sampling
    if sampling.penalized:
        _penalize(row, logits)
    if sampling.logit_bias:
        ids = to_device(list(sampling.logit_bias), np.int64, logits.device)
        logits[ids] += to_device(list(sampling.logit_bias.values()), np.float32, logits.device)
    if row.num_output < sampling.min_new_tokens:
        ends = to_device([*eos_token_ids, *sampling.stop_token_ids], np.int64, logits.device)
        logits.index_fill_(0, ends, -torch.inf)
    if row.mask is not None:
        logits.masked_fill_(to_device(_forbidden(row.mask, logits.shape[0]), np.bool_, logits.device), -torch.inf)


def _penalize(row: Row, logits: Tensor) -> None:
    """Repetition: logits of tokens seen in prompt or output are divided (if positive) or multiplied by the penalty
    (Keskar et al., CTRL, arXiv:1909.05858; transformers' RepetitionPenaltyLogitsProcessor). Frequency and presence: the
    count of the token in the output times the one, and the other once if it is there at all, are subtracted (OpenAI's
    API reference, "frequency and presence penalties")."""
    if row.history is None:
        raise ValueError(f"row of {row.rid} has a penalty but no history")
    sampling = row.sampling
    if sampling.repetition_penalty != 1.0:
        seen = to_device(np.unique(row.history), np.int64, logits.device)
        values = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sampling.frequency_penalty or sampling.presence_penalty:
        found, times = np.unique(row.history[row.num_prompt :], return_counts=True)
        counts = to_device(times, np.float32, logits.device)
        logits[to_device(found, np.int64, logits.device)] -= (
            sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
        )


def _forbidden(mask: bytes, vocab_size: int) -> np.ndarray:
    """Bit i of byte i // 8 (little-endian) allows token i; tokens past the mask's end are not allowed."""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[:vocab_size]
    forbidden = np.ones(vocab_size, np.bool_)
    forbidden[: len(bits)] = bits == 0
    return forbidden


# ---- drawing -----------------------------------------------------------------------------------------------------


def _draw(rows: Sequence[Row], logits: Tensor) -> Tensor:
    """One draw a row: `[rows]`."""
    device, vocab_size = logits.device, logits.shape[1]
    scaled = logits / to_device([row.sampling.temperature for row in rows], np.float32, device).unsqueeze(1)
    keys = to_device([row_key(row.sampling.seed, row.position) for row in rows], np.int64, device).unsqueeze(1)
    free = [i for i, row in enumerate(rows) if not _restricted(row.sampling, vocab_size)]
    bound = [i for i, row in enumerate(rows) if _restricted(row.sampling, vocab_size)]
    tokens = torch.empty(len(rows), dtype=torch.int64, device=device)
    if free:
        index = to_device(free, np.int64, device)
        noise = gumbel(keys[index], torch.arange(vocab_size, device=device))
        tokens[index] = (scaled[index] + noise).argmax(-1)
    if bound:
        index = to_device(bound, np.int64, device)
        tokens[index] = _draw_restricted([rows[i].sampling for i in bound], scaled[index], keys[index])
    return tokens


def _restricted(sampling: Sampling, vocab_size: int) -> bool:
    return 0 < sampling.top_k < vocab_size or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _draw_restricted(settings: Sequence[Sampling], scaled: Tensor, keys: Tensor, look: int = FIRST_LOOK) -> Tensor:
    """Draw among the tokens that top_k, top_p and min_p leave. Looks at the `look` likeliest first, and at more for
    rows that may need them: the result is the same, because all that concerns a candidate is what comes before it."""
    vocab_size = scaled.shape[1]
    top_k = [s.top_k if 0 < s.top_k < vocab_size else vocab_size for s in settings]
    count = min(vocab_size, max(k if k < vocab_size else look for k in top_k))
    values, ids = ordered_top(scaled, count)
    keep = _keep(scaled, values, top_k, settings)
    scores = torch.where(keep, values + gumbel(keys, ids), -torch.inf)
    tokens = ids.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
    if max(top_k) == count:
        return tokens
    unsure = [i for i, last in enumerate(keep[:, -1].tolist()) if last and top_k[i] > count]
    if unsure:
        rows = to_device(unsure, np.int64, scaled.device)
        tokens[rows] = _draw_restricted([settings[i] for i in unsure], scaled[rows], keys[rows], look * 8)
    return tokens


def _keep(scaled: Tensor, values: Tensor, top_k: list[int], settings: Sequence[Sampling]) -> Tensor:
    """Which candidates (`values`, likeliest first) stay: `[rows, candidates]`."""
    count, device = values.shape[1], values.device
    limits = to_device(top_k, np.int64, device).unsqueeze(1)
    top_p = to_device([s.top_p for s in settings], np.float64, device).unsqueeze(1)
    min_p = to_device([s.min_p for s in settings], np.float64, device).unsqueeze(1)
    highest = values[:, :1]
    weights = (values - highest).exp().double()
    mass = weights.cumsum(1)
    total = mass.gather(1, (limits - 1).clamp(max=count - 1))  # of what top_k leaves
    if max(top_k) == scaled.shape[1]:
        everything = (scaled - highest).exp().double().sum(1, keepdim=True)
        total = torch.where(limits < scaled.shape[1], total, everything)
    # top_p: the shortest run from the top whose mass reaches top_p, so a token stays if the mass before it does not
    enough = (mass - weights >= top_p * total) & (top_p < 1.0)
    keep = (torch.arange(count, device=device) < limits) & ~enough & (weights >= min_p)
    keep[:, 0] = True
    return keep
