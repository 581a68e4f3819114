"""Data sets from real files, bad files, batches and shifts."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from marval import data as data_module
from marval import imagenet
from marval.batches import batch_indices, prefetch, random_shift
from marval.data import load_data, load_dataset
from marval.images import LazyImages, image_grid, read_images, save_png
from marval.rng import generator

SHARED = Path(__file__).parents[2] / "shared" / "data"


def picture(value: int = 0, size: tuple[int, int] = (8, 8), channels: int = 3) -> np.ndarray:
    return np.full((*size, channels), value, np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of seven images each; class a holds 0..6, class b 10..16."""
    root = tmp_path / "images"
    for name, base in (("a", 0), ("b", 10)):
        (root / name).mkdir(parents=True)
        for i in range(7):
            save_png(root / name / f"{i}.png", picture(base + i))
    return root


def test_digits_split():
    train, test, everything = (load_dataset("digits", split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(everything)) == (1437, 360, 1797)
    assert train.images.shape[1:] == (8, 8, 1)
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int64
    assert train.class_names == list("0123456789")
    assert "CC BY 4.0" in train.licence
    np.testing.assert_array_equal(everything.images[::5], test.images)
    np.testing.assert_array_equal(np.delete(everything.labels, np.s_[::5]), train.labels)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the project's shared data is not on this machine")
def test_digits_equal_the_shared_file():
    arrays = np.load(SHARED / "digits.npz")
    np.testing.assert_array_equal(load_dataset("digits", "all").images, arrays["x"])
    np.testing.assert_array_equal(load_dataset("digits", "all").labels, arrays["label"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the project's shared data is not on this machine")
def test_photographs_are_cropped_as_by_adm(tmp_path: Path):
    photos = sorted((SHARED / "imagenet_photos").iterdir())[:3]
    for photo in photos:
        (tmp_path / photo.name).symlink_to(photo)
    data = load_dataset(str(tmp_path), image_size=64)
    assert data.images.shape == (3, 64, 64, 3)
    for source, image in zip(photos, data.images, strict=True):
        with Image.open(next(source.iterdir())) as reference:
            pil = reference.convert("RGB")
        while min(pil.size) >= 128:
            pil = pil.resize((pil.size[0] // 2, pil.size[1] // 2), Image.Resampling.BOX)
        scale = 64 / min(pil.size)
        array = np.array(pil.resize(tuple(round(x * scale) for x in pil.size), Image.Resampling.BICUBIC))
        y, x = (array.shape[0] - 64) // 2, (array.shape[1] - 64) // 2
        np.testing.assert_array_equal(image, array[y : y + 64, x : x + 64])


def test_folder_holds_out_every_fifth_of_each_class(folder: Path):
    (folder / ".hidden").mkdir()
    (folder / "a" / ".DS_Store.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("ignored")
    test, train = load_dataset(str(folder), "test"), load_dataset(str(folder))
    assert test.class_names == ["a", "b"]
    assert test.images[:, 0, 0, 0].tolist() == [0, 5, 10, 15]
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert train.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 6, 11, 12, 13, 14, 16]
    assert len(load_dataset(str(folder), "all")) == 14


def test_pictures_that_no_one_will_see_are_told_of(folder: Path, capsys: pytest.CaptureFixture[str]):
    load_dataset(str(folder))
    assert not capsys.readouterr().err
    scan = folder / "a" / "2021" / "scan.TIF"
    scan.parent.mkdir()
    Image.new("L", (8, 8)).save(scan)
    (scan.parent / "._scan.tif").write_bytes(b"no image")
    for _ in range(2):
        load_dataset(str(folder))
    warning = f"marval: warning: pictures in {folder} are left out (1 in all), such as {scan}"
    assert capsys.readouterr().err.count(warning) == 1
    Image.new("L", (8, 8)).save(folder / "a" / "x.gif")
    save_png(folder / "stray.png", picture())
    load_dataset(str(folder))
    warning = f"marval: warning: pictures in {folder} are left out (3 in all), such as {folder / 'stray.png'}"
    assert capsys.readouterr().err.count(warning) == 1


def test_a_single_image_is_for_training(folder: Path):
    (folder / "c").mkdir()
    save_png(folder / "c" / "only.PNG", picture(99))
    assert 2 in load_dataset(str(folder)).labels
    assert 2 not in load_dataset(str(folder), "test").labels


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folder_with_splits_of_its_own(tmp_path: Path, held_out: str):
    for split, value in (("train", 1), (held_out, 2)):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            save_png(tmp_path / split / name / "x.png", picture(value))
    values = [load_dataset(str(tmp_path), split).images[:, 0, 0, 0].tolist() for split in ("train", "test", "all")]
    assert values == [[1, 1], [2, 2], [1, 2, 1, 2]]
    (tmp_path / "train" / "c").mkdir()
    save_png(tmp_path / "train" / "c" / "x.png", picture())
    with pytest.raises(ValueError, match="class 'c' is not in both"):
        load_dataset(str(tmp_path))


def test_nested_folders(folder: Path):
    (folder / "a" / "more" / "deep").mkdir(parents=True)
    (folder / "a" / ".cache").mkdir()
    save_png(folder / "a" / "more" / "deep" / "x.png", picture(77))
    save_png(folder / "a" / ".cache" / "x.png", picture(88))
    everything = load_dataset(str(folder), "all")
    assert everything.images[everything.labels == 0][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 77]


def test_imagenet_classes(folder: Path):
    with pytest.raises(ValueError, match=r"class 'a' of .*images is not one of ImageNet's 1,000"):
        load_data(str(folder), classes="imagenet")
    (folder / "a").rename(folder / "n01484850")
    (folder / "b").rename(folder / "n01440764")
    found = load_data(str(folder), "test", classes="imagenet")
    assert found.labels.tolist() == [0, 0, 2, 2]
    assert found.class_names == imagenet.names()


def test_large_folders_are_read_when_needed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    save_png(folder / "a" / "1.png", picture(7, size=(12, 9), channels=1))
    whole = load_data(str(folder), image_size=8)
    assert isinstance(whole.images, np.ndarray)
    monkeypatch.setattr(data_module, "IN_MEMORY", len(whole) * 8 * 8 * 3 - 1)
    lazy = load_data(str(folder), image_size=8)
    assert isinstance(lazy.images, LazyImages)
    assert (lazy.images.shape, len(lazy)) == (whole.images.shape, len(whole))
    assert lazy.class_names == whole.class_names
    np.testing.assert_array_equal(lazy.labels, whole.labels)
    index = np.array([3, 0, 9, 3])
    np.testing.assert_array_equal(lazy.images[index], whole.images[index])
    with pytest.raises(ValueError, match=r"holds 10 images, too many to compare .*: choose an --image-size"):
        load_data(str(folder))
    (folder / "b" / "1.png").write_text("no image")
    with pytest.raises(ValueError, match=r"1.png cannot be read as an image"):
        lazy.images[np.arange(10)]


def test_prefetch_reads_one_step_ahead():
    started, release = [], threading.Event()

    def read(step: int) -> int:
        started.append((step, threading.current_thread()))
        release.wait(10)
        return step * step

    steps = prefetch(read, range(5, 9))
    release.set()
    assert next(steps) == 25
    release.clear()
    assert next_started(started, 2) == [5, 6]
    release.set()
    assert next(steps) == 36
    steps.close()
    assert len(started) in (2, 3)  # the third may be on its way, the fourth is not
    assert all(thread is not threading.current_thread() for _, thread in started)
    assert not any(thread.is_alive() for _, thread in started)
    assert list(prefetch(read, range(4))) == [0, 1, 4, 9]
    assert list(prefetch(read, [])) == []


def next_started(started: list, count: int) -> list[int]:
    """The steps begun so far, once there are so many."""
    for _ in range(1000):
        if len(started) >= count:
            break
        threading.Event().wait(0.01)
    return [step for step, _ in started]


def test_prefetch_raises_in_turn():
    def read(step: int) -> int:
        if step == 2:
            raise ValueError("file 2 is bad")
        return step

    seen = []
    with pytest.raises(ValueError, match="file 2 is bad"):
        seen.extend(prefetch(read, range(5)))
    got = prefetch(read, range(5))
    assert [next(got), next(got)] == [0, 1]
    with pytest.raises(ValueError, match="file 2 is bad"):
        next(got)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("marval-prefetch")] == []


def test_channels_and_image_size(folder: Path, tmp_path: Path):
    save_png(folder / "a" / "1.png", picture(7, channels=1))
    assert load_dataset(str(folder)).images.shape == (10, 8, 8, 3)
    grey = tmp_path / "grey" / "a"
    grey.mkdir(parents=True)
    save_png(grey / "0.png", picture(7, size=(20, 9), channels=1))
    assert load_dataset(str(grey.parent), image_size=6).images.shape == (1, 6, 6, 1)


def test_every_kind_of_file(tmp_path: Path):
    (tmp_path / "a").mkdir()
    for suffix in ("jpg", "JPEG", "png", "webp", "bmp"):
        Image.fromarray(picture(80)).save(tmp_path / "a" / f"{suffix}.{suffix}")
    Image.fromarray(picture(80)).convert("CMYK").save(tmp_path / "a" / "cmyk.jpg")
    images = load_dataset(str(tmp_path), "all").images
    assert images.shape == (6, 8, 8, 3)
    assert abs(images.astype(int) - 80).max() <= 2


def test_opaque_alpha_is_dropped(tmp_path: Path):
    (tmp_path / "a").mkdir()
    Image.fromarray(picture(80)).convert("RGBA").save(tmp_path / "a" / "0.png")
    Image.fromarray(picture(90)[..., 0]).convert("LA").save(tmp_path / "a" / "1.png")
    assert load_dataset(str(tmp_path), "all").images[:, 0, 0].tolist() == [[80] * 3, [90] * 3]


def test_damaged_exif_is_no_damaged_image(tmp_path: Path):
    """As in a few of ImageNet's photographs; Pillow warns, the pixels are whole."""
    (tmp_path / "a").mkdir()
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x1a\0\x05\0\0\0\x01\0\0\xff\0"
    Image.fromarray(picture(80)).save(tmp_path / "a" / "0.jpg", exif=exif)
    with pytest.warns(UserWarning, match=r"EXIF|Truncated File Read"):
        assert abs(load_dataset(str(tmp_path), "all").images.astype(int) - 80).max() <= 2


def truncate(path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = path.with_suffix(suffix)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def palette_with_transparency(path: Path) -> None:
    Image.fromarray(picture()).convert("P").save(path, transparency=bytes([0, 128]))


def sixteen_bit_rgb(path: Path) -> None:
    """A 1x1 PNG of 16 bits per channel; Pillow would silently read it as 8-bit RGB."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + bytes(6)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b""))


BAD_FILES = {
    "empty": (lambda p: p.write_bytes(b""), "cannot be read as an image"),
    "text": (lambda p: p.write_text("no image"), "cannot be read as an image"),
    "truncated png": (lambda p: truncate(p, ".png"), "cannot be read as an image"),
    "truncated jpeg": (lambda p: truncate(p, ".jpg"), "cannot be read as an image"),
    "truncated webp": (lambda p: truncate(p, ".webp"), "cannot be read as an image"),
    "truncated bmp": (lambda p: truncate(p, ".bmp"), "cannot be read as an image"),
    "16-bit grey": (lambda p: Image.fromarray(np.zeros((8, 8), np.uint16)).save(p), "more than 8 bits"),
    "16-bit rgb": (sixteen_bit_rgb, "more than 8 bits"),
    "palette": (lambda p: Image.fromarray(picture()).convert("P").save(p), "is a palette image: convert it"),
    "palette, transparent": (palette_with_transparency, "is a palette image: convert it"),
    "black-white": (lambda p: Image.fromarray(picture()).convert("1").save(p), "is a black-and-white image"),
    "rgba": (lambda p: Image.new("RGBA", (8, 8)).save(p), "has transparency: flatten it"),
    "grey + alpha": (lambda p: Image.new("LA", (8, 8)).save(p), "has transparency: flatten it"),
    "transparent colour": (lambda p: Image.new("RGB", (8, 8)).save(p, transparency=(0, 0, 0)), "has transparency"),
    "not square": (lambda p: save_png(p, picture(size=(8, 9))), "is 9x8, not square: choose an --image-size"),
    "other size": (lambda p: save_png(p, picture(size=(9, 9))), "is 9x9, but .*1.png is 8x8: choose an --image-size"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file(folder: Path, kind: str):
    write, message = BAD_FILES[kind]
    write(folder / "b" / "bad.png")
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset(str(folder))
    text = str(caught.value)
    assert str(folder / "b" / "bad.") in text
    assert "\n" not in text


def test_bad_folder(tmp_path: Path, folder: Path):
    with pytest.raises(ValueError, match="'nowhere' does not exist: give digits"):
        load_dataset("nowhere")
    with pytest.raises(ValueError, match="is a file: give digits"):
        load_dataset(str(folder / "a" / "0.png"))
    with pytest.raises(ValueError, match="has no class folders"):
        load_dataset(str(folder / "a"))
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        load_dataset("digits", "dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="image size must be at least 1, got 0"):
        load_dataset("digits", image_size=0)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*empty has no images"):
        load_dataset(str(folder))
    (tmp_path / "single" / "a").mkdir(parents=True)
    save_png(tmp_path / "single" / "a" / "0.png", picture())
    with pytest.raises(ValueError, match=r"the test split of .* is empty"):
        load_dataset(str(tmp_path / "single"), "test")


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 40), batch=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_every_epoch_visits_every_image_once(n: int, batch: int, seed: int):
    steps = -(-3 * n // batch)
    stream = np.concatenate([batch_indices(n, batch, step, seed) for step in range(steps)])
    assert stream.dtype == np.int64
    assert len(stream) == steps * batch
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    again = np.concatenate([batch_indices(n, 1, i, seed) for i in range(min(len(stream), 50))])
    np.testing.assert_array_equal(again, stream[:50])


def test_epochs_and_seeds_differ():
    first = batch_indices(100, 100, 0, 0)
    assert (first != batch_indices(100, 100, 1, 0)).any()
    assert (first != batch_indices(100, 100, 0, 1)).any()
    with pytest.raises(ValueError, match="no batch of 4 out of 0 images"):
        batch_indices(0, 4, 0, 0)


def test_random_shift_translates_whole_images():
    images = torch.rand(64, 3, 6, 7)
    shifted = random_shift(images, 1, generator(0))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    seen = set()
    for i in range(64):
        places = [(y, x) for y in range(3) for x in range(3) if padded[i, :, y : y + 6, x : x + 7].equal(shifted[i])]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) == 9
    assert random_shift(images, 1, generator(0)).equal(shifted)
    assert random_shift(images, 0, generator(0)).equal(images)


def test_read_images(folder: Path, tmp_path: Path):
    assert read_images(folder).shape == (14, 8, 8, 3)
    assert read_images(folder / "a")[:, 0, 0, 0].tolist() == list(range(7))
    images = np.zeros((2, 4, 6, 1), np.uint8)
    np.savez(tmp_path / "good.npz", images=images)
    np.testing.assert_array_equal(read_images(tmp_path / "good.npz"), images)
    np.savez(tmp_path / "float.npz", images=images / 255)
    np.savez(tmp_path / "other.npz", x=images)
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("float.npz", "float64 .* must be uint8 NHWC"),
        ("other.npz", "no array `images`"),
        ("text.npz", "cannot be read as .npz"),
        ("empty", "holds no images"),
        ("nowhere", "does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            read_images(tmp_path / name)


def test_png_and_grid(tmp_path: Path):
    images = np.arange(3 * 2 * 2 * 1, dtype=np.uint8).reshape(3, 2, 2, 1)
    grid = image_grid(images, columns=2, scale=3, pad=1)
    assert grid.shape == (15, 15, 1)
    np.testing.assert_array_equal(grid[1:7:3, 8:14:3], images[1])
    assert (grid[8:, 8:] == grid[0, 0]).all()
    save_png(tmp_path / "grid.png", grid)
    with Image.open(tmp_path / "grid.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), grid[..., 0])
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize("flat", [False, True], ids=["train alone", "train and a flat val"])
def test_a_folder_of_splits_is_not_a_folder_of_classes(flat: bool, tmp_path: Path):
    for name in ("train/ant/0.png", "train/bee/0.png", *(["val/0.png"] if flat else [])):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_png(tmp_path / name, np.zeros((8, 8, 1), np.uint8))
    with pytest.raises(
        ValueError, match=r"holds train/ where classes should be: give .*train, or class folders in each"
    ):
        load_data(str(tmp_path))


def arrays(**changes: Any) -> dict[str, Any]:
    images = np.arange(12 * 8 * 8, dtype=np.uint8).reshape(12, 8, 8, 1)
    return {"images": images, "labels": np.arange(12) % 2, "class_names": np.array(["a", "b"])} | changes


def test_npz(tmp_path: Path):
    file = tmp_path / "data.npz"
    np.savez(file, **arrays())
    train, test = (load_dataset(str(file), split) for split in ("train", "test"))
    assert (len(train), len(test), train.class_names, train.licence) == (8, 4, ["a", "b"], "not stated")
    assert test.images[:, 0, 0, 0].tolist() == [images[0, 0, 0] for images in arrays()["images"][[0, 1, 10, 11]]]
    np.savez(file, **arrays(test=np.arange(12) > 8, licence="mine", source="made up"))
    data = load_data(str(file), "test")
    assert (len(data), data.source, data.licence, data.labels.tolist()) == (3, "made up", "mine", [1, 0, 1])
    assert load_dataset(str(file), "train", image_size=4).images.shape == (9, 4, 4, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.arange(12)}, r"labels must be \(12,\) integers in \[0, 1\], got int64 \(12,\) from 0 to 11"),
        ({"labels": np.zeros(3, int)}, r"labels must be \(12,\) integers"),
        ({"labels": np.array(["cat"] * 12)}, r"integers in \[0, 1\], got <U3 \(12,\)"),
        ({"images": np.zeros((12, 8, 8, 1))}, "images must be uint8 NHWC of 1 or 3 channels, got float64"),
        ({"images": np.zeros((12, 8, 6, 1), np.uint8)}, "images are 8x6: choose an --image-size"),
        ({"test": np.zeros(12, int)}, r"test must be \(12,\) booleans"),
        ({"test": np.ones(12, bool)}, "the train split is empty"),
    ],
)
def test_bad_npz(tmp_path: Path, changes: dict[str, Any], message: str):
    file = tmp_path / "data.npz"
    np.savez(file, **arrays(**changes))
    with pytest.raises(ValueError, match=message) as error:
        load_dataset(str(file), "train")
    assert str(file) in str(error.value)


def test_npz_that_is_none(tmp_path: Path):
    np.savez(tmp_path / "whole.npz", **arrays())
    for content in (b"no archive", b"", (tmp_path / "whole.npz").read_bytes()[:1000]):
        (tmp_path / "data.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*data.npz"):
            load_dataset(str(tmp_path / "data.npz"))
    np.savez(tmp_path / "data.npz", images=np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match="has no 'labels': it needs images, labels and class_names"):
        load_dataset(str(tmp_path / "data.npz"))
