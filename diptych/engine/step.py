"""One step of the model, and what is left of it when its forward pass fails."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Protocol

from diptych.errors import DiptychError, EngineBroken
from diptych.types import Plan, RowResult, StepResult

log = logging.getLogger(__name__)


class Device(Protocol):
    """What runs plans, in the order in which they are launched."""

    @property
    def overlaps(self) -> bool:
        """A second step may be launched while the first is not collected; it is computed right after the first."""

    def launch(self, plan: Plan) -> Any:
        """Hand a plan over and return at once. What goes wrong, `collect` tells.

        In `plan.token_ids`, -1 - r is the token that row r of the plan launched just before samples.
        """

    async def collect(self, launched: Any) -> StepResult:
        """Wait for the oldest step not collected yet. Raises what computing it raised; EngineBroken: never go on."""


@dataclass(frozen=True, slots=True)
class Step:
    """One in flight. `refused`: requests whose grammar gave up, and why; their rows mean nothing."""

    plan: Plan
    launched: Any
    refused: list[tuple[str, DiptychError]]


async def collect(device: Device, step: Step, watchdog_s: float) -> StepResult | None:
    """The step's result; None if it failed. Raises EngineBroken if it takes longer than `watchdog_s`, or if the ranks
    are out of step after it."""
    plan = step.plan
    try:
        async with asyncio.timeout(watchdog_s):
            return await device.collect(step.launched)
    except TimeoutError:
        raise EngineBroken(f"a step took longer than --watchdog-timeout ({watchdog_s:g} s)") from None
    except EngineBroken:
        log.exception("step %d failed", plan.step)
        raise
    except Exception:
        rids = [row.rid for row in plan.rows]
        log.exception("step %d failed with %d requests: %s", plan.step, len(rids), ", ".join(rids))
        return None


async def run_rows(
    device: Device, plan: Plan, parts: list[Plan | None], watchdog_s: float
) -> tuple[StepResult, list[str]]:
    """What is left of `plan`, which failed: its rows, run one by one. `parts` is what `sched.rows.split` made of it.

    Returns the result, and the requests that fail even alone: their rows sampled nothing. What a failed pass has stored
    does no harm: the same slots are written again before they are read. Nothing else may be in flight. Raises
    EngineBroken as `collect` does.
    """
    results: list[RowResult] = []
    failed: list[str] = []
    duration_s = 0.0
    for row, part in zip(plan.rows, parts, strict=True):
        result = None
        if part is not None and len(parts) > 1:
            result = await collect(device, Step(part, device.launch(part), []), watchdog_s)
        if result is not None:
            duration_s += result.duration_s
        elif part is not None:
            failed.append(row.rid)
        results.append(RowResult(-1) if result is None else result.rows[0])
    return StepResult(rows=results, duration_s=duration_s), failed
