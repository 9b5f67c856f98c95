"""Small networks with random weights, so that the examples run anywhere in seconds. Yours takes their place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddpm_fast.nn import UNet


def randomized(module: nn.Module, seed: int) -> nn.Module:
    """`module` with weights drawn from `seed`, also where training starts from zero, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, std=fan_in**-0.5, generator=generator)
    return module.eval()


class ConditionedUNet(nn.Module):
    """The package's U-Net over the state and the images beside it, with labels in the place of prompts.

    Args:
        channels: of the state.
        outputs: channels of the output; twice `channels` with a learned variance.
        beside: channels of the images that the network is shown beside the state.
        labels: how many labels there are, 0 for a network without any.
        seed: of the weights.
    """

    def __init__(self, channels: int, outputs: int, *, beside: int = 0, labels: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.unet = UNet(
            in_channels=channels + beside,
            out_channels=outputs,
            base_channels=16,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_levels=(),
            num_groups=4,
            num_classes=labels or None,
        )
        randomized(self, seed)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, beside: Tensor | None = None) -> Tensor:
        """``(N, outputs, H, W)`` from the state, the time, int64 labels ``(N,)`` and ``(N, beside, H, W)``."""
        h = self.unet(x if beside is None else torch.cat([x, beside], dim=1), t, y)
        # Most of a noisy state is noise: with this, random weights keep the samples in range as trained ones do.
        return torch.cat([h[:, : x.shape[1]] * 0.2 + x, h[:, x.shape[1] :]], dim=1)
