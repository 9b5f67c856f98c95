"""q_sample: the forward process (Ho et al. 2020, equation 4)."""

from __future__ import annotations

import pytest
import torch

import ddpm_fast as df
from ddpm_fast.ops.noising import NOISING, NOISING_RANDOM

from .common import SHAPES_AND_LAYOUTS, laid_out, run_with_isa, same_bits, shape_and_layout_id

SCHEDULE = df.NoiseSchedule.linear(1000)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8]


def images(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=dtype) if dtype == torch.uint8 else torch.randn(shape).to(dtype)


def in_float64(x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    x0 = x0.double() / 127.5 - 1 if x0.dtype == torch.uint8 else x0.double()
    abar = SCHEDULE.alphas_cumprod[t].reshape(-1, *[1] * (x0.dim() - 1))
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES_AND_LAYOUTS, ids=shape_and_layout_id)
def test_x_t_is_the_papers_and_has_the_references_bits(
    backend: str, case: tuple[tuple[int, ...], str], dtype: torch.dtype
) -> None:
    shape, layout = case
    x0 = laid_out(images(shape, dtype), layout)
    t = torch.randint(0, 1000, shape[:1])
    x_t, noise = df.q_sample(x0, t, SCHEDULE, seed=5, step=7)
    result = torch.float32 if dtype == torch.uint8 else dtype
    assert (x_t.dtype, noise.dtype) == (result, result)
    assert x_t.stride() == noise.stride() == x0.stride()
    assert same_bits(noise, df.randn(shape, seed=5, step=7, stream="training", dtype=result))
    # Three roundings of float32, and one to the result's dtype.
    tolerance = {torch.float32: 6e-7, torch.float16: 4e-3, torch.bfloat16: 3e-2}[result]
    torch.testing.assert_close(x_t.double(), in_float64(x0, t, noise), rtol=tolerance, atol=tolerance)
    with df.use_backend("reference"):
        expected, _ = df.q_sample(x0, t, SCHEDULE, seed=5, step=7)
    assert same_bits(x_t, expected)
    assert same_bits(df.q_sample(x0, t, SCHEDULE, noise=noise)[0], x_t)


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("stream", ["training", "augmentation"])
def test_the_stream_is_that_of_randn(backend: str, stream: str, grad: bool) -> None:
    x0, t = images((2, 3, 8, 8)).requires_grad_(grad), torch.tensor([5, 600])
    x_t, noise = df.q_sample(x0, t, SCHEDULE, seed=5, step=7, stream=stream)
    assert same_bits(noise, df.randn((2, 3, 8, 8), seed=5, step=7, stream=stream))
    assert same_bits(x_t.detach(), df.q_sample(x0.detach(), t, SCHEDULE, noise=noise)[0])


def test_every_byte_becomes_the_float_it_should(backend: str) -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    t = torch.zeros(1, dtype=torch.int64)
    x_t, _ = df.q_sample(levels, t, SCHEDULE, noise=torch.zeros(1, 1, 16, 16))
    scaled = levels.float() / 127.5 - 1
    assert (scaled.min(), scaled.max()) == (-1, 1)
    assert torch.equal(x_t, SCHEDULE.noising_coefficients("cpu")[0, 0] * scaled)


@pytest.mark.parametrize("noise_layout", ["contiguous", "channels_last", "transposed", "expanded"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_given_noise_may_lie_otherwise_than_x0(backend: str, layout: str, noise_layout: str) -> None:
    shape = (3, 3, 12, 12)
    x0, t = laid_out(images(shape), layout), torch.tensor([0, 500, 999])
    noise = {
        "contiguous": lambda: torch.randn(shape),
        "channels_last": lambda: laid_out(torch.randn(shape), "channels_last"),
        "transposed": lambda: torch.randn(shape).transpose(2, 3),
        "expanded": lambda: torch.randn(3, 1, 12, 12).expand(shape),
    }[noise_layout]()
    got, returned = df.q_sample(x0, t, SCHEDULE, noise=noise)
    assert returned is noise
    assert same_bits(got, df.q_sample(x0.contiguous(), t, SCHEDULE, noise=noise.contiguous())[0])


def test_half_precision_noise_for_a_float32_image(backend: str) -> None:
    x0, noise, t = images((2, 3, 8, 8)), torch.randn(2, 3, 8, 8).bfloat16(), torch.tensor([3, 4])
    assert same_bits(df.q_sample(x0, t, SCHEDULE, noise)[0], df.q_sample(x0, t, SCHEDULE, noise.float())[0])


def test_x0_may_be_any_view(backend: str) -> None:
    base = images((4, 6, 9, 9))
    t = torch.tensor([1, 2, 3, 4])
    for view in (base[:, ::2], base.transpose(2, 3), base[:, 1:4], base[:, :, 1:, 2:]):
        assert same_bits(
            df.q_sample(view, t, SCHEDULE, seed=1)[0], df.q_sample(view.contiguous(), t, SCHEDULE, seed=1)[0]
        )


def test_without_a_seed_torchs_generator_decides() -> None:
    x0, t = images((2, 3, 8, 8)), torch.tensor([3, 4])
    torch.manual_seed(1)
    first = df.q_sample(x0, t, SCHEDULE)[0]
    assert not torch.equal(first, df.q_sample(x0, t, SCHEDULE)[0])
    torch.manual_seed(1)
    assert torch.equal(first, df.q_sample(x0, t, SCHEDULE)[0])


def test_a_sample_alone_has_the_bits_it_has_in_a_batch(backend: str) -> None:
    x0, t = images((64, 3, 9, 9), torch.uint8), torch.arange(64)
    batch, _ = df.q_sample(x0, t, SCHEDULE, seed=3)
    alone, _ = df.q_sample(x0[7:8], t[7:8], SCHEDULE, seed=3, sample_ids=[7])
    assert same_bits(batch[7:8], alone)


def test_float64_is_computed_in_float64() -> None:
    x0, t = images((3, 2, 4, 4)).double(), torch.tensor([0, 400, 999])
    x_t, noise = df.q_sample(x0, t, SCHEDULE, seed=1)
    assert x_t.dtype == torch.float64
    # The table is float32; the arithmetic is not.
    signal, sigma = SCHEDULE.noising_coefficients("cpu")[t].double().reshape(-1, 2, 1, 1, 1).unbind(1)
    assert torch.equal(x_t, signal * x0 + sigma * noise)


def test_gradients_reach_x0_and_noise() -> None:
    x0 = images((2, 3, 4, 4)).double().requires_grad_()
    noise = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([3, 900])
    assert torch.autograd.gradcheck(lambda a, b: df.q_sample(a, t, SCHEDULE, b)[0], (x0, noise))


@pytest.mark.parametrize("given", [True, False], ids=["noise-given", "noise-drawn"])
def test_the_bits_do_not_depend_on_gradients(backend: str, given: bool) -> None:
    x0, t = images((2, 3, 8, 8)), torch.tensor([3, 900])
    extra = {"noise": torch.randn(2, 3, 8, 8)} if given else {"seed": 4}
    expected, _ = df.q_sample(x0, t, SCHEDULE, **extra)
    leaf = x0.clone().requires_grad_()
    got, noise = df.q_sample(leaf, t, SCHEDULE, **extra)
    assert same_bits(got.detach(), expected)
    assert not noise.requires_grad
    got.sum().backward()
    signal = SCHEDULE.sqrt_alphas_cumprod.float()[t].reshape(2, 1, 1, 1)
    assert torch.equal(leaf.grad, signal.expand_as(leaf))


def test_every_instruction_set_gives_the_same_bits() -> None:
    code = (
        "import ddpm_fast as df, torch, hashlib;"
        "g = torch.Generator().manual_seed(0);"
        "x = torch.randint(0, 256, (3, 3, 61, 67), dtype=torch.uint8, generator=g);"
        "s = df.NoiseSchedule.cosine(100); t = torch.tensor([0, 50, 99]);"
        "a = df.q_sample(x, t, s, seed=1)[0];"
        "b = df.q_sample(x.half(), t, s, seed=1)[0].view(torch.int16);"
        "c = df.q_sample(x.bfloat16(), t, s, seed=1)[0].view(torch.int16);"
        "print(*(hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in (a, b, c)))"
    )
    assert run_with_isa("avx512", code) == run_with_isa("avx2", code) == run_with_isa("generic", code)


def test_opcheck(backend: str) -> None:
    x0, t, table = images((2, 3, 4, 5)), torch.tensor([1, 2]), SCHEDULE.noising_coefficients("cpu")
    out, noise = torch.empty_like(x0), torch.empty_like(x0)
    torch.library.opcheck(NOISING[backend], (x0, t, table, torch.randn_like(x0), out))
    step = torch.tensor([0])
    torch.library.opcheck(NOISING_RANDOM[backend], (x0, t, table, torch.tensor([1]), None, step, 2, out, noise))


def test_compiles_into_one_graph(backend: str) -> None:
    def f(x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return df.q_sample(x0, t, SCHEDULE, seed=3)[0] * 2

    x0, t = images((2, 3, 8, 8)), torch.tensor([5, 6])
    assert torch.equal(torch.compile(f, fullgraph=True)(x0, t), f(x0, t))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x0": torch.zeros(2, dtype=torch.int32)}, "x0 must be uint8, float16"),
        ({"x0": torch.zeros(2)}, r"x0 must be \(N, C, \*\), not of shape \(2,\)"),
        ({"t": torch.tensor([1, 2, 3])}, r"t must be int64 of shape \(2,\)"),
        ({"t": torch.tensor([1.0, 2.0])}, "not torch.float32"),
        ({"t": torch.tensor([1, 1000])}, r"t must lie in \[0, 1000\); element 1 is 1000"),
        ({"t": torch.tensor([-1, 0])}, "element 0 is -1"),
        ({"t": torch.tensor([1, 2], device="meta")}, "on cpu"),
        ({"noise": torch.zeros(2, 3, 4, 5)}, r"noise must be .* of shape \(2, 3, 4, 4\)"),
        ({"noise": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "floating-point"),
        ({"noise": torch.zeros(2, 3, 4, 4), "seed": 1}, "exclude each other"),
        ({"seed": -1}, "seed must lie in"),
        ({"seed": 1, "sample_ids": [1]}, "sample_ids"),
        ({"seed": 1, "step": -1}, "step"),
        ({"stream": "other"}, "stream must be one of"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], match: str) -> None:
    arguments = {"x0": torch.zeros(2, 3, 4, 4), "t": torch.tensor([1, 2]), "schedule": SCHEDULE, **change}
    with pytest.raises(ValueError, match=match):
        df.q_sample(**arguments)
