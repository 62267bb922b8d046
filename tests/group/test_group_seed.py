"""The seed's manifest, unchanged, with doubles in place of the programs; and where its module names lead."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from group_manifests import EXAMPLES, group, python, role, text

from diptych.group.local import environment
from diptych.group.local.state import changes

DOUBLES = Path(__file__).with_name("doubles")


async def test_the_seed_manifest_unchanged(run_group: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order of the start, pod names, addresses, mount path, Service: all that is not the programs' own."""
    monkeypatch.setattr(environment, "SHIMS", DOUBLES)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "name.txt").write_text("the demo model")
    manifest = (EXAMPLES / "seed" / "sglang_pd.yaml").read_text()
    options = {"claims": {"llm-model": str(tmp_path)}, "service_ports": {"sglang-pd": 0}}
    async with run_group(manifest, **options) as running:
        ready = await running.until_ready()
        pairs = zip([None, *running.history], running.history, strict=False)
        lines = [line for old, new in pairs for line in changes(old, new)]
        assert "sglang-pd-scheduler waits for decode, prefill" in lines
        started = next(i for i, line in enumerate(lines) if line.startswith("sglang-pd-scheduler-0 starting"))
        for pod in ("sglang-pd-prefill-0", "sglang-pd-prefill-1", "sglang-pd-decode-0"):
            assert lines.index(f"{pod} ready") < started
        async with aiohttp.ClientSession() as session, session.get(f"http://{ready.services[0].address}/") as reply:
            answers = json.loads(await reply.text())
        addresses = {pod.name: pod.ip for pod in ready.pods}
    assert [answer["pod"] for answer in answers] == ["sglang-pd-prefill-0", "sglang-pd-prefill-1", "sglang-pd-decode-0"]
    for answer in answers:
        assert answer["model"] == "the demo model"
        assert answer["model_path"] == "/models/Qwen3-32B/"
        assert answer["host"] == addresses[answer["pod"]]
        assert (answer["tp"], answer["port"], answer["enable_metrics"]) == ("2", "8000", True)
    assert [answer["disaggregation_mode"] for answer in answers] == ["prefill", "prefill", "decode"]
    assert [answer["disaggregation_bootstrap_port"] for answer in answers] == ["34000", "34000", None]


async def test_module_names_lead_to_our_programs_in_pods_only(run_group: Any) -> None:
    code = """
    import importlib, runpy, sys
    import diptych.cli
    sys.argv[1:] = ["--flag"]
    diptych.cli.main = lambda arguments: print("main got", arguments, flush=True)
    for name in ("launch_server", "srt.disaggregation.mini_lb", "srt.disaggregation.launch_lb"):
        try:
            runpy.run_module("sglang." + name, run_name="__main__")
        except SystemExit:
            pass
        importlib.import_module("sglang." + name)  # as a spawned child would: does nothing
    runpy.run_module("sglang_router.launch_router", run_name="__main__")
    """
    command = ["python3", "-c", python(code)[-1]]
    async with run_group(text(group(role("a", command, probe=False)))) as running:
        await running.until(lambda _: running.pod("toy-a-0").restarts > 0)  # it ends when it has called them all
        log = (running.folder.logs / "toy-a-0.log").read_text()
    calls = [line for line in log.splitlines() if line.startswith("main")]
    route = "main got ['route', '--flag']"
    assert calls[:4] == ["main got ['serve', '--flag']", route, route, route]
    assert not any(name == "sglang" or name.startswith("sglang.") for name in sys.modules)
    assert not any(str(environment.SHIMS) in path for path in sys.path)
