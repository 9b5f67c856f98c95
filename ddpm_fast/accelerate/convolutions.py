"""The convolution modules: which of them are 3x3 of stride 1, and their forward on the fused op."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

from ..nn import Conv3x3
from ..nn.conv import plan_module, prepared_weight
from ..ops._check import needs_grad
from ..ops.conv import ConvPlan, conv3x3, cpu_isa, plan_conv3x3
from .computed import FusedComputedConv, as_torch_lays_out, fused_class
from .patch import Accelerated, is_accelerated, mark, marked, subclass, swap
from .standardized import FusedStandardizedConv, standardizes


class FusedConv(Accelerated, nn.Conv2d):
    """nn.Conv2d, 3x3 of stride 1 and padding 1, on the fused op where no gradient is needed.

    Its outputs have the dtype and the memory format that torch's have.
    """

    def forward(self, input: Tensor) -> Tensor:
        y = self._fused(input, upsample=False)
        return super().forward(input) if y is None else y

    def doubled(self, input: Any) -> Tensor | None:
        """The convolution of the image doubled by repeating its pixels; None where the fused op does not take it."""
        if not isinstance(input, Tensor) or "forward" in self.__dict__:
            return None
        return self._fused(input, upsample=True)

    def _fused(self, input: Tensor, upsample: bool) -> Tensor | None:
        mode: str = self.__dict__["_ddpm_fast_mode"]
        if needs_grad(input, self.weight, self.bias) or plan_module(self, input, mode, upsample).tile is None:
            return None
        prepared = prepared_weight(self, self.__dict__.get("_ddpm_fast_prepared"))
        mark(self, "prepared", prepared)
        y = conv3x3(input, prepared, self.bias, upsample=upsample, mode=mode)
        return as_torch_lays_out(y, input, self.weight)


def is_conv(module: nn.Module) -> bool:
    """Whether a module is a convolution, of any kind."""
    return isinstance(module, _ConvNd)


def accelerate_convs(model: nn.Module, mode: str) -> None:
    """Puts the convolutions that the fused op takes on it, and leaves a note on each of the others."""
    for module in model.modules():
        if not is_conv(module) or isinstance(module, Conv3x3):
            continue
        reason = _why_not(module, mode)
        if reason is None:
            reason = _accelerate_conv(module, mode)
        if reason is not None:
            mark(module, "note", reason)


def _accelerate_conv(conv: nn.Module, mode: str) -> str | None:
    """Why it could not be done after all; None if it was."""
    assert isinstance(conv, nn.Conv2d)
    made: type[Accelerated] | None
    if type(conv).forward is nn.Conv2d.forward:
        made = subclass(FusedConv, type(conv))
    elif standardizes(conv):
        made = subclass(FusedStandardizedConv, type(conv))
    else:
        made = fused_class(conv, mode)
    if made is None:
        return "it has a forward of its own, in which no call of torch's conv2d can be seen"
    try:
        swap(conv, made)
    except TypeError as error:
        return f"its class cannot be extended: {error}"
    mark(conv, "mode", mode)
    return None


def conv_note(module: nn.Module, untouched: str) -> tuple[bool, str]:
    """Whether a convolution runs on the fused op; how, or why not."""
    if isinstance(module, (Conv3x3, FusedConv, FusedComputedConv, FusedStandardizedConv)):
        mode = module.mode if isinstance(module, Conv3x3) else marked(module, "mode")
        plan = _plan(module, mode)
        return plan.tile is not None, f"{mode}, {plan.reason}"
    return False, marked(module, "note", untouched)


def _plan(conv: nn.Conv2d, mode: str) -> ConvPlan:
    """The plan for an image large enough for any."""
    return plan_conv3x3(conv.in_channels, conv.out_channels, 64, 64, mode=mode, isa=cpu_isa())


def _why_not(conv: nn.Module, mode: str) -> str | None:
    """Why a convolution cannot run on the fused op, whatever its input; None if it can."""
    if not isinstance(conv, nn.Conv2d):
        return f"{type(conv).__name__} is not a Conv2d"
    if isinstance(conv, LazyModuleMixin):
        return "its number of channels is not known yet"
    if "forward" in conv.__dict__ or is_accelerated(conv):
        return "it has a forward of its own"
    if type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        return "it has a _conv_forward of its own"
    if set(conv._parameters) != {"weight", "bias"} or conv._buffers or conv._modules:
        return "its weight or bias is not a plain parameter (parametrized or computed), or it has further state"
    if conv.kernel_size != (3, 3) or conv.stride != (1, 1) or conv.padding not in ((1, 1), "same"):
        how = f"kernel {conv.kernel_size}, stride {conv.stride}, padding {conv.padding}"
        return f"{how}: the fused op is 3x3 of stride 1 and padding 1"
    if conv.dilation != (1, 1) or conv.groups != 1 or conv.padding_mode != "zeros":
        how = f"dilation {conv.dilation}, groups {conv.groups}, padding with {conv.padding_mode}"
        return f"{how}: the fused op has no dilation, one group, and pads with zeros"
    plan = _plan(conv, mode)
    return None if plan.tile is not None else plan.reason
