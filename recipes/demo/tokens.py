"""The tokenizer: byte-level BPE over single digits, single signs, single spaces and words.

A word has the same tokens wherever it stands, so copying is copying of tokens. The special tokens have Qwen3's names.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from recipes.demo import TASKS, lookup, problems, words
from recipes.demo.chat import MODEL_DIR, render
from recipes.demo.smalltalk import LONG_ASKS, STORY, TEST_ANSWER, TEST_THOUGHT, UNKNOWN_ANSWER, make_fixed

VOCAB_SIZE = 4096
CONTROL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
VISIBLE = (  # kept when special tokens are skipped
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
    "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
PIECES = r"[\r\n]+|\s|\p{N}|[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]|(?:(?![\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}])[\p{L}\p{M}])+|[^\s\p{L}\p{M}\p{N}]"


def build(corpus: Iterator[str]) -> Tokenizer:
    """Train a tokenizer of `VOCAB_SIZE` tokens; the special ones come last, as in Qwen3."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    size = VOCAB_SIZE - len(CONTROL) - len(VISIBLE)
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if tokenizer.get_vocab_size() != size:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, {size} are wanted: make it larger")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in CONTROL])
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in VISIBLE])
    return tokenizer


def corpus(seed: int = 0, per_task: int = 3_000) -> Iterator[str]:
    """Training problems of every task with their replies, every word of the lists, and made-up words."""
    rng = random.Random(seed)
    for word in itertools.chain(
        words.WORDS, words.NAMES, words.SURNAMES, words.CITIES, words.COMMON, words.HAN, words.COLORS
    ):
        yield f"{word} {word} {word.capitalize()}\n" * 40
    for text in (*LONG_ASKS, STORY, TEST_ANSWER, TEST_THOUGHT, UNKNOWN_ANSWER):
        yield text * 30
    for task in TASKS:
        for problem in problems(task, per_task if task != "lookup" else 1, seed, "train"):
            yield f"{render(problem.messages, problem.tools)}{problem.thought}\n{problem.answer}"
    for _ in range(per_task):
        problem = make_fixed(rng)
        yield f"{problem.messages[0]['content']}\n{problem.thought}\n{problem.answer}"
        yield lookup.build(rng, 200, 1).messages[0]["content"]
        yield words.sentence(rng)
        yield " ".join(words.pseudo_word(rng) for _ in range(4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = build(corpus())
    tokenizer.save(str(args.out / "tokenizer.json"))
    print(f"{tokenizer.get_vocab_size()} tokens -> {args.out / 'tokenizer.json'}")


if __name__ == "__main__":
    main()
