"""Peak memory of whole networks, each variant in a process of its own.

    python -m benchmarks.memory

Counted is the largest resident size of the process after two forward passes, less its size before the network was
made: weights, whatever we keep beside them, activations, and what the allocator holds on to.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from contextlib import nullcontext

import torch
from torch import nn

import ddpm_fast as df
from benchmarks import networks
from benchmarks.bench_sampling import contiguous_copy, fashion_mnist
from benchmarks.report import aligned
from ddpm_fast._memory import kept_memory
from ddpm_fast.nn import eager_copy

VARIANTS = ("eager contiguous", "eager channels_last", "ours")
CASES = [("CIFAR-10 DDPM", 4), ("CIFAR-10 DDPM", 16), ("annotated article", 16), ("shipped", 16), ("shipped", 64)]


def make(name: str, variant: str) -> nn.Module:
    if name == "shipped":
        model, _ = fashion_mnist()
        model.requires_grad_(False)
        if variant == "ours":
            return model
        return eager_copy(contiguous_copy(model) if variant == "eager contiguous" else model)
    made = networks.cifar() if name.startswith("CIFAR") else networks.article()
    if variant == "ours":
        return df.accelerate(made, channels_last=True)
    return made.to(memory_format=torch.channels_last) if variant == "eager channels_last" else made


def resident() -> float:
    """MB that the process holds just now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


@torch.no_grad()
def peak(name: str, samples: int, variant: str) -> float:
    """MB, in this process."""
    torch.set_num_threads(1)
    networks.article()(torch.randn(1, 1, 28, 28), torch.zeros(1))  # what torch and its libraries take once
    before = resident()
    model = make(name, variant)
    x = torch.randn(samples, *((3, 32, 32) if name.startswith("CIFAR") else (1, 28, 28)))
    with kept_memory() if variant == "ours" else nullcontext():  # as the Sampler runs it
        for _ in range(2):
            model(x, torch.arange(samples))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - before


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("NET", "SAMPLES", "VARIANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        name, samples, variant = arguments.one
        print(peak(name, int(samples), variant))
        return
    lines = []
    for name, samples in CASES:
        megabytes = []
        for variant in VARIANTS:
            command = [sys.executable, "-m", "benchmarks.memory", "--one", name, str(samples), variant]
            megabytes.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        ratio = f"{megabytes[2] / min(megabytes[:2]):.2f}"
        lines.append([name, str(samples), *(f"{m:.0f}" for m in megabytes), ratio])
    print(aligned(("network", "images", *(f"{v}, MB" for v in VARIANTS), "ours / less of both"), lines))


if __name__ == "__main__":
    main()
