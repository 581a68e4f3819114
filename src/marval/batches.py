"""Batches for training: which images an update sees, shifted and mirrored, as tokens, and read ahead."""

import functools
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from marval.data import ImageDataset
from marval.latents import LatentDataset
from marval.rng import generator, put
from marval.tokenizers import PixelTokenizer, Tokenizer, to_float

Read = TypeVar("Read")
_ORDER_KEY = 0xDA7A  # sets the stream of epoch orders apart from every other use of (seed, n)


@functools.lru_cache(maxsize=2)
def _epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    return torch.randperm(num_images, generator=generator(seed, epoch, _ORDER_KEY)).numpy()


def batch_indices(num_images: int, batch: int, step: int, seed: int) -> np.ndarray:
    """Numbers of the images of update ``step``, int64 (batch,): a window on an endless stream of permuted epochs.

    A pure function: each epoch visits every image once, batches may span epochs, and a resume needs no state.

    Raises:
        ValueError: no images, an empty batch, or a negative step or seed.
    """
    if num_images < 1 or batch < 1 or step < 0 or seed < 0:
        raise ValueError(f"no batch of {batch} out of {num_images} images at step {step} with seed {seed}")
    epochs, places = np.divmod(np.arange(step * batch, (step + 1) * batch), num_images)
    parts = [_epoch_order(num_images, seed, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
    return np.concatenate(parts)


def random_shift(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Translate each image (NCHW) by -shift .. shift whole pixels in y and x; borders are replicated."""
    return _translate(images, _offsets(len(images), shift, generator))


def _offsets(count: int, shift: int, generator: torch.Generator) -> Tensor:
    """Random translations from -shift to shift in y and in x for each image, (2, B, 1)."""
    return torch.randint(-shift, shift + 1, (2, count, 1), generator=generator, device=generator.device)


def _translate(images: Tensor, offsets: Tensor) -> Tensor:
    batch, channels, height, width = images.shape
    dy, dx = offsets.to(images.device)
    rows = (torch.arange(height, device=images.device) + dy).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) + dx).clamp(0, width - 1)
    n = torch.arange(batch, device=images.device)[:, None, None, None]
    c = torch.arange(channels, device=images.device)[:, None, None]
    return images[n, c, rows[:, None, :, None], columns[:, None, None, :]]


@torch.no_grad()
def batch_tokens(
    data: ImageDataset | LatentDataset, tokenizer: Tokenizer, index: np.ndarray, rows: slice,
    generator: torch.Generator, shift: int = 0, flip: bool = False,
) -> Tensor:  # fmt: skip
    """Tokens (B', L, D), on the generator's device, of the images ``index[rows]``; latents are posterior samples.

    Every random number is drawn for the whole batch and cut to ``rows``, so that the number of processes changes
    nothing. Only ``index[rows]`` is read.

    Args:
        data: images, or latents that this tokenizer's autoencoder made. tokenizer: on the generator's device.
        index: int (B,), the whole batch, see `batch_indices`. rows: this process's part of it.
        shift: largest translation in pixels, see `random_shift`. flip: mirror each image with probability 1/2.

    Raises:
        ValueError: latents are to be shifted, or meet a tokenizer of pixels.
    """
    count, device = len(index), generator.device
    own = index[rows]
    mirrored = torch.zeros(count, dtype=torch.bool)
    if flip:
        mirrored = torch.rand(count, generator=generator, device=device) < 0.5
    mirrored = mirrored[rows]
    if isinstance(data, LatentDataset):
        if shift or isinstance(tokenizer, PixelTokenizer):
            remedy = "they cannot be shifted: set shift to 0" if shift else "give their tokenizer, not pixels"
            raise ValueError(f"{data.source}, are latents: {remedy}")
        moments = put(data.moments(own, mirrored.cpu().numpy()), device)
    else:
        images = to_float(put(torch.from_numpy(data.images[own]), device))
        if shift:
            images = _translate(images, _offsets(count, shift, generator)[:, rows])
        if flip:
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        if isinstance(tokenizer, PixelTokenizer):
            return tokenizer.encode(images)
        moments = tokenizer.moments(images.expand(-1, tokenizer.image_channels, -1, -1))
    shape = (count, moments.shape[1] // 2, *moments.shape[2:])
    noise = torch.randn(shape, generator=generator, device=device)[rows]
    return tokenizer.tokens(moments, noise)


def prefetch(read: Callable[[int], Read], steps: Iterable[int]) -> Generator[Read, None, None]:
    """Yield ``read(step)`` of each step in turn; a background thread reads the next one in the meantime.

    ``steps`` is asked for one step more than was handed out. An error of ``read`` is raised in its turn. Closing the
    iterator waits for the read under way and starts no other. Thread-local modes of PyTorch (no_grad, autocast) are
    those of a fresh thread.
    """
    thread = ThreadPoolExecutor(1, "marval-prefetch")
    try:
        coming = None
        for step in steps:
            ready, coming = coming, thread.submit(read, step)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()
    finally:
        thread.shutdown(cancel_futures=True)
