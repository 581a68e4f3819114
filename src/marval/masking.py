"""Which tokens are hidden, and when each is revealed: orders, the unmasking schedule, training mask ratios.

An order is a permutation of the L token positions (row-major over the grid) in the order in which they are REVEALED:
``orders[b, 0]`` is drawn first. (The reference MAR stores the reverse: its masked tokens are the first entries.)
"""

import functools
import itertools
import math

import torch
from torch import Tensor


def raster_order(length: int) -> Tensor:
    """(L,) row by row."""
    return torch.arange(length)


def centre_out_order(grid: int) -> Tensor:
    """(grid * grid,) from the centre of the image outwards; equal distances in raster order."""
    axis = torch.arange(grid) - (grid - 1) / 2
    return torch.argsort((axis[:, None] ** 2 + axis[None, :] ** 2).flatten(), stable=True)


@functools.cache
def halton_order(grid: int) -> Tensor:
    """(grid * grid,) spread evenly: each token far from those before it, so that tokens drawn together depend little on
    each other (the Halton sequence in bases 2 and 3, as Besnier et al. 2025, arXiv 2503.17076, order MaskGIT's tokens).
    """

    def radical_inverse(i: int, base: int) -> float:
        value, scale = 0.0, 1.0 / base
        while i:
            i, digit = divmod(i, base)
            value, scale = value + digit * scale, scale / base
        return value

    seen: dict[int, None] = {}
    i = 0
    while len(seen) < grid * grid:
        i += 1
        seen.setdefault(int(radical_inverse(i, 2) * grid) * grid + int(radical_inverse(i, 3) * grid))
    return torch.tensor(list(seen))


def shifted(order: Tensor, grid: int, shift: Tensor) -> Tensor:
    """An order (L,) moved cyclically on the token grid, for each image by another of the L shifts (B,) -> (B, L)."""
    rows = (order // grid + shift[:, None] // grid) % grid
    columns = (order % grid + shift[:, None] % grid) % grid
    return rows * grid + columns


def check_order(order: Tensor, length: int) -> Tensor:
    """The order as int64.

    Raises:
        ValueError: a row of the (L,) or (B, L) tensor is not a permutation of 0 .. L-1.
    """
    if order.ndim not in (1, 2) or order.is_floating_point():
        raise ValueError(f"an order must be integers of shape (L,) or (B, L), got {order.dtype} {tuple(order.shape)}")
    order = order.long()
    if order.shape[-1] != length:
        raise ValueError(f"an order must list all {length} token positions, got {order.shape[-1]}")
    for row in order.reshape(-1, length):
        if not torch.equal(row.sort().values, torch.arange(length, device=row.device)):
            counts = torch.bincount(row[(row >= 0) & (row < length)], minlength=length)
            wrong = int((counts != 1).nonzero()[0])
            raise ValueError(
                f"an order must be a permutation of 0..{length - 1}: position {wrong} occurs {int(counts[wrong])} times"
            )
    return order


def masked_counts(length: int, ar_steps: int) -> list[int]:
    """Number of masked tokens before each AR step and after the last: K + 1 entries from L down to 0.

    After step k of K it is floor(L cos(pi/2 (k+1)/K)), but at least 1 before the last step and at least one token
    fewer than before (MaskGIT's cosine schedule as MAR uses it).

    Raises:
        ValueError: ``ar_steps`` is not in [1, length].
    """
    if not 1 <= ar_steps <= length:
        raise ValueError(f"the number of AR steps must be in [1, {length}] for {length} tokens, got {ar_steps}")
    counts = [length]
    for k in range(1, ar_steps):
        counts.append(max(1, min(counts[-1] - 1, math.floor(length * math.cos(math.pi / 2 * k / ar_steps)))))
    return [*counts, 0]


def sorted_within_steps(orders: Tensor, counts: list[int]) -> Tensor:
    """Orders (B, L) with the tokens of each AR step, and those known before the first, ascending: one sort for all.

    Args:
        counts: masked tokens before each AR step and after the last.
    """
    length = orders.shape[1]
    sizes = torch.tensor([length - counts[0], *(a - b for a, b in itertools.pairwise(counts)), counts[-1]])
    step = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(orders.device)
    return (step * length + orders).sort(dim=1).values % length


def linear_guidance(w: float | Tensor, masked_after: int, length: int) -> float | Tensor:
    """Muse's schedule as MAR uses it: 1 + (w - 1) (L - masked) / L, with at least one token counted as masked."""
    return 1 + (w - 1) * (length - max(1, masked_after)) / length


def training_masked_count(length: int, uniform: float, minimum: float = 0.7) -> int:
    """Number of masked tokens for training: ceil(L r), r ~ normal(1, 0.25) truncated to [minimum, 1].

    Args:
        uniform: a draw of U[0, 1), turned into r by the inverse CDF.
    """

    def cdf(x: float) -> float:
        return 0.5 * (1 + math.erf(x / math.sqrt(2)))

    low = cdf((minimum - 1) / 0.25)
    quantile = torch.tensor(low + uniform * (0.5 - low), dtype=torch.float64)
    ratio = 1 + 0.25 * float(torch.special.ndtri(quantile))
    return max(1, min(length, math.ceil(length * ratio)))


def masked_count(ratios: str, length: int, ar_steps: int, uniform: float) -> int:
    """Number of masked tokens of an update. ``ratios``: ``training``, ``inference`` or ``tokens``."""
    if ratios == "training":
        return training_masked_count(length, uniform)
    return (token_masked_count if ratios == "tokens" else inference_masked_count)(length, ar_steps, uniform)


def inference_masked_count(length: int, ar_steps: int, uniform: float) -> int:
    """Number of masked tokens that a uniformly drawn one of the K AR steps of inference sees. ``uniform``: U[0, 1)."""
    return masked_counts(length, ar_steps)[int(uniform * ar_steps)]


def token_masked_count(length: int, ar_steps: int, uniform: float) -> int:
    """Number of masked tokens that the AR step sees which draws a token chosen uniformly: steps count by how many
    tokens they draw. ``uniform``: U[0, 1)."""
    left = length - int(uniform * length)  # masked tokens before this one, and itself
    return min(count for count in masked_counts(length, ar_steps) if count >= left)


def random_masks(count: int, length: int, num_masked: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random positions, different for each image: visible (B, V), ascending, and masked (B, num_masked)."""
    orders = torch.rand(count, length, generator=generator, device=generator.device).argsort(dim=1)
    return orders[:, num_masked:].sort(dim=1).values, orders[:, :num_masked]
