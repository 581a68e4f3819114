"""CLIP and its rewards against transformers' own pipeline, on a tiny random model in the published file format."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from marval.models.clip import Clip
from marval.reward_checks import check_reward
from marval.reward_files import check_files
from marval.rewards import load_reward
from marval.tokenizers import to_float

transformers = pytest.importorskip("transformers")
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

SIZE = 30
PROMPTS = ["a picture of a red square", "a goldfish", "noise", "stripes, many of them"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights: config.json, model.safetensors, tokenizer and preprocessor_config.json."""
    path = tmp_path_factory.mktemp("clip")
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 520,
        "max_position_embeddings": 40, "bos_token_id": 518, "eos_token_id": 519, "pad_token_id": 519,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
        "image_size": SIZE, "patch_size": 6,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that images and prompts differ clearly
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    model.save_pretrained(path)
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    merges = [("a", "</w>"), ("r", "e"), ("re", "d"), ("o", "f")]
    words = [*letters, *(f"{x}</w>" for x in letters), "re", "red", "of", "x", "y", "z"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    while len(vocab) < 518:
        vocab[f"unused{len(vocab)}"] = len(vocab)
    vocab |= {"<|startoftext|>": 518, "<|endoftext|>": 519}
    transformers.CLIPTokenizer(vocab=vocab, merges=merges[1:]).save_pretrained(path)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(path)
    assert {p.name for p in path.iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"
    }  # fmt: skip
    return path


def pictures(height: int, width: int) -> np.ndarray:
    """uint8 NHWC: a coloured square, a smooth ramp, noise, stripes."""
    y, x = np.mgrid[:height, :width]
    square = np.stack([255 * ((y < height // 2) & (x < width // 2)), 40 + 0 * y, 90 + 0 * y], -1)
    ramp = np.stack([255 * y / height, 255 * x / width, 128 + 0 * y], -1)
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    stripes = np.repeat(255 * (x // 2 % 2)[..., None], 3, -1)
    return np.stack([square, ramp, noise, stripes]).astype(np.uint8)


def reference(folder: Path, images: np.ndarray) -> tuple[Tensor, Tensor]:
    """transformers' pipeline on PIL images: preprocessed pixels, and cosines of each image with its prompt."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)([Image.fromarray(i) for i in images], return_tensors="pt")
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, **pixels)
    return pixels["pixel_values"], (out.logits_per_image / model.logit_scale.exp()).diagonal()


@pytest.mark.parametrize(("height", "width"), [(SIZE, SIZE), (64, 64), (8, 8), (96, 61), (31, 47)])
def test_scores_equal_transformers(folder: Path, height: int, width: int):
    images = pictures(height, width)
    pixels, cosines = reference(folder, images)
    clip = Clip.load(str(folder), "cpu")
    x = to_float(torch.from_numpy(images))
    steps = (clip.preprocess(x) - pixels).abs() * clip.std * 255
    assert steps.max() <= (1e-3 if (height, width) == (SIZE, SIZE) else 1.5)  # the processor rounds to 8 bits
    torch.testing.assert_close(clip.cosine(x, PROMPTS), cosines, atol=0.01, rtol=0)
    assert cosines.std() > 0.05  # so that this tolerance means something
    if (height, width) == (SIZE, SIZE):
        torch.testing.assert_close(clip.cosine(x, PROMPTS), cosines, atol=1e-5, rtol=0)


def test_rewards_have_their_units(folder: Path):
    images = pictures(SIZE, SIZE)
    _, cosines = reference(folder, images)
    x = to_float(torch.from_numpy(images))
    names = {"class_names": ["cat", "dog"], "template": "a {class}", "classifier": "", "device": "cpu"}
    clip, pick = load_reward(f"clip:{folder}", **names), load_reward(f"pickscore:{folder}", **names)
    torch.testing.assert_close(check_reward(clip, x, PROMPTS), 100 * cosines, atol=1e-3, rtol=0)
    scale = float(np.exp(2.6592))  # transformers' initial logit_scale
    torch.testing.assert_close(check_reward(pick, x, PROMPTS), scale * cosines, atol=1e-3, rtol=0)
    hps = load_reward(f"hps:{folder}", **names)
    torch.testing.assert_close(check_reward(hps, x, PROMPTS), 100 * cosines, atol=1e-3, rtol=0)
    for spec in ("clip:", "pickscore:", "hps:", "imagereward:", "aesthetic:", "brisque:"):
        with pytest.raises(ValueError, match=f"reward '{spec}' needs a model"):
            load_reward(spec, **names)


def test_the_gradient_of_the_image_raises_the_score(folder: Path):
    clip = Clip.load(str(folder), "cpu")
    x = to_float(torch.from_numpy(pictures(48, 40))[:3]).clamp(0.05, 0.95).double().requires_grad_()
    before = clip.cosine(x, PROMPTS[:3])
    (gradient,) = torch.autograd.grad(before.sum(), x)
    step = 1e-3 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    with torch.no_grad():
        gained = clip.cosine(x + step, PROMPTS[:3]) - clip.cosine(x - step, PROMPTS[:3])
    expected = 2 * (gradient * step).sum((1, 2, 3)).float()
    torch.testing.assert_close(gained, expected, rtol=0.05, atol=0)
    assert all(parameter.grad is None for parameter in clip.model.parameters())


def test_grey_images_and_cached_prompts(folder: Path, monkeypatch: pytest.MonkeyPatch):
    clip = Clip.load(str(folder), "cpu")
    grey = to_float(torch.from_numpy(pictures(20, 20))).mean(1, keepdim=True)
    assert torch.equal(clip.cosine(grey, PROMPTS), clip.cosine(grey.expand(-1, 3, -1, -1), PROMPTS))
    calls: list[int] = []
    forward = clip.model.text_model.forward
    monkeypatch.setattr(
        clip.model.text_model, "forward", lambda *a, **k: (calls.append(len(a[0])), forward(*a, **k))[1]
    )
    one = clip.texts(["a cat", "a dog", "a cat"])
    assert calls == [2]
    torch.testing.assert_close(clip.texts(["a dog", "a bird", PROMPTS[0]])[0], one[1])
    assert calls == [2, 1]  # a bird
    with pytest.raises(ValueError, match=r"the prompt 'xxxx.* is longer than the 40 tokens CLIP reads"):
        clip.texts(["x" * 50])
    names = {"class_names": ["cat", "x" * 50], "template": "a {class}", "classifier": "", "device": "cpu"}
    with pytest.raises(ValueError, match=r"reward 'clip:.*x' is longer than the 40 tokens CLIP reads"):
        load_reward(f"clip:{folder}", **names)  # before any image asks for the last class


def edited(folder: Path, out: Path, name: str, change: Any) -> str:
    """A copy of the folder with one file changed: ``change`` edits its tensors or its JSON in place."""
    shutil.copytree(folder, out)
    if name.endswith(".safetensors"):
        tensors = load_file(out / name)
        change(tensors)
        save_file(tensors, out / name, metadata={"format": "pt"})
    else:
        values = json.loads((out / name).read_text())
        change(values)
        (out / name).write_text(json.dumps(values))
    return str(out)


def test_what_is_not_a_whole_clip_is_refused(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    weights, preprocessor = "model.safetensors", "preprocessor_config.json"
    cases = (
        (weights, lambda t: t.pop("visual_projection.weight"), "no tensor visual_projection.weight"),
        (weights, lambda t: t.update(other=torch.zeros(2)), "an unknown tensor other"),
        (weights, lambda t: t.update(logit_scale=torch.zeros(3)), "a wrong shape for tensor logit_scale"),
        (preprocessor, lambda c: c.update(resample=2), "preprocessor_config.json is not CLIP's: bicubic resize"),
        (preprocessor, lambda c: c.update(crop_size={"height": 24, "width": 24}), "is not CLIP's"),
        ("config.json", lambda c: c["text_config"].update(vocab_size=519), "a wrong shape for tensor text_model.embed"),
    )
    for i, (name, change, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message) as error:
            Clip.load(edited(folder, tmp_path / str(i), name, change), "cpu")
        assert "\n" not in str(error.value)
    for name in (weights, preprocessor, "config.json", "tokenizer.json"):
        out = tmp_path / f"without-{name}"
        shutil.copytree(folder, out)
        (out / name).unlink()
        with pytest.raises(ValueError, match=str(out)) as error:
            Clip.load(str(out), "cpu")
        assert "\n" not in str(error.value)
    cut = edited(folder, tmp_path / "cut", "config.json", lambda c: None)
    Path(cut, weights).write_bytes(Path(cut, weights).read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"cannot load a CLIP from {cut}"):
        Clip.load(cut, "cpu")
    with pytest.raises(ValueError, match="'nowhere' is neither a folder nor a hub name"):
        Clip.load("nowhere", "cpu")
    harmless = edited(folder, tmp_path / "old", weights, lambda t: t.update({
        "text_model.embeddings.position_ids": torch.arange(40)[None]}))  # fmt: skip
    Clip.load(harmless, "cpu")
    assert capfd.readouterr() == ("", "")  # no reports, no bars: what is wrong is in the error


class OpenClip(nn.Module):
    """A CLIP as open_clip builds and names it, the sizes of the fixture; its ViT-H/14 has GELU."""

    def __init__(self):
        super().__init__()

        def transformer() -> nn.ModuleDict:
            blocks = []
            for _ in range(2):
                mlp = nn.ModuleDict({"c_fc": nn.Linear(32, 64), "c_proj": nn.Linear(64, 32)})
                attention = nn.MultiheadAttention(32, 4, batch_first=True)
                blocks.append(
                    nn.ModuleDict({"ln_1": nn.LayerNorm(32), "attn": attention, "ln_2": nn.LayerNorm(32), "mlp": mlp})
                )
            return nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})

        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, 32, 6, 6, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.zeros(32))
        self.visual.positional_embedding = nn.Parameter(torch.zeros(26, 32))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(32), nn.LayerNorm(32)
        self.visual.transformer, self.visual.proj = transformer(), nn.Parameter(torch.zeros(32, 16))
        self.transformer = transformer()
        self.token_embedding, self.ln_final = nn.Embedding(520, 32), nn.LayerNorm(32)
        self.positional_embedding = nn.Parameter(torch.zeros(40, 32))
        self.text_projection = nn.Parameter(torch.zeros(32, 16))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2

    @staticmethod
    def run(transformer: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in transformer["resblocks"]:
            h = block["ln_1"](x)
            x = x + block["attn"](h, h, h, need_weights=False, attn_mask=mask)[0]
            x = x + block["mlp"]["c_proj"](nn.functional.gelu(block["mlp"]["c_fc"](block["ln_2"](x))))
        return x

    @torch.no_grad()
    def cosine(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        v: Any = self.visual
        x = v.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        images = v.ln_post(self.run(v.transformer, v.ln_pre(x))[:, 0]) @ v.proj
        length = tokens.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.ln_final(self.run(self.transformer, x, mask))
        texts = x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection
        return nn.functional.cosine_similarity(images, texts)


def test_weights_of_open_clip(folder: Path, tmp_path: Path):
    """`hps:` of a file in open_clip's layout, half precision as HPS_v2.1_compressed.pt, beside the other files."""

    def gelu(config: dict[str, Any]) -> None:
        config["text_config"]["hidden_act"] = config["vision_config"]["hidden_act"] = "gelu"

    out = Path(edited(folder, tmp_path / "hps", "config.json", gelu))
    (out / "model.safetensors").unlink()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = OpenClip().half()
    state = model.state_dict()
    names = {"class_names": ["cat", "dog"], "template": "a {class}", "classifier": "", "device": "cpu"}
    torch.save({"state_dict": state | {"attn_mask": torch.zeros(2, 2)}, "epoch": 1}, out / "HPS_v2.1_compressed.pt")
    torch.save({f"module.{name}": value for name, value in state.items()}, out / "flat.pt")
    save_file(state, out / "open_clip.safetensors")
    images = pictures(SIZE, SIZE)
    pixels, _ = reference(folder, images)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    expected = 100 * model.float().cosine(pixels, tokens["input_ids"])
    assert expected.std() > 5
    for file in ("HPS_v2.1_compressed.pt", "flat.pt", "open_clip.safetensors"):
        reward = load_reward(f"hps:{out / file}", **names)
        found = check_reward(reward, to_float(torch.from_numpy(images)), PROMPTS)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    bad = out / "bad.pt"
    for change, message in (
        (
            lambda t: t.pop("visual.transformer.resblocks.1.attn.in_proj_weight"),
            "no tensor vision_model.encoder.layers",
        ),
        (lambda t: t.update({"visual.head": torch.zeros(2)}), "an unknown tensor visual.head"),
        (
            lambda t: t.update({"ln_final.weight": torch.zeros(2)}),
            "a wrong shape for tensor text_model.final_layer_norm",
        ),
    ):
        tensors = dict(state)
        change(tensors)
        torch.save({"state_dict": tensors}, bad)
        with pytest.raises(ValueError, match=message) as error:
            load_reward(f"hps:{bad}", **names)
        assert f"the weights of {bad} are not" in str(error.value)
    bad.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no file of torch"):
        load_reward(f"hps:{bad}", **names)


def test_names_of_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The real code of transformers on a cache laid out as the hub's: HPSv2's weights have no other files with them."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub, "is_offline_mode", lambda: True, raising=False)

    def model(name: str) -> Path:
        path = tmp_path / f"models--{name.replace('/', '--')}"
        (path / "refs").mkdir(parents=True)
        (path / "refs" / "main").write_text("0" * 40)
        return path / "snapshots" / ("0" * 40)

    whole = model("laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    shutil.copytree(folder, whole)
    (whole / "model.safetensors").unlink()
    weights = model("xswu/HPSv2")
    weights.mkdir(parents=True)
    torch.save({"state_dict": OpenClip().half().state_dict()}, weights / "HPS_v2.1_compressed.pt")
    shutil.copytree(folder, model("openai/tiny"))
    head = model("a/head") / "head.pth"
    head.parent.mkdir(parents=True)
    torch.save(nn.Linear(16, 1).state_dict(), head)
    local = {
        "hps:xswu/HPSv2": f"hps:{tmp_path / 'hps.pt'}", "clip:openai/tiny": f"clip:{folder}",
        "aesthetic:openai/tiny:a/head/head.pth": f"aesthetic:{folder}:{head}",
    }  # fmt: skip
    for name in whole.iterdir():
        shutil.copy(name, tmp_path)
    shutil.copy(weights / "HPS_v2.1_compressed.pt", tmp_path / "hps.pt")
    names = {"class_names": ["cat", "dog"], "template": "a {class}", "classifier": "", "device": "cpu"}
    x = to_float(torch.from_numpy(pictures(SIZE, SIZE)))
    for spec, same in local.items():
        check_files(spec, "")
        found, expected = (check_reward(load_reward(name, **names), x, PROMPTS) for name in (spec, same))
        assert torch.equal(found, expected)
        assert found.std() > 0
    for spec, message in (
        ("aesthetic:openai/tiny:a/head/other.pth", "there is no folder a/head, and the hub gives no other.pth"),
        ("clip:openai/other", "there is no folder openai/other, and the hub gives no config.json"),
    ):
        with pytest.raises(ValueError, match=message):
            check_files(spec, "")
    shutil.rmtree(weights)
    with pytest.raises(ValueError, match=r"there is no folder xswu/HPSv2, and the hub gives no HPS_v2.1_compressed.pt"):
        load_reward("hps:xswu/HPSv2", **names)


def test_aesthetic_score(folder: Path, tmp_path: Path):
    names = {"class_names": ["cat", "dog"], "template": "a {class}", "classifier": "", "device": "cpu"}
    images = pictures(SIZE, SIZE)
    pixels, _ = reference(folder, images)
    with torch.no_grad():
        embedded = transformers.CLIPModel.from_pretrained(folder).get_image_features(pixels).pooler_output
    embedded = embedded / embedded.norm(dim=-1, keepdim=True)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        layers = nn.Sequential(
            nn.Linear(16, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        ).eval()  # fmt: skip
        single = nn.Linear(16, 1)
    mlp, linear = tmp_path / "sac+logos+ava1-l14-linearMSE.pth", tmp_path / "sa_0_4_vit_l_14_linear.pth"
    torch.save(nn.ModuleDict({"layers": layers}).state_dict(), mlp)
    torch.save(single.state_dict(), linear)
    x = to_float(torch.from_numpy(images))
    for file, head in ((mlp, layers), (linear, single)):
        reward = load_reward(f"aesthetic:{folder}:{file}", **names)
        torch.testing.assert_close(check_reward(reward, x, PROMPTS), head(embedded)[:, 0].detach(), atol=1e-5, rtol=0)
        assert reward.differentiable
    with pytest.raises(ValueError, match=r"needs a CLIP and a head: give aesthetic:CLIP:HEAD.pth"):
        load_reward(f"aesthetic:{folder}", **names)
    with pytest.raises(ValueError, match=r"nowhere.pth does not exist"):
        load_reward(f"aesthetic:{folder}:nowhere.pth", **names)
    torch.save(nn.Linear(768, 1).state_dict(), linear)
    with pytest.raises(ValueError, match=r"has embeddings 16 wide, the head .* reads 768"):
        load_reward(f"aesthetic:{folder}:{linear}", **names)
