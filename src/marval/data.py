"""Images from the embedded digits or from folders, validated up front; batches, shifts, and image files."""

import functools
import io
import warnings
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from marval.checkpoint import write_atomically
from marval.rng import generator

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
HOLD_OUT = 5
"""Every fifth image, from the first, is held out as the test split."""
_ORDER_KEY = 0xDA7A  # sets the stream of epoch orders apart from every other use of (seed, n)
Split = Literal["train", "test", "all"]


@dataclass(frozen=True)
class ImageDataset:
    """Labelled images in memory.

    Attributes:
        images: uint8 NHWC, C is 1 or 3. labels: int64 (N,). class_names: one per class.
        source, licence: where the images are from, and their terms.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    source: str
    licence: str

    def __len__(self) -> int:
        return len(self.images)


def load_dataset(source: str, split: Split = "train", image_size: int | None = None) -> ImageDataset:
    """Read and validate every image of a split.

    A folder is split by its sub-folders train/ and test/ (or val/) if these hold class folders; otherwise the
    images of each class, sorted by name, are held out where index % 5 == 0 (a single image is kept for training).

    Args:
        source: ``digits`` (embedded), or a folder with one sub-folder of images per class (classes sorted by name).
        image_size: centre-crop to squares of this size; None if all images already are squares of one size.

    Raises:
        ValueError: no such data, no or empty classes, an unreadable or unsuitable image; names file and remedy.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"unknown split {split!r}: choose train, test or all")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image size must be at least 1, got {image_size}")
    return _digits(split, image_size) if source == "digits" else _folder(Path(source), split, image_size)


def _digits(split: Split, image_size: int | None) -> ImageDataset:
    with resources.files("marval").joinpath("assets/digits.npz").open("rb") as file:
        arrays = np.load(file)
        images, labels = arrays["x"], arrays["label"].astype(np.int64)
    held_out = np.arange(len(labels)) % HOLD_OUT == 0
    keep = {"train": ~held_out, "test": held_out, "all": held_out | True}[split]
    images = images[keep]
    if image_size is not None:
        crops = [center_crop(Image.fromarray(image[..., 0]), image_size) for image in images]
        images = np.stack([np.asarray(crop) for crop in crops])[..., None]
    source = "UCI Optical Recognition of Handwritten Digits, test part"
    return ImageDataset(images, labels[keep], [str(c) for c in range(10)], source, "CC BY 4.0")


def _folder(root: Path, split: Split, image_size: int | None) -> ImageDataset:
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"data {str(root)!r} {problem}: give digits, or a folder with one sub-folder per class")
    held_out = next((root / name for name in ("test", "val") if _subfolders(root / name)), None)
    if held_out is not None and _subfolders(root / "train"):
        files = _class_files(root / "train")
        test = _class_files(held_out)
        if odd := sorted(set(files) ^ set(test)):
            raise ValueError(f"class {odd[0]!r} is not in both {root / 'train'} and {held_out}: make the classes equal")
        if split != "train":
            files = {name: (files[name] if split == "all" else []) + test[name] for name in files}
    else:
        files = {name: _split(paths, split) for name, paths in _class_files(root).items()}
    paths = [path for group in files.values() for path in group]
    if not paths:
        raise ValueError(f"the {split} split of {root} is empty: every class has one image only; add images")
    labels = np.repeat(np.arange(len(files)), [len(group) for group in files.values()]).astype(np.int64)
    images = _read_equal(paths, image_size, square=True)
    return ImageDataset(images, labels, list(files), str(root), "not stated")


def _subfolders(folder: Path) -> list[Path]:
    """Visible sub-folders sorted by name; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _class_files(root: Path) -> dict[str, list[Path]]:
    """Class name -> its images, both sorted by name; at least one class, and one image of each."""
    classes = _subfolders(root)
    if not classes:
        raise ValueError(f"{root} has no class folders: put the images of each class into a sub-folder of its own")
    files = {c.name: sorted(filter(_is_image, c.iterdir()), key=lambda p: p.name) for c in classes}
    for folder in classes:
        if not files[folder.name]:
            raise ValueError(f"class folder {folder} has no images ({' '.join(SUFFIXES)}): add some, or remove it")
    return files


def _split(paths: list[Path], split: Split) -> list[Path]:
    if split == "all" or len(paths) == 1:
        return [] if split == "test" else paths
    return [path for i, path in enumerate(paths) if (i % HOLD_OUT == 0) == (split == "test")]


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square at ``size`` pixels: halved by boxes, then bicubic, as ADM and MAR preprocess ImageNet."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _open(path: Path) -> Image.Image:
    """A decoded image of mode L or RGB with 8 bits per channel."""
    try:
        data = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            image = Image.open(io.BytesIO(data))
            image.load()
    except Exception as error:  # decoders raise OSError, SyntaxError, zlib.error, struct.error, ...
        reason = f"{error or type(error).__name__}".splitlines()[0]
        raise ValueError(f"{path} cannot be read as an image ({reason}): replace or remove it") from None
    if image.mode.startswith(("I", "F")) or (image.format == "PNG" and data[24] == 16):
        raise ValueError(f"{path} has more than 8 bits per channel: save it with 8 bits")
    if "A" in image.mode or "a" in image.mode or ("transparency" in image.info and image.mode != "P"):
        raise ValueError(f"{path} has transparency: flatten it onto a background and save it as RGB")
    if image.mode == "CMYK":
        return image.convert("RGB")
    if image.mode not in ("L", "RGB"):
        kind = {"P": "a palette image", "1": "a black-and-white image"}.get(
            image.mode, f"an image of mode {image.mode}"
        )
        raise ValueError(f"{path} is {kind}: convert it to RGB, or to 8-bit grey")
    return image


def _read_equal(paths: list[Path], image_size: int | None, square: bool) -> np.ndarray:
    """Images as one uint8 NHWC array: C = 1 if all are grey, else 3."""
    arrays: list[np.ndarray] = []
    for path in paths:
        image = _open(path)
        if image_size is not None:
            image = center_crop(image, image_size)
        elif square and image.width != image.height:
            raise ValueError(f"{path} is {image.width}x{image.height}, not square: choose an --image-size")
        array = np.atleast_3d(np.asarray(image))
        if arrays and array.shape[:2] != arrays[0].shape[:2]:
            (height, width), first = array.shape[:2], f"{arrays[0].shape[1]}x{arrays[0].shape[0]}"
            remedy = "choose an --image-size" if square else "make all images equal in size"
            raise ValueError(f"{path} is {width}x{height}, but {paths[0]} is {first}: {remedy}")
        arrays.append(array)
    channels = max(array.shape[2] for array in arrays)
    return np.stack([np.broadcast_to(array, (*array.shape[:2], channels)) for array in arrays])


@functools.lru_cache(maxsize=2)
def _epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    return torch.randperm(num_images, generator=generator(seed, epoch, _ORDER_KEY)).numpy()


def batch_indices(num_images: int, batch: int, step: int, seed: int) -> np.ndarray:
    """Images of update ``step``, int64 (batch,): a window on an endless stream of freshly permuted epochs.

    A pure function: each epoch visits every image once, batches may span epochs, and a resume needs no state.

    Raises:
        ValueError: no images, an empty batch, or a negative step or seed.
    """
    if num_images < 1 or batch < 1 or step < 0 or seed < 0:
        raise ValueError(f"no batch of {batch} out of {num_images} images at step {step} with seed {seed}")
    epochs, places = np.divmod(np.arange(step * batch, (step + 1) * batch), num_images)
    parts = [_epoch_order(num_images, seed, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
    return np.concatenate(parts)


def random_shift(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Translate each image (NCHW) by -shift .. shift whole pixels in y and x; borders are replicated."""
    batch, channels, height, width = images.shape
    offsets = torch.randint(-shift, shift + 1, (2, batch, 1), generator=generator, device=generator.device)
    dy, dx = offsets.to(images.device)
    rows = (torch.arange(height, device=images.device) + dy).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) + dx).clamp(0, width - 1)
    n = torch.arange(batch, device=images.device)[:, None, None, None]
    c = torch.arange(channels, device=images.device)[:, None, None]
    return images[n, c, rows[:, None, :, None], columns[:, None, None, :]]


def read_images(path: Path) -> np.ndarray:
    """Unlabelled images of one size, uint8 NHWC: all of a flat or nested folder, or ``images`` of an .npz.

    Raises:
        ValueError: nothing there, an unreadable or unsuitable image, different sizes, or another kind of array.
    """
    if path.is_dir():
        visible = (p for p in path.rglob("*") if not any(q.startswith(".") for q in p.relative_to(path).parts))
        if paths := sorted(filter(_is_image, visible)):
            return _read_equal(paths, None, square=False)
        raise ValueError(f"{path} holds no images ({' '.join(SUFFIXES)})")
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a folder of images, or an .npz with `images` (uint8 NHWC)")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays["images"]
    except KeyError:
        raise ValueError(f"{path} has no array `images`: save it with np.savez(path, images=uint8 NHWC)") from None
    except Exception as error:  # numpy raises ValueError, OSError, EOFError, BadZipFile, TypeError, ...
        raise ValueError(f"{path} cannot be read as .npz ({type(error).__name__}): give another, or a folder") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"`images` of {path} is {found}: it must be uint8 NHWC with 1 or 3 channels")
    return images


def save_png(path: Path, image: np.ndarray) -> None:
    """Write an image, uint8 HWC with 1 or 3 channels; the file is whole or it is not there."""
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    write_atomically(path, lambda p: picture.save(p, format="PNG", optimize=True))


def image_grid(images: np.ndarray, columns: int, scale: int = 1, pad: int = 1) -> np.ndarray:
    """Images (uint8 NHWC) in rows of ``columns`` -> one uint8 HWC; enlarged by pixel repetition, light padding."""
    if columns < 1 or not len(images):
        raise ValueError(f"a grid needs images and columns, got {len(images)} images in {columns} columns")
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    grid = np.full((rows * (height + pad) + pad, columns * (width + pad) + pad, channels), 240, np.uint8)
    for i, image in enumerate(images):
        y, x = pad + i // columns * (height + pad), pad + i % columns * (width + pad)
        grid[y : y + height, x : x + width] = image
    return grid
