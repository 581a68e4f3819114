"""Feature networks: the same numbers as their references, whatever the batch; unsuitable files are refused."""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from marval import features as features_module
from marval import imagenet
from marval.data import load_dataset
from marval.features import INCEPTION_URL, load_features
from marval.images import center_crop
from marval.models.classifier import Classifier
from marval.tokenizers import to_float


@pytest.fixture(scope="module")
def read_data(shared: Path) -> ModuleType:
    """The reader that lies beside the data."""
    spec = importlib.util.spec_from_file_location("read_data", shared / "data" / "read_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def noise(count: int, size: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), np.uint8)


def test_classifier():
    data, network = load_dataset("digits", "test"), Classifier.load(tiny.classifier())
    loaded = load_features(str(tiny.classifier()))
    found = loaded(data.images[:120])
    x = to_float(torch.from_numpy(data.images[:120]))
    torch.testing.assert_close(found.pooled, network.features(x).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logits, network(x).detach(), rtol=1e-5, atol=1e-5)
    assert found.spatial is None
    assert "conv classifier" in loaded.name
    assert loaded.class_indices(["3", "1"]) is not None
    assert loaded.class_indices(["3", "a cat"]) is None
    weights = (tiny.classifier() / "model.safetensors").read_bytes()
    assert loaded.digest == hashlib.sha256(weights).hexdigest()[:16]


def test_mobilenet_equals_its_reader(shared: Path, read_data: ModuleType):
    """Features and logits, at 8x8 grey as at 224x224; the photographs are what their folders say."""
    network = load_features(str(shared / "data" / "weights" / "mobilenet_v2_dequant_fp16.npz"))
    reference = read_data.MobileNetV2()
    for images in (noise(3, 40), noise(2, 8, 1)):
        x = to_float(torch.from_numpy(np.broadcast_to(images, (*images.shape[:3], 3)).copy()))
        with torch.no_grad():
            pooled, logits = reference(x)
        found = network(images)
        torch.testing.assert_close(found.pooled, pooled, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-3)
        assert found.spatial is not None
        assert found.spatial.shape == (len(images), 26 * 49)
        mean = found.spatial.view(-1, 26, 49).mean(2)  # the channels that the pooled features are means of
        torch.testing.assert_close(mean, found.pooled[:, :26], rtol=1e-5, atol=1e-6)

    files = sorted((shared / "data" / "imagenet_photos").glob("*/*.JPEG"))[::10]
    photos = np.stack([np.asarray(center_crop(Image.open(path).convert("RGB"), 224)) for path in files])
    wnids = [path.parent.name for path in files]
    expected = network.class_indices(wnids)
    assert expected is not None
    names = [imagenet.names()[i] for i in expected]
    assert np.array_equal(network.class_indices(names), expected)
    logits = network(photos).logits
    assert logits is not None
    assert (logits.argmax(1).numpy() == expected).mean() >= 0.75


def test_cifar_resnet_reads_cifar(shared: Path, read_data: ModuleType):
    images, labels, names = read_data.images("cifar10-test")
    network = load_features(str(shared / "data" / "weights" / "resnet20-12fca82f.th"))
    found = network(images[:400])
    assert "ResNet-20" in network.name
    assert names == network.class_names
    assert found.pooled.shape == (400, 64)
    assert found.logits is not None
    assert (found.logits.argmax(1).numpy() == labels[:400]).mean() > 0.88
    larger = network(images[:50].repeat(2, 1).repeat(2, 2)).logits  # scaled back to 32x32
    assert larger is not None
    assert (larger.argmax(1).numpy() == labels[:50]).mean() > 0.7
    deeper = load_features(str(shared / "data" / "weights" / "resnet56-4bfd9763.th"))
    assert "ResNet-56" in deeper.name


def test_features_do_not_depend_on_the_batch(shared: Path):
    """The same chunks of images, hence the same bits."""
    network = load_features(str(shared / "data" / "weights" / "resnet20-12fca82f.th"))
    images = noise(120, 32)
    whole = network(images).pooled
    parts = torch.cat([network(images[:100]).pooled, network(images[100:]).pooled])
    assert torch.equal(whole, parts)


def test_a_function_of_ones_own(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Settings:\n    size: int = 3\n"
        "def means(images):\n    return images.mean((2, 3))\n"
        "def both(images):\n    return images.mean((2, 3)), images.flatten(1)\n"
        "def wrong(images):\n    return images\n"
        "def infinite(images):\n    return images.mean((2, 3)) / 0\n"
    )
    images = noise(60, 4)
    found = load_features(f"{file}:means")(images)
    np.testing.assert_allclose(found.pooled, images.mean((1, 2)) / 255, rtol=1e-5)
    assert found.logits is None
    both = load_features(f"{file}:both")(images)
    assert both.logits is not None
    assert both.logits.shape == (60, 48)
    with pytest.raises(ValueError, match=r"mine.py:wrong gave features \[50, 3, 4, 4\] for 50 images"):
        load_features(f"{file}:wrong")(images)
    with pytest.raises(ValueError, match=r"pooled features of .*infinite are not finite"):
        load_features(f"{file}:infinite")(images)


@pytest.fixture
def inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Path]:
    """A network of torch-fidelity with random weights, and its file in the true format."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("needs torch-fidelity: pip install --no-deps torch-fidelity")
    module = features_module._inception_module()
    assert importlib.util.find_spec("torchvision") is not None or "torch_fidelity" not in sys.modules
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    file = tmp_path / "weights.pth"
    torch.save(network.state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", digest)
    monkeypatch.setattr(features_module, "INCEPTION_URL", file.as_uri())
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return network, file


def test_inception(inception: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch):
    """torch-fidelity's features and logits, and ADM's 7 channels of the 17x17 map, rows and columns first."""
    network, file = inception
    images = noise(2, 32)
    maps: list[torch.Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: maps.append(call[2]))
    pooled, logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    loaded = load_features("inception", inception_weights=str(file))
    found = loaded(images)
    torch.testing.assert_close(found.pooled, pooled, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logits, logits, rtol=1e-5, atol=1e-5)
    assert found.spatial is not None
    assert found.spatial.shape == (2, 2023)
    assert found.pooled.shape == (2, 2048)
    torch.testing.assert_close(found.spatial[1, (3 * 17 + 5) * 7 + 2], maps[0][1, 2, 3, 5])
    assert features_module.INCEPTION_SHA256 in loaded.name
    assert loaded.class_names is None


def test_inception_is_downloaded_once_and_verified(
    inception: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    _, file = inception
    path = features_module.inception_weights_file()
    assert path == tmp_path / "hub" / "checkpoints" / f"weights-inception-2015-12-05-{file_digest(file)}.pth"
    assert path.read_bytes() == file.read_bytes()
    assert "downloading" in capsys.readouterr().out
    assert features_module.inception_weights_file() == path
    assert capsys.readouterr().out == ""
    path.unlink()
    monkeypatch.setattr(features_module, "INCEPTION_URL", (tmp_path / "nowhere.pth").as_uri())
    with pytest.raises(ValueError, match=r"cannot download file:.*--inception-weights"):
        features_module.inception_weights_file()
    (tmp_path / "other.pth").write_bytes(b"other")
    with pytest.raises(ValueError, match="is not FID's InceptionV3: its SHA-256 begins d9298a10"):
        load_features("inception", inception_weights=str(tmp_path / "other.pth"))


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def test_inception_of_other_tensors(inception: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The checksum may be right and the file still be none: a missing tensor, or a pickle of something else."""
    network, _ = inception
    state = network.state_dict()
    del state["fc.weight"]
    torch.save(state, tmp_path / "short.pth")
    torch.save({"a": Image.Image}, tmp_path / "code.pth")
    for name in ("short.pth", "code.pth"):
        monkeypatch.setattr(features_module, "INCEPTION_SHA256", file_digest(tmp_path / name))
        with pytest.raises(ValueError, match=f"{name} does not hold InceptionV3's tensors"):
            load_features("inception", inception_weights=str(tmp_path / name))


def test_without_torch_fidelity(monkeypatch: pytest.MonkeyPatch):
    real: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch_fidelity" else real(name))
    with pytest.raises(ValueError, match=r"pip install 'marval\[eval\]'"):
        load_features("inception")


def test_the_name_of_the_weights():
    assert INCEPTION_URL.endswith("-6726825d.pth")


def test_refused(tmp_path: Path):
    (tmp_path / "cut.npz").write_bytes(b"PK")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    torch.save({"state_dict": {"layer1.0.conv1.weight": torch.zeros(3)}}, tmp_path / "other.th")
    (tmp_path / "cut.th").write_bytes(b"PK")
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    (tmp_path / "empty.py").write_text("")
    for spec, words in {
        "resnet": "no feature network 'resnet': choose inception",
        "nowhere.npz": "nowhere.npz: the file does not exist",
        f"{tmp_path}/cut.npz": "cut.npz is not a MobileNetV2",
        f"{tmp_path}/other.npz": "other.npz is not a MobileNetV2",
        f"{tmp_path}/other.th": "other.th: tensor 'bn1.bias' is missing",
        f"{tmp_path}/cut.th": "cut.th is not a CIFAR-10 ResNet",
        f"{tmp_path}/broken.py:f": "fails on import: ModuleNotFoundError",
        f"{tmp_path}/empty.py:f": "has no function 'f'",
        f"{tmp_path}/nothing.py:f": "does not exist",
        str(tmp_path): "config.json does not exist",
    }.items():
        with pytest.raises(ValueError, match=words) as error:
            load_features(spec)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--inception-weights goes with --features inception"):
        load_features("resnet", inception_weights="x.pth")
