"""Several processes that train one network: whose part of a batch is whose, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """torch.distributed's default group of the processes that torchrun has started; without torchrun, nothing.

    Gloo on the CPU, NCCL on GPUs, of which `device` must be this process's own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


class Group:
    """The processes of torch.distributed's default group, or this one alone where there is none.

    Args:
        device: this process's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    def share(self, batch: range) -> range:
        """This process's part of the places in a batch: parts follow each other by rank and differ by one at most."""
        count = len(batch)
        return batch[self.rank * count // self.size : (self.rank + 1) * count // self.size]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, its gradients averaged over the processes by every backward pass."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def local(self, model: nn.Module) -> AbstractContextManager[None]:
        """Backward passes of the wrapped model inside add up on this process, for a later one outside to average."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """The processes' tensors, added up; the same bits on every process, on the CPU."""
        if self.size == 1:
            return values
        total = values.to(self.device)
        dist.all_reduce(total)
        return total.cpu()

    def agree(self, what: str, number: int) -> None:
        """Raises ValueError on every process where the number is not the same on all of them."""
        numbers = torch.zeros(self.size, dtype=torch.int64)
        numbers[self.rank] = number
        numbers = self.sum(numbers)
        if (numbers != numbers[0]).any():
            raise ValueError(
                f"the processes have different {what}s, {numbers.tolist()} by rank: they need the same files, on a "
                f"file system that all share"
            )

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()
