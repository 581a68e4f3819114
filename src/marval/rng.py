"""Explicit randomness. Nothing in marval reads the global generators but dropout, which knows no other.

Sampling: image i of seed s has a generator of its own, so the same image comes out of any batch size, process count
or order of work. Training: step n of a run has a generator of its own, from which every process draws the numbers of
the whole batch and keeps its share, so neither a resume nor the number of processes changes them.
"""

import enum
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

THREADED = 1 << 20
"""Numbers from which several threads draw those of different images, for a GPU."""


class Stream(enum.IntEnum):
    """What the loops use a run's seed for: `generator` (seed, stream, step). Those of HOST are on a CPU: numbers that
    Python reads without waiting for a GPU."""

    TRAIN = 1
    TRAIN_HOST = 2
    DISTILL = 3
    DISTILL_HOST = 4
    RL = 5
    RL_HOST = 6
    DATA = 7


def generator(*keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator determined by the keys (non-negative integers) and by nothing else."""
    seed = int(np.random.SeedSequence((len(keys), *keys)).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


def seed_dropout(seed: int, step: int, first_row: int) -> None:
    """Seed PyTorch's global generators, which dropout reads, for these rows of a batch."""
    torch.manual_seed(generator(seed, 3, step, first_row).initial_seed())  # four keys: no `Stream`'s


def put(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on the device; a GPU is not waited for."""
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def fill_rows(rows: Tensor, generators: Sequence[torch.Generator], threads: bool) -> None:
    """Standard normal numbers into each row (N, ...) from its own generator, by several threads if so asked."""

    def fill(row: Tensor, g: torch.Generator) -> None:
        with torch.inference_mode():  # which threads do not inherit
            row.normal_(generator=g)

    if threads:
        with ThreadPoolExecutor() as pool:
            list(pool.map(fill, rows, generators))
        return
    for row, g in zip(rows, generators, strict=True):
        fill(row, g)


class ImageNoise:
    """Random numbers of a batch of images, one CPU generator per image.

    Args:
        seed: of the run. indices: which images of it, one per batch row. device: where draws are put.
    """

    def __init__(self, seed: int, indices: list[int], device: torch.device | str = "cpu"):
        self.generators = [generator(seed, index) for index in indices]
        self.device = device

    def randn(self, *shape: int) -> Tensor:
        """Standard normal (B, *shape)."""
        on_gpu = torch.device(self.device).type == "cuda"
        draws = torch.empty(len(self.generators), *shape, pin_memory=on_gpu)
        fill_rows(draws, self.generators, threads=on_gpu and draws.numel() >= THREADED)
        return draws.to(self.device, non_blocking=True)

    def permutation(self, length: int) -> Tensor:
        """A random permutation for each image, (B, length)."""
        return put(torch.stack([torch.randperm(length, generator=g) for g in self.generators]), self.device)
