"""Clusters, asynchronous copies, barriers, warps and memory, each with a kernel of features.cu."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.gpu.ptx import Module
from tests.gpu.ptx.nvcc import compile_ptx

SOURCE = Path(__file__).parent / "features.cu"


@pytest.fixture(scope="module")
def mod() -> Module:
    m = Module(compile_ptx(SOURCE))
    assert not m.unsupported
    return m


ORDERS = pytest.mark.parametrize("order", [0, 1, 2])


def ints(n: int, fill: int = -1) -> npt.NDArray[np.int32]:
    return np.full(n, fill, np.int32)


def floats(n: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=n).astype(np.float32)


def test_cluster_ids(mod: Module) -> None:
    o = ints(24 * 10)
    mod.launch("cluster_ids", (6, 4), 32, [o], cluster=(3, 2))
    for b, r in enumerate(o.reshape(24, 10)):
        x, y = b % 6, b // 6
        assert list(r) == [x % 3, y % 2, 3, 2, x % 3 + 3 * (y % 2), x // 3, y // 2, 2, 6, 192]


@ORDERS
def test_cluster_sum(mod: Module, order: int) -> None:
    x, o = floats(3 * 1000), np.full(12, np.nan, np.float32)
    mod.launch("cluster_sum", 12, 64, [x, o, 1000], cluster=4, order=order, readonly=(0,), strict_global=True)
    assert np.allclose(o.reshape(3, 4), x.reshape(3, 1000).sum(1)[:, None], atol=1e-4)
    assert (o.reshape(3, 4) == o.reshape(3, 4)[:, :1]).all()


def test_cluster_shape_checks(mod: Module) -> None:
    name = next(k for k in mod.kernels if "cluster_fixed" in k)
    o = ints(8)
    mod.launch(name, 8, 32, [o])  # takes __cluster_dims__
    assert list(o) == [0, 1, 2, 3] * 2
    with pytest.raises(ValueError, match="compiled for clusters"):
        mod.launch(name, 8, 32, [o], cluster=2)
    with pytest.raises(ValueError, match="no multiple of the cluster"):
        mod.launch("cluster_atomic", 3, 32, [o], cluster=2)


@ORDERS
def test_cluster_push_and_atomic(mod: Module, order: int) -> None:
    o = ints(8 * 64)
    mod.launch("cluster_push", 8, 64, [o], cluster=4, order=order)
    for b in range(8):
        assert (o[b * 64 :][:64] == ((b + 3) % 4) * 1000 + 3 * np.arange(64)).all()
    o = ints(8)
    mod.launch("cluster_atomic", 8, 32, [o], cluster=4, order=order)
    assert list(o) == [32 * 10, 0, 0, 0] * 2


@ORDERS
def test_cp_async(mod: Module, order: int) -> None:
    x, o = floats(256 * 5), np.full(256 * 5, np.nan, np.float32)
    mod.launch("cpasync", 1, 64, [x, o, 5], order=order, readonly=(0,))
    assert (o.reshape(5, 256) == 2 * x.reshape(5, 256)[:, ::-1]).all()
    o = np.full(64, np.nan, np.float32)
    mod.launch("cpasync_zfill", 1, 64, [x[:40].copy(), o, 40], order=order)
    assert (o[::-1] == np.r_[x[:40], np.zeros(24)]).all()


@ORDERS
def test_mbarrier_and_bulk_copy(mod: Module, order: int) -> None:
    x, o = floats(768), np.full(768, np.nan, np.float32)
    mod.launch("bulk", 1, 256, [x, o], order=order)
    assert (o.reshape(3, 256) == x.reshape(3, 256) + x.reshape(3, 256)[:, ::-1]).all()
    o = np.full(128, np.nan, np.float32)
    mod.launch("cuda_barrier", 1, 128, [x, o], order=order)
    assert (o == x[:128][np.arange(128) ^ 1]).all()
    mod.launch("bulk_out", 1, 128, [x, o], order=order)
    assert (o == 2 * x[:128]).all()
    remote = ints(96)
    mod.launch("remote_mbarrier", 3, 32, [remote], cluster=3, order=order)
    assert (remote.reshape(3, 32) == 100 * np.array([[2], [0], [1]]) + np.arange(31, -1, -1)).all()


@ORDERS
def test_barriers(mod: Module, order: int) -> None:
    o = ints(192)
    mod.launch("named", 1, 128, [o], order=order)
    assert (o.reshape(3, 64) == 10 * np.arange(63, -1, -1) + np.arange(3)[:, None]).all()
    for n in (0, 5, 48, 99):
        o = ints(48)
        mod.launch("barred", 1, 48, [o, n], order=order)
        assert (o == 4 * min(n, 48) + 2 * (n >= 48) + (n < 48)).all()


def test_activemask(mod: Module) -> None:
    o = ints(64)
    mod.launch("active", 1, 32, [o, 20])
    third = sum(1 << t for t in range(0, 32, 3))
    rest = sum(1 << t for t in range(20) if t % 3)
    mask, size = o.reshape(32, 2).T
    assert [int(m) & 0xFFFFFFFF for m in mask] == [third if t % 3 == 0 else rest if t < 20 else 0 for t in range(32)]
    assert list(size) == [0 if t % 2 == 0 else 1600 + t // 2 for t in range(32)]
    for seed in range(5):  # a random part of the lanes is legal as well, and tiled code must survive it
        o2 = ints(64)
        mod.launch("active", 1, 32, [o2, 20], order=2, seed=seed)


def lane_ops(values: Iterable[int]) -> list[list[int]]:
    """What the kernel "warps" computes, row by row."""
    v = [int(q) for q in values]
    lanes = range(32)

    def ballot(holds: Callable[[int], bool]) -> int:
        return sum(1 << k for k in lanes if holds(v[k]))

    parity = 0
    for q in v:
        parity ^= q & 0xFFFFFFFF
    return [
        [v[k - 3] if k % 8 >= 3 else v[k] for k in lanes],
        [v[k + 5] if k % 16 + 5 < 16 else v[k] for k in lanes],
        [v[k ^ 9] for k in lanes],
        [v[k // 8 * 8 + 6] for k in lanes],
        [ballot(lambda q, mine=v[k] & 3: q & 3 == mine) for k in lanes],  # type: ignore[misc]
        [2**32] * 32,
        [sum(v)] * 32,
        [min(v) + parity] * 32,
        [ballot(lambda q: q > 0)] * 32,
        [int(1 in v) * 2 + all(q < 1000 for q in v)] * 32,
        [(1 << k) - 1 for k in lanes],
        [~((1 << k) - 1) for k in lanes],
    ]


@ORDERS
def test_warp_operations(mod: Module, order: int) -> None:
    x = np.random.default_rng(1).integers(-500, 500, 32).astype(np.int32)
    o = ints(12 * 32)
    mod.launch("warps", 1, 32, [o, x], order=order)
    for k, (got, want) in enumerate(zip(o.reshape(12, 32), lane_ops(x), strict=True)):
        assert [int(g) & 0xFFFFFFFF for g in got] == [w & 0xFFFFFFFF for w in want], k
    o = ints(32)
    mod.launch("half_warps", 1, 32, [o], order=order)
    assert list(o) == [t ^ 5 if t < 16 else t ^ 6 for t in range(32)]


def test_cache_hints_and_dependent_launch(mod: Module) -> None:
    x, o = floats(256).reshape(64, 4), np.full((64, 4), np.nan, np.float32)
    st, _ = mod.launch("hints", 2, 32, [x, o], readonly=(0,))
    want = x.copy()
    want[:, 0] = x[:, 0] + (x[:, 3] + x[:, 1] + x[:, 2])
    assert np.allclose(o, want, atol=1e-6)
    assert st["vec16"] == 3 * 64
    a, b = np.arange(32, dtype=np.int32), ints(32)
    mod.launch("dependent", 1, 32, [a, b])
    assert (b == a + 1).all()


def test_symbols_arguments_calls(mod: Module) -> None:
    table, o = floats(16), np.zeros(32, np.float32)
    mod.symbol("table").view(np.float32)[:] = table
    before = mod.symbol("counter").view(np.int32)[0]
    mod.launch("symbols", 1, 32, [o])
    assert (o == np.r_[table, table]).all()
    assert mod.symbol("counter").view(np.int32)[0] == before + 2
    args = np.array([(1.5, [1, 2, 3], 0.25)], np.dtype([("s", "f4"), ("a", "i4", 3), ("d", "f8")])).tobytes()
    mod.launch("by_value", 1, 32, [args, o])
    assert (o == 1.5 * np.arange(32) + np.arange(32) % 3 + 1 + 0.25).all()
    f, d = ints(16), np.zeros(16)
    mod.launch("calls", 1, 16, [f, d])
    fib = [0, 1]
    while len(fib) < 16:
        fib.append(fib[-1] + fib[-2])
    t = np.arange(16.0)
    assert list(f) == fib
    assert np.allclose(d, (1.5 + t) ** 2.5 + np.sin(1e6 * t), rtol=1e-13)


def test_control_flow_and_addresses(mod: Module) -> None:
    o = ints(64)
    mod.launch("switches", 1, 64, [o])
    f: list[Callable[[int], int]] = [
        lambda t: t * 3,
        lambda t: bin(t).count("1"),
        lambda t: t ^ 77,
        lambda t: t << 3,
        lambda t: -t,
        lambda t: t // 3,
        lambda t: t % 5,
        lambda t: 1000,
    ]
    assert list(o) == [f[t & 7](t) for t in range(64)]
    x, o = np.arange(1000, 1032, dtype=np.int32), ints(32)
    mod.launch("generic", 1, 32, [x, o])
    assert list(o) == [(31 - t + 100, 1000 + t + 200, (t & 7) * t + 400)[t % 3] for t in range(32)]
    x, o = (
        np.array([0, 1e-3, 1, -2, 3.14159, 100, 12345.678, -1e5, 1e10, 3e38, 1e-40, 7e7] + [0.1] * 20, np.float32),
        np.zeros(64, np.float32),
    )
    mod.launch("trig", 1, 32, [x, o])  # slow path: tables in global memory, local arrays
    assert np.allclose(o.reshape(32, 2), np.stack([np.sin(x.astype(float)), np.cos(x.astype(float))], 1), atol=2e-7)


@ORDERS
def test_atomics(mod: Module, order: int) -> None:
    g, u, f = (
        np.array([0, 100, -100, -1, 0, 0, 0, 0, 0], np.int32),
        np.array([0, 0, 1], np.uint32),
        np.zeros(2, np.float32),
    )
    h, bf, f4, q = np.zeros(2, np.float16), np.zeros(2, np.uint16), np.zeros(4, np.float32), np.zeros(2, np.uint64)
    mod.launch("atomics", 1, 64, [g, u, f, h, bf, f4, q], order=order)
    assert list(g) == [sum(range(64)), -7, 56, 0, 0xFFFF, 0, -64, 192, 42]
    assert list(u) == [
        64 % 10,
        (10 - 64 % 10) % 10,
        0xF8000000,
    ]
    assert list(f) == [32, 64]
    assert list(h) == [64, 32]
    assert list(bf) == [0x4280, 0x4300]
    assert list(f4) == [64, 128, 192, 256]
    assert list(q) == [64 << 33, 63]


@ORDERS
def test_synchronisation_through_global_memory(mod: Module, order: int) -> None:
    x, part, ticket, o = floats(64 * 9), np.zeros(9, np.float32), np.zeros(1, np.uint32), np.zeros(1, np.float32)
    mod.launch("last_block", 9, 64, [x, part, ticket, o], order=order, strict_global=True)
    assert abs(o[0] - x.sum()) < 1e-4
    assert ticket[0] == 0
    lock, n = ints(1, 0), ints(1, 0)
    mod.launch("spin_lock", 3, 64, [lock, n], order=order, strict_global=True)
    assert n[0] == 192


def test_approximate_results_can_be_shifted(mod: Module) -> None:
    x = np.linspace(0.1, 5, 32).astype(np.float32)
    out = []
    for a in (-1, 0, 1):
        o = np.zeros(128, np.float32)
        mod.launch("approximate", 1, 32, [x, o], approx=a)
        out.append(o)
    assert (out[0][:96] < out[2][:96]).all()
    assert (out[0][96:] == out[2][96:]).all()
    assert np.allclose(out[0][:96], out[2][:96], rtol=2e-6)
    assert math.isclose(out[1][0], math.exp(0.1), rel_tol=1e-6)


def test_unchecked_module_gives_the_same_bits(mod: Module) -> None:
    m = Module(compile_ptx(SOURCE), check=False, only="cluster_sum")
    assert list(m.kernels) == ["cluster_sum"]
    x, a, b = floats(3000), np.zeros(12, np.float32), np.zeros(12, np.float32)
    mod.launch("cluster_sum", 12, 64, [x, a, 1000], cluster=4)
    m.launch("cluster_sum", 12, 64, [x, b, 1000], cluster=4, workers=2)
    assert (a == b).all()


@ORDERS
def test_matrix_loads_and_stores(mod: Module, order: int) -> None:
    x, o = np.arange(256, dtype=np.uint16), np.zeros(768, np.uint16)
    mod.launch("matrices", 1, 32, [x, o], order=order)
    m = x.reshape(4, 8, 8)
    assert (o[:256].reshape(4, 8, 8) == m).all()
    assert (o[256:512].reshape(4, 8, 8) == m.transpose(0, 2, 1)).all()
    assert (o[512:].reshape(4, 8, 8) == m.transpose(0, 2, 1)).all()
