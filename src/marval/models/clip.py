"""CLIP (arXiv 2103.00020) through transformers: how well an image fits a text, differentiable in the image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from marval.checkpoint import load_tensors, read_pickle, read_state_dict
from marval.hub import quiet

BICUBIC = 3  # PIL.Image.Resampling.BICUBIC
_OPEN_CLIP_STARTS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # transformers spells it so
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
}
_OPEN_CLIP_PARTS = {
    ".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.", ".attn.": ".self_attn.", ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}  # fmt: skip


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an open_clip model, float32, under the names of transformers' `CLIPModel`.

    open_clip keeps query, key and value in one tensor and the two projections transposed. Unknown names stay.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("module.")
        start = next((start for start in _OPEN_CLIP_STARTS if name.startswith(start)), "")
        new = _OPEN_CLIP_STARTS.get(start, "") + name.removeprefix(start)
        for part, replacement in _OPEN_CLIP_PARTS.items():
            new = new.replace(part, replacement)
        if ".in_proj_" in new:
            layer, _, kind = new.partition("in_proj_")
            for letter, third in zip("qkv", tensor.float().chunk(3), strict=True):
                converted[f"{layer}{letter}_proj.{kind}"] = third
        elif name != "attn_mask":  # a constant
            converted[new] = tensor.float().T if name in ("visual.proj", "text_projection") else tensor.float()
    return converted


def _read_open_clip(path: Path) -> dict[str, Tensor]:
    """Of a .safetensors file, or of a pickle with or without an entry ``state_dict``."""
    if path.suffix == ".safetensors":
        return load_tensors(path)
    saved = read_pickle(path)
    wrapped = isinstance(saved, dict) and "state_dict" in saved
    return read_state_dict(path, "state_dict" if wrapped else None)[0]


def preprocess(images: Tensor, resize: int, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """Float NCHW in [0, 1], 1 or 3 channels, of any size -> normalised (B, 3, size, size), differentiable.

    Shortest side resized (bicubic, antialiased, columns before rows, each bounded, as Pillow), centre crop,
    normalisation. transformers' processor does the same on 8-bit images; the difference is its rounding after
    each pass, at most 1.5 / 255 before the normalisation.
    """
    height, width = images.shape[2:]
    short = min(height, width)
    shape = [resize if side == short else int(resize * side / short) for side in (height, width)]
    x = images.expand(-1, 3, -1, -1).float()
    for sides in ([height, shape[1]], shape):
        x = F.interpolate(x, sides, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return (x[..., top : top + size, left : left + size] - mean) / std


class Clip:
    """A frozen CLIP in float32.

    Attributes:
        model: transformers' `CLIPModel`. tokenizer: its tokenizer.
        size: side of the square images that the model sees. mean, std: (3, 1, 1) of its normalisation.
        logit_scale: exp of the learned inverse temperature; about 100 in the published models.
    """

    def __init__(self, model: Any, tokenizer: Any, resize: int, size: int, mean: list[float], std: list[float]):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.resize, self.size = resize, size
        self.mean, self.std = (torch.tensor(x, device=model.device).view(3, 1, 1) for x in (mean, std))
        self.logit_scale = float(model.logit_scale.exp())
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def load(cls, source: str, device: torch.device | str, rest: str = "") -> "Clip":
        """A CLIP by its source.

        Args:
            source: a folder in the format of transformers (config, weights, tokenizer, preprocessor), a hub name, or
                a file of open_clip's weights (``HPS_v2.1_compressed.pt``) in a folder with the other files of a
                transformers CLIP of the same size.
            rest: folder or hub name of these other files, if they are not in the folder of the weights.

        Raises:
            ValueError: transformers is not installed, a file is missing or unreadable, the weights are not exactly
                those of the model (names the tensor), or the preprocessor is not CLIP's.
        """
        try:
            import transformers
        except ImportError:
            raise ValueError("CLIP needs transformers: pip install 'marval[rewards]'") from None
        path = Path(source)
        if not path.exists() and source.count("/") != 1:
            raise ValueError(f"{source!r} is neither a folder nor a hub name such as openai/clip-vit-large-patch14")
        folder = rest or (str(path.parent) if path.is_file() else source)
        with quiet(transformers):
            # The variant that works on PIL images exists by this name since transformers 5.4; it needs no torchvision.
            from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

            try:
                weights: dict[str, Any] = {"dtype": torch.float32}
                if path.is_file():
                    weights = {
                        "config": transformers.CLIPConfig.from_pretrained(folder),
                        "state_dict": from_open_clip(_read_open_clip(path)),
                    }
                loaded: Any = transformers.CLIPModel.from_pretrained(
                    None if path.is_file() else source, output_loading_info=True, ignore_mismatched_sizes=True,
                    **weights,
                )  # fmt: skip
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
                processor = CLIPImageProcessorPil.from_pretrained(folder)
            except Exception as error:  # each file has its own library, and each library its own kinds of error
                raise ValueError(f"cannot load a CLIP from {source}: {' '.join(str(error).split())}") from None
        model, report = loaded
        surplus = [name for name in report["unexpected_keys"] if not name.endswith("position_ids")]
        resized = [str(name if isinstance(name, str) else name[0]) for name in report["mismatched_keys"]]
        wrong = {"no": report["missing_keys"], "an unknown": surplus, "a wrong shape for": resized}
        for what, names in wrong.items():
            if names:
                raise ValueError(f"the weights of {source} are not this CLIP's: {what} tensor {min(names)}")
        if len(tokenizer) != model.config.text_config.vocab_size:
            count = f"{len(tokenizer)} words, the model {model.config.text_config.vocab_size}"
            raise ValueError(f"the tokenizer of {folder} knows {count}: copy tokenizer.json of this model into it")
        size, crop = processor.size["shortest_edge"], processor.crop_size
        wanted = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True}
        as_clip = all(getattr(processor, name) == value for name, value in wanted.items())
        seen = model.config.vision_config.image_size
        if not as_clip or processor.resample != BICUBIC or not (crop["height"] == crop["width"] == seen <= (size or 0)):
            raise ValueError(f"{folder}/preprocessor_config.json is not CLIP's: bicubic resize, centre crop to {seen}")
        return cls(model.to(device), tokenizer, size, seen, list(processor.image_mean), list(processor.image_std))

    def preprocess(self, images: Tensor) -> Tensor:
        """`preprocess` with the sizes and the normalisation of this model."""
        return preprocess(images, self.resize, self.size, self.mean, self.std)

    def images(self, images: Tensor) -> Tensor:
        """Float NCHW in [0, 1] -> unit vectors (B, C)."""
        pooled = self.model.vision_model(pixel_values=self.preprocess(images)).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        """Unit vectors (B, C) of the prompts, each computed once.

        Raises:
            ValueError: a prompt is longer than the model reads.
        """
        new = sorted(set(prompts) - set(self._texts))
        longest = self.model.config.text_config.max_position_embeddings
        for start in range(0, len(new), 256):
            batch = new[start : start + 256]
            tokens = self.tokenizer(batch, padding=True, return_tensors="pt").to(self.model.device)
            if tokens["input_ids"].shape[1] > longest:
                raise ValueError(f"the prompt {max(batch, key=len)!r} is longer than the {longest} tokens CLIP reads")
            pooled = self.model.text_model(tokens["input_ids"], tokens["attention_mask"]).pooler_output
            self._texts |= dict(zip(batch, F.normalize(self.model.text_projection(pooled), dim=-1), strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts])

    def cosine(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosine between each image (float NCHW in [0, 1]) and its prompt, (B,), in [-1, 1]."""
        return (self.images(images) * self.texts(prompts)).sum(-1)
