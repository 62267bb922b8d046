"""Copies of pages between pools of different shapes: against numpy's indexing, and how few they are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.kv.extents import Block, PoolShape, extents


@st.composite
def transfers(draw):
    num_heads, num_layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sides = []
    count = draw(st.integers(1, 6))
    for _ in range(2):
        shape = PoolShape(8, num_heads + draw(st.integers(0, 2)), num_layers + draw(st.integers(0, 2)), 3)
        pages = draw(st.permutations(range(8)))[:count] if draw(st.booleans()) else range(8 - count, 8)
        head = draw(st.integers(0, shape.num_heads - num_heads))
        layer = draw(st.integers(0, shape.num_layers - num_layers))
        sides.append((shape, Block(pages, head, layer)))
    return *sides, num_heads, num_layers


@given(transfers())
def test_the_bytes_are_those_of_an_indexed_copy(transfer):
    (to, dst), (source, src), num_heads, num_layers = transfer
    rng = np.random.default_rng(1)
    here, there = (rng.integers(0, 256, shape.num_bytes, np.uint8) for shape in (to, source))
    expected = here.reshape((*to[:3], 3)).copy()

    def part(block):
        heads, layers = slice(block.head, block.head + num_heads), slice(block.layer, block.layer + num_layers)
        return list(block.pages), heads, layers

    expected[part(dst)] = there.reshape((*source[:3], 3))[part(src)]
    for copy in extents(to, dst, source, src, num_heads, num_layers):
        for row in range(copy.rows):
            at, start = copy.to + row * copy.to_pitch, copy.source + row * copy.source_pitch
            here[at : at + copy.width] = there[start : start + copy.width]
    assert np.array_equal(here, expected.reshape(-1))


def test_how_many_copies_qwen3_32b_takes():
    whole = PoolShape(600, 8, 64, 32 << 10)
    half_heads, half_layers = whole._replace(num_heads=4), whole._replace(num_layers=32)

    def copies(to, source, heads, layers, pages=range(256), head=0):
        return [
            (c.width >> 20, c.rows)
            for c in extents(to, Block(pages, 0, 0), source, Block(pages, head, 0), heads, layers)
        ]

    assert copies(whole, whole, 8, 64) == [(4096, 1)]
    assert copies(whole, whole, 8, 64, range(0, 512, 2)) == [(16, 1)] * 256
    assert copies(half_heads, whole, 4, 64, head=4) == [(8, 1)] * 256
    assert copies(half_heads, half_heads, 4, 64) == [(2048, 1)]
    assert copies(whole, half_layers, 8, 32) == [(1, 8)] * 256


@pytest.mark.parametrize(
    ("dst", "src", "heads", "layers"),
    [
        (Block([8], 0, 0), Block([0], 0, 0), 1, 1),
        (Block([0], 0, 0), Block([-1], 0, 0), 1, 1),
        (Block([0], 1, 0), Block([0], 0, 0), 2, 1),
        (Block([0], 0, 0), Block([0], 0, 2), 1, 2),
        (Block([0, 1], 0, 0), Block([0], 0, 0), 1, 1),
    ],
)
def test_what_is_outside_of_a_pool_is_refused(dst, src, heads, layers):
    shape = PoolShape(8, 2, 3, 5)
    with pytest.raises(ValueError, match="pages"):
        extents(shape, dst, shape, src, heads, layers)


def test_layers_of_another_size_are_refused():
    with pytest.raises(ValueError, match="layers of another size"):
        extents(PoolShape(2, 1, 1, 8), Block([0], 0, 0), PoolShape(2, 1, 1, 4), Block([0], 0, 0), 1, 1)
