"""How much faster do recipes train on this CPU by the operations of `marval.models.cpu` than by PyTorch's own?

    python benchmarks/cpu_training.py benchmarks/results/cpu_training.json --recipes digits,fashion-mnist

Updates of `marval train` and `marval distill` themselves, on the recipes' own data, by one way and the other in turn;
the same updates by both. They differ in how many tokens are masked, which is most of the spread.
benchmarks/speed_floor.py writes the table.
"""

import argparse
import contextlib
import dataclasses
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from marval import recipes
from marval.bench import machine, median_and_spread
from marval.checkpoint import write_json
from marval.distill import distill
from marval.models import cpu, mar
from marval.run import Progress, versions
from marval.train import train

WARM_UP = 3
"""Updates that are not counted."""


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


@contextlib.contextmanager
def pytorch_operations() -> Iterator[None]:
    with patch.object(cpu, "WORK", sys.maxsize), patch.object(mar, "attention", plain_attention):
        yield


WAYS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "pytorch": pytorch_operations,
    "marval": contextlib.nullcontext,
}


def clocked(run: Callable[[], object]) -> list[float]:
    """Seconds of each update of a run but the first few."""
    starts: list[float] = []
    steps = Progress.__iter__

    def noted(self: Progress) -> Iterator[int]:
        for step in steps(self):
            starts.append(time.perf_counter())
            yield step

    with patch.object(Progress, "__iter__", noted):
        run()
    return np.diff(starts)[WARM_UP:].tolist()


def measure(recipe: str, updates: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of the teacher and of the student of a recipe."""
    changes = {"steps": updates + WARM_UP + 1, "sample_every": 0, "save_every": 10**6}
    teacher = dataclasses.replace(recipes.TRAIN[recipe](), **changes)
    student = dataclasses.replace(recipes.DISTILL[recipe](), **changes)
    seconds: dict[tuple[str, str], list[float]] = {(verb, way): [] for verb in ("train", "distill") for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        for i in range(rounds):
            for way, operations in WAYS.items():
                folder = Path(name) / f"{way}-{i}"
                with operations():
                    seconds["train", way] += clocked(lambda out=folder / "teacher": train(teacher, out))
                    seconds["distill", way] += clocked(
                        lambda folder=folder: distill(student, folder / "teacher", folder / "student")
                    )
    rows = []
    for verb, config in (("train", teacher), ("distill", student)):
        row: dict[str, Any] = {"recipe": recipe, "verb": verb, "batch": config.batch, "precision": config.precision}
        for way in WAYS:
            row[way], row[f"{way} spread"] = median_and_spread(seconds[verb, way])
        rows.append(row | {"updates": updates * rounds})
    return rows


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipes", default="digits", help="comma-separated; their data must be there")
    parser.add_argument("--updates", type=int, default=10, help="of each way in each round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(words)
    device, rows = torch.device("cpu"), []
    for recipe in args.recipes.split(","):
        rows += measure(recipe, args.updates, args.rounds)
        write_json(
            args.out,
            {
                "benchmark": "cpu_training", "command": shlex.join(["python", *(sys.argv if words is None else words)]),
                "date": time.strftime("%Y-%m-%d"), "machine": machine(device), "versions": versions(device),
                "rows": rows,
            },
        )  # fmt: skip
        for row in rows[-2:]:
            print(
                f"{row['verb']} {recipe}: {1000 * row['pytorch']:.0f} ms by PyTorch's operations, "
                f"{1000 * row['marval']:.0f} by ours", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
