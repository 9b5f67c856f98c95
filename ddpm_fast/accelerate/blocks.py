"""Blocks: modules whose own methods call a norm and an activation. The methods are rewritten, the class is swapped."""

from __future__ import annotations

import ast
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from torch import nn

from . import fused, rewrite, source
from .norms import FusedNorm
from .patch import Accelerated, original_class, subclass, swap
from .patterns import SILU, Patterns
from .scope import Scope
from .sites import Site

_INJECTED = {
    rewrite.NORM_ACT: fused.norm_act,
    rewrite.EMBEDDED: fused.embedded,
    rewrite.DIVIDED: fused.divided,
    SILU: F.silu,
}

_Answers = dict[tuple[str, str], tuple[ast.expr, bool]]
_Result = tuple[ast.FunctionDef, list[rewrite.Fused]] | tuple[()]

_rewritten: WeakKeyDictionary[types.FunctionType, list[tuple[_Answers, _Result]]] = WeakKeyDictionary()
_trees: WeakKeyDictionary[types.FunctionType, ast.FunctionDef | str] = WeakKeyDictionary()


@dataclass
class Plan:
    """What is to be done with a block.

    Attributes:
        methods: the rewritten ones.
        sites: the norms that they fuse.
        unreadable: why a method that calls a norm could not be looked at.
    """

    methods: dict[str, tuple[types.FunctionType, types.FunctionType, ast.FunctionDef]] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)


class FusedBlock(Accelerated, nn.Module):
    """A module with rewritten methods."""

    @classmethod
    def class_in_pickles(cls, original: type[nn.Module]) -> type[Any]:
        return subclass(_Revived, original)


class _Revived(Accelerated, nn.Module):
    """A block as it comes out of a pickle, until its state is there and its methods can be rewritten again."""

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__class__ = self.original_class  # type: ignore[assignment]
        accelerate_block(self, lambda norm: isinstance(norm, FusedNorm))


def plan_block(module: nn.Module, accepts: Callable[[object], bool]) -> Plan:
    """What can be fused in the methods of a module, which `accelerate` has not changed."""
    plan = Plan()
    called = _names_of_norms(module, accepts)
    if not called or "forward" in module.__dict__:
        return plan
    seen: set[str] = set()
    for owner in type(module).__mro__:
        if owner.__module__.split(".")[0] == "torch" or issubclass(nn.Module, owner):
            continue
        for name, method in vars(owner).items():
            if name in seen or (name.startswith("__") and name != "__call__"):
                continue
            seen.add(name)
            if isinstance(method, types.FunctionType):
                _plan_method(plan, module, name, method, called, accepts)
    return plan


def _names_of_norms(module: nn.Module, accepts: Callable[[object], bool]) -> set[str]:
    """The names by which the module's methods could call its norms, or a Sequential that holds them."""
    return {
        next((part for part in reversed(path.split(".")) if not part.isdigit()), "")
        for path, child in module.named_modules()
        if child is not module and accepts(child)
    }


def _plan_method(
    plan: Plan,
    module: nn.Module,
    name: str,
    method: types.FunctionType,
    called: set[str],
    accepts: Callable[[object], bool],
) -> None:
    try:
        inner = source.innermost(method)
        if called.isdisjoint(inner.__code__.co_names):
            return
        tree = _tree(inner)
    except source.Unreadable as error:
        plan.unreadable[name] = str(error)
        return
    patterns = Patterns(Scope(inner, tree, module), accepts)
    known = _rewritten.setdefault(inner, [])
    result = next((result for answers, result in known if patterns.agrees(answers)), None)
    if result is None:
        result = rewrite.rewrite(tree, patterns) or ()
        known.append((patterns.answers, result))
    if result:
        new, calls = result
        plan.methods[name] = (method, inner, new)
        plan.sites += [_site(call, patterns.scope) for call in calls]


def _site(call: rewrite.Fused, scope: Scope) -> Site:
    norm = scope.resolve(call.norm)
    act = None if call.act is None else scope.resolve(call.act)
    if isinstance(norm, nn.Sequential):
        norm, act, *_ = norm
    if isinstance(act, nn.Sequential):
        act = next(iter(act))
    return Site(norm, act, call.modulated, call.embedded)


def _tree(function: types.FunctionType) -> ast.FunctionDef:
    known = _trees.get(function)
    if known is None:
        try:
            known = source.parse(function)
        except source.Unreadable as error:
            known = str(error)
        _trees[function] = known
    if isinstance(known, str):
        raise source.Unreadable(known)
    return known


def apply(plan: Plan, module: nn.Module) -> None:
    """Gives a block the class with its rewritten methods; blocks that are rewritten alike share one."""
    if not plan.methods:
        return
    key = tuple((name, tree) for name, (_, _, tree) in sorted(plan.methods.items(), key=lambda item: item[0]))

    def methods() -> dict[str, Any]:
        return {
            name: source.redecorate(method, source.build(inner, tree, _INJECTED))
            for name, (method, inner, tree) in plan.methods.items()
        }

    swap(module, subclass(FusedBlock, original_class(module), key, methods))


def accelerate_block(module: nn.Module, accepts: Callable[[object], bool]) -> None:
    apply(plan_block(module, accepts), module)
