"""A run's steps as a CUDA graph: captured once, replayed for every step.

A step is a launch of ours besides the hundreds of the network; replaying them all as one graph takes the host out of
the loop. What changes from step to step lies in device memory: the state, and the number of the step, which the graph
counts up itself, and by which the time, the coefficients and the noise are looked up.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from ddpm_fast.sampler.noise import SeededNoise
from ddpm_fast.sampler.run import Run

# Steps made as they are before the capture: the first fills caches and lets libraries choose their kernels, which must
# not happen while a graph is captured.
WARM_UP = 1


def obstacle(run: Run) -> str | None:
    """Why a run's steps cannot be one graph, None where they can."""
    hooks = run.apply.hooks
    if run.x.device.type != "cuda":
        return f"the samples are on {run.x.device}, not on a CUDA device"
    if run.history is not None or run.x0 is not None:
        return "the steps differ: the solver or a self-conditioned model keeps something of the step before"
    if run.corrector is not None:
        return "the corrector makes updates of its own"
    if run.inpainting is not None:
        return "inpainting draws noise of its own"
    if hooks.denoised_fn is not None or hooks.cond_fn is not None:
        return "denoised_fn and cond_fn may do anything"
    if type(run.source) is not SeededNoise:
        return "the noise does not come from a seed"
    if len(run.timesteps) <= WARM_UP + 1:
        return "the steps are too few"
    return None


class GraphedSteps:
    """Makes a run's steps, from the second on by replaying a graph of one.

    Args:
        run: one without an `obstacle`.
        insists: whether a failing capture is an error; otherwise it is a warning, and the steps are made as they are.
    """

    def __init__(self, run: Run, insists: bool) -> None:
        self._run, self._insists = run, insists
        self._number = torch.zeros(1, dtype=torch.int64, device=run.x.device)
        self._replay: Callable[[], None] | None = None

    def step(self, i: int) -> None:
        """Make step i; to be called for 0, 1, 2, ... in turn."""
        if i == WARM_UP:
            self._replay = self._captured()
        if self._replay is not None:
            self._replay()
        elif i < WARM_UP:
            self._beside_the_main_stream()
        else:
            self._once()

    def _once(self) -> None:
        self._run.make(self._number)
        self._number.add_(1)

    def _beside_the_main_stream(self) -> None:
        """The step on another stream, as a capture makes it: libraries keep a workspace for each."""
        main, side = torch.cuda.current_stream(self._number.device), torch.cuda.Stream(self._number.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            self._once()
        main.wait_stream(side)

    def _captured(self) -> Callable[[], None] | None:
        """The replay of a step, which is recorded here and not made; None where the model cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._number.device), torch.cuda.graph(graph):
                self._once()
        except RuntimeError as error:
            if self._insists:
                raise
            warnings.warn(
                f"the model cannot be captured in a CUDA graph, and runs without: {error}. "
                "Sampler(..., cuda_graph=False) does not try.",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        return graph.replay


def graphed(run: Run, wish: bool | str) -> GraphedSteps | None:
    """The graph that a Sampler's `cuda_graph` asks for, None for steps made as they are.

    Raises:
        ValueError: for `wish` True where there is an `obstacle`.
    """
    if wish is False:
        return None
    reason = obstacle(run)
    if reason is None:
        return GraphedSteps(run, insists=wish is True)
    if wish is True:
        raise ValueError(f"cuda_graph=True is not possible here: {reason}")
    return None
