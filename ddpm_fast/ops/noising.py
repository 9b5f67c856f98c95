"""q_sample: the forward process in one pass, its noise given or made on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpm_fast import backends
from ddpm_fast.backends.reference import noising as reference
from ddpm_fast.ops import _check
from ddpm_fast.ops._operator import Operator
from ddpm_fast.ops.random import randn

if TYPE_CHECKING:
    from ddpm_fast.schedule import NoiseSchedule

NOISING = Operator(
    "noising",
    "Tensor x0, Tensor t, Tensor coefficients, Tensor noise, Tensor(a!) out",
    reference.noising,
)
NOISING_RANDOM = Operator(
    "noising_random",
    "Tensor x0, Tensor t, Tensor coefficients, Tensor seed, Tensor? sample_ids, Tensor step, int stream, "
    "Tensor(a!) out, Tensor(b!) noise",
    reference.noising_random,
)

NOISING_DRAWN = Operator(
    "noising_drawn",
    "Tensor x0, Tensor t, Tensor coefficients, Tensor seed, Tensor? sample_ids, Tensor step, int stream, "
    "Tensor(a!) out",
    reference.noising_drawn,
    on=("reference", "cpu"),
)

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _check_inputs(x0: Tensor, t: Tensor, timesteps: int, noise: Tensor | None) -> None:
    if x0.dtype not in _FLOATS and x0.dtype != torch.uint8:
        raise ValueError(f"x0 must be uint8, float16, bfloat16, float32 or float64, not {x0.dtype}")
    if x0.dim() < 2:
        raise ValueError(f"x0 must be (N, C, *), not of shape {tuple(x0.shape)}")
    if t.dtype != torch.int64 or t.shape != x0.shape[:1] or t.device != x0.device:
        raise ValueError(
            f"t must be int64 of shape ({x0.shape[0]},) on {x0.device}, "
            f"not {t.dtype} of shape {tuple(t.shape)} on {t.device}"
        )
    _check.rows_in_range(t, timesteps, "t")
    if noise is not None and (noise.shape != x0.shape or noise.dtype not in _FLOATS or noise.device != x0.device):
        raise ValueError(
            f"noise must be a floating-point tensor of shape {tuple(x0.shape)} on {x0.device}, "
            f"not {noise.dtype} of shape {tuple(noise.shape)} on {noise.device}"
        )


def q_sample(
    x0: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    step: int | Tensor = 0,
    *,
    stream: str = "training",
) -> tuple[Tensor, Tensor]:
    """Draws x_t from q(x_t | x_0): `x_t = sqrt(alphas_cumprod[t]) * x0 + sqrt(1 - alphas_cumprod[t]) * noise`.

    Ho et al. 2020, equation 4. Half-precision inputs are computed in float32 and rounded once. Differentiable in x0
    and noise.

    Args:
        x0: (N, C, *) float32, float16, bfloat16 or float64; or uint8 images, which become `x0 / 127.5 - 1`.
        t: int64 (N,), in [0, T).
        schedule: the `NoiseSchedule` that t counts in.
        noise: (N, C, *) standard normal; drawn from `seed` unless given.
        seed, sample_ids, step, stream: as for `randn`. Without a seed one is drawn from torch's generator.

    Returns:
        x_t and the noise in it, both (N, C, *) in x0's dtype (float32 for uint8) and layout; `noise` itself if given.

    Raises:
        TypeError, ValueError: for anything outside the shapes, dtypes, devices and ranges above, and where both
            noise and seed are given.
    """
    _check_inputs(x0, t, schedule.timesteps, noise)
    if noise is not None and seed is not None:
        raise ValueError("noise and seed exclude each other: give the noise or the seed it is drawn from")
    number = _check.stream_number(stream)
    device = x0.device
    coefficients = schedule.noising_coefficients(device)
    dtype = torch.float32 if x0.dtype == torch.uint8 else x0.dtype
    if not _check.is_dense(x0):
        x0 = x0.contiguous()

    if noise is None:
        seed = int(torch.randint(0, 1 << 62, ()).item()) if seed is None else seed
        if not _check.needs_grad(x0):
            samples = x0.shape[0]
            x_t = torch.empty_like(x0, dtype=dtype)
            noise = torch.empty_like(x_t)
            NOISING_RANDOM[backends.choose(x_t)](
                x0,
                t,
                coefficients,
                _check.seed_tensor(seed, device),
                _check.sample_id_tensor(sample_ids, samples, device),
                _check.counter_tensor(step, "step", samples, device),
                number,
                x_t,
                noise,
            )
            return x_t, noise
        noise = torch.empty_like(x0, dtype=dtype, requires_grad=False)
        randn(x0.shape, seed=seed, sample_ids=sample_ids, step=step, stream=stream, out=noise)

    if _check.needs_grad(x0, noise):
        # The same bits as the kernels', and autograd knows the way back.
        return reference.q_sample(x0, t, coefficients, noise), noise
    x_t = torch.empty_like(x0, dtype=dtype)
    NOISING[backends.choose(x_t)](x0, t, coefficients, _check.one_pixel_stride(noise), x_t)
    return x_t, noise


def noised(
    x0: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    *,
    seed: int | Tensor,
    sample_ids: Sequence[int] | Tensor | None = None,
    step: int | Tensor = 0,
) -> Tensor:
    """The x_t of `q_sample`, to the bit, whose noise is made on the way and not kept: `target_loss` draws it again.

    Args:
        x0: (N, C, *) float32, or uint8 images.
        t, schedule, seed, sample_ids, step: as for `q_sample`.

    Returns:
        (N, C, *) float32 in x0's layout, without a gradient.

    Raises:
        TypeError, ValueError: as `q_sample`, and for another dtype of x0.
    """
    _check_inputs(x0, t, schedule.timesteps, None)
    if x0.dtype not in (torch.float32, torch.uint8):
        raise ValueError(f"x0 must be float32 or uint8, not {x0.dtype}")
    samples, device = x0.shape[0], x0.device
    if not _check.is_dense(x0):
        x0 = x0.contiguous()
    x_t = torch.empty_like(x0, dtype=torch.float32, requires_grad=False)
    NOISING_DRAWN[NOISING_DRAWN.choose(x_t)](
        x0,
        t,
        schedule.noising_coefficients(device),
        _check.seed_tensor(seed, device),
        _check.sample_id_tensor(sample_ids, samples, device),
        _check.counter_tensor(step, "step", samples, device),
        _check.STREAMS["training"],
        x_t,
    )
    return x_t
