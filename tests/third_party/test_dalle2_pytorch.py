"""dalle2-pytorch's prior and decoder, run as they are, against Sampler and `low_resolution`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.cascade import low_resolution
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule
from tests.third_party.stand_ins import import_alone

package = import_alone(
    "dalle2_pytorch.dalle2_pytorch",
    (
        "torchvision",
        "torchvision.transforms",
        "kornia",
        "kornia.augmentation",
        "kornia.filters",
        "resize_right",
        "rotary_embedding_torch",
        "x_clip",
        "coca_pytorch",
        "vector_quantize_pytorch",
    ),
    unwanted=("dalle2_pytorch.tokenizer",),
)

DIM, STEPS, SCALE = 16, 50, 2.0


class PriorNetwork(nn.Module):
    """What DiffusionPrior asks of a network; a text of zeros is none."""

    dim, self_cond = DIM, False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.last = nn.Linear(2 * DIM, 32), nn.Linear(32, DIM)

    def forward(self, x: Tensor, t: Tensor, text_embed: Tensor) -> Tensor:
        time = t.reshape(-1, 1).float() / STEPS
        return self.last(torch.tanh(self.first(torch.cat([x, text_embed * 4], dim=1)) + time))

    def forward_with_cond_scale(
        self, x: Tensor, t: Tensor, cond_scale: float, self_cond: Tensor | None, text_embed: Tensor
    ) -> Tensor:
        """As DiffusionPriorNetwork's, on a batch of 2N."""
        both = torch.cat([torch.zeros_like(text_embed), text_embed])
        null, conditional = self(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return null + (conditional - null) * cond_scale


def test_prior_is_bit_equal_from_the_same_torch_seed(capsys):
    text = F.normalize(torch.randn(3, DIM), dim=1)
    original = package.DiffusionPrior(
        PriorNetwork(),
        image_embed_dim=DIM,
        timesteps=STEPS,
        cond_drop_prob=0.1,
        condition_on_text_encodings=False,
        sampling_clamp_l2norm=True,
        sampling_final_clamp_l2norm=True,
    )
    torch.manual_seed(0)
    expected = original.p_sample_loop((3, DIM), text_cond={"text_embed": text}, cond_scale=SCALE)
    after = torch.randn(1)

    sampler = Sampler(
        PriorNetwork(),
        NoiseSchedule.cosine(STEPS),
        prediction="x0",
        clip=None,
        denoised_fn=original.l2norm_clamp_embed,
        guidance_scale=SCALE,
    )
    torch.manual_seed(0)
    x = sampler.sample(
        (3, DIM),
        generator=torch.default_generator,
        model_kwargs={"text_embed": text},
        uncond_kwargs={"text_embed": torch.zeros_like(text)},
    )
    assert torch.equal(original.l2norm_clamp_embed(x) / original.image_embed_scale, expected)
    assert torch.equal(torch.randn(1), after)


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    torch.manual_seed(1)
    network = {
        "dim": 8,
        "image_embed_dim": DIM,
        "cond_dim": 8,
        "dim_mults": (1, 2),
        "attend_at_middle": False,
        "resnet_groups": 4,
    }
    result = package.Decoder(
        unet=(package.Unet(**network), package.Unet(**network)),
        image_sizes=(8, 16),
        timesteps=STEPS,
        beta_schedule=("cosine", "cosine"),
        learned_variance=(True, True),
        use_noise_for_lowres_cond=True,
        use_blur_for_lowres_cond=False,
    )
    for unet in result.unets:
        nn.init.normal_(unet.to_out.weight, std=0.1)  # which starts from zero
    return result.eval()


class Called(nn.Module):
    """Its network as a Sampler calls one: prediction and variance in one tensor."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return self.unet(x, t, **kwargs)


def test_the_decoders_cascade_from_the_same_torch_seed(decoder, capsys):
    image_embed = F.normalize(torch.randn(2, DIM), dim=1)
    torch.manual_seed(0)
    small = decoder.sample(image_embed=image_embed, stop_at_unet_number=1)
    torch.manual_seed(0)
    large = decoder.sample(image_embed=image_embed)
    after = torch.randn(1)

    def sampled(number: int, **shown: Tensor) -> Tensor:
        sampler = Sampler(Called(decoder.unets[number]), NoiseSchedule.cosine(STEPS), variance="learned_range")
        return sampler.sample(
            (2, 3, *[(8, 16)[number]] * 2),
            generator=torch.default_generator,
            model_kwargs={"image_embed": image_embed, **shown},
        )

    torch.manual_seed(0)
    ours_small = sampled(0)
    low_res, time = low_resolution(ours_small, 16, NoiseSchedule.linear(1000), 200, noise=torch.randn(2, 3, 16, 16))
    ours_large = sampled(1, lowres_cond_img=low_res, lowres_noise_level=time)
    assert torch.equal(torch.randn(1), after)
    for ours, theirs in ((ours_small, small), (ours_large, large)):
        assert theirs.std() > 0.05
        # The exponential of a learned variance is ours, and the upper bound a float64 logarithm; measured 5e-7.
        torch.testing.assert_close((ours + 1) * 0.5, theirs, rtol=0, atol=3e-6)


def test_the_decoders_network_accelerates():
    """Every GroupNorm of its blocks, with scale, shift and SiLU; its LayerNorms are named."""
    torch.manual_seed(1)
    unet = package.Unet(8, image_embed_dim=DIM, cond_dim=8, dim_mults=(1, 2), resnet_groups=4, attn_heads=2)
    unet.eval()
    nn.init.normal_(unet.to_out.weight, std=0.1)  # which starts from zero
    x, t, image_embed = torch.randn(2, 3, 8, 8), torch.tensor([3, 40]), torch.randn(2, DIM)
    with torch.no_grad():
        expected = unet(x, t, image_embed=image_embed)
        df.accelerate(unet)
        result, report = unet(x, t, image_embed=image_embed), df.acceleration_report(unet)
        assert torch.equal(df.restore(unet)(x, t, image_embed=image_embed), expected)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    norms = {name for name, module in unet.named_modules() if isinstance(module, nn.GroupNorm)}
    assert set(report.fused) == norms
    assert all(text == "GroupNorm [+ scale/shift] + SiLU" for text in report.patterns.values())
    assert all(reason.startswith("LayerNorm is neither") for reason in report.skipped.values())
