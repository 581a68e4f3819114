"""Was the reward hacked? Numbers of a model on fixed seeds and prompts, beside the range of the starting student.

Watched are the trained reward, rewards and a judge that are not trained on, FID, KID, precision and recall, and
statistics of the images, where hacking shows first. One that leaves its range raises an alarm; a model with many at
once, or with half of its variety lost, has collapsed.
"""

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from marval.config import RLConfig, warn
from marval.distributed import World
from marval.features import FeatureNetwork
from marval.metrics import frechet_distance, moments_of
from marval.pipeline import Pipeline
from marval.reference import Reference, enough, load_network, load_reference, sample_distances
from marval.reward_checks import PROBE
from marval.reward_files import listed, short_name
from marval.reward_models import ClassifierLogProb, ReadsClass
from marval.rewards import WeightedSum, class_prompts, load_reward
from marval.run import digest_of
from marval.scoring import Reward, name_of, score
from marval.tokenizers import to_float

HELD_OUT_SEED = 1_000_003
"""Added to the run's seed for held-out evaluations, whose images are neither trained on nor reported."""
SHARES = ("brightness", "contrast", "saturation", "edge_density", "clipped")
"""Image statistics that lie in [0, 1]."""
STATISTICS = (*SHARES, "entropy")
RESERVED = (*STATISTICS, "colours", "features", "reward", "judge", "accuracy", "fid", "kid", "precision", "recall")
"""Names that a held-out reward cannot take."""
LEAST_RECALL = 0.5
"""Share of the starting student's recall below which images are so alike that the model has collapsed."""
Ranges = dict[str, list[float]]
"""Centre and spread of each number, by its name."""


def per_image(images: Tensor) -> dict[str, Tensor]:
    """The statistics of each of B float NCHW images in [0, 1]: ``colours``, a histogram (B, bins), and scalars (B,).

    See `image_statistics`, which takes their means over the images.
    """
    count, channels = images.shape[:2]
    levels = 16 if channels == 1 else 4
    colour = torch.zeros_like(images[:, 0], dtype=torch.long)
    for plane in (images * levels).long().clamp(max=levels - 1).unbind(1):
        colour = colour * levels + plane
    histogram = torch.zeros(count, levels**channels, device=images.device)
    ones = torch.ones_like(colour, dtype=torch.float32).flatten(1)
    pixels = colour.flatten(1)
    edges = images.diff(dim=2).abs().mean((1, 2, 3)) + images.diff(dim=3).abs().mean((1, 2, 3))
    return {
        "brightness": images.mean((1, 2, 3)),
        "contrast": images.flatten(1).std(1),
        "saturation": (images.amax(1) - images.amin(1)).mean((1, 2)),
        "edge_density": edges / 2,
        "clipped": ((images < 0.002) | (images > 0.998)).float().mean((1, 2, 3)),
        "colours": histogram.scatter_add(1, pixels, ones) / pixels.shape[1],
    }


def summary(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean of each statistic of `per_image`; in place of ``colours``, the entropy of the mean histogram, in bits."""
    means = {name: value.mean(0) for name, value in rows.items()}
    colours = means.pop("colours")
    return means | {"entropy": -(colours * colours.clamp(min=1e-12).log2()).sum()}


def image_statistics(images: Tensor) -> dict[str, Tensor]:
    """Statistics of float NCHW images in [0, 1] in which reward hacking shows first, as scalars by name.

    ``brightness`` (mean), ``contrast`` (standard deviation within an image), ``saturation`` (largest channel minus
    smallest; 0 for grey images), ``edge_density`` (mean absolute difference of neighbours), ``clipped`` (share of
    values at 0 or 1), ``entropy`` (bits, of the colours in 4 levels per channel, grey in 16).
    """
    return summary(per_image(images))


def class_in_turn(i: int, count: int, classes: int) -> int:
    """Class of image i of ``count``: classes take turns, or, where there are more classes, are evenly spread."""
    return i * classes // count % classes if count < classes else i % classes


def trial_size(classes: int) -> int:
    """Number of images on which rewards and networks are tried before anything else: one of every class, up to 64."""
    return max(PROBE, min(classes, 64))


def networks_of(reward: Reward, classifier: str) -> set[str]:
    """Names of the networks and functions that a reward asks, each part of a sum: a classifier by the digest of its
    weights, a CLIP, an ImageReward or a function by its path."""
    parts = reward.rewards if isinstance(reward, WeightedSum) else [reward]
    found = set()
    for part in parts:
        name = name_of(part)
        kind, _, source = name.partition(":")
        if isinstance(part, ClassifierLogProb | ReadsClass):
            found.add(digest_of(Path(classifier)))
            continue
        if kind == "aesthetic":  # a head on a CLIP
            source = source.rpartition(":")[0]
        found.add(str(Path(name if kind.endswith(".py") or not source else source).resolve()))
    return found


@dataclass(frozen=True)
class Monitor:
    """Measures models on fixed seeds and prompts, and compares them with the starting student."""

    config: RLConfig
    world: World
    prompts: list[str]
    """One per class."""
    rewards: dict[str, Reward]
    """The trained one as ``reward``, then held-out ones by their short names."""
    judge: ClassifierLogProb | None
    network: FeatureNetwork | None
    """Network of FID, KID, precision and recall; None leaves them out."""
    reference: Reference | None
    independent: bool
    """Whether anything is watched that the reward does not optimise, other than image statistics."""
    statistics: tuple[str, ...]
    """Image statistics that can raise an alarm: grey images have no saturation."""

    @classmethod
    def make(cls, config: RLConfig, student: Pipeline, reward: Reward, world: World) -> "Monitor":
        """A monitor of what the config names: loads held-out rewards, judge, network and reference.

        The classifier that the reward is made of is the network only where the config names it.

        Args:
            student: the starting student. reward: the trained one.

        Raises:
            ValueError: a reward, a network or a reference that does not exist or does not suit the images; all are
                tried on a few images of the student.
        """
        prompts = class_prompts(config.prompt, student.class_names)

        def load(spec: str, classifier: str = config.classifier) -> Reward:
            return load_reward(
                spec, classifier=classifier, class_names=student.class_names, template=config.prompt,
                device=world.device,
            )  # fmt: skip

        rewards = {"reward": reward}
        for spec in listed(config.held_out):
            name = short_name(spec)
            rewards[spec if name in (*rewards, *RESERVED) else name] = load(spec)
        judge = load("classifier", config.judge) if config.judge else None
        assert judge is None or isinstance(judge, ClassifierLogProb)
        parts = reward.rewards if isinstance(reward, WeightedSum) else [reward]
        optimised = any(isinstance(part, ClassifierLogProb | ReadsClass) for part in parts)
        spec = config.features or config.judge or ("" if optimised else config.classifier)
        network = reference = None
        if config.select == "fid" and not spec:
            raise ValueError("select fid needs --features or --judge: the reward optimises the --classifier's features")
        if config.select == "fid" and not config.reference:
            warn("--select fid measures to images of the starting student, which hardly improves: name --reference")
        if spec:
            network = load_network(spec, world)
            if config.reference:
                sizes = student.tokenizer.image_size, student.tokenizer.image_channels
                reference = load_reference(config.reference, network, *sizes, world)
        trained, *held_out = (networks_of(reward, config.classifier) for reward in rewards.values())
        watched = set().union(*held_out, [digest_of(Path(config.judge))] if judge else [])
        watched |= {network.digest} if network else set()
        grey = student.tokenizer.image_channels == 1
        shown = tuple(name for name in STATISTICS if not (grey and name == "saturation"))
        monitor = cls(config, world, prompts, rewards, judge, network, reference, not watched <= trained, shown)
        count = trial_size(len(prompts))
        labels = torch.tensor([class_in_turn(i, count, len(prompts)) for i in range(count)], device=world.device)
        images = student.sample(labels.tolist(), seed=config.seed, batch_size=PROBE)
        for start in range(0, count, PROBE):
            monitor.row(images[start : start + PROBE], labels[start : start + PROBE], start)
        if network is None or reference is not None:
            return monitor
        features = monitor.rows(student, config.range_seeds)["features"]
        own = Reference("starting student", "its images", len(features), moments_of(features), None, features)
        return dataclasses.replace(monitor, reference=own)

    @torch.no_grad()
    def rows(self, model: Pipeline, seed: int) -> dict[str, Tensor]:
        """The numbers of each of N = `eval_images` images, drawn by all processes, classes in turn; (N, ...), CPU.

        Args:
            seed: which set of images, counted from 0.
        """
        config, world = self.config, self.world
        share = -(-config.eval_images // world.size)  # surplus images keep the processes in step
        first = world.rank * share
        turns = [class_in_turn(first + i, config.eval_images, len(model.class_names)) for i in range(share)]
        labels = torch.tensor(turns, device=world.device)
        batch = world.parts(config.batch, config.accumulate)[0].own.stop  # as many as an update decodes at once
        base = config.seed + HELD_OUT_SEED * (1 + seed)
        images = model.sample(labels.tolist(), seed=base, first_image=first, batch_size=batch)
        slices = [slice(start, start + batch) for start in range(0, share, batch)]
        parts = [self.row(images[some], labels[some], first + some.start) for some in slices]
        whole = {name: world.gather_rows(torch.cat([part[name] for part in parts])) for name in parts[0]}
        return {name: value[: config.eval_images].cpu() for name, value in whole.items()}

    @torch.no_grad()
    def row(self, images: np.ndarray, asked: Tensor, first: int = 0) -> dict[str, Tensor]:
        """The numbers of each of B images, uint8 NHWC, by name: rewards, judge, features, image statistics; (B, ...).

        Args:
            asked: (B,) the classes that were asked for. first: number of the first image, for messages.
        """
        x = to_float(torch.from_numpy(images)).to(asked.device)
        prompts = [self.prompts[label] for label in asked.tolist()]
        row = {name: score(reward, x, prompts, first) for name, reward in self.rewards.items()}
        if self.judge is not None:
            labels = self.judge.labels(prompts, asked.device)  # the judge may number its classes otherwise
            log_prob = self.judge.classifier(x).log_softmax(1)
            row["accuracy"] = (log_prob.argmax(1) == labels).float()
            row["judge"] = log_prob.gather(1, labels[:, None])[:, 0]
        if self.network is not None:
            row["features"] = self.network(np.ascontiguousarray(images)).pooled.to(asked.device)
        return row | per_image(x)

    def measure(self, model: Pipeline, seed: int = 0) -> dict[str, float]:
        """Every held-out number of a model, ``NAME_heldout``, on the set of images ``seed``; the same on all
        processes."""
        return self.numbers(self.rows(model, seed))

    def numbers(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
        """Held-out numbers from `rows`: means over the images, and FID, KID, precision and recall of the features."""
        numbers = summary({name: value for name, value in rows.items() if name != "features"})
        if "features" in rows and self.reference is not None:
            distances = self.distances(rows["features"], self.reference)
            numbers |= {name: torch.tensor(value) for name, value in distances.items()}
        return self.world.means({f"{name}_heldout": value for name, value in numbers.items()})

    def distances(self, features: Tensor, reference: Reference) -> dict[str, float]:
        """FID of features (N, F) to a reference and, if it has features and there are enough images, KID, precision and
        recall."""
        values = {"fid": frechet_distance(reference.moments, moments_of(features))}
        real = reference.features
        if real is not None and enough(features, real):
            subsets = 1 if max(len(real), len(features)) <= 1000 else 10
            found = sample_distances(features, real, self.config.seed, self.world.device, subsets)
            values |= {name: value for name, value in found.items() if name != "kid_std"}
        return values

    def ranges(self, student: Pipeline, first: Mapping[str, float]) -> Ranges:
        """Centre and spread of every number of the starting student.

        Centre: on the first set of images, whose noise all later looks share. Spread: standard deviation over
        `range_seeds` sets, at least 2 % of the centre, for rewards and the judge at least the standard error of a mean
        over a set, and 0.001 where values are shares. Warns of a reward that picks the best model and is constant.

        Args:
            first: `measure` of the first set.
        """
        sets = [self.rows(student, seed) for seed in range(1, self.config.range_seeds)]
        if self.selected in self.rewards:
            values = torch.cat([rows[self.selected] for rows in sets])
            if bool((values == values[0]).all()):
                same = f"{self.selected} is {values[0].item():g} for all {len(values)} images of the starting student"
                warn(f"{same}, and the model with most of it is kept: give another --select, --judge or --held-out")
        looks, scored = [first, *(self.numbers(rows) for rows in sets)], (*self.rewards, "judge", "accuracy")
        found = {}
        for name, centre in first.items():
            kind = name.removesuffix("_heldout")
            least = 0.001 if kind in SHARES else 1e-6
            if kind in scored and len(sets[0][kind]) > 1:
                least = max(least, float(sets[0][kind].std()) / len(sets[0][kind]) ** 0.5)
            found[name] = [centre, max(statistics.stdev(look[name] for look in looks), 0.02 * abs(centre), least)]
        return found

    def alarms(self, values: Mapping[str, float], ranges: Ranges) -> dict[str, float]:
        """The numbers that left their range, by how many spreads; the better side of one that has any is no alarm.

        One that is not a number always is.
        """
        found = {}
        for name, value in values.items():
            centre, spread = ranges[name]
            distance = (value - centre) / spread
            kind = name.removesuffix("_heldout")
            worse = distance if kind in ("fid", "kid") else -distance
            if kind in STATISTICS:
                worse = abs(distance)
            if not worse <= self.config.range_width:
                found[name] = distance
        return found

    def collapsed(self, alarms: Mapping[str, float], values: Mapping[str, float], ranges: Ranges) -> str:
        """Why a model counts as collapsed, too many alarms or images that are alike; empty if it does not.

        Image statistics alone may be what the reward asks for: they count where nothing else is watched and all that
        can raise an alarm do.
        """
        recall = "recall_heldout"
        if self.config.collapse > 0 and recall in alarms and values[recall] < LEAST_RECALL * ranges[recall][0]:
            return f"images are alike: {recall} {values[recall]:.4g}, the starting student's is {ranges[recall][0]:.4g}"
        quality = [name for name in alarms if name.removesuffix("_heldout") not in STATISTICS]
        telling = bool(quality) or (not self.independent and len(alarms) == len(self.statistics))
        many = telling and 0 < self.config.collapse <= len(alarms)
        return f"{len(alarms)} alarms ({', '.join(alarms)})" if many else ""

    def limits(self, name: str, ranges: Ranges) -> tuple[float, float]:
        """The lower and the upper end of a number's range."""
        centre, spread = ranges[name]
        return centre - self.config.range_width * spread, centre + self.config.range_width * spread

    def stated(self, ranges: Ranges) -> dict[str, float]:
        """Both ends of all ranges, for the log: ``NAME_low`` and ``NAME_high``."""
        ends = ((name, self.limits(name, ranges)) for name in ranges)
        return {f"{name}_{end}": value for name, pair in ends for end, value in zip(("low", "high"), pair, strict=True)}

    def line(self, step: int, name: str, value: float, ranges: Ranges) -> str:
        """The message of an alarm: update, number, value and range."""
        low, high = self.limits(name, ranges)
        where = f"{self.config.range_width:g} spreads over {self.config.range_seeds} seeds of the starting student"
        return f"ALARM update {step}: {name} {value:.4g} is outside {low:.4g} .. {high:.4g} ({where})"

    @property
    def selected(self) -> str:
        """Name of the number that picks the best model, as `RLConfig.select` says."""
        held_out = list(self.rewards)[1:]
        select = self.config.select
        if select == "auto":
            select = "judge" if self.judge is not None else "held-out" if held_out else "reward"
        return held_out[0] if select == "held-out" else select

    def criterion(self, values: Mapping[str, float]) -> float:
        """The number by which models are compared, higher is better: the selected one, or minus FID."""
        value = values[f"{self.selected}_heldout"]
        return -value if self.selected == "fid" else value
