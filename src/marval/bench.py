"""Time a teacher and its student side by side: where an image's time goes, how far from the floor, and the ratio."""

import contextlib
import dataclasses
import functools
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from tqdm import tqdm

from marval.checkpoint import write_json
from marval.config import SamplingConfig, StudentConfig, to_dict
from marval.distributed import connect
from marval.floor import bandwidth, floor_seconds, matmul_rate, sampling_loads, synchronise
from marval.graphs import plainly
from marval.matching import load_scores
from marval.models.cached import CachedBackbone
from marval.pipeline import Pipeline
from marval.rng import ImageNoise
from marval.run import versions, writable_folder
from marval.sampling import TokenSampler
from marval.shipped import model_folder

PARTS = ("encoder", "decoder", "head", "tokenizer", "rest")
NO_STUDENT = "none: the teacher's head, evaluated once"
"""In place of a student, where the folder is a teacher's: it shows the time that one would take."""


def teacher_and_student(
    folder: Path, device: torch.device | str = "cpu", dtype: Literal["float32", "bf16"] = "float32"
) -> tuple[Pipeline, Pipeline]:
    """Both models of a folder: a student's folder holds its teacher's head; a teacher is timed as its own student."""
    folder = model_folder(folder)
    model = Pipeline.load(folder, device, dtype=dtype)
    if model.student is None:
        config = StudentConfig(guidance=model.sampling.guidance)
        constant = dataclasses.replace(model.sampling, guidance_schedule="constant")
        student = Pipeline(model.network, model.tokenizer, model.class_names, constant, config)
        return model, student
    if not (folder / "scores.safetensors").exists() and (folder.parent / "teacher").is_dir():  # as marval's own are
        return Pipeline.load(folder.parent / "teacher", device, dtype=dtype), model
    network = load_scores(folder, model.network, model.student.guidance_range is not None)[0]
    if dtype == "bf16":
        network.to_bf16()
    sampling = dataclasses.replace(model.sampling, evaluations=1)
    return Pipeline(network, model.tokenizer, model.class_names, sampling), model


# ---- what a number was measured on


def machine(device: torch.device) -> dict[str, Any]:
    """The processor, and the GPU if that is what is measured."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    found: dict[str, Any] = {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    with contextlib.suppress(OSError):
        found["load_average"] = os.getloadavg()[0]
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def reset_peak(device: torch.device) -> None:
    """From now on `peak_memory` counts, as far as the system can start anew (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device, graphs: bool = False) -> int:
    """Bytes: of tensors on the GPU, or resident memory of the whole process.

    A CUDA graph that is launched again asks for no memory: with ``graphs``, all that PyTorch holds on the GPU counts.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) if graphs else torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- one batch


@torch.inference_mode()
def time_batch(model: Pipeline, config: SamplingConfig, batch: int, seed: int) -> float:
    """Seconds from classes to uint8 images (or to tokens, if there is no autoencoder); nothing inside is timed."""
    device = model.device
    synchronise(device)
    start = time.perf_counter()
    labels = torch.arange(batch, device=device) % len(model.class_names)
    tokens = model.draw_batch(config, labels, ImageNoise(seed, list(range(batch)), device))
    if model.tokenizer.has_images:
        model.to_images(tokens).cpu()
    synchronise(device)
    return time.perf_counter() - start


def time_and_peak(
    model: Pipeline, config: SamplingConfig, batch: int, graphs: bool, peaks: list[int], seed: int
) -> float:
    """`time_batch`, whose peak memory is appended to ``peaks``."""
    reset_peak(model.device)
    seconds = time_batch(model, config, batch, seed)
    peaks.append(peak_memory(model.device, graphs))
    return seconds


@contextlib.contextmanager
def clocks(model: Pipeline) -> Iterator[dict[str, float]]:
    """Seconds spent inside encoder, decoder, head and tokenizer until the block ends, added up.

    Each clock waits for the device, so the sum is longer than a batch without clocks; CUDA graphs are left aside, but
    for that of the decoding. A cached backbone (refresh_every) is not split: its time counts as the decoder's.
    """
    seconds: dict[str, float] = dict.fromkeys(PARTS[:-1], 0.0)
    device = model.device

    def clocked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronise(device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronise(device)
            seconds[part] += time.perf_counter() - start
            return result

        return timed

    network, images = model.network, functools.partial(model.to_images, call=model.call)
    token_sampler, encode, decode = model.token_sampler, network.encode, network.decode

    def clocked_sampler(*args: Any, **kwargs: Any) -> TokenSampler:
        one = token_sampler(*args, **kwargs)
        parts = {name: clocked("head", getattr(one, name)) for name in ("prepare", "evaluate")}
        return dataclasses.replace(one, **parts)

    cached = clocked("decoder", CachedBackbone.condition)
    own: list[dict[str, Any]] = [vars(model), vars(network)]
    before = [dict(names) for names in own]
    own[0].update(token_sampler=clocked_sampler, call=plainly, to_images=clocked("tokenizer", images))
    own[1].update(encode=clocked("encoder", encode), decode=clocked("decoder", decode))
    try:
        with patch.object(CachedBackbone, "condition", cached):
            yield seconds
    finally:
        for names, old in zip(own, before, strict=True):
            names.clear()
            names.update(old)


def split_batch(model: Pipeline, config: SamplingConfig, batch: int, seed: int) -> dict[str, float]:
    """Seconds of a batch by part, `PARTS`, with clocks."""
    with clocks(model) as seconds:
        total = time_batch(model, config, batch, seed)
    return {**seconds, "rest": total - sum(seconds.values())}


# ---- many

TURN = 0.05
"""Seconds that a model's turn at least takes in `times_in_turn`."""


def times_in_turn(
    batches: Mapping[str, Callable[[int], float]], repeats: int, title: str = "", quiet: bool = False
) -> dict[str, list[float]]:
    """What each function returned (seconds), the models in turn, so that a slow spell of the machine meets all of them.

    The first round is a warm-up. A turn goes on for `TURN`; of several batches the first, which finds the caches full
    of the model before it, is not counted.

    Args:
        batches: draw and time a batch, given the round. repeats: rounds that count.
    """
    times: dict[str, list[float]] = {name: [] for name in batches}
    for repeat in tqdm(range(repeats + 1), desc=title, delay=2, leave=False, disable=quiet):
        for name, batch in batches.items():
            turn = [batch(repeat)]
            while sum(turn) < TURN:
                turn.append(batch(repeat))
            times[name] += (turn[1:] or turn) if repeat else []
    return times


def seconds_per_image(models: Mapping[str, Pipeline], batch: int, repeats: int = 10) -> dict[str, float]:
    """Median wall time of one batch of each model with its own settings, per image, decoding included."""
    batches = {
        name: functools.partial(time_batch, model, model.settings(), batch) for name, model in models.items()
    }  # fmt: skip
    times = times_in_turn(batches, repeats, f"batch {batch}")
    return {name: statistics.median(values) / batch for name, values in times.items()}


def median_and_spread(values: list[float]) -> tuple[float, float]:
    """Median, and interquartile range over median."""
    middle = statistics.median(values)
    if len(values) < 2:
        return middle, 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, (high - low) / middle


def floor_of(model: Pipeline, config: SamplingConfig, batch: int, rates: dict[str, float]) -> float:
    """Seconds of a batch without the autoencoder: operations over the rate; on a GPU also bytes over the bandwidth."""
    on_gpu = model.device.type == "cuda"
    teacher = model.student is None
    loads = sampling_loads(
        model.network.config, config.ar_steps, batch, head_steps=config.head_steps if teacher else config.evaluations,
        guided=teacher and config.guidance != 1, itemsize=int(rates["itemsize"]),
    )  # fmt: skip
    return floor_seconds(loads, rates["matmul"], rates["bandwidth"] if on_gpu else float("inf"))["total"]


def rates_of(device: torch.device, precision: str) -> dict[str, float]:
    """Measured operations and bytes per second, and the bytes of a number."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return {"matmul": matmul_rate(device, dtype), "bandwidth": bandwidth(device), "itemsize": dtype.itemsize}


def bench(
    folder: Path, batches: list[int], repeats: int = 10, device: str = "cpu", ar_steps: list[int] | None = None,
    budget: float | None = None, precision: Literal["auto", "float32", "bf16"] = "auto", graphs: bool = False,
    compile: bool = False, evaluations: int | None = None, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Medians over ``repeats`` rounds, teacher and student in turn (`times_in_turn`) within one process.

    Args:
        ar_steps: values of K, each timed at every batch size; the model's default if left out.
        precision: of the weights; auto: bf16 on CUDA, float32 on the CPU. graphs, compile: `Pipeline.accelerate`.
        budget: milliseconds: also find the largest K whose student's image takes no longer at the first batch size.
        evaluations: of the student's head per token. settings: of `Pipeline.settings`, of both,
            but for the chain's, head_steps and solver, which are the teacher's.

    Returns:
        ``student``: distilled, or `NO_STUDENT`. ``rows``: one per batch size, K and model; times of an image, its parts
        from batches of their own with clocks, which are slower. ``speedup``: teacher over student by batch size and K.
        Settings, machine and versions.
    """
    if repeats < 1 or min(batches, default=0) < 1:
        raise ValueError(f"repeats and batch sizes must be at least 1, got {repeats} and {batches}")
    place = torch.device(device)
    dtype = ("bf16" if place.type == "cuda" else "float32") if precision == "auto" else precision
    models = dict(zip(("teacher", "student"), teacher_and_student(folder, place, dtype), strict=True))
    for model in models.values():
        model.accelerate(graphs, compile)
    shared = {name: value for name, value in settings.items() if name not in ("head_steps", "solver")}
    own: dict[str, dict[str, Any]] = {"teacher": settings, "student": {**shared, "evaluations": evaluations}}
    rates = rates_of(place, dtype)
    rows, speedup, quiet = [], {}, os.environ.get("RANK", "0") != "0"
    given = ar_steps or [models["student"].sampling.ar_steps]
    for batch in batches:
        for k in given:
            configs = {name: model.settings(**own[name], ar_steps=k) for name, model in models.items()}
            peaks: dict[str, list[int]] = {name: [] for name in models}
            batch_of = {
                name: functools.partial(time_and_peak, model, configs[name], batch, graphs, peaks[name])
                for name, model in models.items()
            }
            times = times_in_turn(batch_of, repeats, f"batch {batch}, K {k}", quiet)
            for name, model in models.items():
                median, spread = median_and_spread([seconds / batch for seconds in times[name]])
                splits = [split_batch(model, configs[name], batch, seed) for seed in range(min(3, repeats))]
                parts = {part: statistics.median(split[part] for split in splits) / batch for part in PARTS}
                least = floor_of(model, configs[name], batch, rates) / batch
                rows.append(
                    {
                        "model": name, "batch": batch, "ar_steps": k, "seconds_per_image": median, "spread": spread,
                        "parts": parts, "floor_seconds_per_image": least,
                        "over_floor": (median - parts["tokenizer"]) / least, "peak_memory": max(peaks[name]),
                    }
                )  # fmt: skip
            speedup[f"batch {batch}, K {k}"] = rows[-2]["seconds_per_image"] / rows[-1]["seconds_per_image"]
    options = {"repeats": repeats, "dtype": dtype, "graphs": graphs, "compile": compile}
    few = models["student"].settings(**own["student"]).evaluations
    protocol = {**options, **to_dict(models["teacher"].settings(**settings)), "ar_steps": given, "evaluations": few}
    about = {"machine": machine(place), "versions": versions(place), "date": time.strftime("%Y-%m-%d")}
    alone = models["student"].network is models["teacher"].network
    found = {
        "student": NO_STUDENT if alone else "distilled", "rows": rows, "speedup": speedup, "rates": rates,
        "settings": protocol, **about, "command": " ".join(["marval", *sys.argv[1:]]),
    }  # fmt: skip
    if budget is not None:
        found["budget"] = largest_within(models["student"], budget / 1000, batches[0], repeats, own["student"])
    return found


def bench_folder(folder: Path, batches: list[int], json: Path | None, device: str, **settings: Any) -> None:
    """`bench` the model in a folder, print the `table`, and write the results into the new file ``json``, if given.

    Args:
        device: cpu, cuda, or auto. settings: other arguments of `bench`.

    Raises:
        ValueError: the file exists, or its folder cannot be written.
    """
    if json is not None:
        if json.exists():
            raise ValueError(f"{json} exists: choose another --json")
        writable_folder(json.parent)
    world = connect(device)
    results = bench(folder, batches, device=str(world.device), **settings)
    if world.is_main:
        print(table(results))
        if json is not None:
            write_json(json, results)


def largest_within(
    model: Pipeline, budget: float, batch: int, repeats: int, settings: dict[str, Any]
) -> dict[str, float | int | None]:
    """The largest K whose median image takes at most ``budget`` seconds, by bisection; None if no K does."""
    measured: dict[int, float] = {}

    def fits(k: int) -> bool:
        config = model.settings(**settings, ar_steps=k)
        times = [time_batch(model, config, batch, seed) for seed in range(repeats + 1)]
        measured[k] = statistics.median(times[1:]) / batch
        return measured[k] <= budget

    low, high = 0, model.network.config.num_tokens + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {"seconds": budget, "batch": batch, "ar_steps": low or None, "seconds_per_image": measured.get(low)}


def table(results: dict[str, Any]) -> str:
    """The rows as text: milliseconds per image."""
    parts = "".join(f"{part:>10}" for part in PARTS)
    lines = [f"{'batch':>5}{'K':>5}  {'model':<8}{'total ms':>10}{'spread':>8}{'floor x':>9}{'MiB':>8} |{parts}"]
    for row in results["rows"]:
        split = "".join(f"{1000 * row['parts'][part]:>10.2f}" for part in PARTS)
        lines.append(
            f"{row['batch']:>5}{row['ar_steps']:>5}  {row['model']:<8}{1000 * row['seconds_per_image']:>10.2f}"
            f"{100 * row['spread']:>6.0f} %{row['over_floor']:>9.2f}{row['peak_memory'] / 2**20:>8.0f} |{split}"
        )
    alone = results["student"] == NO_STUDENT
    if alone:
        lines.append(f"no student in this folder: the rows named so are {NO_STUDENT.removeprefix('none: ')}")
    who = "one untrained evaluation" if alone else "the student"
    lines += [f"{case}: {who} is {ratio:.1f} x as fast" for case, ratio in results["speedup"].items()]
    if "budget" in results:
        b = results["budget"]
        took = "no K fits" if b["ar_steps"] is None else f"K = {b['ar_steps']} ({1000 * b['seconds_per_image']:.1f} ms)"
        lines.append(f"within {1000 * b['seconds']:g} ms per image at batch {b['batch']}: {took}")
    s, m, rates = results["settings"], results["machine"], results["rates"]
    on_gpu = "gpu" in m
    memory = "all memory held on the GPU" if s["graphs"] else "tensors on the GPU"
    memory = memory if on_gpu else "the process's resident memory"
    modes = [name for name in ("graphs", "compile") if s[name]]
    modes += [f"refresh_every {s['refresh_every']}"] if s["refresh_every"] > 1 else []
    lines += [
        f"ms per image; the parts were clocked in other batches{', without graphs' if s['graphs'] else ''}; "
        f"teacher: {s['head_steps']} {s['solver']} steps, guidance {s['guidance']} ({s['guidance_schedule']})"
        + (f"; student: {s['evaluations']} evaluations" if s["evaluations"] > 1 else ""),
        f"floor: operations at the {rates['matmul'] / 1e12:.3g} TFLOP/s of matrix products measured in this run"
        + (f", or bytes at {rates['bandwidth'] / 1e9:.0f} GB/s" if on_gpu else "") + "; without the tokenizer",
        f"{', '.join([s['dtype'], *modes])}, {m.get('gpu', m['cpu'])}, {m['cores']} cores, {m['threads']} threads; "
        + f"MiB: peak of {memory}",
    ]  # fmt: skip
    return "\n".join(lines)
