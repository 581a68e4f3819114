"""Explicit randomness. Nothing in marval reads the global generators but dropout, which knows no other.

Sampling: image i of seed s has a generator of its own, so the same image comes out of any batch size, process count
or order of work. Training: step n of a run has a generator of its own, from which every process draws the numbers of
the whole batch and keeps its share, so neither a resume nor the number of processes changes them.
"""

import numpy as np
import torch
from torch import Tensor


def generator(*keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator determined by the keys (non-negative integers) and by nothing else."""
    seed = int(np.random.SeedSequence((len(keys), *keys)).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


def seed_dropout(*keys: int) -> None:
    """Seed PyTorch's global generators, which dropout reads, from keys such as (seed, use, step, first row)."""
    torch.manual_seed(generator(*keys).initial_seed())


def put(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on the device; a GPU is not waited for."""
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


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
        return put(torch.stack([torch.randn(shape, generator=g) for g in self.generators]), self.device)

    def permutation(self, length: int) -> Tensor:
        """A random permutation for each image, (B, length)."""
        return put(torch.stack([torch.randperm(length, generator=g) for g in self.generators]), self.device)
