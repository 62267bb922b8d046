"""The prompt's log-probabilities are in the prefill server's answer; they are moved into decode's.

`/generate`: lists in `meta_info`, prefill's in front of decode's. `/v1/completions` with echo: the prompt's part of
each choice's `logprobs`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from diptych.errors import UpstreamError

_META = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")
_ECHO = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
_DATA = b"data: "
_DONE = b"[DONE]"

Json = dict[str, Any]


def merge(prefill: bytes, decode: bytes) -> bytes:
    """Decode's whole answer with the prompt's logprobs. Raises UpstreamError when the answers do not fit together."""
    theirs, ours = _parse(prefill), _parse(decode)
    if isinstance(ours, list) != isinstance(theirs, list) or (isinstance(ours, list) and len(ours) != len(theirs)):
        raise UpstreamError("the prefill and the decode server answered a batch differently")
    for given, item in zip(theirs, ours, strict=True) if isinstance(ours, list) else [(theirs, ours)]:
        prompts = _Prompts()
        prompts.learn(given)
        prompts.add_to(item)
    return msgspec.json.encode(ours)


class StreamMerger:
    """Puts the prompt's logprobs into the events of decode's stream. `feed` takes any parts, `rest` ends it.

    Both raise UpstreamError: for what is no JSON, and for an event of more than `limit` bytes.
    """

    def __init__(self, prefill: bytes, *, limit: int) -> None:
        self._limit = limit
        self._prompts = _Prompts()
        for event in prefill.split(b"\n\n"):
            if _has_json(event):
                self._prompts.learn(_parse(event[len(_DATA) :]))
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """The events that are complete now."""
        *events, self._held = (self._held + data).split(b"\n\n")
        if len(self._held) > self._limit:
            raise UpstreamError(f"a server's event is longer than {self._limit} bytes; raise --max-payload-size")
        return b"".join(self._merged(event) + b"\n\n" for event in events)

    def rest(self) -> bytes:
        """What was left when the stream ended; nothing, if it ended well."""
        rest, self._held = self._held, b""
        return rest

    def _merged(self, event: bytes) -> bytes:
        if not _has_json(event):
            return event
        item = _parse(event[len(_DATA) :])
        self._prompts.add_to(item)
        return _DATA + msgspec.json.encode(item)


class _Prompts:
    """The prompts' logprobs by index of the sequence."""

    def __init__(self) -> None:
        self._meta: dict[int, Json] = {}
        self._echo: dict[int, Json] = {}

    def learn(self, item: Any) -> None:
        """From an answer or event of the prefill server."""
        if not isinstance(item, dict):
            return
        meta = item.get("meta_info")
        if isinstance(meta, dict):
            self._meta[_index(item)] = {name: meta[name] for name in _META if _list(meta, name)}
        for choice in _choices(item):
            self._echo.setdefault(_index(choice), choice["logprobs"])

    def add_to(self, item: Any) -> None:
        """To an answer or event of the decode server."""
        if not isinstance(item, dict):
            return
        meta = item.get("meta_info")
        if isinstance(meta, dict):
            for name, values in self._meta.get(_index(item), {}).items():
                meta[name] = values + _list(meta, name)
        for choice in _choices(item):
            echo = self._echo.pop(_index(choice), None)  # once: later events carry new tokens only
            if echo is not None:
                _put_prompt(choice["logprobs"], echo)


def _list(item: Json, name: str) -> list[Any]:
    """A list, or an empty one if there is something else."""
    value = item.get(name)
    return value if isinstance(value, list) else []


def _index(item: Json) -> int:
    index = item.get("index", 0)
    return index if isinstance(index, int) else 0


def _choices(item: Json) -> list[Json]:
    """The choices that have logprobs."""
    return [one for one in _list(item, "choices") if isinstance(one, dict) and isinstance(one.get("logprobs"), dict)]


def _put_prompt(logprobs: Json, prefill: Json) -> None:
    """The prompt's part of `prefill`'s lists: in place of the nulls where decode keeps places for it, else in front.

    Without places it is all but the last token, which is the one that a prefill server samples.
    """
    given = _list(logprobs, "token_logprobs")
    num_places = next((at for at, value in enumerate(given) if value is not None), len(given))
    for name in _ECHO:
        ours, theirs = logprobs.get(name), prefill.get(name)
        if isinstance(ours, list) and isinstance(theirs, list):
            logprobs[name] = (theirs[:num_places] if num_places else theirs[:-1]) + ours[num_places:]


def _has_json(event: bytes) -> bool:
    return event.startswith(_DATA) and event[len(_DATA) :] != _DONE


def _parse(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):
        raise UpstreamError("a server's answer is no JSON, so that its logprobs cannot be merged") from None
