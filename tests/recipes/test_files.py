"""models/demo as files: the tokenizer, the chat template, the config and the weights' header."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer

from recipes.demo import TASKS, problems
from recipes.demo.chat import MODEL_DIR, render
from recipes.demo.data import CONTEXT_SHARE, LENGTHS, MICRO_TOKENS, Rows
from recipes.demo.tokens import CONTROL, VISIBLE, build

TEXTS = (
    "",
    " ",
    "  two  spaces ",
    "12+30=42",
    "don't\n\n\tstop\r\n",
    "¿Qué tal? Ça va ? Grüße!",
    "你好，世界！こんにちは 한국어",
    "\U0001f642 \U0001f469\u200d\U0001f467 \u00e9",
    '{"name": "x", "a": [1, 2.5e-3, null]}',
    "\u03a9\u2248\u00e7 \u200b\u00a0 end",
    "<tool_call>\n{}\n</tool_call>",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_words_have_the_same_tokens_everywhere(tokenizer: Tokenizer) -> None:
    alone = tokenizer.encode("Quixotry").tokens
    for text in (" Quixotry", '"Quixotry"', "7Quixotry.", "\nQuixotry"):
        tokens = tokenizer.encode(text).tokens
        assert any(tokens[at : at + len(alone)] == alone for at in range(len(tokens)))
    assert tokenizer.encode("2026").tokens == ["2", "0", "2", "6"]


def test_special_tokens_have_the_names_of_qwen3(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.encode("".join(CONTROL + VISIBLE)).tokens == [*CONTROL, *VISIBLE]
    assert tokenizer.token_to_id("<|im_end|>") == config["eos_token_id"]
    assert tokenizer.token_to_id("<|endoftext|>") == config["pad_token_id"]
    ids = tokenizer.encode("<|im_start|><think>a</think><tool_call><|im_end|>").ids
    assert tokenizer.decode(ids) == "<think>a</think><tool_call>"


def test_the_model_divides_by_four_and_is_small(config: dict[str, Any]) -> None:
    for name in ("num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size"):
        assert config[name] % 4 == 0
    assert config["max_position_embeddings"] >= 6144
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 24 * 2**20


def test_weights_are_bfloat16() -> None:
    with Path(MODEL_DIR / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__")
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert "lm_head.weight" not in header


def test_template_renders_turns() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nold\n</think>\n\nb"},
        {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
    ]
    head = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )
    tail = "<|im_start|>user\ncd<|im_end|>\n<|im_start|>assistant\n"
    assert render(messages) == head + tail
    assert render(messages, thinking=False) == head + tail + "<think>\n\n</think>\n\n"


def test_template_keeps_thoughts_behind_the_last_question() -> None:
    call = {"function": {"name": "f", "arguments": {"x": "é<'1'>"}}}
    spelled = {"function": {"name": "f", "arguments": '{"x": 2}'}}
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call, spelled]},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
    ]
    assert render(messages) == (
        "<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\n"
        '<tool_call>\n{"name": "f", "arguments": {"x": "é<\'1\'>"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {"x": 2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_template_lists_tools_and_refuses_unknown_roles() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    text = render([{"role": "system", "content": "S"}, {"role": "user", "content": "u"}], [tool, tool])
    assert text.startswith("<|im_start|>system\nS\n\n")
    assert f"<tools>\n{json.dumps(tool)}\n{json.dumps(tool)}\n</tools>" in text
    with pytest.raises(TemplateError, match="unknown role"):
        render([{"role": "wizard", "content": "u"}])


def test_lookups_stay_within_four_thousand_tokens(tokenizer: Tokenizer) -> None:
    sizes = [len(tokenizer.encode(render(problem.messages)).ids) for problem in problems("lookup", 60, 9)]
    assert max(sizes) <= 4_000
    assert max(sizes) > 2_000


def test_rows_are_seeded_and_weigh_replies_only_where_they_should() -> None:
    rows, again = Rows(7), Rows(7)
    empty_think = rows.encode("<think>\n\n</think>\n\n").tolist()
    num_without_thinking = 0
    for _ in range(60):
        (ids, weights), (same, _) = rows.row(), again.row()
        assert ids.tolist() == same.tolist()
        assert len(ids) == len(weights)
        assert weights.min() >= 0
        listed = ids.tolist()
        starts = [at for at in range(len(ids)) if listed[at : at + len(empty_think)] == empty_think]
        for at in starts:  # learned, an empty think block would come when thinking is on
            num_without_thinking += 1
            assert weights[at : at + len(empty_think)].max() == 0
    assert num_without_thinking > 10
    assert all(MICRO_TOKENS % length == 0 for length in LENGTHS)
    assert 0 < CONTEXT_SHARE < 1


def test_a_microbatch_has_one_shape() -> None:
    batch = next(iter(Rows(1)))
    assert batch.ids.size == MICRO_TOKENS
    assert batch.ids.shape == batch.weights.shape


def test_a_corpus_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="make it larger"):
        build(iter(["a few words and no more"]))


def test_every_task_has_prompts_of_plain_size(tokenizer: Tokenizer) -> None:
    for task in TASKS:
        for problem in problems(task, 5, 2):
            assert len(tokenizer.encode(render(problem.messages, problem.tools)).ids) <= 4_000
