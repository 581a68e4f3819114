"""Rewards by name, those of a user's own functions, and sums of several (one call of a reward: `marval.scoring`)."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marval.imagenet import class_indices
from marval.models.blip import ImageReward
from marval.models.clip import Clip
from marval.models.quality import Brisque
from marval.reward_files import check_files, summands
from marval.reward_models import (
    Aesthetic,
    ClassifierLogProb,
    ClipScore,
    HpsScore,
    ImageRewardScore,
    PickScore,
    Quality,
    ReadsClass,
    load_classifier,
)
from marval.scoring import BaseReward, Reward, RewardError, name_of, score
from marval.user_code import import_function

CHUNK = 32
"""Images that a reward sees at a time while many are scored before a run."""


def class_prompts(template: str, class_names: Sequence[str]) -> list[str]:
    """The prompt of each class.

    Raises:
        ValueError: several classes, but no {class} in the template.
    """
    if len(class_names) > 1 and "{class}" not in template:
        raise ValueError(f"prompt {template!r} is the same for all {len(class_names)} classes: put {{class}} into it")
    return [template.replace("{class}", name) for name in class_names]


class UserReward(BaseReward):
    """A user's function (images, prompts) -> (B,); its attribute ``differentiable`` counts, default False."""

    def __init__(self, function: Callable[[Tensor, list[str]], Tensor]):
        self.function = function
        self.differentiable = bool(getattr(function, "differentiable", False))
        self.name = getattr(function, "name", "") or getattr(function, "__name__", type(function).__name__)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.function(images, prompts)


class Verifiable(BaseReward):
    """A user's check (images, prompts) -> (B,) truths: booleans or numbers 0 and 1, as a tensor or a list."""

    differentiable = False
    takes_first = True

    def __init__(self, function: Callable[[Tensor, list[str]], Any]):
        self.function = function

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], first: int = 0) -> Tensor:
        values = torch.as_tensor(self.function(images, prompts), device=images.device)
        if values.shape == (len(images),) and not (truth := (values == 0) | (values == 1)).all():
            bad = int((~truth).nonzero()[0])
            raise RewardError(
                f"reward {name_of(self)!r} is {values[bad].item()} for image {first + bad} ({prompts[bad]!r}): a "
                "verifiable reward is 0 or 1"
            )
        return values.float()


def exact_match(read: Callable[[Tensor], Sequence[str]], answers: Mapping[str, str]) -> Verifiable:
    """1 where the text that ``read`` finds in an image is exactly the answer that its prompt asks for, else 0.

    Args:
        read: images float NCHW in [0, 1] -> B texts. answers: by prompt; of a prompt that is not there, ValueError.
    """

    def check(images: Tensor, prompts: list[str]) -> list[bool]:
        if unknown := [prompt for prompt in prompts if prompt not in answers]:
            raise ValueError(f"prompt {unknown[0]!r} belongs to no class")
        texts = list(read(images))
        return [text == answers[prompt] for text, prompt in zip(texts, prompts, strict=True)]

    return Verifiable(check)


class WeightedSum(BaseReward):
    """sum_i weights_i (reward_i - means_i) / stds_i; differentiable if all its parts are.

    Means 0 and deviations 1 leave the rewards as they are; `calibrate` measures them, so that the weights compare
    rewards of different units.
    """

    takes_first = True

    def __init__(
        self, rewards: Sequence[Reward], weights: Sequence[float], means: Sequence[float] = (),
        stds: Sequence[float] = (),
    ):  # fmt: skip
        self.rewards, self.weights = list(rewards), list(weights)
        self.means, self.stds = list(means) or [0.0] * len(self.rewards), list(stds) or [1.0] * len(self.rewards)
        if not len(self.rewards) == len(self.weights) == len(self.means) == len(self.stds) or not self.rewards:
            raise ValueError(f"{len(self.rewards)} rewards, {len(self.weights)} weights, {len(self.stds)} deviations")
        if not all(math.isfinite(w) and w for w in self.weights) or not all(0 < s < math.inf for s in self.stds):
            raise ValueError(f"weights {self.weights} must not be 0, deviations {self.stds} must be above 0")
        self.differentiable = all(reward.differentiable for reward in self.rewards)
        self.name = " + ".join(f"{w:g}*{name_of(r)}" for w, r in zip(self.weights, self.rewards, strict=True))

    def parts(self, images: Tensor, prompts: list[str], first: int = 0) -> Tensor:
        """Each reward as it is, (rewards, B)."""
        return torch.stack([score(reward, images, prompts, first) for reward in self.rewards])

    def __call__(self, images: Tensor, prompts: list[str], first: int = 0) -> Tensor:
        return self.combine(self.parts(images, prompts, first))

    def combine(self, values: Tensor) -> Tensor:
        """The sum of `parts`."""
        weights, means, stds = (values.new_tensor(x)[:, None] for x in (self.weights, self.means, self.stds))
        return (weights * (values - means) / stds).sum(0)


@torch.no_grad()
def calibrate(reward: WeightedSum, images: Tensor, prompts: list[str]) -> WeightedSum:
    """The sum with parts of mean 0 and deviation 1 on these images.

    Args:
        images: of the starting student, many and of different classes; the same on every process.

    Raises:
        ValueError: as `score`, or a part is constant on these images, so that no deviation is known.
    """
    starts = range(0, len(images), CHUNK)
    values = torch.cat([reward.parts(images[i : i + CHUNK], prompts[i : i + CHUNK], i) for i in starts], 1).double()
    means, stds = values.mean(1), values.std(1, correction=0)
    for part, mean, std in zip(reward.rewards, means.tolist(), stds.tolist(), strict=True):
        if std <= 1e-6 * abs(mean):
            raise RewardError(
                f"reward {name_of(part)!r} is {mean:g} for all {len(images)} images of the starting model: it cannot "
                "be normalised; leave it out of the sum, or change its scale"
            )
    return WeightedSum(reward.rewards, reward.weights, means.tolist(), stds.tolist())


def load_reward(
    spec: str, *, classifier: str, class_names: Sequence[str], template: str, device: torch.device | str
) -> Reward:
    """A reward by name.

    ``classifier``              `ClassifierLogProb`
    ``reads-class``             `ReadsClass`
    ``pickscore:SOURCE``        `PickScore`, ``clip:SOURCE`` `ClipScore`: see `Clip.load`
    ``hps:SOURCE``              `HpsScore.load`
    ``imagereward:SOURCE``      `ImageRewardScore`: see `ImageReward.load`
    ``aesthetic:CLIP:HEAD``     `Aesthetic.load`; the file's name holds no colon
    ``brisque:FOLDER``          `Quality`: see `Brisque.load`
    ``FILE.py:function``        `UserReward`
    ``verifiable:FILE.py:function``   `Verifiable`
    ``exact-match:FILE.py:function``  `exact_match` of the texts that the function reads with the class names
    ``W*REWARD + W*REWARD``     `WeightedSum`, not calibrated; a plus separates only with spaces around it and a weight
                                with ``*`` after it, so that paths may contain one. A negative weight is a penalty.

    Args:
        classifier: of the first two: a folder of marval train-classifier, a CIFAR-10 ResNet (.th) or ImageNet's
            MobileNetV2 (.npz), see `load_classifier`.
        class_names: of the model to be trained. template: of its prompts, with {class}.

    Raises:
        ValueError: unknown name, no such file or function, a classifier of other classes, or no whole model; names
            the part of a sum. See `check_files`.
    """
    if parts := summands(spec):
        rewards = [
            load_reward(part, classifier=classifier, class_names=class_names, template=template, device=device)
            for _, part in parts
        ]
        return WeightedSum(rewards, [weight for weight, _ in parts])
    try:
        reward = _load_one(spec, classifier, class_names, template, device)
    except ValueError as error:
        raise ValueError(str(error) if spec in str(error) else f"reward {spec!r}: {error}") from error.__cause__
    reward.name = spec
    return reward


def _load_one(
    spec: str, classifier: str, class_names: Sequence[str], template: str, device: torch.device | str
) -> BaseReward:
    check_files(spec, classifier)
    prompts = class_prompts(template, class_names)
    kind, _, source = spec.partition(":")
    models: dict[str, Callable[[], BaseReward]] = {
        "clip": lambda: ClipScore(Clip.load(source, device)),
        "pickscore": lambda: PickScore(Clip.load(source, device)),
        "hps": lambda: HpsScore.load(source, device),
        "imagereward": lambda: ImageRewardScore(ImageReward.load(source, device)),
        "aesthetic": lambda: Aesthetic.load(source, device),
        "brisque": lambda: Quality(Brisque.load(Path(source)).to(device)),
        "verifiable": lambda: Verifiable(import_function(source, "reward", "images", "prompts")),
        "exact-match": lambda: exact_match(
            import_function(source, "reward", "images"), dict(zip(prompts, class_names, strict=True))
        ),
    }
    if kind in models:
        reward = models[kind]()
        if isinstance(reward, ClipScore):
            reward.clip.texts(prompts)  # kept there; one that is too long is refused now
        elif isinstance(reward, ImageRewardScore):
            reward.network.tokens(prompts)
        return reward
    built_in = {"classifier": ClassifierLogProb, "reads-class": ReadsClass}.get(spec)
    if built_in is None:
        return UserReward(import_function(spec, "reward", "images", "prompts"))
    network = load_classifier(classifier, device)
    indices = class_indices(network.class_names, class_names)
    if indices is None:
        ours, theirs = (", ".join(list(names)[:5]) for names in (class_names, network.class_names))
        raise ValueError(f"classifier {classifier} knows the classes {theirs}, but the model {ours}: train one on them")
    asked = class_prompts(template, network.class_names)
    for index, prompt in zip(indices, prompts, strict=True):
        asked[index] = prompt  # the model's own name of the class
    return built_in(network, asked)
