"""Attention in accelerated models: whose projections are folded, when, and what must not change."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from torch import Tensor, nn
from torch.autograd import forward_ad

import ddpm_fast as df
from ddpm_fast.accelerate import acceleration_report, one_head
from tests.nn.test_attention import Calls

from . import originals as o
from .test_wrapping import _replica

CL = torch.channels_last
FOLDED = "one head, its four projections folded into two"


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shape of the rows of each folded attention; those that accelerate tries out have 15 or 16 positions, or 7."""
    seen: list[torch.Size] = []
    attend = one_head.attend

    def spy(rows: Tensor, *args: Any) -> Tensor:
        if rows.shape[1] not in (7, 15, 16):
            seen.append(rows.shape)
        return attend(rows, *args)

    monkeypatch.setattr(one_head, "attend", spy)
    return seen


def diffusers_attention(channels: int = 64, **options: Any) -> nn.Module:
    """As diffusers' U-Nets make it, where the options do not say otherwise."""
    usual = {"heads": 1, "dim_head": channels, "norm_num_groups": 4, "residual_connection": True, "bias": True}
    return Attention(channels, **usual | options)


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "diffusers": diffusers_attention,
    "diffusers-bmm": lambda c: diffusers_attention(c, processor=AttnProcessor()),
    "diffusers-rescaled": lambda c: diffusers_attention(c, rescale_output_factor=2**0.5),
    "diffusers-alone": lambda c: diffusers_attention(c, norm_num_groups=None, residual_connection=False),
    "diffusers-no_scale": lambda c: diffusers_attention(c, scale_qk=False, bias=False),
    "diffusers-wide": lambda c: diffusers_attention(c, dim_head=2 * c, out_bias=False),
    "guided": o.GuidedAttention,
    "guided-block": o.GuidedAttentionBlock,
    "compvis": o.CompVisAttnBlock,
    "harmless": lambda c: HarmlessAttention(c),
}

every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, channels: int = 64, seed: int = 0) -> nn.Module:
    """Weights that keep the size of the values."""
    module = KINDS[kind](channels)
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() < 2 else p[0].numel() ** -0.5))
    return module.eval()


def image(channels: int = 64, side: int = 5, seed: int = 9) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(seed))


def rms(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


@every_kind
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@torch.no_grad()
def test_same_output_and_restored_bit_for_bit(kind: str, channels_last: bool, folds: list[torch.Size]) -> None:
    module = make(kind)
    keys, kinds = list(module.state_dict()), [type(m) for m in module.modules()]
    attributes = [sorted(vars(m)) for m in module.modules()]
    x = image().contiguous(memory_format=CL if channels_last else torch.contiguous_format)
    want = module(x)
    untouched = acceleration_report(module)
    assert untouched.attentions_skipped == {"": "accelerate() has not been applied"}
    report = acceleration_report(df.accelerate(module))
    assert (report.attentions_fused, report.attentions_skipped) == ({"": FOLDED}, {})
    given = x.clone()
    got = module(x)
    assert folds == [(2, 25, 64)]
    assert torch.equal(x, given)
    assert (got.dtype, got.stride()) == (want.dtype, want.stride())
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * float(want.abs().max()))
    assert list(module.state_dict()) == keys
    assert acceleration_report(df.accelerate(module)) == report
    assert torch.equal(df.restore(module)(x), want)
    assert [type(m) for m in module.modules()] == kinds
    assert [sorted(vars(m)) for m in module.modules()] == attributes
    assert acceleration_report(module) == untouched
    assert len(folds) == 1


@pytest.mark.parametrize("side", [8, 16])
@pytest.mark.parametrize("channels", [64, 128, 256, 512])
@pytest.mark.parametrize("kind", ["diffusers", "diffusers-bmm", "guided-block", "compvis"])
@torch.no_grad()
def test_the_error_is_at_most_the_originals(kind: str, channels: int, side: int, folds: list[torch.Size]) -> None:
    ours = eagers = 0.0
    for seed in range(3):
        module = make(kind, channels, seed)
        x = image(channels, side, seed).contiguous(memory_format=CL)
        # Folding alone is compared, and openai's norm casts to float32.
        module.norm = module.group_norm = nn.Identity().eval()
        exact = copy.deepcopy(module).double()(x.double())
        eagers += rms(module(x) - exact)
        ours += rms(df.accelerate(module)(x) - exact)
    assert len(folds) == 3
    assert ours <= eagers


def forward_mode(module: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(module(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def autocast(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return module(x)


def with_inference_weights(module: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return copy.deepcopy(module)(x)


ORIGINAL: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "gradient": lambda module, x: torch.enable_grad()(module)(x),
    "gradient of the input": lambda module, x: torch.enable_grad()(module)(x.clone().requires_grad_()),
    "bfloat16": lambda module, x: copy.deepcopy(module).bfloat16()(x.bfloat16()),
    "float64": lambda module, x: copy.deepcopy(module).double()(x.double()),
    "autocast": autocast,
    "training": lambda module, x: copy.deepcopy(module).train()(x),
    "inference tensors": with_inference_weights,
    "vmap": lambda module, x: torch.func.vmap(module)(x[:, None]),
    "jvp": lambda module, x: torch.func.jvp(module, (x,), (x,))[1],
    "forward mode": forward_mode,
    "no image": lambda module, x: module(x[:0]),
}


@pytest.mark.parametrize("case", ORIGINAL)
@pytest.mark.parametrize("kind", ["diffusers-bmm", "compvis"])
@torch.no_grad()
def test_where_folding_is_not_safe_the_original_runs(kind: str, case: str, folds: list[torch.Size]) -> None:
    module = make(kind)
    module.norm = module.group_norm = nn.Identity().eval()  # norms are another test's subject
    df.accelerate(module)
    if case == "gradient of the input":
        module.requires_grad_(False)
    twin = copy.deepcopy(module)
    twin.__class__ = twin.original_class
    x = image()
    assert torch.equal(ORIGINAL[case](module, x), ORIGINAL[case](twin, x))
    assert folds == []


def halve(module: nn.Module) -> None:
    module.forward = lambda x: x / 2  # type: ignore[method-assign]


def adapt(module: nn.Module) -> None:
    """As LoRA puts itself in the place of a layer."""
    module.to_q = nn.Sequential(module.to_q)


def another_layer() -> nn.Module:
    return nn.Linear(64, 64).requires_grad_(False).eval()


def dropout_at_inference(module: nn.Module) -> None:
    module.to_out[1].p = 0.5
    module.to_out[1].train()


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "hook": lambda module: module.to_v.register_forward_hook(lambda m, args, y: 2 * y),
    "hook before": lambda module: module.to_out[0].register_forward_pre_hook(lambda m, args: (2 * args[0],)),
    "norm's hook": lambda module: module.group_norm.register_forward_hook(lambda m, args, y: 2 * y),
    "adapter": adapt,
    "another layer": lambda module: setattr(module, "to_q", another_layer()),
    "forward": halve,
    "layer's forward": lambda module: halve(module.to_q),
    "parametrization": lambda module: nn.utils.parametrizations.weight_norm(module.to_k),
    "old weight_norm": lambda module: nn.utils.weight_norm(module.to_k),
    "processor": lambda module: module.set_processor(SlicedAttnProcessor(1)),
    "fused projections": lambda module: module.fuse_projections(),
    "heads": lambda module: setattr(module, "heads", 2),
    "scale": lambda module: setattr(module, "scale", 0.5),
    "divisor": lambda module: setattr(module, "rescale_output_factor", 3),
    "residual": lambda module: setattr(module, "residual_connection", False),
    "dropout": dropout_at_inference,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_whatever_is_changed_afterwards_counts(change: str, folds: list[torch.Size]) -> None:
    twin = make("diffusers-bmm")
    module = df.accelerate(copy.deepcopy(twin))
    x = image()
    before = module(x)
    assert len(folds) == 1
    outputs = []
    for changed in (module, twin):
        torch.manual_seed(1)
        CHANGES[change](changed)
        outputs.append(changed(x))
    got, want = outputs
    # To the rounding of the fused norm.
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * float(want.abs().max()))
    assert not torch.equal(got, before)
    assert len(folds) == 1


@torch.no_grad()
def test_a_hook_is_honoured_only_while_it_is_there(folds: list[torch.Size]) -> None:
    module = df.accelerate(make("diffusers"))
    seen: list[Tensor] = []
    x = image()
    handle = module.to_q.register_forward_hook(lambda m, args, y: seen.append(y))
    module(x)
    assert (len(seen), folds) == (1, [])
    handle.remove()
    module(x)
    everywhere = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(y))
    module(x)
    everywhere.remove()
    assert (len(seen) > 5, len(folds)) == (True, 1)
    # One on the module itself takes nothing away.
    module.register_forward_hook(lambda m, args, y: seen.append(y))
    assert seen.pop() is not module(x)
    assert len(folds) == 2


@torch.no_grad()
def test_pruned_layers_are_a_narrower_head(folds: list[torch.Size]) -> None:
    twin = make("diffusers")
    module = df.accelerate(copy.deepcopy(twin))
    for made in (twin, module):
        for layer in (made.to_q, made.to_k, made.to_v):
            layer.weight, layer.bias = nn.Parameter(layer.weight[:32]), nn.Parameter(layer.bias[:32])
        made.to_out[0].weight = nn.Parameter(made.to_out[0].weight[:, :32])
    x = image()
    want = twin(x)
    torch.testing.assert_close(module(x), want, rtol=0, atol=2e-6 * float(want.abs().max()))
    assert folds == []


@torch.no_grad()
def test_a_mismatch_is_torchs_error() -> None:
    twin = make("diffusers-alone")
    module = df.accelerate(copy.deepcopy(twin))
    for made in (twin, module):
        made.to_out[0].half()
    with pytest.raises(RuntimeError) as want:
        twin(image())
    with pytest.raises(RuntimeError) as got:
        module(image())
    assert str(got.value) == str(want.value)


@torch.no_grad()
def test_arguments(folds: list[torch.Size]) -> None:
    twin = make("diffusers")
    module = df.accelerate(copy.deepcopy(twin))
    twin.group_norm = module.group_norm
    x = image()
    same = {"encoder_hidden_states": None, "attention_mask": None, "temb": torch.ones(2, 3)}
    assert torch.equal(module(x, **same), module(x))
    assert torch.equal(module(x, None, None), module(x))
    assert len(folds) == 4
    context, mask = torch.randn(2, 6, 64), torch.randn(2, 25, 25)
    for given in ({"encoder_hidden_states": context}, {"attention_mask": mask}, {"hidden_states": x}):
        args = () if "hidden_states" in given else (x,)
        assert torch.equal(module(*args, **given), twin(*args, **given))
    with pytest.raises(RuntimeError) as want:
        twin(x[:, :32])
    with pytest.raises(RuntimeError) as got:
        module(x[:, :32])
    assert str(got.value) == str(want.value)
    assert len(folds) == 4
    guided = df.accelerate(make("guided-block"))
    assert torch.equal(guided(x, None), guided(x))
    assert len(folds) == 6


@pytest.mark.parametrize("kind", ["diffusers-alone", "diffusers-no_scale"])
@torch.no_grad()
def test_rows_are_taken_where_no_norm_is(kind: str, folds: list[torch.Size]) -> None:
    module = make(kind)
    rows = torch.randn(2, 9, 64)
    want = module(rows)
    got = df.accelerate(module)(rows)
    taken = kind == "diffusers-alone"
    assert len(folds) == taken
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * float(want.abs().max()))


class WindowedAttention(o.CompVisAttnBlock):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(WindowedAttention, self).forward(half) for half in x.chunk(2, dim=3)], dim=3)


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Conv2d(16, 48, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).chunk(3, dim=2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class LayerNormAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), Causal()

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x.flatten(2).transpose(1, 2))
        return self.attention(rows.transpose(1, 2).reshape(x.shape))


class CausalAttention(Causal):
    pass


MAPS: list[Tensor] = []
COUNT = 0


class WatchedAttention(o.CompVisAttnBlock):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weight = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=2)
        self.look(weight)
        return x + self.proj_out((v @ weight.transpose(1, 2)).reshape(x.shape))


class IntoAttributeAttention(WatchedAttention):
    def look(self, weight: Tensor) -> None:
        self.weight = weight


class IntoListAttention(WatchedAttention):
    def look(self, weight: Tensor) -> None:
        MAPS.append(weight)


class BehindNameAttention(WatchedAttention):
    def look(self, weight: Tensor) -> None:
        keep = MAPS.append
        keep(weight)


class IntoItsInputAttention(WatchedAttention):
    def look(self, weight: Tensor) -> None:
        weight.mul_(1)


class PrintingAttention(WatchedAttention):
    def look(self, weight: Tensor) -> None:
        print(weight.mean())


class IntoElementAttention(WatchedAttention):
    def look(self, weight: Tensor) -> None:
        self.seen[0] = weight


class CountingAttention(WatchedAttention):
    def look(self, weight: Tensor) -> None:
        global COUNT
        COUNT += 1


class IntoDefaultAttention(WatchedAttention):
    def look(self, weight: Tensor, seen: list[Tensor] = MAPS) -> None:
        seen += [weight]


class OwnListAttention(WatchedAttention):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.maps: list[Tensor] = []

    def look(self, weight: Tensor) -> None:
        maps = self.maps
        maps += [weight]


class StaticAttention(WatchedAttention):
    @staticmethod
    def look(weight: Tensor) -> None:
        MAPS.append(weight)


class DecoratedAttention(WatchedAttention):
    @torch.no_grad()
    def look(self, weight: Tensor) -> None:
        pass


class CalledAttention(WatchedAttention):
    def __call__(self, x: Tensor) -> Tensor:
        MAPS.append(x)
        return super().__call__(x)

    def look(self, weight: Tensor) -> None:
        pass


class HarmlessAttention(WatchedAttention):
    """What must not be a reason: loops, branches, conditions, errors, other methods, static ones, and no effect."""

    def look(self, weight: Tensor) -> None:
        if weight.dim() != 3 or self.size(weight) > 10**6:
            raise RuntimeError(f"{weight.shape} is too large")
        total = sum_of([1.0, 2.0])
        for _ in range(2):
            total = total + float(weight.mean())

    @staticmethod
    def size(weight: Tensor) -> int:
        return weight.shape[0] * weight.shape[1]


def sum_of(numbers: list[float]) -> float:
    total = 0.0
    for number in numbers:
        total += number
    return total


class CallingAttention(WatchedAttention):
    def __init__(self, channels: int, callback: Callable[[Tensor], None]) -> None:
        super().__init__(channels)
        self.look = callback


class StoringProcessor(AttnProcessor2_0):
    def __call__(self, attn: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
        MAPS.append(x)
        return super().__call__(attn, x, **kwargs)


class EfficientAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Conv2d(16, 48, 1, bias=False), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(2) for t in self.to_qkv(x).chunk(3, dim=1))
        context = k.softmax(dim=-1) @ v.transpose(1, 2)
        return self.to_out((context.transpose(1, 2) @ q.softmax(dim=1)).reshape(x.shape))


class ScaledAttention(Attention):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


def hooked() -> nn.Module:
    module = make("compvis")
    module.k.register_forward_hook(lambda *args: None)
    return module


def replaced() -> nn.Module:
    module = make("compvis")
    halve(module)
    return module


def parametrized() -> nn.Module:
    module = make("compvis")
    nn.utils.parametrizations.weight_norm(module.q)
    return module


REASONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "heads": (lambda: diffusers_attention(heads=4, dim_head=16), "^4 heads"),
    "openai's heads": (lambda: o.GuidedAttentionBlock(64, num_heads=2), "^2 heads"),
    "nn.MultiheadAttention": (lambda: nn.MultiheadAttention(16, 1), "parameters or buffers of its own"),
    "cross-attention": (lambda: diffusers_attention(cross_attention_dim=32), "do not lead from the same channels"),
    "narrow": (lambda: diffusers_attention(dim_head=32), "a head of 32 for 64 channels"),
    "query norm": (lambda: diffusers_attention(qk_norm="layer_norm"), "Linear.*at most one norm"),
    "added keys": (lambda: diffusers_attention(added_kv_proj_dim=8), "it holds .* not four projections"),
    "spatial norm": (lambda: diffusers_attention(spatial_norm_dim=4), "it holds .* at most one norm"),
    "weight_norm": (parametrized, "it holds GroupNorm, ParametrizedConv2d"),
    "processor": (lambda: diffusers_attention(processor=StoringProcessor()), "processor is a StoringProcessor"),
    "subclass": (lambda: ScaledAttention(16, heads=1, dim_head=16), "processor is a AttnProcessor2_0"),
    "linear": (EfficientAttention, "does not compute self-attention"),
    "layer norm": (LayerNormAttention, "does not compute self-attention"),
    "causal": (CausalAttention, "does not compute self-attention"),
    "windows": (lambda: WindowedAttention(16), "WindowedAttention.forward has 'super"),
    "attribute": (lambda: IntoAttributeAttention(16), "look has 'self.weight'"),
    "list": (lambda: IntoListAttention(16), "look has 'MAPS"),
    "name": (lambda: BehindNameAttention(16), "look has 'MAPS"),
    "in place": (lambda: IntoItsInputAttention(16), r"look has 'weight.mul_'"),
    "element": (lambda: IntoElementAttention(16), r"look has 'self.seen\[0\]'"),
    "global": (lambda: CountingAttention(16), "look has 'global COUNT'"),
    "default": (lambda: IntoDefaultAttention(16), "look keeps a default value that can change"),
    "own list": (lambda: OwnListAttention(16), "its maps is a list"),
    "static": (lambda: StaticAttention(16), "look has 'MAPS"),
    "decorated": (lambda: DecoratedAttention(16), "look is not a plain function"),
    "__call__": (lambda: CalledAttention(16), "has a __call__ of its own"),
    "print": (lambda: PrintingAttention(16), "look has 'print'"),
    "callback": (lambda: CallingAttention(16, MAPS.append), "its look is a builtin_function_or_method"),
    "hook": (hooked, "a hook on 'k'"),
    "replaced": (replaced, "replaced on the instance"),
}


@pytest.mark.parametrize("case", REASONS)
@torch.no_grad()
def test_what_is_skipped_says_why_and_stays_what_it_is(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    made, reason = REASONS[case]
    module = made()
    kind, attributes = type(module), {name for name in vars(module) if "ddpm_fast" not in name}
    report = acceleration_report(df.accelerate(module))
    assert type(module) is kind
    assert {name for name in vars(module) if "ddpm_fast" not in name} == attributes
    assert report.attentions_fused == {}
    with pytest.raises(ValueError, match=reason):
        raise ValueError(report.attentions_skipped[""])
    # Nothing of it has been run.
    assert MAPS == []
    assert capsys.readouterr().out == ""


def test_containers_are_not_attention() -> None:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    names = {name for name, module in unet.named_modules() if isinstance(module, Attention)}
    report = acceleration_report(df.accelerate(unet))
    assert report.attentions_fused.keys() | report.attentions_skipped.keys() == names
    assert all(report.attentions_skipped.values())


def test_own_modules_are_named() -> None:
    for heads, fused in ((1, True), (2, False)):
        module = df.nn.blocks.SelfAttention(16, num_heads=heads, num_groups=4)
        report = acceleration_report(df.accelerate(module))
        assert report.attentions_fused == ({"": FOLDED} if fused else {})
        assert report.attentions_skipped == ({} if fused else {"": "2 heads"})
        module.folds = False
        assert acceleration_report(module).attentions_fused == {}


def test_attentions_have_a_table_of_their_own() -> None:
    module = df.accelerate(nn.Sequential(make("diffusers"), diffusers_attention(heads=2, dim_head=8)))
    table = str(acceleration_report(module)).split("\n\n")[-1]
    assert table.splitlines() == [
        "attention           how, or why not",
        f"0          fused    {FOLDED}",
        "1          skipped  2 heads: folded, their projections would take more work",
        "1 fused, 1 skipped",
    ]


@every_kind
@torch.no_grad()
def test_new_weights_are_seen(kind: str, folds: list[torch.Size]) -> None:
    module, other = df.accelerate(make(kind)), df.accelerate(make(kind, seed=1))
    x = image()
    module(x)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), other(x))
    before = module(x)
    for name, parameter in module.named_parameters():
        parameter.mul_(2)
        after = module(x)
        # Softmax does not see the keys' bias.
        assert torch.equal(after, before) == (name.split(".")[-2:] in (["to_k", "bias"], ["k", "bias"])), name
        before = after
    assert len(folds) == 4 + len(list(module.parameters()))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("kind", ["diffusers", "guided-block", "compvis"])
@torch.no_grad()
def test_copies_are_folded_and_have_weights_of_their_own(kind: str, how: str, folds: list[torch.Size]) -> None:
    module = df.accelerate(make(kind))
    x = image()
    want = module(x)
    if how == "deepcopy":
        twin = copy.deepcopy(module)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(x), want)
    assert len(folds) == 2
    assert acceleration_report(twin) == acceleration_report(module)
    for parameter in twin.parameters():
        parameter.zero_()
    assert not torch.equal(twin(x), want)
    assert torch.equal(module(x), want)
    assert len(folds) == 4
    assert [type(m) for m in df.restore(twin).modules()] == [type(m) for m in make(kind).modules()]


@every_kind
@torch.no_grad()
def test_replicas_run_the_original(kind: str, folds: list[torch.Size]) -> None:
    """DataParallel's: they have no parameters, whose changes could be seen."""
    module = df.accelerate(make(kind))
    x = image()
    want = module(x)
    got = _replica(module)(x)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * float(want.abs().max()))
    assert len(folds) == 1


@every_kind
def test_gradients_are_the_originals(kind: str, folds: list[torch.Size]) -> None:
    module = df.accelerate(make(kind))
    twin = copy.deepcopy(module)
    twin.__class__ = twin.original_class
    for made in (module, twin):
        made(image()).square().sum().backward()
    for (name, a), (_, b) in zip(module.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    assert folds == []


@pytest.mark.parametrize("kind", ["diffusers-bmm", "compvis"])
@torch.no_grad()
def test_compiles_as_one_graph(kind: str, folds: list[torch.Size]) -> None:
    module = make(kind)
    x = image()
    want = module(x)
    got = torch.compile(df.accelerate(module), backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * float(want.abs().max()))
    assert folds == []


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("heads", [1, 4])
def test_never_on_the_slow_path_by_accident(heads: int, channels_last: bool, grad: bool) -> None:
    module = df.accelerate(diffusers_attention(heads=heads, dim_head=64 // heads).eval())
    x = image().contiguous(memory_format=CL if channels_last else torch.contiguous_format)
    with Calls() as calls, torch.set_grad_enabled(grad):
        module(x)
    assert calls.names.count("_scaled_dot_product_flash_attention_for_cpu") == 1
    assert not {"bmm", "_softmax", "_scaled_dot_product_attention_math"} & set(calls.names)


@torch.no_grad()
def test_a_whole_network(folds: list[torch.Size]) -> None:
    unet = diffusers.UNet2DModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    x = image(3, 32)
    o.fill(unet)
    for p in unet.parameters():
        p.mul_(0.3)
    want = unet(x, 7).sample
    report = acceleration_report(df.accelerate(unet, conv="torch", channels_last=True))
    assert list(report.attentions_fused) == [name for name, m in unet.named_modules() if isinstance(m, Attention)]
    got = unet(x, 7).sample
    assert folds == [(2, 256, 32)] * 4  # the one in the middle gets the time embedding
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
