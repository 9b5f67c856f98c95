"""Where the noise of a run comes from: a seed, given tensors, a function, or a torch generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.ops import _check
from ddpm_fast.ops.random import randn

NoiseFunction = Callable[[int, int, tuple[int, ...]], Tensor]
"""``noise(draw, t, shape)``: the number of the draw, the timestep's original number, the shape wanted."""


class SeededNoise:
    """Noise that the step's kernel makes itself, from the seed and the samples' numbers (the default)."""

    def __init__(
        self,
        seed: int | Tensor,
        sample_ids: Sequence[int] | Tensor | None,
        samples: int,
        device: torch.device,
        corrections: int = 0,
    ) -> None:
        self.seed = _check.seed_tensor(seed, device)
        self.sample_ids = _check.sample_id_tensor(sample_ids, samples, device)
        self.extras = corrections  # the corrector's updates come first in its stream

    def extra(self, i: int, like: Tensor) -> Tensor:
        """A draw of step i that is not the step's own, of `like`'s shape: the stream "corrector", counted."""
        noise = randn(
            like.shape,
            seed=self.seed,
            sample_ids=self.sample_ids,
            step=self.extras,
            stream="corrector",
            out=torch.empty_like(like),
        )
        self.extras += 1
        return noise

    def start(self, x: Tensor) -> None:
        """Fill `x` with x_T."""
        randn(x.shape, seed=self.seed, sample_ids=self.sample_ids, stream="x_T", out=x)

    def arguments(self, i: int, stochastic: bool) -> dict[str, Any]:
        """What `ops.denoise` gets for step i; a solver that adds no noise has no use for it.

        To be called once for each step, in order: the step may be one of several draws, or of none.
        """
        return {"seed": self.seed, "sample_ids": self.sample_ids} if stochastic else {}

    def correction(self, i: int) -> dict[str, Any]:
        """What `ops.denoise` gets for an update of the corrector in step i; the table's row numbers the draw."""
        return {"seed": self.seed, "sample_ids": self.sample_ids, "stream": "corrector"}


class GivenNoise(SeededNoise):
    """Noise from the caller's rows or function, one row a draw of the original; x_T comes from the seed."""

    def __init__(
        self,
        noise: Tensor | NoiseFunction,
        timesteps: list[int],
        draws: tuple[int, ...],
        extras: int,
        shape: tuple[int, ...],
        seed: int | Tensor,
        sample_ids: Sequence[int] | Tensor | None,
        device: torch.device,
    ) -> None:
        super().__init__(seed, sample_ids, shape[0], device)
        self.timesteps, self.draws, self.shape, self.device = timesteps, draws, shape, device
        self.noise, self.next = noise, 0
        if isinstance(noise, Tensor):
            if noise.dtype != torch.float32 or noise.device != device:
                raise ValueError(f"noise must be float32 on {device}, got {noise.dtype} on {noise.device}")
            total = sum(draws) + extras
            if noise.dim() != len(shape) + 1 or noise.shape[1:] != shape or len(noise) < total:
                raise ValueError(
                    f"noise must have a row of shape {shape} for each of the {total} draws "
                    f"of these {len(timesteps)} steps, got shape {tuple(noise.shape)}"
                )
        elif not callable(noise):
            raise TypeError(f"noise must be a tensor of rows or noise(draw, t, shape), got {type(noise).__name__}")

    def arguments(self, i: int, stochastic: bool) -> dict[str, Any]:
        """The last row of step i. The function is called whether or not its noise is used, to keep its count."""
        row = None
        for _ in range(self.draws[i]):
            row = self._row(i)
        return {"noise": row} if stochastic and row is not None else {}

    def extra(self, i: int, like: Tensor) -> Tensor:
        """The next row."""
        return self._row(i)

    def correction(self, i: int) -> dict[str, Any]:
        """The next row."""
        return {"noise": self._row(i)}

    def _row(self, i: int) -> Tensor:
        number, self.next = self.next, self.next + 1
        if isinstance(self.noise, Tensor):
            return self.noise[number]
        return check_noise(self.noise(number, self.timesteps[i], self.shape), self.shape, self.device)


class GeneratorNoise:
    """Noise drawn from torch in the original's order: x_T, then as often as it draws in a step, used or not."""

    def __init__(
        self, generator: torch.Generator, draws: tuple[int, ...], shape: tuple[int, ...], device: torch.device
    ) -> None:
        if generator.device.type != device.type:
            raise ValueError(f"generator is on {generator.device}, the samples are on {device}")
        self.generator, self.draws = generator, draws
        # Contiguous whatever the layout of the samples: torch fills memory in order, and so did the original.
        self.buffer = torch.empty(shape, dtype=torch.float32, device=device)

    def start(self, x: Tensor) -> None:
        """Fill `x` with x_T."""
        x.copy_(self.buffer.normal_(generator=self.generator))

    def arguments(self, i: int, stochastic: bool) -> dict[str, Any]:
        """Draw the noise of step i."""
        for _ in range(self.draws[i]):
            self.buffer.normal_(generator=self.generator)
        return {"noise": self.buffer} if stochastic and self.draws[i] else {}

    def extra(self, i: int, like: Tensor) -> Tensor:
        """The next draw."""
        return self.buffer.normal_(generator=self.generator)

    def correction(self, i: int) -> dict[str, Any]:
        """The next draw."""
        return {"noise": self.buffer.normal_(generator=self.generator)}


NoiseSource = SeededNoise | GeneratorNoise


def check_noise(noise: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`noise` if it can be used for samples of `shape` on `device`, an error otherwise."""
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise must be a tensor, got {type(noise).__name__}")
    if noise.shape != shape or noise.dtype != torch.float32 or noise.device != device:
        raise ValueError(
            f"noise must be float32 of shape {shape} on {device}, "
            f"got {noise.dtype} of shape {tuple(noise.shape)} on {noise.device}"
        )
    return noise
