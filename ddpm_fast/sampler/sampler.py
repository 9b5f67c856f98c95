"""The sampling loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from ddpm_fast._memory import kept_memory
from ddpm_fast.modes import MODES, Mode, TableRequest
from ddpm_fast.sampler.arguments import (
    HISTORIES,
    check_shape,
    check_state,
    parse_clip,
    parse_corrector,
    parse_hooks,
    parse_inpainting,
    parse_number,
    parse_self_condition,
    parse_steps,
    parse_threshold,
    parse_time_input,
)
from ddpm_fast.sampler.graph import graphed
from ddpm_fast.sampler.inpaint import Inpainting
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
from ddpm_fast.sampler.run import Run, call_with_gradients
from ddpm_fast.sampler.state import SamplerState
from ddpm_fast.sampler.step import Step
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.solvers import COLUMNS, SIGMA_SOLVERS, CoefficientTable, langevin_table

_SOLVERS = ("ddpm", "ddim", "plms", "langevin", *SIGMA_SOLVERS)
# Those that start from sigma * x_T and not from x_T.
_SCALED = ("euler", "heun", "euler_ancestral")


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
        solver: "ddpm" (ancestral), "ddim", "plms" (pseudo linear multistep), "dpmpp_2m" (DPM-Solver++ of second
            order), "euler", "heun" and "euler_ancestral" (Karras et al. 2022, k-diffusion's, at the schedule's own
            noise levels or at "karras" ones), or "langevin". "ddpm", "euler_ancestral", "langevin" and "ddim" with
            `eta` add noise. "heun" calls the model twice a step, but for the last. "langevin" is annealed Langevin
            dynamics (Song, Ermon 2019): an update at each noise level, the last one x0 itself; `corrector_steps`
            makes more.
        steps: how many of the schedule's T steps to make: None for all, an int, which chooses as the
            `reference` does, or a string such as "10,10,5", "ddim50" or "fast27" as
            :meth:`NoiseSchedule.respace` takes them.
        timesteps: the steps to make, as strictly descending numbers of `schedule`, instead of `steps`; or "karras",
            for the solvers from "dpmpp_2m" on: `steps` levels between timesteps (:meth:`NoiseSchedule.karras`).
        eta: DDIM's noise, from 0 (none) to 1 (DDPM's).
        clip: the range that x0 is clipped to: ``(low, high)``, None, or "auto" for the `reference`'s own:
            (-1, 1), and None for "latent-diffusion" and "annotated".
        threshold: a quantile in (0, 1], or ``(quantile, maximum)``: dynamic thresholding, in place of
            `clip`. Each sample's x0 is clipped to that quantile of its magnitude, at least 1 and at most
            `maximum`, and divided by it.
        guidance_scale: w of classifier-free guidance, ``e = e_u + w * (e_c - e_u)``; :meth:`sample` then
            needs `uncond_kwargs`.
        guidance_rescale: phi in [0, 1]: the part of the guided output that is brought back to the standard
            deviation, sample by sample, of the conditional one (Lin et al. 2024, section 3.4).
        reference: whose loop to follow, in the choice of steps, the clip, the coefficients and the order and
            number of draws from a `generator`:

            - "guided": openai's; DDPM with a fixed variance is bit-equal to it given the same noise.
            - "lucidrains": the same to the bit, without a draw in the last step.
            - "latent-diffusion": CompVis'; no clip, DDIM's and PLMS' steps are one later, and end at the
              abar of timestep 0.
            - "diffusers": its schedulers' float32 coefficients. :meth:`from_diffusers` has accurate ones too.
            - "annotated": the Hugging Face article's float32 tables; no clip, epsilon, "fixed_small", DDPM.
        time_input: what the model gets as t: "auto" the timestep's original number (int64), and for a schedule
            of :meth:`NoiseSchedule.log_snr` the log signal-to-noise ratio (float32); "scaled" the number times
            1000 / T (float32); or a function of what "auto" gives, a tensor ``(N,)``, called at each step.
        cond_fn: ``cond_fn(x, t, **model_kwargs)``, the gradient of log p(y | x), `t` as the model gets it;
            called at each step with gradients enabled.
        cond_mode: what the gradient changes: "mean" moves the mean of a DDPM step by variance * gradient,
            "score" takes sqrt(1 - abar) * gradient from epsilon, after the clip (Dhariwal, Nichol 2021,
            algorithms 1 and 2). openai's DDIM is "score".
        denoised_fn: ``denoised_fn(x0)``, applied to x0 before the clip.
        self_condition: whether the model also gets the last step's x0, None in the first, as
            `x_self_cond`, or as the keyword that a string names (Chen, Zhang, Hinton 2023).
        temperature: a factor, at least 0, of the noise that the steps add. It is multiplied into sigma.
        cuda_graph: whether :meth:`sample` captures a step, model and all, in a CUDA graph and replays it, which gives
            the same images without the host's work. "auto" does where it can, that is on a CUDA device, with noise from
            a seed, without hooks, callback, inpainting, corrector or self-conditioning, and with a solver whose steps
            are alike; a model that cannot be captured then runs without, and a warning says why. True makes that an
            error. A model whose Python code does other things from call to call needs False: a graph repeats what one
            call did.
        corrector_steps: updates of Langevin dynamics before each step, at the noise level that it starts from, each
            with a call of the model: predictor-corrector sampling (Song et al. 2021, algorithm 5, in the order of its
            authors' code). Their noise is the stream "corrector", step i * corrector_steps and on.
        corrector_snr: r, in (0, 1), of their size, and of "langevin": ``2 alpha r^2 (1 - abar)`` times the score,
            see :func:`ddpm_fast.solvers.langevin_table`.

    A hook costs a kernel or more a step and self-conditioning a write of x0; without them a step is one
    kernel.

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
        timesteps: Iterable[int] | Tensor | Literal["karras"] | None = None,
        eta: float = 0.0,
        clip: Literal["auto"] | tuple[float, float] | None = "auto",
        threshold: float | tuple[float, float] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        reference: str | Mode = "guided",
        time_input: Literal["auto", "scaled"] | TimeFunction = "auto",
        cond_fn: Callable[..., Tensor] | None = None,
        cond_mode: Literal["mean", "score"] = "mean",
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        self_condition: bool | str = False,
        temperature: float = 1.0,
        cuda_graph: bool | Literal["auto"] = "auto",
        corrector_steps: int = 0,
        corrector_snr: float = 0.16,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t), got {type(model).__name__}")
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
        if solver not in _SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(_SOLVERS)}, got {solver!r}")
        mode = reference if isinstance(reference, Mode) else MODES.get(reference)
        if mode is None:
            raise ValueError(f"reference must be one of {', '.join(MODES)}, got {reference!r}")
        if solver not in mode.solvers:
            raise ValueError(f"reference={mode.name!r} has solver {' or '.join(mode.solvers)}, got {solver!r}")
        if solver != "ddim" and eta != 0.0:
            raise ValueError(f"eta is a parameter of solver='ddim' and must be 0 for {solver!r}, got {eta!r}")
        if solver == "plms" and prediction != "epsilon":
            raise ValueError(f"solver='plms' extrapolates epsilon and has no prediction={prediction!r}")
        if guidance_scale is not None:
            parse_number("guidance_scale", guidance_scale)
        hooks = parse_hooks(guidance_rescale, guidance_scale, denoised_fn, cond_fn, cond_mode, solver, prediction)
        updates = parse_corrector(corrector_steps, corrector_snr, solver, hooks)
        keyword = parse_self_condition(self_condition)
        noise_scale = parse_number("temperature", temperature, low=0.0)
        if cuda_graph not in ("auto", True, False):
            raise ValueError(f"cuda_graph must be 'auto', True or False, got {cuda_graph!r}")
        bounds, quantile = parse_clip(clip, mode.clip), parse_threshold(threshold)
        schedule, positions = parse_steps(schedule, mode, steps, timesteps, solver)
        edits_x0 = bounds is not None or quantile is not None or denoised_fn is not None

        self.model = model
        self._mode = mode
        self._full = schedule
        self._positions = tuple(range(schedule.timesteps) if positions is None else positions)
        self._schedule = schedule if positions is None else schedule.respace(positions)
        self._guidance_scale = guidance_scale
        self._clip = bounds
        self._threshold = quantile
        self._self_condition = keyword
        self._cuda_graph = cuda_graph
        self._time_function = parse_time_input(time_input, schedule)
        table = mode.table(
            TableRequest(
                full=schedule,
                kept=self._schedule,
                positions=self._positions,
                solver=solver,
                prediction=prediction,
                variance=variance,
                eta=eta,
                guidance_scale=1.0 if guidance_scale is None else float(guidance_scale),
                edits_x0=edits_x0,
                needs_x0=edits_x0 or keyword is not None or (cond_fn is not None and cond_mode == "score"),
                corrector_snr=corrector_snr,
            )
        )
        if table.output_weight is not None and cond_fn is not None:
            raise ValueError("reference='diffusers' has no DDIM step with cond_fn and a clip: use reference='guided'")
        self._table = _with_temperature(table, noise_scale)
        self._times = self._schedule.network_times.flip(0)
        self._timestep_list: list[int] = self._table.timesteps.tolist()
        self._double_channels = variance in ("learned", "learned_range")
        self._step = Step(self._table, self._schedule, bounds, quantile, guidance_scale, hooks)
        self._corrector: Step | None = None
        if updates:
            corrections = langevin_table(
                self._schedule,
                prediction=prediction,
                variance=variance,
                snr=corrector_snr,
                guidance_scale=1.0 if guidance_scale is None else float(guidance_scale),
                updates=updates,
            )
            corrections = _with_temperature(corrections, noise_scale)
            self._corrector = Step(corrections, self._schedule, bounds, quantile, guidance_scale, hooks)
        self._finish: Callable[[Tensor], None] | None = None

    # ------------------------------------------------------------------ made from somebody else's object

    @classmethod
    def from_guided(cls, diffusion: Any, model: Callable[..., Any], **options: Any) -> Sampler:
        """As `p_sample_loop` of openai's GaussianDiffusion or SpacedDiffusion, GLIDE's included, samples.

        Tables, numbering, what the model predicts, its variance and `rescale_timesteps` are read from
        `diffusion`. `options` are further arguments of Sampler: ``solver="ddim"`` with ``cond_mode="score"`` is
        `ddim_sample_loop`.

        Args:
            diffusion: the live object.
            model: as one passes it to `p_sample_loop`.

        Raises:
            TypeError: `diffusion` is none, or an option is given for what is read from it.
            ValueError: it predicts something that a Sampler does not know, or a subclass that samples differently.
        """
        from ddpm_fast.interop import guided

        return cls(model, **guided.arguments(diffusion, options))

    @classmethod
    def from_lucidrains(cls, diffusion: Any, **options: Any) -> Sampler:
        """As `sample` of denoising_diffusion_pytorch's GaussianDiffusion or LearnedGaussianDiffusion samples.

        Its float32 buffers, its network, objective, self-conditioning, DDIM steps and eta are read from
        `diffusion`. :meth:`sample` returns what that `sample` does: in [0, 1], unless `diffusion` was made with
        ``auto_normalize=False``; states are in [-1, 1] all the same.

        Raises:
            TypeError: `diffusion` is none, or an option is given for what is read from it.
            ValueError: a subclass that samples differently, or betas that are not in (0, 1).
        """
        from ddpm_fast.interop import lucidrains

        sampler = cls(**lucidrains.arguments(diffusion, options))
        sampler._finish = lucidrains.finish(diffusion)
        return sampler

    @classmethod
    def from_latent_diffusion(cls, ddpm: Any, **options: Any) -> Sampler:
        """As CompVis' DDPM or LatentDiffusion samples, in latents.

        Its float32 buffers, parameterization and clip are read from `ddpm`. `options` are further arguments of
        Sampler: ``solver="ddim", steps=50, eta=0.0`` is DDIMSampler, ``solver="plms", steps=50`` PLMSSampler. A
        condition is ``model_kwargs={"c": c}``, the unconditional one ``uncond_kwargs={"c": uc}``.

        Raises:
            TypeError: `ddpm` is none, or an option is given for what is read from it.
            ValueError: it does something that a Sampler does not, or a subclass that samples differently.
        """
        from ddpm_fast.interop import latent_diffusion

        return cls(**latent_diffusion.arguments(ddpm, options))

    @classmethod
    def from_diffusers(
        cls,
        scheduler: Any,
        unet: Callable[..., Any],
        *,
        use_clipped_model_output: bool = False,
        coefficients: Literal["float32", "float64"] = "float32",
        **options: Any,
    ) -> Sampler:
        """As a pipeline of diffusers with a DDPMScheduler or a DDIMScheduler samples.

        The float32 betas and abar, and what the configuration says, are read from `scheduler`. Its timesteps are
        taken where `set_timesteps` was called, all of them otherwise; ``steps=n`` is `set_timesteps(n)` on a
        copy, and ``timesteps=scheduler.timesteps[k:]`` makes a part of them, as image-to-image pipelines do.

        Args:
            scheduler: the live object.
            unet: the network; its `.sample` is taken.
            use_clipped_model_output: as in `DDIMScheduler.step`.
            coefficients: "float32", its own, for its results; "float64", the same formulas exactly, for better ones.

        Raises:
            ImportError: diffusers is not installed.
            TypeError: an option is given for what is read from `scheduler`.
            ValueError: another scheduler, a subclass with a step of its own, or a variance or timestep that a
                Sampler does not have.
        """
        from ddpm_fast.interop import diffusers

        return cls(unet, **diffusers.arguments(scheduler, options, use_clipped_model_output, coefficients))

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
            f"guidance_scale={self._guidance_scale}, reference={self._mode.name!r})"
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
        mask: Tensor | None = ...,
        known: Tensor | None = ...,
        blend: Literal["before", "after", "repaint"] = ...,
        resample: int = ...,
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
        mask: Tensor | None = ...,
        known: Tensor | None = ...,
        blend: Literal["before", "after", "repaint"] = ...,
        resample: int = ...,
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
        mask: Tensor | None = None,
        known: Tensor | None = None,
        blend: Literal["before", "after", "repaint"] = "before",
        resample: int = 1,
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
            x_T: float32 start, not written to; drawn from `seed` or `generator` unless given. Standard normal
                for every solver; "euler", "heun" and "euler_ancestral" scale it to their noise themselves.
            noise: the steps' noise: a float32 tensor ``(>= D, N, C, *)`` with a row for each draw that the
                `reference` makes in all steps, or a function ``noise(draw, t, shape)`` of the draw's number
                0 .. D-1 and the timestep's original number. D is S where it draws in each step.
            generator: draw from torch instead: x_T unless given, then as often and in the order as the
                `reference` does, draws that it does not use included.
            model_kwargs: further keyword arguments of the model.
            uncond_kwargs: those of the unconditional half, under guidance. The model is called once with a
                batch of 2N, the unconditional half first, where the arguments of both are the same tensors'
                names with a row for each sample, and twice, unconditional first, otherwise.
            mask: floating-point or bool, of a shape that broadcasts to ``(N, C, *)``: 1 where `known` is kept.
            known: float32 ``(N, C, *)``, the images to complete, as the network knows images.
            blend: where the known part, noised, replaces the state's: "before" each step (latent-diffusion's
                DDIM), "after" each step, at the timestep that it was made from (latent-diffusion's DDPM), or
                "repaint": after it, at the timestep that it leads to (Lugmayr et al. 2022). Its noise is one
                more draw a step, before or after the step's own; from a seed, of the stream "corrector".
            resample: with "repaint", how often each step but the last is made; in between the state is noised
                back up, which is one more draw.
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
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable, got {type(callback).__name__}")
        run = self._run(
            shape,
            seed,
            sample_ids,
            x_T,
            noise,
            generator,
            model_kwargs,
            uncond_kwargs,
            out,
            (mask, known, blend, resample),
        )
        kept = None if every is None else run.storage(every)
        collected = 0
        with contextlib.closing(self._steps(run, callback is not None, progress)) as steps:
            for i, state in enumerate(steps):
                if kept is not None and every is not None and (i + 1) % every == 0:
                    kept[collected].copy_(run.x)
                    collected += 1
                if callback is not None and callback(cast(SamplerState, state)) is True:
                    break
        if self._finish is not None:
            self._finish(run.x)
            if kept is not None:
                self._finish(kept)
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
        mask: Tensor | None = None,
        known: Tensor | None = None,
        blend: Literal["before", "after", "repaint"] = "before",
        resample: int = 1,
        progress: bool = False,
        out: Tensor | None = None,
    ) -> Iterator[SamplerState]:
        """Run the steps one at a time, yielding a :class:`SamplerState` after each; x_T is not yielded.

        Arguments and errors are those of :meth:`sample`, and arguments are checked by the call, before the
        first state is asked for. The model is in evaluation mode from the first state until the iterator
        ends or is closed.
        """
        run = self._run(
            shape,
            seed,
            sample_ids,
            x_T,
            noise,
            generator,
            model_kwargs,
            uncond_kwargs,
            out,
            (mask, known, blend, resample),
        )
        return cast(Iterator[SamplerState], self._steps(run, True, progress))

    def _steps(self, run: Run, want_state: bool, progress: bool) -> Generator[SamplerState | None, None, None]:
        bar = _progress_bar(self.steps) if progress else None
        try:
            with kept_memory(), evaluating(self.model):
                graph = None if want_state else graphed(run, self._cuda_graph)
                for i in range(self.steps):
                    state = None
                    if graph is not None:
                        graph.step(i)
                    else:
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
        model_kwargs: Mapping[str, Any] | None = None,
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
            model_kwargs: what `cond_fn` gets besides x and t.
            out: where to write the result; may be `x_t`.

        Returns:
            x_{t-1}, float32 ``(N, C, *)``, without gradient.

        Raises:
            TypeError, ValueError: an argument that is not as above, or a solver whose steps depend on the
                ones before.
        """
        if self._table.solver in HISTORIES:
            raise ValueError(f"solver={self._table.solver!r} has a history, which step does not keep: use stream")
        if self._table.solver == "heun":
            raise ValueError("solver='heun' asks the network twice a step, which step does not: use stream")
        if self._corrector is not None:
            raise ValueError("corrector_steps asks the network more than once a step, which step does not: use stream")
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
            arguments = source.arguments(i, self._step.stochastic)
        cond_fn, gradient = self._step.hooks.cond_fn, None
        if cond_fn is not None:
            time = self._times[i].to(x_t.device).expand(shape[0])
            time = time if self._time_function is None else self._time_function(time)
            gradient = functools.partial(call_with_gradients, cond_fn, time, model_kwargs or {})
        with torch.no_grad():
            unconditional = outputs[0] if pair else None
            return self._step(x_t, outputs[-1], unconditional, i, arguments, out, None, gradient)

    # ------------------------------------------------------------------ parts

    def _output_channels(self, shape: tuple[int, ...]) -> int:
        return shape[1] * 2 if self._double_channels else shape[1]

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
        inpainting: tuple[Tensor | None, Tensor | None, str, int],
    ) -> Run:
        """Check a run's arguments and make its buffers."""
        size = check_shape(shape)
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
                check_state(name, state, size, device)
        mask, known, blend, resample = inpainting
        mask = parse_inpainting(mask, known, blend, resample, size, device)
        if resample > 1 and self._table.solver in HISTORIES:
            raise ValueError(f"solver={self._table.solver!r} has a history and cannot make a step again: resample=1")
        if resample > 1 and self._corrector is not None:
            raise ValueError("corrector_steps draws once for each step, which is not made again: resample=1")
        if blend == "repaint" and self._table.solver == "langevin":
            raise ValueError("blend='repaint' follows a step to the next level, where solver='langevin' does not lead")
        paint = None
        if mask is not None and known is not None:
            paint = Inpainting(mask, known, blend, resample, self._full, self._positions)
        corrections = 0 if self._corrector is None else self._corrector.table.steps
        source: NoiseSource
        if generator is not None:
            source = GeneratorNoise(generator, self._table.draws, size, device)
        elif noise is not None:
            extras = 0 if paint is None else paint.extras(self._table.draws, self._step.stochastic)
            extras += corrections
            source = GivenNoise(noise, self._timestep_list, self._table.draws, extras, size, seed, sample_ids, device)
        else:
            source = SeededNoise(seed, sample_ids, size[0], device, corrections)
        with torch.no_grad():
            if out is None:
                order = preferred_layout(self.model, len(size)) if x_T is None else layout(x_T)
                out = torch.empty(size, dtype=torch.float32, device=device, memory_format=order)
            if x_T is None:
                source.start(out)
            elif x_T is not out:
                out.copy_(x_T)
            if self._table.solver in _SCALED:
                out.mul_(float(self._schedule.sqrt_one_minus_alphas_cumprod[-1]))
            network = BoundNetwork(
                self.model,
                out,
                dtype,
                self._output_channels(size),
                self._times,
                self._time_function,
                model_kwargs or {},
                uncond_kwargs,
                self._self_condition,
            )
        return Run(self._step, out, network, source, self._timestep_list, paint, self._corrector)


def _with_temperature(table: CoefficientTable, temperature: float) -> CoefficientTable:
    """The table with every sigma times `temperature`; for a learned variance, the factor of sigma."""
    if temperature == 1.0:
        return table
    factor = torch.ones(len(COLUMNS), dtype=torch.float64)
    factor[COLUMNS.index("sigma")] = temperature
    return dataclasses.replace(table, rows=table.rows * factor.float(), rows64=table.rows64 * factor)


def _progress_bar(steps: int) -> Any:
    from tqdm import tqdm  # a tenth of a second that most runs need not spend

    return tqdm(total=steps, desc="sampling", unit="step")
