"""Grammars: masks allow exactly what fits, limits hold, nothing begins before its time."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from diptych.errors import BadRequest, ConfigError
from diptych.text.grammar import (
    MAX_GRAMMAR_BYTES,
    MAX_JOINED_PATTERNS,
    MAX_REGEX_CHARS,
    GrammarCompiler,
    GrammarState,
    depth_of,
    validate,
)
from diptych.text.tokenizer import Tokenizer
from diptych.text.toolcalls import forced_call_grammar
from diptych.types import Grammar, Sampling

DEMO = str(Path(__file__).parents[2] / "models" / "demo")

VOCAB = 4096
EOS = (4072, 4070)
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(DEMO, VOCAB, EOS)


def allowed(mask: bytes) -> list[int]:
    return [id for id in range(VOCAB) if mask[id // 8] >> (id % 8) & 1]


def random_output(compiler: GrammarCompiler, grammar: Grammar, seed: int, demo: Tokenizer) -> str:
    """What a model that chooses at random would write."""
    draw = random.Random(seed)
    state = GrammarState(Sampling(grammar=grammar), compiler)
    ids: list[int] = []
    while not state.finished:
        mask = state.mask()
        assert mask is not None and len(mask) == VOCAB // 8
        ids.append(draw.choice(allowed(mask)))
        if ids[-1] in EOS:
            break
        state.advance(ids[-1])
    return demo.decode([id for id in ids if id not in EOS], skip_special=False)


@pytest.mark.parametrize("seed", range(8))
def test_any_choice_fits_the_schema(compiler: GrammarCompiler, demo: Tokenizer, seed: int) -> None:
    value = json.loads(random_output(compiler, Grammar("json_schema", SCHEMA), seed, demo))
    assert set(value) == {"name", "age"} and 0 <= value["age"] <= 99 and len(value["name"]) <= 5


def test_regex_and_ebnf(compiler: GrammarCompiler, demo: Tokenizer) -> None:
    assert random_output(compiler, Grammar("regex", "[0-9]{3}"), 1, demo).isdigit()
    assert random_output(compiler, Grammar("ebnf", 'root ::= "yes" | "no"'), 1, demo) in ("yes", "no")
    assert random_output(compiler, Grammar("ebnf", 'start: "yes" | "no"'), 2, demo) in ("yes", "no")


def test_json_object_begins_with_a_brace(compiler: GrammarCompiler, demo: Tokenizer) -> None:
    mask = compiler.compile(Grammar("json_object")).mask()
    assert all(demo.token_text(id).startswith("{") for id in allowed(mask))


def test_forced_tool_call(compiler: GrammarCompiler, demo: Tokenizer) -> None:
    text = forced_call_grammar({"weather": json.loads(SCHEMA)}, several=False, tags_are_tokens=True)
    validate(Grammar("ebnf", text))
    out = random_output(compiler, Grammar("ebnf", text), 3, demo).strip()
    assert out.startswith("<tool_call>\n")
    call = json.loads(out.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert call["name"] == "weather" and set(call["arguments"]) == {"name", "age"}


def test_nothing_but_the_end_follows_the_end(compiler: GrammarCompiler, demo: Tokenizer) -> None:
    matcher = compiler.compile(Grammar("regex", "a"))
    matcher.advance(demo.encode("a", special=False)[0])
    assert matcher.finished and set(allowed(matcher.mask())) == set(EOS)
    matcher.advance(EOS[0])
    assert matcher.finished


def test_a_token_that_does_not_fit(compiler: GrammarCompiler, demo: Tokenizer) -> None:
    matcher = compiler.compile(Grammar("regex", "[0-9]+"))
    with pytest.raises(BadRequest) as caught:
        matcher.advance(demo.encode("x", special=False)[0])
    assert "<state>" not in caught.value.message


def test_a_token_that_does_not_fit_is_told_by_the_next_mask(compiler: GrammarCompiler, demo: Tokenizer) -> None:
    state = GrammarState(Sampling(grammar=Grammar("regex", "[0-9]+")), compiler)
    state.advance(demo.encode("x", special=False)[0])
    assert not state.finished
    for _ in range(2):
        with pytest.raises(BadRequest, match="regex"):
            state.mask()


def test_the_grammar_waits_for_its_token(compiler: GrammarCompiler, demo: Tokenizer) -> None:
    think_end = demo.id_of("</think>")
    assert think_end is not None
    state = GrammarState(Sampling(grammar=Grammar("regex", "[0-9]"), grammar_after=think_end), compiler)
    for id in demo.encode("well, let me see", special=False):
        assert state.mask() is None and not state.finished
        state.advance(id)
    state.advance(think_end)
    assert {demo.token_text(id) for id in allowed(state.mask() or b"")} == set("0123456789")
    state.advance(demo.encode("7", special=False)[0])
    assert state.finished


def test_matchers_of_one_grammar_are_independent(compiler: GrammarCompiler, demo: Tokenizer) -> None:
    one, two = (compiler.compile(Grammar("regex", "ab")) for _ in range(2))
    one.advance(demo.encode("a", special=False)[0])
    assert [demo.token_text(id) for id in allowed(one.mask())] == ["b"]
    assert "ab" in [demo.token_text(id) for id in allowed(two.mask())]


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("regex", "("), "unclosed group"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("json_schema", "{"), "not valid JSON"),
        (Grammar("json_schema", "[1]"), "must be a JSON object"),
        (Grammar("json_schema", '{"type": "wat"}'), "wat"),
        (Grammar("json_schema", '{"$ref": "#/nope"}'), "nope"),
        (Grammar("json_schema", '{"type": "string", "pattern": "("}'), "unclosed"),
        (Grammar("json_schema", '{"a":' * 33 + "1" + "}" * 33), "deeper than 32"),
        (Grammar("json_schema", "[" * 100_000), "64|65536"),
        (Grammar("json_schema", '{"a":' * 10_000 + "1" + "}" * 10_000), "deeper|valid JSON"),
        (Grammar("json_schema", '{"x-guidance": {"lenient": true}}'), "x-guidance"),
        (Grammar("ebnf", 'start: %json {"x-guidance": {}}'), "x-guidance"),
        (Grammar("ebnf", 'start: %json {"a":' + '{"a":' * 40 + "1" + "}" * 41), "deeper"),
        (Grammar("ebnf", 'start: %json // {}\n {"type": "string"}'), "%json"),
        (Grammar("ebnf", "start: %json"), "%json"),
        (Grammar("ebnf", "root ::= ((("), "cannot be used"),
        (Grammar("ebnf", "root ::= " + "(" * 20_000), "nested too deeply"),
        (Grammar("ebnf", "start: nothing"), "nothing"),
        (Grammar("other", ""), "unknown kind"),
    ],
)
def test_refusals(compiler: GrammarCompiler, grammar: Grammar, reason: str) -> None:
    for check in (validate, compiler.compile):
        with pytest.raises(BadRequest, match=reason) as caught:
            check(grammar)
        assert len(caught.value.message) < 700


@pytest.mark.parametrize(("kind", "limit", "text"), [("regex", MAX_REGEX_CHARS, "a"), ("ebnf", MAX_GRAMMAR_BYTES, " ")])
def test_limits(kind: str, limit: int, text: str) -> None:
    start = "" if kind == "regex" else 'start: "a"'
    for length in (limit - 1, limit):
        validate(Grammar(kind, start + text * (length - len(start))))
    with pytest.raises(BadRequest, match=str(limit)):
        validate(Grammar(kind, start + text * (limit + 1 - len(start))))


def test_schema_depth_limit() -> None:
    def nested(levels: int) -> Grammar:
        schema: dict[str, object] = {"type": "string"}
        for _ in range(levels):
            schema = {"type": "array", "items": schema}
        return Grammar("json_schema", json.dumps(schema))

    validate(nested(30))
    validate(nested(31))
    with pytest.raises(BadRequest, match="deeper"):
        validate(nested(32))


def joined(shape: str, count: int) -> dict[str, Any]:
    """A schema in which a text must fulfil `count` patterns at once."""
    rules: list[dict[str, Any]] = [{"type": "string", "pattern": f"^.{{{i},}}$"} for i in range(count)]
    if shape == "allOf":
        return {"allOf": rules}
    if shape == "$ref":
        chain = {f"d{i}": {**rule, "$ref": f"#/$defs/d{i + 1}"} for i, rule in enumerate(rules)}
        return {"$defs": {**chain, f"d{count}": {"type": "string"}}, "$ref": "#/$defs/d0"}
    if shape == "properties":
        return {"allOf": [{"type": "object", "properties": {"a": rule}} for rule in rules]}
    found: dict[str, Any] = {"type": "string"}
    for rule in rules:
        found = {**rule, "anyOf": [found]}
    return found


@pytest.mark.parametrize("wrap", ["json_schema", "ebnf"])
@pytest.mark.parametrize("shape", ["allOf", "$ref", "properties", "anyOf"])
def test_patterns_that_must_hold_together_are_few(compiler: GrammarCompiler, shape: str, wrap: str) -> None:
    """The library's work more than doubles with each of them: 21 took 21 s, and nobody can stop it."""

    def grammar(count: int) -> Grammar:
        text = json.dumps(joined(shape, count))
        return Grammar(wrap, text if wrap == "json_schema" else f"start: %json {text}")

    validate(grammar(MAX_JOINED_PATTERNS))
    for check in (validate, compiler.compile):
        with pytest.raises(BadRequest, match="more than 8 patterns"):
            check(grammar(MAX_JOINED_PATTERNS + 1))
        with pytest.raises(BadRequest, match="more than 8 patterns"):
            check(grammar(12))


def test_patterns_of_different_values_may_be_many() -> None:
    """As in schemas that programs write: definitions that others refer to, each with patterns of its own."""
    fields = {f"f{i}": {"type": "string", "pattern": f"^x{{{i}}}$"} for i in range(40)}
    lonely = {"allOf": [{"$ref": "#/$defs/inner"}], "description": "one part is no join"}
    schema = {
        "$defs": {"inner": {"type": "object", "properties": fields}},
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/inner"}, "b": lonely, "c": {"anyOf": [{"type": "null"}, fields["f3"]]}},
    }
    validate(Grammar("json_schema", json.dumps(schema)))


def test_depth() -> None:
    assert [depth_of(x) for x in (1, [], {}, [1, {"a": []}], {"a": 1})] == [0, 1, 1, 3, 1]


def test_wrong_folder() -> None:
    with pytest.raises(ConfigError):
        GrammarCompiler("/nowhere/tokenizer.json", VOCAB, EOS)
