"""imagen-pytorch's cascade, run as it is with its own networks, against Sampler and `low_resolution`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.cascade import low_resolution
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule
from tests.third_party.stand_ins import import_alone

package = import_alone(
    "imagen_pytorch.imagen_pytorch",
    ("torchvision", "torchvision.transforms", "kornia", "kornia.augmentation"),
    unwanted=("imagen_pytorch.t5",),  # the text encoder: embeddings are given here
)

STEPS, SCALE = 20, 3.0
TEXT = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def imagen() -> nn.Module:
    torch.manual_seed(1)
    network = {
        "dim": 8,
        "text_embed_dim": 12,
        "dim_mults": (1, 2),
        "layer_attns": False,
        "layer_cross_attns": False,
        "attend_at_middle": False,
        "attn_heads": 2,
        "attn_dim_head": 4,
    }
    result = package.Imagen(
        unets=(package.Unet(**network), package.Unet(lowres_cond=True, **network)),
        image_sizes=(8, 16),
        timesteps=STEPS,
        text_embed_dim=12,
    )
    for unet in result.unets:
        nn.init.normal_(unet.final_conv.weight, std=0.1)  # which starts from zero
    return result.eval()


class Called(nn.Module):
    """Its network as a Sampler calls one, with the noise level of the small image as `lowres_noise_times`."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return self.unet(x, t, **kwargs)


def sampled(imagen: nn.Module, number: int, **shown: Tensor) -> Tensor:
    """A stage from torch's generator, in [-1, 1]; the number that drops the condition makes two calls of a step."""
    sampler = Sampler(
        Called(imagen.unets[number]),
        NoiseSchedule.log_snr("cosine", STEPS),
        guidance_scale=SCALE,
        threshold=0.95,
    )
    condition = {"text_embeds": TEXT, "text_mask": torch.ones(2, 5, dtype=torch.bool), **shown}
    x = sampler.sample(
        (2, 3, *[(8, 16)[number]] * 2),
        generator=torch.default_generator,
        model_kwargs={**condition, "cond_drop_prob": 0.0},
        uncond_kwargs={**condition, "cond_drop_prob": 1.0},
    )
    return x.clamp(-1, 1)


def test_the_cascade_from_the_same_torch_seed(imagen):
    torch.manual_seed(0)
    small, large = imagen.sample(
        text_embeds=TEXT,
        cond_scale=SCALE,
        cfg_remove_parallel_component=False,
        return_all_unet_outputs=True,
        use_tqdm=False,
    )
    after = torch.randn(1)

    torch.manual_seed(0)
    ours_small = sampled(imagen, 0)
    # Step 199 of 1000 is its level, the time 0.2.
    low_res, time = low_resolution(
        ours_small, 16, NoiseSchedule.log_snr("linear", 1000), 199, noise=torch.randn(2, 3, 16, 16)
    )
    ours_large = sampled(imagen, 1, lowres_cond_img=low_res, lowres_noise_times=time)
    assert torch.equal(torch.randn(1), after)
    for ours, theirs in ((ours_small, small), (ours_large, large)):
        assert theirs.std() > 0.05
        # Its tables are float32, down to an alpha of 4e-8, and it guides by c + (w - 1) * (c - u); measured 4e-7.
        torch.testing.assert_close((ours + 1) * 0.5, theirs, rtol=0, atol=3e-6)


def test_its_network_accelerates(imagen):
    """Every ChanRMSNorm with its scale, shift and SiLU; its LayerNorms, of which there is no fused op, are named."""
    unet, x, t = imagen.unets[0], torch.randn(2, 3, 8, 8), torch.tensor([0.3, -2.0])
    with torch.no_grad():
        expected = unet(x, t, text_embeds=TEXT)
        df.accelerate(unet)
        result, report = unet(x, t, text_embeds=TEXT), df.acceleration_report(unet)
        assert torch.equal(df.restore(unet)(x, t, text_embeds=TEXT), expected)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    norms = {name for name, module in unet.named_modules() if isinstance(module, package.ChanRMSNorm)}
    assert set(report.fused) == norms
    assert all(text == "RMSNorm [+ scale/shift] + SiLU" for text in report.patterns.values())
    assert report.skipped
    assert all(reason.startswith("LayerNorm is neither") for reason in report.skipped.values())
