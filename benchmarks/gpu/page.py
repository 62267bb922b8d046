"""Fills docs/gpu.md from the results: tables between its markers, plots into docs/plots/. No number is typed by hand.

    python -m benchmarks.gpu.page [--chip nvidia-h200] [--check]

`--check` writes nothing and exits 1 if the page or a plot is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu import svg, tables
from benchmarks.gpu.tables import Results

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE, PLOTS = ROOT / "benchmarks" / "results", ROOT / "docs" / "gpu.md", ROOT / "docs" / "plots"
BLOCK = re.compile(r"(<!-- filled: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

TABLES: dict[str, Callable[[Results], str]] = {
    "qwen3-32b": lambda results: tables.engine_table(results, "Qwen3-32B", 1),
    "qwen3-32b-tp2": lambda results: tables.engine_table(results, "Qwen3-32B", 2),
    "qwen3-8b": lambda results: tables.engine_table(results, "Qwen3-8B", 1),
    "qwen3-0.6b": lambda results: tables.engine_table(results, "Qwen3-0.6B", 1),
    "variants": tables.variants_table,
    "first": tables.first_table,
    "tail": tables.tail_table,
    "goodput": tables.goodput_table,
    "profile": tables.profile_table,
}


def load(chip: str, folder: Path = RESULTS) -> Results:
    """Results of GPU benchmarks on one kind of GPU, by their files' names without it."""
    paths = sorted(folder.glob(f"gpu-*-{chip}.json"))
    return {path.stem.removesuffix(f"-{chip}"): json.loads(path.read_text()) for path in paths}


def fill(page: str, results: Results) -> str:
    """`page` with every marked block made anew. Raises KeyError for a mark that names no table."""
    return BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]](results)}{block[3]}", page)


def plots(results: Results) -> dict[str, str]:
    """SVG by file name."""
    made = {}
    for model in ("Qwen3-32B", "Qwen3-0.6B"):
        for unit, name, what in (("ms", "tpot", "TPOT"), ("tok/s", "prefill", "prefill")):
            lines = [line for line in tables.engine_lines(results, model, 1) if line.unit == unit]
            groups = [
                svg.Group(line.what, (line.ours, line.beside.peer, line.beside.floor), line.beside.target)
                for line in lines
            ]
            title = f"{model}, {what}, one GPU ({'less' if unit == 'ms' else 'more'} is better)"
            file = f"{name}-{model.lower()}.svg"
            made[file] = svg.bars(title, unit, ("Diptych", "vLLM 0.25.1", "floor"), groups)
    return made | {"tail.svg": tail_plot(results), "goodput.svg": goodput_plot(results)}


def tail_plot(results: Results) -> str:
    groups = []
    for model, topology, result in tables.served(results):
        found = result.get("tail")
        values = tuple(found["beside"][key] if found else None for key in ("p50", "p99", "max"))
        groups.append(svg.Group(f"{model}, {topology}", values))
    title = "ITL of 32 running streams while prompts of 4k to 16k tokens arrive without pause"
    return svg.bars(title, "ms", ("median", "p99", "longest"), groups)


def goodput_plot(results: Results) -> str:
    lines = []
    for model, topology, result in tables.served(results):
        if model == "Qwen3-32B" and "goodput" in result:
            points = tuple((run["rate"], 100 * run["share_met"]) for run in result["goodput"]["runs"])
            lines.append(svg.Line(topology, points))
    return svg.lines("Qwen3-32B: requests within the limits", "requests/s", "% of requests", lines, mark=90)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="nvidia-h200", help="as the names of the results end")
    parser.add_argument("--check", action="store_true", help="only say whether everything is up to date")
    args = parser.parse_args()
    results = load(args.chip)
    wanted = {PAGE: fill(PAGE.read_text(), results)}
    wanted |= {PLOTS / name: text for name, text in plots(results).items()}
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}{' is not up to date' if args.check else ''}")
        if not args.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path])
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
