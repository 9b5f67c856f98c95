"""``ddpm-fast train``: the settings that suit a data set, where the command line does not say otherwise."""

from __future__ import annotations

from typing import Any

from ddpm_fast.nn import UNetConfig
from ddpm_fast.training import TrainConfig

# fashion-mnist: the recipe of the shipped checkpoint.
_NETWORKS: dict[str, dict[str, Any]] = {
    "digits": {"in_channels": 1, "base_channels": 32, "channel_mult": (1, 2), "attention_levels": (1,)},
    "fashion-mnist": {"in_channels": 1, "base_channels": 24, "channel_mult": (1, 2, 4), "attention_levels": (2,)},
    "folder": {"in_channels": 3, "base_channels": 64, "channel_mult": (1, 2, 2, 2), "attention_levels": (2,)},
}
_COMMON = {"num_res_blocks": 1, "num_heads": 2, "num_groups": 8}


def configuration(dataset: str, network: dict[str, Any], settings: dict[str, Any]) -> TrainConfig:
    """The run's settings.

    Args:
        dataset: "digits", "fashion-mnist" or "folder".
        network: fields of UNetConfig; None stands for what suits the data set.
        settings: the other fields of TrainConfig.

    Raises:
        ValueError: a value that the configuration does not allow.
    """
    chosen = {name: value for name, value in network.items() if value is not None}
    chosen["learned_variance"] = settings.get("variance") in ("learned", "learned_range")
    return TrainConfig(
        dataset=dataset, unet=UNetConfig(**{**_COMMON, **_NETWORKS[dataset], **chosen}), lr_decay="cosine", **settings
    )
