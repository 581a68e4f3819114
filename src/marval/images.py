"""Image files: found, decoded, cropped as ADM and MAR do, read in bulk or one by one; PNG and grids."""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from marval.checkpoint import write_atomically

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
UNREAD = (".gif", ".tif", ".tiff", ".avif", ".heic", ".jfif", ".jp2")
"""Picture formats that are not read; users must convert them."""
THREADS = min(16, os.cpu_count() or 1)
"""Threads that decode image files."""


def is_image(name: str) -> bool:
    """Whether a file name is that of a visible image."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def files_below(folder: Path) -> list[str]:
    """Paths of the visible files in a folder and its visible sub-folders, sorted."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return sorted(found)


def images_below(folder: Path) -> list[str]:
    """Paths of the images in a folder and its visible sub-folders, sorted."""
    return [path for path in files_below(folder) if is_image(os.path.basename(path))]


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square at ``size`` pixels: halved by boxes, then bicubic, as ADM and MAR preprocess ImageNet."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def square(image: Image.Image, size: int) -> np.ndarray:
    """The central square as uint8 (size, size, 3); grey images have three equal channels."""
    return np.array(center_crop(image, size).convert("RGB"))


def open_image(path: str) -> Image.Image:
    """An image file, decoded.

    Raises:
        ValueError: it cannot be read, or as `decode_image`.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image ({error.strerror}): replace or remove it") from None
    return decode_image(data, path)


def decode_image(data: bytes, path: str) -> Image.Image:
    """A decoded image of mode L or RGB with 8 bits per channel; ``path`` is for messages.

    Raises:
        ValueError: not an image, a truncated one, or one whose meaning in RGB is not clear.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 1 << 62):
            raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels are too many")
        image.load()
    except Exception as error:  # decoders raise OSError, SyntaxError, zlib.error, struct.error, ...
        reason = f"{error or type(error).__name__}".splitlines()[0]
        if isinstance(error, UnidentifiedImageError):  # it speaks of our BytesIO
            reason = "not of a known format"
        raise ValueError(f"{path} cannot be read as an image ({reason}): replace or remove it") from None
    if image.mode.startswith(("I", "F")) or (image.format == "PNG" and data[24] == 16):
        raise ValueError(f"{path} has more than 8 bits per channel: save it with 8 bits")
    if image.mode in ("LA", "RGBA") and image.getchannel("A").getextrema() == (255, 255):
        return image.convert(image.mode[:-1])
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


def read_equal(paths: list[str], image_size: int | None, squares: bool) -> np.ndarray:
    """Read images of one size into one uint8 NHWC array: C = 1 if all are grey, else 3.

    Args:
        image_size: centre-crop to squares of this size. squares: without it, refuse images that are not square.

    Raises:
        ValueError: an unreadable image, or one of another size; names the file.
    """
    arrays: list[np.ndarray] = []
    for path in paths:
        image = open_image(path)
        if image_size is not None:
            image = center_crop(image, image_size)
        elif squares and image.width != image.height:
            raise ValueError(f"{path} is {image.width}x{image.height}, not square: choose an --image-size")
        array = np.atleast_3d(np.asarray(image))
        if arrays and array.shape[:2] != arrays[0].shape[:2]:
            (height, width), first = array.shape[:2], f"{arrays[0].shape[1]}x{arrays[0].shape[0]}"
            remedy = "choose an --image-size" if squares else "make all images equal in size"
            raise ValueError(f"{path} is {width}x{height}, but {paths[0]} is {first}: {remedy}")
        arrays.append(array)
    channels = max(array.shape[2] for array in arrays)
    return np.stack([np.broadcast_to(array, (*array.shape[:2], channels)) for array in arrays])


class LazyImages:
    """Image files that are read, cropped and scaled when they are asked for, by a pool of threads.

    Attributes:
        shape: (N, S, S, 3); grey images have three equal channels.
    """

    def __init__(self, paths: list[str], image_size: int):
        self.paths, self.image_size = paths, image_size
        self.shape = (len(paths), image_size, image_size, 3)
        self.threads = ThreadPoolExecutor(THREADS, "marval-images")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """The images at positions int (B,), uint8 (B, S, S, 3); a bad file is a ValueError that names it."""
        return np.stack(list(self.threads.map(self._read, index)))

    def _read(self, i: int) -> np.ndarray:
        return square(open_image(self.paths[i]), self.image_size)


def read_images(path: Path) -> np.ndarray:
    """Unlabelled images of one size, uint8 NHWC: all of a flat or nested folder, or ``images`` of an .npz.

    Raises:
        ValueError: nothing there, an unreadable or unsuitable image, different sizes, or another kind of array.
    """
    if path.is_dir():
        if paths := images_below(path):
            return read_equal(paths, None, squares=False)
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
