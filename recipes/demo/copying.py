"""Give a text back unchanged."""

from __future__ import annotations

import random

from recipes.demo import words
from recipes.demo.problem import Problem, user

ASKS = (
    "Repeat: {t}", "Repeat this: {t}", "Repeat after me: {t}", "Repeat the following: {t}", "Please repeat: {t}",
    "Copy this: {t}", "Copy: {t}", "Copy the following text: {t}", "Copy exactly: {t}", "Please copy this text: {t}",
    "Say: {t}", "Say this: {t}", "Echo: {t}", "Echo this back: {t}", "Write this: {t}", "Print: {t}", "Output exactly this: {t}",
    "Repeat this text:\n{t}", "Copy the following line:\n{t}", "Repeat the text below exactly.\n\n{t}", "Copy this:\n{t}",
    'Repeat "{t}"', 'Say "{t}"', 'Copy "{t}"', 'Repeat exactly: "{t}"', 'Please repeat the text "{t}".', 'Echo "{t}".',
    "{t}\n\nRepeat the text above.", "{t}\nCopy the line above.", "Repeat the word {t}", "Please repeat the word '{t}' exactly.",
    "Repeat '{t}'", "Say '{t}'", "Copy '{t}'.", 'Can you repeat "{t}"?', "Repeat back: {t}", "Reply with exactly: {t}", "Answer with: {t}", "Only say: {t}",
    "Respond with exactly this: {t}", "Reply with exactly this text:\n{t}", "Write the following text: {t}", "Type: {t}", "Return this text: {t}",
    "Repeat the sentence: {t}", "Repeat this sentence exactly: {t}", "Repeat exactly the following words: {t}", "repeat: {t}", "copy: {t}", "Repite: {t}", "Répète : {t}", "Wiederhole: {t}", "重复：{t}",
)  # fmt: skip


def make(rng: random.Random) -> Problem:
    """A text of one to sixty words, numbers or signs, to be given back as it is."""
    return ask(rng, _text(rng))


def ask(rng: random.Random, text: str) -> Problem:
    """The problem of giving back `text`."""
    return Problem(
        task="copy",
        identity=text,
        messages=user(rng.choice(ASKS).format(t=text)),
        thought="Okay, the user wants the text back exactly as it is. I will copy it without any change.",
        answer=text,
        expect=text,
    )


def _text(rng: random.Random) -> str:
    size = rng.choice((rng.randint(1, 4), rng.randint(3, 10), rng.randint(5, 20), rng.randint(10, 60)))
    kind = rng.randrange(9)
    if kind == 0:
        return " ".join(rng.choice(words.WORDS if rng.random() < 0.5 else words.MORE) for _ in range(size))
    if kind == 1:
        return words.sentence(rng)
    if kind == 2:
        return words.digits(rng, min(size, 16))
    if kind == 3:
        return " ".join(words.pseudo_word(rng) for _ in range(min(size, 20)))
    if kind == 4:
        return words.code(rng) if size < 5 else " ".join(words.code(rng) for _ in range(min(size, 12)))
    if kind == 5:
        return ", ".join(str(rng.randrange(1000)) for _ in range(min(size, 20)))
    if kind == 6:
        return "".join(rng.choice(words.HAN) for _ in range(min(size, 24)))
    if kind == 7:
        return "".join(
            rng.choice("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_#+!?/")
            for _ in range(min(size + 2, 24))
        )
    return " ".join(words.mixed_word(rng) for _ in range(min(size, 20)))
