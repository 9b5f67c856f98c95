"""``ddpm-fast sample --estimate``: how long a run would take, from a few of its steps."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ddpm_fast.cli.sample import MANIFEST, Job, Request, Shard, in_parallel, is_done, recorded_sums

_STEPS = 6
_SECONDS = 5.0


@dataclass(frozen=True)
class Estimate:
    """What a run has to do, and how long a step of a micro-batch takes where as many run at once as will.

    Attributes:
        shards, found: micro-batches to be made, and those that are there already.
        threads: how many are made at once.
        steps: of the sampler, over all micro-batches of a shard.
        step_seconds: of one step of one micro-batch.
    """

    shards: int
    found: int
    threads: int
    steps: int
    step_seconds: float

    @property
    def seconds(self) -> float:
        """Of the whole run, without starting Python and loading the checkpoint."""
        return math.ceil(self.shards / self.threads) * self.steps * self.step_seconds

    def __str__(self) -> str:
        there = f" ({self.found} are there already)" if self.found else ""
        return (
            f"{self.shards} shards{there}, {self.threads} at once, {self.steps} steps of "
            f"{1e3 * self.step_seconds:.1f} ms: about {duration(self.seconds)}"
        )


def duration(seconds: float) -> str:
    """Seconds as a person says them: 12 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def estimate(request: Request, folder: Path, *, threads: int | None = None, rank: int = 0, world: int = 1) -> Estimate:
    """Time the first steps of as many micro-batches as would run at once. Nothing is written.

    The arguments are those of :func:`write_samples`.
    """
    job = Job(request)
    mine = job.shards[rank::world]
    sums = recorded_sums(folder) if (folder / MANIFEST).exists() else {}
    missing = [shard for shard in mine if not is_done(folder, shard, sums)]
    at_once = max(1, min(job.at_once(threads), len(missing)))
    times: list[float] = []

    def work(shard: Shard) -> None:
        begun = time.perf_counter()
        states = job.sampler.stream(**job.arguments(shard.first))
        next(states)
        last = time.perf_counter()
        if job.sampler.steps == 1:
            times.append(last - begun)
        # Of more steps the first does not count: it chooses algorithms, and draws memory from the system.
        for _ in zip(states, range(_STEPS), strict=False):
            now = time.perf_counter()
            times.append(now - last)
            last = now
            if now - begun > _SECONDS:
                break

    if missing:
        in_parallel(work, missing[:at_once], at_once, threading.Event())
    calls = math.ceil(missing[0].count / request.micro_batch) * job.sampler.steps if missing else 0
    return Estimate(len(missing), len(mine) - len(missing), at_once, calls, median(times) if times else 0.0)
