"""Prompts of a given number of tokens, and counts of tokens in text, from a folder's tokenizer.json."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from diptych.errors import ConfigError

# Letters, perhaps behind the mark that byte-level or sentencepiece vocabularies write for the space before a word.
_WORD = re.compile(r"[Ġ▁]?([A-Za-z]{2,})")


class Tokens:
    """A tokenizer seen as a source of random prompts. Special tokens (end of text, image marks, …) are never drawn."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = set(tokenizer.get_added_tokens_decoder())
        vocab = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
        self._plain = np.array([i for _, i in vocab if i not in added])
        self._words = [match[1] for token, _ in vocab if (match := _WORD.fullmatch(token))]

    @classmethod
    def open(cls, folder: str) -> Tokens:
        """The tokenizer of a model folder. Raises ConfigError if there is none or it cannot be read."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"--tokenizer {folder}: no tokenizer.json there; give the model's folder")
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception for any malformed file
            raise ConfigError(f"--tokenizer {folder}: tokenizer.json cannot be read ({error})") from None

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def count(self, text: str) -> int:
        return len(self._encode(text))

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def random_ids(self, rng: np.random.Generator, num: int) -> list[int]:
        return [int(i) for i in rng.choice(self._plain, size=num)]

    def random_text(self, rng: np.random.Generator, num: int) -> str:
        """Random words cut after `num` tokens (the cut text may encode to one token more or less in odd vocabularies).

        Raises ConfigError for a tokenizer that has no words.
        """
        if not self._words:
            raise ConfigError("this tokenizer has no words to write prompts with; use --dataset-name random-ids")
        text = " ".join(self._words[i] for i in rng.integers(len(self._words), size=num))
        return self.decode(self._encode(text)[:num])
