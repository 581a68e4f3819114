"""What a run would need, as ``--dry-run`` says it: parameters, memory per process, operations, time.

Found without memory or data by running the loops' own losses on the meta device (`marval.needs`).
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import torch

from marval import recipes
from marval.checkpoint import tensor_shapes
from marval.config import MARConfig, SamplingConfig, StudentConfig, from_dict
from marval.costs import without_data
from marval.floor import H200, matmul_rate
from marval.model_files import read_config
from marval.needs import Needs, distill_needs, evaluate_needs, rl_needs, train_needs
from marval.reference import chunk_rows, num_chunks
from marval.sampling_costs import decoder_of, images_in_rounds
from marval.shipped import model_folder
from marval.update_costs import Share

Verb = Literal["train", "distill", "rl", "evaluate"]
GIB = 2**30
H200_SHARE: dict[Verb, float] = {"train": 0.33, "distill": 0.33, "rl": 0.22, "evaluate": 0.33}
"""Share of the rate of its matrix products in bf16 that a run reaches on an H200.

Measured for MAR-B's training and distillation (docs/performance.md; distillation with one update per context). Those of
`ASSUMED` were never measured: evaluation as training; RL, which waits for its launches, twice the 11 % that were
measured with 16 images at a time, as if it had `RL_PART` of them, though the recipes' accumulate leaves it fewer."""
ASSUMED: tuple[Verb, ...] = ("rl", "evaluate")
RL_PART = 32
"""Images at a time for which the share of RL is assumed; with fewer it takes longer than planned."""


def plan(
    verb: Verb, config: Any, sizes: MARConfig, processes: int = 1, *, student: StudentConfig | None = None,
    sampling: SamplingConfig | None = None, whole_teacher: bool = False, pixels: bool | None = None,
    images_per_epoch: int | None = None, this_machine: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """What a run with these settings needs; takes seconds and no memory worth mentioning.

    Args:
        config: TrainConfig, DistillConfig, RLConfig or EvaluateConfig, as the verb wants it.
        sizes: of the MAR, with the data's grid, token_dim and num_classes.
        processes: of torchrun; with ``config.shard`` weights, gradients, optimizer and average are divided by it.
        student: of the model that `rl` starts from or `evaluate` measures; None there is a teacher (`rl`: the default).
        sampling: what the model that `evaluate` measures draws with unless the settings say otherwise.
        whole_teacher: the teacher of the student that `rl` starts from has a backbone of its own (distilled whole).
        pixels: the tokens are patches of pixels, as the tokenizer of a model's folder says. None: those of 16 channels
            are (grey 4x4 patches, as of the recipe fashion-mnist), but for ImageNet's 1,000 classes (imagenet256-*).
        images_per_epoch: training images; 1,281,167 by default if the classes are ImageNet's.
        this_machine: also measure this machine's rate of matrix products, for about a second.

    Returns:
        Plain JSON: ``parameters`` (counts), ``memory`` (bytes of one process; their ``total`` holds ``gradients`` and
        ``activations``, or what is needed ``between`` updates in their place, if that is more), ``batch``,
        ``steps``, ``images``, ``epochs``, ``operations`` (per image, and of the run), ``time`` (seconds per machine),
        ``notes``.

    Raises:
        ValueError: the batch is too small for the processes and parts.
    """
    if processes < 1:
        raise ValueError(f"the number of processes must be at least 1, got {processes}")
    on_cuda = getattr(config, "device", "auto") != "cpu"
    bf16 = config.precision == "bf16" or (config.precision == "auto" and on_cuda)
    settings = dataclasses.replace(config, precision="bf16" if bf16 else "float32")
    share, parts = share_of(verb, config, processes)
    with without_data():
        if pixels is None:
            pixels = sizes.token_dim == 16 and sizes.num_classes != 1000
        decoder, still = decoder_of(sizes, pixels), dataclasses.replace(sizes, dropout=0.0)
        if verb == "train":
            needs = train_needs(settings, sizes, share, decoder)
        elif verb == "distill":
            needs = distill_needs(settings, still, share, decoder)
        elif verb == "rl":
            needs = rl_needs(settings, still, share, decoder, student or StudentConfig(), whole_teacher)
        else:
            needs = evaluate_needs(settings, sizes, share, decoder, student, sampling)
    if verb == "rl" and share.part < RL_PART:
        measured = "11 % with 16 images at a time on a GPU"
        needs.notes.append(f"RL waits for its launches: measured {measured}; with parts of {share.part} expect longer")
    sharded = bool(getattr(config, "shard", False)) and processes > 1
    if verb == "evaluate":
        runs = len(config.settings())
        images = runs * config.num_images
        steps = runs * sum(math.ceil(n / share.part) for n in images_in_rounds(config.num_images, processes))
    else:
        images, steps = config.steps * share.total, config.steps
    if images_per_epoch is None and getattr(config, "classes", "") == "imagenet":
        images_per_epoch = recipes.IMAGENET_IMAGES
    read = images / getattr(config, "context_updates", 1)
    operations = needs.operations * images + needs.looks
    time = {}
    if this_machine:
        rate = machine_rate()
        time["this machine"] = {"rate": rate, "seconds": operations / rate}
    rate = H200_SHARE[verb] * H200[0] * processes
    time["H200"] = {"rate": rate, "seconds": (operations + needs.surplus) / rate}
    return {
        "verb": verb, "processes": processes, "sharded": sharded, "precision": settings.precision,
        "parameters": {"total": needs.parameters, "trained": needs.trained, "frozen": needs.helpers},
        "memory": memory_of(needs, processes if sharded else 1),
        "batch": {"total": share.total, "process": share.rows, "part": share.part, "parts": parts},
        "steps": steps, "images": images,
        "epochs": read / images_per_epoch if images_per_epoch and verb != "evaluate" else None,
        "operations": {"image": needs.operations, "run": operations},
        "time": time,
        "notes": needs.notes,
    }  # fmt: skip


def print_plan(verb: Verb, recipe: str, config: Any, folder: Path | None, processes: int) -> None:
    """Print what a run needs that starts from the model in the folder, or, without one, from what the recipe says.

    Raises:
        ValueError: as `plan`; no model in the folder; or data of a size that nothing says.
    """
    sampling = None
    if folder is None:
        sizes, student, pixels = recipes.sizes(recipe, config), None, None
        whole = verb == "rl" and recipes.DISTILL[recipe]().trained == "all"
    else:
        folder = model_folder(folder)
        sizes, student, made = read_config(folder)
        sampling = from_dict(SamplingConfig, made["sampling"])
        pixels, scores = made["tokenizer"]["kind"] == "pixels", folder / "scores.safetensors"
        whole = verb == "rl" and scores.exists() and "teacher.mask_token" in tensor_shapes(scores)
    planned = plan(
        verb, config, sizes, processes, student=student, sampling=sampling, whole_teacher=whole, pixels=pixels
    )
    print(table(planned))


def share_of(verb: Verb, config: Any, processes: int) -> tuple[Share, int]:
    """What one process works through at a time, and in how many parts.

    Raises:
        ValueError: an update's batch is too small for the processes and parts.
    """
    if verb == "evaluate":  # in whole chunks, for which processes may be left without one
        rows = min(config.batch, len(chunk_rows(0, config.num_images)))
        total = min(config.num_images, rows * min(processes, num_chunks(config.num_images)))
        return Share(rows, rows, 1, total, processes), 1
    batch, parts = config.batch, config.accumulate
    if batch < processes * parts:
        raise ValueError(f"batch {batch} is too small for {processes} processes with {parts} parts each: raise it")
    rows = math.ceil(batch / processes)
    return Share(rows, math.ceil(rows / parts), min(parts, 2), batch, processes), parts


def memory_of(needs: Needs, split: int) -> dict[str, int]:
    """Bytes of one process by kind, and their total, with the weights split over ``split`` processes (FSDP2)."""
    memory = dict(needs.memory)
    if split > 1:
        for name in ("weights", "gradients", "optimizer", "average"):
            memory[name] = math.ceil(memory[name] / split)
        memory["gradients"] = math.ceil(needs.all_gradients / split)  # FSDP2 makes those of all networks at once
        memory["gathered"] = 3 * needs.largest_block  # a block, the next one on its way, and a block's gradient
    working = memory["gradients"] + memory["activations"]
    memory["total"] = sum(memory.values()) - working + max(working, needs.between)
    if needs.between > working:
        memory["between"] = needs.between
    return memory


def machine_rate() -> float:
    """Operations per second of matrix products here: bf16 on a CUDA GPU, float32 on the CPU; measured."""
    cuda = torch.cuda.is_available()
    return matmul_rate(torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32)


def _duration(seconds: float) -> str:
    """Seconds in the unit in which they can be read."""
    for unit, name in ((365.25 * 86400, "years"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} seconds"


def table(plan: dict[str, Any]) -> str:
    """A plan as text, for people."""
    memory, batch, operations, parameters = (plan[x] for x in ("memory", "batch", "operations", "parameters"))
    held = "split over the processes (FSDP2)" if plan["sharded"] else "whole in each process"
    meaning = {
        "weights": held,
        "gradients": "of one network at a time",
        "optimizer": "two moments per trained weight",
        "average": "of the trained weights, for evaluation",
        "activations": f"largest sum during an update of {batch['part']} images, temporaries included",
        "frozen": ", ".join(f"{name} {count / 1e6:,.0f} M" for name, count in parameters["frozen"].items()),
        "gathered": "two whole blocks and a block's gradient (estimate)",
        "between": "instead of gradients and activations, while images are drawn or an average is saved",
        "total": "without PyTorch's own needs and fragmentation: leave 10 % free",
    }
    processes = f"{plan['processes']} process{'es' if plan['processes'] > 1 else ''}"
    parts = f", in {batch['parts']} parts of {batch['part']}" if batch["parts"] > 1 else ""
    epochs = f" ({plan['epochs']:,.1f} epochs)" if plan["epochs"] else ""
    made = "planned on the meta device: no data was read and no network made in memory"
    lines = [
        f"{plan['verb']}, {processes}, {plan['precision']}: {made}",
        f"  parameters   {parameters['total'] / 1e6:,.1f} M, {parameters['trained'] / 1e6:,.1f} M of them trained",
        f"  batch        {batch['total']:,} images, {batch['process']:,} per process{parts}",
        "  memory per process",
    ]
    lines += [f"    {name:<12}{size / GIB:8.2f} GiB  {meaning[name]}" for name, size in memory.items() if size]
    lines += [
        f"  steps        {plan['steps']:,}",
        f"  images       {plan['images']:,}{epochs}",
        f"  operations   {operations['image'] / 1e12:,.3f} T per image, {operations['run'] / 1e18:,.4g} E in all",
    ]
    for name, entry in plan["time"].items():
        if name == "H200":
            share = f"{'an assumed ' if plan['verb'] in ASSUMED else ''}{H200_SHARE[plan['verb']]:.0%}"
            how = f"{processes} on H200, each at {share} of {H200[0] / 1e12:.0f} TFLOP/s"
        else:
            how = f"this machine alone at its measured {entry['rate'] / 1e12:.3g} TFLOP/s of matrix products"
        lines.append(f"  time         {_duration(entry['seconds'])} with {how}")
    return "\n".join([*lines, *(f"  note         {note}" for note in plan["notes"])])
