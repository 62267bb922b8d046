"""What is wrong with a body's fields: names that do not exist and values of a wrong type."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from itertools import islice

import msgspec

from diptych.api.schemas import NativeSampling
from diptych.errors import BadRequest

NEAR = 0.9  # of difflib's ratio: one letter off in a name of five or more
MAX_UNKNOWN = 16  # names looked at, so that a body full of them costs nothing
_NAMED = re.compile(r"(missing required|contains unknown) field `([^`]*)`")
_TYPES = re.compile(r"^Expected `([^`]*)`, got `([^`]*)`$")
_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}
_GOT = _WANTED | {"int": "a number", "float": "a number with decimals"}
_AT = re.compile(r" - at `(?:key` in `)?\$\.?([^`]*)`$")


def refuse_near_misses(names: Iterable[str], kind: type[msgspec.Struct]) -> None:
    """Raise BadRequest if one of the body's names is no field of `kind` but nearly one: its value would be ignored."""
    known = kind.__struct_encode_fields__
    for name in islice((name for name in names if name not in known), MAX_UNKNOWN):
        if close := difflib.get_close_matches(name, known, n=1, cutoff=NEAR):
            raise BadRequest(f"{name}: there is no such field; did you mean {close[0]}?", param=name)


def wrong_field(text: str, inside: str = "") -> BadRequest:
    """msgspec's complaint about a value `inside` the body, in plain words that begin with the field's name."""
    found = _AT.search(text)
    path = found.group(1) if found else ""
    named = _NAMED.search(text)
    if named:
        path = f"{path}.{named.group(2)}" if path else named.group(2)
    param = f"{inside}.{path}" if inside and path and not path.startswith("[") else inside + path
    param = param[:200]
    return BadRequest(f"{param or 'the body'}: {_complaint(_AT.sub('', text), named)}", param=param or None)


def _complaint(text: str, named: re.Match[str] | None) -> str:
    if named and named.group(1) == "missing required":
        return "is required"
    if named:  # only sampling_params mind
        close = difflib.get_close_matches(named.group(2), NativeSampling.__struct_fields__, n=1)
        return "there is no such field" + (f"; did you mean {close[0]}?" if close else "")
    if types := _TYPES.search(text):
        wanted = [_WANTED.get(name, name) for name in types.group(1).split(" | ") if name != "null"]
        return f"must be {' or '.join(dict.fromkeys(wanted))}, not {_GOT.get(types.group(2), types.group(2))}"
    return text[:1].lower() + text[1:]
