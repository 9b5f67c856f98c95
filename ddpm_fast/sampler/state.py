"""What a run shows of a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class SamplerState:
    """What a step left behind. The tensors are copies: keep them or write into them, the run goes on
    unchanged.

    Attributes:
        x: float32 ``(N, C, *)``, the state after the step.
        x0: float32 ``(N, C, *)``, the clipped prediction of x_0 that the step was made with.
        t: the step's timestep, numbered as in the original schedule.
        i: the step's number, 0 for the noisiest.
    """

    x: Tensor
    x0: Tensor
    t: int
    i: int
