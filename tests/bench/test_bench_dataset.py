from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from diptych.bench.commands import add_flags
from diptych.bench.dataset import load_rows
from diptych.bench.tokens import Tokens
from diptych.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small byte-level tokenizer: every byte a token, forty words, one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {mark: i for i, mark in enumerate(alphabet)}
    merges = []
    for first in "abcdefgh":
        for second in "klmno":
            merges.append((first, second))
            vocab[first + second] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(path / "tokenizer.json"))
    return str(path)


@pytest.fixture(scope="module")
def tokens(folder: str) -> Tokens:
    return Tokens.open(folder)


def flags(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(list(argv))


def test_random_text_has_the_length_asked_for(tokens: Tokens) -> None:
    args = flags("--num-prompts", "50", "--random-input-len", "40", "--random-output-len", "8")
    args.random_range_ratio = 0.5
    rows = load_rows(args, tokens)
    assert len(rows) == 50
    assert all(isinstance(row.prompt, str) and tokens.count(row.prompt) == row.prompt_len for row in rows)
    assert {row.prompt_len for row in rows} <= set(range(20, 41))
    assert {row.output_len for row in rows} == {4, 5, 6, 7, 8}
    assert rows == load_rows(args, tokens)
    args.seed = 43
    assert rows != load_rows(args, tokens)


def test_fixed_lengths(tokens: Tokens) -> None:
    args = flags("--num-prompts", "20", "--random-input-len", "33", "--random-range-ratio", "1.0")
    assert {(row.prompt_len, row.output_len) for row in load_rows(args, tokens)} == {(33, 1024)}


def test_random_ids_are_ids_and_never_special(tokens: Tokens) -> None:
    args = flags("--dataset-name", "random-ids", "--num-prompts", "40", "--random-input-len", "200")
    rows = load_rows(args, tokens)
    drawn = {i for row in rows for i in row.prompt}
    assert drawn == set(range(296))  # every plain token, and not 296, the special one
    assert all(len(row.prompt) == row.prompt_len for row in rows)


def test_random_ids_become_text_for_chat(tokens: Tokens) -> None:
    args = flags("--dataset-name", "random-ids", "--backend", "sglang-oai-chat", "--num-prompts", "3")
    assert all(isinstance(row.prompt, str) for row in load_rows(args, tokens))


def test_shared_prefix(tokens: Tokens) -> None:
    shape = ("--gsp-num-groups", "3", "--gsp-prompts-per-group", "4", "--gsp-system-prompt-len", "30")
    args = flags(
        "--dataset-name", "generated-shared-prefix", *shape, "--gsp-question-len", "6", "--gsp-output-len", "9"
    )
    shuffled = load_rows(args, tokens)
    args.gsp_ordered = True
    ordered = load_rows(args, tokens)
    assert len(ordered) == 12
    assert shuffled != ordered
    assert sorted(row.prompt for row in shuffled) == sorted(row.prompt for row in ordered)
    systems = [row.prompt.split("\n\n")[0] for row in ordered]
    assert [len(set(systems[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1]
    assert len(set(systems)) == 3
    assert len({row.prompt for row in ordered}) == 12
    assert {row.output_len for row in ordered} == {9}


def write(path: Path, *lines: object) -> str:
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    return str(path)


def test_custom_file(tokens: Tokens, tmp_path: Path) -> None:
    turns = [{"content": "ak bl"}, {"value": "co do el"}]
    path = write(tmp_path / "c.jsonl", {"conversations": turns}, {"prompt": "fm", "output_len": 7}, {"prompt": "x"})
    args = flags("--dataset-name", "custom", "--dataset-path", path, "--num-prompts", "2")
    rows = load_rows(args, tokens)
    assert [(row.prompt, row.prompt_len, row.output_len) for row in rows] == [("ak bl", 3, 5), ("fm", 1, 7)]
    args.sharegpt_output_len = 3
    assert [row.output_len for row in load_rows(args, None)] == [3, 3]
    args.num_prompts, args.sharegpt_output_len = 3, None
    with pytest.raises(ConfigError, match="line 5"):  # lines are counted with the empty ones
        load_rows(args, tokens)


def test_openai_file(tmp_path: Path) -> None:
    line = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "model": "x", "tools": [1], "top_p": 0.5}
    path = write(tmp_path / "o.jsonl", line)
    args = flags("--dataset-name", "openai", "--dataset-path", path, "--backend", "sglang-oai-chat")
    (row,) = load_rows(args, None)
    assert (row.prompt, row.output_len, row.extra) == (line["messages"], 12, {"tools": [1], "top_p": 0.5})
    args.backend = "sglang"
    with pytest.raises(ConfigError, match="sglang-oai-chat"):
        load_rows(args, None)


def test_what_is_missing_is_named(tokens: Tokens, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tokenizer"):
        load_rows(flags(), None)
    with pytest.raises(ConfigError, match="--dataset-path"):
        load_rows(flags("--dataset-name", "custom"), tokens)
    with pytest.raises(ConfigError, match="--dataset-path"):
        load_rows(flags("--dataset-name", "custom", "--dataset-path", str(tmp_path / "none")), tokens)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\nnot json\n')
    with pytest.raises(ConfigError, match="line 2"):
        load_rows(flags("--dataset-name", "custom", "--dataset-path", str(bad), "--sharegpt-output-len", "2"), tokens)
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokens.open(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokens.open(str(tmp_path))
    with pytest.raises(ConfigError, match="--random-range-ratio"):
        load_rows(flags("--random-range-ratio", "1.5"), tokens)
