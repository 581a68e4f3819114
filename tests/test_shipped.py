"""The models that come with marval: they load by name, draw, say where they are from, and are small."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import marval
from marval import shipped
from marval.features import load_features
from marval.reward_files import check_classifier

NAMES = shipped.names()


def test_there_are_models():
    assert "fashion-mnist/student" in NAMES
    assert sum(file.stat().st_size for file in shipped.FOLDER.rglob("*") if file.is_file()) < 60e6


@pytest.mark.parametrize("name", NAMES)
def test_shipped_model(name: str):
    model = marval.load(name)
    images = model.sample([0, 1], seed=1)
    side = model.tokenizer.image_size
    assert images.shape == (2, side, side, model.tokenizer.image_channels)
    assert images.std() > 20
    assert (model.student is None) == name.endswith("/teacher")
    card = (shipped.FOLDER / name / "README.md").read_text()
    for part in (f'marval.load("{name}")', "licence of the data", "Numbers", '"steps"', "marval evaluate"):
        assert part in card, part
    text = json.dumps(json.loads((shipped.FOLDER / name / "config.json").read_text()))
    assert "/root" not in text + card
    assert "/work" not in text + card


def test_a_device_that_is_not_there():
    for device in ("cuda:7", "gpu"):
        with pytest.raises(ValueError, match=f"device '{device}'"):
            marval.load("digits/student", device=device)


def test_sample_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    tiny.main(["sample", "--model", "fashion-mnist/student", "--classes", "sneaker", "--out", "drawn"])
    assert np.asarray(Image.open(tmp_path / "drawn" / "0000_sneaker.png")).shape == (28, 28)


def test_models_of_a_recipe_share_an_autoencoder_and_copies_have_their_own(tmp_path: Path):
    model = marval.load("emoji/student")
    assert not (shipped.FOLDER / "emoji" / "student" / "tokenizer").exists()
    model.save(tmp_path / "tokenizer" / "copy")  # in a folder of this name, which is no autoencoder
    assert (tmp_path / "tokenizer" / "copy" / "tokenizer" / "config.json").is_file()
    same = marval.load(tmp_path / "tokenizer" / "copy").sample([3], seed=1)
    assert np.array_equal(same, model.sample([3], seed=1))


def test_unknown_names(tmp_path: Path):
    with pytest.raises(ValueError, match=r"model 'fashion/student' does not exist: .*fashion-mnist/student"):
        marval.load("fashion/student")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        marval.load(tmp_path / "file")


def test_classifiers_by_name():
    """As --features, --classifier and --judge take them."""
    images = marval.load("fashion-mnist/student").sample([1] * 8, seed=0)
    for name in ("fashion-mnist/classifier", "fashion-mnist/judge"):
        network = load_features(name)
        logits = network(images).logits
        assert logits is not None
        assert (logits.argmax(1) == 1).float().mean() > 0.7
        check_classifier(name)
    with pytest.raises(ValueError, match="no feature network 'fashion-mnist/other'"):
        load_features("fashion-mnist/other")
