"""The code in docs/drop_in.md and docs/accelerate.md, run as it stands: after gives the images of before."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.cascade import low_resolution
from ddpm_fast.interop.diffusers import FastDDIMScheduler
from tests.originals import annotated
from tests.originals import latent_diffusion as compvis
from tests.originals.guided import GaussianDiffusion, ModelVarType
from tests.originals.network import Net
from tests.third_party import lucidrains
from tests.third_party.test_k_diffusion import external, sampling

DOCS = Path(__file__).resolve().parent.parent / "docs"
Namespace = dict[str, Any]


def blocks(document: str) -> dict[str, str]:
    """The Python code of a document by its section, the second of a section with a 2 behind it, and so on."""
    found: dict[str, str] = {}
    for section in re.split(r"^#+ ", (DOCS / document).read_text(), flags=re.MULTILINE):
        title = re.split(r"[:\n]", section)[0]
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", section, re.DOTALL), 1):
            found[title if number == 1 else f"{title} {number}"] = code
    return found


def run(code: str, names: Callable[[], Namespace]) -> tuple[Namespace, Namespace]:
    """What is in the namespace behind the statements before "# after", and behind the others, both from one seed."""
    statements = ast.parse(code).body
    lines = code.splitlines()
    marked = [any("# after" in line for line in lines[s.lineno - 1 : s.end_lineno]) for s in statements]
    first = marked.index(True) if True in marked else 0
    results = []
    for part in (statements[:first], statements[first:]):
        results.append(names())
        torch.manual_seed(0)
        with torch.no_grad():
            exec(compile(ast.Module(part, []), "document", "exec"), results[-1])
    return results[0], results[1]


def guided() -> Namespace:
    return {"diffusion": spaced(), "model": Net()}


def spaced(**options: Any) -> GaussianDiffusion:
    few = df.NoiseSchedule.linear(1000).respace(3)
    return GaussianDiffusion(
        few.betas.numpy(), timestep_map=few.timestep_map.tolist(), original_num_steps=1000, **options
    )


def glide() -> Namespace:
    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return net(x, t, y=y)

    net = Net(outputs=2)
    text, null = {"y": torch.tensor([1.0, 2.0, 3.0, 4.0])}, {"y": torch.zeros(4)}
    return {"diffusion": spaced(var_type=ModelVarType.LEARNED_RANGE), "model": network, "text": text, "null": null}


def denoising_diffusion() -> Namespace:
    package = lucidrains.import_package()
    return {"diffusion": package.GaussianDiffusion(Net(), image_size=64, timesteps=3, beta_schedule="cosine")}


class DDIMSampler:
    """With the arguments and results of CompVis' own."""

    def __init__(self, model: compvis.LatentDiffusion) -> None:
        self.model = model

    def sample(
        self,
        steps: int,
        batch_size: int,
        shape: tuple[int, ...],
        conditioning: Tensor,
        unconditional_conditioning: Tensor,
        unconditional_guidance_scale: float,
    ) -> tuple[Tensor, None]:
        original = compvis.DDIMSampler(self.model, steps, 0.0)
        size = (batch_size, *shape)
        return original.sample(size, conditioning, unconditional_conditioning, unconditional_guidance_scale), None


def latents() -> Namespace:
    c, uc = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.zeros(4)
    return {"DDIMSampler": DDIMSampler, "model": compvis.LatentDiffusion(Net(4)), "c": c, "uc": uc}


def pipeline() -> Namespace:
    unet = diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    return {"FastDDIMScheduler": FastDDIMScheduler, "pipe": diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())}


def scheduler_loop() -> Namespace:
    class Network(Net):
        def forward(self, x: Tensor, t: Tensor) -> Any:
            return diffusers.models.unets.unet_2d.UNet2DOutput(super().forward(x, t))

    scheduler = diffusers.DDPMScheduler()
    scheduler.set_timesteps(4)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"scheduler": scheduler, "unet": Network(), "x": x, "g": torch.Generator().manual_seed(2)}


def k_diffusion() -> Namespace:
    c = torch.tensor([1.0, -2.0, 0.5, 3.0])
    names = {name: getattr(sampling, name) for name in ("get_sigmas_karras", "sample_dpmpp_2m")}
    return {"CompVisDenoiser": external.CompVisDenoiser, "ldm": compvis.LatentDiffusion(Net(4)), "c": c, **names}


def cascade() -> Namespace:
    class Upsampler(Net):
        def forward(self, x: Tensor, t: Tensor, y: Tensor, lowres_cond_img: Tensor, lowres_noise_times: Tensor) -> Any:
            return super().forward(x, t, y=y + lowres_noise_times) + 0.1 * lowres_cond_img

    return {
        "base": df.Sampler(lambda x, t, y: 0.1 * x, df.NoiseSchedule.linear(4), guidance_scale=2.0),
        "upsampler": df.Sampler(Upsampler(), df.NoiseSchedule.linear(2), guidance_scale=2.0),
        "low_resolution": low_resolution,
        "augmentation": df.NoiseSchedule.log_snr("linear", 1000),
        "text": {"y": torch.ones(16)},
        "null": {"y": torch.zeros(16)},
    }


def article() -> Namespace:
    betas = annotated.betas("linear", 20)

    def p_sample_loop(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
        return annotated.p_sample_loop(model, betas, shape)

    return {"p_sample_loop": p_sample_loop, "model": Net(1), "betas": betas}


def same(before: Tensor, after: Tensor, tolerance: float = 0.0) -> None:
    assert torch.isfinite(after).all()
    torch.testing.assert_close(after, before, rtol=0, atol=tolerance * before.abs().max().item())


def check_glide(_: Namespace, after: Namespace) -> None:
    """GLIDE's model_fn, on the batch of both halves that its loop draws noise for."""
    names = glide()

    def model_fn(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        half = x[: len(x) // 2]
        output = names["model"](torch.cat([half, half]), t, y)
        conditional, unconditional = output[:, :3].chunk(2)
        mixed = unconditional + 3.0 * (conditional - unconditional)
        return torch.cat([torch.cat([mixed, mixed]), output[:, 3:]], dim=1)

    torch.manual_seed(0)
    y = torch.cat([names["text"]["y"], names["null"]["y"]])
    expected = names["diffusion"].p_sample_loop(model_fn, (8, 3, 64, 64), model_kwargs={"y": y})[:4]
    # The exponential of a learned variance is ours, within 4 ulp; measured 1.4e-6 after these three long steps.
    same(expected, after["x"], 4e-6)


def check_pipeline(_: Namespace, after: Namespace) -> None:
    assert type(after["pipe"].scheduler) is FastDDIMScheduler


def check_k_diffusion(before: Namespace, after: Namespace) -> None:
    """The noise is not the same: the start there is torch's."""
    assert before["x"].shape == after["x"].shape
    assert 0.5 < after["x"].std() / before["x"].std() < 2.0


def check_cascade(_: Namespace, after: Namespace) -> None:
    assert after["small"].shape == (16, 3, 64, 64)
    assert after["large"].shape == (16, 3, 256, 256)
    assert torch.isfinite(after["large"]).all()


SECTIONS: dict[str, tuple[Callable[[], Namespace], Callable[[Namespace, Namespace], None]]] = {
    "openai": (guided, lambda before, after: same(before["x"], after["x"])),
    "openai 2": (glide, check_glide),
    "lucidrains": (denoising_diffusion, lambda before, after: same(before["x"], after["x"])),
    "CompVis": (latents, lambda before, after: same(before["z"], after["z"], 4e-6)),
    "diffusers": (pipeline, check_pipeline),
    "diffusers 2": (scheduler_loop, lambda before, after: same(before["x"], after["x"], 1e-5)),
    "k-diffusion": (k_diffusion, check_k_diffusion),
    "Cascades": (cascade, check_cascade),
    "The annotated diffusion model": (article, lambda before, after: same(before["imgs"], after["x"], 1e-6)),
}


def test_every_block_is_run() -> None:
    assert blocks("drop_in.md").keys() == SECTIONS.keys()


@pytest.mark.parametrize("section", SECTIONS)
def test_what_replaces_a_loop_gives_its_images(section: str) -> None:
    names, check = SECTIONS[section]
    before, after = run(blocks("drop_in.md")[section], lambda: {"torch": torch, "df": df, **names()})
    check(before, after)


def test_accelerating_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("accelerate.md").values()
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    ).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor(5)
    with torch.no_grad():
        expected = model(x, t).sample
        classes = [type(module) for module in model.modules()]
        exec(code, {"model": model})
        assert [type(module) for module in model.modules()] == classes
        assert torch.equal(model(x, t).sample, expected)
    assert "conv_norm_out" in capsys.readouterr().out
