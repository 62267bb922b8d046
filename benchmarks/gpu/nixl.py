"""Pages from one GPU to another over NIXL: right, and how fast; the copies of `benchmarks.gpu.ipc`.

    python -m benchmarks.gpu.nixl [--json FILE]

Two processes of one host, each with a pool shaped as Qwen3-32B's; UCX chooses the way (on one host CUDA's handles and
NVLink). With one GPU both sit on it. Across hosts, start a prefill and a decode server with
`--disaggregation-transfer-backend nixl` and look at `kv_transfer_speed_gb_s`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.gpu import ipc
from benchmarks.results import write
from diptych.transfer.nixl import NixlTransport


def lender() -> None:
    """Lends a filled pool until the end of its input."""
    store, memory = ipc.new_store(0)
    words = memory.view(torch.int32)
    for start in range(0, memory.nbytes, ipc.CHECK_BYTES):
        size = min(ipc.CHECK_BYTES, memory.nbytes - start)
        words[start // 4 : (start + size) // 4] = ipc.pattern(start, size, memory.device)
    torch.cuda.synchronize()
    lending = NixlTransport().lending(store)
    with lending.serving():
        ipc.say(handle=lending.lend().hex(), num_bytes=memory.nbytes)
        sys.stdin.read()


def borrower(lent: dict[str, Any]) -> list[dict[str, Any]]:
    """Copies out of that pool; every byte that was copied is compared, and no other may have changed."""
    store, memory = ipc.new_store(torch.cuda.device_count() - 1)
    memory.fill_(ipc.POISON)
    torch.cuda.synchronize()
    started = time.perf_counter()
    lending = NixlTransport().lending(store)
    rows: list[dict[str, Any]] = [{"what": "register", "ms": ipc.ms(started)}]
    pool = lending.borrow(bytes.fromhex(lent["handle"]), lent["num_bytes"])
    for share in ipc.SHARES:
        for scattered in (False, True):
            for tokens in (1024, 4096, 16384):
                copies = ipc.plan(share, tokens, scattered)
                pool.copy(copies)
                row = {"what": share, "tokens": tokens, "scattered": scattered}
                rows.append(row | {"wrong_bytes": ipc.wrong_bytes(memory, copies)} | ipc.timed(pool, copies))
                print(*(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
                memory.fill_(ipc.POISON)
                torch.cuda.synchronize()
    pool.close()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", default="", help="where results go (default: benchmarks/results/)")
    args = parser.parse_args()
    if args.child:
        lender()
        return 0
    command = [sys.executable, "-m", "benchmarks.gpu.nixl", "--child"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        rows = borrower(json.loads(child.stdout.readline()))
        child.stdin.close()
    print(write("gpu-nixl", {"rows": rows}, args.json).name)
    return int(any(row.get("wrong_bytes") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
