"""What the operator tells Prometheus. Names follow those that Kubernetes controllers commonly have."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """One set a process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.reconciles = Counter(
            "controller_runtime_reconcile_total", "Reconciles, by result", ("controller", "result"), registry=registry
        )
        self.reconcile_s = Histogram(
            "controller_runtime_reconcile_time_seconds",
            "Seconds of one reconcile",
            ("controller",),
            registry=registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )
        self.queue_depth = Gauge("workqueue_depth", "Keys that wait for a worker", ("name",), registry=registry)
        self.retries = Counter("workqueue_retries_total", "Keys put back after a failure", ("name",), registry=registry)
        self.api_requests = Counter(
            "rest_client_requests_total", "Requests to the API server", ("method", "code"), registry=registry
        )
        self.relists = Counter(
            "diptych_operator_relists_total", "Lists because a watch could not go on", ("kind",), registry=registry
        )
        self.writes = Counter("diptych_operator_writes_total", "Objects written", ("verb", "kind"), registry=registry)
        self.leader = Gauge(
            "leader_election_master_status", "1 while this process is the leader", ("name",), registry=registry
        )
        self.groups = Gauge("diptych_operator_groups", "Groups, by condition Ready", ("ready",), registry=registry)
