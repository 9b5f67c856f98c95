"""The linear attention of accelerated models: who gets the fused op, when it runs, and what must not change."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.accelerate import acceleration_report, linear_attention
from examples import annotated
from tests.third_party.lucidrains import import_package
from tests.third_party.stand_ins import import_alone

from . import originals as o

CL = torch.channels_last


class Article(nn.Module):
    """The annotated article's, with names of ours."""

    def __init__(self, dim: int, heads: int = 2, dim_head: int = 8) -> None:
        super().__init__()
        self.factor, self.count = dim_head**-0.5, heads
        self.first = nn.Conv2d(dim, heads * dim_head * 3, 1, bias=False)
        self.last = nn.Sequential(nn.Conv2d(heads * dim_head, dim, 1), nn.GroupNorm(1, dim))

    def forward(self, image: Tensor) -> Tensor:
        """Attends."""
        n, channels, height, width = image.shape  # noqa: RUF059 - as they write it
        parts = self.first(image).chunk(3, dim=1)
        q, k, v = map(lambda t: rearrange(t, "b (h c) x y  ->  b h c (x y)", h=self.count), parts)  # noqa: C417
        q = q.softmax(dim=-2)
        k = k.softmax(dim=-1)
        q = q * self.factor
        context = torch.einsum("b h d n, b h e n -> b h d e", k, v)
        y = torch.einsum("b h d e, b h d n -> b h e n", context, q)
        y = rearrange(y, "b h c (x y) -> b (h c) x y", h=self.count, x=height, y=width)
        return self.last(y)


def lucidrains(name: str, dim_head: int = 8) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        if name == "denoising_diffusion_pytorch":
            module = import_package().denoising_diffusion_pytorch
        else:
            unwanted = ("denoising_diffusion_pytorch.fid_evaluation",)
            others = ("torchvision", "torchvision.transforms", "accelerate")
            module = import_alone(f"denoising_diffusion_pytorch.{name}", others, unwanted)
        return module.LinearAttention(12, heads=2, dim_head=dim_head)

    return make


FORMS: dict[str, Callable[[], nn.Module]] = {
    "article": lambda: Article(12),
    "examples/annotated.py": lambda: annotated.LinearAttention(12, heads=2, dim_head=8),
    "lucidrains": lucidrains("denoising_diffusion_pytorch"),
    "lucidrains repaint": lucidrains("repaint"),
    "lucidrains guided_diffusion": lucidrains("guided_diffusion"),
    "lucidrains simple_diffusion": lucidrains("simple_diffusion"),
    "lucidrains classifier_free_guidance": lucidrains("classifier_free_guidance"),
}

# Heads of whole vectors, whose projections go into the op.
WIDE_FORMS: dict[str, Callable[[], nn.Module]] = {
    "article": lambda: Article(12, dim_head=16),
    "examples/annotated.py": lambda: annotated.LinearAttention(12, heads=2, dim_head=16),
    **{name: lucidrains(name, dim_head=16) for name in ("denoising_diffusion_pytorch", "simple_diffusion")},
}

every_form = pytest.mark.parametrize("form", FORMS)


def make(form: str) -> nn.Module:
    return o.fill(FORMS[form]())


def image(layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(2, 12, 7, 9, generator=generator).contiguous(memory_format=layout)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of heads of each call of the fused op."""
    seen: list[int] = []
    op = linear_attention.linear_attention

    def spy(qkv: Tensor, heads: int, **options: Any) -> Tensor:
        seen.append(heads)
        return op(qkv, heads, **options)

    monkeypatch.setattr(linear_attention, "linear_attention", spy)
    return seen


@pytest.fixture
def projected_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The same of the op with the projections in it."""
    seen: list[int] = []
    op = linear_attention.projected_linear_attention

    def spy(*tensors: Tensor, heads: int, **options: Any) -> Tensor:
        seen.append(heads)
        return op(*tensors, heads=heads, **options)

    monkeypatch.setattr(linear_attention, "projected_linear_attention", spy)
    return seen


# ---- Who gets it ----


@every_form
@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=["contiguous", "channels_last"])
@torch.no_grad()
def test_same_output_and_restored_bit_for_bit(form: str, layout: torch.memory_format, calls: list[int]) -> None:
    model = make(form)
    keys, attributes = list(model.state_dict()), [sorted(vars(m)) for m in model.modules()]
    x = image(layout)
    want = model(x)
    got = df.accelerate(model)(x)
    assert calls == [2]
    assert got.is_contiguous(memory_format=layout)
    # Rounding of values around 1, normalised at the end.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    assert list(model.state_dict()) == keys
    calls.clear()
    assert torch.equal(df.restore(model)(x), want)
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert calls == []


@pytest.mark.parametrize("form", WIDE_FORMS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=["contiguous", "channels_last"])
@torch.no_grad()
def test_plain_projections_go_into_the_op(
    form: str, layout: torch.memory_format, calls: list[int], projected_calls: list[int]
) -> None:
    model = o.fill(WIDE_FORMS[form]())
    x = image(layout)
    want = model(x)
    got = df.accelerate(model)(x)
    assert (projected_calls, calls) == ([2], [])
    assert got.is_contiguous(memory_format=layout)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    small = x[..., :2, :2].contiguous(memory_format=layout)  # more channels than pay for so few pixels
    torch.testing.assert_close(model(small), df.restore(model)(small), rtol=1e-4, atol=2e-5)
    assert (projected_calls, calls) == ([2], [2])


@pytest.mark.parametrize("what", ["bias", "forward", "class", "kernel", "hook", "sequential hook", "global hook"])
@torch.no_grad()
def test_projections_that_are_not_plain_are_called(what: str, calls: list[int], projected_calls: list[int]) -> None:
    module = o.fill(annotated.LinearAttention(12, heads=2, dim_head=16))
    seen: list[str] = []
    handle = None
    if what == "bias":
        module.to_qkv.bias = nn.Parameter(torch.ones(96))
    elif what == "forward":
        module.to_out[0].forward = lambda x: nn.Conv2d.forward(module.to_out[0], x) * 2  # type: ignore[method-assign]
    elif what == "class":
        module.to_qkv = o.fill(type("Conv", (nn.Conv2d,), {})(12, 96, 1, bias=False))
    elif what == "kernel":
        module.to_qkv = o.fill(nn.Conv2d(12, 96, 3, padding=1, bias=False))
    elif what == "hook":
        module.to_qkv.register_forward_pre_hook(lambda m, args: seen.append(what))
    elif what == "sequential hook":
        module.to_out.register_forward_hook(lambda m, args, output: seen.append(what))
    x = image()
    want = module(x)
    df.accelerate(module)
    seen.clear()
    if what == "global hook":
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, args, output: seen.append(what) if m is module.to_qkv else None
        )
    got = module(x)
    if handle is not None:
        handle.remove()
    assert (calls, projected_calls) == ([2], [])
    assert seen == ([what] if "hook" in what else [])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@every_form
def test_the_report_names_it(form: str) -> None:
    model = nn.ModuleDict({"attention": make(form)})
    untouched = acceleration_report(model)
    assert not untouched.attentions_fused
    report = acceleration_report(df.accelerate(model))
    memory = ", with a memory" if hasattr(model["attention"], "mem_kv") else ""
    assert report.attentions_fused == {"attention": f"linear attention, 2 heads{memory}"}
    assert report.attentions_skipped == {}
    assert f"attention  fused    linear attention, 2 heads{memory}" in str(report)
    assert acceleration_report(df.accelerate(model)) == report
    assert acceleration_report(df.restore(model)) == untouched


@pytest.mark.parametrize("name", ["lucidrains", "examples/annotated.py"])
@torch.no_grad()
def test_whole_networks_compute_the_same(name: str, calls: list[int], projected_calls: list[int]) -> None:
    if name == "lucidrains":
        model: nn.Module = import_package().Unet(dim=8, dim_mults=(1, 2, 4), channels=1, flash_attn=False)
    else:
        model = annotated.Unet(16, 1)
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([3, 700])
    o.fill(model)
    want = model(x, t)
    got = df.accelerate(model, channels_last=True)(x, t)
    in_all = len(acceleration_report(model).attentions_fused)
    assert (len(projected_calls), len(calls)) == ((4, 0) if name == "lucidrains" else (5, 1))
    assert in_all == len(projected_calls) + len(calls)
    # Some forty layers, each rounding to a few 1e-7 of its output.
    assert (got - want).square().mean().sqrt() <= 1e-5 * want.square().mean().sqrt()


class LinearAttention(nn.Module):
    """Called so, and computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Conv2d(12, 48, 1), nn.Conv2d(16, 12, 1)
        self.heads, self.scale = 2, 8**-0.5

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        q, k, v = self.to_qkv(x).reshape(n, 3, self.heads, -1, height * width).unbind(1)
        q = q.softmax(dim=-2) * self.scale
        context = k.softmax(dim=-1) @ v.transpose(-2, -1)
        return self.to_out((context.transpose(-2, -1) @ q).reshape(n, -1, height, width))


class SoftmaxLinearAttention(LinearAttention):
    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        q, k, v = self.to_qkv(x).reshape(n, 3, self.heads, -1, height * width).unbind(1)
        q = q.softmax(dim=-1) * self.scale
        context = k.softmax(dim=-1) @ v.transpose(-2, -1)
        return self.to_out((context.transpose(-2, -1) @ q).reshape(n, -1, height, width))


class OrderLinearAttention(LinearAttention):
    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        k, q, v = self.to_qkv(x).reshape(n, 3, self.heads, -1, height * width).unbind(1)
        q = q.softmax(dim=-2) * self.scale
        context = k.softmax(dim=-1) @ v.transpose(-2, -1)
        return self.to_out((context.transpose(-2, -1) @ k).reshape(n, -1, height, width))


class ModuleLinearAttention(LinearAttention):
    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        q, k, v = self.to_qkv(x).reshape(n, 3, self.heads, -1, height * width).unbind(1)
        q = q.softmax(dim=-2) * self.scale
        context = k.softmax(dim=-1) @ v.transpose(-2, -1)
        return self.to_qkv((context.transpose(-2, -1) @ q).reshape(n, -1, height, width))


class MoreLinearAttention(LinearAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class ComputedLinearAttention(annotated.LinearAttention):
    """Its scale is computed: nobody knows whether it is a number the next time."""

    scale = property(lambda self: 0.5, lambda self, value: None)


def replaced() -> nn.Module:
    module = LinearAttention()
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def other_rearrange() -> nn.Module:
    """The article's text, where `rearrange` is another function."""

    def rearrange(t: Tensor, pattern: str, **sizes: int) -> Tensor:
        return t

    forward = Article.forward
    namespace = {**forward.__globals__, "rearrange": rearrange}
    changed = type(forward)(forward.__code__, namespace, forward.__name__)
    return type("LinearAttention", (Article,), {"forward": changed})(12)


UNKNOWN = "none of those that are known"
OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "softmax": (SoftmaxLinearAttention, UNKNOWN),
    "order": (OrderLinearAttention, UNKNOWN),
    "module": (ModuleLinearAttention, UNKNOWN),
    "more": (MoreLinearAttention, UNKNOWN),
    "replaced": (replaced, "forward was replaced"),
    "rearrange": (other_rearrange, UNKNOWN),
    "integer scale": (lambda: _with(scale=1), "scale no float"),
    "tensor scale": (lambda: _with(scale=torch.tensor(0.5)), "scale no float"),
    "float heads": (lambda: _with(heads=2.0), "heads is no int"),
    "computed scale": (lambda: ComputedLinearAttention(12), "scale no float"),
    "function": (lambda: _with(to_out=torch.neg), "to_out is no module"),
}


def _with(**attributes: Any) -> nn.Module:
    module = LinearAttention()
    for name, value in attributes.items():
        if name in module._modules:
            del module._modules[name]
        module.__dict__[name] = value
    return module


@pytest.mark.parametrize("case", OTHERS)
def test_what_only_looks_like_it_says_why_and_stays_what_it_is(case: str) -> None:
    make_module, reason = OTHERS[case]
    module = make_module()
    kind = type(module)
    report = acceleration_report(df.accelerate(nn.ModuleList([module])))
    assert type(module) is kind
    assert report.attentions_fused == {}
    assert reason in report.attentions_skipped["0"]


# ---- When it runs ----


@pytest.mark.parametrize(
    ("what", "run"),
    [
        ("gradient", lambda m, x: m(x)),
        ("float64", lambda m, x: copy.deepcopy(m).double()(x.double())),
        ("bfloat16", lambda m, x: copy.deepcopy(m).bfloat16()(x.bfloat16())),
        ("keyword", lambda m, x: m(x=x)),
        ("vmap", lambda m, x: torch.func.vmap(m)(x[:, None])),
        ("jvp", lambda m, x: torch.func.jvp(m, (x,), (x,))[1]),
        ("subclass", lambda m, x: m(nn.Parameter(x))),
    ],
)
def test_what_the_op_does_not_take_is_the_original(what: str, run: Any, calls: list[int]) -> None:
    module = make("examples/annotated.py")
    module.to_out[1] = nn.Identity()  # the norm is accelerated for itself
    x = image()
    with torch.set_grad_enabled(what == "gradient"):
        want = run(module, x)
        assert torch.equal(run(df.accelerate(module), x), want)
    assert calls == []


@torch.no_grad()
def test_autocast_is_the_original(calls: list[int]) -> None:
    module = make("lucidrains guided_diffusion")
    x = image()
    with torch.autocast("cpu", torch.bfloat16):
        want = module(x)
        assert torch.equal(df.accelerate(module)(x), want)
    assert calls == []


def test_gradients_are_those_of_the_original() -> None:
    module = make("lucidrains")
    twin = df.accelerate(copy.deepcopy(module))
    for m in (module, twin):
        m(image()).square().sum().backward()
    for (name, a), (_, b) in zip(module.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4 * float(a.grad.abs().max()), msg=name)


@torch.no_grad()
def test_hooks_see_what_they_saw(calls: list[int]) -> None:
    module = df.accelerate(make("lucidrains"))
    seen: list[str] = []
    for name in ("norm", "to_qkv", "to_out"):
        module.get_submodule(name).register_forward_hook(lambda m, args, output, name=name: seen.append(name))
    module.to_qkv.register_forward_hook(lambda m, args, output: output * 0)
    module.register_forward_hook(lambda m, args, output: seen.append("module"))
    flat = module(image())
    assert seen == ["norm", "to_qkv", "to_out", "module"]
    assert calls == [2]
    # Equal queries and keys: every pixel gets the same.
    torch.testing.assert_close(flat, flat[:1, :, :1, :1].expand_as(flat), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_new_heads_and_weights_are_seen(calls: list[int]) -> None:
    module = make("examples/annotated.py")
    x = image()
    df.accelerate(module)(x)
    module.heads, module.scale = 4, 0.5
    module.to_qkv.weight.mul_(0.3)
    got = module(x)
    assert calls == [2, 4]
    torch.testing.assert_close(got, df.restore(module)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@torch.no_grad()
def test_copies_are_accelerated(how: str, calls: list[int]) -> None:
    model = df.accelerate(nn.Sequential(make("examples/annotated.py")))
    x = image()
    want = model(x)
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
    assert torch.equal(twin(x), want)
    assert calls == [2]
    assert acceleration_report(twin) == acceleration_report(model)
    assert type(df.restore(twin)[0]) is annotated.LinearAttention


@torch.no_grad()
def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    module = df.accelerate(make("lucidrains"))
    x = image(CL)
    want = module(x)
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), want)
