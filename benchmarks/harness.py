"""Measuring a case: all contestants in one process, in turn, compared round by round."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Contestant = Callable[[], object]
"""Does the work once, on inputs prepared beforehand."""

Clock = Callable[[], Any]
"""Now, as something whose difference is seconds."""

OURS = "ours"


@dataclass(frozen=True)
class Target:
    """What the project wants of a row: how many times as fast as the faster peer."""

    at_least: float
    aim: float


@dataclass(frozen=True)
class FloorTarget:
    """What the project wants of a row: how many times the time of its memory floor it may take."""

    at_most: float
    aim: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the table.

    Args:
        what: what is measured; rows with the same words are summed up together.
        shape, dtype: of the main input.
        layout: "contiguous" or "channels_last".
        note: what else tells this row from its neighbours.
        ours: our contestant.
        peers: the others; the ratio is taken against the fastest of them.
        floors: work that bounds ours from below, such as a copy of the same tensor. Timed, but no competitor.
        check: run before anything is timed: raises AssertionError where ours is wrong, returns its largest error.
        target: what the ratio should be.
        steps: steps in one call; the times shown are those of one step.
        grad: run with gradients enabled.
    """

    what: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    note: str = ""
    ours: Contestant
    peers: Mapping[str, Contestant] = field(default_factory=dict)
    floors: Mapping[str, Contestant] = field(default_factory=dict)
    check: Callable[[], float]
    target: Target | FloorTarget | None = None
    steps: int = 1
    grad: bool = False


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    Args:
        seconds: for all contestants of a case together.
        round_seconds: a contestant's turn repeats its call until it has taken about this long.
        least, most: bounds of the number of rounds.
    """

    seconds: float = 3.0
    round_seconds: float = 5e-4
    least: int = 9
    most: int = 400


QUICK = Budget(seconds=0.03, round_seconds=2e-5, least=2, most=3)


class Moment:
    """A place in a GPU's stream of work. The difference of two waits for the later, and is the seconds between."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: Moment) -> float:
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1e3


def gpu_flush() -> Contestant:
    """Fills a GPU's cache with something else; larger than that of any, and long enough for the host to run ahead."""
    other = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    return other.zero_


def measure(
    case: Case,
    benchmark: Any,
    budget: Budget,
    row: dict[str, Any],
    clock: Clock = time.perf_counter,
    before: Contestant | None = None,
) -> None:
    """Checks a case, then times it; `row` receives all that is known of it, as plain data.

    pytest-benchmark's fixture `benchmark` times our rounds; between two of them every other contestant has a turn, in
    an order that moves on by one each time. A check that fails ends the case: the row then holds no times.

    clock: what times the other contestants; the fixture has been told of it by the mark `benchmark`.
    before: work outside the timed part, before every turn, which then is a single call.
    """
    row.update(_described(case), threads=torch.get_num_threads())
    with torch.set_grad_enabled(case.grad):
        try:
            row["error"] = float(case.check())
        except Exception as failure:
            row["failure"] = str(failure).split("\n", 1)[0] or "the check failed"
            raise
        if not benchmark.enabled:
            benchmark(case.ours)
            return
        others = {**case.peers, **case.floors}
        everyone = {OURS: case.ours, **others}
        seconds = {name: _seconds_a_call(run, budget.seconds / 50, clock) for name, run in everyone.items()}
        calls = {name: 1 if before else max(1, math.ceil(budget.round_seconds / s)) for name, s in seconds.items()}
        whole_round = sum(calls[name] * seconds[name] for name in calls)
        rounds = min(budget.most, max(budget.least, int(budget.seconds / whole_round)))

        times: dict[str, list[float]] = {name: [] for name in others}
        order = deque(others)

        def others_turn() -> None:
            for name in order:
                if before is not None:
                    before()
                times[name].append(_timed(others[name], calls[name], clock))
            order.rotate(1)

        def before_ours() -> None:  # what a set-up returns would be arguments
            if before is not None:
                before()

        with _no_collection():
            benchmark.pedantic(
                case.ours,
                rounds=rounds,
                iterations=calls[OURS],
                setup=before_ours if before else None,  # which pytest-benchmark refuses beside several calls
                teardown=others_turn,
            )
    ours = list(benchmark.stats.stats.data)
    # The fixture makes one more call, and its teardown, for the function's result.
    times = {OURS: ours, **{name: values[: len(ours)] for name, values in times.items()}}
    row.update(summary(times, case))
    row["rounds"] = rounds
    benchmark.extra_info["row"] = row


def summary(times: Mapping[str, Sequence[float]], case: Case) -> dict[str, Any]:
    """Percentiles of every contestant in seconds a step, and the ratios against the fastest peer and floor.

    A ratio is the median of the ratios of single rounds, which a machine that slows down for a while distorts less
    than a ratio of medians.
    """
    result: dict[str, Any] = {"times": {name: _percentiles(values, case.steps) for name, values in times.items()}}
    if case.peers:
        fastest = min(case.peers, key=lambda name: statistics.median(times[name]))
        result |= {"fastest_peer": fastest, "ratio": median_ratio(times[fastest], times[OURS])}
    if case.floors:
        fastest = min(case.floors, key=lambda name: statistics.median(times[name]))
        result |= {"floor": fastest, "floors": median_ratio(times[OURS], times[fastest])}
    return result


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=True))


def _percentiles(values: Sequence[float], steps: int) -> dict[str, float]:
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20": p20 / steps, "p50": statistics.median(values) / steps, "p80": p80 / steps}


def _described(case: Case) -> dict[str, Any]:
    row: dict[str, Any] = {
        "what": case.what,
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "layout": case.layout,
        "note": case.note,
        "peers": list(case.peers),
    }
    if isinstance(case.target, Target):
        row["target"] = {"at_least": case.target.at_least, "aim": case.target.aim}
    elif isinstance(case.target, FloorTarget):
        row["target"] = {"at_most": case.target.at_most, "aim": case.target.aim}
    return row


def _timed(run: Contestant, calls: int, clock: Clock) -> float:
    start = clock()
    for _ in range(calls):
        run()
    return float(clock() - start) / calls


def _seconds_a_call(run: Contestant, enough: float, clock: Clock) -> float:
    """Warms up and estimates: the shortest of a few calls, of fewer where they take `enough` seconds."""
    run()
    best, spent = math.inf, 0.0
    for _ in range(20):
        best = min(best, took := _timed(run, 1, clock))
        if (spent := spent + took) > enough:
            break
    return best


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the garbage collector out of one contestant's turn."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
