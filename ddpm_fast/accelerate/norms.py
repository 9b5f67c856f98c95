"""The norm modules: which there are in a model, which of them are GroupNorm, and their forward on the fused op."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..nn import GroupNormSiLU, RMSNormSiLU
from ..ops import group_norm_silu
from ..ops._check import is_transformed
from .activations import computes
from .patch import Accelerated, mark, marked, original_class

_TORCH_NORMS = (
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
    nn.modules.batchnorm._NormBase,
)

# The devices whose autocast runs group_norm in float32. The CPU's does not.
_AUTOCAST_TO_FLOAT32 = frozenset({"cuda", "xpu"})
_HALF = (torch.float16, torch.bfloat16)

M = TypeVar("M", bound=nn.Module)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: one of torch's, or one that is called so and has no norm inside it."""
    if isinstance(module, _TORCH_NORMS):
        return True
    if isinstance(module, torch.jit.ScriptModule):
        named = "norm" in str(getattr(module, "original_name", "")).lower()
    else:
        # The parametrizations of torch.nn.utils are modules called _WeightNorm and the like.
        named = "norm" in original_class(module).__name__.lower() and not type(module).__module__.startswith(
            "torch.nn.utils"
        )
    return named and not any(is_norm(child) for child in module.modules() if child is not module)


def runs_fused(x: Tensor) -> bool:
    """Whether a kernel takes this tensor. The reference backend serves only where it is asked for: it is no faster."""
    return backends.choose(x) != "reference" or backends.forced() == "reference"


def autocast_dtype(device: str, dtype: torch.dtype, autocast: bool) -> torch.dtype:
    """The dtype in which PyTorch's own group_norm runs, and which its result has."""
    return torch.float32 if autocast and device in _AUTOCAST_TO_FLOAT32 and dtype in _HALF else dtype


def _rows(parameter: Any, x: Tensor) -> Tensor | None:
    """A scale or shift as (N, C), if it is one for each channel of each sample and leaves the result x's dtype."""
    if (
        type(parameter) is not Tensor
        or parameter.dim() != x.dim()
        or parameter.shape[:2] != x.shape[:2]
        or parameter.numel() != x.shape[0] * x.shape[1]
        or parameter.device != x.device
        or torch.promote_types(parameter.dtype, x.dtype) != x.dtype
    ):
        return None
    return parameter.flatten(1).to(x.dtype)


def rows(parameters: Iterable[Tensor | None], x: Tensor) -> list[Tensor | None] | None:
    """Scales and shifts as (N, C), None for those not given; or None where one of them is not to be had so."""
    found: list[Tensor | None] = []
    for parameter in parameters:
        row = None if parameter is None else _rows(parameter, x)
        if parameter is not None and row is None:
            return None
        found.append(row)
    return found


class FusedNorm(Accelerated, nn.Module):
    """A norm module on a fused op."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            y = self.fused(args[0])
            if y is not None:
                return y
        return super().forward(*args, **kwargs)

    def fused(
        self,
        x: Tensor,
        silu: bool = False,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> Tensor | None:
        """`silu(norm(x + embedding) * (1 + scale) + shift)` in one pass, or None where that is not to be had."""
        raise NotImplementedError


def takes(norm: nn.Module, x: Any, channels: int) -> bool:
    """Whether the op has an answer for this input, and PyTorch's would be the same."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return False  # another tensor type has its own idea of every operation
    dims = marked(norm, "dims")
    if x.dim() < 2 or x.shape[1] != channels or (dims is not None and x.dim() not in dims):
        return False
    return x.is_floating_point() and x.numel() > 0 and not x.is_meta and runs_fused(x) and not is_transformed()


class FusedGroupNorm(FusedNorm, nn.GroupNorm):
    """nn.GroupNorm, or a subclass of it that was found to compute the same, on the fused op."""

    def fused(
        self,
        x: Tensor,
        silu: bool = False,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> Tensor | None:
        # One value a group, or none: what PyTorch makes of that is its own affair.
        if not takes(self, x, self.num_channels) or x.numel() <= self.num_groups:
            return None
        own = self.__dict__
        casts: bool = own.get("_ddpm_fast_casts", False)
        if not casts and not x.is_cpu:
            device = x.device.type
            x = x.to(autocast_dtype(device, x.dtype, torch.is_autocast_enabled(device)))
        weight, bias = self.weight, self.bias
        for parameter in (weight, bias):
            if parameter is None:
                continue
            if parameter.device != x.device or parameter.shape != (self.num_channels,):
                return None
            if parameter.dtype != x.dtype and not (parameter.dtype == torch.float32 and x.dtype in _HALF):
                return None
        inside: bool = own.get("_ddpm_fast_silu_inside", False)
        modulated = scale is not None or shift is not None
        if inside and (silu or modulated):
            return None
        if modulated or embedding is not None:
            found = rows((scale, shift, embedding), x)
            if found is None:
                return None
            scale, shift, embedding = found
        return group_norm_silu(
            x,
            self.num_groups,
            weight,
            bias,
            self.eps,
            scale=scale,
            shift=shift,
            activation="silu" if silu or inside else None,
            embedding=embedding,
        )


def stand_in(norm: M) -> M:
    """The norm with weights of our own on the CPU: zeros would hide what it computes, and so would a meta device."""
    twin = norm.__class__.__new__(norm.__class__)
    twin.__dict__ = norm.__dict__.copy()
    generator = torch.Generator().manual_seed(0)
    twin._parameters = {
        name: p if p is None else nn.Parameter(torch.randn(p.shape, generator=generator))
        for name, p in norm._parameters.items()
    }
    return twin


def why_no_group_norm(norm: nn.GroupNorm) -> str | None:
    """Why a GroupNorm cannot run on the fused op; None if it can, which for a subclass is tried out.

    A subclass may cast to float32 and back (openai's GroupNorm32) and apply SiLU itself (GLIDE's).
    """
    if not 0 < norm.eps < math.inf:
        return f"eps is {norm.eps}: the fused op needs a positive one"
    if set(norm._parameters) != {"weight", "bias"} or norm._buffers or norm._modules:
        return "its weight or bias is not a plain parameter (parametrized or computed), or it has further state"
    if type(norm).forward is nn.GroupNorm.forward:
        return None
    return _try_out(norm)


def _try_out(norm: nn.GroupNorm) -> str | None:
    twin = stand_in(norm)
    weight, bias = (None if p is None else p.detach() for p in (twin.weight, twin.bias))
    generator = torch.Generator().manual_seed(1)
    dims: dict[bool, list[int]] = {False: [], True: []}
    for shape in [(2, norm.num_channels, *(3,) * spatial) for spatial in range(4)]:
        probe = torch.randn(shape, generator=generator) * 2 + 1

        def alone(x: Tensor) -> Tensor:
            return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)

        for silu in (False, True):
            if computes(twin.forward, (lambda x: F.silu(alone(x))) if silu else alone, probe):
                dims[silu].append(probe.dim())
    found = [silu for silu in (False, True) if dims[silu]]
    if len(found) != 1:
        return f"{type(norm).__name__} does not compute what nn.GroupNorm does"
    (silu,) = found
    mark(norm, "dims", tuple(dims[silu]))
    mark(norm, "silu_inside", silu)
    mark(norm, "casts", _casts(twin))
    return None


def _casts(norm: nn.GroupNorm) -> bool:
    """Whether the norm computes in float32 and gives back its input's dtype, whatever that is."""
    try:
        with torch.no_grad():
            return norm.forward(torch.randn(2, norm.num_channels, 3, 3, dtype=torch.float64)).dtype == torch.float64
    except RuntimeError:  # as PyTorch's own, which does not mix dtypes
        return False


def has_silu_inside(norm: nn.Module) -> bool:
    return bool(marked(norm, "silu_inside", False))


def is_fused_already(module: nn.Module) -> bool:
    """Whether a module is one of this package's own, on the fused op as it is."""
    return type(module) in (GroupNormSiLU, RMSNormSiLU)
