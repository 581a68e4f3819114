"""Measure a model: Frechet distances, Inception Score, KID, precision and recall, class accuracy, rewards.

Every number is taken with the seeds, counts and settings that are written next to it, and over the features of the
named network; compare within one network only. Images never touch the disk: they are drawn in chunks, and what the
metrics need of each chunk is kept.
"""

import hashlib
import json
import shutil
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
from marval.checkpoint import read_json, save_arrays, write_atomically, write_json
from marval.config import EvaluateConfig, to_dict, warn
from marval.distributed import World, connect
from marval.draw import file_name, refuse_cache
from marval.features import BATCH, FeatureNetwork
from marval.images import save_png
from marval.metrics import (
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_interval,
    precision_recall,
)
from marval.pipeline import Pipeline
from marval.reference import (
    Reference,
    chunk_rows,
    gather_chunks,
    load_network,
    load_reference,
    num_chunks,
    rounds,
    split_of,
)
from marval.reward_files import check_files, code_of, listed, parts_of
from marval.rewards import UserReward, class_prompts, load_reward
from marval.rng import generator
from marval.run import digest_of, new_folder, versions, writable_folder
from marval.scoring import BaseReward, score
from marval.shipped import model_folder
from marval.tables import check_matplotlib, one_line, pair_table, paired, plot, result_table, sweep_table
from marval.tokenizers import to_float, to_uint8
from marval.update import autocast, is_bf16

SPLITS, NEIGHBOURS = 10, 3
"""Of the Inception Score; of precision and recall."""
FEW = 500
"""Images below which a distance says more about their number than about the model."""
_KID_KEY = 0x41D  # sets the stream of KID's subsets apart from every other use of the seed
PREFIX, REWARDS_FILE = "reward ", "rewards.npz"
"""Of the rewards among what is kept of each image; and the file of the rewards alone."""
Reward = Callable[[Tensor, list[str]], Tensor]


@torch.no_grad()
def draw(
    model: Pipeline, labels: Sequence[int], first: int, config: EvaluateConfig, settings: Mapping[str, Any]
) -> np.ndarray:
    """Images number ``first`` and on, of these labels, uint8 NHWC. The tokenizer decodes in float32, few at a time."""
    with autocast(config.precision, model.device):
        tokens = model.sample_tokens(
            labels, seed=config.seed, first_image=first, batch_size=config.batch, **settings
        )  # fmt: skip
    parts = [to_uint8(model.tokenizer.decode(part.to(model.device))).cpu() for part in tokens.split(BATCH)]
    return torch.cat(parts).numpy()


def evaluate(
    model: Pipeline, reference: Reference, network: FeatureNetwork, config: EvaluateConfig,
    settings: Mapping[str, Any] | None = None, *, world: World | None = None,
    rewards: Mapping[str, Reward] | None = None, partial: Path | None = None, png: Path | None = None,
    weights: str = "", code: Mapping[str, str] | None = None, title: str = "evaluate",
) -> dict[str, Any]:  # fmt: skip
    """One row of results, with its protocol; on the first process only, the others get {}.

    Images are drawn and seen by the network in chunks of fixed borders, so that on one kind of machine the number of
    processes, an interruption and, as far as the device's arithmetic does not depend on it, the batch change nothing.

    Args:
        reference: of the same network. config: num_images, seed, batch, precision and prompt are read here.
        settings: overrides of the model's sampling defaults.
        rewards: callables (images float NCHW in [0, 1], prompts) -> (B,), by name.
        partial: folder of the finished chunks' features, from which an interrupted evaluation goes on; the caller
            removes it, with the rewards of each image in it (REWARDS_FILE). png: folder for the images. weights:
            `weights_digest`, needed if the model is sharded. code: digests of what the rewards are made of, which an
            evaluation that goes on must find the same.

    Raises:
        ValueError: settings that the model does not serve, a reference of other features, or a ``partial`` of another
            model or other settings.
    """
    world, settings, rewards = world or World(0, 1, model.device), dict(settings or {}), dict(rewards or {})
    check_features(model, reference, network)
    protocol = _protocol(model, network, config, settings, weights or weights_digest(model)) | {
        "reference": reference.name, "reference_source": reference.source,
        "reference_images": reference.count or "unknown",
    }  # fmt: skip
    if rewards:
        protocol["prompt"] = config.prompt
    with tempfile.TemporaryDirectory() as temporary:
        folder = partial or Path(temporary)
        finished = folder / "results.json"
        settings_file = protocol | {"rewards": sorted(rewards), "png": str(png or ""), "chunk": references.CHUNK}
        settings_file |= code or {}
        pending = _pending(folder, settings_file, finished, world)
        _measure_chunks(model, pending, folder, network, config, settings, rewards, world, png, title)
        if not world.is_main:
            return {}
        if not finished.exists():
            columns, moments = _columns(folder, config.num_images)
            results = _summary(model, reference, network, config, columns, moments)
            seconds = float(columns["seconds"].median())
            timing = {"seconds_per_image": seconds, "batch": min(config.batch, references.CHUNK)}
            about = {"protocol": protocol, "timing": timing, "versions": versions(world.device)}
            scored = {name: columns[f"{PREFIX}{name}"].numpy() for name in rewards}
            save_arrays(folder / REWARDS_FILE, scored)
            write_json(finished, results | about)
            for i in range(num_chunks(config.num_images)):
                (folder / _chunk_file(i)).unlink()
        return read_json(finished)


def _protocol(
    model: Pipeline, network: FeatureNetwork, config: EvaluateConfig, settings: Mapping[str, Any], weights: str
) -> dict[str, Any]:
    """All of a row's protocol but its reference."""
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
        images = draw(model, labels, first, config, settings)
        seconds = (time.perf_counter() - start) / len(images)
        images, labels = images[:own], labels[:own]
        rows = network(images).parts() | {"seconds": torch.full((own,), seconds)}
        for name, reward in rewards.items():
            asked = [prompts[label] for label in labels]
            rows[f"{PREFIX}{name}"] = _rewards(reward, images, asked, model.device, first)
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
def _rewards(reward: Reward, images: np.ndarray, prompts: list[str], device: torch.device, first: int) -> Tensor:
    """(B,) float32 on the CPU, of batches of fixed size; ``first`` is the number of the first image."""
    parts, reward = [], reward if isinstance(reward, BaseReward) else UserReward(reward)
    for start in range(0, len(images), BATCH):
        batch = to_float(torch.from_numpy(images[start : start + BATCH]).to(device))
        parts.append(score(reward, batch, prompts[start : start + BATCH], first + start).cpu())
    return torch.cat(parts)


def _columns(folder: Path, num_images: int) -> tuple[dict[str, Tensor], dict[str, Statistics]]:
    """What the chunks' files hold of each image, (N, ...) by name, and of each chunk its seconds per image; and the
    moments of the features, of which the spatial ones are not kept."""
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

    if real is None or min(len(real), len(pooled)) <= NEIGHBOURS:
        why = "the reference has statistics only" if real is None else f"no more than {NEIGHBOURS} images"
        left_out |= {"kid": why, "precision": why, "recall": why}
    else:
        pair = pooled.to(network.device), real.to(network.device)
        results["kid"], results["kid_std"] = kernel_distance(*pair, generator(config.seed, _KID_KEY))
        results["precision"], results["recall"] = precision_recall(*pair, NEIGHBOURS)

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


def _differences(after: Path, before: Path) -> dict[str, Any]:
    """Mean difference of each reward, after minus before, and its 95 % interval over pairs of images that share seed,
    noise and class. Two REWARDS_FILEs."""
    found = {}
    with np.load(after, allow_pickle=False) as new, np.load(before, allow_pickle=False) as old:
        for name in new.files:
            mean, half = mean_interval(torch.from_numpy(new[name]).double() - torch.from_numpy(old[name]).double())
            found[name] = {"mean": mean, "interval95": half}
    return found


def evaluate_folder(
    folder: Path, out: Path, config: EvaluateConfig, resume: bool = False, png: Path | None = None,
    save_reference: Path | None = None, before: Path | None = None,
) -> None:  # fmt: skip
    """`marval evaluate`: writes ``out`` and prints what is in it; for several settings also a plot beside it.

    Args:
        out: JSON of the results: one row, or {"rows": [...]}. With ``before`` the row also holds that model's, under
            "before", and of each reward its ``difference``. What is finished of it lies in ``<out>.partial``.
        resume: go on with what lies there.
        png: new folder for the images. save_reference: new .npz for the reference's features and statistics.
        before: folder of the model as it was before RL, to be measured beside it: same seeds and classes, and the
            settings of ``folder``'s model.

    Raises:
        ValueError: no feature network, a bad reference, settings that the model does not serve, several settings or
            other classes with ``before``, or an ``out`` that exists or cannot be written.
    """
    if before is not None and len(config.settings()) > 1:
        raise ValueError("--before compares two models at one setting: give one value of each")
    world = connect(config.device, config.shard)
    rows, partial = config.settings(), out.with_name(f"{out.name}.partial")
    finished = resume and out.is_file() and not partial.exists()
    picture = out.with_suffix(".png") if len(rows) > 1 else None
    goes_on = resume and (partial / "rows").is_dir()
    for path, flag in ((out, "out"), (picture, "out"), (save_reference, "save-reference"), (png, "png")):
        if path is not None and path.exists() and (path == out or not goes_on) and not finished:
            raise ValueError(f"{path} exists: choose another --{flag}")
    if partial.exists() and not goes_on:
        remedy = "add --resume to go on, or remove it" if not resume else "it is not of marval: choose another --out"
        raise ValueError(f"{partial} holds an unfinished evaluation: {remedy}")
    if not config.reference:
        raise ValueError("name what to compare with: --reference digits, a folder of images, or an .npz")
    data = split_of(config.reference)[0]
    if data != "digits" and not Path(data).exists():
        known = "digits, a folder of images, an .npz, or a split of training data, as DATA:test"
        raise ValueError(f"--reference {config.reference} does not exist: give {known}")
    if picture is not None:
        check_matplotlib()
    world.barrier()  # every process has looked at the files before one is written
    folders = [model_folder(path) for path in (folder, before) if path is not None]
    spec = _network_spec(config, folders[0])
    rewarded = listed(config.rewards)
    classifier = _classifier(spec, rewarded)
    for reward in rewarded:
        check_files(reward, classifier)
    models = [Pipeline.load(path, world.device, config.weights) for path in folders]
    model = models[0]
    if before is not None:  # not each with its own defaults
        stored = model.settings(**rows[0])
        chain = () if model.student is None else ("head_steps", "solver")
        rows = [{name: getattr(stored, name) for name in rows[0] if name not in chain}]
    for other in models:
        other.require_images()
        for row in rows:
            refuse_cache(config.shard, other.settings(**row))
    if any(_draws(other) != _draws(model) for other in models):
        raise ValueError(f"{folders[1]} draws other classes, images or tokens than {folders[0]}: --before is the same "
                         "model before RL")  # fmt: skip
    network = load_network(spec, world, config.inception_weights)
    if not config.shard:
        for other in models:
            other.accelerate()
    rewards = _load_rewards(rewarded, classifier, config, model)
    digests = [weights_digest(other) for other in models]
    if finished:
        asked = [(models[which], digests[which], row) for which in range(len(models)) for row in rows]
        protocols = [_protocol(other, network, config, row, digest) for other, digest, row in asked]
        text = _finished(out, [p | {"reference": config.reference} for p in protocols], rewards, folders)
        for path, flag in ((png, "png"), (save_reference, "save-reference")):
            if path is not None and not path.exists():
                raise ValueError(f"{out} is finished, without {path}: choose another --out, or leave --{flag} out")
        world.barrier()
        if world.is_main:
            print(f"{text}\nfinished before: {out}")
        return
    if world.is_main:
        writable_folder(out.parent)
        if png is not None and not goes_on:
            new_folder(png)
    sizes = model.tokenizer.image_size, model.tokenizer.image_channels
    reference = load_reference(config.reference, network, *sizes, world)
    check_features(model, reference, network)
    if save_reference is not None and world.is_main and not save_reference.exists():
        references.save_reference(save_reference, reference, network)
    if config.num_images < FEW:
        warn(f"distances of {config.num_images} images are mostly those of so few: compare them at equal counts only")
    code = {name: digest_of(path) for name, path in code_of(rewarded).items()}
    code |= {"classifier": digest_of(Path(classifier))} if classifier and rewarded else {}
    for other in models:
        world.shard(other.network)
    if before is None:
        several = len(rows) > 1
        jobs = [(f"{i + 1}/{len(rows)}" if several else "evaluate", f"{i:03d}", 0, row) for i, row in enumerate(rows)]
    else:
        several = True
        jobs = [(name, name, which, rows[0]) for which, name in enumerate(("after", "before"))]
    results = []
    for title, name, which, row in jobs:
        place = png / name if png is not None and several else png
        if place is not None and world.is_main:
            place.mkdir(parents=True, exist_ok=True)
        world.barrier()
        results.append(evaluate(
            models[which], reference, network, config, row, world=world, rewards=rewards, png=place,
            weights=digests[which], code=code, partial=partial / "rows" / name, title=title,
        ))  # fmt: skip
        if world.is_main and several:
            tqdm.write(f"{title}  {one_line(results[-1])}")
    if world.is_main:
        if before is not None:
            differences = _differences(*(partial / "rows" / name / REWARDS_FILE for name in ("after", "before")))
            pair = paired(results[0], results[1], differences)
            write_json(out, pair)
            print(pair_table(pair, str(folders[0]), str(folders[1])))
        elif picture is None:
            write_json(out, results[0])
            print(result_table(results[0], str(folder)))
        else:
            write_atomically(picture, lambda path: plot(results, path))
            write_json(out, {"rows": results})
            print(sweep_table(results, str(folder)))
            print(f"plot in {picture}")
        shutil.rmtree(partial)
        print(f"written to {out}")
    world.barrier()


def _finished(
    out: Path, protocols: Sequence[Mapping[str, Any]], rewards: Mapping[str, Reward], folders: Sequence[Path]
) -> str:
    """The results that are there already, as people read them; ValueError unless they are what is asked for."""
    results = read_json(out)
    try:
        rows = results.get("rows", [results])
        rows = [*rows, results["before"]] if "before" in results else rows
        found = [row["protocol"] for row in rows]
        scored = {name for row in rows for name in row.get("rewards", {})}
    except (LookupError, TypeError, AttributeError):
        raise ValueError(f"{out} exists and is no result of marval evaluate: choose another --out") from None
    if len(found) != len(protocols):
        raise ValueError(f"{out} exists, with {len(found)} rows, not {len(protocols)}: choose another --out")
    for before, now in zip(found, json.loads(json.dumps(protocols)), strict=True):
        for name, value in now.items():
            if before.get(name) != value:
                values = f"{name} = {before.get(name)!r}, not {value!r}"
                raise ValueError(f"{out} exists, with {values}: choose another --out")
    if scored != set(rewards):
        raise ValueError(f"{out} exists, with rewards {sorted(scored)}, not {sorted(rewards)}: choose another --out")
    if "before" in results:
        return pair_table(results, *map(str, folders))
    return sweep_table(rows, str(folders[0])) if "rows" in results else result_table(results, str(folders[0]))


def _draws(model: Pipeline) -> tuple[Any, ...]:
    """What two models must have in common whose images are compared one by one."""
    tokens = model.network.config.grid, model.network.config.token_dim
    return model.class_names, model.tokenizer.image_size, model.tokenizer.image_channels, *tokens


def _load_rewards(specs: Sequence[str], classifier: str, config: EvaluateConfig, model: Pipeline) -> dict[str, Reward]:
    """By their names, each tried on a black image."""
    size, channels = model.tokenizer.image_size, model.tokenizer.image_channels
    rewards: dict[str, Reward] = {}
    for spec in specs:
        rewards[spec] = load_reward(
            spec, classifier=classifier, class_names=model.class_names, template=config.prompt, device=model.device
        )  # fmt: skip
        black = np.zeros((1, size, size, channels), np.uint8)
        _rewards(rewards[spec], black, class_prompts(config.prompt, model.class_names)[:1], model.device, 0)
    return rewards


def _network_spec(config: EvaluateConfig, folder: Path) -> str:
    """--features, or else the classifier beside the model."""
    beside = folder.resolve().parent / "classifier"
    if not config.features and not beside.exists():
        raise ValueError(f"no {beside}: name a network with --features (marval train-classifier makes one)")
    return config.features or str(beside)


def _classifier(spec: str, rewards: Sequence[str]) -> str:
    """The feature network, where rewards can read it as a classifier; else "", or a ValueError if one has to."""
    if spec != "inception" and ".py:" not in spec:
        return spec
    if needy := [reward for reward in rewards if {"classifier", "reads-class"} & set(parts_of(reward))]:
        which = "a folder of marval train-classifier, a CIFAR-10 resnet*.th or a mobilenet_v2*.npz"
        raise ValueError(
            f"reward {needy[0]!r} asks the network of --features, and {spec} is no classifier: name {which}"
        )
    return ""
