"""What a reference mode is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.solvers import CoefficientTable


@dataclass(frozen=True)
class TableRequest:
    """What a table is to be made for.

    Attributes:
        full: the schedule that the network was trained with.
        kept: the steps of it that are made.
        positions: their numbers in `full`, ascending.
        solver, prediction, variance, eta, guidance_scale: as in Sampler.
        edits_x0: whether x0 is clipped, thresholded or changed by a hook, so that the network's epsilon is
            no longer the one that belongs to it.
        needs_x0: whether the step must go by way of x0.
        corrector_snr: the step size of Langevin dynamics, as in Sampler.
    """

    full: NoiseSchedule
    kept: NoiseSchedule
    positions: tuple[int, ...]
    solver: str
    prediction: str
    variance: str
    eta: float
    guidance_scale: float
    edits_x0: bool
    needs_x0: bool
    corrector_snr: float = 0.16


class Mode(ABC):
    """One original."""

    name: ClassVar[str]
    solvers: ClassVar[tuple[str, ...]]
    clip: ClassVar[tuple[float, float] | None] = (-1.0, 1.0)

    @abstractmethod
    def choose(self, schedule: NoiseSchedule, steps: int) -> list[int]:
        """The numbers in `schedule`, ascending, of the timesteps that the original makes when asked for `steps`."""

    @abstractmethod
    def table(self, request: TableRequest) -> CoefficientTable:
        """The coefficients and the draws of each step."""


def check_count(steps: int, total: int) -> int:
    """`steps` if a schedule of `total` can be sampled in as many."""
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be between 1 and the schedule's {total}, got {steps}")
    return steps
