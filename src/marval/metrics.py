"""How far generated images are from real ones, and how good they look to a network: one function, one formula.

Everything is computed in float64 from features that a network (`marval.features`) took of the images. The numbers of
two networks cannot be compared with each other: a value means nothing without the name of its features.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Moments:
    """Mean (F,) and covariance (F, F) of features, float64, with the number of images (0 if unknown)."""

    mu: np.ndarray
    sigma: np.ndarray
    count: int = 0

    @functools.cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root of the covariance: a reference is compared many times."""
        values, vectors = np.linalg.eigh(self.sigma)
        return vectors * np.sqrt(values.clip(min=0)) @ vectors.T


class Statistics:
    """Streaming float64 mean and covariance, independent of how the images are batched."""

    def __init__(self, dim: int):
        self.count, self.total, self.products = 0, np.zeros(dim), np.zeros((dim, dim))

    def add(self, features: Tensor) -> None:
        """Features (B, F)."""
        x = features.detach().double().cpu().numpy()
        self.count += len(x)
        self.total += x.sum(0)
        self.products += x.T @ x

    def moments(self) -> Moments:
        """Unbiased, as np.cov.

        Raises:
            ValueError: fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f"a Frechet distance needs at least 2 images, got {self.count}")
        mu = self.total / self.count
        sigma = (self.products - self.count * np.outer(mu, mu)) / (self.count - 1)
        return Moments(mu, sigma, self.count)


def moments_of(features: Tensor) -> Moments:
    """Of features (N, F) in one piece; ValueError if N < 2."""
    statistics = Statistics(features.shape[1])
    statistics.add(features)
    return statistics.moments()


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    Over pooled features of Inception this is FID; over a spatial map of features, sFID (Nash et al. 2021,
    arXiv 2103.03841). The trace of the root is that of (S_a^(1/2) S_b S_a^(1/2))^(1/2), a symmetric matrix, so
    eigenvalues do.

    Raises:
        ValueError: the two have different numbers of features.
    """
    if a.mu.shape != b.mu.shape:
        raise ValueError(f"statistics of {len(a.mu)} features cannot be compared with {len(b.mu)}: use one network")
    product_root = np.sqrt(np.linalg.eigvalsh(a.root @ b.sigma @ a.root).clip(min=0))
    difference = a.mu - b.mu
    return float(difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * product_root.sum())


def energy_distance(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Energy distance 2 E|a - b| - E|a - a'| - E|b - b'| (Szekely and Rizzo 2013), E|a - a'| and E|b - b'|.

    Zero where the distributions are the same; unbiased, so estimates may be negative. It needs no network, so it suits
    few samples of low dimension: tokens that are drawn many times in the same context.

    Args:
        a, b: (..., N, D) and (..., M, D) samples of each pair of distributions.

    Returns:
        The distances (...), and the mean distances (...) of two samples of each, to which they can be compared.

    Raises:
        ValueError: fewer than two samples.
    """
    if min(a.shape[-2], b.shape[-2]) < 2:
        raise ValueError(f"an energy distance needs 2 samples of each, got {a.shape[-2]} and {b.shape[-2]}")

    def total(x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").sum((-2, -1))

    n, m = a.shape[-2], b.shape[-2]
    within_a, within_b = total(a, a) / (n * (n - 1)), total(b, b) / (m * (m - 1))
    return 2 * total(a, b) / (n * m) - within_a - within_b, within_a, within_b


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp(E_x KL(p(y|x) | p(y))), mean and standard deviation over splits (Salimans et al. 2016, arXiv 1606.03498).

    Split i holds images i N / splits to (i + 1) N / splits by index: ADM's convention, with its 5,000 images per split
    at N = 50,000. torch-fidelity has the same splits after a fixed shuffle, which matters only if classes are sorted;
    images in turn are not. Both take Inception's logits without their bias.

    Args:
        logits: (N, C), one row per image.

    Raises:
        ValueError: fewer images than splits.
    """
    count = len(logits)
    if count < splits:
        raise ValueError(f"an Inception Score of {splits} splits needs at least as many images, got {count}")
    scores = []
    for i in range(splits):
        log_p = logits[i * count // splits : (i + 1) * count // splits].double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(log_p))  # finite where all probabilities underflow
        scores.append(float((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    x: Tensor, y: Tensor, generator: torch.Generator, subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """KID (Binkowski et al. 2018, arXiv 1801.01401): unbiased squared MMD under (<a, b> / F + 1)^3.

    Args:
        x, y: features (N, F) and (M, F) on one device. generator: of the subsets, on the CPU.
        subsets: how many random subsets of each are compared, each of ``subset_size`` images, or of all if fewer.

    Returns:
        Mean and standard deviation over the subsets; the mean of equal distributions is 0 and may come out negative.

    Raises:
        ValueError: fewer than two images.
    """
    size = min(subset_size, len(x), len(y))
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 images of each kind, got {len(x)} and {len(y)}")
    values = []
    for _ in range(subsets):
        a, b = (z[torch.randperm(len(z), generator=generator)[:size].to(z.device)].double() for z in (x, y))
        k_aa, k_bb, k_ab = ((u @ v.T / x.shape[1] + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        within = (k_aa.sum() - k_aa.trace() + k_bb.sum() - k_bb.trace()) / (size * (size - 1))
        values.append(float(within - 2 * k_ab.mean()))
    return float(np.mean(values)), float(np.std(values))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(A, F) and (B, F) -> (A, B), not negative."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def _radii(features: Tensor, k: int, chunk: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row."""
    nearest = [
        _squared_distances(part, features).topk(k + 1, dim=1, largest=False).values for part in features.split(chunk)
    ]
    return torch.cat(nearest)[:, k]


def precision_recall(generated: Tensor, real: Tensor, k: int = 3, chunk: int = 500) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2).

    Precision: share of the generated images that lie in a ball around a real one which reaches to that one's k-th
    nearest real neighbour. Recall: the same with the parts exchanged. Both grow with the number of images that span
    the balls, so compare at equal counts.

    Args:
        generated, real: features (N, F) and (M, F) on one device.
        chunk: rows whose distances are held at a time, (chunk, max(N, M)) float64; the result is the same.

    Raises:
        ValueError: not more than k images of one kind.
    """
    if min(len(generated), len(real)) <= k:
        raise ValueError(f"precision and recall need more than {k} images, got {len(generated)} and {len(real)}")
    generated, real = generated.double(), real.double()
    real_radii, radii = _radii(real, k, chunk), _radii(generated, k, chunk)
    precise, recalled = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part, part_radii in zip(generated.split(chunk), radii.split(chunk), strict=True):
        distances = _squared_distances(part, real)
        precise += int((distances <= real_radii).any(1).sum())
        recalled |= (distances <= part_radii[:, None]).any(0)
    return precise / len(generated), float(recalled.double().mean())


def mean_interval(values: Tensor) -> tuple[float, float]:
    """Mean of independent values (N,), and half the width of its 95 % interval, 1.96 s / sqrt(N)."""
    x = values.double()
    return float(x.mean()), float(1.96 * x.std(correction=1) / len(x) ** 0.5)
