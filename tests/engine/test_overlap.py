"""The real model on a CPU, with plans made ahead: to the last bit what it gives step by step."""

from __future__ import annotations

import asyncio

import pytest

from diptych.config import ServerConfig
from diptych.engine.loop import Engine
from diptych.engine.ranks import Ranks
from diptych.engine.roles.unified import UnifiedRole
from diptych.model.runner import Runner
from diptych.sched.state import SchedConfig, new_state
from diptych.text.grammar import GrammarCompiler
from diptych.types import FromEngine, Grammar, LogprobSpec, Output, Outputs, Plan, Request, Sampling, Submit

PAGE_SIZE, NUM_PAGES = 16, 40
MODEL = "models/demo"


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(ServerConfig(model_path=MODEL, page_size=PAGE_SIZE, max_total_tokens=PAGE_SIZE * NUM_PAGES))


def requests() -> list[Request]:
    """Of every kind, more than the pool can hold at once."""
    kinds = [
        Sampling(max_new_tokens=40, temperature=0.0, ignore_eos=True),
        Sampling(max_new_tokens=30, seed=7, top_p=0.9),
        Sampling(max_new_tokens=25, seed=8, presence_penalty=0.5),
        Sampling(max_new_tokens=50, seed=9, min_new_tokens=3, stop_token_ids=tuple(range(0, 4000, 7))),
        Sampling(max_new_tokens=20, temperature=0.0, grammar=Grammar("regex", "[a-z]+ [0-9]{3}")),
    ]
    specs = [None, LogprobSpec(top=2), LogprobSpec(prompt_start=2)]
    return [
        Request(
            rid=f"r{number}",
            prompt=[(number * 37 + at * at) % 997 + 3 for at in range(5 + 17 * number % 90)],
            sampling=kinds[number % len(kinds)],
            logprobs=specs[number % len(specs)],
        )
        for number in range(15)
    ]


async def serve(runner: Runner, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, list[Output]], int]:
    """What each request gets, and how many steps were planned with tokens that were not known then."""
    ahead = 0
    launch = runner.launch

    def counting(plan: Plan) -> object:
        nonlocal ahead
        ahead += bool((plan.token_ids < 0).any())
        return launch(plan)

    monkeypatch.setattr(runner, "launch", counting)
    outputs: dict[str, list[Output]] = {}
    everything = asyncio.Event()
    wanted = requests()

    def emit(message: FromEngine) -> None:
        assert isinstance(message, Outputs)
        for output in message.outputs:
            outputs.setdefault(output.rid, []).append(output)
        if sum(got[-1].finish is not None for got in outputs.values()) == len(wanted):
            everything.set()

    config = SchedConfig(
        page_size=PAGE_SIZE,
        context_len=256,
        max_running=8,
        chunk_tokens=48,
        reserved_decode_tokens=0,
        eos_token_ids=runner.info.eos_token_ids,
    )
    ranks = Ranks(runner, lambda *_: None, lambda _: None)
    ranks.overlaps = overlap  # on a CPU there is nothing to win, but it can be done
    grammars = GrammarCompiler(MODEL, runner.info.vocab_size, runner.info.eos_token_ids)
    engine = Engine(new_state(config, NUM_PAGES), ranks, emit, grammars=grammars)
    UnifiedRole(engine.requests)
    running = asyncio.create_task(engine.run())
    for request in wanted:
        engine.deliver(Submit(request))
    async with asyncio.timeout(120):
        await everything.wait()
    engine.stop()
    await running
    ranks.close()
    assert not engine.state.seqs
    return outputs, ahead


async def test_what_is_planned_ahead_gives_the_same(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for overlap in (False, True):
        with monkeypatch.context() as patch:
            outputs, ahead = await serve(runner, overlap, patch)
        assert (ahead > 10) == overlap
        answers.append({rid: [content(output) for output in got] for rid, got in outputs.items()})
    assert answers[0] == answers[1]
    assert {end.type for got in outputs.values() for end in [got[-1].finish] if end} == {"stop", "length"}


def content(output: Output) -> tuple[object, ...]:
    """All but how often the request had to give way."""
    return output.tokens, output.logprobs, output.prompt_logprobs, output.finish
