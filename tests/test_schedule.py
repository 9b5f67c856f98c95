"""NoiseSchedule: the formulas, the choice of steps, what is refused, and the object itself."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast.schedule import NoiseSchedule

NAMES = ("linear", "cosine", "quadratic", "sigmoid", "scaled_linear")
TABLES = (
    "betas",
    "alphas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "snr",
)


# ---------------------------------------------------------------------- formulas


def test_linear_is_evenly_spaced_between_its_endpoints():
    betas = NoiseSchedule.linear(1000).betas
    expected = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    # The formula's own rounding, in float64.
    torch.testing.assert_close(betas, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    assert betas[0] == 1e-4
    assert betas[-1] == 0.02


@pytest.mark.parametrize("timesteps", [1, 2, 5, 20, 21])
def test_linear_stays_finite_for_few_steps(timesteps):
    schedule = NoiseSchedule.linear(timesteps)
    assert all(torch.isfinite(getattr(schedule, name)).all() for name in TABLES)


def test_rescaled_linear_with_few_steps_is_an_error_not_nan():
    with pytest.raises(ValueError, match=r"beta_end must lie in \(0, 1\), got 2\.0"):
        NoiseSchedule.linear(10, 0.1 / 10, 20 / 10)


def test_cosine_follows_the_squared_cosine():
    def abar(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = NoiseSchedule.cosine(1000)
    expected = [abar((i + 1) / 1000) / abar(0) for i in range(999)]  # the last beta is capped
    torch.testing.assert_close(
        schedule.alphas_cumprod[:-1], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0
    )
    assert schedule.betas[-1] == 0.999


def test_quadratic_and_scaled_linear_square_a_line():
    for schedule, start, end in (
        (NoiseSchedule.quadratic(300), 1e-4, 0.02),
        (NoiseSchedule.scaled_linear(300), 0.00085, 0.012),
    ):
        roots = schedule.betas.sqrt()
        torch.testing.assert_close(
            roots.diff(), torch.full((299,), (end**0.5 - start**0.5) / 299).double(), rtol=1e-6, atol=0
        )
        torch.testing.assert_close(roots[[0, -1]], torch.tensor([start, end]).double().sqrt(), rtol=1e-7, atol=0)


def test_sigmoid_runs_from_minus_six_to_six():
    u = torch.linspace(-6, 6, 200, dtype=torch.float64)
    expected = torch.sigmoid(u) * (0.02 - 1e-4) + 1e-4
    torch.testing.assert_close(NoiseSchedule.sigmoid(200).betas, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_named_is_the_class_method_of_that_name(name):
    assert NoiseSchedule.named(name, 50) == getattr(NoiseSchedule, name)(50)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-6, 0.5, allow_nan=False), min_size=1, max_size=40))
def test_every_table_follows_from_the_betas(betas):
    schedule = NoiseSchedule.from_betas(betas)
    beta = torch.tensor(betas, dtype=torch.float64)
    abar = torch.tensor(np.cumprod(1.0 - np.array(betas)))
    previous = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    variance = beta * (1 - previous) / (1 - abar)
    expected = {
        "betas": beta,
        "alphas": 1 - beta,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": abar**0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - abar) ** 0.5,
        "sqrt_recip_alphas_cumprod": abar**-0.5,
        "sqrt_recipm1_alphas_cumprod": (1 / abar - 1) ** 0.5,
        "posterior_variance": variance,
        "posterior_mean_coef1": beta * previous.sqrt() / (1 - abar),
        "posterior_mean_coef2": (1 - previous) * (1 - beta).sqrt() / (1 - abar),
        "snr": abar / (1 - abar),
    }
    for name, value in expected.items():
        table = getattr(schedule, name)
        assert table.dtype == torch.float64
        assert table.shape == (len(betas),)
        # Two roundings of the same formula, a few units in the last place apart.
        torch.testing.assert_close(table, value, rtol=1e-14, atol=0, msg=name)
    floor = variance[1] if len(betas) > 1 else torch.tensor(1e-20, dtype=torch.float64)
    clipped = torch.cat([floor[None], variance[1:]]).log()
    torch.testing.assert_close(schedule.posterior_log_variance_clipped, clipped, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("timesteps", [1, 2, 10, 1000])
def test_posterior_mean_keeps_a_clean_image(name, timesteps):
    """With x_t = sqrt(abar) x_0 the posterior's mean is sqrt(abar_prev) x_0: both coefficients are right."""
    s = NoiseSchedule.named(name, timesteps)
    mean = s.posterior_mean_coef1 + s.posterior_mean_coef2 * s.sqrt_alphas_cumprod
    torch.testing.assert_close(mean, s.alphas_cumprod_prev.sqrt(), rtol=1e-10, atol=1e-13)


def test_from_betas_accepts_tensors_arrays_and_sequences():
    values = [0.1, 0.2, 0.15]
    for given_betas in (values, tuple(values), np.array(values), torch.tensor(values, dtype=torch.float64)):
        assert NoiseSchedule.from_betas(given_betas) == NoiseSchedule.from_betas(values)
    assert NoiseSchedule.from_betas(torch.tensor(values)).betas.dtype == torch.float64


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, 0.0, 0.2], r"betas\[1\] = 0\.0 is outside \(0, 1\)"),
        ([0.1, 0.2, -0.5, -1.0], r"betas\[2\] = -0\.5 is outside"),
        ([0.1, 1.0, 0.2], r"betas\[1\] = 1\.0 is outside"),
        ([0.1, 1.5], r"betas\[1\] = 1\.5 is outside"),
        ([float("nan"), 0.2], r"betas\[0\] = nan is outside"),
        ([0.1, float("inf")], r"betas\[1\] = inf is outside"),
        ([], "at least one timestep"),
        ([[0.1, 0.2]], r"one dimension, got shape \(1, 2\)"),
        ([1e-17, 0.1], r"betas\[0\] = 1e-17 is too small"),
    ],
    ids=["zero", "first-of-two", "one-inside", "above-one", "nan", "inf", "empty", "matrix", "too-small"],
)
def test_from_betas_names_what_is_wrong(betas, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_betas(betas)


def test_last_beta_may_be_one():
    assert NoiseSchedule.from_betas([0.1, 0.5, 1.0]).alphas_cumprod[-1] == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NoiseSchedule.linear(0), ValueError, "timesteps must be at least 1, got 0"),
        (lambda: NoiseSchedule.cosine(-3), ValueError, "timesteps must be at least 1, got -3"),
        (lambda: NoiseSchedule.linear(10.0), TypeError, "timesteps must be an int, got float"),
        (lambda: NoiseSchedule.linear(True), TypeError, "timesteps must be an int, got bool"),
        (
            lambda: NoiseSchedule.linear(10, 0.02, 1e-4),
            ValueError,
            r"beta_start = 0\.02 must not exceed beta_end",
        ),
        (lambda: NoiseSchedule.quadratic(10, 0.02, 1e-4), ValueError, "must not exceed"),
        (lambda: NoiseSchedule.sigmoid(10, 0.02, 1e-4), ValueError, "must not exceed"),
        (lambda: NoiseSchedule.scaled_linear(10, 0.02, 1e-4), ValueError, "must not exceed"),
        (lambda: NoiseSchedule.linear(10, 0.0), ValueError, r"beta_start must lie in \(0, 1\), got 0\.0"),
        (lambda: NoiseSchedule.linear(10, 0.1, math.nan), ValueError, "beta_end must be finite, got nan"),
        (lambda: NoiseSchedule.linear(10, "a"), TypeError, "beta_start must be a real number, got str"),
        (lambda: NoiseSchedule.cosine(10, s=-1.0), ValueError, r"s must be at least 0, got -1\.0"),
        (
            lambda: NoiseSchedule.cosine(10, max_beta=1.5),
            ValueError,
            r"max_beta must lie in \(0, 1\], got 1\.5",
        ),
        (lambda: NoiseSchedule.named("cubic", 10), ValueError, "'cubic': choose one of linear, cosine"),
        (lambda: NoiseSchedule.named(3, 10), TypeError, "name must be a string, got int"),
        (lambda: NoiseSchedule.from_betas("abc"), TypeError, "got str"),
        (
            lambda: NoiseSchedule.from_betas(torch.tensor([0.1j])),
            TypeError,
            "real numbers, got dtype torch.complex64",
        ),
        (lambda: NoiseSchedule(), TypeError, "no constructor"),
    ],
)
def test_constructors_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---------------------------------------------------------------------- respacing

COUNTS = st.integers(1, 60).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total)))
SCHEDULE = NoiseSchedule.linear(1000)


def assert_steps(schedule: NoiseSchedule, total: int, count: int) -> None:
    kept = schedule.timestep_map.tolist()
    assert len(kept) == count == schedule.timesteps
    assert kept == sorted(set(kept))
    assert kept[0] >= 0
    assert kept[-1] < total
    full = NoiseSchedule.linear(total)
    # abar is rebuilt from rebuilt betas: the rounding of at most 60 divisions and products.
    torch.testing.assert_close(schedule.alphas_cumprod, full.alphas_cumprod[kept], rtol=1e-13, atol=0)


@settings(max_examples=200, deadline=None)
@given(COUNTS, st.sampled_from([None, "leading", "trailing", "linspace"]))
def test_respacing_keeps_n_distinct_steps_and_their_abar(counts, spacing):
    total, count = counts
    assert_steps(NoiseSchedule.linear(total).respace(count, spacing=spacing), total, count)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_sections_share_the_steps_out(data):
    total = data.draw(st.integers(1, 60))
    sections = data.draw(st.integers(1, total))
    size, longer = divmod(total, sections)
    counts = [data.draw(st.integers(1, size + (k < longer))) for k in range(sections)]
    respaced = NoiseSchedule.linear(total).respace(",".join(map(str, counts)))
    assert_steps(respaced, total, sum(counts))
    ends = np.cumsum([size + (k < longer) for k in range(sections)])
    kept = np.array(respaced.timestep_map.tolist())
    assert [int(((kept >= e - size - (k < longer)) & (kept < e)).sum()) for k, e in enumerate(ends)] == counts


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 59), min_size=1, unique=True), st.booleans())
def test_explicit_steps_in_either_order(steps, descending):
    steps.sort(reverse=descending)
    assert_steps(NoiseSchedule.linear(60).respace(steps), 60, len(steps))


@pytest.mark.parametrize(
    ("specification", "expected"),
    [
        ("5", [0, 250, 500, 749, 999]),  # 249.75 and 499.5 (to even) and 749.25
        (5, [0, 250, 500, 749, 999]),
        ("1", [0]),
        ("3,2", [0, 250, 499, 500, 999]),  # 249.5 rounds to even
        ("0,2", [500, 999]),
        ("ddim4", [0, 250, 500, 750]),
        ("ddim50", list(range(0, 1000, 20))),
        (
            "fast27",
            [
                *(0, 22, 44, 66, 88, 111, 133, 155, 177, 199),
                *(200, 222, 244, 266, 288, 311, 333, 355, 377, 399),
                *(400, 500, 599, 600, 799, 800, 997),
            ],
        ),
        ([981, 961, 1], [1, 961, 981]),
        (torch.tensor([1, 961]), [1, 961]),
        (range(0, 1000, 500), [0, 500]),
    ],
)
def test_specifications(specification, expected):
    assert SCHEDULE.respace(specification).timestep_map.tolist() == expected


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [("leading", [0, 250, 500, 750]), ("trailing", [249, 499, 749, 999]), ("linspace", [0, 333, 666, 999])],
)
def test_spacings(spacing, expected):
    assert SCHEDULE.respace(4, spacing=spacing).timestep_map.tolist() == expected


@pytest.mark.parametrize("name", ["linear", "cosine", "quadratic", "sigmoid", "scaled_linear"])
def test_a_schedule_knows_what_made_it(name):
    schedule = NoiseSchedule.named(name, 100)
    assert schedule.name == schedule.respace(10).name == name
    assert schedule.karras(3).name == "karras"
    assert NoiseSchedule.from_betas([0.1, 0.2]).name == "from_betas"
    assert NoiseSchedule.log_snr("cosine", 3).name == "log_snr"


def test_all_steps_are_the_same_schedule():
    assert SCHEDULE.respace(1000) == SCHEDULE
    assert SCHEDULE.respace("1000") == SCHEDULE


def test_respacing_twice_keeps_the_original_numbers():
    once = SCHEDULE.respace("ddim100")
    twice = once.respace([0, 50, 99])
    assert twice.timestep_map.tolist() == [0, 500, 990]
    assert twice.original_timesteps == 1000


@pytest.mark.parametrize(
    ("steps", "spacing", "error", "message"),
    [
        (0, None, ValueError, "between 1 and the schedule's 1000, got 0"),
        (1001, None, ValueError, "got 1001"),
        (1001, "leading", ValueError, "got 1001"),
        (
            50,
            "middle",
            ValueError,
            "spacing must be None or one of leading, trailing, linspace, got 'middle'",
        ),
        ("50", "leading", ValueError, "spacing='leading' needs a number of steps"),
        ("ddim51", None, ValueError, "no integer stride takes exactly 51 of 1000"),
        ("ddim", None, ValueError, "'ddim' is not understood"),
        ("ten", None, ValueError, "'ten' is not understood"),
        ("fast28", None, ValueError, "'fast28' is not understood"),
        ("10,,5", None, ValueError, "is not understood"),
        ("-5", None, ValueError, "is not understood"),
        ("0", None, ValueError, "at least one step"),
        ("10,501", None, ValueError, "cannot take 501 steps from section 1, which has 500"),
        ([], None, ValueError, "steps is empty"),
        ([5, 1000], None, ValueError, r"steps\[1\] = 1000 is outside 0 \.\. 999"),
        ([-1, 5], None, ValueError, r"steps\[0\] = -1 is outside"),
        ([5, 7, 7], None, ValueError, "holds 7 more than once"),
        ([5, 9, 7], None, ValueError, "ascending or descending"),
        ([5, 7.0], None, TypeError, r"steps\[1\] must be an int, got float"),
        (torch.tensor([1.0]), None, TypeError, "tensor of torch.float32"),
        (5.0, None, TypeError, "got float"),
        (True, None, TypeError, "got bool"),
        (None, None, TypeError, "got NoneType"),
    ],
)
def test_respace_refuses(steps, spacing, error, message):
    with pytest.raises(error, match=message):
        SCHEDULE.respace(steps, spacing=spacing)


# ---------------------------------------------------------------------- zero terminal SNR


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr(name):
    before = NoiseSchedule.named(name, 200)
    after = before.rescale_zero_terminal_snr()
    assert after.betas[-1] == 1
    assert after.alphas_cumprod[-1] == 0
    assert after.snr[-1] == 0
    torch.testing.assert_close(after.alphas_cumprod[0], before.alphas_cumprod[0], rtol=1e-14, atol=0)
    # Shifting and scaling keeps the proportions of sqrt(abar).
    old, new = before.sqrt_alphas_cumprod, after.sqrt_alphas_cumprod
    torch.testing.assert_close(new, (old - old[-1]) * (old[0] / (old[0] - old[-1])), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(after.rescale_zero_terminal_snr().betas, after.betas, rtol=1e-12, atol=1e-15)


def test_zero_terminal_snr_survives_respacing():
    respaced = SCHEDULE.rescale_zero_terminal_snr().respace(10, spacing="trailing")
    assert respaced.alphas_cumprod[-1] == 0
    assert respaced.timestep_map[-1] == 999


def test_zero_terminal_snr_needs_two_steps():
    with pytest.raises(ValueError, match="at least 2 timesteps"):
        NoiseSchedule.linear(1).rescale_zero_terminal_snr()


# ---------------------------------------------------------------------- the object


def test_tables_are_copies():
    schedule = NoiseSchedule.linear(10)
    for name in TABLES:
        before = getattr(schedule, name)
        getattr(schedule, name).zero_()
        torch.testing.assert_close(getattr(schedule, name), before, rtol=0, atol=0)
    values = torch.tensor([0.1, 0.2], dtype=torch.float64)
    made = NoiseSchedule.from_betas(values)
    values.zero_()
    assert made.betas.tolist() == [0.1, 0.2]


def test_attributes_cannot_be_set_or_deleted():
    schedule = NoiseSchedule.linear(10)
    with pytest.raises(AttributeError, match="immutable"):
        schedule.betas = torch.zeros(10)
    with pytest.raises(AttributeError, match="immutable"):
        del schedule._betas


def test_equality_hash_and_copies():
    a, b = NoiseSchedule.linear(10), NoiseSchedule.linear(10)
    assert a == b
    assert hash(a) == hash(b)
    assert a != NoiseSchedule.linear(11)
    assert a != NoiseSchedule.linear(10, 2e-4)
    assert a != "linear"
    half = NoiseSchedule.linear(20).respace(5)
    assert half != NoiseSchedule.from_betas(half.betas)  # the same betas under other numbers
    for other in (copy.copy(half), copy.deepcopy(half), pickle.loads(pickle.dumps(half))):
        assert other == half
        assert other.timestep_map.tolist() == half.timestep_map.tolist()


def test_repr_tells_the_essentials():
    assert repr(NoiseSchedule.linear(1000)) == (
        "NoiseSchedule(linear, timesteps=1000, betas 0.0001 .. 0.02, alphas_cumprod 0.9999 .. 4.03583e-05)"
    )
    assert "timesteps=50 of 1000" in repr(SCHEDULE.respace(50))
    assert len(SCHEDULE) == 1000


def test_noising_coefficients_are_cast_once_and_shared():
    schedule = NoiseSchedule.cosine(100)
    table = schedule.noising_coefficients("cpu")
    assert table.dtype == torch.float32
    assert table.shape == (100, 2)
    assert torch.equal(table[:, 0], schedule.sqrt_alphas_cumprod.float())
    assert torch.equal(table[:, 1], schedule.sqrt_one_minus_alphas_cumprod.float())
    assert schedule.noising_coefficients(torch.device("cpu")) is table
