"""3x3 convolution: error against float64 beside torch's, bits, the choice of tiles, prepared weights, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, silu

from ddpm_fast.ops import conv3x3, plan_conv3x3, prepare_conv3x3
from ddpm_fast.ops.conv import CONV3X3, MODES, cpu_isa, pack

from .common import needs_vectors, run_with_isa, same_bits, shape_id

CL = torch.channels_last
TILES = [(2, 2), (4, 2), (4, 4)]
UPSAMPLED = (1, 1)

# (N, C, K, H, W): one of everything; counts that are no multiple of a vector, of four, of a panel, or of a tile; more
# tiles than one block holds; more channels than are transformed at once.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 7, 9),
    (1, 16, 16, 2, 3),
    (5, 17, 33, 6, 5),
    (3, 24, 24, 28, 28),
    (1, 31, 100, 1, 40),
    (4, 48, 1, 14, 13),
    (2, 130, 64, 4, 4),
    (1, 257, 48, 11, 8),
    (2, 320, 35, 9, 64),
]

# (C, K, side): every rule of "exact", in layers such as the shipped net, the annotated article's and CIFAR's have.
LAYERS = [
    (16, 16, 28),
    (24, 24, 28),
    (28, 28, 28),
    (48, 24, 28),
    (48, 48, 14),
    (64, 64, 8),
    (72, 48, 14),
    (96, 96, 7),
    (96, 96, 4),
    (128, 128, 16),
    (128, 64, 8),
    (192, 96, 7),
    (192, 64, 4),
    (256, 128, 16),
    (256, 128, 8),
    (256, 128, 4),
    (384, 64, 8),
    (512, 64, 8),
    (512, 128, 4),
]


def layer(
    n: int, c: int, k: int, h: int, w: int, *, seed: int = 0, activation: Callable[[Tensor], Tensor] = silu
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x as it comes out of a norm and SiLU, weight and bias as PyTorch starts them, and something to add."""
    generator = torch.Generator().manual_seed(seed)
    x = activation(torch.randn(n, c, h, w, generator=generator)).contiguous(memory_format=CL)
    bound = 1 / math.sqrt(9 * c)
    weight = torch.empty(k, c, 3, 3).uniform_(-bound, bound, generator=generator).contiguous(memory_format=CL)
    bias = torch.empty(k).uniform_(-bound, bound, generator=generator)
    residual = torch.randn(n, k, h, w, generator=generator).contiguous(memory_format=CL)
    return x, weight, bias, residual


def rms(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


def kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, tile: tuple[int, int], block: int = 32
) -> Tensor:
    """The C++ kernel itself, whatever the plan says; a tile of 1x1 is the kernel that doubles the image."""
    upsample = tile == UPSAMPLED
    size = doubled(x).shape[2:] if upsample else x.shape[2:]
    out = torch.full((x.shape[0], weight.shape[0], *size), math.nan).contiguous(memory_format=CL)
    CONV3X3["cpu"](x, weight, bias, residual, pack(weight), upsample, *tile, block, out)
    return out


def doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).contiguous(memory_format=CL)


@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t[0]}x{t[1]}")
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_the_kernel_is_the_convolution(shape: tuple[int, ...], tile: tuple[int, int]) -> None:
    x, weight, bias, residual = layer(*shape)
    product = conv2d(x.double(), weight.double(), padding=1)
    # Rounding is relative to the magnitudes that are summed; F(4x4, 3x3) multiplies it by 10 in the worst element.
    magnitude = conv2d(x.abs().double(), weight.abs().double(), padding=1).amax()
    for b in (bias, None):
        for r in (residual, None):
            expected = product + (0 if b is None else b.double().reshape(-1, 1, 1)) + (0 if r is None else r.double())
            got = kernel(x, weight, b, r, tile)
            assert (got - expected).abs().max() < 30 * 2**-24 * (magnitude + expected.abs().amax())


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_the_kernel_that_doubles_is_the_convolution_of_the_doubled_image(shape: tuple[int, ...]) -> None:
    n, c, k, h, w = shape
    x, weight, bias, _ = layer(*shape)
    residual = layer(n, c, k, 2 * h, 2 * w)[3]
    product = conv2d(doubled(x).double(), weight.double(), padding=1)
    magnitude = conv2d(doubled(x).abs().double(), weight.abs().double(), padding=1).amax()
    for b in (bias, None):
        for r in (residual, None):
            expected = product + (0 if b is None else b.double().reshape(-1, 1, 1)) + (0 if r is None else r.double())
            got = kernel(x, weight, b, r, UPSAMPLED)
            # Differences of neighbours are at most twice as large as they are.
            assert (got - expected).abs().max() < 4 * 2**-24 * (magnitude + expected.abs().amax())


@pytest.mark.parametrize("mode", MODES)
def test_upsampling_in_every_mode_and_on_every_backend(backend: str, mode: str) -> None:
    for shape in ((2, 24, 40, 5, 6), (1, 3, 16, 4, 4)):  # the second is torch's
        x, weight, bias, _ = layer(*shape)
        expected = conv2d(doubled(x).double(), weight.double(), bias.double(), padding=1)
        for image in (x, x.contiguous()):
            got = conv3x3(image, weight, bias, upsample=True, mode=mode)
            assert got.is_contiguous(memory_format=CL)
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
        residual = torch.randn_like(got)
        out = residual.clone(memory_format=CL)
        conv3x3(x, weight, bias, residual=out, upsample=True, mode=mode, out=out)
        torch.testing.assert_close(out.double(), expected + residual.double(), rtol=1e-5, atol=1e-5)


@needs_vectors
@pytest.mark.parametrize("case", LAYERS, ids=shape_id)
def test_upsampling_errs_at_most_as_much_as_torch(case: tuple[int, int, int]) -> None:
    c, k, side = case
    ours, torchs = 0.0, 0.0
    for seed in range(3):
        x, weight, bias, _ = layer(max(1, 400 // side**2), c, k, side, side, seed=seed)
        exact = conv2d(doubled(x).double(), weight.double(), bias.double(), padding=1)
        ours += rms(conv3x3(x, weight, bias, upsample=True) - exact)
        torchs += rms(conv2d(doubled(x), weight, bias, padding=1) - exact)
    assert ours <= torchs


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_mode_is_the_convolution(backend: str, shape: tuple[int, ...]) -> None:
    x, weight, bias, residual = layer(*shape)
    expected = conv2d(x.double(), weight.double(), bias.double(), padding=1) + residual.double()
    magnitude = conv2d(x.abs().double(), weight.abs().double(), padding=1).amax() + expected.abs().amax()
    for mode in MODES:
        for layout in (torch.contiguous_format, CL):
            got = conv3x3(
                x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout), bias,
                residual=residual.contiguous(memory_format=layout), mode=mode,
            )  # fmt: skip
            assert got.is_contiguous(memory_format=CL)
            assert (got - expected).abs().max() < 30 * 2**-24 * magnitude


def errors(c: int, k: int, side: int, mode: str) -> tuple[float, float]:
    """Rms errors of ours and of torch's channels_last convolution, over several draws."""
    ours, torchs = [], []
    for seed in range(3):
        x, weight, bias, _ = layer(max(1, 400 // side**2), c, k, side, side, seed=seed)
        exact = conv2d(x.double(), weight.double(), bias.double(), padding=1)
        ours.append(rms(conv3x3(x, weight, bias, mode=mode) - exact))
        torchs.append(rms(conv2d(x, weight, bias, padding=1) - exact))
    return sum(ours), sum(torchs)


@needs_vectors
@pytest.mark.parametrize("case", LAYERS, ids=shape_id)
def test_exact_errs_at_most_as_much_as_torch(case: tuple[int, int, int]) -> None:
    assert plan_conv3x3(case[0], case[1], case[2], case[2], isa=cpu_isa()).tile is not None
    ours, torchs = errors(*case, "exact")
    assert ours <= torchs


@needs_vectors
@pytest.mark.parametrize("case", LAYERS, ids=shape_id)
def test_strict_errs_much_less_than_torch(case: tuple[int, int, int]) -> None:
    ours, torchs = errors(*case, "strict")
    # With fewer than 32 channels torch's sums are as short as ours, on some processors.
    assert ours <= (1.0 if case[0] < 32 else 0.6) * torchs


@needs_vectors
@pytest.mark.parametrize("case", LAYERS, ids=shape_id)
def test_stricts_error_is_the_same_on_every_machine_and_hardly_grows(case: tuple[int, int, int]) -> None:
    c, k, side = case
    x, weight, bias, _ = layer(max(1, 400 // side**2), c, k, side, side)
    exact = conv2d(x.double(), weight.double(), bias.double(), padding=1)
    # Every instruction set gives the same bits, so this is one number; 1.6 to 2.5e-7 by docs/conv.md's table.
    assert rms(conv3x3(x, weight, bias, mode="strict") - exact) <= 2.7e-7 * rms(exact)


@pytest.mark.parametrize("tile", [*TILES, UPSAMPLED], ids=lambda t: f"{t[0]}x{t[1]}")
def test_a_sample_has_its_bits_in_any_batch_and_with_any_threads(tile: tuple[int, int]) -> None:
    for shape in ((5, 24, 40, 13, 9), (3, 144, 100, 8, 8), (5, 48, 24, 28, 28)):
        x, weight, bias, residual = layer(*shape)
        residual = doubled(residual) if tile == UPSAMPLED else residual
        torch.set_num_threads(1)
        expected = kernel(x, weight, bias, residual, tile)
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            assert same_bits(kernel(x, weight, bias, residual, tile), expected)
            for n in (0, shape[0] - 1):
                one = kernel(x[n : n + 1], weight, bias, residual[n : n + 1], tile)
                assert same_bits(one, expected[n : n + 1])


BITS = """
import hashlib, torch
from ddpm_fast.ops.conv import CONV3X3, pack
g = torch.Generator().manual_seed(3)
digest = hashlib.sha256()
for n, c, k, h, w in ((2, 20, 40, 9, 7), (1, 144, 16, 8, 8), (1, 3, 5, 4, 4)):
    x, r = (torch.randn(n, m, h, w, generator=g).contiguous(memory_format=torch.channels_last) for m in (c, k))
    weight, bias = torch.randn(k, c, 3, 3, generator=g), torch.randn(k, generator=g)
    for tile in ((2, 2), (4, 2), (4, 4)):
        out = torch.empty_like(r)
        CONV3X3["cpu"](x, weight, bias, r, pack(weight), False, *tile, 16, out)
        digest.update(out.contiguous().numpy().tobytes())
    out = torch.empty(n, k, 2 * h, 2 * w).contiguous(memory_format=torch.channels_last)
    CONV3X3["cpu"](x, weight, bias, None, pack(weight), True, 1, 1, 16, out)
    digest.update(out.contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    assert run_with_isa(isa, BITS) == run_with_isa("", BITS)


def test_not_finite_pixels_spoil_their_neighbourhood_alone() -> None:
    x, weight, bias, _ = layer(2, 32, 32, 16, 16)
    expected = conv3x3(x, weight, bias)
    x[0, 3, 0, 0] = math.nan
    got = conv3x3(x, weight, bias)
    assert got[0, :, :2, :2].isnan().all()
    assert same_bits(got[0, :, 8:, 8:], expected[0, :, 8:, 8:])
    assert same_bits(got[1], expected[1])


def test_out_is_filled_and_may_be_the_residual() -> None:
    x, weight, bias, residual = layer(2, 24, 40, 9, 9)
    for mode in ("exact", "torch"):
        expected = conv3x3(x, weight, bias, residual=residual, mode=mode)
        out = residual.clone(memory_format=CL)
        assert conv3x3(x, weight, bias, residual=out, mode=mode, out=out) is out
        assert same_bits(out, expected)
        empty = conv3x3(x[:0], weight, bias, mode=mode)
        assert empty.shape == (0, 40, 9, 9)


def test_the_torch_mode_has_torchs_bits() -> None:
    x, weight, bias, residual = layer(2, 24, 40, 9, 9)
    assert same_bits(conv3x3(x, weight, bias, mode="torch"), conv2d(x, weight, bias, padding=1))
    got = conv3x3(x, weight, bias, residual=residual, mode="torch")
    assert same_bits(got, residual + conv2d(x, weight, bias, padding=1))


def test_a_prepared_weight_gives_the_same_bits_and_is_packed_once() -> None:
    x, weight, bias, _ = layer(2, 24, 40, 9, 9)
    prepared = prepare_conv3x3(weight)
    assert same_bits(conv3x3(x, prepared, bias), conv3x3(x, weight, bias))
    assert prepared.packed() is prepared.packed()


def fused_step(parameter: torch.nn.Parameter, gradient: Tensor) -> None:
    """It does not count in the parameter's version."""
    parameter.grad = gradient
    torch.optim.SGD([parameter], lr=1.0, fused=True).step()


CHANGES: dict[str, Callable[[torch.nn.Parameter, Tensor], object]] = {
    "in place": lambda p, new: p.copy_(new),
    "lerp": lambda p, new: p.lerp_(new, 1.0),
    "foreach": lambda p, new: torch._foreach_copy_([p], [new]),
    "fused optimizer": lambda p, new: fused_step(p, p - new),
    "other memory": lambda p, new: setattr(p, "data", new),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_weight_is_packed_again(change: str) -> None:
    x, weight, bias, _ = layer(2, 24, 40, 9, 9)
    new = layer(2, 24, 40, 9, 9, seed=1)[1]
    parameter = torch.nn.Parameter(weight)
    prepared = prepare_conv3x3(parameter)
    old_result = conv3x3(x, prepared, bias)
    CHANGES[change](parameter, new)
    result = conv3x3(x, prepared, bias)
    torch.testing.assert_close(parameter.detach(), new)
    assert same_bits(result, conv3x3(x, parameter.clone(), bias))
    assert not torch.equal(result, old_result)


def test_plans_say_why() -> None:
    def reason(*shape: int, **options: Any) -> str:
        plan = plan_conv3x3(*shape, **options)
        assert plan.tile is None
        return plan.reason

    assert "mode" in reason(64, 64, 8, 8, mode="torch")
    assert "stride" in reason(64, 64, 8, 8, stride=2)
    assert "float16" in reason(64, 64, 8, 8, dtype=torch.float16)
    assert "cuda" in reason(64, 64, 8, 8, device="cuda")
    assert "vector" in reason(64, 64, 8, 8, isa="generic")
    assert "3 to 64 channels" in reason(3, 64, 8, 8)
    assert "64 to 3 channels" in reason(64, 3, 8, 8)
    assert "1x8" in reason(64, 64, 1, 8)
    with pytest.raises(ValueError, match="'exact', 'strict', 'fast', 'torch'"):
        plan_conv3x3(64, 64, 8, 8, mode="quick")


def test_plans_choose_tiles_by_channels_and_size() -> None:
    assert plan_conv3x3(24, 24, 28, 28).tile == (2, 2)
    assert plan_conv3x3(96, 96, 7, 7).tile == (4, 2)
    assert plan_conv3x3(128, 128, 32, 32).tile == (4, 4)
    assert plan_conv3x3(512, 256, 16, 16)[:2] == ((4, 4), 64)
    assert plan_conv3x3(24, 24, 28, 28, mode="fast")[:2] == ((4, 4), 128)
    assert plan_conv3x3(512, 256, 16, 16, mode="strict")[:2] == ((2, 2), 32)


@pytest.mark.parametrize("needed", ["x", "weight", "bias", "residual", "all"])
@pytest.mark.parametrize("shape", [(2, 24, 40, 9, 11), (3, 128, 64, 12, 12), (2, 3, 24, 8, 8)], ids=str)
def test_gradients(backend: str, shape: tuple[int, int, int, int, int], needed: str) -> None:
    """Against float64; three channels are torch's forward and backward, in the middle of it or not."""
    given = dict(zip(("x", "weight", "bias", "residual"), layer(*shape), strict=True))
    leaves = {n: v.clone().requires_grad_() if needed in (n, "all") else v for n, v in given.items()}
    exact = {n: v.detach().double().requires_grad_(v.requires_grad) for n, v in leaves.items()}
    upstream = torch.randn_like(given["residual"])
    wanted = [n for n, v in leaves.items() if v.requires_grad]
    got = torch.autograd.grad(conv3x3(**leaves), [leaves[n] for n in wanted], upstream)
    y = exact["residual"] + torch.nn.functional.conv2d(exact["x"], exact["weight"], exact["bias"], padding=1)
    expected = torch.autograd.grad(y, [exact[n] for n in wanted], upstream.double())
    for a, b in zip(got, expected, strict=True):
        assert float((a.double() - b).square().mean().sqrt()) <= 1e-6 * float(b.square().mean().sqrt()) + 1e-12


def test_the_gradient_of_x_rounds_at_most_as_torchs() -> None:
    for channels, outputs, side in ((24, 24, 28), (48, 24, 28), (96, 96, 7), (128, 128, 16)):
        x, weight, _, residual = layer(4, channels, outputs, side, side)
        upstream = torch.randn_like(residual)
        exact = torch.nn.grad.conv2d_input(x.shape, weight.double(), upstream.double(), padding=1)
        leaf = x.clone().requires_grad_()
        (ours,) = torch.autograd.grad(conv3x3(leaf, weight), leaf, upstream)
        (torchs,) = torch.autograd.grad(torch.nn.functional.conv2d(leaf, weight, padding=1), leaf, upstream)
        ours_error, torchs_error = ((g.double() - exact).square().mean().sqrt() for g in (ours, torchs))
        assert ours_error <= torchs_error, (channels, outputs, side)


def test_no_second_derivative() -> None:
    x, weight, _, _ = layer(1, 24, 24, 5, 5)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="conv3x3 has no second derivative"):
        torch.autograd.grad(conv3x3(x, weight).sum(), x, create_graph=True)


def test_opcheck(backend: str) -> None:
    x, weight, bias, residual = layer(2, 20, 24, 5, 6)
    out = torch.empty_like(residual)
    torch.library.opcheck(CONV3X3[backend], (x, weight, bias, residual, pack(weight), False, 4, 4, 16, out))
    torch.library.opcheck(CONV3X3[backend], (x, weight, None, None, pack(weight), False, 2, 2, 64, out))
    large = torch.empty(2, 24, 10, 12).contiguous(memory_format=CL)
    torch.library.opcheck(CONV3X3[backend], (x, weight, bias, None, pack(weight), True, 1, 1, 64, large))


X, WEIGHT, BIAS, RESIDUAL = layer(2, 20, 24, 6, 5)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "x must be a tensor", {"x": 1}),
        (ValueError, r"x must be \(N, C, H, W\)", {"x": X[0]}),
        (ValueError, r"x must be \(N, C, H, W\)", {"x": X[:, :, :0]}),
        (ValueError, "x must be float32", {"x": X.half()}),
        (TypeError, "weight must be a tensor or prepared", {"weight": "w"}),
        (ValueError, r"weight must be \(K, C, 3, 3\)", {"weight": WEIGHT[..., :2]}),
        (ValueError, r"weight must be torch.float32 of shape \(24, 20, 3, 3\)", {"weight": WEIGHT[:, :3]}),
        (ValueError, "weight must be torch.float32", {"weight": WEIGHT.double()}),
        (TypeError, "bias must be a tensor or None", {"bias": 0.0}),
        (ValueError, r"bias must be torch.float32 of shape \(24,\)", {"bias": BIAS[1:]}),
        (ValueError, "residual must be", {"residual": X}),
        (ValueError, "out must be torch.float32 of shape", {"out": X}),
        (ValueError, "out must be channels_last", {"out": torch.empty(2, 24, 6, 5)}),
        (ValueError, "mode must be one of", {"mode": "winograd"}),
        (
            RuntimeError,
            "out= is for calls without gradients",
            {"bias": BIAS.clone().requires_grad_(), "out": torch.empty_like(RESIDUAL)},
        ),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_bad_input_is_named(backend: str, error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        conv3x3(**{"x": X, "weight": WEIGHT, **arguments})


def test_out_must_not_overlap_x() -> None:
    x, weight, _, _ = layer(2, 24, 24, 6, 6)
    with pytest.raises(ValueError, match="not share memory"):
        conv3x3(x, weight, out=x)


def test_weights_that_cannot_be_prepared_are_named() -> None:
    with pytest.raises(ValueError, match="float32 on the CPU"):
        prepare_conv3x3(WEIGHT.double())
    with torch.inference_mode():
        inference = WEIGHT.clone()
    with pytest.raises(ValueError, match="inference tensor"):
        prepare_conv3x3(inference)


def test_the_kernel_refuses_what_it_would_misread() -> None:
    out = torch.empty_like(RESIDUAL)
    packed = pack(WEIGHT)
    for arguments, message in (
        ((X.contiguous(), WEIGHT, None, None, packed, False, 4, 4, 16, out), "x must be channels_last"),
        ((X, WEIGHT, None, None, packed[1:], False, 4, 4, 16, out), "prepared"),
        ((X, WEIGHT, None, None, None, False, 4, 4, 16, out), "prepared"),
        ((X, WEIGHT, None, None, packed, False, 3, 3, 16, out), "tiles are 2x2, 4x2 or 4x4"),
        ((X, WEIGHT, None, None, packed, False, 4, 4, 24, out), "block"),
        ((X, WEIGHT, None, X, packed, False, 4, 4, 16, out), "residual"),
        ((X, WEIGHT, None, None, packed, False, 4, 4, 16, X), "out has the wrong shape"),
        ((X, WEIGHT, None, None, packed, True, 1, 1, 16, out), "out has the wrong shape"),
        ((X, WEIGHT, None, None, packed, True, 2, 2, 16, doubled(out)), "tiles are 1x1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            CONV3X3["cpu"](*arguments)
