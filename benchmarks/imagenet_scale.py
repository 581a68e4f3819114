"""A MAR of full size from its published file to an exported student: time and memory, beside what --dry-run says.

    python benchmarks/imagenet_scale.py benchmarks/results/imagenet_scale.json

Files of full size in the layouts of the published ones, but with random weights, go through import-kl16, import-mar,
encode (of real photographs), train, distill (the head, everything), rl, sample, export and load: marval's own functions
and recipes, each stage in a process of its own. On a GPU also `--sizes mar-b,mar-l,mar-h`: batches of training are the
largest, up to a cap, that fit a GPU of 80 GB. Scratch files go to $TMPDIR: about 12 GB for mar-b, 50 GB for mar-h.
mar-b took 27 minutes on 2 busy cores; `--sizes tiny` shows in a few that all works. Needs the extras latents and
rewards, and ../shared (photographs, names of KL-16's tensors). `--stages rl` measures this one again, after those that
it starts from, and keeps the other rows of the file.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from marval import imagenet, importing, recipes
from marval.__main__ import main as marval
from marval.checkpoint import load_tensors, read_json, write_json
from marval.config import PRESETS, EvaluateConfig, MARConfig, RLConfig, RunConfig, StudentConfig
from marval.distill import distill
from marval.dryrun import GIB, machine_rate, plan
from marval.models import blip
from marval.models.mar import MAR
from marval.pipeline import Pipeline
from marval.reward_costs import IMAGEREWARD
from marval.rl import rl
from marval.run import Run, versions
from marval.train import train
from marval.update import autocast

SHARED = Path(__file__).resolve().parents[2] / "shared"
TINY = MARConfig(grid=2, width=32, depth=1, heads=2, buffer_size=4, head_width=32, head_depth=1)
SIZES = {"tiny": TINY, **PRESETS}
STRIDE = 16
"""Pixels per token of MAR."""
HEAD_STEPS = 100
"""Denoising steps of the teacher."""
LIMIT = 78 * GIB
"""What a GPU of 80 GB leaves to PyTorch's allocator."""
CLIP_B = {"text_config": {}, "vision_config": {}}
"""Sizes of CLIP ViT-B/32, transformers' defaults."""
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
CLIP_TINY = {"text_config": _TOWER, "vision_config": _TOWER}
BLIP_TINY = (
    {**_TOWER, "num_attention_heads": 1, "hidden_size": 64, "patch_size": 16, "image_size": 32},
    {**IMAGEREWARD[1], **_TOWER},
)


@dataclass(frozen=True)
class Case:
    """A stage with one size of model on one device, in a folder that holds the files of all stages."""

    size: str
    device: str
    root: Path
    stage: str = ""
    batch: int = 1
    ar_steps: int = 64
    steps: int = 1
    """Updates, with the warm-up."""

    @property
    def model(self) -> MARConfig:
        return SIZES[self.size]

    @property
    def recipe(self) -> str:
        return f"imagenet256-{self.size[-1]}" if self.size in PRESETS else "imagenet256-b"

    @property
    def guidance(self) -> float:
        return importing.GUIDANCE.get(self.size, 2.9)

    @property
    def warm_up(self) -> int:
        """Updates that are not timed."""
        return 1 if self.device == "cpu" else 2


# ---- files as they are published


def random_tensor(name: str, shape: list[int], salt: str = "") -> Tensor:
    """The rule of golden/kl16: matrices keep the variance, norms are near the identity, biases small."""
    r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32((salt + name).encode())))
    if r.ndim > 1:
        return r / r[0].numel() ** 0.5
    return 0.1 * r + float(name.endswith("weight"))


def mar_checkpoint(model: MARConfig) -> dict[str, Any]:
    """What the published checkpoint-last.pth hold: raw and averaged parameters, epoch, arguments."""
    with torch.device("meta"):
        names = {n.replace("head.", "diffloss.net."): list(t.shape) for n, t in MAR(model).state_dict().items()}
    raw, average = (
        OrderedDict((name, random_tensor(name, shape, salt)) for name, shape in names.items()) for salt in ("raw", "")
    )
    args = argparse.Namespace(
        diffloss_d=model.head_depth, diffloss_w=model.head_width, buffer_size=model.buffer_size,
        vae_embed_dim=model.token_dim, vae_stride=STRIDE, patch_size=1,
    )  # fmt: skip
    return {"model": raw, "model_ema": dict(average), "epoch": 799, "args": args}


def write_clip(folder: Path, sizes: dict[str, Any]) -> None:
    """A CLIP of random weights in transformers' files, for the reward; its words are single characters."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    config: Any = transformers.CLIPConfig(**sizes)
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [f"unused{i}" for i in range(config.text_config.vocab_size - len(words) - 2)]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)


def write_imagereward(folder: Path, vision: dict[str, Any], text: dict[str, Any]) -> None:
    """An ImageReward of random weights in the published files; its words are those of ImageNet's prompts."""
    import transformers

    ours = nn.ModuleDict(dict(zip(("vision", "text", "head"), blip.networks(transformers, vision, text), strict=True)))
    tensors: dict[str, Tensor] = {}
    for name, tensor in ours.state_dict().items():
        if name.startswith("vision."):
            for part, replacement in blip.VISION_PARTS.items():
                name = name.replace(replacement, part)
        start = next(start for start, replacement in blip.STARTS.items() if name.startswith(replacement))
        name = start + name.removeprefix(blip.STARTS[start])
        tensors[name] = random_tensor(name, list(tensor.shape))
    folder.mkdir()
    torch.save(tensors, folder / blip.WEIGHTS)
    write_json(folder / blip.TEXT_CONFIG, text)
    prompts = " ".join([RLConfig().prompt, *imagenet.names()]).lower()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(re.findall(r"\w+|[^\w\s]", prompts)))]
    words += [f"[unused{i}]" for i in range(text["vocab_size"] - 2 - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")


def write_files(case: Case, images: Path, kl16_keys: Path, count: int) -> None:
    """checkpoint-last.pth, kl16.ckpt, clip/ and a head on it, imagereward/, and photographs of ``count`` classes."""
    shapes = json.loads(kl16_keys.read_text())["state_dict_shapes"]
    torch.save({"model": {n: random_tensor(n, shape) for n, shape in shapes.items()}}, case.root / "kl16.ckpt")
    torch.save(mar_checkpoint(case.model), case.root / "checkpoint-last.pth")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write_clip(case.root / "clip", CLIP_B if case.size in PRESETS else CLIP_TINY)
    write_imagereward(case.root / "imagereward", *(IMAGEREWARD if case.size in PRESETS else BLIP_TINY))
    torch.save({"weight": torch.full((1, 512), 0.1), "bias": torch.zeros(1)}, case.root / "aesthetic.pth")
    folders = sorted(path for path in images.iterdir() if path.is_dir())
    for folder in folders[:: max(1, len(folders) // count)][:count]:
        shutil.copytree(folder, case.root / "images" / folder.name)


# ---- stages; each runs in its own process, and returns what it measured


def import_kl16(case: Case) -> dict[str, Any]:
    return {"seconds": seconds(lambda: command("import-kl16", case.root / "kl16.ckpt", out=case.root / "kl16"))}


def import_mar(case: Case) -> dict[str, Any]:
    given = {"preset": case.size} if case.size in PRESETS else {"heads": case.model.heads}
    folder, file = case.root / "teacher", case.root / "checkpoint-last.pth"
    return {"seconds": seconds(lambda: command("import-mar", file, out=folder, tokenizer=case.root / "kl16", **given))}


def check_import(case: Case) -> bool:
    """Whether the imported tensors are the averaged ones of the checkpoint, to the bit."""
    tensors = load_tensors(case.root / "teacher" / "model.safetensors")
    names = {name: name.replace("head.", "diffloss.net.") for name in tensors}
    return all(torch.equal(t, random_tensor(names[n], list(t.shape))) for n, t in tensors.items())


def encode(case: Case) -> dict[str, Any]:
    """Whole verb: loading, both mirror images, and the reconstructions of all."""
    folders = {"images": case.root / "images", "tokenizer": case.root / "kl16", "out": case.root / "latents"}
    size = case.model.grid * STRIDE
    spent = seconds(lambda: command("encode", **folders, image_size=size, batch=case.batch, device=case.device))
    count = json.loads((folders["out"] / "index.json").read_text())["num_images"]
    return {"seconds": spent * case.batch / count, "images": count}


def update(case: Case) -> dict[str, Any]:
    """Mean seconds of an update of train, distill or rl after the warm-up; the last line of metrics.jsonl, or
    the last two of rl, which has one of held-out images."""
    _, config, _, _ = planned(case)
    out = case.root / case.stage.replace(" ", "-")
    shutil.rmtree(out, ignore_errors=True)  # of a batch that was too large
    loops: dict[str, Callable[[], Any]] = {
        "train": lambda: train(config, out),
        "distill head": lambda: distill(config, case.root / "teacher", out),
        "distill all": lambda: distill(config, case.root / "teacher", out),
        "rl": lambda: rl(config, case.root / "distill-head", out),
    }
    ends = update_ends(loops[case.stage])
    assert len(ends) == case.steps
    last: dict[str, Any] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines()[-2 if case.stage == "rl" else -1 :]:
        last |= {name: value for name, value in json.loads(line).items() if isinstance(value, float | int)}
    if case.stage != "distill head":  # the next stages start from this one
        shutil.rmtree(out)
    between = [b - a for a, b in pairwise(ends[case.warm_up - 1 :])]
    return {"seconds": float(np.mean(between)), "timed_updates": len(between), "metrics": last}


def update_ends(loop: Callable[[], Any]) -> list[float]:
    """Times at which the updates of a loop ended, for a loop that logs each: to log, it waits for the device."""
    ends, log = [], Run.log

    def logged(run: Run, step: int, **values: Any) -> dict[str, float]:
        row = log(run, step, **values)
        if "reward_heldout" not in values:
            ends.append(time.perf_counter())
        return row

    with patch.object(Run, "log", logged):
        loop()
    return ends


def sample(case: Case) -> dict[str, Any]:
    """Seconds of a batch of images, decoding included, after a small warm-up."""
    device = torch.device(case.device)
    settings, few, folder = {}, {"ar_steps": 1}, "distill-head"
    if is_teacher(case):
        settings = {"head_steps": HEAD_STEPS, "guidance": case.guidance, "guidance_schedule": "linear"}
        few, folder = {"ar_steps": 1, "head_steps": 1}, "teacher"
    model = Pipeline.load(case.root / folder, device)
    classes = list(range(case.batch))
    with autocast(RunConfig().precision, device):
        model.sample(classes, **{**settings, **few})
        start = time.perf_counter()
        images = model.sample(classes, ar_steps=case.ar_steps, batch_size=case.batch, **settings)
    spent = time.perf_counter() - start
    np.save(case.root / "sampled.npy", images)
    return {"seconds": spent}


def export(case: Case) -> dict[str, Any]:
    """Also whether the exported model draws what the student of the last stage drew."""
    folders = {"model": case.root / "distill-head", "out": case.root / "exported"}
    spent = seconds(lambda: command("export", **folders, licence="cc0-1.0"))
    device = torch.device(case.device)
    model = Pipeline.load(folders["out"], device)
    with autocast(RunConfig().precision, device):
        images = model.sample(list(range(case.batch)), ar_steps=case.ar_steps, batch_size=case.batch)
    return {"seconds": spent, "equal": bool(np.array_equal(images, np.load(case.root / "sampled.npy")))}


STAGES: dict[str, Callable[[Case], dict[str, Any]]] = {
    "import-kl16": import_kl16, "import-mar": import_mar, "encode": encode, "train": update, "distill head": update,
    "distill all": update, "rl": update, "sample teacher": sample, "sample student": sample, "export": export,
}  # fmt: skip


STARTS = ("import-kl16", "import-mar", "encode", "distill head")
"""Stages whose folders the others read."""


def is_teacher(case: Case) -> bool:
    return case.stage == "sample teacher"


def command(verb: str, *positional: Path, **flags: Any) -> None:
    """`marval VERB ...`, as from the command line, but errors are raised."""
    named = [word for flag, value in flags.items() for word in (f"--{flag.replace('_', '-')}", str(value))]
    with patch.dict(os.environ, MARVAL_TRACEBACK="1"):
        marval([verb, *map(str, positional), *named])


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---- plans


def planned(case: Case) -> tuple[Any, Any, MARConfig, StudentConfig | None]:
    """Verb, settings, sizes and student of a stage, as `marval.dryrun.plan` takes them; the stage runs the same."""
    student = recipes.DISTILL[case.recipe]().student
    if case.stage.startswith("sample"):
        given: dict[str, Any] = {"num_images": max(2, case.batch), "batch": case.batch, "ar_steps": f"{case.ar_steps}"}
        if is_teacher(case):
            given |= {"guidance": f"{case.guidance}", "guidance_schedule": "linear", "head_steps": f"{HEAD_STEPS}"}
        config = EvaluateConfig(device=case.device, **given)
        return "evaluate", config, case.model, None if is_teacher(case) else student
    common: dict[str, Any] = {
        "device": case.device, "batch": case.batch, "accumulate": 1, "steps": case.steps, "log_every": 1,
        "sample_every": 0, "save_every": 10**6,
    }  # fmt: skip
    data = {"data": str(case.root / "latents"), "image_size": case.model.grid * STRIDE}
    if case.stage == "train":
        recipe = recipes.TRAIN[case.recipe]()
        model = dataclasses.replace(case.model, dropout=recipe.model.dropout)
        sampling = dataclasses.replace(recipe.sampling, ar_steps=case.ar_steps)
        return "train", dataclasses.replace(recipe, model=model, sampling=sampling, **data, **common), model, None
    if case.stage == "rl":
        clip = case.root / "clip"  # in the place of every reward that is one, or a head on one
        held_out = f"clip:{clip},imagereward:{case.root / 'imagereward'},hps:{clip}"
        held_out += f",aesthetic:{clip}:{case.root / 'aesthetic.pth'}"
        own = {"reward": f"pickscore:{clip}", "held_out": held_out, "eval_images": case.batch, "patience": 0}
        own |= {"ar_steps": case.ar_steps, "select": "reward"}
        return "rl", dataclasses.replace(recipes.RL[case.recipe](), **own, **common), case.model, student
    own = {"trained": case.stage.split()[1], "ar_steps": case.ar_steps}
    return "distill", dataclasses.replace(recipes.DISTILL[case.recipe](), **own, **data, **common), case.model, None


def predict(case: Case) -> dict[str, float]:
    """Bytes, and operations of an update or of a batch of images; nothing for what --dry-run does not plan."""
    if STAGES[case.stage] not in (update, sample):
        return {}
    verb, config, model, student = planned(case)
    found = plan(verb, config, model, student=student, this_machine=False)
    return {"predicted_memory": found["memory"]["total"], "operations": case.batch * found["operations"]["image"]}


def fit(case: Case) -> tuple[Case, dict[str, float]]:
    """The case and its plan. On a GPU an update gets the largest batch, up to the case's, whose plan is within the
    limit: memory grows linearly with the batch."""
    if case.device == "cuda" and STAGES[case.stage] is update:
        few, many = (predict(dataclasses.replace(case, batch=batch))["predicted_memory"] for batch in (8, 16))
        case = dataclasses.replace(case, batch=max(1, min(case.batch, int(8 + (LIMIT - few) / (many - few) * 8))))
    return case, predict(case)


# ---- measuring


def fresh(function: Callable[..., Any], *args: Any) -> Any:
    """Call the function in a process of its own, so that memory is that of this call alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except (KeyboardInterrupt, SystemExit):  # the pool would wait for the end of the stage
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def at_once(function: Callable[..., Any], items: list[Any]) -> list[Any]:
    """The function of each item, in as many processes as there are cores."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(function, items))


def measure(case: Case) -> dict[str, Any]:
    """The stage, with its peak of memory: of the process on the CPU, of the allocator on a GPU."""
    if case.device == "cuda":
        share = LIMIT / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = STAGES[case.stage](case)
    found["dtype"] = "bf16" if case.device == "cuda" else "float32"
    found["threads"], found["load_average"] = torch.get_num_threads(), os.getloadavg()[0]
    found["process_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["process_memory_before"] = before
    found["peak_memory"] = found["process_memory"]
    if case.device == "cuda" and torch.cuda.max_memory_allocated():  # imports need no GPU
        found["peak_memory"] = torch.cuda.max_memory_allocated()
        found["reserved_memory"] = torch.cuda.max_memory_reserved()
    return found


def cases(size: str, device: str, root: Path) -> list[Case]:
    """All stages in their order. On a GPU the batches of training are caps."""
    small = device == "cpu"
    case = Case(size, device, root)

    def stage(name: str, batch: int = 1, **changes: Any) -> Case:
        return dataclasses.replace(case, stage=name, batch=batch, **changes)

    found = [stage("import-kl16"), stage("import-mar"), stage("encode", 2 if small else 16)]
    found.append(stage("train", 2 if small else 256, steps=3 if small else 12))
    shared = recipes.DISTILL[case.recipe]().context_updates  # their mean time needs all of them
    for name in ("distill head", "distill all"):
        found.append(stage(name, 2 if small else 256, steps=1 + shared if small else 2 + 3 * shared))
    found.append(stage("rl", 1 if small else 32, steps=2 if small else 4, ar_steps=4 if small else 64))
    for name in ("sample teacher", "sample student"):
        found += [stage(name, batch, ar_steps=k) for batch in ((1,) if small else (1, 64)) for k in (64, 16)]
    found.append(dataclasses.replace(found[-1], stage="export"))
    return [dataclasses.replace(c, ar_steps=min(c.ar_steps, c.model.num_tokens)) for c in found]


def run_stage(case: Case, predicted: dict[str, float], rate: float, call: Callable[..., Any]) -> dict[str, Any]:
    """The row of a stage. What does not fit a GPU after all gets a smaller batch."""
    is_update, fitted = STAGES[case.stage] is update, case.batch
    while True:
        try:
            found = call(measure, case)
            break
        except torch.OutOfMemoryError:
            if case.batch == 1 or not is_update:
                raise
            case = dataclasses.replace(case, batch=case.batch - max(1, case.batch // 16))
    if case.batch < fitted:
        predicted = call(predict, case)
    if case.stage == "import-mar":
        found["equal"] = call(check_import, case)
    row: dict[str, Any] = {"size": case.size, "stage": case.stage, "device": case.device}
    if predicted or case.stage == "encode":
        row |= {"batch": case.batch, "images_per_second": case.batch / found["seconds"]}
        row["tokens_per_second"] = case.model.num_tokens * row["images_per_second"]
    if predicted:
        row |= {**predicted, "predicted_seconds": predicted["operations"] / rate}
        if case.stage != "train":
            row["ar_steps"] = case.ar_steps
    return row | found


def table(rows: list[dict[str, Any]]) -> str:
    """One line per stage: seconds of the verb, of a batch, or of an update; peak memory. "said" is what --dry-run
    predicts, time from the number of operations at the rate of matrix products."""
    head = f"{'size':<6} {'stage':<15}{'batch':>6}{'K':>4}{'seconds':>10}{'said':>9}{'images/s':>10}{'tokens/s':>10}"
    lines = [f"{head}{'GiB':>8}{'said':>8}"]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['size']:<6} {row['stage']:<15}  {row['error']}"[:120])
            continue
        cells = [
            (row.get("batch"), 6, "d", 1), (row.get("ar_steps"), 4, "d", 1), (row["seconds"], 10, ".3g", 1),
            (row.get("predicted_seconds"), 9, ".3g", 1), (row.get("images_per_second"), 10, ".3g", 1),
            (row.get("tokens_per_second"), 10, ".0f", 1), (row["peak_memory"], 8, ".2f", GIB),
            (row.get("predicted_memory"), 8, ".2f", GIB),
        ]  # fmt: skip
        text = "".join(f"{'' if v is None else format(v if u == 1 else v / u, f):>{w}}" for v, w, f, u in cells)
        checked = {True: "  equal", False: "  NOT EQUAL", None: ""}[row.get("equal")]
        lines.append(f"{row['size']:<6} {row['stage']:<15}{text}{checked}".rstrip())
    return "\n".join(lines)


def benchmark(
    out: Path, sizes: list[str], device: str, images: Path, kl16_keys: Path, call: Callable[..., Any] = fresh,
    each: Callable[..., Any] = at_once, again: tuple[str, ...] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """Run all stages; ``out`` is written after each. ``call`` a stage in a new process, and ``each`` of the plans.

    If stages run ``again``, those before them run too, but only the rows of the former are replaced in ``out``, and
    only by what could be measured.

    Returns:
        The rows of ``out``, and errors of stages that ran again.
    """
    rate = call(machine_rate)
    about: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "versions": call(versions, torch.device(device)), "matmul_rate": rate,
        "memory_limit": LIMIT if device == "cuda" else None,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    replaced: set[tuple[str, str]] = set()
    if again:
        about = read_json(out)
        rows = about.pop("rows")
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="marval-scale-") as folder:
            call(write_files, Case(size, device, Path(folder)), images, kl16_keys, 4 if device == "cpu" else 16)
            for case, predicted in each(fit, cases(size, device, Path(folder))):
                if again and case.stage not in (*again, *STARTS):
                    continue
                try:
                    row = run_stage(case, predicted, rate, call)
                except Exception as error:  # of any stage: the others still run
                    reason = f"{type(error).__name__}: {error}".replace(folder, "").splitlines()[0]
                    row = {"size": size, "stage": case.stage, "error": reason}
                print(table([row]).splitlines()[-1], flush=True)
                if case.stage == "import-mar":  # room on the disk
                    (Path(folder) / "checkpoint-last.pth").unlink()
                if again and (case.stage not in again or "error" in row):
                    failed += [row] if "error" in row else []
                    continue
                if again and (size, case.stage) not in replaced:
                    rows = [row for row in rows if (row["size"], row["stage"]) != (size, case.stage)]
                    replaced.add((size, case.stage))
                rows.append(row | ({"date": time.strftime("%Y-%m-%d")} if again else {}))
                rows.sort(key=lambda row: (list(SIZES).index(row["size"]), list(STAGES).index(row["stage"])))
                write_json(out, {**about, "rows": rows})
    return rows + failed


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file of the results")
    parser.add_argument("--sizes", default="mar-b", help=f"comma-separated: {', '.join(SIZES)}")
    parser.add_argument("--stages", default="", help=f"measure these again, comma-separated: {', '.join(STAGES)}")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument(
        "--images", type=Path, default=SHARED / "data" / "imagenet_photos", help="folders by WordNet id"
    )
    parser.add_argument("--kl16-keys", type=Path, default=SHARED / "golden" / "kl16" / "keys.json")
    args = parser.parse_args(words)
    sizes = args.sizes.split(",")
    for size in sizes:
        if size not in SIZES:
            parser.error(f"unknown size {size!r}: choose from {', '.join(SIZES)}")
    again = tuple(stage for stage in args.stages.split(",") if stage)
    for stage in again:
        if stage not in STAGES:
            parser.error(f"unknown stage {stage!r}: choose from {', '.join(STAGES)}")
    if again and not args.out.is_file():
        parser.error(f"{args.out} does not exist: without --stages all are measured into it")
    for path in (args.images, args.kl16_keys):
        if not path.exists():
            parser.error(f"{path} does not exist: name it with --images or --kl16-keys")
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the scratch files go, and the process of the stage
    rows = benchmark(args.out, sizes, device, args.images, args.kl16_keys, again=again)
    print(f"\n{table(rows)}")
    if any("error" in row or row.get("equal") is False for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
