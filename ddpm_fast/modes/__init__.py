"""Reference modes: whose loop a Sampler reproduces, a file an original.

A mode says which timesteps a number of steps means, what x0 is clipped to, how the coefficients of a step
come about and how often the original draws noise in it. The modes hold no state and run nothing: all of it
ends up in a coefficient table.
"""

from __future__ import annotations

from ddpm_fast.modes._mode import Mode, TableRequest
from ddpm_fast.modes.annotated import AnnotatedMode
from ddpm_fast.modes.diffusers import DiffusersMode
from ddpm_fast.modes.guided import GuidedMode
from ddpm_fast.modes.latent_diffusion import LatentDiffusionMode
from ddpm_fast.modes.lucidrains import LucidrainsMode

MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (GuidedMode(), LucidrainsMode(), LatentDiffusionMode(), DiffusersMode(), AnnotatedMode())
}
"""The modes by the name that `reference=` takes."""

__all__ = [
    "MODES",
    "AnnotatedMode",
    "DiffusersMode",
    "GuidedMode",
    "LatentDiffusionMode",
    "LucidrainsMode",
    "Mode",
    "TableRequest",
]
