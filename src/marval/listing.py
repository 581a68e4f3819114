"""Labelled image files where they lie: folders of class folders, or members of tar files, read without unpacking."""

import glob
import json
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from marval import imagenet
from marval.data import class_files
from marval.images import SUFFIXES, decode_image, is_image, square


class Entry(NamedTuple):
    """One image file, or a member of a tar file."""

    name: str
    """For messages: the path, or ``tar:member``."""
    file: str
    offset: int
    size: int
    """Bytes from ``offset``; -1 for all."""
    label: int


class Listing(NamedTuple):
    """All images of a split, in the order of the shards."""

    entries: list[Entry]
    class_names: list[str]
    numbered: bool
    """The class names are class numbers of a webdataset."""


def load_square(entry: Entry, image_size: int) -> np.ndarray | ValueError:
    """The central square, uint8 (S, S, 3), or what is wrong with the file."""
    try:
        with open(entry.file, "rb") as file:
            file.seek(entry.offset)
            data = file.read(entry.size)
        return square(decode_image(data, entry.name), image_size)
    except OSError as error:
        return ValueError(f"{entry.name} cannot be read ({error.strerror}): replace or remove it")
    except ValueError as error:
        return error


def list_images(images: str) -> Listing:
    """All images of a folder of class folders or of tar files, see `marval.encode.encode`.

    Raises:
        ValueError: no images, no classes, or a damaged tar file.
    """
    root = Path(images)
    tars = sorted(glob.glob(f"{glob.escape(images)}/*.tar")) if root.is_dir() else sorted(glob.glob(images))
    if root.is_file():
        tars = [images]
    if root.is_dir() and (not tars or any(path.is_dir() for path in root.iterdir() if path.name[0] != ".")):
        files = class_files(root)
        entries = [Entry(path, path, 0, -1, label) for label, name in enumerate(files) for path in files[name]]
        return Listing(entries, list(files), False)
    if not tars:
        raise ValueError(f"images {images!r} do not exist: give a folder of class folders, or .tar files")
    found: list[tuple[Entry, str | int]] = []
    for tar in tars:
        found += _members(tar)
    if not found:
        raise ValueError(f"{images} holds no images ({' '.join(SUFFIXES)})")
    kinds = {type(label): entry for entry, label in found}
    if len(kinds) > 1:
        one, other = (entry.name for entry in kinds.values())
        raise ValueError(f"{one} and {other}: one has a class name, one a class number; use one kind for all")
    if int in kinds:
        names: list[Any] = [str(number) for number in range(max(int(label) for _, label in found) + 1)]
        return Listing([entry._replace(label=int(label)) for entry, label in found], names, True)
    names = sorted({label for _, label in found})
    place = {name: position for position, name in enumerate(names)}
    return Listing([entry._replace(label=place[label]) for entry, label in found], names, False)


def _members(path: str) -> list[tuple[Entry, str | int]]:
    """The images of a tar file in its order, each with the name or number of its class."""
    images: list[Entry] = []
    labels: dict[str, str | int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # else all headers stay in memory
                name = member.name.removeprefix("./")
                key = _key(name)
                if not member.isfile() or any(part.startswith(".") for part in name.split("/")):
                    continue
                if is_image(name):
                    images.append(Entry(name, path, member.offset_data, member.size, -1))
                elif name in (f"{key}.cls", f"{key}.json") and (content := tar.extractfile(member)) is not None:
                    label = _label(content.read(), f"{path}:{name}")
                    labels.update({} if label is None else {key: label})
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no whole, uncompressed tar file ({error}): copy or pack it again") from None
    found: list[tuple[Entry, str | int]] = []
    for entry in images:
        key, whole = _key(entry.name), entry._replace(name=f"{path}:{entry.name}")
        if key not in labels:
            found.append((whole, _folder(entry.name, path)))
        elif entry.name.count(".", len(key)) == 1:  # not another picture of a sample, such as key.mask.png
            found.append((whole, labels[key]))
    return found


def _key(name: str) -> str:
    """What the members of a webdataset's sample have in common: all before the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _label(content: bytes, name: str) -> str | int | None:
    """Class name or number in a .cls or .json member; None if a .json has none."""
    try:
        value: Any = content.decode().strip()
        if name.endswith(".json"):
            values = json.loads(value)
            value = values.get("label", values.get("class"))
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if value is None or (isinstance(value, str) and value) or (type(value) is int and 0 <= value < 1 << 20):
            return value
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{name} holds no class name or number: it must be text, or JSON with `label` or `class`")


def _folder(name: str, path: str) -> str:
    """Class of a member without a label of its own."""
    folder = name.split("/")[0] if "/" in name else Path(path).stem
    if "/" not in name and folder not in imagenet.index_of_wnid():
        raise ValueError(f"{path}:{name} has no class: it needs a folder, a .cls or .json with its class beside it")
    if folder in ("train", "val", "test"):
        raise ValueError(f"{path}:{name} has its split where the class should be: pack the class folders themselves")
    return folder
