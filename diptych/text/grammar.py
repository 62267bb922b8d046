"""Constrained output: which tokens may come next, by llguidance. Used in the engine process; the API edge validates.

A grammar costs its client's request at most: sizes, nesting and the library's own work are limited, and what goes
wrong is a BadRequest with the reason.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from diptych.errors import BadRequest, ConfigError
from diptych.types import Grammar, Sampling

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_GRAMMAR_BYTES = 64 << 10
MAX_REGEX_CHARS = 4096
MAX_SCHEMA_DEPTH = 32
MAX_JOINED_PATTERNS = 8  # the library's work grows exponentially with the patterns that one text must fulfil
CACHED_GRAMMARS = 128

# A bounded run of white space between tokens: a small model would otherwise write spaces for ever.
_JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,16}"}
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


def validate(grammar: Grammar) -> None:
    """Raise BadRequest, with the reason, for a grammar that cannot be used. Takes milliseconds to about a second: not
    for the loop.
    """
    text = _compile_text(grammar)
    failed, messages = LLMatcher.validate_grammar_with_warnings(text, None, limits=_LIMITS)
    if failed and not messages[0].startswith("no tokenizer"):
        raise _refusal(grammar, messages[0])


def _refusal(grammar: Grammar, reason: str) -> BadRequest:
    return BadRequest(f"this {grammar.kind} cannot be used: {_clean(reason)}", param=grammar.kind)


def _clean(reason: str) -> str:
    """The library's first words only; what follows is a dump of its state."""
    reason = reason.split("\n<state>")[0].split("\n<grammar>")[0].strip()
    return re.sub(r"0x[0-9a-fA-F]{6,}", "(address)", reason)[:500]


def _compile_text(grammar: Grammar) -> str:
    """The grammar in the library's own form, within our limits."""
    limit = MAX_REGEX_CHARS if grammar.kind == "regex" else MAX_GRAMMAR_BYTES
    if len(grammar.text.encode("utf-8", "replace")) > limit:
        raise BadRequest(f"{grammar.kind} must not have more than {limit} bytes", param=grammar.kind)
    try:
        if grammar.kind == "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object"}, _JSON_OPTIONS)
        if grammar.kind == "json_schema":
            return LLMatcher.grammar_from_json_schema(_schema(grammar.text), _JSON_OPTIONS)
        if grammar.kind == "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        if grammar.kind == "ebnf":
            _check_inner_schemas(grammar.text)
            return LLMatcher.grammar_from_lark(any_to_lark(grammar.text))
    except BadRequest:
        raise
    except RecursionError:
        raise _refusal(grammar, "it is nested too deeply") from None
    except Exception as error:  # the GBNF converter and the schema reader raise plain ValueError and Exception
        raise _refusal(grammar, str(error)) from None
    raise BadRequest(f"unknown kind of grammar {grammar.kind!r}: use json_object, json_schema, regex or ebnf")


def _schema(text: str) -> dict[str, Any]:
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        raise BadRequest("json_schema is not valid JSON", param="json_schema") from None
    if isinstance(schema, bool):  # JSON Schema's shortest: anything, or nothing
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise BadRequest("json_schema must be a JSON object", param="json_schema")
    _check_schema(schema)
    return schema


def _check_inner_schemas(text: str) -> None:
    """Lark's %json takes a schema too: those of forced tool calls, and of whoever writes such a grammar."""
    for found in re.finditer(r"%json\s*", text):
        try:
            schema, _ = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError):
            schema = None
        if not isinstance(schema, dict):
            raise BadRequest("%json must be followed by a JSON object", param="ebnf")
        _check_schema(schema)


def _check_schema(schema: dict[str, Any]) -> None:
    """Raise BadRequest for a schema beyond our limits."""
    if depth_of(schema) > MAX_SCHEMA_DEPTH:
        raise BadRequest(f"json_schema must not be nested deeper than {MAX_SCHEMA_DEPTH} levels", param="json_schema")
    if len(_patterns(schema)) > MAX_JOINED_PATTERNS and any(map(_joins, _objects(schema))):
        raise BadRequest(
            f"json_schema must not have more than {MAX_JOINED_PATTERNS} patterns where it joins schemas (allOf, $ref "
            "beside other rules ...)",
            param="json_schema",
        )
    if "x-guidance" in schema:
        raise BadRequest("json_schema must not have x-guidance", param="json_schema")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects within decoded JSON."""
    level = [value]
    while level:
        found = [x for x in level if isinstance(x, dict)]
        yield from found
        level = [x for item in level if isinstance(item, list) for x in item] + [x for o in found for x in o.values()]


def _patterns(schema: dict[str, Any]) -> set[str]:
    return {one["pattern"] for one in _objects(schema) if isinstance(one.get("pattern"), str)}


def _joins(schema: dict[str, Any]) -> bool:
    """Whether several parts of a schema apply to the same value."""
    every = schema.get("allOf")
    num_parts = len(every) if isinstance(every, list) else 0
    num_parts += sum(name in schema for name in ("anyOf", "oneOf", "$ref"))
    num_parts += any(name in schema for name in ("pattern", "properties", "patternProperties", "items", "prefixItems"))
    return num_parts > 1


def depth_of(value: Any) -> int:
    """Levels of nesting of decoded JSON; a scalar has none. Does not recurse."""
    depth, level = 0, [value]
    while level := [x for x in level if isinstance(x, dict | list)]:
        depth += 1
        level = [x for item in level for x in (item.values() if isinstance(item, dict) else item)]
    return depth


class Matcher:
    """One output under one grammar. Not shared."""

    def __init__(self, inner: LLMatcher, grammar: Grammar, num_bytes: int) -> None:
        self._inner = inner
        self._grammar = grammar
        self._num_bytes = num_bytes

    def mask(self) -> bytes:
        """Tokens allowed next, as in types.Row.mask; ends of sequence only when the grammar may end here.

        Raises BadRequest when the grammar has become too costly.
        """
        mask: bytes = self._inner.compute_bitmask()
        self._check()
        return mask[: self._num_bytes]

    def advance(self, token: int) -> None:
        """Take the sampled token. Raises BadRequest when the grammar does not allow it."""
        if self._inner.is_stopped():
            return  # only an end of sequence can follow, and it changes nothing
        self._inner.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """The grammar is fulfilled and cannot go on: the request ends here, even with ignore_eos."""
        return bool(self._inner.is_stopped())

    def _check(self) -> None:
        if self._inner.is_error():
            raise _refusal(self._grammar, self._inner.get_error())


class GrammarCompiler:
    """Grammars to matchers, for one tokenizer. `path` is tokenizer.json or its folder; `vocab_size` is the model's."""

    def __init__(self, path: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        where = Path(path)
        file = where / "tokenizer.json" if where.is_dir() else where
        try:
            text = file.read_text(encoding="utf-8")
            self._tokenizer = LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos_token_ids))
        except OSError as error:
            raise ConfigError(f"cannot read {file.name}: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"grammars cannot use this tokenizer.json: {error}") from None
        self._num_bytes = (vocab_size + 7) // 8
        self._cache: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def compile(self, grammar: Grammar) -> Matcher:
        """A fresh matcher. Raises BadRequest for a grammar that cannot be used."""
        found = self._cache.get(grammar)
        if found is None:
            found = LLMatcher(self._tokenizer, _compile_text(grammar), log_level=0, limits=_LIMITS)
            if found.is_error():
                raise _refusal(grammar, found.get_error())
            self._cache[grammar] = found
            if len(self._cache) > CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(grammar)
        return Matcher(found.deep_copy(), grammar, self._num_bytes)


class GrammarState:
    """The grammar of one request, which may begin only after a token such as </think> (`Sampling.grammar_after`)."""

    def __init__(self, sampling: Sampling, compiler: GrammarCompiler) -> None:
        assert sampling.grammar is not None
        self._matcher = compiler.compile(sampling.grammar)
        self._after = sampling.grammar_after
        self._failure: BadRequest | None = None

    def mask(self) -> bytes | None:
        """Tokens allowed next; None: all, the grammar has not begun. Raises BadRequest once the grammar has failed."""
        if self._failure is not None:
            raise self._failure
        return None if self._after is not None else self._matcher.mask()

    def advance(self, token: int) -> None:
        """Take the sampled token, whatever the phase. Never raises: a token that does not fit is told by the next
        mask.
        """
        if self._after is not None:
            self._after = None if token == self._after else self._after
            return
        try:
            self._matcher.advance(token)
        except BadRequest as error:
            self._failure = error

    @property
    def finished(self) -> bool:
        return self._after is None and self._failure is None and self._matcher.finished
