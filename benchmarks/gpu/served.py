"""A real server of a benchmark's model, and batches of requests to it: one HTTP request, one wall-clock time."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np

from diptych.testing.processes import ServerProcess

START_TIMEOUT_S, REQUEST_TIMEOUT_S = 300.0, 300.0
Prompts = list[list[int]]


def serve_flags(folder: str, name: str, *more: str, rehearse: bool = False) -> list[str]:
    """`diptych serve` with dummy weights and no prefix cache; what is rehearsed runs on the CPU."""
    where = ["--device", "cpu", "--dtype", "float32"] if rehearse else ["--device", "cuda", "--dtype", "bfloat16"]
    what = ["--model-path", folder, "--served-model-name", name, "--load-format", "dummy", "--disable-radix-cache"]
    return ["serve", *what, *where, "--port", "0", "--enable-metrics", "--log-level", "warning", *more]


def draw(rng: np.random.Generator, lengths: Sequence[int], vocab: int) -> Prompts:
    """Prompts of random token ids."""
    return [[int(token) for token in rng.integers(vocab, size=length)] for length in lengths]


class Served:
    """One `diptych serve` or `route`; a context manager. `ready_s`: from the process's start until it was ready."""

    def __init__(self, flags: Sequence[str], env: dict[str, str] | None = None) -> None:
        self._started = time.perf_counter()
        self.process = ServerProcess(*flags, env=env)
        self.ready_s = 0.0

    def wait_ready(self) -> Served:
        self.process.wait_ready(START_TIMEOUT_S)
        self.ready_s = time.perf_counter() - self._started
        return self

    @property
    def url(self) -> str:
        return self.process.url

    def info(self) -> dict[str, Any]:
        found: dict[str, Any] = self.process.get("/server_info")
        return found

    def __enter__(self) -> Served:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            print(self.process.tail(), flush=True)
        self.process.stop()

    def seconds(self, prompts: Prompts, output_lens: Sequence[int]) -> float:
        """Greedy answers of exactly these lengths to all prompts, sent at once: from the request to the last byte.

        Raises RuntimeError if the server refuses or an answer has another length.
        """
        sampling = [{"temperature": 0.0, "max_new_tokens": length, "ignore_eos": True} for length in output_lens]
        body = json.dumps({"input_ids": prompts, "sampling_params": sampling}).encode()
        request = urllib.request.Request(f"{self.url}/generate", body, {"Content-Type": "application/json"})
        started = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as reply:
                answer = reply.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"HTTP {error.code}: {error.read(500).decode(errors='replace')}") from None
        seconds = time.perf_counter() - started
        got = [len(one["output_ids"]) for one in json.loads(answer)]
        if got != list(output_lens):
            raise RuntimeError(f"answers of {got} tokens, not {list(output_lens)}")
        return seconds
