"""lucidrains' denoising_diffusion_pytorch: GaussianDiffusion and LearnedGaussianDiffusion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ddpm_fast.interop import _read

_KIND = "GaussianDiffusion of denoising_diffusion_pytorch"
_PREDICTIONS = {"pred_noise": "epsilon", "pred_x0": "x0", "pred_v": "v"}
_PACKAGE = "denoising_diffusion_pytorch."
_MODULES = tuple(_PACKAGE + name for name in ("denoising_diffusion_pytorch", "learned_gaussian_diffusion"))
# What makes the samples. Where a subclass has its own, its samples are not those of a Sampler.
_METHODS = ("model_predictions", "p_mean_variance", "p_sample", "p_sample_loop", "ddim_sample", "q_posterior")
_CLASSES = ("GaussianDiffusion", "LearnedGaussianDiffusion")


def arguments(diffusion: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a Sampler that samples as `diffusion.sample()` does."""
    _read.check_options(options, ("prediction", "variance", "self_condition", "time_input", "clip"), _KIND)
    for name in _METHODS:
        _read.attribute(diffusion, name, _KIND)
        method = getattr(type(diffusion), name)
        owner, _, _ = method.__qualname__.rpartition(".")
        if owner not in _CLASSES or (method.__module__.startswith(_PACKAGE) and method.__module__ not in _MODULES):
            raise ValueError(
                f"{type(diffusion).__name__} samples with {method.__module__}.{method.__qualname__}, which a Sampler "
                f"cannot stand in for"
            )
    objective = _read.attribute(diffusion, "objective", _KIND)
    learned = any(cls.__name__ == "LearnedGaussianDiffusion" for cls in type(diffusion).__mro__)
    if learned and objective != "pred_noise":
        raise ValueError(
            f"LearnedGaussianDiffusion with objective={objective!r}: its p_sample takes the output for noise"
        )
    result = {
        "model": diffusion.model,
        "schedule": _read.schedule(diffusion, _KIND),
        "prediction": _read.choice(diffusion, "objective", objective, _PREDICTIONS),
        "variance": "learned_range" if learned else "fixed_small",
        "self_condition": bool(diffusion.self_condition),
        "reference": "lucidrains",
    }
    if diffusion.is_ddim_sampling and "solver" not in options:
        result.update(solver="ddim", eta=float(diffusion.ddim_sampling_eta))
        if "timesteps" not in options:
            result["steps"] = int(diffusion.sampling_timesteps)
    return {**result, **options}


def finish(diffusion: Any) -> Callable[[Tensor], None]:
    """What `sample` does to its result: [0, 1] from [-1, 1], or nothing with auto_normalize=False."""

    def unnormalize(x: Tensor) -> None:
        x.copy_(diffusion.unnormalize(x))

    return unnormalize
