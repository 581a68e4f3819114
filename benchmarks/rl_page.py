"""Tables and pictures of docs/rl.md, from what rl_study.py has measured."""

import base64
import io
import itertools
import math
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from results_page import ROOT, Places, table, write_between

from marval.checkpoint import read_json
from marval.images import save_png

QUICK = Path(tempfile.gettempdir()) / "rl_study_quick"
"""Everything that ``--quick`` writes."""
COLUMNS = {
    "reward": "its reward", "log_prob": "classifier's log-probability", "judge": "judge's", "brisque": "BRISQUE",
    "accuracy": "accuracy, %", "fid": "FID", "precision": "precision, %", "recall": "recall, %",
    "clipped": "clipped, %", "alarms": "alarms",
}  # fmt: skip
SHOWN = tuple(COLUMNS)
PERCENT = ("accuracy", "precision", "recall", "clipped")
DIFFERENT = ("reward", "judge", "brisque", "accuracy", "fid", "recall")
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t for 95 % intervals of a mean of so many values."""
MANY = 50_000
"""Images over which RL and best of n have the same compute."""
COMPARED = {"reward": "its reward", "judge": "judge's", "fid": "FID"}
"""What changes at equal compute are given for, and what they are called."""
FID_FACTOR, RECALL_FACTOR, JUDGE_SHARE = 1.5, 0.5, 0.1
"""See `hacked`."""
CRITERION = (
    f"**Hacked**, by a rule set before these runs: beside the student on the same images, FID is more than "
    f"{FID_FACTOR} times as high, or recall less than half, or the judge's log-probability has fallen by more than "
    f"{100 * JUDGE_SHARE:.0f} % while the trained reward has risen. A number of seeds where not all agree."
)

Row = dict[str, Any]
Rows = dict[str, Row]


def places(quick: bool) -> Places:
    """The repository's, or for a trial a copy of the page outside of it; results are one file."""
    docs = Places(ROOT / "benchmarks/results/rl_study.json", ROOT / "docs/rl.md", ROOT / "docs/images")
    if not quick:
        return docs
    trial = Places(QUICK / "rl_study.json", QUICK / "rl.md", QUICK / "images")
    trial.pictures.mkdir(parents=True, exist_ok=True)
    if not trial.page.exists():
        shutil.copy(docs.page, trial.page)
    return trial


# ---- numbers


def interval(values: Iterable[float | None], percent: bool = False, sign: bool = False) -> str:
    """Mean and half the width of its 95 % interval (Student's t), of values of several seeds."""
    x = [100 * v if percent else v for v in values if v is not None]
    if not x:
        return ""
    mean = statistics.fmean(x)
    digits = 1 if percent else 0 if abs(mean) >= 100 else 2 if abs(mean) >= 1 else 3
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    if len(x) < 2:
        return text
    return f"{text} ± {T95.get(len(x), 1.96) * statistics.stdev(x) / math.sqrt(len(x)):.{digits}f}"


def of(rows: Rows, key: str) -> dict[str, Row]:
    """The rows of a key, by seed."""
    return {seed: row for name, row in rows.items() for found, _, seed in [name.rpartition("/")] if found == key}


def keys_of(rows: Rows, stage: str) -> list[str]:
    return list(dict.fromkeys(key.rpartition("/")[0] for key in rows if key.startswith(f"{stage}/")))


def after(row: Row) -> Row:
    """The numbers of a model that RL kept, of a best of n, or of the student."""
    return row.get("kept") or row.get("values") or row


def hacked(before: Row, now: Row) -> bool:
    """`CRITERION`."""
    fallen = now["judge"] < before["judge"] - JUDGE_SHARE * abs(before["judge"])
    return (
        now["fid"] > FID_FACTOR * before["fid"]
        or now["recall"] < RECALL_FACTOR * before["recall"]
        or (fallen and now["reward"] > before["reward"])
    )


def verdict(found: Mapping[str, Row]) -> str:
    """Whether the runs of a key were hacked."""
    each = [hacked(row["before"], after(row)) for row in found.values() if "before" in row]
    if not each or len(set(each)) == 1:
        return "" if not each else "**yes**" if each[0] else "no"
    return f"{sum(each)} of {len(each)}"


def measured(rows: Rows) -> list[str]:
    """The columns that there are."""
    student = next(iter(of(rows, "student").values()))
    return [name for name in SHOWN if name != "brisque" or student.get(name) is not None]


def numbers(found: Mapping[str, Row], columns: Sequence[str]) -> list[str]:
    return [interval([after(row).get(name) for row in found.values()], name in PERCENT) for name in columns]


def of_best(n: float, best: Mapping[int, float]) -> float:
    """A number of the best of n, linear in log n between those measured."""
    counts = sorted(best)
    return float(np.interp(math.log(n), [math.log(m) for m in counts], [best[m] for m in counts]))


def equal_n(reward: float, best: Mapping[int, float]) -> tuple[float, bool]:
    """The n whose best of n has this reward, linear in log n between those measured, and whether it is beyond all."""
    pairs = sorted(best.items())
    for (n, low), (m, high) in itertools.pairwise(pairs):
        if reward <= high:
            share = (reward - low) / (high - low) if high > low else 0.0
            return n * (m / n) ** max(0.0, share), False
    return float(pairs[-1][0]), reward > pairs[-1][1]


def against_best(rows: Rows, key: str) -> list[str]:
    """Seconds of RL and of an image; the n that costs as much over `MANY` images, and by how much reward, judge and
    FID differ from the student's, that n's and RL's; the n of equal reward and the images at which both have cost the
    same."""
    ending = ", reads the class (0 or 1)" if "reads the class" in key else ""
    best = {int(k.split("/")[1].split(",")[0]): of(rows, k) for k in keys_of(rows, "best of n")
            if k.endswith(ending) and ("," in k) == bool(ending)}  # fmt: skip
    timed = {seed: row for seed, row in of(rows, key).items() if "seconds_per_image" in row}
    counts, equal_counts, even = list[float](), list[float](), list[float]()
    changes: dict[str, list[float]] = {f"{whose} {name}": [] for name in COMPARED for whose in ("best", "rl")}
    beyond = False
    for seed, row in timed.items():
        values = {n: after(by_seed[seed]) for n, by_seed in best.items() if seed in by_seed}
        if len(values) < 2:
            continue
        images = row["run_seconds"] / row["seconds_per_image"]
        counts.append(1 + images / MANY)
        for name in COMPARED:
            of_n = {n: value[name] for n, value in values.items()}
            start = of_n[min(of_n)]
            changes[f"best {name}"].append(of_best(counts[-1], of_n) - start)
            changes[f"rl {name}"].append(row["kept"][name] - start)
        if changes["rl reward"][-1] > 0:
            n, more = equal_n(row["kept"]["reward"], {n: value["reward"] for n, value in values.items()})
            beyond |= more
            equal_counts.append(n)
            even += [images / (n - 1)] if n > 1 else []
    return [
        interval([row["run_seconds"] for row in timed.values()]),
        interval([1000 * row["seconds_per_image"] for row in timed.values()]),
        interval(counts), *(interval(values, sign=True) for values in changes.values()),
        f"{'> ' * beyond}{interval(equal_counts)}", f"{'< ' * beyond}{interval(even)}",
    ]  # fmt: skip


# ---- tables


def gain(rows: Rows) -> list[str]:
    """Before, after, and the best of n."""
    keys = keys_of(rows, "algorithms")
    if not keys:
        return []
    columns, best = measured(rows), keys_of(rows, "best of n")
    lines = [["student", *numbers(of(rows, "student"), columns), ""]]
    lines += [[title(key), *numbers(of(rows, key), columns), verdict(of(rows, key))] for key in (*keys, *best)]
    text = ["### Gain", table(["", *(COLUMNS[name] for name in columns), "hacked"], lines)]
    costs = [[title(key), *against_best(rows, key)] for key in keys]
    head = [
        "", "seconds of RL", "ms per image", f"n of equal compute, {MANY:,} images",
        *(f"{name}: {whose}" for name in COMPARED.values() for whose in ("best of n", "RL")),
        "n of equal reward", "images until RL pays",
    ]  # fmt: skip
    text += [
        "At equal compute: RL's seconds, evaluations included, and those of drawing and scoring an image of the "
        f"student right after it in the same process. Best of n costs n images where the aligned model costs one: over "
        f"{MANY:,} images, as many as FID is published with, both have cost the same at the n given, whose numbers are "
        "interpolated for each seed, as is the n of equal reward (`>`: beyond the largest n in a seed). Reward, judge "
        "and FID are differences from the student's.",
        table(head, costs),
    ]
    paired = []
    for key in (*keys, *best):
        pairs = [(row["before"], after(row)) for row in of(rows, key).values() if "before" in row]
        names = [name for name in DIFFERENT if name in columns]
        cells = [interval([b[n] - a[n] for a, b in pairs], n in PERCENT, sign=True) for n in names]
        if pairs and key != "best of n/1" and not key.startswith("best of n/1,"):
            paired.append([title(key), *cells])
    if paired:
        head = ["minus the student", *(COLUMNS[name] for name in DIFFERENT if name in columns)]
        text += ["Differences seed by seed, on the same classes, noise and orders:", table(head, paired)]
    return text


def title(key: str) -> str:
    stage, _, name = key.partition("/")
    return f"best of {name}" if stage == "best of n" else name


def anchors(rows: Rows) -> list[str]:
    keys = keys_of(rows, "anchors")
    if not keys:
        return []
    columns = measured(rows)
    named = {"student": "student"}
    if "anchors/none, gentle learning rate" in keys:
        named["algorithms/gradient, log-probability"] = "GSIM 1, gentle learning rate"
        named["algorithms/gradient, log-probability, KL 0.03"] = "GSIM 1 and KL 0.03, gentle learning rate"
    named |= {key: title(key) for key in keys}
    lines = [[name, *numbers(of(rows, key), columns), verdict(of(rows, key))] for key, name in named.items()]
    text = ["### Anchors", CRITERION, table(["anchor", *(COLUMNS[name] for name in columns), "hacked"], lines)]
    stops = []
    for key in keys:
        found = of(rows, key)
        if "guards" in key or "target" in key:
            last, kept = ([f"{v:.0f}" for v in values] for values in (
                [row["curve"][-1]["step"] for row in found.values()], [row["best_update"] for row in found.values()],
            ))  # fmt: skip
            why = dict.fromkeys(row["stop"].partition(";")[0] or "not stopped" for row in found.values())
            stops.append([title(key), ", ".join(last), ", ".join(kept), "; ".join(why)])
    if stops:
        text += [
            "What stops a run by itself, by seed:",
            table(["run", "last update", "update kept", "why it ended"], stops),
        ]
    return text


def by_update(pairs: Mapping[str, str], rows: Rows, head: str, value: Callable[[Row], list[Any]], percent: bool) -> str:
    """A table of a number of every evaluation; `value` gives those of a row."""
    lines = []
    for name, key in pairs.items():
        each = zip(*(value(row) for row in of(rows, key).values()), strict=True)
        lines.append([name, *(interval(step, percent) for step in each)])
    steps = [f"{look['step']:.0f}" for look in next(iter(of(rows, next(iter(pairs.values()))).values()))["curve"]]
    return table([f"{head}, after updates:", *steps], lines)


def intermediates(rows: Rows) -> list[str]:
    everything = {
        f"{what}, anchor {name}": f"{key}{name}"
        for name in ("none", "GSIM 1")
        for what, key in (
            ("whole images", "anchors/"),
            ("one gradient step", "intermediates/one gradient step, anchor "),
            ("one AR step", "intermediates/one AR step, anchor "),
        )
    }  # fmt: skip
    pairs = {name: key for name, key in everything.items() if of(rows, key)}
    if not keys_of(rows, "intermediates") or not of(rows, "anchors/none"):
        return []
    text = [
        "### Rewards of whole images and of single AR steps",
        "One AR step: trained on the reward of what a single AR step makes of all tokens hidden from it. One gradient "
        "step: the reward of whole images, its gradient through one random AR step, as with one AR step.",
    ]
    for name, head in (("reward", "Reward of whole images"), ("fid", "FID"), ("recall", "Recall, %")):
        percent = name in PERCENT
        text.append(by_update(pairs, rows, head, lambda row, n=name: [x[n] for x in row["curve"]], percent))
    seen = {name: key for name, key in pairs.items() if all("glimpses" in row for row in of(rows, key).values())}
    if not seen:
        return text
    text.append(
        "Does the reward of a single step mislead? On the same 200 held-out images at every evaluation: the reward "
        "of what single AR steps make, mean over all K; that of the whole images; and Spearman's correlation of both "
        "over the images, mean over the steps but the last, whose image is the whole one."
    )
    for head, value in (
        ("Reward of single steps", lambda glimpse: statistics.fmean(glimpse["single"])),
        ("Reward of these images, whole", lambda glimpse: glimpse["whole"]),
        ("Correlation", lambda glimpse: statistics.fmean(glimpse["correlation"][:-1])),
    ):
        text.append(by_update(seen, rows, head, lambda row, v=value: [v(g) for g in row["glimpses"]], False))
    lines = []
    for i, when in ((0, "student"), (-1, "at the end")):
        for name, key in list(seen.items())[:1] if i == 0 else seen.items():
            last = [row["glimpses"][i] for row in of(rows, key).values()]
            for part in ("single", "correlation"):
                cells = [interval(values) for values in zip(*(g[part] for g in last), strict=True)]
                what = "reward" if part == "single" else "correlation"
                lines.append([f"{when if i == 0 else f'{name}, {when}'}: {what}", *cells])
    text.append(table(["by AR step", *(f"{k + 1}" for k in range(len(lines[0]) - 1))], lines))
    return text


def agreement(rows: Rows, study: Mapping[str, Any]) -> list[str]:
    reached = {name: of(rows, f"agreement/{name}") for name in ("gradient", "group")}
    if not all(reached.values()):
        return []
    lines = []
    for name, found in reached.items():
        curves = [row["curve"] for row in found.values()]
        rewards = [interval([1000 * c[i]["reward"] for c in curves]) for i in (0, -1)]
        closed = interval([1 - c[-1]["reward"] / c[0]["reward"] for c in curves], percent=True)
        lines.append([name, *rewards, closed, f"{curves[0][-1]['step']:.0f}"])
    head = ["algorithm", "before", "after", "of the gap closed, %", "updates"]
    what = f"Minus the squared distance of an image's mean brightness to {study['grey']}, times 1,000; the best is 0."
    return ["### One optimum, both algorithms", what, table(head, lines)]


def costs(rows: Rows, study: Mapping[str, Any]) -> list[str]:
    found = {key.partition("/")[2]: row for key, row in rows.items() if key.startswith("cost/")}
    if not {f"{kind}, {how}" for kind in ("student", "teacher") for how in ("recomputed", "stored")} <= found.keys():
        return []

    lines = [[name, f"{row['seconds_per_update']:.2f}", f"{row['bytes'] / 2**20:.0f}"] for name, row in found.items()]
    for how in ("recomputed", "stored"):
        a, b = found[f"teacher, {how}"], found[f"student, {how}"]
        ratios = a["seconds_per_update"] / b["seconds_per_update"], a["bytes"] / b["bytes"]
        lines.append([f"ratio, {how}", *(f"{ratio:.1f}" for ratio in ratios)])
    if anchor := found.get("GSIM anchor"):
        a, b = found["teacher, stored"], found["student, stored"]
        seconds = [row["seconds_per_update"] + anchor["seconds_per_update"] for row in (a, b)]
        size = [max(row["bytes"], anchor["bytes"]) for row in (a, b)]
        lines.append(["ratio, stored, both anchored", f"{seconds[0] / seconds[1]:.1f}", f"{size[0] / size[1]:.1f}"])
    row = found["student, stored"]
    about = (
        f"One update of {row['batch']} images, K = {row['ar_steps']}; AR steps stored or recomputed. The teacher's "
        f"chain is DDIM's, of {study.get('chain', 100)} evaluations: as many as the ancestral one has, and no noise to "
        "draw again. The anchor's row is what the default update adds to the rollout."
    )
    head = ["policy", "seconds", "MiB beyond the weights"]
    return ["### The teacher's chain as the policy", about, table(head, lines)]


def memory(rows: Rows) -> list[str]:
    found = {key.partition("/")[2]: row for key, row in rows.items() if key.startswith("memory/")}
    if not found:
        return []
    names = ("tokens", "recomputed", "stored", "recomputed, peak of the update", "stored, peak of the update")
    lines = [[k, *(f"{row[name] / 2**10:.0f}" for name in names)] for k, row in found.items()]
    heads = ["K", "its tokens alone", *names[1:]]
    return ["### Memory of a rollout", "KiB kept for the gradient, 16 images.", table(heads, lines)]


def side_by_side(name: str, pictures: dict[str, str], folder: Path) -> list[str]:
    """Writes rl_NAME.png, a block for each model; returns its place in the page."""
    if not pictures:
        return []
    blocks = [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in pictures.values()]
    scale = max(1, round(480 / blocks[0].shape[1]))
    big = [block.repeat(scale, 0).repeat(scale, 1) for block in blocks]
    gap = np.full((8 * scale // 2, *big[0].shape[1:]), 255, np.uint8)
    whole = np.concatenate([part for block in big for part in (block, gap)][:-1])
    save_png(folder / f"rl_{name}.png", whole if whole.ndim == 3 else whole[..., None])
    names = "; ".join(key.rpartition("/")[2].replace("none", "no anchor") for key in pictures)
    text = f"The same seeds in each block, from above: {names}.\n\n![Images of each model](images/rl_{name}.png)"
    return ["### Side by side", text]


def about(results: Mapping[str, Any]) -> str:
    """How it was measured."""
    study, on, rows = results["protocol"]["study"], results["versions"], results["rows"]
    pressed = f", {study['pressed']} of them under pressure" if "pressed" in study else ""
    group = {name.replace("_", " "): value for name, value in study.get("group", {}).items()}
    own = f"; {', '.join(f'{name} {value}' for name, value in group.items())}" if group else ""
    brisque = " BRISQUE is minus its score, 0 the best." if "brisque" in measured(rows) else ""
    return (
        f"Measured on {results['date']}, {on['device']}, {on['threads']} threads, PyTorch {on['torch']}, "
        f"{study.get('precision', 'float32')}: {study['updates']} updates of {study['batch']} images{pressed}, K = "
        f"{study['ar_steps']}, {len(of(rows, 'student'))} seeds with 95 % intervals, {study['images']} held-out images "
        f"each, distances (to {study['data']}) and accuracy by the judge, which no reward here is made of. Learning "
        f"rate {study['lr']:g} (group: 3 times that{own}), under pressure {study['pressure']:g}. A run keeps the "
        "evaluation that its reward likes best, or what its row says; numbers and pictures are of that model, on "
        "images that chose nothing; alarms are those of its evaluation, and numbers by update those of all "
        "evaluations. Seeds vary RL alone: teacher, student, classifier and judge are the same. A mixture's own reward "
        f"is the plain sum of its parts; the run normalises them.{brisque}"
    )


def write_page(quick: bool) -> None:
    """Tables and pictures of docs/rl.md, between the markers of each study."""
    to = places(quick)
    for name, results in read_json(to.results).items():
        rows, study = results["rows"], results["protocol"]["study"]
        parts = [
            about(results), *gain(rows), *anchors(rows), *intermediates(rows), *agreement(rows, study),
            *costs(rows, study), *memory(rows), *side_by_side(name, results["pictures"], to.pictures),
        ]  # fmt: skip
        write_between(to.page, f"<!-- rl_study {name} -->", f"<!-- end of {name} -->", "\n\n".join(parts))
