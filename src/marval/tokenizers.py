"""Images <-> tokens. Images are float NCHW in [0, 1]; tokens are (B, L, D), row-major over the token grid."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, H W / p^2, C p^2), channel-major within a token, as the reference MAR."""
    batch, channels, height, width = x.shape
    p = patch_size
    x = x.reshape(batch, channels, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // p) * (width // p), channels * p * p)


def unpatchify(tokens: Tensor, patch_size: int) -> Tensor:
    """Inverse of `patchify` for a square grid."""
    batch, length, dim = tokens.shape
    p, grid = patch_size, round(length**0.5)
    x = tokens.reshape(batch, grid, grid, dim // (p * p), p, p)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, dim // (p * p), grid * p, grid * p)


@dataclass(frozen=True, kw_only=True)
class PixelTokenizer:
    """Raw pixel patches scaled to [-1, 1]: no weights, exact."""

    image_size: int
    channels: int
    patch_size: int

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image size {self.image_size} is not a multiple of the patch size {self.patch_size}")
        if self.channels not in (1, 3):
            raise ValueError(f"images must have 1 or 3 channels, got {self.channels}")

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def token_dim(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def token_range(self) -> tuple[float, float]:
        """Bounds of a token's entries, known for pixels."""
        return (-1.0, 1.0)

    def encode(self, images: Tensor) -> Tensor:
        """Float NCHW in [0, 1] -> tokens (B, L, D) in [-1, 1]."""
        return patchify(2 * images - 1, self.patch_size)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L, D) -> float NCHW in [0, 1], differentiable inside the range."""
        return ((unpatchify(tokens, self.patch_size) + 1) / 2).clamp(0, 1)


NO_IMAGES = "this model works on latents of an autoencoder that is not in its folder: use sample_tokens() in Python"


@dataclass(frozen=True, kw_only=True)
class LatentTokenizer:
    """Latents of an autoencoder that is not part of the model folder, such as MAR's KL-16: tokens only, no images."""

    grid: int
    channels: int
    patch_size: int

    @property
    def token_dim(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def token_range(self) -> None:
        return None

    def encode(self, images: Tensor) -> Tensor:
        raise ValueError(NO_IMAGES)

    decode = encode


Tokenizer = PixelTokenizer | LatentTokenizer
_KINDS: dict[str, Any] = {"pixels": PixelTokenizer, "latents": LatentTokenizer}


def tokenizer_to_dict(tokenizer: Tokenizer) -> dict[str, Any]:
    """JSON form, with its ``kind``."""
    kind = next(kind for kind, cls in _KINDS.items() if isinstance(tokenizer, cls))
    return {"kind": kind, **vars(tokenizer)}


def tokenizer_from_dict(values: dict[str, Any]) -> Tokenizer:
    """Inverse of `tokenizer_to_dict`."""
    values = dict(values)
    kind = values.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"unknown tokenizer kind {kind!r}: known are {', '.join(_KINDS)}")
    return _KINDS[kind](**values)


def to_uint8(images: Tensor) -> Tensor:
    """Float NCHW in [0, 1] -> uint8 NHWC."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_float(images: Tensor) -> Tensor:
    """uint8 NHWC -> float NCHW in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255
