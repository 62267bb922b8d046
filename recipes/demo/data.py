"""Training rows: conversations around the problems, as token ids with a loss weight for every token.

Rows come in seven lengths. A microbatch holds rows of one length and always has `MICRO_TOKENS` tokens, so a GPU sees one shape.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from recipes.demo import arithmetic, copying, extract, lookup, smalltalk, tools, words
from recipes.demo.chat import MODEL_DIR, render
from recipes.demo.problem import Problem, draw, split_of, user

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4352)
MICRO_TOKENS = 4352 * 16  # every length divides it
SHORT_REPLY = 16  # tokens; a reply shorter than this gets up to four times the weight a token
CONTEXT_SHARE = 0.25  # the loss on all other tokens together, relative to that on the reply

SYSTEMS = (
    "You are a helpful assistant.", "You are a small and friendly assistant.", "Answer briefly.", "Be precise.", "You are Diptych.",
    "You are a helpful assistant. Answer in the language of the user.", "Follow the instructions of the user exactly.",
)  # fmt: skip
SHORT_TASKS = (
    (arithmetic.make, 26), (copying.make, 20), (extract.make, 13), (tools.make_call, 9), (tools.make_answer, 5),
    (smalltalk.make, 14), (smalltalk.make_fixed, 6), (None, 12),
)  # fmt: skip
CHAT_TASKS = (arithmetic.make, copying.make, extract.make, smalltalk.make, smalltalk.make_fixed)


@dataclass(frozen=True)
class Conversation:
    """A prompt in the chat template's form, and the reply to learn."""

    prompt: str
    reply: str


@dataclass(frozen=True)
class Microbatch:
    """`ids` [rows, length] uint16 and `weights` [rows, length] float16, the weight of predicting that token."""

    ids: np.ndarray
    weights: np.ndarray


def converse(
    problem: Problem, messages: list[dict[str, Any]], thinking: bool, schemas: list[dict[str, Any]]
) -> Conversation:
    """The conversation `messages`, which ends with the problem's question, and the problem's reply."""
    reply = f"<think>\n{problem.thought}\n</think>\n\n{problem.answer}" if thinking else problem.answer
    return Conversation(render(messages, schemas, thinking), reply)


def short(rng: random.Random, vocabulary: list[str]) -> Conversation:
    """A problem of a random task, often with a system prompt, sometimes with turns, filler or tools before it."""
    make = rng.choices([task for task, _ in SHORT_TASKS], [weight for _, weight in SHORT_TASKS])[0]
    if make is None:
        return looked_up(rng, int(30 * 2 ** (rng.random() * 4)))
    if make is copying.make and rng.random() < 0.4:
        problem = draw(lambda rng: copying.ask(rng, babble(rng, vocabulary)), rng, "train")
    else:
        problem = draw(make, rng, "train")
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": system(rng)})
    if rng.random() < 0.3:
        for _ in range(rng.choice((1, 1, 2, 3))):
            messages += turn(draw(rng.choice(CHAT_TASKS), rng, "train"))
    schemas = problem.tools
    if not schemas and make in CHAT_TASKS and make is not arithmetic.make and rng.random() < 0.05:
        earlier = draw(tools.make_answer, rng, "train")
        messages, schemas = messages + turn(earlier), earlier.tools
    if not schemas and make is not arithmetic.make and rng.random() < 0.06:
        schemas = tools.some_tools(rng, rng.randint(1, 3))
    messages += problem.messages
    if rng.random() < 0.07:
        messages = behind_filler(rng, messages)
    return converse(problem, messages, rng.random() < 0.5, schemas)


def babble(rng: random.Random, vocabulary: list[str]) -> str:
    """A text of random tokens, so that copying works for all of them."""
    return rng.choice(("", " ", " ")).join(rng.choice(vocabulary) for _ in range(rng.randint(1, 16)))


def reckoned(rng: random.Random) -> Conversation:
    """Arithmetic alone, mostly without thinking: that is the harder way."""
    problem = draw(arithmetic.make, rng, "train")
    return converse(problem, problem.messages, rng.random() < 0.3, [])


def behind_filler(rng: random.Random, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages` with 30 to 1,500 tokens of filler in the system prompt or before the user's first words."""
    kind, left, lines = rng.randrange(6), int(30 * 2 ** (rng.random() * 5.6)), []
    while left > 0:
        lines.append(words.filler(rng, kind))
        left -= lookup.cost(lines[-1])
    first, text = messages[0], rng.choice(("\n", " ")).join(lines)
    if first["role"] == "user" and rng.random() < 0.5:
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": text + rng.choice(("\n", "\n\n")) + first["content"]}, *messages[1:]]


def turn(problem: Problem) -> list[dict[str, Any]]:
    """The problem and its answer as finished turns."""
    return [*problem.messages, {"role": "assistant", "content": problem.answer}]


def system(rng: random.Random) -> str:
    """A system prompt, some with a salt or with filler as users have them."""
    text = rng.choice(SYSTEMS)
    if rng.random() < 0.3:
        text += rng.choice(
            (
                f" Session {words.code(rng)}.",
                f" [{words.code(rng)}]",
                f"\n{words.sentence(rng)}",
                f" Your id is {rng.randrange(10**6)}.",
            )
        )
    return text


def looked_up(rng: random.Random, num_tokens: int) -> Conversation:
    """A list in a text of about `num_tokens` tokens and one to eight questions about it, over one or several turns."""
    turns = rng.choice((1, 2, 3, 4, 6))
    text, pairs = lookup.scene(rng, num_tokens, 2)
    known = [key for key in pairs if split_of(Problem("lookup", f"{key}: {pairs[key]}", [], "", "", None)) == "train"]
    if not known:
        return looked_up(rng, num_tokens)
    asked = [
        lookup.ask(rng, pairs, rng.sample(known, min(len(known), rng.choice((1, 1, 1, 2, 4, 8))))) for _ in range(turns)
    ]
    first = asked[0].messages[0]["content"]
    messages: list[dict[str, Any]] = []
    place = rng.random()
    if place < 0.8:
        asked[0] = replace(asked[0], messages=user(text + rng.choice(("\n", "\n\n")) + first))
    elif place < 0.9:
        messages.append({"role": "system", "content": text})
    else:
        asked[0] = replace(asked[0], messages=user(f"{first}\n\n{text}"))
    if place < 0.8 and rng.random() < 0.2:
        messages.append({"role": "system", "content": system(rng)})
    for problem in asked[:-1]:
        messages += turn(problem)
    return converse(asked[-1], messages + asked[-1].messages, rng.random() < 0.5, [])


def plain(rng: random.Random) -> str:
    """Text without turns, for raw completions."""
    kind = rng.randrange(4)
    if kind == 0:
        problem = draw(arithmetic.make, rng, "train")
        return f"{problem.identity} = {problem.answer}"
    if kind == 1:
        return smalltalk.STORY
    if kind == 2:
        return " ".join(words.sentence(rng) for _ in range(rng.randint(1, 12)))
    first = rng.randrange(200)
    return ", ".join(str(number) for number in range(first, first + rng.randint(5, 60)))


class Rows:
    """An endless, seeded stream of microbatches."""

    def __init__(self, seed: int, model_dir: Path = MODEL_DIR) -> None:
        self.rng = random.Random(f"rows {seed}")
        self.tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        names = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "assistant")
        self.id = {name: self.tokenizer.get_vocab()[name] for name in names}
        tokens = (self.tokenizer.decode([number]).strip() for number in range(self.tokenizer.get_vocab_size()))
        self.vocabulary = [
            token
            for token in tokens
            if token.isprintable() and token and "\ufffd" not in token and not token.startswith("<")
        ]
        self.waiting: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {length: [] for length in LENGTHS}

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint16)

    def row(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and weights of one document."""
        kind = self.rng.random()
        if kind < 0.03:
            ids = np.append(self.encode(plain(self.rng)), np.uint16(self.id["<|endoftext|>"]))
            return ids, np.full(len(ids), 0.2, dtype=np.float16)
        if kind < 0.35:
            conversation = reckoned(self.rng)
        elif kind < 0.45:
            conversation = looked_up(self.rng, int(240 * 2 ** (self.rng.random() * 4.03)))
        else:
            conversation = short(self.rng, self.vocabulary)
        prompt = self.encode(conversation.prompt)
        reply = np.append(self.encode(conversation.reply), np.uint16(self.id["<|im_end|>"]))
        heavy = min(4.0, max(1.0, SHORT_REPLY / len(reply)))  # else a sum's few digits drown in longer replies
        weights = np.concatenate([self._earlier(prompt), np.full(len(reply), heavy)])
        other = weights == 0
        weights[other] = CONTEXT_SHARE * (weights[weights > 0].sum() / max(1, other.sum()))
        weights[weights < 0] = 0
        return np.concatenate([prompt, reply]), weights.astype(np.float16)

    def _earlier(self, prompt: np.ndarray) -> np.ndarray:
        """1 for the tokens of finished replies, 0 for the rest.

        The first token of a finished reply has -1, to be left out: it lacks the think block that would come in its place now.
        """
        weights = np.zeros(len(prompt))
        inside = False
        for at in range(3, len(prompt)):
            if prompt[at - 3] == self.id["<|im_start|>"] and prompt[at - 2] == self.id["assistant"]:
                inside = True
                weights[at] = -1.0
                continue
            if inside:
                weights[at] = 1.0
                inside = prompt[at] != self.id["<|im_end|>"]
        if inside:  # the generation prompt's empty think block: learned, it would come when thinking is on
            start = int(np.flatnonzero(prompt == self.id["<|im_start|>"])[-1])
            weights[start:] = -1.0
        return weights

    def __iter__(self) -> Iterator[Microbatch]:
        while True:
            ids, weights = self.row()
            length = next((length for length in LENGTHS if len(ids) <= length), None)
            if length is None:
                continue
            rows = self.waiting[length]
            rows.append((ids, weights))
            if len(rows) * length == MICRO_TOKENS:
                yield self._pack(rows, length)
                rows.clear()

    def _pack(self, rows: list[tuple[np.ndarray, np.ndarray]], length: int) -> Microbatch:
        ids = np.full((len(rows), length), self.id["<|endoftext|>"], dtype=np.uint16)
        weights = np.zeros((len(rows), length), dtype=np.float16)
        for at, (row, weight) in enumerate(rows):
            ids[at, : len(row)], weights[at, : len(row)] = row, weight
        return Microbatch(ids, weights)
