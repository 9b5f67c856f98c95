"""The memory format of convolution weights, and of images that leave it open."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .patch import Accelerated, subclass, swap

# Not one of patch's marks: accelerate applied again leaves the layout alone.
_CONVERTED = "_channels_last_by_ddpm_fast"


class FirstConv(Accelerated, nn.Conv2d):
    """A 1x1 convolution of images of one channel, whose result is channels_last.

    Neither such a weight nor such an image has one layout, and torch takes both for contiguous; the network would go on
    with contiguous images and mix them with others.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 4 and input.shape[1] == 1:
            samples, _, height, width = input.shape
            input = input.reshape(samples, height, width, 1).permute(0, 3, 1, 2)
        return super().forward(input)


def to_channels_last(model: nn.Module) -> None:
    """Lays out the contiguous 4-D parameters of every module in channels_last. They stay the same objects."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.weight.shape[1:] == (1, 1, 1) and module.groups == 1:
            swap(module, subclass(FirstConv, nn.Conv2d))
        names = [name for name, p in module._parameters.items() if p is not None and _is_contiguous_image(p)]
        if names:
            _convert(module, names, torch.channels_last)
            module.__dict__[_CONVERTED] = sorted({*module.__dict__.get(_CONVERTED, ()), *names})


def undo_channels_last(model: nn.Module) -> None:
    """Makes what `to_channels_last` converted contiguous again."""
    for module in model.modules():
        names = module.__dict__.pop(_CONVERTED, ())
        _convert(module, [name for name in names if module._parameters.get(name) is not None], torch.contiguous_format)


def _is_contiguous_image(p: Tensor) -> bool:
    return p.dim() == 4 and p.is_contiguous() and not p.is_contiguous(memory_format=torch.channels_last)


def _convert(module: nn.Module, names: list[str], memory_format: torch.memory_format) -> None:
    for name in names:
        parameter = module._parameters[name]
        assert parameter is not None
        parameter.data = parameter.data.contiguous(memory_format=memory_format)
