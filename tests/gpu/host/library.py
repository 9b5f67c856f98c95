"""Builds the CUDA extension's sources for the host under a sanitizer, and says how to start Python with it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch.utils import cpp_extension

from tests.gpu import cuda_library
from tests.gpu.cuda_library import CSRC, FakeLaunch
from tests.gpu.host.translate import translate_folder
from tests.gpu.ptx import nvcc
from tests.gpu.ptx.build import CACHE, digest

FOLDER = Path(__file__).parent

# By name: g++'s options, and the runtime that a program without them, which Python is, must load first.
SANITIZERS = {
    "address": (("-fsanitize=address", "-fsanitize=undefined"), "libasan.so"),
    "thread": (("-fsanitize=thread",), "libtsan.so"),
}

# -fno-strict-aliasing: nvcc lets a device's code read floats as words.
_FLAGS = ("-O1", "-g", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-omit-frame-pointer", "-fPIC", "-Wall")
# nvcc's pragmas, and arrays that are written where the constant of a template says so.
_QUIET = ("-Wno-unknown-pragmas", "-Wno-maybe-uninitialized")


def _compile(source: Path, out: Path, options: Sequence[str], includes: Sequence[Path]) -> Path:
    """nvcc hands C++ on to g++, and knows where its own headers are."""
    host = ",".join([*_FLAGS, *_QUIET, *options, "-fno-sanitize-recover=all"])
    cuda_library.run(
        [
            *(*nvcc.nvcc(), "-std=c++20", f"-Xcompiler={host}", *(f"-I{path}" for path in includes)),
            *("-include", FOLDER / "shim.h", "-c", source, "-o", out),
        ]
    )
    return out


def build(device_sources: Path, host_sources: Sequence[Path], sanitizer: str) -> Path:
    """The shared library of a folder of CUDA sources and of C++ files beside them; built once for a content."""
    ours = [path for path in sorted(FOLDER.rglob("*")) if path.suffix in (".h", ".cpp", ".py")]
    theirs = [path for path in sorted(CSRC.rglob("*")) if path.is_file() and path.parent.name != "cpu"]
    files = [*ours, *theirs, *sorted(device_sources.iterdir()), cuda_library.RUNTIME]
    key = digest(*(path.read_bytes() for path in files if path.is_file()), str(device_sources), nvcc.version(),
                 torch.__version__, sanitizer)  # fmt: skip
    library = CACHE / f"host-{key}.so"
    if library.exists():
        return library
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        scratch = Path(folder)
        # The same name as in csrc, for the sources' own #include; behind it the rest of csrc.
        translated = translate_folder(device_sources, scratch / "translated" / "cuda")
        includes = [FOLDER / "include", FOLDER, scratch / "translated", CSRC / "include", CSRC]
        options, _ = SANITIZERS[sanitizer]
        jobs = [
            pool.submit(_compile, path, scratch / f"{path.name}.o", () if path.name == "run.cpp" else options, includes)
            for path in (*translated, FOLDER / "run.cpp")
        ]
        host_jobs = [pool.submit(cuda_library.compile_host, path, scratch) for path in host_sources]
        host_jobs.append(pool.submit(cuda_library.compile_runtime, scratch))
        objects = [job.result() for job in jobs] + [path for job in host_jobs for path in job.result()]
        torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
        linked: list[str | Path] = [*cuda_library.CXX, *options, "-shared", *objects, *torch_libraries, "-ldl"]
        cuda_library.run([*linked, "-o", scratch / "library.so"])
        os.replace(scratch / "library.so", library)
    return library


def environment(sanitizer: str) -> dict[str, str]:
    """What a process needs that loads a library of `build`: it ends at the first report."""
    _, runtime = SANITIZERS[sanitizer]
    found = subprocess.run(
        [*cuda_library.CXX, f"-print-file-name={runtime}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    return {
        **os.environ,
        "LD_PRELOAD": found,
        # Python keeps objects until the end, which are no leaks of ours.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # What torch does in its own threads is not seen, for want of its barriers.
        "TSAN_OPTIONS": "halt_on_error=1,ignore_noninstrumented_modules=1",
        "OMP_NUM_THREADS": "1",
    }


def fixed_addresses() -> list[str]:
    """The command in front of Python's: ThreadSanitizer's memory must lie where it expects it."""
    return ["setarch", "--addr-no-randomize"] if shutil.which("setarch") else []


class HostLibrary(cuda_library.CudaLibrary):
    """The loaded library, in place of the one whose kernels are PTX."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._callback = None

    def run(self, launch: FakeLaunch) -> int:
        """Runs the kernel that the host code has just launched."""
        self._library.host_run(launch.grid, launch.block, launch.cluster, ctypes.c_uint64(launch.shared))
        return 0

    def launch_bug(self, bug: int, out: torch.Tensor) -> None:
        """Launches one of bugs/bugs.cu, in its library."""
        self._library.launch(bug, ctypes.c_void_p(out.data_ptr()))


@cache
def extension(sanitizer: str) -> Path:
    """The library of csrc/cuda, with the operators."""
    _, host_sources = cuda_library.sources()
    return build(CSRC / "cuda", host_sources, sanitizer)
