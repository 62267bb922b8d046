"""Results to tables: pure. What was not measured says so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu import reference
from benchmarks.gpu.reference import Beside
from benchmarks.gpu.svg import MISSING, number
from benchmarks.gpu.topology import parse

Result = dict[str, Any]
Results = dict[str, Result]  # by the benchmark's name; all of one kind of GPU

SERVED = [  # what the issue asks for, in order; the topologies of a group have the same number of GPUs
    ("Qwen3-32B", "u"),
    ("Qwen3-32B", "u+u"),
    ("Qwen3-32B", "p+d"),
    ("Qwen3-8B", "u+u"),
    ("Qwen3-8B", "p+d"),
    ("Qwen3-32B", "u+u+u+u"),
    ("Qwen3-32B", "p+p+d2"),
]


@dataclass(frozen=True)
class Line:
    """A figure of a server beside what it is compared with. `less`: the smaller, the better."""

    what: str
    unit: str
    less: bool
    beside: Beside
    ours: float | None

    @property
    def reached(self) -> str:
        if self.ours is None or self.beside.target is None:
            return "–"
        met = self.ours <= self.beside.target if self.less else self.ours >= self.beside.target
        return "yes" if met else "**no**"


def engine_name(model: str, tp: int, label: str = "") -> str:
    return "-".join(["gpu-engine", model.lower(), f"tp{tp}", *([label] if label else [])])


def engine_lines(results: Results, model: str, tp: int) -> list[Line]:
    """Everything that the reference has for this model, and whatever else was measured."""
    rows = results.get(engine_name(model, tp), {}).get("rows", [])

    def cells(table: dict[Any, Any], kind: str, keys: tuple[str, ...]) -> list[Any]:
        wanted = [key[2:] for key in table if key[:2] == (model, tp)]
        found = [tuple(row[key] for key in keys) for row in rows if row.get("kind") == kind]
        return wanted + [cell for cell in found if cell not in wanted]

    def ours(**told: Any) -> float | None:
        match = [row["value"] for row in rows if all(row.get(key) == value for key, value in told.items())]
        return match[0] if match else None

    lines = [
        Line(
            f"TPOT, batch {batch}, context {context:,}",
            "ms",
            True,
            reference.tpot(model, tp, batch, context),
            ours(kind="tpot", batch=batch, context=context),
        )
        for batch, context in cells(reference.TPOT_MS, "tpot", ("batch", "context"))
    ]
    lines += [
        Line(
            f"prefill, {count} × {length:,}",
            "tok/s",
            False,
            reference.prefill(model, tp, count, length),
            ours(kind="prefill", count=count, length=length),
        )
        for count, length in cells(reference.PREFILL_TOK_S, "prefill", ("count", "length"))
    ]
    names = {"fixed": "256 × (128 → 512)", "mix": "256 × (100–1,024 → 100–1,024)"}
    lines += [
        Line(names[load], "output tok/s", False, reference.output(model, tp, load), ours(kind="output", load=load))
        for (load,) in cells(reference.OUTPUT_TOK_S, "output", ("load",))
    ]
    ready = ours(kind="ready")
    if ready is not None or (model, tp) in reference.READY_TARGET_S:
        lines.append(Line("start to ready", "s", True, reference.ready(model, tp), ready))
    return lines


def engine_table(results: Results, model: str, tp: int) -> str:
    lines = engine_lines(results, model, tp)
    if not lines:
        return f"{MISSING}\n"
    body = [
        [
            *(line.what, line.unit, _cell(line.beside.floor), _cell(line.beside.peer)),
            *(_ours(line.ours), _target(line), line.reached),
        ]
        for line in lines
    ]
    note = machine_note([results.get(engine_name(model, tp))])
    return markdown(["", "unit", "floor", "vLLM 0.25.1", "Diptych", "target", "reached"], body) + note


def _target(line: Line) -> str:
    return "–" if line.beside.target is None else f"{'≤' if line.less else '≥'} {line.beside.target:,g}"


def variants_table(results: Results) -> str:
    """Runs with flags of their own (`--label`) beside those without."""
    body, used = [], []
    for name, result in sorted(results.items()):
        if not name.startswith("gpu-engine-") or not result.get("label"):
            continue
        plain = results.get(engine_name(result["model"], result["tp"]), {})
        base = {row["what"]: row.get("value") for row in plain.get("rows", [])}
        used += [result, plain]
        for row in result["rows"]:
            if "value" in row:
                ours, other = row["value"], base.get(row["what"])
                change = f"{ours / other - 1:+.1%}" if other else "–"
                flags = f"`{' '.join(result['flags'])}`" if result["flags"] else result["label"]
                body.append([result["model"], flags, row["what"], row["unit"], number(ours), _cell(other), change])
    if not body:
        return f"{MISSING}\n"
    return markdown(["model", "flags", "", "unit", "with", "without", "change"], body) + machine_note(used)


def serve_name(model: str, topology: str) -> str:
    return f"gpu-serve-{model.lower()}-{topology.replace('+', '-')}"


def served(results: Results) -> list[tuple[str, str, Result]]:
    """By topology, what runs with the labels `latency`, `goodput…` and one without found: of the latter all rates."""
    joined = []
    for model, topology in SERVED:
        name = serve_name(model, topology)
        parts = [part for each, part in sorted(results.items()) if each in (name, f"{name}-latency")]
        parts += [part for each, part in sorted(results.items()) if each.startswith(f"{name}-goodput")]
        result = {key: value for part in parts for key, value in part.items()}
        if runs := [run for part in parts for run in part.get("goodput", {}).get("runs", ())]:
            result["goodput"] = result["goodput"] | {"runs": sorted(runs, key=lambda run: run["rate"])}
        joined.append((model, topology, result))
    return joined


def _highest(goodput: Result) -> float:
    return max((run["rate"] for run in goodput["runs"] if run["holds"]), default=0.0)


def gpus(topology: str) -> int:
    return sum(part.tp for part in parse(topology))


def goodput_table(results: Results) -> str:
    found = [(model, topology, result.get("goodput")) for model, topology, result in served(results)]
    rates = {(model, topology): _highest(goodput) for model, topology, goodput in found if goodput}
    body = []
    for model, topology, goodput in found:
        if topology == "u":
            continue
        cells = [model, str(gpus(topology)), f"`{topology}`"]
        if not goodput:
            body.append([*cells, MISSING, "", "", ""])
            continue
        runs, highest = goodput["runs"], _highest(goodput)
        unified = rates.get((model, "+".join("u" * gpus(topology))), 0.0)
        times = "–" if not unified or "d" not in topology else f"{highest / unified:.2f} ×"
        late = "yes" if any(run["client_bottleneck"] for run in runs) else "no"
        best = next((run for run in reversed(runs) if run["rate"] == highest), None)
        tail = f"{number(best['p99_ttft_ms'])} / {number(best['p99_itl_ms'])}" if best else "–"
        fails = min((run["rate"] for run in runs if not run["holds"] and run["rate"] > highest), default=None)
        body.append([*cells, number(highest), _cell(fails), times, tail, late])
    head = ["model", "GPUs", "servers", "highest rate that holds, requests/s", "next that fails", "against unified"]
    head += ["TTFT / ITL p99 there, ms", "client late"]
    used = [result for *_, result in served(results) if "goodput" in result]
    return markdown(head, [row + [""] * (len(head) - len(row)) for row in body]) + machine_note(used)


def tail_table(results: Results) -> str:
    body = []
    for model, topology, result in served(results):
        found = result.get("tail")
        if found is None:
            body.append([model, f"`{topology}`", MISSING, "", "", "", ""])
            continue
        alone, beside, long = found["alone"], found["beside"], found["long_ttft_ms"]
        ttft = f"{number(long['p50'])} / {number(long['p99'])}" if long else "–"
        three = " / ".join(number(beside[key]) for key in ("p50", "p99", "max"))
        two = " / ".join(number(alone[key]) for key in ("p50", "p99"))
        ratio = f"{found['p99_over_median']:.2f} ×"
        body.append([model, f"`{topology}`", two, three, ratio, ttft, number(found["client_p99_lag_ms"])])
    head = ["model", "servers", "alone, p50 / p99, ms", "beside long prompts, p50 / p99 / max, ms", "p99 / p50 beside"]
    head += ["TTFT of the long prompts, p50 / p99, ms", "client's lag p99, ms"]
    return markdown(head, body) + machine_note(result for *_, result in served(results) if "tail" in result)


def first_table(results: Results) -> str:
    body = []
    for model, topology, result in served(results):
        if not result.get("first"):
            body.append([model, f"`{topology}`", MISSING, "", "", "", ""])
        for found in result.get("first", []):
            row = [f"{found['length']:,}", number(found["ttft_ms"]), number(found["compute_ms"])]
            row += [f"{found['over_compute']:+.1%}", _cell(found.get("mean_kv_transfer_latency_ms"))]
            body.append([model, f"`{topology}`", *row])
    head = ["model", "servers", "prompt, tokens", "TTFT, ms", "prefill's compute, ms", "TTFT over compute"]
    note = machine_note(result for *_, result in served(results) if result.get("first"))
    return markdown([*head, "first to last page, ms"], body) + note


def profile_table(results: Results) -> str:
    body, used = [], []
    for name, result in sorted(results.items()):
        if not name.startswith("gpu-profile-"):
            continue
        used.append(result)
        model = " ".join(filter(None, [result["model"], result["label"]]))
        for found in result["profiles"]:
            if "kernels" in found:
                times = [number(found[key]) for key in ("step_ms", "busy_ms")]
                gaps = [f"{found['idle_share']:.1%}", number(found["longest_gap_us"]), number(found["launch_us"])]
                body.append([model, found["what"], *times, *gaps, _largest(found["kernels"])])
    if not body:
        return f"{MISSING}\n"
    head = ["model", "step", "time, ms", "kernels ran, ms", "idle, profiled", "longest gap, µs"]
    return markdown([*head, "launch on the CPU, µs", "largest kernels"], body) + machine_note(used)


def _largest(kernels: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"`{one['kernel'][:40].replace('|', '/')}` {one['share']:.0%}" for one in kernels[:3])


# ---- words ---------------------------------------------------------------------------------------------------------


def _cell(value: float | None) -> str:
    return "–" if value is None else number(value)


def _ours(value: float | None) -> str:
    return MISSING if value is None else f"**{number(value)}**"


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def machine_note(used: Iterable[Result | None]) -> str:
    """What the figures were taken on, one line a machine."""
    lines: dict[str, None] = {}
    for result in used:
        if result and "machine" in result:
            machine = result["machine"]
            chips = sorted({gpu.split(",")[0] for gpu in machine["gpus"]})
            count = f"{len(machine['gpus'])} × {', '.join(chips)}" if chips else "no GPU"
            host = f"{machine['cpu']}, {machine['cores']:g} cores"
            torch = machine["packages"].get("torch", "?")
            lines[f"{count}; {host}; torch {torch}; {machine['date'][:10]}"] = None
    return "".join(f"\nTaken on {line}.\n" for line in lines)
