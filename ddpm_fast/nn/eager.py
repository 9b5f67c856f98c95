"""A network on PyTorch's own operations, to compare with."""

from __future__ import annotations

import copy

from torch import nn

from .blocks import SelfAttention
from .conv import Conv3x3
from .group_norm_silu import EagerGroupNormSiLU, GroupNormSiLU


def eager_copy(model: nn.Module) -> nn.Module:
    """A deep copy of ``model`` in which the modules of this package run on PyTorch's operations, one after the other.

    The baseline of the demo and of the benchmarks: the same parameters, outputs equal up to rounding.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if type(module) is GroupNormSiLU:
            # Same fields, other forward: nothing has to be rebuilt or found again by name.
            module.__class__ = EagerGroupNormSiLU
        elif isinstance(module, Conv3x3):
            module.mode = "torch"
        elif isinstance(module, SelfAttention):
            module.folds = False
    return twin
