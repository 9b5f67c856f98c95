"""What the expressions in a method stand for, on one object: modules, functions, and nothing that has to be run."""

from __future__ import annotations

import ast
import builtins
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

MISSING: Any = object()

# Nodes with names of their own.
SCOPED = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.Lambda,
    ast.ClassDef,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)


def walk_here(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below, the node itself included, without those in scopes of their own."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, SCOPED):
            yield from walk_here(child)


def names(node: ast.AST, context: type[ast.expr_context]) -> Counter[str]:
    """How often each name is loaded, or stored, in a node and in everything below it."""
    return Counter(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, context))


class Scope:
    """A method's names, for one object.

    Attributes:
        captured: names that a nested function, a comprehension or a `global` statement sees as well.
    """

    def __init__(self, function: types.FunctionType, tree: ast.FunctionDef, instance: nn.Module) -> None:
        arguments = tree.args
        positional = [*arguments.posonlyargs, *arguments.args]
        self.instance = instance
        self._outside = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        self._globals = function.__globals__
        parameters = {
            a.arg for a in [*positional, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg] if a is not None
        }
        stores = Counter(n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load))
        self._locals = parameters | set(stores)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node is not tree:
                self._locals.add(node.name)
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._locals |= {(a.asname or a.name).split(".")[0] for a in node.names}
            if isinstance(node, ast.ExceptHandler) and node.name:
                self._locals.add(node.name)
        self._self = positional[0].arg if positional and positional[0].arg not in stores else None
        self._aliases: dict[str, ast.expr] = {}
        self.captured: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, (ast.Global, ast.Nonlocal)):
                self.captured |= set(node.names)
            elif isinstance(node, SCOPED) and node is not tree:
                self.captured |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            elif isinstance(node, ast.Assign) and len(node.targets) == 1:
                for target, value in _pairs(node.targets[0], node.value):
                    if stores[target] == 1 and target not in parameters:
                        self._aliases[target] = value

    def resolve(self, node: ast.expr) -> Any:
        """The object that an expression stands for, or MISSING."""
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if isinstance(node, ast.Attribute):
            return _attribute(self.resolve(node.value), node.attr)
        if isinstance(node, ast.Subscript):
            return _item(self.resolve(node.value), node.slice)
        return MISSING

    def _name(self, name: str) -> Any:
        if name == self._self:
            return self.instance
        if name in self._aliases:
            value = self._aliases.pop(name)  # not there meanwhile: it may name itself
            try:
                return self.resolve(value)
            finally:
                self._aliases[name] = value
        if name in self._locals:
            return MISSING
        if name in self._outside:
            try:
                return self._outside[name].cell_contents
            except ValueError:
                return MISSING
        return self._globals.get(name, getattr(builtins, name, MISSING))


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for one, its in zip(target.elts, value.elts, strict=True):
            if isinstance(one, ast.Name):
                yield one.id, its


def _attribute(base: Any, name: str) -> Any:
    if isinstance(base, types.ModuleType):
        return getattr(base, name, MISSING)
    if isinstance(base, nn.Module):
        # Not getattr: a property would run.
        return base._modules[name] if name in base._modules else base.__dict__.get(name, MISSING)
    return MISSING


def _item(base: Any, index: ast.expr) -> Any:
    # Containers of torch with their own __getitem__; a subclass's could do anything.
    getter = getattr(type(base), "__getitem__", None)
    if getter not in (nn.Sequential.__getitem__, nn.ModuleList.__getitem__, nn.ModuleDict.__getitem__):
        return MISSING
    try:
        if isinstance(index, ast.Slice):
            parts = [None if p is None else ast.literal_eval(p) for p in (index.lower, index.upper, index.step)]
            return base[slice(*parts)]
        return base[ast.literal_eval(index)]
    except (ValueError, TypeError, IndexError, KeyError, SyntaxError):
        return MISSING
