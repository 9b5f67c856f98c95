"""The public functions through both GPU backends, every launch in the simulator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from ddpm_fast import backends
from ddpm_fast.ops import denoise
from ddpm_fast.solvers import ddpm_table
from tests.gpu import simulate
from tests.ops.common import same_bits
from tests.ops.norms import assert_close

BACKENDS = ("triton", "cuda")
SCHEDULE = df.NoiseSchedule.linear(1000)


def image(seed: int) -> Tensor:
    return torch.randn(2, 6, 9, 7, generator=torch.Generator().manual_seed(seed))


OPS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: df.randn((2, 3, 17, 19), seed=(1 << 63) + 12345, sample_ids=torch.tensor([(1 << 32) - 1, 5])),
    "noising": lambda: df.q_sample(image(1), torch.tensor([5, 331]), SCHEDULE, seed=77, step=5)[0],
    "denoise": lambda: denoise(image(1), image(2), ddpm_table(SCHEDULE).rows, torch.tensor([1, 999]), seed=3),
    "norm_act": lambda: df.group_norm_silu(image(1), 3, image(2)[0, :, 0, 0], shift=image(3)[:, :, 0, 0]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_public_functions_run_end_to_end(backend: str, op: str) -> None:
    with simulate.backend(backend, strict_global=True) as launches:
        got = OPS[op]()
    with df.use_backend("reference"):
        expected = OPS[op]()
    assert launches
    assert all(launch.stats["st_bytes"] for launch in launches)
    if op == "norm_act":
        assert_close(got, expected.double())
    else:
        assert same_bits(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_launches_are_reported(backend: str) -> None:
    with simulate.backend(backend, trace=1 << 14) as launches:
        x = df.randn((2, 4, 16, 16), seed=1)
    (launch,) = launches
    assert "normal" in launch.kernel
    assert launch.stats["st_bytes"] == x.nbytes
    assert launch.block % 32 == 0
    assert len(launch.trace) == launch.stats["traced"] > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_left_when_the_block_ends(backend: str) -> None:
    chosen = backends.choose
    with simulate.backend(backend):
        assert backends.choose(torch.empty(1)) == backend
        assert backends.choose(torch.empty(1, dtype=torch.float64)) == "reference"
        assert torch.isnan(torch.empty(5)).all()  # a kernel that forgets an element is seen
    assert backends.choose is chosen
    assert same_bits(df.randn((3, 5), seed=2), df.randn((3, 5), seed=2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_in_a_kernel_reaches_the_caller(backend: str) -> None:
    with simulate.backend(backend, max_instr=10), pytest.raises(RuntimeError, match="instruction limit"):
        df.randn((2, 3, 17, 19), seed=7)


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'triton' or 'cuda'"), simulate.backend("cpu"):
        pass
