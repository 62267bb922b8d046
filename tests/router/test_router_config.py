"""Both command lines, every flag, and what is refused."""

from __future__ import annotations

from dataclasses import fields

import pytest

from diptych.errors import ConfigError
from diptych.router.config import RouterConfig, ServerAddress, parse_router_args

PAIR = ["--prefill", "http://p:8000", "--decode", "http://d:8000"]


def parse(*words: str) -> RouterConfig:
    return parse_router_args(list(words))


def test_the_seeds_command_line():
    line = (
        "--prefill http://sglang-pd-prefill-0.sglang-pd-prefill:8000 http://sglang-pd-prefill-1.sglang-pd-prefill:8000"
        " --prefill-bootstrap-ports 34000 34000 --decode http://sglang-pd-decode-0.sglang-pd-decode:8000"
        " --host 0.0.0.0 --port 8000"
    )
    config = parse_router_args(line.split())
    assert config.prefill == (
        ServerAddress("sglang-pd-prefill-0.sglang-pd-prefill", 8000, 34000),
        ServerAddress("sglang-pd-prefill-1.sglang-pd-prefill", 8000, 34000),
    )
    assert config.decode == (ServerAddress("sglang-pd-decode-0.sglang-pd-decode", 8000),)
    assert (config.host, config.port, config.disaggregated) == ("0.0.0.0", 8000, True)


def test_one_bootstrap_port_is_for_all_and_none_is_null():
    two = ["--prefill", "http://a:1", "http://b:2", "--decode", "http://d:3"]
    assert [s.bootstrap_port for s in parse(*two, "--prefill-bootstrap-ports", "9").prefill] == [9, 9]
    assert [s.bootstrap_port for s in parse(*two).prefill] == [None, None]
    assert [s.bootstrap_port for s in parse(*two, "--prefill-bootstrap-ports", "9", "none").prefill] == [9, None]


def test_comma_lists_of_old_versions():
    config = parse(
        "--prefill", "http://a:1,http://b:2", "--prefill-bootstrap-ports", "5,6", "--decode", "http://d:3,http://e:4"
    )
    assert config.prefill == (ServerAddress("a", 1, 5), ServerAddress("b", 2, 6))
    assert [server.url for server in config.decode] == ["http://d:3", "http://e:4"]


def test_launch_routers_command_line():
    config = parse(
        *(
            "--pd-disaggregation",
            "--mini-lb",
            "--prefill",
            "http://a:1",
            "34000",
            "--prefill",
            "http://[::1]:2",
            "none",
        ),
        *("--decode", "http://d:3", "--decode", "http://e", "--policy", "round_robin", "--decode-policy", "least_load"),
    )
    assert config.prefill == (ServerAddress("a", 1, 34000), ServerAddress("::1", 2, None))
    assert config.prefill[1].bootstrap_host == "[::1]" and config.prefill[1].url == "http://[::1]:2"
    assert config.decode == (ServerAddress("d", 3), ServerAddress("e", 80))
    assert config.policy_of("prefill") == "round_robin" and config.policy_of("decode") == "least_load"


def test_plain_mode():
    config = parse("--worker-urls", "http://a:1", "http://b:2/")
    assert config.workers == (ServerAddress("a", 1), ServerAddress("b", 2))
    assert not config.disaggregated and config.policy_of("worker") == "cache_aware"


def test_policies_by_default():
    assert parse(*PAIR).policy_of("prefill") == "cache_aware"
    assert parse(*PAIR).policy_of("decode") == "power_of_two"
    assert {parse(*PAIR, "--mini-lb").policy_of(role) for role in ("prefill", "decode")} == {"random"}
    assert parse(*PAIR, "--policy", "random", "--prefill-policy", "cache_aware").policy_of("prefill") == "cache_aware"


VALUES = {"policy": "random", "prefill_policy": "random", "decode_policy": "random", "log_level": "debug"}
VALUES |= {"health_check_endpoint": "/ready", "host": "h", "prometheus_host": "h", "api_key": "k"}


@pytest.mark.parametrize("item", [item for item in fields(RouterConfig) if item.metadata], ids=lambda item: item.name)
def test_every_flag_sets_its_field(item):
    name = "--" + item.name.replace("_", "-")
    if isinstance(item.default, bool):
        words, value = [name], True
    elif isinstance(item.default, tuple):
        words, value = [name, "x", "y"], ("x", "y")
    elif item.name in VALUES:
        words, value = [name, VALUES[item.name]], VALUES[item.name]
    else:
        value = type(item.default)(0.5 if item.name == "cache_threshold" else 7)
        words = [name, str(value)]
    assert getattr(parse(*PAIR, *words), item.name) == value != item.default


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*PAIR, "--service-discovery"], "--service-discovery"),
        ([*PAIR, "--dp-aware"], "--dp-aware"),
        ([*PAIR, "--polic", "random"], "--polic"),
        ([*PAIR, "--policy", "manual"], "manual"),
        ([*PAIR, "--port", "x"], "--port"),
        ([*PAIR, "--port", "70000"], "--port"),
        ([*PAIR, "--cache-threshold", "2"], "--cache-threshold"),
        ([*PAIR, "--max-concurrent-requests", "0"], "--max-concurrent-requests"),
        ([*PAIR, "--body-timeout-secs", "0"], "--body-timeout-secs"),
        ([*PAIR, "--request-timeout-secs", "nan"], "--request-timeout-secs"),
        ([*PAIR, "--health-check-interval-secs", "inf"], "--health-check-interval-secs"),
        ([*PAIR, "--retry-max-retries", "-1"], "--retry-max-retries"),
        ([*PAIR, "--health-check-endpoint", "x"], "--health-check-endpoint"),
        ([*PAIR, "--api-key", "a\nb"], "--api-key"),
        ([], "--worker-urls"),
        (["--pd-disaggregation"], "--prefill"),
        (["--prefill", "http://a:1"], "--decode"),
        (["--decode", "http://a:1"], "--prefill"),
        ([*PAIR, "--worker-urls", "http://a:1"], "--worker-urls"),
        (["--prefill", "http://a:1", "http://a:1", "--decode", "http://d:1"], "twice"),
        ([*PAIR, "--prefill-bootstrap-ports", "1", "2"], "--prefill-bootstrap-ports"),
        ([*PAIR, "--prefill-bootstrap-ports", "0"], "--prefill-bootstrap-ports"),
        (["--prefill", "http://a:1", "5", "--decode", "http://d:1", "--prefill-bootstrap-ports", "5"], "once"),
        (["--prefill", "http://a:1", "5", "6", "--decode", "http://d:1"], "6 is no URL"),
        (["--prefill", "a:1", "--decode", "http://d:1"], "http://host:port"),
        (["--prefill", "https://a:1", "--decode", "http://d:1"], "http://"),
        (["--prefill", "http://a:x", "--decode", "http://d:1"], "http://host:port"),
        (["--prefill", "http://a:1/v1", "--decode", "http://d:1"], "nothing more"),
        (["--prefill", "http://u:p@a:1", "--decode", "http://d:1"], "nothing more"),
    ],
)
def test_what_is_wrong_is_named(words, told):
    with pytest.raises(ConfigError, match=told):
        parse_router_args(words)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all("--" + item.name.replace("_", "-") in shown for item in fields(RouterConfig) if item.metadata)


def test_the_key_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("DIPTYCH_API_KEY", "secret")
    assert parse(*PAIR).key == "secret"
    assert parse(*PAIR, "--api-key", "other").key == "other"


def test_all_unknown_flags_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match="unknown flag --made-up, --other; "):
        parse_router_args(["--worker-urls", "http://127.0.0.1:1", "--made-up", "1", "--other=2"])
