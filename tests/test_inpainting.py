"""Inpainting: against latent-diffusion's loops and RePaint's algorithm, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule
from tests.originals.latent_diffusion import DDIMSampler, LatentDiffusion
from tests.originals.network import Net

SHAPE = (2, 4, 8, 8)
MASK = torch.zeros(2, 1, 8, 8)
MASK[:, :, :4] = 1.0
KNOWN = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(SHAPE)
SCHEDULE = NoiseSchedule.linear(1000)


def noised(ldm: LatentDiffusion, t: int) -> Tensor:
    return ldm.sqrt_alphas_cumprod[t] * KNOWN + ldm.sqrt_one_minus_alphas_cumprod[t] * torch.randn_like(KNOWN)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_before_is_latent_diffusions_ddim(eta):
    ldm = LatentDiffusion(Net(4))
    original = DDIMSampler(ldm, 20, eta)
    torch.manual_seed(0)
    x = original.sample(SHAPE, None, mask=MASK, x0=KNOWN)
    sampler = Sampler.from_latent_diffusion(ldm, solver="ddim", steps=20, eta=eta)
    torch.manual_seed(0)
    result = sampler.sample(SHAPE, generator=torch.default_generator, mask=MASK, known=KNOWN)
    torch.testing.assert_close(result, x, rtol=0, atol=4e-6 * x.abs().max().item())


def test_after_is_latent_diffusions_ddpm_to_the_bit():
    class Blended(LatentDiffusion):
        pass

    ldm = Blended(Net(4), 50)
    torch.manual_seed(0)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        for k in reversed(range(50)):
            t = torch.full((2,), k)
            e = ldm.apply_model(x, t, None)
            x0 = ldm.sqrt_recip_alphas_cumprod[k] * x - ldm.sqrt_recipm1_alphas_cumprod[k] * e
            mean = ldm.posterior_mean_coef1[k] * x0 + ldm.posterior_mean_coef2[k] * x
            sigma = float(k > 0) * (0.5 * ldm.posterior_log_variance_clipped[k : k + 1]).exp()
            x = mean + sigma * torch.randn(SHAPE)
            x = noised(ldm, k) * MASK + (1.0 - MASK) * x
    torch.manual_seed(0)
    result = Sampler.from_latent_diffusion(ldm).sample(
        SHAPE, generator=torch.default_generator, mask=MASK, known=KNOWN, blend="after"
    )
    assert torch.equal(result, x)


@pytest.mark.parametrize("resample", [1, 3])
def test_repaint_is_its_algorithm_1(resample):
    net, schedule = Net(4), SCHEDULE.respace(10)
    sampler = Sampler(net, SCHEDULE, steps=10)
    torch.manual_seed(0)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        for i in range(10):
            k = 9 - i
            again = resample if k > 0 else 1
            for u in range(again):
                output = net(x, schedule.timestep_map[k].expand(2))
                x = sampler.step(x, output, i, torch.randn(SHAPE))
                below = schedule.alphas_cumprod_prev[k]
                known = below.sqrt().float() * KNOWN + (1 - below).sqrt().float() * torch.randn(SHAPE)
                x = known * MASK + (1 - MASK) * x
                if u + 1 < again:
                    beta = schedule.betas[k]
                    x = (1 - beta).sqrt().float() * x + beta.sqrt().float() * torch.randn(SHAPE)
    torch.manual_seed(0)
    result = sampler.sample(
        SHAPE, generator=torch.default_generator, mask=MASK, known=KNOWN, blend="repaint", resample=resample
    )
    torch.testing.assert_close(result, x, rtol=0, atol=1e-5)
    # The last step leads to timestep -1, where the known part is known exactly.
    assert torch.equal(result[:, :, :4], KNOWN[:, :, :4])


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({}, 10),
        ({"blend": "after"}, 10),
        ({"blend": "repaint"}, 10),
        ({"blend": "repaint", "resample": 3}, 4 * (3 + 3 + 2) + 2),
    ],
    ids=str,
)
def test_every_draw_is_a_row(options, total):
    sampler = Sampler(Net(4), SCHEDULE, steps=5)
    calls = []

    def noise(draw, t, shape):
        calls.append(draw)
        return torch.zeros(shape)

    sampler.sample(SHAPE, noise=noise, mask=MASK, known=KNOWN, **options)
    assert calls == list(range(total))
    rows = torch.randn(total, *SHAPE)
    sampler.sample(SHAPE, noise=rows, mask=MASK, known=KNOWN, **options)
    with pytest.raises(ValueError, match=f"each of the {total} draws"):
        sampler.sample(SHAPE, noise=rows[1:], mask=MASK, known=KNOWN, **options)


@pytest.mark.parametrize("options", [{}, {"blend": "repaint", "resample": 2}], ids=["before", "repaint"])
def test_a_samples_inpainting_does_not_depend_on_its_batch(options):
    def model(x, t):
        return x * 0.5

    sampler = Sampler(model, SCHEDULE, steps=5)
    batch = sampler.sample(SHAPE, seed=3, mask=MASK, known=KNOWN, **options)
    alone = sampler.sample((1, *SHAPE[1:]), seed=3, sample_ids=[1], mask=MASK[1:], known=KNOWN[1:], **options)
    assert torch.equal(batch[1], alone[0])
    assert not torch.equal(batch, sampler.sample(SHAPE, seed=4, mask=MASK, known=KNOWN, **options))


def test_a_mask_may_be_bool_and_broadcasts():
    sampler = Sampler(Net(4), SCHEDULE, steps=3)
    expected = sampler.sample(SHAPE, mask=MASK, known=KNOWN, blend="after")
    for mask in (MASK.bool(), MASK[:1], MASK[0, 0], MASK.expand(SHAPE)):
        assert torch.equal(sampler.sample(SHAPE, mask=mask, known=KNOWN, blend="after"), expected)
    nothing = sampler.sample(SHAPE, mask=torch.zeros(1), known=KNOWN)
    assert torch.equal(nothing, sampler.sample(SHAPE))


def test_stream_is_sample():
    sampler = Sampler(Net(4), SCHEDULE, steps=3)
    options = {"mask": MASK, "known": KNOWN, "blend": "repaint", "resample": 2}
    *_, last = sampler.stream(SHAPE, **options)
    assert torch.equal(last.x, sampler.sample(SHAPE, **options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": MASK}, ValueError, "mask and known need each other"),
        ({"known": KNOWN}, ValueError, "mask and known need each other"),
        ({"mask": [1], "known": KNOWN}, TypeError, "mask must be a torch.Tensor, got list"),
        ({"mask": MASK, "known": KNOWN[:, :1]}, ValueError, r"known must be float32 of shape \(2, 4, 8, 8\)"),
        ({"mask": MASK[..., :3], "known": KNOWN}, ValueError, r"mask must broadcast to \(2, 4, 8, 8\), got"),
        ({"mask": MASK.int(), "known": KNOWN}, ValueError, "mask must be floating-point or bool"),
        ({"blend": "during"}, ValueError, "blend must be one of before, after, repaint, got 'during'"),
        ({"resample": 0, "blend": "repaint"}, ValueError, "resample must be at least 1, got 0"),
        ({"resample": 2}, ValueError, "resample=2 needs blend='repaint'"),
        ({"resample": 1.5}, TypeError, "resample must be an int, got float"),
    ],
    ids=["no-known", "no-mask", "list", "known", "shape", "int", "blend", "zero", "before", "float"],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        Sampler(Net(4), SCHEDULE, steps=2).sample(SHAPE, **options)


def test_a_history_cannot_make_a_step_again():
    with pytest.raises(ValueError, match="solver='plms' has a history and cannot make a step again"):
        Sampler(Net(4), SCHEDULE, steps=2, solver="plms").sample(
            SHAPE, mask=MASK, known=KNOWN, blend="repaint", resample=2
        )
