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
        original: ``original(mark)`` prepares the loop, which draws from torch's generator; `mark` is called with the
            network.
        sampler: ``sampler(mark)``, the same for the Sampler.
        tolerance: of the two results' difference, 0 where they are bit-equal.
        arguments: what `sample` gets besides.
        source: x_T and noise as the original draws them, called behind `torch.manual_seed`.
    """

    name: str
    shape: tuple[int, ...]
    original: Callable[[Mark], Callable[[], Tensor]]
    sampler: Callable[[Mark], df.Sampler]
    tolerance: float
    arguments: dict[str, Any] = field(default_factory=dict)
    source: Callable[[], dict[str, Any]] = lambda: {"generator": torch.default_generator}

    def ours(self, mark: Mark) -> Callable[[], Tensor]:
        """The Sampler's loop, prepared."""
        sampler = self.sampler(mark)
        return lambda: sampler.sample(self.shape, seed=0, **self.arguments)

    def error(self) -> float:
        """The largest difference of the two from the same torch seed."""
        original, sampler = self.original(nothing), self.sampler(nothing)
        torch.manual_seed(0)
        expected = original()[: self.shape[0]]
        torch.manual_seed(0)
        result = sampler.sample(self.shape, **self.source(), **self.arguments)
        return float((result - expected).abs().max())


def _output(seed: int, channels: int) -> Tensor:
    """About what a network says of a noisy state; small enough for x0 to lie on both sides of the clip."""
    return 0.3 * torch.randn(4, channels, 64, 64, generator=torch.Generator().manual_seed(seed))


SCHEDULE = df.NoiseSchedule.linear(1000).respace(STEPS)
CONDITION = {"model_kwargs": {"y": torch.ones(4)}, "uncond_kwargs": {"y": torch.zeros(4)}}
CONDITIONAL, UNCONDITIONAL = _output(1, 3), _output(2, 3)


def _guided(variance: ModelVarType) -> GaussianDiffusion:
    return GaussianDiffusion(SCHEDULE.betas.numpy(), var_type=variance)


def _openai(variance: str) -> Loop:
    output = CONDITIONAL if variance == "fixed_small" else _output(1, 6)

    def original(mark: Mark) -> Callable[[], Tensor]:
        diffusion, network = _guided(ModelVarType[variance.upper()]), Network(output, mark)
        return lambda: diffusion.p_sample_loop(network, IMAGES)

    return Loop(
        f"guided-diffusion, {variance}",
        IMAGES,
        original,
        lambda mark: df.Sampler(Network(output, mark), SCHEDULE, variance=variance),
        tolerance=0.0 if variance == "fixed_small" else 4e-6,  # the exponential is ours
    )


def _glide() -> Loop:
    conditional, unconditional = _output(1, 6), _output(2, 6)

    def original(mark: Mark) -> Callable[[], Tensor]:
        diffusion, network = (
            _guided(ModelVarType.LEARNED_RANGE),
            Network(torch.cat([conditional, unconditional]), mark),
        )

        def model_fn(x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
            half = x[: len(x) // 2]
            output = network(torch.cat([half, half]), t)
            epsilon, rest = output[:, :3], output[:, 3:]
            c, u = torch.split(epsilon, len(epsilon) // 2)
            mixed = u + SCALE * (c - u)
            return torch.cat([torch.cat([mixed, mixed]), rest], dim=1)

        return lambda: diffusion.p_sample_loop(model_fn, (8, *IMAGES[1:]))

    def half_of_what_it_draws() -> dict[str, Any]:
        twice = (8, *IMAGES[1:])
        return {"x_T": torch.randn(twice)[:4], "noise": lambda draw, t, shape: torch.randn(twice)[:4]}

    return Loop(
        "GLIDE, guidance",
        IMAGES,
        original,
        lambda mark: df.Sampler(
            Network(torch.cat([unconditional, conditional]), mark),
            SCHEDULE,
            variance="learned_range",
            guidance_scale=SCALE,
        ),
        tolerance=4e-6,  # the exponential is ours
        arguments=CONDITION,
        source=half_of_what_it_draws,
    )


def _lucidrains() -> Loop:
    package = import_package()

    def diffusion(mark: Mark) -> Any:
        return package.GaussianDiffusion(
            Network(CONDITIONAL, mark),
            image_size=64,
            timesteps=STEPS,
            beta_schedule="cosine",
            objective="pred_noise",
            auto_normalize=False,
        )

    def original(mark: Mark) -> Callable[[], Tensor]:
        process = diffusion(mark)

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
        lambda mark: df.Sampler.from_lucidrains(diffusion(mark)),
        tolerance=0.0,
    )


def _compvis() -> Loop:
    conditional, unconditional = _output(1, 4), _output(2, 4)
    both = torch.cat([unconditional, conditional])
    y, null = torch.ones(4), torch.zeros(4)

    def original(mark: Mark) -> Callable[[], Tensor]:
        sampler = DDIMSampler(LatentDiffusion(Network(both, mark)), STEPS, 0.0)
        return lambda: sampler.sample(LATENTS, y, null, SCALE)

    return Loop(
        "CompVis DDIM, guidance",
        LATENTS,
        original,
        lambda mark: df.Sampler.from_latent_diffusion(
            LatentDiffusion(Network(both, mark)), solver="ddim", steps=STEPS, guidance_scale=SCALE
        ),
        tolerance=1e-4,  # nine float32 operations a step, on latents that grow to 30
        arguments={"model_kwargs": {"c": y}, "uncond_kwargs": {"c": null}},
    )


def _diffusers() -> Loop:
    def scheduler() -> DDPMScheduler:
        made = DDPMScheduler(1000)
        made.set_timesteps(STEPS)
        return made

    def original(mark: Mark) -> Callable[[], Tensor]:
        network, made = Network(CONDITIONAL, mark), scheduler()

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
        lambda mark: df.Sampler.from_diffusers(scheduler(), Network(CONDITIONAL, mark)),
        tolerance=2e-6,  # its scalars are float32
    )


LOOPS = (_openai("fixed_small"), _openai("learned_range"), _glide(), _lucidrains(), _compvis(), _diffusers())
