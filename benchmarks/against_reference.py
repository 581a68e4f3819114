"""Side by side with the reference MAR (LTH14/mar), run from its own checkout: the same samples, then the time of each.

    python benchmarks/against_reference.py --reference PATH_TO_CHECKOUT --json benchmarks/results/against_reference.json

Both get the same random weights. First the reference draws a few AR steps while its random numbers are recorded, ours
gets the same numbers, and both must draw the same tokens. Then reference teacher, our teacher and our student, and both
of ours with a cached backbone, are timed in turn, generation by generation. On the CPU every AR step is timed: the k-th
steps of two models are a pair, the ratio is the median over all pairs, and an image takes the sum over k of the
medians. On CUDA a generation is one measurement, without clocks inside.

Nothing of the reference is part of marval. Where CUDA is absent `.cuda()` does nothing; where timm or SciPy is absent,
a stand-in has the transformer block (with PyTorch's fused attention, as timm has) and the name of a distribution that
only training draws from.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from marval import recipes
from marval.bench import clocks, machine, median_and_spread, peak_memory, reset_peak
from marval.checkpoint import write_json
from marval.config import PRESETS, MARConfig, SamplingConfig, StudentConfig
from marval.floor import bandwidth as copy_bandwidth
from marval.floor import by_part, floor_seconds, matmul_rate, sampling_loads, synchronise
from marval.masking import masked_counts
from marval.models.mar import MAR
from marval.pipeline import Pipeline
from marval.rng import ImageNoise
from marval.run import versions
from marval.tokenizers import LatentTokenizer, patchify

SIZES = {
    "tiny": MARConfig(
        grid=4, num_classes=5, width=32, depth=2, heads=4, buffer_size=4, head_width=48, head_depth=2
    ),
    **{name: recipes.sizes(name, recipes.TRAIN[name]()) for name in ("digits", "fashion-mnist")},
    **PRESETS,
}  # fmt: skip
STRIDE = 16
"""Pixels per token of MAR; nothing depends on it here."""
CHECKED_AR_STEPS = 4
"""AR steps of the comparison, with the settings of the timing otherwise."""
TOLERANCE = 2e-5
"""Largest error of a token relative to its largest entry, in float32; MAR-B has 5e-6. The chain's first step, at
t = 999, multiplies everything by 2e4 (random weights make tokens of about 1e4): even a temperature of 0.9 changes only
3e-5 of a token. bf16 is reported, not judged."""
CUDA_TOLERANCE = 1e-4
"""There PyTorch's kernels of one operation differ more from each other."""


# ---- the reference, in an environment that it can run in


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))


class _Block(nn.Module):
    """Stands in for timm's vision transformer block in evaluation mode; the same names of parameters."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, norm_layer: Any, **_: Any):
        super().__init__()
        self.norm1, self.attn, self.norm2 = norm_layer(dim), _Attention(dim, num_heads), norm_layer(dim)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(dim, int(mlp_ratio * dim)), "fc2": nn.Linear(int(mlp_ratio * dim), dim)}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def stand_ins() -> dict[str, Any]:
    """Modules that the reference imports, as far as they are not installed."""
    found: dict[str, Any] = {}
    if importlib.util.find_spec("timm") is None:
        names = ("timm", "timm.models", "timm.models.vision_transformer")
        found |= {name: ModuleType(name) for name in names}
        found[names[-1]].Block = _Block
    if importlib.util.find_spec("scipy") is None:
        found |= {name: ModuleType(name) for name in ("scipy", "scipy.stats")}
        found["scipy"].stats = found["scipy.stats"]
        found["scipy.stats"].truncnorm = lambda *_, **__: None
    return found


@contextlib.contextmanager
def environment(device: torch.device) -> Iterator[None]:
    """In which the reference's code, full of `.cuda()`, runs on this device."""
    if device.type == "cuda":
        yield
    else:
        with patch.object(Tensor, "cuda", lambda self, *_, **__: self):
            yield


def load_code(checkout: Path) -> ModuleType:
    """``models/mar.py`` of the checkout.

    Raises:
        ValueError: the folder is not a checkout of it.
    """
    if not (checkout / "models" / "mar.py").is_file():
        raise ValueError(f"{checkout} is no checkout of LTH14/mar: it has no models/mar.py")
    before, added = set(sys.modules), stand_ins()
    sys.modules.update(added)
    try:
        with patch.object(sys, "path", [str(checkout), *sys.path]):
            module = importlib.import_module("models.mar")
    finally:  # what a real timm brought along stays: torch's own modules cannot be imported twice
        for name in set(sys.modules) - before:
            if name in added or name.split(".")[0] in ("models", "diffusion"):
                del sys.modules[name]
    return module


def reference_from(code: ModuleType, network: MAR, head_steps: int) -> Any:
    """The reference's MAR with our weights: the very same tensors.

    Its parameters require gradients, as in its own evaluation: autocast then casts each weight once per generation,
    not at every use.
    """
    c = network.config
    with torch.device("meta"):
        reference = code.MAR(
            img_size=c.grid * STRIDE, vae_stride=STRIDE, patch_size=1, encoder_embed_dim=c.width, encoder_depth=c.depth,
            encoder_num_heads=c.heads, decoder_embed_dim=c.width, decoder_depth=c.depth, decoder_num_heads=c.heads,
            mlp_ratio=4, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6), vae_embed_dim=c.token_dim,
            class_num=c.num_classes, buffer_size=c.buffer_size, diffloss_d=c.head_depth, diffloss_w=c.head_width,
            num_sampling_steps=str(head_steps),
        )  # fmt: skip
    reference.load_state_dict(their_names(network.state_dict()), strict=True, assign=True)
    return reference.eval()


def their_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the reference's names."""
    return {
        name.replace("head.", "diffloss.net.", 1) if name.startswith("head.") else name: t for name, t in state.items()
    }


def random_network(model: MARConfig, device: torch.device, seed: int = 0) -> MAR:
    """A MAR whose zero-initialised layers are small random ones, so that no part of it is without effect."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        network = MAR(model)
        for name, parameter in network.named_parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
            elif "norm" in name or ".in_ln." in name:
                nn.init.normal_(parameter, 1.0, 0.02)
    return network.eval().requires_grad_(False)


# ---- the same random numbers


@dataclasses.dataclass
class Tape:
    """What a generation of the reference drew."""

    orders: list[Tensor] = dataclasses.field(default_factory=list)
    starts: list[Tensor] = dataclasses.field(default_factory=list)
    """Initial noise of each AR step, (B n, D)."""
    steps: list[Tensor] = dataclasses.field(default_factory=list)
    """Noise of each denoising step of each AR step; with guidance the second half goes unused."""

    @contextlib.contextmanager
    def recording(self, reference: Any) -> Iterator[None]:
        def kept(into: list[Tensor], function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def recorded(*args: Any, **kwargs: Any) -> Tensor:
                into.append(function(*args, **kwargs))
                return into[-1]

            return recorded

        with (
            patch.object(torch, "randn", kept(self.starts, torch.randn)),
            patch.object(torch, "randn_like", kept(self.steps, torch.randn_like)),
            patch.object(reference, "sample_orders", kept(self.orders, reference.sample_orders)),
        ):
            yield


class Replay:
    """Stands in for `marval.rng.ImageNoise`: hands out what was recorded, for K AR steps."""

    def __init__(self, tape: Tape, ar_steps: int, device: torch.device):
        self.device = device
        self.orders = tape.orders[0].to(device).flip(1)  # the reference lists the last token first
        self.batch, self.length = self.orders.shape
        self.generators = [None] * self.batch
        self.starts = [start.to(device) for start in tape.starts]
        self.counts = masked_counts(self.length, ar_steps)
        per_step = len(tape.steps) // ar_steps
        self.noises = iter([tape.steps[i * per_step : (i + 1) * per_step] for i in range(ar_steps)])

    def permutation(self, length: int) -> Tensor:
        assert length == self.length
        return self.orders

    def randn(self, *shape: int) -> Tensor:
        """The initial noise of all positions (B, L, D), then the noise of each AR step's chain (B, T, n, D)."""
        if len(shape) == 2:
            z = torch.full((self.batch, *shape), torch.nan, device=self.device)
            for start, (masked, after) in zip(self.starts, itertools.pairwise(self.counts), strict=True):
                target = self.orders[:, self.length - masked : self.length - after].sort(1).values
                drawn = start.view(self.batch, -1, shape[-1])
                z.scatter_(1, target[..., None].expand_as(drawn), drawn)
            return z
        steps, tokens, dim = shape
        block = torch.stack(next(self.noises)).to(self.device)
        return block[:, : self.batch * tokens].view(steps, self.batch, tokens, dim).transpose(0, 1)


# ---- drawing and timing


@dataclasses.dataclass
class Measured:
    """A generation of a batch."""

    tokens: Tensor
    """(B, L, D)"""
    steps: list[float]
    """Seconds of each AR step; one entry for all, if they were not timed."""
    parts: dict[str, float]
    """Seconds inside encoder, decoder and head, if they were timed."""


@dataclasses.dataclass
class Theirs:
    """The reference teacher."""

    reference: Any
    dtype: str
    name: str = "reference teacher"

    def draw(self, config: SamplingConfig, labels: Tensor, clocked: bool, seed: int = 0) -> Measured:
        reference, device = self.reference, labels.device
        seconds, starts = dict.fromkeys(("encoder", "decoder", "head"), 0.0), []

        def timed(part: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(*args: Any, **kwargs: Any) -> Tensor:
                synchronise(device)
                start = time.perf_counter()
                if part == "encoder":
                    starts.append(start)
                result = function(*args, **kwargs)
                synchronise(device)
                seconds[part] += time.perf_counter() - start
                return result

            return call

        names = {"encoder": (reference, "forward_mae_encoder"), "decoder": (reference, "forward_mae_decoder")}
        names["head"] = (reference.diffloss, "sample")
        with contextlib.ExitStack() as stack:
            stack.enter_context(environment(device))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bf16"))
            for part, (target, name) in names.items() if clocked else ():
                stack.enter_context(patch.object(target, name, timed(part, getattr(target, name))))
            synchronise(device)
            start = time.perf_counter()
            latents = reference.sample_tokens(
                bsz=len(labels), num_iter=config.ar_steps, cfg=config.guidance, cfg_schedule=config.guidance_schedule,
                labels=labels, temperature=config.temperature,
            )  # fmt: skip
            synchronise(device)
            end = time.perf_counter()
        times = [start, *starts[1:], end]  # an AR step ends where the next begins
        return Measured(patchify(latents, 1), [b - a for a, b in itertools.pairwise(times)], seconds)


@dataclasses.dataclass
class Ours:
    """A teacher or student of marval."""

    model: Pipeline
    name: str
    refresh_every: int = 1

    def draw(self, config: SamplingConfig, labels: Tensor, clocked: bool, seed: int = 0, noise: Any = None) -> Measured:
        device, ends = labels.device, []
        schedule = "constant" if self.model.student else config.guidance_schedule
        config = dataclasses.replace(config, refresh_every=self.refresh_every, guidance_schedule=schedule)
        seconds: dict[str, float] = {}
        with torch.inference_mode(), clocks(self.model) if clocked else contextlib.nullcontext() as parts:
            synchronise(device)
            start = time.perf_counter()
            noise = noise or ImageNoise(seed, list(range(len(labels))), device)
            clock = (lambda *_: ends.append(time.perf_counter())) if clocked else None
            tokens = self.model.draw_batch(config, labels, noise, each_ar_step=clock)
            synchronise(device)
            end = time.perf_counter()
            seconds |= parts or {}
        times: list[float] = [start, *ends[:-1], end]
        seconds.pop("tokenizer", None)
        return Measured(tokens.float(), [b - a for a, b in itertools.pairwise(times)], seconds)


def pipelines(
    network: MAR, guidance: float, dtype: str = "float32", graphs: bool = False, compile: bool = False
) -> dict[str, Pipeline]:
    """A teacher and a one-step student of the network's weights, copied if the dtype is another; they draw tokens.

    The network itself stays as it is: neither packed nor compiled.
    """
    c = network.config
    shared = [] if dtype == "bf16" else [*network.parameters(), *network.buffers()]
    network = copy.deepcopy(network, {id(tensor): tensor for tensor in shared})
    if dtype == "bf16":
        network.to_bf16()
    tokenizer = LatentTokenizer(
        image_size=c.grid * STRIDE, channels=c.token_dim, patch_size=1, stride=STRIDE, scale=1.0
    )
    names = [str(i) for i in range(c.num_classes)]
    sampling = SamplingConfig(ar_steps=1, guidance=guidance, guidance_schedule="linear")
    constant, student = dataclasses.replace(sampling, guidance_schedule="constant"), StudentConfig(guidance=guidance)
    return {
        "teacher": Pipeline(network, tokenizer, names, sampling).accelerate(graphs, compile),
        "student": Pipeline(network, tokenizer, names, constant, student).accelerate(graphs, compile),
    }


def contenders(
    code: ModuleType, network: MAR, head_steps: int, guidance: float, refresh_every: int, dtype: str, fast: bool
) -> list[Theirs | Ours]:
    """The reference and ours; the latter with a cached backbone, and, if ``fast``, compiled and from CUDA graphs."""
    found: list[Theirs | Ours] = [Theirs(reference_from(code, network, head_steps), dtype)]
    plain = pipelines(network, guidance, dtype)
    found += [Ours(model, name) for name, model in plain.items()]
    if refresh_every > 1:
        found += [Ours(m, f"{name}, full pass every {refresh_every}", refresh_every) for name, m in plain.items()]
    if fast:
        modes = {"compiled": {"compile": True}}
        if network.fake_latent.device.type == "cuda":
            modes |= {"graphs": {"graphs": True}, "compiled, graphs": {"compile": True, "graphs": True}}
        for mode, settings in modes.items():
            fast_ones = pipelines(network, guidance, dtype, **settings)
            found += [Ours(model, f"{name}, {mode}") for name, model in fast_ones.items()]
    return found


def tolerance(device: torch.device) -> float:
    """Of float32 tokens on this device."""
    return CUDA_TOLERANCE if device.type == "cuda" else TOLERANCE


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """Of a token (..., D), relative to its largest entry."""
    return float(((actual - expected).abs().amax(-1) / expected.abs().amax(-1)).max())


def compare(theirs: Theirs, ours: list[Ours], config: SamplingConfig, labels: Tensor) -> dict[str, float]:
    """Largest errors: of our exact teachers with the reference's random numbers, of students against the plain one.

    Raises:
        ValueError: an error is above the tolerance.
    """
    config = dataclasses.replace(config, ar_steps=min(config.ar_steps, CHECKED_AR_STEPS))
    tape = Tape()
    with tape.recording(theirs.reference):
        expected = theirs.draw(config, labels, clocked=False).tokens
    errors, first = {}, None
    for one in ours:
        if one.refresh_every > 1:
            continue
        if one.model.student is None:
            replayed = Replay(tape, config.ar_steps, labels.device)
            errors[one.name] = largest_error(one.draw(config, labels, False, noise=replayed).tokens, expected)
        else:
            drawn = one.draw(config, labels, clocked=False).tokens
            first = drawn if first is None else first
            errors[one.name] = largest_error(drawn, first)
    most = tolerance(labels.device) if theirs.dtype == "float32" else float("inf")
    for name, error in errors.items():
        if not error <= most:
            raise ValueError(f"{name}: a token differs by {error:.3g} of its largest entry, more than {most:g}")
    return errors


def measure(
    models: list[Theirs | Ours], config: SamplingConfig, labels: Tensor, generations: int, rates: dict[str, list[float]]
) -> dict[str, list[Measured]]:
    """Generations of all models in turn, after a short warm-up of each; the rates of the device between them."""
    device = labels.device
    on_cpu = device.type == "cpu"
    found: dict[str, list[Measured]] = {model.name: [] for model in models}
    cheap = dataclasses.replace(config, head_steps=2)
    short = dataclasses.replace(cheap, ar_steps=min(2, config.ar_steps))
    for model in models:
        if not on_cpu:
            model.draw(config, labels, clocked=False)
        elif isinstance(model, Ours):  # the comparison was the reference's warm-up
            model.draw(cheap if "compiled" in model.name else short, labels, clocked=True)
    dtype = torch.bfloat16 if isinstance(models[0], Theirs) and models[0].dtype == "bf16" else torch.float32
    for generation in range(generations):
        for model in models:
            rates["matmul"].append(matmul_rate(device, dtype, 0.3))
            found[model.name].append(model.draw(config, labels, clocked=on_cpu, seed=generation))
    rates["bandwidth"].append(copy_bandwidth(device))
    if not on_cpu:  # the split, in a generation of its own
        for model in models:
            found[model.name][0].parts = model.draw(config, labels, clocked=True).parts
    return found


def summary(
    found: dict[str, list[Measured]], models: list[Theirs | Ours], config: SamplingConfig, sizes: MARConfig, batch: int,
    rates: dict[str, list[float]], itemsize: int, on_cpu: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per model."""
    rate, moved = statistics.median(rates["matmul"]), statistics.median(rates["bandwidth"])
    rows = []
    reference = [m.steps for m in found["reference teacher"]]
    for model in models:
        measured = [m.steps for m in found[model.name]]
        medians = [statistics.median(step) for step in zip(*measured, strict=True)]
        teacher = isinstance(model, Theirs) or model.model.student is None
        loads = sampling_loads(
            sizes, config.ar_steps, batch, head_steps=config.head_steps if teacher else 1,
            guided=teacher and config.guidance != 1, itemsize=itemsize,
        )  # fmt: skip
        floor = floor_seconds(loads, rate, float("inf") if on_cpu else moved)["total"]
        pairs = [[a / b for a, b in zip(*steps, strict=True)] for steps in zip(reference, measured, strict=True)]
        whole = [sum(a) / sum(b) for a, b in zip(reference, measured, strict=True)]
        parts = [m.parts for m in found[model.name] if m.parts]
        scaled = [t / m for steps in measured for t, m in zip(steps, medians, strict=True)]
        rows.append(
            {
                "model": model.name, "batch": batch, "ar_steps": config.ar_steps,
                "head_steps": config.head_steps if teacher else 1,
                "seconds_per_image": sum(medians) / batch,
                "spread": median_and_spread(scaled)[1],
                "measurements": sum(map(len, measured)),
                "reference_over_this": sum(statistics.median(s) for s in zip(*reference, strict=True)) / sum(medians),
                "reference_over_this_by_generation": whole,
                "reference_over_this_by_step": [statistics.median(p) for p in zip(*pairs, strict=True)],
                "floor_seconds_per_image": floor / batch, "over_floor": sum(medians) / floor,
                "operations_per_image": sum(p.operations for p in by_part(loads).values()) / batch,
                "parts": {p: statistics.median(x[p] for x in parts) / batch for p in parts[0]} if parts else {},
                "step_seconds": medians,
            }
        )  # fmt: skip
    return rows


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [
        f"{'batch':>5}  {'model':<28}{'s/image':>10}{'spread':>8}{'n':>5}{'ref / it':>9}{'floor x':>9} |"
        f"{'encoder':>9}{'decoder':>9}{'head':>9}"
    ]
    for row in result["rows"]:
        parts = "".join(f"{row['parts'].get(part, float('nan')):>9.3g}" for part in ("encoder", "decoder", "head"))
        lines.append(
            f"{row['batch']:>5}  {row['model']:<28}{row['seconds_per_image']:>10.4g}{100 * row['spread']:>6.1f} %"
            f"{row['measurements']:>5}{row['reference_over_this']:>9.2f}{row['over_floor']:>9.2f} |{parts}"
        )
    m, s = result["machine"], result["settings"]
    lines += [f"same tokens as the reference: {name}, largest error {e:.1e}" for name, e in result["errors"].items()]
    lines += [
        f"{s['preset']}, K = {s['ar_steps']}, guidance {s['guidance']} linear, {s['head_steps']} steps, {s['dtype']}; "
        f"{m.get('gpu', m['cpu'])}, {m['threads']} threads",
        f"the reference: {s['reference_precision']}",
        f"floor: operations at {statistics.median(result['rates']['matmul']) / 1e12:.3g} TFLOP/s of matrix products, "
        "measured between the generations",
    ]
    return "\n".join(lines)


def digest(checkout: Path) -> str:
    """Which version of the reference this is."""
    return "models/mar.py sha256 " + hashlib.sha256((checkout / "models" / "mar.py").read_bytes()).hexdigest()[:16]


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Check and time all batch sizes; the file is written after each."""
    device, model = torch.device(args.device), SIZES[args.preset]
    config = SamplingConfig(
        ar_steps=min(args.ar_steps, model.num_tokens), head_steps=args.head_steps, guidance=args.guidance,
        guidance_schedule="linear",
    )  # fmt: skip
    code = load_code(args.reference)
    network = random_network(model, device)
    models = contenders(code, network, args.head_steps, args.guidance, args.refresh_every, args.dtype, args.fast)
    theirs, ours = models[0], [one for one in models if isinstance(one, Ours)]
    assert isinstance(theirs, Theirs)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    precision = "bf16 by autocast, its cache of weights on" if args.dtype == "bf16" else "float32, no autocast"
    settings |= {
        "ar_steps": config.ar_steps, "reference": digest(args.reference), "reference_precision": precision,
    }  # fmt: skip
    rates: dict[str, list[float]] = {"matmul": [], "bandwidth": []}
    result: dict[str, Any] = {
        "benchmark": "against_reference", "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/against_reference.py, with the options below", "settings": settings,
        "machine": machine(device), "versions": versions(device), "timm": "timm" not in stand_ins(), "errors": {},
        "rates": rates, "rows": [],
    }  # fmt: skip
    del settings["json"]
    for batch in args.batch:
        labels = torch.arange(batch, device=device) % model.num_classes
        errors = compare(theirs, ours, config, labels)
        if args.dtype == "bf16":
            exact = contenders(code, network, args.head_steps, args.guidance, 1, "float32", args.fast)
            assert isinstance(exact[0], Theirs)
            found = compare(exact[0], [one for one in exact if isinstance(one, Ours)], config, labels)
            errors |= {f"{name} (in float32)": error for name, error in found.items()}
            del exact
        result["errors"] = {n: max(e, result["errors"].get(n, 0.0)) for n, e in errors.items()}
        reset_peak(device)
        found = measure(models, config, labels, args.generations, rates)
        itemsize = 2 if args.dtype == "bf16" else 4
        result["rows"] += summary(found, models, config, model, batch, rates, itemsize, device.type == "cpu")
        result["peak_memory"] = peak_memory(device, args.fast)
        if args.json is not None:
            write_json(args.json, result)
    return result


def options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="checkout of LTH14/mar")
    parser.add_argument("--preset", default="mar-b", choices=list(SIZES))
    parser.add_argument("--ar-steps", type=int, default=16)
    parser.add_argument("--head-steps", type=int, default=100, help="denoising steps of the teachers")
    parser.add_argument("--guidance", type=float, default=2.9, help="at the last AR step, linear from 1")
    parser.add_argument("--batch", default="1,4", help="batch sizes, comma-separated")
    parser.add_argument("--generations", type=int, default=0, help="timed; 3 on the CPU, 11 on CUDA if left out")
    parser.add_argument("--refresh-every", type=int, default=4, help="of the cached backbone; 1 leaves it out")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bf16"], help="auto: bf16 on CUDA")
    parser.add_argument("--fast", action="store_true", help="also compiled blocks and, on CUDA, graphs")
    parser.add_argument("--json", type=Path, help="file of the results")
    args = parser.parse_args(words)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "bf16" if args.device == "cuda" else "float32"
    args.generations = args.generations or (11 if args.device == "cuda" else 3)
    try:
        args.batch = [int(part) for part in args.batch.split(",")]
    except ValueError:
        parser.error(f"--batch {args.batch!r} must be comma-separated integers")
    if min([*args.batch, args.ar_steps, args.head_steps, args.refresh_every]) < 1:
        parser.error("batch sizes and steps must be at least 1")
    return args


def main(words: list[str] | None = None) -> None:
    args = options(words)
    try:
        result = benchmark(args)
    except ValueError as error:
        sys.exit(f"against_reference: {error}")
    print(table(result))


if __name__ == "__main__":
    main()
