"""What `python -m build` makes: an sdist with everything, a wheel of that sdist, and the wheel installed and used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm_fast as df

ROOT = Path(df.__file__).parent.parent
PACKAGE = "ddpm_fast"

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


def build(folder: Path, **environment: str) -> tuple[Path, Path]:
    """Makes an sdist of the source tree and of that a wheel, with the torch that is here: isolation downloads another.

    What was compiled in the tree's folders lies in the copy too, and must not get into either.
    """
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info"))
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", "dist", str(source)],
        cwd=folder,
        env={**os.environ, "MAX_JOBS": "2", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


def files(*folders: str) -> set[str]:
    """The source tree's files in some of its folders, without what is made of them."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in paths if path.parent.name != "__pycache__" and path.suffix != ".so"}


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"{PACKAGE}-{df.__version__}.dist-info/METADATA").decode())


def install(wheel: Path, folder: Path) -> Path:
    """A new environment with the wheel, and its folder of commands. What the wheel requires is borrowed from here."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install", "--no-index"]
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True, capture_output=True)
    # A folder that is named in a .pth file has no .pth files read of its own: no editable install comes along.
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def sample(*command: str, cwd: Path, out: Path) -> tuple[np.ndarray, str]:
    """Two images that a `ddpm-fast` draws in three steps, and what it printed to stderr."""
    options = ("-n", "2", "--steps", "3", "--threads", "1", "--format", "npy", "--out", str(out))
    stderr = run(*command, "sample", *options, cwd=cwd).stderr
    (file,) = out.glob("*.npy")
    return np.load(file), stderr


def source_sample(out: Path) -> np.ndarray:
    return sample(sys.executable, "-m", PACKAGE, cwd=ROOT, out=out)[0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and a wheel without extensions, which takes seconds."""
    return build(tmp_path_factory.mktemp("plain"), DDPM_FAST_NO_EXTENSION="1")


def test_the_sdist_holds_what_it_takes_to_build_test_and_measure(plain: tuple[Path, Path]) -> None:
    with tarfile.open(plain[0]) as tar:
        held = {member.name.split("/", 1)[1] for member in tar.getmembers() if member.isfile()}
    expected = files("csrc", PACKAGE, "tests", "benchmarks", "examples", "docs")
    assert {"csrc/include/ddpm_fast/philox.h", "csrc/cuda/denoise.cu", "csrc/cuda/noise.cuh"} <= expected
    expected |= {"setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "LICENSE"}
    expected |= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    made = {name for name in held if name in ("PKG-INFO", "setup.cfg") or name.startswith(f"{PACKAGE}.egg-info/")}
    assert held - made == expected


def test_the_wheel_holds_the_package_alone(plain: tuple[Path, Path]) -> None:
    wheel = plain[1]
    assert wheel.name == f"{PACKAGE}-{df.__version__}-py3-none-any.whl"
    information = f"{PACKAGE}-{df.__version__}.dist-info/"
    held = names(wheel)
    assert {name for name in held if not name.startswith(information)} == files(PACKAGE)
    assert {f"{PACKAGE}/py.typed", f"{PACKAGE}/checkpoints/fashion-mnist.safetensors"} <= held
    assert f"{information}licenses/LICENSE" in held


def test_the_wheel_asks_for_what_it_runs_with(plain: tuple[Path, Path]) -> None:
    found = metadata(plain[1])
    assert found["Requires-Python"] == ">=3.10"
    assert found["License-Expression"] == "Apache-2.0"
    required = [line for line in found.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert "torch>=2.10" in required  # the version whose stable ABI the extensions are built for


def test_a_wheel_without_extensions_draws_images_and_says_once_what_is_missing(
    plain: tuple[Path, Path], tmp_path: Path
) -> None:
    commands = install(plain[1], tmp_path / "environment")
    images, stderr = sample(str(commands / "ddpm-fast"), cwd=tmp_path, out=tmp_path / "images")
    assert stderr.count("RuntimeWarning") == 1
    assert "install a C++17 compiler" in stderr
    assert images.shape == (2, 1, 28, 28)
    # float32 networks whose norms and convolutions round differently, over three steps
    np.testing.assert_allclose(images, source_sample(tmp_path / "expected"), atol=1e-4)


@pytest.mark.slow
def test_one_wheel_holds_both_extensions_and_draws_the_same_bits(tmp_path: Path) -> None:
    """For every Python from 3.10 and every torch from 2.10 on: the limited API, the stable ABI."""
    _, wheel = build(tmp_path, DDPM_FAST_CUDA="1", DDPM_FAST_CUDA_ARCHS="80")
    assert wheel.name.startswith(f"{PACKAGE}-{df.__version__}-cp310-abi3-linux_")
    compiled = {f"{PACKAGE}/_C.abi3.so", f"{PACKAGE}/_cuda.abi3.so"}
    assert {name for name in names(wheel) if name.startswith(f"{PACKAGE}/")} == files(PACKAGE) | compiled

    commands = install(wheel, tmp_path / "environment")
    assert "cpu        available" in run(str(commands / "ddpm-fast"), "doctor", cwd=tmp_path).stdout
    images, stderr = sample(str(commands / "ddpm-fast"), cwd=tmp_path, out=tmp_path / "images")
    assert "RuntimeWarning" not in stderr
    if torch.version.cuda is not None:  # with and without a GPU
        # Everything that the extension takes of torch is looked up at once.
        run(str(commands / "python"), "-c", "import ddpm_fast._cuda", cwd=tmp_path, LD_BIND_NOW="1")
    np.testing.assert_array_equal(images, source_sample(tmp_path / "expected"), strict=True)
