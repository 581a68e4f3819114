"""A finished quickstart run as one HTML page: numbers, samples, unmasking, curves; no external resource."""

import base64
import html
import io
import itertools
import json
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from marval.checkpoint import read_json, write_atomically
from marval.shipped import MODELS
from marval.tables import check_matplotlib

PAGE = Path(__file__).parent / "assets" / "report.html"
COLUMNS = {  # key of results.json -> heading of the table; the order is the table's
    "fid": "FID, classifier features",
    "fid_heldout_features": "FID, held-out features",
    "accuracy": "accuracy",
    "accuracy_heldout": "accuracy, held-out",
    "reward": "reward",
    "seconds_per_image_batch1": "ms/image, batch 1",
    "seconds_per_image_batch256": "ms/image, batch 256",
    "head_evaluations_per_token": "head evaluations per token",
    "ar_steps": "AR steps",
}
PANELS = (  # folder, title, keys of metrics.jsonl, logarithmic (where every value is positive)
    ("teacher", "denoising loss", ("loss", "mse", "vb"), True),
    ("teacher", "gradient norm", ("grad_norm",), True),
    ("student", "GSIM losses", ("student_loss", "auxiliary_loss"), False),
    ("student", "mean |y|: teacher &minus; auxiliary", ("y",), True),
    ("student", "gradient norms", ("student_grad_norm", "auxiliary_grad_norm"), True),
    ("student", "tokens", ("token_mean", "token_std", "data_mean", "data_std"), False),
    ("aligned", "reward", ("reward", "reward_heldout"), False),
    ("aligned", "held-out accuracy", ("accuracy_heldout",), False),
    ("aligned", "image statistics", ("brightness", "contrast", "edge_density", "clipped"), False),
)
SERIES = {f"#0{i}0e0{i}": f"var(--s{i})" for i in range(1, 5)}  # colours only SVG sees -> the page's, light or dark
INK = "#0a0e0a"
HIDDEN = ((120, 135, 165, 65), (120, 135, 165, 110))  # RGBA: the two squares of the hatch over hidden tokens


def write_report(out: Path) -> Path:
    """Write ``out/report.html`` from the files of a finished run, atomically; the same files give the same bytes.

    Raises:
        ValueError: a file is missing, damaged or lacks a value, or matplotlib is not installed.
    """
    check_matplotlib()
    results = _read_results(out / "results.json")
    arrays = _read_samples(out / "samples.npz")
    metrics = {model: _read_metrics(out / model / "metrics.jsonl") for model in MODELS}
    settings, versions = results["settings"], results["versions"]
    head = {model: _cell("head_evaluations_per_token", results[model]) for model in MODELS}
    origins = ("from the data", "its diffusion chain", "one step per token", "one step, after RL")
    grids = "".join(
        _picture(_rgba(arrays[name]), 10, 270, f"<b>{name.title()}</b>: {origin}")
        for name, origin in zip(("real", *MODELS), origins, strict=True)
    )
    strips = ""
    for model in ("teacher", "student"):
        images = _hide(arrays[f"{model}_trace"], arrays["trace_visible"])
        steps, columns = images.shape[:2]
        cost = f"{head[model]} head evaluation{'s' * (head[model] != '1')} per token, "
        cost += f"{_cell('seconds_per_image_batch1', results[model])} ms per image"
        stage = f'<div class="stage" style="aspect-ratio:{columns};background-size:100% {steps}00%"></div>'
        strips += _picture(
            images.reshape(-1, *images.shape[2:]), columns, 540, f"<b>{model.title()}</b>: {cost}", stage
        )
    run = (
        f"marval {versions['marval']}, seed {settings['seed']}, guidance {settings['guidance']}, "
        f"{_number(sum(settings['seconds'].values()) / 60)} minutes, {versions['platform']}, "
        f"{versions['threads']} threads"
    )
    evaluation = {k: v for k, v in settings.items() if k not in ("seconds", "stages")}
    blocks = {"versions": versions, "seconds": settings["seconds"], "evaluation": evaluation, **settings["stages"]}
    page = _filled_page(
        title=f"From {head['teacher']} head evaluations per token to {head['student']}",
        summary=_summary(results),
        run=html.escape(run),
        table=_table(results),
        floor=_cell("fid", {"fid": results["fid_floor"]}),
        speedup1=_number(results["speedup_batch1"]),
        speedup256=_number(results["speedup_batch256"]),
        images=", ".join(f"{n:,}" for n in sorted({results[model]["num_images"] for model in MODELS})),
        features=html.escape(str(settings["features"])),
        protocol=html.escape(str(settings["protocol"])),
        grids=grids,
        strips=strips,
        steps=len(arrays["trace_visible"]) - 1,
        curves="".join(_curves(metrics)),
        settings="".join(f"<div><h3>{html.escape(k)}</h3><dl>{_entries('', v)}</dl></div>" for k, v in blocks.items()),
    )
    path = out / "report.html"
    write_atomically(path, lambda p: p.write_text(page, encoding="utf-8", newline="\n"))
    return path


def _filled_page(**values: object) -> str:
    """The page with each ``{{name}}`` replaced by the HTML of that name."""
    return re.sub(r"{{(\w+)}}", lambda match: str(values[match[1]]), PAGE.read_text(encoding="utf-8"))


def _read_results(path: Path) -> dict[str, Any]:
    results = read_json(path)
    needed = {**dict.fromkeys(MODELS, (*COLUMNS, "num_images")), "versions": ("marval", "platform", "threads")}
    needed["settings"] = ("seed", "guidance", "features", "protocol", "stages", "seconds")
    names = [(name, key) for name, keys in needed.items() for key in keys]
    for name, *key in [*names, ("fid_floor",), ("speedup_batch1",), ("speedup_batch256",)]:
        if (results.get(name, {}).get(key[0]) if key else results.get(name)) is None:
            raise ValueError(f"{path} has no {'.'.join([name, *key])!r}: run the quickstart's evaluation again")
    return results


def _read_samples(path: Path) -> dict[str, np.ndarray]:
    names = ("real", *MODELS, "teacher_trace", "student_trace", "trace_visible")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: is {path.parent} a finished quickstart run?") from None
    except KeyError as error:
        raise ValueError(f"{path} has no array {error}: run the quickstart's evaluation again") from None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}): run the quickstart's evaluation again") from None


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: is {path.parent.parent} a finished quickstart run?")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}): delete that line") from None
    return rows


def _number(value: float) -> str:
    """Three significant digits, all of them if more stand before the point."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _cell(key: str, values: Mapping[str, Any]) -> str:
    """One number of the table as text, a dash where there is none."""
    if (value := values.get(key)) is None:
        return "&ndash;"
    if key.startswith("seconds"):
        return _number(1000 * value)
    if key.startswith("accuracy"):
        return f"{100 * value:.1f} %"
    return f"{value:.3f}".replace("-", "&minus;") if key.startswith(("fid", "reward")) else f"{value:,}"


def _table(results: Mapping[str, Any]) -> str:
    rows = {model: results[model] for model in MODELS}
    if "one_step_untrained" in results:
        rows = {"teacher": rows.pop("teacher"), "one step, untrained": results["one_step_untrained"], **rows}
    head = "".join(f'<th scope="col">{heading}</th>' for heading in ("model", *COLUMNS.values()))
    body = ""
    for name, values in rows.items():
        cells = "".join(f"<td>{_cell(key, values)}</td>" for key in COLUMNS)
        body += f'<tr><th scope="row">{name}</th>{cells}</tr>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _summary(results: Mapping[str, Any]) -> str:
    """Two sentences that say what became better and what worse."""
    teacher, student, aligned = (results[model] for model in MODELS)

    def moved(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
        before, after = _cell(key, old), _cell(key, new)
        better = (new[key] < old[key]) == key.startswith("fid")
        verdict = "unchanged" if before == after else "better" if better else "worse"
        return f"from {before} to <b>{after}</b> ({verdict})"

    speedup = results["speedup_batch1"]
    pace = f"<b>{_number(speedup)} times</b> the teacher's speed" + ("" if speedup > 1 else ", so no faster,")
    return (
        f"At batch 1 the distilled student draws images at {pace}; distillation takes the FID (classifier features, "
        f"lower is better) {moved('fid', teacher, student)} and the held-out accuracy "
        f"{moved('accuracy_heldout', teacher, student)}. Alignment then takes the reward "
        f"{moved('reward', student, aligned)}, the held-out accuracy {moved('accuracy_heldout', student, aligned)} "
        f"and the FID {moved('fid', student, aligned)}."
    )


def _rgba(images: np.ndarray) -> np.ndarray:
    """uint8 (..., H, W, 1 or 3) -> opaque uint8 (..., H, W, 4)."""
    rgb = np.broadcast_to(images, (*images.shape[:-1], 3))
    return np.concatenate([rgb, np.full_like(rgb[..., :1], 255)], axis=-1)


def _hide(trace: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """RGBA of images (S, N, H, W, C), tokens that are not visible (S, N, h, w) hatched."""
    height, width = trace.shape[2:4]
    shown = visible.repeat(height // visible.shape[2], axis=2).repeat(width // visible.shape[3], axis=3)
    hatch = np.array(HIDDEN, dtype=np.uint8)[np.add.outer(np.arange(height), np.arange(width)) % 2]
    return np.where(shown[..., None], _rgba(trace), hatch)


def _picture(images: np.ndarray, columns: int, width: int, caption: str, above: str = "") -> str:
    """RGBA images (N, H, W, 4) in a grid with transparent gaps, enlarged by the whole number that fits ``width`` px."""
    cells = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)))
    _, high, wide, _ = cells.shape
    grid = cells.reshape(-1, columns, high, wide, 4).swapaxes(1, 2).reshape(-1, columns * wide, 4)
    buffer = io.BytesIO()
    Image.fromarray(grid).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    scale = max(1, width // grid.shape[1])
    size = f'width="{scale * grid.shape[1]}" height="{scale * grid.shape[0]}"'
    picture = f'<img {size} alt="" src="data:image/png;base64,{data}">'
    return f"<figure>{above}{picture}<figcaption>{caption}</figcaption></figure>"


def _curves(metrics: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """One inline SVG figure per panel that has a value."""
    from matplotlib.figure import Figure

    figures = []
    for model, title, keys, logarithmic in PANELS:
        figure = Figure(figsize=(3.6, 1.8), layout="constrained")
        if drawn := _draw_panel(figure.add_subplot(), metrics[model], keys, logarithmic):
            legend = "".join(f' <span style="color:{SERIES[colour]}">{key}</span>' for key, colour in drawn.items())
            svg = _inline_svg(figure, f"{model}: {title}")
            figures.append(f"<figure><figcaption><b>{model.title()}</b> {title}<br>{legend}</figcaption>{svg}</figure>")
    return figures


def _draw_panel(axes: Any, rows: Sequence[dict[str, Any]], keys: Sequence[str], logarithmic: bool) -> dict[str, str]:
    """The colour of each key of metrics.jsonl that has a finite value: a line of the mean of up to 120 bins, and their
    range as its shade."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    drawn: dict[str, str] = {}
    lowest, highest = math.inf, 0.0
    for key, colour in zip(keys, itertools.islice(SERIES, len(keys)), strict=True):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]
        if not points:
            continue
        bins = np.array_split(np.array(points), min(len(points), 120))
        step, mean = np.array([b.mean(axis=0) for b in bins]).T
        low, high = [b[:, 1].min() for b in bins], [b[:, 1].max() for b in bins]
        axes.fill_between(step, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(step, mean, color=colour, linewidth=1.4, marker="o" if len(bins) <= 20 else "", markersize=3)
        drawn[key] = colour
        lowest, highest = min(lowest, *low), max(highest, *high)
    if logarithmic and lowest > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if highest > 50 * lowest else (1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=INK, labelsize=7.5, length=0)
    axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)
    return drawn


def _inline_svg(figure: Any, label: str) -> str:
    """A matplotlib figure as an SVG that fits into the page: of any width, in the page's colours, with ids that no
    other figure has. The label is read to those who do not see it."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label.replace(":", ""), "svg.fonttype": "none"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    # No XML header, fixed size or namespaces, nor the ids figure_1, axes_1, ... that every figure repeats.
    start = f'<svg role="img" aria-label="{label}" viewBox="'
    svg = re.sub(r'.*?<svg[^>]*viewBox="([^"]*)"[^>]*>', rf'{start}\1">', buffer.getvalue(), count=1, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for colour, variable in (*SERIES.items(), (INK, "var(--muted)")):
        svg = svg.replace(colour, variable)
    return svg


def _entries(name: str, value: Any) -> str:
    """Nested settings as entries of a definition list, names joined by dots."""
    if isinstance(value, Mapping):
        return "".join(_entries(f"{name}.{key}" if name else str(key), item) for key, item in value.items())
    return f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>"
