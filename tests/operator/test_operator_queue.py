"""The work queue's promises: each key once, never on two workers, failures ever later, nothing forgotten."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from diptych.group.operator.queue import KeyQueue


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_key_is_handed_out_once_and_again_if_it_was_added_meanwhile() -> None:
    queue: KeyQueue[str] = KeyQueue()
    queue.add("a")
    queue.add("a")
    assert queue.get(0) == "a"
    assert queue.get(0) is None
    queue.add("a")
    assert queue.get(0) is None  # a worker has it
    queue.done("a")
    assert queue.get(0) == "a"
    queue.done("a")
    assert queue.get(0) is None


def test_failures_wait_ever_longer_up_to_a_cap() -> None:
    clock = Clock()
    queue: KeyQueue[str] = KeyQueue(0.1, 2.0, clock)
    assert [queue.retry("a") for _ in range(7)] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    queue.succeeded("a")
    assert queue.retry("a", at_least_s=1.5) == 1.5


def test_later_keys_come_when_they_are_due_and_earlier_if_asked() -> None:
    clock = Clock()
    queue: KeyQueue[str] = KeyQueue(clock=clock)
    queue.add_after("a", 5)
    queue.add_after("b", 1)
    queue.add_after("a", 3)
    queue.add_after("a", 9)
    clock.now = 1
    assert queue.get(0) == "b"
    clock.now = 3
    assert queue.get(0) == "a"
    queue.done("a")
    clock.now = 9
    assert queue.get(0) is None  # the other times of "a" are void
    queue.add_after("c", 5)
    queue.add("c")
    assert queue.get(0) == "c"
    queue.done("c")
    clock.now = 20
    assert queue.get(0) is None


def test_a_closed_queue_wakes_its_workers() -> None:
    queue: KeyQueue[str] = KeyQueue()
    got: list[str | None] = []
    workers = [threading.Thread(target=lambda: got.append(queue.get(60))) for _ in range(3)]
    for worker in workers:
        worker.start()
    queue.close()
    for worker in workers:
        worker.join(10)
    assert got == [None, None, None]


@given(st.lists(st.tuples(st.sampled_from(["add", "later", "work", "finish", "pass"]), st.integers(0, 3))))
def test_every_key_that_was_added_is_worked_on_afterwards(steps: list[tuple[str, int]]) -> None:
    clock = Clock()
    queue: KeyQueue[int] = KeyQueue(clock=clock)
    owed: set[int] = set()  # added and not begun since
    later: set[int] = set()  # asked for at a time, and may come once more than owed
    working: set[int] = set()
    for what, key in steps:
        if what == "add":
            queue.add(key)
            owed.add(key)
        elif what == "later":
            queue.add_after(key, key + 1)
            owed.add(key)
            later.add(key)
        elif what == "work":
            found = queue.get(0)
            if found is not None:
                assert found in owed | later and found not in working
                owed.discard(found)
                working.add(found)
        elif what == "finish" and key in working:
            working.discard(key)
            queue.done(key)
        elif what == "pass":
            clock.now += key
    for key in working:
        queue.done(key)
    clock.now += 10
    rest = []
    while (found := queue.get(0)) is not None:
        rest.append(found)
        queue.done(found)
    assert len(rest) == len(set(rest))
    assert owed <= set(rest) <= owed | later
