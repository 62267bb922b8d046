"""One step of the model, and what is left of it when its forward pass fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from diptych.errors import EngineBroken
from diptych.sched.rows import split
from diptych.types import Plan, RowResult, StepResult

log = logging.getLogger(__name__)

Compute = Callable[[Plan], Awaitable[StepResult]]


async def run_step(compute: Compute, plan: Plan, watchdog_s: float) -> tuple[StepResult, list[str]]:
    """Run the plan; if it fails, run its rows one by one. Returns the result, and the requests that fail even alone:
    their rows sampled nothing.

    What a failed pass has stored does no harm: the same slots are written again before they are read. Raises
    EngineBroken if a pass takes longer than `watchdog_s`, or if the ranks are out of step after it.
    """
    whole = await _run(compute, plan, watchdog_s)
    if whole is not None:
        return whole, []
    alone = [await _run(compute, part, watchdog_s) for part in split(plan)] if len(plan.rows) > 1 else [None]
    result = StepResult(
        rows=[RowResult(-1) if part is None else part.rows[0] for part in alone],
        duration_s=sum(part.duration_s for part in alone if part is not None),
    )
    return result, [row.rid for row, part in zip(plan.rows, alone, strict=True) if part is None]


async def _run(compute: Compute, plan: Plan, watchdog_s: float) -> StepResult | None:
    """One forward pass; None if it fails."""
    try:
        async with asyncio.timeout(watchdog_s):
            return await compute(plan)
    except TimeoutError:
        raise EngineBroken(f"a step took longer than --watchdog-timeout ({watchdog_s:g} s)") from None
    except EngineBroken:
        log.exception("step %d failed", plan.step)
        raise
    except Exception:
        rids = [row.rid for row in plan.rows]
        log.exception("step %d failed with %d requests: %s", plan.step, len(rids), ", ".join(rids))
        return None
