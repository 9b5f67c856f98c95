"""A norm that is fused, and with what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .norms import has_silu_inside


@dataclass
class Site:
    """A norm that is fused, and with what.

    Attributes:
        act: the activation, a module or a function; None where there is none.
        modulated: whether a scale and shift stand between the two.
        embedded: whether something is added to the norm's input.
        container: the Sequential in which they stand, if it is not a method that calls them.
    """

    norm: nn.Module
    act: Any = None
    modulated: bool = False
    embedded: bool = False
    container: nn.Module | None = None


def describe(sites: list[Site]) -> str:
    """What is fused with one norm: in brackets what only some branches of the code have, or may have."""
    silu = has_silu_inside(sites[0].norm) or any(site.act is not None for site in sites)
    return (
        "[embedding +] " * any(site.embedded for site in sites)
        + ("GroupNorm" if isinstance(sites[0].norm, nn.GroupNorm) else "RMSNorm")
        + " [+ scale/shift]" * any(site.modulated for site in sites)
        + " + SiLU" * silu
    )
