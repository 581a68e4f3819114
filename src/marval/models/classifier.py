"""Two small image classifiers of different kinds: reward models, judges, and features of Frechet distances."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from marval.checkpoint import load_strictly, load_tensors, read_json, save_tensors, write_json
from marval.config import check, from_dict, to_dict
from marval.shipped import classifier_folder

FORMAT = 1
FEATURES = 64
Arch = Literal["conv", "resnet"]


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Sizes of a classifier."""

    image_size: int
    """Side of the square images."""
    channels: int
    """1 (grey) or 3 (RGB)."""
    num_classes: int
    """Number of classes, K."""
    arch: Arch = "conv"
    """`conv`: convolution - BatchNorm - ReLU, max pooling; `resnet`: residual, GroupNorm, SiLU, average pooling."""
    width: int = 32
    """Channels of the first stage; each later one has twice as many, up to 4 times this."""

    def __post_init__(self) -> None:
        check(self.image_size >= 4, f"image_size must be at least 4, got {self.image_size}")
        check(self.channels in (1, 3), f"channels must be 1 or 3, got {self.channels}")
        check(self.num_classes >= 1, f"num_classes must be at least 1, got {self.num_classes}")
        check(self.arch in ("conv", "resnet"), f"unknown arch {self.arch!r}: choose conv or resnet")
        check(self.width >= 8 and self.width % 8 == 0, f"width must be a multiple of 8, got {self.width}")

    @property
    def stage_widths(self) -> list[int]:
        """Channels at image_size, image_size / 2, ... down to a side of 4 to 7 pixels."""
        stages = self.image_size.bit_length() - 2
        return [self.width * min(2**i, 4) for i in range(stages)]


def _conv(config: ClassifierConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    last = config.channels
    for width in config.stage_widths:
        layers += [nn.MaxPool2d(2)] if layers else []
        for _ in range(2):
            layers += [nn.Conv2d(last, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            last = width
    layers += [nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(4 * last, FEATURES), nn.ReLU()]
    return nn.Sequential(*layers)


class _Residual(nn.Module):
    """shortcut(x) + conv(act(norm(conv(act(norm(x)))))) at ``stride``."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width_in), nn.SiLU(), nn.Conv2d(width_in, width, 3, stride, 1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, 1, 1),
        )  # fmt: skip
        self.shortcut = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x, self.stride, ceil_mode=True) if self.stride > 1 else x
        return self.shortcut(pooled) + self.body(x)


def _resnet(config: ClassifierConfig) -> nn.Sequential:
    last = config.width
    layers: list[nn.Module] = [nn.Conv2d(config.channels, last, 3, padding=1)]
    for i, width in enumerate(config.stage_widths):
        layers += [_Residual(last, width, 2 if i else 1)]
        last = width
    layers += [nn.GroupNorm(8, last), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, FEATURES)]
    return nn.Sequential(*layers, nn.SiLU())


class Classifier(nn.Module):
    """Images (float NCHW in [0, 1]) -> logits (B, K); differentiable with respect to the images.

    Attributes:
        config: sizes. class_names: K names. provenance: free JSON: data, its licence, settings, accuracies.
    """

    def __init__(self, config: ClassifierConfig, class_names: Sequence[str], provenance: dict[str, Any] | None = None):
        super().__init__()
        if len(class_names) != config.num_classes:
            raise ValueError(f"{len(class_names)} class names for {config.num_classes} classes")
        self.config = config
        self.class_names = list(class_names)
        self.provenance = provenance or {}
        self.body = (_conv if config.arch == "conv" else _resnet)(config)
        self.head = nn.Linear(FEATURES, config.num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features, (B, 64).

        Raises:
            ValueError: the images differ in shape from those it was trained on.
        """
        channels, size = self.config.channels, self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (channels, size, size):
            raise ValueError(f"this classifier reads images (B, {channels}, {size}, {size}), got {list(images.shape)}")
        return self.body(2 * images - 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def save(self, path: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into the folder, each atomically."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        save_tensors(path / "model.safetensors", self.state_dict())
        config = {"format": FORMAT, "classifier": to_dict(self.config), "class_names": self.class_names}
        write_json(path / "config.json", {**config, "provenance": self.provenance})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "Classifier":
        """A folder that `save` wrote, or a classifier that comes with marval, in eval mode.

        Raises:
            ValueError: something is missing, damaged or does not fit; the message names the file and the tensor.
        """
        path = classifier_folder(path)
        file = path / "config.json"
        config = read_json(file)
        if not isinstance(config, dict) or config.get("format") != FORMAT or "classifier" not in config:
            raise ValueError(f"{file} does not describe a marval classifier: make one with marval train-classifier")
        try:
            sizes = from_dict(ClassifierConfig, config["classifier"])
            classifier = cls(sizes, config["class_names"], config.get("provenance"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from None
        file = path / "model.safetensors"
        load_strictly(classifier, load_tensors(file), str(file))
        return classifier.to(device).eval()
