"""Published image classifiers, built from their files: ImageNet's MobileNetV2 and the CIFAR-10 ResNets.

They give features for Frechet distances and accuracies where Inception's weights are not at hand, and rewards.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from marval import imagenet
from marval.checkpoint import load_strictly

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class MobileNetV2(nn.Module):
    """ImageNet MobileNetV2 (arXiv 1801.04381) of 224x224 images, with the normalisation folded into its convolutions.

    Args:
        plan: steps ["conv", i, source, target, stride, depthwise], ["add", a, b, target] and ["mean", source, target]
            over numbered values.
        weights: c00.w (O, I, k, k), c00.b (O,), c01.w, ...
    """

    def __init__(self, plan: list[Any], weights: dict[str, Tensor]):
        super().__init__()
        self.plan, self.convolutions = plan, [step for step in plan if step[0] == "conv"]
        for name, weight in weights.items():
            self.register_buffer(name.replace(".", "_"), weight)

    @classmethod
    def load(cls, path: Path) -> "MobileNetV2":
        """From an .npz with ``plan`` (JSON) and the weights.

        Raises:
            ValueError: another file, or an array of the plan is missing.
        """
        try:
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as pack:
                plan = json.loads(str(pack["plan"]))
                names = [name for name in pack.files if name != "plan"]
                weights = {name: torch.from_numpy(pack[name].astype(np.float32)) for name in names}
            needed = [f"c{step[1]:02d}.{part}" for step in plan if step[0] == "conv" for part in "wb"]
        except Exception as error:  # numpy raises ValueError, OSError, EOFError, BadZipFile, KeyError, ...
            reason = f"is not a MobileNetV2 .npz with a plan ({type(error).__name__})"
            raise ValueError(f"{path} {reason}: give another") from None
        if missing := sorted(set(needed) - set(weights)):
            raise ValueError(f"{path}: array {missing[0]!r} of the plan is missing: copy the file again")
        return cls(plan, weights)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, 224, 224) in [-1, 1] -> last map (B, 1280, 7, 7), its mean (B, 1280), logits (B, 1000)."""
        values, last, pooled = {self.convolutions[0][2]: x}, x, x
        for step in self.plan:
            if step[0] == "add":
                values[step[3]] = values[step[1]] + values[step[2]]
            elif step[0] == "mean":
                last = values[step[1]]
                values[step[2]] = pooled = last.mean((2, 3), keepdim=True)
            else:
                _, i, source, target, stride, depthwise = step
                weight, bias = self.get_buffer(f"c{i:02d}_w"), self.get_buffer(f"c{i:02d}_b")
                h = values[source]
                # "same" padding as TensorFlow's: what is odd goes to the right and to the bottom
                padding = max((-(-h.shape[-1] // stride) - 1) * stride + weight.shape[-1] - h.shape[-1], 0)
                h = F.pad(h, (padding // 2, padding - padding // 2) * 2)
                h = F.conv2d(h, weight, bias, stride, groups=len(weight) if depthwise else 1)
                linear = (i > 0 and self.convolutions[i - 1][5]) or i == len(self.convolutions) - 1
                values[target] = h if linear else h.clamp(0, 6)
        logits = values[self.convolutions[-1][3]].flatten(1)
        return last, pooled.flatten(1), logits[:, -1000:]  # of 1,001, the first stands for "background"


class _Residual(nn.Module):
    """relu(shortcut + bn(conv(relu(bn(conv(x)))))); the shortcut skips pixels and pads channels (option A)."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.stride = 1 if width == width_in else 2
        self.conv1 = nn.Conv2d(width_in, width, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        more = h.shape[1] - x.shape[1]
        return F.relu(h + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, more // 2, more // 2)))


class CifarResNet(nn.Module):
    """He et al. 2016 (arXiv 1512.03385), section 4.2: three stages of 16, 32 and 64 channels; 6 n + 2 layers."""

    def __init__(self, blocks: int):
        super().__init__()
        self.depth = 6 * blocks + 2
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (width_in, width) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            layers = [_Residual(width_in if i == 0 else width, width) for i in range(blocks)]
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.linear = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, 32, 32) -> (B, 64)."""
        h = F.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            h = self.get_submodule(f"layer{stage}")(h)
        return h.mean((2, 3))

    @classmethod
    def load(cls, path: Path) -> "CifarResNet":
        """From akamaster's .th files, whose ``state_dict`` has the names ``module.layer1.0.conv1.weight`` and so on.

        Raises:
            ValueError: another file; a missing, unexpected or misshapen tensor.
        """
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            tensors = {name.removeprefix("module."): value for name, value in saved["state_dict"].items()}
            blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layer1."))
        except Exception as error:  # torch.load and what is not such a file raise anything
            raise ValueError(f"{path} is not a CIFAR-10 ResNet with a `state_dict` ({type(error).__name__})") from None
        network = cls(blocks)
        state = network.state_dict()
        counters = {name: value for name, value in state.items() if name.endswith("num_batches_tracked")}
        load_strictly(network, counters | tensors, str(path))
        return network.eval()


class PublishedClassifier(nn.Module):
    """One of these networks behind its preprocessing, for images float NCHW in [0, 1] of any size, 1 or 3 channels.

    Attributes:
        name, preprocessing: for protocols. class_names: what its logits stand for.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: CifarResNet | MobileNetV2, file_name: str):
        super().__init__()
        self.network = network
        if isinstance(network, CifarResNet):
            self.name, self.class_names = f"CIFAR-10 ResNet-{network.depth} ({file_name})", CIFAR10
            self.preprocessing = "32x32 (others: bilinear with antialiasing), ImageNet's mean and std"
            self.size, mean, std = 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        else:
            self.name, self.class_names = f"ImageNet MobileNetV2 ({file_name})", imagenet.names()
            self.preprocessing = "pixels in [-1, 1], bilinear with antialiasing to 224x224"
            self.size, mean, std = 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    @classmethod
    def load(cls, path: Path) -> "PublishedClassifier":
        """A CIFAR-10 ResNet (.th) or ImageNet's MobileNetV2 (.npz).

        Raises:
            ValueError: no such file, or not what its ending says.
        """
        if not path.is_file():
            raise ValueError(f"no classifier {path}: the file does not exist")
        return cls((CifarResNet if path.suffix == ".th" else MobileNetV2).load(path), path.name)

    def outputs(self, images: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Spatial features (B, S), penultimate features (B, F) and logits (B, K).

        The ResNet has no spatial ones. MobileNetV2's are the first 26 channels of the 7x7 map before the pooling, 1,274
        numbers: about as many as pooled ones, which is how ADM chose Inception's 7 channels of 17x17.
        """
        x = images.expand(-1, 3, -1, -1)
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        x = (x - self.mean) / self.std
        if isinstance(self.network, CifarResNet):
            pooled = self.network.features(x)
            return None, pooled, self.network.linear(pooled)
        last, pooled, logits = self.network(x)
        return last[:, :26].flatten(1), pooled, logits

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.outputs(images)[2]
