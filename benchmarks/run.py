"""`make bench`: every benchmark, one after the other; results go to benchmarks/results/. Exit status 1 if one failed.

python benchmarks/run.py [NAME ...]
"""

from __future__ import annotations

import subprocess
import sys

import results
from programs import ROOT, STOP_TIMEOUT_S, end_on_sigterm

BENCHMARKS = {
    "unified": "--output",
    "disaggregated": "--output",
    "router": "--output",
    "api": "--output",
    "transfer": "--json",
    "operator_figures": "--output",
}  # file flag


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"no benchmark called {unknown[0]}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    end_on_sigterm()
    failed = []
    for name in names or BENCHMARKS:
        print(f"==== {name} ====", flush=True)
        command = [sys.executable, f"benchmarks/{name}.py", BENCHMARKS[name], str(results.path_of(name))]
        if run(command):
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def run(command: list[str]) -> int:
    """Run one script to its end; if this one is ended first, end it in order, with all it started."""
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
