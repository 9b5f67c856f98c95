"""Options, fixtures and the table at the end of `pytest benchmarks/ --benchmark-only`."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, report
from benchmarks.harness import Case

_ROWS = pytest.StashKey[list[report.Row]]()
_MACHINE = pytest.StashKey[dict[str, str]]()

# The files that measure an op wherever its inputs are; the others measure the CPU.
_ON_ANY_DEVICE = {f"bench_{op}" for op in ("random", "noising", "denoise", "norm_act", "rms_norm_act")}


def _thread_counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ddpm_fast benchmarks")
    group.addoption("--quick", action="store_true", help="a few rounds of each case: only shows that they run")
    group.addoption(
        "--threads",
        type=_thread_counts,
        default=[torch.get_num_threads()],
        metavar="N[,N]",
        help="numbers of threads to measure with (default: what torch uses)",
    )
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where the ops are measured")
    group.addoption("--compiled", action="store_true", help="also measure whole networks through torch.compile")
    group.addoption("--csv", type=Path, metavar="FILE", help="also write the rows to a CSV file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    config.stash[_MACHINE] = report.machine()
    if config.getoption("--device") == "cuda" and torch.cuda.is_available():
        torch.set_default_device("cuda")  # before the files are imported, whose tables are made then
        config.stash[_MACHINE]["GPU"] = torch.cuda.get_device_name()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") != "cuda":
        return
    for item in items:
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="--device cuda: torch finds no GPU"))
        elif item.path.stem not in _ON_ANY_DEVICE:
            item.add_marker(pytest.mark.skip(reason="--device cuda: this measures the CPU"))
        else:
            item.add_marker(pytest.mark.benchmark(timer=harness.Moment))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "threads" in metafunc.fixturenames:
        counts = metafunc.config.getoption("--threads")
        metafunc.parametrize("threads", counts, ids=[f"{n}t" for n in counts], indirect=True)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any, threads: int, quick: bool) -> Callable[[Case], None]:
    """Checks and times a case, and adds it to the table."""
    budget = harness.QUICK if quick else harness.Budget()
    rows = request.config.stash[_ROWS]
    on_gpu = request.config.getoption("--device") == "cuda"

    def run(case: Case) -> None:
        rows.append({})
        if on_gpu:
            harness.measure(case, benchmark, budget, rows[-1], harness.Moment, harness.gpu_flush())
        else:
            harness.measure(case, benchmark, budget, rows[-1])

    return run


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["ddpm_fast"] = config.stash[_MACHINE]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if not rows:
        return
    terminalreporter.section("ddpm_fast")
    terminalreporter.write_line(report.render(rows, config.stash[_MACHINE]))
    path = config.getoption("--csv")
    if path is not None:
        _write_csv(path, rows)


def _write_csv(path: Path, rows: list[report.Row]) -> None:
    """A line for each contestant of each row."""
    fields = [
        "what",
        "note",
        "shape",
        "layout",
        "dtype",
        "threads",
        "contestant",
        "p20",
        "p50",
        "p80",
        "ratio",
        "error",
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            shape = "x".join(map(str, row["shape"]))
            for name, times in row.get("times", {}).items():
                writer.writerow({**row, "shape": shape, "contestant": name, **times})
