"""What RL does to a student: what it gains, what hacks it, what holds it, and whether the method's two arguments hold.

    python benchmarks/rl_study.py run digits runs/quickstart      # every stage; goes on where it stopped
    python benchmarks/rl_study.py run digits runs/quickstart --stages cost,memory --seeds 0
    python benchmarks/rl_study.py page                            # docs/rl.md from the committed results

``runs/quickstart`` stands for any folder with teacher, student, classifier and judge; the last two may be elsewhere
(--classifier, --judge). Results are added to
benchmarks/results/rl_study.json, one row per run, as soon as they are there, the first seed of all rows first. A run
keeps the model of its evaluations that its own reward likes best, or what a row says; numbers and pictures are of that
model, on images that chose nothing. The same images measure the student and its best of n. Seeds vary RL alone:
teacher, student, classifier and judge are given.
"""

import argparse
import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import rl_costs
import rl_page
import torch
from PIL import Image
from results_page import alone_in, same_protocol
from rl_page import SHOWN
from torch import Tensor

import marval.rl
from marval import masking, monitor, sampling
from marval.algorithms import Batch, RewardGradient, Rollout
from marval.checkpoint import load_state, read_json, write_json
from marval.config import GSIMConfig, RLConfig, numbers
from marval.distributed import World
from marval.draw import sample_in_turn
from marval.features import FeatureNetwork
from marval.images import image_grid
from marval.measure import weights_digest
from marval.monitor import Monitor
from marval.pipeline import Pipeline
from marval.reference import Reference, load_reference
from marval.rewards import class_prompts, load_reward
from marval.rng import generator
from marval.run import versions
from marval.scoring import Reward
from marval.tokenizers import to_float, to_uint8
from marval.update import autocast

BRISQUE = Path(__file__).resolve().parents[2] / "shared/data/weights"
"""Held out where it is, and where images have the 28 pixels a side that its statistics need."""
REAL = 2000
"""Real images that precision and recall compare with, at most; FID's moments are of all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Settings of one data set."""

    data: str
    """Real images, as marval evaluate takes them."""
    updates: int
    """Of a run at the gentle learning rate."""
    pressed: int
    """Of a run under pressure."""
    images: int
    """Of every held-out evaluation."""
    batch: int
    best: tuple[int, ...]
    """The n of the best of n."""
    cost_batch: int
    """Of the updates whose cost is measured."""
    chain: int = 100
    """Evaluations of the teacher's chain there."""
    precision: str
    """Of drawing and training."""
    lr: float = 1e-4
    """Of the student, gentle."""
    pressure: float = 1e-3
    """Of the student, where hacking is to be provoked."""
    ar_steps: int = 8
    group: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of algorithm group, where they are not the shipped ones."""
    grey: float = 0.4
    """Mean brightness that pays most where both algorithms chase the same optimum."""


STUDIES = {
    "digits": Study(
        data="digits", updates=60, pressed=30, images=800, batch=64, best=(1, 2, 4, 8, 16), cost_batch=16,
        precision="float32",
    ),
    "fashion-mnist": Study(
        data="data/fashion-mnist.npz:test", updates=36, pressed=24, images=400, batch=32, best=(1, 2, 4, 8),
        cost_batch=4, precision="bf16", group={"batch": 128, "group_size": 16, "std": 0.3, "steps": 72},
    ),
    "cifar10": Study(
        data="data/cifar10.npz:test", updates=36, pressed=24, images=400, batch=32, best=(1, 2, 4, 8),
        cost_batch=4, precision="bf16", group={"batch": 128, "group_size": 16, "std": 0.3},
    ),
}  # fmt: skip

REWARDS = """
def ink(images, prompts):
    return images.mean((1, 2, 3))

def grey(images, prompts):
    return -(ink(images, prompts) - {grey}).square()

ink.differentiable = grey.differentiable = True
"""
"""A reward that wants white squares, and one with an optimum."""
ANCHORS: dict[str, dict[str, Any]] = {
    "none": {"anchor": 0.0},
    "GSIM 1": {"anchor": 1.0},
    "GSIM 10": {"anchor": 10.0},
    "GSIM 1, falling to 0.1": {"anchor": 1.0, "anchor_final": 0.1},
    "KL 0.003": {"anchor": 0.0, "kl": 0.003},
    "KL 0.03": {"anchor": 0.0, "kl": 0.03},
    "GSIM 3 and KL 0.01": {"anchor": 3.0, "kl": 0.01},
    "adapters of rank 4": {"anchor": 0.0, "trained": "lora", "lora_rank": 4},
    "2 random AR steps": {"anchor": 0.0, "grad_ar_steps": 2, "grad_ar_choice": "random"},
}
NONE, GSIM = ANCHORS["none"], ANCHORS["GSIM 1"]
INK = ("none", "GSIM 1", "GSIM 10", "KL 0.003", "KL 0.03")
"""The anchors tried on the reward that wants white squares."""
MIXED = ("none", "GSIM 10", "KL 0.03")
"""Those tried on it and the classifier together."""
ONE_STEP: dict[str, Any] = {"grad_ar_steps": 1, "grad_ar_choice": "random"}
GUARDS = {name: getattr(RLConfig(), name) for name in ("patience", "collapse")} | {"select": "judge"}
"""As they are shipped."""
PICTURED = (
    "algorithms/gradient, log-probability", "algorithms/gradient, log-probability, KL 0.03",
    "algorithms/group, reads the class (0 or 1)", "anchors/none",
    "anchors/GSIM 10", "anchors/ink, none", "anchors/ink, GSIM 1", "anchors/ink, GSIM 10",
    "anchors/ink and classifier, none", "anchors/ink and classifier, GSIM 10",
)  # fmt: skip
"""Of the seed that is measured first."""
SKIPPED = {
    "fashion-mnist": ("agreement/gradient", "agreement/group"),
    "cifar10": (
        "algorithms/group, log-probability", "intermediates/one gradient step, anchor none",
        "intermediates/one AR step, anchor GSIM 1", "agreement/gradient", "agreement/group",
    ),
}  # fmt: skip
"""Rows that a study whose updates are dear goes without."""


class SingleStep(RewardGradient):
    """What the method warns of: the reward of an image all of whose hidden tokens were drawn in one AR step."""

    def loss(self, batch: Batch) -> tuple[Tensor, Rollout]:
        (k,) = batch.grad_steps
        whole, self.counts = self.counts, [*self.counts[: k + 1], 0]
        try:
            return super().loss(batch)
        finally:
            self.counts = whole


class Draws:
    """`Pipeline.sample` in a precision; a set of images that the student has drawn is not drawn again."""

    def __init__(self, student: Pipeline, config: RLConfig):
        self.settings, self.digest, self.config = student.sampling, weights_digest(student), config
        self.sets: dict[tuple[Any, ...], np.ndarray] = {}
        self.again = False
        """Whether all is drawn anew, for what it costs."""

    def sample(self, model: Pipeline, labels: Sequence[int], **options: Any) -> np.ndarray:
        key = (*labels, *sorted(options.items()))
        students = model.sampling == self.settings and weights_digest(model) == self.digest
        if students and not self.again and key in self.sets:
            return self.sets[key]
        with autocast(self.config.precision, model.device):
            tokens = model.sample_tokens(labels, **options)
        images = to_uint8(model.tokenizer.decode(tokens)).numpy()
        if students:
            self.sets[key] = images
        return images

    @contextlib.contextmanager
    def anew(self) -> Iterator[None]:
        self.again = True
        try:
            yield
        finally:
            self.again = False


class BestOf:
    """Looks to a monitor like a model, and draws the best of n images of the student by a reward. The first of them is
    the one by which the student is measured; the others have seeds of their own."""

    def __init__(self, student: Pipeline, n: int, reward: Reward, prompts: Sequence[str]):
        self.student, self.n, self.reward, self.prompts = student, n, reward, prompts
        self.class_names = student.class_names

    @torch.no_grad()
    def sample(self, labels: list[int], seed: int, **options: Any) -> np.ndarray:
        drawn = [self.student.sample(labels, seed=seed + 1000 * i, **options) for i in range(self.n)]
        asked = [self.prompts[label] for label in labels]
        best = torch.stack([self.reward(to_float(torch.from_numpy(x)), asked) for x in drawn]).argmax(0)
        return np.stack(drawn)[best.numpy(), np.arange(len(labels))]


@dataclasses.dataclass(frozen=True)
class Job:
    """A row to be measured, and what it will take."""

    key: str
    work: Callable[[], dict[str, Any]]
    updates: int = 0
    images: int = 0
    """Drawn and looked at."""


class Bench:
    """One study's models and results."""

    def __init__(
        self, name: str, run: Path, quick: bool, scratch: Path, classifier: str | None = None, judge: str | None = None
    ):  # fmt: skip
        study = STUDIES[name]
        if quick:
            study = dataclasses.replace(study, updates=2, pressed=2, images=40, best=(1, 2), cost_batch=4, chain=4)
        self.study, self.name, self.folder, self.quick = study, name, run, quick
        self.file = rl_page.places(quick).results
        if not (run / "student/scores.safetensors").exists():
            raise ValueError(f"{run / 'student'} has no scores.safetensors, which anchors need: distil it anew")
        self.student = Pipeline.load(run / "student")
        self.student.sampling = dataclasses.replace(self.student.sampling, ar_steps=study.ar_steps)
        self.prompts = class_prompts(RLConfig().prompt, self.student.class_names)
        self.code = scratch / "rewards.py"
        self.code.write_text(REWARDS.format(grey=study.grey))
        self.held_out = []
        if self.student.tokenizer.image_size >= 28:
            self.held_out = [f"brisque:{BRISQUE}"] if BRISQUE.is_dir() else []
            if not self.held_out:
                print(f"BRISQUE is not measured: its files are not in {BRISQUE}")
        self.classifier, self.judge = classifier or str(run / "classifier"), judge or str(run / "judge")
        places = {"teacher": run / "teacher", "student": run / "student"}
        places |= {"classifier": Path(self.classifier), "judge": Path(self.judge)}
        models = {part: digest(place) for part, place in places.items()}
        protocol = {"study": dataclasses.asdict(study), "weights": models, "held_out": len(self.held_out)}
        self.results: dict[str, Any] = {"rows": {}, "pictures": {}} | self.stored().get(name, {})
        protocol = json.loads(json.dumps(protocol))  # as it is read back
        self.results["protocol"] = same_protocol(self.file, self.results.get("protocol", {}), protocol)
        self.draws = Draws(self.student, self.config())
        self.before: dict[tuple[str, int], dict[str, Any]] = {}
        self.references: dict[tuple[str, str], Reference] = {}

    def stored(self) -> dict[str, Any]:
        return read_json(self.file) if self.file.exists() else {}

    def read(self) -> None:
        """With what a process beside this one has written meanwhile, which measures other seeds or another study."""
        found = self.stored().get(self.name, {})
        for part in ("rows", "pictures"):
            self.results[part] = found.get(part, {}) | self.results[part]

    def save(self) -> None:
        with alone_in(self.file.parent):
            self.read()
            pictures = self.results["pictures"]
            self.results["pictures"] = {key: pictures[key] for key in ("student", *PICTURED) if key in pictures}
            self.results |= {"versions": versions(torch.device("cpu")), "date": time.strftime("%Y-%m-%d")}
            write_json(self.file, self.stored() | {self.name: self.results})

    def run(self, stages: Sequence[str], seeds: Sequence[int]) -> None:
        """Add the rows that are missing."""
        if unknown := [stage for stage in stages if stage not in (*SEEDED, *ONCE)]:
            raise ValueError(f"unknown stage {unknown[0]!r}: choose of {', '.join((*SEEDED, *ONCE))}")

        def reference_once(spec: str, network: FeatureNetwork, *rest: Any) -> Reference:
            if (spec, network.digest) not in self.references:
                found = load_reference(spec, network, *rest)
                assert found.features is not None
                self.references[spec, network.digest] = dataclasses.replace(found, features=found.features[:REAL])
            return self.references[spec, network.digest]

        def sample(model: Pipeline, labels: Sequence[int], **options: Any) -> np.ndarray:
            return self.draws.sample(model, labels, **options)

        jobs = [self.start(seed) for seed in seeds]
        jobs += [job for seed in seeds for stage in SEEDED if stage in stages for job in getattr(self, stage)(seed)]
        jobs += [job for stage in ONCE if stage in stages for job in getattr(self, stage)()]
        skipped = SKIPPED.get(self.name, ())
        jobs = [job for job in jobs if job.key.rpartition("/")[0] not in skipped]
        missing = [job for job in jobs if job.key not in self.results["rows"]]
        with patch.object(monitor, "load_reference", reference_once), patch.object(Pipeline, "sample", sample):
            if missing:
                self.estimate(missing)
            if "student" not in self.results["pictures"]:
                self.results["pictures"]["student"] = picture(self.student)
            for job in missing:
                self.read()
                if job.key in self.results["rows"]:
                    continue
                start = time.perf_counter()
                row = job.work()
                seconds = round(time.perf_counter() - start, 2)
                self.results["rows"][job.key] = row | {"seconds": seconds}
                self.save()
                print(f"{job.key}: {seconds} s", flush=True)

    def estimate(self, jobs: Sequence[Job]) -> None:
        """Print how long the rows will take, from a few updates with the default anchor and one look at the student."""

        def seconds(work: Callable[[], Any]) -> float:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start

        def few(steps: int) -> None:
            with tempfile.TemporaryDirectory() as out:
                config = self.config(steps=steps, eval_images=10, eval_every=steps)
                marval.rl.rl(config, self.folder / "student", Path(out) / "run")

        config, own = self.config(seed=10**6), self.reward()
        watch = Monitor.make(config, self.student, own, World(0, 1, torch.device("cpu")))
        look = seconds(lambda: watch.measure(self.student)) / config.eval_images
        update = max(0.0, (seconds(lambda: few(5)) - seconds(lambda: few(1))) / 4)
        minutes = (update * sum(job.updates for job in jobs) + look * sum(job.images for job in jobs)) / 60
        print(
            f"{len(jobs)} rows are missing: about {minutes:.1f} minutes at {update:.2f} s per update and "
            f"{1000 * look:.1f} ms per image",
            flush=True,
        )

    def config(self, **changes: Any) -> RLConfig:
        """Watched alike in every run: judge and its features against the real images, and, where it is not trained
        on, the classifier's log-probability. No model is too bad to be kept: hacking is to be seen."""
        study = self.study
        lr, steps = changes.pop("lr", study.lr), changes.get("steps", study.updates)
        watched = [] if changes.get("reward", "classifier") == "classifier" else ["classifier"]
        given = {
            "steps": steps, "batch": study.batch, "ar_steps": study.ar_steps, "ema": 0.9, "log_every": steps,
            "save_every": 10_000, "sample_every": 0, "eval_every": max(1, steps // 3), "range_seeds": 3,
            "eval_images": study.images, "patience": 0, "collapse": 0, "checkpoint_ar_steps": False, "select": "reward",
            "kl": 0.0, "classifier": self.classifier, "judge": self.judge, "reference": study.data,
            "held_out": ",".join([*watched, *self.held_out]), "precision": study.precision,
            "gsim": GSIMConfig(lr=lr, auxiliary_lr=2 * lr),
        }  # fmt: skip
        return RLConfig(**(given | changes))

    def reward(self, spec: str = "classifier") -> Reward:
        """By name, as a run loads it."""
        return load_reward(
            spec, classifier=self.classifier, class_names=self.student.class_names,
            template=RLConfig().prompt, device="cpu",
        )  # fmt: skip

    def measure(self, model: Any, config: RLConfig) -> dict[str, Any]:
        """What is `SHOWN` of a model, on images that no run has looked at."""
        watch = Monitor.make(config, self.student, self.reward(config.reward), World(0, 1, torch.device("cpu")))
        values = watch.measure(model, config.range_seeds + 1)
        return shown({name.removesuffix("_heldout"): value for name, value in values.items()})

    def of_student(self, config: RLConfig) -> dict[str, Any]:
        """`measure` of the student, which many runs start from."""
        key = config.reward, config.seed
        if key not in self.before:
            self.before[key] = self.measure(self.student, config)
        return self.before[key]

    def seconds_per_image(self, reward: Reward) -> float:
        """To draw an image of the student and ask its reward."""
        labels = [i % len(self.prompts) for i in range(min(200, self.study.images))]
        chosen = BestOf(self.student, 1, reward, self.prompts)
        with self.draws.anew():
            start = time.perf_counter()
            chosen.sample(labels, seed=0, batch_size=self.study.batch)
            return (time.perf_counter() - start) / len(labels)

    def align(
        self, key: str, seed: int, *, timed: bool = False, single: bool = False, glimpsed: bool = False, **changes: Any
    ) -> Job:
        """One run: its held-out evaluations, in order, and the numbers of the model that it kept, beside the student's.

        Args:
            timed: also how long it takes, nothing remembered, and beside it an image of the student.
            single: train on rewards of `SingleStep`. glimpsed: compare these with those of whole images.
        """
        config = self.config(seed=seed, **changes)
        looks = -(-config.steps // config.eval_every) + 1  # one of them at what was kept

        def work() -> dict[str, Any]:
            seen: list[dict[str, Any]] = []
            with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as patches:
                if timed:
                    patches.enter_context(self.draws.anew())
                if single:
                    patches.enter_context(patch.object(marval.rl, "RewardGradient", SingleStep))
                if glimpsed:
                    patches.enter_context(patch.object(marval.rl, "Monitor", self.glimpsing(config, seen)))
                start = time.perf_counter()
                model = marval.rl.rl(config, self.folder / "student", Path(folder) / "run")
                row: dict[str, Any] = {"run_seconds": round(time.perf_counter() - start, 2)}
                lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
                row["stop"] = load_state(Path(folder) / "run/checkpoint.pt")["extra"]["stop"]
            if timed:
                row["seconds_per_image"] = self.seconds_per_image(self.reward(config.reward))
            if key in PICTURED and key not in self.results["pictures"]:
                self.results["pictures"][key] = picture(model)
            curve = [read_line(line) for line in lines if '"alarms"' in line]
            row["curve"] = [{"step": look["step"]} | shown(look) for look in curve]
            row["best_update"] = model.provenance["best_update"]
            row["before"] = self.of_student(config)
            alarms = next(look["alarms"] for look in curve if look["step"] == row["best_update"])
            row["kept"] = self.measure(model, config) | {"alarms": alarms}
            return row | ({"glimpses": seen} if glimpsed else {})

        sets = looks + 3 * timed + glimpsed * looks
        return Job(f"{key}/{seed}", work, config.steps, sets * self.study.images)

    def start(self, seed: int) -> Job:
        """The student's own numbers."""
        return Job(f"student/{seed}", lambda: self.of_student(self.config(seed=seed)), 0, 4 * self.study.images)

    # ---- stages of a seed

    def algorithms(self, seed: int) -> Iterator[Job]:
        """Differentiable and black box, gently, with the default anchor."""
        group: dict[str, Any] = {"algorithm": "group", "lr": 3 * self.study.lr, "timed": True} | self.study.group
        yield self.align("algorithms/gradient, log-probability", seed, timed=True)
        yield self.align("algorithms/gradient, log-probability, KL 0.03", seed, timed=True, kl=0.03)
        yield self.align("algorithms/group, reads the class (0 or 1)", seed, reward="reads-class", **group)
        yield self.align("algorithms/group, log-probability", seed, **group)

    def best_of_n(self, seed: int) -> Iterator[Job]:
        """The student's best of n by the rewards that it is trained on."""
        for spec, name in (("classifier", ""), ("reads-class", ", reads the class (0 or 1)")):
            for n in self.study.best:
                config = self.config(seed=seed, reward=spec)

                def work(n: int = n, config: RLConfig = config) -> dict[str, Any]:
                    chosen = BestOf(self.student, n, self.reward(config.reward), self.prompts)
                    return {"before": self.of_student(config), "values": self.measure(chosen, config)}

                new = (n + 1) // 2 if spec == "classifier" else 0
                yield Job(f"best of n/{n}{name}/{seed}", work, 0, new * self.study.images)

    def anchors(self, seed: int) -> Iterator[Job]:
        """Under pressure, each anchor alone; and what stops a run that has none."""
        study = self.study
        pressed: dict[str, Any] = {"lr": study.pressure, "steps": study.pressed}
        yield self.align("anchors/none, gentle learning rate", seed, **NONE)
        for name, changes in ANCHORS.items():
            yield self.align(f"anchors/{name}", seed, glimpsed=name == "none", **pressed, **changes)
        often = pressed | NONE | {"eval_every": max(1, study.pressed // 6)}
        for name in ("hinge", "target"):
            key, changes = f"anchors/{name} at half the student's", often if name == "target" else pressed | NONE
            job = self.align(key, seed, **changes)
            yield dataclasses.replace(job, work=lambda k=key, n=name, c=changes: self.halved(k, seed, n, c))
        yield self.align("anchors/none, shipped guards", seed, **(often | GUARDS))
        ink = f"{self.code}:ink"
        for name in INK:
            yield self.align(f"anchors/ink, {name}", seed, reward=ink, **pressed, **ANCHORS[name])
        for name in MIXED:
            mixture = f"1*{ink} + 1*classifier"
            key = f"anchors/ink and classifier, {name}"
            yield self.align(key, seed, reward=mixture, **pressed, **ANCHORS[name])

    def halved(self, key: str, seed: int, setting: str, changes: dict[str, Any]) -> dict[str, Any]:
        """A run whose setting is half the reward, a log-probability, of the student, which is measured before it."""
        half = self.results["rows"][f"student/{seed}"]["reward"] / 2
        return self.align(key, seed, **changes, **{setting: half}).work() | {setting: half}

    def intermediates(self, seed: int) -> Iterator[Job]:
        """Rewards of whole images (the rows of `anchors`) against rewards of what one AR step makes of all tokens.

        The control has the gradient of the latter, through one random AR step, and the reward of the former.
        """
        pressed: dict[str, Any] = {"lr": self.study.pressure, "steps": self.study.pressed} | ONE_STEP
        for name, anchor in (("none", NONE), ("GSIM 1", GSIM)):
            key = f"intermediates/one AR step, anchor {name}"
            yield self.align(key, seed, single=True, glimpsed=True, **pressed, **anchor)
        yield self.align("intermediates/one gradient step, anchor none", seed, **pressed, **NONE)

    def glimpsing(self, config: RLConfig, seen: list[dict[str, Any]]) -> type[Monitor]:
        """A monitor that adds to ``seen`` what `glimpse` finds at every evaluation."""
        reward = self.reward(config.reward)

        class Glimpsing(Monitor):
            def measure(self, model: Pipeline, seed: int = 0) -> dict[str, float]:
                seen.append(bench.glimpse(model, config, reward))
                return super().measure(model, seed)

        bench = self
        return Glimpsing

    @torch.no_grad()
    def glimpse(self, model: Pipeline, config: RLConfig, reward: Reward) -> dict[str, Any]:
        """Mean rewards of whole images, and by AR step of what that step alone makes of all tokens hidden from it; and
        Spearman's correlation of these over the images."""
        count, network = min(200, config.eval_images), model.network
        length, g = network.config.num_tokens, generator(config.seed, 7)
        labels, counts = torch.arange(count) % len(self.prompts), masking.masked_counts(length, config.ar_steps)
        asked = [self.prompts[label] for label in labels.tolist()]
        orders, z = (
            torch.rand(count, length, generator=g).argsort(1),
            torch.randn(count, length, network.config.token_dim, generator=g),
        )
        with autocast(config.precision, model.device):
            draw, w = model.token_sampler(model.sampling), model.sampling.guidance
            states = list(sampling.unmask(network, draw, labels, orders, counts, z, guidance=w))
            singles = [
                sampling.last(sampling.unmask(network, draw, labels, orders, [hidden, 0], z, guidance=w, tokens=known))
                for hidden, known in zip(counts, [torch.zeros_like(z), *states[:-1]], strict=False)
            ]
        whole, *each = (reward(model.tokenizer.decode(tokens), asked) for tokens in (states[-1], *singles))
        return {
            "whole": float(whole.mean()), "single": [float(r.mean()) for r in each],
            "correlation": [spearman(r, whole) for r in each],
        }  # fmt: skip

    def agreement(self, seed: int) -> Iterator[Job]:
        """One optimum inside the range of images, without anchors: both algorithms, until they are there."""
        study = self.study
        common: dict[str, Any] = {"reward": f"{self.code}:grey", **NONE}
        group = {"algorithm": "group", "group_size": 16, "std": 0.2, "lr": 0.3 * study.pressure}
        yield self.align("agreement/gradient", seed, **common, lr=study.pressure)
        yield self.align("agreement/group", seed, **common, **group, steps=2 * study.updates)

    # ---- stages of no seed

    def cost(self) -> Iterator[Job]:
        """One update with the reward's gradient through a rollout: the teacher's chain against the one step; and what
        the anchor adds to either."""
        study, config, repeats = self.study, self.config(batch=self.study.cost_batch), 1 if self.quick else 3

        def rollout(kind: str, recompute: bool) -> dict[str, Any]:
            model = Pipeline.load(self.folder / kind)
            update = rl_costs.rollout_update(model, self.reward(), config, study.chain, recompute)
            return rl_costs.measured(update, repeats) | about

        def anchor() -> dict[str, Any]:
            return rl_costs.measured(rl_costs.anchor_update(self.student, self.folder / "student", config), repeats)

        about = {"batch": study.cost_batch, "ar_steps": study.ar_steps}
        for kind in ("student", "teacher"):
            for recompute in (True, False):
                key = f"cost/{kind}, {'recomputed' if recompute else 'stored'}"
                yield Job(key, lambda k=kind, r=recompute: rollout(k, r))
        yield Job("cost/GSIM anchor", anchor)

    def memory(self) -> Iterator[Job]:
        """What a rollout keeps for its gradient, by K."""
        reward = self.reward(f"{self.code}:ink")
        for steps in (2, 4, 8, 16):
            yield Job(f"memory/{steps}", lambda k=steps: rl_costs.memory(self.student, reward, k))


SEEDED = ("algorithms", "best_of_n", "anchors", "intermediates", "agreement")
ONCE = ("cost", "memory")


def digest(place: Path) -> str:
    """Which weights a folder, or a file, holds."""
    file = place / "model.safetensors" if place.is_dir() else place
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def read_line(line: str) -> dict[str, Any]:
    """An evaluation's line of metrics.jsonl, its numbers without their suffix."""
    return {name.removesuffix("_heldout"): value for name, value in json.loads(line).items()}


def shown(values: dict[str, Any]) -> dict[str, Any]:
    """What the page has of an evaluation."""
    return {name: values.get(name) for name in SHOWN} | {"log_prob": values.get("classifier", values["reward"])}


def spearman(a: Tensor, b: Tensor) -> float:
    """Correlation of the ranks."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def picture(model: Pipeline) -> str:
    """Three images of each of up to ten classes, the same seeds for all models: a PNG as base64."""
    count = min(10, len(model.class_names))
    images, _ = sample_in_turn(model, range(count), 3 * count, 0)
    buffer = io.BytesIO()
    Image.fromarray(image_grid(images, columns=count, scale=1).squeeze()).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run, page = verbs.add_parser("run"), verbs.add_parser("page")
    run.add_argument("name", choices=STUDIES)
    run.add_argument("folder", type=Path)
    run.add_argument("--stages", default=",".join((*SEEDED, *ONCE)))
    run.add_argument("--seeds", default="0,1,2")
    run.add_argument("--classifier", help="as of marval rl; FOLDER/classifier if left out")
    run.add_argument("--judge", help="likewise; FOLDER/judge if left out")
    for verb in (run, page):
        verb.add_argument("--quick", action="store_true", help="a trial: 2 updates, 40 images, a temporary place")
    given = parser.parse_args(args)
    if given.verb == "page":
        rl_page.write_page(given.quick)
        return
    with tempfile.TemporaryDirectory(prefix="rl-study-") as scratch:
        bench = Bench(given.name, given.folder, given.quick, Path(scratch), given.classifier, given.judge)
        bench.run(given.stages.split(","), numbers(given.seeds, int, "--seeds"))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"{error}")
