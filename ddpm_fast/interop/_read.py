"""What the importers share: reading attributes of an object whose class is not ours to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddpm_fast.schedule import NoiseSchedule

TABLES = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
"""What openai's, lucidrains' and CompVis' objects hold under one name."""


def attribute(source: Any, name: str, kind: str) -> Any:
    """``source.name``; without it `source` is not what the importer is for."""
    try:
        return getattr(source, name)
    except AttributeError:
        raise TypeError(f"{type(source).__name__} has no {name!r} and is no {kind}") from None


def schedule(
    source: Any, kind: str, timestep_map: list[int] | None = None, original_timesteps: int | None = None
) -> NoiseSchedule:
    """The schedule with the object's own tables."""
    tables = {name: attribute(source, name, kind) for name in ("betas", *TABLES)}
    return NoiseSchedule.from_tables(tables, timestep_map, original_timesteps)


def choice(source: Any, name: str, value: Any, known: Mapping[str, str]) -> str:
    """Our word for theirs."""
    if value not in known:
        raise ValueError(f"{type(source).__name__}.{name} is {value!r}; a Sampler has {', '.join(known)}")
    return known[value]


def check_methods(source: Any, methods: tuple[str, ...], originals: tuple[str, ...]) -> None:
    """Refuse an object with methods of its own in the place of those of `originals`, which are classes' names.

    The class that a method comes from first is an original whatever its name: forks rename them.
    """
    for name in methods:
        owners = [cls.__name__ for cls in type(source).__mro__ if name in vars(cls)]
        if name in getattr(source, "__dict__", ()) or (len(owners) > 1 and owners[0] not in originals):
            raise ValueError(f"{type(source).__name__} has a {name} of its own, which a Sampler cannot stand in for")


def check_options(options: Mapping[str, Any], read: tuple[str, ...], kind: str) -> None:
    """Refuse keywords for what the object itself says."""
    for name in ("schedule", "reference", *read):
        if name in options:
            raise TypeError(f"{name} is read from the {kind} and cannot be given beside it")
