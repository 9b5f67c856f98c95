"""Do the tests notice a wrong kernel? Runs the kernels' own tests on mutants of their PTX, and prints who survived.

    python -m tests.gpu.mutate [--target N] [--kernels REGEX] [--mutants N] [--variants N] [--seconds N] [--seed N]
                               [PYTEST ARGUMENT ...]

Pytest's arguments choose the tests (`tests/gpu/test_cuda_*.py tests/gpu/test_triton_*.py` by default, without those
marked slow). Each runs once on the kernels as they are, which says what mutants it reaches; then those that reach a
mutant run on it until one fails. A mutant that no thread comes to, and one that outlives its time, count as survivors,
unless it is shown to compute the same: ptxas makes the kernel's own machine code of it, or the bits of its operands
allow nothing else.
It takes minutes a file, and fails where less than nine in ten of a kernel's mutants are killed.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from _pytest.runner import runtestprotocol

import tests.gpu.ptx.triton as ptx_triton
from tests.gpu import cuda_library, cuda_runs, simulate, triton_runs
from tests.gpu.equivalent import MachineCode
from tests.gpu.known_bits import KnownBits
from tests.gpu.mutants import Mutant, MutatedModule
from tests.gpu.ptx import Module

HERE = Path(__file__).parent
ENOUGH = 0.9  # of a kernel's mutants


def readable(kernel: str) -> str:
    """A kernel's name with its template arguments, as the source has it."""
    name = subprocess.run(["c++filt", "-p", kernel], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"ddpm_fast::cuda::|\(\w+\)", "", name)


def family_of(kernel: str) -> str:
    """The kernel without its template arguments."""
    return kernel.partition("<")[0]


@contextlib.contextmanager
def one_schedule() -> Iterator[None]:
    """Inside the block, tests that run a kernel under several schedules run it under the first."""
    with contextlib.ExitStack() as stack:
        for runs in (cuda_runs, triton_runs):
            stack.enter_context(mock.patch.object(runs, "SCHEDULES", triton_runs.SCHEDULES[:1]))
        yield


@dataclass
class Trial:
    """A test: how long it takes, what mutants it reaches, and what it did to those that it ran on."""

    item: pytest.Item
    seconds: float
    reached: dict[MutatedModule, frozenset[int]]
    tried: Counter[MutatedModule] = field(default_factory=Counter)
    killed: Counter[MutatedModule] = field(default_factory=Counter)

    def failure(self) -> str:
        """Runs the test; how it failed, nothing if it passed."""
        reports = runtestprotocol(self.item, log=False, nextitem=None)
        return "\n".join(report.longreprtext or report.outcome for report in reports if not report.passed)

    def kills(self, module: MutatedModule) -> bool:
        """Whether it fails on the mutant of a module that is alive."""
        killed = bool(self.failure())
        self.tried[module] += 1
        self.killed[module] += killed
        return killed

    def promise(self, module: MutatedModule) -> float:
        """How many mutants of a module it may kill in a second."""
        return (self.killed[module] + 1) / (self.tried[module] + 2) / self.seconds


@dataclass
class Result:
    """What became of the mutants of one compiled kernel."""

    kernel: str
    possible: int
    killed: int = 0
    survivors: list[Mutant] = field(default_factory=list)  # that a thread came to
    unreached: list[Mutant] = field(default_factory=list)
    equivalent: int = 0

    @property
    def tried(self) -> int:
        return self.killed + len(self.survivors) + len(self.unreached) + self.equivalent

    def told(self) -> list[str]:
        """A line for each survivor."""
        survived = [f"    survived: {mutant}" for mutant in self.survivors]
        return survived + [f"    not reached: {mutant}" for mutant in self.unreached]


@dataclass
class Mutation:
    """The pytest plugin that runs the collected tests on mutants.

    target: the architecture that all tests run on, since many mutants of one kernel tell more than the same ones of
    three; kernels: those that have mutants, a regular expression; mutants: of a compiled kernel, drawn by `seed`;
    variants: compiled kernels of one source that have mutants; seconds: of the processor's time that the tests have for
    a mutant.
    """

    target: int
    kernels: str
    mutants: int
    variants: int
    seconds: float
    seed: int
    results: list[Result] = field(default_factory=list)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise pytest.UsageError("not all tests could be collected")
        with self._mutated() as modules:
            trials = [trial for item in session.items if (trial := self._trial(item, modules)).reached]
            for module in modules:
                self.results.append(result := self._result(module, trials))
                print(row(module.name, [result]), *result.told(), sep="\n", file=sys.stderr, flush=True)
        return True

    @contextlib.contextmanager
    def _mutated(self) -> Iterator[list[MutatedModule]]:
        """Kernels that are translated inside the block have mutants; yields them as they come."""
        made: list[MutatedModule] = []

        def module(ptx: str, only: str = "", **_: object) -> Module:
            (kernel,) = [name for name in re.findall(r"\.entry\s+([\w$]+)", ptx) if re.search(only, name)]
            name = readable(kernel)
            variants = [family_of(other.name) for other in made].count(family_of(name))
            if variants == self.variants or not re.search(self.kernels, name):
                return Module(ptx, only=only)
            made.append(MutatedModule(ptx, kernel, self.mutants, self.seed, name=name))
            return made[-1]

        on_any_target = simulate.backend

        def backend(name: str, target: int = 0, **options: Any) -> Any:
            return on_any_target(name, self.target, **options)

        with (
            mock.patch.object(simulate, "backend", backend),
            mock.patch.object(cuda_library, "Module", module),
            mock.patch.object(ptx_triton, "Module", module),
            mock.patch.object(cuda_library.CudaLibrary, "modules", {}),
            mock.patch.dict(ptx_triton.MODULES, clear=True),
        ):
            yield made

    def _trial(self, item: pytest.Item, modules: list[MutatedModule]) -> Trial:
        """Runs a test on the kernels as they are. One that fails, as it counts on its architecture, reaches nothing."""
        trial = Trial(item, 0.0, {})
        for module in modules:
            module.forget_reached()
        start, known = time.process_time(), len(modules)
        with one_schedule():
            if failure := trial.failure():
                print(f"left out: {item.nodeid}: {failure}", file=sys.stderr, flush=True)
                return trial
            if len(modules) > known:  # most of the time went into compiling
                start = time.process_time()
                trial.failure()
        trial.seconds = time.process_time() - start
        trial.reached = {module: reached for module in modules if (reached := module.reached())}
        return trial

    def _result(self, module: MutatedModule, trials: list[Trial]) -> Result:
        result = Result(module.name, module.possible)
        ((name, kernel),) = module.kernels.items()
        known_bits, machine_code = KnownBits(kernel), MachineCode(module.parsed.lines, name)
        for number, mutant in module.mutants.items():
            able = [trial for trial in trials if number in trial.reached.get(module, ())]
            module.alive = number
            if able and self._is_killed(module, able):
                result.killed += 1
            elif known_bits.is_same(mutant) or machine_code.is_same(mutant):
                result.equivalent += 1
            elif not able:
                result.unreached.append(mutant)
            else:
                result.survivors.append(mutant)
        module.alive = None
        return result

    def _is_killed(self, module: MutatedModule, trials: list[Trial]) -> bool:
        """Whether a test fails: each with one schedule at first, then those that have more with all of them."""
        trials = sorted(trials, key=lambda trial: trial.promise(module), reverse=True)
        with one_schedule():
            if self._one_kills(module, trials):
                return True
        return self._one_kills(module, (t for t in trials if hasattr(t.item.module, "under_every_schedule")))  # type: ignore[attr-defined]

    def _one_kills(self, module: MutatedModule, trials: Iterable[Trial]) -> bool:
        start = time.process_time()
        return any(trial.kills(module) for trial in trials if time.process_time() - start < self.seconds)


def share(results: list[Result]) -> float:
    """Of the mutants that were tried and change something, how many were killed."""
    return sum(r.killed for r in results) / max(sum(r.tried - r.equivalent for r in results), 1)


def row(kernel: str, results: list[Result]) -> str:
    """A line of the table."""
    counts = [(r.possible, r.tried, r.equivalent, len(r.unreached), r.killed) for r in results]
    sums = [sum(numbers) for numbers in zip(*counts, strict=True)]
    return f"| `{kernel}` | {' | '.join(map(str, [len(results), *sums]))} | {share(results):.0%} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.mutate", description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=int, default=90, help="the architecture, 90 for sm_90")
    parser.add_argument("--kernels", default="", help="a regular expression: the kernels that have mutants")
    parser.add_argument("--mutants", type=int, default=30, help="the most mutants of a compiled kernel")
    parser.add_argument("--variants", type=int, default=4, help="the most compiled variants of a kernel with mutants")
    parser.add_argument("--seconds", type=float, default=10, help="how long tests run on a mutant")
    parser.add_argument("--seed", type=int, default=0, help="of the sample of mutants")
    options, chosen = parser.parse_known_args(arguments)
    torch.set_num_threads(1)
    files = [str(path) for backend in ("cuda", "triton") for path in sorted(HERE.glob(f"test_{backend}_*.py"))]
    plugin = Mutation(options.target, options.kernels, options.mutants, options.variants, options.seconds, options.seed)
    chosen = chosen or files
    if failed := pytest.main([*chosen, "-q", "-s", "--tb=line", "-p", "no:cacheprovider"], plugins=[plugin]):
        return int(failed)
    kernels: dict[str, list[Result]] = {}
    for result in plugin.results:
        kernels.setdefault(family_of(result.kernel), []).append(result)
    print("| kernel | compiled variants | mutants | tried | equivalent | not reached | killed | share |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for kernel, results in kernels.items():
        print(row(kernel, results))
    return 0 if min(map(share, kernels.values())) >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
