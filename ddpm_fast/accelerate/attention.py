"""The attention modules of a model: linear ones get the fused op, those with one head folded projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn.blocks import SelfAttention
from ..nn.folded import folding_is_safe
from .fused import hooked
from .linear_attention import FusedLinearAttention, accelerate_linear_attention, is_called_linear
from .linear_attention import note as linear_note
from .one_head import OneHead, find_one_head
from .patch import Accelerated, mark, marked, original_class, subclass, swap

_FOLDED = "one head, its four projections folded into two"


class FoldedAttention(Accelerated, nn.Module):
    """A module that was found to be self-attention with one head, on two projections where no gradient is needed.

    The original runs in training mode, with gradients, with hooks on its inner modules or arguments besides the input,
    for other dtypes, devices and shapes, and as soon as anything about it is not as it was.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and args and type(args[0]) is Tensor:
            plan: OneHead = marked(self, "one_head")
            if self._can_fold(plan, args[0], args[1:], kwargs):
                return plan.run(args[0])
        return super().forward(*args, **kwargs)

    def _can_fold(self, plan: OneHead, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        for argument in args:
            if argument is not None:
                return False
        for name, argument in kwargs.items():
            if argument is not None and name not in plan.unused:
                return False
        if not plan.takes(x) or not plan.is_as_it_was(self):
            return False
        parameters: list[Tensor] = []
        for module in (self, *plan.inner):
            if module.training or (module is not self and hooked(module)):
                return False
            parameters += [p for p in module._parameters.values() if p is not None]
        for p in parameters:
            if type(p) is not nn.Parameter or p.dtype != x.dtype or p.device != x.device:
                return False
        return folding_is_safe(x, parameters)


def is_attention(module: nn.Module) -> bool:
    """Whether a module is called attention, has parameters, and holds no other such module; or was found to be one."""
    if isinstance(module, FusedLinearAttention):
        return True
    return _is_called_attention(module) and not any(
        _is_called_attention(inner) for inner in module.modules() if inner is not module
    )


def _is_called_attention(module: nn.Module) -> bool:
    name = original_class(module).__name__.lower()
    return ("attention" in name or "attn" in name) and next(module.parameters(), None) is not None


def accelerate_attentions(model: nn.Module) -> None:
    """Accelerates linear attention and attention with one head, and leaves a note on the other attention modules."""
    for module in model.modules():
        why_not_linear = accelerate_linear_attention(module)
        if why_not_linear is None or not is_attention(module) or isinstance(module, SelfAttention):
            continue
        if is_called_linear(module):
            mark(module, "note", why_not_linear)
            continue
        found = find_one_head(module)
        if isinstance(found, OneHead):
            try:
                swap(module, subclass(FoldedAttention, type(module)))
                mark(module, "one_head", found)
                continue
            except TypeError as error:
                found = f"its class cannot be extended: {error}"
        mark(module, "note", found)


def attention_note(module: nn.Module, untouched: str) -> tuple[bool, str]:
    """Whether an attention module is accelerated; how, or why not."""
    if isinstance(module, SelfAttention):
        if module.num_heads > 1:
            return False, f"{module.num_heads} heads"
        return module.folds, _FOLDED if module.folds else "its folds is False"
    if isinstance(module, FoldedAttention):
        return True, _FOLDED
    if isinstance(module, FusedLinearAttention):
        return True, linear_note(module)
    return False, marked(module, "note", untouched)
