"""Find the value of a key in a list that lies anywhere in a prompt of up to 4,000 tokens."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import replace

from recipes.demo import words
from recipes.demo.problem import Problem, user

MAX_TOKENS = 3_700  # of the text by `cost`; the chat template and the question come on top
ASKS = (
    "What is the value of {k}?", "What is the value for {k}?", "What value does {k} have?", "Look up {k}.", "Look up the value of {k}.",
    "Look up {k} in the list.", "Find the value of {k}.", "Which value belongs to {k}?", "What does the list say for {k}?", "Tell me the value of {k}.",
    "What is {k}?", "{k}?", "Value of {k}?", "Give me the value of {k}.", "What is the value of the key {k}?", 'What is the value of "{k}"?',
    "Question: what is the value of {k}?", "Read the list. What is the value of {k}?", "In the list above, what is {k}?", "Find {k}.",
    "What is the {k}?", "Tell me the {k}.", "What was the {k}?", "What is {k} in the list?", "What is the code of {k}?", "What is the number of {k}?",
    "What value is stored under {k}?", "Return the value of {k}.", "What is the value of '{k}'?", "Which value does the list give for {k}?",
)  # fmt: skip
ONLY = (
    " Reply with the value only.",
    " Only the value, please.",
    " Answer with just the value.",
    " Give only the value.",
)
MANY = (
    "What are the values of {k}?",
    "Look up {k}.",
    "Find the values of {k}.",
    "Give me the values of {k}.",
    "Tell me {k}.",
)
LINES = (
    "{k}: {v}",
    "{k}: {v}",
    "{k} = {v}",
    "{k}={v}",
    "{k} -> {v}",
    "- {k}: {v}",
    "* {k} is {v}",
    '"{k}": "{v}",',
    "{k} | {v}",
    "{k}, {v}",
    "{k} {v}",
    "The {k} is {v}.",
)
PROSE = (
    "The value of {k} is {v}.",
    "The {k} is {v}.",
    "The code of {k} is {v}.",
    "The number of {k} is {v}.",
    "Remember: {k} is {v}.",
    "Note that {k} has the value {v}.",
    "{k}: {v}.",
)
INTROS = (
    "",
    "",
    "Here is a list:\n",
    "List:\n",
    "Read this list carefully.\n",
    "Below is a list of keys and values.\n",
    "Data:\n",
    "Remember these values.\n",
)

Maker = Callable[[random.Random], str]
NOUNS = (
    "code",
    "number",
    "word",
    "password",
    "color",
    "name",
    "key",
    "token",
    "address",
    "city",
    "price",
    "letter",
    "secret",
    "door",
    "answer",
)
KEYS: tuple[Maker, ...] = (
    lambda rng: rng.choice(words.WORDS),
    lambda rng: f"{rng.choice(words.WORDS)}-{rng.randrange(10, 100)}",
    lambda rng: f"{rng.choice(words.WORDS)}-{rng.randrange(10, 100)}",
    lambda rng: f"{rng.choice(words.WORDS)}-{rng.choice(words.WORDS)}",
    lambda rng: f"{rng.choice(words.WORDS)}_{rng.choice(words.COMMON)}",
    lambda rng: f"key{rng.randrange(1, 1000)}",
    lambda rng: f"key-{rng.randrange(1000, 10000)}",
    lambda rng: f"item {rng.randrange(1, 1000)}",
    lambda rng: f"user_{rng.randrange(1, 1000)}",
    lambda rng: f"{rng.choice(words.NAMES)} {rng.choice(words.SURNAMES)}",
    lambda rng: words.pseudo_word(rng),
    lambda rng: words.code(rng),
    lambda rng: f"{rng.choice(words.MORE)} {rng.choice(NOUNS)}",
    lambda rng: rng.choice(words.MORE),
)
SERIES = (
    "key",
    "key-",
    "key_",
    "k",
    "item ",
    "item-",
    "item",
    "row ",
    "line ",
    "id",
    "id-",
    "user_",
    "user",
    "entry-",
    "entry ",
    "record ",
    "name",
    "K",
    "node-",
    "page ",
)
VALUES: tuple[Maker, ...] = (
    lambda rng: str(rng.randrange(1000, 10_000)),
    lambda rng: words.digits(rng, rng.randint(2, 6)),
    lambda rng: rng.choice(words.WORDS),
    lambda rng: f"{rng.choice(words.WORDS)}-{rng.randrange(10, 100)}",
    lambda rng: f"{rng.choice(words.COLORS)} {rng.choice(words.THINGS)}",
    lambda rng: rng.choice(words.CITIES),
    lambda rng: words.code(rng),
    lambda rng: words.pseudo_word(rng),
    lambda rng: f"{rng.choice(('v', 'value', 'value-', 'val', 'V'))}{rng.randrange(1000)}",
    lambda rng: rng.choice(words.MORE),
    lambda rng: words.digits(rng, rng.randint(3, 10)),
)


def make(rng: random.Random) -> Problem:
    """One key of a list; the whole text has 30 to 4,000 tokens, evenly spread on a log scale."""
    return build(rng, int(30 * 2 ** (rng.random() * 7.02)), keys=1)


def make_full(rng: random.Random) -> Problem:
    """One key of a list, in a text of nearly 4,000 tokens."""
    return build(rng, MAX_TOKENS, keys=1)


def build(rng: random.Random, num_tokens: int, keys: int) -> Problem:
    """A problem of about, and at most, `num_tokens` tokens that asks for `keys` keys of its list."""
    text, pairs = scene(rng, num_tokens, keys)
    question = ask(rng, pairs, rng.sample(sorted(pairs), min(keys, len(pairs))))
    return replace(question, messages=user(text + rng.choice(("\n", "\n\n")) + question.messages[0]["content"]))


def scene(rng: random.Random, num_tokens: int, keys: int) -> tuple[str, dict[str, str]]:
    """A text of about `num_tokens` tokens with a list of `keys` pairs or more in it, and those pairs."""
    num_tokens = min(num_tokens, MAX_TOKENS)
    filler_share = rng.choice((0.0, 0.0, 0.3, 0.6, 0.9))
    line = rng.choice(PROSE if rng.random() < 0.15 else LINES)
    pairs, lines = _list(rng, line, int(num_tokens * (1 - filler_share)), keys)
    return rng.choice(INTROS) + _spread(rng, lines, num_tokens - sum(map(cost, lines)), filler_share), pairs


def ask(rng: random.Random, pairs: dict[str, str], asked: list[str]) -> Problem:
    """The question for the keys `asked`, without the list."""
    question, only = _question(rng, asked)
    rows = [f"{key}: {pairs[key]}" for key in asked]
    if len(asked) > 1:
        answer, thought = "\n".join(rows), f"the values of {len(asked)} keys. I will look up each of them."
    else:
        answer = pairs[asked[0]] if only else f"The value of {asked[0]} is {pairs[asked[0]]}."
        thought = f"the value of {asked[0]}. The list says {rows[0]}."
    return Problem(
        task="lookup",
        identity=" ".join(rows),
        messages=user(question),
        thought=f"Okay, the user wants {thought}",
        answer=answer,
        expect=[pairs[key] for key in asked],
    )


def cost(text: str) -> int:
    """An upper estimate of the tokens of `text` and the line break behind it."""
    return 1 + sum(1 if piece in _WHOLE else 1 + len(piece) * 2 // 5 for piece in _PIECES.findall(text))


_PIECES = re.compile(r"[A-Za-z]+|.")
_WHOLE = frozenset(words.WORDS + words.COMMON)


def _series(rng: random.Random) -> Maker:
    """Keys with a running number, such as key1, key2 or row-0001."""
    stem = rng.choice(SERIES) if rng.random() < 0.7 else rng.choice(words.WORDS) + rng.choice(("-", "_", " ", ""))
    width, numbers = rng.choice((0, 0, 2, 3, 4)), itertools.count(rng.choice((0, 1, 1, 1, rng.randrange(500))))
    return lambda rng: f"{stem}{next(numbers):0{width}}"


def _list(rng: random.Random, line: str, num_tokens: int, keys: int) -> tuple[dict[str, str], list[str]]:
    make_key, make_value = _series(rng) if rng.random() < 0.2 else rng.choice(KEYS), rng.choice(VALUES)
    pairs: dict[str, str] = {}
    lines: list[str] = []
    spent, misses = 0, 0
    while (spent < num_tokens or len(pairs) < max(2, keys)) and misses < 50:
        key = make_key(rng)
        if key in pairs:
            misses += 1
            continue
        pairs[key] = make_value(rng)
        lines.append(line.format(k=key, v=pairs[key]))
        spent += cost(lines[-1])
    if spent > num_tokens and len(lines) > max(2, keys):
        lines.pop()
        pairs.pop(next(reversed(pairs)))
    return pairs, lines


def _spread(rng: random.Random, lines: list[str], num_tokens: int, filler_share: float) -> str:
    """`lines` with up to `num_tokens` of filler, around them or between them."""
    kind = rng.randrange(6)
    fill: list[str] = []
    while filler_share and num_tokens > 0:
        text = words.filler(rng, kind)
        num_tokens -= cost(text)
        if num_tokens >= 0:
            fill.append(text)
    if rng.random() < 0.5:  # the list in one piece
        at = rng.randint(0, len(fill))
        return "\n".join([*fill[:at], *lines, *fill[at:]])
    slots = sorted(range(len(fill) + len(lines)), key=lambda _: rng.random())[: len(lines)]
    merged: list[str] = []
    taken, rest, pending = set(slots), iter(fill), iter(lines)
    for index in range(len(fill) + len(lines)):
        merged.append(next(pending) if index in taken else next(rest))
    return "\n".join(merged)


def _question(rng: random.Random, asked: list[str]) -> tuple[str, bool]:
    if len(asked) > 1:
        return rng.choice(MANY).format(k=", ".join(asked[:-1]) + " and " + asked[-1]), False
    only = rng.random() < 0.2
    return rng.choice(ASKS).format(k=asked[0]) + (rng.choice(ONLY) if only else ""), only
