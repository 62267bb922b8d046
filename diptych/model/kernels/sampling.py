"""Drawing tokens on a GPU: what sampling.py defines, over the whole vocabulary, without a sort and without the host.

The tokens of a row are ordered by a key: the value's bits, made monotonic, above the complement of the id (order.py).
top_k and top_p each leave the tokens from some key on: the largest one from which there are k of them, or from which
their mass reaches top_p of what top_k left. That key is found digit by digit, from the top: for the first digits all
blocks of all rows measure at once what has each value of the digit; then the few tokens that share these digits are
listed, and one program a row goes through its list for the rest. Last, the Gumbel-max over what is left.

A row depends on nothing else: counts are integers, and masses are multiples of 2^-42 of the likeliest token's, so that
sums are exact and their order does not matter. A token's mass is exp, taken in float64, rounded to float32 and then cut
to such a multiple: where a run's mass comes that close to top_p (1e-12 a token, or expf's last bit), sampling.py's sum
in float64 may end it a token earlier or later. The noise has noise.py's arithmetic; its logarithms in float64 are
libdevice's, as torch's own are, and another library's would differ in their last bit, which rounding to float32 removes
but for about one number in 2^28.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diptych.model.kernels.launch import wait_for_previous

MASS_UNIT = tl.constexpr(2.0**42)  # masses of up to 2^20 tokens are below 2^62


# ---- values ------------------------------------------------------------------------------------------------------


@triton.jit
def _scaled(places, mask, temperature):  # type: ignore[no-untyped-def]
    """logit / temperature, rounded as torch does."""
    return tl.div_rn(tl.load(places, mask=mask, other=float("-inf")).to(tl.float32), temperature)


@triton.jit
def _ordered(x):  # type: ignore[no-untyped-def]
    """float32 to 32 bits in the same order, from 0 on, as int64. A negative zero is a zero."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 0x80000000


@triton.jit
def _unordered(order):  # type: ignore[no-untyped-def]
    """The inverse."""
    bits = (order - 0x80000000).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _token_keys(x, ids, ID_BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    return (_ordered(x) << ID_BITS) + ((1 << ID_BITS) - 1 - ids)


@triton.jit
def _weights(x, highest):  # type: ignore[no-untyped-def]
    """The probability over that of the likeliest token, float32; 0 for a token that cannot be."""
    return tl.where(x > float("-inf"), tl.exp((x - highest).to(tl.float64)), 0.0).to(tl.float32)


@triton.jit
def _gumbel(key, ids):  # type: ignore[no-untyped-def]
    """noise.gumbel. `key` int64."""
    x = key.to(tl.uint64) + ids.to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    u = ((x >> 11).to(tl.float64) + 0.5) * (1.0 / 9007199254740992)
    return (-tl.log(-tl.log(u))).to(tl.float32)


# ---- where a run of tokens ends ----------------------------------------------------------------------------------


@triton.jit
def peak_kernel(  # type: ignore[no-untyped-def]
    logits, rows, temperatures, peaks, stride, VOCAB: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (row, block): `peaks` (from 0 on), the highest value of the row as _ordered has it."""
    wait_for_previous(OVERLAP)
    row, ids = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = logits + tl.load(rows + row) * stride + ids
    x = _scaled(places, ids < VOCAB, tl.load(temperatures + row).to(tl.float32))
    tl.atomic_max(peaks + row, tl.max(_ordered(x), 0))


@triton.jit
def _measure(  # type: ignore[no-untyped-def]
    x, mask, ids, highest, low, least, shift, MASS: tl.constexpr, ID_BITS: tl.constexpr, DIGIT: tl.constexpr,
):  # fmt: skip
    """Mass or count of the tokens from `least` on, by the digit at `shift` of their keys' distance from `low`:
    `[1 << DIGIT]`."""
    keys = _token_keys(x, ids, ID_BITS)
    digits = (keys - low) >> shift
    counted = mask & (keys >= least) & (x > float("-inf"))
    if MASS:
        amount = tl.where(counted, (_weights(x, highest) * MASS_UNIT).to(tl.int64), 0)
    else:
        amount = counted.to(tl.int64)
    bins = tl.arange(0, 1 << DIGIT)
    found = tl.zeros([1 << DIGIT], tl.int64)
    for i in tl.static_range(1 << DIGIT):
        found += tl.where(bins == i, tl.sum(tl.where(digits == i, amount, 0), 0), 0)
    return found


@triton.jit
def _descend(found, low, above, goal, shift, DIGIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest digit from which the measure reaches `goal`: the new `low`, and the measure above that digit."""
    bins = tl.arange(0, 1 << DIGIT)
    reached = above + tl.cumsum(found, 0, reverse=True)
    digit = tl.maximum(tl.sum((reached.to(tl.float64) >= goal).to(tl.int64), 0) - 1, 0)
    return digit, low + (digit << shift), above + tl.sum(tl.where(bins > digit, found, 0), 0)


@triton.jit
def _after(totals, row, limit, count, done, ROUNDS: tl.constexpr, MASS: tl.constexpr, DIGIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where `done` coarse rounds have led: last digit, low, above, goal."""
    bins = tl.arange(0, 1 << DIGIT)
    goal = limit
    if MASS:
        goal = tl.maximum(limit * tl.sum(tl.load(totals + (row << DIGIT) + bins), 0).to(tl.float64), 1.0)
    low, above, digit = row.to(tl.int64) * 0, row.to(tl.int64) * 0, row.to(tl.int64) * 0
    for i in range(done):
        found = tl.load(totals + ((i * count + row) << DIGIT) + bins)
        digit, low, above = _descend(found, low, above, goal, (ROUNDS - 1 - i) * DIGIT, DIGIT)
    return digit, low, above, goal


@triton.jit(do_not_specialize=["done"])
def measure_kernel(  # type: ignore[no-untyped-def]
    logits, rows, temperatures, limits, peaks, floors, totals, parts, stride, done, MASS: tl.constexpr,
    ROUNDS: tl.constexpr, ID_BITS: tl.constexpr, DIGIT: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (row, block) of coarse round `done`: adds its measure to `totals` `[COARSE, rows, digits]` (zeros before)
    and keeps it in `parts` `[rows, blocks, digits]`, by which it knows the next time whether it has any such token."""
    wait_for_previous(OVERLAP)
    row, block, count = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    limit = tl.load(limits + row)
    if limit > 0:
        bins = tl.arange(0, 1 << DIGIT)
        part = parts + ((row * tl.num_programs(1) + block) << DIGIT)
        digit, low, _, _ = _after(totals, row, limit, count, done, ROUNDS, MASS, DIGIT)
        found = tl.zeros([1 << DIGIT], tl.int64)
        if (done == 0) | (tl.load(part + digit) > 0):
            ids = block * BLOCK + tl.arange(0, BLOCK)
            places = logits + tl.load(rows + row) * stride + ids
            x = _scaled(places, ids < VOCAB, tl.load(temperatures + row).to(tl.float32))
            highest, least = _unordered(tl.load(peaks + row)), tl.load(floors + row)
            shift = (ROUNDS - 1 - done) * DIGIT
            found = _measure(x, ids < VOCAB, ids, highest, low, least, shift, MASS, ID_BITS, DIGIT)
            tl.atomic_add(totals + ((done * count + row) << DIGIT) + bins, found, mask=found > 0)
        tl.debug_barrier()  # all threads have read what is now overwritten
        tl.store(part + bins, found)


@triton.jit
def list_kernel(  # type: ignore[no-untyped-def]
    logits, rows, temperatures, limits, floors, totals, parts, lengths, listed, stride, MASS: tl.constexpr,
    COARSE: tl.constexpr, ROUNDS: tl.constexpr, ID_BITS: tl.constexpr, DIGIT: tl.constexpr, VOCAB: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (row, block): its tokens that share the coarse digits go to the row's list `[VOCAB]`, in any order, as
    `lengths` (zeros before) gives out places."""
    wait_for_previous(OVERLAP)
    row, block = tl.program_id(0), tl.program_id(1)
    limit = tl.load(limits + row)
    if limit > 0:
        digit, low, _, _ = _after(totals, row, limit, tl.num_programs(0), COARSE, ROUNDS, MASS, DIGIT)
        if tl.load(parts + ((row * tl.num_programs(1) + block) << DIGIT) + digit) > 0:
            ids = block * BLOCK + tl.arange(0, BLOCK)
            places = logits + tl.load(rows + row) * stride + ids
            x = _scaled(places, ids < VOCAB, tl.load(temperatures + row).to(tl.float32))
            keys = _token_keys(x, ids, ID_BITS)
            chosen = (ids < VOCAB) & (keys >= tl.load(floors + row)) & (x > float("-inf"))
            chosen &= (keys - low) >> ((ROUNDS - COARSE) * DIGIT) == 0
            places_before = tl.cumsum(chosen.to(tl.int32), 0) - 1
            start = tl.atomic_add(lengths + row, tl.sum(chosen.to(tl.int32), 0))
            tl.store(listed + row.to(tl.int64) * VOCAB + start + places_before, ids, mask=chosen)


@triton.jit
def finish_kernel(  # type: ignore[no-untyped-def]
    logits, rows, temperatures, limits, peaks, floors, totals, lengths, listed, stride, MASS: tl.constexpr,
    COARSE: tl.constexpr, ROUNDS: tl.constexpr, ID_BITS: tl.constexpr, DIGIT: tl.constexpr, VOCAB: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (row): the other digits, from the list; raises `floors` to the key that is found."""
    wait_for_previous(OVERLAP)
    row = tl.program_id(0)
    limit = tl.load(limits + row)
    if limit > 0:
        _, low, above, goal = _after(totals, row, limit, tl.num_programs(0), COARSE, ROUNDS, MASS, DIGIT)
        highest, least = _unordered(tl.load(peaks + row)), tl.load(floors + row)
        temperature, length = tl.load(temperatures + row).to(tl.float32), tl.load(lengths + row)
        for i in range(COARSE, ROUNDS):
            shift = (ROUNDS - 1 - i) * DIGIT
            found = tl.zeros([1 << DIGIT], tl.int64)
            for start in range(0, length, BLOCK):
                inside = start + tl.arange(0, BLOCK) < length
                ids = tl.load(listed + row.to(tl.int64) * VOCAB + start + tl.arange(0, BLOCK), mask=inside, other=0)
                x = _scaled(logits + tl.load(rows + row) * stride + ids, inside, temperature)
                found += _measure(x, inside, ids, highest, low, least, shift, MASS, ID_BITS, DIGIT)
            _, low, above = _descend(found, low, above, goal, shift, DIGIT)
        tl.debug_barrier()  # all threads have read it
        tl.store(floors + row, tl.maximum(low, least))


# ---- the draw ----------------------------------------------------------------------------------------------------


@triton.jit
def draw_kernel(  # type: ignore[no-untyped-def]
    logits, rows, temperatures, keys, min_p, peaks, floors, best, stride, BOUND: tl.constexpr, ID_BITS: tl.constexpr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (row, block): the key (see _token_keys) of the token with the highest value + noise, among those from
    `floors` on whose weight is at least `min_p` (BOUND); where there is none, 0. `best` `[rows, blocks]`."""
    wait_for_previous(OVERLAP)
    row, block = tl.program_id(0), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    places = logits + tl.load(rows + row) * stride + ids
    x = _scaled(places, ids < VOCAB, tl.load(temperatures + row).to(tl.float32))
    kept = ids < VOCAB
    if BOUND:
        kept &= _token_keys(x, ids, ID_BITS) >= tl.load(floors + row)
        least = tl.load(min_p + row)
        if least > 0:
            kept &= _weights(x, _unordered(tl.load(peaks + row))).to(tl.float64) >= least
    winner = tl.zeros([], tl.int64)
    if tl.max(kept.to(tl.int32), 0) > 0:
        score = x + _gumbel(tl.load(keys + row), ids)
        score = tl.where(score == score, score, float("inf"))  # argmax, too, takes a not-a-number for the highest
        winner = tl.max(tl.where(kept, _token_keys(score, ids, ID_BITS), 0), 0)
    tl.store(best + row * tl.num_programs(1) + block, winner)


@triton.jit
def choose_kernel(  # type: ignore[no-untyped-def]
    best, rows, tokens, blocks, VOCAB: tl.constexpr, ID_BITS: tl.constexpr, BLOCKS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (row): the best of its blocks to the row's place in `tokens`; the last token if none has any, which only
    logits that are no numbers bring about."""
    wait_for_previous(OVERLAP)
    row, inside = tl.program_id(0), tl.arange(0, BLOCKS)
    winner = tl.max(tl.load(best + row * blocks + inside, mask=inside < blocks, other=0), 0)
    last: tl.constexpr = (1 << ID_BITS) - 1
    tl.store(tokens + tl.load(rows + row), tl.minimum(last - (winner & last), VOCAB - 1))
