"""Which settings of the distillation are best? Each variant changes one setting of the recipe and is measured alike.

    python benchmarks/distill_ablation.py run digits runs/digits     # every row; goes on where it stopped
    python benchmarks/distill_ablation.py run digits runs/digits --axes "lambda of L2,contexts" --seeds 0
    python benchmarks/distill_ablation.py page                           # docs/results.md from the committed results

The folder holds teacher, classifier and judge; the judge is a classifier of another architecture and seed that took
part in no training. A variant and seed is added to benchmarks/results/distill_ablation_NAME.json as soon as it is
there, the first seed of all variants first. All variants of a seed draw from the same noise, which no other page uses.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from real_pictures import load_networks, moments_of_all, quality, real_features
from results_page import (
    BLUE,
    GREY,
    QUICK,
    RED,
    about_now,
    alone_in,
    mean_and_deviation,
    measured_on,
    places,
    same_protocol,
    shown_folder,
    table,
    write_between,
)

from marval import recipes
from marval.checkpoint import read_json, write_atomically, write_json
from marval.config import DistillConfig, filled, numbers, to_dict
from marval.data import load_dataset
from marval.distill import distill, make_student
from marval.draw import sample_in_turn
from marval.measure import weights_digest
from marval.pipeline import Pipeline
from marval.tables import check_matplotlib

NUM_IMAGES, FIRST_SEED = 2000, 77
"""Images of every row; the seed of the images is this one plus the row's."""
SCALES = (1.0, 2.0, 3.0)
"""Guidance at which a student that takes it as an input is compared with one student per scale."""
NETWORKS = ("classifier", "judge")
RECIPE, GUIDANCE, UPDATES = "recipe", "guidance", "updates"
BEGIN, END = "<!-- ablations: python benchmarks/distill_ablation.py page -->", "<!-- end of ablations -->"


def axes(base: DistillConfig) -> dict[str, dict[str, DistillConfig]]:
    """The values of every setting, each in a recipe that is otherwise ``base``."""

    def gsim(**changes: Any) -> DistillConfig:
        return dataclasses.replace(base, gsim=dataclasses.replace(base.gsim, **changes))

    def student(**changes: Any) -> DistillConfig:
        return dataclasses.replace(base, student=dataclasses.replace(base.student, **changes))

    def run(**changes: Any) -> DistillConfig:
        return dataclasses.replace(base, **changes)

    low, high = base.student.guidance_range or (base.student.guidance,) * 2
    return {
        "lambda of L2": {f"{lam:g}": gsim(lam=lam) for lam in (1.0, 0.5, 0.0, -0.4)},
        "distance": {name: gsim(distance=name) for name in ("pseudo-huber", "squared")},
        "trained": {
            "head": run(trained="head", auxiliary="head"),
            **{
                f"head, {n} updates per context": run(trained="head", auxiliary="head", context_updates=n)
                for n in (2, 4)
            },
            "head and backbone": run(trained="all"),
        },
        "auxiliary updates": {f"{n}": gsim(auxiliary_updates=n) for n in (1, 2, 5)},
        "t_init": {f"{t}": student(t_init=t) for t in (100, 300, 450, 600, 755)},
        "t_max": {f"{t}": gsim(t_range=(base.gsim.t_range[0], t)) for t in (700, 850, 950, 999)},
        "contexts": {name: run(rollout=share) for name, share in (("data", 0.0), ("half", 0.5), ("rollouts", 1.0))},
        "mask ratios": {name: run(mask_ratios=name) for name in ("inference", "training", "tokens")},
        GUIDANCE: {f"input, {low:g} to {high:g}": base}
        | {f"w = {w:g} alone": student(guidance=w, guidance_range=None) for w in SCALES},
        UPDATES: {f"{n}": run(steps=n) for n in (base.steps // 4, base.steps // 2, base.steps, 2 * base.steps)},
    }


def cost(config: DistillConfig) -> tuple[Any, ...]:
    """What an update's time depends on."""
    return config.trained, config.auxiliary, config.gsim.auxiliary_updates, config.rollout, config.context_updates


class Study:
    """One data set's teacher and results."""

    def __init__(self, name: str, folder: Path, quick: bool):
        recipe = recipes.DISTILL[name]()
        self.base = dataclasses.replace(recipe, steps=4 if quick else recipe.steps, sample_every=0, save_every=10**6)
        self.name, self.folder, self.axes = name, folder, axes(self.base)
        self.names = {
            axis: {value: RECIPE if config == self.base else f"{axis}: {value}" for value, config in values.items()}
            for axis, values in self.axes.items()
        }
        """Of the rows; the recipe's, which all axes share, is one."""
        self.num_images = 40 if quick else NUM_IMAGES
        self.file = places(quick).results / f"distill_ablation_{name}.json"
        self.teacher = Pipeline.load(folder / "teacher").accelerate()
        data = recipe.data
        networks = load_networks(folder, None, None, "cpu")
        parts = {"train": load_dataset(data, "train")}
        real = real_features(data, parts, networks, QUICK / "sets" if quick else folder / "sets")
        names, whole = self.teacher.class_names, moments_of_all(real)
        self.quality: Callable[..., dict[str, float]] = lambda images, labels: quality(
            images, labels, [len(images)], networks, real, whole, names
        )[len(images)]
        protocol = {
            "recipe": to_dict(self.base),
            "num_images": self.num_images, "data": parts["train"].source, "train images": len(parts["train"]),
            "teacher": weights_digest(self.teacher), "teacher_steps": self.teacher.sampling.head_steps,
            **{name: f"{network.name}, sha256 {network.digest}" for name, network in networks.items()},
        }  # fmt: skip
        self.protocol = json.loads(json.dumps(protocol))  # as it is read back
        self.read()

    def read(self) -> dict[str, Any]:
        """The rows so far, of this protocol; those of another process as well."""
        results = read_json(self.file) if self.file.exists() else {"rows": {}, "protocol": {}}
        if recipe := results["protocol"].get("recipe"):
            results["protocol"]["recipe"] = filled(recipe, self.protocol["recipe"])
        results["protocol"] = same_protocol(self.file, results["protocol"], self.protocol)
        return results

    def scales(self, config: DistillConfig) -> list[float]:
        """At which a variant is measured: the recipe at all of them, the others at their own."""
        own = config.student.guidance
        return sorted({own, *SCALES}) if config == self.base and config.student.guidance_range else [own]

    def measure(self, model: Pipeline, seed: int, scales: Sequence[float]) -> dict[str, dict[str, float]]:
        """Numbers by guidance."""
        classes = range(len(model.class_names))
        found: dict[str, dict[str, float]] = {}
        for w in scales:
            images, labels = sample_in_turn(
                model, classes, self.num_images, FIRST_SEED + seed, ar_steps=self.base.ar_steps, guidance=w
            )
            found[f"{w:g}"] = self.quality(images, labels)
        return found

    def row(self, name: str, config: DistillConfig | None, seed: int) -> dict[str, Any]:
        """One row: a variant distilled and measured; or without a config, what it started from."""
        if config is None:
            fixed = dataclasses.replace(self.base.student, guidance_range=None)
            model = make_student(self.teacher, dataclasses.replace(self.base, student=fixed))
            if name == "teacher":
                return {"values": self.measure(self.teacher, seed, self.scales(self.base))}
            return {"values": self.measure(model, seed, [fixed.guidance])}
        with tempfile.TemporaryDirectory() as out:
            wall, cpu = time.perf_counter(), time.process_time()
            model = distill(dataclasses.replace(config, seed=seed), self.folder / "teacher", Path(out) / "student")
            seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        return {**seconds, "values": self.measure(model.accelerate(), seed, self.scales(config))}

    def run(self, chosen: Sequence[str], seeds: Sequence[int]) -> None:
        """Add the rows that are missing."""
        if unknown := [axis for axis in chosen if axis not in self.axes]:
            raise ValueError(f"unknown axis {unknown[0]!r}: choose of {', '.join(self.axes)}")
        wanted: dict[str, DistillConfig | None] = {"teacher": None, "untrained": None}
        wanted[RECIPE] = self.base
        for axis in chosen:
            wanted |= {self.names[axis][value]: config for value, config in self.axes[axis].items()}
        rows = self.read()["rows"]
        missing = [(name, seed) for seed in seeds for name in wanted if f"{name}/{seed}" not in rows]
        if missing:
            self.estimate([wanted[name] for name, _ in missing])
        for name, seed in missing:
            start = time.perf_counter()
            row: dict[str, Any] = {**self.row(name, wanted[name], seed), "seed": seed}
            about = {"folder": shown_folder(self.folder), "about": about_now(self.teacher.device), "axes": self.names}
            with alone_in(self.file.parent):
                results = self.read()
                results["rows"][f"{name}/{seed}"] = row
                write_json(self.file, results | {"name": self.name} | about)
            numbers_of = next(iter(row["values"].values()))
            shown = ", ".join(f"{key} {value:.4g}" for key, value in numbers_of.items())
            print(f"{name}/{seed}: {shown}; {time.perf_counter() - start:.0f} s", flush=True)

    def estimate(self, configs: Sequence[DistillConfig | None]) -> None:
        """Print how long the rows will take, from a short run of every kind of update and a few images."""
        updates = max(2, min(20, self.base.steps))
        per_update: dict[tuple[Any, ...], float] = {}
        students = [config for config in configs if config is not None]
        for config in students:
            if cost(config) not in per_update:
                short = dataclasses.replace(config, steps=updates, log_every=updates)
                with tempfile.TemporaryDirectory() as out:
                    start = time.perf_counter()
                    distill(short, self.folder / "teacher", Path(out) / "student")
                    per_update[cost(config)] = (time.perf_counter() - start) / updates
        per_image, few = {}, min(100, self.num_images)
        plain = dataclasses.replace(self.base.student, guidance_range=None)
        student = make_student(self.teacher, dataclasses.replace(self.base, student=plain))
        for kind, model in (("student", student), ("teacher", self.teacher)):
            start = time.perf_counter()
            sample_in_turn(model, range(len(model.class_names)), few, 0)
            per_image[kind] = (time.perf_counter() - start) / few
        training = sum(per_update[cost(config)] * config.steps for config in students)
        sets = sum(len(self.scales(config)) for config in students)
        started = [config for config in configs if config is None]
        drawing = self.num_images * (
            sets * per_image["student"]
            + len(started) / 2 * (len(self.scales(self.base)) * per_image["teacher"] + per_image["student"])
        )
        minutes = (training + drawing) / 60
        print(
            f"{len(configs)} rows are missing: about {minutes:.1f} minutes at this pace, {drawing / 60:.1f} of them to "
            f"draw ({updates} updates of every kind and {few} images of teacher and student were timed)",
            flush=True,
        )


# ---- the page


def seeds_of(results: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Rows of a variant, by seed."""
    found = [row for key, row in results["rows"].items() if key.rpartition("/")[0] == name]
    return sorted(found, key=lambda row: row["seed"])


def values_at(rows: Sequence[Mapping[str, Any]], w: str, key: str) -> list[float]:
    return [row["values"][w][key] for row in rows if w in row["values"]]


def line(results: Mapping[str, Any], name: str, w: str, *titles: str) -> list[str]:
    """Cells of a row of the table at a guidance scale."""
    rows = seeds_of(results, name)
    seconds = [row["cpu_seconds"] for row in rows if "cpu_seconds" in row]
    return [
        *titles, w, *(mean_and_deviation(values_at(rows, w, f"fid_{network}_train")) for network in NETWORKS),
        *(mean_and_deviation(values_at(rows, w, key), 100) for key in ("precision", "recall", "accuracy")),
        f"{statistics.fmean(seconds):.0f}" if seconds else "", str(len(values_at(rows, w, "accuracy"))),
    ]  # fmt: skip


def ablation_table(results: Mapping[str, Any]) -> str:
    """Every value of every axis; the recipe once in each."""
    own = own_guidance(results)
    start = {"teacher": f"teacher, {results['protocol']['teacher_steps']} steps", "untrained": "1 step, untrained"}
    lines = []
    for name, title in start.items():
        scales = list(dict.fromkeys(w for row in seeds_of(results, name) for w in row["values"]))
        lines += [line(results, name, w, "", title) for w in scales]
    for axis, values in results["axes"].items():
        for value, name in values.items():
            rows, title = seeds_of(results, name), f"**{value}**" if name == RECIPE else value
            scales = list(rows[0]["values"]) if rows and (axis == GUIDANCE or name != RECIPE) else [own] * bool(rows)
            lines += [line(results, name, w, axis, title) for w in scales]
    head = [
        "setting", "value", "w", *(f"FID, {network}" for network in NETWORKS), "precision, %", "recall, %",
        "accuracy, %", "CPU seconds", "seeds",
    ]  # fmt: skip
    return table(head, lines)


def own_guidance(results: Mapping[str, Any]) -> str:
    """The recipe's, as the values of a row name it."""
    return f"{results['protocol']['recipe']['student']['guidance']:g}"


def better(results: Mapping[str, Any]) -> str:
    """Values that beat the recipe in every seed and over the features of both networks, in words."""
    own = own_guidance(results)

    def by_seed(name: str) -> dict[int, list[float]]:
        return {
            row["seed"]: [row["values"][own][f"fid_{network}_train"] for network in NETWORKS]
            for row in seeds_of(results, name) if own in row["values"]
        }  # fmt: skip

    recipe, found = by_seed(RECIPE), []
    for name in dict.fromkeys(name for values in results["axes"].values() for name in values.values()):
        pairs = [(fids, recipe[seed]) for seed, fids in by_seed(name).items() if seed in recipe]
        if len(pairs) > 1 and all(a < b for fids, ours in pairs for a, b in zip(fids, ours, strict=True)):
            found.append(name)
    if len(recipe) < 2:
        return ""
    return f"Below the recipe in every seed and over both networks' features: {'; '.join(found) or 'none'}."


def ablation_plot(results: Mapping[str, Any], path: Path) -> None:
    """FID over the judge's features, a panel for each axis: every seed, and the mean of each value."""
    check_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    own, key = own_guidance(results), "fid_judge_train"
    figure = Figure(figsize=(13, 6), layout="constrained", dpi=100)
    columns = -(-len(results["axes"]) // 2)
    panels = figure.subplots(2, columns, sharey=True).flatten()
    recipe = values_at(seeds_of(results, RECIPE), own, key)
    teacher = values_at(seeds_of(results, "teacher"), own, key)

    def draw(axes: Any, x: Sequence[float], names: Sequence[tuple[str, str]], **style: Any) -> None:
        """Dots and means of (row, guidance) at x."""
        found = [(at, values_at(seeds_of(results, name), w, key)) for at, (name, w) in zip(x, names, strict=True)]
        found = [(at, values) for at, values in found if values]
        for at, values in found:
            axes.plot([at] * len(values), values, "o", color=style["color"], alpha=0.45, markersize=4)
        means = [statistics.fmean(values) for _, values in found]
        axes.plot([at for at, _ in found], means, marker="_", markersize=12, linewidth=1.2, **style)

    for axes, (axis, values) in zip(panels, results["axes"].items(), strict=False):
        names = list(values.values())
        if recipe and axis != GUIDANCE:
            axes.axhspan(min(recipe), max(recipe), color=RED, alpha=0.15, linewidth=0)
        if axis == GUIDANCE:
            scales = [f"{w:g}" for w in SCALES]
            alone = [(name, next(iter(seeds_of(results, name)[0]["values"]))) for name in names[1:]
                     if seeds_of(results, name)]  # fmt: skip
            draw(axes, SCALES, [(RECIPE, w) for w in scales], color=RED, label="an input")
            draw(axes, [float(w) for _, w in alone], alone, color=BLUE, label="one student each")
            draw(axes, SCALES, [("teacher", w) for w in scales], color=GREY, label="teacher")
            axes.set_xticks(SCALES)
            axes.legend(frameon=False, fontsize=7)
            title = "guidance w"
        else:
            if teacher:
                axes.axhline(statistics.fmean(teacher), color=GREY, linewidth=1, linestyle="--")
            if axis == UPDATES:
                seconds = [[row["cpu_seconds"] for row in seeds_of(results, name)] for name in names]
                there = [(statistics.fmean(s), name, text) for s, name, text in zip(seconds, names, values, strict=True)
                         if s]  # fmt: skip
                axes.set_xscale("log")
                axes.xaxis.set_minor_locator(NullLocator())
                draw(axes, [x for x, _, _ in there], [(name, own) for _, name, _ in there], color=BLUE)
                axes.set_xticks([x for x, _, _ in there], [f"{x:.0f} s\n{text}" for x, _, text in there])
                title = "updates (and CPU seconds)"
            else:
                draw(axes, range(len(names)), [(name, own) for name in names], color=BLUE)
                axes.set_xticks(range(len(names)), [textwrap.fill(value, 9) for value in values])
                axes.set_xlim(-0.5, len(names) - 0.5)
                title = axis
            for tick, name in zip(axes.get_xticklabels(), [name for name in names if name], strict=False):
                tick.set_color(RED if name == RECIPE else "black")
        axes.set_title(title, fontsize=10)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    for axes in panels[len(results["axes"]) :]:
        axes.set_visible(False)
    figure.supylabel("FID over the judge's features, to the training split", fontsize=9)
    write_atomically(path, lambda place: figure.savefig(place, format="png", metadata={"Software": None}))


def section(results: Mapping[str, Any], pictures: Path) -> str:
    """One data set."""
    name, protocol = results["name"], results["protocol"]
    recipe, file = protocol["recipe"], pictures / f"results_ablation_{name}.png"
    ablation_plot(results, file)
    about = (
        f"Measured by `python benchmarks/distill_ablation.py run {name} {results['folder']}`, "
        f"{measured_on(results['about'])}: {recipe['steps']} updates of {recipe['batch']} images, K = "
        f"{recipe['ar_steps']}; {protocol['num_images']:,} images of each row; {protocol['train images']:,} training "
        f"images. Classifier: {protocol['classifier']}. Judge: {protocol['judge']}. Teacher {protocol['teacher']}."
    )
    picture = (
        f"![FID of each value of each setting](images/{file.name})\n\nA dot is a seed, a bar the mean; red: the "
        "recipe's value, and its range over seeds; dashed: the teacher."
    )
    return "\n\n".join(filter(None, [f"### {name}", about, better(results), picture, ablation_table(results)]))


def write_page(quick: bool) -> None:
    """The ablations of docs/results.md."""
    to = places(quick)
    found = [read_json(file) for file in sorted(to.results.glob("distill_ablation_*.json"))]
    write_between(to.page, BEGIN, END, "\n\n".join(section(results, to.pictures) for results in found))


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run, page = verbs.add_parser("run"), verbs.add_parser("page")
    run.add_argument("name", choices=("digits", "fashion-mnist"))
    run.add_argument("folder", type=Path)
    run.add_argument("--axes", help="comma-separated settings; all if left out")
    run.add_argument("--seeds", default="0,1", help="of the distillation and the images")
    for verb in (run, page):
        verb.add_argument("--quick", action="store_true", help="a trial: 4 updates, 40 images, a temporary place")
    given = parser.parse_args(args)
    if given.verb == "page":
        write_page(given.quick)
        return
    study = Study(given.name, given.folder, given.quick)
    study.run(given.axes.split(",") if given.axes else list(study.axes), numbers(given.seeds, int, "--seeds"))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"{error}")
