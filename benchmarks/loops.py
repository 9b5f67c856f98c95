"""The loops that a Sampler replaces, beside it, with a network that does nothing: its output is always the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

import ddpm_fast as df
from tests.originals.guided import GaussianDiffusion, ModelVarType
from tests.originals.latent_diffusion import DDIMSampler, LatentDiffusion
from tests.third_party.lucidrains import import_package

STEPS = 10
IMAGES, LATENTS = (4, 3, 64, 64), (4, 4, 64, 64)
SCALE = 3.0

Mark = Callable[[], None]


def nothing() -> None:
    """For a loop whose steps nobody counts."""


class Network(nn.Module):
    """Returns one tensor. `mark` is called first; what lucidrains asks of a network is there."""

    channels = out_dim = 3
    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self, output: Tensor, mark: Mark) -> None:
        super().__init__()
        self.output, self.mark = output, mark

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        self.mark()
        assert len(x) == len(self.output)
        return self.output


@dataclass(frozen=True)
class Loop:
    """A loop and the Sampler for it.

    Args:
        name: whose.
        shape: (N, C, H, W).
        original: ``original(network)`` prepares the loop, which draws from torch's generator.
        sampler: ``sampler(network)``, the same for the Sampler.
        output: what the network returns that does nothing.
        tolerance: of the two results' difference, 0 where they are bit-equal.
        arguments: what `sample` gets besides.
        swapped: whether the original has the conditional half of a batch first.
        source: x_T and noise as the original draws them, called behind `torch.manual_seed`.
    """

    name: str
    shape: tuple[int, ...]
    original: Callable[[nn.Module], Callable[[], Tensor]]
    sampler: Callable[[nn.Module], df.Sampler]
    output: Tensor
    tolerance: float
    arguments: dict[str, Any] = field(default_factory=dict)
    swapped: bool = False
    source: Callable[[], dict[str, Any]] = lambda: {"generator": torch.default_generator}

    def theirs(self, mark: Mark = nothing) -> Callable[[], Tensor]:
        """The original's loop with a network that does nothing, prepared."""
        return self.original(Network(self.output, mark))

    def ours(self, mark: Mark = nothing) -> Callable[[], Tensor]:
        """The Sampler's, from a seed."""
        return self.ours_with(self._ours(mark))

    def ours_with(self, network: nn.Module) -> Callable[[], Tensor]:
        sampler = self.sampler(network)
        return lambda: sampler.sample(self.shape, seed=0, **self.arguments)

    def error(self) -> float:
        """The largest difference of the two from the same torch seed."""
        original, sampler = self.theirs(), self.sampler(self._ours(nothing))
        torch.manual_seed(0)
        expected = original()[: self.shape[0]]
        torch.manual_seed(0)
        result = sampler.sample(self.shape, **self.source(), **self.arguments)
        return float((result - expected).abs().max())

    def _ours(self, mark: Mark) -> Network:
        output = torch.cat(self.output.chunk(2)[::-1]) if self.swapped else self.output
        return Network(output, mark)


def _output(seed: int, channels: int) -> Tensor:
    """About what a network says of a noisy state; small enough for x0 to lie on both sides of the clip."""
    return 0.3 * torch.randn(4, channels, 64, 64, generator=torch.Generator().manual_seed(seed))


SCHEDULE = df.NoiseSchedule.linear(1000).respace(STEPS)
LABELS, NO_LABELS = torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)


def _guided(variance: ModelVarType) -> GaussianDiffusion:
    return GaussianDiffusion(SCHEDULE.betas.numpy(), var_type=variance)


def _openai(variance: str) -> Loop:
    def original(network: nn.Module) -> Callable[[], Tensor]:
        diffusion = _guided(ModelVarType[variance.upper()])
        return lambda: diffusion.p_sample_loop(network, IMAGES)

    fixed = variance == "fixed_small"
    return Loop(
        f"guided-diffusion, {variance}",
        IMAGES,
        original,
        lambda network: df.Sampler(network, SCHEDULE, variance=variance),
        output=_output(1, 3 if fixed else 6),
        tolerance=0.0 if fixed else 4e-6,  # the exponential is ours
    )


def _glide() -> Loop:
    twice = (8, *IMAGES[1:])

    def original(network: nn.Module) -> Callable[[], Tensor]:
        diffusion = _guided(ModelVarType.LEARNED_RANGE)

        def model_fn(x: Tensor, t: Tensor) -> Tensor:
            half = x[: len(x) // 2]
            output = network(torch.cat([half, half]), t)
            epsilon, rest = output[:, :3], output[:, 3:]
            c, u = torch.split(epsilon, len(epsilon) // 2)
            mixed = u + SCALE * (c - u)
            return torch.cat([torch.cat([mixed, mixed]), rest], dim=1)

        return lambda: diffusion.p_sample_loop(model_fn, twice)

    return Loop(
        "GLIDE, guidance",
        IMAGES,
        original,
        lambda network: df.Sampler(network, SCHEDULE, variance="learned_range", guidance_scale=SCALE),
        output=torch.cat([_output(1, 6), _output(2, 6)]),
        tolerance=4e-6,  # the exponential is ours
        arguments={"model_kwargs": {"y": LABELS}, "uncond_kwargs": {"y": NO_LABELS}},
        swapped=True,
        source=lambda: {"x_T": torch.randn(twice)[:4], "noise": lambda draw, t, shape: torch.randn(twice)[:4]},
    )


def _lucidrains() -> Loop:
    package = import_package()

    def diffusion(network: nn.Module) -> Any:
        return package.GaussianDiffusion(
            network,
            image_size=64,
            timesteps=STEPS,
            beta_schedule="cosine",
            objective="pred_noise",
            auto_normalize=False,
        )

    def original(network: nn.Module) -> Callable[[], Tensor]:
        process = diffusion(network)

        def p_sample_loop() -> Tensor:
            """Theirs, without its progress bar."""
            x = torch.randn(IMAGES)
            for t in reversed(range(STEPS)):
                x, _ = process.p_sample(x, t)
            return x

        return p_sample_loop

    return Loop(
        "lucidrains",
        IMAGES,
        original,
        lambda network: df.Sampler.from_lucidrains(diffusion(network)),
        output=_output(1, 3),
        tolerance=0.0,
    )


def _compvis() -> Loop:
    def original(network: nn.Module) -> Callable[[], Tensor]:
        sampler = DDIMSampler(LatentDiffusion(network), STEPS, 0.0)
        return lambda: sampler.sample(LATENTS, LABELS, NO_LABELS, SCALE)

    return Loop(
        "CompVis DDIM, guidance",
        LATENTS,
        original,
        lambda network: df.Sampler.from_latent_diffusion(
            LatentDiffusion(network), solver="ddim", steps=STEPS, guidance_scale=SCALE
        ),
        output=torch.cat([_output(2, 4), _output(1, 4)]),
        tolerance=1e-4,  # nine float32 operations a step, on latents that grow to 30
        arguments={"model_kwargs": {"c": LABELS}, "uncond_kwargs": {"c": NO_LABELS}},
    )


def _diffusers() -> Loop:
    def scheduler() -> DDPMScheduler:
        made = DDPMScheduler(1000)
        made.set_timesteps(STEPS)
        return made

    def original(network: nn.Module) -> Callable[[], Tensor]:
        made = scheduler()

        @torch.no_grad()
        def pipeline() -> Tensor:
            """The loop of DDPMPipeline."""
            x = torch.randn(IMAGES)
            for t in made.timesteps:
                x = made.step(network(x, t), t, x).prev_sample
            return x

        return pipeline

    return Loop(
        "diffusers DDPM",
        IMAGES,
        original,
        lambda network: df.Sampler.from_diffusers(scheduler(), network),
        output=_output(1, 3),
        tolerance=2e-6,  # its scalars are float32
    )


LOOPS = (_openai("fixed_small"), _openai("learned_range"), _glide(), _lucidrains(), _compvis(), _diffusers())
