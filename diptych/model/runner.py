"""One forward pass and one sampling pass over a plan: the torch side of an engine step."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from diptych.config import ServerConfig
from diptych.errors import ConfigError
from diptych.kv.store import PageStore
from diptych.model.attention import AttentionBackend, PagedAttention
from diptych.model.config import ModelConfig, load_model_config, model_folder
from diptych.model.decoder import Decoder
from diptych.model.layers import padded_rows
from diptych.model.logprobs import token_logprobs
from diptych.model.parallel import Parallel
from diptych.model.pool import CpuPageStore, KVPool, kv_page_bytes, pool_pages
from diptych.model.sampling import sample
from diptych.model.selftest import activations_are_exact, attention_is_exact, products_are_exact
from diptych.model.weights import open_weights
from diptych.types import LogprobSpec, ModelInfo, Plan, Row, RowResult, StepResult, TokenLogprob

LOGIT_BYTES = 32 << 20  # prompt logprobs: logits held at once


class CausalModel(Protocol):
    """What a runner needs of a model: hidden states of a step's tokens, and logits of some of them."""

    num_heads: int
    num_kv_heads: int  # of this rank
    scale: float

    def forward(self, tokens: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor | None: ...


class Runner:
    """Owns this rank's weights and KV pool. `run` is a function of the plan and of the pages' contents alone.

    `exact` says whether the self-test found that rows do not depend on the batch. Raises ConfigError for a model folder
    or settings that cannot work; `progress` hears what the start is at.
    """

    def __init__(
        self,
        config: ServerConfig,
        rank: int = 0,
        world: int = 1,
        group: ProcessGroup | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.rank = rank
        self.device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        folder = model_folder(config.model_path)
        shape = load_model_config(folder)
        parallel = Parallel(rank, world, group)
        dtype = _dtype(config.dtype, shape.dtype, self.device)
        context_len = _context_len(config.context_length, shape)
        source = open_weights(folder, config.load_format, dtype, config.random_seed)
        with torch.inference_mode():
            pack = products_are_exact(_product_shapes(shape, world), dtype, self.device, pack=True)
            self.exact = pack or products_are_exact(_product_shapes(shape, world), dtype, self.device, pack=False)
            self.model: CausalModel = Decoder(
                shape, source, parallel, context_len, device=self.device, pack=pack, progress=progress
            )
            heads, kv_heads = self.model.num_heads, self.model.num_kv_heads
            self.exact &= attention_is_exact(heads, kv_heads, shape.head_dim, config.page_size, dtype, self.device)
            self.exact &= activations_are_exact(shape.intermediate_size // world, dtype, self.device)
        page_bytes = kv_page_bytes(kv_heads, shape.num_layers, shape.head_dim, config.page_size, dtype.itemsize)
        self.num_pages = pool_pages(config, page_bytes, context_len)
        mib = self.num_pages * page_bytes >> 20
        progress(f"KV pool: {self.num_pages} pages of {config.page_size} tokens, {mib} MiB")
        self.pool = KVPool(
            self.num_pages, config.page_size, kv_heads, shape.num_layers, shape.head_dim, dtype, self.device
        )
        self.store: PageStore = CpuPageStore(self.pool)
        self.attention: AttentionBackend = PagedAttention(self.pool, heads, self.model.scale)
        self.info = ModelInfo(
            architecture=shape.architecture,
            vocab_size=shape.vocab_size,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            kv_dtype=str(dtype).removeprefix("torch."),
            context_len=context_len,
            eos_token_ids=shape.eos_token_ids,
            num_parameters=source.num_parameters,
            weight_bytes=source.num_parameters * dtype.itemsize,
            fingerprint=hashlib.sha256(f"{shape} {source.fingerprint()}".encode()).hexdigest()[:16],
        )

    @torch.inference_mode()
    def run(self, plan: Plan) -> StepResult:
        """Compute a step: store the KV of its tokens, sample its rows. Blocks. Ranks above 0 return no rows."""
        started = time.perf_counter()
        hidden = self._forward(plan)
        tokens, logprobs = self._sample(plan, hidden)
        prompt = self._prompt_logprobs(plan, hidden)
        rows = []
        if self.rank == 0:
            rows = [RowResult(tokens.get(b, -1), logprobs.get(b), prompt.get(b)) for b in range(len(plan.rows))]
        return StepResult(rows=rows, duration_s=time.perf_counter() - started)

    def _forward(self, plan: Plan) -> Tensor:
        """Hidden states `[padded tokens, hidden]`."""
        rows = padded_rows(len(plan.token_ids))
        inputs = np.zeros((2, rows), np.int64)
        inputs[0, : len(plan.token_ids)] = plan.token_ids
        inputs[1, : len(plan.token_ids)] = plan.positions
        tokens, positions = torch.from_numpy(inputs).to(self.device)
        self.attention.begin(plan)
        return self.model.forward(tokens, positions, self.attention)

    def _logits(self, hidden: Tensor, index: Sequence[int]) -> Tensor | None:
        """float32 logits of some rows of `hidden`, `[len(index), vocab]`; None on ranks above 0."""
        padded = np.zeros(padded_rows(len(index)), np.int64)
        padded[: len(index)] = index
        logits = self.model.logits(hidden.index_select(0, torch.from_numpy(padded).to(self.device)))
        return None if logits is None else logits[: len(index)]

    def _sample(self, plan: Plan, hidden: Tensor) -> tuple[dict[int, int], dict[int, TokenLogprob]]:
        """Token, and logprob if asked for, by row."""
        sampling = [b for b, row in enumerate(plan.rows) if row.samples]
        if not sampling:
            return {}, {}
        logits = self._logits(hidden, [int(plan.q_starts[b + 1]) - 1 for b in sampling])
        if logits is None:
            return {}, {}
        rows = [plan.rows[b] for b in sampling]
        tokens = sample(rows, logits, self.info.eos_token_ids).tolist()
        asked = [(i, row.logprobs) for i, row in enumerate(rows) if row.logprobs is not None]
        logprobs: dict[int, TokenLogprob] = {}
        if asked:
            found = token_logprobs(logits[[i for i, _ in asked]], [tokens[i] for i, _ in asked], [s for _, s in asked])
            logprobs = {sampling[i]: logprob for (i, _), logprob in zip(asked, found, strict=True)}
        return dict(zip(sampling, tokens, strict=True)), logprobs

    def _prompt_logprobs(self, plan: Plan, hidden: Tensor) -> dict[int, list[TokenLogprob]]:
        """Logprobs of the prompt tokens that rows ask for, by row."""
        found: dict[int, list[TokenLogprob]] = {}
        for b, row in enumerate(plan.rows):
            if row.prompt_targets:
                first = int(plan.q_starts[b]) + row.target_start
                found[b] = self._target_logprobs(row, hidden, first)
        return found

    def _target_logprobs(self, row: Row, hidden: Tensor, first: int) -> list[TokenLogprob]:
        targets = row.prompt_targets or []
        spec = row.logprobs or LogprobSpec()
        block = max(4, LOGIT_BYTES // (4 * self.info.vocab_size) // 4 * 4)
        found: list[TokenLogprob] = []
        for at in range(0, len(targets), block):
            part = targets[at : at + block]
            logits = self._logits(hidden, range(first + at, first + at + len(part)))
            if logits is not None:
                found += token_logprobs(logits, part, [spec] * len(part))
        return found


def _dtype(asked: str, checkpoint: str, device: str) -> torch.dtype:
    name = asked if asked != "auto" else "float32" if device == "cpu" else checkpoint
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _context_len(asked: int, shape: ModelConfig) -> int:
    if asked > shape.max_context:
        raise ConfigError(
            f"--context-length {asked} is more than this model's positions allow ({shape.max_context}); "
            "choose less, or give its config.json a rope scaling"
        )
    return asked or shape.max_position


def _product_shapes(shape: ModelConfig, world: int) -> list[tuple[int, int]]:
    """(inputs, outputs) of this rank's matrices."""
    inner = shape.intermediate_size // world
    heads = shape.num_heads * shape.head_dim // world
    kv_heads = max(1, shape.num_kv_heads // world) * shape.head_dim
    hidden = shape.hidden_size
    vocab = -(-shape.vocab_size // world)
    return [(hidden, heads + 2 * kv_heads), (heads, hidden), (hidden, 2 * inner), (inner, hidden), (hidden, vocab)]
