"""What faster sampling costs in quality: AR steps, orders that spread tokens, cached backbones, on a trained model.

    python benchmarks/fast_settings.py runs/quickstart/student digits OUT.json --ar-steps 4,8,16
    python benchmarks/fast_settings.py runs/quickstart/student digits OUT.json --clock  # on a quiet machine

Each combination draws the same seeds. The first command goes on where an interrupted one ended. With OUT.json in
benchmarks/results, benchmarks/speed_floor.py writes its table.
"""

import argparse
import itertools
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from results_page import same_protocol

from marval.bench import seconds_per_image
from marval.checkpoint import read_json, write_json
from marval.config import EvaluateConfig, numbers
from marval.features import load_features
from marval.measure import measure as row_of
from marval.measure import weights_digest
from marval.pipeline import Pipeline
from marval.reference import load_reference
from marval.run import versions

SETTINGS = ("ar_steps", "order", "refresh_every")
PROTOCOL = ("weights", "reference", "features", "num_images", "seeds", "guidance")
"""What all rows of a file share."""


def measure(args: argparse.Namespace) -> None:
    model = Pipeline.load(args.model).accelerate()
    network = load_features(str(args.features or args.model.parent / "classifier"))
    reference = load_reference(args.reference, network, None, model.tokenizer.image_channels)
    results: dict[str, Any] = {
        "benchmark": "fast_settings", "command": shlex.join(["python", *sys.argv]), "model": args.model.as_posix(),
        "weights": weights_digest(model),
        "reference": args.reference, "features": network.name,
        "num_images": args.num_images, "seeds": args.seeds, "guidance": model.sampling.guidance,
        "date": time.strftime("%Y-%m-%d"), "versions": versions(model.device), "rows": [],
    }  # fmt: skip
    if args.out.exists():
        before = read_json(args.out)
        same_protocol(args.out, *({n: found.get(n) for n in PROTOCOL} for found in (before, results)))
        results["rows"] = before["rows"]
    steps = numbers(args.ar_steps, int, "--ar-steps")
    refreshes = numbers(args.refresh_every, int, "--refresh-every")
    for k, order, refresh in itertools.product(steps, ("random", "halton"), refreshes):
        settings = dict(zip(SETTINGS, (k, order, refresh), strict=True))
        if any(same(row, settings) for row in results["rows"]):
            continue
        measured = [
            row_of(model, reference, network, EvaluateConfig(num_images=args.num_images, seed=seed), settings)
            for seed in range(args.seeds)
        ]
        fid = [row["fid"] for row in measured]
        results["rows"].append(
            settings
            | {"fid": statistics.mean(fid), "fid_spread": max(fid) - min(fid)}
            | {"accuracy": statistics.mean(row["accuracy"] for row in measured)}
        )
        write_json(args.out, results)
        print(results["rows"][-1], flush=True)


def clock(args: argparse.Namespace) -> None:
    """Seconds per image at batch 1 of every row, all settings in turn; for a quiet machine."""
    results = read_json(args.out)
    model = Pipeline.load(args.model).accelerate()
    models = {}
    for i, row in enumerate(results["rows"]):
        settings = model.settings(**{name: row[name] for name in SETTINGS})
        models[str(i)] = Pipeline(model.network, model.tokenizer, model.class_names, settings, model.student)
    for i, seconds in seconds_per_image(models, 1).items():
        results["rows"][int(i)]["seconds_batch_1"] = seconds
    write_json(args.out, results | {"clocked": time.strftime("%Y-%m-%d")})


def same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """The same settings."""
    return all(row[name] == other[name] for name in SETTINGS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("reference", help="as of `marval evaluate --reference`")
    parser.add_argument("out", type=Path)
    parser.add_argument("--ar-steps", default="4,8,16")
    parser.add_argument("--refresh-every", default="1,2,4")
    parser.add_argument("--features", help="as of `marval evaluate`; the classifier beside the model if left out")
    parser.add_argument("--num-images", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clock", action="store_true", help="only time the rows of OUT at batch 1")
    args = parser.parse_args()
    clock(args) if args.clock else measure(args)


if __name__ == "__main__":
    main()
