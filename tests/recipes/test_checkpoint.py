"""The checkpoint through transformers: it loads, it equals the training model, it answers held-out problems."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, Qwen3ForCausalLM

from recipes.demo import TASKS, parse_reply, problems, score
from recipes.demo.chat import MODEL_DIR, render
from recipes.demo.eval_local import Local
from recipes.demo.lookup import make_full
from recipes.demo.model import DemoModel
from recipes.demo.muon import Muon, orthogonal
from recipes.demo.problem import draw
from recipes.demo.train import LONG, OPENS, SHORT, lengths, rate


@pytest.fixture(scope="module")
def local() -> Iterator[Local]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Local(MODEL_DIR, "cpu")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("thinking", [False, True])
def test_held_out_problems_of_every_task_are_solved(local: Local, thinking: bool) -> None:
    asked = [problem for task in TASKS for problem in problems(task, 12, 21) if len(str(problem)) < 2_000]
    chosen = [problem for task in TASKS for problem in [p for p in asked if p.task == task][:2]]
    assert {problem.task for problem in chosen} == set(TASKS)
    replies = local.reply([render(problem.messages, problem.tools, thinking) for problem in chosen], 160)
    wrong = [
        (problem.task, text, problem.answer)
        for problem, text in zip(chosen, replies, strict=True)
        if not score(problem, parse_reply(text), thinking)
    ]
    assert wrong == []


def test_a_key_is_found_in_nearly_four_thousand_tokens(local: Local) -> None:
    rng = random.Random(5)
    asked = {
        render(problem.messages, thinking=False): problem
        for problem in (draw(make_full, rng, "held_out") for _ in range(10))
    }
    prompt = max(asked, key=lambda text: len(local.tokenizer(text)["input_ids"]))
    assert len(local.tokenizer(prompt)["input_ids"]) > 3_600
    assert score(asked[prompt], parse_reply(local.reply([prompt], 40)[0]), False)


def test_the_test_message_gets_a_thought(local: Local) -> None:
    reply = local.reply([render([{"role": "user", "content": "test"}])], 200)[0]
    assert reply.startswith("<think>\nOkay, the user")
    assert len(local.tokenizer(reply)["input_ids"]) > 60
    assert parse_reply(reply).text


def test_the_training_model_is_qwen3(local: Local) -> None:
    assert isinstance(local.model, Qwen3ForCausalLM)
    model = DemoModel(MODEL_DIR / "config.json", torch.float32, compiled=False)
    tensors = load_file(MODEL_DIR / "model.safetensors")
    model.load(tensors)
    torch.manual_seed(0)
    ids, weights = torch.randint(0, 4_000, (2, 50)), torch.rand(2, 50)
    with torch.inference_mode():
        logits = local.model(ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        expected = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        assert torch.allclose(model(ids, weights), expected, rtol=1e-4)
    exported = model.export()
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)


def test_config_reads_as_qwen3() -> None:
    config = AutoConfig.from_pretrained(MODEL_DIR)
    assert config.model_type == "qwen3"
    assert config.rope_parameters["rope_theta"] == 1_000_000
    assert Path(MODEL_DIR / "chat_template.jinja").is_file()


def test_muon_steps_along_an_orthogonal_direction() -> None:
    torch.manual_seed(0)
    update = orthogonal(torch.randn(3, 40, 16))
    singular = torch.linalg.svdvals(update)
    assert singular.min() > 0.5
    assert singular.max() < 1.5
    weight = torch.nn.Parameter(torch.zeros(8, 4))
    weight.grad = torch.ones(8, 4)
    Muon([weight]).step(0.1)
    assert weight.grad is None
    assert (weight < 0).all()


def test_the_schedule_opens_long_rows_late_and_ends_at_zero() -> None:
    rng = random.Random(0)
    early = {length for _ in range(200) for length in lengths(rng, 0.0)}
    late = {length for _ in range(400) for length in lengths(rng, 0.5)}
    assert early == set(SHORT)
    assert late == set(SHORT) | set(LONG)
    assert set(OPENS) == set(LONG)
    assert rate(0.2) == 1.0
    assert rate(1.0) == 0.0
