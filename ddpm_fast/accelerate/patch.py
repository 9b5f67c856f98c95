"""A module is accelerated by giving it another class: a subclass of its own, with another forward.

Nothing else about it changes: it stays the same object, with the same attributes, parameters, hooks and children, and
undoing it is giving the class back. Unlike a `forward` set on the instance, a class survives copying, pickling and
the replicas of DataParallel.
"""

from __future__ import annotations

import copyreg
import types
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import nn

_MARK = "_ddpm_fast_"

T = TypeVar("T", bound="Accelerated")


class Accelerated:
    """What the classes that accelerate gives to modules share. Comes before the module's own class in the MRO."""

    original_class: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keeps a registry that the module's own class may have for its subclasses from seeing ours."""

    def _get_name(self) -> str:
        return f"Fused{self.original_class.__name__}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles name the original class: ours is made again when the pickle is read."""
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__ and reduced[1][0] is type(self):  # type: ignore[attr-defined]
            return (_revive, (type(self).__mro__[1], self.original_class, *reduced[1][1:]), *reduced[2:])
        return reduced

    @classmethod
    def class_in_pickles(cls, original: type[nn.Module]) -> type[Any]:
        """The class of an object that comes out of a pickle, before it has a state."""
        return subclass(cls, original)


def _revive(mixin: type[Accelerated], original: type[nn.Module], *args: Any) -> Any:
    made = mixin.class_in_pickles(original)
    return made.__new__(made, *args)


_classes: dict[tuple[type, type, Hashable], type[Any]] = {}


def subclass(
    mixin: type[T], original: type[nn.Module], key: Hashable = None, methods: Callable[[], dict[str, Any]] = dict
) -> type[T]:
    """The class (mixin, original) with some methods; one for each key."""
    made = _classes.get((mixin, original, key))
    if made is None:
        body = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "original_class": original,
            **methods(),
        }
        # The original's name too: devices are mapped, and layers chosen, by the names of classes.
        made = types.new_class(original.__name__, (mixin, original), exec_body=lambda ns: ns.update(body))
        _classes[mixin, original, key] = made
    return made


def swap(module: nn.Module, new: type[Any]) -> None:
    """Gives a module its new class. TypeError where Python does not allow it (`__slots__`)."""
    module.__class__ = new


def is_accelerated(module: nn.Module) -> bool:
    return isinstance(module, Accelerated)


def original_class(module: nn.Module) -> type[nn.Module]:
    return module.original_class if isinstance(module, Accelerated) else type(module)


def unswap(module: nn.Module) -> None:
    """Gives a module its own class back and removes every mark."""
    if isinstance(module, Accelerated):
        swap(module, module.original_class)
    for mark in [name for name in module.__dict__ if name.startswith(_MARK)]:
        del module.__dict__[mark]


def mark(module: nn.Module, name: str, value: Any) -> None:
    """Leaves a value in the module's `__dict__`, past whatever `__setattr__` the module has."""
    module.__dict__[_MARK + name] = value


def marked(module: nn.Module, name: str, default: Any = None) -> Any:
    return module.__dict__.get(_MARK + name, default)
