"""The U-Net of denoising diffusion models (Ho et al. 2020, appendix B; Dhariwal & Nichol 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops.conv import MODES
from .blocks import Downsample, ResBlock, SelfAttention, Upsample, zero_init
from .conv import Conv3x3
from .embedding import timestep_embedding
from .group_norm_silu import GroupNormSiLU

_TIME_EMBEDDINGS = ("add", "scale_shift")


@dataclass(frozen=True)
class UNetConfig:
    """Everything that determines a :class:`UNet`'s architecture; ``UNetConfig(**config.to_dict())`` is an equal one.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output; ``None`` is ``in_channels``, or twice that with ``learned_variance``.
        learned_variance: the output also carries one variance channel for each image channel.
        base_channels: channels at full resolution before ``channel_mult``.
        channel_mult: one factor a resolution level; each level after the first has half the height and width.
        num_res_blocks: residual blocks a level on the way down (one more on the way up).
        attention_levels: indices into ``channel_mult`` of the levels with self-attention; the middle always has it.
        num_heads: attention heads.
        num_groups: groups of every norm.
        dropout: probability inside the residual blocks.
        time_embedding: ``"add"`` before the second norm of a block, or ``"scale_shift"`` after it.
        num_classes: number of labels ``y`` that condition the network, ``None`` for none.
        self_condition: the network also sees its last estimate of x0, zeros at first (Chen, Zhang and Hinton 2023).
        channels_last: keep weights and activations in ``torch.channels_last``.

    Raises:
        ValueError: a value outside what is described above, naming the field.
    """

    in_channels: int = 3
    out_channels: int | None = None
    learned_variance: bool = False
    base_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (1,)
    num_heads: int = 1
    num_groups: int = 32
    dropout: float = 0.0
    time_embedding: str = "add"
    num_classes: int | None = None
    self_condition: bool = False
    channels_last: bool = True

    def __post_init__(self) -> None:
        # JSON has no tuples.
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "attention_levels", tuple(self.attention_levels))
        for name in ("in_channels", "base_channels", "num_res_blocks", "num_heads", "num_groups"):
            _check_positive(name, getattr(self, name))
        for name in ("out_channels", "num_classes"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if not self.channel_mult:
            raise ValueError("channel_mult must name at least one level, got ()")
        for factor in self.channel_mult:
            _check_positive("channel_mult", factor)
        if self.base_channels % 2 != 0:
            raise ValueError(f"base_channels must be even, got {self.base_channels}")
        for level in self.attention_levels:
            if not 0 <= level < len(self.channel_mult):
                raise ValueError(
                    f"attention_levels must lie in 0..{len(self.channel_mult) - 1}, got {self.attention_levels}"
                )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.time_embedding not in _TIME_EMBEDDINGS:
            raise ValueError(f"time_embedding must be one of {_TIME_EMBEDDINGS}, got {self.time_embedding!r}")
        if self.learned_variance and self.out_channels not in (None, 2 * self.in_channels):
            raise ValueError(
                f"out_channels must be twice in_channels ({2 * self.in_channels}) with learned_variance, "
                f"got {self.out_channels}"
            )
        # All widths, sums of two widths included, are multiples of base_channels.
        if self.base_channels % self.num_groups != 0:
            raise ValueError(
                f"base_channels must be a multiple of num_groups, got {self.base_channels} and {self.num_groups}"
            )
        if self.base_channels % self.num_heads != 0:
            raise ValueError(
                f"base_channels must be a multiple of num_heads, got {self.base_channels} and {self.num_heads}"
            )

    @property
    def output_channels(self) -> int:
        """Channels of the network's output."""
        if self.out_channels is not None:
            return self.out_channels
        return 2 * self.in_channels if self.learned_variance else self.in_channels

    @property
    def size_multiple(self) -> int:
        """Height and width of an input must be multiples of this."""
        return int(2 ** (len(self.channel_mult) - 1))

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """The inverse of :meth:`to_dict`. Raises ValueError for fields that do not exist."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown fields in a UNet config: {unknown}")
        return cls(**values)


class UNet(nn.Module):
    """The denoising U-Net: ``model(x, t, y=None, x_self_cond=None)``.

    Give a :class:`UNetConfig`, or its fields as keywords.
    """

    def __init__(self, config: UNetConfig | None = None, **fields_of_config: Any) -> None:
        super().__init__()
        if config is not None and fields_of_config:
            raise TypeError("give either a UNetConfig or its fields as keywords, not both")
        if config is None:
            config = UNetConfig(**fields_of_config)
        elif not isinstance(config, UNetConfig):
            raise TypeError(f"config must be a UNetConfig, got {type(config).__name__}")
        self.config = config

        embedding_dim = 4 * config.base_channels
        self.time_mlp = nn.Sequential(
            nn.Linear(config.base_channels, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )
        self.class_embedding = None if config.num_classes is None else nn.Embedding(config.num_classes, embedding_dim)

        def block(in_channels: int, out_channels: int) -> ResBlock:
            return ResBlock(
                in_channels,
                out_channels,
                embedding_dim=embedding_dim,
                num_groups=config.num_groups,
                time_embedding=config.time_embedding,
                dropout=config.dropout,
            )

        def attention(channels: int) -> SelfAttention:
            return SelfAttention(channels, num_heads=config.num_heads, num_groups=config.num_groups)

        widths = [config.base_channels * factor for factor in config.channel_mult]
        last_level = len(widths) - 1
        channels = config.base_channels
        skips = [channels]
        self.conv_in = Conv3x3(config.in_channels * (2 if config.self_condition else 1), channels)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                layers: list[nn.Module] = [block(channels, width)]
                if level in config.attention_levels:
                    layers.append(attention(width))
                self.down.append(nn.ModuleList(layers))
                channels = width
                skips.append(channels)
            if level < last_level:
                self.down.append(nn.ModuleList([Downsample(channels)]))
                skips.append(channels)

        self.middle = nn.ModuleList([block(channels, channels), attention(channels), block(channels, channels)])

        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config.num_res_blocks + 1):
                layers = [block(channels + skips.pop(), width)]
                channels = width
                if level in config.attention_levels:
                    layers.append(attention(width))
                if level > 0 and i == config.num_res_blocks:
                    layers.append(Upsample(channels))
                self.up.append(nn.ModuleList(layers))

        self.norm_out = GroupNormSiLU(config.num_groups, channels)
        self.conv_out = zero_init(Conv3x3(channels, config.output_channels))
        self._gradient_checkpointing = False
        self._memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.to(memory_format=self._memory_format)  # type: ignore[call-overload]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the network computes in: its weights'."""
        return self.conv_in.weight.dtype

    def set_conv_mode(self, mode: str) -> None:
        """Choose how the 3x3 convolutions and their gradients are computed.

        A choice of the moment: neither the state dict nor the config carries it.

        Args:
            mode: ``"exact"`` (the default), ``"strict"``, ``"fast"`` or ``"torch"``, see :func:`ddpm_fast.conv3x3`.

        Raises:
            ValueError: for another mode.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        for module in self.modules():
            if isinstance(module, Conv3x3):
                module.mode = mode

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Keep only the input of each block for the backward pass, and compute the block again there.

        A choice of the moment: neither the state dict nor the config carries it. Results are the same to the bit.

        Args:
            enabled: whether to.
        """
        self._gradient_checkpointing = enabled

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, x_self_cond: Tensor | None = None) -> Tensor:
        """Predict from noisy images.

        Args:
            x: ``(N, in_channels, H, W)`` floating point; H and W multiples of ``config.size_multiple``.
                Converted to the network's own dtype.
            t: ``(N,)`` timesteps, integer or floating point.
            y: ``(N,)`` int64 labels; exactly when the network has ``num_classes``.
            x_self_cond: like x, the last estimate of x0; only for a network with ``self_condition``.

        Returns:
            ``(N, output_channels, H, W)`` in the network's dtype.

        Raises:
            ValueError: wrong shape, or labels missing or not expected.
        """
        self._check(x, t, y, x_self_cond)
        if self.config.self_condition:
            x = torch.cat((torch.zeros_like(x) if x_self_cond is None else x_self_cond.to(x.dtype), x), dim=1)
        dtype = self.dtype
        embedding = self.time_mlp(timestep_embedding(t, self.config.base_channels).to(dtype))
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(y)
        embedding = F.silu(embedding)  # every block's projection starts with it

        h = self.conv_in(x.to(dtype=dtype, memory_format=self._memory_format))
        skips = [h]
        for stage in self.down:
            h = self._run(stage, h, embedding)
            skips.append(h)
        h = self._run(self.middle, h, embedding)
        for stage in self.up:
            h = self._run(stage, torch.cat((h, skips.pop()), dim=1), embedding)
        return self.conv_out(self.norm_out(h))  # type: ignore[no-any-return]

    def _run(self, stage: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        assert isinstance(stage, nn.ModuleList)
        again = self._gradient_checkpointing and torch.is_grad_enabled()
        for layer in stage:
            inputs = (h, embedding) if isinstance(layer, ResBlock) else (h,)
            h = checkpoint(layer, *inputs, use_reentrant=False) if again else layer(*inputs)
        return h

    def _check(self, x: Tensor, t: Tensor, y: Tensor | None, x_self_cond: Tensor | None) -> None:
        config = self.config
        if x_self_cond is not None and (not config.self_condition or x_self_cond.shape != x.shape):
            raise ValueError(
                f"x_self_cond must have x's shape {tuple(x.shape)} and the network self_condition, "
                f"got {tuple(x_self_cond.shape)} and {config.self_condition}"
            )
        if x.ndim != 4 or x.shape[1] != config.in_channels:
            raise ValueError(f"x must have shape (N, {config.in_channels}, H, W), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {x.dtype}")
        multiple = config.size_multiple
        if x.shape[2] % multiple != 0 or x.shape[3] % multiple != 0 or 0 in x.shape[2:]:
            raise ValueError(
                f"height and width of x must be multiples of {multiple} for {len(config.channel_mult)} levels, "
                f"got {x.shape[2]}x{x.shape[3]}"
            )
        if t.shape != (x.shape[0],):
            raise ValueError(f"t must have shape ({x.shape[0]},), got {tuple(t.shape)}")
        if (y is None) != (config.num_classes is None):
            state = "missing: the network has num_classes" if y is None else "given: the network has no num_classes"
            raise ValueError(f"labels y are {state}={config.num_classes}")
        if y is not None and y.shape != (x.shape[0],):
            raise ValueError(f"y must have shape ({x.shape[0]},), got {tuple(y.shape)}")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
