"""The step behind the network: one kernel, or more where a hook asks for what the kernel does not do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.ops.denoise import denoise
from ddpm_fast.sampler.guidance import mixed
from ddpm_fast.sampler.threshold import dynamic_bound
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.solvers import CoefficientTable

Gradient = Callable[[Tensor], Tensor]
"""The gradient of log p(y | x) at x, with everything but x fixed."""


@dataclass(frozen=True)
class Hooks:
    """What a user has put into the step. Where nothing is, the step is one kernel."""

    guidance_rescale: float = 0.0
    denoised_fn: Callable[[Tensor], Tensor] | None = None
    cond_fn: Callable[..., Tensor] | None = None
    cond_mode: str = "mean"


@dataclass(frozen=True, eq=False)
class _DeviceTable:
    """A table on a device, cut into what each step needs beforehand: the loop then builds no tensor."""

    rows: Tensor
    numbers: tuple[Tensor, ...]  # the steps' numbers, one int64 tensor of one element each
    x0_rows: Tensor
    output_weight: Tensor  # (S,), like the next two empty where nothing reads it
    score: Tensor  # (S, 3): sqrt(1 / abar), sqrt(1 / abar - 1), sqrt(1 - abar)
    variance: Tensor  # (S,)


class Step:
    """One row of a table applied to a state and the outputs of a network.

    Args:
        table: the coefficients.
        schedule: that of the steps made, whose tables the hooks read.
        clip, threshold: what to do with x0.
        guidance_scale: w, or None.
        hooks: what to do besides.
    """

    def __init__(
        self,
        table: CoefficientTable,
        schedule: NoiseSchedule,
        clip: tuple[float, float] | None,
        threshold: tuple[float, float] | None,
        guidance_scale: float | None,
        hooks: Hooks,
    ) -> None:
        self.table, self.clip, self.threshold, self.hooks = table, clip, threshold, hooks
        self.guidance_scale = guidance_scale
        self.stochastic = table.stochastic
        self.variance = table.variance if table.uses_learned_variance else "fixed"
        self.schedule = schedule
        self._mixes = hooks.guidance_rescale != 0.0 or table.output_weight is not None
        self._fused = (
            threshold is None and hooks.denoised_fn is None and hooks.cond_fn is None and table.output_weight is None
        )
        self._on_device: dict[torch.device, _DeviceTable] = {}

    def output(self, x_t: Tensor, output: Tensor, unconditional: Tensor | None) -> Tensor:
        """The guided output, (N, C, *), or (N, 2C, *) where the step uses a learned variance."""
        channels = x_t.shape[1]
        e = output[:, :channels]
        if unconditional is not None and self.guidance_scale is not None:
            e = mixed(e, unconditional[:, :channels], self.guidance_scale, self.hooks.guidance_rescale)
        return self._with_variance(e, output)

    def __call__(
        self,
        x_t: Tensor,
        output: Tensor,
        unconditional: Tensor | None,
        i: int | Tensor,
        noise: dict[str, Any],
        out: Tensor | None,
        x0_out: Tensor | None,
        gradient: Gradient | None,
    ) -> Tensor:
        """From x_t and the network's outputs for step i to x_{t-1}.

        Args:
            i: the step's number, or an int64 tensor (1,) that holds it.
            noise: `noise`, or `seed` and `sample_ids`, or nothing, as `ops.denoise` takes them.
            out: where to write x_{t-1}; may be x_t.
            x0_out: where to write the x0 that the step was made from.
            gradient: that of `cond_fn`, where there is one.
        """
        on = self._table_on(x_t.device)
        index = on.numbers[i] if isinstance(i, int) else i
        # A network may return a view of its input, and a step in place writes there while it still reads.
        output = _apart_from((out, x0_out), output)
        unconditional = None if unconditional is None else _apart_from((out, x0_out), unconditional)
        if self.variance == "fixed" and output.shape[1] != x_t.shape[1]:
            # DDIM with a network that also predicts a variance, which DDIM does not use.
            output = output[:, : x_t.shape[1]]
            unconditional = None if unconditional is None else unconditional[:, : x_t.shape[1]]
        if self._mixes and unconditional is not None:
            output, unconditional = self.output(x_t, output, unconditional), None
        prediction = self.table.prediction
        if x0_out is not None and self.table.x0_rows is not None:
            self._x0(x_t, output, unconditional, on.x0_rows, index, self.clip, None, x0_out)
            x0_out = None
        if self._fused:
            return denoise(
                x_t,
                output,
                on.rows,
                index,
                prediction=prediction,
                variance=self.variance,
                clip=self.clip,
                unconditional=unconditional,
                out=out,
                x0_out=x0_out,
                **noise,
            )
        return self._composed(x_t, output, unconditional, index, on, noise, out, x0_out, gradient)

    # ------------------------------------------------------------------ more than one kernel

    def _composed(
        self,
        x_t: Tensor,
        output: Tensor,
        unconditional: Tensor | None,
        index: Tensor,
        on: _DeviceTable,
        noise: dict[str, Any],
        out: Tensor | None,
        x0_out: Tensor | None,
        gradient: Gradient | None,
    ) -> Tensor:
        hooks = self.hooks
        prediction, clip, bound = self.table.prediction, self.clip, None
        network = output
        if hooks.denoised_fn is not None or self.threshold is not None:
            # What follows needs x0 before it is clipped: a pass for x0 alone, whose x_prev is thrown away.
            x0 = self._x0(x_t, output, unconditional, on.rows, index, None, None, torch.empty_like(x_t))
            if hooks.denoised_fn is not None:
                x0 = _check_like(hooks.denoised_fn(x0), x_t, "denoised_fn")
                prediction, output, unconditional = "x0", self._with_variance(x0, output), None
            if self.threshold is not None:
                clip, bound = None, dynamic_bound(x0, *self.threshold)
        if gradient is not None and hooks.cond_mode == "score":
            # Dhariwal, Nichol 2021, algorithm 2, on the x0 that the step would have been made from.
            x0 = self._x0(
                x_t, output, unconditional, on.rows, index, clip, bound, torch.empty_like(x_t), prediction=prediction
            )
            recip, recipm1, root = on.score[index].unbind(1)
            epsilon = (recip * x_t - x0) / recipm1 - root * _check_like(gradient(x_t), x_t, "cond_fn")
            x0 = recip * x_t - recipm1 * epsilon
            prediction, output, unconditional = "x0", self._with_variance(x0, output), None
            clip, bound = None, None
        common: dict[str, Any] = {"variance": self.variance, "threshold": bound}
        if gradient is not None and hooks.cond_mode == "mean":
            # Dhariwal, Nichol 2021, algorithm 1: the mean, moved, and only then the noise.
            mean = denoise(
                x_t,
                output,
                on.rows,
                index,
                prediction=prediction,
                clip=clip,
                unconditional=unconditional,
                x0_out=x0_out,
                **common,
            )
            moved = mean + self._variance(x_t, output, index, on) * _check_like(gradient(x_t), x_t, "cond_fn")
            output = self._with_variance(moved, output)
            return denoise(x_t, output, on.rows, index, prediction="x_prev", variance=self.variance, out=out, **noise)
        if self.table.output_weight is not None:
            network = _apart_from((out,), network)
        x_prev = denoise(
            x_t,
            output,
            on.rows,
            index,
            prediction=prediction,
            clip=clip,
            unconditional=unconditional,
            out=out,
            x0_out=x0_out,
            **common,
            **noise,
        )
        if self.table.output_weight is not None:
            x_prev.addcmul_(network.to(x_prev.dtype), on.output_weight[index])
        return x_prev

    def _x0(
        self,
        x_t: Tensor,
        output: Tensor,
        unconditional: Tensor | None,
        rows: Tensor,
        index: Tensor,
        clip: tuple[float, float] | None,
        bound: Tensor | None,
        into: Tensor,
        prediction: str | None = None,
    ) -> Tensor:
        """x0 alone, written into `into`."""
        denoise(
            x_t,
            output,
            rows,
            index,
            prediction=prediction or self.table.prediction,
            variance=self.variance,
            clip=clip,
            threshold=bound,
            unconditional=unconditional,
            out=torch.empty_like(x_t),
            x0_out=into,
        )
        return into

    def _with_variance(self, prediction: Tensor, output: Tensor) -> Tensor:
        """`prediction` in place of the output's own, beside the variance that the output carries."""
        if self.variance == "fixed":
            return prediction
        return torch.cat([prediction, output[:, prediction.shape[1] :].to(prediction.dtype)], dim=1)

    def _variance(self, x_t: Tensor, output: Tensor, index: Tensor, on: _DeviceTable) -> Tensor:
        """The variance that a gradient is weighed with."""
        if self.variance == "fixed":
            return on.variance[index]
        log_variance = output[:, x_t.shape[1] :].float()
        if self.variance == "learned_range":
            log_min, log_max = on.rows[index, 5], on.rows[index, 6]
            fraction = (log_variance + 1) / 2
            log_variance = fraction * log_max + (1 - fraction) * log_min
        return log_variance.exp()

    # ------------------------------------------------------------------ tables

    def _table_on(self, device: torch.device) -> _DeviceTable:
        found = self._on_device.get(device)
        if found is None:
            table, schedule = self.table, self.schedule
            numbers = torch.arange(table.steps, dtype=torch.int64, device=device)
            score = variance = nothing = torch.empty(0, device=device)
            updates = table.steps // schedule.timesteps  # rows of a timestep
            if self.hooks.cond_fn is not None:
                columns = [
                    schedule.sqrt_recip_alphas_cumprod.float(),
                    schedule.sqrt_recipm1_alphas_cumprod.float(),
                    (1.0 - schedule.alphas_cumprod.float()).double().sqrt().float(),
                ]
                score = torch.stack(columns, dim=1).flip(0).repeat_interleave(updates, 0).to(device)
                variance = _step_variance(table, schedule).float().flip(0).to(device)
            weight = table.output_weight
            found = _DeviceTable(
                rows=table.rows.to(device),
                numbers=numbers.view(-1, 1).unbind(),
                x0_rows=(table.rows if table.x0_rows is None else table.x0_rows).to(device),
                output_weight=nothing if weight is None else weight.to(device),
                score=score,
                variance=variance,
            )
            self._on_device[device] = found
        return found


def _step_variance(table: CoefficientTable, schedule: NoiseSchedule) -> Tensor:
    """The variances of a step with a fixed one, as openai's code weighs a gradient with them."""
    small = schedule.posterior_variance
    if table.variance == "fixed_large":
        return torch.cat([small[1:2] if len(small) > 1 else small, schedule.betas[1:]])
    return small


def _check_like(result: Any, x: Tensor, name: str) -> Tensor:
    """What a hook returned, in float32."""
    if not isinstance(result, Tensor):
        raise TypeError(f"{name} must return a tensor, got {type(result).__name__}")
    if result.shape != x.shape or result.device != x.device:
        raise ValueError(
            f"{name} must return a tensor of shape {tuple(x.shape)} on {x.device}, "
            f"got {tuple(result.shape)} on {result.device}"
        )
    return result.detach().to(x.dtype)


def _apart_from(written: tuple[Tensor | None, ...], tensor: Tensor) -> Tensor:
    """`tensor`, copied where it lives in memory that is about to be written."""
    for target in written:
        if target is not None and target.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
            return tensor.clone()
    return tensor
