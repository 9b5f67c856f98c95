"""Reading and writing of safetensors files whose header carries JSON; writing is all or nothing."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "ddpm_fast"
VERSION = 1


def write_atomically(path: Path, write: Callable[[Path], object], *, shared: bool = False) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: a reader sees the old file or the new.

    Args:
        path: the file to write.
        write: called with the temporary file's path.
        shared: other processes may be writing the same file at this moment.

    Raises:
        OSError: it cannot be written, as on a full disk; the old file stays, and what there was of the new one goes.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        if isinstance(error, OSError) and error.strerror is not None and error.filename is None:
            error.filename = str(path)  # a write that fails does not say of which file
        raise


def write_tensors(path: str | Path, kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write tensors and a JSON-serialisable header; `kind` says what the file is for."""
    metadata = {"format": FORMAT, "version": str(VERSION), "kind": kind, "header": json.dumps(header, sort_keys=True)}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(plain, temporary, metadata)
        except SafetensorError as error:  # how it reports that the system could not write
            raise OSError(f"cannot write {path}: {error}") from error

    write_atomically(Path(path), write)


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read back what :func:`write_tensors` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, truncated, of another program, of another kind or of an unknown version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or truncated, or not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: a safetensors file, but not one that ddpm_fast wrote")
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"{path}: format version {metadata.get('version')}, this ddpm_fast reads version {VERSION}")
    if metadata.get("kind") != kind:
        raise ValueError(f"{path}: holds a {metadata.get('kind')!r} checkpoint, {kind!r} is needed")
    try:
        header = json.loads(metadata["header"])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no readable JSON header: {error!r}") from error
    return tensors, header


def take_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def load_exactly(path: str | Path, targets: dict[str, Tensor], source: dict[str, Tensor], what: str) -> None:
    """Copy `source` into `targets`, keeping the targets' dtype, device and layout.

    Raises:
        ValueError: a name that is missing, not expected, or of another shape; nothing is copied then.
    """
    missing = sorted(set(targets) - set(source))
    unexpected = sorted(set(source) - set(targets))
    if missing or unexpected:
        raise ValueError(
            f"{path}: the {what} does not fit the architecture in its header: "
            f"missing {missing[:5] or 'nothing'}, unexpected {unexpected[:5] or 'nothing'}"
        )
    for name, target in targets.items():
        if source[name].shape != target.shape:
            raise ValueError(
                f"{path}: {what} {name} has shape {tuple(source[name].shape)}, "
                f"the architecture in its header needs {tuple(target.shape)}"
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(source[name])
