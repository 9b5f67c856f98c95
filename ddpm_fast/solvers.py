"""Coefficient tables: a solver is a table with one row a step, which one kernel applies.

A row holds everything that a step needs besides the images, so that a step is

    x0 = x0_from_x * x_t - x0_from_output * output        (epsilon and v; the output itself for x0)
    x_prev = mean_from_x0 * clip(x0) + mean_from_x * x_t + sigma * z

Tables are built in float64 and cast to float32 once, on the CPU, so that every device computes with the
same bits.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_fast.schedule import NoiseSchedule

__all__ = [
    "COLUMNS",
    "PREDICTIONS",
    "SIGMA_SOLVERS",
    "VARIANCES",
    "CoefficientTable",
    "check_eta",
    "check_snr",
    "ddim_table",
    "ddpm_table",
    "langevin_table",
    "make_table",
]

COLUMNS = (
    "x0_from_x",
    "x0_from_output",
    "mean_from_x0",
    "mean_from_x",
    "sigma",
    "log_min",
    "log_max",
    "guidance_scale",
)
"""What the columns of a table hold, in order."""

PREDICTIONS = ("epsilon", "x0", "v", "x_prev")
"""What a network may predict."""

SIGMA_SOLVERS = ("dpmpp_2m", "euler", "heun", "euler_ancestral")
"""Solvers of the probability flow in sigma = sqrt(1 / abar - 1), and its stochastic relative. In terms of x_t an
Euler step is DDIM's with eta 0, and an ancestral one DDIM's with eta 1."""

VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
"""Where the variance of an ancestral step may come from."""


@dataclass(frozen=True, eq=False)
class CoefficientTable:
    """One row of coefficients for each of S steps, the noisiest first.

    Attributes:
        solver: "ddpm", "ddim", "plms", "langevin" or one of `SIGMA_SOLVERS`.
        prediction: one of `PREDICTIONS`.
        variance: one of `VARIANCES`.
        timesteps: int64 ``(S,)`` on the CPU, descending, numbered as in the original schedule.
        rows: float32 ``(S, 8)`` on the CPU, the columns of `COLUMNS`. Where the solver uses a learned
            variance, the sigma column is 1, and 0 at the last step, and multiplies the standard deviation
            that the network gives.
        rows64: float64 ``(S, 8)`` on the CPU: the same without the cast, to measure errors against.
        draws: how often the original draws noise in each step, whether or not it uses it.
        output_weight: float32 ``(S,)`` on the CPU, or None: a factor of the network's output that a second
            kernel adds to x_prev, where the step is not linear in the clipped x0 and x_t alone.
        x0_rows: float32 ``(S, 8)`` on the CPU, or None: the rows whose x0 is the true one, where that of
            `rows` is only a means to x_prev.
    """

    solver: str
    prediction: str
    variance: str
    timesteps: Tensor
    rows: Tensor
    rows64: Tensor
    draws: tuple[int, ...]
    output_weight: Tensor | None = None
    x0_rows: Tensor | None = None

    @property
    def steps(self) -> int:
        """S, the number of steps."""
        return len(self.rows)

    @property
    def uses_learned_variance(self) -> bool:
        """Whether a step takes its variance from the network's output (DDIM never does)."""
        return self.solver == "ddpm" and self.variance in ("learned", "learned_range")

    @property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        return bool((self.rows[:, COLUMNS.index("sigma")] != 0).any())

    def __repr__(self) -> str:
        return (
            f"CoefficientTable(solver={self.solver!r}, prediction={self.prediction!r}, "
            f"variance={self.variance!r}, steps={self.steps}, "
            f"timesteps {int(self.timesteps[0])} .. {int(self.timesteps[-1])})"
        )


def ddpm_table(
    schedule: NoiseSchedule,
    *,
    prediction: str = "epsilon",
    variance: str = "fixed_small",
    guidance_scale: float = 1.0,
    log_betas: Tensor | None = None,
    variance_floor: float | None = None,
) -> CoefficientTable:
    """Ancestral sampling with the posterior q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7).

    The table has a row for each timestep of the schedule. sigma is ``exp(0.5f * float32(log variance))`` in
    float32. The log variance of "fixed_small" is the clipped one of the posterior, that of "fixed_large" is
    log(beta) with the posterior's at the cleanest step. "learned_range" puts the first into log_min and
    log(beta) into log_max (Nichol, Dhariwal 2021, eq. 15). The last step adds no noise. `log_betas`,
    float64 ``(T,)``, takes the place of log(beta), and `variance_floor` that of the clipped variance at the
    cleanest step.

    Raises:
        TypeError: `schedule` is no NoiseSchedule.
        ValueError: an unknown `prediction` or `variance`, or coefficients beyond the range of float32, as
            epsilon prediction has at a timestep without signal (zero terminal signal-to-noise ratio).
    """
    _check(schedule, prediction, variance)
    x0_from_x, x0_from_output = _x0_columns(schedule, prediction)
    small = schedule.posterior_log_variance_clipped
    if variance_floor is not None:
        small[0] = math.log(max(float(schedule.posterior_variance[0]), variance_floor))
    log_betas = schedule.betas.log() if log_betas is None else log_betas
    mask = torch.ones_like(small)
    mask[0] = 0.0
    zeros = torch.zeros_like(small)
    log_min, log_max = (small, log_betas) if variance == "learned_range" else (zeros, zeros)
    if variance in ("learned", "learned_range"):
        sigma, sigma64 = mask.float(), mask
    else:
        log_variance = small if variance == "fixed_small" else torch.cat([small[:1], log_betas[1:]])
        sigma = mask.float() * torch.exp(0.5 * log_variance.float())
        sigma64 = mask * torch.exp(0.5 * log_variance)
    return make_table(
        "ddpm",
        schedule,
        prediction,
        variance,
        [
            x0_from_x,
            x0_from_output,
            schedule.posterior_mean_coef1,
            schedule.posterior_mean_coef2,
            sigma64,
            log_min,
            log_max,
            torch.full_like(small, guidance_scale),
        ],
        sigma,
    )


def ddim_table(
    schedule: NoiseSchedule,
    *,
    prediction: str = "epsilon",
    variance: str = "fixed_small",
    eta: float = 0.0,
    guidance_scale: float = 1.0,
    final_alpha_cumprod: float | None = None,
) -> CoefficientTable:
    """DDIM (Song, Meng, Ermon 2021, eqs. 12 and 16), a row for each timestep.

    epsilon is the one that belongs to the clipped x0, as in openai's code, which makes the step linear in
    x0 and x_t. `eta` is 0 for the deterministic sampler and 1 for the variance of the DDPM posterior;
    `variance` says only what the network's output carries, for DDIM does not use a learned variance.
    `final_alpha_cumprod` is the abar that the last step ends at, unless the schedule's own, which is 1.

    Raises:
        TypeError: `schedule` is no NoiseSchedule or `eta` no real number.
        ValueError: as :func:`ddpm_table`; "x_prev" prediction, which determines a DDPM step and no other;
            `eta` outside [0, 1].
    """
    _check(schedule, prediction, variance)
    check_eta(eta)
    if prediction == "x_prev":
        raise ValueError("prediction='x_prev' is the mean of a DDPM step: use solver='ddpm'")
    x0_from_x, x0_from_output = _x0_columns(schedule, prediction)
    abar, abar_prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    if final_alpha_cumprod is not None:
        abar_prev[0] = final_alpha_cumprod
    sigma = eta * torch.sqrt((1.0 - abar_prev) / (1.0 - abar) * (1.0 - abar / abar_prev))
    # 1 - abar_prev - sigma^2, the factor of epsilon squared, written as a sum of terms that are not negative.
    shrink = abar * (1.0 - abar_prev) / (abar_prev * (1.0 - abar))
    direction = torch.sqrt((1.0 - abar_prev) * ((1.0 - eta**2) + eta**2 * shrink))
    epsilon_from_x = torch.rsqrt(1.0 - abar)
    zeros = torch.zeros_like(abar)
    return make_table(
        "ddim",
        schedule,
        prediction,
        variance,
        [
            x0_from_x,
            x0_from_output,
            torch.sqrt(abar_prev) - direction * torch.sqrt(abar) * epsilon_from_x,
            direction * epsilon_from_x,
            sigma,
            zeros,
            zeros,
            torch.full_like(abar, guidance_scale),
        ],
        sigma.float(),
    )


def langevin_table(
    schedule: NoiseSchedule,
    *,
    prediction: str = "epsilon",
    variance: str = "fixed_small",
    snr: float = 0.16,
    guidance_scale: float = 1.0,
    updates: int = 1,
    denoise_last: bool = False,
) -> CoefficientTable:
    """Langevin dynamics at the schedule's levels: ``x + delta * score(x) + sqrt(2 delta) * z``, `updates` rows a level.

    The step size is that of the corrector of Song et al. 2021, algorithm 5, ``delta = 2 alpha (r |z| / |score|)^2``,
    with the squared norms at their expected values, D of z and ``D / (1 - abar)`` of the score: so
    ``delta = 2 alpha r^2 (1 - abar)``, which neither the batch nor the draw changes. The score belongs to the (clipped)
    x0 by Tweedie's formula, which makes the update linear in x0 and x. At a level of variance v the stationary variance
    of the updates is ``v / (1 - delta / (2 v))``.

    Args:
        schedule: the levels.
        prediction, variance: what the network's output carries.
        snr: r, in (0, 1): larger steps, quicker and less exact.
        guidance_scale: w of classifier-free guidance.
        updates: rows of each level, one after the other.
        denoise_last: whether the last row is x0 itself, without noise: the end of a sampler.

    Raises:
        TypeError: `schedule` is no NoiseSchedule or `snr` no real number.
        ValueError: as :func:`ddpm_table`; "x_prev" prediction, which has no score; `snr` outside (0, 1).
    """
    _check(schedule, prediction, variance)
    check_snr(snr)
    if prediction == "x_prev":
        raise ValueError("prediction='x_prev' is the mean of a DDPM step and has no score: no Langevin dynamics")
    x0_from_x, x0_from_output = _x0_columns(schedule, prediction)
    ratio = 2.0 * snr**2 * schedule.alphas  # delta / (1 - abar)
    mean_from_x0 = ratio * schedule.sqrt_alphas_cumprod
    mean_from_x = 1.0 - ratio
    sigma = torch.sqrt(2.0 * ratio) * schedule.sqrt_one_minus_alphas_cumprod
    zeros = torch.zeros_like(sigma)
    columns = [x0_from_x, x0_from_output, mean_from_x0, mean_from_x, sigma, zeros, zeros]
    columns = [column.repeat_interleave(updates) for column in (*columns, torch.full_like(sigma, guidance_scale))]
    if denoise_last:
        for name, value in (("mean_from_x0", 1.0), ("mean_from_x", 0.0), ("sigma", 0.0)):
            columns[COLUMNS.index(name)][0] = value
    table = make_table(
        "langevin", schedule, prediction, variance, columns, columns[COLUMNS.index("sigma")].float(), updates=updates
    )
    return dataclasses.replace(table, draws=(*table.draws[:-1], 0)) if denoise_last else table


def _x0_columns(schedule: NoiseSchedule, prediction: str) -> tuple[Tensor, Tensor]:
    if prediction == "epsilon":
        return schedule.sqrt_recip_alphas_cumprod, schedule.sqrt_recipm1_alphas_cumprod
    if prediction == "v":
        return schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    zeros = torch.zeros(schedule.timesteps, dtype=torch.float64)
    return zeros, zeros


def make_table(
    solver: str,
    schedule: NoiseSchedule,
    prediction: str,
    variance: str,
    columns: list[Tensor],
    sigma: Tensor,
    draws: tuple[int, ...] | None = None,
    output_weight: Tensor | None = None,
    x0_rows: Tensor | None = None,
    updates: int = 1,
) -> CoefficientTable:
    """A table from its columns, which are float64 ``(T,)`` in the order of the schedule, cleanest step first.

    With `updates` they are ``(T * updates,)``, as many entries for each timestep.

    `sigma` is its float32 column, not always a plain cast. The rest is as in :class:`CoefficientTable`, noisiest
    step first; `draws` is once a step unless given.

    Raises:
        ValueError: a coefficient beyond the range of float32.
    """
    rows64 = torch.stack(columns, dim=1).flip(0)
    rows = rows64.float()
    rows[:, COLUMNS.index("sigma")] = sigma.flip(0)
    timesteps = schedule.timestep_map.flip(0).repeat_interleave(updates)
    finite = torch.isfinite(rows)
    if not finite.all():
        row, column = (int(v) for v in (~finite).nonzero()[0])
        t = int(timesteps[row])
        abar = float(schedule.alphas_cumprod.flip(0)[row // updates])
        where = f"at timestep {t}, where alphas_cumprod is {abar:.3g}"
        if prediction == "epsilon" and COLUMNS[column].startswith("x0"):
            raise ValueError(
                f"prediction='epsilon' cannot recover x0 {where}: "
                f"use a network that predicts v or x0, or another schedule"
            )
        raise ValueError(f"{COLUMNS[column]} is not finite in float32 {where}")
    draws = (1,) * len(rows) if draws is None else draws
    return CoefficientTable(
        solver, prediction, variance, timesteps, rows, rows64, draws, output_weight=output_weight, x0_rows=x0_rows
    )


def check_eta(eta: float) -> float:
    """`eta` if it is DDIM's, an error otherwise."""
    if isinstance(eta, bool) or not isinstance(eta, (int, float)):
        raise TypeError(f"eta must be a real number, got {type(eta).__name__}")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    return float(eta)


def check_snr(snr: float) -> float:
    """`snr` if Langevin dynamics can be run with it, an error otherwise."""
    if isinstance(snr, bool) or not isinstance(snr, (int, float)):
        raise TypeError(f"corrector_snr must be a real number, got {type(snr).__name__}")
    if not 0.0 < snr < 1.0:
        raise ValueError(f"corrector_snr must lie in (0, 1), got {snr}")
    return float(snr)


def _check(schedule: NoiseSchedule, prediction: str, variance: str) -> None:
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}")
