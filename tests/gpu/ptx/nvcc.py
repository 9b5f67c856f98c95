"""CUDA C++ -> PTX and cubin with nvcc, the one on PATH or else the one that pip installs; cached by content."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from .build import CACHE


@cache
def nvcc() -> tuple[str, ...]:
    """The command that starts nvcc."""
    if found := shutil.which("nvcc"):
        return (found,)
    for folder in getattr(importlib.util.find_spec("nvidia"), "submodule_search_locations", None) or ():
        for path in sorted(Path(folder).glob("*/bin/nvcc")):
            return (str(path),)
    raise FileNotFoundError("no nvcc on PATH, and nvidia-cuda-nvcc is not installed (pip install 'ddpm_fast[test]')")


@cache
def version() -> str:
    """What nvcc says about itself."""
    return subprocess.run([*nvcc(), "--version"], check=True, capture_output=True, text=True).stdout


def _compile(source: str | os.PathLike[str], flags: Sequence[str], suffix: str) -> Path:
    """Runs nvcc unless the same preprocessed source was compiled with the same flags before."""
    flags = ["-std=c++17", "-O3", *flags]
    preprocessed = subprocess.run([*nvcc(), *flags, "-E", os.fspath(source)], check=True, capture_output=True).stdout
    digest = hashlib.sha256(preprocessed + " ".join(flags).encode() + version().encode()).hexdigest()[:20]
    out = CACHE / f"nvcc-{digest}.{suffix}"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = out.with_name(f"{out.stem}.{os.getpid()}.tmp.{suffix}")
        done = subprocess.run([*nvcc(), *flags, f"-{suffix}", "-o", scratch, source], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed on {source}:\n{done.stdout}{done.stderr}")
        os.replace(scratch, out)
    return out


def compile_ptx(source: str | os.PathLike[str], arch: int = 90, flags: Sequence[str] = ()) -> str:
    """PTX of a .cu file for sm_<arch>, with line information; further flags go to nvcc."""
    return _compile(source, ["-lineinfo", f"-arch=sm_{arch}", *flags], "ptx").read_text()


def compile_cubin(source: str | os.PathLike[str], arch: int = 90, flags: Sequence[str] = ()) -> Path:
    """The cubin of a .cu file for sm_<arch>."""
    return _compile(source, [f"-arch=sm_{arch}", *flags], "cubin")
