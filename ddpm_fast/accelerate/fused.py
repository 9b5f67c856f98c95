"""What accelerated code calls: two modules, one after the other, in one pass or in the original steps."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeGuard, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

from .activations import is_silu_function, is_silu_module
from .convolutions import FusedConv
from .norms import FusedNorm
from .patch import Accelerated


def hooked(module: nn.Module) -> bool:
    """Whether somebody looks at what goes into this module or comes out of it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _torch_module._has_any_global_hook()
    )


def is_plain_sequential(module: Any) -> bool:
    """Whether a module does what nn.Sequential does, and nothing more."""
    if not isinstance(module, nn.Sequential) or "forward" in module.__dict__:
        return False
    return isinstance(module, FusedSequential) or type(module).forward is nn.Sequential.forward


def doubles(module: nn.Module) -> bool:
    """Whether a module doubles an image's height and width by repeating its pixels, and does nothing else."""
    return (
        type(module) is nn.Upsample
        and "forward" not in module.__dict__
        and (module.mode, module.size) == ("nearest", None)
        and module.scale_factor in (2, (2, 2))
    )


def is_plain_projection(module: Any) -> TypeGuard[nn.Conv2d]:
    """Whether a module is torch's 1x1 convolution, and nothing else is to happen when it is called."""
    return (
        type(module) is nn.Conv2d
        and "forward" not in module.__dict__
        and not hooked(module)
        and set(module._parameters) == {"weight", "bias"}
        and module.kernel_size == module.stride == (1, 1)
        and module.padding in ((0, 0), "same", "valid")
        and module.groups == 1
    )


def unshuffles(module: nn.Module) -> int | None:
    """By what factor a module shrinks an image whose squares of pixels become channels; None if it is another module.

    It is torch's PixelUnshuffle, or the Rearrange of einops that says the same.
    """
    if "forward" in module.__dict__:
        return None
    if type(module) is nn.PixelUnshuffle:
        return module.downscale_factor
    einops: Any = sys.modules.get("einops.layers.torch")
    if einops is not None and type(module) is einops.Rearrange:
        layer: Any = module
        sides: dict[str, int] = layer.axes_lengths
        if layer.pattern.split() == _UNSHUFFLE.split() and sides.keys() == {"p1", "p2"} and sides["p1"] == sides["p2"]:
            return sides["p1"]
    return None


_UNSHUFFLE = "b c (h p1) (w p2) -> b (c p1 p2) h w"


def _unshuffled(x: Any, factor: int, conv: Any) -> Tensor | None:
    """A 1x1 convolution of the unshuffled image: one of the image, by squares of pixels with their side as stride."""
    if type(x) is not Tensor or x.dim() != 4 or x.shape[2] % factor or x.shape[3] % factor:
        return None
    weight: Tensor = conv.weight
    if weight.shape[1] != x.shape[1] * factor**2:
        return None
    return F.conv2d(x, weight.reshape(-1, x.shape[1], factor, factor), conv.bias, stride=factor)


def run(modules: Sequence[nn.Module], x: Any) -> Any:
    """One module after the other; a norm and a SiLU, or a change of resolution and a convolution, in one pass."""
    i = 0
    while i < len(modules):
        module, following = modules[i], modules[i + 1] if i + 1 < len(modules) else None
        y = None
        if following is not None and isinstance(module, FusedNorm) and is_silu_module(following):
            y = norm_act(module, x, following)
        elif isinstance(following, FusedConv) and doubles(module) and not hooked(module) and not hooked(following):
            y = following.doubled(x)
        elif is_plain_projection(following) and (factor := unshuffles(module)) is not None and not hooked(module):
            y = _unshuffled(x, factor, following)
        if y is None:
            x = module(x)
            i += 1
        else:
            x = y
            i += 2
    return x


class FusedSequential(Accelerated, nn.Sequential):
    """nn.Sequential in which a norm and the SiLU behind it, or a change of resolution and a convolution, are one pass.

    It looks at its modules in every forward. A slice of it is of its class, and so is right wherever it is cut: what
    was cut off from its SiLU is a norm alone.
    """

    def forward(self, input: Any) -> Any:
        return run(list(self), input)


def norm_act(
    norm: Any,
    x: Any,
    act: Any = None,
    scale: Any = None,
    shift: Any = None,
    embedding: Any = None,
) -> Any:
    """`act(norm(x + embedding) * (1 + scale) + shift)`, in one pass where that changes nothing but the rounding.

    Args:
        norm: a module, called with one argument.
        x: its input.
        act: a module or a function, or None. A Sequential that starts with a SiLU is run as a whole.
        scale, shift, embedding: whatever broadcasts; in one pass only where there is one for each channel.

    The original steps are taken where a hook would miss a value, where a module has been replaced since, and for
    whatever tensor the op does not take.
    """
    rest: list[nn.Module] = []
    silu = act is not None
    fusable = isinstance(norm, FusedNorm) and "forward" not in norm.__dict__ and not hooked(norm)
    if fusable and silu:
        if not isinstance(act, nn.Module):
            fusable = is_silu_function(act)
        else:
            head = act
            if is_plain_sequential(act):
                head, *rest = cast(nn.Sequential, act)
                fusable = not hooked(act)
            fusable = fusable and is_silu_module(head) and "forward" not in head.__dict__ and not hooked(head)
    if fusable:
        y = norm.fused(x, silu, scale, shift, embedding)
        if y is not None:
            return run(rest, y) if rest else y
    if embedding is not None:
        x = x + embedding
    y = norm(x)
    if scale is not None:
        y = y * (1 + scale)
    if shift is not None:
        y = y + shift
    return act(y) if silu else y


def divided(total: Any, factor: Any) -> Any:
    """`total / factor` of a sum that nobody else holds: the sum itself where the factor is 1, a copy spared."""
    if type(factor) in (float, int) and factor == 1 and type(total) is Tensor and total.is_floating_point():
        return total
    return total / factor


def embedded(sequential: Any, x: Any, embedding: Any) -> Any:
    """`sequential(x + embedding)`, where the Sequential starts with a norm and a SiLU: the addition in their pass."""
    if isinstance(sequential, FusedSequential) and len(sequential) > 1 and not hooked(sequential):
        norm, act, *rest = sequential
        if isinstance(norm, FusedNorm) and is_silu_module(act) and not hooked(norm) and not hooked(act):
            y = norm.fused(x, True, embedding=embedding)
            if y is not None:
                return run(rest, y)
    return sequential(x + embedding)
