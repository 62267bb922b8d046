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
        ("--page-size", ["0"]),
        ("--max-running-requests", ["0"]),
        ("--max-queued-requests", ["0"]),
        ("--chunked-prefill-size", ["0", "-2"]),
        ("--context-length", ["-1"]),
        ("--max-total-tokens", ["-1", "15"]),
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
    foreign = "--trust-remote-code --mem-fraction-static 0.8 --max-model-len=4096 --made-up-thing x --context-lenght 5"
    with pytest.raises(ConfigError) as caught:
        parse_server_args([*MODEL, *foreign.split(), "--disaggregation-transfer-backend", "mooncake"])
    told = caught.value.message
    for words in (
        "--trust-remote-code (a model's own code is never run; leave it out)",
        "--mem-fraction-static (--max-total-tokens sets",
        "--max-model-len (--context-length)",
        ", --made-up-thing,",
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
