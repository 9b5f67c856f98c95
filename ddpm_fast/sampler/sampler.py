"""The sampling loop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from ddpm_fast.ops import _check
from ddpm_fast.ops.denoise import denoise
from ddpm_fast.sampler.network import (
    BoundNetwork,
    TimeFunction,
    check_output,
    evaluating,
    home,
    layout,
    output_tensor,
    preferred_layout,
)
from ddpm_fast.sampler.noise import (
    GeneratorNoise,
    GivenNoise,
    NoiseFunction,
    NoiseSource,
    SeededNoise,
    check_noise,
)
from ddpm_fast.sampler.threshold import dynamic_bound
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.solvers import CoefficientTable, ddim_table, ddpm_table

_SOLVERS = ("ddpm", "ddim")
_REFERENCES = ("guided",)


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


class Sampler:
    """Samples from a diffusion model: one pass over memory a step, besides the network.

    Args:
        model: ``model(x, t, **model_kwargs)``, returning a tensor or an output with `.sample`. x is ``(N,
            C, *)`` in the dtype of the model's first floating-point parameter (float32 for a plain
            function), t has shape ``(N,)``.
        schedule: the noise schedule that the model was trained with.
        prediction: what the model predicts: "epsilon", "x0", "v" or "x_prev" (the mean of a DDPM step).
        variance: "fixed_small", "fixed_large", "learned" or "learned_range". With the last two the model
            has 2C output channels, the prediction first.
        solver: "ddpm" (ancestral) or "ddim".
        steps: how many of the schedule's T steps to make: None for all, an int or a string such as
            "10,10,5" or "ddim50" as :meth:`NoiseSchedule.respace` takes them.
        timesteps: the steps to make, as strictly descending numbers of `schedule`, instead of `steps`.
        eta: DDIM's noise, from 0 (none) to 1 (DDPM's).
        clip: the range that x0 is clipped to: ``(low, high)``, None, or "auto" for (-1, 1).
        threshold: a quantile in (0, 1], or ``(quantile, maximum)``: dynamic thresholding, in place of
            `clip`. Each sample's x0 is clipped to that quantile of its magnitude, at least 1 and at most
            `maximum`, and divided by it.
        guidance_scale: w of classifier-free guidance, ``e = e_u + w * (e_c - e_u)``; :meth:`sample` then
            needs `uncond_kwargs`.
        reference: whose arithmetic to follow. "guided" is that of openai's guided-diffusion, bit for bit
            given the same noise with the DDPM solver.
        time_input: what the model gets as t: "auto" the timestep's original number (int64), "scaled" that
            number times 1000 / T (float32), or a function of the former, an int64 tensor ``(N,)``, called
            at each step.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument outside what is listed above, or a schedule that `prediction` cannot be used
            with.

    The model is called under ``torch.no_grad`` and in evaluation mode, and its mode is restored afterwards,
    also after an error. It is not called in inference mode: a tensor that a model keeps from such a call (a
    cache of positions, say) could never again take part in a backward pass.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: NoiseSchedule,
        *,
        prediction: str = "epsilon",
        variance: str = "fixed_small",
        solver: str = "ddpm",
        steps: int | str | None = None,
        timesteps: Iterable[int] | Tensor | None = None,
        eta: float = 0.0,
        clip: Literal["auto"] | tuple[float, float] | None = "auto",
        threshold: float | tuple[float, float] | None = None,
        guidance_scale: float | None = None,
        reference: str = "guided",
        time_input: Literal["auto", "scaled"] | TimeFunction = "auto",
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t), got {type(model).__name__}")
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
        if solver not in _SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(_SOLVERS)}, got {solver!r}")
        if reference not in _REFERENCES:
            raise ValueError(f"reference must be one of {', '.join(_REFERENCES)}, got {reference!r}")
        if guidance_scale is not None:
            _check_number("guidance_scale", guidance_scale)
        self.model = model
        self._schedule = _respaced(schedule, steps, timesteps)
        self._guidance_scale = guidance_scale
        self._clip = _parse_clip(clip)
        self._threshold = _parse_threshold(threshold)
        self._time_function = _parse_time_input(time_input, schedule.original_timesteps)
        weight = 1.0 if guidance_scale is None else float(guidance_scale)
        if solver == "ddim":
            self._table = ddim_table(
                self._schedule, prediction=prediction, variance=variance, eta=eta, guidance_scale=weight
            )
        else:
            if eta != 0.0:
                raise ValueError(f"eta is a parameter of solver='ddim' and must be 0 for 'ddpm', got {eta!r}")
            self._table = ddpm_table(self._schedule, prediction=prediction, variance=variance, guidance_scale=weight)
        self._timestep_list: list[int] = self._table.timesteps.tolist()
        self._stochastic = self._table.stochastic
        self._kernel_variance = self._table.variance if self._table.uses_learned_variance else "fixed"
        self._double_channels = variance in ("learned", "learned_range")
        self._on_device: dict[torch.device, tuple[Tensor, tuple[Tensor, ...]]] = {}

    # ------------------------------------------------------------------ what it was made of

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule of the steps that are made (respaced where `steps` or `timesteps` was given)."""
        return self._schedule

    @property
    def table(self) -> CoefficientTable:
        """The coefficients, a row for each step."""
        return self._table

    @property
    def steps(self) -> int:
        """S, the number of steps."""
        return self._table.steps

    @property
    def timesteps(self) -> Tensor:
        """int64 ``(S,)`` on the CPU: the steps' original numbers, descending."""
        return self._table.timesteps.clone()

    def __repr__(self) -> str:
        table = self._table
        bound = f"threshold={self._threshold}" if self._threshold else f"clip={self._clip}"
        return (
            f"Sampler(solver={table.solver!r}, prediction={table.prediction!r}, variance={table.variance!r}, "
            f"steps={self.steps} of {self._schedule.original_timesteps}, {bound}, "
            f"guidance_scale={self._guidance_scale})"
        )

    # ------------------------------------------------------------------ running it

    @overload
    def sample(
        self,
        shape: Sequence[int],
        *,
        seed: int | Tensor = ...,
        sample_ids: Sequence[int] | Tensor | None = ...,
        x_T: Tensor | None = ...,
        noise: Tensor | NoiseFunction | None = ...,
        generator: torch.Generator | None = ...,
        model_kwargs: Mapping[str, Any] | None = ...,
        uncond_kwargs: Mapping[str, Any] | None = ...,
        progress: bool = ...,
        callback: Callable[[SamplerState], object] | None = ...,
        every: None = ...,
        out: Tensor | None = ...,
    ) -> Tensor: ...

    @overload
    def sample(
        self,
        shape: Sequence[int],
        *,
        seed: int | Tensor = ...,
        sample_ids: Sequence[int] | Tensor | None = ...,
        x_T: Tensor | None = ...,
        noise: Tensor | NoiseFunction | None = ...,
        generator: torch.Generator | None = ...,
        model_kwargs: Mapping[str, Any] | None = ...,
        uncond_kwargs: Mapping[str, Any] | None = ...,
        progress: bool = ...,
        callback: Callable[[SamplerState], object] | None = ...,
        every: int,
        out: Tensor | None = ...,
    ) -> tuple[Tensor, Tensor]: ...

    def sample(
        self,
        shape: Sequence[int],
        *,
        seed: int | Tensor = 0,
        sample_ids: Sequence[int] | Tensor | None = None,
        x_T: Tensor | None = None,
        noise: Tensor | NoiseFunction | None = None,
        generator: torch.Generator | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
        callback: Callable[[SamplerState], object] | None = None,
        every: int | None = None,
        out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run all steps.

        Args:
            shape: ``(N, C, *)``.
            seed: of x_T and of the steps' noise: an int in [0, 2^64) or an int64 tensor of one element.
            sample_ids: the samples' numbers in [0, 2^32), 0 .. N-1 unless given. A sample's noise depends
                on the seed and its number only, not on the batch that it is drawn in.
            x_T: float32 start, not written to; drawn from `seed` or `generator` unless given.
            noise: the steps' noise: a float32 tensor ``(>= S, N, C, *)`` with a row for each step, or a
                function ``noise(draw, t, shape)`` of the draw's number 0 .. S-1 and the timestep's original
                number.
            generator: draw from torch instead: x_T unless given, then once for each step, in openai's
                order.
            model_kwargs: further keyword arguments of the model.
            uncond_kwargs: those of the unconditional half, under guidance. The model is called once with a
                batch of 2N, the unconditional half first, where the arguments of both are the same tensors'
                names with a row for each sample, and twice, unconditional first, otherwise.
            progress: show a progress bar.
            callback: called with a :class:`SamplerState` after each step; returning True ends the run.
            every: also collect the state after each `every`-th step.
            out: float32, contiguous or channels_last: the state lives in it and it is what is returned.

        The state is on the device of the model's first parameter (of `x_T`, `out` or `generator` for a
        plain function, else the CPU). It has the layout of `out`, else of `x_T`, else of the model's
        convolutions.

        Returns:
            float32 ``(N, C, *)``; with `every`, also the collected states, float32 ``(S // every, N, C,
            *)``, fewer if the callback ended the run.

        Raises:
            TypeError, ValueError: before the model is called, for an argument that is not as above; or at
                the first step, for an output of another shape than it must have.
        """
        run = self._run(shape, seed, sample_ids, x_T, noise, generator, model_kwargs, uncond_kwargs, out)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable, got {type(callback).__name__}")
        kept = None if every is None else run.storage(every)
        collected = 0
        with contextlib.closing(self._steps(run, callback is not None, progress)) as steps:
            for i, state in enumerate(steps):
                if kept is not None and every is not None and (i + 1) % every == 0:
                    kept[collected].copy_(run.x)
                    collected += 1
                if callback is not None and callback(cast(SamplerState, state)) is True:
                    break
        return run.x if kept is None else (run.x, kept[:collected])

    def stream(
        self,
        shape: Sequence[int],
        *,
        seed: int | Tensor = 0,
        sample_ids: Sequence[int] | Tensor | None = None,
        x_T: Tensor | None = None,
        noise: Tensor | NoiseFunction | None = None,
        generator: torch.Generator | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
        out: Tensor | None = None,
    ) -> Iterator[SamplerState]:
        """Run the steps one at a time, yielding a :class:`SamplerState` after each; x_T is not yielded.

        Arguments and errors are those of :meth:`sample`, and arguments are checked by the call, before the
        first state is asked for. The model is in evaluation mode from the first state until the iterator
        ends or is closed.
        """
        run = self._run(shape, seed, sample_ids, x_T, noise, generator, model_kwargs, uncond_kwargs, out)
        return cast(Iterator[SamplerState], self._steps(run, True, progress))

    def _steps(self, run: _Run, want_state: bool, progress: bool) -> Generator[SamplerState | None, None, None]:
        bar = _progress_bar(self.steps) if progress else None
        try:
            with evaluating(self.model):
                for i in range(self.steps):
                    state = run.step(i, want_state)
                    if bar is not None:
                        bar.update()
                    yield state
        finally:
            if bar is not None:
                bar.close()

    def step(
        self,
        x_t: Tensor,
        model_output: Any,
        i: int,
        noise: Tensor | None = None,
        *,
        seed: int | Tensor = 0,
        sample_ids: Sequence[int] | Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """One step, for loops of one's own: with the same seed, S of them are :meth:`sample`.

        Args:
            x_t: float32 ``(N, C, *)``.
            model_output: what the model returned for x_t, under guidance the tuple ``(unconditional,
                conditional)``.
            i: the step, 0 .. S-1, counted from the noisiest.
            noise: float32 ``(N, C, *)``; drawn from `seed`, for `sample_ids` and step i, unless given.
            seed: as in :meth:`sample`.
            sample_ids: as in :meth:`sample`.
            out: where to write the result; may be `x_t`.

        Returns:
            x_{t-1}, float32 ``(N, C, *)``, without gradient.

        Raises:
            TypeError, ValueError: an argument that is not as above.
        """
        if isinstance(i, bool) or not isinstance(i, int):
            raise TypeError(f"i must be an int, got {type(i).__name__}")
        if not 0 <= i < self.steps:
            raise ValueError(f"i must lie in 0 .. {self.steps - 1}, got {i}")
        if not isinstance(x_t, Tensor):
            raise TypeError(f"x_t must be a tensor, got {type(x_t).__name__}")
        if x_t.dtype != torch.float32 or x_t.dim() < 2:
            raise ValueError(f"x_t must be float32 of shape (N, C, *), got {x_t.dtype} {tuple(x_t.shape)}")
        shape = tuple(x_t.shape)
        pair = isinstance(model_output, tuple)
        if self._guidance_scale is not None and not (pair and len(model_output) == 2):
            raise TypeError("with guidance_scale, model_output must be the tuple (unconditional, conditional)")
        if self._guidance_scale is None and pair:
            raise TypeError("model_output is a tuple, which needs a Sampler with guidance_scale")
        outputs = [output_tensor(o) for o in (model_output if pair else (model_output,))]
        for output in outputs:
            check_output(output, shape, self._output_channels(shape))
        arguments: dict[str, Any] = {}
        if noise is not None:
            arguments["noise"] = check_noise(noise, shape, x_t.device)
        else:
            source = SeededNoise(seed, sample_ids, shape[0], x_t.device)
            arguments = source.arguments(i, self._stochastic)
        with torch.no_grad():
            return self._apply(
                x_t, outputs[-1], outputs[0] if pair else None, i, arguments, out, None, self._scratch(x_t)
            )

    # ------------------------------------------------------------------ parts

    def _output_channels(self, shape: tuple[int, ...]) -> int:
        return shape[1] * 2 if self._double_channels else shape[1]

    def _scratch(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """What thresholding needs besides the state."""
        return None if self._threshold is None else (torch.empty_like(x), torch.empty_like(x))

    def _coefficients(self, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The rows on `device`, and for each step its number as a tensor of one element."""
        found = self._on_device.get(device)
        if found is None:
            numbers = torch.arange(self.steps, dtype=torch.int64, device=device)
            found = self._table.rows.to(device), numbers.view(-1, 1).unbind()
            self._on_device[device] = found
        return found

    def _apply(
        self,
        x_t: Tensor,
        output: Tensor,
        unconditional: Tensor | None,
        i: int,
        noise: dict[str, Any],
        out: Tensor | None,
        x0_out: Tensor | None,
        scratch: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """The step behind the network: from x_t and the outputs to x_{t-1}, by way of one kernel."""
        rows, numbers = self._coefficients(x_t.device)
        # A network may return a view of its input, and a step in place writes there while it still reads.
        output = _apart_from(out, output)
        unconditional = None if unconditional is None else _apart_from(out, unconditional)
        if self._double_channels and self._kernel_variance == "fixed":
            # DDIM with a network that also predicts a variance, which DDIM does not use.
            output = output[:, : x_t.shape[1]]
            unconditional = None if unconditional is None else unconditional[:, : x_t.shape[1]]
        common: dict[str, Any] = {
            "prediction": self._table.prediction,
            "variance": self._kernel_variance,
            "unconditional": unconditional,
        }
        clip, bound = self._clip, None
        if self._threshold is not None and scratch is not None:
            # The bound needs x0 before it is clipped: a pass for x0 alone, whose x_prev is thrown away.
            x0, unused = scratch
            denoise(x_t, output, rows, numbers[i], clip=None, out=unused, x0_out=x0, **common)
            clip, bound = None, dynamic_bound(x0, *self._threshold)
        return denoise(
            x_t,
            output,
            rows,
            numbers[i],
            clip=clip,
            threshold=bound,
            out=out,
            x0_out=x0_out,
            **noise,
            **common,
        )

    def _run(
        self,
        shape: Sequence[int],
        seed: int | Tensor,
        sample_ids: Sequence[int] | Tensor | None,
        x_T: Tensor | None,
        noise: Tensor | NoiseFunction | None,
        generator: torch.Generator | None,
        model_kwargs: Mapping[str, Any] | None,
        uncond_kwargs: Mapping[str, Any] | None,
        out: Tensor | None,
    ) -> _Run:
        """Check a run's arguments and make its buffers."""
        size = _check_shape(shape)
        for name, kwargs in (("model_kwargs", model_kwargs), ("uncond_kwargs", uncond_kwargs)):
            if kwargs is not None and not isinstance(kwargs, Mapping):
                raise TypeError(f"{name} must be a mapping of keyword arguments, got {type(kwargs).__name__}")
        if self._guidance_scale is not None and uncond_kwargs is None:
            raise ValueError("guidance_scale is set: uncond_kwargs must be given (it may be empty)")
        if self._guidance_scale is None and uncond_kwargs is not None:
            raise ValueError("uncond_kwargs needs a Sampler with guidance_scale")
        if generator is not None and noise is not None:
            raise ValueError("noise and generator exclude each other: both say where the noise comes from")
        if generator is not None and sample_ids is not None:
            raise ValueError("sample_ids number the draws from a seed and exclude generator")
        device, dtype = home(self.model)
        for name, given, kind in (
            ("x_T", x_T, Tensor),
            ("out", out, Tensor),
            ("generator", generator, torch.Generator),
        ):
            if given is None:
                continue
            if not isinstance(given, kind):
                raise TypeError(f"{name} must be a torch.{kind.__name__}, got {type(given).__name__}")
            device = device or given.device
        device = device or torch.device("cpu")
        for name, state in (("x_T", x_T), ("out", out)):
            if state is not None:
                _check_state(name, state, size, device)
        source: NoiseSource
        if generator is not None:
            source = GeneratorNoise(generator, size, device)
        elif noise is not None:
            source = GivenNoise(noise, self._timestep_list, size, seed, sample_ids, device)
        else:
            source = SeededNoise(seed, sample_ids, size[0], device)
        with torch.no_grad():
            if out is None:
                order = preferred_layout(self.model, len(size)) if x_T is None else layout(x_T)
                out = torch.empty(size, dtype=torch.float32, device=device, memory_format=order)
            if x_T is None:
                source.start(out)
            elif x_T is not out:
                out.copy_(x_T)
            network = BoundNetwork(
                self.model,
                out,
                dtype,
                self._output_channels(size),
                self._table.timesteps,
                self._time_function,
                model_kwargs or {},
                uncond_kwargs,
            )
        return _Run(self, out, network, source)


class _Run:
    """One run: its state, its buffers, its network and its noise."""

    def __init__(self, sampler: Sampler, x: Tensor, network: BoundNetwork, source: NoiseSource) -> None:
        self.sampler, self.x, self.network, self.source = sampler, x, network, source
        self.scratch = sampler._scratch(x)

    def step(self, i: int, want_state: bool) -> SamplerState | None:
        """Make step i. The state that it returns, if wanted, is made of copies."""
        sampler, x = self.sampler, self.x
        x0 = torch.empty_like(x) if want_state else None
        with torch.no_grad():
            output, unconditional = self.network(i)
            noise = self.source.arguments(i, sampler._stochastic)
            sampler._apply(x, output, unconditional, i, noise, out=x, x0_out=x0, scratch=self.scratch)
        return None if x0 is None else SamplerState(x.clone(), x0, sampler._timestep_list[i], i)

    def storage(self, every: int) -> Tensor:
        """Room for the state after each `every`-th step."""
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every must be an int, got {type(every).__name__}")
        if not 1 <= every <= self.sampler.steps:
            raise ValueError(f"every must lie in 1 .. {self.sampler.steps}, got {every}")
        return self.x.new_empty((self.sampler.steps // every, *self.x.shape))


# ---------------------------------------------------------------------- arguments


def _respaced(
    schedule: NoiseSchedule, steps: int | str | None, timesteps: Iterable[int] | Tensor | None
) -> NoiseSchedule:
    if timesteps is None:
        if steps is None:
            return schedule
        if isinstance(steps, bool) or not isinstance(steps, (int, str)):
            raise TypeError(f"steps must be None, an int or a string, got {type(steps).__name__}")
        return schedule.respace(steps)
    if steps is not None:
        raise ValueError("steps and timesteps exclude each other: both choose the steps to make")
    if isinstance(timesteps, (str, int)) or not isinstance(timesteps, Iterable):
        raise TypeError(f"timesteps must be the steps' numbers, got {type(timesteps).__name__}")
    chosen = timesteps.tolist() if isinstance(timesteps, Tensor) else list(timesteps)
    if len(chosen) > 1 and chosen[0] < chosen[-1]:
        raise ValueError(f"timesteps must be descending, got {chosen[0]} .. {chosen[-1]}")
    return schedule.respace(chosen)


def _parse_clip(clip: Literal["auto"] | tuple[float, float] | None) -> tuple[float, float] | None:
    if clip is None:
        return None
    if isinstance(clip, str):
        if clip == "auto":
            return (-1.0, 1.0)
        raise ValueError(f"clip must be 'auto', None or (low, high), got {clip!r}")
    if not isinstance(clip, (tuple, list)):
        raise TypeError(f"clip must be 'auto', None or (low, high), got {type(clip).__name__}")
    if len(clip) != 2:
        raise ValueError(f"clip must be 'auto', None or (low, high), got {len(clip)} values")
    low, high = (_check_number("clip", value) for value in clip)
    if low >= high:
        raise ValueError(f"clip must be (low, high) with low < high, got {(low, high)}")
    return (low, high)


def _parse_threshold(threshold: float | tuple[float, float] | None) -> tuple[float, float] | None:
    if threshold is None:
        return None
    maximum = math.inf
    if isinstance(threshold, (tuple, list)):
        if len(threshold) != 2:
            raise ValueError(f"threshold as a tuple must be (quantile, maximum), got {len(threshold)} values")
        ratio, maximum = (_check_number("threshold", value) for value in threshold)
    else:
        ratio = _check_number("threshold", threshold)
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"threshold's quantile must lie in (0, 1], got {ratio}")
    if maximum < 1.0:
        raise ValueError(f"threshold's maximum must be at least 1, got {maximum}")
    return ratio, maximum


def _parse_time_input(time_input: str | TimeFunction, original_timesteps: int) -> TimeFunction | None:
    if callable(time_input):
        return time_input
    if time_input == "auto":
        return None
    if time_input == "scaled":
        factor = 1000.0 / original_timesteps
        return lambda t: t.float() * factor
    raise ValueError(f"time_input must be 'auto', 'scaled' or a function, got {time_input!r}")


def _check_number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    if isinstance(shape, (str, int)) or not isinstance(shape, Sequence):
        raise TypeError(f"shape must be (N, C, *), got {type(shape).__name__}")
    size = tuple(shape)
    if len(size) < 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(f"shape must be (N, C, *) of ints >= 1, got {size}")
    return size


def _check_state(name: str, given: Tensor, size: tuple[int, ...], device: torch.device) -> None:
    if given.shape != size or given.dtype != torch.float32 or given.device != device:
        raise ValueError(
            f"{name} must be float32 of shape {size} on {device}, "
            f"got {given.dtype} of shape {tuple(given.shape)} on {given.device}"
        )
    if name == "out" and not _check.is_dense(given):
        raise ValueError(f"out must be contiguous or channels_last, got strides {given.stride()}")


def _apart_from(out: Tensor | None, tensor: Tensor) -> Tensor:
    """`tensor`, copied where it lives in the memory of `out`."""
    if out is None or out.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
        return tensor
    return tensor.clone()


def _progress_bar(steps: int) -> Any:
    from tqdm import tqdm  # a tenth of a second that most runs need not spend

    return tqdm(total=steps, desc="sampling", unit="step")
