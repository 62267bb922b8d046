"""What the operator costs and how fast it is: real `diptych operator` processes against the API server for tests, which
runs in this process over real HTTP, or with --kubeconfig against a real cluster.

All share the machine's cores, so times are upper bounds. Pods of the API server for tests are simulated: they become
ready so long after they started (`--pod-seconds`). "Beyond its pods" is what is left of the time until the group says
Ready without the time that its pods took, which is watched.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import results
from operator_worlds import ClusterWorld, OwnWorld, World, cluster_world, own_world, until

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
Figures = dict[str, Any]


def world(args: argparse.Namespace, pod_s: float) -> AbstractContextManager[World]:
    if args.kubeconfig:
        return cluster_world(Path(args.kubeconfig).resolve(), args.node, *args.outage)
    return own_world(pod_s)


def one_group(args: argparse.Namespace) -> Figures:
    beyond, pods, writes = [], [], []
    with world(args, args.pod_seconds) as it:
        operator = it.start()
        until(lambda: operator.leads)
        for number in range(args.rounds):
            name, before = f"g{number}", operator.writes
            with it.pods_own_time(name) as pods_time:
                it.create(name)
                took = until(lambda name=name: it.is_ready(name))  # type: ignore[misc]
                pods.append(pods_time())
            beyond.append(took - pods[-1])
            time.sleep(2)  # what is written when the group is ready counts too
            writes.append(operator.writes - before)
        before = operator.writes
        time.sleep(args.idle_seconds)
        idle = operator.writes - before
    return {
        "writes_until_ready": max(writes),
        f"writes_in_{args.idle_seconds:g}_s_idle": idle,
        "one_group_its_pods_s": results.spread(pods),
        "one_group_beyond_its_pods_s": results.spread(beyond),
    }


def many_groups(args: argparse.Namespace, number: int = 50) -> Figures:
    with world(args, 0.0 if number > 50 else 0.5) as it:
        operator = it.start()
        until(lambda: operator.leads)
        started = time.monotonic()
        it.create(*(f"g{each}" for each in range(number)))
        until(lambda: it.all_ready(number), 0.1 if number <= 50 else 2.0)
        took = time.monotonic() - started
        time.sleep(3)
        return {
            f"{number}_groups_at_once_s": round(took, 2),
            f"writes_of_{number}_groups": operator.writes,
            f"rss_{number}_groups_mb": operator.rss_mb(),
        }


def thousand_groups(args: argparse.Namespace) -> Figures:
    return many_groups(args, args.many)


def failover(args: argparse.Namespace) -> Figures:
    """From the signal until a StatefulSet that was deleted at the same moment is there again."""
    found: dict[str, list[float]] = {"sigkill": [], "sigterm": []}
    for _ in range(args.rounds):
        for name in found:
            with world(args, 0.0) as it:
                first = it.start()
                until(lambda first=first: first.leads)  # type: ignore[misc]
                it.create("g")
                until(lambda: it.is_ready("g"))
                it.start()
                time.sleep(2)
                first.process.send_signal(signal.SIGKILL if name == "sigkill" else signal.SIGTERM)
                started = time.monotonic()
                first.process.wait(60)
                uid = it.lose_decode()
                until(lambda uid=uid: it.has_decode(but=uid))  # type: ignore[misc]
                found[name].append(time.monotonic() - started)
    return {f"failover_{name}_s": results.spread(values) for name, values in found.items()}


def repairs(args: argparse.Namespace) -> Figures:
    dropped, outage = [], []
    with world(args, 0.0) as it:
        operator = it.start()
        until(lambda: operator.leads)
        it.create("g")
        until(lambda: it.is_ready("g"))
        if isinstance(it, OwnWorld):
            dropped = [_repair(it, 0.0, forget=True) for _ in range(args.rounds)]
        if isinstance(it, OwnWorld) or all(args.outage):
            outage = [_repair(it, 20.0, forget=False) for _ in range(max(1, args.rounds // 2))]
    found = {"repaired_after_dropped_watches_s": dropped, "repaired_after_outage_of_20_s_s": outage}
    return {name: results.spread(values) for name, values in found.items() if values}


def _repair(it: World, away_s: float, *, forget: bool) -> float:
    """Watches end, an object is deleted, and the server comes back after `away_s`."""
    until(it.has_decode)
    time.sleep(2)
    if isinstance(it, ClusterWorld):
        return until(it.outage(away_s))
    assert isinstance(it, OwnWorld)
    return until(it.outage(away_s, forget=forget))


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
    parser.add_argument("--pod-seconds", type=float, default=0.5, help="until a simulated pod is ready")
    parser.add_argument("--idle-seconds", type=float, default=60.0)
    parser.add_argument("--many", type=int, default=1000, help="groups of the last part")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--kubeconfig", default="", help="a real cluster, with the definitions installed and pods run")
    parser.add_argument("--node", default="", metavar="KEY=VALUE", help="with --kubeconfig: label of the pods' nodes")
    parser.add_argument(
        "--outage",
        nargs=2,
        default=["", ""],
        metavar=("DOWN", "UP"),
        help="with --kubeconfig: commands that stop and start its API server (default: no outage)",
    )
    parser.add_argument("--note", default="", help="a sentence that is kept with the figures: what runs the pods")
    args = parser.parse_args()
    figures: Figures = {}
    for part in args.parts:
        figures |= PARTS[part](args)
        print(json.dumps(figures, indent=1), flush=True)
    missed = [name for name, bound in BOUNDS.items() if name in figures and _most(figures[name]) > bound]
    own = ("output", "kubeconfig", "outage")
    options = {key: value for key, value in vars(args).items() if key not in own}
    result = {"settings": options, "figures": figures, "bounds": BOUNDS, "missed": missed}
    name = "operator_figures_cluster" if args.kubeconfig else "operator_figures"
    print(f"missed: {', '.join(missed) or 'none'}; written to {results.write(name, result, args.output)}")
    return int(bool(missed))


def _most(figure: Any) -> float:
    return float(figure["max"] if isinstance(figure, dict) else figure)


if __name__ == "__main__":
    sys.exit(main())
