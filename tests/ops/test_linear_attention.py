"""Linear attention: error against float64 beside eager's, bits, memory, layouts, gradients, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ddpm_fast as df
from ddpm_fast import backends
from ddpm_fast.backends.reference import linear_attention as reference
from ddpm_fast.ops.linear_attention import (
    LINEAR_ATTENTION,
    PROJECTED_LINEAR_ATTENTION,
    is_projecting_faster,
    projected_linear_attention,
)
from tests.third_party.lucidrains import import_package

from .common import LAYOUTS, laid_out, run_with_isa, same_bits, shape_id

CL = torch.channels_last

# (N, heads, dim, H, W, memories): one of everything; no whole vector, tile, block or chunk; more memories than a block;
# the widest head; several chunks.
SHAPES = [
    (1, 1, 1, 1, 1, 0),
    (2, 4, 32, 28, 28, 4),
    (3, 2, 17, 9, 10, 3),
    (2, 3, 128, 7, 8, 70),
    (1, 1, 100, 2, 3, 1),
    (1, 2, 8, 40, 77, 2),
]
# The layers of the annotated article's and lucidrains' networks, and other heads at other sizes.
LAYERS = [(4, 32, 28, 4), (4, 32, 28, 0), (4, 32, 14, 4), (4, 32, 7, 0), (2, 16, 12, 4), (1, 64, 16, 0), (2, 128, 8, 4)]


def inputs(
    n: int, heads: int, dim: int, h: int, w: int, memories: int, *, layout: str = "channels_last", spread: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    qkv = laid_out(torch.randn(n, 3 * heads * dim, h, w) * spread, layout)
    return qkv, torch.randn(2, heads, dim, memories) if memories else None


def einsums(qkv: Tensor, heads: int, memory: Tensor | None, scale: float) -> Tensor:
    """As the annotated article writes it, with lucidrains' memory."""
    n, _, h, w = qkv.shape
    q, k, v = (t.reshape(n, heads, -1, h * w) for t in qkv.chunk(3, dim=1))
    if memory is not None:
        k, v = (torch.cat((m.expand(n, *m.shape), t), dim=-1) for m, t in zip(memory, (k, v), strict=True))
    q, k = q.softmax(dim=-2) * scale, k.softmax(dim=-1)
    context = torch.einsum("bhdn,bhen->bhde", k, v)
    return torch.einsum("bhde,bhdn->bhen", context, q).reshape(n, -1, h, w)


def exact(qkv: Tensor, heads: int, memory: Tensor | None) -> Tensor:
    memory = None if memory is None else memory.double()
    return einsums(qkv.double(), heads, memory, (qkv.shape[1] // (3 * heads)) ** -0.5)


def rms(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


# ---- Values ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_is_the_einsums_in_float64(backend: str, shape: tuple[int, ...], layout: str) -> None:
    qkv, memory = inputs(*shape, layout=layout)
    y = df.linear_attention(qkv, shape[1], memory=memory)
    assert y.dtype == torch.float32
    assert y.is_contiguous(memory_format=LAYOUTS[layout])
    # A context entry is a mean of values, each weight of it within a few units in the last place.
    assert (y - exact(qkv, shape[1], memory)).abs().max() < 8 * 2**-24 * qkv.abs().max()


@pytest.mark.parametrize("spread", [1.0, 3.0])
@pytest.mark.parametrize("layer", LAYERS, ids=shape_id)
def test_errs_at_most_as_much_as_eager(layer: tuple[int, int, int, int], spread: float) -> None:
    heads, dim, side, memories = layer
    ours = eagers = 0.0
    for seed in range(5):
        torch.manual_seed(seed)
        qkv, memory = inputs(2, heads, dim, side, side, memories, spread=spread)
        truth = exact(qkv, heads, memory)
        ours += rms(df.linear_attention(qkv, heads, memory=memory) - truth)
        eagers += rms(einsums(qkv, heads, memory, dim**-0.5) - truth)
    assert ours <= eagers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_the_operations_one_by_one(dtype: torch.dtype) -> None:
    qkv, memory = inputs(2, 2, 16, 6, 5, 3)
    qkv, memory = qkv.to(dtype), memory.to(dtype)
    y = df.linear_attention(qkv, 2, memory=memory)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=CL)
    assert torch.equal(y, reference.attend(qkv, memory, 2, 0.25))


def test_the_reference_is_lucidrains_module(backend: str) -> None:
    package = import_package()
    module = package.denoising_diffusion_pytorch.LinearAttention(12, heads=3, dim_head=8, num_mem_kv=5).double()
    x = torch.randn(2, 12, 6, 7, dtype=torch.float64)
    qkv = module.to_qkv(module.norm(x))
    with torch.no_grad():
        if backend == "reference":
            y = df.linear_attention(qkv, 3, memory=module.mem_kv, scale=module.scale)
            torch.testing.assert_close(module.to_out(y), module(x))
        else:
            y = df.linear_attention(qkv.float(), 3, memory=module.mem_kv.float(), scale=module.scale)
            torch.testing.assert_close(module.to_out(y.double()), module(x), rtol=1e-4, atol=1e-5)


def test_large_values_and_one_that_wins_overflow_nowhere(backend: str) -> None:
    qkv, memory = inputs(2, 2, 20, 9, 8, 3, spread=200.0)
    qkv[0, 45, 8, 7] = 1e5  # the last key of a channel, after all that it outweighs
    y = df.linear_attention(qkv, 2, memory=memory)
    assert torch.isfinite(y).all()
    assert (y - exact(qkv, 2, memory)).abs().max() < 1e-6 * 1e5


def test_nan_stays_in_its_head(backend: str) -> None:
    qkv, _ = inputs(2, 2, 20, 9, 8, 0)
    qkv[1, 2 * 20 + 25, 3, 3] = torch.nan  # a key of the second head
    y = df.linear_attention(qkv, 2)
    assert y[1, 20:].isnan().all()
    assert not y[0].isnan().any()
    assert not y[1, :20].isnan().any()
    qkv, _ = inputs(1, 1, 20, 9, 8, 0)
    qkv[0, 4, 3, 3] = torch.nan  # a query
    assert df.linear_attention(qkv, 1).isnan().sum() == 20


@pytest.mark.parametrize("shape", [(2, 24), (2, 24, 11), (2, 24, 2, 3, 4)], ids=shape_id)
def test_any_number_of_spatial_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    qkv = torch.randn(shape)
    flat = qkv.reshape(2, 24, -1, 1)
    assert torch.equal(df.linear_attention(qkv, 2), df.linear_attention(flat, 2).reshape(2, 8, *shape[2:]))
    if len(shape) == 5:
        last = qkv.contiguous(memory_format=torch.channels_last_3d)
        y = df.linear_attention(last, 2)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        assert torch.equal(y, df.linear_attention(qkv, 2))


def test_views_are_taken_as_they_are(backend: str) -> None:
    wide = torch.randn(3, 100, 8, 9)
    for layout in LAYOUTS:
        view = laid_out(wide, layout)[1:, 7:79, :, :5]
        assert torch.equal(df.linear_attention(view, 3), df.linear_attention(view.contiguous(), 3))
    memory = torch.randn(4, 8, 3, 2).permute(3, 2, 1, 0)
    qkv = wide[:, :72]
    assert torch.equal(
        df.linear_attention(qkv, 3, memory=memory), df.linear_attention(qkv, 3, memory=memory.contiguous())
    )


def test_no_sample_and_wide_heads(backend: str) -> None:
    assert df.linear_attention(torch.randn(0, 24, 4, 4), 2).shape == (0, 8, 4, 4)
    qkv, _ = inputs(2, 1, 129, 4, 4, 0)
    torch.testing.assert_close(df.linear_attention(qkv, 1).double(), exact(qkv, 1, None), rtol=1e-4, atol=1e-6)
    assert torch.equal(df.linear_attention(qkv, 1, scale=0), torch.zeros(2, 129, 4, 4))


# ---- With the projections in it ----

# (N, C, K, heads, dim, H, W, memories): the smallest; no whole vector of channels, no whole block of pixels; several
# chunks and a memory larger than a block; the widest head; whole vectors.
PROJECTED_SHAPES = [
    (1, 1, 1, 1, 16, 1, 1, 0),
    (2, 28, 28, 4, 32, 28, 28, 0),
    (3, 17, 35, 2, 48, 9, 10, 3),
    (1, 20, 19, 2, 16, 40, 77, 70),
    (2, 24, 5, 1, 128, 7, 8, 2),
    (2, 64, 32, 4, 32, 9, 9, 4),
]
# (C, heads, dim, side, memories) of the annotated article's and lucidrains' networks, and the most channels.
PROJECTED_LAYERS = [(28, 4, 32, 28, 0), (56, 4, 32, 14, 0), (112, 4, 32, 7, 0), (28, 4, 32, 28, 4), (256, 4, 32, 16, 4)]

Projected = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def projected_inputs(
    n: int, c: int, k: int, heads: int, dim: int, h: int, w: int, memories: int, layout: str = "channels_last"
) -> Projected:
    x = laid_out(torch.randn(n, c, h, w), layout)
    qkv_weight = torch.randn(3 * heads * dim, c, 1, 1) * c**-0.5
    out_weight = torch.randn(k, heads * dim, 1, 1) * (heads * dim) ** -0.5
    memory = torch.randn(2, heads, dim, memories) if memories else None
    return x, qkv_weight, out_weight, torch.randn(k), memory


def one_by_one(x: Tensor, qkv: Tensor, out: Tensor, bias: Tensor | None, memory: Tensor | None, heads: int) -> Tensor:
    y = einsums(F.conv2d(x, qkv), heads, memory, (qkv.shape[0] // (3 * heads)) ** -0.5)
    return F.conv2d(y, out, bias)


def in_float64(tensors: Projected) -> list[Any]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def projected(tensors: Projected, heads: int) -> Tensor:
    x, qkv_weight, out_weight, out_bias, memory = tensors
    return projected_linear_attention(x, qkv_weight, out_weight, out_bias, heads=heads, memory=memory)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", PROJECTED_SHAPES, ids=shape_id)
def test_projected_is_the_operations_in_float64(backend: str, shape: tuple[int, ...], layout: str) -> None:
    tensors = projected_inputs(*shape, layout=layout)
    heads = shape[3]
    y = projected(tensors, heads)
    assert y.dtype == torch.float32
    assert y.is_contiguous(memory_format=LAYOUTS[layout])
    # Means of values around 1 through two products, an addition of a bias around 1 at the end.
    assert (y - one_by_one(*in_float64(tensors), heads)).abs().max() < 16 * 2**-24 * tensors[0].abs().max()
    without_bias = projected((*tensors[:3], None, tensors[4]), heads)
    torch.testing.assert_close(without_bias + tensors[3][:, None, None], y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", PROJECTED_LAYERS, ids=shape_id)
def test_projected_errs_at_most_as_much_as_eager(layer: tuple[int, int, int, int, int]) -> None:
    channels, heads, dim, side, memories = layer
    assert is_projecting_faster(channels, channels, dim, side * side)
    ours = eagers = 0.0
    for seed in range(5):
        torch.manual_seed(seed)
        tensors = projected_inputs(2, channels, channels, heads, dim, side, side, memories)
        tensors = (*tensors[:3], None, tensors[4])  # whose rounding would hide the others
        truth = one_by_one(*in_float64(tensors), heads)
        ours += rms(projected(tensors, heads) - truth)
        eagers += rms(one_by_one(*tensors, heads) - truth)
    assert ours <= eagers


@pytest.mark.parametrize("why", ["few pixels", "narrow heads", "bfloat16", "float64", "gradient"])
def test_projected_elsewhere_is_the_operations_one_by_one(why: str) -> None:
    channels, side, dim = {"few pixels": (44, 4, 16), "narrow heads": (8, 6, 8)}.get(why, (12, 6, 16))
    assert is_projecting_faster(channels, channels, dim, side * side) == (why not in ("few pixels", "narrow heads"))
    tensors = projected_inputs(2, channels, channels, 2, dim, side, side, 3)
    if why in ("bfloat16", "float64"):
        tensors = tuple(tensor.to(getattr(torch, why)) for tensor in tensors)
    x, qkv_weight, out_weight, out_bias, memory = tensors
    out_weight.requires_grad_(why == "gradient")
    y = projected(tensors, 2)
    assert y.requires_grad == (why == "gradient")
    attended = df.linear_attention(F.conv2d(x, qkv_weight), 2, memory=memory)
    assert torch.equal(y, F.conv2d(attended, out_weight, out_bias))


def test_projected_overflows_nowhere(backend: str) -> None:
    tensors = projected_inputs(2, 20, 20, 2, 16, 9, 8, 3)
    tensors[0].mul_(200.0)
    y = projected(tensors, 2)
    assert torch.isfinite(y).all()
    # What a key is rounded by, its weight is wrong by, as a share of it.
    keys = F.conv2d(*tensors[:2]).abs().max()
    assert (y - one_by_one(*in_float64(tensors), 2)).abs().max() < 8 * 2**-24 * keys * tensors[0].abs().max()


def test_projected_nan_stays_in_its_sample(backend: str) -> None:
    tensors = projected_inputs(2, 20, 20, 2, 16, 9, 8, 0)
    tensors[0][1, 4, 3, 3] = torch.nan
    y = projected(tensors, 2)
    assert y[1].isnan().all()
    assert not y[0].isnan().any()


def test_projected_takes_views_and_no_sample(backend: str) -> None:
    _, *weights = projected_inputs(1, 32, 20, 2, 16, 1, 1, 2)
    wide = torch.randn(3, 50, 8, 9)
    for layout in LAYOUTS:
        view = laid_out(wide, layout)[1:, 7:39, :, :5]
        assert torch.equal(projected((view, *weights), 2), projected((view.contiguous(), *weights), 2))
    assert projected((wide[:0, :32], *weights), 2).shape == (0, 20, 8, 9)


def test_projected_gradients_are_those_of_the_operations() -> None:
    tensors = [t.requires_grad_() for t in in_float64(projected_inputs(2, 5, 4, 2, 16, 3, 4, 2))]
    assert torch.autograd.gradcheck(lambda *leaves: projected(leaves, 2), tensors, fast_mode=True)


def test_projected_under_functional_transforms(backend: str) -> None:
    x, *weights = projected_inputs(3, 12, 12, 2, 16, 6, 5, 0)
    got = torch.func.vmap(lambda image: projected((image[None], *weights), 2)[0])(x)
    torch.testing.assert_close(got, projected((x, *weights), 2), rtol=1e-4, atol=1e-5)


def test_projected_traces_whole(backend: str) -> None:
    torch._dynamo.reset()
    x, *weights = projected_inputs(2, 12, 12, 2, 16, 6, 5, 2)

    def function(x: Tensor) -> Tensor:
        return projected((x * 2, *weights), 2)

    assert same_bits(torch.compile(function, backend="aot_eager", fullgraph=True)(x), function(x))


# ---- Gradients, transforms, graphs ----


def test_gradcheck_in_float64() -> None:
    qkv, memory = inputs(2, 2, 3, 2, 3, 2)
    leaves = [t.double().requires_grad_() for t in (qkv, memory)]
    assert torch.autograd.gradcheck(lambda x, m: df.linear_attention(x, 2, memory=m), leaves)


def test_gradients_are_those_of_the_einsums(backend: str) -> None:
    qkv, memory = inputs(2, 2, 16, 6, 5, 3)
    grads = []
    for run in (lambda x, m: df.linear_attention(x, 2, memory=m), lambda x, m: einsums(x, 2, m, 0.25)):
        leaves = [t.clone().requires_grad_() for t in (qkv, memory)]
        grads.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_under_functional_transforms(backend: str) -> None:
    qkv, _ = inputs(3, 2, 8, 4, 5, 0)
    want = df.linear_attention(qkv, 2)
    got = torch.func.vmap(lambda x: df.linear_attention(x[None], 2)[0])(qkv)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_operators_pass_opcheck() -> None:
    for name in ("reference", *(["cpu"] if backends.missing["cpu"] is None else [])):
        qkv, memory = inputs(2, 2, 8, 3, 5, 2)
        out = torch.empty(2, 16, 3, 5)
        torch.library.opcheck(LINEAR_ATTENTION[name], (qkv, memory, 2, 0.5, out))
        torch.library.opcheck(LINEAR_ATTENTION[name], (qkv, None, 2, 0.5, out))
        tensors = projected_inputs(2, 12, 10, 2, 16, 3, 5, 2)
        out = torch.empty(2, 10, 3, 5)
        for rest in (tensors[3:], (None, None)):
            torch.library.opcheck(PROJECTED_LINEAR_ATTENTION[name], (*tensors[:3], *rest, 2, 0.5, out))


def test_traces_whole(backend: str) -> None:
    torch._dynamo.reset()
    qkv, memory = inputs(2, 2, 8, 4, 5, 2)

    def function(x: Tensor) -> Tensor:
        return df.linear_attention(x * 2, 2, memory=memory)

    assert same_bits(torch.compile(function, backend="aot_eager", fullgraph=True)(qkv), function(qkv))


# ---- Bits ----

BITS = """
import hashlib, torch, ddpm_fast as df
torch.set_num_threads({threads})
digest = hashlib.sha256()
for n, heads, dim, side, memories in ((2, 4, 32, 28, 4), (1, 2, 17, 40, 3), (3, 1, 128, 9, 70), (2, 3, 1, 5, 1)):
    torch.manual_seed(0)
    qkv, memory = torch.randn(n, 3 * heads * dim, side, side) * 2, torch.randn(2, heads, dim, memories)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = df.linear_attention(qkv.contiguous(memory_format=layout), heads, memory=memory)
        digest.update(y.contiguous().numpy().tobytes())
from ddpm_fast.ops.linear_attention import projected_linear_attention
shapes = (2, 28, 28, 4, 32, 28, 4), (1, 20, 33, 2, 48, 40, 3), (3, 64, 5, 1, 128, 9, 70)
for n, c, k, heads, dim, side, memories in shapes:
    torch.manual_seed(0)
    x, memory = torch.randn(n, c, side, side), torch.randn(2, heads, dim, memories)
    qkv_weight, out_weight = torch.randn(3 * heads * dim, c, 1, 1) / 5, torch.randn(k, heads * dim, 1, 1) / 8
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        y = projected_linear_attention(x, qkv_weight, out_weight, torch.randn(k), heads=heads, memory=memory)
        digest.update(y.contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


def test_bits_are_the_same_on_every_instruction_set_and_number_of_threads() -> None:
    digests = {
        (isa, threads): run_with_isa(isa, BITS.format(threads=threads))
        for isa, threads in (("avx512", 1), ("avx512", 2), ("avx2", 1), ("generic", 1))
    }
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_of_a_sample_depend_neither_on_its_batch_nor_on_the_layout(layout: str) -> None:
    qkv, memory = inputs(5, 2, 24, 33, 34, 3)
    batched = df.linear_attention(qkv, 2, memory=memory)
    alone = df.linear_attention(laid_out(qkv[3:4], layout), 2, memory=memory)
    assert same_bits(alone[0].contiguous(), batched[3].contiguous())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 28, 20, 4, 32, 33, 34, 3), (5, 32, 32, 2, 16, 8, 8, 0)], ids=shape_id)
def test_projected_bits_of_a_sample_depend_neither_on_its_batch_nor_on_the_layout(
    shape: tuple[int, ...], layout: str
) -> None:
    x, *weights = projected_inputs(*shape)
    batched = projected((x, *weights), shape[3])
    alone = projected((laid_out(x[3:4], layout), *weights), shape[3])
    assert same_bits(alone[0].contiguous(), batched[3].contiguous())


# ---- Bad input ----

X, IN, OUT, BIAS = torch.zeros(2, 12, 9, 9), torch.zeros(96, 12, 1, 1), torch.zeros(7, 32, 1, 1), torch.zeros(7)
QKV = torch.zeros(2, 24, 4, 4)
VALUE_ERRORS: dict[str, Callable[[], Any]] = {
    "qkv must be float32, float16, bfloat16 or float64, not torch.int64": lambda: df.linear_attention(QKV.long(), 2),
    "heads must be at least 1, not 0": lambda: df.linear_attention(QKV, 0),
    r"qkv must be \(N, 3 \* 3 \* dim, \*\).*not of shape \(2, 24, 4, 4\)": lambda: df.linear_attention(QKV, 3),
    r"one pixel, not of shape \(2, 24, 0, 4\)": lambda: df.linear_attention(QKV[:, :, :0], 2),
    r"not of shape \(24,\)": lambda: df.linear_attention(QKV[0, :, 0, 0], 2),
    r"memory must be \(2, 2, 4\) and one more dimension, not of shape \(2, 4, 2, 3\)": lambda: df.linear_attention(
        QKV, 2, memory=torch.zeros(2, 4, 2, 3)
    ),
    "memory must be torch.float32 on cpu, as qkv, not torch.float64 on cpu": lambda: df.linear_attention(
        QKV, 2, memory=torch.zeros(2, 2, 4, 3).double()
    ),
    "x must be float32, float16, bfloat16 or float64, not torch.int64": lambda: projected_linear_attention(
        X.long(), IN, OUT, heads=2
    ),
    "heads must be at least 1, not -1": lambda: projected_linear_attention(X, IN, OUT, heads=-1),
    r"x must be \(N, C, H, W\) with at least one.*not of shape \(2, 12, 9\)": lambda: projected_linear_attention(
        X[..., 0], IN, OUT, heads=2
    ),
    r"x must be \(N, C, H, W\) with at least one.*not of shape \(2, 12, 0, 9\)": lambda: projected_linear_attention(
        X[:, :, :0], IN, OUT, heads=2
    ),
    r"qkv_weight must be \(3 \* 5 \* dim, 12, 1, 1\), not of shape \(96, 12, 1, 1\)": lambda: (
        projected_linear_attention(X, IN, OUT, heads=5)
    ),
    r"qkv_weight must be \(3 \* 2 \* dim, 12, 1, 1\), not of shape \(\)": lambda: projected_linear_attention(
        X, torch.tensor(1.0), OUT, heads=2
    ),
    "qkv_weight must be torch.float32 on cpu, as x, not torch.float64 on cpu": lambda: projected_linear_attention(
        X, IN.double(), OUT, heads=2
    ),
    r"out_weight must be \(K, 32, 1, 1\), not of shape \(7, 31, 1, 1\)": lambda: projected_linear_attention(
        X, IN, OUT[:, 1:], heads=2
    ),
    r"out_bias must be \(7,\), not of shape \(6,\)": lambda: projected_linear_attention(X, IN, OUT, BIAS[1:], heads=2),
    r"memory must be \(2, 2, 16\) and one more dimension, not of shape \(3,\)": lambda: projected_linear_attention(
        X, IN, OUT, heads=2, memory=torch.zeros(3)
    ),
}
TYPE_ERRORS: dict[str, Callable[[], Any]] = {
    "qkv must be a tensor, not list": lambda: df.linear_attention([[1.0]], 1),
    "heads must be an int, not float": lambda: df.linear_attention(QKV, 2.0),
    "heads must be an int, not bool": lambda: df.linear_attention(QKV, True),
    "memory must be a tensor or None, not float": lambda: df.linear_attention(QKV, 2, memory=1.0),
    "scale must be a float or None, not str": lambda: df.linear_attention(QKV, 2, scale="1"),
    "x must be a tensor, not list": lambda: projected_linear_attention([1.0], IN, OUT, heads=2),
    "heads must be an int, not str": lambda: projected_linear_attention(X, IN, OUT, heads="2"),
    "qkv_weight must be a tensor, not NoneType": lambda: projected_linear_attention(X, None, OUT, heads=2),
    "out_weight must be a tensor, not NoneType": lambda: projected_linear_attention(X, IN, None, heads=2),
    "out_bias must be a tensor, not float": lambda: projected_linear_attention(X, IN, OUT, 1.0, heads=2),
    "scale must be a float or None, not bool": lambda: projected_linear_attention(X, IN, OUT, heads=2, scale=True),
}


@pytest.mark.parametrize("message", VALUE_ERRORS)
def test_wrong_values_are_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VALUE_ERRORS[message]()


@pytest.mark.parametrize("message", TYPE_ERRORS)
def test_wrong_types_are_named(message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TYPE_ERRORS[message]()
