"""A whole chain of the trained network: rounding differs from layer to layer, and where it ends after 1000 steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.cli.network import open_network
from ddpm_fast.nn import UNet, eager_copy


def rms(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


@pytest.mark.slow
def test_our_images_are_no_further_from_eagers_than_eagers_two_layouts_from_each_other() -> None:
    network = open_network(None)
    model = network.model.eval()
    contiguous = UNet(replace(model.config, channels_last=False)).eval()
    contiguous.load_state_dict(model.state_dict())
    shape = (4, *network.shape)
    ours, last, plain = (
        df.Sampler(net, network.schedule).sample(shape, seed=0)
        for net in (model, eager_copy(model), eager_copy(contiguous))
    )
    between = rms(last - plain)
    assert 0 < between < 1e-3
    assert rms(ours - last) <= between
    assert rms(ours - plain) <= between
