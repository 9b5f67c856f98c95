"""One run of a sampler: its state, its buffers, its network and its noise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.sampler.network import BoundNetwork
from ddpm_fast.sampler.noise import NoiseSource
from ddpm_fast.sampler.plms import History
from ddpm_fast.sampler.state import SamplerState
from ddpm_fast.sampler.step import Step


class Run:
    """The loop's body. `x` is the state, written in place by every step."""

    def __init__(self, step: Step, x: Tensor, network: BoundNetwork, source: NoiseSource, timesteps: list[int]) -> None:
        self.apply, self.x, self.network, self.source, self.timesteps = step, x, network, source, timesteps
        self.history = History() if step.table.solver == "plms" else None
        # The x0 of the step before, which a self-conditioned network is told.
        self.x0 = torch.empty_like(x) if network.self_condition is not None else None

    def step(self, i: int, want_state: bool) -> SamplerState | None:
        """Make step i. The state that it returns, if wanted, is made of copies."""
        x = self.x
        x0 = torch.empty_like(x) if want_state and self.x0 is None else self.x0
        with torch.no_grad():
            output, unconditional = self._network(i)
            noise = self.source.arguments(i, self.apply.stochastic)
            if self.history is not None:
                # A copy: the network may write its next output where it wrote this one.
                guided = torch.empty_like(x).copy_(self.apply.output(x, output, unconditional))
                output, unconditional = self.history.output(guided, functools.partial(self._ahead, i, guided)), None
            self.apply(x, output, unconditional, i, noise, out=x, x0_out=x0, gradient=self.gradient(i))
        if not want_state or x0 is None:
            return None
        return SamplerState(x.clone(), x0 if self.x0 is None else x0.clone(), self.timesteps[i], i)

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
