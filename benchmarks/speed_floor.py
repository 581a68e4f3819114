"""Write the tables of docs/performance.md: floors by arithmetic (marval.floor), measurements from benchmarks/results.

    python benchmarks/speed_floor.py            # measures the rate of matrix products here first
    python benchmarks/speed_floor.py --rate 0.136

The tables stand between two markers of the page; nothing else of it changes.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from marval.config import PRESETS
from marval.floor import H200, PARTS, by_part, floor_seconds, matmul_rate, sampling_loads

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- tables: python benchmarks/speed_floor.py -->", "<!-- end of tables -->"
AR_STEPS, BATCHES, HEAD_STEPS = (16, 64, 256), (1, 16, 256), 100
ROLES: dict[str, dict[str, Any]] = {"teacher": {"head_steps": HEAD_STEPS, "guided": True}, "student": {}}
GIB = 2**30


def markdown(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table; numbers get three digits, what is missing stays empty."""

    def cell(value: Any) -> str:
        if not isinstance(value, float):
            return "" if value is None else str(value)
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read(results: Path, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and contents of the results that one benchmark wrote."""
    found = [(file.name, json.loads(file.read_text())) for file in sorted(results.glob("*.json"))]
    return [(n, r) for n, r in found if isinstance(r, dict) and r.get("benchmark") == kind]


def link(name: str) -> str:
    return f"[results](../benchmarks/results/{name})"


def device_of(result: dict[str, Any]) -> str:
    return result["machine"].get("gpu", "CPU")


def column_of(result: dict[str, Any]) -> str:
    """Which of the floors its rows are compared with: CPU, H200, or another device that the table has not."""
    return "H200" if "H200" in device_of(result) else device_of(result)


def over_floors(results: Path) -> dict[tuple[str, str, int, int, str], float]:
    """Measured time over the floor at the rate of the same run, by device, size, K, batch and role: our best."""
    found: dict[tuple[str, str, int, int, str], float] = {}
    rows = [
        (column_of(result), result["settings"]["preset"], row, row["model"])
        for _, result in read(results, "against_reference") for row in result["rows"]
    ]  # fmt: skip
    rows += [
        (column_of(result), row["size"], row, row["model"])
        for _, result in read(results, "gpu_suite")
        for row in result["stages"]
        if {"over_floor", "model"} <= set(row)
    ]  # fmt: skip
    for device, size, row, model in rows:
        role = model.split(",")[0]
        if role in ROLES and "full pass" not in model:  # a cached backbone does less than the floor counts
            key = (device, size, row["ar_steps"], row["batch"], role)
            found[key] = min(found.get(key, float("inf")), row["over_floor"])
    for _, result in read(results, "time_over_floor"):  # of a few AR steps, where no whole image was measured
        for row in result["rows"]:
            found.setdefault(
                (column_of(result), row["size"], row["ar_steps"], row["batch"], row["model"]), row["over_floor"]
            )
    return found


def sampled_steps(results: Path) -> str:
    """What the rows of single AR steps are."""
    found = read(results, "time_over_floor")
    if not found:
        return "single AR steps (`benchmarks/time_over_floor.py`), not measured yet"
    texts = []
    for name, result in found:
        dates = sorted({row.get("date", result["date"]) for row in result["rows"]})
        on = result["machine"].get("gpu", f"{result['machine']['cpu']}, {result['machine']['threads']} threads")
        texts.append(f"`{result['command']}`; {on}, {' and '.join(dates)}, {link(name)}")
    return f"single AR steps, on a GPU of a few in a row ({'; '.join(texts)})"


def operations() -> str:
    """Table of operations per image; the batch does not matter."""
    rows = []
    for size, model in PRESETS.items():
        for k in AR_STEPS:
            row: list[Any] = [size, k]
            for settings in ROLES.values():
                parts = by_part(sampling_loads(model, k, 1, **settings))
                row += [parts[part].operations / 1e12 for part in PARTS]
                row.append(sum(parts[part].operations for part in PARTS) / 1e12)
            rows.append([*row, row[5] / row[9]])
    heads = [f"{role}: {part}" for role in ROLES for part in (*PARTS, "all")]
    return markdown(["", "K", *heads, "teacher / student"], rows)


def floors(rate: float, measured: dict[tuple[str, str, int, int, str], float]) -> str:
    """Table of bytes and of the least time per image."""
    rows = []
    for size, model in PRESETS.items():
        for k in AR_STEPS:
            for batch in BATCHES:
                row: list[Any] = [size, k, batch]
                for settings in ROLES.values():
                    parts = by_part(sampling_loads(model, k, batch, itemsize=2, **settings))
                    row.append(sum(load.bytes for load in parts.values()) / batch / 1e9)
                for role, settings in ROLES.items():
                    cpu = floor_seconds(sampling_loads(model, k, batch, **settings), rate)["total"] / batch
                    row += [cpu, measured.get(("CPU", size, k, batch, role))]
                for role, settings in ROLES.items():
                    loads = sampling_loads(model, k, batch, itemsize=2, **settings)
                    row.append(1000 * floor_seconds(loads, *H200)["total"] / batch)
                    row.append(measured.get(("H200", size, k, batch, role)))
                rows.append(row)
    heads = ["", "K", "batch", *(f"{role} GB" for role in ROLES)]
    heads += [h for d, unit in (("CPU", "s"), ("H200", "ms")) for r in ROLES for h in (f"{d} {r} {unit}", "x")]
    return markdown(heads, rows)


def side_by_side(results: Path) -> str:
    """Tables of every run against the reference."""
    texts = []
    for name, result in read(results, "against_reference"):
        s, m = result["settings"], result["machine"]
        rows = []
        for row in result["rows"]:
            spread = f"{100 * row['spread']:.1f} %" if s["generations"] > 1 else None  # of one there is none
            ratio = row["reference_over_this"]
            parts = [row["parts"].get(part) for part in PARTS]
            seconds, count = row["seconds_per_image"], row["measurements"]
            rows.append([row["batch"], row["model"], seconds, spread, count, ratio, row["over_floor"], *parts])
        heads = ["batch", "model", "s/image", "spread", "n", "reference / this", "x floor", *PARTS]
        error = max(e for n, e in result["errors"].items() if n.startswith("teacher"))
        settings = f"K = {s['ar_steps']}, guidance {s['guidance']} linear, {s['head_steps']} steps, {s['dtype']}"
        settings += f" (the reference: {s['reference_precision']})"
        texts.append(
            f"{s['preset']}, {settings}; {m.get('gpu', m['cpu'])}, {m['threads']} threads, {result['date']} "
            f"({link(name)}); largest error of a token {error:.1e} of its largest entry:\n\n{markdown(heads, rows)}"
        )
    return "\n\n".join(texts) or "Not measured yet."


def small_models(results: Path) -> str:
    """Tables of `marval bench` on trained small models."""
    texts = []
    for file in sorted(results.glob("bench_*.json")):
        result = json.loads(file.read_text())
        s, m = result["settings"], result["machine"]
        rows = []
        for teacher, student in zip(result["rows"][::2], result["rows"][1::2], strict=True):
            ratio = teacher["seconds_per_image"] / student["seconds_per_image"]
            cells = [1000 * teacher["seconds_per_image"], 1000 * student["seconds_per_image"], ratio]
            rows.append([teacher["batch"], teacher["ar_steps"], *cells, student["over_floor"]])
        heads = ["batch", "K", "teacher ms", "student ms", "teacher / student", "student x floor"]
        texts.append(
            f"`{result['command']}`: guidance {s['guidance']}, {s['head_steps']} steps, {s['dtype']}; "
            f"{m.get('gpu', m['cpu'])}, {m['threads']} threads, {result['date']}, medians of {s['repeats']} batches "
            f"({link(file.name)}):\n\n" + markdown(heads, rows)
        )
    return "\n\n".join(texts) or "Not measured yet."


def quality(results: Path) -> str:
    """Tables of what fewer AR steps, other orders and a cached backbone cost and save on trained models."""
    texts = []
    for name, result in read(results, "fast_settings"):
        exact = {(r["ar_steps"], r["order"]): r for r in result["rows"] if r["refresh_every"] == 1}
        rows = []
        for row in result["rows"]:
            seconds, base = (r.get("seconds_batch_1") for r in (row, exact[row["ar_steps"], row["order"]]))
            times = [1000 * seconds, base / seconds] if seconds and base else [None, None]
            fid = f"{row['fid']:.2f} ({row['fid_spread']:.2f})"
            accuracy = f"{100 * row['accuracy']:.1f} %"
            rows.append([row["ar_steps"], row["order"], row["refresh_every"], fid, accuracy, *times])
        heads = ["K", "order", "full pass every", "FID* (range)", "accuracy", "ms, batch 1", "exact / this"]
        texts.append(
            f"`{result['command']}`, then with `--clock`: guidance {result['guidance']:g}, {result['seeds']} seeds of "
            f"{result['num_images']:,} images, {result['date']} ({link(name)}). "
            f"\\* Features: {result['features']}:\n\n" + markdown(heads, rows)
        )
    return "\n\n".join(texts) or "Not measured yet."


def training(results: Path) -> str:
    """Table of the updates at full size, and the ratio of head-only to full distillation."""
    result = json.loads((results / "imagenet_scale.json").read_text())
    stages = {row["stage"]: row for row in result["rows"] if "predicted_seconds" in row and row["size"] == "mar-b"}
    verbs = [verb for verb in ("train", "distill head", "distill all", "rl") if verb in stages]
    rows = [
        [
            verb, row["batch"], row.get("ar_steps"), row["seconds"], row["timed_updates"], row["predicted_seconds"],
            row["seconds"] / row["predicted_seconds"], row["tokens_per_second"], row["peak_memory"] / GIB,
        ]
        for verb in verbs for row in [stages[verb]]
    ]  # fmt: skip
    heads = ["update", "batch", "K", "seconds", "n", "floor", "x", "tokens/s", "peak GiB"]
    device = result["versions"]["device"]
    text = f"mar-b on {device}, {result['date']} ({link('imagenet_scale.json')}):\n\n{markdown(heads, rows)}"
    for verb in verbs:
        if later := stages[verb].get("date"):
            busy = f"threads: {stages[verb]['threads']}, load average {stages[verb]['load_average']:.1f}"
            text += f"\n\n{verb} was measured again on {later} ({busy}; its floor at that time's rate)."
    if {"distill head", "distill all"} <= set(stages):
        head, everything = stages["distill head"], stages["distill all"]
        ratio = everything["seconds"] / head["seconds"]
        assert head["batch"] == everything["batch"]
        text += f"\n\nHead-only distillation makes {ratio:.2f} times the updates per second of full distillation."
    return text


def cpu_training(results: Path) -> str:
    """Table of updates by PyTorch's own operations and by ours."""
    texts = []
    for name, result in read(results, "cpu_training"):
        rows = [
            [
                row["recipe"], row["verb"], row["batch"], "bf16" if row["precision"] == "bf16" else "float32",
                1000 * row["pytorch"], 1000 * row["marval"], row["pytorch"] / row["marval"], row["updates"],
            ]
            for row in result["rows"]
        ]  # fmt: skip
        heads = ["recipe", "", "batch", "precision", "ms by PyTorch's", "ms by ours", "PyTorch's / ours", "n"]
        m = result["machine"]
        texts.append(
            f"`{result['command']}`; {m['cpu']}, {m['threads']} threads, {result['date']} ({link(name)}):\n\n"
            + markdown(heads, rows)
        )
    return "\n\n".join(texts) or "Not measured yet."


def gpu(results: Path) -> str:
    """Tables of what the GPU suite found."""
    texts = []
    for name, result in read(results, "gpu_suite"):
        stages = result["stages"]
        drawn = [s for s in stages if "seconds_per_image" in s]
        cases = [(s["size"], s["batch"], s["ar_steps"]) for s in drawn]
        reference = {case: s for case, s in zip(cases, drawn, strict=True) if s["model"].startswith("reference")}
        rows = []
        for case, s in zip(cases, drawn, strict=True):
            other = reference.get(case)
            ratio = other["seconds_per_image"] / s["seconds_per_image"] if other else None
            rows.append(
                [
                    s["size"], s["model"] + ", extrapolated" * s.get("extrapolated", False), s["mode"], s["batch"],
                    s["ar_steps"], 1000 * s["seconds_per_image"],
                    f"{100 * s['spread']:.1f} %" if s["measurements"] > 1 else None, s["measurements"],
                    ratio, s.get("over_floor"), s.get("transformer_matmul_share"),
                ]
            )  # fmt: skip
        heads = ["", "model", "mode", "batch", "K", "ms/image", "spread", "n", "reference / this", "x floor"]
        heads.append("transformer's share of matmul rate")
        notes = [
            f"\n\nThe reference extrapolated from {s['measured_head_steps'][0]} and {s['measured_head_steps'][1]} "
            f"denoising steps where the whole chain was timed too (K = {s['ar_steps']}, batch {s['batch']}): "
            f"{100 * s['extrapolation_error']:+.1f} %."
            for s in drawn if s.get("extrapolation_error") is not None
        ]  # fmt: skip
        same = {s["stage"]: s for s in stages if "largest_error" in s}
        if same:
            names = {name: name.removeprefix("same tokens").strip(", ") for name in same}
            found = [f"{names[name]} {s['largest_error']:.1g}" for name, s in same.items()]
            notes.append(
                "\n\nLargest error of a token relative to its largest entry, to our plain float32 where nothing else "
                f"is said (golden: of conditions and of the head, against recorded ones): {'; '.join(found)}."
            )
        updates = [
            [
                s["size"], s["verb"], s["batch"], s["seconds_per_update"], s["measurements"], s["floor_seconds"],
                s["over_floor"], s["tokens_per_second"], s["peak_memory"] / GIB,
            ]
            for s in stages if "verb" in s and "seconds_per_update" in s
        ]  # fmt: skip
        ratios = []
        for size in PRESETS:
            one = {s["verb"]: s for s in stages if "seconds_per_update" in s and s["size"] == size}
            pair = [one[verb] for verb in ("distill head", "distill all") if verb in one]
            if len(pair) == 2 and len({(s["batch"], s.get("context_updates", 1)) for s in pair}) == 1:
                ratio = one["distill all"]["seconds_per_update"] / one["distill head"]["seconds_per_update"]
                ratios.append(f"\n\n{size}: head-only distillation makes {ratio:.2f} times the updates per second.")
        rates = [s["rates"] for s in stages if s.get("rates")]
        measured = [
            f"{what} {min(r[key] for r in rates) / 1e12:.3g} to {max(r[key] for r in rates) / 1e12:.3g}"
            for key, what in (("bf16", "TFLOP/s of bf16"), ("float32", "of float32"), ("bandwidth", "TB/s of copies"))
            if rates
        ]
        texts.append(
            f"{', '.join([device_of(result), 'PyTorch ' + result['versions']['torch'], result['date'], *measured])} "
            f"({link(name)}):\n\n{markdown(heads, rows)}{''.join(notes)}\n\n"
            + markdown(["", "update", "batch", "seconds", "n", "floor", "x", "tokens/s", "peak GiB"], updates)
            + "".join(ratios)
        )
    return "\n\n".join(texts) or "Not measured yet."


def tables(rate: float, results: Path = RESULTS) -> str:
    """All tables; ``rate`` in operations per second."""
    sections: list[tuple[str, Callable[[], str]]] = [
        ("### Operations per image, in 10^12", operations),
        (
            "### Bytes and floor per image\n\nGB in bf16. CPU: float32 operations at "
            f"{rate / 1e12:.3g} TFLOP/s, measured by the command; H200: bf16, {H200[0] / 1e12:.0f} TFLOP/s and "
            f"{H200[1] / 1e12:.1f} TB/s. x: measured time over the floor at the rate of the same run, where "
            f"there is a measurement: of whole images from the tables below, else of {sampled_steps(results)}.",
            lambda: floors(rate, over_floors(results)),
        ),
        ("### Against the reference", lambda: side_by_side(results)),
        ("### Small models", lambda: small_models(results)),
        ("### What faster sampling costs", lambda: quality(results)),
        ("### Training", lambda: training(results)),
        ("### Training small models on a CPU", lambda: cpu_training(results)),
        ("### On a GPU", lambda: gpu(results)),
    ]  # fmt: skip
    return "\n\n".join(f"{head}\n\n{table()}" for head, table in sections)


def page(text: str, rate: float, results: Path = RESULTS) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: a marker is missing.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the page must have {BEGIN} and then {END}, once each")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{tables(rate, results)}\n\n{END}{after}"


def rate_in(text: str) -> float:
    """The rate that a page's tables were made with."""
    match = re.search(r"operations at ([\d.]+) TFLOP/s, measured by the command", text)
    assert match
    return float(match[1]) * 1e12


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, help="10^12 operations per second; measured on this CPU if left out")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(words)
    rate = args.rate * 1e12 if args.rate else matmul_rate(torch.device("cpu"), torch.float32, 3.0)
    rate = float(f"{rate:.3g}")  # as the page shows it
    args.page.write_text(page(args.page.read_text(), rate, args.results))
    print(f"{args.page.name}: tables at {rate / 1e12:g} TFLOP/s")


if __name__ == "__main__":
    main()
