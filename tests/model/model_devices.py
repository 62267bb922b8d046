"""What the suites run on: the CPU of any machine, and its GPU if it has one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

# Settings by device; on a GPU few graphs, as each takes time to capture. The pool's size is for the test to say.
SETTINGS: dict[str, dict[str, Any]] = {"cpu": {"device": "cpu"}, "cuda": {"device": "cuda", "cuda_graph_max_bs": 8}}
BACKENDS: dict[str, dict[str, Any]] = {
    "cpu": SETTINGS["cpu"],
    "cuda, triton": {**SETTINGS["cuda"], "attention_backend": "triton"},
    "cuda, torch": {"device": "cuda", "attention_backend": "torch"},
}
BACKENDS = {name: settings for name, settings in BACKENDS.items() if settings["device"] in DEVICES}

# For the processes of ranks on a CPU: a machine without a GPU, on which this package is found wherever it lies.
CPU_PROCESS = {
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))),
    "TRITON_INTERPRET": "1",
}
