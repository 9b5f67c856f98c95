"""The public functions through both GPU backends, every launch in the simulator."""

from __future__ import annotations

import pytest
import torch

import ddpm_fast as df
from ddpm_fast import backends
from tests.gpu import simulate
from tests.gpu.mutation_cases import CASES
from tests.ops.common import same_bits

BACKENDS = ("triton", "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["normal", "noising", "denoise", "norm_act"])
def test_public_functions_run_end_to_end(backend: str, op: str) -> None:
    name, calls = CASES[f"{backend}:{op}"]
    with simulate.backend(name, strict_global=True) as launches:
        calls[0].check()
    assert launches
    assert all(launch.stats["st_bytes"] for launch in launches)


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
