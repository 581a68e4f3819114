"""What RL does to a student: what it gains, what hacks it, what holds it, and whether the method's two arguments hold.

    python benchmarks/rl_study.py run digits runs/quickstart      # every stage; goes on where it stopped
    python benchmarks/rl_study.py run digits runs/quickstart --stages cost,memory --seeds 0
    python benchmarks/rl_study.py page                            # docs/rl.md from the committed results

``runs/quickstart`` stands for any folder with teacher, student, classifier and judge. Results are added to
benchmarks/results/rl_study.json, one row per run, as soon as they are there. A run keeps the model of its evaluations
that its own reward likes best, or what a row says; numbers and pictures are of that model, on images that chose
nothing. The same images measure the student and its best of n. Seeds vary RL alone: teacher, student, classifier and
judge are given.
"""

import argparse
import base64
import dataclasses
import hashlib
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import marval.rl
from marval import masking, monitor, policy, sampling
from marval.algorithms import Batch, RewardGradient, Rollout
from marval.checkpoint import read_json, write_json
from marval.config import GSIMConfig, RLConfig
from marval.costs import Work
from marval.data import image_grid, save_png
from marval.diffusion import respace
from marval.distributed import World
from marval.draw import sample_in_turn
from marval.features import FeatureNetwork
from marval.monitor import Monitor
from marval.pipeline import Pipeline
from marval.reference import Reference, load_reference
from marval.rewards import Reward, class_prompts, load_reward
from marval.rng import ImageNoise, generator
from marval.run import versions
from marval.tokenizers import to_float

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE, PICTURES = ROOT / "benchmarks/results/rl_study.json", ROOT / "docs/rl.md", ROOT / "docs/images"
SHOWN = ("reward", "log_prob", "judge", "accuracy", "fid", "precision", "recall", "clipped", "alarms")
PERCENT = ("accuracy", "precision", "recall", "clipped")
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t for 95 % intervals of a mean of so many values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Settings of one data set."""

    data: str
    """Real images, as marval evaluate takes them."""
    updates: int
    """Of every run."""
    images: int
    """Of every held-out evaluation."""
    lr: float
    """Of the student, gentle."""
    pressure: float
    """Of the student, where hacking is to be provoked."""
    batch: int = 64
    ar_steps: int = 8
    grey: float = 0.4
    """Mean brightness that pays most where both algorithms chase the same optimum."""


STUDIES = {
    "digits": Study(data="digits", updates=60, images=1000, lr=1e-4, pressure=1e-3),
    "fashion-mnist": Study(
        data="data/fashion-mnist.npz:test", updates=40, images=400, lr=1e-4, pressure=1e-3, batch=32
    ),
}

REWARDS = """
def ink(images, prompts):
    return images.mean((1, 2, 3))

def grey(images, prompts):
    return -(ink(images, prompts) - {grey}).square()

ink.differentiable = grey.differentiable = True
"""
"""A reward that wants white squares, and one with an optimum."""
GSIM: dict[str, Any] = {"anchor": 1.0}
NONE: dict[str, Any] = {"anchor": 0.0}
ANCHORS: dict[str, dict[str, Any]] = {
    "none": NONE,
    "GSIM 1": GSIM,
    "GSIM 1, falling to 0.1": {"anchor": 1.0, "anchor_final": 0.1},
    "KL 0.003": {"anchor": 0.0, "kl": 0.003},
    "hinge at -0.05": {"anchor": 0.0, "hinge": -0.05},
    "adapters of rank 4": {"anchor": 0.0, "trained": "lora", "lora_rank": 4},
    "2 random AR steps": {"anchor": 0.0, "grad_ar_steps": 2, "grad_ar_choice": "random"},
}
STOPS = {"judge": "none, kept by the judge", "fid": "none, kept by FID"}
"""Scores that choose among the evaluations of a run without anchor, other than its own reward."""
INK = ("none", "GSIM 1", "KL 0.003")
"""The anchors tried on the reward that wants white squares."""
FEWER = {
    "fashion-mnist": (
        "gradient, log-probability", "group, reads the class (0 or 1)", "none", "GSIM 1", "KL 0.003", "ink, none",
        "ink, GSIM 1",
    )
}  # fmt: skip
"""The runs of a study whose updates are dear, and no best of more than 4; elsewhere all."""


class SingleStep(RewardGradient):
    """What the method warns of: the reward of an image all of whose hidden tokens were drawn in one AR step."""

    def loss(self, batch: Batch) -> tuple[Tensor, Rollout]:
        (k,) = batch.grad_steps
        whole, self.counts = self.counts, [*self.counts[: k + 1], 0]
        try:
            return super().loss(batch)
        finally:
            self.counts = whole


class Bench:
    """One study's models and results."""

    def __init__(self, name: str, run: Path, seeds: Sequence[int], quick: bool):
        study = STUDIES[name]
        self.study = dataclasses.replace(study, updates=2, images=40) if quick else study
        self.name, self.run_folder, self.seeds, self.quick = name, run, seeds, quick
        self.file = Path(tempfile.gettempdir()) / "rl_study_quick.json" if quick else RESULTS
        self.results: dict[str, Any] = {"rows": {}, "pictures": {}} | self.stored().get(name, {})
        self.student = Pipeline.load(run / "student")
        self.folder = tempfile.TemporaryDirectory(prefix="rl-study-")
        self.rewards = Path(self.folder.name) / "rewards.py"
        self.rewards.write_text(REWARDS.format(grey=self.study.grey))
        models = {part: digest(run / part) for part in ("teacher", "student", "classifier", "judge")}
        protocol = {"study": dataclasses.asdict(self.study), "weights": models}
        if self.results.setdefault("protocol", protocol) != protocol:
            raise SystemExit(f"{self.file} holds a {name} study of other models or settings: remove it there")

    def stored(self) -> dict[str, Any]:
        return read_json(self.file) if self.file.exists() else {}

    def save(self) -> None:
        """With the rows that a process beside this one has written meanwhile, which measures other seeds."""
        everything = self.stored()
        found = everything.get(self.name, {})
        for part in ("rows", "pictures"):
            self.results[part] = found.get(part, {}) | self.results[part]
        self.results |= {"versions": versions(torch.device("cpu")), "date": time.strftime("%Y-%m-%d")}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, everything | {self.name: self.results})

    def once(self, key: str, work: Callable[[], dict[str, Any]]) -> None:
        """Do the work and keep its row, unless it is there."""
        if key not in self.results["rows"]:
            start = time.perf_counter()
            row = work()
            self.results["rows"][key] = row | {"seconds": round(time.perf_counter() - start, 2)}
            self.save()
            print(f"{key}: {self.results['rows'][key]['seconds']} s", flush=True)

    def config(self, **changes: Any) -> RLConfig:
        """Watched alike in every run: judge and its features against the real images, and, where it is not trained
        on, the classifier's log-probability. No model is too bad to be kept: hacking is to be seen."""
        study, folder = self.study, self.run_folder
        lr = changes.pop("lr", study.lr)
        watched = "" if changes.get("reward", "classifier") == "classifier" else "classifier"
        given = {
            "steps": study.updates, "batch": study.batch, "ar_steps": study.ar_steps, "ema": 0.9, "log_every": 5,
            "save_every": 10_000, "sample_every": 0, "eval_every": max(1, study.updates // 4), "range_seeds": 3,
            "eval_images": study.images, "patience": 0, "collapse": 0, "checkpoint_ar_steps": False, "select": "reward",
            "classifier": str(folder / "classifier"), "judge": str(folder / "judge"), "reference": study.data,
            "held_out": watched, "gsim": GSIMConfig(lr=lr, auxiliary_lr=2 * lr),
        }  # fmt: skip
        return RLConfig(**(given | changes))

    def reward(self, spec: str = "classifier") -> Reward:
        """By name, as a run loads it."""
        return load_reward(
            spec, classifier=str(self.run_folder / "classifier"), class_names=self.student.class_names,
            template=self.config().prompt, device="cpu",
        )  # fmt: skip

    def measure(self, model: Any, config: RLConfig) -> dict[str, Any]:
        """What is `SHOWN` of a model, on images that no run has looked at."""
        watch = Monitor.make(config, self.student, self.reward(config.reward), World(0, 1, torch.device("cpu")))
        values = watch.look(model, config.range_seeds + 1)
        shown: dict[str, Any] = {name: values.get(f"{name}_heldout") for name in SHOWN}
        return shown | {"log_prob": values.get("classifier_heldout", shown["reward"])}

    def align(self, key: str, seed: int, pictured: bool = False, **changes: Any) -> None:
        """One run: its held-out evaluations, in order, and the numbers of the model that it kept."""
        if key.partition("/")[2] not in FEWER.get(self.name, (key.partition("/")[2],)):
            return

        def work() -> dict[str, Any]:
            config, start = self.config(seed=seed, **changes), time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "run"
                model = marval.rl.rl(config, self.run_folder / "student", out)
                lines = (out / "metrics.jsonl").read_text().splitlines()
            seconds, rows = time.perf_counter() - start, [read_line(line) for line in lines]
            if pictured and seed == self.seeds[0]:
                self.results["pictures"][key] = picture(model)
            curve = [row | {"log_prob": row.get("classifier", row["reward"])} for row in rows if "alarms" in row]
            kept = self.measure(model, config) | {"alarms": alarms_of(curve, model.provenance["best_update"])}
            shown = [{name: row.get(name) for name in ("step", *SHOWN)} for row in curve]
            return {"curve": shown, "kept": kept, "run_seconds": round(seconds, 2)}

        self.once(f"{key}/{seed}", work)

    def start(self) -> None:
        """The student's own numbers."""
        for seed in self.seeds:
            self.once(f"student/{seed}", lambda seed=seed: self.measure(self.student, self.config(seed=seed)))

    # ---- stages

    def algorithms(self) -> None:
        """Differentiable and black box, gently, with the default anchor."""
        if "student" not in self.results["pictures"]:
            self.results["pictures"]["student"] = picture(self.student)
        self.start()
        for seed in self.seeds:
            self.align("algorithms/gradient, log-probability", seed, pictured=True)
            group: dict[str, Any] = {"algorithm": "group", "lr": 3 * self.study.lr}
            self.align("algorithms/group, reads the class (0 or 1)", seed, True, reward="reads-class", **group)
            self.align("algorithms/group, log-probability", seed, **group)

    def anchors(self) -> None:
        """Under pressure, each anchor alone."""
        self.start()
        for seed in self.seeds:
            for select, name in STOPS.items():
                self.align(f"anchors/{name}", seed, lr=self.study.pressure, select=select, **NONE)
            for name, changes in ANCHORS.items():
                pictured = name in ("none", "GSIM 1")
                self.align(f"anchors/{name}", seed, pictured, lr=self.study.pressure, **changes)
            for name in INK:
                reward = f"{self.rewards}:ink"
                self.align(f"anchors/ink, {name}", seed, True, reward=reward, lr=self.study.pressure, **ANCHORS[name])
            mixture = f"1*{self.rewards}:ink + 1*classifier"
            self.align("anchors/ink and classifier, none", seed, True, reward=mixture, lr=self.study.pressure, **NONE)

    def intermediates(self) -> None:
        """Rewards of whole images against rewards of what one AR step makes of all tokens.

        The control has the gradient of the latter, through one random AR step, and the reward of the former.
        """
        single: dict[str, Any] = {"grad_ar_steps": 1, "grad_ar_choice": "random", "lr": self.study.pressure}
        for seed in self.seeds:
            for name, anchor in (("none", NONE), ("GSIM 1", GSIM)):
                self.align(f"intermediates/one gradient step, anchor {name}", seed, **single, **anchor)
                with patch.object(marval.rl, "RewardGradient", SingleStep):
                    self.align(f"intermediates/one AR step, anchor {name}", seed, **single, **anchor)

    def agreement(self) -> None:
        """One optimum inside the range of images, without anchors: both algorithms, until they are there."""
        common: dict[str, Any] = {"reward": f"{self.rewards}:grey", "lr": self.study.pressure, "anchor": 0.0}
        for seed in self.seeds:
            self.align("agreement/gradient", seed, **common)
            group = common | {"lr": 0.3 * self.study.pressure, "algorithm": "group", "group_size": 16, "std": 0.2}
            self.align("agreement/group", seed, **group, steps=2 * self.study.updates)

    def best_of_n(self) -> None:
        """The student's best of n by the same reward. Its first image is the one by which the student is measured; the
        others have seeds of their own."""
        reward, prompts = self.reward(), class_prompts(self.config().prompt, self.student.class_names)

        class Chosen:
            """Looks to a monitor like a model, and draws the best of n images by the reward."""

            def __init__(self, student: Pipeline, n: int):
                self.student, self.n, self.class_names, self.seconds = student, n, student.class_names, 0.0

            def sample(self, labels: list[int], **options: Any) -> np.ndarray:
                seed, start = options.pop("seed"), time.perf_counter()
                drawn, scores = [], []
                for i in range(self.n):
                    drawn.append(self.student.sample(labels, seed=seed + 1000 * i, **options))
                    with torch.no_grad():
                        x = to_float(torch.from_numpy(drawn[-1]))
                        scores.append(reward(x, [prompts[label] for label in labels]))
                best = torch.stack(scores).argmax(0)
                self.seconds += time.perf_counter() - start
                return np.stack(drawn)[best.numpy(), np.arange(len(labels))]

        for seed in self.seeds:
            for n in (1, 2, 4) if self.name in FEWER else (1, 2, 4, 8, 16):

                def work(n: int = n, seed: int = seed) -> dict[str, Any]:
                    chosen = Chosen(self.student, n)
                    values = self.measure(chosen, self.config(seed=seed))
                    return {"values": values, "seconds_per_image": chosen.seconds / self.study.images}

                self.once(f"best of n/{n}/{seed}", work)

    def cost(self) -> None:
        """One update with the reward's gradient through a rollout: the teacher's chain against the one step."""
        teacher = Pipeline.load(self.run_folder / "teacher")
        batch = 4 if self.quick else 16
        for kind, model in (("student", self.student), ("teacher", teacher)):
            for recompute in (True, False):
                key = f"cost/{kind}, {'recomputed' if recompute else 'stored'}"
                self.once(key, lambda m=model, r=recompute: self.cost_of_update(m, batch, r))

    def cost_of_update(self, model: Pipeline, batch: int, recompute: bool) -> dict[str, Any]:
        """Seconds and bytes of rollout, reward, gradient of the head and Adam's step."""
        steps, length, reward = self.study.ar_steps, model.network.config.num_tokens, self.reward()
        prompts = class_prompts(self.config().prompt, model.class_names)
        head, counts = model.network.head, masking.masked_counts(length, steps)
        model.network.requires_grad_(False)
        head.requires_grad_(True)
        optimizer = torch.optim.Adam(head.parameters(), 1e-9)
        labels = torch.arange(batch) % len(prompts)
        z = torch.randn(batch, length, model.network.config.token_dim, generator=generator(0))
        orders = torch.rand(batch, length, generator=generator(1)).argsort(1)

        def update() -> None:
            if model.student is None:  # ddim: as many evaluations as the ancestral chain, and no noise to draw again
                noise, schedule = ImageNoise(0, list(range(batch))), respace(model.schedule, 100)
                clamp = model.tokenizer.token_range
                draw = sampling.diffusion_chain(head, schedule, noise, "ddim", clamp=clamp)
            else:
                draw = model.draw(model.sampling)
            tokens = sampling.last(sampling.unmask(
                model.network, draw, labels, orders, counts, z, guidance=model.sampling.guidance,
                needs_null=model.student is None, checkpoint_ar_steps=recompute,
            ))  # fmt: skip
            rewards = reward(model.tokenizer.decode(tokens), [prompts[label] for label in labels.tolist()])
            policy.reward_loss(rewards).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        with Work() as work:
            update()
        times = []
        for _ in range(1 if self.quick else 3):
            start = time.perf_counter()
            update()
            times.append(time.perf_counter() - start)
        model.network.requires_grad_(False)
        return {"seconds_per_update": statistics.median(times), "bytes": work.peak, "batch": batch, "ar_steps": steps}

    def memory(self) -> None:
        """What a rollout keeps for its gradient, by K."""
        length, dim = self.student.network.config.num_tokens, self.student.network.config.token_dim
        z, exploration = torch.randn(2, 16, length, dim, generator=generator(0))
        orders = torch.rand(16, length, generator=generator(1)).argsort(1)
        w = torch.full((16, 1), float(self.student.sampling.guidance))
        prompts = [f"{i}" for i in range(16)]

        def brightness(images: Tensor, prompts: list[str]) -> Tensor:
            return images.mean((1, 2, 3))

        for steps in (2, 4, 8, 16):

            def kept(steps: int = steps) -> dict[str, Any]:
                row: dict[str, Any] = {"tokens": 16 * length * dim * 4 * steps}
                self.student.network.head.requires_grad_(True)
                for name, recompute in (("recomputed", True), ("stored", False)):
                    config = RLConfig(ar_steps=steps, checkpoint_ar_steps=recompute)
                    reward: Any = brightness
                    algorithm = RewardGradient(self.student, reward, config, self.student.network)
                    chosen = frozenset(range(steps))
                    labels = torch.arange(16) % len(self.student.class_names)
                    batch = Batch(labels, prompts, orders, z, w, exploration, chosen)
                    with Work() as work:
                        loss, rollout = algorithm.loss(batch)
                        row[name] = work.alive
                        loss.backward()
                        row[f"{name}, peak of the update"] = work.peak
                        del loss, rollout
                    self.student.network.head.zero_grad()
                self.student.network.head.requires_grad_(False)
                return row

            self.once(f"memory/{steps}", kept)


STAGES = ("algorithms", "anchors", "intermediates", "agreement", "best_of_n", "cost", "memory")


def digest(folder: Path) -> str:
    """Which weights a folder holds."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def read_line(line: str) -> dict[str, Any]:
    """A line of metrics.jsonl, held-out numbers without their suffix."""
    return {name.removesuffix("_heldout") if "alarms" in line else name: v for name, v in json.loads(line).items()}


def alarms_of(curve: Sequence[dict[str, Any]], step: int) -> float:
    """Alarms of the evaluation after an update."""
    return next(row["alarms"] for row in curve if row["step"] == step)


def picture(model: Pipeline) -> str:
    """Three images of each of up to ten classes, the same seeds for all models: a PNG as base64."""
    count = min(10, len(model.class_names))
    images, _ = sample_in_turn(model, range(count), 3 * count, 0)
    buffer = io.BytesIO()
    Image.fromarray(image_grid(images, columns=count, scale=1).squeeze()).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


# ---- the page


def interval(values: Sequence[float | None], percent: bool = False) -> str:
    """Mean and half the width of its 95 % interval (Student's t), of values of several seeds."""
    x = [100 * v if percent else v for v in values if v is not None]
    if not x:
        return ""
    digits = 1 if percent else 2 if abs(statistics.fmean(x)) >= 1 else 3
    mean = f"{statistics.fmean(x):.{digits}f}"
    if len(x) < 2:
        return mean
    return f"{mean} ± {T95.get(len(x), 1.96) * statistics.stdev(x) / math.sqrt(len(x)):.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of(rows: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The rows of all seeds of a key."""
    return [row for name, row in rows.items() if name.rpartition("/")[0] == key]


def numbers(values: Sequence[dict[str, Any]]) -> list[str]:
    return [interval([value.get(name) for value in values], name in PERCENT) for name in SHOWN]


COLUMNS = (
    "its reward", "classifier's log-probability", "judge's", "accuracy, %", "FID", "precision, %", "recall, %",
    "clipped, %", "alarms",
)  # fmt: skip


def results_table(rows: dict[str, Any]) -> list[str]:
    """Before, after, and the best of n."""
    keys = [key for key in unique(rows) if key.startswith("algorithms/")]
    if not keys:
        return []
    lines = [["student", *numbers(of(rows, "student")), ""]]
    for key in keys:
        found = of(rows, key)
        seconds = min(row["run_seconds"] for row in found)
        lines.append([key.partition("/")[2], *numbers([row["kept"] for row in found]), f"{seconds:.0f}"])
    for key in (key for key in unique(rows) if key.startswith("best of n/")):
        found = of(rows, key)
        lines.append([f"best of {key.partition('/')[2]}", *numbers([row["values"] for row in found]), ""])
    text = ["### Gain", table(["", *COLUMNS, "seconds, least"], lines)]
    once = of(rows, "best of n/1")
    if once:
        drawn = min(row["seconds_per_image"] for row in once)
        spent = min(row["run_seconds"] for row in of(rows, keys[0]))
        text.append(
            f"The {spent:.0f} s of `{keys[0].partition('/')[2]}`, evaluations included, would draw and choose among "
            f"{spent / drawn:.0f} images of the student: at equal compute, for 5,000 images, RL competes with the best "
            f"of {1 + spent / drawn / 5000:.1f}, and after them costs nothing more."
        )
    return text


def unique(rows: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(key.rpartition("/")[0] for key in rows))


def anchors_table(rows: dict[str, Any]) -> list[str]:
    keys = [key for key in unique(rows) if key.startswith("anchors/")]
    if not keys:
        return []
    lines = [["student", *numbers(of(rows, "student"))]]
    lines += [[key.partition("/")[2], *numbers([row["kept"] for row in of(rows, key)])] for key in keys]
    return ["### Anchors", table(["anchor", *COLUMNS], lines)]


def intermediates_table(rows: dict[str, Any]) -> list[str]:
    pairs = {
        f"{what}, anchor {name}": key
        for name in ("none", "GSIM 1")
        for what, key in (
            ("whole images", f"anchors/{name}"),
            ("one gradient step", f"intermediates/one gradient step, anchor {name}"),
            ("one AR step", f"intermediates/one AR step, anchor {name}"),
        )
    }  # fmt: skip
    if not all(of(rows, key) for key in pairs.values()):
        return []
    text = [
        "### Rewards of whole images and of single AR steps",
        "One gradient step: the reward of whole images, its gradient through one random AR step, as with one AR step.",
    ]
    for value, title in (("reward", "Reward of whole images"), ("fid", "FID"), ("recall", "Recall, %")):
        lines = []
        for name, key in pairs.items():
            curves = [row["curve"] for row in of(rows, key)]
            each = zip(*curves, strict=True)
            lines.append([name, *(interval([row[value] for row in step], value in PERCENT) for step in each)])
        steps = [f"{row['step']:.0f}" for row in of(rows, "anchors/none")[0]["curve"]]
        text.append(table([f"{title}, after updates:", *steps], lines))
    return text


def other_tables(rows: dict[str, Any], study: dict[str, Any]) -> list[str]:
    text = []
    reached = {name: of(rows, f"agreement/{name}") for name in ("gradient", "group")}
    if all(reached.values()):
        lines = []
        for name, found in reached.items():
            curves = [row["curve"] for row in found]
            rewards = [interval([1000 * c[i]["reward"] for c in curves]) for i in (0, -1)]
            closed = interval([1 - c[-1]["reward"] / c[0]["reward"] for c in curves], percent=True)
            lines.append([name, *rewards, closed, f"{curves[0][-1]['step']:.0f}"])
        head = ["algorithm", "before", "after", "of the gap closed, %", "updates"]
        what = (
            f"Minus the squared distance of an image's mean brightness to {study['grey']}, times 1,000; the best is 0."
        )
        text += ["### One optimum, both algorithms", what, table(head, lines)]
    costs = {key.partition("/")[2]: row for key, row in rows.items() if key.startswith("cost/")}
    if len(costs) == 4:
        lines = [
            [name, f"{row['seconds_per_update']:.2f}", f"{row['bytes'] / 2**20:.0f}"] for name, row in costs.items()
        ]
        for how in ("recomputed", "stored"):
            a, b = costs[f"teacher, {how}"], costs[f"student, {how}"]
            ratios = a["seconds_per_update"] / b["seconds_per_update"], a["bytes"] / b["bytes"]
            lines.append([f"ratio, {how}", *(f"{ratio:.1f}" for ratio in ratios)])
        row = costs["student, stored"]
        title = (
            f"One update of {row['batch']} images, K = {row['ar_steps']}; AR steps stored or recomputed. The teacher's "
            "chain is DDIM's, of 100 evaluations: as many as the ancestral one has, and no noise to draw again."
        )
        text += [
            "### The teacher's chain as the policy",
            title,
            table(["policy", "seconds", "MiB beyond the weights"], lines),
        ]
    memory = {key.partition("/")[2]: row for key, row in rows.items() if key.startswith("memory/")}
    if memory:
        names = ("tokens", "recomputed", "stored", "recomputed, peak of the update", "stored, peak of the update")
        lines = [[k, *(f"{row[name] / 2**10:.0f}" for name in names)] for k, row in memory.items()]
        heads = ["K", "its tokens alone", *names[1:]]
        text += ["### Memory of a rollout", "KiB kept for the gradient, 16 images.", table(heads, lines)]
    return text


def write_page() -> None:
    """Tables and pictures of docs/rl.md, between the markers of each study."""
    text, everything = PAGE.read_text(), read_json(RESULTS)
    for name, results in everything.items():
        start, end = f"<!-- rl_study {name} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(start)
        if not found:
            raise SystemExit(f"{PAGE} has no place for {name}: add {start} and {end}")
        rows, study = results["rows"], results["protocol"]["study"]
        about = results["versions"]
        seeds = max(sum("curve" in row for row in of(rows, key)) for key in unique(rows))
        parts = [
            f"Measured on {results['date']}, {about['device']}, {about['threads']} threads, PyTorch {about['torch']}: "
            f"{study['updates']} updates of {study['batch']} images, K = {study['ar_steps']}, {seeds} seeds with 95 % "
            f"intervals, {study['images']} held-out images each, distances and accuracy by the judge, which no "
            f"reward here is made of. Learning rate {study['lr']:g} (group: 3 times that), under pressure "
            f"{study['pressure']:g}. A run keeps the evaluation that its reward likes best, or what its row says; "
            "numbers and pictures are of that model, on images that chose nothing; alarms are those of its evaluation, "
            "and numbers by update those of all evaluations. Seeds vary RL alone: teacher, student, classifier and "
            "judge are the same. A mixture's own reward is the plain sum of its parts; the run normalises them.",
            *results_table(rows), *anchors_table(rows), *intermediates_table(rows), *other_tables(rows, study),
        ]  # fmt: skip
        if results["pictures"]:
            parts += ["### Side by side", side_by_side(name, results["pictures"])]
        text = before + start + "\n" + "\n\n".join(parts) + "\n" + end + rest.partition(end)[2]
    PAGE.write_text(text)


def side_by_side(name: str, pictures: dict[str, str]) -> str:
    """Writes docs/images/rl_NAME.png, a block for each model; returns its place in the page."""
    blocks = [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in pictures.values()]
    scale = max(1, round(480 / blocks[0].shape[1]))
    big = [block.repeat(scale, 0).repeat(scale, 1) for block in blocks]
    gap = np.full((8 * scale // 2, *big[0].shape[1:]), 255, np.uint8)
    whole = np.concatenate([part for block in big for part in (block, gap)][:-1])
    save_png(PICTURES / f"rl_{name}.png", whole if whole.ndim == 3 else whole[..., None])
    names = "; ".join(key.rpartition("/")[2].replace("none", "no anchor") for key in pictures)
    return f"The same seeds in each block, from above: {names}.\n\n![Images of each model](images/rl_{name}.png)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("page")
    run = verbs.add_parser("run")
    run.add_argument("name", choices=STUDIES)
    run.add_argument("folder", type=Path)
    run.add_argument("--stages", default=",".join(STAGES))
    run.add_argument("--seeds", default="0,1,2")
    run.add_argument("--quick", action="store_true", help="2 updates, 40 images, results outside the repository")
    args = parser.parse_args()
    if args.verb == "page":
        write_page()
        return
    bench = Bench(args.name, args.folder, [int(seed) for seed in args.seeds.split(",")], args.quick)
    found: dict[tuple[str, str], Reference] = {}

    def reference_once(spec: str, network: FeatureNetwork, *rest: Any) -> Reference:
        if (spec, network.digest) not in found:
            found[spec, network.digest] = load_reference(spec, network, *rest)
        return found[spec, network.digest]

    with patch.object(monitor, "load_reference", reference_once):
        for stage in args.stages.split(","):
            if stage not in STAGES:
                raise SystemExit(f"unknown stage {stage!r}: choose of {', '.join(STAGES)}")
            getattr(bench, stage)()


if __name__ == "__main__":
    main()
