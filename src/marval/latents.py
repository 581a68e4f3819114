"""Latents of images, as `marval encode` writes them: memory-mapped float16 shards of posterior moments.

index.json            tokenizer, image size, class names and counts, checksum of every other file, bad images
labels.npy            int64 (N,): positions in the class names
shard-00000.npy       float16 (n, 2, 2C, h, w): posterior mean ++ log-variance of each image and of its mirror image
tokenizer/            the autoencoder
reconstructions.png   originals above their reconstructions
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from marval import imagenet
from marval.checkpoint import read_json, sha256

FORMAT = 1
Split = Literal["train", "test", "all"]
Classes = Literal["folders", "imagenet"]


@dataclass(frozen=True)
class LatentDataset:
    """Labelled posterior moments on disk; only what is asked for is read.

    Attributes:
        labels: int64 (N,). class_names: one per class. source, licence: where the images are from, and their terms.
        image_size: side of the encoded squares, in pixels. tokenizer_folder: the autoencoder that encoded them.
        folders: where the shards are. shards: memory maps, float16 (n, 2, 2C, h, w).
    """

    labels: np.ndarray
    class_names: list[str]
    source: str
    licence: str
    image_size: int
    tokenizer_folder: Path
    folders: list[Path]
    shards: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.labels)

    def moments(self, index: np.ndarray, mirrored: np.ndarray) -> Tensor:
        """Posterior mean ++ log-variance, float32 (B, 2C, h, w), of images: int (B,), mirrored or not: bool (B,)."""
        ends = np.cumsum([len(shard) for shard in self.shards])
        of_shard = np.searchsorted(ends, index, side="right")
        result = np.empty((len(index), *self.shards[0].shape[2:]), np.float32)
        for number in np.unique(of_shard):
            rows, shard = np.flatnonzero(of_shard == number), self.shards[number]
            result[rows] = shard[index[rows] - (ends[number] - len(shard)), mirrored[rows].astype(int)]
        return torch.from_numpy(result)

    def verify(self) -> None:
        """Read every file of the latents and compare its checksum.

        Raises:
            ValueError: names the first damaged file.
        """
        for folder in self.folders:
            for name, checksum in checksums(read_index(folder)).items():
                if sha256(folder / name) != checksum:
                    raise ValueError(f"{folder / name} is damaged: run marval encode again with --resume to repair it")


def checksums(index: dict[str, Any]) -> dict[str, str]:
    """Checksums of the data files that an index lists, by file name."""
    return {"labels.npy": index["labels_sha256"], **{shard["file"]: shard["sha256"] for shard in index["shards"]}}


def holds_latents(root: Path) -> bool:
    """Whether a folder, or its sub-folder train/, was written by `marval encode`."""
    return any((folder / "index.json").is_file() for folder in (root, root / "train"))


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of latents, finished or not (then its ``shards`` is None).

    Raises:
        ValueError: no such file, or another kind of file.
    """
    index = read_json(folder / "index.json")
    if not isinstance(index, dict) or index.get("format") != FORMAT or "shards" not in index:
        raise ValueError(f"{folder / 'index.json'} was not written by this version of marval encode (format {FORMAT})")
    return index


def load_latents(root: Path, split: Split = "train", classes: Classes = "folders") -> LatentDataset:
    """Open a folder of `marval encode`, or of two such folders, train/ and test/ (or val/), of which ``split`` chooses.

    A folder of its own is one split, whichever images it holds: ``train`` and ``all`` take it, it has no ``test``.
    Shapes, types and sizes of all files are checked here, their checksums by `LatentDataset.verify` and by `marval
    encode --resume`: reading all of ImageNet's 42 GB before every run would cost minutes.

    Raises:
        ValueError: unfinished or damaged latents, splits that do not fit together, unknown classes; names the file.
    """
    if (root / "index.json").is_file():
        if split == "test":
            raise ValueError(f"{root} holds one split: for {split}, encode images into {root}/train and {root}/val")
        folders = [root]
    else:
        held_out = next((root / name for name in ("test", "val") if (root / name / "index.json").is_file()), None)
        if held_out is None and split != "train":
            raise ValueError(f"{root} has no latents in test/ or val/: encode the held-out images into {root / 'val'}")
        folders = [root / "train"] if split != "test" else []
        folders += [held_out] if held_out is not None and split != "train" else []
    indices = [read_index(folder) for folder in folders]
    first, shards, parts = indices[0], [], []
    for folder, index in zip(folders, indices, strict=True):
        if index["shards"] is None:
            raise ValueError(f"{folder} is not finished: run marval encode again with --resume")
        for name in ("image_size", "moments_shape", "class_names", "tokenizer_sha256"):
            if index[name] != first[name]:
                raise ValueError(f"{folders[0]} and {folder} differ in {name}: encode both in the same way")
        for shard in index["shards"]:
            shape = (shard["images"], 2, *index["moments_shape"])
            shards.append(_map(folder / shard["file"], np.dtype(np.float16), shape))
        parts.append(np.array(_map(folder / "labels.npy", np.dtype(np.int64), (index["num_images"],))))
    labels, names = class_labels(np.concatenate(parts), first["class_names"], classes, root, first["numbered_classes"])
    source = f"{first['source']}, encoded at {first['image_size']} px"
    licence = first.get("licence", "not stated")
    return LatentDataset(labels, names, source, licence, first["image_size"], folders[0] / "tokenizer", folders, shards)


def _map(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Map a .npy file into memory; raises ValueError unless it has this type and shape."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = f"{error}".splitlines()[0]
        raise ValueError(f"{path} cannot be read ({reason}): run marval encode again with --resume") from None
    if array.dtype != dtype or array.shape != shape:
        found = f"{array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}"
        raise ValueError(f"{path} is {found}: run marval encode again with --resume")
    return array


def class_labels(
    labels: np.ndarray, names: list[str], classes: Classes, source: str | Path, numbered: bool = False
) -> tuple[np.ndarray, list[str]]:
    """Labels and class names: as found in ``source``, or among ImageNet's 1,000, where a class is named by WordNet id.

    Args:
        numbered: the names are class numbers of a webdataset, "0", "1" .., which are ImageNet's positions already.

    Raises:
        ValueError: unknown ``classes``, or a class that is not among ImageNet's.
    """
    if classes not in ("folders", "imagenet"):
        raise ValueError(f"unknown classes {classes!r}: choose folders or imagenet")
    if classes == "folders":
        return labels, names
    positions = imagenet.index_of_wnid()
    if numbered:
        positions = {str(position): position for position in positions.values()}
    if unknown := [name for name in names if name not in positions]:
        remedy = "name it by WordNet id, such as n01443537, or choose --classes folders"
        raise ValueError(f"class {unknown[0]!r} of {source} is not one of ImageNet's 1,000: {remedy}")
    return np.array([positions[name] for name in names], np.int64)[labels], imagenet.names()
