"""Measure images: Frechet distances, Inception Score, KID, precision and recall, class accuracy, rewards.

Every number is taken with the seeds, counts and settings that are written next to it, and over the features of the
named network; compare within one network only. Images never touch the disk: they are drawn in chunks, and what the
metrics need of each chunk is kept. The command line's `marval evaluate`: marval.evaluate.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from marval import reference as references
from marval.checkpoint import read_json, save_arrays, write_json
from marval.config import EvaluateConfig, to_dict
from marval.distributed import World
from marval.draw import file_name
from marval.features import BATCH, FeatureNetwork
from marval.images import save_png
from marval.metrics import (
    Statistics,
    frechet_distance,
    inception_score,
    mean_interval,
)
from marval.pipeline import Pipeline
from marval.reference import (
    NEIGHBOURS,
    Reference,
    chunk_rows,
    enough,
    gather_chunks,
    num_chunks,
    rounds,
    sample_distances,
)
from marval.rewards import UserReward, class_prompts
from marval.run import versions
from marval.scoring import BaseReward, score
from marval.tokenizers import to_float, to_uint8
from marval.update import autocast, is_bf16

SPLITS = 10
"""Parts of the images, over which the Inception Score has a mean and a deviation."""
PREFIX = "reward "
"""Before the name of a reward, among the columns that a chunk's file holds."""
REWARDS_FILE = "rewards.npz"
"""Rewards of each image, for differences of two models on the same seeds."""
Reward = Callable[[Tensor, list[str]], Tensor]


@torch.no_grad()
def draw_chunk(
    model: Pipeline, labels: Sequence[int], first: int, config: EvaluateConfig, settings: Mapping[str, Any]
) -> np.ndarray:
    """Images number ``first`` and on, of these labels, uint8 NHWC. The tokenizer decodes in float32, few at a time."""
    with autocast(config.precision, model.device):
        tokens = model.sample_tokens(
            labels, seed=config.seed, first_image=first, batch_size=config.batch, **settings
        )  # fmt: skip
    parts = [to_uint8(model.tokenizer.decode(part.to(model.device))).cpu() for part in tokens.split(BATCH)]
    return torch.cat(parts).numpy()


def measure(
    model: Pipeline, reference: Reference, network: FeatureNetwork, config: EvaluateConfig,
    settings: Mapping[str, Any] | None = None, *, world: World | None = None,
    rewards: Mapping[str, Reward] | None = None, partial: Path | None = None, png: Path | None = None,
    weights: str = "", code: Mapping[str, str] | None = None, title: str = "evaluate",
) -> dict[str, Any]:  # fmt: skip
    """One row of results, with its protocol; on the first process only, the others get {}.

    Images are drawn and seen by the network in chunks of fixed borders, so that on one kind of machine the number of
    processes, an interruption and, as far as the device's arithmetic does not depend on it, the batch change nothing.

    Args:
        reference: of the same network. config: num_images, seed, batch, precision, prompt and weights are read.
        settings: overrides of the model's sampling defaults.
        rewards: callables (images float NCHW in [0, 1], prompts) -> (B,), by name.
        partial: folder of the finished chunks' features, from which an interrupted evaluation goes on; the caller
            removes it, with the rewards of each image in it (REWARDS_FILE). png: folder for the images.
        weights: `weights_digest`, needed if the model is sharded. code: digests of what the rewards are made of, for
            the protocol.

    Raises:
        ValueError: settings that the model does not serve, a reference of other features, or a ``partial`` of another
            model or other settings.
    """
    world, settings, rewards = world or World(0, 1, model.device), dict(settings or {}), dict(rewards or {})
    check_features(model, reference, network)
    weights = weights or weights_digest(model)
    protocol = protocol_of(model, network, config, settings, weights, rewards, code) | {
        "reference": reference.name, "reference_source": reference.source,
        "reference_images": reference.count or "unknown",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = partial or Path(temporary)
        finished = folder / "results.json"
        begun_with = protocol | {"rewards": sorted(rewards), "png": str(png or ""), "chunk": references.CHUNK}
        pending = _pending(folder, begun_with, finished, world)
        _measure_chunks(model, pending, folder, network, config, settings, rewards, world, png, title)
        if not world.is_main:
            return {}
        if not finished.exists():
            columns, moments = _columns(folder, config.num_images)
            results = _summary(model, reference, network, config, columns, moments)
            seconds = float(columns["seconds"].median())
            timing = {"seconds_per_image": seconds, "batch": min(config.batch, references.CHUNK)}
            about = {"protocol": protocol, "timing": timing, "versions": versions(world.device)}
            save_arrays(folder / REWARDS_FILE, {name: columns[f"{PREFIX}{name}"].numpy() for name in rewards})
            write_json(finished, results | about)
            for i in range(num_chunks(config.num_images)):
                (folder / _chunk_file(i)).unlink()
        return read_json(finished)


def protocol_of(
    model: Pipeline, network: FeatureNetwork, config: EvaluateConfig, settings: Mapping[str, Any], weights: str,
    rewards: Mapping[str, Reward] | None = None, code: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All that decides a row of results, but its reference and the names of its rewards."""
    sampling = to_dict(model.settings(**settings))
    evaluations = sampling.pop("evaluations")
    if model.student is not None:
        sampling["head_steps"] = evaluations
    return {
        "model": weights, "kind": "teacher" if model.student is None else "student",
        "weights": config.weights, **sampling,
        "precision": "bf16" if is_bf16(config.precision, model.device) else "float32",
        "num_images": config.num_images, "seed": config.seed,
        "features": network.name, "features_sha256": network.digest, "preprocessing": network.preprocessing,
        **({"prompt": config.prompt, **(code or {})} if rewards else {}),
    }  # fmt: skip


def check_features(model: Pipeline, reference: Reference, network: FeatureNetwork) -> None:
    """Raises ValueError if the network cannot see the model's images, or the reference has other features."""
    size, channels = model.tokenizer.image_size, model.tokenizer.image_channels
    trial = network(np.zeros((1, size, size, channels), np.uint8)).parts()
    for kind, moments in (("pooled", reference.moments), ("spatial", reference.spatial)):
        if kind in trial and moments is not None and len(moments.mu) != trial[kind].shape[1]:
            counts = f"{len(moments.mu)} {kind} features, {network.name} gives {trial[kind].shape[1]}"
            raise ValueError(f"reference {reference.name} has {counts}: use the network that it was made with")


def weights_digest(model: Pipeline) -> str:
    """Start of the SHA-256 of the network's tensors, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"sha256 {digest.hexdigest()[:16]}"


def _pending(folder: Path, settings: dict[str, Any], finished: Path, world: World) -> list[int]:
    """The chunks that are not in the folder yet; a new folder gets the settings, one of other settings is refused."""
    chunks = range(num_chunks(settings["num_images"]))
    done = torch.zeros(1, len(chunks), dtype=torch.uint8)
    if world.is_main:
        settings = json.loads(json.dumps(settings))
        if (folder / "settings.json").exists():
            before = read_json(folder / "settings.json")
            for name in settings | before:
                if settings.get(name) != before.get(name):
                    values = f"{before.get(name)!r}, not {settings.get(name)!r}"
                    raise ValueError(f"{folder} was begun with {name} = {values}: use the same, or remove the folder")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "settings.json", settings)
        done[0] = torch.tensor([finished.exists() or (folder / _chunk_file(i)).exists() for i in chunks])
    return [i for i, is_done in zip(chunks, world.gather_rows(done)[0].tolist(), strict=True) if not is_done]


def _chunk_file(index: int) -> str:
    return f"chunk-{index:06d}.npz"


def _measure_chunks(
    model: Pipeline, pending: list[int], folder: Path, network: FeatureNetwork, config: EvaluateConfig,
    settings: Mapping[str, Any], rewards: Mapping[str, Reward], world: World, png: Path | None, title: str,
) -> None:  # fmt: skip
    """Draw the pending chunks, all processes in lock step, and keep what the metrics need of each in a file."""
    count, num_classes = config.num_images, len(model.class_names)
    prompts = class_prompts(config.prompt, model.class_names) if rewards else []
    left = sum(len(chunk_rows(i, count)) for i in pending)
    bar = tqdm(
        total=count, initial=count - left, desc=title, unit="img", delay=2, disable=not world.is_main,
        dynamic_ncols=True,
    )  # fmt: skip
    for mine, group in rounds(pending, world):
        counts = [len(chunk_rows(i, count)) for i in group]
        first, own = chunk_rows(mine, count).start, len(chunk_rows(mine, count))
        labels = [(first + i) % num_classes for i in range(max(counts))]  # surplus images keep the processes in step
        start = time.perf_counter()
        images = draw_chunk(model, labels, first, config, settings)
        seconds = (time.perf_counter() - start) / len(images)
        images, labels = images[:own], labels[:own]
        rows = network(images).parts() | {"seconds": torch.full((own,), seconds)}
        for name, reward in rewards.items():
            asked = [prompts[label] for label in labels]
            rows[f"{PREFIX}{name}"] = rewards_of(reward, images, asked, model.device, first)
        if png is not None and world.rank < len(group):
            for i, (image, label) in enumerate(zip(images, labels, strict=True), first):
                save_png(png / f"{i:06d}_{file_name(model.class_names[label])}.png", image)
        for i, part in zip(group, gather_chunks(rows, counts, world), strict=True):
            if world.is_main:
                arrays = {name: value.numpy() for name, value in part.items()}
                save_arrays(folder / _chunk_file(i), arrays)
        bar.update(sum(counts))
    bar.close()


@torch.no_grad()
def rewards_of(reward: Reward, images: np.ndarray, prompts: list[str], device: torch.device, first: int) -> Tensor:
    """Rewards (B,) float32 on the CPU, in batches of fixed size; ``first`` is the number of the first image."""
    parts, reward = [], reward if isinstance(reward, BaseReward) else UserReward(reward)
    for start in range(0, len(images), BATCH):
        batch = to_float(torch.from_numpy(images[start : start + BATCH]).to(device))
        parts.append(score(reward, batch, prompts[start : start + BATCH], first + start).cpu())
    return torch.cat(parts)


def _columns(folder: Path, num_images: int) -> tuple[dict[str, Tensor], dict[str, Statistics]]:
    """Columns of all images, (N, ...) by name, from the chunks' files, and moments of the pooled and spatial features.

    Of the spatial features nothing else is kept; ``seconds`` has one value per chunk."""
    moments: dict[str, Statistics] = {}
    kept: dict[str, list[Tensor]] = {}
    for i in range(num_chunks(num_images)):
        with np.load(folder / _chunk_file(i), allow_pickle=False) as file:
            rows = {name: torch.from_numpy(file[name]) for name in file.files}
        for kind in ("pooled", "spatial"):
            if kind in rows:
                moments.setdefault(kind, Statistics(rows[kind].shape[1])).add(rows[kind])
        for name in rows.keys() - {"spatial"}:
            kept.setdefault(name, []).append(rows[name][:1] if name == "seconds" else rows[name])
    return {name: torch.cat(parts) for name, parts in kept.items()}, moments


def _summary(
    model: Pipeline, reference: Reference, network: FeatureNetwork, config: EvaluateConfig,
    columns: Mapping[str, Tensor], moments: Mapping[str, Statistics],
) -> dict[str, Any]:  # fmt: skip
    """The numbers, from `_columns`."""
    pooled, logits, real = columns["pooled"], columns.get("logits"), reference.features
    results: dict[str, Any] = {"fid": frechet_distance(reference.moments, moments["pooled"].moments())}
    left_out: dict[str, str] = {}

    if "spatial" not in moments:
        left_out["sfid"] = "the network has no spatial features"
    elif reference.spatial is None:
        left_out["sfid"] = "the reference has no mu_s and sigma_s"
    else:
        results["sfid"] = frechet_distance(reference.spatial, moments["spatial"].moments())

    if logits is None or len(logits) < SPLITS:
        left_out["inception_score"] = "the network has no logits" if logits is None else f"fewer than {SPLITS} images"
    else:
        results["inception_score"], results["inception_score_std"] = inception_score(logits, SPLITS)

    if real is not None and enough(pooled, real):
        results |= sample_distances(pooled, real, config.seed, network.device)
    else:
        why = "the reference has statistics only" if real is None else f"no more than {NEIGHBOURS} images"
        left_out |= {"kid": why, "precision": why, "recall": why}

    indices = network.class_indices(model.class_names)
    if indices is None or logits is None:
        left_out["accuracy"] = "the network does not read the model's classes"
    else:
        asked = torch.from_numpy(indices[np.arange(config.num_images) % len(indices)])
        results["accuracy"] = float((logits.argmax(1) == asked).double().mean())

    for name in sorted(columns):
        if name.startswith(PREFIX):
            mean, half = mean_interval(columns[name])
            results.setdefault("rewards", {})[name.removeprefix(PREFIX)] = {"mean": mean, "interval95": half}
    if left_out:
        results["left_out"] = left_out
    return results
