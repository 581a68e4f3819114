"""Training of a small classifier (`marval.models.classifier`), which gives features, accuracy and rewards."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from marval.batches import batch_indices, prefetch, random_shift
from marval.config import check
from marval.data import ImageDataset, load_dataset
from marval.distributed import connect
from marval.models.classifier import Arch, Classifier, ClassifierConfig
from marval.rng import generator, put
from marval.run import new_folder
from marval.tokenizers import to_float

_TRAIN_KEY = 0xC1A5  # sets the stream of augmentations apart from every other use of (seed, n)


@torch.no_grad()
def accuracy(classifier: Classifier, dataset: ImageDataset, batch: int = 512) -> float:
    """Share of the images whose most likely class is their label."""
    device = classifier.head.weight.device
    right = 0
    for images, labels in zip(
        torch.from_numpy(dataset.images).split(batch), torch.from_numpy(dataset.labels).split(batch), strict=True
    ):
        right += int((classifier(to_float(images).to(device)).argmax(1).cpu() == labels).sum())
    return right / len(dataset)


def train_classifier(
    dataset: ImageDataset, held_out: ImageDataset, *, arch: Arch = "conv", seed: int = 0, epochs: int = 20,
    batch: int = 64, lr: float = 3e-3, shift: int = 1, noise: float = 0.1, label_smoothing: float = 0.05,
    width: int = 32, device: torch.device | str = "cpu", progress: bool = True,
) -> tuple[Classifier, dict[str, float]]:  # fmt: skip
    """Train with AdamW, a one-cycle learning rate, shifts, noise and smoothed labels; deterministic in the seed.

    Args:
        held_out: images of the same classes that only measure.
        shift: largest translation in pixels. noise: largest standard deviation of Gaussian noise on the pixels.

    Returns:
        The classifier in eval mode, and ``accuracy_train`` and ``accuracy_held_out`` in [0, 1].

    Raises:
        ValueError: the two data sets differ in classes or shape, or a setting is out of range.
    """
    check(epochs >= 1 and batch >= 1 and lr > 0, f"epochs {epochs}, batch {batch} and lr {lr} must be positive")
    check(
        dataset.class_names == held_out.class_names, "the held-out images have other classes than the training images"
    )
    shapes = dataset.images.shape[1:], held_out.images.shape[1:]
    check(shapes[0] == shapes[1], f"training images {list(shapes[0])} and held-out images {list(shapes[1])} must agree")
    size, channels = dataset.images.shape[2:]
    config = ClassifierConfig(
        image_size=size, channels=channels, num_classes=len(dataset.class_names), arch=arch, width=width
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        classifier = Classifier(config, dataset.class_names)
    classifier.to(device).train()

    steps = epochs * -(-len(dataset) // batch)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2), pct_start=0.2)

    def read(step: int) -> tuple[Tensor, Tensor]:
        draw = generator(seed, step, _TRAIN_KEY)
        rows = batch_indices(len(dataset), batch, step, seed)
        images = random_shift(to_float(torch.from_numpy(dataset.images[rows])), shift, draw)
        std = noise * torch.rand(batch, 1, 1, 1, generator=draw)
        images = (images + std * torch.randn(images.shape, generator=draw)).clamp(0, 1)
        return put(images, device), put(torch.from_numpy(dataset.labels[rows]), device)

    ahead = prefetch if torch.device(device).type == "cuda" else map  # a GPU would wait for the noise
    batches = tqdm(
        ahead(read, range(steps)), total=steps, desc=f"classifier ({arch})", disable=not progress, delay=2
    )  # fmt: skip
    for images, labels in batches:
        loss = F.cross_entropy(classifier(images), labels, label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    classifier.eval()
    metrics = {"accuracy_train": accuracy(classifier, dataset), "accuracy_held_out": accuracy(classifier, held_out)}
    settings = {"seed": seed, "epochs": epochs, "batch": batch, "lr": lr, "shift": shift, "noise": noise}
    settings["label_smoothing"] = label_smoothing
    classifier.provenance = {"data": dataset.source, "licence": dataset.licence, "training": settings, **metrics}
    return classifier, metrics


def train_classifier_folder(
    data: str, out: Path, arch: Arch = "conv", epochs: int = 20, seed: int = 0, image_size: int | None = None,
    device: str = "auto",
) -> None:  # fmt: skip
    """Train a classifier on the training split of some data, save it in a new folder, and print its accuracy on the
    held-out split.

    Args:
        data: as `load_dataset` takes it.
        image_size: the images are centre-cropped and scaled to it.

    Raises:
        ValueError: data of one class, several processes, a folder that exists, or a setting out of range.
    """
    check(epochs >= 1, f"epochs {epochs} must be at least 1")
    world = connect(device)
    check(world.size == 1, "train-classifier is the work of one process: start it without torchrun")
    train, held_out = (load_dataset(data, split, image_size) for split in ("train", "test"))
    several = len(train.class_names) >= 2
    check(several, f"data {data} have one class: a classifier tells classes apart, so give two or more")
    new_folder(out)
    classifier, metrics = train_classifier(
        train, held_out, arch=arch, epochs=epochs, seed=seed, device=world.device
    )  # fmt: skip
    classifier.save(out)
    print(f"classifier in {out}: {100 * metrics['accuracy_held_out']:.1f} % of {len(held_out)} held-out images")
