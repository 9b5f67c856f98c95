"""Builds the extensions: LibTorch Stable ABI, limited Python API, one file for every Python and torch to come.

ddpm_fast._C holds the CPU kernels. ddpm_fast._cuda holds the CUDA kernels and is built where nvcc is, with any torch
and with or without a GPU; it is loaded under a torch with CUDA alone.

DDPM_FAST_GENERIC=1   compiles the portable path of the CPU kernels alone, the one that other architectures take.
DDPM_FAST_NO_EXTENSION=1   installs without any extension: everything then runs on the reference and Triton backends.
DDPM_FAST_CUDA=0   leaves the CUDA extension out; =1 makes it an error that it cannot be built, and takes the nvcc that
pip installs where there is no other.
DDPM_FAST_CUDA_ARCHS="80 90"   the architectures to compile for, instead of all that nvcc knows of the usual ones.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup

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
INCLUDES = [str(Path("csrc/include").resolve()), str(Path("csrc").resolve())]
HEADERS = [str(path) for suffix in ("*.h", "*.cuh") for path in sorted(Path("csrc").rglob(suffix))]
# What both extensions read tensors with.
COMMON = ["csrc/arguments.cpp", "csrc/image.cpp"]

# Turing, Ampere, Ada, Hopper, Blackwell; and PTX of the last, for what comes.
CUDA_ARCHS = ("75", "80", "86", "89", "90", "100", "120")
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def failed(name: str, reason: object, consequence: str, remedy: str) -> None:
    print(
        f"\nddpm_fast: the {name} extension was not built ({reason}).\n"
        f"The package is installed all the same and {consequence}.\n"
        f"To get the kernels: {remedy} and reinstall ddpm_fast.\n",
        file=sys.stderr,
    )


def cpu_failed(reason: object) -> None:
    failed(
        "CPU",
        reason,
        "runs on its reference backend, which is slower",
        "install a C++17 compiler (Debian: apt-get install g++)",
    )


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


def find_pip_nvcc() -> str | None:
    """The nvcc of the package nvidia-cuda-nvcc, which an isolated build does not see."""
    for folder in getattr(importlib.util.find_spec("nvidia"), "submodule_search_locations", None) or ():
        for path in sorted(Path(folder).glob("*/bin/nvcc")):
            return str(path)
    return None


def cuda_architectures(nvcc: str) -> list[str]:
    """nvcc's options for the architectures asked for, or those of the usual ones that it knows."""
    asked = re.split(r"[ ,;]+", os.environ.get("DDPM_FAST_CUDA_ARCHS", "").strip())
    if asked == [""]:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
        asked = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in listed.split()]
    if not asked or not all(re.fullmatch(r"\d+[a-z]?", arch) for arch in asked):
        raise ValueError(f"DDPM_FAST_CUDA_ARCHS must be numbers such as '80 90', not {asked}")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in asked]
    return [*codes, f"-gencode=arch=compute_{asked[-1]},code=compute_{asked[-1]}"]


def compile_cuda(nvcc: str, folder: Path) -> list[str]:
    """Compiles csrc/cuda/*.cu into object files in a folder, those that are out of date."""
    flags = [*NVCC_FLAGS, *cuda_architectures(nvcc), *(f"-I{path}" for path in INCLUDES)]
    sources = sorted(Path("csrc/cuda").glob("*.cu"))
    folder.mkdir(parents=True, exist_ok=True)
    # The objects of another choice of architectures are not these.
    stamp = folder / "cuda-flags.txt"
    same_flags = stamp.is_file() and stamp.read_text() == " ".join(flags)
    newest_header = max(Path(header).stat().st_mtime for header in HEADERS)

    def compile_one(source: Path) -> str:
        out = folder / f"{source.stem}.cu.o"
        newest = max(source.stat().st_mtime, newest_header)
        if not (same_flags and out.is_file() and out.stat().st_mtime > newest):
            done = subprocess.run([nvcc, *flags, "-c", str(source), "-o", str(out)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"nvcc failed on {source}:\n{done.stdout}{done.stderr}")
        return str(out)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, sources))
    stamp.write_text(" ".join(flags))
    return objects


def cuda_runtime(nvcc: str) -> list[str]:
    """The linker's options for nvcc's static runtime; none where it has none: torch brings a shared one."""
    told = subprocess.run([nvcc, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    for folder in re.findall(r'-L([^"\s]+)', told):
        if (Path(folder) / "libcudart_static.a").is_file():
            return [f"-L{folder}", "-lcudart_static", "-ldl", "-lpthread", "-lrt"]
    return []


def extensions() -> dict[str, object]:
    if os.environ.get("DDPM_FAST_NO_EXTENSION") == "1":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        cpu_failed(error)
        return {}

    wish = os.environ.get("DDPM_FAST_CUDA", "")
    nvcc = None if wish == "0" else find_nvcc()
    # An installation does not take minutes longer because something else has brought pip's nvcc along.
    if wish == "1" and nvcc is None and (nvcc := find_pip_nvcc()) is None:
        raise RuntimeError(
            "DDPM_FAST_CUDA=1, and there is no nvcc on the path. Put CUDA's there, or "
            "`pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-runtime==13.0.*' "
            "'nvidia-cuda-cccl==13.0.*' 'nvidia-nvvm==13.0.*'` and build with --no-build-isolation"
        )

    class OptionalBuild(BuildExtension):
        """A failing compiler costs the speed, never the installation."""

        def run(self) -> None:
            built: list[Extension] = []
            compiler = self.compiler  # its name, which a run replaces by an object
            for module in list(self.extensions):
                self.extensions, self.compiler = [module], compiler
                try:
                    if nvcc is not None and module.name == "ddpm_fast._cuda":
                        module.extra_objects = compile_cuda(nvcc, Path(self.build_temp))
                        module.extra_link_args += cuda_runtime(nvcc)
                    super().run()
                    built.append(module)
                except Exception as error:
                    if module.name == "ddpm_fast._C":
                        cpu_failed(error)
                    elif wish == "1":
                        raise
                    else:
                        failed(
                            "CUDA", error, "its other backends work", f"see that {nvcc} works, or set DDPM_FAST_CUDA=0"
                        )
            self.extensions = built

    def module(name: str, sources: list[str], flags: list[str], link: list[str]) -> Extension:
        return CppExtension(
            name,
            sources,
            include_dirs=INCLUDES,
            depends=HEADERS,
            extra_compile_args=[*ABI_FLAGS, *CXX_FLAGS, *flags],
            extra_link_args=link,
            py_limited_api=True,
        )

    generic = ["-DDDPM_FAST_GENERIC"] if os.environ.get("DDPM_FAST_GENERIC") == "1" else []
    modules = [module("ddpm_fast._C", ["csrc/ops.cpp", *COMMON, *files("csrc/cpu")], generic, [])]
    if nvcc is not None:
        # What torch's CUDA library defines is found through libtorch, which nothing else here needs.
        link = ["-Wl,--no-as-needed", "-ltorch"]
        modules.append(module("ddpm_fast._cuda", ["csrc/ops_cuda.cpp", *COMMON, *files("csrc/cuda")], [], link))
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def files(folder: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).glob("*.cpp"))


setup(**extensions())
