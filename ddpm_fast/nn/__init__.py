"""Network modules built on the fused ops."""

from __future__ import annotations

from .conv import Conv3x3
from .eager import eager_copy
from .embedding import timestep_embedding
from .group_norm_silu import EagerGroupNormSiLU, GroupNormSiLU
from .rms_norm_silu import RMSNormSiLU
from .unet import UNet, UNetConfig

__all__ = [
    "Conv3x3",
    "EagerGroupNormSiLU",
    "GroupNormSiLU",
    "RMSNormSiLU",
    "UNet",
    "UNetConfig",
    "eager_copy",
    "timestep_embedding",
]
