"""The decoder's forward pass on a GPU: the same layers, with our kernels between the products, and for them where they
are faster than cuBLAS. The reference is Decoder.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from diptych.model.blas import blas_product
from diptych.model.decoder import Decoder, Layer
from diptych.model.kernels import gated
from diptych.model.kernels.ends import embed_norm
from diptych.model.kernels.fixed import fixed_product
from diptych.model.kernels.fused import add_norm, silu_mul
from diptych.model.kernels.matmul import Scaled, gated_product, product, product_add, product_parts
from diptych.model.kernels.stream import stream_gated, stream_wins
from diptych.model.kernels.tiles import ProductTiles, wins
from diptych.model.layers import Linear, RMSNorm, known_tokens
from diptych.model.row_shares import Arriving
from diptych.model.triton_attention import TritonAttention

ADD_ROWS = 1024  # from so many rows on cuBLAS adds its product to `x`: the norm then has half as much to read and write
# Multiplications of a layer on a rank from which on sums are hidden behind them: 2,048 rows of half of Qwen3-32B. With
# fewer the CPU takes longer to launch a layer, in more pieces, than the GPU to run it.
HIDING = 480 * 10**9


class FusedDecoder:
    """See CausalModel. Runs the weights of `decoder`; enqueues work and never waits for it. `fixed`: by products whose
    rows do not depend on one another."""

    def __init__(self, decoder: Decoder, *, fixed: bool = False) -> None:
        self.decoder, self._fixed = decoder, fixed
        self.num_heads, self.num_kv_heads = decoder.num_heads, decoder.num_kv_heads
        self.num_layers, self.scale = decoder.num_layers, decoder.scale
        self._eps = decoder.config.norm_eps
        gate_up = decoder.layers[0].gate_up
        self._gates = not fixed and gate_up.bias is None and gated.takes(gate_up.weight)
        if self._gates:
            gated.prepare(gate_up.weight)
        layer = decoder.layers[0]
        self._shares = decoder.parallel.row_shares if layer.o_bias is None and layer.down_bias is None else None
        self._layer_numbers = sum(linear.weight.numel() for linear in (layer.qkv, layer.o, layer.gate_up, layer.down))
        self._cos, self._sin = decoder.cos.squeeze(1), decoder.sin.squeeze(1)
        self._arrivals = torch.zeros(decoder.config.hidden_size, dtype=torch.int32, device=self._cos.device)
        # After its last layer a stage but the first has nothing to norm; add_norm is then done for its sum alone.
        final = decoder.ends.norm if decoder.ends is not None else decoder.layers[-1].mlp_norm
        readers: list[tuple[RMSNorm, Linear | None]] = [(layer.attention_norm, layer.qkv) for layer in decoder.layers]
        self._following = [*readers[1:], (final, None)]  # of each layer: the norm after it, and who reads what it gives

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        wanted: Tensor | None,
        attention: TritonAttention,
        last: Tensor | None = None,
    ) -> Tensor | None:
        """As Decoder.forward, but `attention` knows the positions already. `wanted` None: all rows. `last`: see
        known_tokens; without it, all tokens are known."""
        decoder = self.decoder
        place = decoder.parallel
        final = self.num_layers - 1 if place.stage == place.stages - 1 else None
        normed: Tensor | Scaled | Arriving
        x, normed = self._begin(tokens, last)
        for index, layer in enumerate(decoder.layers):
            mixed = self._attend(index, layer, self._product(layer.qkv, normed), attention)
            if index == final and wanted is not None:  # what follows concerns each row by itself
                if not len(wanted):
                    return x[:0] if place.stages == 1 else None
                x, mixed = self._rows(x, wanted), mixed.index_select(0, wanted)
            normed = self._after_attention(index, x, mixed)
        if isinstance(normed, Arriving):
            normed = normed.whole()
        if place.stages > 1:
            return decoder.hand_on(self._rows(x), len(tokens) if wanted is None else len(wanted))
        assert isinstance(normed, Tensor)  # what follows the last layer is no product's input
        return normed

    def logits(self, features: Tensor) -> Tensor | None:
        """Logits `[rows, vocab]` in the model's type; None on ranks that have none."""
        decoder = self.decoder
        assert decoder.ends is not None
        normed = features if decoder.parallel.stages == 1 else decoder.ends.norm(features)
        joined = decoder.parallel.join(self._product(decoder.ends.head, normed, whole=True))
        return None if joined is None else joined[:, : decoder.config.vocab_size]

    def _begin(self, tokens: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the first layer reads, and what its norm makes of it."""
        decoder, norm = self.decoder, self.decoder.layers[0].attention_norm
        if decoder.ends is not None and decoder.parallel.world == 1 and not self._fixed:
            table = decoder.ends.embedding.table
            return embed_norm(tokens, tokens if last is None else last, table, norm.weight, self._eps)
        x = decoder.begin(tokens if last is None else known_tokens(tokens, last))
        return x, norm(x)

    def _attend(self, index: int, layer: Layer, qkv: Tensor, attention: TritonAttention) -> Tensor:
        return attention.attend_qkv(index, qkv, layer.qk_norm, self._eps, self._cos, self._sin)

    def _rows(self, x: Tensor, wanted: Tensor | None = None) -> Tensor:
        """The rows `wanted` of `x`, or all, on every rank, also where each rank has only its share of them."""
        if self._shares is not None and self._shares.takes(x):
            return self.decoder.parallel.sum(self._shares.own_rows(x, wanted))
        return x if wanted is None else x.index_select(0, wanted)

    def _after_attention(self, index: int, x: Tensor, mixed: Tensor) -> Tensor | Scaled | Arriving:
        """The rest of a layer, in place in `x`: what the norm after it makes of that."""
        layer = self.decoder.layers[index]
        normed = self._add(x, layer.o, mixed, layer.o_bias, layer.mlp_norm, layer.gate_up)
        inner = self._gated(layer.gate_up, normed)
        return self._add(x, layer.down, inner, layer.down_bias, *self._following[index])

    def _product(self, linear: Linear, x: Tensor | Scaled | Arriving, *, whole: bool = False) -> Tensor:
        """A product, or, unless it must be `whole`, its unreduced parts for the kernel that follows."""
        if isinstance(x, Arriving):
            out = x.rows.new_empty(len(x.rows), linear.weight.shape[0])
            for start, stop in x.pieces():
                self._write(linear, x.rows, start, stop, out[start:stop])
            return out
        tiles = self._tiles(linear, x)
        if tiles is not None:
            return (product if whole else product_parts)(x, linear.weight, tiles)
        assert isinstance(x, Tensor)
        if self._fixed:
            out = fixed_product(x, linear.weight)
            return out if linear.bias is None else out + linear.bias
        return blas_product(linear, x)

    def _write(self, linear: Linear, x: Tensor, start: int, stop: int, out: Tensor) -> None:
        """The product of many rows [start, stop) of `x` to `out`."""
        if self._fixed:
            fixed_product(x[start:stop], linear.weight, out)
            if linear.bias is not None:
                out += linear.bias
        elif linear.bias is not None:
            torch.addmm(linear.bias, x[start:stop], linear.weight.t(), out=out)
        else:
            torch.mm(x[start:stop], linear.weight.t(), out=out)

    def _gated(self, linear: Linear, x: Tensor | Scaled | Arriving) -> Tensor:
        """silu(gate) * up, of a product that gives both."""
        if isinstance(x, Arriving):
            if not self._gates:
                return silu_mul(self._product(linear, x), self._cos.dtype)
            out = x.rows.new_empty(len(x.rows), linear.weight.shape[0] // 2)
            for start, stop in x.pieces(gated.first_rows(x.num_own, len(x.rows), linear.weight)):
                gated.silu_product(x.rows[start:stop], linear.weight, out[start:stop])
            return out
        if self._gates and isinstance(x, Tensor) and x.shape[0] >= gated.LEAST_ROWS:
            return gated.silu_product(x, linear.weight)
        if self._gates and isinstance(x, Tensor) and stream_wins(x.shape[0], *linear.weight.shape):
            return stream_gated(x, linear.weight, self._arrivals)
        tiles = self._tiles(linear, x)
        if tiles is not None and tiles.joins:
            return gated_product(x, linear.weight, self._arrivals, tiles)
        return silu_mul(self._product(linear, x), self._cos.dtype)

    def _add(
        self, x: Tensor, linear: Linear, inputs: Tensor, bias: Tensor | None, norm: RMSNorm, reader: Linear | None
    ) -> Tensor | Scaled | Arriving:
        """Add to `x`, in place, a product whose inputs are split over the ranks; what `norm` makes of the sum, for the
        product `reader` if that is what reads it. Of many rows each rank adds to its own only (see RowShares)."""
        place = self.decoder.parallel
        if self._shares is not None and self._shares.takes(x):
            hides = len(x) * self._layer_numbers >= HIDING
            captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
            hidden, plain = self._shares.product_add_norm_hidden, self._shares.product_add_norm
            exchange = hidden if hides and not captured else plain
            return exchange(x, partial(self._write, linear, inputs), norm.weight, self._eps)
        if bias is None and place.world > 1:
            return place.sum_add_norm(x, self._product(linear, inputs), norm.weight, self._eps)
        if bias is None and not self._fixed and x.shape[0] >= ADD_ROWS:
            return norm(x.addmm_(inputs, linear.weight.t()))
        tiles = self._tiles(linear, inputs)
        joins = tiles is not None and tiles.joins and bias is None
        if joins and reader is not None and self._reads_scaled(reader, x):
            return product_add(x, inputs, linear.weight, norm.weight, self._eps, self._arrivals, tiles)
        delta = self._product(linear, inputs, whole=bias is not None)
        if bias is not None:
            delta = place.sum(delta) + bias
        return add_norm(x, delta, norm.weight, self._eps)

    def _tiles(self, linear: Linear, x: Tensor | Scaled) -> ProductTiles | None:
        """Those with which our product is the faster one; None: cuBLAS's, or the fixed one."""
        if self._fixed or linear.bias is not None:
            return None
        values = x.values if isinstance(x, Scaled) else x
        return wins(values.shape[0] * values.element_size() // 2, *linear.weight.shape)  # measured in 16 bits

    def _reads_scaled(self, linear: Linear, x: Tensor) -> bool:
        """Whether what our product reads may be Scaled. float16 might not hold it."""
        return x.dtype != torch.float16 and self._tiles(linear, x) is not None
