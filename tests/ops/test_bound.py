"""The terms of the variational bound, against openai's formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.ops import bound_terms
from ddpm_fast.ops.bound import BOUND_TERMS, BOUND_TERMS_BACKWARD
from ddpm_fast.training.tables import bound_coefficients
from tests.originals.bound import Bound

from .common import SHAPES_AND_LAYOUTS, laid_out, run_with_isa, same_bits, shape_and_layout_id

SCHEDULE = df.NoiseSchedule.linear(1000)
PREDICTIONS = ["epsilon", "x0", "v", "x_prev"]
VARIANCES = ["fixed_small", "fixed_large", "learned", "learned_range"]
CPU = torch.device("cpu")


def byte_images(shape: tuple[int, ...]) -> Tensor:
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    images.view(-1)[: min(2, images.numel())] = torch.tensor([0, 255], dtype=torch.uint8)[: images.numel()]
    return images


def scaled(images: Tensor) -> Tensor:
    return images.double() / 127.5 - 1


class Case:
    """Images, noise and an output that is right up to a small error, as a trained network's is."""

    def __init__(self, shape: tuple[int, ...], prediction: str, variance: str, schedule: df.NoiseSchedule = SCHEDULE):
        self.prediction, self.variance, self.schedule = prediction, variance, schedule
        self.original = Bound(schedule, prediction, variance)
        self.images = byte_images(shape)
        self.x0 = scaled(self.images)
        self.t = torch.tensor([0, 1, schedule.timesteps // 2, schedule.timesteps - 1])[torch.arange(shape[0]) % 4]
        noise = torch.randn(shape, dtype=torch.float64)
        self.x_t = self.original.q_sample(self.x0, self.t, noise)
        signal, sigma = (
            self.original.read(table, self.t, self.x0)
            for table in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
        )
        right = {
            "epsilon": noise,
            "x0": self.x0,
            "v": signal * noise - sigma * self.x0,
            "x_prev": self.original.q_posterior_mean(self.x0, self.x_t, self.t),
        }[prediction]
        # A few of the decoder's standard deviations at t = 0, where openai's subtraction still has digits left.
        error = {"epsilon": 0.1, "v": 0.1, "x0": 1e-2, "x_prev": 1e-3}[prediction]
        self.output = right + error * torch.randn(shape, dtype=torch.float64)
        if variance in ("learned", "learned_range"):
            values = torch.rand(shape, dtype=torch.float64) * 2.2 - 1.1
            if variance == "learned":
                values += self.original.read(schedule.posterior_log_variance_clipped, self.t, self.x0)
            self.output = torch.cat([self.output, values], dim=1)

    @property
    def kind(self) -> str:
        return "fixed" if self.variance.startswith("fixed") else self.variance

    def exact(self, clip: tuple[float, float] | None, output: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output = self.output if output is None else output
        terms = self.original.vb_terms_bpd(output, self.x0, self.x_t, self.t, clip)
        return terms.output, (terms.pred_xstart - self.x0).square().flatten(1).mean(1)

    def ours(
        self, dtype: torch.dtype, clip: tuple[float, float] | None, layout: str = "contiguous", **changes: Any
    ) -> tuple[Tensor, Tensor]:
        coefficients = bound_coefficients(self.schedule, self.prediction, self.variance, dtype, CPU)
        x0, x_t, output = (
            changes.pop(name, laid_out(tensor.to(dtype), layout) if tensor.dim() == 4 else tensor.to(dtype))
            for name, tensor in (("x0", self.x0), ("x_t", self.x_t), ("model_output", self.output))
        )
        return bound_terms(
            x0, x_t, output, self.t, coefficients, prediction=self.prediction, variance=self.kind, clip=clip, **changes
        )


@pytest.mark.parametrize("clip", [None, (-1.0, 1.0), (-0.5, 0.25)], ids=["free", "unit", "narrow"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_float64_is_openais(prediction: str, variance: str, clip: tuple[float, float] | None) -> None:
    case = Case((8, 3, 7, 5), prediction, variance)
    expected, got = case.exact(clip), case.ours(torch.float64, clip)
    # openai subtracts two distribution functions: what is left of a bin of 1e-9 has seven digits.
    torch.testing.assert_close(got[0], expected[0], rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-12, atol=1e-14)


def float32_tolerance(case: Case, bound: Tensor) -> Tensor:
    """What rounding the inputs to float32 alone may move: x0's error, as the term's scale sees it.

    In epsilon prediction x0 = recip * x_t - recipm1 * e, whose rounding the term at t divides by the posterior's
    standard deviation; the mean itself is predicted with a rounding that is larger still against that deviation.
    """
    s, t = case.schedule, case.t
    magnitude = {"epsilon": s.sqrt_recip_alphas_cumprod * 4, "v": 1 + 0 * s.betas, "x0": 1 + 0 * s.betas}
    if case.prediction == "x_prev":
        error = 2e-7 + 0 * s.betas
    else:
        error = 2.4e-7 * magnitude[case.prediction] * s.posterior_mean_coef1
    relative = error * torch.exp(-0.5 * s.posterior_log_variance_clipped)
    return 3e-6 * bound.abs() + 2 * (relative[t] * (bound.abs() + relative[t]).sqrt()) + 1e-9


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)], ids=["free", "unit"])
def test_float32_is_close(backend: str, prediction: str, variance: str, clip: tuple[float, float] | None) -> None:
    case = Case((8, 3, 17, 19), prediction, variance)
    expected, got = case.exact(clip), case.ours(torch.float32, clip)
    assert got[0].dtype == torch.float32
    assert bool(((got[0].double() - expected[0]).abs() <= float32_tolerance(case, expected[0])).all())


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("case", SHAPES_AND_LAYOUTS, ids=shape_and_layout_id)
def test_the_kernel_is_the_reference(case: tuple[tuple[int, ...], str], variance: str) -> None:
    shape, layout = case
    made = Case(shape, "v", variance)
    with df.use_backend("reference"):
        expected = made.ours(torch.float32, (-1.0, 1.0), layout)
    got = made.ours(torch.float32, (-1.0, 1.0), layout)
    # Float32 arithmetic, and sums of up to 128 in a lane, against float64.
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_bytes_and_half_precision_outputs_are_read(backend: str) -> None:
    case = Case((4, 3, 8, 8), "epsilon", "learned_range")
    plain = case.ours(torch.float32, None)
    # The bytes become x / 127.5 - 1 in float32, x0 is the float64 value rounded.
    torch.testing.assert_close(case.ours(torch.float32, None, x0=case.images)[0], plain[0], rtol=1e-4, atol=1e-7)
    half = case.output.bfloat16()
    got = case.ours(torch.float32, None, model_output=half)
    assert same_bits(got[0], case.ours(torch.float32, None, model_output=half.float())[0])


def test_the_layout_of_the_output_does_not_matter(backend: str) -> None:
    case = Case((4, 3, 9, 11), "epsilon", "learned_range")
    plain = case.ours(torch.float32, None)[0]
    assert same_bits(
        case.ours(torch.float32, None, model_output=laid_out(case.output.float(), "channels_last"))[0], plain
    )


def test_a_sample_alone_has_the_bits_it_has_in_a_batch(backend: str) -> None:
    case = Case((8, 3, 61, 67), "epsilon", "learned_range")
    coefficients = bound_coefficients(SCHEDULE, "epsilon", "learned_range", torch.float32, CPU)
    tensors = [tensor.float() for tensor in (case.x0, case.x_t, case.output)]
    options = {"variance": "learned_range"}
    batch, _ = bound_terms(*tensors, case.t, coefficients, **options)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        alone, _ = bound_terms(*(tensor[5:6] for tensor in tensors), case.t[5:6], coefficients, **options)
        assert same_bits(alone, batch[5:6])


@pytest.mark.parametrize("clip", [None, (-0.9, 0.9)], ids=["free", "clipped"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradient_in_float64(prediction: str, variance: str, clip: tuple[float, float] | None) -> None:
    """Against autograd through openai's formulas."""
    case = Case((4, 2, 3, 5), prediction, variance)
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    output = case.output.requires_grad_()
    (expected,) = torch.autograd.grad((case.exact(clip, output)[0] * weights).sum(), output)
    (got,) = torch.autograd.grad((case.ours(torch.float64, clip, model_output=output)[0] * weights).sum(), output)
    # Relative to the sample's largest, since openai's subtraction loses digits in the decoder's tails.
    largest = expected.abs().flatten(1).amax(1).reshape(-1, 1, 1, 1)
    assert bool(((got - expected).abs() <= 1e-7 * largest).all())


def test_gradcheck() -> None:
    case = Case((3, 1, 2, 3), "epsilon", "learned_range", df.NoiseSchedule.linear(3))

    def f(output: Tensor) -> Tensor:
        return case.ours(torch.float64, None, model_output=output)[0]

    assert torch.autograd.gradcheck(f, case.output.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mean_gradient", [True, False], ids=["all", "variance-only"])
@pytest.mark.parametrize("variance", ["fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_kernels_gradient_is_the_references(
    prediction: str, variance: str, mean_gradient: bool, layout: str, dtype: torch.dtype
) -> None:
    case = Case((4, 3, 9, 11), prediction, variance)
    grads = []
    for backend, with_mean in (("reference", True), ("reference", mean_gradient), ("cpu", mean_gradient)):
        output = laid_out(case.output.to(dtype), layout).requires_grad_()
        with df.use_backend(backend):
            terms, _ = case.ours(torch.float32, (-0.9, 0.9), layout, model_output=output, mean_gradient=with_mean)
            (grad,) = torch.autograd.grad((terms * torch.tensor([1.0, -2.0, 3.0, 0.5])).sum(), output)
        assert grad.dtype == dtype
        grads.append(grad.double())
    whole, expected, got = grads
    if not mean_gradient:
        assert not got[:, :3].any()
    largest = whole.abs().flatten(1).amax(1).reshape(-1, 1, 1, 1)
    # What float32 leaves of x0's error, and of that of a mean, which is a thousandth of the mean itself.
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-3 if prediction == "x_prev" else 2e-5
    assert bool(((got - expected).abs() <= tolerance * largest).all())


@settings(max_examples=200, deadline=None)
@given(
    byte=st.integers(0, 255),
    mean=st.floats(-3, 3),
    log_variance=st.floats(-14, 2),
    backend=st.sampled_from(df.available_backends()),
)
def test_decoder(byte: int, mean: float, log_variance: float, backend: str) -> None:
    """A bin's probability for any mean and variance; float32 inputs, so that both sides see the same numbers."""
    x0 = torch.tensor(byte / 127.5 - 1.0, dtype=torch.float32)
    output = torch.tensor([mean, log_variance], dtype=torch.float32).reshape(1, 2, 1)
    coefficients = bound_coefficients(SCHEDULE, "x0", "learned", torch.float32, CPU)
    image, t = x0.reshape(1, 1, 1), torch.zeros(1, dtype=torch.int64)
    with df.use_backend(backend):
        got, _ = bound_terms(image, torch.zeros(1, 1, 1), output, t, coefficients, prediction="x0", variance="learned")
    # The bins' probabilities in 60 digits' worth of care: log(sigmoid(a) - sigmoid(b)) without cancellation.
    x, m, v = float(x0), float(output[0, 0, 0]), float(output[0, 1, 0])
    inverse = math.exp(-0.5 * v)
    p, q = inverse * (x - m + 1 / 255), inverse * (x - m - 1 / 255)
    logit = lambda z: 2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)  # noqa: E731
    softplus = lambda z: max(z, 0.0) + math.log1p(math.exp(-abs(z)))  # noqa: E731
    if x < -0.999:
        nll = softplus(-logit(p))
    elif x > 0.999:
        nll = softplus(logit(q))
    else:
        gap = logit(p) - logit(q)
        nll = softplus(-logit(p)) + softplus(logit(q)) - (math.log(-math.expm1(-gap)) if gap > 0 else -math.inf)
    nll = min(nll, -math.log(1e-12))
    # gap is a difference of numbers up to (3 / sigma)^3, and float64 has 16 digits.
    assert float(got) == pytest.approx(nll / math.log(2), rel=1e-5, abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(excess=st.floats(-8, 8), difference=st.floats(-3, 3), backend=st.sampled_from(df.available_backends()))
@example(excess=1e-12, difference=0.0, backend="reference")
def test_divergence(excess: float, difference: float, backend: str) -> None:
    """KL of two normal distributions from equal ones to ones far apart, to float32's precision of the result."""
    coefficients = torch.tensor([[0.0, 0, 1, 0, 0, 0, 0]] * 2)
    output = torch.tensor([difference, excess], dtype=torch.float32).reshape(1, 2, 1)
    image, t = torch.zeros(1, 1, 1), torch.ones(1, dtype=torch.int64)
    with df.use_backend(backend):
        got, _ = bound_terms(image, image, output, t, coefficients, prediction="x0", variance="learned")
    d, u = float(output[0, 1, 0]), float(output[0, 0, 0])
    series = d * d / 2 - d**3 / 6 + d**4 / 24 if abs(d) < 1e-4 else d + math.expm1(-d)
    want = 0.5 * (series + u * u * math.exp(-d)) / math.log(2)
    # The reference's d + expm1(-d) is of second order in d, and is left with the float64 rounding of the first.
    assert float(got) == pytest.approx(want, rel=2e-6, abs=1e-30 + abs(d) * 2**-52)


def test_every_instruction_set_gives_the_same_bits() -> None:
    code = (
        "import ddpm_fast as df, torch, hashlib;"
        "from ddpm_fast.ops import bound_terms; from ddpm_fast.training.tables import bound_coefficients;"
        "torch.manual_seed(0); shape = (3, 3, 17, 19); x0 = torch.rand(shape) * 2 - 1; x = torch.randn(shape);"
        "e = torch.randn(3, 6, 17, 19, requires_grad=True); t = torch.tensor([0, 50, 99]);"
        "s = df.NoiseSchedule.cosine(100);"
        "c = bound_coefficients(s, 'epsilon', 'learned_range', torch.float32, torch.device('cpu'));"
        "b, m = bound_terms(x0, x, e, t, c, variance='learned_range', clip=(-1.0, 1.0)); b.sum().backward();"
        "print(*(hashlib.sha256(v.detach().numpy().tobytes()).hexdigest() for v in (b, m, e.grad)))"
    )
    assert run_with_isa("avx512", code) == run_with_isa("avx2", code) == run_with_isa("generic", code)


def test_opcheck() -> None:
    for backend in ("reference", "cpu"):
        case = Case((2, 3, 4, 5), "epsilon", "learned_range")
        x0, x_t, output = case.x0.float(), case.x_t.float(), case.output.float()
        table = bound_coefficients(SCHEDULE, "epsilon", "learned_range", torch.float32, CPU)
        numbers = (0, 2, -1.0, 1.0)
        results = (torch.empty(2), torch.empty(2))
        torch.library.opcheck(BOUND_TERMS[backend], (x0, x_t, output, table, case.t, *numbers, *results))
        arguments = (torch.ones(2), x0, x_t, output, table, case.t, *numbers, True, torch.empty_like(output))
        torch.library.opcheck(BOUND_TERMS_BACKWARD[backend], arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend: str, compiler: str) -> None:
    case = Case((2, 3, 4, 5), "epsilon", "learned_range")
    table = bound_coefficients(SCHEDULE, "epsilon", "learned_range", torch.float32, CPU)
    x0, x_t = case.x0.float(), case.x_t.float()

    def f(output: Tensor) -> Tensor:
        return bound_terms(x0, x_t, output, case.t, table, variance="learned_range")[0].sum() * 2

    grads = []
    for function in (f, torch.compile(f, fullgraph=True, backend=compiler)):
        output = case.output.float().requires_grad_()
        function(output).backward()
        grads.append(output.grad)
    assert torch.equal(*grads)


def test_no_second_derivative() -> None:
    case = Case((2, 1, 2, 2), "epsilon", "fixed_small")
    output = case.output.float().requires_grad_()
    with pytest.raises(RuntimeError, match="bound_terms has no second derivative"):
        torch.autograd.grad(case.ours(torch.float32, None, model_output=output)[0].sum(), output, create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x_t": 1}, TypeError, "x_t must be a tensor"),
        ({"x_t": torch.zeros(2, 3, 4, 4).half()}, ValueError, "x_t must be float32"),
        ({"x_t": torch.zeros(2, 3, 8, 4)[:, :, ::2]}, ValueError, "x_t must be"),
        ({"x0": [0]}, TypeError, "x0 must be a tensor"),
        ({"x0": torch.zeros(2, 3, 4, 5)}, ValueError, r"x0 must have shape \(2, 3, 4, 4\)"),
        ({"x0": torch.zeros(2, 3, 4, 4).long()}, ValueError, "x0 must have"),
        ({"model_output": torch.zeros(2, 6, 4, 4)}, ValueError, "model_output must have shape"),
        ({"t": torch.tensor([1, 1000])}, ValueError, r"t must lie in \[0, 1000\); element 1"),
        ({"t": torch.tensor([1.0, 2.0])}, ValueError, "t must be int64"),
        ({"coefficients": torch.zeros(1000, 8)}, ValueError, r"coefficients must be .* \(T, 7\)"),
        ({"prediction": "score"}, ValueError, "prediction must be one of"),
        ({"variance": "fixed_small"}, ValueError, "variance must be one of"),
        ({"clip": (1.0, -1.0)}, ValueError, "clip must be"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], match: str) -> None:
    image = torch.zeros(2, 3, 4, 4)
    arguments = {
        "x0": image,
        "x_t": image,
        "model_output": image,
        "t": torch.tensor([1, 2]),
        "coefficients": bound_coefficients(SCHEDULE, "epsilon", "fixed_small", torch.float32, CPU),
        **change,
    }
    with pytest.raises(error, match=match):
        bound_terms(**arguments)
