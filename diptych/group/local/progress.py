"""How a group comes up, for a person: a live line on a terminal, one line a change elsewhere."""

from __future__ import annotations

import contextlib
import time

from rich.console import Console
from rich.status import Status

from diptych.group.local.state import Snapshot, changes


class Progress:
    """Prints each change with the seconds since the start. On a terminal a last line shows all roles until `settle`.

    `hint` is printed once, when the group is ready.
    """

    def __init__(self, console: Console, hint: str = "") -> None:
        self._console = console
        self._hint = hint
        self._began = time.monotonic()
        self._before: Snapshot | None = None
        self._live: Status | None = None

    def line(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal has gone: the group still has to end in order
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start_from(self, snapshot: Snapshot) -> None:
        """Takes what is already so as known."""
        self._before = snapshot

    def show(self, snapshot: Snapshot) -> None:
        for change in changes(self._before, snapshot):
            self.line(f"{time.monotonic() - self._began:7.1f} s  {change}")
        self._before = snapshot
        if snapshot.status == "ready":
            self.settle()
            if self._hint:
                self.line(self._hint)
                self._hint = ""
        elif self._console.is_terminal:
            if self._live is None:
                self._live = self._console.status("")
                self._live.start()
            self._live.update(_roles(snapshot))

    def settle(self) -> None:
        """Takes the live line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _roles(snapshot: Snapshot) -> str:
    parts = []
    for role in snapshot.roles:
        note = f" [dim](waits for {', '.join(role.waiting_for)})[/dim]" if role.waiting_for else ""
        colour = "green" if role.ready == role.replicas else "yellow"
        parts.append(f"{role.name} [{colour}]{role.ready}/{role.replicas}[/{colour}]{note}")
    return f"{snapshot.group} {snapshot.status}: " + "  ".join(parts)
