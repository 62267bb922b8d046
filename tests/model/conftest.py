"""One thread: what the servers of a small machine use, and what their neighbours in a test run can bear. Products of
float32 in float32, whatever the environment says of TF32. Without a GPU, Triton kernels run in its interpreter, which
must be known before they are imported."""

from __future__ import annotations

import os

import torch
import transformers

torch.set_num_threads(1)
torch.set_float32_matmul_precision("highest")
transformers.logging.disable_progress_bar()
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
