"""``ddpm-fast demo``: the same images twice, by a plain loop and by ``ddpm_fast.Sampler``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
        plain_seconds, fast_seconds: of the two loops, all steps.
        difference: the largest between the two grids, images in [-1, 1].
        twin_difference: the largest between an image and the same one drawn alone.
        x: float32 ``(N, C, H, W)``, the images.
        frames: float32 ``(F, N, C, H, W)``, states on the way.
    """

    plain_seconds: float
    fast_seconds: float
    difference: float
    twin_difference: float
    x: Tensor
    frames: Tensor


def compare(network: Network, *, count: int, steps: int | str | None, seed: int) -> Comparison:
    """Draw `count` images with both loops, from the same noise, and one of them alone."""
    if network.prediction != "epsilon" or network.model.config.num_classes is not None:
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

    with _progress(twin, schedule.timesteps, "plain PyTorch loop"):
        started = time.perf_counter()
        # randn where the originals call torch.randn_like, which would not give both loops the same noise. It is
        # the faster of the two, so the plain loop does not suffer by it.
        plain = plain_loop(
            twin,
            schedule.betas,
            schedule.timestep_map,
            randn(shape, seed=seed, stream="x_T"),
            lambda i: randn(shape, seed=seed, step=i),
        )
        plain_seconds = time.perf_counter() - started

    with _progress(network.model, schedule.timesteps, "ddpm_fast         "):
        started = time.perf_counter()
        x, frames = sampler.sample(shape, seed=seed, every=max(1, schedule.timesteps // _FRAMES))
        fast_seconds = time.perf_counter() - started

    number = count // 2
    with _progress(network.model, schedule.timesteps, "one image alone   "):
        alone = sampler.sample((1, *network.shape), seed=seed, sample_ids=[number])
    return Comparison(
        plain_seconds,
        fast_seconds,
        (plain - x).abs().max().item(),
        (alone[0] - x[number]).abs().max().item(),
        x,
        frames,
    )


def table(result: Comparison, steps: int) -> str:
    """The result for the terminal."""
    rows = [
        ("", "seconds", "ms a step"),
        ("plain PyTorch loop", f"{result.plain_seconds:.1f}", f"{1e3 * result.plain_seconds / steps:.1f}"),
        ("ddpm_fast", f"{result.fast_seconds:.1f}", f"{1e3 * result.fast_seconds / steps:.1f}"),
        ("ratio", f"{result.plain_seconds / result.fast_seconds:.2f}", ""),
    ]
    lines = [f"{name:<20}{first:>9}{second:>11}" for name, first, second in rows]
    lines += [
        "",
        "largest difference of a pixel, from -1 to 1",
        f"{'between the loops':<20}{result.difference:>9.1e}   the networks' rounding, carried through all steps",
        f"{'drawn again alone':<20}{result.twin_difference:>9.1e}   one image, from its twin in the batch:",
        f"{'':<32}the same noise and steps, the network's rounding differs",
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


@contextmanager
def _progress(model: nn.Module, steps: int, label: str) -> Iterator[None]:
    """A progress bar that counts the network's calls."""
    with tqdm(total=steps, desc=label, unit="step") as bar:

        def count(*_: Any) -> None:
            bar.update()

        handle = model.register_forward_hook(count)
        try:
            yield
        finally:
            handle.remove()
