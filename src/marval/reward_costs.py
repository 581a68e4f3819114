"""The networks of published rewards at their sizes, on the meta device, for `marval.needs`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from marval.checkpoint import read_json, read_state_dict
from marval.models.blip import MAX_TOKENS, TEXT_CONFIG, WEIGHTS, convert, networks, vision_sizes
from marval.reward_files import parts_of

VIT_H = {
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "patch_size": 14,
    },
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    },
    "projection_dim": 1024,
}  # fmt: skip
"""Of PickScore and HPSv2.1: CLIP ViT-H/14."""
VIT_L = {
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14,
    },
    "text_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    },
    "projection_dim": 768,
}  # fmt: skip
"""Of openai/clip-vit-large-patch14, which the aesthetic heads read."""
IMAGEREWARD = (
    {**VIT_L["vision_config"], "patch_size": 16, "image_size": 224},
    {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "max_position_embeddings": 512, "vocab_size": 30524,
    },
)  # fmt: skip
"""Its image encoder, and the text model of its med_config.json."""


@dataclass
class Scorers:
    """Rewards that one batch of images is scored with."""

    networks: nn.ModuleList = field(default_factory=nn.ModuleList)
    notes: list[str] = field(default_factory=list)
    """What is not counted, or not known."""

    def __call__(self, images: Tensor) -> Tensor:
        """Some function of all scores of float NCHW images, (B,); one number of each image where none is counted."""
        scores = [network(images) for network in self.networks]
        return torch.stack(scores).sum(0) if scores else images.mean((1, 2, 3))


def scorers(specs: Sequence[str]) -> Scorers:
    """Of rewards by name, as `marval.rewards.load_reward` takes them; those of a sum one by one.

    Raises:
        ValueError: transformers is not installed.
    """
    found = Scorers()
    for part in (part for spec in specs for part in parts_of(spec)):
        kind, _, source = part.partition(":")
        if kind not in ("clip", "pickscore", "hps", "aesthetic", "imagereward"):
            found.notes.append(f"the network of {part}, if it has one, is not counted")
            continue
        try:
            import transformers
        except ImportError:
            raise ValueError("the size of a reward needs transformers: pip install 'marval[rewards]'") from None
        with torch.device("meta"):
            if kind == "imagereward":
                network: nn.Module = _ImageReward(transformers, Path(source))
            else:
                network = _Clip(transformers, kind, source.rpartition(":")[0] if kind == "aesthetic" else source, found)
        found.networks.append(network.requires_grad_(False).eval())
    return found


class _Clip(nn.Module):
    """Image embeddings; those of the prompts are computed once."""

    def __init__(self, transformers: Any, kind: str, source: str, found: Scorers):
        super().__init__()
        folder = Path(source).parent if Path(source).is_file() else Path(source)
        if (folder / "config.json").is_file():
            config = transformers.CLIPConfig.from_pretrained(folder)
        else:
            large = kind in ("clip", "aesthetic")
            config = transformers.CLIPConfig(**(VIT_L if large else VIT_H))
            size = "openai/clip-vit-large-patch14 (ViT-L/14)" if large else "PickScore and HPSv2.1 (ViT-H/14)"
            found.notes.append(f"{source} is not at hand: a CLIP of the size of {size} is counted")
        self.clip = transformers.CLIPModel(config)
        self.size: int = config.vision_config.image_size

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.expand(-1, 3, -1, -1), (self.size, self.size), mode="bicubic", antialias=True)
        with torch.autocast("cpu", enabled=False):
            return self.clip.visual_projection(self.clip.vision_model(pixel_values=x).pooler_output).mean(1)


class _ImageReward(nn.Module):
    """Image encoder, and text model that reads the longest prompt with the image in view: those of the folder, or the
    published ViT-L/16 and BERT-base."""

    def __init__(self, transformers: Any, folder: Path):
        super().__init__()
        vision, text = IMAGEREWARD
        if (folder / WEIGHTS).is_file():
            tensors = convert(read_state_dict(folder / WEIGHTS)[0])
            vision, text = vision_sizes(tensors, str(folder / WEIGHTS)), read_json(folder / TEXT_CONFIG)
        self.vision, self.text, self.head = networks(transformers, vision, text)
        self.text.config.pad_token_id = None  # else transformers 5.4 looks for padding, in tokens without values
        self.size: int = vision["image_size"]

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.expand(-1, 3, -1, -1), (self.size, self.size), mode="bicubic", antialias=True)
        with torch.autocast("cpu", enabled=False):
            seen = self.vision(pixel_values=x).last_hidden_state
            tokens = torch.zeros(len(x), MAX_TOKENS, dtype=torch.long, device=x.device)
            read = self.text(input_ids=tokens, encoder_hidden_states=seen, is_decoder=False)
            return self.head(read.last_hidden_state[:, 0])[:, 0]
