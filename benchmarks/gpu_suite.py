"""Everything worth knowing about speed on one GPU, in under 9 minutes, in one JSON.

    python benchmarks/gpu_suite.py --out OUT.json --reference PATH_TO_CHECKOUT_OF_LTH14_MAR

Stages run in the order of their importance; the file is written after each, so that a run which is killed keeps what
it had. A stage that fails or takes too long is recorded with its error, and the next one runs. With
`--stages "mar-b rl" "mar-h*"` only these run; they join an earlier file, or replace what it has if they succeed; each
has the date and the rates of its own run. Random weights; tokens, not images: neither the autoencoder nor a reward's
network is timed. `--preset tiny --device cpu` shows in seconds that all stages run that need no CUDA (graphs, compiled
blocks).

Sampling: ratios to the floor (marval.floor) at the rates measured in the first stage, and to the reference teacher at
equal K, guidance 2.9 linear, 100 steps, in bf16 by autocast with its cache of weights. Training: updates of the loops'
own losses on synthetic latents, in bf16 by autocast on CUDA; operations as PyTorch counts them.
"""

import argparse
import contextlib
import copy
import dataclasses
import fnmatch
import gc
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import against_reference as side
import torch
from torch import Tensor

from marval import masking, recipes
from marval.bench import PARTS, machine, median_and_spread, peak_memory, reset_peak, split_batch, time_batch
from marval.checkpoint import load_strictly, read_json, read_mar_checkpoint, write_json
from marval.config import PRESETS, DistillConfig, MARConfig, RLConfig, SamplingConfig, TrainConfig
from marval.costs import Work
from marval.diffusion import cosine_schedule
from marval.distributed import World
from marval.ema import EMA
from marval.floor import bandwidth, by_part, floor_seconds, matmul_rate, sampling_loads, synchronise
from marval.matching import ScoreMatching, draw_guidance, draw_noise
from marval.models.mar import MAR
from marval.networks import copy_head, copy_network, own_part
from marval.pipeline import Pipeline
from marval.rng import ImageNoise
from marval.run import versions
from marval.sampling import few_evaluations, last, unmask
from marval.train import adamw, teacher_loss
from marval.update import Update, autocast

GUIDANCE = 2.9
COMPILING = 150
"""Seconds of a stage whose blocks are compiled from nothing."""
SHARED = [Path(__file__).resolve().parents[i] / "shared" for i in (1, 2)]


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is measured: of the published sizes, or of a tiny one that shows that everything runs."""

    sizes: dict[str, MARConfig]
    ar_steps: tuple[int, int]
    large: int
    """The large batch."""
    few: int
    """AR steps of teachers at the large batch."""
    head_steps: int
    cut: tuple[int, int]
    """Denoising steps of the reference from which a whole chain is extrapolated."""
    repeats: int
    batches: dict[str, int]
    """Images per update."""
    rl_ar_steps: int
    rate_seconds: float
    """For each rate of the device."""


FULL = Scale(
    sizes=PRESETS, ar_steps=(64, 256), large=256, few=16, head_steps=100, cut=(5, 25), repeats=11,
    batches={"train": 128, "distill head": 96, "distill all": 96, "rl": 16}, rl_ar_steps=64, rate_seconds=1.0,
)  # fmt: skip
TINY = Scale(
    sizes={"tiny": side.SIZES["tiny"]}, ar_steps=(2, 4), large=3, few=3, head_steps=4, cut=(2, 3), repeats=2,
    batches={"train": 2, "distill head": 2, "distill all": 2, "rl": 2}, rl_ar_steps=2, rate_seconds=0.05,
)  # fmt: skip


class TooLong(Exception):
    """A stage ran past its time."""


class Suite:
    """Runs stages and keeps what they found."""

    def __init__(self, out: Path, device: torch.device, scale: Scale, minutes: float):
        self.out, self.device, self.scale = out, device, scale
        self.end = time.perf_counter() + 60 * minutes
        self.stage_end = self.end
        self.rates: dict[str, float] = {}
        self.result: dict[str, Any] = {
            "benchmark": "gpu_suite", "date": time.strftime("%Y-%m-%d"), "machine": machine(device),
            "versions": versions(device), "settings": {"guidance": GUIDANCE, **dataclasses.asdict(scale)},
            "command": "python benchmarks/gpu_suite.py", "stages": [],
        }  # fmt: skip
        self._network: tuple[str, MAR] | None = None

    def network(self, size: str) -> MAR:
        """Random weights in float32 on the device; one size at a time."""
        if self._network is None or self._network[0] != size:
            self._network = None
            self._network = size, side.random_network(self.scale.sizes[size], self.device)
        return self._network[1]

    def run(self, name: str, work: Callable[[], dict[str, Any]], seconds: float) -> None:
        """One stage, of at most so many seconds, and none that the end of the suite does not leave."""
        stages = self.result["stages"]
        at = next((i for i, stage in enumerate(stages) if stage["stage"] == name), len(stages))
        left = min(seconds, self.end - time.perf_counter())
        start, found = time.perf_counter(), {}
        self.stage_end = start + left
        if left < 1:
            found = {"skipped": "no time left"}
        else:
            try:
                with limited(left):
                    found = work()
            except (Exception, TooLong) as error:
                text = str(error).replace(str(Path.cwd()), ".").strip()
                found = {"error": f"{type(error).__name__}: {text[:500]}"}
        failed = {"error", "skipped"}
        if at == len(stages) or not found.keys() & failed or stages[at].keys() & failed:
            took = time.perf_counter() - start
            stages[at : at + 1] = [
                {"stage": name, **found, "date": self.result["date"], "rates": dict(self.rates), "stage_seconds": took}
            ]
        write_json(self.out, self.result)
        print(f"{time.perf_counter() - start:7.1f} s  {name:<44} {line(found)}", flush=True)
        gc.collect()
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # after a failed kernel everything fails; the others tell
                torch.cuda.empty_cache()


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `TooLong` in the block after so many seconds (once Python is back from what it called)."""

    def stop(*_: Any) -> None:
        raise TooLong(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def line(found: dict[str, Any]) -> str:
    """What a stage found, in a few words."""
    shown = (
        "error",
        "skipped",
        "seconds_per_image",
        "over_floor",
        "matmul_share",
        "tokens_per_second",
        "largest_error",
    )
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items() if k in shown)[
        :150
    ]


@contextlib.contextmanager
def compiler(words: list[str]) -> Iterator[None]:
    """Where blocks are compiled: a compiler that knows nothing yet, and fails where it would give up on a block."""
    if "compile" not in words:
        yield
        return
    from torch import _dynamo

    _dynamo.reset()
    strict = "fail_on_recompile_limit_hit"
    try:
        with _dynamo.config.patch(strict, True) if hasattr(_dynamo.config, strict) else contextlib.nullcontext():
            yield
    finally:
        _dynamo.reset()


# ---- the device


def rates(suite: Suite) -> dict[str, Any]:
    found = {
        "bf16": matmul_rate(suite.device, torch.bfloat16, suite.scale.rate_seconds),
        "float32": matmul_rate(suite.device, torch.float32, suite.scale.rate_seconds),
        "bandwidth": bandwidth(suite.device, suite.scale.rate_seconds),
    }
    suite.rates.update(found)
    x = torch.zeros(1, device=suite.device)
    synchronise(suite.device)
    start = time.perf_counter()
    for _ in range(2000):
        x.add_(1)
    synchronise(suite.device)
    return {**found, "seconds_per_launch": (time.perf_counter() - start) / 2000}


def noise(suite: Suite) -> dict[str, Any]:
    """Seconds of the random numbers of a teacher's AR step at the large batch: a generator per image, on the CPU."""
    sizes = next(iter(suite.scale.sizes.values()))
    drawn, source = sizes.num_tokens // suite.scale.few, ImageNoise(0, list(range(suite.scale.large)), suite.device)
    source.randn(suite.scale.head_steps, drawn, sizes.token_dim)
    synchronise(suite.device)
    start = time.perf_counter()
    source.randn(suite.scale.head_steps, drawn, sizes.token_dim)
    synchronise(suite.device)
    return {"batch": suite.scale.large, "tokens": drawn, "seconds_per_ar_step": time.perf_counter() - start}


# ---- sampling


def sampling(
    suite: Suite, size: str, role: str, mode: str, batch: int, ar_steps: int, repeats: int | None = None
) -> dict[str, Any]:
    """Median time of an image after a warm-up, in which graphs are recorded and blocks compiled.

    The split by part needs clocks inside, which a graph has not: None with graphs.
    """
    words, model = mode.split("+"), suite.scale.sizes[size]
    dtype, graphs = "bf16" if "bf16" in words else "float32", "graphs" in words
    found: dict[str, Any] = {}
    times: list[float] = []
    with compiler(words):
        pipeline = side.pipelines(suite.network(size), GUIDANCE, dtype, graphs, "compile" in words)[role]
        config = settings(suite, pipeline, ar_steps)
        start = time.perf_counter()
        time_batch(pipeline, config, batch, 0)
        found["warm_up_seconds"] = time.perf_counter() - start
        time_batch(pipeline, config, batch, 0)
        reset_peak(suite.device)
        for seed in range(repeats or suite.scale.repeats):
            times.append(time_batch(pipeline, config, batch, seed) / batch)
            if time.perf_counter() + (1 if graphs else 4) * batch * times[-1] > suite.stage_end:  # the split follows
                break
        found["peak_memory"] = peak_memory(suite.device, graphs)
        median, spread = median_and_spread(times)
        clocked = 0 if graphs else 3 if batch * median < 1 else 1
        split = [split_batch(pipeline, config, batch, seed) for seed in range(clocked)]
    teacher = role == "teacher"
    loads = sampling_loads(
        model, ar_steps, batch, head_steps=config.head_steps if teacher else 1, guided=teacher,
        itemsize=2 if dtype == "bf16" else 4,
    )  # fmt: skip
    floor = floor_seconds(loads, suite.rates[dtype], suite.rates["bandwidth"])["total"] / batch
    operations = {part: load.operations / batch for part, load in by_part(loads).items()}
    parts, share = None, None
    if split:
        parts = {part: statistics.median(s[part] for s in split) / batch for part in PARTS}
        transformer = operations["encoder"] + operations["decoder"]
        share = transformer / (parts["encoder"] + parts["decoder"]) / suite.rates[dtype]
    return {
        "size": size, "model": role, "mode": mode, "batch": batch, "ar_steps": ar_steps,
        "head_steps": config.head_steps if teacher else 1, "seconds_per_image": median, "spread": spread,
        "measurements": len(times), "images_per_second": 1 / median, "floor_seconds_per_image": floor,
        "over_floor": median / floor, "operations_per_image": operations, "parts_with_clocks": parts,
        "matmul_share": sum(operations.values()) / median / suite.rates[dtype], "transformer_matmul_share": share,
        **found,
    }  # fmt: skip


def settings(suite: Suite, pipeline: Pipeline, ar_steps: int) -> SamplingConfig:
    return pipeline.settings(ar_steps=ar_steps, head_steps=None if pipeline.student else suite.scale.head_steps)


def parity(suite: Suite, code: Any) -> dict[str, Any]:
    """Errors of our teachers with the reference's random numbers, in float32 (see `against_reference.compare`)."""
    size, scale = next(iter(suite.scale.sizes)), suite.scale
    network = suite.network(size)
    theirs = side.Theirs(side.reference_from(code, network, scale.head_steps), "float32")
    modes = {"": False} | ({", graphs": True} if suite.device.type == "cuda" else {})
    ours = [
        side.Ours(model, role + mode)
        for mode, graphs in modes.items()
        for role, model in side.pipelines(network, GUIDANCE, graphs=graphs).items()
    ]
    config = SamplingConfig(
        ar_steps=scale.few, head_steps=scale.head_steps, guidance=GUIDANCE, guidance_schedule="linear"
    )
    errors = side.compare(theirs, ours, config, torch.arange(2, device=suite.device))
    return {"errors": errors, "largest_error": max(errors.values()), "tolerance": side.tolerance(suite.device)}


def reference(
    suite: Suite, code: Any, size: str, batch: int, ar_steps: int, steps: tuple[int, ...]
) -> dict[str, Any]:  # fmt: skip
    """The reference teacher under autocast to bf16, as its own code samples, with so many denoising steps, in turn.

    Without a whole chain among them, the time of one is extrapolated from the first two, linearly; with both, what
    that would have been says how good it is elsewhere.
    """
    whole = suite.scale.head_steps
    labels = torch.arange(batch, device=suite.device) % suite.scale.sizes[size].num_classes
    dtype = "bf16" if suite.device.type == "cuda" else "float32"
    fewest = min(suite.scale.cut)
    models = {n: side.Theirs(side.reference_from(code, suite.network(size), n), dtype) for n in {fewest, *steps}}

    def seconds(n: int) -> float:
        config = SamplingConfig(ar_steps=ar_steps, head_steps=n, guidance=GUIDANCE, guidance_schedule="linear")
        return sum(models[n].draw(config, labels, clocked=False).steps) / batch

    seconds(fewest)  # every shape once
    times: dict[int, list[float]] = {n: [] for n in steps}
    for _ in range(max(3, suite.scale.repeats // 3)):
        start = time.perf_counter()
        for n in steps:
            times[n].append(seconds(n))
        now = time.perf_counter()
        if now + (now - start) > suite.stage_end:
            break
    found, guessed = times.get(whole, []), []
    if len(steps) > 1:
        low, high, *_ = steps
        pairs = zip(times[low], times[high], strict=True)
        guessed = [a + (b - a) * (whole - low) / (high - low) for a, b in pairs]
    median, spread = median_and_spread(found or guessed)
    error = statistics.median(guessed) / median - 1 if found and guessed else None
    return {
        "size": size, "model": "reference teacher", "mode": "bf16 by autocast" if dtype == "bf16" else dtype,
        "batch": batch, "ar_steps": ar_steps, "head_steps": whole, "measured_head_steps": list(steps),
        "seconds_per_image": median, "spread": spread, "measurements": len(found or guessed),
        "extrapolated": not found, "extrapolation_error": error,
        "measured_seconds_per_image": {str(n): statistics.median(values) for n, values in times.items()},
    }  # fmt: skip


def sameness(suite: Suite, mode: str) -> dict[str, Any]:
    """Largest error of a token of the fast path against the plain one in float32, relative to its largest entry.

    Where the dtype is another, so are the tokens: then a typical error says more.
    """
    size, words, found = next(iter(suite.scale.sizes)), mode.split("+"), {}
    network, labels = suite.network(size), torch.arange(2, device=suite.device)
    dtype = "bf16" if "bf16" in words else "float32"
    with compiler(words):
        plain = side.pipelines(network, GUIDANCE)
        fast = side.pipelines(network, GUIDANCE, dtype, "graphs" in words, "compile" in words)
        for role in plain:
            config = settings(suite, plain[role], suite.scale.few)
            drawn = []
            for pipeline in (plain[role], fast[role], fast[role]):  # the second time from recorded graphs
                with torch.inference_mode():
                    noise = ImageNoise(0, [0, 1], suite.device)
                    drawn.append(pipeline.draw_batch(config, labels, noise).float())
            errors = [(x - drawn[0]).abs().amax(-1) / drawn[0].abs().amax(-1) for x in drawn[1:]]
            found[role] = {"largest": float(torch.stack(errors).max()), "median": float(torch.stack(errors).median())}
    return {"mode": mode, "errors": found, "largest_error": max(f["largest"] for f in found.values())}


# ---- training


def training(suite: Suite, verb: str, size: str) -> dict[str, Any]:
    """Updates of one loop: random numbers, losses, optimizer and average; no data are read."""
    model, batch, device = suite.scale.sizes[size], suite.scale.batches[verb], suite.device
    step = {"train": train_step, "rl": rl_step}.get(verb, distill_step)(suite, verb, size, batch)
    each = recipes.DISTILL["imagenet256-b"]().context_updates if verb.startswith("distill") else 1  # updates of a step
    with Work() as work:  # the warm-up; counted first, so that running out of time later costs repeats alone
        step()
    step()
    reset_peak(device)
    times: list[float] = []
    for _ in range(min(6, suite.scale.repeats)):
        synchronise(device)
        start = time.perf_counter()
        step()
        synchronise(device)
        times.append((time.perf_counter() - start) / each)
        if time.perf_counter() + 1.5 * each * times[-1] > suite.stage_end:
            break
    median, spread = median_and_spread(times)
    operations = work.operations / each
    memory = peak_memory(device)
    rate = suite.rates["bf16" if device.type == "cuda" else "float32"]
    return {
        "size": size, "verb": verb, "batch": batch, "context_updates": each, "seconds_per_update": median,
        "spread": spread, "measurements": len(times), "images_per_second": batch / median,
        "tokens_per_second": batch * model.num_tokens / median, "peak_memory": memory,
        "operations_per_update": operations, "floor_seconds": operations / rate,
        "over_floor": median * rate / operations, "matmul_share": operations / median / rate,
    }  # fmt: skip


def trainable(suite: Suite, size: str) -> tuple[MAR, Tensor, Tensor, torch.Generator]:
    """The network, synthetic latents (B, L, D) of the largest batch, labels, and a generator on the device."""
    g = torch.Generator(suite.device).manual_seed(0)
    model, rows = suite.scale.sizes[size], max(suite.scale.batches.values())
    tokens = torch.randn(rows, model.num_tokens, model.token_dim, generator=g, device=suite.device)
    labels = torch.randint(model.num_classes, (rows,), generator=g, device=suite.device)
    return copy.deepcopy(suite.network(size)), tokens, labels, g


def train_step(suite: Suite, verb: str, size: str, batch: int) -> Callable[[], None]:
    """An update as `marval.train` does it, with dropout, at the middle of MAR's mask ratios."""
    network, tokens, labels, g = trainable(suite, size)
    recipe = recipes.TRAIN["imagenet256-b"]()
    model = dataclasses.replace(network.config, dropout=recipe.model.dropout)
    with torch.device("meta"):
        blank = MAR(model)
    blank.load_state_dict(network.state_dict(), assign=True)
    network = blank.requires_grad_(True).train()
    config = TrainConfig(batch=batch, model=model)
    world = World(0, 1, suite.device)
    update, ema = Update("teacher", network, adamw(network, config), config, world), EMA(network, config.ema)
    schedule, length = cosine_schedule(), model.num_tokens
    num_masked = masking.training_masked_count(length, 0.5)

    def step() -> None:
        visible, masked = masking.random_masks(batch, length, num_masked, g)
        shape = (batch, num_masked, config.head_batch_mul)
        t = torch.randint(0, len(schedule), shape, generator=g, device=suite.device)
        eps = torch.randn(*shape, model.token_dim, generator=g, device=suite.device)
        update.backward(teacher_loss, network, schedule, tokens[:batch], visible, masked, labels[:batch], t, eps)
        update.step(0)
        ema.update(network)

    return step


def matched(
    suite: Suite, size: str, config: DistillConfig | RLConfig, student_config: Any
) -> tuple[ScoreMatching, list[Update], EMA[Any], tuple[Tensor, Tensor, torch.Generator]]:
    """Student and auxiliary of a teacher, as `marval.distill` makes them."""
    teacher, tokens, labels, g = trainable(suite, size)
    guidance_input = student_config.guidance_range is not None
    student, auxiliary = copy_network(teacher, config.trained, guidance_input), copy_head(teacher, guidance_input)
    matching = ScoreMatching(teacher, student, auxiliary, student_config, config.gsim, cosine_schedule())
    updates, world = [], World(0, 1, suite.device)
    for name, part in (("student", own_part(student, teacher)), ("auxiliary", auxiliary)):
        optimizer = torch.optim.Adam(part.parameters(), config.gsim.lr, betas=(0.0, 0.999), fused=True)
        updates.append(Update(name, part, optimizer, config, world))
    return matching, updates, EMA(updates[0].module, config.ema), (tokens, labels, g)


def match(
    matching: ScoreMatching, updates: list[Update], config: Any, tokens: Tensor, labels: Tensor, g: torch.Generator,
    num_masked: int,
) -> Iterator[None]:  # fmt: skip
    """Contexts; then without end the auxiliary's update and the student's gradient."""
    batch, device = len(tokens), tokens.device
    visible, masked = masking.random_masks(batch, tokens.shape[1], num_masked, g)
    w = draw_guidance(matching.student_config, batch, g)
    with torch.no_grad(), autocast(config.precision, device):
        context = matching.context(tokens, visible, masked, labels, w)
    shape = (batch, num_masked, tokens.shape[2])
    while True:
        updates[1].backward(matching.auxiliary_loss, context, draw_noise(*shape, config.gsim.auxiliary_t_range, g))
        updates[1].step(0)
        updates[0].backward(matching.student_loss, context, draw_noise(*shape, config.gsim.t_range, g))
        yield
        with autocast(config.precision, device):
            context = matching.refresh(context)


def distill_step(suite: Suite, verb: str, size: str, batch: int) -> Callable[[], None]:
    """The updates on one context as `marval.distill` does them, half-way through the AR steps."""
    config = dataclasses.replace(recipes.DISTILL["imagenet256-b"](), batch=batch, trained=verb.split()[1])
    matching, updates, ema, (tokens, labels, g) = matched(suite, size, config, config.student)
    num_masked = masking.inference_masked_count(tokens.shape[1], suite.scale.rl_ar_steps, 0.5)

    def step() -> None:
        gradients = match(matching, updates, config, tokens[:batch], labels[:batch], g, num_masked)
        for _ in range(config.context_updates):
            next(gradients)
            updates[0].step(0)
            ema.update(updates[0].module)

    return step


def rl_step(suite: Suite, verb: str, size: str, batch: int) -> Callable[[], None]:
    """A rollout of K AR steps with gradients through all, recomputed one by one, the reward being minus the mean square
    of the tokens (no autoencoder, no reward network), and the anchor, as `marval.rl` does it."""
    student_config = recipes.DISTILL["imagenet256-b"]().student
    config = RLConfig(batch=batch, ar_steps=suite.scale.rl_ar_steps)
    matching, updates, ema, (tokens, labels, g) = matched(suite, size, config, student_config)
    tokens, labels, network = tokens[:batch], labels[:batch], matching.student
    counts = masking.masked_counts(tokens.shape[1], config.ar_steps)
    num_masked = masking.inference_masked_count(tokens.shape[1], config.ar_steps, 0.5)
    draw = few_evaluations(network.head, matching.schedule, (student_config.t_init,))

    def loss(orders: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, None]:
        steps = unmask(network, draw, labels, orders, counts, z, guidance=w, checkpoint_ar_steps=True)
        return last(steps).float().square().mean(), None

    def step() -> None:
        orders = torch.rand(tokens.shape[:2], generator=g, device=tokens.device).argsort(dim=1)
        z = torch.randn(tokens.shape, generator=g, device=tokens.device)
        updates[0].backward(loss, orders, z, draw_guidance(matching.student_config, batch, g), last=False)
        next(match(matching, updates, config, tokens, labels, g, num_masked))
        updates[0].step(0)
        ema.update(updates[0].module)

    return step


# ---- parity


def golden(suite: Suite) -> dict[str, Any]:
    """Recorded tensors of the reference (shared/golden), in float32 on this device: the largest errors."""
    from safetensors.torch import load_file

    folder = next((path / "golden" / "mar_tiny" for path in SHARED if (path / "golden").is_dir()), None)
    if folder is None:
        return {"skipped": "no folder shared/golden"}
    recorded = {name: t.to(suite.device) for name, t in load_file(folder / "golden.safetensors").items()}
    sizes = {"grid": 4, "num_classes": 5, "width": 32, "depth": 2, "heads": 4, "buffer_size": 4, "head_width": 48}
    network = MAR(MARConfig(**sizes, head_depth=2)).eval().requires_grad_(False)
    load_strictly(network, read_mar_checkpoint(folder / "checkpoint-last.pth", "raw")[0], "golden")
    network.to(suite.device)
    visible = torch.stack([(row == 0).nonzero().squeeze(1) for row in recorded["mask"]])
    condition = network.condition(recorded["tokens"], visible, recorded["labels"])
    out = network.head(recorded["head_x"], recorded["head_t"], recorded["condition"].flatten(0, 1))
    errors = {
        "condition": (condition - recorded["condition"]).abs().max(),
        "head": (out - recorded["head_out"]).abs().max(),
    }
    found = {name: float(error) for name, error in errors.items()}
    return {"errors": found, "largest_error": max(found.values())}


# ---- all of it


def stages(suite: Suite, checkout: Path | None) -> list[tuple[str, Callable[[], dict[str, Any]], float]]:
    """Name, work and seconds at most, the most important first."""
    scale, first = suite.scale, next(iter(suite.scale.sizes))
    short, long = scale.ar_steps
    found: list[tuple[str, Callable[[], dict[str, Any]], float]] = [("rates", lambda: rates(suite), 60)]

    def draws(size: str, role: str, mode: str, batch: int, k: int, seconds: float, repeats: int | None = None) -> None:
        def work() -> dict[str, Any]:
            return sampling(suite, size, role, mode, batch, k, repeats)

        found.append((f"{size} {role} {mode} batch {batch} K {k}", work, seconds))

    cuda = suite.device.type == "cuda"
    best = "bf16+graphs" if cuda else "bf16"
    draws(first, "student", best, 1, short, 30)
    if cuda:
        draws(first, "student", "bf16+compile+graphs", 1, short, COMPILING)
    draws(first, "student", best, 1, long, 90)  # a graph for each number of visible tokens
    draws(first, "student", "bf16", scale.large, short, 50, 3)
    if checkout is not None:
        code = side.load_code(checkout)

        def theirs(size: str, batch: int, k: int, steps: tuple[int, ...], seconds: float) -> None:
            def work() -> dict[str, Any]:
                return reference(suite, code, size, batch, k, steps)

            found.append((f"{size} reference teacher batch {batch} K {k}", work, seconds))

        found.append(("same tokens as the reference, float32", lambda: parity(suite, code), 40))
        theirs(first, 1, short, (*scale.cut, scale.head_steps), 45)
        theirs(first, scale.large, scale.few, (scale.head_steps,), 45)
        theirs(first, 1, long, scale.cut, 80)
    draws(first, "student", "bf16", scale.large, scale.few, 20, 3)
    draws(first, "teacher", best, 1, short, 40, 3)
    draws(first, "teacher", "bf16", scale.large, scale.few, 40, 1)
    fast = ["float32+graphs", "bf16+graphs", "bf16", "float32+compile", "bf16+compile+graphs"] if cuda else ["bf16"]
    for mode in fast[:3]:
        found.append((f"same tokens, {mode}", lambda mode=mode: sameness(suite, mode), 30))
    for verb in scale.batches:
        seconds = 70 if verb == "rl" else 40
        found.append((f"{first} {verb}", lambda verb=verb: training(suite, verb, first), seconds))
    if cuda:
        draws(first, "student", "bf16", 1, short, 20, 3)
        draws(first, "student", "bf16+compile", scale.large, scale.few, COMPILING, 3)
        draws(first, "student", "float32", 1, short, 20, 3)
    for mode in fast[3:]:
        found.append((f"same tokens, {mode}", lambda mode=mode: sameness(suite, mode), COMPILING))
    found.append(("noise of a teacher's AR step", lambda: noise(suite), 20))
    found.append(("golden", lambda: golden(suite), 20))
    for size in list(scale.sizes)[1:]:
        draws(size, "student", best, 1, short, 40)
        draws(size, "student", "bf16", scale.large, scale.few, 40, 1)
    for size in list(scale.sizes)[1:]:
        draws(size, "student", best, 1, long, 60, 3)
    draws(first, "teacher", best, 1, long, 60, 2)
    for size in list(scale.sizes)[1:]:
        draws(size, "teacher", best, 1, short, 40, 2)
        if checkout is not None:
            theirs(size, 1, short, scale.cut, 50)
            theirs(size, scale.large, scale.few, scale.cut, 50)
    return found


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--reference", type=Path, help="checkout of LTH14/mar; without it, ours alone")
    parser.add_argument("--preset", default="full", choices=["full", "tiny"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--minutes", type=float, default=8.5, help="no stage starts or goes on after this time")
    parser.add_argument("--stages", nargs="+", help="names or patterns; OUT keeps its other stages")
    args = parser.parse_args(words)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    suite = Suite(args.out, torch.device(device), TINY if args.preset == "tiny" else FULL, args.minutes)
    if args.out.exists():
        if args.stages is None:
            parser.error(f"{args.out} exists: name --stages to measure again, or another --out")
        earlier = read_json(args.out)
        suite.result["stages"] = earlier["stages"]
        then, now = (
            {name: result["versions"][name] for name in ("device", "torch")} | result["settings"]
            for result in (earlier, json.loads(json.dumps(suite.result)))
        )
        for name, value in then.items():
            if value != now.get(name):
                parser.error(
                    f"{args.out} was measured with {name} {value}, this is {now.get(name)}: choose another --out"
                )
    try:
        planned = stages(suite, args.reference)
    except ValueError as error:
        sys.exit(f"gpu_suite: {error}")
    patterns = ["*"] if args.stages is None else ["rates", *args.stages]
    for pattern in patterns:
        if not fnmatch.filter([name for name, _, _ in planned], pattern):
            parser.error(f"--stages {pattern!r} is none of {', '.join(name for name, _, _ in planned)}")
    for name, work, seconds in planned:
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            suite.run(name, work, seconds)
    places = {name: place for place, (name, _, _) in enumerate(planned)}
    place, order = 0, {}
    for stage in suite.result["stages"]:  # those of an earlier run with --reference stay behind the one before them
        place = order[stage["stage"]] = places.get(stage["stage"], place)
    suite.result["stages"].sort(key=lambda stage: order[stage["stage"]])
    write_json(args.out, suite.result)
    return suite.result


if __name__ == "__main__":
    main()
