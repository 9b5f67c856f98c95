"""The gates let good kernels through and hold the others back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.gpu import gates
from tests.gpu.ptx import Module, nvcc, perf, sass
from tests.gpu.ptx.devices import DEVICES
from tests.gpu.ptx.metrics import metrics

SOURCE = Path(__file__).parent / "gates.cu"


@pytest.fixture(scope="module")
def ptx() -> str:
    return nvcc.compile_ptx(SOURCE)


@pytest.fixture(scope="module")
def module(ptx: str) -> Module:
    return Module(ptx)


@pytest.fixture(scope="module")
def cubin() -> Path:
    return nvcc.compile_cubin(SOURCE)


def values(n: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=n).astype(np.float32)


def test_spills(cubin: Path) -> None:
    gates.assert_no_spills(cubin, "copy|shared|rounded")
    with pytest.raises(AssertionError, match="spills"):
        gates.assert_no_spills(cubin, "spills")
    with pytest.raises(AssertionError, match="no kernel"):
        gates.assert_no_spills(cubin, "absent")


def test_vector_accesses(cubin: Path) -> None:
    code = sass.sass(cubin)
    gates.assert_vector_accesses(code["copy_vectors"])
    with pytest.raises(AssertionError, match="128-bit LDG"):
        gates.assert_vector_accesses(code["copy_strided"])
    gates.assert_vector_accesses(code["copy_strided"], loads=False, stores=False)


def test_occupancy(cubin: Path) -> None:
    gates.assert_occupancy(cubin, 90, threads=256, least=1.0, kernels="copy_vectors")
    with pytest.raises(AssertionError, match="occupancy"):  # two blocks with half of the shared memory each
        gates.assert_occupancy(cubin, 90, threads=256, least=0.5, kernels="copy_vectors", dynamic_shared=100 * 1024)
    # 65536 registers of a multiprocessor, given out by 256 a warp.
    assert perf.resident_blocks(80, registers=64, threads=256) == 4
    assert perf.resident_blocks(80, registers=65, threads=256) == 3
    assert perf.occupancy(120, registers=32, threads=1024) == pytest.approx(2 / 3)


def test_rounding(ptx: str) -> None:
    gates.assert_rounded_operations(gates.kernel_text(ptx, "rounded"))
    with pytest.raises(AssertionError, match="fused"):
        gates.assert_rounded_operations(gates.kernel_text(ptx, "fused"))
    with pytest.raises(AssertionError, match=r"ex2\.approx"):
        gates.assert_rounded_operations(gates.kernel_text(ptx, "approximate"))
    with pytest.raises(AssertionError, match="no rounding"):
        gates.assert_rounded_operations("add.f32 %f1, %f2, %f3;")
    with pytest.raises(AssertionError, match="flushes"):
        gates.assert_rounded_operations("add.rn.ftz.f32 %f1, %f2, %f3;")
    with pytest.raises(AssertionError, match="no kernel"):
        gates.kernel_text(ptx, "absent")


def test_traffic_and_coalescing(module: Module) -> None:
    x, out = values(512), np.zeros(512, np.float32)
    stats, trace = module.launch("copy_vectors", 2, 64, [x, out], trace=1 << 12)
    assert (x == out).all()
    gates.assert_traffic(stats, x.nbytes, out.nbytes)
    gates.assert_coalesced(trace)
    with pytest.raises(AssertionError, match="bytes read"):
        gates.assert_traffic(stats, x.nbytes // 2, out.nbytes)
    with pytest.raises(AssertionError, match="bytes written"):
        gates.assert_traffic(stats, x.nbytes, 2 * out.nbytes)
    _, trace = module.launch("copy_strided", 1, 64, [x, out], trace=1 << 12)
    with pytest.raises(AssertionError, match="PTX line"):
        gates.assert_coalesced(trace)
    assert all(access.efficiency == pytest.approx(1 / 8) for access in metrics(trace).values())
    with pytest.raises(AssertionError, match="no global access"):
        gates.assert_coalesced(trace[:0])


@pytest.mark.parametrize(("stride", "ways"), [(1, 1), (2, 2), (4, 4), (32, 32), (33, 1)])
def test_bank_conflicts(module: Module, stride: int, ways: int) -> None:
    x, out = values(32), np.zeros(32, np.float32)
    _, trace = module.launch("through_shared", 1, 32, [x, out, stride], trace=1 << 12)
    assert (out == x[::-1]).all()
    assert {a.per_request for a in metrics(trace).values() if "shared" in a.name} == {ways}
    if ways == 1:
        gates.assert_no_bank_conflicts(trace)
    else:
        with pytest.raises(AssertionError, match="shared"):
            gates.assert_no_bank_conflicts(trace)


def test_estimate(cubin: Path) -> None:
    """The arithmetic of the roofline, on a kernel that can only be bound by memory."""
    code = sass.sass(cubin)["copy_vectors"]
    estimate = perf.estimate(perf.main_loop(code), elements=4, bytes_per_element=8, device=DEVICES[90])
    assert estimate.bound == "memory"
    assert estimate.memory == pytest.approx(8 / (0.9 * 3.35e12))
    assert estimate.instructions == sass.summary(code).instructions / 4
