"""The random numbers, to the bit: docs/noise.md."""

from __future__ import annotations

import math
import re
import shutil
import subprocess

import pytest
import torch
from scipy import stats

import ddpm_fast as df
from ddpm_fast.backends.reference import random as reference
from ddpm_fast.ops.random import NORMAL, random_timesteps

from .common import (
    LAYOUTS,
    SHAPES_AND_LAYOUTS,
    run_with_isa,
    same_bits,
    shape_and_layout_id,
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def words(text: str) -> torch.Tensor:
    return torch.tensor([int(word, 16) for word in text.split()])


def as_hex(values: torch.Tensor) -> str:
    return " ".join(f"{bits & 0xFFFFFFFF:08x}" for bits in values.contiguous().view(torch.int32).flatten().tolist())


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    low, high = (int(word, 16) for word in key.split())
    seed = torch.tensor([(high << 32 | low) - (1 << 64 if high >> 31 else 0)])
    got = reference.philox(tuple(words(counter).unbind()), seed)
    assert torch.equal(torch.cat(got), words(expected))


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("00000000 00000000", "40d87047 00000000"),
        ("00000001 7fffffff", "40d1c6ff b1a4c23c"),
        ("ffffffff 80000000", "00000000 c0d1c6ff"),
        ("7fffffff 00000005", "00000000 00000000"),
        ("55555555 aaaaaaaa", "3ee68842 3f47a593"),
        ("40000000 40000000", "3f55224c bf55224c"),
    ],
)
def test_pairs_of_words_give_the_contracts_normals(pair: str, expected: str) -> None:
    r0, r1 = words(pair)
    assert as_hex(torch.stack(reference.normal_pair(r0.reshape(1), r1.reshape(1)))) == expected


def test_elements_are_those_of_the_contract(backend: str) -> None:
    noise = df.randn((1, 8), seed=0x0123456789ABCDEF, sample_ids=[7], step=123, stream="timesteps")
    assert as_hex(noise) == "3fe6dfb0 3f8308dd bf1fed19 bf619c79 c027abfe bf7b2601 be915de4 bf7e1789"


def test_normals_are_box_mullers_within_the_documented_error() -> None:
    generator = torch.Generator().manual_seed(1)
    r0, r1 = torch.randint(0, 1 << 32, (2, 1 << 20), generator=generator)
    first, second = reference.normal_pair(r0, r1)
    # The conversions to float32 are part of the contract; everything after them is exact here.
    u = (r0.to(torch.int32).float().double().abs() * 2.0**-31).clamp(min=2.0**-33)
    radius = (-2 * u.log()).sqrt()
    # A turn is an eighth to either side of an axis; the sign and the axis come from the words' top bits.
    angle = (r1 << 1).to(torch.int32).float().double() * 2.0**-34 * 2 * math.pi
    a = radius * angle.cos() * torch.where(r0 >= 1 << 31, -1.0, 1.0)
    b = radius * angle.sin()
    swap = r1 >= 1 << 31
    errors = torch.cat([first - torch.where(swap, b, a), second - torch.where(swap, a, b)]).abs()
    assert errors.max() <= 1.05e-6
    assert errors.square().mean().sqrt() <= 6.9e-8


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", SHAPES_AND_LAYOUTS, ids=shape_and_layout_id)
def test_every_backend_gives_the_same_bits(backend: str, case: tuple[tuple[int, ...], str], dtype: torch.dtype) -> None:
    shape, layout = case
    arguments = {"seed": 1 << 63, "sample_ids": [*range(5, 5 + shape[0])], "step": 1000, "stream": "x_T"}
    with df.use_backend("reference"):
        expected = df.randn(shape, **arguments)
    got = df.randn(shape, **arguments, dtype=dtype, memory_format=LAYOUTS[layout])
    assert got.is_contiguous(memory_format=LAYOUTS[layout])
    assert same_bits(got, expected.to(dtype))


def test_float64_holds_the_float32_values() -> None:
    assert torch.equal(df.randn((2, 9), dtype=torch.float64), df.randn((2, 9)).double())


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    code = (
        "import ddpm_fast as df, torch, hashlib;"
        "x = df.randn((3, 5, 61, 67), seed=11, memory_format=torch.channels_last);"
        "y = df.randn((2, 4099), seed=12, dtype=torch.bfloat16).view(torch.int16);"
        "z = df.randn((2, 4099), seed=12, dtype=torch.float16).view(torch.int16);"
        "print(*(hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for t in (x, y, z)))"
    )
    assert run_with_isa(isa, code) == run_with_isa("", code)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_any_number_of_channels_is_interleaved(isa: str) -> None:
    # Sizes about the runs of 16 and 128 pixels, between guards: what is written beyond the image shows.
    code = """
import ddpm_fast as df, torch
for channels in (2, 3, 4, 5, 7, 8):
    for pixels in (1, 2, 15, 16, 17, 18, 33, 127, 128, 129, 145, 700):
        shape = (2, channels, 1, pixels)
        guarded = torch.full((2 * channels * pixels + 32,), 7.0)
        image = guarded[16:-16].view(2, 1, pixels, channels).permute(0, 3, 1, 2)
        df.randn(shape, seed=5, out=image)
        with df.use_backend("reference"):
            expected = df.randn(shape, seed=5)
        assert torch.equal(image, expected), shape
        assert (guarded[:16] == 7).all() and (guarded[-16:] == 7).all(), shape
print("equal")
"""
    assert run_with_isa(isa, code) == "equal"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(backend: str, layout: str) -> None:
    batch = df.randn((64, 3, 16, 15), seed=3, step=4, memory_format=LAYOUTS[layout])
    alone = df.randn((1, 3, 16, 15), seed=3, step=4, sample_ids=[7])
    assert same_bits(batch[7:8], alone)


def test_the_number_of_threads_changes_nothing() -> None:
    torch.set_num_threads(1)
    one = df.randn((16, 3, 64, 64), seed=1)
    torch.set_num_threads(2)
    assert same_bits(one, df.randn((16, 3, 64, 64), seed=1))


def test_a_step_for_each_sample(backend: str) -> None:
    steps = torch.tensor([5, 0, 2])
    together = df.randn((3, 2, 7), step=steps)
    for i, step in enumerate(steps.tolist()):
        assert same_bits(together[i : i + 1], df.randn((1, 2, 7), step=step, sample_ids=[i]))


def test_seed_and_out_may_be_tensors(backend: str) -> None:
    out = torch.full((3, 2, 8, 8), math.nan).contiguous(memory_format=torch.channels_last)
    assert df.randn(out.shape, seed=torch.tensor([9]), out=out) is out
    assert same_bits(out, df.randn((3, 2, 8, 8), seed=9))
    view = torch.full((2 * 3 * 8 + 1,), math.nan)[1:].reshape(2, 3, 8)  # a storage offset, no 16-byte boundary
    assert same_bits(df.randn(view.shape, seed=9, out=view), df.randn((2, 3, 8), seed=9))


def test_an_empty_batch_is_empty(backend: str) -> None:
    assert df.randn((0, 3, 4, 4)).shape == (0, 3, 4, 4)
    assert df.randn((2, 0)).shape == (2, 0)


def test_the_distribution_is_normal() -> None:
    # 10^7 draws; each bound is about four standard deviations of the statistic, and the draws are fixed.
    z = df.randn((100, 100_000), seed=2024).double()
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs(z.pow(3).mean()) < 4 * (15 / n) ** 0.5
    assert abs(z.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 0.001


def test_samples_steps_streams_and_seeds_are_uncorrelated() -> None:
    n = 1 << 18
    draws = torch.cat(
        [
            df.randn((3, n), seed=1),
            df.randn((1, n), seed=1, step=1),
            df.randn((1, n), seed=1, stream="x_T"),
            df.randn((1, n), seed=2),
            df.randn((1, n), seed=1 << 32),
        ]
    )
    correlations = torch.corrcoef(draws.double()) - torch.eye(len(draws), dtype=torch.float64)
    assert correlations.abs().max() < 4.5 / n**0.5
    shifted = torch.corrcoef(torch.stack([draws[0, 1:], draws[0, :-1]]).double())[0, 1]  # neighbours in a block
    assert shifted.abs() < 4.5 / n**0.5


def test_no_noise_or_step_kernel_holds_a_fused_multiply_add() -> None:
    objdump = shutil.which("objdump")
    assert objdump, "objdump comes with the compiler's binutils"
    from ddpm_fast import _C

    listing = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", _C.__file__], capture_output=True, text=True, check=True
    )
    kernels = ("fill_normal", "fill_part", "normal_tiles", "noising_tiles", "denoise_tiles")
    seen: set[str] = set()
    inside: str | None = None
    for line in listing.stdout.splitlines():
        if match := re.match(r"[0-9a-f]+ <(.*)>:", line):
            inside = next((kernel for kernel in kernels if kernel in match[1]), None)
            seen |= {inside} if inside else set()
        elif inside:
            assert not re.search(r"\bvfn?m(add|sub)", line), f"{inside}: {line}"
    assert {"fill_normal", "noising_tiles", "denoise_tiles"} <= seen


def test_timesteps_are_uniform_and_belong_to_their_sample() -> None:
    t = random_timesteps(100_000, 1000, seed=1, step=3)
    assert t.min() == 0
    assert t.max() == 999
    counts = torch.bincount(t, minlength=1000)
    assert stats.chisquare(counts.numpy()).pvalue > 0.001
    assert torch.equal(random_timesteps(3, 1000, seed=1, step=3, sample_ids=[7, 0, 99]), t[[7, 0, 99]])
    assert not torch.equal(random_timesteps(100, 1000, seed=1, step=4), t[:100])


def test_opcheck(backend: str) -> None:
    out = torch.empty(2, 3, 4, 5)
    ids = torch.tensor([4, 2])
    torch.library.opcheck(NORMAL[backend], (out, torch.tensor([1]), ids, torch.tensor([0]), 1))
    torch.library.opcheck(NORMAL[backend], (out, torch.tensor([1]), None, torch.tensor([0, 3]), 1))


def test_compiles_into_one_graph(backend: str) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return df.randn(x.shape, seed=3) + x

    x = torch.zeros(2, 3, 8, 8)
    assert torch.equal(torch.compile(f, fullgraph=True)(x), f(x))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"shape": ()}, ValueError, r"shape must be \(N, \*\)"),
        ({"shape": (2, -1)}, ValueError, "shape"),
        ({"shape": (2, 1.5)}, ValueError, "shape"),
        ({"seed": -1}, ValueError, r"seed must lie in \[0, 2\^64\), not -1"),
        ({"seed": 1 << 64}, ValueError, "seed"),
        ({"seed": 1.0}, TypeError, "seed must be an int.*not float"),
        ({"seed": True}, TypeError, "seed"),
        ({"seed": torch.tensor([1, 2])}, ValueError, "one element"),
        ({"seed": torch.tensor([1.0])}, ValueError, "int64"),
        ({"sample_ids": [1, 2, 3]}, ValueError, r"sample_ids must be int64 of shape \(2,\)"),
        ({"sample_ids": [0, -1]}, ValueError, "number 1 is -1"),
        ({"sample_ids": [0, 1 << 32]}, ValueError, "number 1"),
        ({"sample_ids": torch.tensor([0.0, 1.0])}, ValueError, "int64"),
        ({"step": -1}, ValueError, "step must lie in"),
        ({"step": 1.5}, TypeError, "step"),
        ({"step": torch.zeros(3, dtype=torch.int64)}, ValueError, "1 or 2 elements"),
        ({"stream": "nonsense"}, ValueError, "stream must be one of .*x_T"),
        ({"dtype": torch.int32}, ValueError, "dtype must be float32"),
        ({"out": torch.empty(3, 2)}, ValueError, r"out must be .* of shape \(2, 6\)"),
        ({"out": torch.empty(6, 2).T}, ValueError, "contiguous or channels_last"),
        ({"out": torch.empty(2, 6, dtype=torch.int64)}, ValueError, "floating-point"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        df.randn(**{"shape": (2, 6), **change})


@pytest.mark.parametrize("timesteps", [0, -3, 1 << 31])
def test_bad_timesteps_are_named(timesteps: int) -> None:
    with pytest.raises(ValueError, match="timesteps must lie in"):
        random_timesteps(2, timesteps, seed=0)
