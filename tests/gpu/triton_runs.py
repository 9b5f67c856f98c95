"""What the tests of the Triton backend share: runs under every schedule, and what a launch is compiled to."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ddpm_fast.backends.triton import _launch
from tests.gpu import simulate
from tests.gpu.ptx.triton import Specialised
from tests.ops.common import same_bits
from tests.ops.norms import assert_close

ARCHITECTURES = (80, 90, 120)

# Threads forwards, backwards and in random order; and with the slower search for races in global memory.
SCHEDULES: tuple[dict[str, Any], ...] = (
    {"order": 0, "strict": True},
    {"order": 1},
    {"order": 2, "seed": 5},
    {"order": 2, "seed": 6, "strict_global": True},
)

# Samples and steps whose first block of noise has a word at an end of its range; found by trying 2^32 samples and more.
_RARE = (
    (4212173505, 1),  # r0 = 0
    (748870513, 1),  # r1 = 0
    (889928178, 4),  # r1 = 2^32 - 1
    (4292409672, 1),  # r2 = 0
    (3760530611, 1),  # r3 = 0
    (524120840, 1),  # r3 = 2^32 - 1
)
SEED, STREAM = torch.tensor([0x0123456789ABCDEF]), 3


def drawn_for(samples: int) -> tuple[Tensor, Tensor]:
    """Sample numbers and steps of a batch, with SEED and STREAM those of the rare words first."""
    others = torch.arange(samples)
    common = torch.stack([others.flip(0) + (1 << 32) - samples, others + 123], 1)
    ids, steps = torch.cat([torch.tensor(_RARE), common])[:samples].unbind(1)
    return ids.contiguous(), steps.contiguous()


MANY = 300  # samples


def under_every_schedule(
    op: Callable[[], tuple[Tensor, ...]], target: int = 90, samples: int = 1
) -> tuple[Tensor, ...]:
    """What `op` returns, the same bits whatever the order of the threads; many samples run in the first order alone,
    since their blocks do what those of a few do."""
    results = []
    for options in SCHEDULES[:1] if samples >= MANY else SCHEDULES:
        with simulate.backend("triton", target, **options):
            results.append(op())
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    return results[0]


def assert_rounded_once(got: Tensor, expected: Tensor) -> None:
    """Of a short dtype: an arithmetic's error that is smaller than a rounding's shows in how many elements lie on the
    other side of one. Those of float32 put 1 of 3000 there at most, in the tests' cases."""
    if got.dtype in (torch.float16, torch.bfloat16):
        assert int((got != expected.to(got.dtype)).sum()) <= 1 + got.numel() // 500


def with_extremes(row: Tensor) -> Tensor:
    """A parameter that is added, whose last values put SiLU's argument beyond what its exponential reaches."""
    row[-1, -3:] = torch.tensor([3e38, -3e38, -100.0])
    return row


def assert_close_beside_extremes(got: Tensor, expected: Tensor) -> None:
    """The largest values apart from the others, whose tolerance is of the largest of them."""
    for part in (expected.abs() > 1e30, expected.abs() <= 1e30):
        if part.any():
            assert_close(got[part], expected[part])


def blank(like: Tensor, dtype: torch.dtype | None = None, offset: int = 0) -> Tensor:
    """NaNs in the shape and layout of a dense tensor, so many elements behind an aligned address."""
    storage = torch.full((like.numel() + offset,), torch.nan, dtype=dtype or like.dtype)
    return storage.as_strided(like.shape, like.stride(), offset)


def moved(tensor: Tensor, offset: int) -> Tensor:
    """A dense tensor's copy in its layout, so many elements behind an aligned address."""
    storage = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype)
    return storage.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


@dataclasses.dataclass
class Call:
    """One launch of a kernel, as the backend asked for it."""

    kernel: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]

    def compiled(self, target: int | str) -> Any:
        return Specialised(self.kernel, target, self.args, self.keywords).compile()


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Launches inside the block run nothing and fill the list."""
    calls: list[Call] = []

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constexprs: Any) -> None:
        calls.append(Call(kernel, args, {"num_warps": num_warps, "enable_fp_fusion": False, **constexprs}))

    with mock.patch.object(_launch, "launch", launch):
        yield calls
