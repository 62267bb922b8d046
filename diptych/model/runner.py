"""One forward pass and one sampling pass over a plan: the torch side of an engine step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from diptych.config import ServerConfig
from diptych.kv.share import layer_range
from diptych.kv.store import PageStore
from diptych.model.attention import AttentionBackend
from diptych.model.layers import padded_rows
from diptych.model.load import load_model
from diptych.model.logprobs import token_logprobs
from diptych.model.paged_attention import PagedAttention
from diptych.model.parallel import Parallel
from diptych.model.pool import KVPool, PoolStore, kv_page_bytes, pool_pages
from diptych.model.sampling import sample
from diptych.types import LogprobSpec, ModelInfo, Plan, RowResult, StepResult, TokenLogprob

LOGIT_BYTES = 32 << 20  # prompt logprobs: logits held at once


def device_of(config: ServerConfig) -> str:
    """ "cuda" or "cpu": what `--device` asks for."""
    return config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


class Runner:
    """Owns this rank's weights and KV pool. `run` is a function of the plan and of the pages' contents alone.

    `exact` says whether the self-test found that rows do not depend on the batch. Raises ConfigError for a model folder
    or settings that cannot work; `progress` hears what the start is at.
    """

    def __init__(
        self,
        config: ServerConfig,
        parallel: Parallel | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.parallel = parallel or Parallel()
        self.device = device_of(config)
        loaded = load_model(config, self.parallel, self.device, progress)
        self.model, self.exact = loaded.model, loaded.exact
        self.info: ModelInfo = loaded.info
        heads, layers, dim = loaded.model.num_kv_heads, loaded.model.num_layers, loaded.info.head_dim
        most_layers = len(layer_range(loaded.info.num_layers, self.parallel.stages, 0))  # page numbers hold for all
        page_bytes = kv_page_bytes(heads, most_layers, dim, config.page_size, loaded.dtype.itemsize)
        self.num_pages = pool_pages(config, page_bytes, self.info.context_len)
        mib = self.num_pages * page_bytes >> 20
        progress(f"KV pool: {self.num_pages} pages of {config.page_size} tokens, {mib} MiB")
        self.pool = KVPool(self.num_pages, config.page_size, heads, layers, dim, loaded.dtype, self.device)
        self.store: PageStore = PoolStore(self.pool, loaded.info.num_layers)
        self.attention: AttentionBackend = PagedAttention(self.pool, self.model.num_heads, self.model.scale)

    @torch.inference_mode()
    def run(self, plan: Plan) -> StepResult:
        """Compute a step: store the KV of its tokens, sample its rows. Blocks. Ranks above 0 return no rows."""
        started = time.perf_counter()
        torch.get_num_threads()  # makes --cpu-threads hold in the thread that calls; oneDNN would not ask
        sampling = [b for b, row in enumerate(plan.rows) if row.samples]
        targets = [b for b, row in enumerate(plan.rows) if row.prompt_targets]
        wanted = [int(plan.q_starts[b + 1]) - 1 for b in sampling]
        for b in targets:
            first = int(plan.q_starts[b]) + plan.rows[b].target_start
            wanted += range(first, first + len(plan.rows[b].prompt_targets or ()))
        features = self._features(plan, wanted)
        if features is None:
            return StepResult(rows=[], duration_s=time.perf_counter() - started)
        tokens, logprobs = self._sample(plan, sampling, features)
        prompt = self._prompt_logprobs(plan, targets, features[len(sampling) :])
        rows = []
        if self.parallel.leads:
            rows = [RowResult(tokens.get(b, -1), logprobs.get(b), prompt.get(b)) for b in range(len(plan.rows))]
        return StepResult(rows=rows, duration_s=time.perf_counter() - started)

    def _features(self, plan: Plan, wanted: Sequence[int]) -> Tensor | None:
        """The forward pass: what the model says of the tokens `wanted` (places in the plan), `[len(wanted), …]`, on the
        first stage."""
        num_tokens = len(plan.token_ids)
        inputs = np.zeros((2, padded_rows(num_tokens)), np.int64)
        inputs[0, :num_tokens] = plan.token_ids
        inputs[1, :num_tokens] = plan.positions
        tokens, positions = torch.from_numpy(inputs).to(self.device)
        index = np.zeros(padded_rows(len(wanted)), np.int64)
        index[: len(wanted)] = wanted
        self.attention.begin(plan)
        features = self.model.forward(tokens, positions, torch.from_numpy(index).to(self.device), self.attention)
        return None if features is None else features[: len(wanted)]

    def _logits(self, features: Tensor) -> Tensor | None:
        """float32 logits of these features, `[rows, vocab]`; None on ranks above 0."""
        count = features.shape[0]
        padded = features.new_zeros(padded_rows(count), features.shape[1])
        padded[:count] = features
        logits = self.model.logits(padded)
        return None if logits is None else logits[:count]

    def _sample(
        self, plan: Plan, sampling: Sequence[int], features: Tensor
    ) -> tuple[dict[int, int], dict[int, TokenLogprob]]:
        """Token, and logprob if asked for, by row."""
        if not sampling:
            return {}, {}
        logits = self._logits(features[: len(sampling)])
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

    def _prompt_logprobs(self, plan: Plan, targets: Sequence[int], features: Tensor) -> dict[int, list[TokenLogprob]]:
        """Logprobs of the prompt tokens that rows ask for, by row. `features` are those of the targets, in order."""
        found: dict[int, list[TokenLogprob]] = {}
        at = 0
        for b in targets:
            tokens = plan.rows[b].prompt_targets or []
            spec = plan.rows[b].logprobs or LogprobSpec()
            found[b] = self._target_logprobs(tokens, spec, features[at : at + len(tokens)])
            at += len(tokens)
        return found

    def _target_logprobs(self, tokens: list[int], spec: LogprobSpec, features: Tensor) -> list[TokenLogprob]:
        block = max(4, LOGIT_BYTES // (4 * self.info.vocab_size) // 4 * 4)
        found: list[TokenLogprob] = []
        for at in range(0, len(tokens), block):
            part = tokens[at : at + block]
            logits = self._logits(features[at : at + block])
            if logits is not None:
                found += token_logprobs(logits, part, [spec] * len(part))
        return found
