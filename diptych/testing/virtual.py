"""A virtual-time event loop: when nothing is ready, its clock jumps to the next timer.

A simulation of hours takes as long as its computations, two runs with the same seeds are the same run, and a wait that
nothing will ever end is an error instead of a hang.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(RuntimeError):
    """Every task waits for something, and no timer is left that could end a wait."""


class _Clock:
    """Stands where an event loop has its selector: asked to wait, it moves the time on."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Deadlock("every task waits, and no timer is left")
        if timeout > 0:
            self.now_s += timeout
        return []

    def close(self) -> None:
        return None


class LateExecutor(Executor):
    """Does its work some virtual seconds after it was given, on a VirtualLoop; with probability `late_p` much later."""

    def __init__(
        self, rng: random.Random, delay_s: tuple[float, float], late_p: float, late_s: tuple[float, float]
    ) -> None:
        self._rng = rng
        self._delay_s = delay_s
        self._late_p, self._late_s = late_p, late_s

    def draw_delay(self) -> float:
        return self._rng.uniform(*(self._late_s if self._rng.random() < self._late_p else self._delay_s))


class VirtualLoop(asyncio.BaseEventLoop):
    """For code that waits only through asyncio: no sockets, no threads.

    Executors other than LateExecutor run their work at once, in place; a coroutine function takes its own time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._selector = self._clock = _Clock()
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._clock.now_s

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        if inspect.iscoroutinefunction(func):
            return self.create_task(func(*args))
        done: asyncio.Future[T] = self.create_future()
        if isinstance(executor, LateExecutor):
            self.call_later(executor.draw_delay(), _carry_out, done, func, args)
        else:
            _carry_out(done, func, args)
        return done

    def _process_events(self, event_list: list[Any]) -> None:
        return None

    def _write_to_self(self) -> None:
        return None


def _carry_out(done: asyncio.Future[T], func: Callable[..., T], args: tuple[Any, ...]) -> None:
    """As a thread would: also if nobody waits any more."""
    try:
        result = func(*args)
    except Exception as error:
        if not done.cancelled():
            done.set_exception(error)
    else:
        if not done.cancelled():
            done.set_result(result)


def run_virtual(work: Coroutine[Any, Any, T]) -> T:
    """Like asyncio.run, in virtual time starting at 0. Raises Deadlock where a real loop would hang.

    An exception that no task handled (reported to the loop's exception handler) is raised at the end.
    """
    unhandled: list[BaseException] = []

    def on_unhandled(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        unhandled.append(context.get("exception") or RuntimeError(context["message"]))

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.get_loop().set_exception_handler(on_unhandled)
        result = runner.run(work)
    if unhandled:
        raise unhandled[0]
    return result
