"""What is computed from parameters once, and again when they change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

T = TypeVar("T")

# Fused optimisers write into parameters without counting it in their version; so every step of any optimiser counts.
_optimizer_steps = 0


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


class Derived(Generic[T]):
    """A function's value for some tensors, kept until one of them has changed.

    A change is another memory, a step of PyTorch's version counter, or a step of any optimiser: writes through `.data`
    are not seen.
    """

    __slots__ = ("_last",)

    def __init__(self) -> None:
        # Sources, their versions and the value: one object, so that threads never see parts of two.
        self._last: tuple[list[Tensor | None], list[int], T] | None = None

    def get(self, sources: tuple[Tensor | None, ...], compute: Callable[..., T]) -> T:
        """`compute(*sources)`, detached; computed only where a source has changed."""
        versions = [_optimizer_steps, *(-1 if source is None else source._version for source in sources)]
        last = self._last
        # torch's fully_shard fills a parameter's memory again without counting it.
        counted = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        if counted and last is not None and last[1] == versions and all(map(_same_memory, last[0], sources)):
            return last[2]
        # Holding the memory that was read keeps its address from being given to another tensor.
        held = [None if source is None else source.detach() for source in sources]
        value = compute(*held)
        self._last = (held, versions, value)
        return value

    def __reduce__(self) -> tuple[type[Derived[T]], tuple[()]]:
        """Copies and pickles belong to other parameters, and start empty."""
        return Derived, ()


def _same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else a.data_ptr() == b.data_ptr()
