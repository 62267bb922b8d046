"""What clients asked for: every request, so that a test can count writes."""

from __future__ import annotations

import threading
from dataclasses import dataclass

WRITES = frozenset({"create", "update", "patch", "apply", "delete", "deletecollection"})


@dataclass(frozen=True)
class Request:
    """One request as it was answered. `name` is empty for lists and watches; `kind` is a kind's name (`Pod`).

    `changed`: whether an object really changed (an apply that changes nothing is a request, but no change).
    """

    verb: str
    kind: str
    namespace: str
    name: str
    subresource: str = ""
    manager: str = ""
    dry_run: bool = False
    code: int = 0
    changed: bool = False
    at_s: float = 0.0

    @property
    def is_write(self) -> bool:
        return self.verb in WRITES and not self.dry_run


class Record:
    """All requests since the server started. Counted from a `mark`; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: list[Request] = []

    def add(self, request: Request) -> None:
        with self._lock:
            self._requests.append(request)

    def mark(self) -> int:
        """A place in the record: pass it as `since`."""
        with self._lock:
            return len(self._requests)

    def requests(self, since: int = 0, *, verb: str = "", kind: str = "") -> list[Request]:
        with self._lock:
            found = self._requests[since:]
        return [one for one in found if verb in ("", one.verb) and kind in ("", one.kind)]

    def writes(self, since: int = 0, *, kind: str = "", leases: bool = False) -> list[Request]:
        """Successful writes, whether or not they changed anything. Leases and Events only where asked for."""
        quiet = set() if leases or kind else {"Lease", "Event"}
        found = self.requests(since, kind=kind)
        return [one for one in found if one.is_write and one.code < 300 and one.kind not in quiet]
