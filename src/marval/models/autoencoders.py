"""Autoencoders of images: diffusers' AutoencoderKL, and TAESD of our own; both read folders in diffusers' format.

Images are float NCHW in [0, 1], of a side that is a multiple of the stride; latents are unscaled, as the network has
them. Scale, shift and patches are the tokenizer's (`marval.tokenizers`).
"""

import filecmp
import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marval.checkpoint import load_strictly, load_tensors, read_json, sha256, write_atomically

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
KINDS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderTinyPool")
"""``_class_name`` of a folder; the last one is ours: diffusers does not know the blocks with a pool."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """What a tokenizer has to know of an autoencoder, without its weights."""

    kind: str
    image_channels: int
    latent_channels: int
    stride: int
    """Pixels per latent, along each side."""
    scale: float
    """Factor that gives the latents about unit variance."""
    shift: float
    """Subtracted from the latents before scaling."""
    magnitude: float | None
    """Latents lie within ± this, but for a few; None where that is not known. TAESD's decoder squashes them there."""


def describe(folder: Path) -> AutoencoderConfig:
    """The autoencoder of a folder, from its config.json.

    Raises:
        ValueError: not a folder of an autoencoder that we can read; a setting that we do not know.
    """
    path = folder / CONFIG
    config = read_json(path)
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in KINDS:
        hint = f"give {folder / 'tokenizer'}" if (folder / "tokenizer").is_dir() else f"known are {', '.join(KINDS)}"
        raise ValueError(f"{path} describes no autoencoder that marval knows ({kind or 'no _class_name'}): {hint}")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} lacks {WEIGHTS}: pickled or sharded weights are not read, save them as safetensors")
    if kind != "AutoencoderKL":
        plain = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2}
        for name, value in plain.items():
            if config.get(name, value) != value:
                raise ValueError(f"{path}: {name} {config[name]!r} is not supported, only {value!r}")
    try:
        stages = config["block_out_channels" if kind == "AutoencoderKL" else "num_encoder_blocks"]
        return AutoencoderConfig(
            kind=kind,
            image_channels=int(config.get("in_channels", 3)),
            latent_channels=int(config["latent_channels"]),
            stride=2 ** (len(stages) - 1),
            scale=float(config.get("scaling_factor") or (0.18215 if kind == "AutoencoderKL" else 1.0)),
            shift=float(config.get("shift_factor") or 0.0),
            magnitude=None if kind == "AutoencoderKL" else float(config.get("latent_magnitude", 3)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no complete config of an {kind}: {type(error).__name__} {error}") from None


def load_autoencoder(folder: Path) -> "KL | TAESD":
    """Network of a folder in eval mode, float32, on the CPU, its weights without gradients.

    Raises:
        ValueError: a file is missing or damaged; a tensor is missing, unexpected or misshapen; diffusers is missing.
    """
    kind = describe(folder).kind
    config, tensors, source = read_json(folder / CONFIG), load_tensors(folder / WEIGHTS), str(folder / WEIGHTS)
    if kind == "AutoencoderKL":
        autoencoder = KL(config, str(folder / CONFIG))
        load_strictly(autoencoder.kl, {_new_name(name): _matrix(name, t) for name, t in tensors.items()}, source)
    else:
        try:
            autoencoder = TAESD(
                config["latent_channels"], config["num_encoder_blocks"], config["num_decoder_blocks"],
                config["encoder_block_out_channels"][0], config["decoder_block_out_channels"][0],
                config.get("in_channels", 3), pool=kind == "AutoencoderTinyPool",
            )  # fmt: skip
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{folder / CONFIG} is no complete config of an {kind}: {error}") from None
        load_strictly(autoencoder, {name.replace(".layers.", "."): t for name, t in tensors.items()}, source)
    return autoencoder.eval().requires_grad_(False)


def autoencoder_digest(folder: Path) -> str:
    """Tells autoencoders apart by their settings and weights."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    digest.update(sha256(folder / WEIGHTS).encode())
    return digest.hexdigest()


def link_autoencoder(source: Path, target: Path) -> None:
    """The two files of a folder also in ``target``: hard links where the file system can, otherwise copies.

    Files that ``target`` has already are left alone.

    Raises:
        ValueError: ``target`` holds another autoencoder.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, CONFIG):  # the config last: a folder that has one is complete
        old, new = (source / name).resolve(), target / name
        if new.exists():
            if not new.samefile(old) and not filecmp.cmp(old, new, shallow=False):
                raise ValueError(f"{target} holds another autoencoder than {source}: choose another folder")
            continue
        try:
            os.link(old, new)
        except OSError:  # another file system, or not allowed to
            write_atomically(new, lambda p, old=old: shutil.copyfile(old, p))


# ---- diffusers' AutoencoderKL


def _new_name(name: str) -> str:
    """Attention layers of folders written before diffusers 0.15 have other names."""
    if ".attentions." in name:
        for old, new in (
            (".query.", ".to_q."),
            (".key.", ".to_k."),
            (".value.", ".to_v."),
            (".proj_attn.", ".to_out.0."),
        ):
            name = name.replace(old, new)
    return name


def _matrix(name: str, tensor: Tensor) -> Tensor:
    """The attention's 1x1 convolutions of the first folders as matrices."""
    return tensor[..., 0, 0] if ".attentions." in name and tensor.ndim == 4 else tensor


class KL(nn.Module):
    """A diffusers AutoencoderKL (Rombach et al. 2022) with uninitialised weights.

    Raises:
        ValueError: diffusers is not installed, or refuses the config, which ``source`` names.
    """

    def __init__(self, config: dict[str, Any], source: str):
        super().__init__()
        try:
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        except ImportError:
            raise ValueError("this autoencoder needs diffusers: pip install 'marval[latents]'") from None
        try:
            with torch.device("meta"):
                kl: Any = AutoencoderKL.from_config(config)
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{source}: diffusers refuses it: {str(error).splitlines()[0]}") from None
        self.kl: Any = kl.to_empty(device="cpu")

    def moments(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> posterior mean ++ log variance in [-30, 20], (B, 2C, h, w)."""
        posterior = self.kl.encode(2 * images - 1).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> images, not clamped."""
        return (self.kl.decode(latents).sample + 1) / 2


# ---- TAESD


class _Block(nn.Module):
    def __init__(self, width: int, pool: bool):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip
        self.pool = None
        if pool:
            self.pool = nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False), nn.GroupNorm(4, 4 * width), nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(x + self.conv(x))


class TAESD(nn.Module):
    """TAESD (madebyollin/taesd): residual convolutions, deterministic, latents in about [-3, 3].

    Layers have the names of diffusers' AutoencoderTiny without ``layers.``.

    Args:
        encoder_blocks, decoder_blocks: residual blocks of each resolution, such as (1, 3, 3, 3) and (3, 3, 3, 1);
            n resolutions make a stride of 2^(n - 1).
        pool: the blocks at the lowest resolution add a 1x1 conv - GroupNorm(4) - ReLU - 1x1 conv to their input
            (TAEF2).
    """

    def __init__(
        self, latent_channels: int, encoder_blocks: Sequence[int], decoder_blocks: Sequence[int],
        encoder_width: int = 64, decoder_width: int = 64, image_channels: int = 3, pool: bool = False,
    ):  # fmt: skip
        super().__init__()
        width, last = encoder_width, len(encoder_blocks) - 1
        down: list[nn.Module] = []
        for i, count in enumerate(encoder_blocks):
            first = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
            down.append(first if i else nn.Conv2d(image_channels, width, 3, padding=1))
            down += [_Block(width, pool and i == last) for _ in range(count)]
        self.encoder = nn.Sequential(*down, nn.Conv2d(width, latent_channels, 3, padding=1))
        width, last = decoder_width, len(decoder_blocks) - 1
        up: list[nn.Module] = [nn.Conv2d(latent_channels, width, 3, padding=1), nn.ReLU()]
        for i, count in enumerate(decoder_blocks):
            up += [_Block(width, pool and i == 0) for _ in range(count)]
            if i < last:
                up += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.decoder = nn.Sequential(*up, nn.Conv2d(width, image_channels, 3, padding=1))

    def moments(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> latents ++ log variance, which is -30: no noise, (B, 2C, h, w)."""
        latents = self.encoder(images)
        return torch.cat([latents, torch.full_like(latents, -30)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> images, not clamped."""
        return self.decoder(torch.tanh(latents / 3) * 3)
