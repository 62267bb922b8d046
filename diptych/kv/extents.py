"""Which runs of bytes copy pages from one rank's pool into another's. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class PoolShape(NamedTuple):
    """A rank's pool, `[page, kv_head, layer, bytes]`, contiguous."""

    num_pages: int
    num_heads: int
    num_layers: int
    layer_bytes: int  # of one layer of one head of one page, keys and values

    @property
    def head_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    @property
    def page_bytes(self) -> int:
        return self.num_heads * self.head_bytes

    @property
    def num_bytes(self) -> int:
        return self.num_pages * self.page_bytes


class Block(NamedTuple):
    """Some pages, from one head and one layer on: counted within the rank."""

    pages: Sequence[int]
    head: int
    layer: int


class Extent(NamedTuple):
    """`rows` runs of `width` bytes, `pitch` bytes from one's start to the next's; where they go to and come from."""

    to: int
    source: int
    width: int
    rows: int = 1
    to_pitch: int = 0  # of a single row: none
    source_pitch: int = 0


def extents(to: PoolShape, dst: Block, source: PoolShape, src: Block, num_heads: int, num_layers: int) -> list[Extent]:
    """Copies of `num_heads` and `num_layers` of each page, as few as can be: whole pages that follow one another on
    both sides are one, as are the heads of a page. Raises ValueError for what is outside of either pool."""
    for shape, block in ((to, dst), (source, src)):
        _check(shape, block, num_heads, num_layers)
    if len(dst.pages) != len(src.pages) or to.layer_bytes != source.layer_bytes:
        raise ValueError(f"{len(src.pages)} pages for {len(dst.pages)}, or layers of another size")
    first_to, first_source = (
        block.head * shape.head_bytes + block.layer * shape.layer_bytes for shape, block in ((to, dst), (source, src))
    )
    width, rows, pitches = num_layers * to.layer_bytes, num_heads, (to.head_bytes, source.head_bytes)
    if num_heads == 1 or pitches == (width, width):
        width, rows, pitches = num_heads * width, 1, (0, 0)
    whole = width == to.page_bytes == source.page_bytes
    found: list[Extent] = []
    for to_page, source_page in zip(dst.pages, src.pages, strict=True):
        one = Extent(
            to_page * to.page_bytes + first_to, source_page * source.page_bytes + first_source, width, rows, *pitches
        )
        last = found[-1] if found else None
        if whole and last and (one.to, one.source) == (last.to + last.width, last.source + last.width):
            found[-1] = last._replace(width=last.width + width)
        else:
            found.append(one)
    return found


def _check(shape: PoolShape, block: Block, num_heads: int, num_layers: int) -> None:
    inside = 0 <= block.head <= block.head + num_heads <= shape.num_heads
    inside = inside and 0 <= block.layer <= block.layer + num_layers <= shape.num_layers
    if not inside or any(not 0 <= page < shape.num_pages for page in block.pages):
        raise ValueError("pages, heads or layers that the pool has not")
