"""Builds with and without compilers, the portable build, make's targets, the documents' code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ddpm_fast as df

ROOT = Path(df.__file__).parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")

# One line an op: a digest of its results.
RESULTS = """
import hashlib
import torch
import ddpm_fast as df
from ddpm_fast import _C
from ddpm_fast.ops import denoise
from ddpm_fast.solvers import ddpm_table

def show(name, *tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    print(name, digest.hexdigest())

print("isa", _C.cpu_isa())
layouts = (torch.contiguous_format, torch.channels_last)
noise = lambda n, c=6: df.randn((3, c, 19, 23), seed=n)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    show(f"random {dtype}", *(df.randn((3, 5, 61, 67), seed=1, dtype=dtype, memory_format=f) for f in layouts))
    schedule = df.NoiseSchedule.linear(1000)
    t = torch.tensor([0, 400, 999])
    show(f"noising {dtype}", *df.q_sample(noise(2).to(dtype), t, schedule, seed=3))
    for variance, table in (("fixed", "fixed_small"), ("learned_range", "learned_range")):
        rows = ddpm_table(schedule, variance=table, guidance_scale=2.0).rows
        channels = 6 if variance == "fixed" else 12
        outputs = noise(4, channels).to(dtype), noise(5, channels).to(dtype)
        show(
            f"denoise {variance} {dtype}",
            *(
                denoise(noise(6).contiguous(memory_format=f), outputs[0], rows, t, variance=variance, clip=(-1, 1),
                        unconditional=outputs[1], seed=7)
                for f in layouts
            ),
        )
    scale, shift = df.randn((3, 12), seed=8).to(dtype).chunk(2, 1)
    for f in layouts:
        x = (3 * noise(9)).to(dtype).contiguous(memory_format=f).requires_grad_()
        y = df.group_norm_silu(x, 3, scale=scale, shift=shift)
        y.backward(noise(10).to(dtype))
        show(f"norm_act {dtype} {f}", y, x.grad)
"""

# The finder of an editable install would lend the folder's package the extension that was built in place.
NO_EDITABLE_INSTALL = """
import sys

sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in str(getattr(finder, "__module__", ""))]
"""


def setup(target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` into a folder, which then gets the Python files too."""
    command = ["setup.py", "build_ext", "--build-lib", str(target), "--build-temp", str(target / "objects")]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "MAX_JOBS": "2", "DDPM_FAST_CUDA": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    files = shutil.ignore_patterns("_C*", "_cuda*", "__pycache__")
    shutil.copytree(ROOT / "ddpm_fast", target / "ddpm_fast", ignore=files, dirs_exist_ok=True)
    (target / "sitecustomize.py").write_text(NO_EDITABLE_INSTALL)
    return done


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with the package that lies in a folder."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_portable_build_gives_the_same_bits(tmp_path: Path) -> None:
    done = setup(tmp_path, DDPM_FAST_GENERIC="1")
    assert (tmp_path / "ddpm_fast" / "_C.abi3.so").is_file(), done.stdout + done.stderr
    built, installed = python(tmp_path, "-c", RESULTS), python(ROOT, "-c", RESULTS)
    assert built.returncode == 0, built.stderr
    assert installed.returncode == 0, installed.stderr
    portable, own = (dict(line.rsplit(" ", 1) for line in run.stdout.splitlines()) for run in (built, installed))
    assert portable.pop("isa") == "generic"
    own.pop("isa")
    assert len(own) == 18
    assert portable == own


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "/bin/false"}, "the CPU extension was not built"),
        ({"DDPM_FAST_NO_EXTENSION": "1"}, ""),
    ],
    ids=["failing compiler", "no extension wanted"],
)
def test_without_an_extension_the_package_works_and_says_so_once(
    tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    done = setup(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert message in done.stderr
    assert ("install a C++17 compiler" in done.stderr) == bool(message)
    assert not list((tmp_path / "ddpm_fast").glob("_C*"))

    used = python(
        tmp_path,
        "-c",
        "import ddpm_fast as df, ddpm_fast.cli; df.randn((2, 3)); print(df.available_backends())",
    )
    assert used.returncode == 0, used.stderr
    assert used.stdout == "['reference']\n"
    assert used.stderr.count("RuntimeWarning") == 1
    assert "No module named 'ddpm_fast._C'. To build them, install a C++17 compiler" in used.stderr

    doctor = python(tmp_path, "-m", "ddpm_fast", "doctor")
    assert doctor.returncode == 0, doctor.stderr
    assert "cpu        missing: No module named 'ddpm_fast._C'" in doctor.stdout


def fake_nvcc(folder: Path) -> str:
    """A path whose nvcc knows two architectures and compiles nothing."""
    script = folder / "nvcc"
    script.write_text('#!/bin/sh\n[ "$1" = --list-gpu-arch ] && echo compute_80 compute_90 && exit\nexit 1\n')
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_a_failing_nvcc_costs_the_cuda_backend_alone_and_says_so_once(tmp_path: Path) -> None:
    done = setup(tmp_path / "build", PATH=fake_nvcc(tmp_path), DDPM_FAST_CUDA="", CXX="/bin/false")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the CUDA extension was not built (nvcc failed on csrc/cuda/denoise.cu") == 1
    assert done.stderr.count("the CPU extension was not built") == 1  # of a compiler that fails, which saves the time


def pip_packages(folder: Path, nvcc: bool) -> str:
    """A folder for PYTHONPATH whose package nvidia hides the real one, with an nvcc that compiles nothing or none."""
    package = folder / "packages" / "nvidia"
    (package / "cu13" / "bin").mkdir(parents=True)
    (package / "__init__.py").touch()
    if nvcc:
        fake_nvcc(package / "cu13" / "bin")
    return str(folder / "packages")


NO_NVCC = {"PATH": "/nowhere", "CUDA_HOME": "/nowhere"}


@pytest.mark.parametrize(
    ("environment", "pip_nvcc", "message"),
    [
        ({}, False, "nvcc failed on csrc/cuda/denoise.cu"),
        (NO_NVCC, True, "nvcc failed on csrc/cuda/denoise.cu"),
        (NO_NVCC, False, "there is no nvcc on the path. Put CUDA's there, or `pip install 'nvidia-cuda-nvcc=="),
        ({"DDPM_FAST_CUDA_ARCHS": "ampere"}, False, "must be numbers such as '80 90', not ['ampere']"),
    ],
    ids=["failing", "failing from pip", "missing", "architectures"],
)
def test_where_cuda_is_asked_for_its_failure_is_an_error(
    tmp_path: Path, environment: dict[str, str], pip_nvcc: bool, message: str
) -> None:
    packages = pip_packages(tmp_path, pip_nvcc)
    given = {"PATH": fake_nvcc(tmp_path), "CXX": "/bin/false", "PYTHONPATH": packages, "DDPM_FAST_CUDA": "1"}
    done = setup(tmp_path / "build", **{**given, **environment})
    assert done.returncode != 0
    assert message in done.stderr


def test_nvcc_from_pip_is_taken_only_where_cuda_is_asked_for(tmp_path: Path) -> None:
    given = {"PYTHONPATH": pip_packages(tmp_path, nvcc=True), "CXX": "/bin/false", "DDPM_FAST_CUDA": "", **NO_NVCC}
    done = setup(tmp_path / "build", **given)
    assert done.returncode == 0, done.stderr
    assert "the CPU extension was not built" in done.stderr
    assert "the CUDA extension" not in done.stderr  # a torch with CUDA has warnings of its own about CUDA_HOME


def test_the_versions_agree() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.*)"$', text, re.MULTILINE)[1] == df.__version__  # type: ignore[index]


def test_torch_is_not_replaced_by_an_extra() -> None:
    """An extra that names torch, or something that brings torchvision along, could install another build of it."""
    text = (ROOT / "pyproject.toml").read_text()
    extras = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert "diffusers" in extras
    assert not re.search(r'"(torch|torchvision|accelerate|denoising-diffusion-pytorch)\b', extras)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["demo", "test", "bench", "lint", "clean"])
def test_make_knows_its_targets(target: str) -> None:
    command = ["make", "--dry-run", "--always-make", target, "PYTHON=python9", "TORCH=torch==2.99"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if target != "clean":
        assert "python9 -m venv .venv" in done.stdout
        assert all("torch==2.99" in line or "--no-deps" in line for line in re.findall("pip .*", done.stdout))


def blocks(document: str) -> list[str]:
    """The Python code in a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_the_readmes_code_runs() -> None:
    namespace: dict[str, object] = {"torch": torch, "model": lambda x, t: 0.1 * x}
    for code in blocks("README.md"):
        exec(code, namespace)
        for name in {"x", "one", "x_prev"} & namespace.keys():
            value = namespace[name]
            assert isinstance(value, torch.Tensor)
            assert torch.isfinite(value).all()
    assert isinstance(namespace["x_prev"], torch.Tensor)


def test_the_readmes_plain_loop_is_what_the_sampler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise in both: torch.randn gives x_T and torch.randn_like the noise of the steps in turn."""
    steps = iter(range(1000))
    monkeypatch.setattr(torch, "randn", lambda *shape: df.randn(shape, seed=0, stream="x_T"))
    monkeypatch.setattr(torch, "randn_like", lambda x: df.randn(x.shape, seed=0, step=next(steps)))
    namespace: dict[str, torch.Tensor] = {"torch": torch, "model": lambda x, t: 0.1 * x}  # type: ignore[dict-item]
    plain, fast = blocks("README.md")[:2]
    exec(plain, namespace)
    expected = namespace["x"]
    exec(fast, namespace)
    # The loop works on float32 tables, whose cancellation near t = 0 costs it the last digits.
    assert (namespace["x"] - expected).abs().max() < 1e-3


def test_documents_link_to_what_exists() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    assert len(documents) >= 6
    for document in documents:
        text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in link:
                assert (document.parent / link).exists(), f"{document.name} links to {link}"


def test_the_licence_is_apache() -> None:
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text()
