"""Leader election by a Lease: of several operators one writes.

The rules are those of Kubernetes' own leader election (client-go's leaderelection): a candidate takes the lease when
its holder has not renewed it for the lease's duration, as measured by the candidate's own clock since it last saw the
lease change, so that clocks of machines need not agree. A leader that cannot renew in time stops working before
another may begin.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from diptych.errors import DiptychError, NotFound
from diptych.group.operator.api import Api
from diptych.group.operator.resources import LEASE, Json

log = logging.getLogger(__name__)

DURATION_S = 6.0  # after so long without a renewal another operator takes over
RENEW_DEADLINE_S = 4.0  # after so long without a renewal the leader stops
RELEASE_S = 2.0  # what giving the lease back may take
RETRY_S = 1.0  # between renewals, and between a candidate's looks


class Election:
    """Takes part in the election of `name` as `identity` until `stop`.

    `on_lead` is called when this process becomes the leader, `on_lost` when it no longer is (not after `stop`).
    """

    def __init__(
        self,
        api: Api,
        namespace: str,
        name: str,
        identity: str,
        on_lead: Callable[[], None],
        on_lost: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api, self._namespace, self._name, self._identity = api, namespace, name, identity
        self._on_lead, self._on_lost, self._clock = on_lead, on_lost, clock
        self._seen: Json | None = None  # the lease's spec as last seen
        self._seen_at = 0.0
        self._renewed_at = 0.0
        self._stopping = threading.Event()
        self.leading = False
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Leave the election; a leader gives the lease back, so that another need not wait for it to expire."""
        self._stopping.set()
        self._thread.join(RENEW_DEADLINE_S)
        if self.leading:
            self.leading = False
            self._release()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def may_write(self) -> bool:
        """Whether no other operator can be leading. To be asked before every write: a renewal may hang meanwhile."""
        return self.leading and self._clock() - self._renewed_at < RENEW_DEADLINE_S

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.look()
            self._stopping.wait(self.pause_s())

    def pause_s(self) -> float:
        """Until the next look; a candidate is there when the lease expires."""
        usual_s = RETRY_S * random.uniform(0.8, 1.2)
        left_s = self._seen_at + self._lasts_s() - self._clock()
        return usual_s if self.leading or left_s <= 0 else min(usual_s, left_s + 0.01)

    def look(self) -> None:
        """Renew the lease, or take it if it is free; then say what changed."""
        try:
            holds = self._try_to_hold()
        except DiptychError as error:
            log.warning("leader election: %s", error.message)
            holds = self.may_write()
        if holds and not self.leading:
            self.leading = True
            log.info("leading as %s", self._identity)
            self._on_lead()
        elif self.leading and not holds:
            self.leading = False
            log.error("the lease %s/%s is lost", self._namespace, self._name)
            self._on_lost()

    def _try_to_hold(self) -> bool:
        """Whether the lease is ours now. Raises Conflict if somebody was faster; the next look tells."""
        started = self._clock()
        left_s = self._renewed_at + RENEW_DEADLINE_S - started if self.leading else RENEW_DEADLINE_S
        api = self._api.within(max(0.2, left_s / 2))
        try:
            lease = api.get(LEASE, self._namespace, self._name)
        except NotFound:
            api.create(LEASE, self._lease(None))
        else:
            spec, now = lease.get("spec") or {}, self._clock()
            if spec != self._seen:
                self._seen, self._seen_at = spec, now
            holder = spec.get("holderIdentity")
            if holder and holder != self._identity and now - self._seen_at <= self._lasts_s():
                return False
            api.replace(LEASE, self._lease(lease))
        self._renewed_at = started
        return True

    def _lasts_s(self) -> float:
        return float((self._seen or {}).get("leaseDurationSeconds") or DURATION_S)

    def _lease(self, old: Json | None) -> Json:
        """The lease, held by us and renewed now."""
        was = (old or {}).get("spec") or {}
        now = _timestamp()
        mine = was.get("holderIdentity") == self._identity
        spec = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": int(DURATION_S),
            "acquireTime": was.get("acquireTime", now) if mine else now,
            "renewTime": now,
            "leaseTransitions": was.get("leaseTransitions", 0) + (0 if mine or old is None else 1),
        }
        if old is None:
            return {"metadata": {"namespace": self._namespace, "name": self._name}, "spec": spec}
        return {"metadata": old["metadata"], "spec": spec}

    def _release(self) -> None:
        try:
            api = self._api.within(RELEASE_S)
            lease = api.get(LEASE, self._namespace, self._name)
            if lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"]["holderIdentity"] = ""
                api.replace(LEASE, lease)
        except DiptychError as error:
            log.warning("the lease could not be given back (%s): it expires in %g s", error.message, DURATION_S)


def _timestamp() -> str:
    """MicroTime, as the API writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
