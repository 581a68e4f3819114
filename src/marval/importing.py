"""Published checkpoints in: the reference MAR's checkpoint-last.pth as a model folder."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from marval.checkpoint import load_strictly, read_mar_checkpoint
from marval.config import PRESETS, MARConfig, SamplingConfig
from marval.models.mar import MAR
from marval.pipeline import Pipeline
from marval.run import new_folder
from marval.tokenizers import LatentTokenizer


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
            width=tensors["z_proj.weight"].shape[0],
            depth=count(r"encoder_blocks\.(\d+)\."),
            heads=heads,
            buffer_size=tensors["encoder_pos_embed_learned"].shape[1] - num_tokens,
            head_width=tensors["head.input_proj.weight"].shape[0],
            head_depth=count(r"head\.res_blocks\.(\d+)\."),
        )
    except KeyError as missing:
        raise ValueError(f"{source} is not a MAR checkpoint: tensor {missing} is missing") from None


def import_mar(checkpoint: Path, out: Path, preset: str | None = None, heads: int | None = None,
               weights: str = "ema") -> str:  # fmt: skip
    """Write a model folder from a MAR checkpoint; returns one line that says what it holds.

    Tokens are the KL-16 latents times 0.2325 that the checkpoint was trained on; `Pipeline.sample_tokens` draws them.

    Args:
        preset: mar-b, mar-l or mar-h; every size must agree. heads: attention heads, for other models.
        weights: ema or raw.

    Raises:
        ValueError: not such a checkpoint, sizes that disagree, a missing or unexpected tensor.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose {', '.join(PRESETS)}")
    if (preset is None) == (heads is None):
        raise ValueError("give either --preset (mar-b, mar-l, mar-h) or --heads: weights do not tell the heads apart")
    tensors, args = read_mar_checkpoint(checkpoint, weights)
    config = infer_config(tensors, PRESETS[preset].heads if preset else heads or 1, str(checkpoint))
    if preset is not None and config != PRESETS[preset]:
        for name, value in vars(PRESETS[preset]).items():
            if getattr(config, name) != value:
                raise ValueError(f"{checkpoint} has {name} {getattr(config, name)}, but preset {preset} has {value}")
    network = MAR(config)
    load_strictly(network, tensors, str(checkpoint))
    patch_size = int(getattr(args, "patch_size", 1))
    tokenizer = LatentTokenizer(grid=config.grid, channels=config.token_dim // patch_size**2, patch_size=patch_size)
    names = [str(index) for index in range(config.num_classes)]
    sampling = SamplingConfig(
        ar_steps=min(64, config.num_tokens), guidance=2.9 if preset else 1.0, guidance_schedule="linear"
    )
    provenance = {"verb": "import-mar", "file": checkpoint.name, "weights": weights, "latent_scale": 0.2325}
    new_folder(out)
    Pipeline(network, tokenizer, names, sampling, None, provenance).save(out)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return f"{parameters / 1e6:.1f} M parameters ({weights}), {config.num_tokens} tokens of {config.token_dim} -> {out}"
