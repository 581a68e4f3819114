"""A finished quickstart run as one HTML page: numbers, samples, unmasking, curves; no external resource."""

import base64
import html
import io
import json
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from marval.checkpoint import read_json, write_atomically

MODELS = ("teacher", "student", "aligned")
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
    page = Template(_PAGE).substitute(
        css=_CSS,
        js=_JS,
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
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
    except ModuleNotFoundError as error:
        raise ValueError(f"the report draws its curves with {error.name}: pip install 'marval[report]'") from None
    figures = []
    for model, title, keys, logarithmic in PANELS:
        figure = Figure(figsize=(3.6, 1.8), layout="constrained")
        axes = figure.add_subplot()
        legend, lowest, highest = "", math.inf, 0.0
        for key, (colour, variable) in zip(keys, [*SERIES.items()][: len(keys)], strict=True):
            rows = [row for row in metrics[model] if row.get(key) is not None and math.isfinite(row[key])]
            if not rows:
                continue
            bins = np.array_split(np.array([(row["step"], row[key]) for row in rows]), min(len(rows), 120))
            step, mean = np.array([b.mean(axis=0) for b in bins]).T
            low, high = [b[:, 1].min() for b in bins], [b[:, 1].max() for b in bins]
            axes.fill_between(step, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(step, mean, color=colour, linewidth=1.4, marker="o" if len(bins) <= 20 else "", markersize=3)
            legend += f' <span style="color:{variable}">{key}</span>'
            lowest, highest = min(lowest, *low), max(highest, *high)
        if not legend:
            continue
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
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": f"{model} {title}", "svg.fonttype": "none"}):
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        # No XML header, fixed size or namespaces, nor the ids figure_1, axes_1, ... that every figure repeats.
        label = f'<svg role="img" aria-label="{model}: {title}" viewBox="'
        svg = re.sub(r'.*?<svg[^>]*viewBox="([^"]*)"[^>]*>', rf'{label}\1">', buffer.getvalue(), count=1, flags=re.S)
        svg = re.sub(r'<g id="[^"]*"', "<g", svg)
        for colour, variable in (*SERIES.items(), (INK, "var(--muted)")):
            svg = svg.replace(colour, variable)
        heading = f"<b>{model.title()}</b> {title}<br>{legend}"
        figures.append(f"<figure><figcaption>{heading}</figcaption>{svg}</figure>")
    return figures


def _entries(name: str, value: Any) -> str:
    """Nested settings as entries of a definition list, names joined by dots."""
    if isinstance(value, Mapping):
        return "".join(_entries(f"{name}.{key}" if name else str(key), item) for key, item in value.items())
    return f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>"


_CSS = """
:root{color-scheme:light dark;--page:#fcfcfa;--ink:#1c1e22;--muted:#666a71;--line:#deded8;
--s1:#3565a8;--s2:#b8541a;--s3:#2a7d5c;--s4:#84509c}
@media(prefers-color-scheme:dark){:root{--page:#15171a;--ink:#e6e6e2;--muted:#9b9fa6;--line:#30333a;
--s1:#82aae6;--s2:#e89560;--s3:#68c09b;--s4:#c69ada}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif;text-size-adjust:100%}
main{max-width:1168px;margin:auto;padding:clamp(1.5rem,5vw,3rem) 20px 4rem}
h1,h2{font-family:ui-serif,Georgia,"Times New Roman",serif;font-weight:500;line-height:1.2;text-wrap:balance}
h1{font-size:clamp(1.7rem,5vw,2.6rem);margin:.2rem 0 1rem} h2{font-size:1.45rem;margin:3.2rem 0 .4rem}
h3{font-size:.95rem;margin:0 0 .3rem} p{max-width:46rem;margin:.5rem 0 1rem} .lead{font-size:1.12rem}
.note,figcaption{color:var(--muted);font-size:.88rem} b{font-weight:600;color:var(--ink)}
figure{margin:0;min-width:0} figcaption{margin:.45rem 0 .3rem} figcaption span{margin-right:.7em}
img,.stage{display:block;max-width:100%;height:auto;image-rendering:pixelated}
.grids,.strips,.curves,.settings{display:grid;gap:1.2rem 16px;margin-top:1.2rem}
.grids{grid-template-columns:repeat(4,minmax(0,270px))}
.strips{grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),540px));column-gap:48px}
.curves,.settings{grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:1.6rem 28px}
svg{display:block;width:100%;height:auto} svg text{font-family:inherit!important}
table{border-collapse:collapse;width:100%;margin:1.2rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.55rem .5rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600} th:first-child{text-align:left;padding-left:0}
thead th{color:var(--muted);font-weight:400;font-size:.84rem;line-height:1.3;white-space:normal;vertical-align:bottom}
@media(max-width:860px){ /* the table on its side: one row per number */
table{display:grid;grid-auto-flow:column;grid-template-rows:repeat(10,auto);grid-template-columns:minmax(4.6rem,1fr);
overflow-x:auto}
thead,tbody,tr{display:contents}
th,td,thead th{padding:.5rem 0 .5rem .5rem;font-size:.8rem;display:flex;justify-content:flex-end;align-items:center}
thead th{text-align:left;justify-content:flex-start;padding-left:0}
tbody th:first-child{white-space:normal;text-align:right;padding-left:.5rem}
.grids{grid-template-columns:1fr 1fr}}
.stage{display:none;width:100%;margin-bottom:.9rem} .player{display:none;align-items:center;gap:1rem;margin-top:1rem}
.js .stage{display:block} .js .player{display:flex} .player input{width:16rem;min-width:0;accent-color:var(--s1)}
output{white-space:nowrap;font-variant-numeric:tabular-nums} summary{cursor:pointer}
button{font:inherit;color:inherit;background:none;border:1px solid var(--line);border-radius:6px;min-width:5rem}
details{margin-top:3.2rem;border-top:1px solid var(--line);padding-top:1rem}
dl{display:grid;grid-template-columns:auto 1fr;gap:.1rem 1rem;margin:0;font-size:.84rem;align-content:start}
dt{color:var(--muted)} dd{margin:0;overflow-wrap:anywhere}
"""

_JS = """
const [slider, button, output] = ['input', 'button', 'output'].map(e => document.querySelector('.player ' + e))
const stages = document.querySelectorAll('.stage'), last = +slider.max
let timer
const show = k => {
  slider.value = k
  output.value = `AR step ${k} of ${last}`
  for (const s of stages) s.style.backgroundPosition = `0 ${100 * k / last}%`
}
const play = on => {
  let k = +slider.value
  clearInterval(timer)
  timer = on && setInterval(() => show(Math.min(k = (k + 1) % (last + 4), last)), 500)  // holds the end
  button.textContent = on ? 'Pause' : 'Play'
}
for (const s of stages) s.style.backgroundImage = `url(${s.nextElementSibling.src})`
button.onclick = () => play(!timer)
slider.oninput = () => { play(false); show(slider.value) }
document.documentElement.className = 'js'
show(0)
play(!matchMedia('(prefers-reduced-motion: reduce)').matches)
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>marval quickstart</title><style>$css</style></head><body><main>
<div class="note">marval quickstart</div>
<h1>$title</h1>
<p class="lead">$summary</p>
<div class="note">$run</div>
<h2>Results</h2>
$table
<p class="note">The student has <b>$speedup1 times</b> the teacher's speed at batch 1 and <b>$speedup256 times</b> at
batch 256. <b>FID floor $floor</b>: what real images score. FID here is a Fréchet distance over $features;
it is not Inception's and compares only within this table. Images per model: $images.</p>
<p class="note">$protocol</p>
<h2>Samples</h2>
<p>One row per class. The three models draw from the same seeds, so a place shows the same noise and the same order.</p>
<div class="grids">$grids</div>
<h2>Unmasking</h2>
<p>Ten images while they are drawn, one row per AR step, in the same random order; hatched tokens are not drawn yet.</p>
<div class="player"><button>Play</button><input type="range" aria-label="AR step" max="$steps" value="0"
><output></output></div>
<div class="strips">$strips</div>
<h2>Curves</h2>
<p>Against the number of updates. A line is the mean of up to 120 bins, the shade their range.</p>
<div class="curves">$curves</div>
<details><summary>Settings and versions</summary><div class="settings">$settings</div></details>
</main><script>${js}</script></body></html>
"""
