"""3x3 convolution, stride 1, padding 1, of an image or of an image doubled: torch's, in float64, rounded once."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import conv2d, interpolate


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    prepared: Tensor | None,
    upsample: bool,
    tile_height: int,
    tile_width: int,
    block: int,
    out: Tensor,
) -> None:
    """Writes residual + (x * weight + bias) to `out`; how a kernel would go about it makes no difference here.

    With `upsample`, x is doubled in height and width first, each pixel repeated.
    """
    x = x.double()
    if upsample:
        x = interpolate(x, scale_factor=2.0, mode="nearest")
    y = conv2d(x, weight.double(), None if bias is None else bias.double(), padding=1)
    out.copy_(y if residual is None else residual.double() + y)
