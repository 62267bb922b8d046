"""Sampling fields of a request, and the model's defaults, to what the engine samples by."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from diptych.api.limits import (
    MAX_INT64,
    MAX_LOGIT_BIAS,
    MAX_N,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    at_most,
    within,
)
from diptych.api.schemas import ResponseFormat, SamplingFields, refuse_unsupported
from diptych.api.wire import encode
from diptych.config import ServerConfig
from diptych.errors import BadRequest, ConfigError, ContextLengthExceeded
from diptych.text.files import folder, read_object
from diptych.types import Grammar, Sampling

MAX_TEMPERATURE = 100.0


@dataclass(frozen=True)
class Defaults:
    """Values used where a request has none."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def load(cls, config: ServerConfig) -> Defaults:
        """From the model's generation_config.json, or OpenAI's constants, as --sampling-defaults says."""
        if config.sampling_defaults == "openai":
            return cls()
        found = read_object(folder(config.model_path) / "generation_config.json")
        values: dict[str, Any] = {}
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            value = found.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"generation_config.json: {name} is not a number; or use --sampling-defaults openai")
            values[name] = int(value) or -1 if name == "top_k" else float(value)
        return replace(cls(), **values)


@dataclass(frozen=True)
class Room:
    """What model and server leave for one sequence."""

    vocab_size: int
    longest: int  # a prompt must be shorter, in tokens
    whole: int  # tokens of prompt and answer together; a prefill server keeps no answers, so its pool does not count


class Seeds:
    """Seeds for requests that bring none; reproducible when --random-seed is not 0."""

    def __init__(self, random_seed: int) -> None:
        self._random = random.Random(random_seed or None)

    def draw(self) -> int:
        return self._random.getrandbits(63)


def seed_of(base: int, index: int) -> int:
    """The seed of the index-th choice: choice 0 is what the same request with n = 1 gives."""
    return (base + index) & MAX_INT64


def num_choices(n: int | None, prefix: str = "") -> int:
    count = 1 if n is None else n
    within(1, MAX_N, count, f"{prefix}n")
    return count


def stop_strings(stop: str | list[str] | None, prefix: str = "") -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    at_most(MAX_STOPS, stops, f"{prefix}stop")
    for text in stops:
        if len(text) > MAX_STOP_CHARS:
            raise BadRequest(
                f"a stop string must not have more than {MAX_STOP_CHARS} characters", param=f"{prefix}stop"
            )
    return tuple(text for text in stops if text)


def grammar_of(fields: SamplingFields, response_format: ResponseFormat | None, prefix: str = "") -> Grammar | None:
    """The constraint that the fields ask for. At most one of them may be set."""
    found = []
    if response_format is not None:
        found.append(_of_format(response_format))
    if fields.json_schema is not None:
        text = fields.json_schema if isinstance(fields.json_schema, str) else encode(fields.json_schema).decode()
        found.append(Grammar("json_schema", text))
    if fields.regex is not None:
        found.append(Grammar("regex", fields.regex))
    if fields.ebnf is not None:
        found.append(Grammar("ebnf", fields.ebnf))
    found = [grammar for grammar in found if grammar is not None]
    if len(found) > 1:
        raise BadRequest(
            "use only one of response_format, json_schema, regex and ebnf",
            param=f"{prefix}{found[1].kind}" if found[1] else None,
        )
    return found[0] if found else None


def grammar_field(grammar: Grammar | None, fields: SamplingFields, prefix: str = "") -> str:
    """The field that asked for this grammar of `grammar_of`, for errors."""
    if grammar is None:
        return ""
    formatted = grammar.kind == "json_object" or (grammar.kind == "json_schema" and fields.json_schema is None)
    return "response_format" if formatted else prefix + grammar.kind


def _of_format(format: ResponseFormat) -> Grammar | None:
    if format.type == "text":
        return None
    if format.type == "json_object":
        return Grammar("json_object")
    if format.type != "json_schema":
        raise BadRequest("response_format.type must be text, json_object or json_schema", param="response_format.type")
    if format.json_schema is None or format.json_schema.schema is None:
        raise BadRequest("response_format.json_schema.schema is missing", param="response_format.json_schema")
    return Grammar("json_schema", encode(format.json_schema.schema).decode())


def check_prompt_length(prompt_tokens: int, room: Room, param: str) -> None:
    """Raise ContextLengthExceeded unless a token of answer fits behind the prompt."""
    if prompt_tokens >= room.longest:
        raise ContextLengthExceeded(
            f"this model's maximum context length is {room.longest} tokens and the prompt has {prompt_tokens} or more; "
            "one token must be left for the answer",
            param=param,
        )


def max_new_tokens(asked: int | None, default: int | None, prompt_tokens: int, room: Room, param: str) -> int:
    """How many tokens may be generated. Without a wish or a default: what fits. Raises ContextLengthExceeded."""
    left = room.whole - prompt_tokens
    check_prompt_length(prompt_tokens, room, param)
    if asked is None:
        return left if default is None else min(left, default)
    if asked < 0:
        raise BadRequest(f"{param} must not be negative", param=param)
    if asked > left:
        raise ContextLengthExceeded(
            f"this model's maximum context length is {room.whole} tokens, but {prompt_tokens + asked} were requested "
            f"({prompt_tokens} in the prompt, {asked} for the answer); shorten the prompt or lower {param}",
            param=param,
        )
    return asked


def make_sampling(
    fields: SamplingFields,
    defaults: Defaults,
    room: Room,
    *,
    max_new: int,
    min_new: int | None,
    seed: int,
    grammar: Grammar | None,
    grammar_after: int | None = None,
    prefix: str = "",
) -> Sampling:
    """Check every range and put the pieces together. Raises BadRequest that names the field (with `prefix`).

    A grammar decides when the answer ends: with one, ignore_eos and the least number of tokens do not count.
    """
    refuse_unsupported(fields, prefix)

    def number(name: str, low: float, high: float, default: float) -> float:
        value = getattr(fields, name)
        if value is None:
            return default
        within(low, high, value, prefix + name)
        return float(value)

    top_p = number("top_p", 0.0, 1.0, defaults.top_p)
    if top_p <= 0:
        raise BadRequest(f"{prefix}top_p must be above 0 and at most 1", param=f"{prefix}top_p")
    repetition = number("repetition_penalty", 0.0, 2.0, defaults.repetition_penalty)
    if repetition <= 0:
        raise BadRequest(f"{prefix}repetition_penalty must be above 0", param=f"{prefix}repetition_penalty")
    least = min_new or 0
    if least < 0 or (max_new and least > max_new):
        name = f"{prefix}min_new_tokens" if prefix else "min_tokens"
        raise BadRequest(f"{name} must be between 0 and the greatest number of tokens, {max_new}", param=name)
    return Sampling(
        max_new_tokens=max_new,
        min_new_tokens=least if grammar is None else 0,
        temperature=number("temperature", 0.0, MAX_TEMPERATURE, defaults.temperature),
        top_p=top_p,
        top_k=_top_k(fields.top_k, defaults.top_k, prefix),
        min_p=number("min_p", 0.0, 1.0, defaults.min_p),
        repetition_penalty=repetition,
        presence_penalty=number("presence_penalty", -2.0, 2.0, 0.0),
        frequency_penalty=number("frequency_penalty", -2.0, 2.0, 0.0),
        logit_bias=_logit_bias(fields.logit_bias, room.vocab_size, prefix),
        seed=seed,
        stop=stop_strings(fields.stop, prefix),
        stop_token_ids=token_ids(
            fields.stop_token_ids or (), room.vocab_size, f"{prefix}stop_token_ids", MAX_STOP_TOKEN_IDS
        ),
        ignore_eos=bool(fields.ignore_eos) and grammar is None,
        grammar=grammar,
        grammar_after=grammar_after if grammar is not None else None,
    )


def _top_k(asked: int | None, default: int, prefix: str) -> int:
    if asked is None:
        return default
    if asked < -1 or asked > MAX_INT64:
        raise BadRequest(f"{prefix}top_k must be at least 1, or -1 for all", param=f"{prefix}top_k")
    return min(asked, 1 << 30) or -1


def _logit_bias(bias: dict[int, float] | None, vocab_size: int, prefix: str) -> dict[int, float]:
    param = f"{prefix}logit_bias"
    at_most(MAX_LOGIT_BIAS, bias, param)
    token_ids(list(bias or ()), vocab_size, param, MAX_LOGIT_BIAS)
    for value in (bias or {}).values():
        within(-100.0, 100.0, value, param)
    return bias or {}


def token_ids(ids: Sequence[int], vocab_size: int, param: str, limit: int) -> tuple[int, ...]:
    """Raise BadRequest for ids that the model does not have."""
    at_most(limit, ids, param)
    for id in ids:
        if not 0 <= id < vocab_size:
            raise BadRequest(
                f"{param}: the model has no token {str(id)[:24]} (ids go from 0 to {vocab_size - 1})", param=param
            )
    return tuple(ids)


def seed_from(asked: int | None, seeds: Seeds, param: str) -> int:
    """The request's seed, folded into 63 bits, or a fresh one."""
    if asked is None:
        return seeds.draw()
    within(-MAX_INT64 - 1, MAX_INT64, asked, param)
    return asked & MAX_INT64
