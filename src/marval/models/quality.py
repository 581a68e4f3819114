"""Quality of an image without a reference: BRISQUE, and the heads that score an embedding."""

import functools
import itertools
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from marval.checkpoint import load_strictly

MODEL, RANGE = "brisque_model_live.yml", "brisque_range_live.yml"
WIDTHS = (1024, 128, 64, 16, 1)
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))  # neighbours: right, below, both diagonals
_FEATURES = 36
_WINDOW, _SIGMA = 7, 7 / 6


class ScoreHead(nn.Module):
    """Five linear layers, embedding (B, width) -> 1024 -> 128 -> 64 -> 16 -> score (B, 1).

    The head of the improved aesthetic predictor and of ImageReward, under their names ``layers.0.weight``, ...: the
    positions of dropout, and of activations where there are any, are left out of the count of modules.
    """

    def __init__(self, width: int, relu: bool = False):
        """``relu``: between the layers, which no published head has but ``ava+logos-l14-reluMSE.pth``."""
        super().__init__()
        places = (0, 3, 6, 9, 11) if relu else (0, 2, 4, 6, 7)
        self.layers = nn.ModuleDict()
        for place, (before, after) in zip(places, itertools.pairwise((width, *WIDTHS)), strict=True):
            self.layers[str(place)] = nn.Linear(before, after)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers.values()):
            x = layer(x.relu() if self.relu and i else x)
        return x


def aesthetic_head(tensors: Mapping[str, Tensor], source: str) -> nn.Module:
    """LAION's aesthetic head with these weights: unit CLIP embedding (B, C) -> (B, 1).

    Either one linear layer (``sa_0_4_vit_l_14_linear.pth``) or a `ScoreHead` (``sac+logos+ava1-l14-linearMSE.pth``).

    Raises:
        ValueError: names the tensor that is missing, unexpected or misshapen.
    """
    first = tensors.get("weight", tensors.get("layers.0.weight"))
    if first is None or first.ndim != 2:
        found = ", ".join(sorted(tensors)[:3])
        raise ValueError(f"{source} is no aesthetic head: tensor 'layers.0.weight' is missing (found: {found})")
    width = first.shape[1]
    head = nn.Linear(width, 1) if "weight" in tensors else ScoreHead(width, relu="layers.3.weight" in tensors)
    load_strictly(head, {name: tensor.float() for name, tensor in tensors.items()}, source)
    return head.eval().requires_grad_(False)


# ---- BRISQUE


class Brisque(nn.Module):
    """BRISQUE (Mittal, Moorthy, Bovik 2012): how natural an image looks, 0 (good) to 100 (bad).

    36 numbers describe the locally normalised luminance and products of its neighbours at two scales, as fits of
    asymmetric generalised Gaussians; a support vector machine, fitted to people's opinions of the LIVE database,
    turns them into the score. It is OpenCV's `QualityBRISQUE` on 8-bit images, up to rounding.

    Not differentiable: the image is rounded to 8 bits, and the shape of a Gaussian is looked up in a table.
    The score is clipped to [0, 100], as OpenCV does. OpenCV gives NaN for an image with a flat scale (nothing to
    fit); it is 100 here.
    """

    vectors: Tensor
    weights: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, vectors: Tensor, weights: Tensor, rho: float, gamma: float, low: Tensor, high: Tensor):
        """Support vectors (S, 36), their weights (S,), and the range (36,) of each feature; float64."""
        super().__init__()
        for name, value in (("vectors", vectors), ("weights", weights), ("low", low), ("high", high)):
            self.register_buffer(name, value)
        self.rho, self.gamma = rho, gamma

    @classmethod
    def load(cls, folder: Path) -> "Brisque":
        """From OpenCV's ``brisque_model_live.yml`` and ``brisque_range_live.yml`` in a folder.

        Raises:
            ValueError: a file is missing, or does not hold what OpenCV writes.
        """
        model, ranges = folder / MODEL, folder / RANGE
        vectors, weights, data = _numbers(model, "support_vectors"), _numbers(model, "alpha"), _numbers(ranges, "data")
        if len(data) != 2 * _FEATURES or len(vectors) != _FEATURES * len(weights):
            sizes = f"{len(vectors)} numbers of support vectors, {len(weights)} weights, {len(data)} of ranges"
            raise ValueError(f"{folder} holds {sizes}: BRISQUE has {_FEATURES} per vector and two ranges of as many")
        (rho,), (gamma,) = _numbers(model, "rho"), _numbers(model, "gamma")
        low, high = data.view(2, _FEATURES)
        return cls(vectors.view(-1, _FEATURES), weights, float(rho), float(gamma), low, high)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Float NCHW in [0, 1], 1 or 3 channels, sides of at least 8 -> score (B,) float32."""
        if min(images.shape[2:]) < 8:
            raise ValueError(f"BRISQUE needs sides of at least 8 pixels, got {images.shape[2]}x{images.shape[3]}")
        features, flat = brisque_features(images.to(self.vectors.device))
        scaled = 2 * (features - self.low) / (self.high - self.low) - 1
        kernel = torch.exp(-self.gamma * (scaled[:, None] - self.vectors).square().sum(2))
        scores = (kernel @ self.weights - self.rho).clamp(0, 100)
        return scores.masked_fill(flat, 100).to(images.device, torch.float32)


def _numbers(path: Path, name: str) -> Tensor:
    """Of the entry ``name`` of a file of OpenCV's: one number, a list, or a list of lists, (N,) float64.

    Raises:
        ValueError: there is no such file or entry.
    """
    try:
        text = path.read_text("ascii")
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{path} is missing or no text: BRISQUE needs OpenCV's {MODEL} and {RANGE}") from None
    number = r"[-+]?\d[\d.]*(?:e[-+]?\d+)?"
    found = re.search(rf"\b{name}: *({number}|(?:\s*(?:- )?\[[^\]]*\])+)", text)
    if found is None:
        raise ValueError(f"{path} has no whole entry {name!r}: it is not OpenCV's, or cut")
    return torch.tensor([float(n) for n in re.findall(number, found[1])], dtype=torch.float64)


@functools.cache
def _shapes() -> tuple[Tensor, Tensor]:
    """Shapes gamma of a generalised Gaussian in steps of 0.001, and (E|x|)^2 / E x^2 of each; ascending, float64."""
    gamma = torch.arange(0.2, 10, 0.001, dtype=torch.float64)
    ratio = (2 * torch.lgamma(2 / gamma) - torch.lgamma(1 / gamma) - torch.lgamma(3 / gamma)).exp()
    return gamma, ratio


def _fit(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Asymmetric generalised Gaussians fitted to the samples x (B, N) by moments, ``count`` being N and more zeros.

    Returns:
        Shape, left and right standard deviation, (B,) each, and whether there was nothing to fit.
    """
    sigmas = []
    for side in (x < 0, x > 0):
        sigmas.append((x.square().where(side, 0.0).sum(1) / side.sum(1)).sqrt())
    left, right = sigmas
    ratio = left / right
    moment = (x.abs().sum(1) / count).square() / (x.square().sum(1) / count)
    moment = moment * (ratio**3 + 1) * (ratio + 1) / (ratio.square() + 1).square()
    gamma, ratios = (table.to(x.device) for table in _shapes())
    above = torch.searchsorted(ratios, moment.contiguous()).clamp(1, len(ratios) - 1)
    nearest = above - (moment - ratios[above - 1] < ratios[above] - moment).long()
    return gamma[nearest], left, right, ~moment.isfinite()


def brisque_features(images: Tensor) -> tuple[Tensor, Tensor]:
    """Float NCHW in [0, 1] -> the 36 features (B, 36) float64, in OpenCV's order, and whether an image is flat (B,)."""
    pixels = (images.double() * 255).round()
    if pixels.shape[1] == 3:
        pixels = (pixels * pixels.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True).round()
    x = pixels / 255
    offsets = torch.arange(_WINDOW, dtype=torch.float64, device=x.device) - _WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    window = (window / window.sum()).outer(window / window.sum())[None, None]
    features: list[Tensor] = []
    flat = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for scale in (1, 2):
        if scale == 2:
            x = F.interpolate(x, [side // 2 for side in x.shape[2:]], mode="bicubic")
        mean, square = (
            F.conv2d(F.pad(value, (_WINDOW // 2,) * 4, mode="replicate"), window) for value in (x, x.square())
        )
        normal = ((x - mean) / ((square - mean.square()).clamp(min=0).sqrt() + 1 / 255))[:, 0]
        height, width = normal.shape[1:]
        gamma, left, right, unfit = _fit(normal.flatten(1), height * width)
        features += [gamma, (left.square() + right.square()) / 2]
        flat |= unfit
        for down, across in _SHIFTS:
            other = normal[:, down:, max(across, 0) : width + min(across, 0)]
            here = normal[:, : height - down, max(-across, 0) : width - max(across, 0)]
            gamma, left, right, unfit = _fit((here * other).flatten(1), height * width)
            flat |= unfit
            spread = (torch.lgamma(2 / gamma) - 0.5 * (torch.lgamma(1 / gamma) + torch.lgamma(3 / gamma))).exp()
            features += [gamma, (right - left) * spread, left.square(), right.square()]
    return torch.stack(features, 1), flat
