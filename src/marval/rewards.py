"""Rewards: callables on images (float NCHW in [0, 1]) and their prompts, giving one number per image, (B,)."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from marval.models.classifier import Classifier
from marval.models.clip import Clip


class Reward(Protocol):
    """Higher is better. A differentiable reward carries gradients to the images."""

    differentiable: bool

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor: ...


def prompt_for(template: str, class_name: str) -> str:
    """The template with {class} replaced by the name."""
    return template.replace("{class}", class_name)


def class_prompts(template: str, class_names: Sequence[str]) -> list[str]:
    """The prompt of each class.

    Raises:
        ValueError: several classes, but no {class} in the template.
    """
    if len(class_names) > 1 and "{class}" not in template:
        raise ValueError(f"prompt {template!r} is the same for all {len(class_names)} classes: put {{class}} into it")
    return [prompt_for(template, name) for name in class_names]


class _ClassifierReward:
    def __init__(self, classifier: Classifier, prompts_by_class: list[str]):
        """Freezes the classifier. ``prompts_by_class``: one prompt per class, all different, else ValueError."""
        if len(prompts_by_class) != classifier.config.num_classes:
            raise ValueError(f"{len(prompts_by_class)} prompts for {classifier.config.num_classes} classes")
        self.classifier = classifier.eval().requires_grad_(False)
        self.classes = {prompt: index for index, prompt in enumerate(prompts_by_class)}
        if len(self.classes) < len(prompts_by_class):
            raise ValueError("two classes have the same prompt: give every class a name of its own")

    def labels(self, prompts: list[str], device: torch.device) -> Tensor:
        """Class index of each prompt, (B,)."""
        if unknown := [prompt for prompt in prompts if prompt not in self.classes]:
            raise ValueError(f"prompt {unknown[0]!r} belongs to no class of the classifier")
        return torch.tensor([self.classes[prompt] for prompt in prompts], device=device)


class ClassifierLogProb(_ClassifierReward):
    """log p(asked class | image) under a classifier, at most 0."""

    differentiable = True

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        labels = self.labels(prompts, images.device)
        return self.classifier(images).log_softmax(1).gather(1, labels[:, None])[:, 0]


class ReadsClass(_ClassifierReward):
    """1 if the classifier's most likely class is the asked one, else 0."""

    differentiable = False

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (self.classifier(images).argmax(1) == self.labels(prompts, images.device)).float()


class ClipScore:
    """100 times the cosine of image and prompt under a CLIP: the CLIP score, at most 100.

    The unit of torchmetrics and of the papers whose CLIP scores are near 30, MARVAL's 29.33 among them; Hessel et al.
    (arXiv 2104.08718) scale the same cosine by 2.5. They clamp at 0, where a reward would lose its gradient; ours does
    not. A score means nothing without the name of the CLIP.
    """

    differentiable = True

    def __init__(self, clip: Clip):
        self.clip = clip

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return 100 * self.clip.cosine(images, prompts)


class PickScore:
    """exp(logit_scale) times the cosine of image and prompt under PickScore's CLIP-H (arXiv 2305.01569).

    As its authors' code: for PickScore_v1 the scale is about 100, and scores are about 18 to 24. Some codes divide
    by 100 or by 26 afterwards.
    """

    differentiable = True

    def __init__(self, clip: Clip):
        self.clip = clip

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.clip.logit_scale * self.clip.cosine(images, prompts)


class UserReward:
    """A user's function (images, prompts) -> (B,); its attribute ``differentiable`` counts, default False."""

    def __init__(self, function: Callable[[Tensor, list[str]], Tensor]):
        self.function = function
        self.differentiable = bool(getattr(function, "differentiable", False))

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.function(images, prompts)


def _import_function(spec: str) -> Callable[..., Any]:
    """``path/to/file.py:function``, or a ValueError."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"reward file {file!r} does not exist: give path/to/file.py:function")
    module_spec = importlib.util.spec_from_file_location(f"marval_reward_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"reward file {file!r} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look their module up
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_spec.name]
        raise ValueError(f"reward file {file!r} fails on import: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if function is None:
        defined = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")) or "none"
        raise ValueError(f"reward file {file!r} has no function {name!r}: it has {defined}")
    if not callable(function):
        raise ValueError(f"{name!r} of {file!r} is a {type(function).__name__}, not a function: name a function")
    return function


def load_reward(
    spec: str, *, classifier: str, class_names: Sequence[str], template: str, device: torch.device | str
) -> Reward:
    """A reward by name.

    Args:
        spec: ``classifier`` (`ClassifierLogProb`), ``reads-class`` (`ReadsClass`), ``clip:SOURCE`` (`ClipScore`) or
            ``pickscore:SOURCE`` (`PickScore`) with a folder or a hub name, or ``path/to/file.py:function``.
        classifier: folder of the classifier that the first two use.
        class_names: of the model to be trained. template: of its prompts, with {class}.

    Raises:
        ValueError: unknown name, no such file or function, a classifier of other classes, or no whole CLIP.
    """
    prompts = class_prompts(template, class_names)
    kind, _, source = spec.partition(":")
    if kind in ("clip", "pickscore"):
        if not source:
            raise ValueError(f"reward {spec!r} needs a model: give {kind}:FOLDER or {kind}:HUB_NAME")
        return {"clip": ClipScore, "pickscore": PickScore}[kind](Clip.load(source, device))
    built_in = {"classifier": ClassifierLogProb, "reads-class": ReadsClass}.get(spec)
    if built_in is None:
        if ":" not in spec:
            known = "classifier, reads-class, clip:FOLDER, pickscore:FOLDER or path/to/file.py:function"
            raise ValueError(f"unknown reward {spec!r}: choose {known}")
        return UserReward(_import_function(spec))
    if not classifier:
        raise ValueError(f"reward {spec!r} needs a classifier's folder: make one with marval train-classifier")
    network = Classifier.load(classifier, device)
    if network.class_names != list(class_names):
        ours, theirs = (", ".join(list(names)[:5]) for names in (class_names, network.class_names))
        raise ValueError(f"classifier {classifier} knows the classes {theirs}, but the model {ours}: train one on them")
    return built_in(network, prompts)


def score(reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """Rewards (B,) float32 of a batch, on its device, with their graph.

    Raises:
        ValueError: the result is not a finite floating-point tensor of shape (B,).
    """
    rewards: Any = reward(images, prompts)
    wanted = f"it must return a floating-point tensor of shape ({len(images)},), one number per image"
    if not isinstance(rewards, Tensor):
        raise ValueError(f"the reward returned a {type(rewards).__name__}: {wanted}")
    if rewards.shape != (len(images),) or not rewards.is_floating_point():
        raise ValueError(f"the reward returned {rewards.dtype} of shape {tuple(rewards.shape)}: {wanted}")
    if not rewards.isfinite().all():
        bad = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(f"the reward of image {bad} ({prompts[bad]!r}) is {rewards[bad].item()}: it must be finite")
    return rewards.to(images.device, torch.float32)


def check_reward(reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """`score` of a trial batch, detached, so that a bad reward is found before any work starts.

    Raises:
        ValueError: as `score`, or a reward that calls itself differentiable gave one without gradient.
    """
    with torch.enable_grad():
        rewards = score(reward, images.detach().requires_grad_(reward.differentiable), prompts)
    if reward.differentiable and not rewards.requires_grad:
        raise ValueError("the reward calls itself differentiable but its result carries no gradient to the images")
    return rewards.detach()
