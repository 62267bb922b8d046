"""Tokens to text, as they come, in constant time a token.

Whatever the chunking, the pieces put together are exactly what `Tokenizer.decode` gives for all ids at once: a
character spread over several tokens comes out when its last byte is there, and never in part.

Three families of decoders exist in practice. Byte-level BPE (GPT-2, Qwen, Llama 3, DeepSeek) is a table of bytes and an
incremental UTF-8 decoder. SentencePiece (Llama 2, Mistral, Gemma) is a table of pieces in which runs of byte tokens
form characters. All others are decoded in a sliding window of the last few tokens.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import tokenizers

_UNKNOWN = "\ufffd"
_SPACE = "\u2581"  # SentencePiece's visible space


class Detokenizer(Protocol):
    """The text of one sequence so far. Never raises: ids that the tokenizer does not know are nothing."""

    def push(self, token: int) -> str: ...  # the text that has become certain with this token, often ""

    def push_all(self, tokens: Sequence[int]) -> str: ...  # the same for several

    def finish(self) -> str: ...  # what is left at the end: incomplete characters become U+FFFD


class Decoding(Protocol):
    """How one tokenizer turns ids into text. Shared by all sequences."""

    def start(self, skip_special: bool) -> Detokenizer: ...

    def token_bytes(self, token: int) -> bytes: ...  # one token by itself, special or not


def decoding_of(tokenizer: tokenizers.Tokenizer) -> Decoding:
    """The decoding that equals `tokenizer.decode`, chosen by the tokenizer's decoder section."""
    decoder = json.loads(tokenizer.to_str()).get("decoder")
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    texts: list[str | None] = [None] * (max(vocab.values(), default=-1) + 1)
    for text, id in vocab.items():
        texts[id] = text
    if decoder is not None and decoder["type"] == "ByteLevel":
        return _ByteLevel(texts, special)
    rule = _piece_rule(decoder)
    return _Pieces(texts, special, *rule) if rule else _Window(tokenizer, texts, special)


def decode(decoding: Decoding, ids: Iterable[int], skip_special: bool = True) -> str:
    """All ids at once."""
    state = decoding.start(skip_special)
    return state.push_all(list(ids)) + state.finish()


# ---- byte-level BPE --------------------------------------------------------------------------------------------


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 stands for itself, the rest follows from
    U+0100.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


class _ByteLevel:
    def __init__(self, texts: Sequence[str | None], special: set[int]) -> None:
        alphabet = _byte_alphabet()
        self._all = [_bytes_of(text, alphabet) for text in texts]
        self._plain = [b"" if id in special else piece for id, piece in enumerate(self._all)]

    def start(self, skip_special: bool) -> Detokenizer:
        return _ByteLevelState(self._plain if skip_special else self._all)

    def token_bytes(self, token: int) -> bytes:
        return self._all[token] if 0 <= token < len(self._all) else b""


def _bytes_of(text: str | None, alphabet: dict[str, int]) -> bytes:
    if text is None:
        return b""
    try:
        return bytes([alphabet[char] for char in text])
    except KeyError:  # an added token written in plain text
        return text.encode()


class _ByteLevelState:
    __slots__ = ("_held", "_table")

    def __init__(self, table: list[bytes]) -> None:
        self._table = table
        self._held = b""  # the beginning of a character

    def push(self, token: int) -> str:
        return self._decode(self._table[token]) if 0 <= token < len(self._table) else ""

    def push_all(self, tokens: Sequence[int]) -> str:
        table, size = self._table, len(self._table)
        return self._decode(b"".join([table[token] for token in tokens if 0 <= token < size]))

    def finish(self) -> str:
        held, self._held = self._held, b""
        return held.decode("utf-8", "replace")

    def _decode(self, data: bytes) -> str:
        data = self._held + data
        text, used = codecs.utf_8_decode(data, "replace")  # without `final`: up to the last whole character
        self._held = data[used:]
        return text


# ---- SentencePiece ---------------------------------------------------------------------------------------------


def _piece_rule(decoder: dict[str, Any] | None) -> tuple[bool, bool, int] | None:
    """(runs of byte tokens form characters, the first piece loses its spaces, spaces lost at the start), or None."""
    if decoder is None:
        return None
    if decoder["type"] == "Metaspace" and decoder.get("replacement") == _SPACE:
        return False, decoder.get("prepend_scheme", "always") != "never", 0
    if decoder["type"] != "Sequence":
        return None
    steps: list[dict[str, Any]] = decoder["decoders"]
    kinds = [step["type"] for step in steps]
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
        return None
    if steps[0]["pattern"] != {"String": _SPACE} or steps[0]["content"] != " ":
        return None
    strip = steps[3] if len(steps) == 4 else {"content": " ", "start": 0, "stop": 0}
    return (True, False, int(str(strip["start"]))) if strip["content"] == " " and strip["stop"] == 0 else None


class _Pieces:
    def __init__(
        self, texts: Sequence[str | None], special: set[int], bytes_fall_back: bool, bare_first: bool, strip: int
    ) -> None:
        self._all: list[str | int | None] = [_piece_of(text, bytes_fall_back) for text in texts]
        self._plain = [None if id in special else piece for id, piece in enumerate(self._all)]
        self._bare_first = bare_first
        self._strip = strip

    def start(self, skip_special: bool) -> Detokenizer:
        return _PiecesState(self._plain if skip_special else self._all, self._bare_first, self._strip)

    def token_bytes(self, token: int) -> bytes:
        piece = self._all[token] if 0 <= token < len(self._all) else None
        if isinstance(piece, int):
            return bytes([piece])
        return (piece or "").encode()


def _piece_of(text: str | None, bytes_fall_back: bool) -> str | int | None:
    if text is None:
        return None
    if bytes_fall_back and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            pass
    return text.replace(_SPACE, " ")


class _PiecesState:
    __slots__ = ("_bare_first", "_run", "_strip", "_table")

    def __init__(self, table: list[str | int | None], bare_first: bool, strip: int) -> None:
        self._table = table
        self._bare_first = bare_first  # still true: the next piece is the first
        self._strip = strip  # spaces still to lose at the start
        self._run = bytearray()  # byte tokens whose fate the next piece decides

    def push(self, token: int) -> str:
        piece = self._table[token] if 0 <= token < len(self._table) else None
        if piece is None:
            return ""
        if isinstance(piece, int):
            self._run.append(piece)
            return ""
        if self._bare_first:
            self._bare_first = False
            piece = piece.replace(" ", "")
        return self._lose_spaces(self._end_run() + piece)

    def push_all(self, tokens: Sequence[int]) -> str:
        return "".join([self.push(token) for token in tokens])

    def finish(self) -> str:
        return self._lose_spaces(self._end_run())

    def _end_run(self) -> str:
        """A run is one text if it is valid UTF-8, otherwise one U+FFFD a byte; so it waits until it is whole."""
        if not self._run:
            return ""
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _UNKNOWN * len(run)

    def _lose_spaces(self, text: str) -> str:
        if not self._strip or not text:
            return text
        kept = text.lstrip(" ") if len(text) - len(text.lstrip(" ")) <= self._strip else text[self._strip :]
        self._strip = 0 if kept else self._strip - len(text)
        return kept


# ---- anything else ---------------------------------------------------------------------------------------------


class _Window:
    def __init__(self, tokenizer: tokenizers.Tokenizer, texts: Sequence[str | None], special: set[int]) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._known = {id for id, text in enumerate(texts) if text is not None}
        self._plain = self._known - special

    def start(self, skip_special: bool) -> Detokenizer:
        return _WindowState(self._tokenizer, self._plain if skip_special else self._known)

    def token_bytes(self, token: int) -> bytes:
        return ((self._texts[token] if 0 <= token < len(self._texts) else None) or "").encode()


class _WindowState:
    """Decodes the last few tokens twice: without and with those not yet shown; the difference is new."""

    __slots__ = ("_ids", "_shown", "_tokenizer", "_visible")

    def __init__(self, tokenizer: tokenizers.Tokenizer, visible: set[int]) -> None:
        self._tokenizer = tokenizer
        self._visible = visible
        self._ids: list[int] = []
        self._shown = 0  # how many of _ids are already in the text; they are context

    def push(self, token: int) -> str:
        if token not in self._visible:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        return "" if text.endswith(_UNKNOWN) else self._take(text)

    def push_all(self, tokens: Sequence[int]) -> str:
        return "".join([self.push(token) for token in tokens])

    def finish(self) -> str:
        return self._take(self._decode(self._ids))

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def _take(self, text: str) -> str:
        context = self._decode(self._ids[: self._shown])
        self._ids = self._ids[self._shown :] or self._ids[-1:]
        self._shown = len(self._ids)
        return text[len(context) :]
