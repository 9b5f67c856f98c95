"""The expressions that are a norm, its scale and shift, or its activation."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .activations import find_silu_function, find_silu_module
from .fused import is_plain_sequential
from .scope import Scope

SILU = "_ddpm_fast_silu"
"""The name under which rewritten methods see torch's silu."""


class Normed(NamedTuple):
    """`core * (1 + scale) + shift`; the core is the call of a norm, or a variable that holds its result."""

    core: ast.expr
    scale: ast.expr | None
    shift: ast.expr | None


class Activated(NamedTuple):
    """An activation's call: what is called, and on what."""

    act: ast.expr
    inner: ast.expr


def _one_plus(node: ast.expr) -> ast.expr | None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        for one, other in ((node.left, node.right), (node.right, node.left)):
            if isinstance(one, ast.Constant) and type(one.value) in (int, float) and one.value == 1:
                return other
    return None


def normed(node: ast.expr, is_core: Callable[[ast.expr], bool]) -> Normed | None:
    """Takes the scale and shift off a core."""
    if is_core(node):
        return Normed(node, None, None)
    if not isinstance(node, ast.BinOp):
        return None
    for inner, other in ((node.left, node.right), (node.right, node.left)):
        if isinstance(node.op, ast.Mult):
            scale = _one_plus(other)
            if scale is not None and is_core(inner):
                return Normed(inner, scale, None)
        elif isinstance(node.op, ast.Add):
            found = normed(inner, is_core)
            if found is not None and found.shift is None:
                return found._replace(shift=other)
    return None


class Patterns:
    """What is a norm and what an activation in a method, on one object.

    Args:
        scope: the method's.
        accepts: whether a module is a norm that is to be fused.

    Attributes:
        answers: every question asked so far. Where another object gives the same answers, its method is rewritten in
            the same way.
    """

    def __init__(self, scope: Scope, accepts: Callable[[object], bool]) -> None:
        self.scope = scope
        self._accepts = accepts
        self.answers: dict[tuple[str, str], tuple[ast.expr, bool]] = {}

    def agrees(self, answers: dict[tuple[str, str], tuple[ast.expr, bool]]) -> bool:
        return all(self._ask(question, node) == answer for (question, _), (node, answer) in answers.items())

    def _ask(self, question: str, node: ast.expr) -> bool:
        key = question, ast.dump(node)
        if key not in self.answers:
            self.answers[key] = node, _QUESTIONS[question](self.scope.resolve(node), self._accepts)
        return self.answers[key][1]

    def is_norm_call(self, node: ast.expr) -> bool:
        return _only_argument(node) is not None and self._ask("norm", node.func)  # type: ignore[attr-defined]

    def is_sequential_call(self, node: ast.expr) -> bool:
        """Whether it calls a Sequential that starts with a norm and a SiLU."""
        return _only_argument(node) is not None and self._ask("sequential", node.func)  # type: ignore[attr-defined]

    def is_torch_call(self, node: ast.expr) -> bool:
        """Whether it calls something of torch's, such as no_grad or autocast."""
        return isinstance(node, ast.Call) and self._ask("torch", node.func)

    def activated(self, node: ast.expr, is_inner: Callable[[ast.expr], bool]) -> Activated | None:
        """The activation at `node`, if what it is applied to is `is_inner`."""
        argument = _only_argument(node)
        if argument is not None:
            function = node.func  # type: ignore[attr-defined]
            return Activated(function, argument) if is_inner(argument) and self._ask("silu", function) else None
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for value, gate in ((node.left, node.right), (node.right, node.left)):
                if isinstance(value, ast.Name) and is_inner(value) and self._is_sigmoid_of(gate, value.id):
                    return Activated(ast.Name(SILU, ast.Load()), value)
        return None

    def _is_sigmoid_of(self, node: ast.expr, name: str) -> bool:
        if not isinstance(node, ast.Call) or node.keywords:
            return False
        function = node.func
        if not node.args:  # a tensor's method
            return isinstance(function, ast.Attribute) and function.attr == "sigmoid" and _is(function.value, name)
        return len(node.args) == 1 and _is(node.args[0], name) and self._ask("sigmoid", function)


def _norm(found: Any, accepts: Callable[[object], bool]) -> bool:
    return accepts(found)


def _sequential(found: Any, accepts: Callable[[object], bool]) -> bool:
    return is_plain_sequential(found) and len(found) > 1 and accepts(found[0]) and find_silu_module(found[1])


def _silu(found: Any, accepts: Callable[[object], bool]) -> bool:
    """Whether it is a SiLU, or a Sequential that starts with one."""
    if is_plain_sequential(found):
        found = found[0] if len(found) else None
    return find_silu_module(found) or find_silu_function(found)


def _sigmoid(found: Any, accepts: Callable[[object], bool]) -> bool:
    return found is torch.sigmoid or found is F.sigmoid or type(found) is nn.Sigmoid


def _torch(found: Any, accepts: Callable[[object], bool]) -> bool:
    return str(getattr(found, "__module__", "")).split(".")[0] == "torch"


_QUESTIONS: dict[str, Callable[[Any, Callable[[object], bool]], bool]] = {
    "norm": _norm,
    "sequential": _sequential,
    "silu": _silu,
    "sigmoid": _sigmoid,
    "torch": _torch,
}


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _only_argument(node: ast.expr) -> ast.expr | None:
    """The argument of a call that has one, `inplace=` aside: the result is the same."""
    if not isinstance(node, ast.Call) or len(node.args) != 1 or isinstance(node.args[0], ast.Starred):
        return None
    return node.args[0] if all(k.arg == "inplace" for k in node.keywords) else None
