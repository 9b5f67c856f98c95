"""The report, and bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ddpm_fast as df
from ddpm_fast.accelerate import AccelerationReport, acceleration_report

from . import originals as o
from .test_originals import MODELS, every_model, make

NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase, o.RMSNorm)

leaf = st.sampled_from(
    [
        lambda: nn.GroupNorm(2, 4),
        lambda: o.GroupNorm32(2, 4),
        lambda: o.GlideNorm(2, 4, swish=1.0),
        lambda: o.GlideNorm(2, 4, swish=0.5),
        lambda: nn.LayerNorm(3),
        lambda: nn.BatchNorm2d(4),
        lambda: nn.InstanceNorm2d(4),
        lambda: nn.RMSNorm(3),
        lambda: o.RMSNorm(4),
        nn.SiLU,
        o.OldSiLU,
        nn.ReLU,
        lambda: nn.Conv2d(4, 4, 1),
        lambda: o.ArticleBlock(4, 4, groups=2),
        lambda: o.GuidedResBlock(4, 4, True),
    ]
)


def build(tree: object) -> nn.Module:
    return nn.Sequential(*map(build, tree)) if isinstance(tree, list) else tree()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.recursive(leaf, lambda children: st.lists(children, max_size=4), max_leaves=8), max_size=5))
def test_every_norm_is_in_one_of_the_two(tree: list[object]) -> None:
    model = build(tree)
    classes = [type(m) for m in model.modules()]
    names = {name for name, module in model.named_modules() if isinstance(module, NORMS)}
    report = acceleration_report(model)
    assert report.fused == []
    assert report.skipped == dict.fromkeys(names, "accelerate() has not been applied")
    report = acceleration_report(df.accelerate(model))
    assert set(report.fused) | set(report.skipped) == names
    assert set(report.fused).isdisjoint(report.skipped)
    assert len(report.fused) == len(set(report.fused))
    assert set(report.patterns) == set(report.fused)
    assert all(report.skipped.values())
    # Of nn.GroupNorm itself, none is skipped here.
    assert {n for n in names if type(model.get_submodule(n)).__name__ == "GroupNorm"} <= set(report.fused)
    df.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert acceleration_report(model).skipped == dict.fromkeys(names, "accelerate() has not been applied")


@every_model
def test_every_norm_of_a_model_is_named(name: str) -> None:
    model = make(name)
    names = {n for n, module in model.named_modules() if isinstance(module, NORMS)}
    report = acceleration_report(df.accelerate(model))
    assert set(report.fused) | set(report.skipped) == names
    known = {n for n in names if isinstance(model.get_submodule(n), (nn.GroupNorm, o.RMSNorm))}
    assert set(report.fused) == {n for n in known if not n.endswith("odd")}
    part = next(n for n, m in model.named_children() if any(isinstance(c, NORMS) for c in m.modules()))
    inner = acceleration_report(model.get_submodule(part))
    assert {f"{part}.{n}" if n else part for n in inner.fused} == {
        n for n in report.fused if n == part or n.startswith(f"{part}.")
    }


def test_patterns() -> None:
    report = acceleration_report(df.accelerate(MODELS["guided-scale_shift"]()))
    assert report.patterns["input_blocks.1.0.in_layers.0"] == "GroupNorm + SiLU"
    assert report.patterns["input_blocks.1.0.out_layers.0"] == "[embedding +] GroupNorm [+ scale/shift] + SiLU"
    assert report.patterns["input_blocks.1.1.norm"] == "GroupNorm"
    report = acceleration_report(df.accelerate(MODELS["compvis"]()))
    assert report.patterns["mid.block_1.norm2"] == "[embedding +] GroupNorm + SiLU"
    report = acceleration_report(df.accelerate(MODELS["imagen"]()))
    assert report.patterns["block.block1.groupnorm"] == "GroupNorm [+ scale/shift] + SiLU"
    report = acceleration_report(df.accelerate(MODELS["glide-scale_shift"]()))
    assert report.patterns["block.in_layers.0"] == "GroupNorm + SiLU"


def test_prints_a_table() -> None:
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.LayerNorm(4))
    assert str(acceleration_report(df.accelerate(model))).splitlines() == [
        "norm           in one pass, or why not",
        "0     fused    GroupNorm + SiLU",
        "2     skipped  LayerNorm is neither a GroupNorm nor an RMSNorm over the channels: there is no fused op for it",
        "1 fused, 1 skipped",
    ]
    assert str(acceleration_report(nn.Identity())).endswith("0 fused, 0 skipped")


def test_convolutions_have_a_table_of_their_own() -> None:
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1))
    assert str(acceleration_report(model)).splitlines() == [
        "norm           in one pass, or why not",
        "0     skipped  accelerate() has not been applied",
        "0 fused, 1 skipped",
        "",
        "convolution           how, or why not",
        "1            skipped  accelerate() has not been applied",
        "0 fused, 1 skipped",
    ]


def test_repr_says_what_is_fused() -> None:
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    assert repr(df.accelerate(model)).startswith("FusedSequential(\n  (0): FusedGroupNorm(2, 4, eps=1e-05")


def test_a_norm_by_itself_and_a_model_without_one() -> None:
    norm = df.accelerate(nn.GroupNorm(2, 4))
    assert acceleration_report(norm).fused == [""]
    assert acceleration_report(df.accelerate(nn.Linear(2, 2))) == AccelerationReport()


@pytest.mark.parametrize("function", [df.accelerate, df.restore, df.acceleration_report])
@pytest.mark.parametrize("value", [None, 3, torch.ones(2), nn.GroupNorm], ids=str)
def test_rejects_what_is_no_module(function, value) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, not "):
        function(value)


def test_rejects_a_wrong_option() -> None:
    model = nn.Sequential(nn.GroupNorm(2, 4))
    with pytest.raises(TypeError, match="channels_last must be a bool, not str"):
        df.accelerate(model, channels_last="yes")
    with pytest.raises(TypeError):
        df.accelerate(model, True)
    with pytest.raises(ValueError, match="conv must be one of"):
        df.accelerate(model, conv="winograd")
    assert type(model[0]) is nn.GroupNorm
