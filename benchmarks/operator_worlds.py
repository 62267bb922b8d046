"""Where the operator's figures are taken: an API server of our own in this process, or the cluster of a kubeconfig.

Both are reached over HTTP, and the operators are real `diptych operator` processes.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from diptych.errors import DiptychError, NotFound
from diptych.group.crds import crds
from diptych.group.operator.api import Api
from diptych.group.operator.main import connect
from diptych.group.operator.metrics import Metrics
from diptych.group.operator.resources import GROUP, POD, STATEFUL_SET, Json, Kind
from diptych.net import listen_socket
from diptych.testing.kube import Behaviour, Cluster, KubeServer

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 1800.0
NAMESPACES = Kind("", "v1", "Namespace", "namespaces", namespaced=False)
LABEL = "rolebasedgroup.workloads.x-k8s.io/name"
FILES = ("certificate-authority", "client-certificate", "client-key", "tokenFile")  # of a kubeconfig


def until(done: Callable[[], bool], pause_s: float = 0.02) -> float:
    """Seconds it took."""
    started = time.monotonic()
    while not done():
        if time.monotonic() - started > DEADLINE_S:
            raise TimeoutError("it did not come about")
        time.sleep(pause_s)
    return time.monotonic() - started


class Operator:
    """One process."""

    def __init__(self, kubeconfig: Path, *flags: str) -> None:
        sock = listen_socket("127.0.0.1", 0)
        self.port = int(sock.getsockname()[1])
        sock.close()
        command = [sys.executable, "-m", "diptych", "operator", "--kubeconfig", str(kubeconfig)]
        self.process = subprocess.Popen(
            [*command, "--bind", f"127.0.0.1:{self.port}", "--log-level", "error", *flags], cwd=ROOT
        )

    def metrics(self) -> dict[str, float]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            return {}
        return {key: float(value) for key, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")}

    @property
    def writes(self) -> int:
        """Objects it has written since it started; leases and events are none."""
        return round(sum(n for key, n in self.metrics().items() if key.startswith("diptych_operator_writes_total{")))

    @property
    def leads(self) -> bool:
        return self.metrics().get('leader_election_master_status{name="diptych-operator"}') == 1

    @property
    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def rss_mb(self) -> float:
        return round(psutil.Process(self.process.pid).memory_info().rss / 2**20, 1)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(60)


class World:
    """A namespace, and operators of it that are ended with it. `pod_spec` goes into every pod of `create`'s groups."""

    def __init__(self, kubeconfig: Path, namespace: str, pod_spec: Json) -> None:
        self.namespace = namespace
        self.api = Api(connect(str(kubeconfig))[0], Metrics())
        self._kubeconfig, self._pod_spec = kubeconfig, pod_spec
        self._operators: list[Operator] = []

    def start(self) -> Operator:
        made = Operator(self._kubeconfig)
        self._operators.append(made)
        until(lambda: made.ready)
        return made

    def close(self) -> None:
        self._end_operators()
        self.api.close()

    def _end_operators(self) -> None:
        for each in self._operators:
            each.end()

    def create(self, *names: str) -> None:
        """Groups of three roles, of which the router waits for the others."""
        pod = {"containers": [{"name": "engine", "image": "registry.k8s.io/pause:3.9"}], **self._pod_spec}
        sizes = {"router": 1, "prefill": 2, "decode": 1}
        roles: list[Json] = [
            {"name": name, "replicas": number, "template": {"spec": pod}} for name, number in sizes.items()
        ]
        roles[0]["dependencies"] = ["prefill", "decode"]
        for name in names:
            self.api.create(GROUP, {"metadata": {"namespace": self.namespace, "name": name}, "spec": {"roles": roles}})

    def is_ready(self, name: str) -> bool:
        return _is_ready(self.api.get(GROUP, self.namespace, name))

    def all_ready(self, number: int) -> bool:
        groups, _ = self.api.list(GROUP, self.namespace)
        return sum(map(_is_ready, groups)) == number

    def delete(self, kind: Kind, name: str) -> None:
        self.api.delete(kind, self.namespace, name, self.api.get(kind, self.namespace, name)["metadata"]["uid"])

    def has_decode(self, but: str = "") -> bool:
        """Whether the StatefulSet of decode is there, and another one than `but` (a uid)."""
        try:
            found = self.api.get(STATEFUL_SET, self.namespace, "g-decode")
        except NotFound:
            return False
        return "deletionTimestamp" not in found["metadata"] and found["metadata"]["uid"] != but

    def lose_decode(self) -> str:
        """Deletes that StatefulSet. Returns its uid."""
        uid: str = self.api.get(STATEFUL_SET, self.namespace, "g-decode")["metadata"]["uid"]
        self.api.delete(STATEFUL_SET, self.namespace, "g-decode", uid)
        return uid

    @contextmanager
    def pods_own_time(self, name: str) -> Iterator[Callable[[], float]]:
        """What is yielded says, of a group that is ready by now, how long it had to wait for its pods: from the first
        of the roles without dependencies to the last of them that became ready, and the same for the router."""
        selector = f"{LABEL}={name}"
        _, version = self.api.list(POD, self.namespace, selector)
        stream = self.api.watch(POD, self.namespace, selector, version, 600)
        seen: dict[bool, list[float]] = {}  # of the router or not: first seen, last became ready
        done = set[str]()

        def follow() -> None:
            try:
                for event, pod in stream:
                    if event == "BOOKMARK":
                        continue
                    pod_name = pod["metadata"]["name"]
                    times = seen.setdefault("router" in pod_name, [time.monotonic()] * 2)
                    if pod_name not in done and _is_ready(pod):
                        done.add(pod_name)
                        times[1] = time.monotonic()
            except DiptychError:
                return  # closed

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            yield lambda: sum(last - first for first, last in seen.values())
        finally:
            stream.close()
            thread.join(60)


class OwnWorld(World):
    """Pods are simulated and become ready `pod_s` after they were made."""

    def __init__(self, folder: Path, pod_s: float) -> None:
        self.server = KubeServer(Cluster())
        self.server.start()
        self.cluster = self.server.cluster
        self.cluster.pods.behaviour = Behaviour(ready_s=pod_s)
        self.cluster.create(*crds())
        super().__init__(self.server.kubeconfig(folder / "kubeconfig"), "default", {})

    def close(self) -> None:
        super().close()
        self.server.stop()

    def outage(self, seconds: float, *, forget: bool) -> Callable[[], bool]:
        """The server is away so long; meanwhile an object is deleted unseen. `forget`: and watches cannot go on from
        where they were. Returns whether it is there again."""
        self.server.faults.begin_outage()
        time.sleep(seconds / 2)
        self.cluster.api.delete("StatefulSet", self.namespace, "g-decode")
        self.cluster.on_work()
        if forget:
            self.server.faults.forget_history()
        time.sleep(seconds / 2)
        self.server.faults.end_outage()
        return lambda: (
            "g-decode" in [each["metadata"]["name"] for each in self.cluster.objects("StatefulSet", self.namespace)]
        )


class ClusterWorld(World):
    """A namespace of a real cluster, made for this. Pods are run by whoever runs them there."""

    def __init__(self, folder: Path, kubeconfig: Path, node: str, down: str, up: str) -> None:
        namespace = f"diptych-figures-{uuid.uuid4().hex[:8]}"
        key, _, value = node.partition("=")
        pod_spec = {"nodeSelector": {key: value}} if node else {}
        super().__init__(_in_namespace(kubeconfig, folder, namespace), namespace, pod_spec)
        self._down, self._up = shlex.split(down), shlex.split(up)
        self._uid = self.api.create(NAMESPACES, {"metadata": {"name": namespace}})["metadata"]["uid"]

    def close(self) -> None:
        self._end_operators()
        for group in self.api.list(GROUP, self.namespace)[0]:  # no operator is left to end them in order
            self.api.merge(GROUP, self.namespace, group["metadata"]["name"], {"metadata": {"finalizers": None}})
        self.api.delete(NAMESPACES, "", self.namespace, self._uid)
        super().close()

    def outage(self, seconds: float) -> Callable[[], bool]:
        """As OwnWorld's, but nothing can be deleted while the server is away: it is when it answers again."""
        subprocess.run(self._down, check=True)
        time.sleep(seconds)
        subprocess.run(self._up, check=True)
        until(self._answers)
        uid = self.lose_decode()
        return lambda: self.has_decode(but=uid)

    def _answers(self) -> bool:
        try:
            self.api.get(STATEFUL_SET, self.namespace, "g-decode")
        except DiptychError:
            return False
        return True


@contextmanager
def own_world(pod_s: float) -> Iterator[OwnWorld]:
    with tempfile.TemporaryDirectory() as folder:
        made = OwnWorld(Path(folder), pod_s)
        try:
            yield made
        finally:
            made.close()


@contextmanager
def cluster_world(kubeconfig: Path, node: str, down: str, up: str) -> Iterator[ClusterWorld]:
    with tempfile.TemporaryDirectory() as folder:
        made = ClusterWorld(Path(folder), kubeconfig, node, down, up)
        try:
            yield made
        finally:
            made.close()


def _in_namespace(kubeconfig: Path, folder: Path, namespace: str) -> Path:
    """A copy that leads into `namespace`: there the operator's lease is, too."""
    config: dict[str, Any] = yaml.safe_load(kubeconfig.read_text())
    for each in (*(one["cluster"] for one in config["clusters"]), *(one["user"] for one in config["users"])):
        each.update({key: str(kubeconfig.parent / each[key]) for key in FILES if key in each})
    for context in config["contexts"]:
        context["context"]["namespace"] = namespace
    path = folder / "kubeconfig"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(config))
    return path


def _is_ready(obj: Json) -> bool:
    conditions = (obj.get("status") or {}).get("conditions") or []
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
