"""One step of the reverse process: design order, bits, gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.backends.reference.denoise import exp_poly
from ddpm_fast.ops import denoise
from ddpm_fast.ops.denoise import DENOISE
from ddpm_fast.solvers import COLUMNS, ddpm_table

from .common import SHAPES_AND_LAYOUTS, laid_out, run_with_isa, same_bits, shape_and_layout_id

SCHEDULE = df.NoiseSchedule.linear(1000)
VARIANCES = {"fixed": "fixed_small", "learned": "learned", "learned_range": "learned_range"}
GUIDANCE = 3.0
EPS = 2.0**-24


def table(variance: str = "fixed", prediction: str = "epsilon") -> Tensor:
    return ddpm_table(SCHEDULE, variance=VARIANCES[variance], prediction=prediction, guidance_scale=GUIDANCE).rows


def output_shape(shape: tuple[int, ...], variance: str) -> tuple[int, ...]:
    return shape if variance == "fixed" else (shape[0], 2 * shape[1], *shape[2:])


def in_float64(
    x_t: Tensor,
    output: Tensor,
    rows: Tensor,
    index: Tensor,
    *,
    prediction: str,
    variance: str,
    clip: tuple[float, float] | None,
    unconditional: Tensor | None,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The step written out from the paper with the table's own numbers.

    Returns x_{t-1} and x0, and for each the sum of the magnitudes of the terms it is made of: float32's roundings are
    relative to those.
    """
    row = {name: rows.double()[index, i].reshape(-1, *[1] * (x_t.dim() - 1)) for i, name in enumerate(COLUMNS)}
    channels, x_t, output = x_t.shape[1], x_t.double(), output.double()
    e = output[:, :channels]
    e_terms = e.abs()
    if unconditional is not None:
        u, w = unconditional.double()[:, :channels], row["guidance_scale"]
        e, e_terms = u + w * (e - u), u.abs() + w * (e.abs() + u.abs())
    if prediction == "x0":
        x0, x0_terms = e, e_terms
    elif prediction == "x_prev":
        x0 = (e - row["mean_from_x"] * x_t) / row["mean_from_x0"]
        x0_terms = (e_terms + row["mean_from_x"] * x_t.abs()) / row["mean_from_x0"]
    else:
        x0 = row["x0_from_x"] * x_t - row["x0_from_output"] * e
        x0_terms = row["x0_from_x"] * x_t.abs() + row["x0_from_output"] * e_terms
    if clip is not None:
        x0 = x0.clamp(*clip)
    if prediction == "x_prev":
        mean, terms = e, e_terms
    else:
        mean = row["mean_from_x0"] * x0 + row["mean_from_x"] * x_t
        terms = row["mean_from_x0"] * x0_terms + row["mean_from_x"] * x_t.abs()
    if noise is None:
        return mean, terms, x0, x0_terms
    sigma, sigma_terms = row["sigma"], row["sigma"]
    if variance != "fixed":
        v = output[:, channels:]
        log_variance, log_terms = v, v.abs()
        if variance == "learned_range":
            log_variance = (v + 1) / 2 * row["log_max"] + (1 - v) / 2 * row["log_min"]
            log_terms = (v.abs() + 1) / 2 * (row["log_max"].abs() + row["log_min"].abs())
        sigma = sigma * (0.5 * log_variance).exp()
        sigma_terms = sigma * (1 + log_terms)  # an error of the logarithm is a relative error of sigma
    return mean + sigma * noise.double(), terms + sigma_terms * noise.double().abs(), x0, x0_terms


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "x_prev"])
@pytest.mark.parametrize("case", SHAPES_AND_LAYOUTS, ids=shape_and_layout_id)
def test_the_step_is_the_papers_and_has_the_references_bits(
    backend: str, case: tuple[tuple[int, ...], str], prediction: str, variance: str
) -> None:
    shape, layout = case
    x_t = laid_out(torch.randn(shape), layout)
    rows, index = table(variance, prediction), torch.randint(0, 1000, shape[:1])
    for dtype, guided, z in itertools.product(
        (torch.float32, torch.float16, torch.bfloat16), (False, True), ("seed", "given", "none")
    ):
        output = torch.randn(output_shape(shape, variance)).to(dtype)
        unconditional = torch.randn_like(output) if guided else None
        noise = torch.randn(shape) if z == "given" else None
        options: dict[str, Any] = {
            "prediction": prediction,
            "variance": variance,
            "clip": (-1.0, 1.0),
            "unconditional": unconditional,
        }
        drawn = {"noise": noise, "seed": 9 if z == "seed" else None}
        x0, expected_x0 = torch.empty_like(x_t), torch.empty_like(x_t)
        got = denoise(x_t, output, rows, index, x0_out=x0, **options, **drawn)
        assert got.stride() == x_t.stride()
        with df.use_backend("reference"):
            expected = denoise(x_t, output, rows, index, x0_out=expected_x0, **options, **drawn)
        assert torch.equal(got, expected)
        assert torch.equal(x0, expected_x0)

        if z == "seed":
            options["noise"] = torch.cat(
                [df.randn((1, *shape[1:]), seed=9, step=int(i), sample_ids=[n]) for n, i in enumerate(index)]
            )
        else:
            options["noise"] = noise
        paper, terms, paper_x0, x0_terms = in_float64(x_t, output, rows, index, **options)
        # Four roundings of the largest term on the way to x0, four more to x_{t-1}.
        assert ((x0 - paper_x0).abs() <= 4 * EPS * x0_terms).all()
        assert ((got - paper).abs() <= 8 * EPS * terms).all()


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("output_layout", ["contiguous", "channels_last", "strided", "transposed"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_networks_output_may_lie_otherwise_than_the_state(
    backend: str, layout: str, output_layout: str, variance: str
) -> None:
    shape = (3, 3, 12, 12)
    x_t = laid_out(torch.randn(shape), layout)
    wide = output_shape(shape, variance)
    output = {
        "contiguous": lambda: torch.randn(wide),
        "channels_last": lambda: laid_out(torch.randn(wide), "channels_last"),
        "strided": lambda: torch.randn(3, wide[1] + 2, 12, 12)[:, 1:-1],
        "transposed": lambda: torch.randn(wide).transpose(2, 3),
    }[output_layout]()
    rows, index = table(variance), torch.tensor([0, 500, 999])
    got = denoise(x_t, output, rows, index, variance=variance, seed=1)
    assert same_bits(got, denoise(x_t.contiguous(), output.contiguous(), rows, index, variance=variance, seed=1))


def test_guidance_reads_both_halves_of_one_output(backend: str) -> None:
    x_t, both = torch.randn(3, 3, 9, 9), torch.randn(6, 6, 9, 9)
    unconditional, conditional = both.chunk(2)
    rows, index = table("learned_range"), torch.tensor([20])
    got = denoise(x_t, conditional, rows, index, variance="learned_range", unconditional=unconditional, seed=1)
    # Epsilon channels are mixed; the variance is the conditional one.
    mixed = torch.cat([unconditional[:, :3] + GUIDANCE * (conditional - unconditional)[:, :3], conditional[:, 3:]], 1)
    assert same_bits(got, denoise(x_t, mixed, rows, index, variance="learned_range", seed=1))


def test_thresholding_clamps_and_divides(backend: str) -> None:
    x_t, x0 = torch.randn(3, 3, 9, 9), 3 * torch.randn(3, 3, 9, 9)
    s = torch.tensor([1.0, 1.7, 2.5])
    bound = s.reshape(3, 1, 1, 1)
    got = torch.empty_like(x_t)
    denoise(x_t, x0, table(prediction="x0"), torch.tensor([20]), prediction="x0", threshold=s, x0_out=got)
    assert same_bits(got, x0.clamp(-bound, bound) / bound)
    assert got.abs().max() <= 1


def test_the_last_step_draws_nothing_and_without_noise_the_mean_comes_back(backend: str) -> None:
    x_t, e = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    x_t[0], e[0] = -0.0, 0.0  # the mean is -0
    last = torch.tensor([999])
    mean = denoise(x_t, e, table(), last)
    assert torch.signbit(mean[0]).all()
    assert same_bits(denoise(x_t, e, table(), last, seed=1), mean)
    assert torch.equal(denoise(x_t, e, table(), last, noise=torch.randn_like(x_t)), mean)
    first = torch.tensor([0])
    sigma = table()[0, COLUMNS.index("sigma")]
    z = df.randn(x_t.shape, seed=1, step=0)
    assert same_bits(denoise(x_t, e, table(), first, seed=1), denoise(x_t, e, table(), first) + sigma * z)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
def test_in_place_and_out(backend: str, layout: str, offset: int) -> None:
    def fresh(value: Tensor) -> Tensor:
        storage = torch.full((value.numel() + offset,), float("nan"))
        view = storage[offset:].as_strided(value.shape, value.stride(), offset)
        return view.copy_(value)

    x_t, e = laid_out(torch.randn(2, 3, 15, 17), layout), torch.randn(2, 3, 15, 17)
    rows, index = table(), torch.tensor([3, 700])
    expected = denoise(x_t, e, rows, index, clip=(-1, 1), seed=2)
    state = fresh(x_t)
    assert denoise(state, e, rows, index, clip=(-1, 1), seed=2, out=state) is state
    assert same_bits(state, expected)
    out = fresh(torch.empty_like(x_t))
    denoise(x_t, e, rows, index, clip=(-1, 1), seed=2, out=out)
    assert same_bits(out, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(backend: str, layout: str) -> None:
    x_t, e = laid_out(torch.randn(64, 3, 16, 16), layout), torch.randn(64, 3, 16, 16)
    torch.set_num_threads(2)
    batch = denoise(x_t, e, table(), torch.tensor([5]), seed=3)
    torch.set_num_threads(1)
    assert same_bits(denoise(x_t, e, table(), torch.tensor([5]), seed=3), batch)
    alone = denoise(x_t[7:8].contiguous(), e[7:8], table(), torch.tensor([5]), seed=3, sample_ids=[7])
    assert same_bits(alone, batch[7:8])


def test_nan_and_infinity_pass_through_as_in_torch(backend: str) -> None:
    x_t, e = torch.zeros(1, 1, 1, 4), torch.tensor([float("nan"), float("inf"), -float("inf"), 0.5])
    x0 = torch.empty_like(x_t)
    denoise(x_t, e.reshape(1, 1, 1, 4), table(), torch.tensor([5]), clip=(-1, 1), x0_out=x0)
    assert torch.equal(x0.isnan(), torch.tensor([[[[True, False, False, False]]]]))
    assert x0[..., 1:3].flatten().tolist() == [-1, 1]
    learned = torch.cat([x_t, e.reshape(1, 1, 1, 4)], 1)
    out = denoise(x_t, learned, table("learned"), torch.tensor([5]), variance="learned", noise=torch.ones_like(x_t))
    assert torch.equal(out.isnan(), torch.tensor([[[[True, False, False, False]]]]))
    assert out[..., 1].item() == pytest.approx(torch.tensor(88.0).exp().item(), rel=1e-6)  # clamped, not infinite


def test_the_polynomial_exponential_is_within_an_ulp() -> None:
    x = torch.linspace(-87, 88, 1 << 20)
    got, exact = exp_poly(x).double(), x.double().exp()
    _, exponent = torch.frexp(exact)
    ulp = torch.ldexp(torch.ones_like(exact), exponent - 24)
    assert ((got - exact).abs() / ulp).max() <= 0.99
    # torch's own is within an ulp as well, so the two are within two of each other.
    assert ((got - x.exp().double()).abs() / ulp).max() <= 2


def test_every_instruction_set_gives_the_same_bits() -> None:
    code = (
        "import ddpm_fast as df, torch, hashlib;"
        "from ddpm_fast.solvers import ddpm_table; from ddpm_fast.ops import denoise;"
        "g = torch.Generator().manual_seed(0);"
        "x = torch.randn(3, 3, 61, 67, generator=g); e = torch.randn(3, 6, 61, 67, generator=g);"
        "rows = ddpm_table(df.NoiseSchedule.linear(100), variance='learned_range', guidance_scale=2.).rows;"
        "r = [denoise(x.contiguous(memory_format=f), e.to(d), rows, torch.tensor([0, 50, 99]), clip=(-1, 1), seed=1,"
        " variance='learned_range', unconditional=e.flip(0)).contiguous()"
        " for f in (torch.contiguous_format, torch.channels_last) for d in (torch.float, torch.half, torch.bfloat16)];"
        "print(*(hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in r))"
    )
    assert run_with_isa("avx512", code) == run_with_isa("avx2", code) == run_with_isa("generic", code)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "x_prev"])
def test_gradients_in_float64(prediction: str, variance: str) -> None:
    shape = (2, 2, 3, 3)
    x_t = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    outputs = [torch.randn(output_shape(shape, variance), dtype=torch.float64, requires_grad=True) for _ in range(2)]
    rows, index = table(variance, prediction), torch.tensor([900, 10])
    noise = torch.randn(shape, dtype=torch.float64)

    def f(x: Tensor, e: Tensor, u: Tensor) -> Tensor:
        return denoise(x, e, rows, index, prediction=prediction, variance=variance, unconditional=u, noise=noise)

    assert torch.autograd.gradcheck(f, (x_t, *outputs))


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_bits_do_not_depend_on_gradients(backend: str, variance: str) -> None:
    shape = (2, 3, 8, 8)
    x_t, output = torch.randn(shape), torch.randn(output_shape(shape, variance))
    rows, index = table(variance), torch.tensor([3, 999])
    expected = denoise(x_t, output, rows, index, variance=variance, clip=(-1, 1), seed=4)
    leaf = output.clone().requires_grad_()
    got = denoise(x_t, leaf, rows, index, variance=variance, clip=(-1, 1), seed=4)
    assert torch.equal(got.detach(), expected)
    got.square().sum().backward()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad != 0).any()


def test_opcheck(backend: str) -> None:
    x_t, e, u = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 4, 5), torch.randn(2, 6, 4, 5)
    out, x0 = torch.empty_like(x_t), torch.empty_like(x_t)
    rows, index = table("learned_range"), torch.tensor([1, 2])
    seed, ids = torch.tensor([1]), torch.tensor([3, 4])
    torch.library.opcheck(
        DENOISE[backend], (x_t, e, u, rows, index, 0, 2, -1.0, 1.0, None, None, seed, ids, 1, out, x0)
    )
    noise, threshold = torch.randn_like(x_t), torch.ones(2)
    torch.library.opcheck(
        DENOISE[backend],
        (x_t, x_t, None, table(), index, 1, 0, None, None, threshold, noise, None, None, 1, out, None),
    )


def test_compiles_into_one_graph(backend: str) -> None:
    rows, index = table(), torch.tensor([3])

    def f(x: Tensor, e: Tensor) -> Tensor:
        return denoise(x, e * 2, rows, index, clip=(-1, 1), seed=3) + 1

    x, e = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    assert torch.equal(torch.compile(f, fullgraph=True)(x, e), f(x, e))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x_t": torch.zeros(2, 3, 4, 4).half()}, "x_t must be float32"),
        ({"x_t": torch.zeros(2)}, r"x_t must be \(N, C, \*\)"),
        ({"x_t": torch.zeros(2, 3, 4, 8)[..., ::2]}, "contiguous or channels_last"),
        ({"model_output": torch.zeros(2, 3, 4, 5)}, r"model_output must be .* of shape \(2, 3, 4, 4\)"),
        ({"model_output": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "floating-point"),
        ({"variance": "learned"}, r"model_output must be .* of shape \(2, 6, 4, 4\)"),
        ({"variance": "fixed_small"}, "variance must be one of .*'fixed'"),
        ({"prediction": "eps"}, "prediction must be one of .*not 'eps'"),
        ({"unconditional": torch.zeros(1, 3, 4, 4)}, "unconditional must be"),
        ({"coefficients": torch.zeros(10, 7)}, r"coefficients must be float32 of shape \(S, 8\)"),
        ({"coefficients": torch.zeros(10, 8).double()}, "coefficients"),
        ({"index": torch.tensor([1, 2, 3])}, r"index must be int64 of shape \(1,\) or \(2,\)"),
        ({"index": torch.tensor(1)}, "index"),
        ({"index": torch.tensor([1000])}, r"index must lie in \[0, 1000\); element 0 is 1000"),
        ({"index": torch.tensor([0, -1])}, "element 1 is -1"),
        ({"clip": (1.0, -1.0)}, "clip must be"),
        ({"clip": (float("nan"), 1.0)}, "clip must be"),
        ({"threshold": torch.ones(3)}, r"threshold must be float32 of shape \(2,\)"),
        ({"threshold": torch.ones(2).double()}, "threshold"),
        ({"noise": torch.zeros(2, 3, 4, 5)}, "noise must be"),
        ({"noise": torch.zeros(2, 3, 4, 4), "seed": 1}, "exclude each other"),
        ({"seed": -1}, "seed must lie in"),
        ({"seed": 1, "sample_ids": [1]}, "sample_ids"),
        ({"stream": "?"}, "stream must be one of"),
        ({"out": torch.zeros(2, 3, 4, 5)}, "out must have x_t's shape"),
        ({"out": torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)}, "strides"),
        ({"x0_out": torch.zeros(2, 3, 4, 4).double()}, "x0_out must have"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], match: str) -> None:
    arguments: dict[str, Any] = {
        "x_t": torch.zeros(2, 3, 4, 4),
        "model_output": torch.zeros(2, 3, 4, 4),
        "coefficients": table(),
        "index": torch.tensor([0]),
        **change,
    }
    with pytest.raises(ValueError, match=match):
        denoise(**arguments)
