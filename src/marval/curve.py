"""The curve of quality while `train` and `distill` run: measured on fixed seeds, the best model kept, and when to stop.

metrics.jsonl   fid_heldout, kid_heldout, precision_heldout, recall_heldout, accuracy_heldout at every evaluation
best/           the averaged model with the lowest FID so far, loadable at any time

RL has more to watch than quality, and its own evaluations: marval.monitor.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from marval.config import CurveConfig, EvaluateConfig
from marval.data import ImageDataset
from marval.distributed import World
from marval.latents import LatentDataset
from marval.measure import check_features, measure
from marval.monitor import HELD_OUT_SEED
from marval.pipeline import Pipeline
from marval.reference import Reference, check_reference, holds_images, load_network, load_reference, of_images
from marval.rng import generator
from marval.run import Run

MEASURES = ("fid", "kid", "precision", "recall", "accuracy")
_SUBSET_KEY = 0x5B5E  # sets the choice of real images apart from every other use of the seed
_SAME = 1e-5
"""Largest squared distance, over the variance, of means that count as of the same images: devices round differently."""


class Curve:
    """Measures a model every so many updates, exactly as `marval evaluate` would, and knows the best so far.

    Args:
        model: as it will be measured, for its sizes and settings; its weights are not read.
        data: the training images, which FID compares with unless the settings name a reference.
        head_steps: of a teacher's inner chain, in place of the model's default.

    Attributes:
        state: what is saved with the run: ``fid`` and ``step`` of the best evaluation, the ``misses`` since, why to
            ``stop``; the digest of the ``network`` and the mean features (F,) of the ``reference``.

    Raises:
        ValueError: a network or a reference that does not exist or does not suit the images, or no images at all.
    """

    def __init__(
        self, config: CurveConfig, model: Pipeline, data: ImageDataset | LatentDataset, world: World,
        head_steps: int | None = None,
    ):  # fmt: skip
        self.config, self.model, self.data, self.world, self.head_steps = config, model, data, world, head_steps
        self.state: dict[str, Any] = {"fid": float("inf"), "step": 0, "misses": 0, "stop": ""}
        if not config.eval_every:
            return
        model.require_images()
        model.settings(head_steps=head_steps)
        if not config.reference and isinstance(data, LatentDataset):
            remedy = "name real images, or their statistics, with --reference"
            raise ValueError(f"{data.source}, are latents, and evaluations compare images: {remedy}")
        self.network = load_network(config.features, world)
        self.state["network"] = self.network.digest
        size, channels = model.tokenizer.image_size, model.tokenizer.image_channels
        self.network(np.zeros((1, size, size, channels), np.uint8))
        if config.reference:
            check_reference(config.reference)
            if not holds_images(config.reference):
                found = load_reference(config.reference, self.network, size, channels, world)
                check_features(model, found, self.network)

    def begin(self, run: Run, start: int) -> None:
        """Read the reference, unless no evaluation is left; to be called once the run restored `state`.

        Raises:
            ValueError: the run went up to here with another network or reference, or the reference cannot be read.
        """
        config, state = self.config, self.state
        if not config.eval_every:
            return
        remedy = "put back what the run began with, or choose another --out"
        if state["network"] != self.network.digest:
            was, now = state["network"], self.network.digest
            raise ValueError(f"{run.out} was begun with features sha256 {was}, {config.features} has {now}: {remedy}")
        if start >= config.steps or state["stop"]:
            return
        self.reference = self._reference()
        check_features(self.model, self.reference, self.network)
        mean, variance = self.reference.moments.mu, self.reference.moments.sigma.trace()
        moved = ((mean - state.setdefault("reference", torch.from_numpy(mean)).numpy()) ** 2).sum()
        if moved > _SAME * variance:
            what = f"{self.reference.name}, {self.reference.source}"
            shift = f"their mean features are {(moved / variance) ** 0.5:.2g} standard deviations away"
            raise ValueError(f"{run.out} was begun with another reference than {what}: {shift}: {remedy}")

    def _reference(self) -> Reference:
        """The reference that the settings name, or the training images; features of no more images than an evaluation
        draws.

        FID takes the statistics of all. Precision and recall depend on the number of images that span their balls, and
        take time in proportion to its square.
        """
        config, tokenizer = self.config, self.model.tokenizer
        if not config.reference and not isinstance(self.data, LatentDataset):
            data, images = self.data, self.data.images
            found = of_images(
                data.source, "training images", len(data), lambda rows: images[np.array(rows)], self.network,
                self.world, subset(len(data), config),
            )  # fmt: skip
            return dataclasses.replace(found, spatial=None)  # no sFID in MEASURES
        sizes = tokenizer.image_size, tokenizer.image_channels
        found = load_reference(config.reference, self.network, *sizes, self.world)
        if found.features is None:
            return found
        return dataclasses.replace(found, features=found.features[subset(len(found.features), config)])

    def measure(self, model: Pipeline, step: int, run: Run) -> bool:
        """Measure the averaged model after ``step`` updates, on all processes; returns whether it is the best so far.

        The best has its number in its provenance, and is the caller's to save, in `best_folder`.
        """
        config, state = self.config, self.state
        settings = EvaluateConfig(
            num_images=config.eval_images, seed=config.seed + HELD_OUT_SEED, precision=config.precision,
            batch=self.world.parts(config.batch, config.accumulate)[0].own.stop,  # as many as an update takes at once
        )  # fmt: skip
        chosen = {"head_steps": self.head_steps}
        found = measure(
            model, self.reference, self.network, settings, chosen, world=self.world, weights=f"of update {step}"
        )  # fmt: skip
        row = torch.tensor([[found.get(name, float("nan")) for name in MEASURES]], dtype=torch.float64)
        shared = self.world.gather_rows(row.to(self.world.device))[0].tolist()  # the first process has them
        values = {name: value for name, value in zip(MEASURES, shared, strict=True) if value == value}
        run.log(step, **{f"{name}_heldout": value for name, value in values.items()})

        better = values["fid"] < state["fid"]
        if better:
            state.update(fid=values["fid"], step=step, misses=0)
            model.provenance |= {"best_update": step, "fid_heldout": float(f"{values['fid']:.6g}")}
        else:
            state["misses"] += 1
        if 0 < config.patience <= state["misses"]:
            since = f"since that of update {state['step']}, which is in {best_folder(run.out)}"
            state["stop"] = f"no FID below {state['fid']:.4g} in {state['misses']} evaluations {since}"
        if self.world.is_main:
            numbers = ", ".join(f"{name.upper() if len(name) == 3 else name} {v:.4g}" for name, v in values.items())
            record = "the best so far" if better else f"best: {state['fid']:.4g} at update {state['step']}"
            tqdm.write(f"update {step}: {numbers} ({record})", file=sys.stderr)
        return better


def subset(count: int, config: CurveConfig) -> Tensor:
    """Indices of those of ``count`` real images whose features an evaluation compares with: `eval_images` at most."""
    if count <= config.eval_images:
        return torch.arange(count)
    return torch.randperm(count, generator=generator(config.seed, _SUBSET_KEY))[: config.eval_images]


def best_folder(out: Path) -> Path:
    """Folder of the best model of the run in ``out``."""
    return out / "best"
