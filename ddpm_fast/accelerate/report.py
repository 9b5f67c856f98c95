"""What accelerate did with each norm, each convolution and each attention of a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from .attention import attention_note, is_attention
from .convolutions import conv_note, is_conv
from .norms import is_fused_already, is_norm
from .patch import is_accelerated, mark, marked

_UNTOUCHED = "accelerate() has not been applied"


@dataclass
class AccelerationReport:
    """Every norm, convolution and attention module of a model, by name; `print` shows a table for each kind.

    Attributes:
        fused: the names of the norms that run on the fused op.
        skipped: the names of the others, and why.
        patterns: for each name in `fused`, what runs in one pass with it.
        convs_fused: the names of the convolutions that run on the fused op, and how where the image is large enough.
        convs_skipped: the names of the others, and why.
        attentions_fused: the names of the attention modules that are folded, or run on the fused op, and how.
        attentions_skipped: the names of the others, and why.
    """

    fused: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    patterns: dict[str, str] = field(default_factory=dict)
    convs_fused: dict[str, str] = field(default_factory=dict)
    convs_skipped: dict[str, str] = field(default_factory=dict)
    attentions_fused: dict[str, str] = field(default_factory=dict)
    attentions_skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        tables = [_table("norm", "in one pass", {name: self.patterns[name] for name in self.fused}, self.skipped)]
        for what, fused, skipped in (
            ("convolution", self.convs_fused, self.convs_skipped),
            ("attention", self.attentions_fused, self.attentions_skipped),
        ):
            if fused or skipped:
                tables.append(_table(what, "how", fused, skipped))
        return "\n\n".join(tables)


def _table(what: str, how: str, fused: dict[str, str], skipped: dict[str, str]) -> str:
    rows = [(name, "fused", text) for name, text in fused.items()]
    rows += [(name, "skipped", reason) for name, reason in skipped.items()]
    width = max([len(what), *(len(name) for name, _, _ in rows)])
    lines = [f"{what:{width}}  {'':7}  {how}, or why not"]
    lines += [f"{name:{width}}  {state:7}  {text}" for name, state, text in rows]
    return "\n".join([*lines, f"{len(fused)} fused, {len(skipped)} skipped"])


def note_fused(norm: nn.Module, pattern: str) -> None:
    mark(norm, "note", ("fused", pattern))


def note_skipped(norm: nn.Module, reason: str) -> None:
    mark(norm, "note", ("skipped", reason))


def acceleration_report(model: nn.Module) -> AccelerationReport:
    """What `accelerate` did with each norm, convolution and attention of a model, or of a part or a wrapper of one.

    Every norm module is in `.fused` or in `.skipped`, every convolution in `.convs_fused` or in `.convs_skipped`, and
    every module that is called attention and has parameters in `.attentions_fused` or in `.attentions_skipped`, under
    the name that `named_modules` gives it; where `accelerate` was not applied, all are skipped, and that is the reason.

    Raises:
        TypeError: if `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    report = AccelerationReport()
    for name, module in model.named_modules():
        if is_conv(module):
            fused, text = conv_note(module, _UNTOUCHED)
            (report.convs_fused if fused else report.convs_skipped)[name] = text
        if is_attention(module):
            fused, text = attention_note(module, _UNTOUCHED)
            (report.attentions_fused if fused else report.attentions_skipped)[name] = text
        if not is_norm(module):
            continue
        state, text = marked(module, "note", ("skipped", _UNTOUCHED))
        if is_fused_already(module):
            report.fused.append(name)
            report.patterns[name] = f"{type(module).__name__} of ddpm_fast, as it is"
        elif state == "fused" and is_accelerated(module):
            report.fused.append(name)
            report.patterns[name] = text
        else:
            report.skipped[name] = text if state == "skipped" else _UNTOUCHED
    return report
