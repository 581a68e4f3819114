"""Labelled images: the embedded digits, a folder or an .npz, or latents of them; training and test split."""

import functools
import itertools
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from marval.config import warn
from marval.images import SUFFIXES, UNREAD, LazyImages, center_crop, files_below, is_image, open_image, read_equal
from marval.latents import Classes, LatentDataset, Split, class_labels, holds_latents, load_latents

HOLD_OUT = 5
"""Every fifth image, from the first, is held out as the test split."""
IN_MEMORY = 1 << 30
"""Bytes of decoded images up to which `load_data` keeps a folder in memory."""


Images = TypeVar("Images", bound=np.ndarray | LazyImages)


@dataclass(frozen=True)
class ImageDataset(Generic[Images]):
    """Labelled images, in memory or read from their files.

    Attributes:
        images: uint8 NHWC, C is 1 or 3, indexed by an int array. labels: int64 (N,). class_names: one per class.
        source, licence: where the images are from, and their terms.
    """

    images: Images
    labels: np.ndarray
    class_names: list[str]
    source: str
    licence: str

    def __len__(self) -> int:
        return len(self.images)


def load_dataset(
    source: str, split: Split = "train", image_size: int | None = None, classes: Classes = "folders"
) -> ImageDataset[np.ndarray]:
    """Read and validate every image of a split; all are kept in memory.

    A folder is split by its sub-folders train/ and test/ (or val/) if these hold class folders; otherwise the
    images of each class, sorted by path, are held out where index % 5 == 0 (a single image is kept for training).

    Args:
        source: ``digits`` (embedded); a folder with one sub-folder per class (sorted by name), images anywhere
            below it; or an .npz of ``images`` (uint8 NHWC), ``labels`` (N,), ``class_names``, and where they are
            known ``test`` (bool (N,): held out; otherwise every fifth of a class), ``source`` and ``licence``. The
            licence of a folder is the first line of its LICENCE.txt.
        image_size: centre-crop to squares of this size; None if all images already are squares of one size.
        classes: the sub-folders, or ImageNet's 1,000, of which the sub-folders are named by WordNet id.

    Raises:
        ValueError: no such data, no or empty classes, an unreadable or unsuitable image; names file and remedy.
    """
    _check(split, image_size)
    if source == "digits":
        return _digits(split, image_size, classes)
    if Path(source).suffix == ".npz":
        return _npz(Path(source), split, image_size, classes)
    paths, labels, names = _labelled_files(Path(source), split, classes)
    images = read_equal(paths, image_size, squares=True)
    return ImageDataset(images, labels, names, source, stated_licence(Path(source)))


def load_data(
    source: str, split: Split = "train", image_size: int | None = None, classes: Classes = "folders"
) -> ImageDataset | LatentDataset:
    """Images, as by `load_dataset`, or latents, as by `load_latents`, without filling the memory.

    A folder of more than 1 GiB of decoded images is read batch by batch: names, classes and the first image are
    checked now, a bad file is named when its turn comes. It needs an ``image_size``.

    Raises:
        ValueError: as `load_dataset` and `load_latents`; an image size that is not the latents'.
    """
    _check(split, image_size)
    root = Path(source)
    if source != "digits" and holds_latents(root):
        latents = load_latents(root, split, classes)
        if image_size not in (None, latents.image_size):
            raise ValueError(f"{root} holds latents of {latents.image_size} px images: leave --image-size out")
        return latents
    if source == "digits" or not root.is_dir():
        return load_dataset(source, split, image_size, classes)
    paths, labels, names = _labelled_files(root, split, classes)
    side = image_size or min(open_image(paths[0]).size)
    if len(paths) * side * side * 3 <= IN_MEMORY:
        return load_dataset(source, split, image_size, classes)
    if image_size is None:
        raise ValueError(f"{root} holds {len(paths)} images, too many to compare their sizes: choose an --image-size")
    images = LazyImages(paths, image_size)
    return ImageDataset(images, labels, names, source, stated_licence(root))


def _check(split: str, image_size: int | None) -> None:
    if split not in ("train", "test", "all"):
        raise ValueError(f"unknown split {split!r}: choose train, test or all")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image size must be at least 1, got {image_size}")


def _digits(split: Split, image_size: int | None, classes: Classes) -> ImageDataset[np.ndarray]:
    with resources.files("marval").joinpath("assets/digits.npz").open("rb") as file:
        arrays = np.load(file)
        images, labels = arrays["x"], arrays["label"].astype(np.int64)
    held_out = np.arange(len(labels)) % HOLD_OUT == 0
    keep = {"train": ~held_out, "test": held_out, "all": held_out | True}[split]
    images = images[keep]
    images = images if image_size is None else _resize(images, image_size)
    source = "UCI Optical Recognition of Handwritten Digits, test part"
    labels, names = class_labels(labels[keep], [str(c) for c in range(10)], classes, "digits")
    return ImageDataset(images, labels, names, source, "CC BY 4.0")


def _npz(path: Path, split: Split, image_size: int | None, classes: Classes) -> ImageDataset[np.ndarray]:
    """A split of the images of an .npz, whose arrays `load_dataset` describes."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except MemoryError:
        raise
    except Exception as error:  # numpy raises ValueError, OSError, EOFError, BadZipFile, ...
        what = f"{error}" if isinstance(error, OSError) else "it is damaged, or not of numpy.savez"
        if "Object arrays" in str(error):
            what = "an array in it holds Python objects: save names with dtype=str"
        raise ValueError(f"cannot read {path}: {what}") from None
    if missing := [name for name in ("images", "labels", "class_names") if name not in arrays]:
        raise ValueError(f"{path} has no {missing[0]!r}: it needs images, labels and class_names")
    images, labels, names = arrays["images"], arrays["labels"], [str(name) for name in arrays["class_names"]]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not len(images):
        raise ValueError(f"{path}: images must be uint8 NHWC of 1 or 3 channels, got {images.dtype} {images.shape}")
    if image_size is None and images.shape[1] != images.shape[2]:
        raise ValueError(f"{path}: images are {images.shape[1]}x{images.shape[2]}: choose an --image-size")
    whole = labels.shape == images.shape[:1] and np.issubdtype(labels.dtype, np.integer)
    if not whole or labels.min() < 0 or labels.max() >= len(names):
        found = f"{labels.dtype} {labels.shape}" + (f" from {labels.min()} to {labels.max()}" if whole else "")
        raise ValueError(f"{path}: labels must be ({len(images)},) integers in [0, {len(names) - 1}], got {found}")
    held_out = np.zeros(len(images), bool)
    for label in range(len(names)):
        of_class = np.flatnonzero(labels == label)
        held_out[of_class[::HOLD_OUT]] = len(of_class) > 1
    held_out = arrays.get("test", held_out)
    if held_out.dtype != bool or held_out.shape != labels.shape:
        raise ValueError(f"{path}: test must be ({len(images)},) booleans, got {held_out.dtype} {held_out.shape}")
    keep = {"train": ~held_out, "test": held_out, "all": held_out | True}[split]
    if not keep.any():
        raise ValueError(f"{path}: the {split} split is empty")
    labels, names = class_labels(labels[keep].astype(np.int64), names, classes, path)
    source, licence = str(arrays.get("source", path)), str(arrays.get("licence", "not stated"))
    images = images[keep]
    return ImageDataset(images if image_size is None else _resize(images, image_size), labels, names, source, licence)


def _resize(images: np.ndarray, size: int) -> np.ndarray:
    """Centre-crop and scale images, uint8 NHWC, to squares of ``size`` pixels."""
    pictures = (Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in images)
    crops = [center_crop(picture, size) for picture in pictures]
    return np.stack([np.asarray(crop).reshape(size, size, -1) for crop in crops])


def _labelled_files(root: Path, split: Split, classes: Classes) -> tuple[list[str], np.ndarray, list[str]]:
    """Image files of a split, their labels and the names of the classes."""
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        kinds = "digits, a folder with one sub-folder per class, an .npz, or a folder of latents from `marval encode`"
        raise ValueError(f"data {str(root)!r} {problem}: give {kinds}")
    if (folders := split_folders(root)) is not None:
        files, test = map(class_files, folders)
        if odd := sorted(set(files) ^ set(test)):
            raise ValueError(f"class {odd[0]!r} is not in both {folders[0]} and {folders[1]}: make the classes equal")
        if split != "train":
            files = {name: (files[name] if split == "all" else []) + test[name] for name in files}
    else:
        files = {name: _split(paths, split) for name, paths in class_files(root).items()}
    paths = list(itertools.chain.from_iterable(files.values()))
    if not paths:
        raise ValueError(f"the {split} split of {root} is empty: every class has one image only; add images")
    labels = np.repeat(np.arange(len(files)), [len(group) for group in files.values()]).astype(np.int64)
    return paths, *class_labels(labels, list(files), classes, root)


def stated_licence(root: Path) -> str:
    """First line of LICENCE.txt, LICENSE.txt or LICENSE in a folder of images, or beside it if it is a split."""
    folders = (root, root.parent) if root.name in ("train", "val", "test") else (root,)
    for file in (folder / name for folder in folders for name in ("LICENCE.txt", "LICENSE.txt", "LICENSE")):
        if file.is_file() and (text := file.read_text(errors="replace").strip()):
            return text.splitlines()[0].strip()
    return "not stated"


def split_folders(root: Path) -> tuple[Path, Path] | None:
    """The sub-folders train/ and test/ (or val/) of a folder of images, if both hold class folders."""
    held_out = next((root / name for name in ("test", "val") if _subfolders(root / name)), None)
    return (root / "train", held_out) if held_out is not None and _subfolders(root / "train") else None


def _subfolders(folder: Path) -> list[Path]:
    """Visible sub-folders sorted by name; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name)


def class_files(root: Path) -> dict[str, list[str]]:
    """Paths of the images of each class by its name, both sorted; at least one class, and one image of each.

    Warns of pictures that no one will see: beside the class folders, or of formats that are not read.

    Raises:
        ValueError: no class folders, or an empty one.
    """
    classes = _subfolders(root)
    if not classes:
        raise ValueError(f"{root} has no class folders: put the images of each class into a sub-folder of its own")
    if splits := [folder.name for folder in classes if folder.name in ("train", "val", "test")]:
        inside = root / splits[0]
        raise ValueError(f"{root} holds {splits[0]}/ where classes should be: give {inside}, or class folders in each")
    below = {folder.name: files_below(folder) for folder in classes}
    odd = [str(path) for path in sorted(root.iterdir()) if path.is_file() and is_image(path.name)]
    odd += [path for paths in below.values() for path in paths if path.lower().endswith(UNREAD)]
    if odd:
        what = f"pictures in {root} are left out ({len(odd)} in all), such as {odd[0]}"
        _warn_once(f"{what}: they lie beside the class folders, or are not of {' '.join(SUFFIXES)}")
    files = {name: [path for path in paths if path.lower().endswith(SUFFIXES)] for name, paths in below.items()}
    for folder in classes:
        if not files[folder.name]:
            raise ValueError(f"class folder {folder} has no images ({' '.join(SUFFIXES)}): add some, or remove it")
    return files


@functools.cache
def _warn_once(what: str) -> None:
    """Warn of something the first time only: a folder is listed for each split."""
    warn(what)


def _split(paths: list[str], split: Split) -> list[str]:
    if split == "all" or len(paths) == 1:
        return [] if split == "test" else paths
    return [path for i, path in enumerate(paths) if (i % HOLD_OUT == 0) == (split == "test")]
