"""What a loop does besides its network, counted: kernels that touch images, the memory they move, reads on the host.

python -m benchmarks.counting     prints the table of docs/drop_in.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They write their first argument without reading it; the functions look at its shape alone.
_OVERWRITES = frozenset({"copy_", "normal_", "fill_", "zero_"})
_SHAPES_ONLY = frozenset({"randn_like", "zeros_like", "ones_like", "full_like"})
# They reserve memory and touch none of it.
_ALLOCATES = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
_HOST_READ = "_local_scalar_dense"


@dataclass(frozen=True)
class Counts:
    """What happens in a step.

    Attributes:
        kernels: operators that compute and touch a tensor of at least an image batch's size.
        transfers: the images that these read and write, in batches (N, C, H, W).
        small: operators that compute on less, each a launch on a GPU.
        host_reads: values that Python waits for.
    """

    kernels: int
    transfers: float
    small: int
    host_reads: int


class Counter(TorchDispatchMode):
    """Counts the operators that run inside the `with` block, in one list entry for each stretch between two marks.

    Args:
        shape: (N, C, *) of the image batch.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.image = torch.Size(shape).numel()
        self.stretches: list[Counts] = [Counts(0, 0.0, 0, 0)]

    def mark(self) -> None:
        self.stretches.append(Counts(0, 0.0, 0, 0))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        last = self.stretches[-1]
        if name == _HOST_READ:
            self.stretches[-1] = Counts(last.kernels, last.transfers, last.small, last.host_reads + 1)
        elif name not in _ALLOCATES and not func.is_view:
            touched = [n for n in _touched(func, name, args, kwargs or {}, result) if n >= self.image]
            if touched:
                moved = sum(touched) / self.image
                self.stretches[-1] = Counts(last.kernels + 1, last.transfers + moved, last.small, last.host_reads)
            else:
                self.stretches[-1] = Counts(last.kernels, last.transfers, last.small + 1, last.host_reads)
        return result


def _elements(tensor: Tensor) -> int:
    """The different places in memory that a tensor stands for: an expanded one is no larger than its source."""
    return torch.Size(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0).numel()


def _touched(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Iterator[int]:
    """The elements read and written, argument by argument."""
    schema = func._schema
    given = [
        *zip(schema.arguments, args, strict=False),
        *((a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs),
    ]
    # An operator of ours, and one with `out`, writes what it is given for that; any other in place reads it before.
    reads_what_it_writes = schema.overload_name != "out" and func.namespace == "aten" and name not in _OVERWRITES
    written = False
    for argument, value in given:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        written |= writes
        times = 2 if writes and reads_what_it_writes else 0 if name in _SHAPES_ONLY else 1
        yield from (_elements(tensor) * times for tensor in _tensors(value))
    if not written:
        yield from map(_elements, _tensors(result))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def per_step(loop: Callable[[Callable[[], None]], Callable[[], object]], shape: tuple[int, ...]) -> Counts:
    """The counts between the network's last call but one and its last; ``loop(mark)()`` marks each of them."""
    counter = Counter(shape)
    run = loop(counter.mark)
    with counter:
        run()
    return counter.stretches[-2]


def main() -> None:
    from benchmarks.loops import LOOPS
    from benchmarks.report import aligned

    lines = []
    for loop in LOOPS:
        before, after = per_step(loop.theirs, loop.shape), per_step(loop.ours, loop.shape)
        pairs = zip(vars(before).values(), vars(after).values(), strict=True)
        lines.append([loop.name, *(f"{b:g} -> {a:g}" for b, a in pairs)])
    print(aligned(("loop", "kernels on images", "transfers", "other kernels", "host reads"), lines))


if __name__ == "__main__":
    main()
