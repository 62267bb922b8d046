"""One thread: what the servers of a small machine use, and what their neighbours in a test run can bear."""

from __future__ import annotations

import torch
import transformers

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()
