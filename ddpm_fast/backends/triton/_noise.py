"""Device functions of the noise: Philox words, pairs of normals, and the normals of a tile. docs/noise.md is the
contract; every operation rounds on its own, so kernels that use them are compiled without fusion."""

from __future__ import annotations

import triton
import triton.language as tl

_hex = float.fromhex

_SCALE = tl.constexpr(_hex("-0x1.62e430p-23"))
_LOG8 = tl.constexpr(_hex("0x1.177b0ep-2"))
_LOG7 = tl.constexpr(_hex("0x1.41e0f8p-2"))
_LOG6 = tl.constexpr(_hex("0x1.1fbd08p-2"))
_LOG5 = tl.constexpr(_hex("0x1.4f121ep-2"))
_LOG4 = tl.constexpr(_hex("0x1.99d41ap-2"))
_LOG3 = tl.constexpr(_hex("0x1.0019e4p-1"))
_LOG2 = tl.constexpr(_hex("0x1.5554b8p-1"))
_LOG1 = tl.constexpr(_hex("0x1.ffffd6p-1"))
_SIN3 = tl.constexpr(_hex("-0x1.330c96p+6"))
_SIN2 = tl.constexpr(_hex("0x1.468064p+6"))
_SIN1 = tl.constexpr(_hex("-0x1.4abc24p+5"))
_SIN0 = tl.constexpr(_hex("0x1.921fb6p+2"))
_COS3 = tl.constexpr(_hex("-0x1.4e6694p+6"))
_COS2 = tl.constexpr(_hex("0x1.03b034p+6"))
_COS1 = tl.constexpr(_hex("-0x1.3bd39ep+4"))


@triton.jit
def philox(c0, c1, c2, c3, key_low, key_high):
    """Philox4x32-10 (Salmon et al. 2011) of uint32 words."""
    for _ in tl.static_range(10):
        # One widening multiplication in place of a high and a low one.
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key_low
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key_high
        c3 = product0.to(tl.uint32)
        key_low = tl.add(key_low, 0x9E3779B9, sanitize_overflow=False)
        key_high = tl.add(key_high, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def normal_pair(r0, r1):
    """Two uint32 words to two standard normals by Box and Muller's transform."""
    s0 = r0.to(tl.int32, bitcast=True)
    s1 = r1.to(tl.int32, bitcast=True)
    u = tl.maximum(tl.abs(s0.to(tl.float32) * 4.656612873077393e-10), 1.1641532182693481e-10)  # 2^-31, 2^-33
    b = u.to(tl.int32, bitcast=True)
    k = (b - 0x3F2AAAAB) & -0x800000
    f = 1.0 - (b - k).to(tl.float32, bitcast=True)
    p = f * _LOG8 + _LOG7
    p = p * f + _LOG6
    p = p * f + _LOG5
    p = p * f + _LOG4
    p = p * f + _LOG3
    p = p * f + _LOG2
    p = p * f + _LOG1
    p = p * f + 2.0
    radius = tl.sqrt_rn(k.to(tl.float32) * _SCALE + p * f)

    x = (s1 << 1).to(tl.float32) * 5.820766091346741e-11  # 2^-34
    z = x * x
    s = z * _SIN3 + _SIN2
    s = s * z + _SIN1
    s = s * z + _SIN0
    s = s * x
    c = z * _COS3 + _COS2
    c = c * z + _COS1
    c = c * z + 1.0
    # The cosine is positive here, and s0 gives it its sign.
    c = (c.to(tl.int32, bitcast=True) | (s0 & -0x80000000)).to(tl.float32, bitcast=True)
    first, second = radius * c, radius * s
    swap = s1 < 0
    return tl.where(swap, second, first), tl.where(swap, first, second)


@triton.jit
def normals(blocks, sample_id, step, stream: tl.constexpr, seed):
    """The normals of the given blocks of four elements: [4 * len(blocks)], in order."""
    zero = tl.zeros_like(blocks).to(tl.uint32)
    r0, r1, r2, r3 = philox(
        zero + sample_id.to(tl.uint32),
        blocks.to(tl.uint32),
        zero + step.to(tl.uint32),
        zero + stream,
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    z0, z1 = normal_pair(r0, r1)
    z2, z3 = normal_pair(r2, r3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def sample_number(ids_ptr, n):
    """The number of the batch's sample n in the noise."""
    if ids_ptr is not None:
        n = tl.load(ids_ptr + n)
    return n


@triton.jit
def tile_normals(
    tile,
    pixels,
    sample_id,
    step,
    stream: tl.constexpr,
    seed,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    QUADS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """The normals of a tile (`_layout.Tiling`), one a lane."""
    q = tl.arange(0, BLOCK // 4)
    if WIDTH == 0:
        z = normals(tile * QUADS + q, sample_id, step, stream, seed)
    else:
        # Blocks lie along the pixels of a channel, and the memory's order is the channels': made in the one order,
        # handed over in the other.
        across: tl.constexpr = (CHANNELS + WIDTH - 1) // WIDTH
        channel, pixel = tile % across * WIDTH, tile // across * PIXELS
        z = normals((((channel + q // QUADS) * pixels + pixel) >> 2) + q % QUADS, sample_id, step, stream, seed)
        lane = tl.arange(0, BLOCK)
        row = lane % WIDTH
        place = row * (4 * QUADS) + lane // WIDTH
        if PIXELS % (4 * QUADS) != 0:
            place += (((channel + row) * pixels + pixel) & 3).to(tl.int32)
        z = tl.gather(z, tl.where(lane < WIDTH * PIXELS, place, 0), 0)
    return z


@triton.jit
def tile_elements(
    tile,
    pixels,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """The elements of a tile, one a lane: place in the sample's memory, channel, pixel, and whether there is one."""
    lane = tl.arange(0, BLOCK)
    if WIDTH == 0:
        element = tile * BLOCK + lane
        there = element < CHANNELS * pixels
        if CHANNELS_LAST:
            channel, pixel = element % CHANNELS, element // CHANNELS
        else:
            channel, pixel = element // pixels, element % pixels
    elif WIDTH == CHANNELS:
        element = tile * (PIXELS * CHANNELS) + lane
        there = (lane < PIXELS * CHANNELS) & (element < CHANNELS * pixels)
        channel, pixel = element % CHANNELS, element // CHANNELS
    else:
        across: tl.constexpr = (CHANNELS + WIDTH - 1) // WIDTH
        channel = tile % across * WIDTH + lane % WIDTH
        pixel = tile // across * PIXELS + lane // WIDTH
        element = pixel * CHANNELS + channel
        there = (lane < WIDTH * PIXELS) & (pixel < pixels) & (channel < CHANNELS)
    return element, channel, pixel, there


@triton.jit
def sample_and_tile(tiles, WIDE: tl.constexpr):
    """Which sample and which of its tiles this program works on."""
    program = tl.program_id(0)
    n, tile = program // tiles, program % tiles
    if WIDE:
        tile = tile.to(tl.int64)
    return n, tile


@triton.jit
def read(pointer, n, element, channel, pixel, there, sample_stride, channel_stride, pixel_stride, ALONG: tl.constexpr):
    """A source's values for a tile, in float32. ALONG: the source lies in memory as the result does."""
    place = element if ALONG else channel * channel_stride + pixel * pixel_stride
    return tl.load(pointer + n.to(tl.int64) * sample_stride + place, mask=there, other=0).to(tl.float32)
