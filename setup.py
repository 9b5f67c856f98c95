"""Builds the CPU extension: LibTorch Stable ABI, limited Python API, one file for every Python and torch to come.

DDPM_FAST_GENERIC=1   compiles the portable path alone, the one that other architectures take.
DDPM_FAST_NO_EXTENSION=1   installs without the extension: everything then runs on the reference backend.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

ABI_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# -ffp-contract=off: the noise and step kernels promise bits, and g++ contracts even intrinsics into FMA.
# -g0: Python's own flags ask for debugging information, nine tenths of the file's size.
# -fno-math-errno lets sqrt be one instruction; nothing reads errno.
# -Wno-(maybe-)uninitialized: g++ 12 warns about its own AVX-512 headers.
CXX_FLAGS = [
    "-O3",
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-g0",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]


def failed(reason: object) -> None:
    print(
        f"\nddpm_fast: the CPU extension was not built ({reason}).\n"
        "The package is installed all the same and runs on its reference backend, which is slower.\n"
        "To get the kernels: install a C++17 compiler (Debian: apt-get install g++) and reinstall ddpm_fast.\n",
        file=sys.stderr,
    )


def extension() -> dict[str, object]:
    if os.environ.get("DDPM_FAST_NO_EXTENSION") == "1":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        failed(error)
        return {}

    class OptionalBuild(BuildExtension):
        """A failing compiler costs the speed, never the installation."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                failed(error)

    generic = ["-DDDPM_FAST_GENERIC"] if os.environ.get("DDPM_FAST_GENERIC") == "1" else []
    sources = ["csrc/ops.cpp", *sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))]
    module = CppExtension(
        "ddpm_fast._C",
        sources,
        include_dirs=[str(Path("csrc/include").resolve()), str(Path("csrc").resolve())],
        depends=[str(p) for p in Path("csrc").rglob("*.h")],
        extra_compile_args=[*ABI_FLAGS, *CXX_FLAGS, *generic],
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
