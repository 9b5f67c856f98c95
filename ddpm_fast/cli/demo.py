"""``ddpm-fast demo``: the same images twice, by a plain loop and by ``ddpm_fast.Sampler``."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddpm_fast.cli import images
from ddpm_fast.cli.errors import UserError
from ddpm_fast.cli.network import Network
from ddpm_fast.cli.plain_loop import plain_loop
from ddpm_fast.nn import UNet, eager_copy
from ddpm_fast.ops import randn
from ddpm_fast.sampler import Sampler

_FRAMES = 50


@dataclass(frozen=True)
class Comparison:
    """What the demo found.

    Attributes:
        plain_seconds, fast_seconds: of each step, in the two loops.
        difference: the largest between the two grids, images in [-1, 1].
        twin_difference: the largest between an image and the same one drawn alone.
        x: float32 ``(N, C, H, W)``, the images.
        frames: states on the way, each ``(N, C, H, W)``.
    """

    plain_seconds: list[float]
    fast_seconds: list[float]
    difference: float
    twin_difference: float
    x: Tensor
    frames: list[Tensor]

    @property
    def ratio(self) -> float:
        """How many times as long a step takes in the plain loop, the median over the steps."""
        return median(plain / fast for plain, fast in zip(self.plain_seconds, self.fast_seconds, strict=True))


def compare(network: Network, *, count: int, steps: int | str | None, seed: int) -> Comparison:
    """Draw `count` images with both loops, from the same noise, and one of them alone.

    The loops take turns, a step each, so that whatever else the machine does meets both.
    """
    config = network.model.config
    usual = network.prediction == "epsilon" and network.variance == "fixed_small"
    if not usual or config.num_classes is not None or config.self_condition:
        raise UserError("the demo's plain loop knows only networks that predict epsilon, without classes")
    sampler = Sampler(network.model, network.schedule, steps=steps)
    schedule = sampler.schedule
    shape = (count, *network.shape)
    twin = _plain_twin(network.model)

    # Both networks choose their algorithms at the first call.
    warm, t = torch.zeros(shape), torch.zeros(count, dtype=torch.int64)
    with torch.no_grad():
        twin(warm, t)
        network.model(warm, t)

    # randn where the originals call torch.randn_like, which would not give both loops the same noise. It is the faster
    # of the two, so the plain loop does not suffer by it.
    plain_steps = plain_loop(
        twin,
        schedule.betas,
        schedule.timestep_map,
        randn(shape, seed=seed, stream="x_T"),
        lambda i: randn(shape, seed=seed, step=i),
    )
    fast_steps = sampler.stream(shape, seed=seed)
    plain_seconds, fast_seconds, frames = [], [], []
    every = max(1, schedule.timesteps // _FRAMES)
    for i in tqdm(range(schedule.timesteps), desc="both loops", unit="step"):
        started = time.perf_counter()
        plain = next(plain_steps)
        between = time.perf_counter()
        fast = next(fast_steps)
        fast_seconds.append(time.perf_counter() - between)
        plain_seconds.append(between - started)
        if (i + 1) % every == 0 or i + 1 == schedule.timesteps:
            frames.append(fast.x)

    number = count // 2
    one = sampler.stream((1, *network.shape), seed=seed, sample_ids=[number])
    for alone in tqdm(one, desc="one alone ", unit="step", total=schedule.timesteps):
        last = alone.x
    return Comparison(
        plain_seconds,
        fast_seconds,
        (plain - fast.x).abs().max().item(),
        (last[0] - fast.x[number]).abs().max().item(),
        fast.x,
        frames,
    )


def table(result: Comparison) -> str:
    """The result for the terminal."""
    lines = [f"{'':<20}{'seconds':>9}{'ms a step':>11}"]
    for name, seconds in (("plain PyTorch loop", result.plain_seconds), ("ddpm_fast", result.fast_seconds)):
        lines.append(f"{name:<20}{sum(seconds):>9.1f}{1e3 * median(seconds):>11.1f}")
    lines += [
        f"{'ratio':<29}{result.ratio:>11.2f}   median of the steps' ratios; the loops took turns",
        "",
        "largest difference of a pixel, from -1 to 1",
        f"{'between the loops':<29}{result.difference:>11.1e}   the networks' rounding, carried through all steps",
        f"{'drawn again alone':<29}{result.twin_difference:>11.1e}   one image, from its twin in the batch:",
        f"{'':<43}the same noise and steps, the network's rounding differs",
    ]
    return "\n".join(lines)


def write_pictures(result: Comparison, folder: Path) -> None:
    """``grid.png`` and ``denoising.gif``."""
    folder.mkdir(parents=True, exist_ok=True)
    images.write_png(folder / "grid.png", images.grid(result.x))
    images.write_gif(folder / "denoising.gif", [images.grid(x) for x in result.frames], milliseconds=80, last=2000)


def _plain_twin(model: UNet) -> nn.Module:
    """The network with the same weights as PyTorch alone would have it: contiguous, norm and SiLU apart."""
    twin = UNet(replace(model.config, channels_last=False))
    twin.load_state_dict(model.state_dict())
    return eager_copy(twin.eval().requires_grad_(False))
