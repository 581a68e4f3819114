"""Rewards that published networks give, and classifiers of ours: see `marval.rewards.load_reward`."""

from pathlib import Path

import torch
from torch import Tensor, nn

from marval.checkpoint import read_state_dict
from marval.hub import hub_file
from marval.models.blip import ImageReward
from marval.models.classifier import Classifier
from marval.models.clip import Clip
from marval.models.quality import Brisque, aesthetic_head
from marval.models.vision import PublishedClassifier
from marval.reward_files import HPS_CLIP, HPS_WEIGHTS, head_file
from marval.scoring import BaseReward


def load_classifier(source: str, device: torch.device | str) -> Classifier | PublishedClassifier:
    """A folder of marval train-classifier, a CIFAR-10 ResNet (.th) or ImageNet's MobileNetV2 (.npz), or ValueError."""
    path = Path(source)
    if path.suffix not in (".th", ".npz"):
        return Classifier.load(path, device)
    return PublishedClassifier.load(path).to(device)


class _ClassifierReward(BaseReward):
    def __init__(self, classifier: Classifier | PublishedClassifier, prompts_by_class: list[str]):
        """Freezes the classifier. ``prompts_by_class``: one prompt per class, all different, else ValueError."""
        if len(prompts_by_class) != len(classifier.class_names):
            raise ValueError(f"{len(prompts_by_class)} prompts for {len(classifier.class_names)} classes")
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


class ClipScore(BaseReward):
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


class HpsScore(ClipScore):
    """100 times the cosine of image and prompt under HPSv2's CLIP-H (arXiv 2306.09341), at most 100.

    The unit of its authors' tables (v2.1: 25 to 31 for their models); their function ``score`` returns the cosine.
    Comparable only between images of the same prompt and with the same version, by their own word. Square images are
    preprocessed as by other CLIPs; the authors resize tensors, where torchvision's version decides on antialiasing, and
    pad images that are not square.
    """

    @classmethod
    def load(cls, source: str, device: torch.device | str) -> "HpsScore":
        """As `Clip.load`, or ValueError. Of a hub name, such as xswu/HPSv2, the weights are HPS_v2.1_compressed.pt, and
        the other files those of laion/CLIP-ViT-H-14-laion2B-s32B-b79K."""
        if Path(source).exists():
            return cls(Clip.load(source, device))
        return cls(Clip.load(str(hub_file(source, HPS_WEIGHTS)), device, HPS_CLIP))


class PickScore(ClipScore):
    """exp(logit_scale) times the cosine of image and prompt under PickScore's CLIP-H (arXiv 2305.01569).

    As its authors' code: for PickScore_v1 the scale is about 100, and scores are about 18 to 24. Some codes divide
    by 100 or by 26 afterwards.
    """

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.clip.logit_scale * self.clip.cosine(images, prompts)


class ImageRewardScore(BaseReward):
    """ImageReward (arXiv 2304.05977), normalised as by its authors: mean 0 and deviation 1 over their images."""

    differentiable = True

    def __init__(self, network: ImageReward):
        self.network = network

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.network(images, prompts)


class Aesthetic(BaseReward):
    """LAION's aesthetic score: a head on the unit embedding of CLIP ViT-L/14. It reads no prompt.

    Fitted to people's ratings from 1 to 10, of which it gives an average; nothing keeps it within that range.
    """

    differentiable = True

    def __init__(self, clip: Clip, head: nn.Module):
        self.clip, self.head = clip, head

    @classmethod
    def load(cls, source: str, device: torch.device | str) -> "Aesthetic":
        """``CLIP:HEAD``, a CLIP (see `Clip.load`) and the file of a head (see `head_file`), or ValueError."""
        name, _, file = source.rpartition(":")
        head = aesthetic_head(read_state_dict(head_file(file))[0], file).to(device)
        clip, width = Clip.load(name, device), next(head.parameters()).shape[1]
        if clip.model.config.projection_dim != width:
            has = f"embeddings {clip.model.config.projection_dim} wide, the head {file} reads {width}"
            raise ValueError(f"the CLIP {name} has {has}: take the CLIP it was trained on (ViT-L/14)")
        return cls(clip, head)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(self.clip.images(images))[:, 0]


class Quality(BaseReward):
    """Minus `Brisque`: -100 (bad) to 0 (good). A black box: BRISQUE has no gradient. It reads no prompt."""

    differentiable = False

    def __init__(self, brisque: Brisque):
        self.brisque = brisque

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return -self.brisque(images)
