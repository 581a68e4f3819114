"""ImageNet's classes: complete, in order, all different, and as in the shared labels."""

import json
import subprocess
import sys
from pathlib import Path

import marval
from marval import imagenet


def test_thousand_classes_in_the_order_of_the_index():
    wnids = [wnid for wnid, _ in imagenet.CLASSES]
    assert len(imagenet.CLASSES) == len(set(wnids)) == 1000
    assert wnids == sorted(wnids)  # torchvision's ImageFolder, and so MAR, sorts the folders
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdecimal() for wnid in wnids)
    assert imagenet.index_of_wnid() == {wnid: i for i, wnid in enumerate(wnids)}
    assert imagenet.index_of_wnid()["n01443537"] == 1
    known = {0: "tench", 207: "Golden Retriever", 388: "giant panda", 980: "volcano", 999: "toilet paper"}
    assert {i: imagenet.names()[i] for i in known} == known


def test_names_are_readable_and_different():
    names = imagenet.names()
    assert len({name.lower() for name in names}) == 1000
    assert names == [name for _, name in imagenet.CLASSES]
    assert all(name == " ".join(name.split()) and name.isascii() and "_" not in name for name in names)
    assert max(map(len, names)) <= 40
    imagenet.names().clear()  # a caller's list is his own
    assert len(imagenet.names()) == 1000


def test_as_the_shared_labels(shared: Path):
    labels = json.loads((shared / "data/labels/imagenet1k_names.json").read_text())
    assert [wnid for wnid, _ in imagenet.CLASSES] == [label["wnid"] for label in labels]
    ours = dict(enumerate(imagenet.names()))
    changed = {i: ours[i] for i, label in enumerate(labels) if ours[i] != label["openai_clip"]}
    assert changed == {744: "projectile", 836: "sunglass"}  # given twice in the source
    assert changed == {i: labels[i]["simple"] for i in changed}
    photographs = {path.name for path in (shared / "data/imagenet_photos").iterdir()}
    assert photographs <= set(imagenet.index_of_wnid())


def test_licence_lies_beside_the_names():
    text = (Path(marval.__file__).parent / "assets/imagenet_classes_LICENSE.txt").read_text()
    assert "MIT License" in text
    assert "Copyright (c) 2021 OpenAI" in text


def test_read_only_when_asked_for():
    code = """if True:
        import sys
        import marval.imagenet
        assert marval.imagenet._classes.cache_info().currsize == 0
        assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
