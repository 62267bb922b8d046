"""The console of an engine: what an operator may ask of it while it runs, and what it reports of itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from diptych.engine.requests import Requests
from diptych.errors import AuditError, BadRequest, DiptychError
from diptych.sched import audit as ledger
from diptych.sched.queue import retract
from diptych.sched.stats import stats
from diptych.types import Control, ControlReply, Stats

log = logging.getLogger(__name__)


class Console:
    """Used by the engine's loop."""

    def __init__(self, requests: Requests) -> None:
        self.facts: dict[str, Any] = {}  # what the worker adds to the `state` report
        self.census: Callable[[], dict[str, Any]] = dict  # and to the `audit` report
        self._requests = requests
        self._last_report = Stats()

    def answer(self, message: Control) -> ControlReply:
        """Carry a control message out. No step may be in flight."""
        try:
            return ControlReply(message.id, True, self._run(message.op, message.args))
        except DiptychError as error:
            reason = {"message": error.message, "status": error.status, "code": error.code}
            return ControlReply(message.id, False, reason)

    def report(self) -> Stats:
        """The figures of now; `state` repeats the latest."""
        report = stats(self._requests.state)
        self._requests.role.add_stats(report)
        self._last_report = report
        return report

    def _run(self, op: str, args: dict[str, Any]) -> dict[str, Any]:
        state, role = self._requests.state, self._requests.role
        if op == "pause":
            state.paused = True
            if args.get("mode") == "retract" and role.retracts:
                for seq in reversed(list(state.running)):
                    retract(state, seq, self._requests.now())
            return {"paused": True}
        if op == "continue":
            state.paused = False
            return {"paused": False}
        if op == "flush_cache":
            if state.seqs or role.held():
                raise BadRequest("the cache can be flushed only when no request is running; wait, or abort them first")
            return {"flushed_pages": state.tree.flush()}
        if op == "audit":
            return self._audit()
        if op == "state":
            return {
                "requests": len(state.seqs),
                "held": len(role.held()),
                "stats": self._last_report,
                **self.facts,
            }
        raise BadRequest(f"unknown control operation {op!r}")

    def _audit(self) -> dict[str, Any]:
        """Recompute the page ledger. `ok` false is a defect of ours, and is logged as one."""
        state = self._requests.state
        try:
            ledger.audit(state)
        except AuditError as error:
            log.error("audit: %s", error.message)
            return {"ok": False, "message": error.message, **self.census()}
        return {
            "ok": True,
            "pages": state.pool.num_pages,
            "free": state.pool.num_free,
            "cached": sum(len(node.pages) for node in state.tree.nodes()),
            "requests": len(state.seqs),
            "held": len(self._requests.role.held()),
            "grammars": self._requests.num_grammars,
            **self.census(),
        }
