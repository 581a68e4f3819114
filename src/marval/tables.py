"""Results of evaluations for people: one table with its protocol, a table of a sweep, and the plot of its trade-off."""

import importlib.util
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WIDTH = 98
"""Characters of a line, at most."""
INK, COLOURS = "#777a80", ("#3565a8", "#b8541a", "#2a7d5c", "#84509c", "#a8871a", "#4f9db0")
SWEPT = {"guidance": "guidance", "ar_steps": "AR steps", "head_steps": "head steps"}


def _with_std(results: Mapping[str, Any], name: str, digits: int, factor: float = 1) -> str:
    return f"{factor * results[name]:.{digits}f} +- {factor * results[f'{name}_std']:.{digits}f}"


def _lines(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(metric, value, how it is defined) of what was measured."""
    found = [("FID", f"{results['fid']:.4f}", "Frechet distance of pooled features")]
    if "sfid" in results:
        found.append(("sFID", f"{results['sfid']:.4f}", "Frechet distance of spatial features"))
    if "inception_score" in results:
        found.append(("Inception Score", _with_std(results, "inception_score", 3), "10 splits by index"))
    if "kid" in results:
        note = "100 subsets of up to 1,000 images, unbiased"
        found.append(("KID x 1000", _with_std(results, "kid", 4, 1000), note))
        found.append(("precision", f"{results['precision']:.4f}", "3 nearest neighbours"))
        found.append(("recall", f"{results['recall']:.4f}", "3 nearest neighbours"))
    if "accuracy" in results:
        found.append(("class accuracy", f"{results['accuracy']:.4f}", "images read as the asked class"))
    for name, reward in results.get("rewards", {}).items():
        found.append((f"{name}", f"{reward['mean']:.4f} +- {reward['interval95']:.4f}", "mean reward, 95 % interval"))
    milliseconds = 1000 * results["timing"]["seconds_per_image"]
    timing = f"drawing, each process, batch {results['timing']['batch']}"
    return [*found, ("ms per image", f"{milliseconds:.4g}", timing)]


def _protocol(values: Mapping[str, Any]) -> list[str]:
    """Indented ``name  value`` lines, wrapped."""
    wide = max(map(len, values))
    lines: list[str] = []
    for name, value in values.items():
        start = f"  {name.replace('_', ' '):<{wide}}  "
        lines += textwrap.wrap(f"{value}", WIDTH, initial_indent=start, subsequent_indent=" " * len(start)) or [start]
    return lines


def result_table(results: Mapping[str, Any], model: str) -> str:
    """The numbers of one evaluation, what was left out and why, and the protocol."""
    rows = _lines(results)
    wide, wider = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [model, *(f"  {name:<{wide}}  {value:<{wider}}  {note}" for name, value, note in rows)]
    if "left_out" in results:
        lines += ["left out", *_protocol(results["left_out"])]
    return "\n".join([*lines, "protocol", *_protocol(results["protocol"])])


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
    """Raises ValueError where the plot could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a sweep draws its plot with matplotlib: pip install 'marval[report]'")


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
