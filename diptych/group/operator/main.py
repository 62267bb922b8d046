"""`diptych operator`: one process of the operator, from its start to its graceful end."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

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
from diptych.group.operator.cache import GROUP_LABEL, Cache
from diptych.group.operator.cluster import Cluster
from diptych.group.operator.controller import Reconciler, Workers, wait_synced
from diptych.group.operator.events import Events
from diptych.group.operator.groups import GroupReconciler
from diptych.group.operator.health import HealthServer
from diptych.group.operator.informer import Informer
from diptych.group.operator.lease import Election
from diptych.group.operator.metrics import Metrics
from diptych.group.operator.observe import ROLE_LABEL
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
from diptych.group.operator.routes import CONTROLLERS, Key, keys
from diptych.group.operator.sets import SetReconciler, is_ready
from diptych.obs import logs

log = logging.getLogger(__name__)

COMPONENT = "diptych-operator"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
OUR_KINDS = (GROUP, GROUP_SET, ADAPTER, PROFILE)  # all of them are watched, not only those of groups
KINDS_OF_GROUPS = (STATEFUL_SET, DEPLOYMENT, SERVICE, CONFIG_MAP, DISRUPTION_BUDGET, REVISION, POD)
OPTIONAL_KINDS = (LEADER_WORKER_SET, POD_GROUP, VOLCANO_POD_GROUP, PROFILE)  # not installed, or not allowed to us
KINDS = tuple(dict.fromkeys((*OUR_KINDS, *KINDS_OF_GROUPS, *OPTIONAL_KINDS)))
STOP_TIMEOUT_S = 10.0


class Operator:
    """Watches `namespace` ("": all), with its lease in `lease_namespace`. `run` blocks until `stop`.

    A leader that loses its lease writes nothing any more, another one may be working already, and takes part in the
    next election: an API server that was away for a while finds the same operator again.
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
        self._api = Api(configuration, self.metrics)
        self._queue: KeyQueue[Key] = KeyQueue()
        self._stopping = threading.Event()
        self._leading = threading.Event()
        self._election: Election | None = None
        if elect:
            name = identity or f"{socket.gethostname()}-{os.getpid()}"
            self._election = Election(
                self._api, lease_namespace, COMPONENT, name, on_lead=self._lead, on_lost=self._step_down
            )
        self._caches = {kind: Cache(kind, self._on_change(kind)) for kind in KINDS}
        self._informers = [self._informer(cache, namespace) for cache in self._caches.values()]
        for ready in (True, False):
            self.metrics.groups.labels(str(ready).lower()).set_function(partial(self._num_groups, ready))
        may_write = self._election.may_write if self._election else lambda: True
        events = Events(self._api, COMPONENT)
        cluster = Cluster(self._api, self._caches, events, self.metrics, may_write)
        self._workers = Workers(self._queue, reconcilers(cluster), self.metrics, num_workers, self._leading)
        self.health = HealthServer(*bind, self.metrics.registry, self._healthy, self._synced)

    def run(self) -> None:
        """Serve until `stop`, then finish what is being written and give the lease back."""
        for informer in self._informers:
            informer.start()
        if self._election is None:
            self._lead()
        else:
            self._election.start()
        self.health.start()
        try:
            if not wait_synced(self._informers, self._stopping, self._say_waiting):
                return
            log.info("in step with the API server")
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
        for informer in self._informers:
            informer.stop()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for informer in self._informers:
            informer.join(max(0.0, deadline - time.monotonic()))
        self.health.close()
        self._api.close()

    def _lead(self) -> None:
        """Look at everything: nobody knows how far the leader before came."""
        self._leading.set()
        self.metrics.leader.labels(COMPONENT).set(1)
        for kind in (GROUP, GROUP_SET, ADAPTER):
            for namespace, name in self._caches[kind].all_keys():
                self._queue.add(Key(CONTROLLERS[kind], namespace, name))

    def _step_down(self) -> None:
        self._leading.clear()
        self.metrics.leader.labels(COMPONENT).set(0)

    def _healthy(self) -> bool:
        """While the API server is away the operator waits; only what has died here would be cured by a restart."""
        elects = self._election is None or self._election.alive
        return elects and all(informer.alive for informer in self._informers)

    def _synced(self) -> bool:
        return all(informer.synced.is_set() for informer in self._informers)

    def _num_groups(self, ready: bool) -> int:
        cache = self._caches[GROUP]
        groups = [cache.get(*key) for key in cache.all_keys()]
        return sum(group is not None and is_ready(group) == ready for group in groups)

    @staticmethod
    def _say_waiting(kind: str) -> None:
        log.info("waiting for the first list of %s", kind)

    def _informer(self, cache: Cache, namespace: str) -> Informer:
        where = namespace if cache.kind.namespaced else ""
        optional = cache.kind in OPTIONAL_KINDS
        return Informer(self._api, cache, where, selector(cache.kind), self.metrics, optional=optional)

    def _on_change(self, kind: Kind) -> Callable[[Json], None]:
        def on_change(obj: Json) -> None:
            for key in keys(kind, obj, self._caches):
                self._queue.add(key)

        return on_change


def reconcilers(cluster: Cluster, clock: Callable[[], float] = time.time) -> dict[str, Reconciler]:
    """By the controller of their keys. `clock` gives Unix time."""
    return {
        "group": GroupReconciler(cluster, clock),
        "set": SetReconciler(cluster, clock),
        "adapter": AdapterReconciler(cluster, clock),
    }


def selector(kind: Kind) -> str:
    """Which objects of the kind are followed. The revisions of groups are; those of their StatefulSets, with the same
    labels and that of a role, are not."""
    if kind in OUR_KINDS:
        return ""
    return f"{GROUP_LABEL},!{ROLE_LABEL}" if kind == REVISION else GROUP_LABEL


# ---- the command -------------------------------------------------------------------------------------------------


def run_operator(args: argparse.Namespace) -> int:
    """Returns 0 after SIGTERM or SIGINT."""
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
    return 0


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
