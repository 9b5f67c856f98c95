"""The U-Net: shapes, options, precision, layout, gradients, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from ddpm_fast.nn import GroupNormSiLU, UNet, UNetConfig, timestep_embedding
from ddpm_fast.nn.blocks import SelfAttention

SMALL = {
    "in_channels": 1,
    "base_channels": 8,
    "channel_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "attention_levels": (2,),
    "num_groups": 4,
}


def build(seed: int = 0, **changes: object) -> UNet:
    """A small U-Net whose zero-initialised layers are filled, so that every path reaches the output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNet(**{**SMALL, **changes})
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def inputs(n: int = 2, channels: int = 1, size: tuple[int, int] = (8, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, *size, generator=generator), torch.arange(n) * 300 + 7


@pytest.mark.parametrize("time_embedding", ["add", "scale_shift"])
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (12, 4)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_output_has_the_input_shape(size: tuple[int, int], time_embedding: str) -> None:
    x, t = inputs(size=size)
    assert build(time_embedding=time_embedding)(x, t).shape == x.shape


def test_output_channels() -> None:
    x, t = inputs(channels=3)
    assert build(in_channels=3, learned_variance=True)(x, t).shape == (2, 6, 8, 8)
    assert build(in_channels=3, out_channels=5)(x, t).shape == (2, 5, 8, 8)


def test_starts_as_the_zero_function() -> None:
    x, t = inputs()
    torch.testing.assert_close(UNet(**SMALL)(x, t), torch.zeros_like(x), rtol=0, atol=0)


@pytest.mark.parametrize("time_embedding", ["add", "scale_shift"])
def test_every_input_matters(time_embedding: str) -> None:
    model = build(time_embedding=time_embedding, num_classes=3)
    x, t = inputs()
    y = torch.tensor([0, 1])
    out = model(x, t, y)
    assert not torch.allclose(out, model(x + 0.1, t, y))
    assert not torch.allclose(out, model(x, t + 100, y))
    assert not torch.allclose(out, model(x, t, y + 1))


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    model = build()
    x, t = inputs(3)
    # Convolutions may round differently with another batch size; anything larger is a leak between samples.
    torch.testing.assert_close(model(x, t)[1:2], model(x[1:2], t[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_is_softmax_attention(heads: int) -> None:
    torch.manual_seed(0)
    layer = SelfAttention(8, num_heads=heads, num_groups=4).requires_grad_(False)
    torch.nn.init.normal_(layer.project.weight)
    x = torch.randn(2, 8, 3, 5)
    rows = layer.norm(x).flatten(2).transpose(1, 2)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in layer.qkv(rows).chunk(3, dim=-1))
    weights = torch.softmax(q @ k.transpose(-1, -2) / (8 // heads) ** 0.5, dim=-1)
    expected = x + layer.project((weights @ v).transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_layouts_agree() -> None:
    x, t = inputs()
    fast = build()
    plain = build(channels_last=False)
    plain.load_state_dict(fast.state_dict())
    assert fast.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert plain.down[0][0].conv1.weight.is_contiguous()
    torch.testing.assert_close(fast(x, t), plain(x, t), rtol=1e-4, atol=1e-5)
    assert fast(x, t).equal(fast(x.contiguous(memory_format=torch.channels_last), t))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)], ids=["float16", "bfloat16"]
)
def test_half_precision_is_near_float32(dtype: torch.dtype, tolerance: float) -> None:
    x, t = inputs()
    expected = build()(x, t)
    out = build().to(dtype)(x, t)
    assert out.dtype == dtype
    # About ten times the unit roundoff (5e-4, 4e-3), on outputs of order 1, for some 20 layers.
    assert (out.float() - expected).abs().max() < tolerance * expected.abs().max()


def test_float_and_int_timesteps_agree() -> None:
    x, t = inputs()
    assert build()(x, t).equal(build()(x, t.float()))


def test_gradients_reach_every_parameter() -> None:
    model = build(time_embedding="scale_shift", num_classes=2).requires_grad_(True)
    x, t = inputs()
    model(x, t, torch.tensor([0, 1])).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_norms_are_fused_modules() -> None:
    model = build()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.GroupNorm)]
    # 3 levels x 1 block down, 2 middle, 3 x 2 up: 11 blocks of two norms; 1 + 2 + 1 attentions; the last norm.
    assert len(norms) == 22 + 4 + 1
    assert all(type(m) is GroupNormSiLU for m in norms)


def test_config_round_trips_through_json() -> None:
    config = UNetConfig(**SMALL, dropout=0.1, num_classes=4)
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="depth"):
        UNetConfig.from_dict({"depth": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_channels": 0}, "base_channels"),
        ({"base_channels": 7}, "base_channels"),
        ({"base_channels": True}, "base_channels"),
        ({"num_groups": 3}, "num_groups"),
        ({"num_heads": 3}, "num_heads"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"channel_mult": (1, 0)}, "channel_mult"),
        ({"num_res_blocks": 0}, "num_res_blocks"),
        ({"attention_levels": (3,)}, "attention_levels"),
        ({"dropout": 1.0}, "dropout"),
        ({"time_embedding": "concat"}, "time_embedding"),
        ({"out_channels": 3, "learned_variance": True}, "out_channels"),
        ({"num_classes": 0}, "num_classes"),
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else None,
)
def test_bad_configs_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{**SMALL, **change})


def test_bad_inputs_are_named() -> None:
    model = build()
    x, t = inputs()
    with pytest.raises(ValueError, match="multiples of 4 for 3 levels, got 8x6"):
        model(x[..., :6], t)
    with pytest.raises(ValueError, match="x must have shape"):
        model(x.expand(2, 2, 8, 8), t)
    with pytest.raises(ValueError, match="floating point"):
        model(x.to(torch.uint8), t)
    with pytest.raises(ValueError, match="t must have shape"):
        model(x, t[:1])
    with pytest.raises(ValueError, match="labels y are given"):
        model(x, t, t)
    with pytest.raises(ValueError, match="labels y are missing"):
        build(num_classes=2)(x, t)
    with pytest.raises(TypeError, match="not both"):
        UNet(UNetConfig(**SMALL), in_channels=1)
    with pytest.raises(TypeError, match="UNetConfig"):
        UNet(SMALL)  # type: ignore[arg-type]


def test_timestep_embedding() -> None:
    t = torch.tensor([0, 1, 999])
    out = timestep_embedding(t, 8)
    assert out.dtype == torch.float32
    k = torch.arange(4, dtype=torch.float64)
    angles = t.double()[:, None] * 10000.0 ** (-k / 4)
    # An angle of up to 999 carries a float32 rounding of up to 999 * 2^-24 * 2.
    torch.testing.assert_close(out.double(), torch.cat((angles.cos(), angles.sin()), 1), rtol=0, atol=2e-4)
    with pytest.raises(ValueError, match="even"):
        timestep_embedding(t, 7)
    with pytest.raises(ValueError, match="shape"):
        timestep_embedding(t[:, None], 8)


def test_self_conditioning_takes_a_second_image() -> None:
    model = build(self_condition=True)
    x, t, last = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.randn(2, 1, 8, 8)
    assert torch.equal(model(x, t), model(x, t, x_self_cond=torch.zeros_like(x)))
    assert not torch.equal(model(x, t), model(x, t, x_self_cond=last))
    with pytest.raises(ValueError, match="x_self_cond must have x's shape"):
        model(x, t, x_self_cond=last[:1])
    with pytest.raises(ValueError, match="x_self_cond"):
        build()(x, t, x_self_cond=last)


def test_checkpointed_blocks_keep_less_and_give_the_same_gradients() -> None:
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([1, 2])
    kept, gradients = [], []
    for again in (False, True):
        model = build(dropout=0.3).requires_grad_(True).train()
        model.set_gradient_checkpointing(again)
        sizes: dict[int, Tensor] = {}

        def keep(tensor: Tensor, sizes: dict[int, Tensor] = sizes) -> Tensor:
            sizes[tensor.data_ptr()] = tensor
            return tensor

        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(x, t).square().mean()
        kept.append(sum(tensor.numel() for tensor in sizes.values()))
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    assert kept[1] < 0.5 * kept[0]
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
