"""Published checkpoints in: the reference MAR's models as model folders, KL-16 and TAESD as tokenizer folders."""

import argparse
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from marval import imagenet
from marval.checkpoint import (
    kind_of_checkpoint,
    load_strictly,
    read_mar_checkpoint,
    read_state_dict,
    save_tensors,
    write_json,
)
from marval.config import PRESETS, MARConfig, SamplingConfig
from marval.models.autoencoders import CONFIG, KL, TAESD, WEIGHTS
from marval.models.mar import MAR
from marval.pipeline import Pipeline
from marval.run import new_folder
from marval.tokenizers import MAR_SCALE, LatentTokenizer, load_tokenizer

# ---- MAR

GUIDANCE = {"mar-b": 2.9, "mar-l": 3.0, "mar-h": 3.2}
"""Linear guidance of the published models at 256 AR steps (MAR's README)."""


def infer_config(tensors: Mapping[str, Tensor], heads: int, source: str) -> MARConfig:
    """Sizes of a MAR network from the shapes of its tensors; the number of attention heads leaves no trace in them.

    Raises:
        ValueError: a tensor that every MAR has is missing.
    """

    def count(pattern: str) -> int:
        return len({match.group(1) for name in tensors if (match := re.match(pattern, name))})

    width = tensors["z_proj.weight"].shape[0] if "z_proj.weight" in tensors else 0
    if width % heads:
        raise ValueError(
            f"{source} is {width} wide, which is no multiple of {heads} attention heads: check --heads or --preset"
        )
    try:
        num_tokens = tensors["diffusion_pos_embed_learned"].shape[1]
        return MARConfig(
            grid=round(num_tokens**0.5),
            token_dim=tensors["z_proj.weight"].shape[1],
            num_classes=tensors["class_emb.weight"].shape[0],
            width=width,
            depth=count(r"encoder_blocks\.(\d+)\."),
            heads=heads,
            buffer_size=tensors["encoder_pos_embed_learned"].shape[1] - num_tokens,
            head_width=tensors["head.input_proj.weight"].shape[0],
            head_depth=count(r"head\.res_blocks\.(\d+)\."),
        )
    except KeyError as missing:
        hint = kind_of_checkpoint(tensors)
        raise ValueError(
            f"{source} is not a MAR checkpoint: tensor {missing} is missing; {hint}".rstrip("; ")
        ) from None


def import_mar(checkpoint: Path, out: Path, preset: str | None = None, heads: int | None = None,
               weights: str = "ema", tokenizer: str | None = None) -> str:  # fmt: skip
    """Write a model folder from a MAR checkpoint; returns one line that says what it holds.

    Its tokens are the KL-16 latents times 0.2325 that the checkpoint was trained on. Without the autoencoder,
    `Pipeline.sample_tokens` draws them; with it, `Pipeline.sample` draws images.

    Args:
        checkpoint: checkpoint-last.pth, or a .safetensors file with the raw or the averaged state dict.
        preset: mar-b, mar-l or mar-h; every size must agree. heads: attention heads, for other models.
        weights: ema or raw; a .safetensors file has one of them only.
        tokenizer: folder (marval import-kl16) or hub name of the autoencoder, put into the model folder.

    Raises:
        ValueError: not such a checkpoint, sizes that disagree, a missing or unexpected tensor, another autoencoder.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose {', '.join(PRESETS)}")
    if (preset is None) == (heads is None):
        raise ValueError("give either --preset (mar-b, mar-l, mar-h) or --heads: weights do not tell the heads apart")
    if heads is not None and heads < 1:
        raise ValueError(f"--heads {heads} must be at least 1")
    tensors, args = read_mar_checkpoint(checkpoint, weights)
    config = infer_config(tensors, PRESETS[preset].heads if preset else heads or 1, str(checkpoint))
    if preset is not None and config != PRESETS[preset]:
        for name, value in vars(PRESETS[preset]).items():
            if getattr(config, name) != value:
                raise ValueError(f"{checkpoint} has {name} {getattr(config, name)}, but preset {preset} has {value}")
    with torch.device("meta"):
        network = MAR(config)
    load_strictly(network.to_empty(device="cpu"), tensors, str(checkpoint))
    patch_size, stride = int(getattr(args, "patch_size", 1)), int(getattr(args, "vae_stride", 16))
    latents = LatentTokenizer(
        image_size=config.grid * patch_size * stride, channels=config.token_dim // patch_size**2,
        patch_size=patch_size, stride=stride, scale=MAR_SCALE,
    )  # fmt: skip
    if tokenizer is not None:
        found = load_tokenizer(tokenizer, latents.image_size, patch_size)
        if found != latents:
            has, wanted = (_describe(t) if isinstance(t, LatentTokenizer) else "pixels" for t in (found, latents))
            raise ValueError(
                f"tokenizer {tokenizer!r} has {has}; {checkpoint} was trained on {wanted}: import its KL-16"
            )
        latents = found
    is_imagenet = config.num_classes == 1000
    names = imagenet.names() if is_imagenet else [str(index) for index in range(config.num_classes)]
    sampling = SamplingConfig(
        ar_steps=min(64, config.num_tokens), guidance=GUIDANCE[preset] if preset else 1.0, guidance_schedule="linear"
    )
    kind = "as in the file" if checkpoint.suffix == ".safetensors" else weights
    provenance = {"verb": "import-mar", "file": checkpoint.name, "weights": kind, "latent_scale": MAR_SCALE}
    new_folder(out)
    Pipeline(network, latents, names, sampling, None, provenance).save(out)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    what = "images" if latents.has_images else "tokens only: no --tokenizer"
    size = f"{parameters / 1e6:.1f} M parameters ({kind}), {config.num_tokens} tokens of {config.token_dim}"
    return f"{size} ({what}) -> {out}"


def _describe(tokenizer: LatentTokenizer) -> str:
    scaled = f"factor {tokenizer.scale:g}" + (f" after shift {tokenizer.shift:g}" if tokenizer.shift else "")
    return f"{tokenizer.channels} channels, stride {tokenizer.stride}, {scaled}"


# ---- KL-16

KL16 = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"] * 5,
    "block_out_channels": [128, 128, 256, 256, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 256,
    "scaling_factor": MAR_SCALE,
    "force_upcast": True,
}
"""MAR's KL-16 as diffusers' AutoencoderKL; attention in the encoder's last resolution and in both middles."""

_KL16_NAMES = [
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.attentions", r"down.\1.attn"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{4 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{4 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
]
"""diffusers' names -> MAR's, each applied in turn."""


def _kl16_name(name: str) -> str:
    for pattern, replacement in _KL16_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def import_kl16(checkpoint: Path, out: Path) -> str:
    """Write MAR's KL-16 as a folder in diffusers' AutoencoderKL format; returns one line that says what it holds.

    Args:
        checkpoint: kl16.ckpt, ``{"model": state dict}``, or a .safetensors file with the state dict.

    Raises:
        ValueError: another file; names every missing, unexpected and misshapen tensor.
    """
    tensors, _ = read_state_dict(checkpoint, "model", [argparse.Namespace])  # of a MAR given by mistake
    ours = KL(KL16, "KL-16").kl.state_dict()
    expected = {_kl16_name(name): list(tensor.shape) for name, tensor in ours.items()}
    expected |= {
        n: [*s, 1, 1] for n, s in expected.items() if len(s) == 2
    }  # the attention's matrices are 1x1 convolutions
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is unexpected" for name in tensors if name not in expected]
    for name, shape in expected.items():
        if name in tensors and list(tensors[name].shape) != shape:
            wrong.append(f"{name} is {list(tensors[name].shape)}, not {shape}")
    if wrong:
        hint = "" if _has_kl_names(tensors) else kind_of_checkpoint(tensors)
        what = "; ".join(wrong) if _has_kl_names(tensors) else f"{wrong[0]}; and {len(wrong) - 1} more"
        raise ValueError(f"{checkpoint} is not MAR's KL-16: {hint}{': ' if hint else ''}{what}")
    new_folder(out)
    save_tensors(out / WEIGHTS, {n: tensors[_kl16_name(n)].float().reshape(ours[n].shape) for n in ours})
    write_json(out / CONFIG, KL16)
    parameters = sum(tensor.numel() for tensor in ours.values())
    return f"KL-16, {parameters:,} parameters, 16 channels, stride 16, factor {MAR_SCALE} -> {out}"


def _has_kl_names(tensors: Mapping[str, Tensor]) -> bool:
    """Whether most names are those of the latent diffusion code: then each that is not is worth naming."""
    return "quant_conv.weight" in tensors and "decoder.mid.attn_1.q.weight" in tensors


# ---- TAESD


def import_taesd(encoder: Path, decoder: Path, out: Path) -> str:
    """Write TAESD weights as a tokenizer folder in diffusers' AutoencoderTiny format; returns a line about it.

    Also for its relatives TAESDXL, TAESD3, TAEF1 and TAEF2, whose shapes tell the number of resolutions, blocks and
    channels apart. Their latents are those that the large model works on: scaled to about unit variance already, so the
    factor is 1.

    Args:
        encoder, decoder: .pth or .safetensors, such as taesd_encoder.pth and taesd_decoder.pth.

    Raises:
        ValueError: other files, or one in the place of the other; a missing, unexpected or misshapen tensor.
    """
    (down, encoder_blocks), (up, decoder_blocks) = _read_taesd(encoder, "encoder"), _read_taesd(decoder, "decoder")
    latent_channels = list(down.values())[-1].shape[0]
    (width, image_channels), (decoder_width, wanted) = (t["0.weight"].shape[:2] for t in (down, up))
    if latent_channels != wanted:
        raise ValueError(f"{encoder} makes {latent_channels} channels, {decoder} takes {wanted}: give two of one model")
    pool = any(".pool." in name for name in (*down, *up))
    with torch.device("meta"):
        model = TAESD(latent_channels, encoder_blocks, decoder_blocks, width, decoder_width, image_channels, pool)
    load_strictly(model.encoder.to_empty(device="cpu"), down, str(encoder))
    load_strictly(model.decoder.to_empty(device="cpu"), up, f"{decoder} (layers from 0)")
    config = {
        "_class_name": "AutoencoderTinyPool" if pool else "AutoencoderTiny",
        "in_channels": image_channels,
        "out_channels": image_channels,
        "latent_channels": latent_channels,
        "encoder_block_out_channels": [width] * len(encoder_blocks),
        "decoder_block_out_channels": [decoder_width] * len(decoder_blocks),
        "num_encoder_blocks": encoder_blocks,
        "num_decoder_blocks": decoder_blocks,
        "act_fn": "relu",
        "scaling_factor": 1.0,
    }
    new_folder(out)
    save_tensors(
        out / WEIGHTS,
        {f"encoder.layers.{n}": t for n, t in down.items()} | {f"decoder.layers.{n}": t for n, t in up.items()},
    )
    write_json(out / CONFIG, config)
    parameters = sum(tensor.numel() for tensor in (*down.values(), *up.values()))
    stride = 2 ** (len(encoder_blocks) - 1)
    return f"TAESD, {parameters:,} parameters, {latent_channels} channels, stride {stride} -> {out}"


def _read_taesd(path: Path, part: str) -> tuple[dict[str, Tensor], list[int]]:
    """Tensors in the order of their layers, which count from 0, and the residual blocks of each resolution."""
    tensors, _ = read_state_dict(path)
    first = 0 if part == "encoder" else 1  # a decoder's layer 0 is its tanh
    convs = sorted(int(match[1]) for name in tensors if (match := re.fullmatch(r"(\d+)\.weight", name)))
    if len(convs) < 2 or convs[0] != first or any(not re.match(r"\d+\.", name) for name in tensors):
        hint = kind_of_checkpoint(tensors) or "its tensors have other names"
        raise ValueError(f"{path} is no TAESD {part}: {hint}")
    blocks = [sum(f"{i}.conv.0.weight" in tensors for i in range(a, b)) for a, b in pairwise(convs)]
    numbered = {(int((parts := name.split(".", 1))[0]) - first, parts[1]): t for name, t in tensors.items()}
    return {f"{layer}.{rest}": numbered[layer, rest] for layer, rest in sorted(numbered)}, blocks
