"""Compiles the C++ that kernels are translated to; the shared libraries are cached by content.

The cache is the folder ptxsim-cache in the system's temporary directory, or $PTXSIM_CACHE. Any number of processes may
use it at once.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

INCLUDE = Path(__file__).parent / "include"
CACHE = Path(os.environ.get("PTXSIM_CACHE") or Path(tempfile.gettempdir()) / "ptxsim-cache")

_MAIN_HEADER = "ptxrt.h"
_HEADERS = (_MAIN_HEADER, "ptxmem.h", "simrt.h")
# -ffp-contract=off, -fwrapv, -fno-strict-aliasing: PTX rounds every operation, wraps integers and reinterprets memory.
# -fno-gnu-unique -fvisibility=hidden: each library has its own runtime and can be loaded beside others.
_CXX = [
    *os.environ.get("CXX", "g++").split(),
    *("-std=c++20", "-w", "-fPIC", "-mfma", "-mf16c", "-ffp-contract=off", "-fwrapv", "-fno-strict-aliasing"),
    *("-fno-gnu-unique", "-fvisibility=hidden", "-pthread"),
]


def digest(*parts: str | bytes) -> str:
    """Twenty hexadecimal digits that name a content."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:20]


def build(command: Sequence[str | os.PathLike[str]], out: Path) -> Path:
    """Runs a compiler command that writes `out`, unless it is there already.

    Raises:
        RuntimeError: the compiler failed; its messages are in it.
    """
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        # A folder of its own: compilers derive further file names from the output's, and others may be building it too.
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            result = Path(scratch) / out.name
            done = subprocess.run([*command, "-o", result], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
            os.replace(result, out)
    return out


def compile_cpp(code: str, flags: Sequence[str], cache: Path = CACHE) -> Path:
    """The shared library of a translated module; the headers are precompiled once for each set of flags."""
    command = [*_CXX, *flags]
    headers = digest(*((INCLUDE / name).read_text() for name in _HEADERS), *command)
    library = cache / f"{digest(code, headers)}.so"
    if not library.exists():
        precompiled = cache / f"include-{headers}"
        build([*command, "-x", "c++-header", INCLUDE / _MAIN_HEADER], precompiled / f"{_MAIN_HEADER}.gch")
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            source = Path(scratch) / "kernels.cpp"
            source.write_text(code)
            build([*command, "-shared", f"-I{precompiled}", f"-I{INCLUDE}", source], library)
    return library
