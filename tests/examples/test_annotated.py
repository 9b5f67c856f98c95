"""examples/annotated.py: what it calls the article's is, and it runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import ddpm_fast as df
from tests.originals import annotated as original

SHAPE = (2, 1, 8, 8)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(df.__file__).parent.parent / "examples" / "annotated.py"
    spec = importlib.util.spec_from_file_location("annotated_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(example: ModuleType, convnext: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return example.Unet(dim=8, channels=1, dim_mults=(1, 2), convnext=convnext).eval()


def test_the_loop_is_the_articles(example):
    model = small(example)
    torch.manual_seed(1)
    expected = original.p_sample_loop(model, original.betas("linear", 20), SHAPE)
    torch.manual_seed(1)
    *_, last = example.Before(20).sample(model, SHAPE)
    assert torch.equal(last, expected)


@pytest.mark.parametrize("convnext", [False, True], ids=["resnet", "convnext"])
def test_both_ways_draw_the_same_images(example, convnext):
    model = small(example, convnext)
    ways = {
        "before": (model, example.Before(30)),
        "after": (df.accelerate(small(example, convnext)), example.After(30)),
    }
    images, seconds = example.sample(ways, SHAPE)
    # The fused norm rounds differently: about an ulp a call, which 30 steps of an untrained network carry on.
    torch.testing.assert_close(images["after"], images["before"], rtol=0, atol=2e-4)
    assert min(seconds.values()) > 0
    assert df.acceleration_report(ways["after"][0]).fused


def test_both_losses_are_one(example, monkeypatch):
    """On the same timesteps and noise."""
    model, x0 = small(example), torch.rand(SHAPE) * 2 - 1
    after = example.After(50)
    t = df.ops.random_timesteps(2, 50, seed=0, step=1)
    monkeypatch.setattr(torch, "randint", lambda *_: t)
    monkeypatch.setattr(torch, "randn_like", lambda x: df.randn(x.shape, seed=0, step=1, stream="training"))
    before = example.Before(50).loss(model, x0)
    torch.testing.assert_close(after.loss(model, x0), before, rtol=1e-5, atol=0)


def test_linear_attention_is_attention_without_the_softmax_over_pixels(example):
    """Its definition, pixel by pixel."""
    torch.manual_seed(0)
    layer, x = example.LinearAttention(4, heads=2, dim_head=3), torch.randn(1, 4, 2, 3)
    q, k, v = (part.reshape(2, 3, 6) for part in layer.to_qkv(x)[0].reshape(3, 6, 6))
    outputs = []
    for head in range(2):
        keys = torch.softmax(k[head], dim=1)
        columns = []
        for pixel in range(6):
            query = torch.softmax(q[head, :, pixel], dim=0) * 3**-0.5
            columns.append(sum((query @ keys[:, j]) * v[head, :, j] for j in range(6)))
        outputs.append(torch.stack(columns, dim=1))
    expected = layer.to_out(torch.cat(outputs).reshape(1, 6, 2, 3))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_attention_is_torchs(example):
    torch.manual_seed(0)
    layer, x = example.Attention(4, heads=2, dim_head=3), torch.randn(2, 4, 3, 3)
    q, k, v = (part.reshape(2, 2, 3, 9).transpose(-2, -1) for part in layer.to_qkv(x).chunk(3, dim=1))
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    expected = layer.to_out(attended.transpose(-2, -1).reshape(2, 6, 3, 3))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_weights_are_standardized(example):
    layer = example.WeightStandardizedConv2d(3, 5, 3, padding=1)
    seen: list[Tensor] = []
    with torch.no_grad():
        layer.bias.zero_()
        for i in range(27):
            x = torch.zeros(1, 27)
            x[0, i] = 1.0
            seen.append(layer(x.reshape(1, 3, 3, 3))[0, :, 1, 1])
    kernels = torch.stack(seen)
    torch.testing.assert_close(kernels.mean(0), torch.zeros(5), rtol=0, atol=1e-6)
    # Less the epsilon below the root, beside a variance of 0.012.
    torch.testing.assert_close(kernels.var(0, unbiased=False), torch.ones(5), rtol=2e-3, atol=0)


def test_it_runs(example, tmp_path, capsys):
    pytest.importorskip("sklearn")
    out = tmp_path / "images.png"
    example.main(
        [
            "--dataset",
            "digits",
            "--steps",
            "2",
            "--batch-size",
            "8",
            "--timesteps",
            "5",
            "--samples",
            "3",
            "--out",
            str(out),
        ]
    )
    printed = capsys.readouterr().out
    assert re.search(r"training +2 +[\d.]+ s +[\d.]+ s +[\d.]+\n", printed)
    assert re.search(r"sampling +5 +[\d.]+ s +[\d.]+ s +[\d.]+\n", printed)
    difference = re.search(r"largest difference of the 3 images: ([\d.e-]+);", printed)
    assert difference is not None
    assert float(difference[1]) < 1e-3
    with Image.open(out) as image:
        assert image.size == (3 * 16, 16)


def test_it_says_what_is_missing(example, capsys):
    with pytest.raises(SystemExit):
        example.main([])
    assert "--dataset fashion-mnist needs --data" in capsys.readouterr().err
