"""What a runner computes with on a GPU: the decoder with fused kernels, Triton attention, CUDA graphs of steps.

Imported only where Triton is used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diptych.config import ServerConfig
from diptych.errors import ConfigError
from diptych.model.attention_tiles import PLAIN_TILES
from diptych.model.decoder import Decoder
from diptych.model.fused_decoder import FusedDecoder
from diptych.model.graphs import StepGraphs
from diptych.model.kernels.fixed import fixed_product
from diptych.model.pool import KVPool
from diptych.model.selftest import attention_is_exact, products_are_exact
from diptych.model.triton_attention import TritonAttention


def fuse(config: ServerConfig, model: Any, pool: KVPool) -> tuple[Any, TritonAttention]:
    """The model (see CausalModel) as it runs on a GPU, and the attention that it is run with. Raises ConfigError for
    shapes that the kernels do not take."""
    fixed = config.deterministic
    if fixed and not isinstance(model, Decoder):
        raise ConfigError("--deterministic on a GPU is for the models that we compute ourselves; leave it out")
    if not isinstance(model, Decoder):
        return model, TritonAttention(pool, model.num_heads, model.scale, tiles=PLAIN_TILES)
    return FusedDecoder(model, fixed=fixed), TritonAttention(pool, model.num_heads, model.scale, fixed=fixed)


@torch.inference_mode()
def is_exact(model: Any, attention: TritonAttention, dtype: torch.dtype) -> bool:
    """Whether rows do not depend on the batch, as far as the self-test can tell: only ever in deterministic mode."""
    if not attention.fixed or not isinstance(model, FusedDecoder):
        return False
    layer, pool = model.decoder.layers[0], attention.pool
    weights = [linear.weight.shape for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    backend = partial(TritonAttention, num_heads=model.num_heads, scale=model.scale, fixed=True)
    device = pool.pages.device.type
    shape = (model.num_heads, model.num_kv_heads, pool.head_dim, pool.page_size)
    return products_are_exact(
        [(k, n) for n, k in weights], dtype, device, lambda weight: partial(fixed_product, weight=weight), int
    ) and attention_is_exact(*shape, dtype, device, backend, pool.pages.dtype)


@torch.inference_mode()
def capture(
    config: ServerConfig,
    model: Any,
    attention: TritonAttention,
    last: Tensor,
    context_len: int,
    progress: Callable[[str], None],
) -> StepGraphs | None:
    """Graphs of steps, unless the settings or the model do not want them. `last`: see StepGraphs."""
    if not config.cuda_graph_max_bs:
        return None
    if not isinstance(model, FusedDecoder):
        progress("graphs: none, this model's steps cannot be captured")
        return None
    pool = attention.pool
    num_tokens = pool.pages.shape[0] * pool.page_size  # sequences that share pages can have more
    pages = -(-context_len // pool.page_size)
    graphs = StepGraphs(model, attention, last, config.cuda_graph_max_bs, pages, num_tokens)
    graphs.capture(progress)
    return graphs
