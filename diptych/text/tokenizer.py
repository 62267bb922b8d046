"""A model's tokenizer: text to ids, ids to text, special tokens, and the chat template that belongs to it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from diptych import mounts
from diptych.errors import BadRequest, ConfigError
from diptych.text.detokenize import Decoding, Detokenizer, decode, decoding_of
from diptych.text.files import folder, read_object, read_text

COMPOSING = 4  # characters that Unicode's NFC may turn into one
SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Tokenizer:
    """Immutable; safe to use from several threads."""

    backend: tokenizers.Tokenizer
    decoding: Decoding
    vocab_size: int  # highest id + 1
    special: dict[str, str]  # bos_token, eos_token ... as templates know them; absent when the model has none
    chat_template: str | None  # Jinja source
    longest_token: int  # characters that one token can stand for at most; 0: unknown

    @classmethod
    def load(cls, path: str, chat_template_file: str = "") -> Tokenizer:
        """Read tokenizer.json and its neighbours in `path`. Raises ConfigError that says which file is wrong."""
        where = folder(path)
        text = read_text(where / "tokenizer.json")
        if text is None:
            raise ConfigError(f"{path} has no tokenizer.json; give the folder that has one with --tokenizer-path")
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception for every kind of malformed file
            raise ConfigError(f"tokenizer.json cannot be read: {error}") from None
        backend.no_truncation()
        backend.no_padding()
        settings = read_object(where / "tokenizer_config.json")
        special = {name: text for name in SPECIAL_NAMES if (text := _token_text(settings.get(name)))}
        template = _chat_template(where, settings, chat_template_file)
        vocab = backend.get_vocab(with_added_tokens=True)
        highest = max(vocab.values(), default=-1)
        return cls(backend, decoding_of(backend), highest + 1, special, template, _longest_token(backend, vocab))

    def check_model(self, model_vocab_size: int) -> None:
        """Raise ConfigError when the tokenizer has ids that the model lacks. Fewer is fine: models pad their
        vocabulary.
        """
        if self.vocab_size > model_vocab_size:
            raise ConfigError(
                f"the tokenizer has {self.vocab_size} ids but the model only {model_vocab_size}; "
                "tokenizer.json belongs to another model"
            )

    def encode(self, text: str, *, special: bool) -> list[int]:
        """`text` as ids. `special` adds what the model expects around a plain prompt (such as a BOS token).

        Blocks, but lets other threads run meanwhile. Special tokens written out in `text` become those tokens, as
        everywhere in the field. Raises BadRequest for text that is not Unicode (half of a surrogate pair).
        """
        try:
            return list(self.backend.encode_batch_fast([text], add_special_tokens=special)[0].ids)
        except TypeError:  # the library's way to say that it cannot write the text as UTF-8
            raise BadRequest("the prompt contains half of a surrogate pair; send valid Unicode") from None

    def least_tokens(self, text: str) -> int:
        """A lower bound of len(encode(text)), known without encoding: hopeless prompts cost nothing."""
        return -(-len(text) // self.longest_token) if self.longest_token else 0

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        """All ids at once; ids that the tokenizer does not know are nothing."""
        return decode(self.decoding, ids, skip_special)

    def detokenizer(self, *, skip_special: bool = True) -> Detokenizer:
        return self.decoding.start(skip_special)

    def token_bytes(self, token: int) -> bytes:
        """One token by itself, special or not; b"" for an unknown id."""
        return self.decoding.token_bytes(token)

    def token_text(self, token: int) -> str:
        """One token by itself; parts of characters show as U+FFFD."""
        return self.decoding.token_bytes(token).decode("utf-8", "replace")

    def id_of(self, text: str) -> int | None:
        """The id of exactly this token."""
        return self.backend.token_to_id(text)


def _token_text(value: Any) -> str | None:
    """A special token is written as its text or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _longest_token(backend: tokenizers.Tokenizer, vocab: dict[str, int]) -> int:
    """Known for byte-level BPE only: there a token has at least as many characters in the vocabulary as in a prompt.

    NFC may make one character of several before; other normalizers, and pre-tokenizers that drop characters, may do
    more.
    """
    made = json.loads(backend.to_str())
    normalizer = (made["normalizer"] or {"type": None})["type"]
    byte_level = (made["decoder"] or {}).get("type") == "ByteLevel" and made["model"]["type"] == "BPE"
    if not byte_level or normalizer not in (None, "NFC") or '"Removed"' in json.dumps(made["pre_tokenizer"]):
        return 0
    return max(map(len, vocab), default=0) * (COMPOSING if normalizer else 1)


def _chat_template(where: Path, settings: dict[str, Any], override: str) -> str | None:
    if override:
        text = read_text(Path(mounts.resolve(override)))
        if text is None:
            raise ConfigError(f"--chat-template: there is no file {override}")
        return text
    text = read_text(where / "chat_template.jinja")
    if text is not None:
        return text
    found = settings.get("chat_template")
    if isinstance(found, list):  # several named templates
        named = {
            item["name"]: item["template"]
            for item in found
            if isinstance(item, dict) and {"name", "template"} <= item.keys()
        }
        found = named.get("default")
    return found if isinstance(found, str) else None
