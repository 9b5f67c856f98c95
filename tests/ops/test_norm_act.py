"""GroupNorm, scale and shift, and SiLU: values, gradients, bits and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.ops.norm_act import NORM_ACT, NORM_ACT_BACKWARD

from .common import run_with_isa, same_bits, shape_id
from .norms import FLOATS, assert_close, is_laid_out, laid_out, leaves

NAMES = ("weight", "bias", "scale", "shift", "embedding")

# (shape, groups): groups of 12, 10, 33 and 15 values and other sizes that are no power of two; rows of a prime number
# of channels, of fewer than a vector and of more than 256; images of one pixel and of none; more than 256 samples;
# several chunks a group in both layouts; a sample of more than a megabyte, whose rows are taken one by one.
CASES = [
    ((2, 12, 5, 3), 3),
    ((2, 30, 7, 7), 10),
    ((1, 320, 9, 7), 32),
    ((300, 8, 4, 4), 4),
    ((2, 70, 1, 1), 7),
    ((2, 131, 6, 5), 1),
    ((1, 267, 5, 5), 3),
    ((1, 1, 40, 41), 1),
    ((1, 64, 40, 40), 8),
    ((1, 2, 100, 103), 2),
    ((1, 128, 47, 45), 32),
    ((3, 48), 4),
    ((2, 6, 33), 2),
    ((2, 20, 2, 3, 5), 4),
    ((2, 3, 2, 2, 2, 2), 1),
]


def case_id(case: tuple[tuple[int, ...], int]) -> str:
    return f"{shape_id(case[0])}-G{case[1]}"


def parameters(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, names: tuple[str, ...] = NAMES
) -> dict[str, Tensor]:
    size = {"weight": shape[1:2], "bias": shape[1:2]}
    return {name: torch.randn(size.get(name, shape[:2])).to(dtype) for name in names}


def plain(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    embedding: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """What is computed, as a user writes it in PyTorch."""
    pixels = (1,) * (x.dim() - 2)
    if embedding is not None:
        x = x + embedding.reshape(*embedding.shape, *pixels)
    # Written out, since F.group_norm refuses a single value a channel in all.
    grouped = x.reshape(x.shape[0], num_groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
    y = ((grouped - mean) / torch.sqrt(variance + eps)).reshape(x.shape)
    if weight is not None:
        y = y * weight.reshape(-1, *pixels)
    if bias is not None:
        y = y + bias.reshape(-1, *pixels)
    if scale is not None:
        y = y * (1 + scale.reshape(*scale.shape, *pixels))
    if shift is not None:
        y = y + shift.reshape(*shift.shape, *pixels)
    return F.silu(y) if activation else y


def exact(x: Tensor, num_groups: int, **given: Any) -> Tensor:
    given = {name: v.double() if isinstance(v, Tensor) else v for name, v in given.items()}
    return plain(x.double(), num_groups, **given)


# ---- Values ----


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_is_float64_rounded_once(
    backend: str, case: tuple[tuple[int, ...], int], layout: str, dtype: torch.dtype, activation: str | None
) -> None:
    shape, groups = case
    x = laid_out(torch.randn(shape) * 2 + 1, layout).to(dtype)
    for names in ((), ("weight", "bias"), ("weight", "bias", "scale", "shift"), NAMES, ("embedding",)):
        given = parameters(shape, dtype, names)
        y = df.group_norm_silu(x, groups, **given, activation=activation)
        assert y.dtype == dtype
        assert is_laid_out(y, layout)
        assert_close(y, exact(x, groups, **given, activation=activation))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parameters_may_be_float32_with_any_x(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 12, 5, 5).to(dtype)
    given = parameters(x.shape)
    y = df.group_norm_silu(x, 3, **given)
    assert y.dtype == dtype
    assert_close(y, exact(x, 3, **given))
    rounded = {name: value.to(dtype) for name, value in given.items()}
    assert_close(
        df.group_norm_silu(x, 3, **{**given, "scale": rounded["scale"]}),
        exact(x, 3, **{**given, "scale": rounded["scale"]}),
    )


def test_arguments_keep_their_places() -> None:
    x, given = torch.randn(2, 8, 3, 3), parameters((2, 8), names=NAMES[:4])
    out = torch.empty_like(x)
    y = df.group_norm_silu(x, 4, given["weight"], given["bias"], 1e-3, given["scale"], given["shift"], None, out)
    assert y is out
    assert_close(y, exact(x, 4, **given, eps=1e-3, activation=None))


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.5, 1])
def test_eps_is_added_to_the_variance_and_promotes_nothing(backend: str, eps: float) -> None:
    x = torch.randn(2, 8, 6, 6) * 1e-3  # a variance of 1e-6
    y = df.group_norm_silu(x, 4, eps=eps)
    assert y.dtype == torch.float32
    assert_close(y, exact(x, 4, eps=eps))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_error_is_no_larger_than_eager_pytorchs(backend: str, layout: str) -> None:
    ours = theirs = 0.0
    for seed in range(5):
        torch.manual_seed(seed)
        x, given = torch.randn(2, 64, 28, 28), parameters((2, 64), names=("weight", "bias"))
        truth = exact(x, 32, **given)
        y = df.group_norm_silu(laid_out(x, layout), 32, **given)
        eager = F.silu(F.group_norm(x, 32, given["weight"], given["bias"]))
        ours += float((y - truth).square().sum())
        theirs += float((eager - truth).square().sum())
    assert ours <= theirs


def _outlier(x: Tensor) -> Tensor:
    x[:, :, 0, 0] = 1e6
    return x


HARD: dict[str, Callable[[Tensor], Tensor]] = {
    "mean 1e3": lambda x: x + 1e3,
    "mean 1e5": lambda x: x + 1e5,
    "mean -1e5, deviation 0.05": lambda x: x * 0.05 - 1e5,
    "outlier first pixels": _outlier,
    "one outlier": lambda x: torch.where(torch.arange(x.numel()).reshape(x.shape) == 0, 1e6, x),
    "constant 0.1": lambda x: torch.full_like(x, 0.1),
    "constant 1e5": lambda x: torch.full_like(x, 1e5),
    "constant channels": lambda x: x[:, :, :1, :1].expand_as(x).contiguous() + 1e5,
    "denormal": lambda x: x * 1e-40,
    "variance near eps": lambda x: x * 3e-3 + 1,
    "huge": lambda x: x * 1e15,
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 32, 20, 20), (1, 8, 70, 70)], ids=shape_id)
@pytest.mark.parametrize("kind", HARD)
def test_hard_inputs_lose_no_accuracy(backend: str, kind: str, shape: tuple[int, ...], layout: str) -> None:
    x = laid_out(HARD[kind](torch.randn(shape)), layout)
    for names in ((), ("weight", "bias", "scale", "shift")):
        given = parameters(shape, names=names)
        truth = exact(x, 4, **given)
        error = (df.group_norm_silu(x, 4, **given) - truth).abs().max()
        scale = max(1.0, float(truth.abs().max())) if kind.startswith("constant") else float(truth.abs().max())
        assert error < 1e-5 * scale


@pytest.mark.parametrize("groups", [2, 8])
def test_an_embedding_is_added_as_a_tensor_would_be(backend: str, groups: int) -> None:
    """Also where the groups are single channels and x is constant, so that nothing but eps divides."""
    x, embedding = torch.full((2, 8, 5, 5), 0.3), torch.randn(2, 8)
    y = df.group_norm_silu(x, groups, embedding=embedding, activation=None)
    whole = (x + embedding[:, :, None, None]).double()
    assert_close(y, plain(whole, groups, activation=None), relative=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_not_finite_is_as_in_eager_pytorch(backend: str, layout: str) -> None:
    x = laid_out(torch.randn(3, 8, 6, 6), layout)
    x[0, 0, 2, 2], x[1, 3, 0, 1], x[2, 7, 5, 5] = torch.inf, -torch.inf, torch.nan
    expected = F.silu(F.group_norm(x, 4))
    y = df.group_norm_silu(x, 4)
    assert torch.equal(y.isnan(), expected.isnan())
    assert y.isnan().sum() == 3 * 2 * 36  # the groups they are in, no more
    for value in (torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 88.5, -88.5, -104.0, 3e38, -3e38):
        x, shift = torch.randn(1, 16, 3, 3), torch.zeros(1, 16)
        shift[0, 5] = value
        y, expected = df.group_norm_silu(x, 4, shift=shift), plain(x, 4, shift=shift)
        assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6, equal_nan=True), value


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_silu_over_its_whole_range(backend: str, dtype: torch.dtype) -> None:
    """A constant image makes z the shift itself."""
    z = torch.linspace(-110, 110, 4001).reshape(1, -1)
    y = df.group_norm_silu(torch.zeros(1, 4001, 1).to(dtype), 1, shift=z).reshape(-1)
    truth = F.silu(z.double()).reshape(-1)
    # Relative down to where exp(z) leaves the dtype's normal range, and looser by z times the roundings of z, which
    # kernels may hold in another unit, and of log2(e).
    relative = 3e-7 + (6e-8 + 1.4e-8) * z.reshape(-1).abs() + torch.finfo(dtype).eps / 2
    allowed = truth.abs() * relative + torch.finfo(dtype).smallest_normal * 90
    assert bool(((y.double() - truth).abs() <= allowed).all())


# ---- Layouts, views and out ----


def test_views_are_read_where_they_lie(backend: str) -> None:
    storage = torch.randn(1 + 2 * 24 * 9 * 7)
    misaligned = storage[1:].view(2, 24, 9, 7)
    wide = laid_out(torch.randn(2, 40, 9, 7), "channels_last")
    views = {
        "storage offset": misaligned,
        "channels of a larger tensor": torch.randn(2, 40, 9, 7)[:, 3:27],
        "every other sample": torch.randn(4, 24, 9, 7)[::2],
        "every other sample, channels_last": laid_out(torch.randn(4, 24, 9, 7), "channels_last")[1::2],
        "expanded samples": torch.randn(1, 24, 9, 7).expand(2, -1, -1, -1),
        "transposed tokens": torch.randn(2, 63, 24).transpose(1, 2),
        "transposed image": torch.randn(2, 24, 7, 9).transpose(2, 3),
        "channels of a channels_last tensor": wide[:, 3:27],
        "reversed strides": torch.randn(9, 7, 24, 2).permute(3, 2, 0, 1),
    }
    given = parameters((2, 24))
    for name, x in views.items():
        y = df.group_norm_silu(x, 4, **given)
        assert_close(y, exact(x, 4, **given), of=name)
    assert is_laid_out(df.group_norm_silu(views["transposed tokens"], 4), "channels_last")
    assert is_laid_out(df.group_norm_silu(views["every other sample, channels_last"], 4), "channels_last")
    assert is_laid_out(df.group_norm_silu(views["transposed image"], 4), "contiguous")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_parameters_may_be_strided_views(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 12, 5, 5).to(dtype)
    scale, shift = torch.randn(3, 24).to(dtype).chunk(2, dim=1)
    columns = torch.randn(12, 3).to(dtype).t()
    weight, bias = torch.randn(24).to(dtype)[::2], torch.randn(1).to(dtype).expand(12)
    embedding = torch.randn(1, 12).to(dtype).expand(3, 12)
    for given in (
        {"scale": scale, "shift": shift, "embedding": columns},
        {"weight": weight, "bias": bias, "embedding": embedding, "scale": columns},
    ):
        assert_close(df.group_norm_silu(x, 3, **given), exact(x, 3, **given))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 12, 5, 3), (1, 40, 30, 30), (2, 131, 3, 3)], ids=shape_id)
def test_out_and_in_place(backend: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    x, given = laid_out(torch.randn(shape), layout).to(dtype), parameters(shape)
    expected = df.group_norm_silu(x, 1, **given)
    out = torch.full_like(x, torch.nan)
    assert df.group_norm_silu(x, 1, **given, out=out) is out
    assert same_bits(out, expected)
    assert df.group_norm_silu(x, 1, **given, out=x) is x
    assert same_bits(x, expected)


def test_out_may_be_the_other_channels_of_one_buffer(backend: str) -> None:
    buffer = torch.randn(3, 16, 5, 5)
    x, out = buffer[:, :8], buffer[:, 8:]
    expected = df.group_norm_silu(x, 4)
    df.group_norm_silu(x, 4, out=out)
    assert same_bits(buffer[:, 8:], expected)


def test_no_sample_is_no_error(backend: str) -> None:
    x = torch.randn(0, 8, 4, 4, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    y = df.group_norm_silu(x, 4, weight, embedding=torch.randn(0, 8))
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros(8))


# ---- Gradients ----


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_gradients_are_those_of_float64(
    backend: str, case: tuple[tuple[int, ...], int], layout: str, dtype: torch.dtype, activation: str | None
) -> None:
    shape, groups = case
    inputs = {"x": laid_out(torch.randn(shape) * 2 + 1, layout).to(dtype), **parameters(shape, dtype)}
    grad = laid_out(torch.randn(shape), layout).to(dtype)
    for names in (("x", *NAMES), ("x", "weight", "bias")):
        given = leaves({name: inputs[name] for name in names})
        truth = leaves({name: inputs[name].double() for name in names})
        y = df.group_norm_silu(given["x"], groups, **{n: given[n] for n in names[1:]}, activation=activation)
        got = torch.autograd.grad(y, list(given.values()), grad)
        z = plain(truth["x"], groups, **{n: truth[n] for n in names[1:]}, activation=activation)
        expected = torch.autograd.grad(z, list(truth.values()), grad.double())
        for name, ours, theirs in zip(names, got, expected, strict=True):
            assert ours.dtype == dtype
            assert ours.shape == theirs.shape
            # A parameter's gradient is a sum of terms that may come to little, an embedding's often to nothing.
            terms = 0 if name == "x" else expected[0].numel() // theirs.numel()
            floor = terms * (1e-6 if name == "embedding" else 3e-8)
            allowed = 1e-5 * theirs.abs().max() + floor + theirs.abs() * torch.finfo(dtype).eps / 2
            assert bool(((ours.double() - theirs).abs() <= allowed).all()), name
        assert is_laid_out(got[0], layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "expanded"])
def test_gradients_may_arrive_in_any_layout(backend: str, layout: str, grad_layout: str) -> None:
    x = laid_out(torch.randn(3, 12, 6, 5), layout).requires_grad_()
    y = df.group_norm_silu(x, 3)
    grad = torch.randn(3, 12, 1, 1).expand_as(x)
    expected = torch.autograd.grad(y, x, laid_out(grad, layout), retain_graph=True)[0]
    if grad_layout != "expanded":
        grad = laid_out(grad, grad_layout)
    got = torch.autograd.grad(y, x, grad)[0]
    assert same_bits(got, expected)
    assert is_laid_out(got, layout)


@pytest.mark.parametrize("wanted", ["x", *NAMES])
def test_each_gradient_alone(backend: str, wanted: str) -> None:
    inputs = {"x": torch.randn(2, 12, 5, 5), **parameters((2, 12))}
    given = leaves(inputs)
    y = df.group_norm_silu(given["x"], 3, **{n: given[n] for n in NAMES})
    expected = dict(zip(given, torch.autograd.grad(y.square().sum(), list(given.values())), strict=True))
    alone = {**inputs, wanted: given[wanted]}
    y = df.group_norm_silu(alone["x"], 3, **{n: alone[n] for n in NAMES})
    got = torch.autograd.grad(y.square().sum(), given[wanted])[0]
    assert same_bits(got, expected[wanted])


@pytest.mark.parametrize("kind", ["mean 1e3", "mean 1e5", "outlier first pixels", "variance near eps"])
def test_gradients_of_hard_inputs(backend: str, kind: str) -> None:
    for layout in ("contiguous", "channels_last"):
        x = laid_out(HARD[kind](torch.randn(2, 16, 20, 20)), layout)
        given, truth = leaves({"x": x, **parameters(x.shape)}), None
        given["embedding"] = torch.zeros(2, 16, requires_grad=True)
        truth = leaves({name: value.double() for name, value in given.items()})
        y = df.group_norm_silu(given["x"], 4, **{n: given[n] for n in NAMES})
        z = plain(truth["x"], 4, **{n: truth[n] for n in NAMES})
        grad = torch.randn_like(y)
        got = torch.autograd.grad(y, list(given.values()), grad)
        expected = torch.autograd.grad(z, list(truth.values()), grad.double())
        for name, ours, theirs in zip(given, got, expected, strict=True):
            # 400 terms a channel, each as large as the gradient of x, sum up to the gradient of an embedding.
            scale = theirs.abs().max() if name != "embedding" else expected[0].abs().max() * 400
            assert (ours.double() - theirs).abs().max() < 2e-5 * scale, name


@pytest.mark.parametrize("activation", ["silu", None])
def test_gradcheck_in_float64(activation: str | None) -> None:
    inputs = [torch.randn(2, 6, 3, 2), *parameters((2, 6)).values()]
    inputs = [value.double().requires_grad_() for value in inputs]

    def function(x: Tensor, w: Tensor, b: Tensor, s: Tensor, t: Tensor, e: Tensor) -> Tensor:
        return df.group_norm_silu(x, 2, w, b, 1e-5, s, t, activation, embedding=e)

    assert torch.autograd.gradcheck(function, inputs)


def test_a_second_derivative_is_refused(backend: str) -> None:
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(df.group_norm_silu(x, 2).sum(), x, create_graph=True)


def test_only_x_the_parameters_and_the_statistics_are_saved(backend: str) -> None:
    given = leaves({"x": torch.randn(2, 8, 16, 16), **parameters((2, 8))})
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        df.group_norm_silu(given["x"], 4, **{n: given[n] for n in NAMES})
    others = [t for t in saved if not any(t.data_ptr() == g.data_ptr() for g in given.values())]
    assert [tuple(t.shape) for t in others] == [(2, 4), (2, 4)]


# ---- Bits ----

BITS = """
import hashlib, torch, ddpm_fast as df
torch.set_num_threads({threads})
digest = hashlib.sha256()
for shape, groups in (((2, 12, 5, 3), 3), ((1, 70, 40, 40), 7), ((3, 131, 6, 5), 1), ((2, 48), 4)):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for last in (False, True):
            torch.manual_seed(0)
            x = torch.randn(shape).to(dtype)
            x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
            given = [torch.randn(s) for s in (shape[1:2], shape[1:2], shape[:2], shape[:2], shape[:2])]
            leaves = [t.requires_grad_() for t in (x, *given)]
            w, b, s, t, e = given
            for activation in ("silu", None):
                y = df.group_norm_silu(x, groups, w, b, 1e-5, s, t, activation, embedding=e)
                for result in (y, *torch.autograd.grad(y, leaves, torch.ones_like(y))):
                    digest.update(result.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_bits_are_the_same_on_every_instruction_set() -> None:
    digests = {isa: run_with_isa(isa, BITS.format(threads=1)) for isa in ("avx512", "avx2", "generic")}
    assert len(set(digests.values())) == 1, digests


# One group or few, so that a sample is shared out; many; in a batch that no number of threads divides.
SHARED = [((1, 16, 64, 64), 1), ((3, 48, 32, 32), 8), ((5, 10, 61, 50), 2)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", SHARED, ids=case_id)
def test_bits_do_not_depend_on_threads(backend: str, case: tuple[tuple[int, ...], int], layout: str) -> None:
    if backend == "reference":
        pytest.skip("PyTorch's own sums may depend on the number of threads")
    shape, groups = case
    given = leaves({"x": laid_out(torch.randn(shape), layout), **parameters(shape)})
    grad = laid_out(torch.randn(shape), layout)

    def run() -> list[Tensor]:
        y = df.group_norm_silu(given["x"], groups, **{n: given[n] for n in NAMES})
        return [y, *torch.autograd.grad(y, list(given.values()), grad)]

    torch.set_num_threads(1)
    alone = run()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(same_bits(a, b) for a, b in zip(alone, run(), strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", SHARED, ids=case_id)
def test_bits_of_a_sample_do_not_depend_on_its_batch(
    backend: str, case: tuple[tuple[int, ...], int], layout: str
) -> None:
    if backend == "reference":
        pytest.skip("PyTorch's own sums may depend on the batch")
    torch.set_num_threads(2)
    (_, *size), groups = case
    shape = (7, *size)
    x, rows = laid_out(torch.randn(shape), layout), parameters(shape, names=NAMES[2:])
    shared, grad = parameters(shape, names=NAMES[:2]), laid_out(torch.randn(shape), layout)

    def run(samples: slice) -> list[Tensor]:
        given = leaves({"x": x[samples], **{n: v[samples] for n, v in rows.items()}})
        y = df.group_norm_silu(given["x"], groups, **shared, **{n: given[n] for n in rows})
        return [y, *torch.autograd.grad(y, list(given.values()), grad[samples])]

    for batched, alone in zip(run(slice(None)), run(slice(4, 5)), strict=True):
        assert same_bits(batched[4:5], alone)


def test_gradients_do_not_change_the_result(backend: str) -> None:
    x = torch.randn(2, 12, 7, 7)
    assert same_bits(df.group_norm_silu(x.clone().requires_grad_(), 3).detach(), df.group_norm_silu(x, 3))


# ---- As an operator of PyTorch's ----


def test_operators_pass_opcheck(backend: str) -> None:
    x, given = torch.randn(2, 8, 5, 3), parameters((2, 8))
    out, mean, rstd = torch.empty_like(x), *torch.empty(2, 2, 4, dtype=torch.float64)
    torch.library.opcheck(NORM_ACT[backend], (x, 4, *given.values(), 1e-5, 1, out, mean, rstd))
    torch.library.opcheck(NORM_ACT[backend], (x, 4, *[None] * 5, 1e-5, 0, out, None, None))
    NORM_ACT[backend](x, 4, *given.values(), 1e-5, 1, out, mean, rstd)
    gradients = [torch.empty_like(t) for t in (x, *given.values())]
    grad = torch.randn_like(x)
    torch.library.opcheck(NORM_ACT_BACKWARD[backend], (grad, x, mean, rstd, 4, *given.values(), 1, *gradients))
    torch.library.opcheck(NORM_ACT_BACKWARD[backend], (grad, x, mean, rstd, 4, *[None] * 5, 0, *[None] * 6))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_traces_whole_forward_and_backward(backend: str, layout: str) -> None:
    torch._dynamo.reset()

    def function(x: Tensor, **given: Tensor) -> Tensor:
        return df.group_norm_silu(x * 2, 4, **given)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    given = leaves({"x": laid_out(torch.randn(2, 8, 5, 3), layout), **parameters((2, 8))})
    grad = torch.randn(2, 8, 5, 3)
    expected = torch.autograd.grad(function(**given), list(given.values()), grad)
    got = torch.autograd.grad(compiled(**given), list(given.values()), grad)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
    with torch.no_grad():
        assert same_bits(compiled(**given), function(**given))


# ---- Bad input ----

X = torch.zeros(2, 8, 4, 4)
TYPE_ERRORS: dict[str, Callable[[], Any]] = {
    "x must be a tensor": lambda: df.group_norm_silu([[1.0]], 1),
    "num_groups must be an int, not float": lambda: df.group_norm_silu(X, 4.0),
    "num_groups must be an int, not bool": lambda: df.group_norm_silu(X, True),
    "eps must be a float, not Tensor": lambda: df.group_norm_silu(X, 4, eps=torch.tensor(1e-5)),
    "eps must be a float, not str": lambda: df.group_norm_silu(X, 4, eps="1e-5"),
    "weight must be a tensor or None, not float": lambda: df.group_norm_silu(X, 4, 1.0),
    "scale must be a tensor or None, not list": lambda: df.group_norm_silu(X, 4, scale=[1.0]),
    "out must be a tensor or None": lambda: df.group_norm_silu(X, 4, out=[0.0]),
}
VALUE_ERRORS: dict[str, Callable[[], Any]] = {
    "x must be float32, float16, bfloat16 or float64, not torch.int64": lambda: df.group_norm_silu(X.long(), 4),
    "not torch.complex64": lambda: df.group_norm_silu(X.to(torch.complex64), 4),
    r"x must be \(N, C, \*\), not of shape \(8,\)": lambda: df.group_norm_silu(X[0, :, 0, 0], 4),
    "num_groups must divide x's 8 channels, not be 3": lambda: df.group_norm_silu(X, 3),
    "num_groups must divide x's 8 channels, not be 0": lambda: df.group_norm_silu(X, 0),
    "num_groups must divide x's 8 channels, not be -4": lambda: df.group_norm_silu(X, -4),
    "num_groups must divide x's 8 channels, not be 16": lambda: df.group_norm_silu(X, 16),
    r"one pixel a sample, not shape \(2, 8, 0, 4\)": lambda: df.group_norm_silu(X[:, :, :0], 4),
    r"one channel and one pixel a sample, not shape \(2, 0, 4, 4\)": lambda: df.group_norm_silu(X[:, :0], 1),
    "eps must be positive and finite, not 0": lambda: df.group_norm_silu(X, 4, eps=0.0),
    "eps must be positive and finite, not -1": lambda: df.group_norm_silu(X, 4, eps=-1e-5),
    "eps must be positive and finite, not inf": lambda: df.group_norm_silu(X, 4, eps=float("inf")),
    "eps must be positive and finite, not nan": lambda: df.group_norm_silu(X, 4, eps=float("nan")),
    r"weight must have shape \(8,\)": lambda: df.group_norm_silu(X, 4, torch.zeros(4)),
    r"bias must have shape \(8,\)": lambda: df.group_norm_silu(X, 4, None, torch.zeros(1, 8)),
    r"scale must have shape \(2, 8\)": lambda: df.group_norm_silu(X, 4, scale=torch.zeros(8)),
    r"shift must have shape \(2, 8\)": lambda: df.group_norm_silu(X, 4, shift=torch.zeros(1, 8)),
    r"embedding must have shape \(2, 8\)": lambda: df.group_norm_silu(X, 4, embedding=torch.zeros(2, 8, 1, 1)),
    "weight must be of x's dtype torch.float32 or float32, not torch.float64": lambda: df.group_norm_silu(
        X, 4, torch.zeros(8).double()
    ),
    "shift must be of x's dtype torch.bfloat16 or float32, not torch.float16": lambda: df.group_norm_silu(
        X.bfloat16(), 4, shift=torch.zeros(2, 8).half()
    ),
    "bias must be on x's device cpu, not on meta": lambda: df.group_norm_silu(
        X, 4, None, torch.zeros(8, device="meta")
    ),
    "activation must be 'silu' or None, not 'relu'": lambda: df.group_norm_silu(X, 4, activation="relu"),
    r"out must be torch.float32 of shape \(2, 8, 4, 4\)": lambda: df.group_norm_silu(X, 4, out=X[:1]),
    "not torch.float16 of shape": lambda: df.group_norm_silu(X, 4, out=X.half()),
    "out must be contiguous or channels_last, whichever x is": lambda: df.group_norm_silu(
        X, 4, out=laid_out(X, "channels_last").clone()
    ),
    r"not of strides \(0, 16, 4, 1\)": lambda: df.group_norm_silu(X, 4, out=X[:1].clone().expand(2, -1, -1, -1)),
    "out must be x itself or share no memory with it": lambda: df.group_norm_silu(
        (b := torch.zeros(3, 8, 4, 4))[:2], 4, out=b[1:]
    ),
}


@pytest.mark.parametrize("message", TYPE_ERRORS)
def test_wrong_types_are_named(message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TYPE_ERRORS[message]()


@pytest.mark.parametrize("message", VALUE_ERRORS)
def test_wrong_values_are_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VALUE_ERRORS[message]()


def test_out_is_refused_where_a_gradient_is_needed(backend: str) -> None:
    x = torch.zeros(2, 8, 4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="out= is for calls without gradients"):
        df.group_norm_silu(x, 4, out=torch.zeros(2, 8, 4, 4))
    with torch.no_grad():
        df.group_norm_silu(x, 4, out=torch.zeros(2, 8, 4, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 3}, "num_groups must divide"),
        ({"weight": torch.zeros(7)}, "weight must be a CPU tensor of shape"),
        ({"scale": torch.zeros(2, 7)}, "scale must be a CPU tensor of shape"),
        ({"shift": torch.zeros(2, 8).double()}, "shift must be float32"),
        ({"out": torch.zeros(2, 8, 4, 3)}, "out must have x's shape"),
        ({"out": torch.zeros(2, 8, 4, 4).half()}, "out must be a CPU tensor of x's dtype"),
        ({"out": laid_out(X, "channels_last").clone()}, "must all be contiguous, or all channels_last"),
        ({"x": torch.zeros(8)}, "out must be|x must be"),
        ({"mean": torch.zeros(2, 4)}, "mean must be a contiguous float64"),
        ({"rstd": torch.zeros(1, 4, dtype=torch.float64)}, "rstd must be a contiguous float64"),
    ],
)
def test_the_kernel_itself_writes_nowhere_it_should_not(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": X, "num_groups": 4, **dict.fromkeys(NAMES), "eps": 1e-5, "activation": 1, "out": torch.zeros_like(X),
        "mean": torch.zeros(2, 4, dtype=torch.float64), "rstd": torch.zeros(2, 4, dtype=torch.float64), **change,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        NORM_ACT["cpu"](**arguments)
