"""Incremental detokenizing equals decoding all at once, for any ids and for all kinds of decoders."""

from __future__ import annotations

import random
import time

import pytest
import tokenizers

from diptych.text.detokenize import decode, decoding_of
from diptych.text.tokenizer import Tokenizer


def check_random(backend: tokenizers.Tokenizer, rounds: int, longest: int, top: int | None = None) -> None:
    decoding = decoding_of(backend)
    draw = random.Random(7)
    size = top or backend.get_vocab_size() + 3  # some ids that do not exist
    for _ in range(rounds):
        ids = [draw.randrange(size) for _ in range(draw.randrange(longest))]
        cut = draw.randrange(len(ids) + 1)
        for skip in (True, False):
            one, several = decoding.start(skip), decoding.start(skip)
            each = [one.push(id) for id in ids]
            assert several.push_all(ids[:cut]) == "".join(each[:cut]), ids
            assert several.push_all(ids[cut:]) == "".join(each[cut:]), ids
            assert several.finish() == one.finish(), ids
            assert decode(decoding, ids, skip) == backend.decode(ids, skip_special_tokens=skip), ids


def test_byte_level(byte_level: tokenizers.Tokenizer) -> None:
    check_random(byte_level, 4000, 16)


def test_demo_model(demo: Tokenizer) -> None:
    check_random(demo.backend, 3000, 16)


def test_sentencepiece(sentencepiece: tokenizers.Tokenizer) -> None:
    check_random(sentencepiece, 4000, 12)


def test_sentencepiece_leading_spaces(sentencepiece: tokenizers.Tokenizer) -> None:
    decoding = decoding_of(sentencepiece)
    vocab = sentencepiece.get_vocab()
    spaces = [vocab["▁"], vocab["▁▁"], vocab["▁▁▁"], vocab["x"], vocab["<0x20>"], vocab["<s>"]]
    draw = random.Random(1)
    for _ in range(500):
        ids = [draw.choice(spaces) for _ in range(draw.randrange(6))]
        assert decode(decoding, ids) == sentencepiece.decode(ids), ids


def test_other_decoders(wordpiece: tokenizers.Tokenizer) -> None:
    check_random(wordpiece, 1000, 12, top=9)


@pytest.mark.parametrize("text", ["héllo 你好 😀 мир", "👩‍👩‍👧‍👦 flags 🇩🇪", "a" * 50])
def test_no_character_comes_in_part(demo: Tokenizer, text: str) -> None:
    state = demo.detokenizer()
    pieces = [state.push(id) for id in demo.encode(text, special=False)]
    assert "".join(pieces) + state.finish() == text
    assert "\ufffd" not in "".join(pieces)


def test_cut_in_a_character(demo: Tokenizer) -> None:
    ids = demo.encode("𓀀", special=False)  # not in the training text: four byte tokens
    assert len(ids) > 1
    state = demo.detokenizer()
    assert "".join([state.push(id) for id in ids[:-1]]) == ""
    assert state.finish() == "\ufffd"


def test_special_tokens_show_only_when_asked(demo: Tokenizer) -> None:
    ids = demo.encode("<|im_start|>hi<|im_end|>", special=False)
    assert demo.decode(ids) == "hi"
    assert demo.decode(ids, skip_special=False) == "<|im_start|>hi<|im_end|>"


def test_cost_is_linear(demo: Tokenizer) -> None:
    ids = demo.encode("hello world ", special=False) * 4000

    def cost(n: int) -> float:
        state = demo.detokenizer()
        start = time.process_time()
        for id in ids[:n]:
            state.push(id)
        return time.process_time() - start

    small, large = min(cost(4000) for _ in range(3)), min(cost(8000) for _ in range(3))
    assert large < 3.5 * small + 0.002
