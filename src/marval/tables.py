"""Results of evaluations for people: one table with its protocol, a table of a sweep, and the plot of its trade-off."""

import importlib.util
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marval.reward_files import short_name

WIDTH = 98
"""Characters of a line, at most."""
INK, COLOURS = "#777a80", ("#3565a8", "#b8541a", "#2a7d5c", "#84509c", "#a8871a", "#4f9db0")
SWEPT = {"guidance": "guidance", "ar_steps": "AR steps", "head_steps": "head steps"}


METRICS = {
    "FID": ("fid", 4, 1, "Frechet distance of pooled features"),
    "sFID": ("sfid", 4, 1, "Frechet distance of spatial features"),
    "Inception Score": ("inception_score", 3, 1, "10 splits by index"),
    "KID x 1000": ("kid", 4, 1000, "100 subsets of up to 1,000 images, unbiased"),
    "precision": ("precision", 4, 1, "3 nearest neighbours"),
    "recall": ("recall", 4, 1, "3 nearest neighbours"),
    "class accuracy": ("accuracy", 4, 1, "images read as the asked class"),
}
"""Title: its name in the results, digits, factor, definition."""
TIME = "ms per image"


def _short_names(results: Mapping[str, Any]) -> dict[str, str]:
    """What tables call each reward; its whole name where the short one is not its own, or that of another row."""
    specs = list(results.get("rewards", {}))
    short = [short_name(spec) for spec in specs]
    taken = [*short, *METRICS, TIME]
    return {spec: name if taken.count(name) == 1 else spec for spec, name in zip(specs, short, strict=True)}


def _with_interval(reward: Mapping[str, float], sign: str = "") -> str:
    return f"{reward['mean']:{sign}.4f} +- {reward['interval95']:.4f}"


def _measured(results: Mapping[str, Any]) -> dict[str, str]:
    """Values of what was measured, by title."""
    found = {}
    for title, (name, digits, factor, _) in METRICS.items():
        if name in results:
            found[title] = f"{factor * results[name]:.{digits}f}"
            if f"{name}_std" in results:
                found[title] += f" +- {factor * results[f'{name}_std']:.{digits}f}"
    for spec, title in _short_names(results).items():
        found[title] = _with_interval(results["rewards"][spec])
    return found | {TIME: f"{1000 * results['timing']['seconds_per_image']:.4g}"}


def _lines(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(metric, value, how it is defined) of what was measured."""
    notes = {title: note for title, (_, _, _, note) in METRICS.items()}
    notes |= dict.fromkeys(_short_names(results).values(), "mean reward, 95 % interval")
    notes[TIME] = f"drawing, each process, batch {results['timing']['batch']}"
    return [(title, value, notes[title]) for title, value in _measured(results).items()]


def _protocol(values: Mapping[str, Any]) -> list[str]:
    """Indented ``name  value`` lines, wrapped."""
    wide = max(map(len, values))
    lines: list[str] = []
    for name, value in values.items():
        title = name if name.startswith("code of ") else name.replace("_", " ")
        start = f"  {title:<{wide}}  "
        lines += textwrap.wrap(f"{value}", WIDTH, initial_indent=start, subsequent_indent=" " * len(start)) or [start]
    return lines


def result_table(results: Mapping[str, Any], model: str) -> str:
    """The numbers of one evaluation, what was left out and why, and the protocol."""
    rows = _lines(results)
    wide, wider = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [model, *(f"  {name:<{wide}}  {value:<{wider}}  {note}" for name, value, note in rows)]
    if "left_out" in results:
        lines += ["left out", *_protocol(results["left_out"])]
    return "\n".join([*lines, "protocol", *_protocol(results["protocol"] | _rewards(results))])


def _rewards(results: Mapping[str, Any]) -> dict[str, str]:
    """Their whole names, for the protocol."""
    return {"rewards": ", ".join(results["rewards"])} if results.get("rewards") else {}


def paired(after: Mapping[str, Any], before: Mapping[str, Any], differences: Mapping[str, Any]) -> dict[str, Any]:
    """The results of two models as one: those after, with those ``before``, and with the ``difference`` of each
    reward."""
    rewards = {name: {**value, "difference": differences[name]} for name, value in after.get("rewards", {}).items()}
    return {**after, **({"rewards": rewards} if rewards else {}), "before": dict(before)}


def pair_table(pair: Mapping[str, Any], after: str, before: str) -> str:
    """`paired` results side by side: the rewards, then all else, and the protocol."""
    values, old = _measured(pair), _measured(pair["before"])
    differences = {
        title: f"{factor * (pair[name] - pair['before'][name]):+.{digits}f}"
        for title, (name, digits, factor, _) in METRICS.items() if title in values and title in old
    }  # fmt: skip
    names = _short_names(pair)
    for spec, title in names.items():
        differences[title] = _with_interval(pair["rewards"][spec]["difference"], "+")
    titles = [*names.values(), *(title for title in values if title not in names.values())]
    table = [("", "before", "after", "after - before")]
    table += [(title, old.get(title, ""), values[title], differences.get(title, "")) for title in titles]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    new, first = pair["protocol"], pair["before"]["protocol"]
    about = {
        name: value if first.get(name) == value else f"{first.get(name)}; then {value}" for name, value in new.items()
    }
    about |= _rewards(pair)
    if names:
        about["+- of rewards"] = (
            "95 % interval of a mean over the images; of a difference over pairs of images of the same seed and class"
        )
    left = ["left out", *_protocol(pair["left_out"])] if "left_out" in pair else []
    folders = _protocol({"before": before, "after": after})
    return "\n".join([*folders, *(f"  {line}" for line in lines), *left, "protocol", *_protocol(about)])


def one_line(results: Mapping[str, Any]) -> str:
    """What was set and the main numbers."""
    protocol = results["protocol"]
    where = f"guidance {protocol['guidance']:g}, {protocol['ar_steps']} AR steps, {protocol['head_steps']} head steps"
    return f"{where}: FID {results['fid']:.4f}"


def sweep_table(rows: Sequence[Mapping[str, Any]], model: str) -> str:
    """One line per setting, and the protocol that all share."""
    columns = {"FID": ("fid", "{:.3f}"), "sFID": ("sfid", "{:.3f}"), "IS": ("inception_score", "{:.2f}"),
               "KID x 1000": ("kid", "{:.3f}"), "prec.": ("precision", "{:.3f}"), "recall": ("recall", "{:.3f}"),
               "acc.": ("accuracy", "{:.3f}")}  # fmt: skip
    table = [[*SWEPT.values(), *(title for title, (name, _) in columns.items() if name in rows[0]), "ms/image"]]
    for row in rows:
        cells = [f"{row['protocol'][name]:g}" for name in SWEPT]
        for name, form in columns.values():
            if name in row:
                cells.append(form.format(1000 * row[name] if name == "kid" else row[name]))
        table.append([*cells, f"{1000 * row['timing']['seconds_per_image']:.4g}"])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table]
    for name in rows[0].get("rewards", {}):
        lines.append(f"{name}: " + ", ".join(f"{row['rewards'][name]['mean']:.3f}" for row in rows))
    shared = {name: value for name, value in rows[0]["protocol"].items() if name not in SWEPT}
    if "left_out" in rows[0]:
        lines += ["left out", *_protocol(rows[0]["left_out"])]
    return "\n".join([model, *lines, "protocol", *_protocol(shared)])


def check_matplotlib() -> None:
    """Raises ValueError unless matplotlib is installed, which plots, curves and the quickstart's report need."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plots and curves are drawn with matplotlib: pip install 'marval[report]'")


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A PNG: FID against guidance, and against the seconds per image, a line for each number of steps."""
    check_matplotlib()
    from matplotlib.figure import Figure

    groups: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["protocol"]["ar_steps"], row["protocol"]["head_steps"]), []).append(row)
    several_head_steps = len({head for _, head in groups}) > 1
    figure = Figure(figsize=(9, 3.8), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2, sharey=True)
    best_ones = []
    for i, ((ar_steps, head_steps), members) in enumerate(sorted(groups.items())):
        members = sorted(members, key=lambda row: row["protocol"]["guidance"])
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": "os^Dv"[i // len(COLOURS) % 5]}
        label = f"K = {ar_steps}" + (f", {head_steps} head steps" if several_head_steps else "")
        fid = [row["fid"] for row in members]
        guidance = [row["protocol"]["guidance"] for row in members]
        seconds = [row["timing"]["seconds_per_image"] for row in members]
        left.plot(guidance, fid, label=label, linewidth=1.5, markersize=5, **style)
        right.plot(seconds, fid, linestyle="", markersize=5, alpha=0.3, markeredgewidth=0, **style)
        best = min(range(len(fid)), key=fid.__getitem__)
        best_ones.append((seconds[best], fid[best]))
        right.plot(*best_ones[-1], linestyle="", markersize=6, **style)
        text = f"w = {guidance[best]:g}"
        right.annotate(text, best_ones[-1], (6, 4), textcoords="offset points", fontsize=8, color=style["color"])
    right.plot(*zip(*sorted(best_ones), strict=True), color=INK, linewidth=0.8, zorder=0)
    right.margins(x=0.15, y=0.14)
    left.set_xlabel("guidance w")
    left.set_ylabel("FID, lower is better")
    right.set_xlabel("seconds per image; solid: best w of each")
    times = [row["timing"]["seconds_per_image"] for row in rows]
    if max(times) > 4 * min(times):
        right.set_xscale("log")
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=8)
    protocol, batch = rows[0]["protocol"], rows[0]["timing"]["batch"]
    title = f"{protocol['num_images']:,} images, seed {protocol['seed']}, features: {protocol['features']}"
    figure.suptitle(textwrap.fill(f"{title}; times of a process at batch {batch}", 140), fontsize=8, color=INK)
    figure.savefig(path, format="png", metadata={"Software": None})
