"""`marval evaluate`: measure the model in a folder, at one setting or several, alone or beside another.

What is measured, and how: marval.measure.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from marval import reference as references
from marval.checkpoint import read_json, write_atomically, write_json
from marval.config import EvaluateConfig, warn
from marval.distributed import World, connect
from marval.draw import refuse_cache
from marval.features import FeatureNetwork
from marval.measure import REWARDS_FILE, Reward, check_features, measure, protocol_of, rewards_of, weights_digest
from marval.metrics import mean_interval
from marval.pipeline import Pipeline
from marval.reference import check_reference, load_network, load_reference
from marval.reward_files import check_files, code_of, listed, parts_of
from marval.rewards import class_prompts, load_reward
from marval.run import digest_of, new_folder, writable_folder
from marval.shipped import model_folder
from marval.tables import check_matplotlib, one_line, pair_table, paired, plot, result_table, sweep_table

FEW = 500
"""Images below which a distance says more about their number than about the model."""


class _Job(NamedTuple):
    """A row of results to measure."""

    title: str
    model: Pipeline
    digest: str
    """Of its weights."""
    settings: dict[str, Any]
    folder: str
    """Where its pictures lie below --png, and what is finished of it below the partial folder."""


class _Files(NamedTuple):
    """What an evaluation writes, and what is there of it already."""

    out: Path
    plot: Path | None
    png: Path | None
    save_reference: Path | None
    partial: Path
    """Folder of what is finished, until ``out`` is written."""
    goes_on: bool
    """``partial`` holds an interrupted evaluation, to be continued."""
    finished: bool
    """``out`` is there, and --resume was given."""


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
    files = _look_at_files(out, png, save_reference, resume, several=len(config.settings()) > 1)
    if not config.reference:
        raise ValueError("name what to compare with: --reference digits, a folder of images, or an .npz")
    check_reference(config.reference)
    world.barrier()  # every process has looked at the files before one is written
    folders = [model_folder(path) for path in (folder, before) if path is not None]
    spec, rewarded = _network_spec(config, folders[0]), listed(config.rewards)
    classifier = _classifier(spec, rewarded)
    for reward in rewarded:
        check_files(reward, classifier)
    models = [Pipeline.load(path, world.device, config.weights) for path in folders]
    rows = _settings(models, folders, config)
    network = load_network(spec, world, config.inception_weights)
    if not config.shard:
        for model in models:
            model.accelerate()
    rewards = _load_rewards(rewarded, classifier, config, models[0])
    code = {name: digest_of(path) for name, path in code_of(rewarded).items()}
    code |= {"classifier": digest_of(Path(classifier))} if classifier and rewarded else {}
    jobs = _jobs(models, rows)
    if files.finished:
        _show_finished(files, jobs, network, rewards, code, config, folders, world)
        return
    if world.is_main:
        writable_folder(out.parent)
        if png is not None and not files.goes_on:
            new_folder(png)
    sizes = models[0].tokenizer.image_size, models[0].tokenizer.image_channels
    reference = load_reference(config.reference, network, *sizes, world)
    check_features(models[0], reference, network)
    if save_reference is not None and world.is_main and not save_reference.exists():
        references.save_reference(save_reference, reference, network)
    if config.num_images < FEW:
        warn(f"distances of {config.num_images} images are mostly those of so few: compare them at equal counts only")
    for model in models:
        world.shard(model.network)
    results = []
    for job in jobs:
        pictures = png / job.folder if png is not None and len(jobs) > 1 else png
        if pictures is not None and world.is_main:
            pictures.mkdir(parents=True, exist_ok=True)
        world.barrier()
        results.append(measure(
            job.model, reference, network, config, job.settings, world=world, rewards=rewards, png=pictures,
            weights=job.digest, code=code, partial=files.partial / "rows" / job.folder, title=job.title,
        ))  # fmt: skip
        if world.is_main and len(jobs) > 1:
            tqdm.write(f"{job.title}  {one_line(results[-1])}")
    if world.is_main:
        _write(files, jobs, results, folders)
        print(f"written to {out}")
    world.barrier()


def _look_at_files(out: Path, png: Path | None, save_reference: Path | None, resume: bool, several: bool) -> _Files:
    """What there is; ValueError if it would be overwritten, or is another program's."""
    partial, plot_file = out.with_name(f"{out.name}.partial"), out.with_suffix(".png") if several else None
    finished, goes_on = resume and out.is_file(), resume and (partial / "rows").is_dir()
    for path, flag in ((out, "out"), (plot_file, "out"), (save_reference, "save-reference"), (png, "png")):
        if path is not None and path.exists() and (path == out or not goes_on) and not finished:
            raise ValueError(f"{path} exists: choose another --{flag}")
    if partial.exists() and not goes_on:
        remedy = "add --resume to go on, or remove it" if not resume else "it is not of marval: choose another --out"
        raise ValueError(f"{partial} holds an unfinished evaluation: {remedy}")
    if plot_file is not None:
        check_matplotlib()
    return _Files(out, plot_file, png, save_reference, partial, goes_on, finished)


def _settings(models: Sequence[Pipeline], folders: Sequence[Path], config: EvaluateConfig) -> list[dict[str, Any]]:
    """The settings to draw with; for two models one alone, with what is left open as the first has it.

    Raises:
        ValueError: a model does not serve a setting, has no images, or the two draw other things.
    """
    rows = config.settings()
    if len(models) > 1:  # not each with its own defaults
        stored = models[0].settings(**rows[0])
        chain = () if models[0].student is None else ("head_steps", "solver")
        rows = [{name: getattr(stored, name) for name in rows[0] if name not in chain}]
    for model in models:
        model.require_images()
        for row in rows:
            refuse_cache(config.shard, model.settings(**row))
    if any(_draws(model) != _draws(models[0]) for model in models):
        raise ValueError(f"{folders[1]} draws other classes, images or tokens than {folders[0]}: --before is the same "
                         "model before RL")  # fmt: skip
    return rows


def _jobs(models: Sequence[Pipeline], rows: Sequence[dict[str, Any]]) -> list[_Job]:
    """A row of results for each setting of one model, or for each of two models at one setting."""
    digests = [weights_digest(model) for model in models]
    if len(models) > 1:
        each = zip(("after", "before"), models, digests, strict=True)
        return [_Job(name, model, digest, rows[0], name) for name, model, digest in each]
    titles = ["evaluate"] if len(rows) == 1 else [f"{i + 1}/{len(rows)}" for i in range(len(rows))]
    return [_Job(titles[i], models[0], digests[0], row, f"{i:03d}") for i, row in enumerate(rows)]


def _write(files: _Files, jobs: Sequence[_Job], results: list[dict[str, Any]], folders: Sequence[Path]) -> None:
    """Results, plot and tables; what was kept in case of an interruption goes."""
    if len(folders) > 1:
        kept = (files.partial / "rows" / job.folder / REWARDS_FILE for job in jobs)
        pair = paired(results[0], results[1], _differences(*kept))
        write_json(files.out, pair)
        print(pair_table(pair, *map(str, folders)))
    elif files.plot is None:
        write_json(files.out, results[0])
        print(result_table(results[0], str(folders[0])))
    else:
        write_atomically(files.plot, lambda path: plot(results, path))
        write_json(files.out, {"rows": results})
        print(sweep_table(results, str(folders[0])))
        print(f"plot in {files.plot}")
    shutil.rmtree(files.partial)


def _differences(after: Path, before: Path) -> dict[str, Any]:
    """Mean difference of each reward, after minus before, and its 95 % interval over pairs of images that share seed,
    noise and class. Two REWARDS_FILEs."""
    found = {}
    with np.load(after, allow_pickle=False) as new, np.load(before, allow_pickle=False) as old:
        for name in new.files:
            mean, half = mean_interval(torch.from_numpy(new[name]).double() - torch.from_numpy(old[name]).double())
            found[name] = {"mean": mean, "interval95": half}
    return found


def _show_finished(
    files: _Files, jobs: Sequence[_Job], network: FeatureNetwork, rewards: Mapping[str, Reward],
    code: Mapping[str, str], config: EvaluateConfig, folders: Sequence[Path], world: World,
) -> None:  # fmt: skip
    """Print the results that are there already.

    Raises:
        ValueError: they are not what is asked for, in any part of the protocol or any file.
    """
    protocols = [
        protocol_of(job.model, network, config, job.settings, job.digest, rewards, code)
        | {"reference": config.reference}
        for job in jobs
    ]
    text = _finished(files.out, protocols, rewards, folders)
    for path, flag in ((files.png, "png"), (files.save_reference, "save-reference")):
        if path is not None and not path.exists():
            raise ValueError(f"{files.out} is finished, without {path}: choose another --out, or leave --{flag} out")
    world.barrier()
    if world.is_main:
        if files.goes_on:
            _remove_partial(files, jobs)
        print(f"{text}\nfinished before: {files.out}")


def _rows_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file of results, in the order of its jobs."""
    rows = results.get("rows", [results])
    return [*rows, results["before"]] if "before" in results else rows


def _remove_partial(files: _Files, jobs: Sequence[_Job]) -> None:
    """Remove what an interruption between the last file and the end has left; ValueError if it is of other results."""
    for job, row in zip(jobs, _rows_of(read_json(files.out)), strict=True):
        kept = files.partial / "rows" / job.folder / "results.json"
        if not kept.exists() or read_json(kept)["protocol"] != row["protocol"]:
            raise ValueError(f"{files.partial} holds an unfinished evaluation, and {files.out} another, finished one: "
                             "remove one of them")  # fmt: skip
    shutil.rmtree(files.partial)


def _finished(
    out: Path, protocols: Sequence[Mapping[str, Any]], rewards: Mapping[str, Reward], folders: Sequence[Path]
) -> str:
    """The results that are there already, as people read them; ValueError unless they are what is asked for."""
    results = read_json(out)
    try:
        rows = _rows_of(results)
        found = [row["protocol"] for row in rows]
        scored = {name for row in rows for name in row.get("rewards", {})}
    except (LookupError, TypeError, AttributeError):
        raise ValueError(f"{out} exists and is no result of marval evaluate: choose another --out") from None
    if len(found) != len(protocols):
        raise ValueError(f"{out} exists, with {len(found)} rows, not {len(protocols)}: choose another --out")
    if scored != set(rewards):
        raise ValueError(f"{out} exists, with rewards {sorted(scored)}, not {sorted(rewards)}: choose another --out")
    for before, now in zip(found, json.loads(json.dumps(protocols)), strict=True):
        for name, value in now.items():
            unknown = name not in before and (name == "classifier" or name.startswith("code of "))  # to older versions
            if before.get(name) != value and not unknown:
                values = f"{name} = {before.get(name)!r}, not {value!r}"
                raise ValueError(f"{out} exists, with {values}: choose another --out")
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
        rewards_of(rewards[spec], black, class_prompts(config.prompt, model.class_names)[:1], model.device, 0)
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
