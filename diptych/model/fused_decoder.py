"""The decoder's forward pass on a GPU: the same layers, with our kernels between the products, and for them where they
are faster than cuBLAS. The reference is Decoder.
"""

from __future__ import annotations

from torch import Tensor

from diptych.model.decoder import Decoder, Layer
from diptych.model.kernels.fixed import fixed_product
from diptych.model.kernels.fused import add_norm, silu_mul
from diptych.model.kernels.matmul import product, product_parts, wins
from diptych.model.layers import Linear, RMSNorm
from diptych.model.triton_attention import TritonAttention


class FusedDecoder:
    """See CausalModel. Runs the weights of `decoder`; enqueues work and never waits for it. `fixed`: by products whose
    rows do not depend on one another."""

    def __init__(self, decoder: Decoder, *, fixed: bool = False) -> None:
        self.decoder, self._fixed = decoder, fixed
        self.num_heads, self.num_kv_heads = decoder.num_heads, decoder.num_kv_heads
        self.num_layers, self.scale = decoder.num_layers, decoder.scale
        self._eps = decoder.config.norm_eps
        self._cos, self._sin = decoder.cos.squeeze(1), decoder.sin.squeeze(1)
        # After its last layer a stage but the first has nothing to norm; add_norm is then done for its sum alone.
        self._final = decoder.ends.norm if decoder.ends is not None else decoder.layers[-1].mlp_norm

    @property
    def layer_bytes(self) -> int:
        """Of the weights of a layer's products, on this rank."""
        layer = self.decoder.layers[0]
        return sum(linear.weight.nbytes for linear in (layer.qkv, layer.o, layer.gate_up, layer.down))

    def forward(
        self, tokens: Tensor, positions: Tensor | None, wanted: Tensor | None, attention: TritonAttention
    ) -> Tensor | None:
        """As Decoder.forward, but `attention` knows the positions already. `wanted` None: all rows."""
        decoder = self.decoder
        x = decoder.begin(tokens)
        place = decoder.parallel
        last = self.num_layers - 1 if place.stage == place.stages - 1 else None
        normed = decoder.layers[0].attention_norm(x)
        for index, layer in enumerate(decoder.layers):
            mixed = self._attend(index, layer, self._product(layer.qkv, normed), attention)
            if index == last and wanted is not None:  # what follows concerns each row by itself
                x, mixed = x.index_select(0, wanted), mixed.index_select(0, wanted)
                if not len(wanted):
                    return x
            normed = self._after_attention(index, x, mixed)
        if place.stages > 1:
            return decoder.hand_on(x, len(tokens) if wanted is None else len(wanted))
        return normed

    def logits(self, features: Tensor) -> Tensor | None:
        """Logits `[rows, vocab]` in the model's type; None on ranks that have none."""
        decoder = self.decoder
        assert decoder.ends is not None
        normed = features if decoder.parallel.stages == 1 else decoder.ends.norm(features)
        joined = decoder.parallel.join(self._product(decoder.ends.head, normed, whole=True))
        return None if joined is None else joined[:, : decoder.config.vocab_size]

    def _attend(self, index: int, layer: Layer, qkv: Tensor, attention: TritonAttention) -> Tensor:
        return attention.attend_qkv(index, qkv, layer.qk_norm, self._eps, self._cos, self._sin)

    def _after_attention(self, index: int, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of a layer, in place in `x`: what the next one's norm makes of it."""
        layers = self.decoder.layers
        layer, following = layers[index], layers[index + 1].attention_norm if index + 1 < len(layers) else self._final
        normed = self._add(x, layer.o, mixed, layer.o_bias, layer.mlp_norm)
        inner = silu_mul(self._product(layer.gate_up, normed), x.dtype)
        return self._add(x, layer.down, inner, layer.down_bias, following)

    def _product(self, linear: Linear, x: Tensor, *, whole: bool = False) -> Tensor:
        """A product, or, unless it must be `whole`, its unreduced parts for the kernel that follows."""
        if self._fixed:
            out = fixed_product(x, linear.weight)
            return out if linear.bias is None else out + linear.bias
        rows = x.shape[0] * x.element_size() // 2  # measured in 16 bits: wider numbers fill a tile sooner
        tiles = None if linear.bias is not None else wins(rows, *linear.weight.shape)
        if tiles is None:
            return linear(x)
        return (product if whole else product_parts)(x, linear.weight, tiles)

    def _add(self, x: Tensor, linear: Linear, inputs: Tensor, bias: Tensor | None, norm: RMSNorm) -> Tensor:
        """Add to `x`, in place, a product whose inputs are split over the ranks; what `norm` makes of the sum."""
        place = self.decoder.parallel
        if bias is None and place.world > 1:
            return place.sum_add_norm(x, self._product(linear, inputs), norm.weight, self._eps)
        delta = self._product(linear, inputs, whole=bias is not None)
        if bias is not None:
            delta = place.sum(delta) + bias
        return add_norm(x, delta, norm.weight, self._eps)
