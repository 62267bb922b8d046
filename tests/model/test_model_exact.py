"""Decision 3, with ==: a sequence's tokens and logprobs do not depend on how and with whom it is computed; on a GPU in
deterministic mode, with its kernels and graphs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from model_checkpoints import llama, qwen3, write
from model_devices import DEVICES, SETTINGS
from model_driver import GREEDY, VOCAB, Driver, Sequence, prompt_of
from transformers import PreTrainedConfig

from diptych.config import ServerConfig
from diptych.model.layers import Linear, padded_rows
from diptych.model.paged_attention import PagedAttention
from diptych.model.runner import Runner
from diptych.model.selftest import activations_are_exact, attention_is_exact, products_are_exact
from diptych.types import LogprobSpec, Sampling

NUM_OUTPUTS = 6
SPEC = LogprobSpec(prompt_start=0, top=3)
LENGTHS = (1, 2, 5, 17, 60, 127, 128, 129, 260, 300)
SAMPLINGS = (
    GREEDY,
    Sampling(temperature=0.8, seed=1),
    Sampling(temperature=1.2, top_p=0.9, seed=2),
    Sampling(temperature=1.2, top_k=20, top_p=0.8, seed=3),
    Sampling(temperature=1.0, min_p=0.05, seed=4, frequency_penalty=0.3, repetition_penalty=1.1),
)


@dataclass(frozen=True)
class Case:
    config: PreTrainedConfig
    page_size: int
    other_page_size: int = 7
    device: str = "cpu"
    dtype: str = "float32"


FEW_KV_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 1}
CASES = {
    "qwen3, page 16": Case(qwen3(hidden_size=96, intermediate_size=160), 16),
    "llama, page 5": Case(llama(num_attention_heads=6, hidden_size=48, intermediate_size=33), 5),
    "qwen3, eight heads on one, page 100": Case(qwen3(**FEW_KV_HEADS, head_dim=40), 100),
}
for _dtype in ("float32", "bfloat16"):  # on a GPU the kernels take other shapes
    CASES |= {
        f"cuda, {_dtype}, llama, page 16": Case(llama(num_attention_heads=6), 16, 64, "cuda", _dtype),
        f"cuda, {_dtype}, qwen3, page 64": Case(qwen3(**FEW_KV_HEADS, head_dim=64), 64, 16, "cuda", _dtype),
    }


@dataclass
class Server:
    folder: Path
    case: Case
    known: dict[int, Sequence] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runner = self.start(max_total_tokens=6000)

    def start(self, **changes: Any) -> Runner:
        case = self.case
        settings = {"page_size": case.page_size, "dtype": case.dtype, "deterministic": case.device == "cuda", **changes}
        runner = Runner(ServerConfig(model_path=str(self.folder), **SETTINGS[case.device], **settings))
        assert runner.exact
        return runner

    def driver(self, seed: int = 0) -> Driver:
        return Driver(self.runner, self.case.page_size, seed)

    def alone(self, number: int) -> Sequence:
        """Sequence `number`, its prompt in one piece and nobody else there."""
        if number not in self.known:
            self.known[number] = sequence(number)
            self.driver(number).generate(self.known[number], NUM_OUTPUTS)
        return self.known[number]


@pytest.fixture(scope="module", params=[name for name, case in CASES.items() if case.device in DEVICES])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Server:
    folder = tmp_path_factory.mktemp("model")
    write(folder, CASES[request.param].config)
    return Server(folder, CASES[request.param])


def sequence(number: int) -> Sequence:
    prompt = prompt_of(LENGTHS[number % len(LENGTHS)], number)
    return Sequence(prompt, SAMPLINGS[number % len(SAMPLINGS)], logprobs=SPEC, rid=str(number))


def same(seq: Sequence, expected: Sequence) -> None:
    assert seq.outputs == expected.outputs
    assert seq.output_logprobs == expected.output_logprobs
    assert seq.prompt_logprobs == expected.prompt_logprobs


@pytest.mark.parametrize(("chunk", "numbers"), [(1, [3]), (7, [4]), (50, [7, 8]), (128, [8, 9])])
def test_chunks_do_not_show(server: Server, chunk: int, numbers: list[int]) -> None:
    for number in numbers:
        seq = sequence(number)
        server.driver(1).generate(seq, NUM_OUTPUTS, chunk)
        same(seq, server.alone(number))


@pytest.mark.parametrize("seed", range(2))
def test_company_pages_and_preemption_do_not_show(server: Server, seed: int) -> None:
    rnd = random.Random(seed)
    driver = server.driver(seed)
    seqs = [sequence(number) for number in range(len(LENGTHS))]
    rnd.shuffle(seqs)
    while unfinished := [seq for seq in seqs if len(seq.outputs) < NUM_OUTPUTS]:
        parts = []
        for seq in unfinished:
            left = len(seq.tokens) - seq.num_cached
            if rnd.random() < 0.8:
                parts.append((seq, left if left == 1 else min(left, rnd.choice([1, 2, 4, 16, 33, 100, 500]))))
        if rnd.random() < 0.1:
            victim = rnd.choice(unfinished)  # preempted: it computes everything again
            driver.release(victim)
            victim.prompt_logprobs = []
            parts = [part for part in parts if part[0] is not victim]
        rnd.shuffle(parts)
        if parts:
            driver.run(parts)
    for seq in seqs:
        same(seq, server.alone(int(seq.rid)))


def test_the_page_size_does_not_show(server: Server) -> None:
    page_size = server.case.other_page_size
    other = server.start(page_size=page_size, max_total_tokens=700)
    seq = sequence(8)
    Driver(other, page_size).generate(seq, NUM_OUTPUTS, chunk=100)
    same(seq, server.alone(8))


def test_a_cached_prefix_does_not_show(server: Server) -> None:
    driver = server.driver()
    first = server.alone(8)
    donor = sequence(8)
    driver.generate(donor, 1)
    page_size = server.case.page_size
    shared = page_size * (200 // page_size)  # whole pages of the donor's prompt
    seq = sequence(8)
    seq.pages, seq.num_cached = donor.pages[: shared // page_size], shared
    driver.generate(seq, NUM_OUTPUTS)
    assert (seq.outputs, seq.output_logprobs) == (first.outputs, first.output_logprobs)
    assert seq.prompt_logprobs == first.prompt_logprobs[shared:]


def test_pages_moved_to_another_runner_do_not_show(server: Server) -> None:
    """Disaggregation: prefill here, pages through the stores' bytes, decode elsewhere."""
    prefill, decode = server.driver(1), server.driver(2)
    seq = sequence(7)
    prefill.generate(seq, 1)
    targets = [page for page in decode.free if page not in seq.pages][-len(seq.pages) - 2 :]
    store = server.runner.store
    half = store.num_heads // 2
    for heads in ((0, half), (half, store.num_heads)):
        if heads[0] < heads[1]:
            data = bytes(store.read(seq.pages, *heads))
            store.write(targets[: len(seq.pages)], *heads, memoryview(data))
    store.write(seq.pages, 0, store.num_heads, memoryview(bytes(len(seq.pages) * store.num_heads * store.head_bytes)))
    decode.free = [page for page in decode.free if page not in targets]
    seq.pages = targets[: len(seq.pages)]
    decode.generate(seq, NUM_OUTPUTS)
    same(seq, server.alone(7))


def test_a_neighbour_with_nonsense_in_its_cache_does_not_show(server: Server) -> None:
    """Not-a-numbers stay with the sequence that made them, even where pages are used again."""
    runner, page_size = server.runner, server.case.page_size
    expected = server.alone(8)
    driver = server.driver(5)
    poisoned = sequence(9)
    plan = driver.plan([(poisoned, len(poisoned.prompt))])
    decoder: Any = runner.model
    table = getattr(decoder, "decoder", decoder).ends.embedding.table  # a GPU's model has the decoder within
    token = next(t for t in poisoned.prompt if t not in expected.tokens)
    with torch.inference_mode():
        kept = table[token].clone()
        table[token] = torch.inf
        runner.run(plan)
        table[token] = kept
    seq = sequence(8)
    driver.free = driver.free[: -len(seq.prompt) // page_size] + poisoned.pages  # its pages come first
    driver.generate(seq, NUM_OUTPUTS)
    same(seq, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_chunks_and_company_do_not_show_in_half_precision(server: Server, dtype: str) -> None:
    runner, page_size = server.start(max_total_tokens=2000, dtype=dtype), server.case.page_size
    whole, chunked, company = sequence(8), sequence(8), sequence(7)
    Driver(runner, page_size).generate(whole, NUM_OUTPUTS)
    driver = Driver(runner, page_size, seed=3)
    while len(chunked.outputs) < NUM_OUTPUTS:
        parts = [(seq, min(90, len(seq.tokens) - seq.num_cached)) for seq in (company, chunked)]
        driver.run(parts)
    same(chunked, whole)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_self_test_passes_with_one_thread_and_with_two(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shapes = [(256, 1024), (768, 256), (100, 33)]
        assert products_are_exact(shapes, torch.float32, "cpu", partial(Linear, pack=True))
        assert products_are_exact(shapes, torch.float32, "cpu", partial(Linear, pack=False))
        assert attention_is_exact(8, 4, 64, 16, torch.float32, "cpu", partial(PagedAttention, num_heads=8, scale=0.1))
        assert attention_is_exact(5, 1, 40, 12, torch.float32, "cpu", partial(PagedAttention, num_heads=5, scale=0.1))
        assert activations_are_exact(300, torch.float32, "cpu")
    finally:
        torch.set_num_threads(before)


def test_the_self_test_notices_rows_that_depend_on_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def shaky(self: Linear, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 1e-7 * (x.shape[0] > 40))

    monkeypatch.setattr(Linear, "__call__", shaky)
    assert not products_are_exact([(64, 64)], torch.float32, "cpu", partial(Linear, pack=False))


def test_row_counts_are_padded_to_multiples_of_four_in_few_sizes() -> None:
    sizes = [padded_rows(count) for count in range(1, 4097)]
    assert all(size % 4 == 0 and 0 <= size - count < max(4, count / 8) for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 160
    assert VOCAB < 256
