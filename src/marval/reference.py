"""What generated images are compared with: features of real images, or their statistics from a file.

Also how all processes share such work: images come in chunks whose borders depend on nothing but their number, a
process takes whole chunks, and the parts are put together in order. So no number depends on how many processes ran.
"""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from marval.checkpoint import save_arrays
from marval.data import ImageDataset, load_data
from marval.distributed import World
from marval.features import FeatureNetwork, load_features
from marval.images import LazyImages, images_below, read_equal, read_images
from marval.latents import Split, holds_latents
from marval.metrics import Moments, Statistics, kernel_distance, precision_recall
from marval.rng import generator

CHUNK = 250
"""Images per chunk."""
NEIGHBOURS = 3
"""Nearest neighbours that precision and recall go by."""
_KID_KEY = 0x41D  # sets the stream of KID's subsets apart from every other use of the seed


@dataclass(frozen=True)
class Reference:
    """Real images as a feature network sees them.

    Attributes:
        name: as the user gave it. source: what was there. count: images behind the moments, 0 if unknown.
        moments, spatial: of pooled and of spatial features; the latter None if there are none.
        features: pooled features (M, F) float32, for KID, precision and recall; None if only statistics are known.
    """

    name: str
    source: str
    count: int
    moments: Moments
    spatial: Moments | None = None
    features: Tensor | None = None


# ---- chunks


def num_chunks(count: int) -> int:
    """Number of chunks of ``count`` images."""
    return -(-count // CHUNK)


def chunk_rows(index: int, count: int) -> range:
    """Indices of the images of chunk ``index``, of ``count`` images in all."""
    return range(index * CHUNK, min((index + 1) * CHUNK, count))


def rounds(chunks: Sequence[int], world: World) -> Iterator[tuple[int, list[int]]]:
    """(the chunk of this process, the chunks of all processes), until all are done.

    Every process gets equally many; one for which none is left repeats the last.
    """
    for start in range(0, len(chunks), world.size):
        group = list(chunks[start : start + world.size])
        yield group[min(world.rank, len(group) - 1)], group


def gather_chunks(rows: dict[str, Tensor], counts: Sequence[int], world: World) -> list[dict[str, Tensor]]:
    """Every process's rows of this round, for the first ``len(counts)`` processes, which had so many."""
    height = max(counts)
    gathered: dict[str, Tensor] = {}
    for name, value in rows.items():
        padded = value.new_zeros(height, *value.shape[1:])
        padded[: len(value)] = value
        gathered[name] = world.gather_rows(padded)
    starts = [i * height for i in range(len(counts))]
    parts = zip(starts, counts, strict=True)
    return [{name: value[start : start + count] for name, value in gathered.items()} for start, count in parts]


def features_in_chunks(
    count: int, read: Callable[[range], np.ndarray], network: FeatureNetwork, world: World, title: str
) -> Iterator[dict[str, Tensor]]:
    """Features of images 0 .. count - 1, chunk by chunk in order, on every process; ``read`` gives uint8 NHWC."""
    with tqdm(total=count, desc=title, unit="img", delay=2, disable=not world.is_main, dynamic_ncols=True) as bar:
        for mine, group in rounds(range(num_chunks(count)), world):
            rows = network(read(chunk_rows(mine, count))).parts()
            counts = [len(chunk_rows(i, count)) for i in group]
            yield from gather_chunks(rows, counts, world)
            bar.update(sum(counts))


# ---- comparisons


def enough(features: Tensor, real: Tensor) -> bool:
    """Whether there are enough images on both sides for `sample_distances`."""
    return min(len(features), len(real)) > NEIGHBOURS


def sample_distances(
    features: Tensor, real: Tensor, seed: int, device: torch.device, subsets: int = 100
) -> dict[str, float]:
    """KID with its standard deviation over ``subsets``, precision and recall of features (N, F) against (M, F).

    Args:
        seed: of KID's subsets. device: where to compute.
    """
    pair = features.to(device), real.to(device)
    kid, kid_std = kernel_distance(*pair, generator(seed, _KID_KEY), subsets)
    precision, recall = precision_recall(*pair, NEIGHBOURS)
    return {"kid": kid, "kid_std": kid_std, "precision": precision, "recall": recall}


# ---- references


def load_network(spec: str, world: World, inception_weights: str = "") -> FeatureNetwork:
    """`load_features` on every process, the first one first: it may have to download the weights."""
    network = load_features(spec, world.device, inception_weights) if world.is_main else None
    world.barrier()
    return network or load_features(spec, world.device, inception_weights)


def split_of(name: str) -> tuple[str, Split]:
    """``data:train`` or ``data:test`` -> data and split; any other name is whole."""
    data, colon, split = name.rpartition(":")
    return (data, split) if colon and split in ("train", "test") else (name, "all")


def check_reference(name: str) -> None:
    """Raises ValueError if nothing has the name that `load_reference` is to load."""
    data = split_of(name)[0]
    if data != "digits" and not Path(data).exists():
        known = "digits, a folder of images, an .npz, or a split of training data, as DATA:test"
        raise ValueError(f"reference {name} does not exist: give {known}")


def holds_images(name: str) -> bool:
    """Whether `load_reference` has images to look at, which takes a while, and not statistics or an unreadable file
    alone."""
    path = Path(split_of(name)[0])
    if path.suffix != ".npz" or path.is_dir():
        return True
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        arrays = {name.removesuffix(".npy") for name in file.namelist()}
    return bool(arrays & {"arr_0", "images"}) and not arrays >= {"mu", "features"}


def load_reference(
    name: str, network: FeatureNetwork, image_size: int | None = None, channels: int = 3, world: World | None = None
) -> Reference:
    """Features or statistics of real images.

    Args:
        name: ``digits`` (training split), ``DATA:train`` or ``DATA:test`` (a split of `load_dataset`'s data, such as
            ``digits:test``), a folder of images (also nested), an .npz of images (``images``, or
            ``arr_0`` as in ADM's files, uint8 NHWC), or an .npz with ``mu`` (F,) and ``sigma`` (F, F), for sFID also
            ``mu_s`` and ``sigma_s``. One with both, as ADM's, gives its statistics and, of its images, the features.
        image_size: images of a folder are centre-cropped and scaled to it, as ADM and MAR do; None takes them as they
            are, equal in size. channels: of the generated images; grey images of a folder stay grey if 1.

    Raises:
        ValueError: no such file, neither images nor statistics in it, or statistics of another network.
    """
    world = world or World(0, 1, network.device)
    data, split = split_of(name)
    path = Path(data if split != "all" else name)
    if holds_latents(path):
        raise ValueError(f"{path} holds latents, and images are compared: give the images that they were made from")

    def from_files(paths: list[str], image_size: int, source: str) -> Reference:
        lazy = LazyImages(paths, image_size)

        def read(rows: range) -> np.ndarray:
            if channels == 1:
                return read_equal([paths[i] for i in rows], image_size, squares=False)
            return lazy[np.array(rows)]

        return of_images(name, source, len(paths), read, network, world)

    if data == "digits" or split != "all":
        dataset = load_data(data, split if split != "all" else "train", image_size)
        assert isinstance(dataset, ImageDataset)
        images = dataset.images
        source = "held-out images" if split == "test" else "training split"
        if isinstance(images, LazyImages):
            return from_files(images.paths, images.image_size, source)
        return of_images(name, source, len(images), lambda rows: images[rows.start : rows.stop], network, world)
    if path.is_dir() and image_size is not None:
        if not (paths := images_below(path)):
            read_images(path)  # raises the error that says so
        return from_files(paths, image_size, f"images of a folder, centre-cropped to {image_size}x{image_size}")
    arrays = _read_npz(path) if path.suffix == ".npz" and path.exists() else {}
    if "mu" not in arrays:
        images = arrays["arr_0"] if "arr_0" in arrays else read_images(path)
        return of_images(
            name, "images as they are", len(images), lambda rows: images[rows.start : rows.stop], network, world
        )
    return _from_statistics(name, arrays, network, world)


def of_images(
    name: str, source: str, count: int, read: Callable[[range], np.ndarray], network: FeatureNetwork, world: World,
    some: Tensor | None = None,
) -> Reference:  # fmt: skip
    """Real images as a network sees them: moments of all, pooled features of all or of those numbered ``some`` (M,).

    Args:
        read: uint8 NHWC images of these numbers, of 0 .. count - 1.
    """
    statistics: dict[str, Statistics] = {}
    features, start = torch.empty(0), 0
    some = torch.arange(count) if some is None else some
    row_of = torch.full((count,), -1)
    row_of[some] = torch.arange(len(some))
    for part in features_in_chunks(count, read, network, world, "reference"):
        pooled = part["pooled"]
        if not start:
            features = pooled.new_empty(len(some), pooled.shape[1])
        for kind in ("pooled", "spatial"):
            if kind in part:
                statistics.setdefault(kind, Statistics(part[kind].shape[1])).add(part[kind])
        rows = row_of[start : start + len(pooled)]
        features[rows[rows >= 0]] = pooled[rows >= 0]
        start += len(pooled)
    moments = {kind: value.moments() for kind, value in statistics.items()}
    return Reference(name, source, count, moments["pooled"], moments.get("spatial"), features)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of statistics; of one without them, ``arr_0`` if it holds images."""
    known = ("mu", "sigma", "mu_s", "sigma_s", "features", "count", "network", "network_name", "arr_0", "images")
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            names = set(file.files) & set(known if "mu" in file.files else ("arr_0",))
            arrays = {name: file[name] for name in names}
    except Exception as error:  # numpy raises ValueError, OSError, EOFError, BadZipFile, ...
        raise ValueError(f"{path} cannot be read as .npz ({type(error).__name__}): give another") from None
    for kind in ("", "_s"):
        mu, sigma = arrays.get(f"mu{kind}"), arrays.get(f"sigma{kind}")
        if (mu is None) != (sigma is None):
            raise ValueError(f"{path} must have both mu{kind} and sigma{kind}")
        if mu is not None and sigma is not None and (mu.ndim != 1 or sigma.shape != (len(mu), len(mu))):
            raise ValueError(f"{path}: mu{kind} {mu.shape} and sigma{kind} {sigma.shape} must be (F,) and (F, F)")
    for name in ("arr_0", "images"):
        image = arrays.get(name)
        if image is not None and (image.dtype != np.uint8 or image.ndim != 4 or image.shape[3] not in (1, 3)):
            raise ValueError(f"`{name}` of {path} is {image.dtype} {list(image.shape)}: it must be uint8 NHWC images")
    return arrays


def _from_statistics(name: str, arrays: dict[str, np.ndarray], network: FeatureNetwork, world: World) -> Reference:
    made_with = str(arrays.get("network", ""))
    if made_with and made_with != network.digest:
        raise ValueError(f"{name} was made with {arrays['network_name']}, not with {network.name}: use one network")
    count = int(arrays.get("count", 0))
    moments, spatial = (
        Moments(arrays[f"mu{kind}"].astype(np.float64), arrays[f"sigma{kind}"].astype(np.float64), count)
        if f"mu{kind}" in arrays else None
        for kind in ("", "_s")
    )  # fmt: skip
    assert moments is not None
    source = "statistics of a file" + ("" if made_with else ", which does not say of which network")
    features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
    images = arrays.get("arr_0", arrays.get("images"))
    if features is None and images is not None:
        parts = features_in_chunks(
            len(images), lambda rows: images[rows.start : rows.stop], network, world, "reference"
        )
        features = torch.cat([part["pooled"] for part in parts])
        source += f", and its {len(images)} images"
    return Reference(name, source, count, moments, spatial, features)


def save_reference(path: Path, reference: Reference, network: FeatureNetwork) -> None:
    """An .npz that `load_reference` reads: statistics, and the features if there are any. Overwrites nothing.

    Raises:
        ValueError: the file exists.
    """
    if path.exists():
        raise ValueError(f"{path} exists: choose another --save-reference")
    arrays = {"mu": reference.moments.mu, "sigma": reference.moments.sigma, "count": np.array(reference.count)}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mu, "sigma_s": reference.spatial.sigma}
    if reference.features is not None:
        arrays["features"] = reference.features.numpy()
    arrays |= {"network": np.array(network.digest), "network_name": np.array(network.name)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_arrays(path, arrays)
