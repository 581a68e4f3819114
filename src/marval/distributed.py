"""Many processes, started by ``torchrun``: who am I, my share of a batch, averaged gradients.

The loops evaluate parts of three networks (a backbone here, a head there), which DistributedDataParallel's forward
hooks do not fit; gradients are averaged explicitly after each backward pass instead.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among ``size``; rank 0 writes files and talks."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """This process's share of a global batch.

        Raises:
            ValueError: the batch does not divide evenly.
        """
        if batch % self.size:
            raise ValueError(f"batch {batch} must be a multiple of the number of processes, {self.size}")
        share = batch // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes, in one collective per dtype and 64 MB."""
        if self.size == 1:
            return
        pending: list[Tensor] = []
        for tensor in tensors:
            if pending and (tensor.dtype != pending[0].dtype or sum(p.numel() for p in pending) > 1 << 24):
                self._average(pending)
                pending = []
            pending.append(tensor)
        self._average(pending)

    def _average(self, tensors: list[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = (flat / self.size).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the processes."""
        result = value.detach().clone()
        self.average([result])
        return result

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows of all processes in rank order; each has equally many."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def connect(device: str = "auto") -> World:
    """Join the other processes if ``torchrun`` started this one; pick the device.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError(f"device {device!r} is not available: this PyTorch ({torch.__version__}) sees no CUDA GPU")
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(torch.device(device))
    elif device != "cpu":
        raise ValueError(f"unknown device {device!r}: choose auto, cpu or cuda")
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(minutes=10))
    return World(rank, size, torch.device(device))


def disconnect() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
