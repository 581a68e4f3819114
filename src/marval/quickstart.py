"""The whole path on real data in minutes: train a teacher, distil it, align it, measure all three, show it."""

import json
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from marval import recipes
from marval.bench import seconds_per_image
from marval.checkpoint import read_json, save_arrays, write_json
from marval.config import DistillConfig, RLConfig, TrainConfig, check, check_types, filled, say, to_dict
from marval.data import load_dataset
from marval.distill import distill, make_student
from marval.draw import head_evaluations_per_token, sample_in_turn
from marval.features import FeatureNetwork, classifier_features
from marval.images import image_grid, save_png
from marval.measure import weights_digest
from marval.metrics import Moments, frechet_distance, moments_of
from marval.models.classifier import Classifier
from marval.pipeline import Pipeline
from marval.report import write_report
from marval.rl import rl
from marval.run import versions, writable_folder
from marval.shipped import MODELS
from marval.tables import check_matplotlib
from marval.train import train
from marval.train_classifier import train_classifier

STAGES = {"train": recipes.digits_teacher, "distill": recipes.digits_student, "rl": recipes.digits_aligned}
"""The field of each stage's settings, and its recipe."""
OWN_CLASSIFIERS = "the quickstart trains its own two: give another to marval rl and the finished student"
OWN_DATA = "the quickstart is for the digits that come with marval: give others to marval train and marval distill"
ITS_OWN = {
    "train.data": OWN_DATA,
    "distill.data": OWN_DATA,
    "rl.classifier": OWN_CLASSIFIERS,
    "rl.judge": OWN_CLASSIFIERS,
}
"""Flags of settings that are the quickstart's own, and what to do instead of changing them."""


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Every setting of the quickstart."""

    seed: int = 0
    """Seed of all stages: every random number derives from it."""
    num_images: int = 5000
    """Images drawn from each model for its numbers."""
    latency_repeats: int = 10
    """Rounds timed for each latency, after a warm-up; the median batch counts."""
    classifier_epochs: int = 20
    """Epochs of the two classifiers."""
    train: TrainConfig = field(default_factory=STAGES["train"])
    """The teacher."""
    distill: DistillConfig = field(default_factory=STAGES["distill"])
    """The student."""
    rl: RLConfig = field(default_factory=STAGES["rl"])
    """The alignment."""

    def __post_init__(self) -> None:
        check_types(self)
        check(self.num_images >= 100, f"num_images must be at least 100, got {self.num_images}")
        check(self.latency_repeats >= 1, f"latency_repeats must be at least 1, got {self.latency_repeats}")
        for stage, recipe in STAGES.items():
            seed = getattr(self, stage).seed
            known = seed in (recipe().seed, self.seed)
            check(known, f"--{stage}.seed {seed}: the quickstart has one seed for all stages: give --seed {seed}")
        for flag, remedy in ITS_OWN.items():
            stage, _, name = flag.partition(".")
            given, own = getattr(getattr(self, stage), name), getattr(STAGES[stage](), name)
            check(given == own, f"--{flag} {given}: {remedy}")


def quickstart(config: QuickstartConfig, out: Path, resume: bool = False) -> dict[str, Any]:
    """Run everything into ``out``: models, results.json, samples.npz, report.html. Returns the results."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("the quickstart is one process: start it without torchrun")
    check_matplotlib()  # fail now, not at the end
    stages = {name: replace(getattr(config, name), seed=config.seed) for name in STAGES}
    config = replace(config, **stages)
    settings = json.loads(json.dumps(to_dict(config)))
    if (out / "quickstart.json").exists():
        check(resume, f"{out} already holds a quickstart: add --resume to go on, or choose another --out")
        before = filled(read_json(out / "quickstart.json"), json.loads(json.dumps(to_dict(QuickstartConfig()))))
        check(before == settings, f"{out} was started with other settings: resume with those")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty and not a quickstart: choose another --out")
    writable_folder(out)
    write_json(out / "quickstart.json", settings)
    clock = Clock(out / "seconds.json")

    say(f"marval quickstart: 1,797 real 8x8 digits, {torch.get_num_threads()} CPU threads, results in {out}")
    with clock("classifier"):
        say("1/5  two digit classifiers: one for features, accuracy and reward, one as the held-out judge")
        classifier = digit_classifier(out / "classifier", "conv", config.seed, config.classifier_epochs)
        judge = digit_classifier(out / "judge", "resnet", config.seed + 1, config.classifier_epochs)
    with clock("train"):
        say(f"2/5  teacher: a masked autoregressive model with a diffusion head, {config.train.steps} updates")
        teacher = train(config.train, out / "teacher", resume=True)
    with clock("distill"):
        chain, updates = config.train.sampling.head_steps, config.distill.steps
        say(f"3/5  student: the inner chain of {chain} steps distilled into one by GSIM, {updates} updates")
        student = distill(config.distill, out / "teacher", out / "student", resume=True)
    with clock("rl"):
        say(f"4/5  aligned: the student post-trained on the classifier's reward, up to {config.rl.steps} updates")
        say("     an ALARM names what left the starting student's range; one or two may be the price (docs/rl.md)")
        rl_config = replace(config.rl, classifier=str(out / "classifier"), judge=str(out / "judge"))
        aligned = rl(rl_config, out / "student", out / "aligned", resume=True)
    with clock("evaluate"):
        say(f"5/5  all three measured with the same {config.num_images} seeds")
        models: dict[str, Pipeline] = dict(zip(MODELS, (teacher, student, aligned), strict=True))
        results = measure(config, models, classifier, judge, out)
        save_pictures(save_samples(config, models, out / "samples.npz"), out)
    results["settings"]["seconds"] = clock.seconds
    write_json(out / "results.json", results)
    report = write_report(out)
    say(table(results))
    minutes = sum(clock.seconds.values()) / 60
    say(f"done in {minutes:.1f} minutes; look at {report}")
    return results


class Clock:
    """Wall seconds of each stage, summed over resumed runs."""

    def __init__(self, file: Path):
        self.file = file
        self.seconds: dict[str, float] = read_json(file) if file.exists() else {}

    def __call__(self, stage: str) -> "Clock":
        self.stage = stage
        return self

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + time.perf_counter() - self.start
        write_json(self.file, self.seconds)
        say(f"     {self.seconds[self.stage]:.0f} s")


def digit_classifier(folder: Path, arch: Any, seed: int, epochs: int) -> Classifier:
    """Train on the training split, or load what an interrupted run trained."""
    if not (folder / "config.json").exists():  # written last
        train_split, held_out = load_dataset("digits", "train"), load_dataset("digits", "test")
        classifier, metrics = train_classifier(train_split, held_out, arch=arch, seed=seed, epochs=epochs)
        classifier.save(folder)
        say(f"     {arch}: {100 * metrics['accuracy_held_out']:.1f} % of {len(held_out)} held-out digits read right")
    return Classifier.load(folder)


def read(network: FeatureNetwork, images: np.ndarray, labels: np.ndarray) -> tuple[Moments, float, float]:
    """Moments of a classifier's features; share of images that it reads as the asked class, and the mean
    log-probability of that class."""
    found, asked = network(images), torch.from_numpy(labels)
    assert found.logits is not None
    log_prob = found.logits.log_softmax(1).gather(1, asked[:, None])
    return moments_of(found.pooled), float((found.logits.argmax(1) == asked).double().mean()), float(log_prob.mean())


def measure(
    config: QuickstartConfig, models: dict[str, Pipeline], classifier: Classifier, judge: Classifier, out: Path
) -> dict[str, Any]:
    """results.json: the three models with the same seeds, after the real data's own distances."""
    real = load_dataset("digits", "train")
    halves = np.random.default_rng(config.seed).permutation(len(real))
    half = len(real) // 2
    networks = {"classifier": classifier_features(classifier), "judge": classifier_features(judge)}
    moments = {name: read(network, real.images, real.labels)[0] for name, network in networks.items()}
    results: dict[str, Any] = {}
    everything = dict(models)
    everything["one_step_untrained"] = make_student(models["teacher"], config.distill)
    for model in everything.values():
        model.accelerate()
    partial = out / "evaluation.json"
    cached = read_json(partial) if partial.exists() else {}
    for name, model in everything.items():
        weights = weights_digest(model)
        if cached.get(name, {}).get("weights") != weights:
            images, labels = sample_in_turn(
                model, range(10), config.num_images, config.seed, title=name, batch_size=250
            )
            seen, accuracy, reward = read(networks["classifier"], images, labels)
            held_out, accuracy_held_out, _ = read(networks["judge"], images, labels)
            cached[name] = {
                "fid": frechet_distance(moments["classifier"], seen),
                "fid_heldout_features": frechet_distance(moments["judge"], held_out),
                "accuracy": accuracy, "accuracy_heldout": accuracy_held_out, "reward": reward,
                "head_evaluations_per_token": head_evaluations_per_token(model),
                "ar_steps": model.sampling.ar_steps, "num_images": len(images), "weights": weights,
            }  # fmt: skip
            write_json(partial, cached)
        results[name] = {key: value for key, value in cached[name].items() if key != "weights"}
    for batch, repeats in ((1, config.latency_repeats), (256, max(1, config.latency_repeats // 5))):
        seconds = seconds_per_image(models, batch, repeats)
        for name in models:
            results[name][f"seconds_per_image_batch{batch}"] = seconds[name]
        results[f"speedup_batch{batch}"] = seconds["teacher"] / seconds["student"]
    pooled = networks["classifier"](real.images).pooled
    results["fid_floor"] = frechet_distance(moments_of(pooled[halves[:half]]), moments_of(pooled[halves[half:]]))
    repeats = config.latency_repeats
    results["settings"] = {
        "seed": config.seed,
        "guidance": models["teacher"].sampling.guidance,
        "features": f"the penultimate layer of a small {classifier.config.arch} digit classifier",
        "protocol": (
            f"{config.num_images} images of each model, classes in turn, the same seeds for all; Frechet distance to "
            f"the {len(real)} training digits over the classifier's features (held-out features: those of the judge, "
            "another architecture and seed, never trained on, but it chose the aligned model's update, on other "
            "seeds); accuracy: the share of images read as the asked class, "
            "by the classifier and by the judge; reward: the classifier's mean log-probability of the asked class; "
            f"latency: median over {repeats} rounds (batch 256: {max(1, repeats // 5)}) after a warm-up, the models in "
            f"turn (marval.bench.times_in_turn), float32, whole images, teacher with "
            f"{models['teacher'].sampling.head_steps} "
            f"{models['teacher'].sampling.solver} steps, the same number of AR steps for all; floor: one half of the "
            "training digits against the other."
        ),
        "stages": {"train": to_dict(config.train), "distill": to_dict(config.distill), "rl": to_dict(config.rl)},
    }
    results["versions"] = versions(models["teacher"].device)
    return results


@torch.no_grad()
def save_samples(config: QuickstartConfig, models: dict[str, Pipeline], file: Path) -> dict[str, np.ndarray]:
    """samples.npz for the report: 10 x 10 grids (a class per row), and ten images after each AR step."""
    real = load_dataset("digits", "train")
    arrays: dict[str, Any] = {"real": np.concatenate([real.images[real.labels == label][:10] for label in range(10)])}
    classes = [label for label in range(10) for _ in range(10)]
    for name, model in models.items():
        arrays[name] = model.sample(classes, seed=config.seed, batch_size=100)
    for name in ("teacher", "student"):
        model, sizes = models[name], models[name].network.config
        trace = [model.to_images(torch.zeros(10, sizes.num_tokens, sizes.token_dim, device=model.device))]
        visible = [torch.zeros(10, sizes.num_tokens, dtype=torch.bool)]

        def keep(_: list[int], tokens: Tensor, drawn: Tensor, model=model, trace=trace, visible=visible) -> None:
            trace.append(model.to_images(tokens))
            visible.append(visible[0].scatter(1, drawn.cpu(), True))

        model.sample(range(10), seed=config.seed, each_ar_step=keep)
        arrays[f"{name}_trace"] = torch.stack(trace).cpu().numpy()
        arrays["trace_visible"] = torch.stack(visible).unflatten(2, (sizes.grid, sizes.grid)).numpy()
    save_arrays(file, arrays, compressed=True)
    return arrays


def save_pictures(arrays: dict[str, np.ndarray], out: Path) -> None:
    """samples.png: real, teacher, student, aligned side by side; unmasking.png: student images, a row per AR step."""
    grids = [image_grid(arrays[name], columns=10, scale=3, pad=3) for name in ("real", *MODELS)]
    gap = np.full((len(grids[0]), 24, grids[0].shape[2]), 255, np.uint8)
    save_png(out / "samples.png", np.concatenate([part for grid in grids for part in (grid, gap)][:-1], axis=1))
    trace, visible = arrays["student_trace"], arrays["trace_visible"]
    patch = trace.shape[2] // visible.shape[2]
    drawn = visible.repeat(patch, axis=2).repeat(patch, axis=3)[..., None]
    images = np.where(drawn, trace, 150).astype(np.uint8)
    save_png(out / "unmasking.png", image_grid(images.reshape(-1, *images.shape[2:]), columns=len(images[0]), scale=6))


def table(results: dict[str, Any]) -> str:
    """The final table of the terminal."""
    lines = [f"{'':<9}{'FID*':>7}{'accuracy':>10}{'held-out':>10}{'reward':>9}{'ms/image':>10}{'batch 256':>11}"]
    for name in MODELS:
        row = results[name]
        lines.append(
            f"{name:<9}{row['fid']:>7.3f}{100 * row['accuracy']:>8.1f} %{100 * row['accuracy_heldout']:>8.1f} %"
            f"{row['reward']:>9.3f}{1000 * row['seconds_per_image_batch1']:>10.1f}"
            f"{1000 * row['seconds_per_image_batch256']:>11.2f}"
        )
    lines.append(f"floor    {results['fid_floor']:>7.3f}   (one half of the real digits against the other)")
    lines.append(
        f"student over teacher: {results['speedup_batch1']:.1f} x as fast at batch 1, "
        f"{results['speedup_batch256']:.1f} x at batch 256"
    )
    lines.append(f"* Frechet distance over {results['settings']['features']}, not Inception")
    return "\n".join(lines)
