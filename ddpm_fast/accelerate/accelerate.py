"""accelerate and restore."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from ..ops.conv import MODES
from . import blocks
from .activations import find_silu_module
from .attention import accelerate_attentions
from .convolutions import accelerate_convs
from .fused import FusedSequential, hooked, is_plain_sequential
from .layout import to_channels_last, undo_channels_last
from .norms import FusedGroupNorm, FusedNorm, has_silu_inside, is_fused_already, is_norm, why_no_group_norm
from .patch import Accelerated, subclass, swap, unswap
from .report import note_fused, note_skipped
from .resampling import accelerate_resamplings
from .rms_norms import FusedRMSNorm, why_no_rms_norm
from .sites import Site, describe

M = TypeVar("M", bound=nn.Module)


def accelerate(model: M, *, conv: str = "exact", channels_last: bool = False) -> M:
    """Puts a model's norms, with the SiLU, scale and shift around them, 3x3 convolutions and attention on fast code.

    In place. The norms are GroupNorm, and RMSNorm over the channels as lucidrains has it. Found are norms alone, norms
    and activations side by side in a Sequential, and norms and activations called in the methods of a block, whatever
    its class, as long as its source can be read. Convolutions are `nn.Conv2d` of 3x3, stride 1 and padding 1, which
    without gradients, in float32 on a CPU, run on `conv3x3`, together with an `nn.Upsample` or diffusers' Upsample2D
    that doubles the image before them. A pixel-unshuffle and the 1x1 convolution behind it in a Sequential become one
    convolution with a stride. Attention is self-attention with one head, whoever wrote
    it: under the same conditions, and in evaluation mode, its four projections are folded into two; and the linear
    attention of the annotated article and of lucidrains' packages, known by what its forward says, which runs on
    `linear_attention`. Outputs and gradients stay the same to rounding; parameters, state dict, hooks, `named_modules`
    and every object's identity stay as they are. What cannot be proved safe is left alone:
    `acceleration_report(model)` names it. On a device or for a dtype without a kernel of ours a model runs as before.

    Applied again, it looks at the model again; `restore` undoes it.

    Args:
        model: any module.
        conv: how the 3x3 convolutions are computed: "exact", "strict" or "fast", see `conv3x3`; "torch" leaves them.
        channels_last: also lays out the weights of 2-D convolutions in channels_last, the faster format on most
            devices. Without it the layout stays as it is.

    Returns:
        `model` itself.

    Raises:
        TypeError: if `model` is not a module, or `channels_last` not a bool.
        ValueError: if `conv` is none of these.
        RuntimeError: if a module has been given a further class since (torch's `fully_shard` does).
    """
    _check(model)
    if not isinstance(channels_last, bool):
        raise TypeError(f"channels_last must be a bool, not {type(channels_last).__name__}")
    if conv not in MODES:
        raise ValueError(f"conv must be one of {MODES}, not {conv!r}")
    _undo(model)
    names = {module: name for name, module in model.named_modules()}
    reasons: dict[nn.Module, str] = {}
    accepted: set[nn.Module] = set()
    for module in names:
        if is_norm(module) and not is_fused_already(module):
            reason = _why_not(module)
            if reason is None:
                accepted.add(module)
            else:
                reasons[module] = reason
    others = [module for module in names if module not in accepted and module not in reasons]

    def accepts(module: object) -> bool:
        return isinstance(module, nn.Module) and module in accepted

    # A hook between a norm and what is fused with it takes the norm out; what is left is looked at again without it.
    while True:
        sites = _sequential_sites(others, accepts)
        plans = {module: blocks.plan_block(module, accepts) for module in others if not _is_container(module)}
        sites += [site for plan in plans.values() for site in plan.sites]
        lost = {site.norm: reason for site in sites if (reason := _hook_between(site, names)) is not None}
        if not lost:
            break
        accepted -= lost.keys()
        reasons |= lost

    for norm in list(accepted):
        try:
            swap(norm, subclass(_fused_class(norm), type(norm)))
        except TypeError as error:
            accepted.discard(norm)
            reasons[norm] = f"its class cannot be extended: {error}"
    for module in {site.container: None for site in sites if site.container is not None}:
        swap(module, subclass(FusedSequential, type(module)))
    for module, plan in plans.items():
        blocks.apply(plan, module)
    for norm, reason in reasons.items():
        note_skipped(norm, reason)
    unread = {
        norm: f"; {type(owner).__name__}.{method} not looked at: {why}"
        for owner, plan in plans.items()
        for method, why in plan.unreadable.items()
        for norm in owner.children()
    }
    for norm in accepted:
        own = [site for site in sites if site.norm is norm]
        note_fused(norm, describe(own or [Site(norm)]) + ("" if own else unread.get(norm, "")))
    accelerate_convs(model, conv)
    accelerate_resamplings(model)
    accelerate_attentions(model)
    if channels_last:
        to_channels_last(model)
    return model


def restore(model: M) -> M:
    """Undoes `accelerate`, in place: every module gets its own class back, and weights their memory layout.

    Returns:
        `model` itself, which computes bit for bit what it did before.

    Raises:
        TypeError: if `model` is not a module.
        RuntimeError: if a module has been given a further class since.
    """
    _check(model)
    _undo(model)
    undo_channels_last(model)
    return model


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")


def _undo(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Accelerated) and "original_class" not in vars(type(module)):
            raise RuntimeError(
                f"{name or 'the model'} was given the class {type(module).__name__} after accelerate(), "
                "which can only be undone in reverse order: accelerate the model after wrapping it"
            )
    for module in model.modules():
        unswap(module)


def _why_not(norm: nn.Module) -> str | None:
    """Why a norm module cannot run on a fused op; None if it can."""
    if isinstance(norm, torch.jit.ScriptModule):
        return "scripted: its forward cannot be replaced"
    if "forward" in norm.__dict__:
        return "its forward was replaced on the instance"
    return why_no_group_norm(norm) if isinstance(norm, nn.GroupNorm) else why_no_rms_norm(norm)


def _fused_class(norm: nn.Module) -> type[FusedNorm]:
    return FusedGroupNorm if isinstance(norm, nn.GroupNorm) else FusedRMSNorm


def _is_container(module: nn.Module) -> bool:
    return is_plain_sequential(module) or type(module) in (nn.ModuleList, nn.ModuleDict)


def _sequential_sites(modules: list[nn.Module], accepts: Callable[[object], bool]) -> list[Site]:
    """Norms with a SiLU behind them in a Sequential."""
    return [
        Site(norm, act, container=module)
        for module in modules
        if is_plain_sequential(module)
        for norm, act in zip(list(module)[:-1], list(module)[1:], strict=True)  # type: ignore[call-overload]
        if accepts(norm) and not has_silu_inside(norm) and find_silu_module(act)
    ]


def _hook_between(site: Site, names: dict[nn.Module, str]) -> str | None:
    for module in (site.norm, site.act):
        if isinstance(module, nn.Module) and hooked(module):
            return f"a hook on {names.get(module, type(module).__name__)!r} sees a value that would not be computed"
    return None
