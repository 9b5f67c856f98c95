"""The 3x3 convolutions of accelerated models: who gets the fused op, when it runs, and what must not change."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import ddpm_fast as df
from ddpm_fast.accelerate import acceleration_report, convolutions
from tests.ops.common import needs_vectors
from tests.third_party.lucidrains import import_package

from . import originals as o

CL = torch.channels_last

pytestmark = needs_vectors


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The mode of each call of the fused op."""
    seen: list[str] = []
    op = convolutions.conv3x3

    def spy(x: Tensor, weight: Any, bias: Tensor | None, *, upsample: bool, mode: str) -> Tensor:
        seen.append(mode)
        return op(x, weight, bias, upsample=upsample, mode=mode)

    monkeypatch.setattr(convolutions, "conv3x3", spy)
    return seen


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([3, 700])


class Guided(nn.Module):
    """openai's blocks, wide enough for the op."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = o.TimestepEmbedSequential(
            o.GuidedResBlock(16, 32, scale_shift=True), o.GuidedResBlock(32, 16, scale_shift=False, up=True)
        )
        self.last = nn.Conv2d(16, 3, 3, padding=1)
        self.embed = nn.Embedding(1000, o.EMBEDDING)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(self.blocks(self.first(x), self.embed(t)))


class Diffusers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = diffusers.UNet2DModel(
            sample_size=16,
            layers_per_block=1,
            block_out_channels=(16, 32),
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x, t).sample


# The model, and how often the op runs in one forward: every 3x3 convolution but the first, the last and strided ones.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "guided": (Guided, 4),
    "diffusers": (Diffusers, 17),
    "lucidrains": (lambda: import_package().Unet(dim=16, dim_mults=(1, 2), flash_attn=False), 25),
}

every_model = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> nn.Module:
    return o.fill(MODELS[name][0]())


def rms(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


@every_model
@pytest.mark.parametrize("channels_last", [False, True], ids=["as_it_is", "channels_last"])
@torch.no_grad()
def test_same_output_and_restored_bit_for_bit(name: str, channels_last: bool, calls: list[str]) -> None:
    model = make(name)
    keys = list(model.state_dict())
    attributes = [sorted(vars(m)) for m in model.modules()]
    x, t = inputs()
    want = model(x, t)
    got = df.accelerate(model, channels_last=channels_last)(x, t)
    assert calls == ["exact"] * MODELS[name][1]
    assert got.dtype == want.dtype
    # A layer errs by some 5e-7 of its output (tests/ops/test_conv.py), and there are at most 25, one after the other.
    assert rms(got - want) <= 25 * 5e-7 * rms(want)
    assert list(model.state_dict()) == keys
    calls.clear()
    assert torch.equal(df.restore(model)(x, t), want)
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert calls == []


@every_model
def test_every_convolution_is_named(name: str) -> None:
    model = make(name)
    names = {n for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
    untouched = acceleration_report(model)
    assert untouched.convs_skipped == dict.fromkeys(names, "accelerate() has not been applied")
    report = acceleration_report(df.accelerate(model))
    assert report.convs_fused.keys() | report.convs_skipped.keys() == names
    assert report.convs_fused.keys().isdisjoint(report.convs_skipped)
    assert len(report.convs_fused) == MODELS[name][1]
    assert all(report.convs_skipped.values())
    again = acceleration_report(df.accelerate(model))
    assert again == report
    assert acceleration_report(df.restore(model)) == untouched


@pytest.mark.parametrize("mode", ["exact", "strict", "fast"])
@torch.no_grad()
def test_the_mode_is_the_ops(mode: str, calls: list[str]) -> None:
    conv = nn.Conv2d(24, 40, 3, padding=1)
    x = torch.randn(2, 24, 10, 9)
    df.accelerate(conv, conv=mode)
    assert torch.equal(conv(x), df.conv3x3(x, conv.weight, conv.bias, mode=mode))
    assert calls == [mode]
    assert acceleration_report(conv).convs_fused[""].startswith(f"{mode}, F(")


@torch.no_grad()
def test_torch_leaves_them_alone(calls: list[str]) -> None:
    model = make("guided")
    report = acceleration_report(df.accelerate(model, conv="torch"))
    assert report.fused
    assert report.convs_fused == {}
    assert "mode is 'torch'" in report.convs_skipped["blocks.0.in_layers.2"]
    model(*inputs())
    assert calls == []


class Scaled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Circular(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight, bias)


def replaced() -> nn.Module:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    conv.forward = lambda x: x  # type: ignore[method-assign]
    return conv


REASONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "1-D": (lambda: nn.Conv1d(16, 16, 3, padding=1), "Conv1d is not a Conv2d"),
    "transposed": (lambda: nn.ConvTranspose2d(16, 16, 3, padding=1), "ConvTranspose2d is not a Conv2d"),
    "lazy": (lambda: nn.LazyConv2d(16, 3, padding=1), "not known yet"),
    "1x1": (lambda: nn.Conv2d(16, 16, 1), r"kernel \(1, 1\)"),
    "stride": (lambda: nn.Conv2d(16, 16, 3, 2, padding=1), r"stride \(2, 2\)"),
    "padding": (lambda: nn.Conv2d(16, 16, 3), r"padding \(0, 0\)"),
    "dilation": (lambda: nn.Conv2d(16, 16, 3, padding="same", dilation=2), r"dilation \(2, 2\)"),
    "groups": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=2), "groups 2"),
    "reflect": (lambda: nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), "padding with reflect"),
    "narrow": (lambda: nn.Conv2d(3, 64, 3, padding=1), "3 to 64 channels"),
    "forward": (lambda: Scaled(16, 16, 3, padding=1), "forward of its own"),
    "_conv_forward": (lambda: Circular(16, 16, 3, padding=1), "_conv_forward of its own"),
    "replaced": (replaced, "forward of its own"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1)),
        "not a plain parameter",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_is_skipped_says_why_and_stays_what_it_is(case: str) -> None:
    make_conv, reason = REASONS[case]
    conv = make_conv()
    kind = type(conv)
    report = acceleration_report(df.accelerate(conv))
    assert type(conv) is kind
    assert report.convs_fused == {}
    with pytest.raises(ValueError, match=reason):
        raise ValueError(report.convs_skipped[""])


@torch.no_grad()
def test_padding_by_name_and_no_bias(calls: list[str]) -> None:
    conv = nn.Conv2d(16, 24, 3, padding="same", bias=False)
    x = torch.randn(1, 16, 8, 8)
    want = conv(x)
    torch.testing.assert_close(df.accelerate(conv)(x), want, rtol=1e-4, atol=1e-5)
    assert calls


def test_modules_of_this_package_keep_their_own_mode() -> None:
    unet = df.nn.UNet(base_channels=32, channel_mult=(1, 2))
    unet.set_conv_mode("strict")
    report = acceleration_report(df.accelerate(unet, conv="fast"))
    assert report.convs_fused["down.0.0.conv1"].startswith("strict, F(2x2")
    assert "kernel (1, 1)" in report.convs_skipped["up.0.0.skip"]
    unet.set_conv_mode("torch")
    assert acceleration_report(unet).convs_skipped["down.0.0.conv1"] == "torch, mode is 'torch'"


INPUTS: dict[str, Tensor] = {
    "contiguous": torch.randn(2, 24, 8, 9),
    "channels_last": torch.randn(2, 24, 8, 9).contiguous(memory_format=CL),
    "half the channels": torch.randn(2, 48, 8, 9)[:, 24:],
    "half of channels_last's": torch.randn(2, 48, 8, 9).contiguous(memory_format=CL)[:, :24],
    "one": torch.randn(1, 24, 8, 9),
    "none": torch.randn(0, 24, 8, 9),
}


@pytest.mark.parametrize("weight_last", [False, True], ids=["weight_contiguous", "weight_channels_last"])
@pytest.mark.parametrize("what", INPUTS)
@torch.no_grad()
def test_outputs_lie_in_memory_as_torchs(what: str, weight_last: bool, calls: list[str]) -> None:
    conv = nn.Conv2d(24, 16, 3, padding=1)
    if weight_last:
        conv.to(memory_format=CL)
    x = INPUTS[what]
    want = conv(x)
    got = df.accelerate(conv)(x)
    assert calls == ["exact"]
    assert got.shape == want.shape
    if want.numel():
        assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def forward_mode(conv: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(conv(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@pytest.mark.parametrize(
    ("what", "run"),
    [
        ("gradient", lambda conv, x: conv(x)),
        ("float64", lambda conv, x: copy.deepcopy(conv).double()(x.double())),
        ("bfloat16", lambda conv, x: copy.deepcopy(conv).bfloat16()(x.bfloat16())),
        ("unbatched", lambda conv, x: conv(x[0])),
        ("vmap", lambda conv, x: torch.func.vmap(conv)(x[:, None])),
        ("jvp", lambda conv, x: torch.func.jvp(conv, (x,), (x,))[1]),
        ("forward mode", forward_mode),
        ("one pixel", lambda conv, x: conv(x[:, :, :1, :1])),
    ],
)
def test_what_the_op_does_not_take_is_torchs(what: str, run: Any, calls: list[str]) -> None:
    conv = nn.Conv2d(24, 16, 3, padding=1)
    x = torch.randn(2, 24, 8, 8)
    with torch.set_grad_enabled(what == "gradient"):
        want = run(conv, x)
        assert torch.equal(run(df.accelerate(conv), x), want)
    assert calls == []


@torch.no_grad()
def test_autocast_and_another_backend_are_torchs(calls: list[str]) -> None:
    conv = nn.Conv2d(24, 16, 3, padding=1)
    x = torch.randn(2, 24, 8, 8)
    want = conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = conv(x)
        df.accelerate(conv)
        assert torch.equal(conv(x), wanted)
    with df.use_backend("reference"):
        assert torch.equal(conv(x), want)
    assert conv.to("meta")(x.to("meta")).shape == want.shape
    assert calls == []


def test_a_mismatch_is_torchs_error() -> None:
    conv = nn.Conv2d(24, 16, 3, padding=1)
    for x in (torch.randn(2, 20, 8, 8), torch.randn(2, 24, 8, 8).double()):
        with torch.no_grad(), pytest.raises(RuntimeError) as want:
            conv(x)
        with torch.no_grad(), pytest.raises(RuntimeError) as got:
            df.accelerate(conv)(x)
        df.restore(conv)
        assert str(got.value) == str(want.value)


def test_gradients_and_training_are_torchs_bit_for_bit() -> None:
    model = make("guided").train()
    twin = df.accelerate(copy.deepcopy(model), conv="torch")
    df.accelerate(model)
    for module in (model, twin):
        torch.manual_seed(1)  # dropout
        module(*inputs()).square().mean().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert a.grad is not None, name
        assert torch.equal(a.grad, b.grad), name


@torch.no_grad()
def test_hooks_see_the_convolution(calls: list[str]) -> None:
    conv = df.accelerate(nn.Conv2d(24, 16, 3, padding=1))
    seen: list[Tensor] = []
    conv.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    x = torch.randn(2, 24, 8, 8)
    y = conv(x)
    assert seen[0] is x
    assert seen[1] is y
    assert calls


@torch.no_grad()
def test_new_weights_are_seen(calls: list[str]) -> None:
    conv, other = (nn.Conv2d(24, 16, 3, padding=1) for _ in range(2))
    x = torch.randn(2, 24, 8, 8)
    df.accelerate(conv)(x)
    conv.load_state_dict(other.state_dict())
    assert torch.equal(conv(x), df.conv3x3(x, other.weight, other.bias))
    conv.weight = nn.Parameter(other.weight + 1)
    assert torch.equal(conv(x), df.conv3x3(x, other.weight + 1, other.bias))
    assert len(calls) == 3


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@torch.no_grad()
def test_copies_are_accelerated_and_have_weights_of_their_own(how: str, calls: list[str]) -> None:
    model = df.accelerate(make("guided"), conv="strict")
    x, t = inputs()
    want = model(x, t)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    calls.clear()
    assert torch.equal(twin(x, t), want)
    assert calls == ["strict"] * 4
    assert acceleration_report(twin) == acceleration_report(model)
    for parameter in twin.parameters():
        parameter.zero_()
    assert not torch.equal(twin(x, t), want)
    assert torch.equal(model(x, t), want)
    df.restore(twin)
    assert all(type(m) is nn.Conv2d for m in twin.modules() if isinstance(m, nn.Conv2d))


@torch.no_grad()
def test_threads_at_once_see_the_new_weights() -> None:
    from concurrent.futures import ThreadPoolExecutor

    conv = df.accelerate(nn.Conv2d(64, 64, 3, padding=1))
    x = torch.randn(1, 64, 8, 8)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            conv.weight.normal_()
            want = df.conv3x3(x, conv.weight, conv.bias)
            # Gradients are off in this thread alone.
            results = list(pool.map(lambda _: torch.no_grad()(conv)(x), range(4)))
            assert all(torch.equal(got, want) for got in results)


def test_compiles_as_one_graph() -> None:
    conv = nn.Sequential(nn.Conv2d(24, 16, 3, padding=1), nn.ReLU())
    x = torch.randn(2, 24, 8, 8)
    with torch.no_grad():
        want = conv(x)
        got = torch.compile(df.accelerate(conv), backend="eager", fullgraph=True)(x)
    assert torch.equal(got, want)


def test_weights_that_were_sharded_are_seen(tmp_path: object) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        conv = nn.Sequential(nn.Conv2d(24, 16, 3, padding=1))
        x = torch.randn(2, 24, 8, 8)
        df.accelerate(conv)
        fully_shard(conv, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        with torch.no_grad():
            conv(x)
            for parameter in conv.parameters():
                parameter.mul_(0.5)
            state = {name: value.full_tensor() for name, value in conv.state_dict().items()}
            want = df.conv3x3(x, state["0.weight"], state["0.bias"])
            assert torch.equal(conv(x), want)
    finally:
        torch.distributed.destroy_process_group()
