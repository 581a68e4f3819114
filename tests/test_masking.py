import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marval import masking
from marval.rng import ImageNoise

LENGTHS = (16, 49, 256)


@pytest.mark.parametrize("length", LENGTHS)
def test_masked_counts(length):
    for num_steps in range(1, length + 1):
        counts = masking.masked_counts(length, num_steps)
        assert len(counts) == num_steps + 1
        assert (counts[0], counts[-1]) == (length, 0)
        assert all(before > after for before, after in itertools.pairwise(counts))
        for k, after in enumerate(counts[1:-1], start=1):
            cosine = math.floor(length * math.cos(math.pi / 2 * k / num_steps))
            assert after == max(1, min(counts[k - 1] - 1, cosine))


def test_masked_counts_by_hand():
    assert masking.masked_counts(16, 1) == [16, 0]
    assert masking.masked_counts(16, 6) == [16, 15, 13, 11, 8, 4, 0]
    assert masking.masked_counts(16, 16) == list(range(16, -1, -1))


@pytest.mark.parametrize("num_steps", [-1, 0, 17])
def test_masked_counts_errors(num_steps):
    with pytest.raises(ValueError, match=rf"\[1, 16\] for 16 tokens, got {num_steps}"):
        masking.masked_counts(16, num_steps)


def test_linear_guidance():
    assert masking.linear_guidance(3.0, 16, 16) == 1
    assert masking.linear_guidance(3.0, 8, 16) == 2
    assert masking.linear_guidance(3.0, 0, 16) == masking.linear_guidance(3.0, 1, 16) == 1 + 2 * 15 / 16
    assert {masking.linear_guidance(1.0, m, 16) for m in range(17)} == {1.0}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("minimum", [0.7, 0.5])
def test_training_masked_count_is_a_truncated_normal(length, minimum):
    """Against the density exp(-(r - 1)^2 / (2 0.25^2)) on [minimum, 1], integrated numerically."""
    draws = np.array([masking.training_masked_count(length, (i + 0.5) / 2000, minimum) for i in range(2000)])
    r = minimum + (1 - minimum) * (np.arange(400_000) + 0.5) / 400_000
    density = np.exp(-0.5 * ((r - 1) / 0.25) ** 2)
    expected = np.bincount(np.ceil(length * r).astype(int), weights=density / density.sum(), minlength=length + 1)
    np.testing.assert_allclose(np.bincount(draws, minlength=length + 1) / 2000, expected, atol=1.1e-3)
    values = np.arange(length + 1)
    mean = (values * expected).sum()
    assert draws.mean() == pytest.approx(mean, abs=2e-3 * length)
    assert draws.std() == pytest.approx(np.sqrt(((values - mean) ** 2 * expected).sum()), rel=0.01)


def test_training_masked_count_range():
    assert masking.training_masked_count(256, 0.0) == math.ceil(256 * 0.7)
    assert masking.training_masked_count(256, 1 - 1e-16) == 256
    assert masking.training_masked_count(1, 0.0, minimum=0.0) == 1


@pytest.mark.parametrize(("length", "num_steps"), [(16, 1), (16, 6), (49, 16), (256, 64)])
def test_inference_masked_count(length, num_steps):
    """Every AR step is equally likely, and nothing but what a step of inference sees is drawn."""
    uniforms = [(i + j) / num_steps for i in range(num_steps) for j in (0.0, 0.5, 0.999)]
    drawn = [masking.inference_masked_count(length, num_steps, min(u, 1 - 2**-53)) for u in uniforms]
    assert set(drawn) == set(masking.masked_counts(length, num_steps)[:-1])
    assert drawn[1::3] == masking.masked_counts(length, num_steps)[:-1]


@pytest.mark.parametrize(("length", "num_steps"), [(16, 1), (16, 6), (49, 16), (256, 64)])
def test_token_masked_count(length, num_steps):
    """Every AR step is as likely as the share of the tokens that it draws."""
    counts = masking.masked_counts(length, num_steps)
    uniforms = [(i + j) / length for i in range(length) for j in (0.001, 0.5, 0.999)]
    drawn = Counter(masking.token_masked_count(length, num_steps, u) for u in uniforms)
    assert drawn == {before: 3 * (before - after) for before, after in itertools.pairwise(counts)}


@settings(deadline=None, max_examples=30)
@given(grid=st.integers(1, 16))
def test_orders_are_permutations(grid):
    length = grid * grid
    for order in (masking.halton_order(grid), masking.raster_order(length), masking.centre_out_order(grid)):
        assert order.sort().values.tolist() == list(range(length))
        assert torch.equal(masking.check_order(order, length), order)


def test_random_order_is_uniform_and_of_each_image():
    orders = ImageNoise(0, list(range(4800))).permutation(4)
    _, counts = orders.unique(dim=0, return_counts=True)
    assert len(counts) == 24
    assert float(counts.min()) > 140
    assert float(counts.max()) < 260
    assert torch.equal(orders[7:8], ImageNoise(0, [7]).permutation(4))


@pytest.mark.parametrize("grid", [4, 7, 16])
def test_centre_out(grid):
    order = masking.centre_out_order(grid)
    centre = [(grid - 1) // 2, grid // 2]
    first = sorted({row * grid + column for row in centre for column in centre})
    assert order[: len(first)].tolist() == first
    distance = (order // grid - (grid - 1) / 2) ** 2 + (order % grid - (grid - 1) / 2) ** 2
    assert bool((distance.diff() >= 0).all())
    ties = distance.diff() == 0
    assert bool((order.diff()[ties] > 0).all())


def test_check_order():
    assert masking.check_order(torch.tensor([2, 0, 1], dtype=torch.int32), 3).dtype == torch.int64
    assert masking.check_order(torch.tensor([[2, 0, 1], [0, 1, 2]]), 3).shape == (2, 3)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 2], "list all 4 token positions, got 3"),
        ([0, 1, 2, 3, 4], "list all 4 token positions, got 5"),
        ([0, 1, 1, 3], r"permutation of 0\.\.3: position 1 occurs 2 times"),
        ([1, 2, 3, 4], "permutation of 0..3: position 0 occurs 0 times"),
        ([-1, 1, 2, 3], "permutation of 0..3: position 0 occurs 0 times"),
        ([[0, 1, 2, 3], [3, 2, 1, 1]], "position 0 occurs 0 times"),
    ],
)
def test_check_order_errors(order, message):
    with pytest.raises(ValueError, match=message):
        masking.check_order(torch.tensor(order), 4)
