"""On a real GPU: every op on every GPU backend, and a whole sampling loop captured and replayed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.cli import doctor
from ddpm_fast.nn import UNet
from ddpm_fast.ops import abs_quantile, denoise
from ddpm_fast.solvers import ddpm_table

from ..ops.common import laid_out, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]

SCHEDULE = df.NoiseSchedule.linear(1000)
LAYOUTS = ["contiguous", "channels_last"]


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with df.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 256, 256), (3, 3, 17, 19), (2, 300, 5, 7)], ids=str)
def test_noise_is_the_cpus(gpu_backend: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    out = laid_out(torch.empty(shape, dtype=dtype, device="cuda"), layout)
    df.randn(shape, seed=7, step=5, out=out)
    with df.use_backend("reference"):
        assert same_bits(out.cpu(), df.randn(shape, seed=7, step=5, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_q_sample_is_the_cpus(gpu_backend: str, dtype: torch.dtype, layout: str) -> None:
    x0, t = laid_out((torch.rand(4, 3, 64, 64) * 200).to(dtype), layout), torch.tensor([0, 10, 500, 999])
    got = df.q_sample(x0.cuda(), t.cuda(), SCHEDULE, seed=3)
    with df.use_backend("reference"):
        expected = df.q_sample(x0, t, SCHEDULE, seed=3)
    assert all(same_bits(a.cpu(), b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variance", ["fixed", "learned", "learned_range"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "x_prev"])
def test_the_step_is_the_cpus(
    gpu_backend: str, prediction: str, variance: str, dtype: torch.dtype, layout: str
) -> None:
    learned = "fixed_small" if variance == "fixed" else variance
    rows = ddpm_table(SCHEDULE, variance=learned, prediction=prediction, guidance_scale=2.0).rows
    x_t = laid_out(torch.randn(3, 3, 64, 64), layout)
    outputs = [laid_out(torch.randn(3, 3 if variance == "fixed" else 6, 64, 64).to(dtype), layout) for _ in range(2)]
    index = torch.tensor([0, 500, 999])
    options: dict[str, Any] = {"prediction": prediction, "variance": variance, "clip": (-1.0, 1.0), "seed": 9}
    got = denoise(x_t.cuda(), outputs[0].cuda(), rows.cuda(), index.cuda(), unconditional=outputs[1].cuda(), **options)
    with df.use_backend("reference"):
        expected = denoise(x_t, outputs[0], rows, index, unconditional=outputs[1], **options)
    assert same_bits(got.cpu(), expected)


def test_the_quantile_is_the_cpus(gpu_backend: str) -> None:
    x = torch.randn(3, 3, 257, 255)
    for q in (0.5, 0.995, 1.0):
        got = abs_quantile(x.cuda(), q)
        with df.use_backend("reference"):
            assert same_bits(got.cpu(), abs_quantile(x, q))


def test_the_doctor_finds_nothing_wrong() -> None:
    assert all(result.passed for result in doctor.self_test())


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(in_channels=1, base_channels=32, channel_mult=(1, 2), num_groups=8).cuda()


OPTIONS: dict[str, dict[str, Any]] = {
    "ddpm": {"steps": 20},
    "ddim": {"solver": "ddim", "steps": 20, "eta": 0.5},
    "threshold": {"steps": 20, "threshold": 0.95},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_captured_loop_gives_the_same_images(gpu_backend: str, unet: UNet, options: dict[str, Any]) -> None:
    def images(cuda_graph: bool) -> Tensor:
        return df.Sampler(unet, SCHEDULE, cuda_graph=cuda_graph, **options).sample((4, 1, 28, 28), seed=3)

    assert torch.equal(images(cuda_graph=True), images(cuda_graph=False))


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_the_loop_never_waits_for_the_device(gpu_backend: str, unet: UNet, cuda_graph: bool) -> None:
    sampler = df.Sampler(unet, SCHEDULE, steps=20, cuda_graph=cuda_graph)
    expected = sampler.sample((4, 1, 28, 28), seed=3)  # copies the tables to the device
    run = sampler._run((4, 1, 28, 28), 3, None, None, None, None, None, None, None, (None, None, "before", 1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in sampler._steps(run, want_state=False, progress=False):
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(run.x, expected)
