"""How closely do a student's tokens follow its teacher's in the same context, and those of shorter chains?

    python benchmarks/token_distance.py run cifar10 runs/cifar10 --scales 1,1.5,3
    python benchmarks/token_distance.py page                          # docs/results.md from the committed results

Of test images some tokens are kept, as many as are visible before the first, the middle and the last of the K AR steps;
the next token is drawn many times by every model. The energy distance of the draws to the teacher's with 100 steps,
over the mean distance of two of those, needs no classifier and hardly any noise: 64 contexts show differences that FID
does not show with 10,000 images. Nothing accumulates here, as it does when a model goes on from its own tokens.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from results_page import about_now, measured_on, places, shown_folder, table, write_between
from torch import Tensor

from marval import masking, rng
from marval.batches import batch_tokens
from marval.checkpoint import read_json, write_json
from marval.config import SamplingConfig, numbers
from marval.data import load_dataset
from marval.measure import weights_digest
from marval.metrics import energy_distance
from marval.pipeline import Pipeline
from marval.rng import ImageNoise

CONTEXTS, DRAWS = 64, 64
"""Test images, each with one set of visible tokens; draws of a token in each."""
STEPS = (100, 25, 10, 4)
"""Of the teacher's chain; the longest is what the others are compared with."""
BEGIN, END = "<!-- distances: python benchmarks/token_distance.py page -->", "<!-- end of distances -->"


def draws(
    model: Pipeline, config: SamplingConfig, tokens: Tensor, visible: Tensor, target: Tensor, labels: Tensor,
    seed: int, count: int,
) -> Tensor:  # fmt: skip
    """(B, count, D) draws of the token at ``target`` (B, 1) given the visible ones (B, V)."""

    def condition(labels: Tensor) -> Tensor:
        return model.network.condition(tokens, visible, labels, target).repeat_interleave(count, 0)

    noise = ImageNoise(seed, list(range(len(tokens) * count)))
    z = noise.randn(1, tokens.shape[2])
    guided = model.student is None and config.guidance != 1
    null = condition(torch.full_like(labels, model.network.config.num_classes)) if guided else None
    return model.token_sampler(config, noise)(condition(labels), null, z, config.guidance).view(len(tokens), count, -1)


@torch.inference_mode()
def measure(folder: Path, data: str, scales: Sequence[float], quick: bool) -> dict[str, Any]:
    """Distances in percent of the spread, and spreads over the teacher's, of every model, AR step and scale."""
    contexts, count, steps = (4, 4, (3, 2)) if quick else (CONTEXTS, DRAWS, STEPS)
    teacher, student = (Pipeline.load(folder / name).accelerate() for name in ("teacher", "student"))
    assert student.student is not None
    test = load_dataset(data, "test")
    g = rng.generator(0)
    index = torch.randperm(len(test), generator=g)[:contexts].numpy()
    tokens = batch_tokens(test, teacher.tokenizer, index, slice(None), g)
    labels = torch.from_numpy(test.labels[index])
    k = student.sampling.ar_steps
    length = tokens.shape[1]
    counts = masking.masked_counts(length, k)
    rows = []
    for ar_step in sorted({0, k // 2, k - 1}):
        visible, masked = masking.random_masks(contexts, length, counts[ar_step], g)
        for w in scales:
            context = tokens, visible, masked[:, :1], labels
            constant = {"guidance": w, "guidance_schedule": "constant"}
            models = {f"teacher, {n} steps": (teacher, teacher.settings(head_steps=n, **constant)) for n in steps}
            for n in student.student.choices:
                name = f"student, {n} step" + "s" * (n > 1)
                models[name] = student, student.settings(evaluations=n, **constant)
            whole = draws(*models[f"teacher, {steps[0]} steps"], *context, 0, count)
            for name, (model, config) in models.items():
                found = draws(model, config, *context, 1, count)
                distance, spread, own = energy_distance(whole, found)
                percent = 100 * distance / spread.mean()
                rows.append(
                    {
                        "model": name, "ar_step": ar_step + 1, "visible": length - counts[ar_step], "guidance": w,
                        "distance": float(percent.mean()), "error": float(percent.std() / contexts**0.5),
                        "spread": float(own.mean() / spread.mean()),
                    }
                )  # fmt: skip
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return {
        "contexts": contexts, "draws": count, "data": test.source, "ar_steps": k, "tokens": length, "rows": rows,
        "models": {"teacher": weights_digest(teacher), "student": weights_digest(student)},
        "about": about_now(teacher.device),
    }  # fmt: skip


def run(name: str, folder: Path, data: str | None, scales: Sequence[float], quick: bool) -> None:
    """Measure, and write the results."""
    given = data or (name if name == "digits" else f"data/{name}.npz")
    flags = f"--scales {','.join(f'{w:g}' for w in scales)}" + (f" --data {data}" if data else "")
    results = {"name": name, "folder": shown_folder(folder), "flags": flags}
    to = places(quick).results
    to.mkdir(parents=True, exist_ok=True)
    write_json(to / f"token_distance_{name}.json", results | measure(folder, given, scales, quick))


def section(results: Mapping[str, Any]) -> str:
    """One data set: a row for each model and scale, a column for each AR step."""
    rows = results["rows"]
    ar_steps = sorted({row["ar_step"] for row in rows})
    visible = {row["ar_step"]: row["visible"] for row in rows}
    lines = []
    for w in dict.fromkeys(row["guidance"] for row in rows):
        for model in dict.fromkeys(row["model"] for row in rows):
            found = {row["ar_step"]: row for row in rows if (row["guidance"], row["model"]) == (w, model)}
            cells = [f"{found[k]['distance']:.2f} ± {found[k]['error']:.2f}" for k in ar_steps]
            spread = statistics.fmean(found[k]["spread"] for k in ar_steps)
            lines.append([f"{w:g}", model, *cells, f"{spread:.2f}"])
    about = (
        f"Measured by `python benchmarks/token_distance.py run {results['name']} {results['folder']} "
        f"{results['flags']}`, {measured_on(results['about'])}: {results['contexts']} contexts of test images, "
        f"{results['draws']} draws. Models: teacher {results['models']['teacher']}, student "
        f"{results['models']['student']}."
    )
    heads = [f"AR step {k} of {results['ar_steps']} ({visible[k]} of {results['tokens']} visible)" for k in ar_steps]
    return f"### {results['name']}\n\n{about}\n\n{table(['w', 'model', *heads, 'spread'], lines)}"


def write_page(quick: bool) -> None:
    """The distances of docs/results.md."""
    to = places(quick)
    found = [read_json(file) for file in sorted(to.results.glob("token_distance_*.json"))]
    write_between(to.page, BEGIN, END, "\n\n".join(section(results) for results in found))


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    measured, page = verbs.add_parser("run"), verbs.add_parser("page")
    measured.add_argument("name", help="of the data: digits, fashion-mnist, cifar10, ...")
    measured.add_argument("folder", type=Path, help="with teacher and student")
    measured.add_argument("--data", help="as of marval train; data/NAME.npz if left out")
    measured.add_argument("--scales", default="1,1.5,2,3", help="of guidance")
    for verb in (measured, page):
        verb.add_argument("--quick", action="store_true", help="a trial: 4 contexts, 4 draws, a temporary place")
    given = parser.parse_args(args)
    if given.verb == "page":
        write_page(given.quick)
        return
    run(given.name, given.folder, given.data, numbers(given.scales, float, "--scales"), given.quick)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"{error}")
