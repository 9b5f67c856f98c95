"""Triton's GroupNorm and SiLU, executed from their PTX: values and all gradients against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.backends.triton import _layout, _norm
from ddpm_fast.ops.norm_act import NORM_ACT, NORM_ACT_BACKWARD
from tests.gpu import gates, simulate
from tests.gpu.triton_runs import (
    ARCHITECTURES,
    assert_close_beside_extremes,
    assert_rounded_once,
    blank,
    moved,
    under_every_schedule,
    with_extremes,
)
from tests.ops.common import same_bits, shape_id
from tests.ops.norms import assert_close, laid_out
from tests.ops.test_norm_act import HARD, NAMES, exact, parameters, plain

EPS = 1e-5
ONCE = ["norm_act_once_kernel"]
CUT = ["channel_moments_kernel", "norm_act_combine_kernel", "norm_act_apply_kernel"]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    groups: int
    layout: str
    dtype: torch.dtype
    names: tuple[str, ...] = NAMES
    activation: int = 1
    mean: float = 1.0
    spread: float = 2.0
    offset: int = 0

    def __str__(self) -> str:
        parts = [
            shape_id(self.shape),
            f"G{self.groups}",
            self.layout,
            str(self.dtype)[6:],
            f"mean{self.mean:g}+-{self.spread:g}",
        ]
        return "-".join([*parts, *(["silu"] if self.activation else []), *self.names, *["misaligned"] * self.offset])

    def inputs(self) -> tuple[Tensor, dict[str, Tensor]]:
        x = laid_out(torch.randn(self.shape) * self.spread + self.mean, self.layout).to(self.dtype)
        given = parameters(self.shape, self.dtype, self.names)
        if "scale" in given:  # parameters may be float32 whatever x is
            given["scale"] = given["scale"].float()
        if "embedding" in given:
            given["embedding"] *= self.spread / 2
        if "shift" in given and self.dtype == torch.float32:
            given["shift"] = with_extremes(given["shift"])
        return moved(x, self.offset), given


# More than 256 samples, numbers of channels, groups and pixels that are no powers of two, nothing aligned, and a spread
# as small as the error of a mean in float32; groups side by side in a program; groups that are cut, with more than one
# trip of the loops over channels and chunks. 63 terms of 1000 times 1 / 63 are not 1000 in float32.
SMALL = Case((300, 36, 3, 3), 9, "contiguous", torch.float32, mean=1e3, spread=1e-2, offset=1)
BUNDLES = Case((2, 64, 4, 8, 8), 16, "channels_last", torch.bfloat16)
CHANNELS = Case((2, 600, 9, 7), 2, "channels_last", torch.float16, mean=1e3)
CHUNKS = Case((2, 4, 9797), 2, "contiguous", torch.float32, ("weight", "bias", "shift"), mean=1e3, spread=1e-2)
# A short dtype holds one value there: only the embedding makes a variance, and the mean's rounding error is seen in it.
FLAT = [replace(case, mean=1e3, spread=1e-2) for case in (BUNDLES, CHANNELS)]
MORE = [
    Case((2, 30, 7, 7), 10, "contiguous", torch.float16),
    Case((3, 48), 4, "contiguous", torch.bfloat16, activation=0),
    Case((2, 131, 6, 5), 1, "channels_last", torch.float32, (), mean=1e3),
    Case((1, 320, 16, 16), 32, "channels_last", torch.float32, ("weight", "bias"), offset=1),
    Case((2, 24, 40, 44), 3, "contiguous", torch.bfloat16, ("weight", "bias", "scale", "shift")),
    Case((2, 40, 80, 81), 2, "channels_last", torch.float32, ("embedding",), activation=0),
]


def forward(case: Case, target: int) -> None:
    x, given = case.inputs()
    places = [given.get(name) for name in NAMES]

    def run() -> tuple[Tensor, ...]:
        out = blank(x, offset=case.offset)
        mean = torch.full((x.shape[0], case.groups), torch.nan, dtype=torch.float64)
        rstd = torch.full_like(mean, torch.nan)
        NORM_ACT["triton"](x, case.groups, *places, EPS, case.activation, out, mean, rstd)
        return out, mean, rstd

    out, mean, rstd = under_every_schedule(run, target, x.shape[0])
    truth = exact(x, case.groups, **given, activation="silu" if case.activation else None)
    assert_close_beside_extremes(out, truth)
    assert_rounded_once(out, truth)
    expected_mean, expected_rstd = torch.empty_like(mean), torch.empty_like(rstd)
    whole = torch.empty(x.shape, dtype=torch.float64)
    NORM_ACT["reference"](x, case.groups, *places, EPS, case.activation, whole, expected_mean, expected_rstd)
    # As a pair of float32 would hold the mean, so that nothing of it is lost to the backward pass.
    torch.testing.assert_close(mean, expected_mean, rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(rstd, expected_rstd, rtol=5e-7, atol=0)


def backward(case: Case, target: int) -> None:
    x, given = case.inputs()
    places, names = [given.get(name) for name in NAMES], ("x", *case.names)
    mean = torch.empty(x.shape[0], case.groups, dtype=torch.float64)
    rstd, grad = torch.empty_like(mean), laid_out(torch.randn(x.shape), case.layout).to(x.dtype)
    whole = torch.empty(x.shape, dtype=torch.float64)
    NORM_ACT["reference"](x, case.groups, *places, EPS, case.activation, whole, mean, rstd)

    def run() -> tuple[Tensor, ...]:
        gradients = {"x": blank(x, offset=case.offset)}
        gradients |= {name: torch.full(given[name].shape, torch.nan) for name in case.names}
        wanted = [gradients.get(name) for name in ("x", *NAMES)]
        NORM_ACT_BACKWARD["triton"](grad, x, mean, rstd, case.groups, *places, case.activation, *wanted)
        return tuple(gradients.values())

    got = under_every_schedule(run, target, x.shape[0])
    leaves = {name: value.double().requires_grad_() for name, value in {"x": x, **given}.items()}
    y = plain(leaves["x"], case.groups, **{name: leaves[name] for name in case.names},
              activation="silu" if case.activation else None)  # fmt: skip
    expected = torch.autograd.grad(y, [leaves[name] for name in names], grad.double())
    for name, ours, theirs in zip(names, got, expected, strict=True):
        # As for the CPU kernels: a parameter's gradient is a sum of terms that may come to little, an embedding's often
        # to nothing.
        terms = 0 if name == "x" else expected[0].numel() // theirs.numel()
        floor = terms * (1e-6 if name == "embedding" else 3e-8)
        allowed = 1e-5 * theirs.abs().max() + floor + theirs.abs() * torch.finfo(ours.dtype).eps / 2
        assert bool(((ours.double() - theirs).abs() <= allowed).all()), name


@pytest.mark.parametrize("case", [SMALL, BUNDLES, CHANNELS, CHUNKS, *FLAT], ids=str)
def test_is_float64_rounded_once(case: Case) -> None:
    forward(case, target=90)


@pytest.mark.parametrize("case", [SMALL, BUNDLES, CHANNELS, CHUNKS, *FLAT], ids=str)
def test_gradients_are_those_of_float64(case: Case) -> None:
    backward(case, target=90)


@pytest.mark.parametrize("target", [80, 120])
def test_other_architectures(target: int) -> None:
    forward(BUNDLES, target)


@pytest.mark.slow
@pytest.mark.parametrize("case", [SMALL, BUNDLES, CHANNELS, CHUNKS, *FLAT, *MORE], ids=str)
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_case_on_every_architecture(target: int, case: Case) -> None:
    forward(case, target)
    backward(case, target)


@pytest.mark.slow
@pytest.mark.parametrize("case", [BUNDLES, CHANNELS], ids=str)
def test_64_bit_offsets_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_layout, "_INT32_ELEMENTS", 1)
    forward(case, target=90)
    backward(case, target=90)


@pytest.mark.parametrize("approx", [1, -1], ids=["above", "below"])
@pytest.mark.parametrize("case", [BUNDLES], ids=str)
def test_approximate_instructions_may_err_as_documented(case: Case, approx: int) -> None:
    x, given = case.inputs()
    with simulate.backend("triton", approx=approx):
        y = df.group_norm_silu(x, case.groups, **given)
    assert_close(y, exact(x, case.groups, **given))


def test_silu_over_its_whole_range_and_what_is_not_finite() -> None:
    """A constant image makes z the shift itself."""
    z = torch.cat([torch.linspace(-110, 110, 4001), torch.tensor([3e38, -3e38, 1e30, torch.inf, torch.nan])])
    for approx in (0, 1, -1):
        with simulate.backend("triton", approx=approx):
            y = df.group_norm_silu(torch.zeros(1, 4006, 1), 1, shift=z.reshape(1, -1)).reshape(-1)
        truth = F.silu(z.double())
        finite = truth.isfinite()
        assert torch.equal(y.isnan(), truth.isnan())
        assert torch.equal(y[~finite].nan_to_num(), truth[~finite].float().nan_to_num())
        # The CPU kernels' bound; and 2^-22 for each of ex2.approx and div.full where they err as much as they may, with
        # the six roundings around them. Below 2^-126 the quotient is flushed.
        relative = 2 * 2**-22 + 6 * 2**-24 if approx else 3e-7
        allowed = truth.abs() * relative + torch.finfo(torch.float32).smallest_normal * 90
        assert bool(((y.double() - truth).abs() <= allowed)[finite].all())


def test_a_group_that_is_not_finite_spoils_no_other() -> None:
    x = torch.randn(3, 8, 6, 6)
    x[0, 0, 2, 2], x[1, 3, 0, 1], x[2, 7, 5, 5] = torch.inf, -torch.inf, torch.nan
    with simulate.backend("triton"):
        y = df.group_norm_silu(x, 4)
    assert torch.equal(y.isnan(), F.silu(F.group_norm(x, 4)).isnan())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 32, 20, 20), (1, 8, 70, 70)], ids=shape_id)
@pytest.mark.parametrize("kind", HARD)
def test_hard_inputs_lose_no_accuracy(kind: str, shape: tuple[int, ...], layout: str) -> None:
    x = laid_out(HARD[kind](torch.randn(shape)), layout)
    for names in ((), ("weight", "bias", "scale", "shift")):
        given = parameters(shape, names=names)
        truth = exact(x, 4, **given)
        with simulate.backend("triton"):
            error = (df.group_norm_silu(x, 4, **given) - truth).abs().max()
        assert error < 1e-5 * (max(1.0, float(truth.abs().max())) if kind.startswith("constant") else truth.abs().max())


@pytest.mark.slow
def test_error_is_no_larger_than_eager_pytorchs() -> None:
    ours = theirs = 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        x, given = torch.randn(2, 64, 28, 28), parameters((2, 64), names=("weight", "bias"))
        truth = exact(x, 32, **given)
        with simulate.backend("triton"):
            y = df.group_norm_silu(x, 32, **given)
        ours += float((y - truth).square().sum())
        theirs += float((F.silu(F.group_norm(x, 32, given["weight"], given["bias"])) - truth).square().sum())
    assert ours <= theirs


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["x", *NAMES])
@pytest.mark.parametrize("case", [Case((2, 12, 5, 5), 3, "contiguous", torch.float32), CHANNELS], ids=["once", "cut"])
def test_each_gradient_alone_has_the_same_bits(case: Case, wanted: str) -> None:
    x, given = case.inputs()
    inputs = {"x": x, **given}

    def gradients(names: tuple[str, ...]) -> dict[str, Tensor]:
        leaves = {name: inputs[name].clone().requires_grad_(name in names) for name in inputs}
        with simulate.backend("triton"):
            y = df.group_norm_silu(leaves["x"], case.groups, **{name: leaves[name] for name in NAMES})
            return dict(zip(names, torch.autograd.grad(y.sum(), [leaves[name] for name in names]), strict=True))

    assert same_bits(gradients((wanted,))[wanted], gradients(("x", *NAMES))[wanted])


def test_a_sample_alone_has_the_bits_it_has_in_a_batch() -> None:
    x = torch.randn(5, 16, 6, 6)
    with simulate.backend("triton"):
        assert same_bits(df.group_norm_silu(x, 4)[3:4], df.group_norm_silu(x[3:4], 4))


def test_samples_of_views_and_out() -> None:
    """Channels of more, every other sample, and a result into the other channels of the same memory."""
    memory = torch.randn(6, 40, 9, 7)
    x, out = memory[::2, 3:15], memory[::2, 20:32]
    truth = exact(x, 3)
    with simulate.backend("triton"):
        assert df.group_norm_silu(x, 3, out=out) is out
    assert_close(out, truth)


@pytest.mark.parametrize(
    ("gradients", "channels"), [(("weight", "bias"), 60), (("weight", "bias"), 64), (("weight",), 70)], ids=str
)
def test_the_sum_over_samples_ends_where_they_do(gradients: tuple[str, ...], channels: int) -> None:
    for samples in (n for n in range(2, _norm._SAMPLES + 3) if n % 16):  # Triton compiles another kernel for multiples
        contributions = torch.randn(samples, len(gradients), channels)
        expected = contributions.double().sum(0)
        got = {name: torch.full((channels,), torch.nan) for name in gradients}
        with simulate.backend("triton"):
            _norm.sum_over_samples(contributions, got["weight"], got.get("bias"))
        for gradient, sums in zip(got.values(), expected, strict=True):
            assert_close(gradient, sums)


def test_without_samples_the_parameters_gradients_are_zero() -> None:
    x, weight = torch.empty(0, 8, 4, 4, requires_grad=True), torch.randn(8, requires_grad=True)
    with simulate.backend("triton") as launches:
        df.group_norm_silu(x, 4, weight).sum().backward()
    assert not launches
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(8))


def test_small_groups_are_read_once_and_large_ones_twice() -> None:
    weight, bias = torch.randn(32), torch.randn(32)
    for shape, kernels in (((2, 32, 16, 16), ONCE), ((1, 32, 64, 128), CUT)):
        x = torch.randn(shape)
        groups = 8 if kernels is ONCE else 1
        with simulate.backend("triton") as launches:
            y = df.group_norm_silu(x, groups, weight, bias)
        assert_close(y, exact(x, groups, weight=weight, bias=bias))
        assert [launch.kernel for launch in launches] == kernels
        for launch in launches:
            if launch.kernel == "channel_moments_kernel":
                gates.assert_traffic(launch.stats, x.nbytes, weight.nbytes * 3)
            elif launch.kernel != "norm_act_combine_kernel":
                # Beside x each thread reads its channels' parameters.
                gates.assert_traffic(launch.stats, x.nbytes, x.nbytes, extra=x.nbytes)


@pytest.mark.parametrize(("case", "chunks"), [(BUNDLES, 0), (CHANNELS, 1), (CHUNKS, 2)], ids=str)
def test_each_result_is_written_by_one_thread(case: Case, chunks: int) -> None:
    """chunks: that a sample's pixels are cut into; 0 where groups are read once."""
    x, given = case.inputs()
    leaves = {name: value.requires_grad_() for name, value in {"x": x, **given}.items()}
    with simulate.backend("triton") as launches:
        y = df.group_norm_silu(**leaves, num_groups=case.groups)
        torch.autograd.grad(y, list(leaves.values()), torch.randn_like(x))
    samples, channels = x.shape[:2]
    statistic, row = 8 * samples * case.groups, 4 * samples * channels  # in float64; in float32
    gradients = row * len(given)
    expected = {"sum_over_samples_kernel": 2 * 4 * channels}  # of weight and bias
    if chunks:
        expected |= {
            "channel_moments_kernel": 3 * row * chunks,
            "norm_act_combine_kernel": 3 * row + 2 * statistic,
            "norm_act_apply_kernel": x.nbytes,
            "channel_sums_kernel": 3 * row * chunks,
            "norm_act_backward_combine_kernel": gradients + statistic,  # two means in float32
            "norm_act_backward_apply_kernel": x.nbytes,
        }
    else:
        expected |= {
            "norm_act_once_kernel": x.nbytes + 2 * statistic,
            "norm_act_backward_once_kernel": x.nbytes + gradients,
        }
    assert {launch.kernel: launch.stats["st_bytes"] for launch in launches} == expected


def test_the_plan_depends_on_a_samples_shape_alone_and_covers_it() -> None:
    for channels, pixels, groups in ((32, 256, 8), (600, 63, 2), (131, 30, 1), (1280, 64, 32), (1, 1, 1), (4, 9797, 2)):
        for channels_last in (False, True):
            for itemsize in (2, 4):
                once = _norm.read_once(channels, pixels, groups, channels_last, itemsize, most=16384)
                if once is not None:
                    assert once.rows >= channels // groups
                    assert once.columns >= pixels
                    assert once.bundle * once.rows * once.columns <= min(16384, 32 * once.num_warps * 32)
                tile = _norm.cut(channels, pixels, channels_last)
                assert tile.rows * tile.columns <= 8192
                assert 1 <= tile.num_warps <= 16
