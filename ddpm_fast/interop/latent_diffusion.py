"""CompVis' latent-diffusion and Stable Diffusion: DDPM and LatentDiffusion."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ddpm_fast.interop import _read

_KIND = "DDPM of latent-diffusion"
_PREDICTIONS = {"eps": "epsilon", "x0": "x0", "v": "v"}
# What makes the samples of `p_sample_loop`; DDIMSampler and PLMSSampler ask for nothing but tables and `apply_model`.
_METHODS = ("predict_start_from_noise", "q_posterior", "p_mean_variance", "p_sample", "p_sample_loop")
_CLASSES = ("DDPM", "LatentDiffusion")


class ConditionedNetwork(nn.Module):
    """The network of a DDPM object as a Sampler calls one, with the condition as `c`."""

    def __init__(self, ddpm: nn.Module) -> None:
        super().__init__()
        self.ddpm: Any = ddpm

    def forward(self, x: Tensor, t: Tensor, c: Any = None) -> Any:
        """`apply_model` of a LatentDiffusion; the network of a plain DDPM takes no condition."""
        if hasattr(self.ddpm, "apply_model"):
            return self.ddpm.apply_model(x, t, c)
        if c is not None:
            raise TypeError(f"{type(self.ddpm).__name__} has no apply_model and takes no condition 'c'")
        return self.ddpm.model(x, t)


def arguments(ddpm: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a Sampler that samples as `ddpm`, a DDIMSampler or a PLMSSampler of it does."""
    _read.check_options(options, ("prediction", "variance", "time_input"), _KIND)
    if not isinstance(ddpm, nn.Module):
        raise TypeError(f"ddpm must be a {_KIND}, got {type(ddpm).__name__}")
    _read.attribute(ddpm, "model", _KIND)
    if getattr(ddpm, "shorten_cond_schedule", False):
        raise ValueError(f"{type(ddpm).__name__} has shorten_cond_schedule, noise on its condition: a Sampler has none")
    ancestral = options.get("solver", "ddpm") == "ddpm"
    if ancestral:
        _read.check_methods(ddpm, _METHODS, _CLASSES)
    parameterization = _read.attribute(ddpm, "parameterization", _KIND)
    result = {
        "model": ConditionedNetwork(ddpm),
        "schedule": _read.schedule(ddpm, _KIND),
        "prediction": _read.choice(ddpm, "parameterization", parameterization, _PREDICTIONS),
        "reference": "latent-diffusion",
    }
    if ancestral and _read.attribute(ddpm, "clip_denoised", _KIND):
        result["clip"] = (-1.0, 1.0)
    return {**result, **options}
