"""The memory format of convolution weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Not one of patch's marks: accelerate applied again leaves the layout alone.
_CONVERTED = "_channels_last_by_ddpm_fast"


def to_channels_last(model: nn.Module) -> None:
    """Lays out the contiguous 4-D parameters of every module in channels_last. They stay the same objects."""
    for module in model.modules():
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
