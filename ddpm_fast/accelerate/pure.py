"""Whether running a module does nothing but compute its output, as far as its source can prove it."""

from __future__ import annotations

import ast
import inspect
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import source
from .norms import FusedNorm
from .patch import original_class
from .scope import MISSING, Scope

PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)

_BUILTINS: tuple[Any, ...] = (int, float, len, range, tuple, list, zip, enumerate, min, max, abs, isinstance)
_FORBIDDEN = (ast.Global, ast.Nonlocal, ast.Import, ast.ImportFrom, ast.Yield, ast.YieldFrom, ast.Await, ast.ClassDef)
# Methods of a tensor of which others hear.
_HEARD = frozenset(["backward", "register_hook", "retain_grad", "record_stream"])


class Impure(Exception):
    """Code that may do something else than compute its output; the text says which, and what."""


def require_pure(module: nn.Module) -> None:
    """Looks at the forward of every module in `module` that is not torch's, and at whatever these use.

    Functions of autograd are trusted to do what their kind is for.

    Raises:
        Impure: if it may write into anything but local variables, or use what is not known to leave all as it is.
    """
    looked_at: set[Any] = set()
    for inner in module.modules():
        kind = original_class(inner)
        if kind.__module__.split(".")[0] == "torch" or isinstance(inner, FusedNorm):
            continue
        for name in ("__call__", "__getattr__", "__getattribute__"):
            if getattr(kind, name) is not getattr(nn.Module, name):
                raise Impure(f"{kind.__qualname__} has a {name} of its own")
        _look(kind.forward, inner, looked_at)


def _look(function: Any, instance: Any, looked_at: set[Any]) -> None:
    if (function, instance) in looked_at:
        return
    looked_at.add((function, instance))
    name = getattr(function, "__qualname__", repr(function))
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        raise Impure(f"{name} is not a plain function")
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if not all(isinstance(default, PLAIN) for default in defaults):
        raise Impure(f"{name} keeps a default value that can change")
    try:
        tree = source.parse(function)
    except source.Unreadable as error:
        raise Impure(f"{name} was not looked at: {error}") from error
    scope = Scope(function, tree, instance)
    for node in (inner for statement in tree.body for inner in ast.walk(statement)):
        written = isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load)
        if (
            written
            or isinstance(node, _FORBIDDEN)
            or (isinstance(node, (ast.Name, ast.Attribute)) and not _is_harmless(node, scope, looked_at))
        ):
            what = ast.unparse(node).splitlines()[0]
            raise Impure(f"{name} has {what!r}, which may do more than compute the result")


def _is_harmless(node: ast.Name | ast.Attribute, scope: Scope, looked_at: set[Any]) -> bool:
    """Whether reading a name, and calling what is read, leaves everything as it is."""
    found = scope.resolve(node)
    if isinstance(node, ast.Name):
        return found is MISSING or found is scope.instance or _is_harmless_value(found, looked_at)
    if found is not MISSING:
        return _is_harmless_value(found, looked_at)
    base, name = scope.resolve(node.value), node.attr
    if isinstance(base, nn.Module):
        method = inspect.getattr_static(original_class(base), name, None)
        if method is None or method is nn.Module.parameters:  # what is not there cannot be reached
            return True
        if isinstance(method, staticmethod):
            _look(method.__func__, MISSING, looked_at)
            return True
        if base is scope.instance and isinstance(method, types.FunctionType):
            _look(method, base, looked_at)
            return True
        return isinstance(method, PLAIN)
    if isinstance(base, type):
        return issubclass(base, torch.autograd.Function) and name == "apply"
    return hasattr(Tensor, name) and not name.endswith("_") and name not in _HEARD


def _is_harmless_value(found: Any, looked_at: set[Any]) -> bool:
    if isinstance(found, (*PLAIN, nn.Module)):  # modules inside are looked at on their own
        return True
    root = str(getattr(found, "__name__" if isinstance(found, types.ModuleType) else "__module__", None)).split(".")[0]
    if root in ("math", "einops") or any(found is builtin for builtin in _BUILTINS):
        return True
    if isinstance(found, types.ModuleType):
        return root == "torch"
    if isinstance(found, type):
        return issubclass(found, (Exception, torch.autograd.Function))
    if isinstance(found, types.FunctionType) and root != "torch":
        _look(found, MISSING, looked_at)
        return True
    name = str(getattr(found, "__name__", ""))
    known = hasattr(Tensor, name) or hasattr(F, name) or name in ("einsum", "cat")
    return known and not name.endswith("_") and any(getattr(space, name, None) is found for space in (torch, F))
