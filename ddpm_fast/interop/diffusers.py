"""diffusers: DDPMScheduler and DDIMScheduler, read into a Sampler or replaced in a pipeline."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

try:
    from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
    from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError(
        f"ddpm_fast.interop.diffusers needs diffusers: pip install 'ddpm_fast[diffusers]' ({error})"
    ) from error

from ddpm_fast.interop import _read
from ddpm_fast.modes import DiffusersMode, TableRequest
from ddpm_fast.ops import _check
from ddpm_fast.ops.noising import q_sample
from ddpm_fast.sampler.step import Hooks, Step
from ddpm_fast.schedule import NoiseSchedule

_KIND = "scheduler of diffusers"
_PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
# "fixed_large_log" is the square root of a logarithm there, which is not a number.
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}
_METHODS = ("step", "previous_timestep", "_get_variance", "_threshold_sample")
_CLASSES = ("DDPMScheduler", "DDIMScheduler", "FastDDPMScheduler", "FastDDIMScheduler")
_HALVES = (torch.float16, torch.bfloat16)


def _solver(scheduler: Any) -> str:
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    for name, solver in (("DDPMScheduler", "ddpm"), ("DDIMScheduler", "ddim")):
        if name in names:
            return solver
    raise ValueError(
        f"scheduler must be a DDPMScheduler or a DDIMScheduler of diffusers, got {type(scheduler).__name__}"
    )


def _schedule(scheduler: Any) -> NoiseSchedule:
    abar = scheduler.alphas_cumprod.cpu()
    return NoiseSchedule.from_tables(
        {
            "betas": scheduler.betas,
            "alphas_cumprod": abar,
            "sqrt_alphas_cumprod": abar**0.5,
            "sqrt_one_minus_alphas_cumprod": (1 - abar) ** 0.5,
        }
    )


def _mode(scheduler: Any, clipped_output: bool, coefficients: str = "float32") -> DiffusersMode:
    return DiffusersMode(
        spacing=scheduler.config.timestep_spacing,
        inference_steps=scheduler.num_inference_steps,
        final_alpha_cumprod=1.0 if scheduler.config.get("set_alpha_to_one", True) else None,
        clipped_output=clipped_output,
        coefficients=coefficients,
    )


def _bounds(config: Any) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """clip and threshold."""
    if config.thresholding:
        return None, (float(config.dynamic_thresholding_ratio), float(config.sample_max_value))
    reach = float(config.clip_sample_range)
    return ((-reach, reach) if config.clip_sample else None), None


def _variance(scheduler: Any) -> str:
    kind = getattr(scheduler, "variance_type", None) or scheduler.config.get("variance_type", "fixed_small")
    return _read.choice(scheduler, "variance_type", kind, _VARIANCES)


def arguments(
    scheduler: Any, options: dict[str, Any], use_clipped_model_output: bool, coefficients: str
) -> dict[str, Any]:
    """The arguments of a Sampler, besides the model, that samples as a pipeline with `scheduler` does."""
    if coefficients not in ("float32", "float64"):
        raise ValueError(f"coefficients must be 'float32' or 'float64', got {coefficients!r}")
    _read.check_options(options, ("prediction", "variance", "solver", "clip", "threshold"), _KIND)
    solver = _solver(scheduler)
    _read.check_methods(scheduler, _METHODS, _CLASSES)
    if use_clipped_model_output and solver == "ddpm":
        raise ValueError("use_clipped_model_output is a parameter of DDIMScheduler")
    config = scheduler.config
    result: dict[str, Any] = {}
    steps = options.pop("steps", None)
    if steps is not None:
        if "timesteps" in options:
            raise ValueError("steps and timesteps exclude each other: both choose the steps to make")
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"steps must be an int, as set_timesteps takes it, got {type(steps).__name__}")
        scheduler = copy.deepcopy(scheduler)
        scheduler.set_timesteps(steps)
    chosen = scheduler.num_inference_steps or getattr(scheduler, "custom_timesteps", False)
    if chosen and "timesteps" not in options:
        result["timesteps"] = scheduler.timesteps.tolist()
    clip, threshold = _bounds(config)
    return {
        "schedule": _schedule(scheduler),
        "prediction": _read.choice(scheduler, "prediction_type", config.prediction_type, _PREDICTIONS),
        "variance": _variance(scheduler),
        "solver": solver,
        "clip": clip,
        "threshold": threshold,
        "reference": _mode(scheduler, use_clipped_model_output, coefficients),
        **result,
        **options,
    }


class _FastStep(SchedulerMixin):  # type: ignore[misc]
    """The step of a scheduler as one kernel. What it cannot do, the scheduler's own step does.

    The position of a timestep in `timesteps` is read from where it lies in memory: a pipeline that iterates over
    them on a GPU is not made to wait for one.
    """

    timesteps: Tensor
    _seen: Tensor | None = None  # the timesteps that _numbers and _made belong to
    _numbers: tuple[int, ...] = ()
    _made: dict[tuple[float, bool], Step]

    def _see(self, numbers: list[int]) -> None:
        self._seen, self._numbers, self._made = self.timesteps, tuple(numbers), {}

    def _position(self, timestep: Any) -> int | None:
        own: Tensor = self.timesteps
        if own is not self._seen:
            self._see(own.tolist())
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1:
                return None
            if (
                timestep.device == own.device
                and timestep.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
            ):
                i, between = divmod(int(timestep.storage_offset() - own.storage_offset()), own.stride(0))
                if between == 0 and 0 <= i < len(self._numbers):
                    return i
        value = int(timestep)
        return self._numbers.index(value) if value in self._numbers else None

    def _fast_step(self, eta: float, clipped_output: bool) -> Step | None:
        """The table for these timesteps, or None where a Sampler has no such step."""
        step = self._made.get((eta, clipped_output))
        if step is None:
            config = self.config
            known = config.prediction_type in _PREDICTIONS and config.get("variance_type", "fixed_small") in _VARIANCES
            if not known or min(self._numbers) < 0:
                return None
            clip, threshold = _bounds(config)
            full = _schedule(self)
            positions = self._numbers[::-1]
            kept = full.respace(positions)
            table = _mode(self, clipped_output).table(
                TableRequest(
                    full=full,
                    kept=kept,
                    positions=positions,
                    solver=_solver(self),
                    prediction=_PREDICTIONS[config.prediction_type],
                    variance=_variance(self),
                    eta=eta,
                    guidance_scale=1.0,
                    edits_x0=clip is not None or threshold is not None,
                    needs_x0=True,
                )
            )
            step = self._made[eta, clipped_output] = Step(table, kept, clip, threshold, None, Hooks())
        return step

    def _run(
        self, step: Step, i: int, sample: Tensor, output: Tensor, generator: Any, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x = sample.float()
        x = x if _check.is_dense(x) else x.contiguous()
        shape, dtype = sample.shape, torch.result_type(sample, output)
        given: dict[str, Any] = {}
        if step.table.draws[i]:
            if noise is None:
                noise = randn_tensor(shape, generator=generator, device=output.device, dtype=output.dtype)
            given = {"noise": noise}
        x0 = torch.empty_like(x)
        with torch.no_grad():
            x_prev = step(x, output, None, i, given, None, x0, None)
        return x_prev.to(dtype), x0.to(dtype)

    def _takes(self, step: Step, sample: Tensor, output: Tensor) -> bool:
        """Whether the kernel takes these tensors, and nobody wants a gradient of the step."""
        channels = sample.shape[1] * (2 if step.variance != "fixed" else 1) if sample.dim() > 1 else 0
        return (
            output.shape == (sample.shape[0], channels, *sample.shape[2:])
            and all(t.dtype == torch.float32 or t.dtype in _HALVES for t in (sample, output))
            and not _check.needs_grad(sample, output)
        )

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As in diffusers; float32 images with a timestep each in one kernel."""
        samples = original_samples
        if (
            samples.dtype != torch.float32
            or noise.dtype != torch.float32
            or noise.shape != samples.shape
            or timesteps.shape != samples.shape[:1]
            or timesteps.dtype != torch.int64
            or not _check.is_dense(samples)
        ):
            result: Tensor = super().add_noise(original_samples, noise, timesteps)
            return result
        schedule = self.__dict__.get("_noising")
        if schedule is None:
            schedule = self.__dict__["_noising"] = _schedule(self)
        return q_sample(samples, timesteps.to(samples.device), schedule, noise)[0]


class FastDDPMScheduler(_FastStep, DDPMScheduler):  # type: ignore[misc]
    """DDPMScheduler with the step in one kernel: the same configuration, calls, draws and, up to 1e-5, results.

    ``pipe.scheduler = FastDDPMScheduler.from_config(pipe.scheduler.config)``. The coefficients are diffusers' own
    float32 ones. variance_type "fixed_large_log", which gives no numbers there, is "fixed_large". A step that wants
    gradients, is in float64, or has variance_type "learned" is left to DDPMScheduler.
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As in diffusers."""
        super().set_timesteps(num_inference_steps, device="cpu", timesteps=timesteps)
        numbers = self.timesteps.tolist()  # before they are on a device that one would have to wait for
        self.timesteps = self.timesteps.to(device)
        self._see(numbers)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """As in diffusers."""
        i = self._position(timestep)
        step = None if i is None else self._fast_step(0.0, False)
        if step is None or i is None or not self._takes(step, sample, model_output):
            return super().step(model_output, timestep, sample, generator=generator, return_dict=return_dict)
        x_prev, x0 = self._run(step, i, sample, model_output, generator, None)
        return DDPMSchedulerOutput(prev_sample=x_prev, pred_original_sample=x0) if return_dict else (x_prev, x0)


class FastDDIMScheduler(_FastStep, DDIMScheduler):  # type: ignore[misc]
    """DDIMScheduler with the step in one kernel, or two where x0 is clipped and epsilon is not derived from it.

    ``pipe.scheduler = FastDDIMScheduler.from_config(pipe.scheduler.config)``; as :class:`FastDDPMScheduler`
    otherwise.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """As in diffusers."""
        super().set_timesteps(num_inference_steps, device="cpu")
        numbers = self.timesteps.tolist()  # before they are on a device that one would have to wait for
        self.timesteps = self.timesteps.to(device)
        self._see(numbers)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As in diffusers."""
        i = None if self.num_inference_steps is None or not 0.0 <= eta <= 1.0 else self._position(timestep)
        step = None if i is None else self._fast_step(float(eta), bool(use_clipped_model_output))
        # A generator beside it is an error there, and another shape broadcasts.
        odd = variance_noise is not None and (generator is not None or variance_noise.shape != sample.shape)
        if step is None or i is None or odd or not self._takes(step, sample, model_output):
            return super().step(
                model_output,
                timestep,
                sample,
                eta=eta,
                use_clipped_model_output=use_clipped_model_output,
                generator=generator,
                variance_noise=variance_noise,
                return_dict=return_dict,
            )
        x_prev, x0 = self._run(step, i, sample, model_output, generator, variance_noise)
        return DDIMSchedulerOutput(prev_sample=x_prev, pred_original_sample=x0) if return_dict else (x_prev, x0)
