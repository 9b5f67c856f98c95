"""The distance from the target, with its noise drawn again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.ops import noised, q_sample, target_loss
from ddpm_fast.ops.noising import NOISING_DRAWN
from ddpm_fast.ops.target_loss import TARGET_LOSS, TARGET_LOSS_BACKWARD

from .common import SHAPES_AND_LAYOUTS, laid_out, run_with_isa, same_bits, shape_and_layout_id

SCHEDULE = df.NoiseSchedule.linear(1000)
# noise_factor and x0_factor: epsilon's, x0's, v's and a mixture.
TABLE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, -0.6], [0.3, 0.7]])
DISTANCES = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}


def images(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def rows(samples: int) -> Tensor:
    return torch.arange(samples) % len(TABLE)


def exact(output: Tensor, x0: Tensor, t: Tensor, noise: Tensor, distance: str) -> Tensor:
    """In float64, by torch's own losses; differentiable."""
    noise_factor, x0_factor = TABLE.double()[t].reshape(-1, 2, *[1] * (output.dim() - 1)).unbind(1)
    x0 = x0.double() / 127.5 - 1 if x0.dtype == torch.uint8 else x0.double()
    target = noise_factor * noise.double() + x0_factor * x0
    return DISTANCES[distance](output.double(), target, reduction="none").flatten(1).mean(1)


@pytest.mark.parametrize("case", SHAPES_AND_LAYOUTS, ids=shape_and_layout_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_x_t_without_its_noise_has_q_samples_bits(
    backend: str, dtype: torch.dtype, case: tuple[tuple[int, ...], str]
) -> None:
    shape, layout = case
    x0 = laid_out(images(shape) if dtype == torch.uint8 else torch.randn(shape), layout)
    t, ids = torch.randint(0, 1000, shape[:1]), range(5, 5 + shape[0])
    expected, _ = q_sample(x0, t, SCHEDULE, seed=3, sample_ids=ids, step=7)
    got = noised(x0, t, SCHEDULE, seed=3, sample_ids=ids, step=7)
    assert same_bits(got, expected)
    assert got.stride() == expected.stride()


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("case", SHAPES_AND_LAYOUTS, ids=shape_and_layout_id)
def test_value_and_gradient(backend: str, case: tuple[tuple[int, ...], str], distance: str) -> None:
    shape, layout = case
    x0, t = images(shape), rows(shape[0])
    output = laid_out(torch.randn(shape), layout).requires_grad_()
    noise = df.randn(shape, seed=9, step=4, stream="training")
    upstream = torch.randn(shape[0])
    losses = target_loss(output, x0, t, TABLE, distance=distance, seed=9, step=4)
    (grad,) = torch.autograd.grad(losses, output, upstream)
    expected = exact(output, x0, t, noise, distance)
    (expected_grad,) = torch.autograd.grad(expected, output, upstream.double())
    # Float32 arithmetic, and sums of up to 128 in a lane.
    torch.testing.assert_close(losses.double(), expected, rtol=3e-6, atol=1e-7)
    assert grad.stride() == output.stride()
    scale = 1 / output[0].numel()
    assert bool(((grad.double() - expected_grad).abs() <= 5e-6 * scale * (1 + upstream.abs().max())).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_outputs_are_compared_in_float32(backend: str, dtype: torch.dtype) -> None:
    shape = (4, 3, 8, 8)
    x0, t, output = images(shape), rows(4), torch.randn(shape).to(dtype).requires_grad_()
    losses = target_loss(output, x0, t, TABLE, seed=9)
    assert losses.dtype == torch.float32
    assert same_bits(losses.detach(), target_loss(output.detach().float(), x0, t, TABLE, seed=9))
    losses.sum().backward()
    wide = output.detach().float().requires_grad_()
    target_loss(wide, x0, t, TABLE, seed=9).sum().backward()
    assert same_bits(output.grad, wide.grad.to(dtype))


def test_given_noise_is_the_drawn_noise(backend: str) -> None:
    shape = (4, 3, 8, 8)
    x0, t = images(shape), rows(4)
    leaves = [torch.randn(shape).requires_grad_()]
    leaves.append(leaves[0].detach().clone().requires_grad_())
    noise = df.randn(shape, seed=2, sample_ids=[3, 1, 4, 5], step=6, stream="training")
    drawn = target_loss(leaves[0], x0, t, TABLE, seed=2, sample_ids=[3, 1, 4, 5], step=6)
    given = target_loss(leaves[1], x0, t, TABLE, noise)
    assert same_bits(drawn.detach(), given.detach())
    drawn.sum().backward()
    given.sum().backward()
    assert same_bits(leaves[0].grad, leaves[1].grad)


def test_half_of_the_channels_of_an_output(backend: str) -> None:
    """What is left of an output that also carries a variance."""
    x0, t = images((4, 3, 8, 8)), rows(4)
    for layout in ("contiguous", "channels_last"):
        output = laid_out(torch.randn(4, 6, 8, 8), layout).requires_grad_()
        target_loss(output[:, :3], x0, t, TABLE, seed=1).sum().backward()
        alone = output.detach()[:, :3].contiguous().requires_grad_()
        target_loss(alone, x0, t, TABLE, seed=1).sum().backward()
        assert torch.equal(output.grad[:, :3], alone.grad)
        assert not output.grad[:, 3:].any()


def test_a_sample_alone_has_the_bits_it_has_in_a_batch(backend: str) -> None:
    output, x0, t = torch.randn(8, 3, 61, 67), images((8, 3, 61, 67)), rows(8)
    batch = target_loss(output, x0, t, TABLE, seed=3)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert same_bits(target_loss(output[5:6], x0[5:6], t[5:6], TABLE, seed=3, sample_ids=[5]), batch[5:6])


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradcheck(distance: str) -> None:
    output = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    x0, noise = torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda o: target_loss(o, x0, rows(4), TABLE, noise, distance=distance), (output,))


def test_every_instruction_set_gives_the_same_bits() -> None:
    code = (
        "import ddpm_fast as df, torch, hashlib; from ddpm_fast.ops import target_loss;"
        "torch.manual_seed(0); o = torch.randn(3, 3, 17, 19, requires_grad=True);"
        "x = torch.randint(0, 256, (3, 3, 17, 19), dtype=torch.uint8); t = torch.tensor([0, 1, 1]);"
        "c = torch.tensor([[1.0, 0.0], [0.8, -0.6]]);"
        "l = target_loss(o, x, t, c, seed=1, distance='huber'); l.sum().backward();"
        "print(*(hashlib.sha256(v.detach().numpy().tobytes()).hexdigest() for v in (l, o.grad)))"
    )
    assert run_with_isa("avx512", code) == run_with_isa("avx2", code) == run_with_isa("generic", code)


def test_opcheck() -> None:
    output, x0, t = torch.randn(2, 3, 4, 5), images((2, 3, 4, 5)), rows(2)
    seed, step = torch.tensor([1]), torch.tensor([0])
    for backend in ("reference", "cpu"):
        draw = (None, seed, None, step, 2, 1)
        torch.library.opcheck(TARGET_LOSS[backend], (output, x0, t, TABLE, *draw, torch.empty(2)))
        arguments = (torch.ones(2), output, x0, t, TABLE, *draw, torch.empty_like(output))
        torch.library.opcheck(TARGET_LOSS_BACKWARD[backend], arguments)
        table = SCHEDULE.noising_coefficients("cpu")
        torch.library.opcheck(NOISING_DRAWN[backend], (x0, t, table, seed, None, step, 2, torch.empty_like(output)))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend: str, compiler: str) -> None:
    x0, t = images((2, 3, 8, 8)), rows(2)

    def f(output: Tensor) -> Tensor:
        return target_loss(output, x0, t, TABLE, seed=3).sum() * 2

    grads = []
    for function in (f, torch.compile(f, fullgraph=True, backend=compiler)):
        torch.manual_seed(1)
        output = torch.randn(2, 3, 8, 8, requires_grad=True)
        function(output).backward()
        grads.append(output.grad)
    assert torch.equal(*grads)


def test_no_second_derivative() -> None:
    output = torch.randn(2, 1, 2, 2, requires_grad=True)
    losses = target_loss(output, images((2, 1, 2, 2)), rows(2), TABLE, seed=0)
    with pytest.raises(RuntimeError, match="target_loss has no second derivative"):
        torch.autograd.grad(losses.sum(), output, create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"output": 1}, TypeError, "output must be a tensor"),
        ({"output": torch.zeros(2, 3, 4).long()}, ValueError, "output must be floating-point"),
        ({"x0": [1]}, TypeError, "x0 must be a tensor"),
        ({"x0": torch.zeros(2, 3, 5)}, ValueError, "x0 must have the output's shape"),
        ({"x0": torch.zeros(2, 3, 4).int()}, ValueError, "x0 must have"),
        ({"noise": torch.zeros(2, 3, 4)}, ValueError, "either the noise or the seed"),
        ({"seed": None}, ValueError, "either the noise or the seed"),
        ({"seed": None, "noise": torch.zeros(2, 3)}, ValueError, "noise must have"),
        ({"seed": -1}, ValueError, "seed must lie in"),
        ({"step": -1}, ValueError, "step"),
        ({"sample_ids": [1]}, ValueError, "sample_ids"),
        ({"t": torch.tensor([0, 4])}, ValueError, r"t must lie in \[0, 4\); element 1"),
        ({"t": torch.tensor([0])}, ValueError, "t must be int64"),
        ({"coefficients": torch.zeros(4, 3)}, ValueError, r"coefficients must be float32 of shape \(T, 2\)"),
        ({"distance": "l2"}, ValueError, "distance must be one of"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], match: str) -> None:
    image = torch.zeros(2, 3, 4)
    with pytest.raises(error, match=match):
        target_loss(
            **{"output": image, "x0": image, "t": torch.tensor([0, 1]), "coefficients": TABLE, "seed": 1, **change}
        )


@pytest.mark.parametrize("x0", [torch.zeros(2, 3).double(), torch.zeros(2, 3).half()], ids=["float64", "float16"])
def test_noise_of_another_dtype_than_float32_has_to_be_kept(x0: Tensor) -> None:
    with pytest.raises(ValueError, match="x0 must be float32 or uint8"):
        noised(x0, torch.tensor([0, 1]), SCHEDULE, seed=1)
