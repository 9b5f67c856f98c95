"""Convolutions with standardised weights: which forwards compute them, and their forward with the weight kept."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.conv import plan_tensors
from ..ops._check import needs_grad
from ..ops._derived import Derived
from ..ops.conv import PreparedConv3x3, conv3x3, prepare_conv3x3
from . import forms, source
from .computed import as_torch_lays_out
from .patch import Accelerated

# The forwards that standardise a weight, as their authors write them. In float32 all have the same epsilon.
_FORMS = [
    forms.parse_form(text)
    for text in (
        # The annotated article; lucidrains' denoising_diffusion_pytorch as it was then.
        """
def forward(self, x):
    eps = 1e-5 if x.dtype == torch.float32 else 1e-3
    weight = self.weight
    mean = reduce(weight, "o ... -> o 1 1 1", "mean")
    var = reduce(weight, "o ... -> o 1 1 1", partial(torch.var, unbiased=False))
    normalized_weight = (weight - mean) * (var + eps).rsqrt()
    return F.conv2d(x, normalized_weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
""",
        # examples/annotated.py, without einops.
        """
def forward(self, x):
    mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
    variance = self.weight.var(dim=(1, 2, 3), unbiased=False, keepdim=True)
    weight = (self.weight - mean) * (variance + 1e-5).rsqrt()
    return F.conv2d(x, weight, self.bias, self.stride, self.padding)
""",
    )
]


class FusedStandardizedConv(Accelerated, nn.Conv2d):
    """A convolution whose forward was found to standardise its weight, on the fused op.

    The weight is standardised and packed again when the parameter has changed, not in each call.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mode: str = self.__dict__["_ddpm_fast_mode"]
        if len(args) != 1 or kwargs or not self._takes(args[0], mode):
            return super().forward(*args, **kwargs)
        input: Tensor = args[0]
        if self.weight.is_inference():  # its changes cannot be seen
            weight: Tensor | PreparedConv3x3 = _standardized(self.weight)
        else:
            kept: Derived[PreparedConv3x3] = self.__dict__.setdefault("_ddpm_fast_kept", Derived())
            weight = kept.get((self.weight,), _prepared)
        return as_torch_lays_out(conv3x3(input, weight, self.bias, mode=mode), input, self.weight)

    def _takes(self, input: Any, mode: str) -> bool:
        return (
            isinstance(input, Tensor)
            and not needs_grad(input, self.weight, self.bias)
            and plan_tensors(self.weight, input, mode).tile is not None
        )


def standardizes(conv: nn.Conv2d) -> bool:
    """Whether a convolution's forward is known to standardise its weight, and does nothing else of its own."""
    forward = type(conv).forward
    if not isinstance(forward, types.FunctionType):
        return False
    try:
        found = (forms.match(form, forward, conv) for form in _FORMS)
        return any(names is not None and all(ours == theirs for ours, theirs in names.items()) for names in found)
    except source.Unreadable:
        return False


def _standardized(weight: Tensor) -> Tensor:
    mean = weight.mean(dim=(1, 2, 3), keepdim=True)
    variance = weight.var(dim=(1, 2, 3), unbiased=False, keepdim=True)
    return (weight - mean) * (variance + 1e-5).rsqrt()


def _prepared(weight: Tensor) -> PreparedConv3x3:
    with torch.inference_mode(False), torch.no_grad():  # what is kept serves calls outside inference mode as well
        return prepare_conv3x3(_standardized(weight))
