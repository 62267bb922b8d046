"""The words every room uses: requests, sampling, plans, results, and the messages between processes.

Everything here is plain data (msgspec structs, numpy arrays): no behaviour, no I/O, no torch.
Times are seconds; `_s` fields are durations, `_at` fields are points on the event loop's clock (`loop.time()`).
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


# ---- what a client asks for -------------------------------------------------------------------------------------


class Grammar(msgspec.Struct, frozen=True):
    """A constraint on the output. `kind`: json_schema | regex | ebnf (Lark/GBNF text) | json_object (text unused)."""

    kind: str
    text: str = ""


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How tokens are chosen. Names and meanings as in SGLang's SamplingParams; validated at the API edge.

    `seed` is always set once a request has left the API process: noise is a function of (seed, position) alone.
    `stop` strings are matched in the API process, on text; all the rest is the engine's.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0  # below 1e-6: greedy
    top_p: float = 1.0
    top_k: int = -1  # -1: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None
    grammar_after: int | None = None  # token id (</think>) after which the grammar begins; None: at once

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-6 or self.top_k == 1

    @property
    def penalized(self) -> bool:
        """The choice depends on which tokens have occurred so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class LogprobSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which log-probabilities to return. They are log_softmax of the model's raw logits, before any sampling change."""

    prompt_start: int = -1  # first prompt position to report; -1: output tokens only
    top: int = 0  # alternatives a position
    token_ids: tuple[int, ...] = ()  # these tokens' logprobs at each position


class Bootstrap(msgspec.Struct, frozen=True):
    """Where a request's prefill happens, and the room in which the two servers meet (SGLang's three fields)."""

    host: str
    port: int
    room: int


FAKE_BOOTSTRAP_HOST = "2.2.2.2"  # a hand-over with nobody: health checks, warm-up, decode-only benchmarks


class Request(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One sequence to generate. `n` > 1 and batches are split before they get here."""

    rid: str
    prompt: list[int]
    sampling: Sampling
    namespace: str = ""  # tenant salt: the radix cache never crosses it
    logprobs: LogprobSpec | None = None
    bootstrap: Bootstrap | None = None


# ---- what comes back ---------------------------------------------------------------------------------------------


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """`logprob` is None only for the first token of a prompt."""

    logprob: float | None
    token: int
    top: list[tuple[float, int]] = []
    chosen: list[tuple[float, int]] = []  # for LogprobSpec.token_ids, in that order


class Finish(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a request ended. `type`: stop | length | abort. `matched`: the stop token id or string, None for length.

    For abort, `status` is the HTTP status, `code` the error code and `message` the reason.
    """

    type: str
    matched: int | str | None = None
    message: str = ""
    status: int = 200
    code: str = ""


class Output(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """New tokens of one request. Exactly one Output of a request carries `finish`, and it is the last."""

    rid: str
    tokens: list[int] = []
    logprobs: list[TokenLogprob] | None = None  # one a token, if asked for
    prompt_logprobs: list[TokenLogprob] | None = None  # once, with the first token
    finish: Finish | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    num_retractions: int = 0


class FirstToken(msgspec.Struct, frozen=True):
    """What prefill hands to decode besides KV pages: the first sampled token and what belongs to it."""

    token: int
    cached_tokens: int  # prompt tokens that prefill did not have to compute
    logprob: TokenLogprob | None = None


# ---- one step of the engine --------------------------------------------------------------------------------------


class Row(msgspec.Struct, kw_only=True):
    """One sequence's part of a step: `num_new` tokens that continue after `num_cached` tokens already in its pages."""

    rid: str
    num_new: int
    num_cached: int
    samples: bool  # this row's last position yields a token
    sampling: Sampling
    position: int  # position in the sequence of the token to be sampled (the noise's counter)
    history: list[int] | None = None  # prompt + output so far; only when a penalty needs it
    num_prompt: int = 0  # how many of `history` are prompt
    num_output: int = 0  # tokens generated before this step (min_new_tokens)
    logprobs: LogprobSpec | None = None
    prompt_targets: list[int] | None = None  # prompt logprobs: prompt_targets[i] is the token that follows this row's
    target_start: int = 0  # input token target_start + i; its logprob comes from that input token's logits
    mask: bytes | None = None  # allowed tokens, little-endian bit i of byte i//8; filled by the engine, None: all


class Plan(msgspec.Struct, kw_only=True):
    """One forward pass over B sequences and T tokens in all, in row order. Page ids are those of every rank."""

    step: int
    rows: list[Row]  # B
    token_ids: I32  # [T] inputs
    positions: I32  # [T]
    slots: I64  # [T] where each token's KV goes: page * page_size + offset
    q_starts: I32  # [B + 1] row b owns tokens q_starts[b]:q_starts[b + 1]
    kv_lens: I32  # [B] tokens in the cache after this step
    pages: I32  # [B, max pages of a row], padded with 0


class RowResult(msgspec.Struct, array_like=True):
    token: int  # -1: this row sampled nothing
    logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


class StepResult(msgspec.Struct, kw_only=True):
    rows: list[RowResult]  # B, in the plan's order
    duration_s: float = 0.0
    eager: bool = False  # a decode step that no CUDA graph took, though there are some


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the other rooms must know of the loaded model. `fingerprint` must agree between prefill and decode."""

    architecture: str
    vocab_size: int
    num_layers: int
    num_kv_heads: int  # of the whole model
    head_dim: int
    kv_dtype: str  # "float32", "bfloat16", ...
    context_len: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    weight_bytes: int
    fingerprint: str


# ---- API process <-> engine process ------------------------------------------------------------------------------


class Submit(msgspec.Struct, tag="submit"):
    request: Request


class Abort(msgspec.Struct, tag="abort", omit_defaults=True):
    """Abort one request; `rid` "" aborts all. Client and the other side of a hand-over get `message` and `code`."""

    rid: str
    message: str = "aborted by the client"
    code: str = "aborted"


class Complete(msgspec.Struct, tag="complete"):
    """The text of a request is complete (a stop string, which only the API process sees): generate no more of it."""

    rid: str


class Control(msgspec.Struct, tag="control", omit_defaults=True):
    """Ask the engine for something besides tokens. `op`: flush_cache | pause | continue | state | audit."""

    id: int
    op: str
    args: dict[str, Any] = {}


class Outputs(msgspec.Struct, tag="outputs"):
    """All that one step produced, and the state after it."""

    outputs: list[Output]
    stats: Stats | None = None


class ControlReply(msgspec.Struct, tag="control_reply", omit_defaults=True):
    id: int
    ok: bool
    result: dict[str, Any] = {}


class Stats(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A snapshot for metrics and load reports. Counters only grow; histogram samples are those since the last one."""

    num_running_reqs: int = 0
    num_queue_reqs: int = 0
    num_retracted_reqs: int = 0  # requests waiting again after a preemption
    num_used_tokens: int = 0
    max_total_num_tokens: int = 0
    num_pages: int = 0
    page_size: int = 0
    evictable_tokens: int = 0
    free_pages: int = 0
    gen_throughput: float = 0.0
    cache_hit_rate: float = 0.0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    cached_tokens_total: int = 0
    num_aborted_requests_total: int = 0
    num_retractions_total: int = 0
    evicted_tokens_total: int = 0
    forward_seconds_total: float = 0.0
    steps_total: int = 0
    num_eager_decode_steps_total: int = 0
    # prefill-decode
    num_prefill_bootstrap_queue_reqs: int = 0
    num_prefill_inflight_queue_reqs: int = 0
    num_decode_prealloc_queue_reqs: int = 0
    num_decode_transfer_queue_reqs: int = 0
    num_bootstrap_failed_reqs_total: int = 0
    num_transfer_failed_reqs_total: int = 0
    kv_pages_sent_total: int = 0
    kv_pages_received_total: int = 0
    kv_bytes_sent_total: int = 0
    kv_bytes_received_total: int = 0
    queue_time_s: list[float] = []
    kv_transfer_latency_ms: list[float] = []
    kv_transfer_speed_gb_s: list[float] = []
    kv_transfer_bootstrap_ms: list[float] = []
    kv_transfer_alloc_ms: list[float] = []
    kv_transfer_total_mb: list[float] = []


class Ready(msgspec.Struct, tag="ready"):
    """First message of an engine: it can serve."""

    model: ModelInfo
    max_total_num_tokens: int
    settings: dict[str, Any]  # those that depend on the device, by their names in ServerConfig
    load_s: float


class Failed(msgspec.Struct, tag="failed"):
    """Last message of an engine that cannot go on; the API process stops with it."""

    message: str


ToEngine = Submit | Abort | Complete | Control
FromEngine = Outputs | ControlReply | Ready | Failed
