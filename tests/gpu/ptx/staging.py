"""Kernel arguments: where arrays lie in memory, and the copies of them that a launch works on."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .parse import align_up

_GAP = 1 << 16  # bytes between allocations, so that an overrun never lands in another argument
_DEVICE_ALIGNMENT = 256  # of an allocation in device memory


@dataclass
class Span:
    """The bytes of an array: where they start, how many, the start of their allocation, and whether they may change."""

    start: int
    size: int
    allocation: int
    writable: bool

    @property
    def end(self) -> int:
        return self.start + self.size


def is_array(argument: Any) -> bool:
    return hasattr(argument, "data_ptr") or isinstance(argument, np.ndarray)


def span_of(array: Any, writable: bool) -> Span:
    """The span of a torch tensor or numpy array, from its first element to its last."""
    if isinstance(array, np.ndarray):
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        item, steps = array.itemsize, list(array.strides)
        start, allocation = array.ctypes.data, owner.ctypes.data
    else:
        item = array.element_size()
        steps = [step * item for step in array.stride()]
        start, allocation = array.data_ptr(), array.untyped_storage().data_ptr()
    reach = sum((n - 1) * step for n, step in zip(array.shape, steps, strict=True))
    return Span(start, item + reach if all(array.shape) else 0, allocation, writable)


@dataclass
class _Part:
    """Overlapping spans, copied as one."""

    start: int
    end: int
    allocation: int
    writable: bool
    copy: int = 0


class Staging:
    """Copies of the arrays of a launch, each at the alignment that it has in its allocation and far from the others.

    Arrays that overlap stay so.
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        self._parts: list[_Part] = []
        for span in sorted((s for s in spans if s.size), key=lambda s: (s.start, s.size)):
            if self._parts and span.start < self._parts[-1].end:
                last = self._parts[-1]
                last.end = max(last.end, span.end)
                last.writable |= span.writable
            else:
                self._parts.append(_Part(span.start, span.end, span.allocation, span.writable))
        slack = _GAP + 2 * _DEVICE_ALIGNMENT
        self._memory = np.empty(sum(p.end - p.start + slack for p in self._parts) + _GAP, np.uint8)
        at = self._memory.ctypes.data + _GAP
        for part in self._parts:
            offset = (part.start - part.allocation) % _DEVICE_ALIGNMENT
            part.copy = align_up(at, _DEVICE_ALIGNMENT) + offset
            ctypes.memmove(part.copy, part.start, part.end - part.start)
            at = part.copy + part.end - part.start + _GAP

    def find(self, address: int) -> int | None:
        """Where the copy of an address lies; None when no array holds it."""
        for part in self._parts:
            if part.start <= address < part.end:
                return part.copy + address - part.start
        return None

    def address(self, span: Span) -> int:
        """Where the copy of a span lies; that of an empty one is null."""
        return self.find(span.start) or 0 if span.size else 0

    def relocate(self, buffer: bytearray, words: Iterable[int]) -> None:
        """Replaces those 64-bit words of a parameter buffer that point into an array by pointers to the copy."""
        for offset in words:
            copy = self.find(int.from_bytes(buffer[offset : offset + 8], "little"))
            if copy is not None:
                buffer[offset : offset + 8] = copy.to_bytes(8, "little")

    def ranges(self, spans: Sequence[Span]) -> list[int]:
        """(address, bytes, writable) of the copy of each span, in one list."""
        return [x for span in spans for x in (self.address(span), span.size, int(span.writable))]

    def copy_back(self) -> None:
        """Writes what the launch changed to the original arrays."""
        for part in self._parts:
            if part.writable:
                ctypes.memmove(part.start, part.copy, part.end - part.start)
