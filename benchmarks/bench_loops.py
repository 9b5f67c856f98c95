"""The loops that people run, without their network, against the Sampler for each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from benchmarks.counting import per_step
from benchmarks.harness import Case
from benchmarks.loops import LOOPS, STEPS, Loop
from ddpm_fast.nn import UNet, eager_copy

# Of an image loop and a guided one in latents.
END_TO_END = ("guided-diffusion, fixed_small", "CompVis DDIM, guidance")


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name.replace(" ", "-"))
def test_loop(measure: Callable[[Case], None], loop: Loop) -> None:
    def check() -> float:
        error = loop.error()
        assert error <= loop.tolerance, f"{error} from the original with the same noise"
        return error

    before, after = per_step(loop.theirs, loop.shape), per_step(loop.ours, loop.shape)
    x, out = torch.randn(loop.shape), torch.empty(loop.shape)
    measure(
        Case(
            what="original loop without its network, a step",
            shape=loop.shape,
            note=f"{loop.name}; kernels {before.kernels} -> {after.kernels}",
            ours=loop.ours(),
            peers={"original": loop.theirs()},
            floors={"copy_": lambda: [out.copy_(x) for _ in range(STEPS)]},
            check=check,
            steps=STEPS,
        )
    )


@pytest.mark.parametrize(
    "loop", [loop for loop in LOOPS if loop.name in END_TO_END], ids=lambda loop: loop.name.replace(" ", "-")
)
def test_end_to_end(measure: Callable[[Case], None], quick: bool, loop: Loop) -> None:
    """With a U-Net: the original's in plain PyTorch, ours with the package's kernels."""
    channels = loop.shape[1]
    torch.manual_seed(0)
    network = UNet(
        in_channels=channels,
        base_channels=16 if quick else 32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_levels=(),
        num_groups=8,
        num_classes=2 if loop.arguments else None,
    ).eval()
    nn.init.normal_(network.conv_out.weight, std=0.02)  # which starts from zero
    original, ours = loop.original(eager_copy(network)), loop.ours_with(network)

    def check() -> float:
        assert loop.error() <= loop.tolerance
        x, t = torch.randn(loop.shape), torch.full((len(loop.output),), 500)
        labels = {"y": torch.ones_like(t)} if loop.arguments else {}
        x = x.repeat(len(t) // len(x), 1, 1, 1)
        error = float((network(x, t, **labels) - eager_copy(network)(x, t, **labels)).abs().max())
        assert error < 1e-4, f"the networks differ by {error}"
        return error

    measure(
        Case(
            what="original loop with a U-Net, a step",
            shape=loop.shape,
            note=loop.name,
            ours=ours,
            peers={"original": original},
            check=check,
            steps=STEPS,
        )
    )
