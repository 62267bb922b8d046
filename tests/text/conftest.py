"""Tokenizers of the kinds that exist, small and made on the spot; and the demo model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from diptych.text.tokenizer import Tokenizer

DEMO = str(Path(__file__).parents[2] / "models" / "demo")
CORPUS = ['hello world, 你好世界 héllo naïve {"name": "x", "arguments": {}} 😀😀 привет мир'] * 20


@pytest.fixture(scope="session")
def demo() -> Tokenizer:
    return Tokenizer.load(DEMO)


@pytest.fixture(scope="session")
def byte_level() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens([AddedToken("<think>"), AddedToken("a plain token"), AddedToken("日本")])
    made.add_special_tokens([AddedToken("<|end of it|>")])
    return made


def _pieces() -> dict[str, int]:
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts += ["▁", "▁▁", "▁▁▁", "▁hello", "hello", "▁wor", "ld", "é", "你", "a▁b", "x", "<0xZZ>"]
    return {text: id for id, text in enumerate(texts)}


@pytest.fixture(scope="session", params=["llama", "gemma", "metaspace", "metaspace-never"])
def sentencepiece(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordLevel(_pieces(), unk_token="<unk>"))
    made.add_special_tokens(["<s>", "</s>", "<unk>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = {
        "llama": decoders.Sequence([*steps, decoders.Strip(content=" ", left=1, right=0)]),
        "gemma": decoders.Sequence(steps),
        "metaspace": decoders.Metaspace(),
        "metaspace-never": decoders.Metaspace(prepend_scheme="never"),
    }[request.param]
    return made


@pytest.fixture(scope="session")
def wordpiece() -> tokenizers.Tokenizer:
    texts = ["[UNK]", "[SEP]", "hello", "##ing", "world", "un", "##believ", "##able", ","]
    made = tokenizers.Tokenizer(models.WordLevel({text: id for id, text in enumerate(texts)}, unk_token="[UNK]"))
    made.add_special_tokens(["[SEP]"])
    made.decoder = decoders.WordPiece(cleanup=False)
    return made
