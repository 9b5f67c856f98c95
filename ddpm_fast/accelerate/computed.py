"""Convolutions that compute their weight anew in each call, as weight standardisation does.

Their forward stays what its author wrote; the call of torch's conv2d in it becomes one that takes the fused op where it
can.
"""

from __future__ import annotations

import ast
import copy
import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.conv import plan_tensors
from ..ops._check import needs_grad
from ..ops.conv import conv3x3
from . import source
from .patch import Accelerated, marked, subclass
from .scope import Scope

_CONV2D = "_ddpm_fast_conv2d"

Pair = int | tuple[int, ...]


def conv2d(
    mode: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """torch's conv2d, on the fused op where it can be, in the layout that torch's result has."""
    plain = stride in (1, (1, 1)) and padding in (1, (1, 1), "same") and dilation in (1, (1, 1)) and groups == 1
    if not plain or needs_grad(input, weight, bias) or plan_tensors(weight, input, mode).tile is None:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return as_torch_lays_out(conv3x3(input, weight, bias, mode=mode), input, weight)


def as_torch_lays_out(y: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """A channels_last result in torch's layout: channels_last where the weight or the input is."""
    if input.stride(1) == 1 or weight.is_contiguous(memory_format=torch.channels_last):
        return y
    return y.contiguous()


class FusedComputedConv(Accelerated, nn.Conv2d):
    """An nn.Conv2d with a forward of its own, whose conv2d is the one above."""

    @classmethod
    def class_in_pickles(cls, original: type[nn.Module]) -> type[Any]:
        return subclass(_Revived, original)


class _Revived(Accelerated, nn.Conv2d):
    """What comes out of a pickle, until its state says in which mode it runs."""

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__class__ = self.original_class  # type: ignore[assignment]
        made = fused_class(self, marked(self, "mode"))
        if made is not None:
            self.__class__ = made  # type: ignore[assignment]


def fused_class(conv: nn.Conv2d, mode: str) -> type[FusedComputedConv] | None:
    """The class for a convolution whose forward calls torch's conv2d; None where that cannot be seen."""
    forward = type(conv).forward
    if not isinstance(forward, types.FunctionType):
        return None
    try:
        inner = source.innermost(forward)
        tree = source.parse(inner)
    except source.Unreadable:
        return None
    rewriter = _Calls(Scope(inner, tree, conv))
    new = rewriter.visit(copy.deepcopy(tree))
    if not rewriter.found:
        return None

    def methods() -> dict[str, Any]:
        replaced = source.build(inner, ast.fix_missing_locations(new), {_CONV2D: functools.partial(conv2d, mode)})
        return {"forward": source.redecorate(forward, replaced)}

    return subclass(FusedComputedConv, type(conv), mode, methods)


class _Calls(ast.NodeTransformer):
    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self.found = False

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if self._scope.resolve(node.func) is F.conv2d:
            self.found = True
            node.func = ast.copy_location(ast.Name(_CONV2D, ast.Load()), node.func)
        return node
