"""Names of metrics, their table in the documentation, lines of the log."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from aiohttp.http import HttpProcessingError
from prometheus_client.parser import text_string_to_metric_families

from diptych.obs import logs, metrics
from diptych.types import Stats

DOC = Path(__file__).parents[2] / "docs" / "metrics.md"

CORE = """
num_running_reqs num_queue_reqs num_used_tokens token_usage cache_hit_rate gen_throughput max_total_num_tokens
time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds
request_time_per_output_token_seconds queue_time_seconds
prompt_tokens_total generation_tokens_total cached_tokens_total num_requests_total
num_aborted_requests_total num_retracted_reqs evicted_tokens_total cache_config_info startup_time_seconds
http_requests_total http_requests_active num_prefill_bootstrap_queue_reqs num_prefill_inflight_queue_reqs
num_decode_prealloc_queue_reqs num_decode_transfer_queue_reqs kv_transfer_speed_gb_s kv_transfer_latency_ms
kv_transfer_bootstrap_ms kv_transfer_alloc_ms kv_transfer_total_mb num_bootstrap_failed_reqs_total
num_transfer_failed_reqs_total
"""


def test_the_core_set_is_there() -> None:
    names = {spec.name for spec in metrics.ALL}
    assert set(CORE.split(None)) <= names
    assert len(names) == len(metrics.ALL)


def test_the_documentation_lists_what_is_there() -> None:
    assert metrics.table() in DOC.read_text()


def test_everything_listed_is_exposed_under_its_name() -> None:
    made = metrics.ServerMetrics("sglang:", "a/model", "unified")
    made.tokens(2, 0.1, first=True)
    made.finished(5, 2, 2, 0.2, 0.1)
    made.http_started("GET", "/x")
    made.http_ended("GET", "/x", 200)
    exposed = set()
    for family in text_string_to_metric_families(made.text().decode()):
        kind = family.type
        exposed.add(family.name + ("_total" if kind == "counter" else ""))
    assert exposed == {f"sglang:{spec.name}" for spec in metrics.ALL}


def test_every_field_of_the_report_is_shown() -> None:
    shown = {spec.field for spec in metrics.ENGINE} | {"free_pages"}
    assert shown == {*Stats.__struct_fields__}


@pytest.fixture
def restore_logging() -> object:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield None
    root.handlers[:], root.level = handlers, level


def test_one_line_an_event(restore_logging: object, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    logs.set_up("info", "server")
    log = logging.getLogger("diptych.test")
    log.info("a client wrote %s", "x\n2026-01-01 forged line\r")
    log.debug("not shown")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert "I server diptych.test: a client wrote x\\n2026-01-01 forged line\\r" in lines[0]


def test_control_characters_are_shown_as_marks(restore_logging: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from a client (the rid of /abort_request) and must not command the terminal that shows the log."""
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    logs.set_up("info", "server")
    logging.getLogger("diptych.test").info("[%s]", "\x1b[2J\x00\x9b\u2028ünï 你好")
    assert stream.getvalue().endswith("[\\x1b[2J\\x00\\x9b\\u2028ünï 你好]\n")


def test_malformed_http_is_one_line(restore_logging: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody can send it, so it must not fill the log with tracebacks."""
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    logs.set_up("info", "server")
    try:
        raise HttpProcessingError(message="bad")
    except HttpProcessingError as error:
        logging.getLogger("aiohttp.server").error("Error handling request", exc_info=error)
    try:
        raise ValueError("ours")
    except ValueError as error:
        logging.getLogger("aiohttp.server").error("Error handling request", exc_info=error)
    lines = stream.getvalue().splitlines()
    assert "malformed HTTP" in lines[0] and "Traceback" in lines[2] and lines[-1] == "ValueError: ours"
