"""ImageReward (arXiv 2304.05977): BLIP reads the prompt with the image in view, and a head scores what it has read.

The published package pins versions of timm and transformers that no longer go together. Here transformers' BLIP
modules carry the published weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marval.checkpoint import load_strictly, read_json, read_state_dict
from marval.hub import hub_file, quiet
from marval.models.clip import preprocess
from marval.models.quality import ScoreHead

WEIGHTS, TEXT_CONFIG = "ImageReward.pt", "med_config.json"
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw scores, from the authors' code: ImageReward is (raw - MEAN) / STD."""
MAX_TOKENS = 35
"""What ImageReward was trained on; its authors cut longer prompts."""
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HEAD_WIDTH = 64  # of an attention head in every published ViT of BLIP
STARTS = {
    "blip.visual_encoder.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
    "blip.visual_encoder.norm.": "vision.post_layernorm.",
    "blip.visual_encoder.blocks.": "vision.encoder.layers.",
    "blip.text_encoder.": "text.",
    "mlp.": "head.",
}
VISION_PARTS = {
    ".norm1.": ".layer_norm1.", ".norm2.": ".layer_norm2.", ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}  # fmt: skip
"""How names of tensors in the published file begin, and parts of those of its image encoder, with ours."""
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ImageReward.pt under the names of `ImageReward`, float32; those it never uses are left out."""
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(_UNUSED):
            continue
        start = next((start for start in STARTS if name.startswith(start)), "")
        new = STARTS.get(start, "") + name.removeprefix(start)
        if new.startswith("vision."):
            for part, replacement in VISION_PARTS.items():
                new = new.replace(part, replacement)
        converted[new] = tensor.float()
    return converted


def vision_sizes(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """transformers' settings of the image encoder, which the published folder does not name, from its tensors.

    Raises:
        ValueError: they are not those of ImageReward; names ``source``.
    """
    try:
        width, _, patch, _ = tensors["vision.embeddings.patch_embedding.weight"].shape
        positions = tensors["vision.embeddings.position_embedding"].shape[1]
        hidden = len(tensors["vision.encoder.layers.0.mlp.fc1.weight"])
        layers = 1 + max(int(name.split(".")[3]) for name in tensors if name.startswith("vision.encoder.layers."))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{source} does not hold ImageReward's tensors: no {error}") from None
    if width % _HEAD_WIDTH:
        raise ValueError(f"{source}: an image encoder {width} wide does not divide into heads of {_HEAD_WIDTH}")
    return {
        "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers, "patch_size": patch,
        "num_attention_heads": width // _HEAD_WIDTH, "image_size": round((positions - 1) ** 0.5) * patch,
        "layer_norm_eps": 1e-6,
    }  # fmt: skip


def networks(transformers: Any, vision: dict[str, Any], text: dict[str, Any]) -> tuple[nn.Module, Any, nn.Module]:
    """Image encoder, text model and head with these settings of transformers', of which unknown ones are left out; on
    the meta device."""
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    known = set(transformers.BlipTextConfig().to_dict())
    text = {name: value for name, value in text.items() if name in known}
    text |= {"encoder_hidden_size": vision["hidden_size"], "is_decoder": True}  # else it has no cross-attention
    with torch.device("meta"):
        reader = BlipTextModel(transformers.BlipTextConfig(**text), add_pooling_layer=False)
        encoder = transformers.BlipVisionModel(transformers.BlipVisionConfig(**vision))
        return encoder, reader, ScoreHead(reader.config.hidden_size)


class ImageReward(nn.Module):
    """A frozen ImageReward in float32.

    Attributes:
        vision: transformers' `BlipVisionModel`. text: its `BlipTextModel`, with cross-attention to the image.
        head: five linear layers on what the text model says at [CLS]. tokenizer: BERT's.
        size: side of the square images that the model sees.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vision: nn.Module, text: nn.Module, head: nn.Module, tokenizer: Any, size: int):
        super().__init__()
        self.vision, self.text, self.head = vision, text, head
        self.tokenizer, self.size = tokenizer, size
        for name, values in (("mean", PIXEL_MEAN), ("std", PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    @classmethod
    def load(cls, source: str, device: torch.device | str) -> "ImageReward":
        """From a folder with ``ImageReward.pt``, ``med_config.json`` and BERT's tokenizer, or from the hub.

        Args:
            source: such a folder (tokenizer: tokenizer.json or vocab.txt of google-bert/bert-base-uncased), or a hub
                name such as THUDM/ImageReward, whose tokenizer is fetched from the hub as well.

        Raises:
            ValueError: transformers is not installed, a file is missing or unreadable, or the weights are not exactly
                those of the model; names the file and the tensor.
        """
        try:
            import transformers
        except ImportError:
            raise ValueError("ImageReward needs transformers: pip install 'marval[rewards]'") from None
        is_folder = Path(source).is_dir()
        if not is_folder and source.count("/") != 1:
            raise ValueError(f"{source!r} is neither a folder nor a hub name such as THUDM/ImageReward")
        with quiet(transformers):
            if is_folder:
                weights, config = (Path(source) / name for name in (WEIGHTS, TEXT_CONFIG))
                if not any((Path(source) / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
                    raise ValueError(f"{source} has no tokenizer: copy tokenizer.json of {TOKENIZER} into it")
            else:
                weights, config = (hub_file(source, name) for name in (WEIGHTS, TEXT_CONFIG))
            tensors = convert(read_state_dict(weights)[0])
            sizes = vision_sizes(tensors, str(weights))
            try:
                tokenizer = transformers.BertTokenizer.from_pretrained(source if is_folder else TOKENIZER)
                vision, reader, head = networks(transformers, sizes, read_json(config))
            except Exception as error:  # each file has its own library, and each library its own kinds of error
                raise ValueError(f"cannot load ImageReward from {source}: {' '.join(str(error).split())}") from None
        if reader.config.vocab_size - len(tokenizer) not in (0, 2):  # [DEC] and [ENC], which a prompt never has
            count = f"{len(tokenizer)} words, the model {reader.config.vocab_size}"
            raise ValueError(f"the tokenizer of {source} knows {count}: copy tokenizer.json of {TOKENIZER} into it")
        for network in (vision, reader, head):
            network.to_empty(device="cpu")
        reader.embeddings.position_ids.copy_(torch.arange(reader.config.max_position_embeddings))
        model = cls(vision, reader, head, tokenizer, sizes["image_size"])
        load_strictly(model, tensors, str(weights))
        return model.to(device).eval().requires_grad_(False)

    def preprocess(self, images: Tensor) -> Tensor:
        """Float NCHW in [0, 1] -> normalised (B, 3, size, size), differentiable; see `marval.models.clip.preprocess`.

        torchvision, which the authors use, crops images that are not square up to one pixel elsewhere.
        """
        return preprocess(images, self.size, self.size, self.mean, self.std)

    def tokens(self, prompts: list[str]) -> Any:
        """What the text model reads; ValueError if a prompt is longer than ImageReward was trained on."""
        tokens = self.tokenizer(prompts, padding=True, return_tensors="pt")
        if tokens["input_ids"].shape[1] > MAX_TOKENS:
            raise ValueError(f"the prompt {max(prompts, key=len)!r} is longer than the {MAX_TOKENS} tokens it reads")
        return tokens

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Float NCHW in [0, 1] and their prompts -> ImageReward (B,), about -2 to 2, differentiable in the images.

        Raises:
            ValueError: as `tokens`.
        """
        tokens = self.tokens(prompts).to(images.device)
        seen = self.vision(pixel_values=self.preprocess(images)).last_hidden_state
        read = self.text(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device), is_decoder=False,
        )  # fmt: skip
        return (self.head(read.last_hidden_state[:, 0])[:, 0] - MEAN) / STD
