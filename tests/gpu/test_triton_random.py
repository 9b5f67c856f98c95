"""Triton's normal noise, executed from its PTX: the reference's bits on every architecture, in every layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddpm_fast.backends.reference import random as reference
from ddpm_fast.backends.triton import _layout
from ddpm_fast.ops.random import NORMAL
from tests.gpu import simulate
from tests.gpu.triton_runs import ARCHITECTURES, SEED, STREAM, blank, drawn_for, under_every_schedule
from tests.ops.common import laid_out, same_bits, shape_id

# Several tiles a sample; sizes no multiple of a vector or of a block of the noise; one element; more channels than a
# tile has; 1-D, 2-D, 3-D and 5-D; (shape, layout, dtype, elements behind an aligned address).
CASES = [
    ((6, 3, 32, 16), "contiguous", torch.float32, 0),
    ((6, 3, 32, 16), "channels_last", torch.float32, 0),
    ((6, 3, 17, 23), "contiguous", torch.bfloat16, 1),
    ((6, 3, 17, 19), "channels_last", torch.float32, 1),
    ((6, 4, 15, 18), "channels_last", torch.float16, 0),
    ((2, 70, 5, 7), "channels_last", torch.float32, 0),
    ((300, 5), "contiguous", torch.float32, 0),
]
MORE_CASES = [
    ((2, 80, 8, 8), "channels_last", torch.bfloat16, 0),
    ((7,), "contiguous", torch.float16, 0),
    ((2, 1, 1, 1), "contiguous", torch.float32, 0),
    ((2, 3, 700), "contiguous", torch.float16, 0),
    ((1, 2, 9, 11, 13), "contiguous", torch.float32, 3),
]


def case_id(case: tuple[tuple[int, ...], str, torch.dtype, int]) -> str:
    shape, layout, dtype, offset = case
    return f"{shape_id(shape)}-{layout}-{str(dtype)[6:]}-{'misaligned' if offset else 'aligned'}"


def agrees(shape: tuple[int, ...], layout: str, dtype: torch.dtype, offset: int, target: int) -> None:
    like = torch.empty(shape, dtype=dtype)
    like = laid_out(like, layout) if len(shape) == 4 else like
    ids, step = drawn_for(shape[0])

    def draw() -> tuple[Tensor]:
        out = blank(like, offset=offset)
        NORMAL["triton"](out, SEED, ids, step, STREAM)
        return (out,)

    (got,) = under_every_schedule(draw, target, shape[0])
    expected = torch.empty_like(got)
    reference.normal(expected, SEED, ids, step, STREAM)
    assert same_bits(got, expected)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_is_the_references_noise(case: tuple[tuple[int, ...], str, torch.dtype, int]) -> None:
    agrees(*case, target=90)


@pytest.mark.parametrize("target", [80, 120])
def test_other_architectures_give_the_same_noise(target: int) -> None:
    agrees(*CASES[4], target=target)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES + MORE_CASES, ids=case_id)
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_case_on_every_architecture(target: int, case: tuple[tuple[int, ...], str, torch.dtype, int]) -> None:
    agrees(*case, target=target)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_64_bit_offsets_change_nothing(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_layout, "_INT32_ELEMENTS", 1)
    agrees((2, 3, 17, 19), layout, torch.float32, 0, target=90)


def test_sample_numbers_default_to_the_batchs_and_one_step_serves_all() -> None:
    out, expected = torch.full((3, 9), torch.nan), torch.empty(3, 9)
    step, seed = torch.tensor([7]), torch.tensor([-77])
    with simulate.backend("triton"):
        NORMAL["triton"](out, seed, None, step, 0)
    reference.normal(expected, seed, None, step, 0)
    assert same_bits(out, expected)


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 0), (torch.bfloat16, 1)], ids=["aligned", "misaligned"])
def test_a_sample_ends_anywhere_in_a_tile(dtype: torch.dtype, offset: int) -> None:
    """A comparison with the end that is off by one is seen where the end is that of the elements that it guards: one
    of eight in a vector, or one eighth of the second tile's 1024."""
    for eighth in range(8):
        like = torch.empty(2, 3, 343 + 43 * eighth, dtype=dtype)
        assert 128 * eighth <= like[0].numel() - 1024 == 129 * eighth + 5 < 128 * (eighth + 1)
        out, expected = blank(like, offset=offset), torch.empty_like(like)
        ids, step = drawn_for(2)
        with simulate.backend("triton"):
            NORMAL["triton"](out, SEED, ids, step, STREAM)
        reference.normal(expected, SEED, ids, step, STREAM)
        assert same_bits(out, expected)


def test_nothing_to_fill_launches_nothing() -> None:
    with simulate.backend("triton") as launches:
        NORMAL["triton"](torch.empty(0, 3), SEED, None, torch.tensor([1]), 0)
        NORMAL["triton"](torch.empty(3, 0), SEED, None, torch.tensor([1]), 0)
    assert not launches


def test_the_tiling_covers_every_sample() -> None:
    for channels, pixels in ((1, 1), (3, 1024), (3, 323), (70, 25), (1000, 7), (4, 65536)):
        image = _layout.Image(channels, pixels, channels * pixels, 1, channels)
        for itemsize in (2, 4):
            for noise in (False, True):
                tile = _layout.tiling(image, itemsize, channels_last=True, noise=noise)
                assert tile.block == 32 * tile.num_warps * max(16 // itemsize, 4)
                if tile.width:
                    assert tile.block >= 4 * tile.quads * tile.width
                    assert tile.pixels % 4 == 0 < tile.pixels
                    across = -(-channels // tile.width)
                    assert tile.tiles % across == 0
                    assert tile.tiles // across * tile.pixels >= pixels > (tile.tiles // across - 1) * tile.pixels
                else:
                    assert tile.tiles * tile.block >= channels * pixels > (tile.tiles - 1) * tile.block


def test_offsets_beyond_two_to_the_31_are_wide() -> None:
    narrow = _layout.Image(4, 1 << 29, 1 << 31, 1 << 29, 1)
    assert not _layout.is_wide(narrow)
    assert _layout.is_wide(narrow._replace(channels=5))
    assert _layout.is_wide(narrow._replace(channels=2, channel_stride=1 << 31))
