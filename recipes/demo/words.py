"""The words that problems are made of, and small random texts."""

from __future__ import annotations

import random
import tomllib
from pathlib import Path

_LISTS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))


def _words(name: str) -> list[str]:
    return [word.replace("_", " ") for word in _LISTS[name].split()]


WORDS, COMMON, MORE = _words("words"), _words("common"), _words("more")
NAMES, SURNAMES, CITIES = _words("names"), _words("surnames"), _words("cities")
COLORS, JOBS, THINGS, MONTHS, DAYS = (_words(name) for name in ("colors", "jobs", "things", "months", "days"))
HAN: str = _LISTS["han"]

_SYLLABLE_STARTS = "b c d f g h j k l m n p r s t v w z br cr dr fl gr kl pl pr sh sl st th tr".split()
_VOWELS = "a e i o u a e i o ai ea oo".split()
_SYLLABLE_ENDS = ["", "", "", "n", "r", "l", "s", "t", "m", "k", "x"]
_SUBJECTS, _VERBS, _OBJECTS, _PLACES = (_LISTS[name] for name in ("subjects", "verbs", "objects", "places"))
_FRAGMENTS = _words("fragments")


def pseudo_word(rng: random.Random) -> str:
    """A word that no language knows, of syllables or of pieces of English words."""
    if rng.random() < 0.7:
        pieces = [
            rng.choice(_SYLLABLE_STARTS) + rng.choice(_VOWELS) + rng.choice(_SYLLABLE_ENDS)
            for _ in range(rng.choice((1, 2, 2, 3)))
        ]
    else:
        pieces = [rng.choice(_FRAGMENTS) for _ in range(rng.choice((1, 2, 2, 3)))]
    word = "".join(pieces)
    return word.capitalize() if rng.random() < 0.3 else word


def digits(rng: random.Random, count: int) -> str:
    """`count` digits, the first not zero."""
    return str(rng.randint(1, 9)) + "".join(str(rng.randrange(10)) for _ in range(count - 1))


def code(rng: random.Random) -> str:
    """A short code such as QX7-31, 9f3ac2 or ZK-204."""
    kind = rng.randrange(4)
    if kind == 0:
        return "".join(rng.choice("0123456789abcdef") for _ in range(rng.randint(4, 8)))
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    number = digits(rng, rng.randint(1, 4))
    return letters + ("-" if kind == 1 else "") + number + (rng.choice("ABCXYZ") if kind == 2 else "")


def mixed_word(rng: random.Random) -> str:
    """A word, a name, a number, a code or a sign."""
    kind = rng.randrange(6)
    if kind == 0:
        return str(rng.randrange(10_000))
    if kind == 1:
        return code(rng)
    if kind == 2:
        return pseudo_word(rng)
    if kind == 3:
        return rng.choice(NAMES)
    return rng.choice((WORDS, COMMON, MORE)[rng.randrange(3)]) + rng.choice(("", "", "", ",", "!", "."))


def sentence(rng: random.Random) -> str:
    """A plain English sentence, or one of words in no order."""
    if rng.random() < 0.2:
        return (
            " ".join(rng.choice(COMMON if rng.random() < 0.5 else MORE) for _ in range(rng.randint(3, 14))).capitalize()
            + "."
        )
    parts = [rng.choice(_SUBJECTS), rng.choice(_VERBS), rng.choice(_OBJECTS), rng.choice(_PLACES)]
    if rng.random() < 0.3:
        parts += ["and", rng.choice(_VERBS), rng.choice(_OBJECTS)]
    if rng.random() < 0.15:
        parts.insert(0, rng.choice(("later", "sometimes", "in the end", "once", "that year")) + ",")
    text = " ".join(parts)
    return text[0].upper() + text[1:] + "."


def filler(rng: random.Random, kind: int) -> str:
    """One line of text that has nothing to do with any question; `kind` 0..5 sets its sort."""
    if kind <= 1:
        return " ".join(sentence(rng) for _ in range(rng.randint(1, 5)))
    if kind == 2:
        return " ".join(rng.choice(COMMON if rng.random() < 0.6 else MORE) for _ in range(rng.randint(5, 40)))
    if kind == 3:
        hour, minute, second = rng.randrange(24), rng.randrange(60), rng.randrange(60)
        return f"{hour:02}:{minute:02}:{second:02} {rng.choice(WORDS)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)} ({rng.randrange(1000)})"
    if kind == 4:
        return " ".join([sentence(rng)] * rng.randint(2, 6))
    return " ".join(mixed_word(rng) for _ in range(rng.randint(5, 30)))
