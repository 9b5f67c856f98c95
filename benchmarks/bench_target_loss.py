"""The distance from a target whose noise is drawn again, and its gradient, against eager PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ddpm_fast as df
from benchmarks.common import LAYOUTS, laid_out, shape_id
from benchmarks.eager import EagerDiffusion, gathered
from benchmarks.harness import Case
from ddpm_fast.ops import target_loss
from ddpm_fast.training.tables import target_coefficients

SCHEDULE = df.NoiseSchedule.linear(1000)
EAGER = EagerDiffusion(SCHEDULE)
SHAPES = [(16, 3, 32, 32), (64, 1, 28, 28), (4, 3, 256, 256)]
SEED = 3

Loss = Callable[[Tensor], Tensor]
"""Of the network's output: (N,)."""


def eager(prediction: str, x0: Tensor, t: Tensor, noise: Tensor | None) -> Loss:
    """As trainers write it; without noise it is drawn, as ours draws it again."""

    def losses(output: Tensor) -> Tensor:
        epsilon = torch.randn_like(x0) if noise is None else noise
        target = epsilon
        if prediction == "v":
            signal, sigma = EAGER.sqrt_alphas_cumprod, EAGER.sqrt_one_minus_alphas_cumprod
            target = gathered(signal, t, x0) * epsilon - gathered(sigma, t, x0) * x0
        return F.mse_loss(output, target, reduction="none").flatten(1).mean(1)

    return losses


def ours(prediction: str, x0: Tensor, t: Tensor, noise: Tensor | None) -> Loss:
    coefficients = target_coefficients(SCHEDULE, prediction, x0.device)
    draw = {"noise": noise} if noise is not None else {"seed": SEED}
    return lambda output: target_loss(output, x0, t, coefficients, **draw)


def gradient(loss: Loss, output: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss(output).mean(), output)
    return grad


def check(prediction: str, x0: Tensor, t: Tensor, output: Tensor, drawn: bool) -> float:
    """The largest relative error of a loss against float64 with the noise of the seed."""
    noise = df.randn(x0.shape, seed=SEED, stream="training")
    loss = ours(prediction, x0, t, None if drawn else noise)
    exact, wide = eager(prediction, x0.double(), t, noise.double()), output.detach().double().requires_grad_()
    expected = exact(wide)
    error = float(((loss(output).double() - expected) / expected).abs().max())
    assert error < 1e-6, f"a loss is off by a relative {error:.1e}"
    expected = gradient(exact, wide)
    off = float((gradient(loss, output).double() - expected).norm() / expected.norm())
    assert off < 1e-6, f"the gradient is off by a relative {off:.1e}"
    return error


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("noise", "prediction"), [("drawn again", "epsilon"), ("drawn again", "v"), ("given", "epsilon")]
)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_loss_and_gradient(
    measure: Callable[[Case], None], shape: tuple[int, ...], noise: str, prediction: str, layout: str
) -> None:
    x0, t = torch.rand(shape) * 2 - 1, torch.randint(0, 1000, shape[:1])
    given = df.randn(shape, seed=SEED, stream="training") if noise == "given" else None
    output = torch.randn(shape)

    def contestant(loss: Callable[..., Loss], layout: str) -> Callable[[], Tensor]:
        image, leaf = laid_out(x0, layout), laid_out(output, layout).requires_grad_()
        kept = None if given is None else laid_out(given, layout)
        return partial(gradient, loss(prediction, image, t, kept), leaf)

    leaf, copy = laid_out(output, layout).requires_grad_(), torch.empty(shape)
    measure(
        Case(
            what=f"loss and gradient, noise {noise}",
            shape=shape,
            layout=layout,
            note=prediction,
            ours=contestant(ours, layout),
            peers={f"eager {name}": contestant(eager, name) for name in LAYOUTS},
            floors={"copy_": lambda: copy.copy_(output)},
            check=lambda: check(prediction, laid_out(x0, layout), t, leaf, given is None),
            grad=True,
        )
    )
