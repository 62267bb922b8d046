"""Things that go wrong with an API server, to order. Thread-safe; each fault ends by its count, or with `clear`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from diptych.testing.kube.api import Api
from diptych.testing.kube.status import ApiError, forbidden
from diptych.testing.kube.store import Change

What = Literal["answer", "delay", "reset", "lose_answer"]


@dataclass(frozen=True)
class Match:
    """Which requests a fault meets; an empty field matches all. `verb` may be `write` for any write."""

    verb: str = ""
    kind: str = ""
    name: str = ""

    def fits(self, verb: str, kind: str, name: str, *, write: bool) -> bool:
        verb_fits = self.verb in ("", verb) or (self.verb == "write" and write)
        return verb_fits and self.kind in ("", kind) and self.name in ("", name)


@dataclass
class Fault:
    """`answer` replies `code` instead; `delay` waits `seconds` first; `reset` cuts the connection before the request
    is carried out, `lose_answer` after it.
    """

    what: What
    match: Match
    times: int
    code: int = 500
    seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)

    def error(self) -> ApiError:
        if self.code == 429:
            message = "the server has received too many requests and has asked us to try again later"
            return ApiError(429, "TooManyRequests", message, headers=self.headers)
        reason = {500: "InternalError", 503: "ServiceUnavailable", 504: "Timeout"}.get(self.code, "Unknown")
        return ApiError(self.code, reason, "an injected fault", headers=self.headers)


class Faults:
    def __init__(self, api: Api) -> None:
        self._api = api
        self._lock = threading.Lock()
        self._pending: list[Fault] = []
        self._forbidden: list[Match] = []
        self._lost: list[tuple[str, int]] = []
        self._outage = False
        self.on_drop: Callable[[], None] = lambda: None  # the server ends its watches
        self.on_outage: Callable[[float], None] = lambda seconds: None  # the server ends the outage later

    # to order a fault

    def answer(
        self, code: int, *, times: int = 1, retry_after_s: int = 1, verb: str = "", kind: str = "", name: str = ""
    ) -> None:
        """The next `times` matching requests get this status code (429 with Retry-After)."""
        headers = {"Retry-After": str(retry_after_s)} if code in (429, 503) else {}
        self._add(Fault("answer", Match(verb, kind, name), times, code=code, headers=headers))

    def delay(self, seconds: float, *, times: int = 1, verb: str = "", kind: str = "", name: str = "") -> None:
        """The next `times` matching requests are answered later."""
        self._add(Fault("delay", Match(verb, kind, name), times, seconds=seconds))

    def reset(self, *, times: int = 1, verb: str = "", kind: str = "", name: str = "") -> None:
        """The next `times` matching requests are not carried out; their connection is cut."""
        self._add(Fault("reset", Match(verb, kind, name), times))

    def lose_answer(self, *, times: int = 1, verb: str = "", kind: str = "", name: str = "") -> None:
        """The next `times` matching requests are carried out, but the connection is cut before the answer."""
        self._add(Fault("lose_answer", Match(verb, kind, name), times))

    def forbid(self, verb: str = "", kind: str = "") -> None:
        """Matching requests get 403, until `clear`."""
        with self._lock:
            self._forbidden.append(Match(verb, kind))

    def lose_events(self, count: int, *, kind: str = "") -> None:
        """The next `count` changes (of that kind) reach no watch, ever."""
        with self._lock:
            self._lost.append((kind, count))

    def drop_watches(self) -> None:
        """Cuts every open watch, without an end of the stream."""
        self.on_drop()

    def forget_history(self) -> None:
        """Watches from any revision up to now get 410, lists continued from before now as well."""
        with self._api.lock:
            self._api.store.forget()

    def outage(self, seconds: float) -> None:
        """No request is answered and no watch lives for that long (of real time). Returns at once."""
        self.begin_outage()
        self.on_outage(seconds)

    def begin_outage(self) -> None:
        self._outage = True
        self.on_drop()

    def end_outage(self) -> None:
        self._outage = False

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        """An outage as long as the block."""
        self.begin_outage()
        try:
            yield
        finally:
            self.end_outage()

    def steal_lease(self, name: str, namespace: str = "default", *, holder: str = "thief") -> None:
        """Another holder has the Lease now. Raises ApiError 404."""
        with self._api.lock:
            lease = self._api.get("Lease", namespace, name)
            now = self._api.clock.stamp(micro=True)
            transitions = lease["spec"].get("leaseTransitions", 0) + 1
            spec = {"holderIdentity": holder, "acquireTime": now, "renewTime": now, "leaseTransitions": transitions}
            self._api.patch("Lease", namespace, name, {"spec": spec}, manager=holder)

    def clear(self) -> None:
        """Ends all faults."""
        with self._lock:
            self._pending.clear()
            self._forbidden.clear()
            self._lost.clear()
        self._outage = False

    def left(self) -> int:
        """How many ordered faults have not happened yet: 0 when a test's faults were all met."""
        with self._lock:
            return sum(fault.times for fault in self._pending) + sum(count for _, count in self._lost)

    # for the server

    @property
    def down(self) -> bool:
        return self._outage

    def take(self, verb: str, kind: str, name: str, *, write: bool) -> Fault | None:
        """The fault that this request meets, used up by one. Raises 403 where forbidden."""
        with self._lock:
            if any(match.fits(verb, kind, name, write=write) for match in self._forbidden):
                raise forbidden(f'{kind} is forbidden: User "test" cannot {verb} resource "{kind}"')
            for fault in self._pending:
                if fault.match.fits(verb, kind, name, write=write):
                    fault.times -= 1
                    if not fault.times:
                        self._pending.remove(fault)
                    return fault
        return None

    def loses(self, change: Change) -> bool:
        """Whether watches must not see this change, used up by one."""
        with self._lock:
            for i, (kind, count) in enumerate(self._lost):
                if kind in ("", change.obj["kind"]):
                    self._lost[i : i + 1] = [(kind, count - 1)] if count > 1 else []
                    return True
        return False

    def _add(self, fault: Fault) -> None:
        with self._lock:
            self._pending.append(fault)


__all__: list[Any] = ["Fault", "Faults", "Match"]
