"""One run of a sampler: its state, its buffers, its network and its noise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.sampler.inpaint import Inpainting
from ddpm_fast.sampler.network import BoundNetwork
from ddpm_fast.sampler.noise import NoiseSource
from ddpm_fast.sampler.plms import History
from ddpm_fast.sampler.second_order import heun_weights, multistep_weights
from ddpm_fast.sampler.state import SamplerState
from ddpm_fast.sampler.step import Step


class Run:
    """The loop's body. `x` is the state, written in place by every step."""

    def __init__(
        self,
        step: Step,
        x: Tensor,
        network: BoundNetwork,
        source: NoiseSource,
        timesteps: list[int],
        inpainting: Inpainting | None = None,
        corrector: Step | None = None,
    ) -> None:
        self.apply, self.x, self.network, self.source, self.timesteps = step, x, network, source, timesteps
        self.inpainting, self.corrector = inpainting, corrector
        solver = step.table.solver
        self.history = History() if solver == "plms" else None
        # The x0 of the step before, which a self-conditioned network is told, and solvers of second order use.
        keeps = network.self_condition is not None or solver in ("heun", "dpmpp_2m")
        self.x0 = torch.empty_like(x) if keeps else None
        self.last_x0 = torch.empty_like(x) if solver == "dpmpp_2m" else None
        self.weights: tuple[Tensor, ...] = ()
        if solver in ("heun", "dpmpp_2m"):
            weights = (heun_weights if solver == "heun" else multistep_weights)(step.schedule)
            self.weights = weights.float().to(x.device).unbind()

    def step(self, i: int, want_state: bool) -> SamplerState | None:
        """Make step i. The state that it returns, if wanted, is made of copies."""
        x, paint = self.x, self.inpainting
        x0 = torch.empty_like(x) if want_state and self.x0 is None else self.x0
        with torch.no_grad():
            if paint is None:
                self._once(i, self.source.arguments, x0)
            elif paint.blend == "repaint":
                self._repaint(paint, i, x0)
            else:
                if paint.blend == "before":
                    paint.put(x, self.source.extra(i, x), i)
                self._once(i, self.source.arguments, x0)
                if paint.blend == "after":
                    paint.put(x, self.source.extra(i, x), i)
        if not want_state or x0 is None:
            return None
        return SamplerState(x.clone(), x0 if self.x0 is None else x0.clone(), self.timesteps[i], i)

    def make(self, number: Tensor) -> None:
        """The step whose number the tensor holds, of a run whose steps are all alike: no history, no hooks.

        `_once` for a step that the host does not know, which is what a graph captures.
        """
        with torch.no_grad():
            output, unconditional = self.network.at(number)
            noise = self.source.arguments(0, self.apply.stochastic)
            self.apply(self.x, output, unconditional, number, noise, out=self.x, x0_out=None, gradient=None)

    def _once(self, i: int, arguments: Callable[[int, bool], dict[str, Any]], x0: Tensor | None) -> None:
        """Step i itself."""
        x = self.x
        if self.corrector is not None:
            self._correct(self.corrector, i)
        output, unconditional = self._network(i)
        noise = arguments(i, self.apply.stochastic)
        if self.history is not None:
            # A copy: the network may write its next output where it wrote this one.
            guided = torch.empty_like(x).copy_(self.apply.output(x, output, unconditional))
            output, unconditional = self.history.output(guided, functools.partial(self._ahead, i, guided)), None
        if self.last_x0 is not None and self.x0 is not None:
            self.last_x0.copy_(self.x0)
        start = x.clone() if self.apply.table.solver == "heun" else None
        self.apply(x, output, unconditional, i, noise, out=x, x0_out=x0, gradient=self.gradient(i))
        if start is not None and i + 1 < len(self.timesteps):
            self._heun(i, start)
        if self.last_x0 is not None and self.x0 is not None and i > 0:
            x.addcmul_(self.x0 - self.last_x0, self.weights[i])

    def _correct(self, corrector: Step, i: int) -> None:
        """The corrector's updates, at the noise level that step i starts from."""
        updates = corrector.table.steps // len(self.timesteps)
        for row in range(i * updates, (i + 1) * updates):
            output, unconditional = self._network(i)
            noise = self.source.correction(i)
            corrector(self.x, output, unconditional, row, noise, out=self.x, x0_out=None, gradient=self.gradient(i))

    def _heun(self, i: int, start: Tensor) -> None:
        """From the end of an Euler step, which the state is, to that of Heun's."""
        x, x0 = self.x, torch.empty_like(start)
        output, unconditional = self._network(i + 1)
        self.apply(x, output, unconditional, i + 1, {}, out=None, x0_out=x0, gradient=self.gradient(i + 1))
        of_start, of_end, of_x0 = self.weights[i]
        x.copy_(of_start * start + of_end * x + of_x0 * x0)

    def _repaint(self, paint: Inpainting, i: int, x0: Tensor | None) -> None:
        """Step i and its repetitions; the draws of each are the step's own, the known part's, the way back's."""

        def again(i: int, stochastic: bool) -> dict[str, Any]:
            return {"noise": self.source.extra(i, self.x)} if stochastic and self.apply.table.draws[i] else {}

        repetitions = paint.repetitions(i)
        for repetition in range(repetitions):
            self._once(i, self.source.arguments if repetition == 0 else again, x0)
            paint.put(self.x, self.source.extra(i, self.x), i, below=True)
            if repetition + 1 < repetitions:
                paint.back(self.x, self.source.extra(i, self.x), i)

    def _network(self, i: int) -> tuple[Tensor, Tensor | None]:
        return self.network(i, self.x0 if i > 0 else None)

    def _ahead(self, i: int, output: Tensor) -> Tensor:
        """The guided output at the state and the timestep that step i leads to, with `output` for its own."""
        before = self.x.clone()
        self.apply(self.x, output, None, i, {}, out=self.x, x0_out=None, gradient=self.gradient(i))
        ahead = self.apply.output(self.x, *self._network(min(i + 1, len(self.timesteps) - 1)))
        self.x.copy_(before)
        return ahead

    def gradient(self, i: int) -> Callable[[Tensor], Tensor] | None:
        """That of `cond_fn` at step i, called with gradients enabled."""
        cond_fn = self.apply.hooks.cond_fn
        if cond_fn is None:
            return None
        time = self.network.time(i, self.x.shape[0])
        return functools.partial(call_with_gradients, cond_fn, time, self.network.model_kwargs)

    def storage(self, every: int) -> Tensor:
        """Room for the state after each `every`-th step."""
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every must be an int, got {type(every).__name__}")
        steps = len(self.timesteps)
        if not 1 <= every <= steps:
            raise ValueError(f"every must lie in 1 .. {steps}, got {every}")
        return self.x.new_empty((steps // every, *self.x.shape))


def call_with_gradients(cond_fn: Callable[..., Any], time: Tensor, kwargs: Mapping[str, Any], x: Tensor) -> Any:
    """`cond_fn` as openai's loops call it, with a state that shares memory with ours and no history."""
    with torch.enable_grad():
        return cond_fn(x.detach(), time, **kwargs)
