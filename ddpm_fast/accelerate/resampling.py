"""Images that are doubled, or pixel-unshuffled, and then convolved: in one op that never builds what is convolved."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from .convolutions import FusedConv
from .fused import FusedSequential, doubles, hooked, is_plain_projection, is_plain_sequential, unshuffles
from .patch import Accelerated, is_accelerated, subclass, swap


class FusedUpsample2D(Accelerated, nn.Module):
    """diffusers' Upsample2D, on the fused op where it is a doubling and a convolution that the op takes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args and not kwargs and not any(argument is not None for argument in args[1:]):  # an output size
            conv = getattr(self, "conv" if self.name == "conv" else "Conv2d_0")
            plain = self.norm is None and self.use_conv and not self.use_conv_transpose and self.interpolate
            if plain and isinstance(conv, FusedConv) and isinstance(args[0], Tensor) and not hooked(conv):
                y = conv.doubled(args[0])
                if y is not None:
                    return y
        return super().forward(*args, **kwargs)


def accelerate_resamplings(model: nn.Module) -> None:
    """Lets Sequentials, and diffusers' Upsample2D, run a change of resolution and the convolution behind it as one."""
    for module in model.modules():
        if is_plain_sequential(module):
            layers = list(module)  # type: ignore[call-overload]
            pairs = pairwise(layers)
            found = any(
                (doubles(first) and isinstance(second, FusedConv))
                or (unshuffles(first) is not None and is_plain_projection(second))
                for first, second in pairs
            )
            made: type[Accelerated] = FusedSequential
        else:
            found, made = _is_diffusers(module), FusedUpsample2D
        if found and not is_accelerated(module):
            swap(module, subclass(made, type(module)))


def _is_diffusers(module: nn.Module) -> bool:
    """Whether it is diffusers' Upsample2D, in the library's own code."""
    library: Any = sys.modules.get("diffusers.models.upsampling")
    if library is None or type(module) is not library.Upsample2D or "forward" in module.__dict__:
        return False
    return bool(type(module).forward.__module__ == library.__name__)
