"""Flags that users of SGLang and vLLM bring along and that a server does not have: what to do instead.

They are refused like any unknown flag; this table is what the error adds.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_NOT_YET = "not yet (see README, Not yet); leave it out"
_ONE_MACHINE = "a server runs on one machine; leave it out"

INSTEAD = {
    "--block-size": "--page-size",
    "--data-parallel-size": _NOT_YET,
    "--disaggregation-ib-device": "nixl finds the devices itself; leave it out",
    "--dist-init-addr": _ONE_MACHINE,
    "--dp": _NOT_YET,
    "--dp-size": _NOT_YET,
    "--enable-mixed-chunk": "steps always mix prompts and answers; leave it out",
    "--enforce-eager": "--disable-cuda-graph",
    "--gpu-memory-utilization": "--mem-fraction-static",
    "--log-level-http": "--log-level",
    "--log-requests": "--log-level debug",
    "--lora-paths": _NOT_YET,
    "--max-model-len": "--context-length",
    "--max-num-batched-tokens": "--chunked-prefill-size",
    "--max-num-seqs": "--max-running-requests",
    "--max-prefill-tokens": "--chunked-prefill-size",
    "--nnodes": _ONE_MACHINE,
    "--node-rank": _ONE_MACHINE,
    "--quantization": _NOT_YET,
    "--schedule-conservativeness": "--num-reserved-decode-tokens",
    "--seed": "--random-seed",
    "--skip-server-warmup": "there is no warm-up; leave it out",
    "--speculative-algorithm": _NOT_YET,
    "--tokenizer": "--tokenizer-path",
    "--trust-remote-code": "a model's own code is never run; leave it out",
}


def explain(unknown: Iterable[str], known: Iterable[str]) -> str:
    """One line about all `unknown` flags, each with what to do instead where that is known."""
    names = list(known)
    parts = []
    for flag in dict.fromkeys(unknown):
        close = [] if flag in INSTEAD else difflib.get_close_matches(flag, names, n=1, cutoff=0.8)
        hint = INSTEAD.get(flag) or (f"did you mean {close[0]}?" if close else "")
        parts.append(f"{flag} ({hint})" if hint else flag)
    return f"unknown flag{'s' if len(parts) > 1 else ''} {', '.join(parts)}"
