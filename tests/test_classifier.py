"""Small classifiers: accuracy, determinism, gradients, files."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from marval.checkpoint import load_tensors, save_tensors
from marval.data import ImageDataset, load_dataset
from marval.models.classifier import Arch, Classifier, ClassifierConfig
from marval.tokenizers import to_float
from marval.train_classifier import accuracy, train_classifier

ARCHS: tuple[Arch, ...] = ("conv", "resnet")
NAMES = list("0123456789")


@pytest.fixture(scope="module")
def digits() -> tuple[ImageDataset, ImageDataset]:
    return load_dataset("digits"), load_dataset("digits", "test")


def first(dataset: ImageDataset, n: int) -> ImageDataset:
    return dataclasses.replace(dataset, images=dataset.images[:n], labels=dataset.labels[:n])


@pytest.mark.parametrize("arch", ARCHS)
def test_learns_digits(digits: tuple[ImageDataset, ImageDataset], arch: Arch):
    train, held_out = digits
    classifier, metrics = train_classifier(train, held_out, arch=arch, epochs=8, width=16, progress=False)
    assert metrics["accuracy_held_out"] > 0.93
    assert metrics["accuracy_held_out"] == accuracy(classifier, held_out, batch=7)
    assert not classifier.training
    assert classifier.provenance["licence"] == "CC BY 4.0"


@pytest.mark.parametrize("arch", ARCHS)
def test_training_depends_on_the_seed_only(digits: tuple[ImageDataset, ImageDataset], arch: Arch):
    few = first(digits[0], 40)

    def weights(seed: int) -> torch.Tensor:
        classifier, _ = train_classifier(few, few, arch=arch, seed=seed, epochs=2, width=8, batch=32, progress=False)
        return torch.cat([p.detach().flatten() for p in classifier.parameters()])

    state = torch.get_rng_state()
    reference = weights(0)
    assert torch.get_rng_state().equal(state)
    torch.rand(3)
    assert weights(0).equal(reference)
    assert not weights(1).equal(reference)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (33, 3), (64, 3)])
def test_shapes_and_gradient(arch: Arch, size: int, channels: int):
    config = ClassifierConfig(image_size=size, channels=channels, num_classes=5, arch=arch, width=8)
    classifier = Classifier(config, list("abcde")).eval()
    images = torch.rand(2, channels, size, size, requires_grad=True)
    assert classifier.features(images).shape == (2, 64)
    logits = classifier(images)
    assert logits.shape == (2, 5)
    logits[0, 0].backward()
    assert images.grad is not None
    assert images.grad[0].count_nonzero() > 0
    assert images.grad[1].count_nonzero() == 0
    with pytest.raises(ValueError, match=rf"reads images \(B, {channels}, {size}, {size}\), got \[2, 1, 5, 5\]"):
        classifier(torch.rand(2, 1, 5, 5))


@pytest.mark.parametrize("arch", ARCHS)
def test_save_and_load(digits: tuple[ImageDataset, ImageDataset], tmp_path: Path, arch: Arch):
    few = first(digits[0], 40)
    classifier, metrics = train_classifier(few, few, arch=arch, epochs=1, width=8, progress=False)
    classifier.save(tmp_path / "c")
    loaded = Classifier.load(tmp_path / "c")
    images = to_float(torch.from_numpy(few.images))
    assert loaded(images).equal(classifier(images))
    assert loaded.class_names == NAMES
    assert loaded.provenance["accuracy_train"] == metrics["accuracy_train"]
    assert not loaded.training


def test_load_is_strict(tmp_path: Path):
    config = ClassifierConfig(image_size=8, channels=1, num_classes=10, width=8)
    Classifier(config, NAMES).save(tmp_path)
    tensors = load_tensors(tmp_path / "model.safetensors")
    save_tensors(tmp_path / "model.safetensors", {k: v for k, v in tensors.items() if k != "head.bias"})
    with pytest.raises(ValueError, match=r"model.safetensors: tensor 'head.bias' is missing"):
        Classifier.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Classifier.load(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"class_names": ["a"]}, "1 class names for 10 classes"),
        ({"classifier": {**saved["classifier"], "depth": 3}}, "no setting 'depth'"),
        ({"classifier": {**saved["classifier"], "arch": "vit"}}, "unknown arch 'vit'"),
        ({"format": 9}, "does not describe a marval classifier"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**saved, **change}))
        with pytest.raises(ValueError, match=message):
            Classifier.load(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        Classifier.load(tmp_path / "nowhere")


def test_held_out_images_must_fit(digits: tuple[ImageDataset, ImageDataset]):
    train, held_out = digits
    with pytest.raises(ValueError, match="other classes"):
        train_classifier(train, dataclasses.replace(held_out, class_names=list("abcdefghij")))
    with pytest.raises(ValueError, match=r"\[8, 8, 1\] and held-out images \[16, 16, 1\] must agree"):
        train_classifier(train, load_dataset("digits", "test", 16))
