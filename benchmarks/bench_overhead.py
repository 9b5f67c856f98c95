"""What a call costs where there is nothing to compute: 8x8 tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import ddpm_fast as df
from benchmarks.eager import EagerDiffusion, group_norm_silu
from benchmarks.harness import Case
from ddpm_fast import backends
from ddpm_fast.ops import denoise
from ddpm_fast.ops.denoise import DENOISE
from ddpm_fast.ops.noising import NOISING_RANDOM
from ddpm_fast.ops.random import NORMAL
from ddpm_fast.solvers import ddpm_table

SHAPE = (1, 1, 8, 8)
SCHEDULE = df.NoiseSchedule.linear(1000)
EAGER = EagerDiffusion(SCHEDULE)
ROWS = ddpm_table(SCHEDULE).rows
INDEX, SEED, STEP, TIME = torch.tensor([499]), torch.tensor([3]), torch.tensor([0]), torch.tensor([500])

Measure = Callable[[Case], None]


def agree(raw: Tensor, public: Tensor) -> float:
    assert torch.equal(raw, public), "the operator and the public function differ"
    return 0.0


def one_multiplication() -> dict[str, Callable[[], object]]:
    """The cheapest that eager PyTorch does with tensors of this size."""
    a, b, out = torch.randn(SHAPE), torch.randn(SHAPE), torch.empty(SHAPE)
    return {"torch.mul(out=)": lambda: torch.mul(a, b, out=out)}


def test_randn(measure: Measure) -> None:
    out, public = torch.empty(SHAPE), torch.empty(SHAPE)
    kernel = NORMAL[backends.choose(out)]

    def raw() -> Tensor:
        kernel(out, SEED, None, STEP, 1)
        return out

    measure(
        Case(
            what="overhead: randn",
            shape=SHAPE,
            ours=lambda: df.randn(SHAPE, seed=3, out=public),
            peers={"torch.randn(out=)": lambda: torch.randn(SHAPE, out=out)},
            floors={"raw op": raw, **one_multiplication()},
            check=lambda: agree(raw(), df.randn(SHAPE, seed=3, out=public)),
        )
    )


def test_q_sample(measure: Measure) -> None:
    x0, out, noise = torch.randn(SHAPE), torch.empty(SHAPE), torch.empty(SHAPE)
    kernel, table = NOISING_RANDOM[backends.choose(x0)], SCHEDULE.noising_coefficients("cpu")

    def raw() -> Tensor:
        kernel(x0, TIME, table, SEED, None, STEP, 2, out, noise)
        return out

    measure(
        Case(
            what="overhead: q_sample",
            shape=SHAPE,
            ours=lambda: df.q_sample(x0, TIME, SCHEDULE, seed=3),
            peers={"eager": lambda: EAGER.q_sample(x0, TIME)},
            floors={"raw op": raw, **one_multiplication()},
            check=lambda: agree(raw(), df.q_sample(x0, TIME, SCHEDULE, seed=3)[0]),
        )
    )


def test_denoise(measure: Measure) -> None:
    x, e, out, public = torch.randn(SHAPE), torch.randn(SHAPE), torch.empty(SHAPE), torch.empty(SHAPE)
    kernel = DENOISE[backends.choose(x)]

    def raw() -> Tensor:
        kernel(x, e, None, ROWS, INDEX, 0, 0, -1.0, 1.0, None, None, SEED, None, 1, out, None)
        return out

    def ours() -> Tensor:
        return denoise(x, e, ROWS, INDEX, clip=(-1.0, 1.0), seed=SEED, out=public)

    measure(
        Case(
            what="overhead: denoise",
            shape=SHAPE,
            ours=ours,
            peers={"eager": lambda: EAGER.p_sample(x, e, 500)},
            floors={"raw op": raw, **one_multiplication()},
            check=lambda: agree(raw(), ours()),
        )
    )


def test_group_norm_silu(measure: Measure) -> None:
    shape = (1, 8, 8, 8)
    x, weight, bias = torch.randn(shape), torch.randn(8), torch.randn(8)

    def check() -> float:
        got, expected = df.group_norm_silu(x, 4, weight, bias), group_norm_silu(x, 4, weight, bias)
        error = float((got - expected).abs().max())
        assert error < 5e-6, f"{error} from eager"
        return error

    measure(
        Case(
            what="overhead: group_norm_silu",
            shape=shape,
            ours=lambda: df.group_norm_silu(x, 4, weight, bias),
            peers={"eager": lambda: group_norm_silu(x, 4, weight, bias)},
            floors=one_multiplication(),
            check=check,
        )
    )
