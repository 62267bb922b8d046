"""The GPU benchmarks as far as a CPU can judge them: their arithmetic, the page they fill, and a rehearsal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.dom import minidom

import numpy as np
import pytest

from benchmarks.gpu import page, reference, svg, tables
from benchmarks.gpu.models import MODELS, QWEN3_8B, REHEARSAL, model_folder, pad_tokenizer
from benchmarks.gpu.profile_engine import decode_plans, table
from benchmarks.gpu.shapes import QWEN3_32B, QWEN3_600M
from benchmarks.gpu.slo import Mix, Search, Slo
from benchmarks.gpu.tails import itls_within, means
from benchmarks.gpu.topology import Part, parse
from diptych.bench.sample import Sample
from diptych.model.config import load_model_config
from diptych.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("batch", "floor_ms"), [(1, 14.9), (8, 15.4), (32, 17.0), (64, 19.1), (128, 23.4)])
def test_floors_of_a_decode_step_are_those_published_in_the_issue(batch: int, floor_ms: float) -> None:
    assert round(reference.decode_floor_ms(QWEN3_32B, batch, 1024), 1) == floor_ms
    assert reference.decode_floor_ms(QWEN3_32B, batch, 1024, 2) * 2 == reference.decode_floor_ms(QWEN3_32B, batch, 1024)


def test_floors_of_prefill_and_small_models() -> None:
    rates = [round(reference.prefill_floor_tok_s(QWEN3_32B, n) / 1e3, 1) for n in (1024, 4096, 16384, 32768)]
    assert rates == [12.4, 11.8, 9.9, 8.2]
    assert round(reference.decode_floor_ms(QWEN3_600M, 1, 1024), 2) == 0.31
    assert round(reference.decode_floor_ms(QWEN3_8B, 64, 1024), 1) == 5.9
    assert [reference.kv_bytes(shape) >> 10 for shape in (QWEN3_32B, QWEN3_8B, QWEN3_600M)] == [256, 144, 112]


def test_every_target_is_between_floor_and_peer() -> None:
    for (model, tp, batch, context), (peer, target) in reference.TPOT_MS.items():
        floor = reference.decode_floor_ms(MODELS[model], batch, context, tp)
        assert floor < (target or peer) <= peer
    for (model, tp, _, length), (peer, target) in reference.PREFILL_TOK_S.items():
        assert peer <= (target or peer) < reference.prefill_floor_tok_s(MODELS[model], length, tp)


def test_a_model_folder_is_read_as_its_shape() -> None:
    with model_folder(REHEARSAL.name) as folder:
        config = load_model_config(Path(folder))
        tokenizer = Tokenizer.load(folder)
    assert (config.hidden_size, config.num_layers, config.num_kv_heads) == (64, 2, 2)
    assert config.vocab_size == tokenizer.vocab_size == REHEARSAL.vocab
    assert config.tied and config.max_position == 40960 and config.rope.theta == 1e6
    texts = [tokenizer.decode([token], skip_special=False) for token in range(4096, REHEARSAL.vocab)]
    assert all(len(text) == 5 for text in texts) and len(set(texts)) == len(texts)
    assert config.eos_token_ids == tuple(tokenizer.encode("<|im_end|>", special=False))


def test_padding_leaves_what_has_a_text_alone() -> None:
    tokenizer: dict[str, Any] = {
        "model": {"vocab": {"a": 0, "Ġaaaa": 2}},
        "added_tokens": [{"id": 3, "content": "<end>"}],
    }
    pad_tokenizer(tokenizer, 6)
    assert tokenizer["model"]["vocab"] == {"a": 0, "Ġaaaa": 2, "<end>": 3, "Ġaaab": 1, "Ġaaac": 4, "Ġaaad": 5}


@pytest.mark.parametrize("limit", [0.07, 0.3, 0.5, 0.51, 0.93, 3.7])
def test_a_search_closes_in_on_the_limit(limit: float) -> None:
    search = Search(0.5, 12)
    while not search.done:
        search.add(search.rate <= limit)
    assert search.holds <= limit < search.fails <= search.holds * 1.12
    assert search.tried < 12


def test_a_search_ends_after_so_many_runs_whatever_it_finds() -> None:
    never, always = Search(1.0, 4), Search(1.0, 4)
    while not never.done:
        never.add(False)
    while not always.done:
        always.add(True)
    assert (never.holds, never.fails) == (0.0, 0.125)
    assert (always.holds, always.fails) == (8.0, 0.0)


def sample(ttft_s: float | None, itls_s: list[float], error: str = "") -> Sample:
    return Sample(
        start_s=10.0, latency_s=99.0, ttft_s=ttft_s, itls_s=itls_s, error=error, output_tokens=1 + len(itls_s)
    )


def test_limits_are_those_of_each_request() -> None:
    slo = Slo(2.0, 0.025)
    assert slo.meets(sample(2.0, [0.02] * 397 + [0.8] * 3))  # three of 400: the 99th percentile is below
    assert not slo.meets(sample(2.0, [0.02] * 390 + [0.8] * 10))
    assert not slo.meets(sample(2.1, [0.02] * 400))
    assert not slo.meets(sample(1.0, [0.02], error="HTTP 500"))
    assert not slo.meets(sample(None, []))


def test_a_higher_rate_has_the_same_requests_sooner() -> None:
    mix = Mix((5, 9), (2, 4), 100, 10.0, 8)
    (slow, late), (fast, early) = mix.rows(1.0, 3), mix.rows(2.0, 3)
    assert [len(slow), len(fast)] == [10, 20]
    assert slow == fast[:10]
    assert np.allclose(np.array(late), 2 * np.array(early[:10]))
    assert len(mix.rows(0.1, 3)[0]) == 8


def test_latencies_between_two_moments() -> None:
    stream = sample(1.0, [1.0, 1.0, 2.0])  # tokens at 11, 12, 13, 15
    assert itls_within([stream], 11.5, 15.0) == [1.0, 2.0]
    with pytest.raises(RuntimeError, match="longer"):
        itls_within([stream], 13.5, 14.0)


def test_means_of_what_moved() -> None:
    change = {"kv_transfer_latency_ms_sum": 6.0, "kv_transfer_latency_ms_count": 4.0, "kv_bytes_sent_total": 64.0}
    assert means(change | {"kv_transfer_alloc_ms_sum": 0.0, "kv_transfer_alloc_ms_count": 0.0}) == {
        "mean_kv_transfer_latency_ms": 1.5,
        "kv_bytes_sent_total": 64.0,
    }


def test_topologies() -> None:
    assert parse("p+p+d2") == [Part("p", 1), Part("p", 1), Part("d", 2)]
    for wrong, why in (("p", "prefill and decode"), ("u+d", "either"), ("x", "no server"), ("u0", "no server")):
        with pytest.raises(ValueError, match=why):
            parse(wrong)


def test_decode_plans_go_on_where_the_one_before_ended() -> None:
    plans = decode_plans(3, 30, 5, 16)
    for step, plan in enumerate(plans):
        assert list(plan.kv_lens) == [31 + step] * 3 and list(plan.positions) == [30 + step] * 3
        assert plan.pages.shape == (3, -(-(31 + step) // 16))
        page_of = plan.slots // 16
        assert (
            list(page_of) == list(plan.pages[:, (30 + step) // 16]) and list(plan.slots % 16) == [(30 + step) % 16] * 3
        )
        assert (plan.pages == plans[-1].pages[:, : plan.pages.shape[1]]).all()
        assert list(plan.token_ids) == ([-1, -2, -3] if step else [0, 1, 2])
        assert [row.position for row in plan.rows] == [31 + step] * 3


def test_a_profile_counts_what_overlaps_once() -> None:
    def event(name: str, start: float, dur: float) -> dict[str, Any]:
        return {"name": name, "ts": start, "dur": dur}

    found = table([event("a", 0, 40), event("b", 30, 10), event("a", 60, 20), event("b", 70, 30)], 2)
    assert found["idle_share"] == 0.2 and found["longest_gap_us"] == 20 and found["gaps_a_step"] == 0.5
    assert found["busy_ms"] == 0.04 and found["profiled_step_ms"] == 0.05
    assert [(one["kernel"], one["us_a_step"], one["calls_a_step"]) for one in found["kernels"]] == [
        ("a", 30.0, 1.0),
        ("b", 20.0, 1.0),
    ]
    with pytest.raises(RuntimeError, match="no kernel"):
        table([], 2)


def test_the_page_and_the_plots_are_what_the_results_say() -> None:
    results = page.load("nvidia-h200")
    assert page.fill(page.PAGE.read_text(), results) == page.PAGE.read_text()
    assert {name: (page.PLOTS / name).read_text() for name in page.plots(results)} == page.plots(results)


def test_a_result_gets_into_tables_and_plots() -> None:
    machine = {"gpus": ["NVIDIA H200, 1 MiB, 2"], "cpu": "C", "cores": 8.0, "packages": {}, "date": "2026-11-22T1"}
    rows: list[dict[str, Any]] = [
        {"what": "TPOT, 1 x 1024", "kind": "tpot", "batch": 1, "context": 1024, "value": 15.5, "unit": "ms"},
        {"what": "TPOT, 8 x 1024", "kind": "tpot", "batch": 8, "context": 1024, "value": 17.5, "unit": "ms"},
        {"what": "TPOT, 64 x 1024", "left_out": "after --budget-s 9"},
    ]
    result = {"model": "Qwen3-32B", "tp": 1, "label": "", "machine": machine, "rows": rows}
    slower: list[dict[str, Any]] = [{**rows[0], "value": 31.0}]
    other = {**result, "label": "x", "flags": ["--deterministic"], "rows": slower}
    results = {tables.engine_name("Qwen3-32B", 1): result, tables.engine_name("Qwen3-32B", 1, "x"): other}
    text = page.fill("<!-- filled: qwen3-32b -->\nold\n<!-- end -->\n<!-- filled: variants --><!-- end -->\n", results)
    assert "| TPOT, batch 1, context 1,024 | ms | 14.94 | 18.39 | **15.50** | ≤ 16.2 | yes |" in text
    assert "| **17.50** | ≤ 16.8 | **no** |" in text and "old" not in text
    assert f"| 19.12 | 24.11 | {svg.MISSING} | ≤ 21.2 | – |" in text
    assert "Taken on 1 × NVIDIA H200; C, 8 cores; torch ?; 2026-11-22." in text
    assert "+100.0%" in tables.variants_table(results)
    made = page.plots(results)
    assert "15.50 ms" in made["tpot-qwen3-32b.svg"] and svg.MISSING in made["tpot-qwen3-0.6b.svg"]
    for plot in made.values():
        minidom.parseString(plot)


def run(script: str, *flags: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.gpu.{script}", "--rehearse", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_one_server_is_measured_from_its_start_to_its_end(tmp_path: Path) -> None:
    output = tmp_path / "engine.json"
    run("engine", "--tpot", "2x16", "--prefill", "2x16", "--loads", "mix", "--reps", "1", "--json", str(output))
    result = json.loads(output.read_text())
    assert "failed" not in result and result["peer"].startswith("vLLM 0.25.1")
    rows = {row["kind"]: row for row in result["rows"]}
    assert list(rows) == ["ready", "tpot", "prefill", "output"]
    assert rows["tpot"]["engine_steps"][0] >= 129 and rows["prefill"]["first_s"] == rows["tpot"]["first_s"]
    assert result["server"]["disable_radix_cache"] is True and "model_path" not in result["server"]
    assert all(row["value"] > 0 for row in result["rows"])


def test_a_step_is_profiled(tmp_path: Path) -> None:
    output = tmp_path / "profile.json"
    run("profile_engine", "--batch", "2", "--prefill", "1x32", "--steps", "3", "--json", str(output))
    decode, prefill = json.loads(output.read_text())["profiles"]
    for found in (decode, prefill):
        assert found["kernels"] and 0 <= found["idle_share"] < 1 and found["step_ms"] > 0
