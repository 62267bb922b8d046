"""One forward pass and one sampling pass over a plan: the torch side of an engine step.

A step is launched, then collected. On a GPU launching only enqueues the work, so that the next step can be launched
behind it before the tokens of this one are known on the host: its plan refers to them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diptych.config import ServerConfig
from diptych.errors import EngineBroken, StepFailed
from diptych.kv.share import layer_range
from diptych.kv.store import PageStore
from diptych.model.attention import AttentionBackend
from diptych.model.gpu_store import make_store
from diptych.model.layers import known_tokens, padded_rows
from diptych.model.load import load_model
from diptych.model.logprobs import Reader, token_logprobs
from diptych.model.memory import kv_page_bytes, pool_pages
from diptych.model.paged_attention import PagedAttention
from diptych.model.parallel import Parallel
from diptych.model.pool import KVPool
from diptych.model.sampling import sample
from diptych.model.staging import to_device, to_host
from diptych.model.warm_up import warm_up_plans
from diptych.types import LogprobSpec, ModelInfo, Plan, Row, RowResult, StepResult, TokenLogprob

if TYPE_CHECKING:
    from diptych.model.graphs import StepGraphs

LOGIT_BYTES = 32 << 20  # prompt logprobs: logits held at once
LEAST_ROWS = 1024  # of a plan that are provided for, whatever the settings


def device_of(config: ServerConfig) -> str:
    """ "cuda" or "cpu": what `--device` asks for."""
    return config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def watch_gpu(device: str) -> Iterator[None]:
    """Lets errors through, but raises EngineBroken instead where no later step can succeed: after some (a bad address,
    a memory fault; not lack of memory) CUDA refuses everything to the process. After an error it waits for the device.
    """
    try:
        yield
    except Exception as error:
        if device == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception as end:
                reason = str(end).partition("\n")[0]
                raise EngineBroken(f"the GPU computes nothing more for this process ({reason})") from error
        raise


@dataclass(slots=True)
class Pending:
    """A step that was launched. What it holds of the host's memory is there once `done` is."""

    plan: Plan
    launched_at: float
    sampling: list[int]  # rows that sample
    eager: bool = False  # see StepResult
    tokens: Tensor | None = None  # theirs; None on ranks that do not sample
    logprobs: tuple[list[int], Reader] | None = None  # rows that ask for them
    prompts: list[tuple[int, list[Reader]]] = field(default_factory=list)
    done: torch.cuda.Event | None = None
    error: Exception | None = None  # why there are no results


class Runner:
    """Owns this rank's weights and KV pool. A step is a function of the plan and of the pages' contents alone.

    `exact` says whether the self-test found that rows do not depend on the batch; `overlaps`, whether `launch` returns
    before the step is computed. Raises ConfigError for a model folder or settings that cannot work; `progress` hears
    what the start is at. `launch` and `collect` are for one thread, and raise EngineBroken when the GPU is lost.
    """

    def __init__(
        self,
        config: ServerConfig,
        parallel: Parallel | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.parallel = parallel or Parallel()
        self.device = device_of(config)
        config = config.on_device(self.device)
        self.overlaps = self.device == "cuda"
        self.pad: Callable[[int], int] = padded_rows if self.device == "cpu" else int  # rows to the rows computed
        loaded = load_model(config, self.parallel, self.device, progress)
        self.model, self.exact = loaded.model, loaded.exact
        self.info: ModelInfo = loaded.info
        heads, layers, dim = loaded.model.num_kv_heads, loaded.model.num_layers, loaded.info.head_dim
        most_layers = len(layer_range(loaded.info.num_layers, self.parallel.stages, 0))  # page numbers hold for all
        page_bytes = kv_page_bytes(heads, most_layers, dim, config.page_size, loaded.kv_dtype.itemsize)
        self.num_pages = pool_pages(config, page_bytes, loaded)
        mib = self.num_pages * page_bytes >> 20
        progress(f"KV pool: {self.num_pages} pages of {config.page_size} tokens, {mib} MiB")
        self.pool = KVPool(self.num_pages, config.page_size, heads, layers, dim, loaded.kv_dtype, self.device)
        self.store: PageStore = make_store(self.pool, loaded.info.num_layers)
        rows = max(config.max_running_requests, LEAST_ROWS)
        self._last = torch.zeros(rows, dtype=torch.int64, device=self.device)  # tokens of the latest step, by row
        self._collected_at = 0.0
        self._graphs: StepGraphs | None = None
        self.attention: AttentionBackend
        if config.attention_backend == "triton":
            from diptych.model.gpu import capture, fuse, is_exact

            self.model, self.attention = fuse(config, self.model, self.pool)
            self.exact = is_exact(self.model, self.attention, loaded.dtype)
            context = self.info.context_len
            if self.overlaps:
                longest = min(config.chunked_prefill_size, context)
                for plan in warm_up_plans(config.page_size, longest, config.max_running_requests):
                    progress(f"first steps: {len(plan.token_ids)} tokens")
                    self.run(plan)
            self._graphs = capture(config, self.model, self.attention, self._last, context, progress)
            if self.overlaps and self.parallel.leads:
                from diptych.model.draws import compile_draws

                compile_draws(loaded.dtype, self.info.vocab_size, self.device)
        else:
            self.attention = PagedAttention(self.pool, self.model.num_heads, self.model.scale)

    def run(self, plan: Plan) -> StepResult:
        """Compute a step: store the KV of its tokens, sample its rows. Blocks. Ranks above 0 return no rows."""
        return self.collect(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Pending:
        """Enqueue a step. In `plan.token_ids`, -1 - r is the token that row r of the plan launched before samples."""
        with watch_gpu(self.device):
            return self._launch(plan)

    def _launch(self, plan: Plan) -> Pending:
        torch.get_num_threads()  # makes --cpu-threads hold in the thread that calls; oneDNN would not ask
        pending = Pending(plan, time.perf_counter(), [b for b, row in enumerate(plan.rows) if row.samples])
        targets = [b for b, row in enumerate(plan.rows) if row.prompt_targets]
        wanted = [int(plan.q_starts[b + 1]) - 1 for b in pending.sampling]
        for b in targets:
            first = int(plan.q_starts[b]) + plan.rows[b].target_start
            wanted += range(first, first + len(plan.rows[b].prompt_targets or ()))
        captured = None
        if self._graphs is not None and not targets:
            captured = self._graphs.launch(plan, wanted)
            pending.eager = captured is None and len(plan.token_ids) == len(plan.rows) == len(wanted)
        if captured is not None:
            if pending.sampling:
                self._sample(pending, captured.logits, captured.greedy)
        elif (features := self._features(plan, wanted)) is not None:
            if pending.sampling:
                self._sample(pending, self._logits(features[: len(pending.sampling)]))
            self._read_prompts(pending, targets, features[len(pending.sampling) :])
        if self.overlaps:
            pending.done = torch.cuda.Event()
            pending.done.record()
        return pending

    def collect(self, pending: Pending) -> StepResult:
        """Wait for a launched step: its results. Raises StepFailed for what went wrong on this rank alone."""
        if pending.done is not None:
            with watch_gpu(self.device):
                pending.done.synchronize()
        now = time.perf_counter()
        duration_s = now - max(pending.launched_at, self._collected_at)
        self._collected_at = now
        if pending.error is not None:
            raise StepFailed("the model's results could not be made tokens of") from pending.error
        if not self.parallel.leads:
            return StepResult(rows=[], duration_s=duration_s)
        rows = [RowResult(-1) for _ in pending.plan.rows]
        if pending.tokens is not None:
            for b, token in zip(pending.sampling, pending.tokens.tolist(), strict=True):
                rows[b].token = token
        if pending.logprobs is not None:
            for b, logprob in zip(pending.logprobs[0], pending.logprobs[1](), strict=True):
                rows[b].logprob = logprob
        for b, readers in pending.prompts:
            found: list[TokenLogprob] = []
            for read in readers:
                found += read()
            rows[b].prompt_logprobs = found
        return StepResult(rows=rows, duration_s=duration_s, eager=pending.eager)

    # ---- the forward pass --------------------------------------------------------------------------------------------

    def _features(self, plan: Plan, wanted: Sequence[int]) -> Tensor | None:
        """What the model says of the tokens `wanted` (places in the plan), `[len(wanted), …]`, on the first stage."""
        num_tokens = len(plan.token_ids)
        inputs = np.zeros((2, self.pad(num_tokens)), np.int64)
        inputs[0, :num_tokens] = plan.token_ids
        inputs[1, :num_tokens] = plan.positions
        tokens, positions = to_device(inputs, np.int64, self.device)
        if plan.token_ids.min(initial=0) < 0:
            tokens = known_tokens(tokens, self._last)
        index = np.zeros(self.pad(len(wanted)), np.int64)
        index[: len(wanted)] = wanted
        self.attention.begin(plan)
        features = self.model.forward(tokens, positions, to_device(index, np.int64, self.device), self.attention)
        return None if features is None else features[: len(wanted)]

    def _logits(self, features: Tensor) -> Tensor | None:
        """Logits of these features, `[rows, vocab]`; None on ranks above 0."""
        count = features.shape[0]
        if self.pad(count) != count:
            padded = features.new_zeros(self.pad(count), features.shape[1])
            padded[:count] = features
            features = padded
        logits = self.model.logits(features)
        return None if logits is None else logits[:count]

    # ---- what comes of it --------------------------------------------------------------------------------------------

    @contextmanager
    def _apart(self, pending: Pending) -> Iterator[None]:
        """For what this rank does without the others. They go on with the step, and so must it: an error waits until
        `collect`.
        """
        try:
            with watch_gpu(self.device):
                yield
        except EngineBroken:
            raise
        except Exception as error:
            pending.error = pending.error or error

    def _sample(self, pending: Pending, logits: Tensor | None, greedy: Tensor | None = None) -> None:
        """Enqueue the choice of a token for each row that samples. `greedy`: the argmax of `logits`, if it is known."""
        sampling = pending.sampling
        rows = [pending.plan.rows[b] for b in sampling]
        tokens = None
        if logits is not None:
            with self._apart(pending):
                tokens = sample(rows, logits, self.info.eos_token_ids, greedy)
        elif not self.overlaps:
            return  # this rank's plans never refer to tokens
        if tokens is None:  # another rank's, or none at all
            tokens = torch.zeros(len(rows), dtype=torch.int64, device=self.device)
        if self.overlaps:
            self.parallel.share_tokens(tokens)
        self._remember(tokens, sampling, len(pending.plan.rows))
        if logits is not None and pending.error is None:
            with self._apart(pending):
                self._tell(pending, rows, tokens, logits)

    def _tell(self, pending: Pending, rows: Sequence[Row], tokens: Tensor, logits: Tensor) -> None:
        """Enqueue what goes to the host of the rows that sample."""
        asked = [i for i, row in enumerate(rows) if row.logprobs is not None]
        if asked:
            index = to_device(asked, np.int64, self.device)
            specs = [row.logprobs or LogprobSpec() for row in rows if row.logprobs is not None]
            reader = token_logprobs(logits.index_select(0, index), tokens.index_select(0, index), specs)
            pending.logprobs = [pending.sampling[i] for i in asked], reader
        pending.tokens = to_host(tokens)

    def _remember(self, tokens: Tensor, sampling: Sequence[int], num_rows: int) -> None:
        """Keep the rows' tokens on the device, for the next step."""
        if len(sampling) == num_rows:
            self._last[:num_rows] = tokens
        else:
            self._last[to_device(sampling, np.int64, self.device)] = tokens

    def _read_prompts(self, pending: Pending, targets: Sequence[int], features: Tensor) -> None:
        """Enqueue the logprobs of the prompt tokens that rows ask for. `features`: those of the targets, in order."""
        at = 0
        for b in targets:
            row = pending.plan.rows[b]
            tokens = row.prompt_targets or []
            spec = row.logprobs or LogprobSpec()
            readers = self._target_logprobs(pending, tokens, spec, features[at : at + len(tokens)])
            pending.prompts.append((b, readers))
            at += len(tokens)

    def _target_logprobs(
        self, pending: Pending, tokens: list[int], spec: LogprobSpec, features: Tensor
    ) -> list[Reader]:
        block = max(4, LOGIT_BYTES // (4 * self.info.vocab_size) // 4 * 4)
        readers: list[Reader] = []
        for at in range(0, len(tokens), block):
            part = tokens[at : at + block]
            logits = self._logits(features[at : at + block])
            if logits is not None:
                with self._apart(pending):
                    readers.append(token_logprobs(logits, to_device(part, np.int64, self.device), [spec] * len(part)))
        return readers
