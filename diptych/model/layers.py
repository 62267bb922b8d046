"""Building blocks of a decoder: matrix products whose rows do not depend on one another, norms, embeddings.

What a token gets must not depend on what else is in the batch. Products choose their kernel by the number of rows, so
rows come padded (`padded_rows`), and `diptych/model/selftest.py` checks at each start that one kernel serves all sizes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.model.parallel import Parallel
from diptych.model.weights import Slice, WeightSource

PACK_ROWS = 16  # the row count oneDNN is told when it lays a weight out; any is right, this suits decoding


def padded_rows(num_rows: int) -> int:
    """The number of rows that `num_rows` rows are computed as.

    A multiple of 4 (fewer fall into other kernels, with other roundings), in growing steps: each new size costs oneDNN
    about a millisecond once, so there are few.
    """
    step = 4 if num_rows <= 64 else 8 if num_rows <= 128 else 16 if num_rows <= 256 else 32
    return -(-num_rows // step) * step


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can hold this weight in its own layout, which makes products of few rows about twice as fast."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class Linear:
    """`x @ weight.T + bias` for `[rows, in]` with padded rows. Keeps its own copy of `weight` `[out, in]`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, pack: bool = True) -> None:
        self.packed = pack and can_pack(weight)
        self.bias = bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


class RMSNorm:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Embedding:
    """Token embeddings, split by vocabulary over the ranks: each looks up its own tokens, the sum has them all."""

    def __init__(self, table: Tensor, part: Slice, parallel: Parallel) -> None:
        self.table, self.part, self.parallel = table, part, parallel

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.parallel.world == 1:
            return F.embedding(tokens, self.table)
        start, stop = self.part
        mine = (tokens >= start) & (tokens < stop)
        rows = F.embedding(torch.where(mine, tokens - start, 0), self.table)
        return self.parallel.sum(rows * mine.unsqueeze(-1))


def vocab_part(vocab_size: int, parallel: Parallel) -> Slice:
    """This rank's tokens. The last rank may have fewer, even none; heads are padded to equal width."""
    width = -(-vocab_size // parallel.world)
    return min(parallel.rank * width, vocab_size), min((parallel.rank + 1) * width, vocab_size)


def load_vocab(source: WeightSource, name: str, vocab_size: int, hidden: int, parallel: Parallel) -> Tensor:
    """This rank's rows of a `[vocab, hidden]` table, padded with zeros to the width that all ranks have."""
    part = vocab_part(vocab_size, parallel)
    width = -(-vocab_size // parallel.world)
    table = torch.zeros(width, hidden, dtype=source.dtype, device=source.device)
    source.read(table[: part[1] - part[0]], name, (vocab_size, hidden), part)
    return table


def known_tokens(ids: Tensor, last: Tensor) -> Tensor:
    """Token ids, int64: an id of -1 - r stands for `last[r]`, which the device alone may know (see Plan)."""
    ids = ids.long()
    return torch.where(ids < 0, last[(-1 - ids).clamp_(min=0)], ids)
