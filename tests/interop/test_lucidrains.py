"""Sampler.from_lucidrains: what denoising_diffusion_pytorch's own objects return."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ddpm_fast.sampler import Sampler
from tests.originals.network import Net
from tests.third_party.lucidrains import import_package

package = import_package()
SHAPE = (2, 3, 8, 8)


def diffusion(net: nn.Module | None = None, kind: str = "GaussianDiffusion", **options: object) -> nn.Module:
    arguments = {"image_size": 8, "timesteps": 100, "objective": "pred_noise", "beta_schedule": "cosine", **options}
    return getattr(package, kind)(net or Net(), **arguments)


def both(original: nn.Module, **options: object) -> tuple[Tensor, Tensor]:
    """The original's samples and ours from the same torch seed; both leave the generator alike."""
    torch.manual_seed(0)
    expected = original.sample(batch_size=2)
    after = torch.randn(1)
    sampler = Sampler.from_lucidrains(original, **options)
    torch.manual_seed(0)
    result = sampler.sample(SHAPE, generator=torch.default_generator)
    assert torch.equal(torch.randn(1), after)
    assert torch.isfinite(expected).all()
    return expected, result


@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "symmetric"])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_ancestral_loop_is_bit_equal(schedule, objective, normalize):
    expected, result = both(diffusion(beta_schedule=schedule, objective=objective, auto_normalize=normalize))
    assert torch.equal(result, expected)
    assert (result.min() >= 0) == normalize


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0"])
def test_a_thousand_steps_are_bit_equal(objective):
    expected, result = both(diffusion(timesteps=1000, beta_schedule="linear", objective=objective))
    assert torch.equal(result, expected)


def test_self_conditioning_is_bit_equal():
    expected, result = both(diffusion(Net(self_condition=True)))
    assert torch.equal(result, expected)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("steps", [1, 7, 20, 99])
def test_ddim_is_chosen_where_the_object_samples_so(steps, eta):
    expected, result = both(diffusion(sampling_timesteps=steps, ddim_sampling_eta=eta))
    # Theirs divides by a float32 sqrt(1 / abar - 1) at each step; measured 1e-6.
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_its_times_are_those_of_its_linspace():
    for steps in range(1, 100):
        times = torch.linspace(-1, 99, steps + 1).int().flip(0)[:-1]
        sampler = Sampler.from_lucidrains(diffusion(sampling_timesteps=steps))
        assert torch.equal(sampler.timesteps, times.long()), steps


def test_learned_variance_agrees_up_to_its_exponential():
    expected, result = both(diffusion(Net(outputs=2), "LearnedGaussianDiffusion", auto_normalize=False))
    # 100 steps whose standard deviations are within an ulp or two.
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_states_and_collected_states():
    original = diffusion()
    sampler = Sampler.from_lucidrains(original)
    x, kept = sampler.sample(SHAPE, every=50)
    assert torch.equal(kept[-1], x)
    *_, last = sampler.stream(SHAPE)
    assert torch.equal((last.x + 1) * 0.5, x)


def test_another_solver_may_be_asked_for():
    original = diffusion(sampling_timesteps=10)
    assert Sampler.from_lucidrains(original, solver="ddpm").steps == 100
    assert Sampler.from_lucidrains(original, steps=5).steps == 5


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (diffusion, {"prediction": "v"}, TypeError, "prediction is read from the GaussianDiffusion"),
        (diffusion, {"clip": None}, TypeError, "clip is read from"),
        (
            lambda: diffusion(timesteps=10, beta_schedule="linear"),
            {},
            ValueError,
            r"betas\[\d\] = .* is outside \(0, 1\)",
        ),
        (
            lambda: diffusion(Net(outputs=2), "LearnedGaussianDiffusion", objective="pred_x0"),
            {},
            ValueError,
            "LearnedGaussianDiffusion with objective='pred_x0'",
        ),
        (Net, {}, TypeError, "Net has no 'model_predictions'"),
    ],
    ids=["prediction", "clip", "nan", "learned", "other"],
)
def test_refusals(make, options, error, message):
    with pytest.raises(error, match=message):
        Sampler.from_lucidrains(make(), **options)


def test_a_subclass_that_samples_differently_is_refused_and_one_that_trains_differently_is_not():
    class Weighted(package.GaussianDiffusion):
        def p_mean_variance(self, x, t, **kwargs):
            return super().p_mean_variance(x, t, **kwargs)

    class Trained(package.GaussianDiffusion):
        def p_losses(self, *args, **kwargs):
            return 0.0

    options = {"image_size": 8, "timesteps": 20}
    with pytest.raises(ValueError, match=r"Weighted samples with .*Weighted\.p_mean_variance"):
        Sampler.from_lucidrains(Weighted(Net(), **options))
    assert Sampler.from_lucidrains(Trained(Net(), **options)).steps == 20
