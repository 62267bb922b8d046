"""Flags of a server: what is unknown or cannot work is refused by its name."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from diptych.config import ANYWHERE, PRIVATE, ServerConfig, flag_names, parse_server_args
from diptych.errors import ConfigError
from diptych.flags import INSTEAD

MODEL = ["--model-path", "models/demo"]


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--tp-size", ["0", "-1"]),
        ("--pp-size", ["0"]),
        ("--cpu-threads", ["0"]),
        ("--page-size", ["-1"]),
        ("--max-running-requests", ["-1"]),
        ("--max-queued-requests", ["0"]),
        ("--chunked-prefill-size", ["-2"]),
        ("--mem-fraction-static", ["-0.1", "1", "nan", "inf"]),
        ("--kv-cache-dtype", ["fp8_e5m2"]),
        ("--attention-backend", ["flashinfer"]),
        ("--cuda-graph-max-bs", ["-1"]),
        ("--context-length", ["-1"]),
        ("--max-total-tokens", ["-1"]),
        ("--num-reserved-decode-tokens", ["-1"]),
        ("--port", ["-1", "65536"]),
        ("--disaggregation-bootstrap-port", ["65536"]),
        ("--disaggregation-bootstrap-timeout", ["0", "-1", "nan", "inf"]),
        ("--disaggregation-heartbeat-timeout", ["0", "nan"]),
        ("--watchdog-timeout", ["0", "-5", "nan", "inf"]),
        ("--drain-timeout", ["-1", "nan", "inf"]),
        ("--disaggregation-bootstrap-allow", ["10.0.0.0/33", "10.0.0.300", "a b", "http://a", "*", "any,10.0.0.1:5"]),
    ],
)
def test_values_that_cannot_work_are_refused(flag: str, values: list[str]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=flag):
            parse_server_args([*MODEL, f"{flag}={value}"])


@pytest.mark.parametrize("flag", ["--no-such-flag", "--model-pat", "--schedule-conservativeness"])
def test_unknown_flags_are_named(flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        parse_server_args([*MODEL, flag, "1"])


def test_all_unknown_flags_are_told_at_once_with_what_to_do_instead() -> None:
    foreign = "--trust-remote-code --gpu-memory-utilization 0.8 --max-model-len=4096 --made-up x --context-lenght 5"
    with pytest.raises(ConfigError) as caught:
        parse_server_args([*MODEL, *foreign.split(), "--disaggregation-transfer-backend", "mooncake"])
    told = caught.value.message
    for words in (
        "--trust-remote-code (a model's own code is never run; leave it out)",
        "--gpu-memory-utilization (--mem-fraction-static)",
        "--max-model-len (--context-length)",
        ", --made-up,",
        "--context-lenght (did you mean --context-length?)",
    ):
        assert words in told, told


def test_advice_names_flags_that_exist_for_flags_that_do_not() -> None:
    names = {name for item in fields(ServerConfig) for name in flag_names(item)}
    assert not names & INSTEAD.keys()
    for flag, advice in INSTEAD.items():
        assert set(re.findall(r"--[a-z-]+", advice)) <= names, flag
        with pytest.raises(ConfigError, match=re.escape(f"{flag} ({advice})")):
            parse_server_args([*MODEL, flag, "1"])


def test_a_backend_of_sglang_is_no_backend_here() -> None:
    with pytest.raises(ConfigError, match=r"mooncake.*tcp reaches any host, nixl uses RDMA"):
        parse_server_args([*MODEL, "--disaggregation-transfer-backend", "mooncake"])


def test_the_model_goes_with_its_flag() -> None:
    with pytest.raises(
        ConfigError, match=r"^models/demo belongs to no flag; the model's folder goes with --model-path"
    ):
        parse_server_args(["models/demo", "--port", "0"])


def test_the_least_values_work() -> None:
    config = parse_server_args([*MODEL, "--drain-timeout", "0", "--num-reserved-decode-tokens", "0", "--port", "0"])
    assert (config.drain_timeout, config.num_reserved_decode_tokens) == (0.0, 0)


def on(device: str, *flags: str) -> ServerConfig:
    return parse_server_args([*MODEL, *flags]).on_device(device)


def test_the_device_fills_in_what_was_not_said() -> None:
    def of(config: ServerConfig) -> tuple[object, ...]:
        return (*config.of_device.values(),)

    assert of(on("cpu")) == (16, 64, 512, "cpu", "torch", 0)
    assert of(on("cuda")) == (64, 256, 8192, "cuda", "triton", 256)
    assert on("cuda").on_device("cuda") == on("cuda")
    assert on("cpu").on_device("cpu") == on("cpu")
    said = "--page-size 32 --max-running-requests 9 --chunked-prefill-size 100 --attention-backend torch".split()
    assert of(on("cpu", *said)) == (32, 9, 100, "cpu", "torch", 0)
    assert of(on("cuda", *said)) == (32, 9, 100, "cuda", "torch", 0)
    assert of(on("cuda", *said[:-1], "triton")) == (32, 9, 100, "cuda", "triton", 9)
    assert on("cuda", "--max-running-requests", "1000").cuda_graph_max_bs == 256
    assert on("cuda", "--cuda-graph-max-bs", "24").cuda_graph_max_bs == 24
    assert on("cuda", "--cuda-graph-max-bs", "999").cuda_graph_max_bs == 256
    assert on("cuda", "--disable-cuda-graph").cuda_graph_max_bs == 0
    assert on("cuda", "--pp-size", "2").cuda_graph_max_bs == 0
    assert on("cpu", "--chunked-prefill-size", "-1").chunked_prefill_size == -1


@pytest.mark.parametrize(
    ("device", "flags", "message"),
    [
        ("cpu", "--base-gpu-id 1", "--base-gpu-id is for a GPU"),
        ("cpu", "--mem-fraction-static 0.8", "--mem-fraction-static is for a GPU"),
        ("cpu", "--cuda-graph-max-bs 8", "--cuda-graph-max-bs is for a GPU"),
        ("cpu", "--disable-cuda-graph", "--disable-cuda-graph is for a GPU"),
        ("cpu", "--attention-backend triton", "--attention-backend triton needs a GPU; on a CPU use torch"),
        ("cpu", "--kv-cache-dtype fp8_e4m3", "--kv-cache-dtype fp8_e4m3 needs a GPU; on a CPU use auto"),
        ("cpu", "--max-total-tokens 15", "--max-total-tokens 15 is less than a page of 16"),
        ("cuda", "--max-total-tokens 63", "--max-total-tokens 63 is less than a page of 64"),
        ("cuda", "--chunked-prefill-size -1", "--chunked-prefill-size -1 bounds no step's memory on a GPU"),
        ("cuda", "--cuda-graph-max-bs 8 --disable-cuda-graph", "--cuda-graph-max-bs: with --disable-cuda-graph no"),
        ("cuda", "--cuda-graph-max-bs 8 --attention-backend torch", "with --attention-backend torch no step"),
        ("cuda", "--deterministic --attention-backend torch", "--deterministic needs our kernels"),
        ("cuda", "--cuda-graph-max-bs 8 --pp-size 2", "with --pp-size 2 no step is captured"),
    ],
)
def test_what_a_device_cannot_do_is_refused(device: str, flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        on(device, *flags.split())
    if "total" not in flags:  # the device is named: said before an engine starts
        with pytest.raises(ConfigError, match=message):
            parse_server_args([*MODEL, "--device", device, *flags.split()])


def test_names_of_determinism() -> None:
    assert not parse_server_args(MODEL).deterministic
    assert parse_server_args([*MODEL, "--deterministic"]).deterministic
    assert parse_server_args([*MODEL, "--enable-deterministic-inference"]).deterministic


def test_names_of_the_parallel_sizes() -> None:
    for tp, pp in (("--tp", "--pp-size"), ("--tensor-parallel-size", "--pipeline-parallel-size")):
        config = parse_server_args([*MODEL, tp, "2", pp, "3"])
        assert (config.tp_size, config.pp_size, config.num_ranks) == (2, 3, 6)
    assert parse_server_args(MODEL).num_ranks == 1


def test_where_prefill_servers_may_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DIPTYCH_PD_SECRET", raising=False)
    assert parse_server_args(MODEL).bootstrap_places == PRIVATE
    given = parse_server_args([*MODEL, "--disaggregation-bootstrap-allow", "10.1.0.0/16, *.prefill.svc,fd00::1"])
    assert given.bootstrap_places == ("10.1.0.0/16", "*.prefill.svc", "fd00::1")
    monkeypatch.setenv("DIPTYCH_PD_SECRET", "s")
    assert parse_server_args(MODEL).bootstrap_places == (ANYWHERE,)
    assert parse_server_args([*MODEL, "--disaggregation-bootstrap-allow", "127.0.0.1"]).bootstrap_places == (
        "127.0.0.1",
    )
    (tmp_path / "empty").write_text("\n")
    assert parse_server_args([*MODEL, "--disaggregation-secret-file", str(tmp_path / "empty")]).bootstrap_places == (
        PRIVATE
    )
