"""Accelerated models under what people put around models."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import ddpm_fast as df
from ddpm_fast.accelerate import acceleration_report

from . import originals as o
from .test_originals import MODELS, assert_close, every_model, inputs, make
from .test_rewrite import Functional


def _compiled_blocks() -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    """Tracing takes seconds: a block of each kind of patch."""
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, o.EMBEDDING)
    resnet = ResnetBlock2D(in_channels=8, temb_channels=o.EMBEDDING, groups=4, time_embedding_norm="scale_shift")
    return {
        "checkpoint": (o.GuidedResBlock(8, 8, scale_shift=True, checkpointed=True), (x, emb)),
        "function": (o.CompVisResnetBlock(8, 8), (x, emb)),
        "diffusers": (resnet, (x, emb)),
        "functional": (Functional(), (torch.randn(2, 4, 3, 3), torch.randn(2, 3))),
    }


@pytest.mark.parametrize(
    ("name", "grad"), [("checkpoint", True), ("function", True), ("diffusers", False), ("functional", True)], ids=str
)
def test_compiles_as_one_graph_like_the_original(name: str, grad: bool) -> None:
    model, arguments = _compiled_blocks()[name]
    o.fill(model)
    code: list[str] = []

    def compiler(graph: torch.fx.GraphModule, example: list[object]) -> object:
        code.append(graph.code)
        return graph.forward

    results = []
    for accelerated in (False, True):
        if accelerated:
            df.accelerate(model)
        torch._dynamo.reset()
        code.clear()
        compiled = torch.compile(model, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
        with torch.set_grad_enabled(grad):
            out = compiled(*arguments)
            parameters = list(model.parameters())
            gradients = torch.autograd.grad(out.sum(), parameters, allow_unused=True) if grad else ()
        results.append([out, *gradients])
        assert any("norm_act" in text for text in code) == accelerated
        assert any("group_norm" in text for text in code) != accelerated
    floor = 1e-3 * max(g.abs().max().item() for g in results[0] if g is not None)
    for want, got in zip(*results, strict=True):
        if want is not None:
            assert_close(got, want, 5e-5, floor)


@every_model
def test_autocast(name: str) -> None:
    model = make(name)
    x, emb = inputs()
    with torch.no_grad():
        exact = model(x, emb)
        with torch.autocast("cpu", torch.bfloat16):
            want = model(x, emb)
            got = df.accelerate(model)(x, emb)
    assert got.dtype == want.dtype
    scale = exact.abs().max()
    assert (got - exact).abs().max() / scale <= 1.5 * (want - exact).abs().max() / scale + 2**-8


@pytest.mark.parametrize(
    ("device", "dtype", "autocast", "expected"),
    [
        ("cuda", torch.float16, True, torch.float32),
        ("cuda", torch.bfloat16, True, torch.float32),
        ("cuda", torch.float16, False, torch.float16),
        ("cuda", torch.float64, True, torch.float64),
        ("cpu", torch.bfloat16, True, torch.bfloat16),
    ],
)
def test_autocast_dtype_is_pytorchs(device: str, dtype: torch.dtype, autocast: bool, expected: torch.dtype) -> None:
    from ddpm_fast.accelerate.norms import autocast_dtype

    assert autocast_dtype(device, dtype, autocast) is expected
    if device == "cpu":
        with torch.autocast("cpu", dtype, enabled=autocast):
            assert nn.GroupNorm(2, 4)(torch.ones(1, 4, 2, 2, dtype=dtype)).dtype == expected


# diffusers' UNet2DModel asks for its dtype in forward, and fails to find it on a replica, accelerated or not.
@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("diffusers", "diffusers-scale_shift")])
def test_data_parallel(name: str, passes: list[str]) -> None:
    """What DataParallel does with a module, as far as a CPU can: replicas that share nothing with the original."""
    model = make(name)
    x, emb = inputs()
    with torch.no_grad():
        want = model(x, emb)
    wrapped = df.accelerate(nn.DataParallel(model))
    with torch.no_grad():
        assert_close(wrapped(x, emb), want)
    report = acceleration_report(wrapped)
    assert report.fused
    assert all(n.startswith("module.") for n in report.fused)
    passes.clear()
    replica = _replica(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        assert_close(replica(x, emb), want)
    assert passes


def _replica(model: nn.Module) -> nn.Module:
    """torch.nn.parallel.replicate, for one device."""
    twins = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for module, twin in twins.items():
        for key, child in module._modules.items():
            if child is not None:
                twin._modules[key] = twins[child]
        for key, parameter in module._parameters.items():
            if parameter is None:
                twin._parameters[key] = None
            else:
                setattr(twin, key, parameter.detach().clone())
    return twins[model]


def test_fully_shard(tmp_path: object, passes: list[str]) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make("guided-scale_shift")
        x, emb = inputs()
        want = model(x, emb)
        df.accelerate(model)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for block in model.modules():
            if isinstance(block, o.GuidedResBlock):
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        got = model(x, emb)
        got.sum().backward()
        assert passes
        assert_close(got, want)
        assert all(p.grad is not None for p in model.parameters())
        with pytest.raises(RuntimeError, match=r"class FSDP\w+ after accelerate"):
            df.restore(model)
        # The other way round: what is wrapped already can be accelerated, and restored.
        model = make("guided-scale_shift")
        for block in model.modules():
            if isinstance(block, o.GuidedResBlock):
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        classes = [type(m) for m in model.modules()]
        passes.clear()
        assert_close(df.accelerate(model)(x, emb), want)
        assert passes
        assert [type(m) for m in df.restore(model).modules()] == classes
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["accelerated-first", "sharded-first"])
@pytest.mark.parametrize("name", ["article", "imagen"])
def test_fully_sharded_data_parallel(name: str, order: str, tmp_path: object, passes: list[str]) -> None:
    """The class of that name, with a unit of its own for each convolution."""
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make(name)
        x, emb = inputs()
        want = model(x, emb)
        gradients = torch.autograd.grad(want.square().sum(), list(model.parameters()))
        wrapped = df.accelerate(model) if order == "accelerated-first" else model
        wrapped = FullyShardedDataParallel(
            wrapped,
            auto_wrap_policy=ModuleWrapPolicy({nn.Conv2d}),
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )
        if order == "sharded-first":
            df.accelerate(wrapped)
        got = wrapped(x, emb)
        assert passes
        assert_close(got, want)
        got.square().sum().backward()
        for parameter, gradient in zip(wrapped.parameters(), gradients, strict=True):
            assert parameter.grad is not None
            assert_close(parameter.grad, gradient.reshape(parameter.grad.shape), 5e-5)
        assert acceleration_report(wrapped).fused
        assert torch.equal(df.restore(wrapped)(x, emb), want)
    finally:
        torch.distributed.destroy_process_group()


def _share_the_weights(rank: int, kind: str, store: str) -> None:
    """One of two processes, each with half of the weights: outputs and gradients of the whole model."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        model = make("article")
        x, emb = inputs()
        want = model(x, emb)
        exact = torch.cat([g.flatten() for g in torch.autograd.grad(want.square().sum(), list(model.parameters()))])
        df.accelerate(model)
        if kind == "fully_shard":
            wrapped: nn.Module = fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
        else:
            wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
        got = wrapped(x, emb)
        assert_close(got, want)
        got.square().sum().backward()
        parts = [p.grad for p in wrapped.parameters() if p.grad is not None]
        square = sum((part.to_local() if kind == "fully_shard" else part).square().sum() for part in parts)
        assert isinstance(square, torch.Tensor)
        torch.distributed.all_reduce(square)
        torch.testing.assert_close(square, exact.square().sum(), rtol=1e-5, atol=0)
        assert acceleration_report(wrapped).fused
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fully_shard", "FullyShardedDataParallel"])
def test_two_processes_share_the_weights(kind: str, tmp_path: object) -> None:
    torch.multiprocessing.spawn(_share_the_weights, args=(kind, f"{tmp_path}/store"), nprocs=2)


def test_function_transforms() -> None:
    """vmap, functorch's gradients and forward-mode differentiation take the original path."""
    norm = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    x, tangent = torch.randn(3, 2, 4, 5, 5), torch.randn(3, 2, 4, 5, 5)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return norm(x).square().sum()

    def results() -> list[torch.Tensor]:
        with torch.no_grad():
            dual = torch.func.jvp(norm, (x[0],), (tangent[0],))
            with forward_ad.dual_level():
                old_dual = forward_ad.unpack_dual(norm(forward_ad.make_dual(x[0], tangent[0]))).tangent
        return [torch.func.vmap(norm)(x), torch.func.vmap(torch.func.grad(loss))(x), *dual, old_dual]

    want = results()
    df.accelerate(norm)
    for a, b in zip(results(), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = make("article").train()
    x, emb = inputs()
    x.requires_grad_()
    want = torch.autograd.grad(model(x, emb).square().sum(), x)[0]
    df.accelerate(model)
    got = torch.autograd.grad(checkpoint(model, x, emb, use_reentrant=False).square().sum(), x)[0]
    assert_close(got, want, 5e-5)
    if reentrant:
        checkpoint(model, x, emb, use_reentrant=True).square().sum().backward()
        assert_close(x.grad, want, 5e-5)


def test_moves_and_loads() -> None:
    model = make("guided-scale_shift")
    other = o.GuidedUNet(scale_shift=True).eval()
    df.accelerate(other)
    other.load_state_dict(model.state_dict())
    x, emb = inputs()
    with torch.no_grad():
        want = model(x, emb)
        assert_close(other(x, emb), want)
        other.double().float()
        assert_close(other(x, emb), want)
        meta = copy.deepcopy(other).to("meta")
        assert meta(x.to("meta"), emb.to("meta")).shape == want.shape
        # float64 has no kernel, and no backend was asked for that has: the model runs as it was.
        with df.use_backend("reference"):
            assert_close(other.double()(x.double(), emb.double()).float(), want)


def test_on_no_better_backend_the_original_runs(monkeypatch: pytest.MonkeyPatch, passes: list[str]) -> None:
    from ddpm_fast import backends

    model = df.accelerate(make("guided-scale_shift"))
    want_passes = model(*inputs()) is not None and list(passes)
    assert want_passes
    passes.clear()
    monkeypatch.setattr(backends, "_forced", None)
    monkeypatch.setattr(backends, "choose", lambda *args: "reference")
    x, emb = inputs()
    got = model(x, emb)
    assert passes == []
    assert torch.equal(got, df.restore(model)(x, emb))


def test_torch_save(tmp_path: object) -> None:
    model = df.accelerate(make("diffusers"))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    x, emb = inputs()
    with torch.no_grad():
        assert torch.equal(twin(x, emb), model(x, emb))
    # Nothing of ours is in the weights alone.
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert b"ddpm_fast" not in file.getvalue()


@every_model
def test_channels_last(name: str) -> None:
    model = make(name)
    strides = [p.stride() for p in model.parameters()]
    pointers = [id(p) for p in model.parameters()]
    x, emb = inputs()
    with torch.no_grad():
        want = model(x, emb)
        df.accelerate(model, channels_last=True)
        converted = [p for p in model.parameters() if p.dim() == 4]
        assert converted
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in converted)
        assert [id(p) for p in model.parameters()] == pointers
        assert_close(model(x, emb), want)
        df.accelerate(model)  # leaves the layout alone
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in converted)
        df.restore(model)
        assert [p.stride() for p in model.parameters()] == strides
        assert torch.equal(model(x, emb), want)


def test_channels_last_of_the_users_own_stays() -> None:
    model = make("article").to(memory_format=torch.channels_last)
    strides = [p.stride() for p in model.parameters()]
    df.restore(df.accelerate(model, channels_last=True))
    assert [p.stride() for p in model.parameters()] == strides
