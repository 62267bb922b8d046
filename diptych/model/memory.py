"""How many pages a rank's KV pool has: on a GPU, as many as its memory holds beside the weights and what a step needs.

What a step needs is reckoned from shapes before the first one runs, because graphs, which are captured against the
pool, must come after it:

    activations   tokens of a step * width * bytes of a number
    sampling      running requests * vocabulary * SAMPLING_BYTES, of which none is needed while layers run; but both are
                  counted, as memory that was freed in one size is not always found in another
    graphs        activations and logits of the largest captured step, whose memory smaller ones share; the logits of
                  every one, which outlive its replay; and GRAPH_BYTES each for its nodes
    the rest      REST_BYTES: workspaces of cuBLAS, kernels' code, attention's partial results, staging of transfers;
                  RANKS_BYTES more with several ranks: NCCL's buffers, which it takes when it first runs
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from diptych.config import ServerConfig
from diptych.errors import ConfigError
from diptych.model.decoder import Decoder

if TYPE_CHECKING:
    from diptych.model.graphs import Shape
    from diptych.model.load import Loaded

GIB = 1 << 30
DEFAULT_POOL_BYTES = 256 << 20  # on a CPU
MAX_DEFAULT_CONTEXTS = 64
# Of a row and a token of the vocabulary while rows are drawn: logits in 2 bytes (twice when ranks' parts are joined)
# and in 4, scaled logits and a selection of them in 4 each, three 8-byte numbers while noise is hashed.
SAMPLING_BYTES = 2 + 2 + 4 + 4 + 4 + 3 * 8
GRAPH_BYTES = 16 << 20
REST_BYTES = 1 * GIB
RANKS_BYTES = 1 * GIB


class GpuMemory(NamedTuple):
    """In bytes. `held`: by this process's tensors."""

    total: int
    free: int
    held: int


def kv_dtype(config: ServerConfig, weights: torch.dtype) -> torch.dtype:
    """The type of the KV pool. Raises ConfigError for one that attention does not read."""
    if config.kv_cache_dtype == "auto":
        return weights
    name = "float8_e4m3fn" if config.kv_cache_dtype == "fp8_e4m3" else config.kv_cache_dtype
    dtype: torch.dtype = getattr(torch, name)
    if dtype != weights and config.attention_backend == "torch":
        raise ConfigError(
            f"--attention-backend torch reads a KV cache of the weights' type only: leave --kv-cache-dtype "
            f"{config.kv_cache_dtype} out, or choose --dtype {str(dtype).removeprefix('torch.')} if it is one"
        )
    return dtype


def kv_page_bytes(num_heads: int, num_layers: int, head_dim: int, page_size: int, itemsize: int) -> int:
    """Bytes of one page of `num_heads` KV heads."""
    return num_heads * num_layers * 2 * page_size * head_dim * itemsize


def pool_pages(config: ServerConfig, page_bytes: int, loaded: Loaded) -> int:
    """How many pages each rank's pool has. On a GPU all ranks call this together, their weights loaded. Raises
    ConfigError."""
    if config.device == "cpu":
        return cpu_pages(config, page_bytes, loaded.info.context_len)
    captured: Sequence[Shape] = []
    if config.cuda_graph_max_bs and isinstance(loaded.model, Decoder):
        from diptych.model.graphs import shapes_of

        captured = shapes_of(config.cuda_graph_max_bs, loaded.model.layer_bytes)
    needed = step_bytes(config, loaded.width, loaded.dtype.itemsize, loaded.info.vocab_size, captured)
    memory = measure()
    pages = least(gpu_pages(config, page_bytes, memory, needed))
    check_pages(config, pages, page_bytes, memory, needed)
    return pages


def cpu_pages(config: ServerConfig, page_bytes: int, context_len: int) -> int:
    """`--max-total-tokens`, or what 256 MiB hold, but one context at least and 64 at most."""
    if config.max_total_tokens:
        return config.max_total_tokens // config.page_size
    per_context = -(-context_len // config.page_size)
    return min(max(DEFAULT_POOL_BYTES // page_bytes, per_context), MAX_DEFAULT_CONTEXTS * per_context)


def step_bytes(config: ServerConfig, width: int, itemsize: int, vocab_size: int, captured: Sequence[Shape]) -> int:
    """What a rank needs besides weights and pool; see above. `width`: numbers that a token has in a layer at once at
    most."""
    rows = config.max_running_requests
    tokens = max(config.chunked_prefill_size, rows + config.page_size)
    needed = tokens * width * itemsize + rows * vocab_size * SAMPLING_BYTES
    if captured:
        needed += max(shape.tokens for shape in captured) * width * itemsize
        sampled = [shape.rows for shape in captured]
        needed += (2 * max(sampled) + sum(sampled)) * vocab_size * itemsize + len(captured) * GRAPH_BYTES
    return needed + REST_BYTES + (RANKS_BYTES if config.num_ranks > 1 else 0)


def gpu_pages(config: ServerConfig, page_bytes: int, memory: GpuMemory, needed: int) -> int:
    """Pages for which there is room. A fraction that was asked for stands, whatever a step needs."""
    room = memory.free - needed
    if config.mem_fraction_static:
        room = min(int(config.mem_fraction_static * memory.total) - memory.held, memory.free)
    pages = max(0, room // page_bytes)
    return min(pages, config.max_total_tokens // config.page_size) if config.max_total_tokens else pages


def check_pages(config: ServerConfig, pages: int, page_bytes: int, memory: GpuMemory, needed: int) -> None:
    """Raise ConfigError if not every running request can have a page, unless no more were asked for."""
    asked = config.max_total_tokens // config.page_size or config.max_running_requests
    if pages >= min(config.max_running_requests, asked):
        return
    sizes = f"of {_gib(memory.total)} GiB, weights take {_gib(memory.held)}, {_gib(memory.free)} are free"
    if config.mem_fraction_static:
        change = "raise --mem-fraction-static, or lower --max-running-requests"
    else:
        sizes += f", and a step needs {_gib(needed)}"
        change = "lower --max-running-requests or --chunked-prefill-size"
    raise ConfigError(
        f"the GPU's memory has room for {pages} KV pages of {page_bytes >> 10} KiB, less than one for each of "
        f"{config.max_running_requests} requests ({sizes}): {change}, or split the model over more GPUs with --tp"
    )


def measure() -> GpuMemory:
    """The current GPU's memory, once all that was enqueued is done and what was freed is given back."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return GpuMemory(total, free, torch.cuda.memory_allocated())


def least(pages: int) -> int:
    """The least of all ranks' numbers: a page's number holds on every rank."""
    if not dist.is_initialized():
        return pages
    number = torch.tensor(pages, device="cuda")
    dist.all_reduce(number, dist.ReduceOp.MIN)
    return int(number)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"
