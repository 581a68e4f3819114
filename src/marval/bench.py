"""Time a teacher and its student side by side: where an image's time goes, and the ratio."""

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from marval import masking, sampling
from marval.config import SamplingConfig, StudentConfig, to_dict
from marval.matching import load_scores
from marval.pipeline import Pipeline
from marval.rng import ImageNoise
from marval.run import versions
from marval.tokenizers import to_uint8

PARTS = ("transformer", "head", "tokenizer", "total")


def teacher_and_student(folder: Path, device: torch.device | str = "cpu") -> tuple[Pipeline, Pipeline]:
    """Both models of a folder: a student's folder holds its teacher's head; a teacher is timed as its own student."""
    model = Pipeline.load(folder, device)
    if model.student is None:
        config = StudentConfig(guidance=model.sampling.guidance)
        constant = dataclasses.replace(model.sampling, guidance_schedule="constant")
        student = Pipeline(model.network, model.tokenizer, model.class_names, constant, config)
        return model, student
    network = load_scores(folder, model.network, model.student.guidance_range is not None)[0]
    return Pipeline(network, model.tokenizer, model.class_names, model.sampling), model


@torch.inference_mode()
def time_batch(model: Pipeline, config: SamplingConfig, batch: int, seed: int) -> dict[str, float]:
    """Seconds of one batch by part: transformer (and the loop around it), head, tokenizer, total."""
    device = model.device
    seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    noise = ImageNoise(seed, list(range(batch)), device)
    length = model.network.config.num_tokens
    labels = torch.arange(batch, device=device) % len(model.class_names)
    draw = model.draw(config, noise)

    def timed(condition: Tensor, null: Tensor | None, z: Tensor, w: float | Tensor) -> Tensor:
        start = now()
        tokens = draw(condition, null, z, w)
        seconds["head"] += now() - start
        return tokens

    start = now()
    tokens = sampling.last(
        sampling.unmask(
            model.network, timed, labels, model.make_orders(config.order, noise),
            masking.masked_counts(length, config.ar_steps), noise.randn(length, model.network.config.token_dim),
            guidance=config.guidance, guidance_schedule=config.guidance_schedule, needs_null=model.student is None,
        )
    )  # fmt: skip
    loop = now()
    if model.tokenizer.has_images:
        to_uint8(model.tokenizer.decode(tokens)).cpu()
    end = now()
    seconds |= {"transformer": loop - start - seconds["head"], "tokenizer": end - loop, "total": end - start}
    return seconds


def bench(folder: Path, batches: list[int], repeats: int = 10, device: str = "cpu", **settings: Any) -> dict[str, Any]:
    """Medians over ``repeats`` batches after a warm-up, teacher and student in turn within one process.

    Returns:
        ``rows``: one per batch size and model, with seconds per image by part and the spread (interquartile range over
        median) of the total; ``speedup``: teacher over student for each batch size; settings and versions.
    """
    if repeats < 1 or min(batches, default=0) < 1:
        raise ValueError(f"repeats and batch sizes must be at least 1, got {repeats} and {batches}")
    models = dict(zip(("teacher", "student"), teacher_and_student(folder, device), strict=True))
    configs = {name: model.settings(**settings) for name, model in models.items()}
    rows, speedup = [], {}
    for batch in batches:
        times: dict[str, list[dict[str, float]]] = {name: [] for name in models}
        for repeat in tqdm(range(repeats + 1), desc=f"batch {batch}", delay=2, leave=False):
            for name, model in models.items():
                measured = time_batch(model, configs[name], batch, seed=repeat)
                if repeat > 0:
                    times[name].append(measured)
        for name in models:
            row: dict[str, Any] = {"model": name, "batch": batch}
            for part in PARTS:
                row[f"{part}_seconds_per_image"] = statistics.median(t[part] for t in times[name]) / batch
            totals = sorted(t["total"] for t in times[name])
            quartiles = statistics.quantiles(totals, n=4) if repeats > 1 else [totals[0]] * 3
            row["spread"] = (quartiles[2] - quartiles[0]) / quartiles[1]
            rows.append(row)
        speedup[str(batch)] = rows[-2]["total_seconds_per_image"] / rows[-1]["total_seconds_per_image"]
    protocol = {"repeats": repeats, "dtype": "float32", **to_dict(configs["teacher"])}
    return {"rows": rows, "speedup": speedup, "settings": protocol, "versions": versions(models["teacher"].device)}


def table(results: dict[str, Any]) -> str:
    """The rows as text: milliseconds per image."""
    lines = [f"{'batch':>5}  {'model':<8}{'transformer':>12}{'head':>10}{'tokenizer':>11}{'total ms':>10}{'spread':>8}"]
    for row in results["rows"]:
        parts = [1000 * row[f"{part}_seconds_per_image"] for part in PARTS]
        lines.append(
            f"{row['batch']:>5}  {row['model']:<8}{parts[0]:>12.2f}{parts[1]:>10.2f}{parts[2]:>11.3f}{parts[3]:>10.2f}"
            f"{100 * row['spread']:>6.0f} %"
        )
    lines += [f"batch {batch}: the student is {ratio:.1f} x as fast" for batch, ratio in results["speedup"].items()]
    s = results["settings"]
    guided = f"guidance {s['guidance']} ({s['guidance_schedule']})"
    lines.append(
        f"teacher: {s['head_steps']} {s['solver']} steps; K = {s['ar_steps']}, {guided}, float32, ms per image"
    )
    return "\n".join(lines)
