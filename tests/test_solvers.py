"""Coefficient tables: against the formulas in float64, and bit for bit against tables cast one by one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.solvers import COLUMNS, PREDICTIONS, VARIANCES, CoefficientTable, ddim_table, ddpm_table

NAMES = ("linear", "cosine", "quadratic", "sigmoid", "scaled_linear")


def column(table: CoefficientTable, name: str) -> torch.Tensor:
    return table.rows[:, COLUMNS.index(name)]


def column64(table: CoefficientTable, name: str) -> torch.Tensor:
    return table.rows64[:, COLUMNS.index(name)]


def openai_tables(betas: np.ndarray) -> dict[str, np.ndarray]:
    """The float64 tables of a GaussianDiffusion, from its betas, in numpy."""
    abar = np.cumprod(1.0 - betas)
    previous = np.append(1.0, abar[:-1])
    variance = betas * (1.0 - previous) / (1.0 - abar)
    return {
        "recip": np.sqrt(1.0 / abar),
        "recipm1": np.sqrt(1.0 / abar - 1),
        "root": np.sqrt(abar),
        "root1m": np.sqrt(1.0 - abar),
        "coef1": betas * np.sqrt(previous) / (1.0 - abar),
        "coef2": (1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - abar),
        "fixed_small": np.log(np.append(variance[1], variance[1:])),
        "fixed_large": np.log(np.append(variance[1], betas[1:])),
        "log_betas": np.log(betas),
    }


def as_read(table: np.ndarray) -> torch.Tensor:
    """What a loop reads for its S steps: each float64 entry cast to float32, the noisiest first."""
    return torch.stack([torch.from_numpy(table)[t].float() for t in reversed(range(len(table)))])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_columns_are_bit_equal_to_openais_casts(name, variance):
    schedule = NoiseSchedule.named(name, 1000)
    tables = openai_tables(schedule.betas.numpy())
    epsilon = ddpm_table(schedule, variance=variance)
    v = ddpm_table(schedule, variance=variance, prediction="v")
    for table, name_, key in (
        (epsilon, "x0_from_x", "recip"),
        (epsilon, "x0_from_output", "recipm1"),
        (v, "x0_from_x", "root"),
        (v, "x0_from_output", "root1m"),
        (epsilon, "mean_from_x0", "coef1"),
        (epsilon, "mean_from_x", "coef2"),
    ):
        assert torch.equal(column(table, name_), as_read(tables[key])), key
    # One exponential a step on a tensor of one element, as the loops that broadcast it compute it.
    log_variance = as_read(tables[variance])
    sigma = torch.stack([torch.exp(0.5 * value.reshape(1, 1, 1, 1)).reshape(()) for value in log_variance])
    assert torch.equal(column(epsilon, "sigma")[:-1], sigma[:-1])
    assert column(epsilon, "sigma")[-1] == 0


@pytest.mark.parametrize("name", NAMES)
def test_learned_range_columns_are_bit_equal_to_openais_casts(name):
    schedule = NoiseSchedule.named(name, 1000)
    tables = openai_tables(schedule.betas.numpy())
    table = ddpm_table(schedule, variance="learned_range")
    assert torch.equal(column(table, "log_min"), as_read(tables["fixed_small"]))
    assert torch.equal(column(table, "log_max"), as_read(tables["log_betas"]))
    assert column(table, "sigma").tolist() == [1.0] * 999 + [0.0]


def test_learned_variance_needs_only_the_mask():
    table = ddpm_table(NoiseSchedule.linear(10), variance="learned")
    assert column(table, "sigma").tolist() == [1.0] * 9 + [0.0]
    assert not column(table, "log_min").any()
    assert not column(table, "log_max").any()
    assert table.uses_learned_variance


def test_sigma_is_rounded_in_float32_not_cast_from_float64():
    """The two differ in some rows, and it is the float32 one that the loops have."""
    table = ddpm_table(NoiseSchedule.linear(1000))
    assert not torch.equal(column(table, "sigma"), column64(table, "sigma").float())
    torch.testing.assert_close(column(table, "sigma").double(), column64(table, "sigma"), rtol=2e-6, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_ddpm_rows_are_casts_of_the_float64_rows(prediction, variance):
    table = ddpm_table(NoiseSchedule.cosine(50), prediction=prediction, variance=variance, guidance_scale=3.5)
    others = [k for k, name in enumerate(COLUMNS) if name != "sigma"]
    assert torch.equal(table.rows[:, others], table.rows64[:, others].float())
    assert (column(table, "guidance_scale") == 3.5).all()
    assert (table.solver, table.prediction, table.variance) == ("ddpm", prediction, variance)
    if prediction in ("x0", "x_prev"):
        assert not column(table, "x0_from_x").any()
        assert not column(table, "x0_from_output").any()


@pytest.mark.parametrize("make", [ddpm_table, ddim_table])
def test_rows_run_from_the_noisiest_step_in_original_numbers(make):
    schedule = NoiseSchedule.linear(1000).respace("ddim50")
    table = make(schedule)
    assert table.timesteps.tolist() == list(range(980, -1, -20))
    assert table.timesteps.dtype == torch.int64
    assert table.rows.shape == (50, 8)
    assert table.rows.dtype == torch.float32
    assert table.rows64.dtype == torch.float64
    assert table.steps == 50
    assert torch.equal(column64(table, "x0_from_x"), schedule.sqrt_recip_alphas_cumprod.flip(0))


# ---------------------------------------------------------------------- DDIM


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_ddim_row_is_the_papers_step(prediction, eta):
    """Equation 12, with the epsilon that belongs to x0, in float64 on random numbers."""
    schedule = NoiseSchedule.linear(1000).respace("ddim25")
    table = ddim_table(schedule, prediction=prediction, eta=eta)
    generator = torch.Generator().manual_seed(1)
    x, output, z = torch.randn(3, 25, generator=generator, dtype=torch.float64)
    abar, previous = schedule.alphas_cumprod.flip(0), schedule.alphas_cumprod_prev.flip(0)
    x0 = {
        "epsilon": (x - (1 - abar).sqrt() * output) / abar.sqrt(),
        "x0": output,
        "v": abar.sqrt() * x - (1 - abar).sqrt() * output,
    }[prediction].clamp(-1, 1)
    epsilon = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
    sigma = eta * ((1 - previous) / (1 - abar)).sqrt() * (1 - abar / previous).sqrt()
    expected = previous.sqrt() * x0 + (1 - previous - sigma**2).sqrt() * epsilon + sigma * z
    row = dict(zip(COLUMNS, table.rows64.unbind(1), strict=True))
    ours = output if prediction == "x0" else row["x0_from_x"] * x - row["x0_from_output"] * output
    result = row["mean_from_x0"] * ours.clamp(-1, 1) + row["mean_from_x"] * x + row["sigma"] * z
    # float64 roundings of about five terms of size 1.
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)


def test_ddim_with_eta_one_has_ddpms_variance_and_mean():
    schedule = NoiseSchedule.linear(100)
    ddim, ddpm = ddim_table(schedule, eta=1.0), ddpm_table(schedule)
    for name in ("mean_from_x0", "mean_from_x", "sigma"):
        # 1e-12: mean_from_x0 is a difference of two numbers near 1.
        torch.testing.assert_close(column64(ddim, name), column64(ddpm, name), rtol=1e-9, atol=1e-12)


def test_ddim_last_step_returns_x0():
    table = ddim_table(NoiseSchedule.linear(100).respace([99, 40, 7]), eta=0.7)
    assert column(table, "mean_from_x0")[-1] == 1
    assert column(table, "mean_from_x")[-1] == 0
    assert column(table, "sigma")[-1] == 0


def test_ddim_ignores_the_variance_of_the_network():
    table = ddim_table(NoiseSchedule.linear(10), variance="learned_range", eta=0.5)
    assert torch.equal(table.rows, ddim_table(NoiseSchedule.linear(10), eta=0.5).rows)
    assert not table.uses_learned_variance


def test_stochastic_says_whether_noise_is_added():
    schedule = NoiseSchedule.linear(10)
    assert ddpm_table(schedule).stochastic
    assert ddim_table(schedule, eta=0.1).stochastic
    assert not ddim_table(schedule).stochastic
    assert not ddpm_table(NoiseSchedule.linear(1)).stochastic


# ---------------------------------------------------------------------- zero terminal SNR and other edges


@pytest.mark.parametrize("make", [ddpm_table, ddim_table])
def test_zero_terminal_snr_refuses_epsilon_and_takes_the_others(make):
    schedule = NoiseSchedule.linear(1000).rescale_zero_terminal_snr()
    with pytest.raises(ValueError, match="cannot recover x0 at timestep 999, where alphas_cumprod is 0"):
        make(schedule)
    for prediction in ("v", "x0"):
        assert torch.isfinite(make(schedule, prediction=prediction).rows).all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_from_pure_noise_is_the_limit(eta):
    """At abar = 0 x is the noise itself, and takes the place of epsilon."""
    schedule = NoiseSchedule.linear(100).rescale_zero_terminal_snr()
    first = dict(zip(COLUMNS, ddim_table(schedule, prediction="v", eta=eta).rows64[0].tolist(), strict=True))
    previous = schedule.alphas_cumprod_prev[-1].item()
    assert first["mean_from_x0"] == pytest.approx(previous**0.5, rel=1e-15)
    assert first["mean_from_x"] == pytest.approx(0.0 if eta else (1 - previous) ** 0.5, rel=1e-15)
    assert first["sigma"] == pytest.approx(eta * (1 - previous) ** 0.5, rel=1e-15)


def test_vanishing_signal_is_refused_by_timestep():
    with pytest.raises(ValueError, match=r"cannot recover x0 at timestep \d+, where alphas_cumprod is"):
        ddpm_table(NoiseSchedule.linear(100_000))


@pytest.mark.parametrize("variance", VARIANCES)
def test_one_step(variance):
    table = ddpm_table(NoiseSchedule.linear(1), variance=variance)
    assert torch.isfinite(table.rows).all()
    assert column(table, "sigma").tolist() == [0.0]
    assert column(table, "mean_from_x0")[0] == pytest.approx(1.0, rel=1e-7)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda s: ddpm_table([0.1]), TypeError, "schedule must be a NoiseSchedule, got list"),
        (lambda s: ddpm_table(s, prediction="eps"), ValueError, "one of epsilon, x0, v, x_prev, got 'eps'"),
        (
            lambda s: ddpm_table(s, variance="small"),
            ValueError,
            "one of fixed_small, fixed_large, .* got 'small'",
        ),
        (lambda s: ddim_table(s, prediction="x_prev"), ValueError, "use solver='ddpm'"),
        (lambda s: ddim_table(s, eta=1.5), ValueError, r"eta must lie in \[0, 1\], got 1\.5"),
        (lambda s: ddim_table(s, eta=float("nan")), ValueError, "got nan"),
        (lambda s: ddim_table(s, eta="1"), TypeError, "eta must be a real number, got str"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make(NoiseSchedule.linear(10))


def test_tables_are_frozen():
    table = ddpm_table(NoiseSchedule.linear(10))
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.rows = table.rows64
    assert repr(table) == (
        "CoefficientTable(solver='ddpm', prediction='epsilon', variance='fixed_small', steps=10, timesteps 9 .. 0)"
    )
