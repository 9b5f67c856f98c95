"""Memory that a loop gives back and needs again in its next step stays with the process."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

# glibc's <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4

# A freed chunk is never unmapped, nor the end of the heap returned, however large.
_KEEPING = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}
# Afterwards: glibc's default, and for the thresholds, which move until somebody sets them, where they move to once a
# process has freed a large tensor.
_USUAL = {_TRIM_THRESHOLD: 64 << 20, _MMAP_THRESHOLD: 32 << 20, _MMAP_MAX: 65536}

_lock = threading.Lock()
_users = 0


@contextmanager
def kept_memory() -> Iterator[None]:
    """While it is open, malloc gives no memory back to the system.

    By default glibc returns a large tensor's memory when it is freed; the next tensor gets new pages, each of which the
    kernel has to find and to clear at its first touch. A U-Net's step does that hundreds of times, for up to a fifth of
    its time (docs/networks.md). Calls nest, in one thread or in several. Nothing happens where the C library is another
    one, or where the environment tunes its malloc already.
    """
    _count(+1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    global _users
    with _lock:
        before, _users = _users, _users + change
        if (before == 0) != (_users == 0):
            _set(_KEEPING if _users else _USUAL)


def _set(options: dict[int, int]) -> None:
    mallopt = _mallopt()
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)


@lru_cache(maxsize=1)
def _mallopt() -> Callable[[int, int], int] | None:
    """The C library's function; None where there is none, or the environment has taken its decisions."""
    tuned = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    return None if tuned else getattr(ctypes.CDLL(None), "mallopt", None)
