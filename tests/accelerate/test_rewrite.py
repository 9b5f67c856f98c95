"""Forwards that are and that are not to be fused: each gives the original's output, and fuses what is stated."""

# ruff: noqa: RET504, SIM108 - written as people write them

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpm_fast as df
from ddpm_fast.accelerate import fused

from . import originals as o


class Block(nn.Module):
    """What the forwards below call."""

    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = nn.GroupNorm(2, 4), nn.GroupNorm(4, 4, eps=1e-3)
        self.act, self.relu = nn.SiLU(), nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(4, 4, 1)
        self.emb = nn.Linear(3, 8)
        self.norms = nn.ModuleList([nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)])
        self.flag = True

    differentiable = True  # what autograd refuses in the original too is compared without it

    def modulation(self, e):
        return self.emb(e)[:, :, None, None].chunk(2, dim=1)


CASES: dict[str, tuple[type[Block], list[str]]] = {}


def fuses(*expected):
    def register(cls):
        CASES[cls.__name__] = cls, list(expected)
        return cls

    return register


# What is fused


@fuses("norm+silu")
class Nested(Block):
    def forward(self, x, e):
        return self.conv(self.act(self.norm(x)))


@fuses("norm+silu")
class Functional(Block):
    def forward(self, x, e):
        return self.conv(F.silu(self.norm(x), inplace=True))


@fuses("norm+silu")
class FunctionAttribute(Block):
    def __init__(self):
        super().__init__()
        self.nonlinearity = o.nonlinearity

    def forward(self, x, e):
        return self.nonlinearity(self.norm(x))


@fuses("norm+silu")
class Sigmoid(Block):
    def forward(self, x, e):
        h = self.norm(x)
        return h * torch.sigmoid(h)


@fuses("norm+silu")
class SigmoidMethod(Block):
    def forward(self, x, e):
        h = self.norm(x)
        h = h.sigmoid() * h
        return self.conv(h)


@fuses("norm+modulation+silu")
class ModulatedInOneLine(Block):
    def forward(self, x, e):
        scale, shift = self.modulation(e)
        return self.act(shift + (1.0 + scale) * self.norm(x))


@fuses("norm+modulation+silu")
class ModulatedInTwoSteps(Block):
    def forward(self, x, e):
        scale, shift = self.modulation(e)
        x = self.norm(x)
        x = x * (scale + 1)
        x = x + shift
        return self.act(x)


@fuses("norm+modulation")
class ModulatedWithoutActivation(Block):
    def forward(self, x, e):
        scale, shift = self.modulation(e)
        h = self.norm(x) * (1 + scale) + shift
        return self.conv(h) + h


@fuses("norm+modulation+silu")
class ShiftOnly(Block):
    def forward(self, x, e):
        _, shift = self.modulation(e)
        x = self.norm(x)
        x = x + shift
        return self.act(x)


@fuses("norm+silu", "norm+silu")
class AliasesAndIndices(Block):
    def forward(self, x, e):
        norm, act = self.norms[-1], self.act
        x = act(norm(x))
        return self.act(self.norms[0](x))


@fuses("norm+silu", "norm+modulation+silu")
class BothBranches(Block):
    def forward(self, x, e):
        h = self.act(self.norm(x))
        if not self.flag:
            h = self.norm2(h)
        elif e is not None:
            scale, shift = self.modulation(e)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            raise ValueError("no embedding")
        h = self.act(h)
        return h


@fuses("embedding+norm+silu")
class Embedded(Block):
    def forward(self, x, e):
        h = self.conv(x)
        if e is not None:
            h = h + self.emb(e)[:, :4, None, None]
        h = self.norm(h)
        h = self.act(h)
        return h


@fuses("embedding+norm")
class EmbeddedAlone(Block):
    def forward(self, x, e):
        h = self.conv(x)
        h = self.emb(e)[:, :4, None, None] + h
        h = self.norm(h)
        return self.conv(h)


@fuses("norm+silu", "norm+silu")
class InALoop(Block):
    def forward(self, x, e):
        for _ in range(2):
            h = self.norm(x)
            h = self.act(h)
            x = x + self.conv(h)
        return x


@fuses("norm", "norm+silu")
class WithSuper(Nested):
    """The base's forward stays as it is: only methods that are called by name are seen."""

    def forward(self, x, e):
        return super().forward(x, e) + self.act(self.norm2(x))


@fuses("norm+silu", "norm+silu")
class ClosureAndDefaults(Block):
    def forward(self, x, e, *, twice=F.silu):
        add = [lambda y: y + self.norm.eps]
        y = self.act(self.norm(x))
        return add[0](twice(self.norm2(y)) if twice is not F.silu else self.act(self.norm2(y)))


def doubled(forward):
    @functools.wraps(forward)
    def wrapper(self, x, e):
        return forward(self, x, e) * 2

    return wrapper


@fuses("norm+silu")
class Decorated(Block):
    @doubled
    def forward(self, x, e):
        h = self.norm(x)
        h = self.act(h)
        return h


@fuses("norm+silu")
class OtherMethods(Block):
    def head(self, x):
        return self.act(self.norm(x))

    def forward(self, x, e):
        return self.head(x)


# What is not


@fuses("norm")
class IntermediateIsUsed(Block):
    def forward(self, x, e):
        h = self.norm(x)
        return self.act(h) + h


@fuses("norm")
class IntermediateIsUsedLater(Block):
    def forward(self, x, e):
        h = self.norm(x)
        y = self.act(h)
        return y + h


@fuses("norm")
class IntermediateIsCaptured(Block):
    def forward(self, x, e):
        h = self.norm(x)

        def later():
            return h

        y = self.act(h)
        return y + later()


@fuses("norm")
class InputIsChangedInPlace(Block):
    differentiable = False

    def forward(self, x, e):
        x = x.clone()
        h = self.norm(x)
        x = self.relu(x)
        h = self.act(h)
        return h + x


@fuses("norm")
class InputIsChangedByAugmentedAssignment(Block):
    differentiable = False

    def forward(self, x, e):
        x = x.clone()
        h = self.norm(x)
        x += 1
        h = self.act(h)
        return h + x


@fuses("norm")
class InputIsChangedByItem(Block):
    differentiable = False

    def forward(self, x, e):
        x = x.clone()
        h = self.norm(x)
        x[:, 0] = 7
        h = self.act(h)
        return h + x


@fuses("norm")
class InputIsChangedInTheSameStatement(Block):
    differentiable = False

    def forward(self, x, e):
        x = x.clone()
        h = self.norm(x)
        h = x.add_(1) + self.act(h)
        return h


@fuses("norm")
class OneBranchOnly(Block):
    def forward(self, x, e):
        h = x
        if e is not None:
            h = self.norm(h)
        h = self.act(h)
        return h


@fuses("norm", "norm")
class OtherNormInTheOtherBranch(Block):
    def forward(self, x, e):
        y = 0
        for flag in (True, False):
            if flag:
                h = self.norm(x)
            else:
                h = self.norm2(x)
            y = y + self.act(h)
        return y


@fuses("norm", "norm")
class AcrossALoop(Block):
    def forward(self, x, e):
        h = self.norm(x)
        for _ in range(2):
            h = self.act(h)
        h2 = self.norm2(h)
        while h2.shape[0] > 5:
            h2 = h2[1:]
        return self.act(h2)


@fuses("norm")
class AcrossAContext(Block):
    def forward(self, x, e):
        h = self.norm(x)
        with torch.no_grad():
            h = self.act(h)
        return h + x


@fuses("norm")
class InsideTry(Block):
    def forward(self, x, e):
        h = x
        try:
            h = self.norm(h)
            raise KeyError("h is used below")
            h = self.act(h)
        except KeyError:
            return h
        return h


@fuses("norm+silu")
class NestedInsideTry(Block):
    def forward(self, x, e):
        try:
            h = self.act(self.norm(x))
        except KeyError:
            h = x
        return h


@fuses("norm")
class ExceptionsAreSwallowed(Block):
    def forward(self, x, e):
        h = x
        with contextlib.suppress(KeyError):
            h = self.norm(h)
            h = {}[h]
        return self.conv(h)


@fuses("norm+silu")
class InsideTorchsContexts(Block):
    def forward(self, x, e):
        with torch.autocast("cpu", enabled=False), torch.enable_grad():
            h = self.norm(x)
            h = self.act(h)
        return h


@fuses("norm")
class Walrus(Block):
    def forward(self, x, e):
        h = self.norm(x)
        if (h := x) is not None:
            h = self.act(h)
        return h


@fuses("norm")
class Locals(Block):
    def forward(self, x, e):
        h = self.norm(x)
        y = locals()["h"]
        h = self.act(h)
        return h + y


@fuses("norm")
class OtherActivations(Block):
    def forward(self, x, e):
        return self.relu(self.norm(x)) + F.gelu(x)


@fuses("norm")
class ModulatedByPixels(Block):
    def forward(self, x, e):
        h = self.norm(x) * (1 + x) + x
        return self.act(h)


@fuses("norm")
class ScaleWithoutOne(Block):
    def forward(self, x, e):
        scale, shift = self.modulation(e)
        h = self.norm(x) * scale + shift
        return self.act(h)


@fuses("norm")
class ShiftBeforeScale(Block):
    def forward(self, x, e):
        scale, shift = self.modulation(e)
        h = self.norm(x) + shift
        h = h * (1 + scale)
        return self.act(h)


@fuses("norm+modulation")
class ModulatedTwice(Block):
    def forward(self, x, e):
        scale, shift = self.modulation(e)
        h = self.norm(x)
        h = h * (1 + scale) + shift
        h = h * (1 + scale) + shift
        return self.act(h)


@fuses("norm")
class PrivateNames(Block):
    def forward(self, x, e):
        self.__kept = x
        return self.act(self.norm(self.__kept))


@fuses("norm")
class Generator(Block):
    def parts(self, x):
        yield self.act(self.norm(x))

    def forward(self, x, e):
        return next(self.parts(x))


@pytest.mark.parametrize("name", CASES)
def test_same_output_and_gradients(name, passes):
    cls, expected = CASES[name]
    model = o.fill(cls())
    x, e = torch.randn(2, 4, 5, 3), torch.randn(2, 3)
    kept = x.clone()
    results = []
    for accelerated in (False, True):
        if accelerated:
            df.accelerate(model)
        inputs = [x.detach().requires_grad_(), e.detach().requires_grad_()]
        with torch.set_grad_enabled(cls.differentiable):
            out = model(*inputs)
        leaves = [*inputs, *model.parameters()] if cls.differentiable else []
        results.append([out, *(torch.autograd.grad(out.square().sum(), leaves, allow_unused=True) if leaves else ())])
    assert torch.equal(x, kept)
    assert passes == expected
    for want, got in zip(*results, strict=True):
        assert (want is None) == (got is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_modules_replaced_later(passes):
    """A rewritten forward looks at the modules that are there."""
    model = df.accelerate(o.fill(Nested()))
    x, e = torch.randn(2, 4, 5, 3), torch.randn(2, 3)
    model.act = nn.Tanh()
    torch.testing.assert_close(model(x, e), model.conv(torch.tanh(model.norm(x))))
    model.norm = nn.InstanceNorm2d(4)
    passes.clear()
    torch.testing.assert_close(model(x, e), model.conv(torch.tanh(model.norm(x))))
    assert passes == []


def test_function_replaced_later(passes):
    model = o.fill(FunctionAttribute())
    df.accelerate(model)
    x = torch.randn(2, 4, 5, 3)
    model.nonlinearity = torch.tanh
    torch.testing.assert_close(model(x, None), torch.tanh(model.norm(x)))
    assert passes == ["norm", "norm"]


def test_instances_of_one_class_differ(passes):
    """What is fused is decided for each object, not for its class."""
    silu, relu = o.fill(Nested()), o.fill(Nested())
    relu.act = nn.ReLU()
    model = nn.ModuleList([silu, relu, o.fill(Nested())])
    df.accelerate(model)
    x, e = torch.randn(2, 4, 5, 3), torch.randn(2, 3)
    for block in model:
        block(x, e)
    assert passes == ["norm+silu", "norm", "norm+silu"]
    assert type(model[0]) is type(model[2])
    assert type(model[1]) is Nested


def test_source_that_is_not_there(passes):
    namespace = {"Block": Block}
    exec("class Unseen(Block):\n    def forward(self, x, e):\n        return self.act(self.norm(x))\n", namespace)
    model = df.accelerate(namespace["Unseen"]())
    report = df.acceleration_report(model)
    assert "norm" in report.fused
    assert report.patterns["norm"] == "GroupNorm; Unseen.forward not looked at: there is no source for it"
    model(torch.randn(2, 4, 5, 3), torch.randn(2, 3))
    assert passes == ["norm"]


def test_source_that_has_changed(tmp_path, passes):
    file = tmp_path / "edited.py"
    text = "def forward(self, x, e):\n    return self.act(self.norm(x))\n"
    file.write_text(text)
    namespace = {}
    exec(compile(text, str(file), "exec"), namespace)
    cls = type("Edited", (Block,), {"forward": namespace["forward"]})
    file.write_text(text.replace("self.norm(x)", "self.norm2(x)"))
    model = df.accelerate(cls())
    model(torch.randn(2, 4, 5, 3), torch.randn(2, 3))
    assert passes == ["norm"]
    assert df.acceleration_report(model).patterns["norm"].endswith("its source is not what runs")


def test_tracebacks_keep_their_lines():
    model = df.accelerate(o.fill(BothBranches()))
    with pytest.raises(ValueError, match="no embedding") as error:
        model(torch.randn(2, 4, 5, 3), None)
    assert error.traceback[-1].path.name == "test_rewrite.py"
    assert 'raise ValueError("no embedding")' in str(error.traceback[-1].statement)


def test_probing_has_no_side_effects(capsys):
    """An activation is tried out; whatever else is called on a norm's result is not."""

    class Chatty(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x * torch.sigmoid(x)

    class Talks(Block):
        def forward(self, x, e):
            h = self.act(self.norm(x))
            h = report_on(self.norm2(h))
            return h

    def report_on(h):
        print("called")
        return h

    model = Talks()
    model.act = Chatty()
    state = torch.get_rng_state()
    df.accelerate(model)
    assert capsys.readouterr().out == ""
    assert torch.equal(torch.get_rng_state(), state)
    assert model.act.calls == 0
    with contextlib.suppress(KeyError):
        model(torch.randn(2, 4, 5, 3), None)
    assert "called" in capsys.readouterr().out


class Scaled(Block):
    """Ends as diffusers' blocks do."""

    factor: object = 1.0

    def forward(self, x):
        h = self.act(self.norm(x))
        return (x + h) / self.factor


@pytest.mark.parametrize("factor", [1.0, 1, 2.0, True, torch.tensor(1.0)], ids=repr)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_sum_is_divided_by_any_factor_but_one(factor, grad):
    block, x = Scaled(), torch.randn(2, 4, 3, 3, requires_grad=grad)
    block.factor = factor
    want = block(x)
    df.accelerate(block)
    with torch.profiler.profile() as profile:
        got = block(x)
    torch.testing.assert_close(got, want)
    divisions = sum(event.count for event in profile.key_averages() if event.key == "aten::div")
    assert divisions == (0 if type(factor) in (float, int) and factor == 1 else 1)
    block.factor = 4.0  # looked at in every call
    torch.testing.assert_close(block(x), df.restore(block)(x))
    if grad:
        (expected,) = torch.autograd.grad(want.sum(), x)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), x)[0], expected)


def test_a_sum_of_whole_numbers_divided_by_one_is_not_whole():
    total = torch.ones(2, dtype=torch.int64)
    assert fused.divided(total, 1).dtype == torch.float32
