"""Where results go, and in what form: one JSON file for each benchmark and kind of machine."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.bench.machine import describe_machine

FOLDER = Path(__file__).resolve().parent / "results"
KEPT = (  # of all the figures of a run, those that a comparison is made on
    *("completed", "failed", "duration", "total_input_tokens", "total_output_tokens", "output_throughput"),
    *("mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "median_tpot_ms"),
    *("mean_itl_ms", "median_itl_ms", "p90_itl_ms", "p95_itl_ms", "p99_itl_ms", "max_itl_ms"),
)


def kept(figures: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in _pick(figures)}


def _pick(figures: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(key, figures[key]) for key in KEPT]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of a figure over the rounds."""
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def settings(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The flags of a run that belong to its figures."""
    return {key: value for key, value in vars(args).items() if key not in ("model", "output")} | {
        "model": Path(args.model).name,
        **more,
    }


def path_of(name: str) -> Path:
    """Where a benchmark's results of this kind of machine are kept."""
    machine = describe_machine()
    chip = machine["gpus"][0].partition(",")[0] if machine["gpus"] else f"{machine['cpu']} {machine['cores']:g} cores"
    return FOLDER / f"{name}-{re.sub(r'[^a-z0-9]+', '-', chip.lower()).strip('-')}.json"


def write(name: str, result: dict[str, Any], output: str = "") -> Path:
    """Write `result`, the machine and its load to `output` or, without one, to `path_of(name)`. Returns the path."""
    machine = {**describe_machine(), "load_average": [round(load, 2) for load in os.getloadavg()]}
    path = Path(output) if output else path_of(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, "machine": machine, **result}, indent=1) + "\n")
    return path
