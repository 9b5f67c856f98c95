"""Do the tests notice a wrong kernel? Runs compact cases on mutants of each kernel's PTX, and prints who survived.

    python -m tests.gpu.mutate [--mutants N] [--seed N] [--verbose] [CASE ...]

A mutant is killed when a case's result is wrong or when the simulator finds an error. A case runs threads forward with
the checks of global memory, and what survives that also backward and in random order. It takes minutes a case.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch

import tests.gpu.ptx.triton as ptx_triton
from tests.gpu import cuda_library, simulate
from tests.gpu.mutants import Mutant, MutatedModule
from tests.gpu.mutation_cases import CASES, Call
from tests.gpu.ptx import Module

TARGET = 90
# A mutant may loop for ever; no kernel of a case executes as many instructions as this.
MOST_INSTRUCTIONS = 1 << 24
SCHEDULES = ({"order": 0, "strict_global": True}, {"order": 1}, {"order": 2, "seed": 1})


@dataclass
class Result:
    """What became of a kernel's mutants."""

    case: str
    kernel: str
    possible: int
    killed: int = 0
    unreached: int = 0  # of the survivors: no thread came to their instruction
    survivors: list[Mutant] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    @property
    def tried(self) -> int:
        return self.killed + len(self.survivors)


def passes(call: Call, backend: str) -> bool:
    """Whether a call gives what it must, and the simulator finds nothing, under every schedule."""
    for schedule in SCHEDULES:
        with simulate.backend(backend, TARGET, processors=1, max_instr=MOST_INSTRUCTIONS, **schedule):
            try:
                call.check()
            except (AssertionError, RuntimeError):
                return False
    return True


@contextlib.contextmanager
def mutated_modules(most: int, seed: int) -> Iterator[list[MutatedModule]]:
    """Kernels that are translated inside the block have mutants; yields them as they come."""
    made: list[MutatedModule] = []

    def module(ptx: str, only: str = "", **_: object) -> Module:
        (kernel,) = [name for name in re.findall(r"\.entry\s+([\w$]+)", ptx) if re.search(only, name)]
        made.append(MutatedModule(ptx, kernel, most, seed))
        return made[-1]

    with (
        mock.patch.object(cuda_library, "Module", module),
        mock.patch.object(ptx_triton, "Module", module),
        mock.patch.object(cuda_library.CudaLibrary, "modules", {}),
        mock.patch.dict(ptx_triton.MODULES, clear=True),
    ):
        yield made


def run_case(name: str, most: int, seed: int) -> Iterator[Result]:
    """Tries the mutants of every kernel that a case's calls launch."""
    backend, calls = CASES[name]
    with mutated_modules(most, seed) as modules:
        users: dict[MutatedModule, list[Call]] = {}
        for call in calls:
            before = {module: module.launches for module in modules}
            if not passes(call, backend):
                raise RuntimeError(f"{name} fails on the kernels as they are")
            for module in modules:
                if module.launches > before.get(module, 0):
                    users.setdefault(module, []).append(call)
        for module, callers in users.items():
            (kernel,) = module.kernels
            result = Result(name, kernel, module.possible)
            for number, mutant in module.mutants.items():
                module.alive = number
                result.kinds[mutant.kind] += 1
                if all(passes(call, backend) for call in callers):
                    result.survivors.append(mutant)
                    result.unreached += not module.reached
                else:
                    result.killed += 1
            module.alive = None
            yield result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.mutate", description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--mutants", type=int, default=100, help="the most mutants of a kernel")
    parser.add_argument("--seed", type=int, default=0, help="of the sample of mutants")
    parser.add_argument("--verbose", action="store_true", help="print the survivors")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    torch.set_num_threads(1)
    print("| case | kernel | mutants | tried | not reached | killed | killed of those reached |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    worst = 1.0
    for name in options.cases or CASES:
        start = time.process_time()
        for r in run_case(name, options.mutants, options.seed):
            share = r.killed / max(r.tried - r.unreached, 1)
            worst = min(worst, share)
            numbers = (r.possible, r.tried, r.unreached, r.killed, f"{share:.0%}")
            print(f"| {r.case} | `{r.kernel}` | {' | '.join(map(str, numbers))} |", flush=True)
            if options.verbose:
                print(*(f"    survived: {mutant}" for mutant in r.survivors), sep="\n", file=sys.stderr, flush=True)
        print(f"{name}: {time.process_time() - start:.0f} s", file=sys.stderr)
    return 0 if worst >= 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
