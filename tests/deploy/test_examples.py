"""examples/: what they say is what Kubernetes, and the programs that they start, understand."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from diptych.group.expand import expand
from diptych.group.validate import check

sys.path.insert(0, str(Path("tests/operator")))
from driver import Driver
from kube_world import NAMESPACE

OURS = "workloads.x-k8s.io/"
TORCHRUN, DOWNLOAD = Path("examples/torchrun.yaml"), Path("examples/model-download.yaml")
BIN = Path(sys.executable).parent
DEADLINE_S = 100.0


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("path", sorted(Path("examples").glob("*.yaml")), ids=str)
def test_examples_are_valid(path: Path) -> None:
    for each in documents(path):
        if each["apiVersion"].startswith(OURS):
            assert [problem for found in check([str(path)]) for problem in found.problems] == []
        else:
            kubernetes_validate.validate(each, "1.33", strict=True)


# ---- torchrun ----------------------------------------------------------------------------------------------------


def variables(pod: dict[str, Any]) -> dict[str, str]:
    """Of its container, as a kubelet resolves them."""
    found: dict[str, str] = {}
    for each in pod["spec"]["containers"][0]["env"]:
        if "valueFrom" in each:
            path = each["valueFrom"]["fieldRef"]["fieldPath"]
            found[each["name"]] = pod["metadata"]["labels"][path.split("'")[1]]
        else:
            found[each["name"]] = expand(each.get("value", ""), found)
    return found


def commands(driver: Driver) -> dict[str, list[str]]:
    """By pod: the command line."""
    return {
        name: [expand(each, variables(pod)) for field in ("command", "args") for each in container[field]]
        for name, pod in driver.pods().items()
        for container in pod["spec"]["containers"]
    }


def test_torchrun_reduces_over_the_pods_of_a_leader_worker_set() -> None:
    """The group comes up on our API server; what its pods are told to run runs here, all on one address."""
    driver = Driver()
    driver.create(*documents(TORCHRUN))
    driver.run(10)
    assert driver.ready("torchrun")
    lines = commands(driver)
    assert sorted(lines) == ["torchrun-ranks-0", "torchrun-ranks-0-1"]
    leader = f"torchrun-ranks-0.torchrun-ranks.{NAMESPACE}"
    for rank, name in enumerate(sorted(lines)):
        said = [f"--{flag}" for flag in ("nnodes=2", f"node-rank={rank}", f"master-addr={leader}")]
        assert lines[name][:4] == ["torchrun", *said]
    assert driver.cluster.resolve(leader, NAMESPACE) == ["torchrun-ranks-0"]
    assert reduce([lines[name] for name in sorted(lines)], leader) == [
        "rank 0: the sum of 1..2 is 3",
        "rank 1: the sum of 1..2 is 3",
    ]


def reduce(lines: list[list[str]], leader: str) -> list[str]:
    """What each process prints first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ExitStack() as stack:
        running = []
        for line in lines:
            argv = [each.replace(leader, "127.0.0.1").replace("29500", str(port)) for each in line]
            argv[argv.index("python3")] = sys.executable
            command = [str(BIN / argv[0]), *argv[1:]]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.terminate)  # torchrun ends what it has started; then the context waits for it
            timer = threading.Timer(DEADLINE_S, process.kill)
            timer.start()
            stack.callback(timer.cancel)
            running.append(process)
        return [process.stdout.readline().strip() for process in running if process.stdout is not None]


# ---- the download ------------------------------------------------------------------------------------------------

FILES = {"config.json": b"{}", "model.safetensors": b"weights"}


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as `hf download` asks for: a model's list of files, and the files."""

    commit = "a" * 40

    def do_HEAD(self) -> None:
        self._file(FILES[self.path.rpartition("/")[2]], body=False)

    def do_GET(self) -> None:
        told: Any
        if self.path.startswith("/api/models/Qwen/Qwen3-32B/tree/"):
            told = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in FILES.items()]
            self._answer(json.dumps(told).encode())
        elif self.path.startswith("/api/models/Qwen/Qwen3-32B/"):
            told = {"id": "Qwen/Qwen3-32B", "sha": self.commit, "siblings": [{"rfilename": name} for name in FILES]}
            self._answer(json.dumps(told).encode())
        elif self.path.startswith("/Qwen/Qwen3-32B/resolve/"):
            self._file(FILES[self.path.rpartition("/")[2]])
        else:
            self.send_error(404)

    def _file(self, data: bytes, body: bool = True) -> None:
        self._answer(data, body, **{"X-Repo-Commit": self.commit, "ETag": f'"{len(data)}"'})

    def _answer(self, data: bytes, body: bool = True, **headers: str) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def test_the_download_fills_the_claim_that_the_group_mounts(tmp_path: Path) -> None:
    claim, job = documents(DOWNLOAD)
    pod = job["spec"]["template"]["spec"]
    container, model = pod["containers"][0], tmp_path / "model"
    template = documents(Path("deploy/qwen3-32b/qwen3-32b.yaml"))[0]["spec"]["roleTemplates"][0]["template"]["spec"]
    claims = [each["volumes"][0]["persistentVolumeClaim"]["claimName"] for each in (pod, template)]
    assert claims == [claim["metadata"]["name"]] * 2
    line = [each.replace("/model", str(model)) for each in (*container["command"], *container["args"])]
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        serving = threading.Thread(target=hub.serve_forever)
        serving.start()
        try:
            environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "tmp")}
            done = subprocess.run(
                [str(BIN / line[0]), *line[1:]],
                env={
                    **environment,
                    "PATH": "/usr/bin:/bin",
                    "HF_HUB_DISABLE_XET": "1",
                    "HF_HUB_DISABLE_TELEMETRY": "1",
                },
                capture_output=True,
                text=True,
                check=False,
                timeout=DEADLINE_S,
            )
        finally:
            hub.shutdown()
            serving.join()
    assert done.returncode == 0, done.stderr
    assert {name: (model / name).read_bytes() for name in FILES} == FILES
