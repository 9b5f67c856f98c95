"""Mutants that change nothing: ptxas makes the same machine code of them as of the kernel.

What computes the same may compile to the same: a result that nobody reads, a sum with what is always zero, a sign that
a value cannot have. An optimiser that is right never makes one program of two that differ, so that such a
mutant is none, whatever the tests are (Papadakis et al. 2015, Trivial Compiler Equivalence). The reverse does not hold:
most mutants that compute the same compile to something else, and count.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import triton

from tests.gpu.mutants import Mutant, text_of

# The newest there is: it reads the PTX of nvcc and of Triton, for every architecture.
_PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"
_ENTRY = re.compile(r"\s*(?:\.\w+\s+)*\.entry\s+([\w$]+)")


class MachineCode:
    """What ptxas makes of one kernel of a PTX text, and of the kernel's mutants."""

    def __init__(self, lines: Sequence[str], kernel: str) -> None:
        """lines: the text's; those of other kernels are left out."""
        ptx = "\n".join(lines)
        text = re.sub(r"^[ \t]*\.section[^{]*\{.*?\}", lambda m: "\n" * m[0].count("\n"), ptx, flags=re.S | re.M)
        self._lines = [re.sub(r"//.*|^\s*\.(loc|file)\b.*", "", line) for line in text.split("\n")]
        other = False  # inside another kernel, which is left out
        for k, line in enumerate(self._lines):
            if m := _ENTRY.match(line):
                other = m[1] != kernel
            if other:
                self._lines[k] = ""
                other = not line.startswith("}")
        self._target = re.search(r"^\.target\s+(\w+)", ptx, flags=re.M)[1]  # type: ignore[index]

    def is_same(self, mutant: Mutant) -> bool:
        """Whether it compiles to the kernel's machine code. One that ptxas refuses does not."""
        line = self._lines[mutant.line - 1]
        if _letters(line) != _letters(f"{text_of(mutant.before)};"):  # the instruction is not alone on its line
            return False
        changed = f"{text_of(mutant.after)};" if mutant.after else ""
        code = self._compiled([*self._lines[: mutant.line - 1], changed, *self._lines[mutant.line :]])
        return code is not None and code == self._original

    @cached_property
    def _original(self) -> bytes:
        code = self._compiled(self._lines)
        if code is None:
            raise RuntimeError("ptxas refuses the kernel itself")
        return code

    def _compiled(self, lines: list[str]) -> bytes | None:
        with tempfile.TemporaryDirectory() as folder:
            source, out = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
            source.write_text("\n".join(lines))
            done = subprocess.run([_PTXAS, f"-arch={self._target}", source, "-o", out], capture_output=True)
            return out.read_bytes() if done.returncode == 0 else None


def _letters(text: str) -> str:
    return re.sub(r"\s", "", text)
