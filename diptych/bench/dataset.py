"""What is asked: rows of prompts and output lengths. Seeded; reads no more than the given file."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from diptych.bench.tokens import Tokens
from diptych.errors import ConfigError

Messages = list[dict[str, Any]]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One request. `prompt`: text, token ids, or chat messages. `prompt_len` 0: only the server can count it."""

    prompt: str | list[int] | Messages
    prompt_len: int
    output_len: int
    extra: dict[str, Any] = {}


def random_lengths(rng: np.random.Generator, full: int, ratio: float, num: int) -> list[int]:
    """`num` lengths, uniform over [full x ratio, full], each at least 1."""
    if full < 1 or not 0.0 <= ratio <= 1.0:
        raise ConfigError(f"lengths must be at least 1 and --random-range-ratio within 0 and 1, not {full} and {ratio}")
    return [int(n) for n in rng.integers(max(int(full * ratio), 1), full + 1, size=num)]


def random_rows(args: argparse.Namespace, tokens: Tokens | None) -> list[Row]:
    """`random`: words, as text. `random-ids`: any plain tokens, as ids where the endpoint takes ids, else as text."""
    tokens = _need(tokens, args.dataset_name)
    rng = np.random.default_rng(args.seed)
    input_lens = random_lengths(rng, args.random_input_len, args.random_range_ratio, args.num_prompts)
    output_lens = random_lengths(rng, args.random_output_len, args.random_range_ratio, args.num_prompts)
    rows = []
    for input_len, output_len in zip(input_lens, output_lens, strict=True):
        prompt: str | list[int]
        if args.dataset_name == "random":
            prompt = tokens.random_text(rng, input_len)
        else:
            prompt = tokens.random_ids(rng, input_len)
            if args.backend == "sglang-oai-chat":
                prompt = tokens.decode(prompt)
        rows.append(Row(prompt=prompt, prompt_len=_count(prompt, tokens), output_len=output_len))
    return rows


def shared_prefix_rows(args: argparse.Namespace, tokens: Tokens | None) -> list[Row]:
    """`generated-shared-prefix`: groups of questions, each group behind one long system prompt."""
    tokens = _need(tokens, args.dataset_name)
    rng = np.random.default_rng(args.seed)
    rows = []
    for _ in range(args.gsp_num_groups):
        system = tokens.random_text(rng, args.gsp_system_prompt_len)
        for _ in range(args.gsp_prompts_per_group):
            prompt = f"{system}\n\n{tokens.random_text(rng, args.gsp_question_len)}"
            rows.append(Row(prompt=prompt, prompt_len=tokens.count(prompt), output_len=args.gsp_output_len))
    return rows if args.gsp_ordered else [rows[i] for i in rng.permutation(len(rows))]


def custom_rows(args: argparse.Namespace, tokens: Tokens | None) -> list[Row]:
    """`custom`: JSON lines with `prompt` and `output_len`, or with `conversations`; the first `--num-prompts` of them.

    Of a conversation the first turn is asked, and the second turn's length is that of the answer.
    """
    rows = []
    for number, line in _lines(args.dataset_path, args.num_prompts):
        turns = line.get("conversations") or line.get("conversation") or []
        said = [turn.get("content") or turn.get("value") or "" for turn in turns[:2]]
        prompt = line.get("prompt") or (said[0] if said else "")
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(f"--dataset-path, line {number}: neither `prompt` nor `conversations` with text")
        output_len = args.sharegpt_output_len or line.get("output_len")
        if output_len is None and len(said) == 2 and tokens is not None:
            output_len = max(tokens.count(said[1]), 1)
        prompt_len = tokens.count(prompt) if tokens else 0
        rows.append(Row(prompt=prompt, prompt_len=prompt_len, output_len=_output_len(output_len, number)))
    return rows


def openai_rows(args: argparse.Namespace, tokens: Tokens | None) -> list[Row]:
    """`openai`: JSON lines, each the body of a chat request; what is not messages, length or model is passed on."""
    if args.backend != "sglang-oai-chat":
        raise ConfigError("--dataset-name openai holds chat requests: it needs --backend sglang-oai-chat")
    rows = []
    for number, line in _lines(args.dataset_path, args.num_prompts):
        messages = line.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ConfigError(f"--dataset-path, line {number}: `messages` is missing or empty")
        output_len = args.sharegpt_output_len or line.get("max_completion_tokens") or line.get("max_tokens") or 256
        taken = ("messages", "model", "max_tokens", "max_completion_tokens", "stream", "stream_options")
        extra = {key: value for key, value in line.items() if key not in taken}
        rows.append(Row(prompt=messages, prompt_len=0, output_len=_output_len(output_len, number), extra=extra))
    return rows


DATASETS: dict[str, Callable[[argparse.Namespace, Tokens | None], list[Row]]] = {
    "random": random_rows,
    "random-ids": random_rows,
    "generated-shared-prefix": shared_prefix_rows,
    "custom": custom_rows,
    "openai": openai_rows,
}


def load_rows(args: argparse.Namespace, tokens: Tokens | None) -> list[Row]:
    """The rows of `args.dataset_name`; at least one. Raises ConfigError that names the flag or the file's line."""
    rows = DATASETS[args.dataset_name](args, tokens)
    if not rows:
        raise ConfigError(f"--dataset-name {args.dataset_name}: no requests; check --num-prompts and --dataset-path")
    return rows


def _need(tokens: Tokens | None, dataset: str) -> Tokens:
    if tokens is None:
        raise ConfigError(f"--dataset-name {dataset} needs --tokenizer: the model's folder with tokenizer.json")
    return tokens


def _count(prompt: str | list[int], tokens: Tokens) -> int:
    return tokens.count(prompt) if isinstance(prompt, str) else len(prompt)


def _output_len(value: Any, number: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"--dataset-path, line {number}: no output length; give --sharegpt-output-len or a --tokenizer"
        )
    return value


def _lines(path: str, limit: int) -> list[tuple[int, dict[str, Any]]]:
    """The first `limit` JSON objects of a JSON lines file, with their line numbers."""
    if not path:
        raise ConfigError("this dataset needs --dataset-path: a file of JSON lines")
    found: list[tuple[int, dict[str, Any]]] = []
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                if len(found) == limit:
                    break
                if line.strip():
                    found.append((number, msgspec.json.decode(line, type=dict[str, Any])))
    except OSError as error:
        raise ConfigError(f"--dataset-path: cannot read it ({error.strerror})") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"--dataset-path, line {number}: not a JSON object ({error})") from None
    return found
