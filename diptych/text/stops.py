"""Stop strings in a text that arrives in pieces.

The result does not depend on the pieces: the stop that is complete first, reading character by character, ends the
text; of two that end at the same character, the longer. Only text that may still become a stop is held back. Linear in
the text for each stop (Knuth, Morris and Pratt's automaton), so a client cannot choose stops that cost more.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Feed text with `push`; what it returns may be shown. Once `matched` is set nothing more comes out."""

    __slots__ = ("_automata", "_first", "_held", "_keep", "matched")

    def __init__(self, stops: Sequence[str], *, keep_stop: bool = False) -> None:
        longest_first = sorted({stop for stop in stops if stop}, key=len, reverse=True)
        self._automata = [_Automaton(stop) for stop in longest_first]
        self._first = frozenset(stop[0] for stop in longest_first)
        self._keep = keep_stop  # no_stop_trim: the stop stays in the text
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        if self.matched is not None:
            return ""
        if not self._held and self._first.isdisjoint(text):  # no stop has begun, and none begins here
            return text
        pending = self._held + text
        seen = len(self._held)
        for position, char in enumerate(text, start=seen + 1):
            for automaton in self._automata:
                if automaton.step(char):
                    self.matched = automaton.stop
                    self._held = ""
                    return pending[: position if self._keep else position - len(automaton.stop)]
        hold = max(automaton.state for automaton in self._automata)
        self._held = pending[len(pending) - hold :]
        return pending[: len(pending) - hold]

    def finish(self) -> str:
        """What was held back, now that no more text will come."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """`state` is the length of the longest prefix of `stop` that the text so far ends with."""

    __slots__ = ("_failure", "state", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.state = 0
        self._failure = [0] * (len(stop) + 1)
        border = 0
        for i in range(1, len(stop)):
            while border and stop[i] != stop[border]:
                border = self._failure[border]
            border += stop[i] == stop[border]
            self._failure[i + 1] = border

    def step(self, char: str) -> bool:
        """True when `char` completes the stop."""
        state = self.state
        while state and self.stop[state] != char:
            state = self._failure[state]
        if self.stop[state] == char:
            state += 1
        self.state = state
        return state == len(self.stop)
