"""Calling a user's network: its device, dtype and layout, its mode, its arguments and what it returns."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_NETWORK_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

TimeFunction = Callable[[Tensor], Tensor]


def layout(tensor: Tensor) -> torch.memory_format:
    """channels_last (2-D or 3-D) where the tensor has that layout and no other, else contiguous."""
    if not tensor.is_contiguous():
        if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def home(model: Any) -> tuple[torch.device | None, torch.dtype]:
    """The device (None if unknown) and dtype of a network's first floating-point parameter, or buffer."""
    if isinstance(model, nn.Module):
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.dtype in _NETWORK_DTYPES:
                return tensor.device, tensor.dtype
    return None, torch.float32


def preferred_layout(model: Any, dim: int) -> torch.memory_format:
    """The layout of the network's convolution weights, for samples of `dim` dimensions."""
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            if parameter.dim() == dim and layout(parameter) != torch.contiguous_format:
                return layout(parameter)
    return torch.contiguous_format


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The network in evaluation mode; every module that was training is set back to it, errors or not."""
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def output_tensor(output: Any) -> Tensor:
    """The tensor of a network's output: itself, or the `.sample` of a diffusers output."""
    tensor = output if isinstance(output, Tensor) else getattr(output, "sample", None)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"the network must return a tensor, or an output with .sample, got {type(output).__name__}")
    # The state is float32: a double-precision network is the only one whose output loses digits here.
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def check_output(output: Tensor, shape: tuple[int, ...], channels: int) -> None:
    """Refuse an output that is not ``(N, channels, *)`` for samples of ``shape = (N, C, *)``."""
    expected = (shape[0], channels, *shape[2:])
    if output.shape != expected:
        raise ValueError(
            f"the network's output must have shape {expected} for samples of shape {shape}, got {tuple(output.shape)}"
        )


class BoundNetwork:
    """A network with everything but the state and the step fixed: one for each run.

    With `uncond_kwargs` it returns two outputs, from one call on a batch of 2N where all keyword arguments
    are tensors with a row for each sample, the unconditional half first, and from two calls where they are
    not. With `self_condition`, the name of a keyword, the network also gets the last x0, or None at first.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        x: Tensor,
        dtype: torch.dtype,
        channels: int,
        timesteps: Tensor,
        time_function: TimeFunction | None,
        model_kwargs: Mapping[str, Any],
        uncond_kwargs: Mapping[str, Any] | None,
        self_condition: str | None = None,
    ) -> None:
        self.model, self.x, self.channels = model, x, channels
        self.model_kwargs, self.self_condition = model_kwargs, self_condition
        self.time_function = time_function
        self.shape = tuple(x.shape)
        samples = self.shape[0]
        self.calls: list[Mapping[str, Any]] = [model_kwargs]
        self.halves = False
        if uncond_kwargs is not None:
            self.halves = _joinable(uncond_kwargs, model_kwargs, samples)
            if self.halves:
                self.calls = [{k: torch.cat([uncond_kwargs[k], model_kwargs[k]]) for k in model_kwargs}]
            else:
                self.calls = [uncond_kwargs, model_kwargs]
        batch = 2 * samples if self.halves else samples
        self.input = x
        if self.halves or dtype != x.dtype:
            self.input = torch.empty((batch, *self.shape[1:]), dtype=dtype, device=x.device, memory_format=layout(x))
        # Both halves are written in one pass, which reads the state once.
        self.target = self.input.unflatten(0, (2, samples)) if self.halves else self.input
        # A row for each step, cut beforehand: the loop then neither builds a tensor nor waits for one.
        self.time_rows = timesteps.to(x.device)[:, None].expand(-1, batch).contiguous()
        self.times = self.time_rows.unbind()

    def time(self, i: int, batch: int) -> Tensor:
        """What the network gets as t in step i, for a batch of that size."""
        time = self.times[i][:batch]
        return time if self.time_function is None else self.time_function(time)

    def __call__(self, i: int, x0: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The network's output for step i, and the unconditional one under guidance."""
        return self._outputs(self.time(i, self.input.shape[0]), x0)

    def at(self, number: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same for the step whose number the tensor, of one element, holds."""
        time = self.time_rows.index_select(0, number).squeeze(0)
        return self._outputs(time if self.time_function is None else self.time_function(time), None)

    def _outputs(self, time: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.input is not self.x:
            self.target.copy_(self.x)
        last: dict[str, Any] = {}
        if self.self_condition is not None:
            if x0 is not None:
                x0 = x0.to(self.input.dtype)
            last[self.self_condition] = torch.cat([x0, x0]) if self.halves and x0 is not None else x0
        outputs = [output_tensor(self.model(self.input, time, **kwargs, **last)) for kwargs in self.calls]
        if self.halves:
            expected = (self.input.shape[0], *self.shape[1:])
            check_output(outputs[0], expected, self.channels)
            outputs = list(outputs[0].chunk(2))
        for output in outputs:
            check_output(output, self.shape, self.channels)
        return outputs[-1], outputs[0] if len(outputs) == 2 else None


def _joinable(first: Mapping[str, Any], second: Mapping[str, Any], samples: int) -> bool:
    """Whether two sets of keyword arguments can be one for a batch of twice the size."""

    def rows(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == samples

    return first.keys() == second.keys() and all(
        rows(first[k]) and rows(second[k]) and first[k].shape[1:] == second[k].shape[1:] for k in first
    )
