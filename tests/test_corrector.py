"""The Langevin corrector: the paper's update, its noise, and what it goes together with."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.solvers import COLUMNS, langevin_table
from tests.originals.network import Net

SHAPE = (2, 4, 8, 8)
SCHEDULE = df.NoiseSchedule.linear(50)


def network(x: Tensor, t: Tensor) -> Tensor:
    """Elementwise: the same bits in any batch."""
    return x * 0.7 + (t.to(x.dtype) * 0.01).reshape(-1, *[1] * (x.dim() - 1))


def draw(step: int, stream: str, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return df.randn(shape, seed=3, step=step, stream=stream)


def test_rows_are_songs_update():
    """``x + delta * score + sqrt(2 delta) z`` with delta = 2 alpha (r |z| / |score|)^2, both norms expected ones."""
    snr = 0.2
    columns = dict(zip(COLUMNS, langevin_table(SCHEDULE, snr=snr).rows64.flip(0).unbind(1), strict=True))
    generator = torch.Generator().manual_seed(0)
    x, epsilon, z = (torch.randn(50, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    deviation = SCHEDULE.sqrt_one_minus_alphas_cumprod[:, None]
    score = -epsilon / deviation
    delta = 2.0 * SCHEDULE.alphas[:, None] * (snr * math.sqrt(5) / (math.sqrt(5) / deviation)) ** 2
    expected = x + delta * score + torch.sqrt(2.0 * delta) * z
    row = {name: column[:, None] for name, column in columns.items()}
    x0 = row["x0_from_x"] * x - row["x0_from_output"] * epsilon
    result = row["mean_from_x0"] * x0 + row["mean_from_x"] * x + row["sigma"] * z
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_all_predictions_give_one_update(prediction):
    row = dict(zip(COLUMNS, langevin_table(SCHEDULE, prediction=prediction).rows64[10].tolist(), strict=True))
    k = 50 - 1 - 10
    signal, deviation = SCHEDULE.sqrt_alphas_cumprod[k].item(), SCHEDULE.sqrt_one_minus_alphas_cumprod[k].item()
    x, x0 = 0.7, 0.3
    epsilon = (x - signal * x0) / deviation
    output = {"epsilon": epsilon, "x0": x0, "v": signal * epsilon - deviation * x0}[prediction]
    found = x0 if prediction == "x0" else row["x0_from_x"] * x - row["x0_from_output"] * output
    assert found == pytest.approx(x0, rel=1e-12)
    delta = 2.0 * SCHEDULE.alphas[k].item() * 0.16**2 * deviation**2
    assert row["mean_from_x0"] * x0 + row["mean_from_x"] * x == pytest.approx(
        x - delta * epsilon / deviation, rel=1e-12
    )
    assert row["sigma"] == pytest.approx(math.sqrt(2.0 * delta), rel=1e-12)


def test_the_stationary_variance_is_as_documented():
    """At the level of a standard normal, whose score is -x."""
    table = langevin_table(SCHEDULE, snr=0.5)
    row = dict(zip(COLUMNS, table.rows64[0].tolist(), strict=True))
    abar = SCHEDULE.alphas_cumprod[-1].item()
    factor = row["mean_from_x0"] * math.sqrt(abar) + row["mean_from_x"]  # x0 = sqrt(abar) x
    delta = 2.0 * SCHEDULE.alphas[-1].item() * 0.25 * (1.0 - abar)
    assert factor == pytest.approx(1.0 - delta, rel=1e-12)
    assert row["sigma"] ** 2 / (1.0 - factor**2) == pytest.approx(1.0 / (1.0 - delta / 2.0), rel=1e-9)


def test_rows_of_a_level_follow_each_other():
    table, single = langevin_table(SCHEDULE, updates=3), langevin_table(SCHEDULE)
    assert table.steps == 150
    assert torch.equal(table.rows[1::3], single.rows)
    assert torch.equal(table.timesteps[2::3], single.timesteps)


@pytest.mark.parametrize("updates", [1, 3])
def test_the_loop_written_out(backend, updates):
    """Updates at the level that a step starts from, then the step; each with its own stream of noise."""
    sampler = df.Sampler(network, SCHEDULE, steps=5, corrector_steps=updates, corrector_snr=0.3)
    predictor = df.Sampler(network, SCHEDULE, steps=5)
    rows = langevin_table(sampler.schedule, snr=0.3).rows
    x = draw(0, "x_T")
    for i, t in enumerate(sampler.timesteps):
        for j in range(updates):
            x0_from_x, x0_from_output, mean_from_x0, mean_from_x, sigma = rows[i, :5]
            x0 = (x0_from_x * x - x0_from_output * network(x, t.expand(2))).clamp(-1, 1)
            x = mean_from_x0 * x0 + mean_from_x * x + sigma * draw(i * updates + j, "corrector")
        x = predictor.step(x, network(x, t.expand(2)), i, seed=3)
    assert torch.equal(sampler.sample(SHAPE, seed=3), x)


def test_langevin_is_the_corrector_alone_and_ends_with_x0():
    sampler = df.Sampler(network, SCHEDULE, solver="langevin", steps=5, clip=None)
    rows = langevin_table(sampler.schedule).rows
    assert torch.equal(sampler.table.rows[:-1], rows[:-1])
    last = [*rows[-1, :2].tolist(), 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert sampler.table.rows[-1].tolist() == last
    states = list(sampler.stream(SHAPE, seed=3))
    assert torch.equal(states[-1].x, states[-1].x0)
    generator = torch.Generator().manual_seed(0)
    sampler.sample(SHAPE, generator=generator)
    by_hand = torch.Generator().manual_seed(0)
    for _ in range(5):  # x_T and four updates
        torch.empty(SHAPE).normal_(generator=by_hand)
    assert torch.equal(generator.get_state(), by_hand.get_state())


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "euler", "heun", "euler_ancestral", "langevin"])
def test_a_sample_does_not_depend_on_its_batch(backend, solver):
    sampler = df.Sampler(network, SCHEDULE, solver=solver, steps=6, corrector_steps=2)
    batch = sampler.sample((8, *SHAPE[1:]), seed=5)
    alone = sampler.sample((1, *SHAPE[1:]), seed=5, sample_ids=[6])
    assert torch.equal(batch[6:7], alone)


def test_given_noise_has_rows_for_the_corrector_first():
    sampler = df.Sampler(network, SCHEDULE, steps=4, corrector_steps=2)
    rows = [row for i in range(4) for row in (draw(2 * i, "corrector"), draw(2 * i + 1, "corrector"), draw(i, "noise"))]
    expected = sampler.sample(SHAPE, seed=3)
    assert torch.equal(sampler.sample(SHAPE, seed=3, noise=torch.stack(rows)), expected)
    seen: list[tuple[int, int]] = []

    def noise(number: int, t: int, shape: tuple[int, ...]) -> Tensor:
        seen.append((number, t))
        return rows[number]

    assert torch.equal(sampler.sample(SHAPE, seed=3, noise=noise), expected)
    assert seen == [(number, int(sampler.timesteps[number // 3])) for number in range(12)]
    with pytest.raises(ValueError, match="each of the 12 draws"):
        sampler.sample(SHAPE, noise=torch.stack(rows[:-1]))


def test_inpaintings_draws_come_behind_the_correctors():
    """Both use the stream "corrector"; no number is drawn twice."""
    sampler = df.Sampler(network, SCHEDULE, steps=3, corrector_steps=2)
    mask, known = torch.ones(1, 1, 8, 8), torch.zeros(SHAPE)
    mask[..., 4:] = 0.0
    x = sampler.sample(SHAPE, seed=3, mask=mask, known=known, blend="after")
    level = SCHEDULE.sqrt_one_minus_alphas_cumprod[0].float()
    assert torch.equal(x[..., :4], (level * draw(6 + 2, "corrector"))[..., :4])


def test_guidance_reaches_the_corrector():
    """A weight of one is the conditional network, whatever the unconditional one says."""

    def conditional(x: Tensor, t: Tensor, factor: float = 1.0) -> Tensor:
        return network(x, t) * factor

    plain = df.Sampler(network, SCHEDULE, steps=4, corrector_steps=1)
    guided = df.Sampler(conditional, SCHEDULE, steps=4, corrector_steps=1, guidance_scale=2.0)
    result = guided.sample(SHAPE, model_kwargs={"factor": 1.0}, uncond_kwargs={"factor": 1.0})
    assert torch.equal(result, plain.sample(SHAPE))
    half = guided.sample(SHAPE, model_kwargs={"factor": 0.75}, uncond_kwargs={"factor": 0.5})
    torch.testing.assert_close(half, plain.sample(SHAPE), rtol=0, atol=1e-5)  # 0.5 + 2 * 0.25, rounded in between


def test_a_score_hook_moves_the_correctors_score():
    """``cond_fn`` = the gradient of a normal around m at the level's own width moves the score by (m - x)."""

    def toward(x: Tensor, t: Tensor) -> Tensor:
        return 2.0 - x

    table = langevin_table(SCHEDULE, updates=2)
    sampler = df.Sampler(
        network, SCHEDULE, solver="ddim", corrector_steps=2, clip=None, cond_fn=toward, cond_mode="score"
    )
    seen = next(iter(sampler.stream(SHAPE, seed=3)))
    x, t = draw(0, "x_T").double(), torch.full((2,), 49)
    row = dict(zip(COLUMNS, table.rows64[0].tolist(), strict=True))
    deviation, signal = SCHEDULE.sqrt_one_minus_alphas_cumprod[-1], SCHEDULE.sqrt_alphas_cumprod[-1]
    for j in range(2):
        epsilon = network(x, t) - deviation * toward(x, t)
        x0 = (x - deviation * epsilon) / signal
        x = row["mean_from_x0"] * x0 + row["mean_from_x"] * x + row["sigma"] * draw(j, "corrector").double()
    epsilon = network(x, t) - deviation * toward(x, t)
    x0 = (x - deviation * epsilon) / signal
    below = SCHEDULE.alphas_cumprod[-2]
    expected = below.sqrt() * x0 + (1.0 - below).sqrt() * epsilon
    # float32 beside float64, where x0 is up to 20.
    torch.testing.assert_close(seen.x.double(), expected, rtol=0, atol=2e-5)


def test_a_network_with_a_learned_variance_has_a_score(backend):
    def both(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([network(x, t), x.clamp(-1, 1)], dim=1)

    learned = df.Sampler(both, SCHEDULE, variance="learned_range", solver="ddim", steps=4, corrector_steps=1)
    plain = df.Sampler(network, SCHEDULE, solver="ddim", steps=4, corrector_steps=1)
    assert torch.equal(learned.sample(SHAPE), plain.sample(SHAPE))


def test_temperature_zero_draws_nothing():
    sampler = df.Sampler(network, SCHEDULE, steps=4, corrector_steps=2, temperature=0.0)
    x_T = draw(0, "x_T")
    assert torch.equal(sampler.sample(SHAPE, x_T=x_T, seed=1), sampler.sample(SHAPE, x_T=x_T, seed=2))


def test_zero_terminal_snr_has_no_update_at_its_last_level():
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    row = langevin_table(schedule, prediction="v").rows[0]
    assert row[2:5].tolist() == [0.0, 1.0, 0.0]
    assert torch.isfinite(df.Sampler(Net(4), schedule, prediction="v", corrector_steps=1).sample(SHAPE)).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"corrector_steps": 1.0}, TypeError, "corrector_steps must be an int, got float"),
        ({"corrector_steps": True}, TypeError, "corrector_steps must be an int, got bool"),
        ({"corrector_steps": -1}, ValueError, "corrector_steps must be at least 0, got -1"),
        ({"corrector_snr": "much"}, TypeError, "corrector_snr must be a real number, got str"),
        ({"corrector_snr": 0.0}, ValueError, r"corrector_snr must lie in \(0, 1\), got 0.0"),
        ({"corrector_snr": math.nan}, ValueError, r"corrector_snr must lie in \(0, 1\), got nan"),
        ({"corrector_steps": 1, "corrector_snr": 1.0}, ValueError, "got 1.0"),
        ({"corrector_steps": 1, "solver": "plms"}, ValueError, "'plms' has a history"),
        ({"corrector_steps": 1, "solver": "dpmpp_2m"}, ValueError, "'dpmpp_2m' has a history"),
        ({"corrector_steps": 1, "prediction": "x_prev"}, ValueError, "has no score"),
        ({"solver": "langevin", "prediction": "x_prev"}, ValueError, "has no score"),
        ({"corrector_steps": 1, "cond_fn": network}, ValueError, "use 'score' with corrector_steps"),
        ({"solver": "langevin", "reference": "lucidrains"}, ValueError, "has solver ddpm or ddim"),
    ],
    ids=str,
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        df.Sampler(network, SCHEDULE, **options)


def test_what_a_run_cannot_do_with_a_corrector():
    mask, known = torch.ones(SHAPE), torch.zeros(SHAPE)
    sampler = df.Sampler(network, SCHEDULE, corrector_steps=1)
    with pytest.raises(ValueError, match="not made again: resample=1"):
        sampler.sample(SHAPE, mask=mask, known=known, blend="repaint", resample=2)
    with pytest.raises(ValueError, match="use stream"):
        sampler.step(draw(0, "x_T"), draw(1, "x_T"), 0)
    with pytest.raises(ValueError, match="does not lead"):
        df.Sampler(network, SCHEDULE, solver="langevin").sample(SHAPE, mask=mask, known=known, blend="repaint")
