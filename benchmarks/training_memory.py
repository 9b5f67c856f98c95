"""Memory of a training step: `python -m benchmarks.training_memory`, each contestant in a process of its own."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch
from torch import Tensor, nn

from benchmarks.training import PEERS, contestant, eager_network, network
from ddpm_fast.nn import GroupNormSiLU

SHAPE = (64, 1, 28, 28)
MEBIBYTE = 1 << 20


def saved_by_norms(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> int:
    """Bytes that the norms, with their activations, keep for the backward pass; a tensor kept twice counts once."""
    kept: dict[int, int] = {}
    parameters = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = max(kept.get(storage.data_ptr(), 0), storage.nbytes())
        return tensor

    def inside(module: GroupNormSiLU) -> None:
        forward = module.forward

        def recorded(*arguments: Tensor, **options: Tensor) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                return forward(*arguments, **options)

        module.forward = recorded  # type: ignore[method-assign]

    for module in model.modules():
        if isinstance(module, GroupNormSiLU):
            inside(module)
    # The result is held until all is counted: freed memory would be given out again under the same address.
    result = model(torch.randn(shape), torch.zeros(shape[0], dtype=torch.int64))
    total = sum(kept.values())
    del result
    return total


def peak_of_a_step(name: str, shape: tuple[int, ...] = SHAPE) -> int:
    """Bytes by which a step raises the process's largest size over what model, optimiser and images take."""
    run = contestant(name, torch.randint(0, 256, shape, dtype=torch.uint8))
    contestant(name, torch.randint(0, 256, (1, *shape[1:]), dtype=torch.uint8))()  # code and threads
    before = _resident()
    for _ in range(3):
        run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_in_a_process(name: str) -> int:
    """The same, measured in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.training_memory", "--only", name]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="NAME", help="print the bytes of one contestant")
    only = parser.parse_args().only
    if only is not None:
        print(peak_of_a_step(only))
        return
    print(f"training step, batch {SHAPE}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    norms = {"ours": saved_by_norms(network()), "eager": saved_by_norms(eager_network("channels_last"))}
    for name, size in norms.items():
        share = f"{100 * (1 - size / norms['eager']):.0f} % less"
        print(f"  norms and activations keep, {name:<6} {size / MEBIBYTE:>8.1f} MiB  {share}")
    peaks = {name: peak_in_a_process(name) for name in ("ours", *PEERS)}
    for name, size in peaks.items():
        share = f"ours is {100 * (1 - peaks['ours'] / size):.0f} % less"
        print(f"  peak of a step, {name:<24} {size / MEBIBYTE:>8.1f} MiB  {share}")


if __name__ == "__main__":
    main()
