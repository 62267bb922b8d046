"""Flags of a server: what is unknown or cannot work is refused by its name."""

from __future__ import annotations

import pytest

from diptych.config import parse_server_args
from diptych.errors import ConfigError

MODEL = ["--model-path", "models/demo"]


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--tp-size", ["0", "-1"]),
        ("--cpu-threads", ["0"]),
        ("--page-size", ["0"]),
        ("--max-running-requests", ["0"]),
        ("--max-queued-requests", ["0"]),
        ("--chunked-prefill-size", ["0", "-2"]),
        ("--context-length", ["-1"]),
        ("--max-total-tokens", ["-1"]),
        ("--num-reserved-decode-tokens", ["-1"]),
        ("--port", ["-1", "65536"]),
        ("--disaggregation-bootstrap-port", ["65536"]),
        ("--disaggregation-bootstrap-timeout", ["0", "-1", "nan", "inf"]),
        ("--disaggregation-heartbeat-timeout", ["0", "nan"]),
        ("--watchdog-timeout", ["0", "-5", "nan", "inf"]),
        ("--drain-timeout", ["-1", "nan", "inf"]),
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


def test_the_least_values_work() -> None:
    config = parse_server_args([*MODEL, "--drain-timeout", "0", "--num-reserved-decode-tokens", "0", "--port", "0"])
    assert (config.drain_timeout, config.num_reserved_decode_tokens) == (0.0, 0)
