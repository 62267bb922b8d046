"""The other side of unified.py: the same prompts through transformers' continuous batching, in a process of its own.

Started by unified.py. A round is a line of JSON in, {"prompts": [[ids]], "output_lens": [n], "concurrency": c}, and one
out: a sample for each prompt, in their order. There is no HTTP here and no tokenizing: requests go straight into the
manager, which favours this side.

    python benchmarks/transformers_side.py MODEL THREADS CONTEXT CONCURRENCY
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

import numpy as np

REQUEST_TIMEOUT_S = 600.0


def start(model_path: str, threads: int, context: int, concurrency: int) -> Any:
    """A running ContinuousBatchingManager: its own defaults, but for a cache no larger than the load can use."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "auto" if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).eval()
    model.to(device)
    config = ContinuousBatchingConfig()
    config.num_blocks = concurrency * (-(-context // config.page_size) + 1)
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1)  # -1: answers do not end early
    manager = model.init_continuous_batching(generation_config=greedy, continuous_batching_config=config)
    manager.start()
    return manager


def closed_loop(
    manager: Any, prompts: list[list[int]], output_lens: list[int], concurrency: int
) -> list[dict[str, Any]]:
    """`concurrency` requests at a time until all have finished; times on this process's clock, in seconds."""
    starts: dict[str, tuple[int, float]] = {}
    samples: list[dict[str, Any]] = [{} for _ in prompts]
    waiting = iter(range(len(prompts)))

    def submit() -> None:
        number = next(waiting, None)
        if number is not None:
            name = f"{time.perf_counter_ns()}"
            starts[name] = number, time.perf_counter()
            manager.add_request(
                prompts[number], request_id=name, max_new_tokens=output_lens[number], record_timestamps=True
            )

    for _ in range(concurrency):
        submit()
    for _ in prompts:
        output = manager.get_result(timeout=REQUEST_TIMEOUT_S)
        if output is None or output.error:
            raise RuntimeError(f"transformers gave no answer: {getattr(output, 'error', 'timed out')}")
        number, start_s = starts[output.request_id]
        times = output.timestamps
        samples[number] = {
            "start_s": start_s,
            "latency_s": times[-1] - start_s,
            "ttft_s": times[0] - start_s,
            "itls_s": np.diff(times).tolist(),
            "prompt_tokens": len(output.prompt_ids),
            "output_tokens": len(output.generated_tokens),
            "output_ids": output.generated_tokens,
        }
        submit()
    return samples


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints is not an answer
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model_path, threads, context, concurrency = sys.argv[1], *map(int, sys.argv[2:5])
    manager = start(model_path, threads, context, concurrency)
    try:
        print("{}", file=answers, flush=True)
        for line in sys.stdin:
            samples = closed_loop(manager, **json.loads(line))
            print(json.dumps(samples), file=answers, flush=True)
    finally:
        manager.stop(block=True, timeout=30, hard_stop=True)


if __name__ == "__main__":
    main()
