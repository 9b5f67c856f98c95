"""Help, usage errors and exit statuses that all commands share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import ddpm_fast
from ddpm_fast.cli import app
from ddpm_fast.cli.errors import one_line

from .conftest import Outcome

COMMANDS = ["demo", "train", "sample", "eval", "doctor"]
Cli = Callable[..., Outcome]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_exit_statuses(cli: Cli, command: str) -> None:
    done = cli(command, "--help")
    assert (done.status, done.err) == (0, "")
    assert f"ddpm-fast {command}" in done.out.split("Examples:")[1]
    assert "Exit status: 0" in done.out
    # Examples keep their lines, and none needs a terminal wider than most.
    assert max(map(len, done.out.splitlines())) <= 100


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=["nothing", "--help", "-h"])
def test_help_lists_the_commands(cli: Cli, arguments: list[str]) -> None:
    done = cli(*arguments)
    assert (done.status, done.err) == (0, "")
    listed = done.out.split("Commands:")[1]
    assert all(f"  {command} " in listed for command in COMMANDS)


def test_version(cli: Cli) -> None:
    assert cli("--version") == (0, f"ddpm-fast {ddpm_fast.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "No such command 'fly'"),
        (["sample", "--wings"], "No such option"),
        (["sample", "-n", "0"], "-n"),
        (["sample", "-n", "many"], "-n"),
        (["sample", "--seed", "-1"], "--seed"),
        (["sample", "--seed", str(2**64)], "--seed"),
        (["sample", "--micro-batch", "0"], "--micro-batch"),
        (["sample", "--threads", "0"], "--threads"),
        (["sample", "--format", "jpg"], "--format"),
        (["sample", "surplus"], "surplus"),
        (["demo", "-n", "0"], "-n"),
        (["train", "--steps", "0"], "--steps"),
        (["train", "--dataset", "cats"], "--dataset"),
        (["eval", "-n", "1"], "-n"),
        (["doctor", "--cure"], "No such option"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_and_status_2(cli: Cli, arguments: list[str], message: str) -> None:
    done = cli(*arguments)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("ddpm-fast: ")
    assert message in done.err
    assert done.err.count("\n") == 1


def test_errors_become_one_line() -> None:
    assert one_line(ValueError("first\n  second")) == "first second"
    assert one_line(FileNotFoundError(2, "No such file or directory", "x.npy")) == "x.npy: No such file or directory"
    assert one_line(OSError("odd")) == "odd"
    assert one_line(ValueError()) == "ValueError"


def test_a_defect_is_not_disguised_as_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("ddpm_fast.cli.doctor.self_test", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        app.run(["doctor"])


def test_python_m_is_the_command() -> None:
    root = Path(ddpm_fast.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "ddpm_fast", "fly"], cwd=root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ddpm-fast: No such command 'fly'.\n"
