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
from marval.evaluate import check_features, evaluate
from marval.features import FeatureNetwork, load_features
from marval.latents import LatentDataset
from marval.metrics import Statistics
from marval.monitor import HELD_OUT_SEED
from marval.pipeline import Pipeline
from marval.reference import Reference, features_in_chunks, load_reference
from marval.rng import generator
from marval.run import Run

MEASURES = ("fid", "kid", "precision", "recall", "accuracy")
_SUBSET_KEY = 0x5B5E  # sets the choice of real images apart from every other use of the seed


class Curve:
    """Measures a model every so many updates, exactly as `marval evaluate` would, and knows the best so far.

    Args:
        model: as it will be measured, for its sizes and settings; its weights are not read.
        data: the training images, which FID compares with unless the settings name a reference.
        head_steps: of a teacher's inner chain, in place of the model's default.

    Attributes:
        best: ``fid`` and ``step`` of the best evaluation, the ``misses`` since, why to ``stop``; saved with the run.

    Raises:
        ValueError: a network or a reference that does not exist or does not suit the images, or no images at all.
    """

    def __init__(
        self, config: CurveConfig, model: Pipeline, data: ImageDataset | LatentDataset, world: World,
        head_steps: int | None = None,
    ):  # fmt: skip
        self.config, self.world, self.head_steps = config, world, head_steps
        self.best: dict[str, Any] = {"fid": float("inf"), "step": 0, "misses": 0, "stop": ""}
        if not config.eval_every:
            return
        model.require_images()
        model.settings(head_steps=head_steps)
        if not config.reference and isinstance(data, LatentDataset):
            remedy = "name real images, or their statistics, with --reference"
            raise ValueError(f"{data.source}, are latents, and evaluations compare images: {remedy}")
        network = load_features(config.features, world.device) if world.is_main else None
        world.barrier()  # the first process may have had to download it
        self.network = network or load_features(config.features, world.device)
        self.reference = self._reference(model, data, self.network)
        check_features(model, self.reference, self.network)

    def _reference(self, model: Pipeline, data: ImageDataset | LatentDataset, network: FeatureNetwork) -> Reference:
        """What the settings name, or the training images; the features of no more images than an evaluation draws.

        FID takes the statistics of all. Precision and recall depend on the number of images that span their balls, and
        take time in proportion to its square.
        """
        config = self.config
        if config.reference or isinstance(data, LatentDataset):
            sizes = model.tokenizer.image_size, model.tokenizer.image_channels
            found = load_reference(config.reference, network, *sizes, self.world)
        else:
            found = of_images(data, network, self.world)
        if found.features is None or len(found.features) <= config.eval_images:
            return found
        some = torch.randperm(len(found.features), generator=generator(config.seed, _SUBSET_KEY))
        return dataclasses.replace(found, features=found.features[some[: config.eval_images]])

    def look(self, model: Pipeline, step: int, run: Run) -> bool:
        """Measure the averaged model after ``step`` updates, on all processes; whether it is the best so far.

        It then learns its number in its provenance, and is the caller's to save, in `folder`.
        """
        config, best = self.config, self.best
        settings = EvaluateConfig(
            num_images=config.eval_images, seed=config.seed + HELD_OUT_SEED, precision=config.precision,
            batch=self.world.parts(config.batch, config.accumulate)[0].own.stop,  # as many as an update takes at once
        )  # fmt: skip
        chosen = {"head_steps": self.head_steps}
        found = evaluate(
            model, self.reference, self.network, settings, chosen, world=self.world, weights=f"of update {step}"
        )  # fmt: skip
        row = torch.tensor([[found.get(name, float("nan")) for name in MEASURES]], dtype=torch.float64)
        shared = self.world.gather_rows(row.to(self.world.device))[0].tolist()  # the first process has them
        values = {name: value for name, value in zip(MEASURES, shared, strict=True) if value == value}
        run.log(step, **{f"{name}_heldout": value for name, value in values.items()})

        better = values["fid"] < best["fid"]
        if better:
            best.update(fid=values["fid"], step=step, misses=0)
            model.provenance |= {"best_update": step, "fid_heldout": float(f"{values['fid']:.6g}")}
        else:
            best["misses"] += 1
        if 0 < config.patience <= best["misses"]:
            since = f"since that of update {best['step']}, which is in {folder(run.out)}"
            best["stop"] = f"no FID below {best['fid']:.4g} in {best['misses']} evaluations {since}"
        if self.world.is_main:
            numbers = ", ".join(f"{name.upper() if len(name) == 3 else name} {v:.4g}" for name, v in values.items())
            record = "the best so far" if better else f"best: {best['fid']:.4g} at update {best['step']}"
            tqdm.write(f"update {step}: {numbers} ({record})", file=sys.stderr)
        return better


def of_images(data: ImageDataset, network: FeatureNetwork, world: World) -> Reference:
    """The training images as a network sees them."""
    images, statistics = data.images, None
    features: list[Tensor] = []

    def read(rows: range) -> np.ndarray:
        return images[np.array(rows)]

    for part in features_in_chunks(len(images), read, network, world, "reference"):
        features.append(part["pooled"])
        statistics = statistics or Statistics(features[0].shape[1])
        statistics.add(features[-1])
    assert statistics is not None
    return Reference(data.source, "training images", len(images), statistics.moments(), None, torch.cat(features))


def folder(out: Path) -> Path:
    """Where the best model of a run lies."""
    return out / "best"
