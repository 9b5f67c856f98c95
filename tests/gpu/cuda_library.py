"""The CUDA extension for a machine without a GPU: the shipped sources, linked with a runtime of ours.

nvcc compiles csrc/cuda/*.cu as for a release, host code and PTX; the host code is linked with fake_cuda/runtime.cpp
instead of NVIDIA's runtime and with the registration in csrc/ops_cuda.cpp. So the operators, the checks and the launch
functions are those that ship, and each launch comes out at a callback with the kernel's name and the bytes of its
parameters.
"""

from __future__ import annotations

import ast
import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch.utils import cpp_extension

from tests.gpu.ptx import Module, nvcc
from tests.gpu.ptx.build import CACHE, digest
from tests.gpu.ptx.devices import Device

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
ARCHITECTURES = (80, 90, 120)
RUNTIME = Path(__file__).parent / "fake_cuda" / "runtime.cpp"

CXX = os.environ.get("CXX", "g++").split()
HOST_SOURCES = ("ops_cuda.cpp", "arguments.cpp", "image.cpp", "cuda/*.cpp")


def _setting(name: str) -> list[str]:
    """A constant of setup.py: what the extension is compiled with."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in statement.targets
        ):
            return list(ast.literal_eval(statement.value))
    raise LookupError(f"setup.py has no {name}")


_INCLUDES = (f"-I{CSRC / 'include'}", f"-I{CSRC}")
NVCC_FLAGS = (*_setting("NVCC_FLAGS"), "-lineinfo")
# The host's code is quick to compile rather than to run.
HOST_FLAGS = (*_setting("ABI_FLAGS"), *_setting("CXX_FLAGS"), "-O0", "-fPIC")


class FakeLaunch(ctypes.Structure):
    """struct Launch of fake_cuda/runtime.cpp"""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        *((name, ctypes.c_uint32 * 3) for name in ("grid", "block", "cluster")),
        ("shared", ctypes.c_uint64),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
    )


class _FakeDevice(ctypes.Structure):
    """struct Device of fake_cuda/runtime.cpp"""

    _fields_ = tuple(
        (name, ctypes.c_int)
        for name in ("major", "minor", "processors", "shared_optin", "shared_processor", "threads_processor")
    )


LaunchCallback = Callable[[FakeLaunch], int]
_callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(FakeLaunch))


def run(command: Sequence[str | os.PathLike[str]]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")


def _compile_device(source: Path, folder: Path, architectures: Sequence[int]) -> list[Path]:
    """Compiles a .cu file into folder: the host's object file, which is returned, and NAME.<architecture>.ptx."""
    kept = folder / f"{source.stem}-kept"
    kept.mkdir()
    targets = [f"-gencode=arch=compute_{a},code=compute_{a}" for a in architectures]
    out = folder / f"{source.stem}.o"
    keep = ["--keep", f"--keep-dir={kept}"]
    run([*nvcc.nvcc(), *NVCC_FLAGS, *targets, *_INCLUDES, *keep, "-c", source, "-o", out])
    for architecture in architectures:
        # nvcc names the file after the architecture only where there are several.
        name = f"{source.stem}.compute_{architecture}.ptx" if len(architectures) > 1 else f"{source.stem}.ptx"
        os.replace(kept / name, folder / f"{source.stem}.{architecture}.ptx")
    shutil.rmtree(kept)
    return [out]


def compile_host(source: Path, folder: Path) -> list[Path]:
    out = folder / f"{source.stem}.host.o"
    system = [f"-isystem{path}" for path in (sysconfig.get_path("include"), *cpp_extension.include_paths())]
    run([*CXX, *HOST_FLAGS, *_INCLUDES, *system, "-c", source, "-o", out])
    return [out]


def compile_runtime(folder: Path) -> list[Path]:
    out = folder / f"{RUNTIME.stem}.o"
    run([*nvcc.nvcc(), "-std=c++17", "-O1", "-Xcompiler=-fPIC,-fvisibility=hidden", "-c", RUNTIME, "-o", out])
    return [out]


def sources() -> tuple[list[Path], list[Path]]:
    """The .cu files and the host's files of the extension."""
    return sorted((CSRC / "cuda").glob("*.cu")), [path for name in HOST_SOURCES for path in sorted(CSRC.glob(name))]


@cache
def build(architectures: tuple[int, ...] = ARCHITECTURES) -> Path:
    """The folder with the library and the PTX of each architecture; built once for a content of csrc/."""
    device_sources, host_sources = sources()
    texts = [p.read_bytes() for p in sorted(CSRC.rglob("*")) if p.is_file() and "cpu" not in p.relative_to(CSRC).parts]
    key = digest(*texts, RUNTIME.read_bytes(), Path(__file__).read_bytes(), nvcc.version(), torch.__version__,
                 repr(architectures))  # fmt: skip
    folder = CACHE / f"cuda-{key}"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=CACHE))
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [pool.submit(_compile_device, s, scratch, architectures) for s in device_sources]
            jobs += [pool.submit(compile_host, s, scratch) for s in host_sources]
            jobs.append(pool.submit(compile_runtime, scratch))
            objects = [path for job in jobs for path in job.result()]
        torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
        # Bound among themselves: a CUDA torch has NVIDIA's runtime in the process, with the names of ours.
        run([*CXX, "-shared", "-Wl,-Bsymbolic", *objects, *torch_libraries, "-o", scratch / "library.so"])
        for path in objects:
            path.unlink()
        try:
            os.replace(scratch, folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


class CudaLibrary:
    """The loaded library. There is one in a process, since it registers operators with torch."""

    modules: ClassVar[dict[tuple[int, str], Module]] = {}  # by architecture and kernel

    def __init__(self) -> None:
        self._folder = build()
        self._library = ctypes.CDLL(str(self._folder / "library.so"))
        self._callback: object = None

    def configure(self, device: Device, on_launch: LaunchCallback) -> None:
        """Says which GPU the host code sees, and what a launch calls; non-zero makes it fail."""
        self._callback = _callback_type(lambda launch: on_launch(launch.contents))  # kept alive: C++ holds a pointer
        limits = (device.processors, device.shared_block, device.shared_processor, device.threads_processor)
        self._library.fake_cuda_configure(ctypes.byref(_FakeDevice(*device.capability, *limits)), self._callback)

    def ptx(self, architecture: int) -> dict[str, str]:
        """The PTX of every .cu file, by its name."""
        return {p.name.split(".")[0]: p.read_text() for p in sorted(self._folder.glob(f"*.{architecture}.ptx"))}

    def module(self, architecture: int, kernel: str) -> Module:
        """The translated module that has a kernel, and no other kernel of its file."""
        key = architecture, kernel
        if key not in self.modules:
            (text,) = [t for t in self.ptx(architecture).values() if re.search(rf"\.entry\s+{re.escape(kernel)}\b", t)]
            module = Module(text, only=f"^{re.escape(kernel)}$")
            if module.unsupported:
                raise NotImplementedError(f"{kernel}: {module.unsupported}")
            self.modules[key] = module
        return self.modules[key]


def cubin(source: str, architecture: int) -> Path:
    """What ptxas makes of csrc/cuda/<source>.cu."""
    return nvcc.compile_cubin(CSRC / "cuda" / f"{source}.cu", architecture, [*_setting("NVCC_FLAGS"), *_INCLUDES])


@cache
def library() -> CudaLibrary:
    """The library, built and loaded at the first call."""
    return CudaLibrary()
