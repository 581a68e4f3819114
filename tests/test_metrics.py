"""Every metric against a plain numpy reference or a closed form, and independent of how the work is cut."""

import numpy as np
import pytest
import torch

from marval.metrics import (
    Moments,
    Statistics,
    energy_distance,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_interval,
    precision_recall,
)
from marval.rng import generator


def random_moments(seed: int, dim: int = 6) -> Moments:
    g = np.random.default_rng(seed)
    root = g.normal(size=(dim, dim))
    return Moments(g.normal(size=dim), root @ root.T + 0.1 * np.eye(dim))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_distance_of_diagonal_gaussians():
    """sum (mu_a - mu_b)^2 + (s_a - s_b)^2."""
    g = np.random.default_rng(0)
    mu, s = g.normal(size=(2, 8)), g.uniform(0.1, 2, size=(2, 8))
    expected = np.square(mu[0] - mu[1]).sum() + np.square(s[0] - s[1]).sum()
    a, b = (Moments(m, np.diag(d**2)) for m, d in zip(mu, s, strict=True))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_distance_against_the_eigenvalues_of_the_product():
    """The plain form: Tr (S_a S_b)^(1/2) is the sum of the roots of the eigenvalues of S_a S_b, real and positive."""
    a, b = random_moments(1), random_moments(2)
    root = np.sqrt(np.linalg.eigvals(a.sigma @ b.sigma).astype(complex)).real.sum()
    plain = np.square(a.mu - b.mu).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(plain, rel=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert abs(frechet_distance(a, a)) < 1e-10


def test_distance_with_fewer_images_than_features():
    """Rank-deficient covariances: finite, and zero to itself."""
    x, y = normal(0, 5, 20), normal(1, 7, 20)
    a, b = (Moments(z.numpy().mean(0), np.cov(z.numpy().T), len(z)) for z in (x, y))
    assert abs(frechet_distance(a, a)) < 1e-6
    root = np.sqrt(np.linalg.eigvals(a.sigma @ b.sigma).astype(complex)).real.sum()
    plain = np.square(a.mu - b.mu).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(plain, rel=1e-6)


def test_refused_distance():
    with pytest.raises(ValueError, match="6 features cannot be compared with 5"):
        frechet_distance(random_moments(1), random_moments(2, dim=5))


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_streaming_statistics(batch: int):
    x = 2 * normal(0, 50, 5) + 3
    stats = Statistics(5)
    for part in x.split(batch):
        stats.add(part)
    moments = stats.moments()
    np.testing.assert_allclose(moments.mu, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.sigma, np.cov(x.numpy().T), rtol=1e-10, atol=1e-12)
    assert moments.count == 50


def test_one_image_is_too_few():
    stats = Statistics(2)
    stats.add(torch.ones(1, 2))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        stats.moments()


def test_inception_score():
    """exp of the mean KL divergence to each split's mean, by loops; 1 for equal images, C for sure and even ones."""
    logits = normal(0, 57, 6).float()
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    scores = []
    for i in range(10):
        part = p[i * 57 // 10 : (i + 1) * 57 // 10]
        scores.append(np.exp(np.mean([(row * np.log(row / part.mean(0))).sum() for row in part])))
    assert inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-10)
    assert inception_score(torch.ones(40, 5)) == pytest.approx((1, 0), abs=1e-12)
    assert inception_score(200 * torch.eye(5).repeat(20, 1), splits=4) == pytest.approx((5, 0), abs=1e-9)
    assert inception_score(2000 * torch.eye(5).repeat(20, 1), splits=4) == pytest.approx((5, 0), abs=1e-9)
    with pytest.raises(ValueError, match="at least as many images, got 9"):
        inception_score(logits[:9])


def plain_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimator by loops over pairs."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / len(a) + 1) ** 3

    pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
    within = sum(kernel(z[i], z[j]) for z in (x, y) for i, j in pairs) / len(pairs)
    return within - 2 * float(np.mean([[kernel(a, b) for b in y] for a in x]))


def test_kernel_distance():
    """All images in one subset: the order does not matter, so it is the plain estimator; smaller subsets are seeded."""
    x, y = normal(0, 12, 4), 1.3 * normal(1, 12, 4) + 0.5
    mean, std = kernel_distance(x, y, generator(0), subsets=3)
    assert mean == pytest.approx(plain_mmd(x.numpy(), y.numpy()), rel=1e-10)
    assert std < 1e-12
    draw = generator(7)
    values = []
    for _ in range(5):
        a, b = (z[torch.randperm(12, generator=draw)[:6]].numpy() for z in (x, y))
        values.append(plain_mmd(a, b))
    expected = (np.mean(values), np.std(values))
    assert kernel_distance(x, y, generator(7), subsets=5, subset_size=6) == pytest.approx(expected, rel=1e-10)
    mean, std = kernel_distance(normal(3, 4000, 4), normal(4, 4000, 4), generator(0))
    assert abs(mean) < 3 * std  # equal distributions
    with pytest.raises(ValueError, match="at least 2 images of each kind, got 1 and 12"):
        kernel_distance(x[:1], y, generator(0))


@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_precision_and_recall(chunk: int):
    """Balls by loops over sorted distances."""
    generated, real = normal(0, 40, 3), 1.5 * normal(1, 30, 3) + 1.5

    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        radii = [np.sort(np.linalg.norm(centres - c, axis=1))[3] for c in centres]
        return float(
            np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points])
        )

    a, b = generated.numpy(), real.numpy()
    assert precision_recall(generated, real, chunk=chunk) == (covered(a, b), covered(b, a))
    assert 0 < covered(a, b) < 1


def test_precision_and_recall_of_special_sets():
    x = normal(0, 20, 3)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    few = x[:10].repeat(4, 1)  # all real, but half of the reality is missing
    precision, recall = precision_recall(few + 1e-9, x)
    assert precision == 1
    assert recall < 1
    with pytest.raises(ValueError, match="more than 3 images, got 3 and 20"):
        precision_recall(x[:3], x)


def test_mean_and_its_interval():
    x = normal(0, 50)
    mean, half = mean_interval(x)
    assert mean == pytest.approx(x.numpy().mean())
    assert half == pytest.approx(1.96 * x.numpy().std(ddof=1) / 50**0.5)


def test_energy_distance():
    """Zero on average where both are drawn from one distribution; of points far apart twice their distance; and in one
    dimension twice the integral of the squared difference of the distribution functions."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4000, 64, 2, generator=g)
    distances, spreads, others = energy_distance(a, b)
    assert distances.shape == spreads.shape == (4000,)
    assert abs(distances.mean()) < 4 * distances.std() / 4000**0.5
    for mean in (spreads.mean(), others.mean()):
        assert float(mean) == pytest.approx(np.pi**0.5, rel=0.01)  # of two normal points of the plane
    far, spread, _ = energy_distance(torch.zeros(3, 5, 2), torch.full((3, 7, 2), 3.0))
    assert far.tolist() == pytest.approx([2 * 18**0.5] * 3)
    assert spread.tolist() == [0, 0, 0]

    x, y = torch.randn(3000, 1, generator=g), 1 + 2 * torch.randn(3000, 1, generator=g)
    grid = torch.linspace(-12, 12, 4801)
    cdfs = [(points <= grid).float().mean(0) for points in (x, y)]
    integral = 2 * ((cdfs[0] - cdfs[1]) ** 2).sum() * (grid[1] - grid[0])
    assert float(energy_distance(x, y)[0]) == pytest.approx(float(integral), rel=0.02)
    with pytest.raises(ValueError, match="needs 2 samples of each, got 3000 and 1"):
        energy_distance(x, y[:1])
