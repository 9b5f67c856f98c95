"""``ddpm-fast sample``: samples in shards, whose bits depend on the settings and on nothing else.

A shard is one micro-batch: the samples that the network sees together. All micro-batches have the same size, the last
one padded with samples that are thrown away, and each is computed by one thread: a convolution may round differently
with another batch size or number of threads. Threads and processes therefore share the shards, never a shard, and
which of them makes one, or in which run, changes no bit.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
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
from ddpm_fast.cli.errors import UserError
from ddpm_fast.cli.network import Network, open_network
from ddpm_fast.sampler import Sampler
from ddpm_fast.training.files import write_atomically

MANIFEST = "manifest.json"
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


class Job:
    """A request with its network: everything that the bits depend on, and the files it leads to."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.network = network = open_network(request.checkpoint, request.image_size)
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
            "format": request.output,
            "shape": list(network.shape),
            "checkpoint": {"file": network.path.name, "sha256": network.digest},
            # A network's rounding may change with any of these, and with it the last bits of the samples.
            "made_with": {
                "ddpm_fast": ddpm_fast.__version__,
                "torch": str(torch.__version__),
                "cpu": torch.backends.cpu.get_cpu_capability(),
            },
        }
        digits = max(5, len(str(request.count - 1)))
        self.shards = []
        for first in range(0, request.count, request.micro_batch):
            numbers = range(first, min(first + request.micro_batch, request.count))
            if request.output == "png":
                files = tuple(f"sample-{number:0{digits}}.png" for number in numbers)
            else:
                files = (f"samples-{first:0{digits}}.npy",)
            self.shards.append(Shard(first, len(numbers), files))

    def manifest(self) -> str:
        """What is written beside the samples."""
        shards = [{"first": s.first, "count": s.count, "files": list(s.files)} for s in self.shards]
        return json.dumps({"settings": self.settings, "shards": shards}, indent=1) + "\n"

    def draw(self, shard: Shard) -> Tensor:
        """The samples of a shard, float32 ``(count, C, H, W)``, contiguous."""
        size = self.request.micro_batch
        numbers = range(shard.first, shard.first + size)
        x = self.sampler.sample(
            (size, *self.network.shape),
            seed=self.request.seed,
            sample_ids=numbers,
            model_kwargs=self.network.conditions(numbers),
        )
        return x[: shard.count].contiguous()


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
        threads: how many shards are made at once; torch's number of threads by default.

    Returns:
        how many were made, and how many were there.

    Raises:
        UserError: `folder` holds samples of another run.
    """
    job = Job(request)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, job)
    mine = job.shards[rank::world]
    missing = [shard for shard in mine if not _complete(folder, shard, job)]

    def work(shard: Shard) -> None:
        x = job.draw(shard)
        if request.output == "png":
            for file, pixels in zip(shard.files, images.to_bytes(x), strict=True):
                images.write_png(folder / file, images.picture(pixels))
        else:
            write_atomically(folder / shard.files[0], lambda temporary: _save_array(temporary, x.numpy()))

    with _watched(job.network, len(missing) * job.sampler.steps, progress) as stop:
        _in_parallel(work, missing, threads or torch.get_num_threads(), stop)
    finished = all(_complete(folder, shard, job) for shard in job.shards)
    if request.output == "grid" and finished and not (folder / GRID).exists():
        _write_grid(folder, job)
    return len(missing), len(mine) - len(missing)


def _in_parallel(work: Callable[[Shard], None], shards: list[Shard], threads: int, stop: threading.Event) -> None:
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
        _write_shared(path, lambda temporary: temporary.write_text(job.manifest()))


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


def _complete(folder: Path, shard: Shard, job: Job) -> bool:
    """Whether a shard is there whole. Files appear all at once; a damaged copy is made again."""
    if job.request.output == "png":
        return all((folder / file).is_file() for file in shard.files)
    try:
        array = np.load(folder / shard.files[0], mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):
        return False
    return bool(array.dtype == np.float32 and array.shape == (shard.count, *job.network.shape))


def _write_grid(folder: Path, job: Job) -> None:
    """Whoever sees the last shard in place writes the picture; two that see it at once write the same one."""
    x = np.concatenate([np.load(folder / shard.files[0]) for shard in job.shards])
    image = images.grid(torch.from_numpy(x))
    _write_shared(folder / GRID, lambda temporary: image.save(temporary, format="PNG"))


def _save_array(path: Path, array: Any) -> None:
    with open(path, "wb") as file:
        np.save(file, array)


def _write_shared(path: Path, write: Callable[[Path], object]) -> None:
    """As `write_atomically`, for a file that other processes may be writing at this moment."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(temporary)
    os.replace(temporary, path)
