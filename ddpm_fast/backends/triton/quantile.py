"""The quantile of each sample's magnitudes by radix selection: their bits order as the values do, NaN last.

Four passes count the values by their next eight bits among those that share the bits found so far; a fifth finds the
next larger value. A small sample is one program's; a large one is shared out, and its counts are added up in memory,
integers, whose sums do not depend on the order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.reference.quantile import rank_of
from ddpm_fast.backends.triton import _launch
from ddpm_fast.backends.triton._layout import power_of_two

_BLOCK = 4096  # elements that a program reads at a time
_ALONE = 1 << 16  # elements of a sample that is left to one program
_CHUNK = 1 << 15  # elements of a program's share of a larger one
_INT32 = (1 << 31) - 1  # the most that can be counted in 32 bits

_INFINITY = tl.constexpr(0x7F800000)
_LARGEST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _magnitudes(x_ptr, start, size, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    there = lane < size - start
    bits = tl.load(x_ptr + start + lane, mask=there, other=0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits, there


@triton.jit
def _count_digits(x_ptr, size, prefix, shift, BLOCK: tl.constexpr):
    """How many of the values whose bits begin with `prefix` have each value of the next eight bits."""
    counts = tl.zeros([256], tl.int32)
    tl.assume(size > 0)
    for start in range(0, size, BLOCK):
        bits, there = _magnitudes(x_ptr, start, size, BLOCK)
        bits = bits >> shift
        counts += tl.histogram(bits & 255, 256, mask=there & (bits >> 8 == prefix))
    return counts


@triton.jit
def _pick(counts, prefix, rank):
    """The prefix with the digit of the value at `rank`, and the rank among the values that share it."""
    smaller = tl.cumsum(counts, 0) <= rank
    return prefix * 256 + tl.sum(smaller.to(tl.int32), 0), rank - tl.sum(tl.where(smaller, counts, 0), 0)


@triton.jit
def _are_more(counts, value, rank):
    """Whether the value at `rank` is not the last of its equals, of which the last digits' counts tell the number."""
    return rank + 1 < tl.sum(tl.where(tl.arange(0, 256) == (value & 255), counts, 0), 0)


@triton.jit
def _next_and_largest(x_ptr, size, value, BLOCK: tl.constexpr):
    above = tl.full([BLOCK], _LARGEST, tl.int32)
    largest = tl.zeros([BLOCK], tl.int32)
    tl.assume(size > 0)
    for start in range(0, size, BLOCK):
        bits, there = _magnitudes(x_ptr, start, size, BLOCK)
        above = tl.minimum(above, tl.where(there & (bits > value), bits, _LARGEST))
        largest = tl.maximum(largest, bits)
    return tl.min(above, 0), tl.max(largest, 0)


@triton.jit
def _interpolate(value, counts, rank, above, largest, way, NEXT: tl.constexpr):
    """torch.lerp's formula, each operation rounded on its own; NaN where there is one, and between infinities."""
    low = value.to(tl.float32, bitcast=True)
    if NEXT:
        high = tl.where(_are_more(counts, value, rank), value, above).to(tl.float32, bitcast=True)
        difference = high - low
        between = tl.where(way < 0.5, low + way * difference, high - difference * (1.0 - way))
    else:
        between = low + (low - low)
    return tl.where(largest > _INFINITY, largest.to(tl.float32, bitcast=True), between)


# A rank may be a multiple of anything: no kernel is compiled for that.
@triton.jit(do_not_specialize=["rank"])
def abs_quantile_kernel(x_ptr, out_ptr, size, rank, way, NEXT: tl.constexpr, BLOCK: tl.constexpr):
    """One sample a program."""
    n = tl.program_id(0)
    x_ptr += n.to(tl.int64) * size
    prefix = tl.full([], 0, tl.int32)
    rank = tl.full([], rank, tl.int32)
    counts = tl.zeros([256], tl.int32)
    for digit in range(4):
        counts = _count_digits(x_ptr, size, prefix, 24 - 8 * digit, BLOCK)
        prefix, rank = _pick(counts, prefix, rank)
    above, largest = _next_and_largest(x_ptr, size, prefix, BLOCK)
    tl.store(out_ptr + n, _interpolate(prefix, counts, rank, above, largest, way, NEXT))


@triton.jit
def _found(counts_ptr, rank, digits):
    """What the first passes' counts say: prefix and rank, as `_pick` has them."""
    prefix = tl.full([], 0, tl.int32)
    rank = tl.full([], rank, counts_ptr.dtype.element_ty)
    for digit in range(digits):
        prefix, rank = _pick(tl.load(counts_ptr + digit * 256 + tl.arange(0, 256)), prefix, rank)
    return prefix, rank


@triton.jit
def _share(x_ptr, size, CHUNK: tl.constexpr):
    """This program's sample, and the beginning and size of its share."""
    chunks = tl.cdiv(size, CHUNK)
    program = tl.program_id(0)
    n = (program // chunks).to(tl.int64)
    start = (program % chunks).to(tl.int64) * CHUNK
    return n, x_ptr + n * size + start, tl.minimum(size - start, CHUNK).to(tl.int32)


@triton.jit(do_not_specialize=["rank", "digit"])
def count_digits_kernel(x_ptr, counts_ptr, counts_out_ptr, size, rank, digit, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    n, x_ptr, share = _share(x_ptr, size, CHUNK)
    prefix, _ = _found(counts_ptr + n * 1024, rank, digit)
    counts = _count_digits(x_ptr, share, prefix, 24 - 8 * digit, BLOCK).to(counts_ptr.dtype.element_ty)
    place = counts_out_ptr + n * 1024 + digit * 256 + tl.arange(0, 256)
    tl.atomic_add(place, counts, mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["rank"])
def next_and_largest_kernel(
    x_ptr, counts_ptr, above_out_ptr, largest_out_ptr, size, rank, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    n, x_ptr, share = _share(x_ptr, size, CHUNK)
    value, _ = _found(counts_ptr + n * 1024, rank, 4)
    above, largest = _next_and_largest(x_ptr, share, value, BLOCK)
    tl.atomic_min(above_out_ptr + n, above, sem="relaxed")
    tl.atomic_max(largest_out_ptr + n, largest, sem="relaxed")


@triton.jit(do_not_specialize=["rank"])
def interpolate_kernel(counts_ptr, above_ptr, largest_ptr, out_ptr, rank, way, NEXT: tl.constexpr):
    n = tl.program_id(0)
    counts_ptr += n.to(tl.int64) * 1024
    value, rank = _found(counts_ptr, rank, 4)
    counts = tl.load(counts_ptr + 3 * 256 + tl.arange(0, 256))
    result = _interpolate(value, counts, rank, tl.load(above_ptr + n), tl.load(largest_ptr + n), way, NEXT)
    tl.store(out_ptr + n, result)


def abs_quantile(x: Tensor, q: float, out: Tensor) -> None:
    """Writes the q quantile of |x| of each sample of x (N, *), float32 and contiguous or channels_last, to out (N,)."""
    samples = x.shape[0]
    if samples == 0:
        return
    size = x.numel() // samples
    rank, way = rank_of(q, size, x.dtype)
    block = min(max(power_of_two(size), 128), _BLOCK)
    num_warps = max(block // 512, 1)
    if size <= _ALONE:
        _launch.launch(
            abs_quantile_kernel, (samples,), x, out, size, rank, way, num_warps=num_warps, NEXT=way > 0, BLOCK=block
        )
        return
    number = torch.int32 if size <= _INT32 else torch.int64
    counts = torch.zeros((samples, 4, 256), dtype=number, device=x.device)
    above = torch.full((samples,), _LARGEST.value, dtype=torch.int32, device=x.device)
    largest = torch.zeros_like(above)
    grid = (samples * -(-size // _CHUNK),)
    tiled = {"num_warps": num_warps, "CHUNK": _CHUNK, "BLOCK": block}
    for digit in range(4):
        _launch.launch(count_digits_kernel, grid, x, counts, counts, size, rank, digit, **tiled)
    _launch.launch(next_and_largest_kernel, grid, x, counts, above, largest, size, rank, **tiled)
    _launch.launch(interpolate_kernel, (samples,), counts, above, largest, out, rank, way, num_warps=4, NEXT=way > 0)
