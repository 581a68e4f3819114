"""ImageReward against transformers' modules and its authors' recipe, on a tiny random model in the published format."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from marval.models.blip import ImageReward
from marval.models.mar import Block
from marval.reward_checks import check_reward
from marval.rewards import load_reward
from marval.tokenizers import to_float

transformers = pytest.importorskip("transformers")
from transformers.models.blip.modeling_blip_text import BlipTextModel  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

SIZE, PATCH, WIDTH, TEXT_WIDTH = 32, 16, 128, 48
PROMPTS = ["a picture of a red dog", "a cat", "redness", "of of of a dog a dog a dog"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", "red", "dog", "cat", "##ness"]
TEXT_CONFIG = {
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1,
    "hidden_act": "gelu", "hidden_size": TEXT_WIDTH, "intermediate_size": 64, "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64, "model_type": "bert", "num_attention_heads": 4, "num_hidden_layers": 2,
    "pad_token_id": 0, "vocab_size": len(WORDS) + 2, "encoder_width": 768, "add_cross_attention": True,
}  # fmt: skip


class VisionTransformer(nn.Module):
    """BLIP's image encoder, that is timm's, under its names."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, PATCH)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (SIZE // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList([Block(WIDTH, WIDTH // 64, 0.0) for _ in range(3)])
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Published(nn.Module):
    """The modules whose tensors ImageReward.pt holds, and how its authors score with them."""

    def __init__(self):
        super().__init__()
        self.blip = nn.ModuleDict({"visual_encoder": VisionTransformer()})
        known = {k: v for k, v in TEXT_CONFIG.items() if k in ("vocab_size", "layer_norm_eps")}
        self.blip["text_encoder"] = BlipTextModel(
            transformers.BlipTextConfig(
                hidden_size=TEXT_WIDTH, encoder_hidden_size=WIDTH, intermediate_size=64, num_attention_heads=4,
                num_hidden_layers=2, max_position_embeddings=64, **known,
            ), add_pooling_layer=False,
        )  # fmt: skip
        self.blip["vision_proj"], self.blip["text_proj"] = nn.Linear(WIDTH, 8), nn.Linear(TEXT_WIDTH, 8)
        sizes, drops = [TEXT_WIDTH, 1024, 128, 64, 16, 1], [0.2, 0.2, 0.1]
        layers: list[nn.Module] = []
        for i in range(5):
            layers += [nn.Linear(sizes[i], sizes[i + 1]), *(nn.Dropout(drops[i]) for _ in range(i < 3))]
        self.mlp = nn.ModuleDict({"layers": nn.Sequential(*layers)})

    @torch.no_grad()
    def score(self, pixels: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        seen = self.blip["visual_encoder"](pixels)
        read = self.blip["text_encoder"](
            tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long), return_dict=True,
        )  # fmt: skip
        rewards = self.mlp["layers"](read.last_hidden_state[:, 0])
        return (rewards[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def published() -> Published:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Published().eval()
        for name, parameter in model.named_parameters():  # so that images and prompts differ clearly
            if parameter.ndim > 1:
                fan_in = parameter.shape[-1] if name.endswith("_embed") else parameter[0].numel()
                parameter.data.normal_(std=1.5 / fan_in**0.5)
    return model


@pytest.fixture(scope="module")
def folder(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageReward.pt, med_config.json and a tokenizer."""
    path = tmp_path_factory.mktemp("imagereward")
    tensors = published.state_dict() | {"blip.text_encoder.embeddings.position_ids": torch.arange(64)[None]}
    torch.save(tensors, path / "ImageReward.pt")
    (path / "med_config.json").write_text(json.dumps(TEXT_CONFIG))
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return path


def pictures(height: int, width: int) -> np.ndarray:
    """uint8 NHWC: a square, a ramp, noise, another ramp."""
    y, x = np.mgrid[:height, :width]
    square = np.stack([255 * ((y < height // 2) & (x < width // 2)), 40 + 0 * y, 90 + 0 * y], -1)
    ramp = np.stack([255 * y / height, 255 * x / width, 128 + 0 * y], -1)
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return np.stack([square, ramp, noise, 255 - ramp]).astype(np.uint8)


def load(folder: Path, *classes: str):
    names = {"class_names": classes or ["cat", "dog"], "template": "a {class}", "classifier": "", "device": "cpu"}
    return load_reward(f"imagereward:{folder}", **names)


@pytest.mark.parametrize(("height", "width"), [(SIZE, SIZE), (64, 64), (20, 20), (48, 40)])
def test_scores_equal_the_authors_recipe(published: Published, folder: Path, height: int, width: int):
    images = pictures(height, width)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    pixels = processor([Image.fromarray(i) for i in images], return_tensors="pt")["pixel_values"]
    tokens = transformers.BertTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", max_length=35, return_tensors="pt"
    )
    expected = published.score(pixels, tokens)
    x = to_float(torch.from_numpy(images))
    found = check_reward(load(folder), x, PROMPTS)
    exact = (height, width) == (SIZE, SIZE)  # else the processor rounds to 8 bits after each pass
    network = ImageReward.load(str(folder), "cpu")
    assert ((network.preprocess(x) - pixels).abs() * network.std * 255).max() <= (1e-3 if exact else 1.5)
    torch.testing.assert_close(found, expected, atol=1e-4 if exact else 0.2, rtol=0)
    torch.testing.assert_close(found, published.score(network.preprocess(x), tokens), atol=1e-4, rtol=0)
    assert expected.std() > 0.8  # so that these tolerances mean something


def test_image_and_prompt_count_and_the_gradient_is_right(folder: Path):
    reward = load(folder)
    x = to_float(torch.from_numpy(pictures(40, 40))).clamp(0.05, 0.95).double().requires_grad_()
    scores = reward(x, PROMPTS)
    assert reward(x, PROMPTS[::-1]).sub(scores).abs().min() > 1e-3
    torch.testing.assert_close(reward(x[1:2], PROMPTS[1:2]), scores[1:2])  # padding to longer prompts changes nothing
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    step = 1e-2 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    with torch.no_grad():
        gained = reward(x + step, PROMPTS) - reward(x - step, PROMPTS)
    torch.testing.assert_close(gained, 2 * (gradient * step).sum((1, 2, 3)).float(), rtol=0.05, atol=0)
    grey = x[:, :1].detach()
    assert torch.equal(reward(grey, PROMPTS), reward(grey.expand(-1, 3, -1, -1), PROMPTS))


def edited(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(folder, out)
    tensors = torch.load(out / "ImageReward.pt", weights_only=True)
    change(tensors)
    torch.save(tensors, out / "ImageReward.pt")
    return out


def test_what_is_not_a_whole_imagereward_is_refused(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    cases: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
        (lambda t: t.pop("mlp.layers.6.bias"), "tensor 'head.layers.6.bias' is missing"),
        (
            lambda t: t.pop("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"),
            "tensor 'text.encoder.layer.1.crossattention.self.key.weight' is missing",
        ),
        (lambda t: t.pop("blip.visual_encoder.blocks.2.attn.qkv.bias"), "layers.2.self_attn.qkv.bias' is missing"),
        (lambda t: t.update(other=torch.zeros(2)), "unexpected tensor 'other'"),
        (lambda t: t.update({"blip.visual_encoder.norm.bias": torch.zeros(3)}), r"has shape \[3\]"),
        (lambda t: t.pop("blip.visual_encoder.pos_embed"), "no 'vision.embeddings.position_embedding'"),
    ]
    for i, (change, message) in enumerate(cases):
        path = edited(folder, tmp_path / str(i), change)
        with pytest.raises(ValueError, match=message) as error:
            load(path)
        assert f"reward 'imagereward:{path}': " in str(error.value)
        assert "\n" not in str(error.value)
    for name, message in (
        ("ImageReward.pt", "ImageReward.pt does not exist"), ("med_config.json", "med_config.json does not exist"),
        ("vocab.txt", "has no tokenizer: copy tokenizer.json of google-bert/bert-base-uncased into it"),
    ):  # fmt: skip
        out = tmp_path / f"without-{name}"
        shutil.copytree(folder, out)
        (out / name).unlink()
        with pytest.raises(ValueError, match=message):
            load(out)
    short = tmp_path / "short"
    shutil.copytree(folder, short)
    (short / "vocab.txt").write_text("\n".join(WORDS[:-1]) + "\n")
    with pytest.raises(ValueError, match="knows 11 words, the model 14: copy tokenizer"):
        load(short)
    with pytest.raises(ValueError, match="'nowhere' is neither a folder nor a hub name"):
        load(Path("nowhere"))
    with pytest.raises(ValueError, match="is longer than the 35 tokens it reads"):
        load(folder)(torch.rand(1, 3, 8, 8), ["a dog " * 20])
    with pytest.raises(ValueError, match="is longer than the 35 tokens it reads"):
        load(folder, "cat", "a dog " * 20)
    assert capfd.readouterr() == ("", "")
