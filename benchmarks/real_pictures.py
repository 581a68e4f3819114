"""Models of real pictures, measured: teacher, student and aligned student beside real data, quality against time.

    python benchmarks/real_pictures.py run fashion-mnist runs/fashion --precision bf16   # goes on where it stopped
    python benchmarks/real_pictures.py run fashion-mnist runs/fashion --precision bf16 --rows "teacher*" --seeds 0
    python benchmarks/real_pictures.py clock fashion-mnist runs/fashion    # times, on a quiet machine
    python benchmarks/real_pictures.py page                                # docs/results.md from the committed results

The folder holds teacher, student, aligned (or not), classifier and judge. The judge is a classifier of another
architecture and seed that took part in no training and no reward. Data: data/NAME.npz, or --data.

A row and seed is added to benchmarks/results/real_pictures_NAME.json as soon as it is there. Its images lie in chunks
in FOLDER/sets (--sets) until someone removes them, so that an interrupted or longer row draws only what is missing.
Every row is measured on its first 2,000 images and on all of them: rows of different length are compared at equal
counts. Two processes may work at once on different rows or seeds.
"""

import argparse
import dataclasses
import fnmatch
import functools
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results_page import (
    BATCHES,
    QUICK,
    SOLVERS,
    STEPS,
    about_now,
    alone_in,
    places,
    same_protocol,
    shown_folder,
    write_page,
)
from torch import Tensor
from tqdm import tqdm

from marval.bench import machine, median_and_spread, time_batch, times_in_turn
from marval.checkpoint import read_json, save_arrays, write_json
from marval.config import DistillConfig, StudentConfig, numbers
from marval.data import ImageDataset, load_dataset
from marval.distill import make_student
from marval.features import FeatureNetwork, load_features
from marval.images import image_grid, read_images, save_png
from marval.measure import weights_digest
from marval.metrics import Moments, frechet_distance, moments_of, precision_recall
from marval.pipeline import Pipeline
from marval.reference import CHUNK, NEIGHBOURS, load_reference, save_reference
from marval.rng import generator

FEW = 2000
"""Images at which all rows are compared."""
FEWER_STEPS = (100, 10)
"""Of the teacher's chain at K other than the student's own, with one solver."""
AR_STEPS = (4, 8, 16, 32)
"""K, as far as there are so many tokens; the number of tokens comes on top."""
CHUNKS_ON_A_GPU = 10
"""Drawn at once there: kernels of 250 small images are too short for it, and other processes do not fill the gaps. Only
a teacher's chain, of small kernels all the same, is drawn from CUDA graphs."""
Features = dict[str, dict[str, Tensor]]
"""Pooled features (N, F) of real images by network and split."""
RealMoments = dict[str, dict[str, Moments]]
"""Their moments."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What is measured: real images, or a model with settings."""

    model: str
    ar_steps: int = 0
    head_steps: int = 1
    """Of a teacher's chain; of a student, evaluations."""
    solver: str = "ancestral"

    @property
    def name(self) -> str:
        """As ``--rows`` takes it: real-test, teacher-k16-100-ddpm, student-k16, student-k16-4."""
        several = f"-{self.head_steps}" if self.head_steps > 1 else ""
        chain = f"-{self.head_steps}-{SOLVERS[self.solver]}" if self.model == "teacher" else several
        return self.model + (f"-k{self.ar_steps}{chain}" if self.ar_steps else "")


def all_rows(
    default: int, others: Sequence[int], aligned: bool, steps: Sequence[int] = STEPS,
    fewer: Sequence[int] = FEWER_STEPS, evaluations: Sequence[int] = (),
) -> list[Row]:  # fmt: skip
    """Real data; at K = ``default`` every number of steps with both solvers, and the student with several evaluations;
    at other K fewer."""
    found = [Row(model="real-test"), Row(model="real-half")]
    for k in (default, *others):
        own = k == default
        for n in steps if own else fewer:
            solvers = SOLVERS if own and n > 1 else ("ancestral",)  # a single step is the same in both
            found += [Row(model="teacher", ar_steps=k, head_steps=n, solver=solver) for solver in solvers]
        found += [Row(model="untrained", ar_steps=k)] if own else []
        found += [Row(model=model, ar_steps=k) for model in ("student", "aligned") if aligned or model == "student"]
        found += [Row(model="student", ar_steps=k, head_steps=n) for n in evaluations if own]
    return found


def quality(
    images: np.ndarray, labels: np.ndarray, counts: Sequence[int], networks: Mapping[str, FeatureNetwork],
    real: Features, whole: RealMoments, class_names: Sequence[str],
) -> dict[int, dict[str, float]]:  # fmt: skip
    """What is measured of the first so many images, for each count.

    Frechet distances over the features of every network to each split of ``whole``; over the judge's features,
    precision and recall against as many images of the training split; the judge's accuracy.
    """
    seen = {name: network(images) for name, network in networks.items()}
    indices, logits = networks["judge"].class_indices(class_names), seen["judge"].logits
    if indices is None or logits is None:
        raise ValueError(f"{networks['judge'].name} does not read all of the classes {', '.join(class_names)}")
    right = logits.argmax(1).numpy() == indices[labels]
    train, device = real["judge"]["train"], networks["judge"].device
    train = train[torch.randperm(len(train), generator=generator(0))].to(device)  # the data may be sorted by class
    found: dict[int, dict[str, float]] = {}
    for count in counts:
        values: dict[str, float] = {"images": min(count, len(images)), "accuracy": float(right[:count].mean())}
        for name, features in seen.items():
            drawn = moments_of(features.pooled[:count])
            for split, reference in whole[name].items():
                values[f"fid_{name}_{split}"] = frechet_distance(reference, drawn)
        pooled = seen["judge"].pooled[:count].to(device)
        values["precision"], values["recall"] = precision_recall(pooled, train[: len(pooled)], NEIGHBOURS)
        found[count] = values
    return found


def load_networks(folder: Path, classifier: str | None, judge: str | None, device: str) -> dict[str, FeatureNetwork]:
    """Both by name, the folder's own unless others are given."""
    specs = {"classifier": classifier, "judge": judge}
    return {name: load_features(spec or str(folder / name), device) for name, spec in specs.items()}


def real_features(
    data: str, parts: Mapping[str, ImageDataset[np.ndarray]], networks: Mapping[str, FeatureNetwork], cache: Path
) -> Features:
    """Of every network and split, computed once and kept in ``cache``."""
    found: Features = {}
    for name, network in networks.items():
        found[name] = {}
        for split, images in parts.items():
            file = cache / f"real-{split}-{len(images)}-{network.digest}.npz"
            if not file.exists():
                reference = load_reference(f"{data}:{split}", network)
                with alone_in(cache):
                    if not file.exists():  # another process may have been faster
                        save_reference(file, reference, network)
            features = load_reference(str(file), network).features
            assert features is not None
            found[name][split] = features
    return found


def moments_of_all(real: Features) -> RealMoments:
    return {name: {split: moments_of(x) for split, x in splits.items()} for name, splits in real.items()}


class Study:
    """One data set's models and results."""

    def __init__(
        self, name: str, folder: Path, *, data: str | None = None, classifier: str | None = None,
        judge: str | None = None, sets: Path | None = None, device: str = "cpu", precision: str = "float32",
        quick: bool = False,
    ):  # fmt: skip
        self.name, self.folder, self.precision, self.quick = name, folder, precision, quick
        self.data = data or ("digits" if name == "digits" else f"data/{name}.npz")
        self.file = places(quick).results / f"real_pictures_{name}.json"
        self.sets = sets or (QUICK / "sets" if quick else folder / "sets")
        roles = ["teacher", "student", *(["aligned"] if (folder / "aligned" / "config.json").exists() else [])]
        self.models = {role: Pipeline.load(folder / role, device) for role in roles}
        student, self.few = self.models["student"], 20 if quick else FEW
        if student.student is None:
            raise ValueError(f"{folder / 'student'} holds a teacher: a student is needed there")
        sampling = student.sampling
        start = StudentConfig(t_init=student.student.t_init, guidance=sampling.guidance)
        plan = DistillConfig(student=start, ar_steps=sampling.ar_steps)
        self.digests = {role: weights_digest(model) for role, model in self.models.items()}
        self.models["untrained"] = make_student(self.models["teacher"], plan)
        self.digests["untrained"] = f"{self.digests['teacher']} at {start.t_init}"
        for model in self.models.values():
            if precision == "bf16":
                model.network.to_bf16()
            model.accelerate()
        self.common = {"guidance": sampling.guidance, "guidance_schedule": sampling.guidance_schedule}
        tokens, has_aligned = student.network.config.num_tokens, "aligned" in self.models
        others = sorted({*(k for k in AR_STEPS if k < tokens), tokens} - {sampling.ar_steps})
        several = student.student.choices[:0:-1]
        self.rows = all_rows(sampling.ar_steps, others, has_aligned, evaluations=several)
        if quick:
            self.rows = all_rows(sampling.ar_steps, others[:1], has_aligned, (4, 1), (4,), several)
        self.specs = classifier, judge, device
        given = {"data": data, "classifier": classifier, "judge": judge}
        self.flags = "".join(f" --{name} {value}" for name, value in given.items() if value)
        self.protocol: dict[str, Any] = {
            **self.common, "ar_steps": sampling.ar_steps, "tokens": tokens, "few": self.few,
            **{role: self.digests[role] for role in ("teacher", "student")},
        }  # fmt: skip
        self.read()

    def read(self) -> dict[str, Any]:
        """The results so far, of this protocol; those of another process as well."""
        results = read_json(self.file) if self.file.exists() else {"rows": {}, "clock": {}, "protocol": {}}
        results["protocol"] = same_protocol(self.file, results["protocol"], self.protocol)
        return results

    def save(self, part: str, entries: dict[str, Any]) -> None:
        """Add entries to the rows, or to the clock, of the file."""
        about = about_now(self.models["student"].device)
        with alone_in(self.file.parent):
            results = self.read()
            results[part] |= entries
            results |= {"name": self.name, "folder": shown_folder(self.folder)}
            if part == "rows":
                results["flags"] = self.flags
                results.setdefault("about rows", {})[about["machine"].get("gpu", "cpu")] = about
            else:
                results["about clock"] = about
            write_json(self.file, results)

    def chosen(self, patterns: str, rows: Sequence[Row]) -> list[Row]:
        """Rows whose names match one of the comma-separated patterns, in their own order."""
        globs = [part.strip() for part in patterns.split(",")]
        for glob in globs:
            if not fnmatch.filter([row.name for row in rows], glob):
                raise ValueError(f"--rows {glob!r} is none of {', '.join(row.name for row in rows)}")
        found = [row for row in rows if any(fnmatch.fnmatch(row.name, glob) for glob in globs)]
        if any(row.model == "aligned" for row in found):  # others can be measured while RL still improves it
            self.protocol["aligned"] = self.digests["aligned"]
            self.read()
        return found

    def settings(self, row: Row) -> dict[str, Any]:
        """Arguments of `Pipeline.settings`. The untrained student has no guidance."""
        k: dict[str, Any] = {"ar_steps": row.ar_steps}
        if row.model == "untrained":
            return k
        chain: dict[str, Any] = {"evaluations": row.head_steps}
        if row.model == "teacher":
            chain = {"head_steps": row.head_steps, "solver": row.solver}
        return k | self.common | chain

    # ---- quality

    def run(self, patterns: str, seeds: Sequence[int], num_images: int) -> None:
        """Measure the rows that are missing, the first seed of all of them first."""
        asked, device = self.chosen(patterns, self.rows), machine(self.models["student"].device).get("gpu", "cpu")
        networks = load_networks(self.folder, *self.specs)
        parts = {split: load_dataset(self.data, split) for split in ("train", "test")}
        real = real_features(self.data, parts, networks, self.sets)
        whole = moments_of_all(real)
        self.protocol |= {
            "precision": self.precision, "data": parts["train"].source,
            **{f"{split} images": len(part) for split, part in parts.items()},
            **{name: f"{network.name}, sha256 {network.digest}" for name, network in networks.items()},
        }  # fmt: skip
        counts = sorted({min(self.few, num_images), num_images})
        names = self.models["student"].class_names
        if parts["train"].class_names != names:
            raise ValueError(f"{self.data} and the models do not have the same classes: give the models' --data")
        for seed in seeds:
            for row in asked:
                key = f"{row.name}/{seed}"
                done = self.read()["rows"].get(key, {}).get("values", {})
                if all(str(count) in done for count in counts):
                    continue
                start = time.perf_counter()
                if row.model.startswith("real"):
                    images, labels, against = self.real(row, seed, num_images, parts, real)
                    values = quality(images, labels, counts, networks, against, moments_of_all(against), names)
                else:
                    images, labels = self.draw(row, seed, num_images)
                    values = quality(images, labels, counts, networks, real, whole, names)
                done |= {str(count): value for count, value in values.items()}
                self.save("rows", {key: dataclasses.asdict(row) | {"seed": seed, "device": device, "values": done}})
                shown = ", ".join(f"{name} {value:.4g}" for name, value in values[counts[-1]].items())
                print(f"{key}: {shown}; {time.perf_counter() - start:.0f} s", flush=True)
        if 0 in seeds:
            self.show(parts["test"])

    def show(self, real: ImageDataset[np.ndarray], seed: int = 0) -> None:
        """docs/images/pictures_NAME.png: real images, then those of every model, two of each class, the same seeds.

        Only once all are drawn; the teacher's with most steps, the student's of every number of evaluations.
        """
        k, classes = self.protocol["ar_steps"], len(self.models["student"].class_names)
        own = [row for row in self.rows if row.ar_steps == k and row.solver == "ancestral"]
        shown = [next(row for row in own if row.model == "teacher")]
        shown += sorted((row for row in own if row.model == "student"), key=lambda row: row.head_steps)
        shown += [row for row in own if row.model == "aligned"]
        if not all(f"{row.name}/{seed}" in self.read()["rows"] for row in shown):
            return
        places_of = [np.flatnonzero(real.labels == label)[:2] for label in range(classes)]
        blocks = [real.images[np.array(places_of).T.ravel()], *(self.draw(row, seed, 2 * classes)[0] for row in shown)]
        grid = image_grid(np.concatenate(blocks), columns=2 * classes, scale=-(-56 // real.images.shape[1]))
        with alone_in(places(self.quick).pictures):
            save_png(places(self.quick).pictures / f"pictures_{self.name}.png", grid)

    def draw(self, row: Row, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Images, uint8 NHWC, of the classes in turn, and their labels; chunks that are on disk are read.

        Raises:
            FloatingPointError: all images are the same, as they once were, and black, on a GPU that several processes
                shared (docs/LOG.md, 2026-11-27).
        """
        model, settings = self.models[row.model], self.settings(row)
        on_gpu = model.device.type == "cuda"
        if on_gpu and row.model == "teacher":  # new ones: each number of tokens has its own, and none is ever dropped
            model.accelerate(graphs=True)
        made_by = json.dumps([self.digests[row.model], settings, seed, str(model.device), self.precision])
        folder = self.sets / f"{row.name}-seed{seed}-{hashlib.sha256(made_by.encode()).hexdigest()[:8]}"
        folder.mkdir(parents=True, exist_ok=True)
        labels = np.arange(count) % len(model.class_names)
        parts = []
        at_once = CHUNK * (CHUNKS_ON_A_GPU if on_gpu else 1)
        for start in tqdm(range(0, count, at_once), desc=folder.name, delay=2, mininterval=10, unit_scale=at_once):
            asked = labels[start : start + at_once]
            files = {first: folder / f"images-{start + first:06d}.npz" for first in range(0, len(asked), CHUNK)}
            sizes = [len(asked[first : first + CHUNK]) for first in files]
            found = [read_images(file)[:n] for file, n in zip(files.values(), sizes, strict=True) if file.exists()]
            if [len(images) for images in found] != sizes:
                drawn = model.sample(asked.tolist(), seed=seed, first_image=start, batch_size=at_once, **settings)
                if len(drawn) > 1 and (drawn == drawn[:1]).all():
                    raise FloatingPointError(
                        f"{folder.name}: images {start} to {start + len(drawn) - 1} are all the same"
                    )
                found = [drawn[first : first + CHUNK] for first in files]
                for file, images in zip(files.values(), found, strict=True):
                    save_arrays(file, {"images": images})
            parts += found
        return np.concatenate(parts), labels

    def real(
        self, row: Row, seed: int, count: int, parts: Mapping[str, ImageDataset[np.ndarray]], real: Features
    ) -> tuple[np.ndarray, np.ndarray, Features]:
        """Up to ``count`` real images, their labels, and the features that they are compared with: the test split
        against the training split; or one random half of the training split against its other half, and the test
        split."""
        draws = np.random.default_rng(seed)
        if row.model == "real-test":
            data, against = parts["test"], {name: {"train": splits["train"]} for name, splits in real.items()}
            index = draws.permutation(len(data))
        else:
            data = parts["train"]
            index, other = np.array_split(draws.permutation(len(data)), 2)
            against = {name: splits | {"train": splits["train"][other]} for name, splits in real.items()}
        return data.images[index[:count]], data.labels[index[:count]], against

    # ---- time

    def clock(self, patterns: str, batches: Sequence[int], repeats: int) -> None:
        """Medians of whole batches, all rows of one K in turn (`times_in_turn`)."""
        rows = self.chosen(patterns, [row for row in self.rows if row.ar_steps and row.model != "untrained"])
        for model in self.models.values():
            model.accelerate(graphs=model.device.type == "cuda")
        for batch in batches:
            for k in dict.fromkeys(row.ar_steps for row in rows):
                group = [row for row in rows if row.ar_steps == k]
                load = machine(torch.device("cpu")).get("load_average")
                batch_of = {}
                for row in group:
                    model = self.models[row.model]
                    config = model.settings(**self.settings(row))
                    batch_of[row.name] = functools.partial(time_batch, model, config, batch)
                before = self.read()["clock"]
                about = {"repeats": repeats, "load_average": load, "date": time.strftime("%Y-%m-%d")}
                entries = {}
                for name, values in times_in_turn(batch_of, repeats, f"batch {batch}, K {k}").items():
                    median, spread = median_and_spread([seconds / batch for seconds in values])
                    found = {"seconds_per_image": median, "spread": spread, **about}
                    entries[name] = before.get(name, {}) | {str(batch): found}
                    print(f"{name}, batch {batch}: {1000 * median:.2f} ms per image", flush=True)
                self.save("clock", entries)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run, clock, page = (verbs.add_parser(verb) for verb in ("run", "clock", "page"))
    for verb in (run, clock):
        verb.add_argument("name", help="of the data: digits, fashion-mnist, cifar10, ...")
        verb.add_argument("folder", type=Path)
        verb.add_argument("--rows", default="*", help='names or patterns, such as "student*,teacher-k16-100-*"')
        verb.add_argument("--device", default="cpu")
    run.add_argument("--seeds", default="0,1,2", help="of the images")
    run.add_argument("--num-images", type=int, default=10_000)
    run.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of the weights that draw")
    run.add_argument("--data", help="as of marval train; data/NAME.npz if left out")
    run.add_argument("--classifier", help="as of marval evaluate --features; FOLDER/classifier if left out")
    run.add_argument("--judge", help="likewise; FOLDER/judge if left out")
    run.add_argument("--sets", type=Path, help="for the images; FOLDER/sets if left out")
    clock.add_argument("--batch", default=",".join(map(str, BATCHES)))
    clock.add_argument("--repeats", type=int, default=10)
    for verb in (run, clock, page):
        verb.add_argument("--quick", action="store_true", help="a trial: 40 images, results in a temporary place")
    given = parser.parse_args(args)
    if given.verb == "page":
        write_page(given.quick)
        return
    if given.verb == "clock":
        study = Study(given.name, given.folder, device=given.device, quick=given.quick)
        study.clock(given.rows, numbers(given.batch, int, "--batch"), 2 if given.quick else given.repeats)
        return
    study = Study(
        given.name, given.folder, data=given.data, classifier=given.classifier, judge=given.judge, sets=given.sets,
        device=given.device, precision=given.precision, quick=given.quick,
    )  # fmt: skip
    study.run(given.rows, numbers(given.seeds, int, "--seeds"), 40 if given.quick else given.num_images)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"{error}")
