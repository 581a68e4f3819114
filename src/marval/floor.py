"""The least that drawing images can cost: operations and bytes of every AR step, and what a device needs for them.

Operations are those of the matrix products and of attention, a multiplication and its addition counted as two, of the
network as `marval.models` defines it: encoder and decoder in each AR step, but in the decoder's last block only the
rows of the tokens that are revealed, whose conditions alone are read; one head evaluation per denoising step. The tests
compare them with PyTorch's counter. Time embeddings (once per model) and the autoencoder are left out.

Bytes are what a device must move that keeps nothing from one matrix product to the next but fuses all else into them:

* weights: every matrix, bias and norm of a part once in each of its passes: encoder and decoder once per AR step, the
  head once per denoising step. Nothing stays in a cache from one pass to the next.
* activations: every matrix product reads its input and writes its output once; attention reads queries, keys and
  values and writes its output; a residual is read once more. Norms, modulations and nonlinearities move nothing.

The parts run one after the other, so the floor is the sum over AR steps and parts of the larger of operations over the
rate of matrix products and bytes over the bandwidth.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from marval import masking
from marval.config import MARConfig
from marval.models.cpu import use_onednn

PARTS = ("encoder", "decoder", "head")
H200 = (790e12, 4.3e12)
"""Operations per second of bf16 matrix products, and bytes per second; measured as 785 to 792 and 4.28 to 4.30
(docs/performance.md)."""


@dataclass(frozen=True)
class Load:
    """Of a part of the network."""

    operations: float = 0.0
    weights: float = 0.0
    """Bytes."""
    activations: float = 0.0
    """Bytes."""

    def __add__(self, other: "Load") -> "Load":
        mine, its = vars(self).values(), vars(other).values()
        return Load(*(a + b for a, b in zip(mine, its, strict=True)))

    @property
    def bytes(self) -> float:
        return self.weights + self.activations

    def seconds(self, rate: float, bandwidth: float = math.inf) -> float:
        return max(self.operations / rate, self.bytes / bandwidth)


Loads = Sequence[dict[str, Load]]
"""Of every AR step, by part."""


def _blocks(width: int, depth: int, rows: int, length: int, itemsize: int) -> Load:
    """Transformer blocks over ``rows`` sequences of ``length`` tokens."""
    tokens = rows * length
    return Load(
        depth * (24 * tokens * width**2 + 4 * tokens * length * width),
        depth * (12 * width**2 + 13 * width) * itemsize,
        depth * 22 * tokens * width * itemsize,
    )


def _last_block(width: int, rows: int, length: int, wanted: int, itemsize: int) -> Load:
    """A block that gives ``wanted`` of its ``length`` tokens: keys and values of all, the rest of those alone."""
    return Load(
        rows * (4 * length * width**2 + 20 * wanted * width**2 + 4 * wanted * length * width),
        (12 * width**2 + 13 * width) * itemsize,
        rows * (5 * length + 18 * wanted) * width * itemsize,
    )


def _linear(rows: int, inputs: int, outputs: int, itemsize: int) -> Load:
    return Load(2 * rows * inputs * outputs, (inputs + 1) * outputs * itemsize, rows * (inputs + outputs) * itemsize)


def ar_step(
    model: MARConfig, masked: int, masked_after: int, batch: int, head_steps: int, guided: bool, itemsize: int
) -> dict[str, Load]:
    """One AR step that reveals ``masked - masked_after`` tokens of each image."""
    width, wide, dim = model.width, model.head_width, model.token_dim
    rows, seen = batch * (1 + guided), model.num_tokens - masked
    inside, length = model.buffer_size + seen, model.buffer_size + model.num_tokens
    revealed = masked - masked_after
    tokens = rows * revealed
    norms = Load(weights=2 * width * itemsize)
    encoder = _linear(rows * seen, dim, width, itemsize) + _blocks(width, model.depth, rows, inside, itemsize)
    decoder = _linear(rows * inside, width, width, itemsize) + _blocks(width, model.depth - 1, rows, length, itemsize)
    decoder += _last_block(width, rows, length, revealed, itemsize)
    block = Load(10 * tokens * wide**2, (5 * wide**2 + 7 * wide) * itemsize, 9 * tokens * wide * itemsize)
    layers = [_linear(tokens, dim, wide, itemsize), *[block] * model.head_depth]
    layers += [_linear(tokens, wide, 2 * wide, itemsize), _linear(tokens, wide, 2 * dim, itemsize)]
    once = sum(layers, Load())
    head = _linear(tokens, width, wide, itemsize) + Load(*(head_steps * value for value in vars(once).values()))
    return {"encoder": encoder + norms + norms, "decoder": decoder + norms, "head": head}


def sampling_loads(
    model: MARConfig, ar_steps: int, batch: int, *, head_steps: int = 1, guided: bool = False, itemsize: int = 4
) -> list[dict[str, Load]]:
    """Every AR step of a batch of images.

    Args:
        head_steps: denoising steps of a teacher; evaluations of a student, mostly 1.
        guided: two passes, with and without the class, as a guided teacher needs.
        itemsize: bytes of a number: 4 in float32, 2 in bf16.
    """
    counts = masking.masked_counts(model.num_tokens, ar_steps)
    return [ar_step(model, *pair, batch, head_steps, guided, itemsize) for pair in pairwise(counts)]


def by_part(loads: Loads) -> dict[str, Load]:
    """Sum over the AR steps."""
    return {part: sum((step[part] for step in loads), Load()) for part in PARTS}


def floor_seconds(loads: Loads, rate: float, bandwidth: float = math.inf) -> dict[str, float]:
    """Seconds by part, and their total. Without a bandwidth: operations over the rate."""
    parts = {part: sum(step[part].seconds(rate, bandwidth) for step in loads) for part in PARTS}
    return parts | {"total": sum(parts.values())}


# ---- what a device reaches


def _per_second(work: Callable[[], object], amount: float, device: torch.device, seconds: float) -> float:
    """``amount`` per call, in the best of the calls that fit into so many seconds: others may use the machine too."""
    best, end = math.inf, time.perf_counter() + seconds
    work()
    while time.perf_counter() < end or best == math.inf:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(8):
            work()
        synchronise(device)
        best = min(best, (time.perf_counter() - start) / 8)
    return amount / best


def synchronise(device: torch.device) -> None:
    """Wait for all that a GPU was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Operations per second of products of large random matrices (constant ones would heat a GPU less).

    On a CPU in float32 the better of PyTorch's product and of oneDNN's with packed weights (`marval.models.cpu`).
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    works: list[Callable[[], object]] = [lambda: torch.mm(a, b, out=out)]
    if device.type == "cpu" and dtype == torch.float32:
        layer = nn.Linear(size, size, bias=False).requires_grad_(False)
        use_onednn(layer, pack=True)
        works.append(lambda: layer(a))
    with torch.inference_mode():
        return max(_per_second(work, 2 * size**3, device, seconds / len(works)) for work in works)


def bandwidth(device: torch.device, seconds: float = 0.5) -> float:
    """Bytes per second, read and written, of copies much larger than any cache."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return _per_second(lambda: target.copy_(source), 2 * source.nbytes, device, seconds)
