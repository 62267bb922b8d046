"""Sampling against naive references: the distribution in float64, the penalties in loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from diptych.model.logprobs import token_logprobs
from diptych.model.noise import gumbel, hash_counters, mix, row_key, uniform
from diptych.model.order import ordered_top
from diptych.model.sampling import FIRST_LOOK, _draw_restricted, change_logits, sample
from diptych.types import LogprobSpec, Row, Sampling

VOCAB = 40
EOS = (3,)


def row(sampling: Sampling, position: int = 0, **values: Any) -> Row:
    return Row(rid="r", num_new=1, num_cached=0, samples=True, sampling=sampling, position=position, **values)


def logits_of(seed: int, rows: int = 1, vocab: int = VOCAB, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def naive_probabilities(logits: np.ndarray[Any, Any], s: Sampling) -> np.ndarray[Any, Any]:
    """Temperature, then top_k, top_p and min_p one after the other, each renormalizing, in float64."""
    scaled = logits.astype(np.float64) / s.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda t: (-p[t], t))
    if s.top_k > 0:
        p[order[s.top_k :]] = 0
        p /= p.sum()
    if s.top_p < 1:
        mass = 0.0
        for token in order:
            if mass >= s.top_p:
                p[token] = 0
            mass += p[token]
        p /= p.sum()
    p[p < s.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=11),
        Sampling(seed=12, temperature=0.5),
        Sampling(seed=13, top_k=5),
        Sampling(seed=14, top_p=0.7),
        Sampling(seed=15, min_p=0.1),
        Sampling(seed=16, temperature=1.5, top_k=12, top_p=0.8, min_p=0.05),
    ],
)
def test_draws_have_the_distribution_asked_for(sampling: Sampling) -> None:
    num_draws = 20000
    logits = logits_of(1)
    p = naive_probabilities(logits[0].numpy(), sampling)
    rows = [row(sampling, position) for position in range(num_draws)]
    counts = np.bincount(sample(rows, logits.expand(num_draws, -1), EOS).numpy(), minlength=VOCAB)
    assert counts[p == 0].sum() == 0
    expected = p * num_draws
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi2 = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_a_draw_depends_on_its_own_row_alone() -> None:
    choices = [
        Sampling(temperature=0.0),
        Sampling(seed=1),
        Sampling(seed=2, top_k=3),
        Sampling(seed=3, top_k=200, top_p=0.5),
        Sampling(seed=4, top_p=0.97),
        Sampling(seed=5, min_p=0.02, presence_penalty=1.0),
        Sampling(seed=6, temperature=1.3, logit_bias={5: 4.0}),
    ]
    logits = logits_of(2, len(choices) * 4, vocab=1000)
    rows = [row(choices[i % len(choices)], i, history=[1, 2, 5, 5], num_prompt=1) for i in range(len(logits))]
    together = sample(rows, logits, EOS).tolist()
    assert together == [int(sample([one], logits[i : i + 1], EOS)) for i, one in enumerate(rows)]
    some = [3, 17, 9]
    assert [together[i] for i in some] == sample([rows[i] for i in some], logits[some], EOS).tolist()


def test_looking_at_few_candidates_first_gives_the_same_draw() -> None:
    flat = logits_of(3, 96, vocab=5000, spread=0.3)  # top_p keeps more than the first look sees, or the second
    settings = [Sampling(seed=i, top_p=(0.02, 0.3, 0.95)[i % 3]) for i in range(96)]
    keys = torch.tensor([[row_key(s.seed, 0)] for s in settings])
    expected = sample([row(s) for s in settings], flat, EOS).tolist()
    assert FIRST_LOOK * 8 < 5000
    for look in (300, 2500, 5000):
        assert _draw_restricted(settings, flat, keys, look).tolist() == expected


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [30, 8, 21]] = 1.0
    assert sample([row(Sampling(temperature=0.0))], logits, EOS).tolist() == [8]
    assert sample([row(Sampling(temperature=0.7, top_k=1))], logits, EOS).tolist() == [8]


def test_top_k_keeps_exactly_k_of_equals() -> None:
    rows = [row(Sampling(top_k=4, seed=seed)) for seed in range(400)]
    assert set(sample(rows, torch.zeros(400, VOCAB), EOS).tolist()) == {0, 1, 2, 3}


def test_penalties_bias_and_minimum_against_loops() -> None:
    generator = torch.Generator().manual_seed(4)
    for trial in range(20):
        history = torch.randint(0, VOCAB, (25,), generator=generator).tolist()
        sampling = Sampling(
            temperature=0.0,
            repetition_penalty=(1.0, 1.3, 0.8)[trial % 3],
            frequency_penalty=(0.0, 0.4)[trial % 2],
            presence_penalty=(0.0, -0.7, 0.5)[trial % 3],
            logit_bias={1: 2.5, 30: -100.0},
            min_new_tokens=16,
            stop_token_ids=(9,),
        )
        one = row(sampling, history=history, num_prompt=10, num_output=15)
        logits = logits_of(trial)[0]
        expected = logits.clone()
        for token in range(VOCAB):
            value = float(logits[token])
            if token in history and sampling.repetition_penalty != 1.0:
                value = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
            count = history[10:].count(token)
            value -= sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0)
            value += sampling.logit_bias.get(token, 0.0)
            expected[token] = -math.inf if token in (3, 9) else value
        changed = logits.clone()
        change_logits(one, changed, EOS)
        torch.testing.assert_close(changed, expected, rtol=0, atol=1e-5)
        before = logits.clone()
        assert sample([one], logits[None], EOS).tolist() == [int(expected.argmax())]
        assert torch.equal(logits, before)


def test_a_penalty_without_history_is_a_defect() -> None:
    with pytest.raises(ValueError, match="history"):
        sample([row(Sampling(repetition_penalty=1.1))], logits_of(0), EOS)


def test_a_mask_allows_what_it_says_and_nothing_past_its_end() -> None:
    allowed = {2, 9, 17}
    mask = bytearray(3)
    for token in allowed:
        mask[token // 8] |= 1 << token % 8
    rows = [row(Sampling(seed=seed, temperature=5.0), mask=bytes(mask)) for seed in range(300)]
    assert set(sample(rows, logits_of(5).expand(300, -1), EOS).tolist()) == allowed


def test_noise_is_splitmix64_and_the_same_in_any_shape() -> None:
    state = 1234567
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # SplitMix64's outputs for this seed
    assert [mix(state + (n + 1) * 0x9E3779B97F4A7C15) for n in range(3)] == published
    hashes = hash_counters(torch.tensor(state), torch.arange(1, 4))
    assert [value % (1 << 64) for value in hashes.tolist()] == published

    keys = torch.tensor([[row_key(7, 3)], [row_key(7, 4)]])
    whole = gumbel(keys, torch.arange(5000))
    part = gumbel(keys[1:], torch.tensor([[4999, 17, 0]]))
    assert torch.equal(part, whole[1:, [4999, 17, 0]])
    assert not torch.equal(whole[0], whole[1])
    assert whole.mean().item() == pytest.approx(0.5772, abs=0.03)
    assert torch.equal(uniform(5, 100, 200), uniform(5, 0, 300)[100:200])


def test_ordered_top_sorts_by_value_then_id() -> None:
    values = torch.tensor([[0.0, -1.0, 5.0, -0.0, 5.0, -torch.inf, -2.5]])
    top, ids = ordered_top(values, 7)
    assert ids.tolist() == [[2, 4, 0, 3, 1, 6, 5]]
    assert top.tolist() == [[5.0, 5.0, 0.0, 0.0, -1.0, -2.5, -math.inf]]


def test_logprobs_are_those_of_the_raw_logits_in_any_company() -> None:
    logits = logits_of(6, 9)
    logits[:, 21] = logits[:, 20]  # equals come by id
    specs = [LogprobSpec(top=index % 4, token_ids=(7, 0)[: index % 3]) for index in range(9)]
    tokens = list(range(9))
    found = token_logprobs(logits, torch.tensor(tokens), specs)()
    exact = torch.log_softmax(logits.double(), -1)
    for index, entry in enumerate(found):
        assert entry.logprob == pytest.approx(exact[index, index].item(), abs=1e-6)
        order = sorted(range(VOCAB), key=lambda t: (-logits[index, t].item(), t))
        assert [token for _, token in entry.top] == order[: index % 4]
        assert [token for _, token in entry.chosen] == [7, 0][: index % 3]
        assert [entry] == token_logprobs(logits[index : index + 1], torch.tensor([index]), [specs[index]])()
