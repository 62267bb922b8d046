"""What the operator costs and how fast it is: real `diptych operator` processes against the API server for tests, which
runs in this process over real HTTP. Both share the machine's cores, so times are upper bounds.

Pods are simulated: they become ready so long after they started (`--pod-seconds`), and "beyond the pods" is what is
left of the time until the group says Ready.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import results

from diptych.group.crds import crds
from diptych.net import listen_socket
from diptych.testing.kube import ApiError, Behaviour, Cluster, KubeServer

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE, DEADLINE_S = "default", 300.0
BOUNDS = {
    "writes_until_ready": 10,
    "writes_in_60_s_idle": 0,
    "one_group_beyond_its_pods_s": 1.5,
    "50_groups_at_once_s": 15,
    "failover_sigkill_s": 8,
    "failover_sigterm_s": 2,
    "repaired_after_dropped_watches_s": 2,
    "repaired_after_outage_of_20_s_s": 2,
    "rss_50_groups_mb": 150,
    "rss_1000_groups_mb": 400,
}
Json = dict[str, Any]


def group(name: str) -> Json:
    """Three roles, of which the router waits for the others."""
    template = {"spec": {"containers": [{"name": "engine", "image": "engine:1"}]}}
    roles: list[Json] = [
        {"name": "router", "replicas": 1, "template": template, "dependencies": ["prefill", "decode"]},
        {"name": "prefill", "replicas": 2, "template": template},
        {"name": "decode", "replicas": 1, "template": template},
    ]
    api = {"apiVersion": "workloads.x-k8s.io/v1alpha1", "kind": "RoleBasedGroup"}
    return {**api, "metadata": {"name": name}, "spec": {"roles": copy.deepcopy(roles)}}


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
    """The API server, and operators that are ended with it."""

    def __init__(self, folder: Path, pod_s: float) -> None:
        self.server = KubeServer(Cluster())
        self.server.start()
        self.cluster = self.server.cluster
        self.cluster.pods.behaviour = Behaviour(ready_s=pod_s)
        self.cluster.create(*crds())
        self._kubeconfig = self.server.kubeconfig(folder / "kubeconfig")
        self._operators: list[Operator] = []

    def start(self, *flags: str) -> Operator:
        made = Operator(self._kubeconfig, *flags)
        self._operators.append(made)
        until(lambda: made.ready)
        return made

    def close(self) -> None:
        for each in self._operators:
            each.end()
        self.server.stop()

    def is_ready(self, name: str) -> bool:
        status = self.cluster.api.get("RoleBasedGroup", NAMESPACE, name).get("status") or {}
        return any(each["type"] == "Ready" and each["status"] == "True" for each in status.get("conditions") or [])

    def exists(self, kind: str, name: str) -> bool:
        try:
            self.cluster.api.get(kind, NAMESPACE, name)
        except ApiError:
            return False
        return True


@contextmanager
def world(pod_s: float = 0.5) -> Iterator[World]:
    with tempfile.TemporaryDirectory() as folder:
        made = World(Path(folder), pod_s)
        try:
            yield made
        finally:
            made.close()


def until(done: Callable[[], bool], pause_s: float = 0.02) -> float:
    """Seconds it took."""
    started = time.monotonic()
    while not done():
        if time.monotonic() - started > DEADLINE_S:
            raise TimeoutError("it did not come about")
        time.sleep(pause_s)
    return time.monotonic() - started


# ---- the figures -------------------------------------------------------------------------------------------------


def one_group(args: argparse.Namespace) -> Json:
    with world(args.pod_seconds) as it:
        operator = it.start()
        until(lambda: operator.leads)
        beyond, writes = [], []
        for number in range(args.rounds):
            mark = it.server.record.mark()
            it.cluster.create(group(f"g{number}"))
            took = until(lambda name=f"g{number}": it.is_ready(name))  # type: ignore[misc]
            beyond.append(took - 2 * args.pod_seconds)  # the router's pod starts when the others are ready
            writes.append(len(it.server.record.writes(mark)))
        time.sleep(3)
        mark = it.server.record.mark()
        time.sleep(args.idle_seconds)
        idle = len(it.server.record.writes(mark))
    return {
        "writes_until_ready": max(writes),
        f"writes_in_{args.idle_seconds:g}_s_idle": idle,
        "one_group_beyond_its_pods_s": results.spread(beyond),
    }


def many_groups(args: argparse.Namespace) -> Json:
    with world() as it:
        operator = it.start()
        until(lambda: operator.leads)
        it.cluster.create(*(group(f"g{number}") for number in range(50)))
        took = until(lambda: all(it.is_ready(f"g{number}") for number in range(50)), 0.1)
        time.sleep(3)
        return {"50_groups_at_once_s": round(took, 2), "rss_50_groups_mb": operator.rss_mb()}


def thousand_groups(args: argparse.Namespace) -> Json:
    with world(0.0) as it:
        operator = it.start()
        until(lambda: operator.leads)
        it.cluster.create(*(group(f"g{number}") for number in range(args.many)))
        took = until(lambda: all(it.is_ready(f"g{number}") for number in range(args.many)), 1.0)
        time.sleep(3)
        return {f"{args.many}_groups_at_once_s": round(took, 1), f"rss_{args.many}_groups_mb": operator.rss_mb()}


def failover(args: argparse.Namespace) -> Json:
    """From the signal until a StatefulSet that was deleted at the same moment is there again."""
    found: dict[str, list[float]] = {"sigkill": [], "sigterm": []}
    for _ in range(args.rounds):
        for name in found:
            with world(0.0) as it:
                first = it.start()
                until(lambda first=first: first.leads)  # type: ignore[misc]
                it.cluster.create(group("g"))
                until(lambda: it.is_ready("g"))
                it.start()
                time.sleep(2)
                first.process.send_signal(signal.SIGKILL if name == "sigkill" else signal.SIGTERM)
                started = time.monotonic()
                first.process.wait(60)
                if it.exists("StatefulSet", "g-decode"):
                    it.cluster.api.delete("StatefulSet", NAMESPACE, "g-decode")
                    it.cluster.on_work()
                until(lambda: it.exists("StatefulSet", "g-decode"))
                found[name].append(time.monotonic() - started)
    return {f"failover_{name}_s": results.spread(values) for name, values in found.items()}


def repairs(args: argparse.Namespace) -> Json:
    dropped, outage = [], []
    with world(0.0) as it:
        operator = it.start()
        until(lambda: operator.leads)
        it.cluster.create(group("g"))
        until(lambda: it.is_ready("g"))
        for _ in range(args.rounds):
            dropped.append(_repair(it, 0.0, forget=True))
        for _ in range(max(1, args.rounds // 2)):
            outage.append(_repair(it, 20.0, forget=False))
    return {
        "repaired_after_dropped_watches_s": results.spread(dropped),
        "repaired_after_outage_of_20_s_s": results.spread(outage),
    }


def _repair(it: World, away_s: float, *, forget: bool) -> float:
    """Watches end, an object is deleted unseen, and the server comes back after `away_s`."""
    until(lambda: it.exists("StatefulSet", "g-decode"))
    time.sleep(2)
    it.server.faults.begin_outage()
    time.sleep(away_s / 2)
    it.cluster.api.delete("StatefulSet", NAMESPACE, "g-decode")
    it.cluster.on_work()
    if forget:
        it.server.faults.forget_history()
    time.sleep(away_s / 2)
    it.server.faults.end_outage()
    return until(lambda: it.exists("StatefulSet", "g-decode"))


PARTS = {
    "one": one_group,
    "fifty": many_groups,
    "failover": failover,
    "repairs": repairs,
    "thousand": thousand_groups,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="", help="file (default: benchmarks/results/)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pod-seconds", type=float, default=0.5, help="until a pod is ready")
    parser.add_argument("--idle-seconds", type=float, default=60.0)
    parser.add_argument("--many", type=int, default=1000, help="groups of the last part")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = parser.parse_args()
    figures: Json = {}
    for part in args.parts:
        figures |= PARTS[part](args)
        print(json.dumps(figures, indent=1), flush=True)
    missed = [name for name, bound in BOUNDS.items() if name in figures and _most(figures[name]) > bound]
    options = {key: value for key, value in vars(args).items() if key != "output"}
    result = {"settings": options, "figures": figures, "bounds": BOUNDS, "missed": missed}
    print(f"missed: {', '.join(missed) or 'none'}; written to {results.write('operator_figures', result, args.output)}")
    return int(bool(missed))


def _most(figure: Any) -> float:
    return float(figure["max"] if isinstance(figure, dict) else figure)


if __name__ == "__main__":
    sys.exit(main())
