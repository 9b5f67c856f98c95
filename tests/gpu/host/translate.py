"""CUDA C++ -> C++ with shim.h: the three forms of the language that no macro can express, and the kernels' own PTX."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

_DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")
_SHARED = re.compile(r"__shared__ (\w+) ([^;]+);")
_LAUNCH = re.compile(r"(\w+(?:<[\w:., ]+>)?)<<<(.+?)>>>\(")
_PTX = re.compile(r'asm\("(\w+)\.approx\.ftz\.f32 %0, %1;" : "=f"\((\w+)\) : "f"\((\w+)\)\);')


def translate(text: str, name: str, numbers: Iterator[int]) -> str:
    """A file of csrc/cuda in C++; its lines keep their numbers.

    Args:
        text: the file.
        name: what messages call it.
        numbers: gives each variable in shared memory its own.

    Raises:
        NotImplementedError: something of CUDA is left that has no translation here.
    """

    def shared(match: re.Match[str]) -> str:
        kind, variables = match.groups()
        found = re.findall(r"(\w+)((?:\[[^]]+\])*)(?:, |$)", variables)
        return " ".join(f"auto& {v} = host::shared<{kind}{size}, {next(numbers)}>();" for v, size in found)

    text = _DYNAMIC.sub(r"\1* const \2 = static_cast<\1*>(host::dynamic_shared());", text)
    text = _SHARED.sub(shared, text)
    text = _LAUNCH.sub(r"host::chevrons(\2)(\1, ", text)
    text = _PTX.sub(r"\2 = host::\1(\3);", text)
    if left := re.search(r"<<<|__shared__|\basm\b", text):
        raise NotImplementedError(f"{name}: no translation for {text[left.start() : left.start() + 80]!r}")
    return f'#line 1 "{name}"\n{text}'


def translate_folder(source: Path, target: Path) -> list[Path]:
    """Translates all files of csrc/cuda into a folder; returns the .cpp that the .cu files became."""
    numbers = itertools.count()
    target.mkdir(parents=True)
    written = []
    for path in sorted(source.iterdir()):
        if path.suffix in (".cu", ".cuh", ".h"):
            to = target / (f"{path.name}.cpp" if path.suffix == ".cu" else path.name)
            to.write_text(translate(path.read_text(), f"{source.name}/{path.name}", numbers))
            written.append(to)
    return [path for path in written if path.suffix == ".cpp"]
