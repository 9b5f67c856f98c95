"""Bits per dimension against openai's loop, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.training import bits_per_dim
from tests.originals.bound import Bound

SCHEDULE = df.NoiseSchedule.cosine(12)
SHAPE = (3, 2, 5, 4)


class Net(nn.Module):
    """Small and smooth; its outputs depend on everything it is given."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.conv = nn.Conv2d(2, 2 * outputs, 3, padding=1)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, gain: float = 1.0) -> Tensor:
        self.seen.append(t)
        return torch.tanh(self.conv(x) * gain + t.reshape(-1, 1, 1, 1) / 12)


def byte_images() -> Tensor:
    return torch.randint(0, 256, SHAPE, dtype=torch.uint8)


@pytest.mark.parametrize("clip", ["auto", None], ids=["clip", "free"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "x_prev"])
def test_is_openais_loop(prediction: str, variance: str, clip: str | None) -> None:
    model = Net(2 if variance.startswith("learned") else 1).double().requires_grad_(False)
    x0 = byte_images().double() / 127.5 - 1
    noise = torch.randn(12, *SHAPE, dtype=torch.float64)
    expected = Bound(SCHEDULE, prediction, variance).calc_bpd_loop(model, x0, noise, clip=clip == "auto")
    # Its q_sample multiplies with a float64 table, ours with the same numbers in float32: given here.
    exact = df.NoiseSchedule.from_betas(SCHEDULE.betas)
    exact._device_tables[torch.device("cpu")] = torch.stack(
        [SCHEDULE.sqrt_alphas_cumprod, SCHEDULE.sqrt_one_minus_alphas_cumprod], dim=1
    )
    got = bits_per_dim(model, exact, x0, prediction=prediction, variance=variance, clip=clip, noise=noise)
    pairs = {"total": "total_bpd", "prior": "prior_bpd", "vlb": "vb", "mse": "mse", "x0_mse": "xstart_mse"}
    for ours, theirs in pairs.items():
        value = getattr(got, ours)
        assert value.shape == ((3,) if ours in ("total", "prior") else (3, 12))
        # openai subtracts distribution functions, and epsilon from x0 is a difference too.
        torch.testing.assert_close(value, expected[theirs], rtol=1e-7, atol=1e-9, msg=lambda m, o=ours: f"{o}: {m}")


def test_float32_and_bytes(backend: str) -> None:
    model, images = Net().requires_grad_(False), byte_images()
    got = bits_per_dim(model, SCHEDULE, images, seed=4)
    assert got.total.dtype == torch.float32
    noise = torch.stack([df.randn(SHAPE, seed=4, step=i, stream="training") for i in range(12)])
    assert all(torch.equal(a, b) for a, b in zip(got, bits_per_dim(model, SCHEDULE, images, noise=noise), strict=True))
    x0 = images.double() / 127.5 - 1
    expected = Bound(SCHEDULE, "epsilon", "fixed_small").calc_bpd_loop(Net().double(), x0, noise.double())
    torch.testing.assert_close(got.total.double(), expected["total_bpd"], rtol=1e-4, atol=0)
    torch.testing.assert_close(got.prior.double(), expected["prior_bpd"], rtol=1e-6, atol=0)


def test_noise_by_a_function_and_keyword_arguments() -> None:
    model, images = Net().requires_grad_(False), byte_images()
    calls = []

    def noise(column: int, t: int, shape: tuple[int, ...]) -> Tensor:
        calls.append((column, t, shape))
        return df.randn(shape, seed=4, step=column, stream="training")

    got = bits_per_dim(model, SCHEDULE, images, noise=noise, model_kwargs={"gain": 2.0})
    assert calls == [(i, 11 - i, SHAPE) for i in range(12)]
    assert torch.equal(got.total, bits_per_dim(model, SCHEDULE, images, seed=4, model_kwargs={"gain": 2.0}).total)
    assert not torch.equal(got.total, bits_per_dim(model, SCHEDULE, images, seed=4).total)


def test_a_respaced_schedule_tells_the_network_the_original_numbers() -> None:
    model = Net().requires_grad_(False)
    bits_per_dim(model, df.NoiseSchedule.linear(1000).respace(4, spacing="leading"), byte_images())
    assert [int(t[0]) for t in model.seen] == [750, 500, 250, 0]


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Dropout(0.5)).train()
    wrapped = lambda x, t: model(x)  # noqa: E731
    bits_per_dim(wrapped, SCHEDULE, byte_images())
    assert model.training
    net = Net().train()
    bits_per_dim(net, SCHEDULE, byte_images())
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_right_noise_costs_the_decoder_alone() -> None:
    """A model that knows the noise: every divergence is 0, and the decoder's bin holds nearly everything."""
    x0 = byte_images().double() / 127.5 - 1
    noise = torch.randn(12, *SHAPE, dtype=torch.float64)
    rows = iter(noise)
    got = bits_per_dim(lambda x, t: next(rows), df.NoiseSchedule.linear(12, 1e-6, 0.5), x0, noise=noise, clip=None)
    assert got.vlb[:, :-1].abs().max() < 1e-6
    assert got.vlb[:, -1].max() < 1e-3
    torch.testing.assert_close(got.total, got.prior + got.vlb.sum(1))


def test_no_signal_is_left_at_the_end() -> None:
    schedule = df.NoiseSchedule.linear(10).rescale_zero_terminal_snr()
    got = bits_per_dim(Net(), schedule, byte_images(), prediction="v")
    assert got.prior.eq(0).all()
    assert all(part.isfinite().all() for part in got)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x0": [1.0]}, TypeError, "x0 must be a tensor"),
        ({"x0": torch.zeros(SHAPE).long()}, ValueError, "x0 must be uint8 or floating point"),
        ({"x0": torch.full(SHAPE, 1.5)}, ValueError, r"all of them in \[-1, 1\]"),
        ({"x0": torch.full(SHAPE, float("nan"))}, ValueError, r"all of them in \[-1, 1\]"),
        ({"noise": torch.zeros(11, *SHAPE)}, ValueError, "noise must have 12 rows"),
        ({"noise": 1.0}, TypeError, "noise must be a tensor of rows"),
        ({"prediction": "score"}, ValueError, "prediction must be one of"),
        ({"variance": "fixed"}, ValueError, "variance must be one of"),
        ({"variance": "learned"}, ValueError, "the model must return"),
        ({"clip": "no"}, ValueError, "clip must be"),
        ({"model": lambda x, t: None}, TypeError, "the model must return a tensor"),
        ({"schedule": df.NoiseSchedule.log_snr("cosine", 12)}, ValueError, "log_snr schedule has no bound"),
        (
            {"schedule": df.NoiseSchedule.linear(10).rescale_zero_terminal_snr()},
            ValueError,
            "prediction='epsilon' cannot recover x0",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        bits_per_dim(**{"model": Net(), "schedule": SCHEDULE, "x0": torch.zeros(SHAPE), **change})
