"""Imports packages whose modules import, at the top, what their sampling loops do not need.

torchvision is among it, whose wheels on PyPI do not load beside a CPU build of torch. Stand-ins take the place of what
is named, or cannot be imported, while a module is being imported and no longer.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any


class _StandIn(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - what makes it a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None})


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError, OSError):  # absent, or built for another torch
        return False
    return True


@contextlib.contextmanager
def _modules(replaced: dict[str, types.ModuleType]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in replaced}
    sys.modules.update(replaced)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def import_package(name: str, others: Sequence[str]) -> types.ModuleType:
    """A package, with stand-ins for those of `others` that cannot be imported.

    Raises:
        ImportError: the package is not installed.
    """
    with _modules({other: _StandIn(other) for other in others if not _importable(other)}):
        return importlib.import_module(name)


def import_alone(name: str, others: Sequence[str], unwanted: Sequence[str] = ()) -> types.ModuleType:
    """The module `name` without its package's `__init__`, which imports every other module of it.

    Args:
        name: as "package.module".
        others: modules that get a stand-in where they cannot be imported.
        unwanted: modules of the package itself that get a stand-in.

    Raises:
        ImportError: the package is not installed.
    """
    package = name.split(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"{package} is not installed: see tests/third_party/requirements.txt")
    bare = types.ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations)
    replaced: dict[str, types.ModuleType] = {package: bare}
    replaced |= {other: _StandIn(other) for other in (*unwanted, *(o for o in others if not _importable(o)))}
    with _modules(replaced):
        return importlib.import_module(name)
