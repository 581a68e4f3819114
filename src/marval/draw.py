"""Draw sets of images: of classes in turn over all processes, and into files."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from marval import masking
from marval.checkpoint import save_arrays
from marval.config import SamplingConfig, numbers
from marval.distributed import World, connect
from marval.images import image_grid, save_png
from marval.pipeline import Pipeline
from marval.run import new_folder
from marval.update import is_bf16


def sample_in_turn(
    model: Pipeline, classes: Sequence[int | str | None], num_images: int, seed: int, world: World | None = None, *,
    batch_size: int = 250, title: str = "", each: Callable[[int, np.ndarray], None] | None = None, **settings: Any,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Draw images of the classes in turn, by all processes: image i has class i modulo the number of classes.

    Args:
        each: called with the number of every image and the image, by the process that has drawn it.

    Returns:
        uint8 NHWC images and their int64 labels (num_classes for unconditional ones), complete on every process.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)
    share, parts = -(-num_images // size), []
    labels = np.array([model.label(classes[i % len(classes)]) for i in range(size * share)])
    names = [*range(len(model.class_names)), None]
    bar = tqdm(total=share, desc=f"{title:<8}", unit="img", delay=2, disable=rank > 0, mininterval=1)
    for start in range(rank * share, (rank + 1) * share, batch_size):
        stop = min(start + batch_size, (rank + 1) * share)
        asked = [names[label] for label in labels[start:stop]]
        parts.append(model.sample(asked, seed=seed, first_image=start, batch_size=batch_size, **settings))
        if each is not None:
            for i in range(start, min(stop, num_images)):
                each(i, parts[-1][i - start])
        bar.update(stop - start)
    bar.close()
    images = np.concatenate(parts)
    if world is not None:
        images = world.gather_rows(torch.from_numpy(images).to(world.device)).cpu().numpy()
    return images[:num_images], labels[:num_images]


def save_images(
    folder: Path, out: Path, classes: str, num_images: int | None, seed: int, batch_size: int, device: str,
    precision: Literal["auto", "float32", "bf16"], graphs: bool, compile: bool, shard: bool, settings: dict[str, Any],
) -> None:  # fmt: skip
    """Draw images into a new folder: PNG files named by number and class, grid.png and samples.npz.

    Args:
        classes: ``all``, ``none`` (unconditional), or comma-separated indices or names.
        precision: of the weights. graphs, compile: see `Pipeline.accelerate`.
        shard: split the network over the processes.
    """
    world = connect(device, shard)
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if num_images is not None and num_images < 1:
        raise ValueError(f"the number of images must be at least 1, got {num_images}")
    if shard and (graphs or compile):
        raise ValueError("--shard moves the weights about: it goes neither with --graphs nor with --compile")
    model = Pipeline.load(folder, world.device, dtype="bf16" if is_bf16(precision, world.device) else "float32")
    if not shard:
        model.accelerate(graphs, compile)
    model.require_images()
    order = settings.get("order")
    if order and "," in order:
        positions = torch.tensor(numbers(order, int, "--order"))
        settings = settings | {"order": masking.check_order(positions, model.network.config.num_tokens)}
    refuse_cache(shard, model.settings(**{n: value for n, value in settings.items() if not isinstance(value, Tensor)}))
    asked: list[Any] = [part.strip() for part in classes.split(",") if part.strip()]
    if classes == "all":
        asked = list(range(len(model.class_names)))
    elif classes == "none":
        asked = [None]
    if not asked:
        raise ValueError(f"--classes {classes!r} names no class: give 3,7 or all or none")
    for name in asked:
        model.label(name)
    count = num_images or len(asked)
    if world.is_main:
        new_folder(out)
    world.barrier()
    if not out.is_dir():
        raise ValueError(f"{out} is not one folder for all processes: put --out where all machines see it")
    world.shard(model.network)
    names = [*model.class_names, "none"]

    def save(i: int, image: np.ndarray) -> None:
        name = file_name(names[model.label(asked[i % len(asked)])])
        save_png(out / f"{i:0{max(4, len(str(count)))}d}_{name}.png", image)

    images, labels = sample_in_turn(
        model, asked, count, seed, world, batch_size=batch_size, title="sample", each=save, **settings
    )
    if world.is_main:
        columns = len(asked) if 1 < len(asked) <= 16 else min(count, 8)
        save_png(out / "grid.png", image_grid(images, columns, scale=max(1, 64 // images.shape[1])))
        save_arrays(out / "samples.npz", {"images": images, "labels": labels}, compressed=True)
        print(f"{count} images, grid.png and samples.npz in {out}")


def refuse_cache(shard: bool, config: SamplingConfig) -> None:
    """Raises ValueError for a cached backbone of a network that is split: it calls parts that are not gathered."""
    if shard and config.refresh_every > 1:
        raise ValueError(f"refresh_every {config.refresh_every} does not work with --shard: use one of them")


def file_name(class_name: str) -> str:
    """A class name as part of a file name: every run of other characters than letters, digits, _ and - is one _."""
    return re.sub(r"[^\w-]+", "_", class_name)


def head_evaluations_per_token(model: Pipeline) -> int:
    """Rows that the head computes for each token: a teacher's steps, twice with guidance; a student's evaluations."""
    if model.student is not None:
        return model.sampling.evaluations
    return model.sampling.head_steps * (2 if model.sampling.guidance != 1 else 1)
