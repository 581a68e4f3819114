"""benchmarks/prepare_data.py: public data sets as one file or a folder that marval reads."""

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from marval.data import load_dataset

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "prepare_data.py"
SCALES, HEART, HAND, WHEELCHAIR, TONE = 0x2696, 0x2764, 0x1F91D, 0x1F9BD, 0x1F3FD
MAN, WOMAN, BOY = 0x1F468, 0x1F469, 0x1F466


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def prepare(monkeypatch: pytest.MonkeyPatch, *args: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, args)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture
def noto(tmp_path: Path) -> Path:
    """Smileys, one per file, grey and half transparent on the right, and a flag, which no class has."""
    folder = tmp_path / "png"
    folder.mkdir()
    for i in range(16):
        picture = np.full((64, 64, 4), 8 * i, np.uint8)
        picture[:, :32, 3], picture[:, 32:, 3] = 255, 0
        Image.fromarray(picture).save(folder / f"emoji_u{0x1F600 + i:x}.png")
    Image.new("RGBA", (64, 64)).save(folder / "emoji_u1f3f4.png")
    Image.new("RGBA", (64, 64), (9, 9, 9, 255)).save(folder / "emoji_u1f468_1f3fd_200d_2696_fe0f.png")
    return folder


@pytest.mark.parametrize(
    ("codes", "name"),
    [
        ([0x1F600], "smiley"), ([0x1F990], "animal"), ([0x1F34E], "food"), ([0x1F44D, TONE], "hand"),
        ([MAN, TONE], "portrait"), ([WOMAN, TONE, 0x1F9B0], "portrait"), ([WOMAN, SCALES], "worker"),
        ([MAN, TONE, HEART, MAN], "couple"), ([0x1F9D1, HAND, 0x1F9D1], "pair"), ([MAN, WOMAN, BOY], None),
        ([MAN, TONE, WHEELCHAIR], None), ([0x1F3F4], None), ([0x1F3C4, TONE, 0x2642], "athlete"),
    ],
)  # fmt: skip
def test_class_of_an_emoji(script: dict[str, Any], codes: list[int], name: str | None):
    assert script["emoji_class"](codes) == name


def test_names_of_the_packed_files_are_code_points(script: dict[str, Any]):
    assert script["named_code_points"]("man + skin tone type-4 + scales") == [MAN, TONE, SCALES]
    assert script["named_code_points"]("u+1faf7") == [0x1FAF7]


def test_emoji_as_one_file(noto: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prepare(monkeypatch, "emoji", noto, tmp_path / "emoji.npz")
    train, test = (load_dataset(str(tmp_path / "emoji.npz"), split) for split in ("train", "test"))
    assert train.images.shape == (14, 32, 32, 3)
    assert train.licence.startswith("Apache-2.0")
    assert len(train.class_names) == 10
    assert test.images[:, 0, 0, 0].tolist() == [9, 8 * 6, 8 * 13]
    assert sorted([*train.images[:, 0, 0, 0], *test.images[:, 0, 0, 0]]) == sorted([9, *range(0, 128, 8)])
    assert (train.images[:, :, 16:] == 255).all(), "transparent is white"
    assert test.labels.tolist() == [train.class_names.index(name) for name in ("worker", "smiley", "smiley")]


def test_folder_of_png_holds_the_same(noto: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for file in noto.glob("*1f468*.png"):
        file.unlink()  # a folder needs every class in both splits
    for left in ("emoji", "emoji.partial/test/smiley"):  # by one that was interrupted
        (tmp_path / left).mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "emoji.partial" / "test" / "smiley" / "99999.png")
    prepare(monkeypatch, "emoji", noto, tmp_path / "emoji")
    assert not (tmp_path / "emoji.partial").exists()
    found = load_dataset(str(tmp_path / "emoji"), "test")
    assert (found.class_names, found.images[:, 0, 0, 0].tolist()) == (["smiley"], [0, 8 * 7, 8 * 14])
    assert "Apache-2.0" in (tmp_path / "emoji" / "LICENCE.txt").read_text()


def test_a_folder_without_emoji_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SystemExit, match=r"FOLDER must hold emoji_u\*\.png"):
        prepare(monkeypatch, "emoji", tmp_path, tmp_path / "emoji.npz")


def test_a_file_is_never_overwritten(noto: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    (tmp_path / "mine.npz").write_bytes(b"mine")
    with pytest.raises(SystemExit):
        prepare(monkeypatch, "emoji", noto, tmp_path / "mine.npz")
    assert "mine.npz exists: choose another OUT, or remove it" in capsys.readouterr().err
    assert (tmp_path / "mine.npz").read_bytes() == b"mine"
