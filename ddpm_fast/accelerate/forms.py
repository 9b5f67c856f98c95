"""Whether a method says the same as a known form of it: other names, the same code."""

from __future__ import annotations

import ast
import functools
import sys
import types
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import source
from .scope import Scope

# What says nothing about what is computed, or is said by other fields.
_IGNORED = frozenset(["ctx", "kind", "type_comment", "type_params", "returns", "annotation", "name"])


def parse_form(text: str) -> ast.FunctionDef:
    """A form, from its source: one function, with `self` as its first argument."""
    (tree,) = ast.parse(text).body
    assert isinstance(tree, ast.FunctionDef)
    return tree


def match(form: ast.FunctionDef, method: types.FunctionType, module: nn.Module) -> dict[str, str] | None:
    """The method's attributes of self by the form's names for them; None where the two do not say the same.

    Local names, attributes of self, annotations, documentation and spaces in strings may differ. What a form's free
    names stand for, the method's have to be as well, the same objects.

    Args:
        form: made by `parse_form`.
        method: of the module's class.
        module: whose method it is.

    Raises:
        source.Unreadable: where the method's source cannot be had.
    """
    tree = source.parse(method)
    comparison = _Comparison(Scope(method, tree, module), _known())
    return comparison.attributes if comparison.same(form, tree) else None


def _known() -> dict[str, object]:
    """What the forms' free names stand for; einops' only where the model's own code has imported it."""
    einops = sys.modules.get("einops")
    known: dict[str, object] = {"torch": torch, "F": F, "map": map, "partial": functools.partial}
    return known | {name: getattr(einops, name) for name in ("rearrange", "reduce", "repeat") if einops is not None}


class _Comparison:
    """Which names of a form are which of a method.

    Attributes:
        attributes: the attributes of self.
    """

    def __init__(self, scope: Scope, known: Mapping[str, object]) -> None:
        self._scope, self._known = scope, known
        self._locals: dict[str, str] = {}
        self.attributes: dict[str, str] = {}

    def same(self, form: Any, tree: Any) -> bool:
        """Whether two nodes, lists of nodes, or other values of their fields say the same."""
        if isinstance(form, list):
            return isinstance(tree, list) and len(form) == len(tree) and all(map(self.same, form, tree))
        if isinstance(form, str):
            return isinstance(tree, str) and form.split() == tree.split()
        if not isinstance(form, ast.AST):
            return type(form) is type(tree) and bool(form == tree)
        if isinstance(form, ast.expr) and (expected := self._expected(form)) is not None:
            local = isinstance(tree, ast.Name) and tree.id in self._locals.values()
            return isinstance(tree, ast.expr) and not local and self._scope.resolve(tree) is expected
        if isinstance(form, ast.Name) and isinstance(tree, ast.Name):
            return _paired(self._locals, form.id, tree.id)
        if isinstance(form, ast.arg) and isinstance(tree, ast.arg):
            return _paired(self._locals, form.arg, tree.arg)
        if isinstance(form, ast.Attribute) and isinstance(form.value, ast.Name) and form.value.id == "self":
            return (
                isinstance(tree, ast.Attribute)
                and self.same(form.value, tree.value)
                and _paired(self.attributes, form.attr, tree.attr)
            )
        if isinstance(form, ast.FunctionDef) and isinstance(tree, ast.FunctionDef) and ast.get_docstring(tree):
            return self.same(form.args, tree.args) and self.same(form.body, tree.body[1:]) and not tree.decorator_list
        return type(form) is type(tree) and all(
            self.same(getattr(form, field), getattr(tree, field)) for field in form._fields if field not in _IGNORED
        )

    def _expected(self, form: ast.expr) -> object:
        """The object that an expression of the form stands for, None where it is none of the known ones."""
        if isinstance(form, ast.Name):
            return self._known.get(form.id)
        if isinstance(form, ast.Attribute) and isinstance(base := self._expected(form.value), types.ModuleType):
            return getattr(base, form.attr, None)
        return None


def _paired(pairs: dict[str, str], ours: str, theirs: str) -> bool:
    """Whether two names can be one, and nothing else."""
    if ours in pairs:
        return pairs[ours] == theirs
    if theirs in pairs.values():
        return False
    pairs[ours] = theirs
    return True
