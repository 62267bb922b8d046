"""Products of many rows whose inputs are split over ranks, summed and normed by shares: each rank has one of the rows.

There are two ways. One kernel does it all when the product is there (diptych/model/kernels/two_shot.py). Or the
exchange is hidden: a rank computes the rows of the others first. While it computes its own, the copy engine brings
those to their owners; the owner adds the parts in rank order in float32, rounds once, adds that to its rows of the
residual and norms them. While it computes the next product of these rows, the copy engine brings them to the others,
which then do theirs of them. (Overlap by decomposition: Wang et al., ASPLOS 2023.) The second way has more to launch.

What a rank has for others to write: their parts of its rows (`inbox`; the first way: its own parts of all rows, for
them to read), and all normed rows (`normed`), one of each for all calls; beside each a flag a sender, which says of
which call it is. Nothing is overwritten too early, as what is enqueued on a stream runs in order, and at the end of the
first way nobody reads or writes any more. Of the second:

    inbox    a sender's next parts come from a product that follows (by the model) its reading of all rows normed here;
             those were sent after what was in the inbox had been added.
    normed   the next normed rows come after the parts of that call, hence after its receiver has begun that call's
             product; its products that read `normed` precede that one.
    sources  what a rank sends lies in its memory as long: it was received when the receiver's answer to it arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import triton
from torch import Tensor

from diptych.model.kernels import launch
from diptych.model.kernels.arrivals import LINE, wait_for
from diptych.model.kernels.fused import add_norm_kernel
from diptych.model.kernels.two_shot import TwoShot

LEAST_BYTES = 4 << 20  # of a sum: smaller ones take one shot
TILE = 128  # rows of a share are a multiple of this, so that products of shares have no more tiles than those of all
PARTS, NORMED = 0, 1  # kinds of flags

Product = Callable[[int, int, Tensor], None]  # writes the product's rows [start, stop) to a tensor


class Copies(Protocol):
    def send(self, source: Tensor, to: int, flag: int, number: int) -> None:
        """See PeerCopies."""


class Arriving:
    """Normed rows of all ranks, `rows` `[rows, width]`, of which those of other ranks are on their way."""

    def __init__(self, rows: Tensor, own: tuple[int, int], wait: Callable[[], None]) -> None:
        self.rows, self._own, self._wait = rows, own, wait

    @property
    def num_own(self) -> int:
        return self._own[1] - self._own[0]

    def pieces(self, first: int | None = None) -> Iterator[tuple[int, int]]:
        """Rows [start, stop), each to be read by what is enqueued before the next are asked for; all must be asked for.
        `first`: how many of this rank's own come before those of other ranks (default: all of them)."""
        start, stop = self._own
        if first is not None:
            start, stop = (stop - first, stop) if stop == len(self.rows) else (start, start + first)
        yield start, stop
        self._wait()
        for piece in ((0, start), (stop, len(self.rows))):
            if piece[0] < piece[1]:
                yield piece

    def whole(self) -> Tensor:
        """All rows, for what is enqueued next."""
        for _ in self.pieces():
            pass
        return self.rows


class RowShares:
    """One rank's side, for up to `most` rows of `width` numbers of `dtype`. Every rank makes the same calls.

    `addresses[r]`: where rank r's zeroed memory of `num_bytes(…)` is in this process; `memory`: our own, as bytes.
    """

    def __init__(
        self, rank: int, addresses: Sequence[int], memory: Tensor, most: int, width: int, dtype: torch.dtype,
        copies: Copies,
    ) -> None:  # fmt: skip
        self.rank, self.world, self.most, self.width, self.dtype = rank, len(addresses), most, width, dtype
        self._addresses, self._copies, self._call = addresses, copies, 0
        share = most_of_share(self.world, most)
        self._row_bytes = width * dtype.itemsize
        self._slot_bytes = share * self._row_bytes
        sizes = [self.world * self._slot_bytes] * 2 + [2 * self.world * LINE * 4, TwoShot.flag_bytes(self.world)]
        places = [[address + sum(sizes[:i]) for address in addresses] for i in range(4)]
        self._two_shot = TwoShot(rank, places[0], places[1], places[3], memory.device)
        inbox, normed, flags, _ = memory[: sum(sizes)].split(sizes)
        self._inbox = inbox.view(dtype).view(self.world, share, width)
        self._normed = normed.view(dtype).view(-1, width)
        self._flags = flags.view(torch.int32).view(2, self.world, LINE)
        self._outgoing = self._inbox.new_empty(self.world - 1, share, width)

    @staticmethod
    def num_bytes(world: int, most: int, width: int, itemsize: int) -> int:
        rows = 2 * world * most_of_share(world, most)
        return rows * width * itemsize + 2 * world * LINE * 4 + TwoShot.flag_bytes(world)

    def prepare(self) -> None:
        """Exchange some zeros, so that nothing is compiled when a prompt is waiting."""

        def product(start: int, stop: int, out: Tensor) -> None:
            out.zero_()

        x, weight = self._inbox.new_zeros(self.world * TILE, self.width), self._inbox.new_ones(self.width)
        self.product_add_norm(x, product, weight, 1.0)
        self.product_add_norm_hidden(x, product, weight, 1.0).whole()

    def takes(self, x: Tensor) -> bool:
        """Whether products of the shape of `x` are summed by shares."""
        rows, width = x.shape
        return x.nbytes > LEAST_BYTES and rows <= self.most and width == self.width and x.dtype == self.dtype

    def own_rows(self, x: Tensor, wanted: Tensor | None) -> Tensor:
        """The rows `wanted` of `x`, or all, with zeros for those of other ranks."""
        start, stop = self.share(self.rank, len(x))
        if wanted is None:
            wanted = torch.arange(len(x), device=x.device)
        mine = (wanted >= start) & (wanted < stop)
        return torch.where(mine[:, None], x.index_select(0, wanted), 0)

    def share(self, rank: int, rows: int) -> tuple[int, int]:
        """Rows [start, stop) of `rows` that are `rank`'s."""
        size = most_of_share(self.world, rows)
        return min(rank * size, rows), min((rank + 1) * size, rows)

    def product_add_norm(self, x: Tensor, product: Product, weight: Tensor, eps: float) -> Tensor:
        """x += the sum of every rank's `product`, in this rank's rows; RMSNorm(x) * weight of all rows. `x`
        `[rows, width]` contiguous; for each row the bits of add_norm (diptych/model/kernels/fused.py) of the sum in
        rank order. What is given is overwritten by the next call, which the ranks make after they have read all of it.
        """
        rows = len(x)
        start, stop = self.share(self.rank, rows)
        product(0, rows, self._inbox.view(-1, self.width)[:rows])
        self._two_shot.add_norm(x[start:stop], start, weight, eps)
        return self._normed[:rows]

    def product_add_norm_hidden(self, x: Tensor, product: Product, weight: Tensor, eps: float) -> Arriving:
        """The same, hidden behind the product and the one that reads what is given. Not for a graph: calls are counted
        by the host."""
        rows, world = len(x), self.world
        self._call = (self._call + 1 + (1 << 31)) % (1 << 32) - (1 << 31)  # as flags wrap around
        for step in range(1, world):
            peer = (self.rank + step) % world
            start, stop = self.share(peer, rows)
            part = self._outgoing[step - 1, : stop - start]
            product(start, stop, part)
            inbox = self._addresses[peer] + self.rank * self._slot_bytes
            self._copies.send(part, inbox, self._flag(peer, PARTS), self._call)
        start, stop = self.share(self.rank, rows)
        product(start, stop, self._inbox[self.rank, : stop - start])
        wait_for(self._flags[PARTS], self._call, self.rank)
        normed = self._normed[:rows]
        mine = normed[start:stop]
        self._add_norm(x[start:stop], weight, mine, eps)
        at = world * self._slot_bytes + start * self._row_bytes
        for step in range(1, world):
            peer = (self.rank + step) % world
            self._copies.send(mine, self._addresses[peer] + at, self._flag(peer, NORMED), self._call)
        call = self._call
        return Arriving(normed, (start, stop), lambda: wait_for(self._flags[NORMED], call, self.rank))

    def _flag(self, peer: int, kind: int) -> int:
        """Where we say to `peer` that something of that kind has arrived."""
        return self._addresses[peer] + 2 * self.world * self._slot_bytes + (kind * self.world + self.rank) * LINE * 4

    def _add_norm(self, x: Tensor, weight: Tensor, out: Tensor, eps: float) -> None:
        block = triton.next_power_of_2(self.width)
        add_norm_kernel[(len(x),)](
            x, self._inbox, weight, out, self._inbox.stride(0), eps, SPLITS=self.world, WIDTH=self.width, BLOCK=block,
            num_warps=min(16, max(1, block // 512)), **launch.options(),
        )  # fmt: skip


def most_of_share(world: int, rows: int) -> int:
    """Rows of the largest share."""
    return -(-rows // (world * TILE)) * TILE
