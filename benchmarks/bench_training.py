"""A training step with the shipped network, against the same network in eager PyTorch with other trainers' losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ddpm_fast as df
from benchmarks.common import shape_id
from benchmarks.eager import EagerDiffusion
from benchmarks.harness import Case, Target
from benchmarks.training import PEERS, SCHEDULE, contestant, eager_network, our_network
from ddpm_fast.training import diffusion_loss


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def check(images: Tensor) -> float:
    """Ours and eager's loss and gradients for the same timesteps and noise; the error is the loss's."""
    t = torch.randint(0, 1000, images.shape[:1])
    noise = df.randn(images.shape, seed=3, step=7, stream="training")
    ours, theirs = our_network(), eager_network("channels_last")
    loss = diffusion_loss(ours, SCHEDULE, images, t, seed=3, step=7).mean()
    x_t, _ = EagerDiffusion(SCHEDULE).q_sample(images, t, noise)
    expected = nn.functional.mse_loss(theirs(x_t, t), noise)
    error = abs(float(loss - expected)) / float(expected)
    assert error < 1e-5, f"the loss is off by a relative {error:.1e}"
    for got, wanted in zip(gradients(ours, loss), gradients(theirs, expected), strict=True):
        off = float((got - wanted).norm() / (wanted.norm() + 1e-9))
        assert off < 1e-3, f"a gradient is off by a relative {off:.1e}"
    return error


@pytest.mark.parametrize("shape", [(16, 1, 28, 28), (64, 1, 28, 28)], ids=shape_id)
def test_step(measure: Callable[[Case], None], quick: bool, shape: tuple[int, ...]) -> None:
    if quick and shape[0] > 16:
        pytest.skip("--quick makes one batch")
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    measure(
        Case(
            what="training step, the shipped network",
            shape=shape,
            layout="channels_last",
            ours=contestant("ours", images),
            peers={name: contestant(name, images) for name in PEERS},
            check=lambda: check(images),
            target=Target(1.15, 1.4),
            grad=True,
        )
    )
