"""From a method to its syntax tree and back, and only where the tree is proved to be that method's."""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import linecache
import types
from collections.abc import Mapping
from typing import NamedTuple

_FUTURE = 0
for _name in __future__.all_feature_names:
    _FUTURE |= getattr(__future__, _name).compiler_flag


class Unreadable(Exception):
    """The source of a function cannot be had, or is not what runs."""


def innermost(function: types.FunctionType) -> types.FunctionType:
    """The function under decorators that used functools.wraps."""
    while isinstance(inner := getattr(function, "__wrapped__", None), types.FunctionType):
        if not any(_holds(cell, inner) for cell in function.__closure__ or ()):
            break  # its documentation only was taken from another function
        function = inner
    return function


def _holds(cell: types.CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # empty
        return False


def redecorate(function: types.FunctionType, inner: types.FunctionType) -> types.FunctionType:
    """The function with `inner` in place of its innermost: the decorators' own wrappers, around something else."""
    wrapped = getattr(function, "__wrapped__", None)
    if not isinstance(wrapped, types.FunctionType) or not any(
        _holds(cell, wrapped) for cell in function.__closure__ or ()
    ):
        return inner
    replacement = redecorate(wrapped, inner)
    cells = tuple(types.CellType(replacement) if _holds(cell, wrapped) else cell for cell in function.__closure__ or ())
    outer = _function(function, function.__code__, cells)
    outer.__dict__["__wrapped__"] = replacement
    return outer


def _function(
    like: types.FunctionType, code: types.CodeType, closure: tuple[types.CellType, ...]
) -> types.FunctionType:
    made = types.FunctionType(code, like.__globals__, like.__name__, like.__defaults__, closure)
    made.__kwdefaults__ = like.__kwdefaults__
    made.__qualname__ = like.__qualname__
    made.__module__ = like.__module__
    made.__annotations__ = like.__annotations__
    made.__dict__.update(like.__dict__)
    return made


def parse(function: types.FunctionType) -> ast.FunctionDef:
    """The syntax tree of a function, with the line numbers of its file. Not to be changed: it is kept.

    Raises:
        Unreadable: where there is no source, or compiling it does not give the function's own bytecode (the file has
            been edited since, or the function rewritten, as pytest rewrites asserts).
    """
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    if not lines:
        raise Unreadable("there is no source for it")
    found = [node for node in _functions(code.co_filename, "".join(lines)) if _is_at(node.function, code)]
    if len(found) != 1:
        raise Unreadable("it is not a plain function")
    function_node, statement, imports = found[0]
    # With the file's imports: calls of what was imported compile differently. Without the rest: files can be long.
    module = ast.Module(body=[*imports, statement], type_ignores=[])
    codes = [compile(module, code.co_filename, "exec", flags=code.co_flags & _FUTURE, dont_inherit=True)]
    for outer in codes:
        codes += [constant for constant in outer.co_consts if isinstance(constant, types.CodeType)]
    if code not in codes:
        raise Unreadable("its source is not what runs")
    for node in ast.walk(function_node):
        name = getattr(node, "id", getattr(node, "attr", getattr(node, "arg", None)))
        if isinstance(name, str) and name.startswith("__") and not name.endswith("__"):
            raise Unreadable("it uses names that are private to its class")  # compiled elsewhere, they would change
    return function_node


class _Found(NamedTuple):
    function: ast.FunctionDef
    statement: ast.stmt  # of the file, in which the function is
    imports: list[ast.stmt]


@functools.lru_cache(maxsize=16)
def _functions(name: str, text: str) -> list[_Found]:
    """Every function in a file."""
    try:
        tree = ast.parse(text, name)
    except SyntaxError as error:
        raise Unreadable("its source cannot be parsed") from error
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.If, ast.Try))]
    return [
        _Found(node, statement, [i for i in imports if i is not statement])
        for statement in tree.body
        for node in ast.walk(statement)
        if isinstance(node, ast.FunctionDef)
    ]


def _is_at(node: ast.FunctionDef, code: types.CodeType) -> bool:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return node.name == code.co_name and first == code.co_firstlineno


def _compile(function: types.FunctionType, tree: ast.FunctionDef, injected: tuple[str, ...]) -> types.CodeType:
    """The code of `tree`, where the function's free variables and the injected ones are free."""
    inner = copy.copy(tree)
    inner.decorator_list, inner.returns = [], None
    if hasattr(inner, "type_params"):
        inner.type_params = []
    inner.args = copy.deepcopy(tree.args)
    # Defaults and annotations belong to the function, which keeps its own.
    inner.args.defaults, inner.args.kw_defaults = [], [None for _ in tree.args.kwonlyargs]
    for argument in ast.walk(inner.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    free = [*function.__code__.co_freevars, *injected]
    module = ast.parse(f"def outer({', '.join(free)}): pass")
    outer = module.body[0]
    assert isinstance(outer, ast.FunctionDef)
    outer.body = [inner]
    code = function.__code__
    compiled: types.CodeType = compile(
        module, code.co_filename, "exec", flags=code.co_flags & _FUTURE, dont_inherit=True
    )
    for name in ("outer", tree.name):
        compiled = next(c for c in compiled.co_consts if isinstance(c, types.CodeType) and c.co_name == name)
    return compiled


def build(function: types.FunctionType, tree: ast.FunctionDef, injected: Mapping[str, object]) -> types.FunctionType:
    """A function with another body, in the same globals and closure, and with further names that only it sees."""
    code = _compile(function, tree, tuple(injected))
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells |= {name: types.CellType(value) for name, value in injected.items()}
    code = code.replace(co_name=function.__code__.co_name)
    return _function(function, code, tuple(cells[name] for name in code.co_freevars))
