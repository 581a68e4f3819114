"""Measure a model: Frechet distance and accuracy over the features of a classifier, rewards, latency.

Every number is taken with the seeds, counts and settings that are written next to it. A Frechet distance here is over
the features of the named classifier, never over Inception's; compare it within one table only.
"""

import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from marval import masking
from marval.checkpoint import write_atomically, write_json
from marval.config import to_dict
from marval.data import image_grid, load_dataset, read_images, save_png
from marval.distributed import World, connect
from marval.models.classifier import Classifier
from marval.pipeline import Pipeline
from marval.run import new_folder, versions, writable_folder
from marval.tokenizers import to_float


@dataclass
class Moments:
    """Mean (F,) and covariance (F, F) of features, float64, with the number of images (0 if unknown)."""

    mu: np.ndarray
    sigma: np.ndarray
    count: int = 0


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


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, eq. 6).

    The trace of the root is that of (S_a^(1/2) S_b S_a^(1/2))^(1/2), a symmetric matrix, so eigenvalues do.

    Raises:
        ValueError: the two have different numbers of features.
    """
    if a.mu.shape != b.mu.shape:
        raise ValueError(f"statistics of {len(a.mu)} features cannot be compared with {len(b.mu)}: use one network")
    values, vectors = np.linalg.eigh(a.sigma)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    product_root = np.sqrt(np.linalg.eigvalsh(root @ b.sigma @ root).clip(min=0))
    difference = a.mu - b.mu
    return float(difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * product_root.sum())


@torch.no_grad()
def image_moments(images: np.ndarray, network: Classifier, batch: int = 512) -> Moments:
    """Moments of the network's features over uint8 NHWC images."""
    stats: Statistics | None = None
    for start in range(0, len(images), batch):
        features = network.features(to_float(torch.from_numpy(images[start : start + batch])))
        stats = stats or Statistics(features.shape[1])
        stats.add(features)
    if stats is None:
        raise ValueError("a Frechet distance needs at least 2 images, got 0")
    return stats.moments()


def reference_moments(reference: str, network: Classifier) -> Moments:
    """Moments of ``digits`` (training split), of a folder or .npz of images, or an .npz with ``mu`` and ``sigma``.

    Raises:
        ValueError: no such file, or neither images nor statistics in it.
    """
    if reference == "digits":
        return image_moments(load_dataset("digits", "train").images, network)
    path = Path(reference)
    if path.suffix == ".npz" and path.exists():
        try:
            with open(path, "rb") as opened, np.load(opened) as file:
                arrays = {name: file[name] for name in ("mu", "sigma") if name in file.files}
        except Exception as error:  # numpy raises ValueError, OSError, EOFError, BadZipFile, ...
            raise ValueError(f"{path} cannot be read as .npz ({type(error).__name__}): give another") from None
        if len(arrays) == 2:
            mu, sigma = (arrays[name].astype(np.float64) for name in ("mu", "sigma"))
            if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
                raise ValueError(f"{path}: mu {mu.shape} and sigma {sigma.shape} must be (F,) and (F, F)")
            return Moments(mu, sigma)
    return image_moments(read_images(path), network)


@torch.no_grad()
def class_accuracy(images: np.ndarray, labels: np.ndarray, judge: Classifier, batch: int = 512) -> tuple[float, float]:
    """Share of images that the judge reads as the asked class, and its mean log-probability of that class."""
    asked, right, log_prob = torch.from_numpy(labels), 0.0, 0.0
    for start in range(0, len(images), batch):
        out = judge(to_float(torch.from_numpy(images[start : start + batch]))).log_softmax(1)
        target = asked[start : start + batch]
        right += float((out.argmax(1) == target).sum())
        log_prob += float(out.gather(1, target[:, None]).sum())
    return right / len(images), log_prob / len(images)


def sample_in_turn(
    model: Pipeline, classes: Sequence[int | str | None], num_images: int, seed: int, world: World | None = None, *,
    batch_size: int = 250, title: str = "", **settings: Any,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Images of the classes in turn, drawn by all processes: image i has class i modulo their number.

    Returns:
        uint8 NHWC images and their int64 labels (num_classes for unconditional ones), complete on every process.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)
    share, parts = -(-num_images // size), []
    labels = np.array([model.label(classes[i % len(classes)]) for i in range(size * share)])
    names = [*range(len(model.class_names)), None]
    bar = tqdm(total=share, desc=f"{title:<8}", unit="img", delay=2, disable=rank > 0, mininterval=1)
    for start in range(rank * share, (rank + 1) * share, batch_size):
        stop = min(start + batch_size, (rank + 1) * share)
        asked = [names[label] for label in labels[start:stop]]
        parts.append(model.sample(asked, seed=seed, first_image=start, batch_size=batch_size, **settings))
        bar.update(stop - start)
    bar.close()
    images = np.concatenate(parts)
    if world is not None:
        images = world.gather_rows(torch.from_numpy(images).to(world.device)).cpu().numpy()
    return images[:num_images], labels[:num_images]


def seconds_per_image(models: dict[str, Pipeline], batch: int, repeats: int = 10) -> dict[str, float]:
    """Median wall time of one batch of each model, per image, decoding included, after a warm-up.

    The models take turns, so that a slow spell of the machine meets all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            classes = [i % len(model.class_names) for i in range(batch)]
            start = time.perf_counter()
            model.sample(classes, seed=repeat, batch_size=batch)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) / batch for name, values in times.items()}


def head_evaluations_per_token(model: Pipeline) -> int:
    """Rows that the head computes for each token: steps, twice under guidance; 1 for a student."""
    if model.student is not None:
        return 1
    return model.sampling.head_steps * (2 if model.sampling.guidance != 1 else 1)


def evaluate(
    model: Pipeline, reference: str, features: Classifier, num_images: int, seed: int = 0, world: World | None = None,
    **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """One row of results: Frechet distance to the reference and accuracy, with the protocol.

    Args:
        reference: see `reference_moments`. features: network of the features; it also reads the class.
    """
    moments = reference_moments(reference, features)
    names = list(range(len(model.class_names)))
    images, labels = sample_in_turn(model, names, num_images, seed, world, title="sample", **settings)
    config = model.settings(**settings)
    results: dict[str, Any] = {"fid": frechet_distance(moments, image_moments(images, features))}
    if features.class_names == model.class_names:
        results["accuracy"] = class_accuracy(images, labels, features)[0]
    protocol = {
        "features": f"penultimate layer of a {features.config.arch} classifier ({features.provenance.get('data')})",
        "reference": reference, "reference_images": moments.count, "num_images": num_images, "seed": seed,
        "kind": "teacher" if model.student is None else "student", **to_dict(config),
    }  # fmt: skip
    if model.student is not None:
        protocol["head_steps"] = 1
    return {**results, "protocol": protocol, "versions": versions(model.device)}


def evaluate_folder(
    folder: Path, reference: str, out: Path, num_images: int, features: Path | None, seed: int, device: str,
    settings: dict[str, Any],
) -> None:  # fmt: skip
    """`marval evaluate`: writes ``out`` and prints what is in it.

    Raises:
        ValueError: no feature network, a bad reference, or an ``out`` that exists or cannot be written.
    """
    world = connect(device)
    if out.exists():
        raise ValueError(f"{out} exists: choose another --out")
    writable_folder(out.parent)
    model = Pipeline.load(folder, world.device)
    model.require_images()
    model.settings(**settings)
    if features is None:
        features = folder.resolve().parent / "classifier"
        if not features.exists():
            raise ValueError(f"no {features}: name a classifier with --features (marval train-classifier makes one)")
    network = Classifier.load(features)
    if num_images < 2:
        raise ValueError(f"a Frechet distance needs at least 2 images, got {num_images}")
    results = evaluate(model, reference, network, num_images, seed, world, **settings)
    if world.is_main:
        write_json(out, results)
        for name in ("fid", "accuracy"):
            if name in results:
                print(f"{name:<10}{results[name]:.4f}")
        print("".join(f"  {name}: {value}\n" for name, value in results["protocol"].items()), end="")
        print(f"written to {out}")


def save_images(
    folder: Path, out: Path, classes: str, num_images: int | None, seed: int, batch_size: int, device: str,
    settings: dict[str, Any],
) -> None:  # fmt: skip
    """`marval sample`: PNG files named by number and class, grid.png and samples.npz in a new folder.

    Args:
        classes: ``all``, ``none`` (unconditional), or comma-separated indices or names.
    """
    world = connect(device)
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if num_images is not None and num_images < 1:
        raise ValueError(f"the number of images must be at least 1, got {num_images}")
    model = Pipeline.load(folder, world.device)
    model.require_images()
    order = settings.get("order")
    if order and "," in order:
        try:
            positions = torch.tensor([int(part) for part in order.split(",")])
        except ValueError:
            raise ValueError(f"--order {order!r} must be a name, or token positions separated by commas") from None
        settings = settings | {"order": masking.check_order(positions, model.network.config.num_tokens)}
    model.settings(**{name: value for name, value in settings.items() if not isinstance(value, Tensor)})
    asked: list[Any] = [part.strip() for part in classes.split(",") if part.strip()]
    if classes == "all":
        asked = list(range(len(model.class_names)))
    elif classes == "none":
        asked = [None]
    if not asked:
        raise ValueError(f"--classes {classes!r} names no class: give 3,7 or all or none")
    for name in asked:
        model.label(name)
    count = num_images or len(asked)
    if world.is_main:
        new_folder(out)
    images, labels = sample_in_turn(model, asked, count, seed, world, batch_size=batch_size, title="sample", **settings)
    if world.is_main:
        names = [*model.class_names, "none"]
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            name = re.sub(r"[^\w-]+", "_", names[label])
            save_png(out / f"{i:0{max(4, len(str(count)))}d}_{name}.png", image)
        columns = len(asked) if 1 < len(asked) <= 16 else min(count, 8)
        save_png(out / "grid.png", image_grid(images, columns, scale=max(1, 64 // images.shape[1])))
        write_atomically(out / "samples.npz", lambda p: write_npz(p, images=images, labels=labels))
        print(f"{count} images, grid.png and samples.npz in {out}")


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """A compressed .npz under exactly this name."""
    with open(path, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
