"""What the demo compares with: sampling as it is usually written, one tensor operation after the other.

The structure is that of lucidrains' denoising-diffusion-pytorch and of the annotated article on it: coefficient tables
in float32, an entry picked for each image, the clipped x0, the posterior's mean, noise. Nothing of ddpm_fast is in it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def plain_loop(
    model: Callable[[Tensor, Tensor], Tensor],
    betas: Tensor,
    timesteps: Tensor,
    x: Tensor,
    noise: Callable[[int], Tensor],
) -> Tensor:
    """Sample from a network that predicts epsilon.

    Args:
        model: ``model(x, t)``.
        betas: float64 ``(S,)``, of the steps that are made, cleanest first.
        timesteps: int64 ``(S,)``, what the network is told of each.
        x: float32 ``(N, C, H, W)``, x_T.
        noise: the noise of the i-th step, 0 for the noisiest.

    Returns:
        float32 ``(N, C, H, W)``.
    """
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    variance = betas * (1 - previous) / (1 - alphas_cumprod)
    tables = {
        "x0_from_x": (1 / alphas_cumprod).sqrt(),
        "x0_from_epsilon": (1 / alphas_cumprod - 1).sqrt(),
        "mean_from_x0": betas * previous.sqrt() / (1 - alphas_cumprod),
        "mean_from_x": (1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
        "log_variance": torch.cat([variance[1:2], variance[1:]]).log() if len(betas) > 1 else torch.zeros(1),
    }
    tables = {name: table.float() for name, table in tables.items()}

    def pick(name: str, index: Tensor) -> Tensor:
        return tables[name].gather(0, index).reshape(-1, 1, 1, 1)

    last = len(betas) - 1
    with torch.no_grad():
        for i in range(len(betas)):
            index = torch.full((len(x),), last - i, dtype=torch.int64)
            epsilon = model(x, timesteps[index])
            x0 = pick("x0_from_x", index) * x - pick("x0_from_epsilon", index) * epsilon
            x0 = x0.clamp(-1, 1)
            mean = pick("mean_from_x0", index) * x0 + pick("mean_from_x", index) * x
            if i == last:
                return mean
            x = mean + (0.5 * pick("log_variance", index)).exp() * noise(i)
    return x
