"""The demo model's problems: the split, the references, the scoring. Standard library alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest

from recipes.demo import TASKS, Problem, Reply, parse_reply, problems, score, split_of
from recipes.demo.arithmetic import add_steps, multiply_steps, subtract_steps
from recipes.demo.smalltalk import PHRASES, TEST_THOUGHT, make_fixed


@pytest.mark.parametrize("task", TASKS)
def test_the_splits_are_disjoint_and_seeded(task: str) -> None:
    num = 150 if task != "lookup" else 30
    held_out, train = problems(task, num, 3), problems(task, num, 4, "train")
    assert {split_of(problem) for problem in held_out} == {"held_out"}
    assert {split_of(problem) for problem in train} == {"train"}
    assert not {problem.identity for problem in held_out} & {problem.identity for problem in train}
    assert held_out == problems(task, num, 3)
    assert held_out != problems(task, num, 5)


@pytest.mark.parametrize("task", TASKS)
def test_reference_replies_score_and_others_do_not(task: str) -> None:
    for problem in problems(task, 60 if task != "lookup" else 20, 1):
        thought = parse_reply(f"<think>\n{problem.thought}\n</think>\n\n{problem.answer}")
        plain = parse_reply(problem.answer)
        assert score(problem, thought, True)
        assert score(problem, plain, False)
        assert not score(problem, thought, False)
        assert not score(problem, plain, True)
        assert not score(problem, Reply(None, "I do not know."), None)
        assert problem.thought.startswith("Okay, the user")


def test_problems_do_not_depend_on_the_hash_seed() -> None:
    code = "from recipes.demo import TASKS, problems; print([problems(task, 3) for task in TASKS])"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]


def test_the_pure_part_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "tokenizers", "aiohttp")
    code = f"import sys, recipes.demo; sys.exit(any(name in sys.modules for name in {heavy}))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_written_methods_end_in_the_right_digits() -> None:
    rng = random.Random(0)
    for _ in range(500):
        a, b = rng.randrange(10_000), rng.randrange(10_000)
        sums = [step.split("=")[1] for step in add_steps(a, b).rstrip(".").split(", ")]
        assert int(sums[-1] + "".join(digit[-1] for digit in reversed(sums[:-1]))) == a + b
        steps = subtract_steps(max(a, b), min(a, b)).rstrip(".").split(", ")
        assert int("".join(step.split("=")[1] for step in reversed(steps))) == abs(a - b)
        c, d = rng.randrange(100), rng.randrange(10)
        assert multiply_steps(c, d).rstrip(".").endswith(f"={c * d}")


def test_scoring_reads_replies_that_a_server_has_taken_apart() -> None:
    problem = problems("tool_call", 1)[0]
    call = {"name": problem.expect["name"], "arguments": json.dumps(problem.expect["arguments"])}
    message = [{"id": "1", "type": "function", "function": call}]
    assert score(problem, parse_reply(None, None, message), False)
    assert score(problem, parse_reply(None, problem.thought, message), True)
    wrong = [{"function": {"name": call["name"], "arguments": "{}"}}]
    assert not score(problem, parse_reply(None, None, wrong), False)
    assert not score(problem, parse_reply(None, None, message * 2), False)


def test_scoring_is_strict() -> None:
    lookup = replace(problems("lookup", 1)[0], expect=["4821"])
    assert score(lookup, Reply(None, "The value is 4821."))
    assert not score(lookup, Reply(None, "The value is 48210."))
    assert not score(lookup, Reply(None, "The value is 4821-7."))
    extract = problems("extract", 1)[0]
    assert not score(extract, Reply(None, f"Here it is: {extract.answer}"))
    total = replace(problems("arithmetic", 1)[0], expect=-5)
    assert score(total, Reply(None, "3 - 8 = -5"))
    assert not score(total, Reply(None, "5"))


def test_an_unfinished_thought_is_no_answer() -> None:
    reply = parse_reply("<think>\nOkay, the user wants 4")
    assert (reply.thought, reply.text) == ("Okay, the user wants 4", "")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="task must be one of"):
        problems("poetry", 1)
    with pytest.raises(ValueError, match="split must be one of"):
        problems("copy", 1, 0, "test")


def test_small_talk_covers_many_languages_and_fixed_phrases_are_in_training() -> None:
    assert len(PHRASES) >= 5
    rng = random.Random(0)
    fixed: list[Problem] = [make_fixed(rng) for _ in range(50)]
    assert {split_of(problem) for problem in fixed} == {"train"}
    assert TEST_THOUGHT.startswith("Okay, the user")
