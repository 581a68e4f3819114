"""CLIP (arXiv 2103.00020) through transformers: how well an image fits a text, differentiable in the image."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no reports on stderr: what is wrong with a file is raised instead."""
    log = transformers.utils.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()


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
    def load(cls, source: str, device: torch.device | str) -> "Clip":
        """A folder in the format of transformers (config, weights, tokenizer, preprocessor), or a hub name.

        Raises:
            ValueError: transformers is not installed, a file is missing or unreadable, the weights are not exactly
                those of the model (names the tensor), or the preprocessor is not CLIP's.
        """
        try:
            import transformers
        except ImportError:
            raise ValueError("CLIP needs transformers: pip install 'marval[rewards]'") from None
        if not Path(source).is_dir() and source.count("/") != 1:
            raise ValueError(f"{source!r} is neither a folder nor a hub name such as openai/clip-vit-large-patch14")
        with _quiet(transformers):
            # The variant that works on PIL images exists by this name since transformers 5; it needs no torchvision.
            from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

            try:
                loaded: Any = transformers.CLIPModel.from_pretrained(
                    source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
                )
                tokenizer = transformers.AutoTokenizer.from_pretrained(source)
                processor = CLIPImageProcessorPil.from_pretrained(source)
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
            raise ValueError(f"the tokenizer of {source} knows {count}: copy tokenizer.json of this model into it")
        size, crop = processor.size["shortest_edge"], processor.crop_size
        wanted = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True}
        as_clip = all(getattr(processor, name) == value for name, value in wanted.items())
        seen = model.config.vision_config.image_size
        if not as_clip or processor.resample != BICUBIC or not (crop["height"] == crop["width"] == seen <= (size or 0)):
            raise ValueError(f"{source}/preprocessor_config.json is not CLIP's: bicubic resize, centre crop to {seen}")
        return cls(model.to(device), tokenizer, size, seen, list(processor.image_mean), list(processor.image_std))

    def preprocess(self, images: Tensor) -> Tensor:
        """Float NCHW in [0, 1], 1 or 3 channels, of any size -> normalised (B, 3, size, size), differentiable.

        Shortest side resized (bicubic, antialiased, columns before rows, each bounded, as Pillow), centre crop,
        normalisation. transformers' processor does the same on 8-bit images; the difference is its rounding after
        each pass, at most 1.5 / 255 before the normalisation.
        """
        height, width = images.shape[2:]
        short = min(height, width)
        shape = [self.resize if side == short else int(self.resize * side / short) for side in (height, width)]
        x = images.expand(-1, 3, -1, -1).float()
        for size in ([height, shape[1]], shape):
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (shape[0] - self.size) // 2, (shape[1] - self.size) // 2
        return (x[..., top : top + self.size, left : left + self.size] - self.mean) / self.std

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
