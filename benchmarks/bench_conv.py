"""3x3 convolutions, layer by layer and in whole U-Nets, against torch's in both layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from benchmarks.common import LAYOUTS, laid_out, rms_error
from benchmarks.harness import Case, Target
from ddpm_fast.nn import UNet, UNetConfig, eager_copy
from ddpm_fast.ops import conv3x3, plan_conv3x3, prepare_conv3x3

Measure = Callable[[Case], None]

# (N, C, K, side): the layers of the shipped network, of the annotated article's and of the CIFAR-10 DDPM U-Net.
LAYERS = {
    "shipped": [
        (16, 24, 24, 28),
        (16, 48, 24, 28),
        (16, 24, 48, 14),
        (16, 48, 48, 14),
        (16, 96, 48, 14),
        (16, 48, 96, 7),
        (16, 96, 96, 7),
        (16, 192, 96, 7),
    ],
    "article": [(16, 28, 28, 28), (16, 56, 56, 14), (16, 112, 112, 7), (16, 224, 112, 7)],
    "CIFAR": [
        (4, 128, 128, 32),
        (4, 256, 128, 32),
        (4, 128, 256, 16),
        (4, 256, 256, 16),
        (4, 512, 256, 16),
        (4, 256, 256, 8),
        (4, 512, 256, 8),
        (4, 256, 256, 4),
        (4, 512, 256, 4),
    ],
}
CASES = [(net, *layer) for net, layers in LAYERS.items() for layer in layers]

SHIPPED = UNetConfig(
    in_channels=1, base_channels=24, channel_mult=(1, 2, 4), attention_levels=(2,), num_heads=2, num_groups=8
)
CIFAR = UNetConfig()
NETS = [("shipped", SHIPPED, (16, 1, 28, 28)), ("CIFAR", CIFAR, (4, 3, 32, 32)), ("CIFAR", CIFAR, (16, 3, 32, 32))]


@pytest.mark.parametrize("mode", ["exact", "strict", "fast"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_layer(measure: Measure, case: tuple[str, int, int, int, int], mode: str) -> None:
    net, samples, channels, outputs, side = case
    x = laid_out(torch.randn(samples, channels, side, side), "channels_last")
    layer = nn.Conv2d(channels, outputs, 3, padding=1).requires_grad_(False)
    weight, bias = layer.weight, layer.bias
    assert bias is not None
    prepared = prepare_conv3x3(weight)

    def check() -> float:
        exact = conv2d(x.double(), weight.double(), bias.double(), padding=1)
        eager = conv2d(x, laid_out(weight, "channels_last"), bias, padding=1)
        error, allowed = rms_error(conv3x3(x, prepared, bias, mode=mode), exact), rms_error(eager, exact)
        assert error <= (4 if mode == "fast" else 1) * allowed, f"rms error {error:.2e}, eager's is {allowed:.2e}"
        return error

    peers = {
        f"eager {name}": partial(conv2d, laid_out(x, name), laid_out(weight, name), bias, padding=1) for name in LAYOUTS
    }
    plan = plan_conv3x3(channels, outputs, side, side, mode=mode)
    measure(
        Case(
            what=f"3x3 convolution, {mode}",
            shape=tuple(x.shape),
            layout="channels_last",
            note=f"{net}, to {outputs} channels, {plan.reason.split(':')[0]}",
            ours=lambda: conv3x3(x, prepared, bias, mode=mode),
            peers=peers,
            check=check,
        )
    )


@pytest.mark.parametrize("mode", ["exact", "strict", "fast"])
@pytest.mark.parametrize("net", NETS, ids=lambda net: f"{net[0]}-{net[2][0]}")
def test_network(
    measure: Measure, quick: bool, net: tuple[str, UNetConfig, tuple[int, int, int, int]], mode: str
) -> None:
    name, config, shape = net
    if quick and name == "CIFAR":
        pytest.skip("--quick runs the small network")
    model = UNet(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():  # the branches that training starts from zero would hide an error in them
            nn.init.normal_(parameter, std=0.02)
    model.set_conv_mode(mode)
    contiguous = UNet(replace(config, channels_last=False)).eval().requires_grad_(False)
    contiguous.load_state_dict(model.state_dict())
    peers: dict[str, nn.Module] = {"eager contiguous": eager_copy(contiguous), "eager channels_last": eager_copy(model)}
    x, t = torch.randn(shape), torch.arange(shape[0]) * 30

    def check() -> float:
        exact = eager_copy(model).double()(x.double(), t)
        error, allowed = rms_error(model(x, t), exact), rms_error(peers["eager channels_last"](x, t), exact)
        assert error <= (4 if mode == "fast" else 1) * allowed, f"rms error {error:.2e}, eager's is {allowed:.2e}"
        return error

    def run(network: nn.Module) -> Tensor:
        return network(x, t)  # type: ignore[no-any-return]

    measure(
        Case(
            what=f"U-Net, convolutions {mode}",
            shape=shape,
            layout="channels_last",
            note=name,
            ours=partial(run, model),
            peers={peer: partial(run, network) for peer, network in peers.items()},
            check=check,
            target=Target(2.2, 2.6) if name == "CIFAR" else Target(1.5, 2.0),
        )
    )
