"""Pseudo linear multistep: a DDIM step with an epsilon extrapolated from the last four."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch import Tensor


class History:
    """The epsilons of the last three steps.

    Liu, Ren, Lin, Zhao, "Pseudo Numerical Methods for Diffusion Models on Manifolds" (2022), eqs. 12 and 13,
    with latent-diffusion's first steps: an averaged one, then Adams-Bashforth of second and third order.
    """

    def __init__(self) -> None:
        self.last: deque[Tensor] = deque(maxlen=3)

    def output(self, e: Tensor, ahead: Callable[[], Tensor]) -> Tensor:
        """The epsilon that the step is made with.

        Args:
            e: the network's.
            ahead: the network's at the end of a step with `e`; called in the first step only.
        """
        last = self.last
        if len(last) == 0:
            mixture = (e + ahead()) / 2
        elif len(last) == 1:
            mixture = (3 * e - last[-1]) / 2
        elif len(last) == 2:
            mixture = (23 * e - 16 * last[-1] + 5 * last[-2]) / 12
        else:
            mixture = (55 * e - 59 * last[-1] + 37 * last[-2] - 9 * last[-3]) / 24
        last.append(e)
        return mixture
