"""How far from their floor are our teacher and student at the sizes of MAR-B, L and H? A few AR steps of each.

    python benchmarks/time_over_floor.py benchmarks/results/time_over_floor.json
    python benchmarks/time_over_floor.py benchmarks/results/time_over_floor.json --sizes mar-b --batches 16
    python benchmarks/time_over_floor.py benchmarks/results/time_over_floor_h200.json --device cuda --batches 1,16,256

A whole image of MAR-H at K = 256 takes a CPU half an hour, so AR steps are drawn alone, evenly spread over the K, from
random tokens (time depends on neither tokens nor weights). Time over floor is the sum of their medians over the sum of
their floors, at the rate of matrix products measured between them; an image would take that times its whole floor. Rows
are kept as soon as they are there, and a row that is there is not measured again. Guidance 2.9 linear, 100 steps. On a
GPU: in bf16, a few AR steps in a row, small batches from CUDA graphs, and the floor knows the bandwidth, too.
"""

import argparse
import itertools
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from against_reference import SIZES, pipelines, random_network

from marval import masking
from marval.bench import machine
from marval.checkpoint import read_json, write_json
from marval.floor import ar_step, bandwidth, floor_seconds, matmul_rate, sampling_loads, synchronise
from marval.pipeline import Pipeline
from marval.rng import ImageNoise
from marval.run import versions
from marval.sampling import last, unmask

AR_STEPS, HEAD_STEPS, GUIDANCE = (16, 64, 256), 100, 2.9
GRAPHED = 16
"""Largest batch that a GPU draws from CUDA graphs."""
WINDOWS = {"cpu": (0, 1), "cuda": (1, 4)}
"""AR steps before the clock starts, and on it. A GPU draws one while the host prepares the next: alone, the first took
MAR-B's student twice as long as one in the middle of an image."""


@torch.inference_mode()
def seconds_of(model: Pipeline, counts: list[int], batch: int, head_steps: int, before: int) -> float:
    """Seconds of the AR steps from counts[before] hidden tokens to counts[-1], drawn after those from counts[0], at the
    full guidance."""
    sizes, noise = model.network.config, ImageNoise(0, list(range(batch)), model.device)
    z = noise.randn(sizes.num_tokens, sizes.token_dim)
    orders, labels = noise.permutation(sizes.num_tokens), torch.arange(batch, device=model.device) % sizes.num_classes
    draw = model.token_sampler(model.settings(ar_steps=1, head_steps=None if model.student else head_steps), noise)
    steps = unmask(
        model.network, draw, labels, orders, counts, z, guidance=GUIDANCE, needs_null=model.student is None,
        tokens=torch.ones_like(z), call=model.call,
    )  # fmt: skip
    for _ in range(before):
        next(steps)
    synchronise(model.device)
    start = time.perf_counter()
    last(steps)
    synchronise(model.device)
    return time.perf_counter() - start


def measure(model: Pipeline, role: str, ar_steps: int, batch: int, steps: int, repeats: int) -> dict[str, Any]:
    """The row of a model, a number of AR steps and a batch size."""
    sizes, device, teacher = model.network.config, model.device, role == "teacher"
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    head_steps = HEAD_STEPS if teacher else 1
    counts = masking.masked_counts(sizes.num_tokens, min(ar_steps, sizes.num_tokens))
    before, timed = WINDOWS[device.type]
    most = len(counts) - 1 - timed
    middles = (int((i + 0.5) * (len(counts) - 1) / steps) for i in range(steps))
    firsts = sorted({min(max(k - timed // 2, before), most) for k in middles})
    windows = [counts[k - before : k + timed + 1] for k in firsts]
    if on_gpu:  # records the graphs of small batches
        for window in windows:
            seconds_of(model, window, batch, head_steps, before)
    else:  # packs the weights, for any batch alike
        seconds_of(model, windows[0], 1, 2, before)
    rate_seconds = 0.1 if on_gpu else 0.3
    rates, seconds = [], []
    for _ in range(repeats):
        rates.append(matmul_rate(device, dtype, rate_seconds))
        seconds.append([seconds_of(model, window, batch, head_steps, before) for window in windows])
    rates.append(matmul_rate(device, dtype, rate_seconds))
    reached = statistics.median(rates), bandwidth(device, rate_seconds) if on_gpu else math.inf
    pairs = [pair for window in windows for pair in itertools.pairwise(window[before:])]
    floor = floor_seconds([ar_step(sizes, *p, batch, head_steps, teacher, dtype.itemsize) for p in pairs], *reached)
    ratio = sum(statistics.median(times) for times in zip(*seconds, strict=True)) / floor["total"]
    loads = sampling_loads(sizes, ar_steps, batch, head_steps=head_steps, guided=teacher, itemsize=dtype.itemsize)
    return {
        "ar_steps": ar_steps, "batch": batch, "model": role, "over_floor": ratio,
        "seconds_per_image": ratio * floor_seconds(loads, *reached)["total"] / batch, "repeats": repeats,
        "measured_ar_steps": [step for k in firsts for step in range(k, k + timed)], "seconds": seconds, "rates": rates,
        "bandwidth": reached[1] if on_gpu else None,
    }  # fmt: skip


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sizes", default="mar-b,mar-l,mar-h", help=", ".join(SIZES))
    parser.add_argument("--batches", default="1")
    parser.add_argument("--models", default="student,teacher")
    parser.add_argument("--steps", type=int, default=4, help="AR steps of a row; on a GPU, windows of several")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", type=torch.device)
    args = parser.parse_args(words)
    result: dict[str, Any] = read_json(args.out) if args.out.exists() else {"benchmark": "time_over_floor", "rows": []}
    rows = result["rows"]
    if rows and result["machine"].get("gpu") != machine(args.device).get("gpu"):
        parser.error(f"{args.out} was measured on another device than {args.device}: choose another file")
    there = {(row["size"], row["ar_steps"], row["batch"], row["model"]) for row in rows}
    on_gpu = args.device.type == "cuda"
    for size in args.sizes.split(","):
        network = random_network(SIZES[size], args.device)
        for batch in map(int, args.batches.split(",")):
            models = pipelines(network, GUIDANCE, "bf16" if on_gpu else "float32", on_gpu and batch <= GRAPHED)
            for k, role in itertools.product(AR_STEPS, args.models.split(",")):
                if (size, k, batch, role) in there or k > SIZES[size].num_tokens:
                    continue
                row = measure(models[role], role, k, batch, args.steps, args.repeats)
                rows.append({"size": size, **row, "date": time.strftime("%Y-%m-%d")})
                command = f"python benchmarks/time_over_floor.py benchmarks/results/{args.out.name}"
                result |= {
                    "command": command + f" --device {args.device}" * on_gpu, "date": time.strftime("%Y-%m-%d"),
                    "machine": machine(args.device), "versions": versions(args.device),
                }  # fmt: skip
                write_json(args.out, result)
                print(f"{size}, K = {k}, batch {batch}, {role}: {row['over_floor']:.2f} times its floor", flush=True)


if __name__ == "__main__":
    sys.exit(main())
