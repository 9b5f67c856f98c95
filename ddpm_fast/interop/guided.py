"""openai's improved-diffusion, guided-diffusion and GLIDE: GaussianDiffusion and SpacedDiffusion."""

from __future__ import annotations

from typing import Any

from torch import nn

from ddpm_fast.interop import _read

_KIND = "GaussianDiffusion of openai's"
_PREDICTIONS = {"EPSILON": "epsilon", "START_X": "x0", "PREVIOUS_X": "x_prev"}
_VARIANCES = {
    "FIXED_SMALL": "fixed_small",
    "FIXED_LARGE": "fixed_large",
    "LEARNED": "learned",
    "LEARNED_RANGE": "learned_range",
}
# What makes the samples, by solver.
_METHODS = {
    "ddpm": ("q_posterior_mean_variance", "p_mean_variance", "p_sample", "p_sample_loop", "p_sample_loop_progressive"),
    "ddim": ("p_mean_variance", "ddim_sample", "ddim_sample_loop", "ddim_sample_loop_progressive"),
}
_CLASSES = ("GaussianDiffusion", "SpacedDiffusion")


def arguments(diffusion: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a Sampler, besides the model, that samples as `diffusion` does."""
    _read.check_options(options, ("prediction", "variance", "time_input"), _KIND)
    if isinstance(diffusion, nn.Module):  # with tables of the same names
        raise TypeError(
            f"{type(diffusion).__name__} is an nn.Module and no {_KIND}: from_lucidrains or from_latent_diffusion may "
            f"be for it"
        )
    _read.check_methods(diffusion, _METHODS.get(options.get("solver", "ddpm"), ()), _CLASSES)
    spaced = hasattr(diffusion, "timestep_map")
    schedule = _read.schedule(
        diffusion,
        _KIND,
        [int(t) for t in diffusion.timestep_map] if spaced else None,
        int(_read.attribute(diffusion, "original_num_steps", _KIND)) if spaced else None,
    )
    if hasattr(diffusion, "model_mean_type"):
        mean, variance = diffusion.model_mean_type, _read.attribute(diffusion, "model_var_type", _KIND)
        prediction = _read.choice(diffusion, "model_mean_type", getattr(mean, "name", mean), _PREDICTIONS)
        kind = _read.choice(diffusion, "model_var_type", getattr(variance, "name", variance), _VARIANCES)
    else:  # GLIDE's, which has no others
        prediction, kind = "epsilon", "learned_range"
    return {
        "schedule": schedule,
        "prediction": prediction,
        "variance": kind,
        "reference": "guided",
        "time_input": "scaled" if getattr(diffusion, "rescale_timesteps", False) else "auto",
        **options,
    }
