"""Images <-> tokens. Images are float NCHW in [0, 1]; tokens are (B, L, D), row-major over the token grid."""

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marval.checkpoint import tensor_shapes
from marval.models.autoencoders import CONFIG, KL, TAESD, WEIGHTS, describe, load_autoencoder

MAR_SCALE = 0.2325
"""MAR's factor on KL-16 latents."""


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Cut (B, C, H, W) into patches (B, H W / p^2, C p^2), channel-major within a patch, as the reference MAR."""
    batch, channels, height, width = x.shape
    p = patch_size
    x = x.reshape(batch, channels, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // p) * (width // p), channels * p * p)


def unpatchify(tokens: Tensor, patch_size: int) -> Tensor:
    """Put the patches of `patchify` together again, for a square grid: (B, L, D) -> (B, D / p^2, H, W)."""
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
            raise ValueError(f"image size {self.image_size} is not a multiple of the patch size {self.patch_size}: "
                             "choose another --image-size or --patch-size")  # fmt: skip
        if self.channels not in (1, 3):
            raise ValueError(f"images must have 1 or 3 channels, got {self.channels}")

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def token_dim(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def image_channels(self) -> int:
        return self.channels

    @property
    def has_images(self) -> bool:
        """Pixels can always be decoded."""
        return True

    def to(self, device: torch.device | str) -> "PixelTokenizer":
        """Nothing: pixel patches have no weights to move."""
        return self

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


NO_IMAGES = (
    "this model works on latents of an autoencoder that is not in its folder: use sample_tokens() in Python, "
    "or import it again with --tokenizer"
)
"""Message where latents cannot be decoded."""


@dataclass(kw_only=True)
class LatentTokenizer:
    """Latents of an autoencoder, shifted and scaled; a token is a square patch of them.

    The autoencoder's weights are read from ``folder`` when they are first needed, and get no gradients; it computes in
    float32, under autocast too. Without a folder (a MAR imported without its KL-16) there are tokens only, no images.
    """

    image_size: int
    channels: int
    """Channels of the latents."""
    patch_size: int
    stride: int
    """Pixels per latent, along each side."""
    scale: float
    shift: float = 0.0
    image_channels: int = 3
    magnitude: float | None = field(default=None, compare=False)
    """Unscaled latents lie within ± this, where known: see `AutoencoderConfig`."""
    folder: Path | None = field(default=None, compare=False)
    """config.json and diffusion_pytorch_model.safetensors of the autoencoder."""

    def __post_init__(self) -> None:
        self._autoencoder: KL | TAESD | None = None
        self._device = torch.device("cpu")
        side = self.stride * self.patch_size
        if self.image_size % side:
            raise ValueError(
                f"image size {self.image_size} is not a multiple of {side}: the autoencoder's stride {self.stride} "
                f"times the patch size {self.patch_size}"
            )

    @property
    def grid(self) -> int:
        return self.image_size // (self.stride * self.patch_size)

    @property
    def token_dim(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def token_range(self) -> tuple[float, float] | None:
        """Bounds of a token's entries, if known. Chains are clamped to them: of latents, an undertrained teacher goes
        astray without (docs/LOG.md)."""
        if self.magnitude is None:
            return None
        return (-self.magnitude - self.shift) * self.scale, (self.magnitude - self.shift) * self.scale

    @property
    def has_images(self) -> bool:
        """Whether tokens can be decoded: the autoencoder is at hand."""
        return self.folder is not None

    def to(self, device: torch.device | str) -> "LatentTokenizer":
        """Compute on this device from now on."""
        self._device = torch.device(device)
        if self._autoencoder is not None:
            self._autoencoder.to(self._device)
        return self

    def _loaded(self) -> "KL | TAESD":
        if self._autoencoder is None:
            if self.folder is None:
                raise ValueError(NO_IMAGES)
            with torch.inference_mode(False):  # a sampler may load and move it; its weights must serve gradients later
                self._autoencoder = load_autoencoder(self.folder).to(self._device)
        return self._autoencoder

    def moments(self, images: Tensor) -> Tensor:
        """Float NCHW in [0, 1] -> posterior mean ++ log variance (-30 if deterministic) of the unscaled latents,
        (B, 2C, h, w) float32.

        Raises:
            ValueError: there is no autoencoder, or its files are damaged.
        """
        autoencoder = self._loaded()
        with torch.autocast(images.device.type, enabled=False):
            return autoencoder.moments(images.float())

    def tokens(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Tokens (B, L, D) of posterior moments: of a draw with noise (B, C, h, w), or without it of the mode."""
        latents, logvar = moments.chunk(2, dim=1)
        if noise is not None:
            latents = latents + torch.exp(0.5 * logvar) * noise
        return patchify((latents - self.shift) * self.scale, self.patch_size)

    def encode(self, images: Tensor) -> Tensor:
        """Float NCHW in [0, 1] -> tokens (B, L, D) of the posterior's mode."""
        return self.tokens(self.moments(images))

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L, D) -> float NCHW in [0, 1], differentiable inside the range; all at once, so its memory grows
        with B."""
        autoencoder = self._loaded()
        with torch.autocast(tokens.device.type, enabled=False):
            latents = unpatchify(tokens.float(), self.patch_size) / self.scale + self.shift
            return autoencoder.decode(latents).clamp(0, 1)


Tokenizer = PixelTokenizer | LatentTokenizer


def load_tokenizer(spec: str, image_size: int, patch_size: int, channels: int = 3) -> Tokenizer:
    """The tokenizer that a user names.

    Args:
        spec: ``pixels``; a folder of an autoencoder (marval import-kl16 or import-taesd, diffusers AutoencoderKL or
            AutoencoderTiny); or such a model on the Hugging Face hub, ``owner/name`` or ``owner/name/subfolder``. The
            network is used for the last only, and only where no such folder exists.
        channels: of the images, for ``pixels``.

    Raises:
        ValueError: no such autoencoder, or the image size does not fit it.
    """
    if spec == "pixels":
        return PixelTokenizer(image_size=image_size, channels=channels, patch_size=patch_size)
    folder = Path(spec)
    if not folder.exists():
        folder = _from_hub(spec)
    config = describe(folder)
    tensor_shapes(folder / WEIGHTS)  # a damaged file is better found now than after hours of work
    return LatentTokenizer(
        image_size=image_size, channels=config.latent_channels, patch_size=patch_size, stride=config.stride,
        scale=config.scale, shift=config.shift, image_channels=config.image_channels, magnitude=config.magnitude,
        folder=folder,
    )  # fmt: skip


def _from_hub(spec: str) -> Path:
    """Folder of the local cache with a hub model's autoencoder."""
    parts = spec.split("/")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)+", spec) or parts[0] in (".", "..") or Path(parts[0]).is_dir():
        raise ValueError(f"tokenizer {spec!r}: no such folder; give `pixels`, a folder, or owner/name on the hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"tokenizer {spec!r} is no folder, and the hub needs pip install 'marval[latents]'") from None
    below = "/".join(parts[2:])
    try:
        root = snapshot_download("/".join(parts[:2]), allow_patterns=[str(Path(below, f)) for f in (CONFIG, WEIGHTS)])
    except Exception as error:  # of the network, of the hub, of the cache: many unrelated types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"tokenizer {spec!r} is no folder and cannot be had from the hub: {reason}") from None
    return Path(root, below)


def tokenizer_to_dict(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer as JSON: its ``kind``, and its fields but the folder."""
    kind = "pixels" if isinstance(tokenizer, PixelTokenizer) else "latents"
    return {"kind": kind, **{f.name: getattr(tokenizer, f.name) for f in fields(tokenizer) if f.name != "folder"}}


def tokenizer_from_dict(values: dict[str, Any], folder: Path | None = None) -> Tokenizer:
    """The tokenizer of what `tokenizer_to_dict` made, with the autoencoder in ``folder``, if there is one.

    Raises:
        ValueError: an unknown kind; the folder holds an autoencoder of another shape.
    """
    values = dict(values)
    kind = values.pop("kind", None)
    if kind == "pixels":
        return PixelTokenizer(**values)
    if kind != "latents":
        raise ValueError(f"unknown tokenizer kind {kind!r}: known are pixels, latents")
    if folder is None:
        return LatentTokenizer(**values)
    found = describe(folder)
    tensor_shapes(folder / WEIGHTS)
    values.setdefault("magnitude", found.magnitude)  # unknown to the marval that wrote it
    tokenizer = LatentTokenizer(**values, folder=folder)
    if (found.latent_channels, found.stride) != (tokenizer.channels, tokenizer.stride):
        raise ValueError(
            f"{folder} holds an autoencoder of {found.latent_channels} channels and stride {found.stride}, "
            f"the model was made with {tokenizer.channels} and {tokenizer.stride}"
        )
    return tokenizer


def recommended_head_width(token_dim: int) -> int:
    """Width of the MLP diffusion head for tokens of this many channels.

    MAR has 1024 for 16 channels, and its author advises more for wider tokens. The rule is ours: the head's matrices
    grow in proportion to the channels, width = 1024 sqrt(D / 16), rounded up to a multiple of 128, never below 1024.
    """
    return max(1024, 128 * math.ceil(8 * math.sqrt(token_dim / 16)))


def to_uint8(images: Tensor) -> Tensor:
    """Images float NCHW in [0, 1] -> uint8 NHWC."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_float(images: Tensor) -> Tensor:
    """Images uint8 NHWC -> float NCHW in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255
