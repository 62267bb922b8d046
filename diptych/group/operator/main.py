"""`diptych operator`: one process of the operator, from its start to its graceful end."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

from kubernetes.client import Configuration
from kubernetes.config import (
    ConfigException,
    list_kube_config_contexts,
    load_incluster_config,
    load_kube_config,
)

from diptych.errors import ConfigError
from diptych.group.operator.adapters import AdapterReconciler
from diptych.group.operator.api import Api
from diptych.group.operator.cluster import Cluster
from diptych.group.operator.controller import Key, Reconciler, Workers, wait_synced
from diptych.group.operator.events import Events
from diptych.group.operator.groups import GroupReconciler
from diptych.group.operator.health import HealthServer
from diptych.group.operator.informer import GROUP_LABEL, Informer
from diptych.group.operator.lease import Election
from diptych.group.operator.metrics import Metrics
from diptych.group.operator.queue import KeyQueue
from diptych.group.operator.resources import (
    ADAPTER,
    CONFIG_MAP,
    DEPLOYMENT,
    DISRUPTION_BUDGET,
    GROUP,
    GROUP_SET,
    LEADER_WORKER_SET,
    POD,
    POD_GROUP,
    PROFILE,
    REVISION,
    SERVICE,
    STATEFUL_SET,
    VOLCANO_POD_GROUP,
    Json,
    Kind,
)
from diptych.group.operator.sets import SetReconciler
from diptych.obs import logs

log = logging.getLogger(__name__)

COMPONENT = "diptych-operator"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
OUR_KINDS = (GROUP, GROUP_SET, ADAPTER, PROFILE)  # all of them are watched, not only those of groups
KINDS_OF_GROUPS = (STATEFUL_SET, DEPLOYMENT, SERVICE, CONFIG_MAP, DISRUPTION_BUDGET, REVISION, POD)
OPTIONAL_KINDS = (LEADER_WORKER_SET, POD_GROUP, VOLCANO_POD_GROUP, PROFILE)  # not installed, or not allowed to us
STOP_TIMEOUT_S = 10.0


class Operator:
    """Watches `namespace` ("": all), with its lease in `lease_namespace`. `run` blocks until `stop`.

    A leader that loses its lease ends the process's work at once (`lost`): another one may be working already.
    """

    def __init__(
        self,
        configuration: Configuration,
        namespace: str,
        lease_namespace: str,
        *,
        bind: tuple[str, int] = ("127.0.0.1", 0),
        num_workers: int = 4,
        elect: bool = True,
        identity: str = "",
    ) -> None:
        self.metrics = Metrics()
        self.lost = False
        self._api = Api(configuration, self.metrics)
        self._queue: KeyQueue[Key] = KeyQueue()
        self._stopping = threading.Event()
        self._leading = threading.Event()
        kinds = dict.fromkeys((*OUR_KINDS, *KINDS_OF_GROUPS, *OPTIONAL_KINDS))
        self._informers = {kind: self._informer(kind, namespace) for kind in kinds}
        cluster = Cluster(self._api, self._informers, Events(self._api, COMPONENT), self.metrics)
        reconcilers: dict[str, Reconciler] = {
            "group": GroupReconciler(cluster),
            "set": SetReconciler(cluster),
            "adapter": AdapterReconciler(cluster),
        }
        self._workers = Workers(self._queue, reconcilers, self.metrics, num_workers)
        self._election: Election | None = None
        if elect:
            name = identity or f"{socket.gethostname()}-{os.getpid()}"
            self._election = Election(
                self._api, lease_namespace, COMPONENT, name, on_lead=self._leading.set, on_lost=self._lose
            )
        self.health = HealthServer(*bind, self.metrics.registry, self._healthy, self._synced)

    def run(self) -> None:
        """Serve until `stop` or until the lease is lost, then finish what is being written and give the lease back."""
        self.health.start()
        for informer in self._informers.values():
            informer.start()
        if self._election is None:
            self._leading.set()
        else:
            self._election.start()
        try:
            if not wait_synced(list(self._informers.values()), self._stopping, self._say_waiting):
                return
            log.info("in step with the API server")
            while not self._leading.wait(0.2):
                if self._stopping.is_set():
                    return
            self.metrics.leader.labels(COMPONENT).set(1)
            self._workers.start()
            self._stopping.wait()
        finally:
            self._close()

    def stop(self) -> None:
        """Let `run` return."""
        self._stopping.set()

    def _close(self) -> None:
        if self._workers.started and not self._workers.stop(STOP_TIMEOUT_S):
            log.warning("a reconcile did not end within %g s", STOP_TIMEOUT_S)
        if self._election is not None:
            self._election.stop()
        for informer in self._informers.values():
            informer.stop()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for informer in self._informers.values():
            informer.join(max(0.0, deadline - time.monotonic()))
        self.health.close()
        self._api.close()

    def _lose(self) -> None:
        self.lost = True
        self.stop()

    def _healthy(self) -> bool:
        """While the API server is away the operator waits; only its own death would be cured by a restart."""
        return not self.lost

    def _synced(self) -> bool:
        return all(informer.synced.is_set() for informer in self._informers.values())

    @staticmethod
    def _say_waiting(kind: str) -> None:
        log.info("waiting for the first list of %s", kind)

    # ---- what changes make whom look ----

    def _informer(self, kind: Kind, namespace: str) -> Informer:
        selector = "" if kind in OUR_KINDS else GROUP_LABEL
        where, optional = namespace if kind.namespaced else "", kind in OPTIONAL_KINDS
        return Informer(self._api, kind, where, selector, self._on_change(kind), self.metrics, optional=optional)

    def _on_change(self, kind: Kind) -> Any:
        def on_change(obj: Json) -> None:
            for key in self._keys(kind, obj):
                self._queue.add(key)

        return on_change

    def _keys(self, kind: Kind, obj: Json) -> list[Key]:
        metadata = obj["metadata"]
        namespace, name = metadata.get("namespace", ""), metadata["name"]
        if kind == PROFILE:
            return [Key("group", *key) for key in self._informers[GROUP].all_keys()]
        if kind == GROUP_SET:
            return [Key("set", namespace, name)]
        if kind == ADAPTER:
            group = obj["spec"]["scaleTargetRef"]["name"]
            return [Key("adapter", namespace, name), Key("group", namespace, group)]
        if kind == GROUP:
            adapters = self._informers[ADAPTER].of_group(namespace, name)
            keys = [Key("adapter", namespace, adapter["metadata"]["name"]) for adapter in adapters]
            owners = [each for each in metadata.get("ownerReferences") or [] if each["kind"] == GROUP_SET.kind]
            return [Key("group", namespace, name), *keys, *(Key("set", namespace, each["name"]) for each in owners)]
        group = (metadata.get("labels") or {}).get(GROUP_LABEL)
        return [Key("group", namespace, group)] if group else []


# ---- the command -------------------------------------------------------------------------------------------------


def run_operator(args: argparse.Namespace) -> int:
    """Returns 0 after SIGTERM or SIGINT, 1 when the lease was lost (to be restarted)."""
    logs.set_up(args.log_level, "operator")
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: must be at least 1")
    configuration, own_namespace = connect(args.kubeconfig)
    namespace = "" if args.all_namespaces else args.namespace or own_namespace
    operator = Operator(
        configuration,
        namespace,
        own_namespace,
        bind=_address(args.bind),
        num_workers=args.workers,
        elect=not args.no_leader_election,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: operator.stop())
    log.info("watching %s, health and metrics on port %d", namespace or "all namespaces", operator.health.port)
    operator.run()
    return 1 if operator.lost else 0


def connect(kubeconfig: str | None) -> tuple[Configuration, str]:
    """How to reach the cluster, and the namespace that is ours there. Raises ConfigError."""
    configuration = Configuration()
    try:
        if kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            load_incluster_config(client_configuration=configuration)
            return configuration, NAMESPACE_FILE.read_text().strip()
        load_kube_config(config_file=kubeconfig, client_configuration=configuration)
        _, context = list_kube_config_contexts(kubeconfig)
    except (ConfigException, OSError) as error:
        raise ConfigError(f"no cluster: {error}; name one with --kubeconfig FILE") from None
    return configuration, context["context"].get("namespace") or "default"


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--bind {text}: must be HOST:PORT")
    return host.strip("[]"), int(port)
