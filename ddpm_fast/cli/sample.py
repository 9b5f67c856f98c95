"""``ddpm-fast sample``: samples in shards, whose bits depend on the settings and on nothing else.

The network sees micro-batches of one size, the last one padded with samples that are thrown away, and each is computed
by one thread: a convolution may round differently with another batch size or number of threads. A shard is one or more
micro-batches. Threads and processes share the shards, never a shard, and which of them makes one, or in which run,
changes no bit.

A shard is finished when its SHA-256 is on record: at first in a hidden file of its own beside it, which its maker
writes after it; once all shards are, in the manifest. What is not on record, or differs from it, is made again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import ddpm_fast
from ddpm_fast.cli import images
from ddpm_fast.cli.errors import UserError, one_line
from ddpm_fast.cli.network import Network, device_of, open_network
from ddpm_fast.sampler import Sampler
from ddpm_fast.training.files import write_atomically

MANIFEST = "manifest.json"
_RECORD = ".{}.sha256"  # of a shard, by its first file; lines as sha256sum writes and checks them
GRID = "grid.png"
_SAMPLES = re.compile(r"samples?-\d+\.(npy|png)")


@dataclass(frozen=True)
class Shard:
    """Samples ``first .. first + count - 1`` and the files that hold them."""

    first: int
    count: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """What the user asked for; the arguments are the command's options."""

    checkpoint: Path | None
    image_size: int | None
    count: int
    seed: int
    steps: int | str | None
    solver: str
    eta: float
    micro_batch: int
    output: str
    """"grid", "png" or "npy"."""
    shard_size: int | None = None
    """Samples in a file; one micro-batch by default."""
    device: str = "cpu"


class Job:
    """A request with its network: everything that the bits depend on, and the files it leads to."""

    def __init__(self, request: Request) -> None:
        size = request.micro_batch if request.shard_size is None else request.shard_size
        if size % request.micro_batch:
            raise UserError(f"--shard-size must be a multiple of --micro-batch {request.micro_batch}, got {size}")
        self.request = request
        self.network = network = open_network(request.checkpoint, request.image_size, device_of(request.device))
        self.sampler = Sampler(
            network.model,
            network.schedule,
            prediction=network.prediction,
            variance=network.variance,
            self_condition=network.model.config.self_condition,
            solver=request.solver,
            steps=request.steps,
            eta=request.eta,
        )
        self.settings = {
            "samples": request.count,
            "seed": request.seed,
            "steps": request.steps,
            "solver": request.solver,
            "eta": request.eta,
            "micro_batch": request.micro_batch,
            "shard_size": size,
            "format": request.output,
            "shape": list(network.shape),
            "checkpoint": {"file": network.path.name, "sha256": network.digest},
            # A network's rounding may change with any of these, and with it the last bits of the samples.
            "made_with": {
                "ddpm_fast": ddpm_fast.__version__,
                "torch": str(torch.__version__),
                "device": _processor(network.device),
            },
        }
        digits = max(5, len(str(request.count - 1)))
        self.shards = []
        for first in range(0, request.count, size):
            numbers = range(first, min(first + size, request.count))
            if request.output == "png":
                files = tuple(f"sample-{number:0{digits}}.png" for number in numbers)
            else:
                files = (f"samples-{first:0{digits}}.npy",)
            self.shards.append(Shard(first, len(numbers), files))

    def manifest(self, sums: Mapping[str, str] | None = None) -> str:
        """What is written beside the samples; `sums`, the SHA-256 of every file, once all are there."""
        shards: list[dict[str, Any]] = []
        for shard in self.shards:
            shards.append({"first": shard.first, "count": shard.count, "files": list(shard.files)})
            if sums is not None:
                shards[-1]["sha256"] = [sums[file] for file in shard.files]
        return json.dumps({"settings": self.settings, "shards": shards}, indent=1) + "\n"

    def draw(self, shard: Shard) -> Tensor:
        """The samples of a shard, float32 ``(count, C, H, W)``, contiguous, on the CPU."""
        size = self.request.micro_batch
        parts = []
        for first in range(shard.first, shard.first + shard.count, size):
            parts.append(self.sampler.sample(**self.arguments(first)).cpu())
        return torch.cat(parts)[: shard.count].contiguous()

    def arguments(self, first: int) -> dict[str, Any]:
        """What the sampler's `sample` and `stream` are called with for the micro-batch that starts with a sample."""
        size = self.request.micro_batch
        numbers = range(first, first + size)
        return {
            "shape": (size, *self.network.shape),
            "seed": self.request.seed,
            "sample_ids": numbers,
            "model_kwargs": self.network.conditions(numbers),
        }

    def at_once(self, threads: int | None) -> int:
        """How many shards are made at once."""
        return threads or (1 if self.network.device.type == "cuda" else torch.get_num_threads())

    def encode(self, x: Tensor) -> list[bytes]:
        """The contents of a shard's files."""
        if self.request.output == "png":
            return [images.png_bytes(images.picture(pixels)) for pixels in images.to_bytes(x)]
        buffer = io.BytesIO()
        np.save(buffer, x.numpy())
        return [buffer.getvalue()]

    def calls(self, shards: list[Shard]) -> int:
        """How often the network is called for them."""
        return sum(math.ceil(shard.count / self.request.micro_batch) for shard in shards) * self.sampler.steps


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability: str = torch.backends.cpu.get_cpu_capability()
    return capability


def share(variables: dict[str, str] | os._Environ[str]) -> tuple[int, int]:
    """This process's number and the number of processes, as torchrun says them; (0, 1) without it."""
    try:
        rank, world = int(variables.get("RANK", "0")), int(variables.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise UserError(f"RANK and WORLD_SIZE must be integers: {error}") from error
    if not 0 <= rank < world:
        raise UserError(f"RANK must lie in [0, WORLD_SIZE), got {rank} of {world}")
    return rank, world


def write_samples(
    request: Request,
    folder: Path,
    *,
    threads: int | None = None,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
) -> tuple[int, int]:
    """Make those of this process's shards that are not there yet.

    Args:
        threads: how many shards are made at once; torch's number of threads by default, and 1 on a GPU.

    Returns:
        how many were made, and how many were there.

    Raises:
        UserError: `folder` holds samples of another run, or a shard cannot be written, as on a full disk: the finished
            ones stay.
    """
    job = Job(request)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, job)
    mine = job.shards[rank::world]
    sums = recorded_sums(folder)
    missing = [shard for shard in mine if not _is_whole(folder, shard, sums)]

    def work(shard: Shard) -> None:
        record = []
        for file, contents in zip(shard.files, job.encode(job.draw(shard)), strict=True):
            write_atomically(folder / file, functools.partial(Path.write_bytes, data=contents))
            record.append(f"{hashlib.sha256(contents).hexdigest()}  {file}\n")
        # Last: what is on record is there.
        write_atomically(_record_of(folder, shard), lambda temporary: temporary.write_text("".join(record)))

    with _watched(job.network, job.calls(missing), progress) as stop:
        try:
            in_parallel(work, missing, job.at_once(threads), stop)
        except OSError as error:
            raise UserError(
                f"{one_line(error)}; the finished shards are kept, and the same command makes the others"
            ) from error
    _finish(folder, job)
    return len(missing), len(mine) - len(missing)


def recorded_sums(folder: Path) -> dict[str, str]:
    """The SHA-256 on record of each finished file in a folder, by its name.

    Raises:
        UserError: a manifest that is none of ``ddpm-fast sample``.
    """
    fresh: dict[str, str] = {}
    # Before the manifest: whoever removes a shard's own record has put it there.
    for path in folder.glob(_RECORD.format("*")):
        with contextlib.suppress(FileNotFoundError):
            fresh.update((line[66:], line[:64]) for line in path.read_text().splitlines())
    try:
        shards = json.loads((folder / MANIFEST).read_text())["shards"]
        sums = {f: s for shard in shards for f, s in zip(shard["files"], shard.get("sha256", []), strict=False)}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST} is no manifest of ddpm-fast sample: choose another folder") from error
    return sums | fresh


def is_intact(path: Path, sums: Mapping[str, str]) -> bool:
    """Whether a file is there and is what its record says."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == sums.get(path.name)
    except FileNotFoundError:
        return False


def is_done(folder: Path, shard: Shard, sums: Mapping[str, str]) -> bool:
    """Whether a shard is finished and undamaged."""
    return all(is_intact(folder / file, sums) for file in shard.files)


def _is_whole(folder: Path, shard: Shard, sums: Mapping[str, str]) -> bool:
    """Whether a shard is finished and undamaged; what is left of it otherwise is removed."""
    if is_done(folder, shard, sums):
        return True
    for path in (_record_of(folder, shard), *(folder / file for file in shard.files)):
        path.unlink(missing_ok=True)
    return False


def _record_of(folder: Path, shard: Shard) -> Path:
    return folder / _RECORD.format(shard.files[0])


def _finish(folder: Path, job: Job) -> None:
    """Whoever finds all shards finished moves their records into the manifest, and draws the grid; two that find it at
    once write the same."""
    sums = recorded_sums(folder)
    files = [file for shard in job.shards for file in shard.files]
    if not all(file in sums and (folder / file).exists() for file in files):
        return
    write_atomically(folder / MANIFEST, lambda temporary: temporary.write_text(job.manifest(sums)), shared=True)
    for shard in job.shards:
        _record_of(folder, shard).unlink(missing_ok=True)
    if job.request.output == "grid" and not (folder / GRID).exists():
        _write_grid(folder, job)


def in_parallel(work: Callable[[Shard], None], shards: list[Shard], threads: int, stop: threading.Event) -> None:
    """Run `work` on all shards, `threads` at a time, each on one thread; an error or Ctrl-C ends them all."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        done, _ = wait([pool.submit(work, shard) for shard in shards], return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


class _Stopped(Exception):
    """Ends the other threads' loops after one has failed."""


@contextmanager
def _watched(network: Network, calls: int, progress: bool) -> Iterator[threading.Event]:
    """Counts the network's calls on a progress bar; while the event is set, the next call ends its thread."""
    stop, lock = threading.Event(), threading.Lock()
    bar = tqdm(total=calls, unit="step", disable=not progress, desc="sampling")

    def count(*_: Any) -> None:
        if stop.is_set():
            raise _Stopped
        with lock:
            bar.update()

    handle = network.model.register_forward_hook(count)
    try:
        with bar:
            yield stop
    finally:
        handle.remove()


def _claim(folder: Path, job: Job) -> None:
    """Put the manifest there, before any sample; refuse a folder whose samples were made otherwise."""
    path = folder / MANIFEST
    # Looked at in this order: another process writes its manifest before its first sample.
    occupied = any(_SAMPLES.fullmatch(file.name) for file in folder.iterdir())
    if path.exists():
        _check_same(path, job)
    elif occupied:
        raise UserError(f"{folder} holds samples, but no {MANIFEST} says how they were made: choose another folder")
    else:
        write_atomically(path, lambda temporary: temporary.write_text(job.manifest()), shared=True)


def _check_same(path: Path, job: Job) -> None:
    try:
        there = json.loads(path.read_text())["settings"]
        names = sorted(there.keys() | job.settings.keys())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is no manifest of ddpm-fast sample: choose another folder") from error
    changed = [
        f"{name} {there.get(name)!r} there, {job.settings.get(name)!r} now"
        for name in names
        if there.get(name) != job.settings.get(name)
    ]
    if changed:
        raise UserError(
            f"{path.parent} holds samples made with other settings ({'; '.join(changed)}): choose another folder"
        )


def _write_grid(folder: Path, job: Job) -> None:
    x = np.concatenate([np.load(folder / shard.files[0]) for shard in job.shards])
    image = images.grid(torch.from_numpy(x))
    write_atomically(folder / GRID, lambda temporary: image.save(temporary, format="PNG"), shared=True)
