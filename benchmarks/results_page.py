"""Tables and plots of docs/results.md: what real_pictures.py and distill_ablation.py share, and those of the former."""

import collections
import contextlib
import dataclasses
import fcntl
import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from marval.bench import machine
from marval.checkpoint import read_json, write_atomically
from marval.run import versions
from marval.tables import check_matplotlib

ROOT = Path(__file__).resolve().parents[1]
QUICK = Path(tempfile.gettempdir()) / "marval_results_quick"
"""Everything that ``--quick`` writes."""
SOLVERS = {"ancestral": "ddpm", "ddim": "ddim"}
STEPS = (100, 50, 25, 10, 4, 1)
"""Of the teacher's chain."""
BATCHES = (1, 64)
MODELS = ("real-test", "real-half", "teacher", "untrained", "student", "aligned")
BEGIN, END = "<!-- tables: python benchmarks/real_pictures.py page -->", "<!-- end of tables -->"
BLUE, LIGHT, RED, GREEN, VIOLET, GREY = "#3565a8", "#4f9db0", "#b8541a", "#2a7d5c", "#84509c", "#777a80"


@dataclasses.dataclass(frozen=True)
class Places:
    """Where results are written."""

    results: Path
    page: Path
    pictures: Path


def places(quick: bool) -> Places:
    """The repository's, or for a trial a copy of the page outside of it."""
    docs = Places(ROOT / "benchmarks/results", ROOT / "docs/results.md", ROOT / "docs/images")
    if not quick:
        return docs
    trial = Places(QUICK, QUICK / "results.md", QUICK / "images")
    trial.pictures.mkdir(parents=True, exist_ok=True)
    if not trial.page.exists():
        shutil.copy(docs.page, trial.page)
    return trial


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While it lasts no other process is in here: for reading, changing and writing a file that several share."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def same_protocol(file: Path, before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Both together.

    Raises:
        ValueError: a setting that both have is not the same; names it and the file.
    """
    for name in before.keys() & now.keys():
        if before[name] != now[name]:
            values = f"{before[name]!r}, not {now[name]!r}"
            raise ValueError(f"{file} was measured with {name} = {values}: use the same, or move the file away")
    return before | now


# ---- text


def mean_and_deviation(values: Sequence[float | None], factor: float = 1) -> str:
    """Mean ± sample standard deviation, of values of several seeds; empty if there are none."""
    x = [factor * value for value in values if value is not None]
    if not x:
        return ""
    mean = statistics.fmean(x)
    digits = 1 if factor == 100 or abs(mean) >= 10 else 2 if abs(mean) >= 1 else 3
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(x):.{digits}f}" if len(x) > 1 else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two markers of the page."""
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no place for this: add {begin} and {end}")
    page.write_text(before + begin + "\n" + (f"\n{text}\n\n" if text else "") + end + after)


def about_now(device: torch.device) -> dict[str, Any]:
    """What is stored beside numbers that are measured now."""
    return {"versions": versions(device), "machine": machine(device), "date": time.strftime("%Y-%m-%d")}


def measured_on(about: Mapping[str, Any], precision: str = "float32") -> str:
    """`about_now` in words; the models' weights have this ``precision``."""
    place = about["machine"]
    device = f"{place['threads']} of {place['cores']} cores of {place['cpu']}"
    if "gpu" in place:
        device = f"{place['gpu']} (`--device cuda`)"
    return f"{about['date']}, {device}, {precision}, PyTorch {about['versions']['torch']}"


def where(results: Mapping[str, Any], precision: str) -> str:
    """What measured the rows, GPUs by their names, and how many each if there are several."""
    devices = [row["device"] for row in results["rows"].values()]
    about = {device: measured_on(about, precision) for device, about in results["about rows"].items()}
    if len(about) == 1:
        return "".join(about.values())
    return "; ".join(f"{text} ({devices.count(device)} rows and seeds)" for device, text in about.items())


def shown_folder(folder: Path) -> str:
    """As a command shows it: no path of one machine."""
    return folder.name if folder.is_absolute() else folder.as_posix()


# ---- rows of real pictures

Rows = dict[str, list[dict[str, Any]]]
"""Of all seeds, by name."""


def grouped(results: Mapping[str, Any]) -> Rows:
    """In the order of the table: real data, the student's own K, other K."""
    own = results["protocol"]["ar_steps"]
    found: Rows = {}
    for key, row in results["rows"].items():
        found.setdefault(key.rpartition("/")[0], []).append(row)

    def place(name: str) -> tuple[Any, ...]:
        row = found[name][0]
        k = row["ar_steps"]
        return k not in (0, own), k, MODELS.index(row["model"]), -row["head_steps"], row["solver"]

    return {name: found[name] for name in sorted(found, key=place)}


def label(row: Mapping[str, Any]) -> str:
    many = f"{row['head_steps']} steps, {SOLVERS[row['solver']].upper()}"
    return {
        "real-test": "real: test split", "real-half": "real: half of the training split",
        "teacher": f"teacher, {'1 step' if row['head_steps'] == 1 else many}", "untrained": "1 step, untrained",
        "student": f"student, {row['head_steps']} step{'s' * (row['head_steps'] > 1)}", "aligned": "aligned, 1 step",
    }[row["model"]]  # fmt: skip


def values_of(rows: Sequence[Mapping[str, Any]], count: str, key: str) -> list[float]:
    """Of the seeds that have so many images."""
    return [row["values"][count][key] for row in rows if key in row["values"].get(count, {})]


def mean_of(rows: Sequence[Mapping[str, Any]], count: str, key: str) -> float | None:
    found = values_of(rows, count, key)
    return statistics.fmean(found) if found else None


def seconds(results: Mapping[str, Any], name: str, batch: int) -> float | None:
    """Of an image, by the clock."""
    return results["clock"].get(name, {}).get(str(batch), {}).get("seconds_per_image")


def milliseconds(seconds: float) -> str:
    """Three digits, all before the point."""
    return f"{1000 * seconds:,.0f}" if seconds >= 0.0995 else f"{1000 * seconds:.3g}"


def counts_of(rows: Rows) -> list[str]:
    """Numbers of images; first the one to compare at: the largest of those that most rows have. A number is left out
    if every row has a larger one, of as many seeds."""
    seeds = [collections.Counter(count for row in found for count in row["values"]) for found in rows.values()]
    counts = sorted({count for one in seeds for count in one}, key=int, reverse=True)
    needed = [
        count for i, count in enumerate(counts)
        if any(one[count] > max((one[larger] for larger in counts[:i]), default=0) for one in seeds)
    ]  # fmt: skip
    return sorted(needed, key=lambda count: sum(count in one for one in seeds), reverse=True)


# ---- section of a data set


def quality_table(results: Mapping[str, Any], rows: Rows, count: str) -> str:
    """All rows that have so many images."""
    fids = [f"fid_{network}_{split}" for network in ("classifier", "judge") for split in ("test", "train")]
    head = [
        "", "K", "FID, classifier, test", "train", "FID, judge, test", "train", "precision, %", "recall, %",
        "accuracy, %", *(f"ms, batch {batch}" for batch in BATCHES), "images", "seeds",
    ]  # fmt: skip
    lines = []
    for name, found in rows.items():
        if images := values_of(found, count, "images"):
            times = [seconds(results, name, batch) for batch in BATCHES]
            lines.append([
                label(found[0]), str(found[0]["ar_steps"] or ""),
                *(mean_and_deviation(values_of(found, count, fid)) for fid in fids),
                *(mean_and_deviation(values_of(found, count, v), 100) for v in ("precision", "recall", "accuracy")),
                *("" if time is None else milliseconds(time) for time in times),
                f"{images[0]:,}", str(len(images)),
            ])  # fmt: skip
    return table(head, lines)


def verdict(results: Mapping[str, Any], rows: Rows, counts: Sequence[str]) -> str:
    """The student beside its teacher, in words, at each number of images; empty until both are there."""
    own = results["protocol"]["ar_steps"]
    names = {role: f"{role}-k{own}" for role in ("student", "aligned")} | {"teacher": f"teacher-k{own}-100-ddpm"}
    student, teacher = names["student"], names["teacher"]
    lines = []
    for count, network in itertools.product(sorted(counts, key=int, reverse=True), ("classifier", "judge")):
        key = f"fid_{network}_test"
        fids = {role: mean_and_deviation(values_of(rows.get(name, []), count, key)) for role, name in names.items()}
        least = mean_of(rows.get(student, []), count, key)
        if least is None or not fids["teacher"]:
            continue
        better = []
        for name, found in rows.items():
            fid = mean_of(found, count, key)
            if name.startswith(f"teacher-k{own}-") and fid is not None and fid < least:
                slow, fast = (seconds(results, which, 1) for which in (name, student))
                times = f" ({slow / fast:.3g})" if slow and fast else ""
                better.append(label(found[0]).removeprefix("teacher, ") + times)
        aligned = f", aligned {fids['aligned']}" if fids["aligned"] else ""
        lines.append(
            f"- {int(count):,} images, the {network}'s features: student {fids['student']}{aligned}, teacher with 100 "
            f"DDPM steps {fids['teacher']}. Settings of the teacher with a lower mean than the student's, and their "
            f"time over its time at batch 1: {'; '.join(better) or 'none'}."
        )
    if not lines:
        return ""
    for batch in BATCHES:
        fast, slow = seconds(results, student, batch), seconds(results, teacher, batch)
        if fast and slow:
            lines.append(
                f"- At batch {batch} the student is {slow / fast:.1f} times as fast as its teacher with 100 steps."
            )
    return f"At K = {own}, FID to the test split:\n\n" + "\n".join(lines)


def about_times(results: Mapping[str, Any]) -> str:
    """How the clock ran; empty before it did."""
    entries = [entry for batches in results["clock"].values() for entry in batches.values()]
    if not entries:
        return ""
    loads = [entry["load_average"] for entry in entries if entry["load_average"] is not None]
    busy = f", load average before it {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    least = min(entry["repeats"] for entry in entries)
    return (
        f"Times: `python benchmarks/real_pictures.py clock {results['name']} {results['folder']}`, "
        f"{measured_on(results['about clock'])}{busy}; medians of {least} batches or more after a "
        "warm-up, all rows of one K in turn, whole images."
    )


def section(results: Mapping[str, Any], pictures: Path) -> str:
    """What was measured, tables, plot."""
    name, protocol, rows = results["name"], results["protocol"], grouped(results)
    if not rows:
        return f"### {name}\n\n{about_times(results)}"
    precision = protocol["precision"]
    bf16 = " --precision bf16" if precision == "bf16" else ""
    command = f"`python benchmarks/real_pictures.py run {name} {results['folder']}{bf16}{results.get('flags', '')}`"
    count, *others = counts_of(rows)
    digests = ", ".join(f"{role} {protocol[role]}" for role in ("teacher", "student", "aligned") if role in protocol)
    parts = [
        f"### {name}",
        f"Measured by {command}, {where(results, precision)}. Data: "
        f"{protocol['data']}, {protocol['train images']:,} training and {protocol['test images']:,} test images. "
        f"Guidance w = {protocol['guidance']:g}, {protocol['guidance_schedule']}. Classifier: "
        f"{protocol['classifier']}. Judge: {protocol['judge']}. Models: {digests}.",
        *filter(None, [about_times(results), verdict(results, rows, (count, *others))]),
    ]
    if (shown := pictures / f"pictures_{name}.png").exists():
        own = [found[0] for found in rows.values() if found[0]["ar_steps"] == protocol["ar_steps"]]
        several = sorted(row["head_steps"] for row in own if row["model"] == "student" and row["head_steps"] > 1)
        roles = ["student", *(f"student ({n} steps)" for n in several), *["aligned"] * ("aligned" in protocol)]
        models = ", ".join(roles)
        parts.append(f"![Images of every model](images/{shown.name})")
        parts.append(
            f"From above: real test images, teacher (100 steps), {models}; of every class two, the same seeds."
        )
    file = pictures / f"results_{name}.png"
    if plot(results, rows, count, file):
        parts.append(f"![FID against seconds per image](images/{file.name})")
        parts.append(
            "Numbers at the points are steps per token, or the K of a student of one step; bars are standard "
            "deviations over seeds. The teacher's single step is left out."
        )
    for number in (count, *others):
        parts += [f"The first {int(number):,} images of each row and seed:", quality_table(results, rows, number)]
    return "\n\n".join(parts)


def plot(results: Mapping[str, Any], rows: Rows, count: str, path: Path) -> bool:
    """Quality against time per image, for both networks; False until the clock has run on student and teacher."""
    own = results["protocol"]["ar_steps"]
    ks = sorted({found[0]["ar_steps"] for found in rows.values()} - {0})
    chains = [n for n in STEPS if n > 1]
    lines: dict[str, tuple[list[str], dict[str, Any]]] = {
        f"teacher, DDPM, K = {own}": ([f"teacher-k{own}-{n}-ddpm" for n in chains], {"color": BLUE, "marker": "o"}),
        f"teacher, DDIM, K = {own}": ([f"teacher-k{own}-{n}-ddim" for n in chains], {"color": LIGHT, "marker": "x"}),
    }
    for n, marker in ((100, "^"), (10, "v")) if len(ks) > 1 else ():
        style = {"color": VIOLET, "marker": marker, "linestyle": ":", "markersize": 4}
        lines[f"teacher, {n} steps, each K"] = [f"teacher-k{k}-{n}-ddpm" for k in ks], style
    lines["student, each K"] = [f"student-k{k}" for k in ks], {"color": RED, "marker": "D"}
    several = [name for name, found in rows.items() if found[0]["model"] == "student" and found[0]["head_steps"] > 1]
    lines[f"student, 2 and more steps, K = {own}"] = several, {"color": RED, "marker": "s", "linestyle": ":"}
    lines["aligned, each K"] = [f"aligned-k{k}" for k in ks], {"color": GREEN, "marker": "P"}

    def points(title: str, key: str) -> list[tuple[float, float, float, str]]:
        """Seconds, mean, deviation, text; from fast to slow."""
        found = []
        for name in lines[title][0]:
            x, values = seconds(results, name, 1), values_of(rows.get(name, []), count, key)
            if x is not None and values:
                row, deviation = rows[name][0], statistics.stdev(values) if len(values) > 1 else 0.0
                text = str(row["ar_steps" if title.endswith("each K") else "head_steps"])
                found.append((x, statistics.fmean(values), deviation, text))
        return sorted(found)

    if not points("student, each K", "fid_judge_test") or not points(next(iter(lines)), "fid_judge_test"):
        return False
    check_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(11, 5), layout="constrained", dpi=110)
    for axes, network in zip(figure.subplots(1, 2), ("classifier", "judge"), strict=True):
        for title, (_, style) in lines.items():
            if not (found := points(title, f"fid_{network}_test")):
                continue
            x, y, deviation, texts = zip(*found, strict=True)
            axes.errorbar(x, y, deviation, label=title, **{"linewidth": 1.3, "markersize": 6, "capsize": 2, **style})
            if title.startswith(("student", "teacher, DDPM")):
                texts = ["K=" * title.endswith("each K") + texts[0], *texts[1:]]
                for place, text in zip(zip(x, y, strict=True), texts, strict=True):
                    axes.annotate(
                        text, place, (0, 8), textcoords="offset points", fontsize=8, ha="center", color=style["color"]
                    )
        floor = mean_of(rows.get("real-half", []), count, f"fid_{network}_test")
        if floor is not None:
            axes.axhline(floor, color=GREY, linewidth=1, linestyle="--", label="real training images")
        axes.set(xscale="log", yscale="log", title=f"{results['name']}: features of the {network}")
        axes.set(xlabel="seconds per image, batch 1", ylabel=f"FID to the test split, {int(count):,} images")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.1, y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    write_atomically(path, lambda place: figure.savefig(place, format="png", metadata={"Software": None}))
    return True


def write_page(quick: bool) -> None:
    """All tables and plots of docs/results.md that real_pictures.py measured."""
    to = places(quick)
    found = [read_json(file) for file in sorted(to.results.glob("real_pictures_*.json"))]
    write_between(to.page, BEGIN, END, "\n\n".join(section(results, to.pictures) for results in found))
