"""Each kernel of bugs.cu has one planted bug: it is reported under every schedule, and its correct variant is not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gpu.ptx import Module
from tests.gpu.ptx.nvcc import compile_ptx

SOURCE = Path(__file__).parent / "bugs.cu"

# kernel -> (message, launch options)
C2: dict[str, Any] = {"grid": 2, "cluster": 2}
BUGS: dict[str, tuple[str, dict[str, Any]]] = {
    "oob_load": ("out-of-bounds global load", {}),
    "oob_store": ("out-of-bounds global store", {}),
    "oob_before": ("out-of-bounds global load", {}),
    "misaligned": ("misaligned 16-byte global", {}),
    "readonly": ("read-only", {"readonly": (0,)}),
    "shared_oob": ("out-of-bounds shared", {}),
    "dynamic_oob": ("out-of-bounds shared", {"smem": 256}),
    "uninitialised": ("uninitialised shared", {}),
    "uninit_atomic": ("uninitialised shared", {}),
    "race_raw": ("race: (RAW|WAR)|uninitialised", {}),
    "race_war": ("race: (RAW|WAR)", {}),
    "race_waw": ("race: WAW", {}),
    "race_same_warp": ("race: (RAW|WAR)|uninitialised", {}),
    "race_shuffle": ("race: (RAW|WAR)", {"strict": True}),
    "race_atomic": ("race: (RAW|WAR)", {}),
    "race_reuse": ("race: (RAW|WAR)", {}),
    "divergent": ("barrier divergence", {}),
    "divergent_warp": ("barrier divergence in warp", {}),
    "early_exit": ("deadlock.*waits at barrier", {}),
    "mask_without_me": ("not in its mask", {}),
    "mask_source": ("shuffle reads lane 20", {}),
    "mask_divergent": ("deadlock.*waits at warp op|warp divergence", {}),
    "mask_differs": ("disagree on the mask", {}),
    "named_race": ("race: (RAW|WAR)|uninitialised", {}),
    "named_count": ("deadlock.*waits at barrier", {}),
    "named_mixed": ("others said|deadlock", {}),
    "local_oob": ("out-of-bounds or misaligned local", {}),
    "endless": ("deadlock|instruction limit", {"max_instr": 100000}),
    "asserts": ("assertion failed", {}),
    "traps": ("trap", {}),
    "cluster_start": ("may not have started", C2),
    "cluster_write": ("race: (RAW|WAR)|uninitialised|has exited", C2),
    "cluster_exit": ("missing cluster barrier|has exited", C2),
    "cluster_relaxed": ("may not have started|race", C2),
    "cluster_rank": ("block rank [23] in a cluster of 2", C2),
    "cluster_oob": ("out-of-bounds shared", C2),
    "cluster_twice": ("arrived before and has not waited", C2),
    "cluster_skip": ("may not have started|race|uninitialised", C2),
    "cpasync_own": ("before its wait", {}),
    "cpasync_barrier": ("race: (RAW|WAR)|before its wait|uninitialised", {}),
    "cpasync_order": ("race: (RAW|WAR)|before its wait", {}),
    "cpasync_group": ("before its wait", {}),
    "cpasync_war": ("race|before its wait", {}),
    "cpasync_oob": ("out-of-bounds global load", {}),
    "bulk_wait": ("asynchronous copy", {}),
    "mbar_bytes": ("deadlock.*mbarrier", {}),
    "mbar_uninit": ("mbarrier|race|uninitialised", {}),
    "global_waw": ("global-memory race: WAW", {"grid": 4, "strict_global": True}),
    "global_raw": ("global-memory race: (RAW|WAR)", {"grid": 4, "strict_global": True}),
    "global_block": ("global-memory race: (RAW|WAR)", {"grid": 2, "strict_global": True}),
    "global_nc": ("ld.global.nc of memory", {"grid": 1, "strict_global": True}),
    "global_scope": ("global-memory race: WAW", {"grid": 2, "strict_global": True}),
    "global_add": ("global-memory race", {"grid": 3, "strict_global": True}),
    "global_fence": ("global-memory race: RAW", {"grid": 3, "strict_global": True}),
}


@pytest.fixture(scope="module")
def mod() -> Module:
    m = Module(compile_ptx(SOURCE))
    assert not m.unsupported
    assert set(m.kernels) == set(BUGS)
    return m


def launch(mod: Module, name: str, bug: int, order: int, **kw: Any) -> Any:
    grid = kw.pop("grid", 1)
    x, o = np.random.default_rng(0).normal(size=64).astype(np.float32), np.zeros(256 if grid > 1 else 64, np.float32)
    smem = kw.pop("smem", 0)
    return mod.launch(name, grid, 64, [x, o, 64, bug], smem=smem, order=order, **kw)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", BUGS)
def test_bug_is_found(mod: Module, name: str, order: int) -> None:
    message, options = BUGS[name]
    launch(mod, name, 0, order, **options)
    with pytest.raises(RuntimeError, match=message) as e:
        launch(mod, name, 1, order, **options)
    text = str(e.value)
    assert re.search(r"PTX line \d+ \[.*; \w+\.(cu|h|hpp|inl)\:\d+\]", text), text
    assert name in text
    assert re.search(r"block \d+: thread \d+|block \d+: deadlock", text)


def test_message_names_instruction_and_source(mod: Module) -> None:
    with pytest.raises(RuntimeError) as e:
        launch(mod, "oob_store", 1, 0)
    line = next(k for k, text in enumerate(SOURCE.read_text().split("\n"), 1) if "oob_store" in text)
    what = "oob_store: block 0: thread 63: out-of-bounds global store of 4 bytes"
    where = rf"PTX line \d+ \[st\.global\.f32 .*; bugs\.cu:{line}\]"
    assert re.fullmatch(f"{what}, {where}", str(e.value)), e.value


def test_neighbouring_and_overlapping_arguments(mod: Module) -> None:
    both = np.zeros(128, np.float32)  # an overrun of the first half does not hide in the second
    with pytest.raises(RuntimeError, match="out-of-bounds global store"):
        mod.launch("oob_store", 1, 64, [both[:64], both[64:], 64, 1])
    with pytest.raises(RuntimeError, match="out-of-bounds global store"):
        mod.launch("oob_store", 1, 64, [both[64:], both[:64], 64, 1])
    both[:] = np.arange(128)
    mod.launch("readonly", 1, 64, [both[1:65], both[:64], 64, 0], order=0)  # o[t] = x[t] on overlapping views
    assert (both[:64] == np.arange(1, 65)).all()
    assert (both[64:] == np.arange(64, 128)).all()
    with pytest.raises(RuntimeError, match="misaligned"):
        mod.launch("misaligned", 1, 64, [both[1:], both[:64].copy(), 64, 0])


def test_shuffles_order_memory_unless_strict(mod: Module) -> None:
    launch(mod, "race_shuffle", 1, 0)


def test_unsupported_instruction_is_listed_and_fails_when_executed() -> None:
    ptx = "\n".join(
        [
            ".version 8.0",
            ".target sm_90",
            ".address_size 64",
            ".visible .entry k(.param .u32 n)",
            "{",
            ".reg .pred %p<2>; .reg .b32 %r<3>;",
            "ld.param.u32 %r1, [n]; setp.eq.u32 %p1, %r1, 0; @%p1 bra E;",
            "frobnicate.u32 %r1, %r2;",
            "add.odd.u32 %r1, %r1, %r2;",
            "E: ret;",
            "}",
        ]
    )
    m = Module(ptx)
    assert [u[:3] for u in m.unsupported] == [("k", 8, "frobnicate.u32"), ("k", 9, "add.odd.u32")]
    m.launch("k", 1, 32, [0])
    with pytest.raises(RuntimeError, match="unsupported frobnicate"):
        m.launch("k", 1, 32, [1])


def test_wrong_launches_are_refused(mod: Module) -> None:
    with pytest.raises(TypeError, match="takes 4 arguments"):
        mod.launch("oob_load", 1, 64, [])
    with pytest.raises(ValueError, match="1024 threads"):
        mod.launch("oob_load", 1, 2048, [0, 0, 0, 0])
