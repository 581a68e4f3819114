"""Frechet distances against plain formulas, streaming statistics, references, and what is measured."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from marval.data import load_dataset, save_png
from marval.evaluate import (
    Moments,
    Statistics,
    class_accuracy,
    evaluate,
    evaluate_folder,
    frechet_distance,
    head_evaluations_per_token,
    image_moments,
    reference_moments,
    sample_in_turn,
    seconds_per_image,
)
from marval.models.classifier import Classifier
from marval.pipeline import Pipeline
from marval.tokenizers import to_float


def random_moments(seed: int, dim: int = 6) -> Moments:
    g = np.random.default_rng(seed)
    root = g.normal(size=(dim, dim))
    return Moments(g.normal(size=dim), root @ root.T + 0.1 * np.eye(dim))


def test_distance_of_diagonal_gaussians():
    """sum (mu_a - mu_b)^2 + (s_a - s_b)^2."""
    g = np.random.default_rng(0)
    mu, s = g.normal(size=(2, 8)), g.uniform(0.1, 2, size=(2, 8))
    expected = np.square(mu[0] - mu[1]).sum() + np.square(s[0] - s[1]).sum()
    moments = [Moments(mu[i], np.diag(s[i] ** 2)) for i in range(2)]
    assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_distance_as_written_in_the_paper(seed: int):
    """With the root of the product itself, a matrix that is not symmetric, from its eigenvalues."""
    a, b = random_moments(seed), random_moments(seed + 100)
    values, vectors = np.linalg.eig(a.sigma @ b.sigma)
    root = (vectors * np.sqrt(values.astype(complex))) @ np.linalg.inv(vectors)
    np.testing.assert_allclose(root @ root, a.sigma @ b.sigma, rtol=1e-8)
    expected = np.square(a.mu - b.mu).sum() + np.trace(a.sigma + b.sigma - 2 * root).real
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_distance_of_singular_covariances():
    """Fewer images than features: rank 1 against rank 1, along one direction u."""
    u = np.array([0.6, 0.8, 0.0])
    a, b = (Moments(np.zeros(3), variance * np.outer(u, u)) for variance in (4.0, 9.0))
    assert frechet_distance(a, b) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match="statistics of 3 features cannot be compared with 6: use one network"):
        frechet_distance(a, random_moments(0))


@pytest.mark.parametrize("batch", [1, 7, 50, 100])
def test_streaming_statistics(batch: int):
    x = torch.from_numpy(np.random.default_rng(0).normal(3, 2, size=(50, 5)))
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
    with pytest.raises(ValueError, match="at least 2 images, got 0"):
        image_moments(np.zeros((0, 8, 8, 1), np.uint8), Classifier.load(tiny.classifier()))


def test_references_agree(tmp_path: Path):
    """The training digits by name, as a folder, as an .npz of images and as an .npz of statistics."""
    network, data = Classifier.load(tiny.classifier()), load_dataset("digits", "train")
    by_name = reference_moments("digits", network)
    assert by_name.count == len(data)
    expected = network.features(to_float(torch.from_numpy(data.images))).detach().double().numpy()
    np.testing.assert_allclose(by_name.mu, expected.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(image_moments(data.images, network, batch=100).sigma, by_name.sigma, atol=1e-4)

    np.savez(tmp_path / "images.npz", images=data.images)
    np.savez(tmp_path / "statistics.npz", mu=by_name.mu.astype(np.float32), sigma=by_name.sigma)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(data.images[:200]):
        save_png(tmp_path / "folder" / f"{i:04d}.png", image)
    for name in ("images.npz", "statistics.npz"):
        moments = reference_moments(str(tmp_path / name), network)
        np.testing.assert_allclose(moments.mu, by_name.mu, rtol=1e-6)
        np.testing.assert_allclose(moments.sigma, by_name.sigma, rtol=1e-6, atol=1e-9)
    moments, first = reference_moments(str(tmp_path / "folder"), network), image_moments(data.images[:200], network)
    np.testing.assert_allclose(moments.sigma, first.sigma, rtol=1e-6, atol=1e-9)


def test_accuracy():
    network, data = Classifier.load(tiny.classifier()), load_dataset("digits", "test")
    accuracy, log_prob = class_accuracy(data.images, data.labels, network, batch=100)
    logits = network(to_float(torch.from_numpy(data.images))).detach()
    labels = torch.from_numpy(data.labels)
    assert accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert log_prob == pytest.approx(-float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)


def test_images_in_turn_do_not_depend_on_the_batch():
    model = Pipeline.load(tiny.student())
    images, labels = sample_in_turn(model, ["7", 2, None], 8, seed=3)
    assert labels.tolist() == [7, 2, 10, 7, 2, 10, 7, 2]
    again, _ = sample_in_turn(model, ["7", 2, None], 8, seed=3, batch_size=3)
    assert np.array_equal(images, again)
    assert np.array_equal(images, model.sample([7, 2, None], num_images=8, seed=3))


def test_results_and_their_protocol(tmp_path: Path):
    evaluate_folder(
        tiny.student(), "digits", tmp_path / "a" / "out.json", 40, tiny.classifier(), 5, "cpu", {"ar_steps": 2}
    )
    results = json.loads((tmp_path / "a" / "out.json").read_text())
    network, model = Classifier.load(tiny.classifier()), Pipeline.load(tiny.student())
    images, labels = sample_in_turn(model, range(10), 40, seed=5, ar_steps=2)
    moments = image_moments(images, network)
    assert results["fid"] == pytest.approx(frechet_distance(reference_moments("digits", network), moments))
    assert results["accuracy"] == class_accuracy(images, labels, network)[0]
    protocol = results["protocol"]
    assert (protocol["num_images"], protocol["seed"], protocol["ar_steps"], protocol["head_steps"]) == (40, 5, 2, 1)
    assert protocol["reference_images"] == 1437
    assert "conv classifier" in protocol["features"]
    assert {"torch", "marval", "platform"} <= results["versions"].keys()
    teacher = evaluate(Pipeline.load(tiny.teacher()), "digits", network, 10)
    assert (teacher["protocol"]["kind"], teacher["protocol"]["head_steps"]) == ("teacher", 10)


def test_evaluations_of_the_head():
    teacher, student = Pipeline.load(tiny.teacher()), Pipeline.load(tiny.student())
    assert head_evaluations_per_token(teacher) == 20  # ten steps, twice for guidance
    assert head_evaluations_per_token(student) == 1
    assert seconds_per_image({"student": student, "teacher": teacher}, 4, repeats=2).keys() == {"student", "teacher"}
