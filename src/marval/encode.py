"""Images -> latents on disk, what `marval encode` does once so that training need not run the autoencoder.

The list of images is cut into shards, which are dealt to the processes; a finished shard has its checksum beside it
and is never made again. What comes out depends on the images and the settings only, not on the number of processes or
on how often the work was interrupted. The files are described in `marval.latents`.
"""

import contextlib
import hashlib
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from marval.batches import prefetch
from marval.checkpoint import read_json, sha256, write_atomically, write_json
from marval.data import split_folders, stated_licence
from marval.distributed import World, connect
from marval.images import THREADS, image_grid, save_png
from marval.latents import FORMAT, load_latents, read_index
from marval.listing import Entry, Listing, list_images, load_square
from marval.models.autoencoders import autoencoder_digest, link_autoencoder
from marval.run import writable_folder
from marval.tokenizers import LatentTokenizer, load_tokenizer, to_float, to_uint8, tokenizer_to_dict

PSNR_IMAGES = 64
"""Images, evenly spaced over all, whose reconstructions are compared with them."""
SHOWN = 8
"""Images, evenly spaced over those compared, that reconstructions.png shows."""


def encode(
    images: str, tokenizer: str, out: Path, image_size: int = 256, batch: int = 16, shard_size: int = 4096,
    on_error: Literal["stop", "skip"] = "stop", device: str = "auto", resume: bool = False,
) -> None:  # fmt: skip
    """Encode images and their mirror images, centre-cropped, into a folder for `marval.data.load_data`.

    The folder holds the autoencoder too. With train/ and val/ (or test/) in ``images``, ``out`` gets the same two
    sub-folders. On a finished folder, ``resume`` compares all checksums and makes damaged shards again. Batches are
    cut within a shard, so the result is the same to the byte for any number of processes and interruptions, with the
    same batch, device and number of threads (else the last bit of a float16 may differ).

    Args:
        images: A folder with one sub-folder per class (sorted by name), images anywhere below it; or tar files: one, a
            folder of them, or a quoted pattern. The class of a member is its first folder, or the ``label`` or
            ``class`` of a ``key.json`` or the text of a ``key.cls`` beside ``key.jpg`` (a webdataset; if these are
            numbers, they are kept), or the WordNet id that is the tar's name.
        tokenizer: an autoencoder for `marval.tokenizers.load_tokenizer`.
        image_size: side of the squares, in pixels.
        batch: images at a time, each with its mirror image.
        shard_size: images per file; several shards per process keep all processes busy.
        on_error: at an image that cannot be read, stop, or report it, leave it out and list it in index.json.

    Raises:
        ValueError: no images or classes, a bad image, an unsuitable tokenizer or folder, settings that differ from
            those of the work to resume, a latent that is not finite in float16; names the file. Shards stay.
    """
    for name, value in (("image_size", image_size), ("batch", batch), ("shard_size", shard_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if on_error not in ("stop", "skip"):
        raise ValueError(f"unknown on_error {on_error!r}: choose stop or skip")
    codec = load_tokenizer(tokenizer, image_size, patch_size=1)
    if not isinstance(codec, LatentTokenizer) or codec.image_channels != 3:
        raise ValueError(f"tokenizer {tokenizer!r} has no latents of RGB images: give an autoencoder; pixels need none")
    world = connect(device)
    codec = codec.to(world.device)
    splits = split_folders(Path(images))
    if splits is None:
        work = [(images, out, list_images(images))]
    else:
        work = [(str(folder), out / folder.name, list_images(str(folder))) for folder in splits]
        if odd := sorted(set(work[0][2].class_names) ^ set(work[1][2].class_names)):
            raise ValueError(f"class {odd[0]!r} is not in both {splits[0]} and {splits[1]}: make the classes equal")
    for source, folder, listing in work:
        _encode_split(source, listing, codec, folder, batch, shard_size, on_error, resume, world)


def _encode_split(
    source: str, listing: Listing, codec: LatentTokenizer, out: Path, batch: int, shard_size: int, on_error: str,
    resume: bool, world: World,
) -> None:  # fmt: skip
    settings = _settings(source, listing, codec, shard_size)
    records = _open_folder(out, settings, codec, resume, world)
    shards = -(-len(listing.entries) // shard_size)
    start = time.perf_counter()
    todo: list[int] = []
    own = range(world.rank, shards, world.size)
    for shard in own:
        record = _record(out, shard) or records.get(_name(shard))
        if record is not None and _is_whole(out / record["file"], record["sha256"]):
            write_json(_sidecar(out, shard), record)
        else:
            todo.append(shard)
    sizes = {shard: len(listing.entries[shard * shard_size : (shard + 1) * shard_size]) for shard in own}
    bar = tqdm(
        total=sum(sizes.values()), initial=sum(sizes[shard] for shard in sizes if shard not in todo), unit="image",
        desc="encode" if world.size == 1 else f"encode, process 1 of {world.size}", disable=not world.is_main,
        dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 20,
    )  # fmt: skip
    with bar:
        encoded = _encode_shards(listing.entries, codec, out, batch, shard_size, todo, on_error, bar, world.device)
    world.barrier()
    seconds = time.perf_counter() - start
    encoded = round(world.size * world.means({"images": torch.tensor(float(encoded))})["images"])
    if world.is_main:
        all_records = [_record(out, shard) for shard in range(shards)]
        _finish(out, settings, listing.entries, all_records, codec, batch, world.device)
        speed = f"{encoded / seconds:.3g} images/s" if encoded else "all shards were whole"
        print(f"{_summary(out)}, {speed} -> {out}")
    world.barrier()


def _settings(source: str, listing: Listing, codec: LatentTokenizer, shard_size: int) -> dict[str, Any]:
    """Settings on which the shards depend, which must be the same after every interruption."""
    assert codec.folder is not None
    names = hashlib.sha256("".join(f"{e.name}\t{e.label}\n" for e in listing.entries).encode()).hexdigest()
    side = codec.image_size // codec.stride
    return {
        "format": FORMAT,
        "source": source,
        "listing_sha256": names,
        "image_size": codec.image_size,
        "shard_size": shard_size,
        "tokenizer": tokenizer_to_dict(codec),
        "tokenizer_sha256": autoencoder_digest(codec.folder),
        "moments_shape": [2 * codec.channels, side, side],
        "numbered_classes": listing.numbered,
        "class_names": listing.class_names,
    }


def _open_folder(
    out: Path, settings: dict[str, Any], codec: LatentTokenizer, resume: bool, world: World
) -> dict[str, dict[str, Any]]:
    """Create the folder or check what it holds; returns the shards, by file name, of a finished index."""
    assert codec.folder is not None
    index = None
    if (out / "index.json").exists():
        if not resume:
            raise ValueError(f"{out} holds latents: add --resume to go on or to check them, or choose another --out")
        index = read_index(out)
        for name, value in settings.items():
            if index.get(name) != value:
                values = f" = {index.get(name)!r}, not {value!r}" if len(f"{value}") < 200 else " that differs"
                raise ValueError(f"{out} was started with {name}{values}: resume with the same settings")
    elif out.exists() and (not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())):
        raise ValueError(f"{out} exists and holds no latents: choose another --out")
    world.barrier()  # every process has looked at the folder before one writes into it
    if world.is_main:
        writable_folder(out)
        if index is None:
            write_json(out / "index.json", {**settings, "shards": None})
        link_autoencoder(codec.folder, out / "tokenizer")
    world.barrier()
    return {record["file"]: record for record in (index or {}).get("shards") or []}


# ---- shards


def _name(shard: int) -> str:
    return f"shard-{shard:05d}.npy"


def _sidecar(out: Path, shard: int) -> Path:
    """The file with the record of a finished shard, which lies beside it until index.json has all records."""
    return out / f"shard-{shard:05d}.json"


def _record(out: Path, shard: int) -> dict[str, Any] | None:
    return read_json(_sidecar(out, shard)) if _sidecar(out, shard).exists() else None


def _is_whole(path: Path, checksum: str) -> bool:
    return path.is_file() and sha256(path) == checksum


def _encode_shards(
    entries: Sequence[Entry], codec: LatentTokenizer, out: Path, batch: int, shard_size: int, shards: list[int],
    on_error: str, bar: Any, device: torch.device,
) -> int:  # fmt: skip
    """Encode and write shards, each with its record; returns the number of images encoded."""
    parts: list[tuple[int, range]] = []
    for shard in shards:
        stop = min((shard + 1) * shard_size, len(entries))
        parts += [(shard, range(i, min(i + batch, stop))) for i in range(shard * shard_size, stop, batch)]
    moments: list[np.ndarray] = []
    bad: list[dict[str, Any]] = []
    encoded = 0
    with ThreadPoolExecutor(THREADS, "marval-images") as threads:

        def read(part: int) -> list[np.ndarray | ValueError]:
            return list(threads.map(lambda i: load_square(entries[i], codec.image_size), parts[part][1]))

        with contextlib.closing(prefetch(read, range(len(parts)))) as batches:
            for part, loaded in enumerate(batches):
                shard, numbers = parts[part]
                for i, image in zip(numbers, loaded, strict=True):
                    if isinstance(image, ValueError):
                        if on_error == "stop":
                            raise ValueError(f"{image}, or leave such images out with --on-error skip")
                        bar.write(f"left out: {image}", file=sys.stderr)
                        bad.append({"number": i, "name": entries[i].name, "reason": str(image)})
                good = [(entries[i].name, image) for i, image in zip(numbers, loaded, strict=True)
                        if isinstance(image, np.ndarray)]  # fmt: skip
                if good:
                    moments.append(_moments(codec, [name for name, _ in good], [x for _, x in good], device))
                encoded += len(good)
                bar.update(len(loaded))
                if part + 1 == len(parts) or parts[part + 1][0] != shard:
                    _write_shard(out, shard, codec, moments, bad)
                    moments, bad = [], []
    return encoded


@torch.no_grad()
def _moments(codec: LatentTokenizer, names: list[str], images: list[np.ndarray], device: torch.device) -> np.ndarray:
    """Posterior moments of images (S, S, 3) and of their mirror images, float16 (B, 2, 2C, h, w).

    Raises:
        ValueError: a latent is not finite in float16; names the image.
    """
    pixels = to_float(torch.from_numpy(np.stack(images)).to(device))
    exact = codec.moments(torch.cat([pixels, pixels.flip(3)])).unflatten(0, (2, len(images))).transpose(0, 1)
    moments = exact.half()
    finite = moments.isfinite().flatten(1).all(1)
    if not finite.all():
        i = int(finite.int().argmin())
        largest = exact[i].abs().max().item()
        raise ValueError(f"{names[i]}: a latent of size {largest:.6g} does not fit float16: use another autoencoder")
    return moments.cpu().numpy()


def _write_shard(
    out: Path, shard: int, codec: LatentTokenizer, moments: list[np.ndarray], bad: list[dict[str, Any]]
) -> None:
    side = codec.image_size // codec.stride
    array = np.concatenate([np.empty((0, 2, 2 * codec.channels, side, side), np.float16), *moments])
    path = out / _name(shard)
    _save_array(path, array)
    record = {"file": path.name, "images": len(array), "sha256": sha256(path), "bad": bad}
    write_json(_sidecar(out, shard), record)  # last: a shard counts once it is whole


def _save_array(path: Path, array: np.ndarray) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)

    write_atomically(path, write)


# ---- the end


def _finish(
    out: Path, settings: dict[str, Any], entries: Sequence[Entry], records: Sequence[dict[str, Any] | None],
    codec: LatentTokenizer, batch: int, device: torch.device,
) -> None:  # fmt: skip
    """Write labels, index and reconstructions into a folder whose shards are all there."""
    shards = [record for record in records if record is not None]
    assert len(shards) == len(records), "a shard has no record"
    bad = [image for shard in shards for image in shard["bad"]]
    numbers = np.delete(np.arange(len(entries)), [image["number"] for image in bad]).tolist()
    if not len(numbers):
        raise ValueError(f"none of the {len(entries)} images of {settings['source']} can be read")
    labels = np.array([entries[i].label for i in numbers], np.int64)
    _save_array(out / "labels.npy", labels)
    index = {
        **settings,
        "licence": stated_licence(Path(settings["source"])),
        "num_images": len(labels),
        "class_counts": np.bincount(labels, minlength=len(settings["class_names"])).tolist(),
        "bad_images": len(bad),
        "labels_sha256": sha256(out / "labels.npy"),
        "reconstruction_psnr": None,
        "shards": shards,
    }
    write_json(out / "index.json", index)
    psnr = reconstruct(out, [entries[i] for i in numbers], codec, batch, device)
    write_json(out / "index.json", {**index, "reconstruction_psnr": round(psnr, 3)})
    for shard in range(len(shards)):
        _sidecar(out, shard).unlink()


@torch.no_grad()
def reconstruct(out: Path, entries: Sequence[Entry], codec: LatentTokenizer, batch: int, device: torch.device) -> float:
    """Decode the mode of some stored latents; writes reconstructions.png, returns the mean PSNR in dB."""
    data = load_latents(out)
    count = min(PSNR_IMAGES, len(data))
    rows = np.arange(count) * len(data) // count
    shown = set((np.arange(min(SHOWN, count)) * count // min(SHOWN, count)).tolist())
    psnr, pairs = [], []
    for start in range(0, count, batch):
        part = rows[start : start + batch]
        moments = data.moments(part, np.zeros(len(part), bool)).to(device)
        decoded = codec.decode(codec.tokens(moments)).cpu()
        for i, row in enumerate(part):
            original = load_square(entries[int(row)], codec.image_size)
            if isinstance(original, ValueError):
                raise original
            exact = to_float(torch.from_numpy(original[None]))
            psnr.append(-10 * torch.log10((decoded[i : i + 1] - exact).square().mean()).item())
            if start + i in shown:
                pairs.append((original, to_uint8(decoded[i : i + 1])[0].numpy()))
    grid = image_grid(np.stack([x for x, _ in pairs] + [y for _, y in pairs]), columns=len(pairs))
    save_png(out / "reconstructions.png", grid)
    return float(np.mean(psnr))


def _summary(out: Path) -> str:
    index = read_index(out)
    images, classes = index["num_images"], sum(count > 0 for count in index["class_counts"])
    size = sum((out / shard["file"]).stat().st_size for shard in index["shards"]) / images
    return (
        f"{images} images of {classes} classes, {index['bad_images']} bad, {size:.0f} bytes per image with its mirror "
        f"image, reconstruction PSNR {index['reconstruction_psnr']:.2f} dB"
    )
