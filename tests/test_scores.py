"""Scores, Tweedie's x0, noise levels and the flow's likelihood: definitions, dtypes, gradients, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import ddpm_fast as df
from tests.mixture import Mixture

SCHEDULE = df.NoiseSchedule.linear(1000)
NO_SIGNAL = SCHEDULE.rescale_zero_terminal_snr()
SHAPES = [(3, 4), (3, 2, 5), (3, 3, 4, 4), (3, 1, 2, 3, 2)]
T = torch.tensor([0, 500, 999])


def normal(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def column(table: Tensor, shape: tuple[int, ...]) -> Tensor:
    return table[T].reshape(-1, *[1] * (len(shape) - 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_formulas(shape, dtype):
    x_t, epsilon = normal(shape, 0, dtype), normal(shape, 1, dtype)
    signal, deviation = (
        column(table, shape) for table in (SCHEDULE.sqrt_alphas_cumprod, SCHEDULE.sqrt_one_minus_alphas_cumprod)
    )
    # Half precision is rounded once; float32 has three roundings, of the table, of a product and of a quotient. x0 is
    # a difference divided by sqrt(abar) of down to 0.006.
    eps = torch.finfo(dtype).eps
    score = df.score_from_epsilon(epsilon, T, SCHEDULE)
    assert score.dtype == dtype
    torch.testing.assert_close(score.double(), -epsilon.double() / deviation, rtol=2 * eps, atol=0)
    back = df.epsilon_from_score(score, T, SCHEDULE)
    assert back.dtype == dtype
    torch.testing.assert_close(back.double(), epsilon.double(), rtol=4 * eps, atol=0)
    x0 = df.x0_from_epsilon(x_t, epsilon, T, SCHEDULE)
    assert x0.dtype == dtype
    expected = (x_t.double() - deviation * epsilon.double()) / signal
    size = (x_t.double().abs() + epsilon.double().abs()) / signal
    assert ((x0.double() - expected).abs() <= 2 * eps * size).all()


def test_they_undo_the_forward_process():
    x0 = normal((3, 2, 4, 4), dtype=torch.float32)
    x_t, noise = df.q_sample(x0, T, SCHEDULE, seed=3)
    # float32's rounding of x_t, divided by sqrt(abar) = 0.006 at the last timestep.
    torch.testing.assert_close(df.x0_from_epsilon(x_t, noise, T, SCHEDULE), x0, rtol=0, atol=1e-4)


def test_they_are_a_mixtures_own():
    """The score of the closed form, and its posterior mean by numerical integration."""
    mixture = Mixture(SCHEDULE, [0.4, 0.6], [[-0.5], [0.3]], [0.1, 0.2])
    x_t, t = torch.tensor([[0.1], [-0.3], [0.8]], dtype=torch.float64), torch.tensor([10, 200, 600])
    x = x_t.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_density(x, t).sum(), x)
    score = df.score_from_epsilon(mixture(x_t, t), t, SCHEDULE)
    torch.testing.assert_close(score, gradient, rtol=1e-10, atol=1e-10)
    grid = torch.linspace(-2, 2, 40001, dtype=torch.float64)
    abar = SCHEDULE.alphas_cumprod[t, None]
    parts = -0.5 * ((grid[:, None] - mixture.means[:, 0]) / mixture.scales) ** 2 - mixture.scales.log()
    prior = torch.logsumexp(mixture.weights.log() + parts, dim=1)
    posterior = torch.softmax(prior - 0.5 * (x_t - abar.sqrt() * grid) ** 2 / (1.0 - abar), dim=1)
    expected = (posterior * grid).sum(1, keepdim=True)
    torch.testing.assert_close(df.x0_from_epsilon(x_t, mixture(x_t, t), t, SCHEDULE), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("function", [df.score_from_epsilon, df.epsilon_from_score], ids=lambda f: f.__name__)
def test_gradients(function):
    value = normal((3, 2, 3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: function(v, T, SCHEDULE), value)


def test_gradients_of_x0():
    x_t, epsilon = normal((3, 2, 3)).requires_grad_(), normal((3, 2, 3), 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, e: df.x0_from_epsilon(x, e, T, SCHEDULE), (x_t, epsilon))


def test_they_compile_into_one_graph():
    def together(x: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        score = df.score_from_epsilon(epsilon, t, SCHEDULE)
        return df.x0_from_epsilon(x, df.epsilon_from_score(score, t, SCHEDULE), t, SCHEDULE)

    x, epsilon = normal((3, 2), dtype=torch.float32), normal((3, 2), 1, torch.float32)
    together(x, epsilon, T)  # the schedule's table for this device is made outside of the graph
    compiled = torch.compile(together, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, epsilon, T), together(x, epsilon, T))


# ---------------------------------------------------------------------- sigma and t


def test_sigma_at_the_timesteps_and_between():
    abar = SCHEDULE.alphas_cumprod
    sigma = ((1.0 - abar) / abar).sqrt()
    steps = torch.arange(1000)
    torch.testing.assert_close(df.sigma_from_timestep(steps, SCHEDULE), sigma, rtol=1e-12, atol=0)
    half = df.sigma_from_timestep(torch.tensor([[10.5]]), SCHEDULE)
    torch.testing.assert_close(half, (sigma[10] * sigma[11]).sqrt().reshape(1, 1), rtol=1e-12, atol=0)
    torch.testing.assert_close(df.timestep_from_sigma(sigma, SCHEDULE), steps.double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["linear", "cosine", "quadratic", "sigmoid", "scaled_linear"])
def test_timestep_undoes_sigma(name):
    schedule = df.NoiseSchedule.named(name, 200)
    t = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 199.0
    # Of a timestep: the levels of `sigmoid` lie 2.5e-3 apart in log sigma, which is known to 1e-15.
    again = df.timestep_from_sigma(df.sigma_from_timestep(t, schedule), schedule)
    torch.testing.assert_close(again, t, rtol=0, atol=1e-9)


def test_one_level_has_one_sigma():
    schedule = df.NoiseSchedule.from_betas([0.5])
    assert df.sigma_from_timestep(torch.zeros(2), schedule).tolist() == [1.0, 1.0]
    assert df.timestep_from_sigma(torch.ones(2), schedule).tolist() == [0.0, 0.0]


# ---------------------------------------------------------------------- likelihood


MIXTURE = Mixture(SCHEDULE, [0.3, 0.7], [[-0.6, 0.2, 0.1], [0.5, -0.3, 0.0]], [0.15, 0.3])
FEW = SCHEDULE.respace(20)


def test_hutchinsons_estimate_is_right_on_average():
    x = MIXTURE.draw(4, seed=0)
    exact = df.log_likelihood(MIXTURE, FEW, x, divergence="exact")
    estimates = torch.stack([df.log_likelihood(MIXTURE, FEW, x, seed=seed) for seed in range(200)])
    error = estimates.std(0) / math.sqrt(200)
    assert (error > 0).all()
    assert ((estimates.mean(0) - exact).abs() < 4 * error).all()
    more = torch.stack([df.log_likelihood(MIXTURE, FEW, x, seed=seed, probes=8) for seed in range(25)])
    # Eight probes: an eighth of the variance, which 25 values know to a third.
    assert more.var(0).mean() < 0.3 * estimates.var(0).mean()


def test_a_sample_is_measured_alone_as_in_a_batch():
    x = MIXTURE.draw(5, seed=0)
    together = df.log_likelihood(MIXTURE, FEW, x, seed=7)
    alone = df.log_likelihood(MIXTURE, FEW, x[3:4], seed=7, sample_ids=[3])
    torch.testing.assert_close(alone, together[3:4], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(df.log_likelihood(MIXTURE, FEW, x, seed=8), together)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_other_predictions_say_the_same(prediction):
    def network(x: Tensor, t: Tensor) -> Tensor:
        signal, deviation = SCHEDULE.sqrt_alphas_cumprod[t][:, None], SCHEDULE.sqrt_one_minus_alphas_cumprod[t][:, None]
        epsilon = MIXTURE(x, t)
        x0 = (x - deviation * epsilon) / signal
        return x0 if prediction == "x0" else signal * epsilon - deviation * x0

    x = MIXTURE.draw(5, seed=0)
    # Networks' outputs are float32: at the cleanest level epsilon is an x0 of that precision divided by 0.01.
    torch.testing.assert_close(
        df.log_likelihood(network, FEW, x, prediction=prediction), df.log_likelihood(MIXTURE, FEW, x), rtol=0, atol=1e-3
    )


def test_a_standard_normal_is_its_own_density():
    """Its flow stands still in x, in images, in float32, with a network that also predicts a variance."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.dropout = nn.Parameter(torch.ones(())), nn.Dropout()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert not self.training
            deviation = SCHEDULE.sqrt_one_minus_alphas_cumprod.float()[t].reshape(-1, 1, 1, 1)
            return torch.cat([self.one * deviation * x, x], dim=1)

    x, model = normal((3, 2, 4, 4), dtype=torch.float32), Net()
    with torch.no_grad():
        result = df.log_likelihood(model, SCHEDULE, x)
    assert result.dtype == torch.float64
    assert not result.requires_grad
    assert model.training
    assert model.one.grad is None
    expected = -0.5 * (x.double().square().flatten(1).sum(1) + 32 * math.log(2 * math.pi))
    # Heun's error, 1e-3 an element, which the first levels make, whose sigmas are half as large again each.
    torch.testing.assert_close(result, expected, rtol=0, atol=0.05)


def test_a_constant_has_no_divergence():
    """epsilon = 0 leaves y in place: what is left is the change of scale and the prior."""
    x = normal((3, 2))
    result = df.log_likelihood(lambda x, t: torch.zeros_like(x), SCHEDULE, x)
    abar = SCHEDULE.alphas_cumprod
    last = x * (abar[-1] / abar[0]).sqrt()
    expected = -0.5 * (last.square().sum(1) + 2 * math.log(2 * math.pi)) + (abar[-1] / abar[0]).log()
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- refusals

X = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: df.score_from_epsilon([0.0], T, SCHEDULE), TypeError, "epsilon must be a tensor, got list"),
        (lambda: df.score_from_epsilon(X, 5, SCHEDULE), TypeError, "t must be a tensor, got int"),
        (lambda: df.score_from_epsilon(X, T, 1000), TypeError, "schedule must be a NoiseSchedule, got int"),
        (lambda: df.score_from_epsilon(X[0], T, SCHEDULE), ValueError, "epsilon must be floating-point"),
        (lambda: df.epsilon_from_score(X.long(), T, SCHEDULE), ValueError, "score must be floating-point"),
        (lambda: df.score_from_epsilon(X, T.float(), SCHEDULE), ValueError, "t must be int64"),
        (lambda: df.score_from_epsilon(X, T[:2], SCHEDULE), ValueError, r"t must be int64 of shape \(3,\)"),
        (
            lambda: df.score_from_epsilon(X, T + 1, SCHEDULE),
            ValueError,
            r"t must lie in \[0, 1000\); element 2 is 1000",
        ),
        (lambda: df.x0_from_epsilon(X, None, T, SCHEDULE), TypeError, "epsilon must be a tensor, got NoneType"),
        (lambda: df.x0_from_epsilon(X, X.double(), T, SCHEDULE), ValueError, "epsilon must be torch.float32 of shape"),
        (lambda: df.x0_from_epsilon(X, X, T, NO_SIGNAL), ValueError, "ends without signal"),
        (lambda: df.sigma_from_timestep(5.0, SCHEDULE), TypeError, "t must be a tensor, got float"),
        (lambda: df.sigma_from_timestep(T, None), TypeError, "schedule must be a NoiseSchedule"),
        (lambda: df.sigma_from_timestep(T + 1, SCHEDULE), ValueError, r"t must lie in \[0, 999\], got 1 .. 1000"),
        (lambda: df.sigma_from_timestep(T.float() - 0.5, SCHEDULE), ValueError, "got -0.5 .. 998.5"),
        (lambda: df.sigma_from_timestep(T.float() * math.nan, SCHEDULE), ValueError, "got nan .. nan"),
        (lambda: df.sigma_from_timestep(T, NO_SIGNAL), ValueError, "ends without signal"),
        (lambda: df.timestep_from_sigma(0.5, SCHEDULE), TypeError, "sigma must be a tensor, got float"),
        (lambda: df.timestep_from_sigma(torch.tensor([0.001]), SCHEDULE), ValueError, r"sigma must lie in \[0.0100005"),
        (lambda: df.timestep_from_sigma(torch.tensor([-1.0]), SCHEDULE), ValueError, "got -1 .. -1"),
        (lambda: df.log_likelihood(None, SCHEDULE, X), TypeError, "model must be callable"),
        (lambda: df.log_likelihood(MIXTURE, 3, X), TypeError, "schedule must be a NoiseSchedule, got int"),
        (lambda: df.log_likelihood(MIXTURE, SCHEDULE, [1.0]), TypeError, "x0 must be a tensor, got list"),
        (lambda: df.log_likelihood(MIXTURE, SCHEDULE, X.half()), ValueError, "x0 must be float32 or float64"),
        (lambda: df.log_likelihood(MIXTURE, SCHEDULE, X[0]), ValueError, r"x0 must be .* \(N, C, \*\)"),
        (lambda: df.log_likelihood(MIXTURE, SCHEDULE, X, prediction="x_prev"), ValueError, "epsilon, x0, v, got"),
        (lambda: df.log_likelihood(MIXTURE, SCHEDULE, X, divergence="no"), ValueError, "hutchinson, exact, got 'no'"),
        (lambda: df.log_likelihood(MIXTURE, SCHEDULE, X, probes=1.0), TypeError, "probes must be an int, got float"),
        (lambda: df.log_likelihood(MIXTURE, SCHEDULE, X, probes=0), ValueError, "probes must be at least 1, got 0"),
        (lambda: df.log_likelihood(MIXTURE, NO_SIGNAL, X), ValueError, "ends without signal"),
        (lambda: df.log_likelihood(lambda x, t: x[:1], SCHEDULE, X), ValueError, r"output must have shape \(3, 2\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
