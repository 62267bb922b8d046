"""The runner on a GPU: CUDA graphs against launches one by one, overlapped steps against steps in turn, deterministic
mode with `==`. Everything here needs a GPU; without one the kernels' tests run in Triton's interpreter instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from model_checkpoints import qwen3, write
from model_driver import Driver, Sequence, prompt_of
from model_mixes import run_mixes, run_overlapped

from diptych.config import ServerConfig
from diptych.model.graphs import Shape
from diptych.model.runner import Runner
from diptych.types import LogprobSpec, Sampling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "head_dim": 64,
    "initializer_range": 0.05,
}
LENGTHS = (70, 21, 34, 300, 5)
STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write(path, qwen3(**SHAPE))
    return path


def runner_of(folder: Path, **settings: object) -> Runner:
    config = ServerConfig(model_path=str(folder), page_size=16, max_total_tokens=4096, cuda_graph_max_bs=8)
    return Runner(ServerConfig(**{**{name: getattr(config, name) for name in config.__slots__}, **settings}))  # type: ignore[arg-type]


def sequences(count: int = len(LENGTHS), **values: object) -> list[Sequence]:
    return [Sequence(prompt_of(n, n), logprobs=LogprobSpec(top=2), rid=str(n), **values) for n in LENGTHS[:count]]  # type: ignore[arg-type]


def generate(runner: Runner, seqs: list[Sequence]) -> list[list[int]]:
    """Prompts in one step, then decode steps of all together."""
    driver = Driver(runner, 16)
    driver.run([(seq, len(seq.prompt)) for seq in seqs])
    for _ in range(STEPS):
        driver.run([(seq, 1) for seq in seqs])
    return [seq.outputs for seq in seqs]


def logprobs_of(seqs: list[Sequence]) -> torch.Tensor:
    return torch.tensor([item.logprob for seq in seqs for item in seq.output_logprobs])


@pytest.mark.parametrize(("hidden", "rows", "graph_rows"), [(384, 256, 64), (448, 16, 16), (576, 16, 0)])
def test_no_request_waits_for_a_compiler(
    hidden: int, rows: int, graph_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, qwen3(**{**SHAPE, "hidden_size": hidden, "intermediate_size": 640}))  # that no other test has
    graphs = {"cuda_graph_max_bs": graph_rows, "disable_cuda_graph": not graph_rows}
    runner = runner_of(tmp_path, max_running_requests=rows, max_total_tokens=1 << 14, **graphs)
    compiled: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **told: compiled.append(told["fn"].name) or None
    )
    for count in (1, 3, len(LENGTHS)):
        generate(runner, sequences(count))
    generate(runner, [Sequence(prompt_of(n, n)) for n in range(2, min(45, rows + 2))])
    driver, seqs = Driver(runner, 16), sequences()
    driver.run([(seqs[0], len(seqs[0].prompt))])
    for seq in seqs[1:]:  # prompts beside rows that decode
        driver.run([(seqs[0], 1), (seq, len(seq.prompt))])
    assert compiled == []


def test_graphs_give_what_launches_one_by_one_give(folder: Path) -> None:
    with_graphs, without = sequences(), sequences()
    tokens = generate(runner_of(folder, dtype="float32"), with_graphs)
    assert tokens == generate(runner_of(folder, dtype="float32", disable_cuda_graph=True, cuda_graph_max_bs=0), without)
    torch.testing.assert_close(logprobs_of(with_graphs), logprobs_of(without), rtol=0, atol=1e-5)


def test_in_bfloat16_graphs_part_from_launches_one_by_one_only_where_two_tokens_are_as_likely(folder: Path) -> None:
    """Kernels that overlap in a graph are others, and round at other places."""
    with_graphs, without = sequences(), sequences()
    generate(runner_of(folder, dtype="bfloat16"), with_graphs)
    generate(runner_of(folder, dtype="bfloat16", disable_cuda_graph=True, cuda_graph_max_bs=0), without)
    for one, other in zip(with_graphs, without, strict=True):
        assert_alike(one, other)


def assert_alike(one: Sequence, other: Sequence) -> None:
    """The same tokens, with nearly the same logprobs, up to where two are as likely."""
    pairs = list(zip(one.output_logprobs, other.output_logprobs, strict=True))
    apart = next((i for i, (a, b) in enumerate(zip(one.outputs, other.outputs, strict=True)) if a != b), len(pairs))
    for a, b in pairs[: apart + 1]:
        assert abs(a.logprob - b.logprob) < 0.05


def test_the_kernels_say_what_torch_says(folder: Path) -> None:
    ours, plain = sequences(), sequences()
    generate(runner_of(folder, dtype="float32"), ours)
    generate(runner_of(folder, dtype="float32", attention_backend="torch", cuda_graph_max_bs=0), plain)
    assert [seq.outputs for seq in ours] == [seq.outputs for seq in plain]
    torch.testing.assert_close(logprobs_of(ours), logprobs_of(plain), rtol=0, atol=2e-3)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(seed=5, top_k=20, top_p=0.95)])
@pytest.mark.parametrize("graphs", [True, False])
def test_a_step_can_be_launched_behind_another(folder: Path, sampling: Sampling, graphs: bool) -> None:
    """Each step is launched before the tokens of the one before are known on the host."""
    settings = {} if graphs else {"disable_cuda_graph": True, "cuda_graph_max_bs": 0}
    runner = runner_of(folder, **settings)
    expected = generate(runner, sequences(sampling=sampling))
    seqs = sequences(sampling=sampling)
    driver = Driver(runner, 16)
    pending = runner.launch(driver.plan([(seq, len(seq.prompt)) for seq in seqs]))
    for _ in range(STEPS):
        for seq in seqs:  # a place for the token that is not known yet
            seq.num_cached = len(seq.tokens)
            seq.outputs.append(0)
        plan = driver.plan([(seq, 1) for seq in seqs])
        plan.token_ids[:] = [-1 - row for row in range(len(seqs))]
        behind = runner.launch(plan)
        take(runner.collect(pending).rows, seqs)
        pending = behind
    for seq in seqs:
        seq.outputs.append(0)
    take(runner.collect(pending).rows, seqs)
    assert [seq.outputs for seq in seqs] == expected


def shapes_taken(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> list[Shape | None]:
    """Fills with the graph of each step that follows."""
    assert runner._graphs is not None
    taken: list[Shape | None] = []
    begin = runner._graphs.begin

    def noted(*args: Any) -> Shape | None:
        taken.append(begin(*args))
        return taken[-1]

    monkeypatch.setattr(runner._graphs, "begin", noted)
    return taken


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_mixed_steps_in_graphs_are_those_without(
    folder: Path, seed: int, overlapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, ours = sequences(), sequences()
    run_mixes(runner_of(folder, dtype="float32", disable_cuda_graph=True, cuda_graph_max_bs=0), plain, seed, STEPS)
    runner = runner_of(folder, dtype="float32")
    taken = shapes_taken(runner, monkeypatch)
    (run_overlapped if overlapped else run_mixes)(runner, ours, seed, STEPS)
    assert [seq.outputs for seq in ours] == [seq.outputs for seq in plain]
    torch.testing.assert_close(logprobs_of(ours), logprobs_of(plain), rtol=0, atol=2e-5)
    assert None not in taken
    assert len({shape.tokens for shape in taken if shape is not None and not shape.decode}) > 2


@pytest.mark.parametrize("seed", range(2))
def test_mixed_steps_of_the_kernels_of_16_bits(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the shapes of Hopper's prefill kernel; they part only where two tokens are as likely."""
    write(tmp_path, qwen3(**{**SHAPE, "head_dim": 128}))
    settings = {"dtype": "bfloat16", "page_size": 64}
    plain, ours = sequences(), sequences()
    without = runner_of(tmp_path, disable_cuda_graph=True, **{**settings, "cuda_graph_max_bs": 0})
    run_mixes(without, plain, seed, STEPS, page=64)
    runner = runner_of(tmp_path, **settings)
    taken = shapes_taken(runner, monkeypatch)
    run_overlapped(runner, ours, seed, STEPS, page=64)
    for one, other in zip(ours, plain, strict=True):
        assert_alike(one, other)
    assert None not in taken


def take(rows: list, seqs: list[Sequence]) -> None:  # type: ignore[type-arg]
    for seq, row in zip(seqs, rows, strict=True):
        seq.outputs[-1] = row.token


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_mode_gives_the_same_bits_alone_in_company_and_in_chunks(folder: Path, dtype: str) -> None:
    runner = runner_of(folder, dtype=dtype, deterministic=True)
    assert runner.exact
    together = sequences()
    generate(runner, together)
    for seq in sequences():
        alone = Sequence(seq.prompt, logprobs=seq.logprobs)
        driver = Driver(runner, 16, seed=3)
        driver.generate(alone, STEPS + 1, chunk=33)
        same = next(other for other in together if other.rid == seq.rid)
        assert alone.outputs == same.outputs
        assert alone.output_logprobs == same.output_logprobs
        driver.release(alone)
