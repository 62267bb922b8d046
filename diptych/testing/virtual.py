"""A virtual-time event loop: when nothing is ready, its clock jumps to the next timer.

A simulation of hours takes as long as its computations, two runs with the same seeds are the same run, and a wait that
nothing will ever end is an error instead of a hang.
"""

from __future__ import annotations

import asyncio
import inspect
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


class VirtualLoop(asyncio.BaseEventLoop):
    """For code that waits only through asyncio: no sockets, no threads.

    Executors run their work at once, in place. Work that takes virtual time is a coroutine function.
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
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    def _process_events(self, event_list: list[Any]) -> None:
        return None

    def _write_to_self(self) -> None:
        return None


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
