"""Tokenizers: closed forms, files, lazy weights, and models whose tokens are latents."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_codec import make_codec
from torch.testing import assert_close

import marval
from marval.checkpoint import save_state, save_tensors, write_json
from marval.config import SamplingConfig, StudentConfig
from marval.models.autoencoders import CONFIG, WEIGHTS, load_autoencoder
from marval.pipeline import Pipeline
from marval.tokenizers import (
    LatentTokenizer,
    PixelTokenizer,
    load_tokenizer,
    patchify,
    recommended_head_width,
    to_float,
    tokenizer_from_dict,
    tokenizer_to_dict,
    unpatchify,
)

SIZE, PATCH = 32, 2
"""With the codec's stride of 4 and 4 channels: a grid of 4x4 tokens of 16."""


@pytest.fixture
def codec(tmp_path: Path) -> Path:
    """A folder of a random TAESD whose config asks for a scale and a shift."""
    folder = make_codec(tmp_path / "codec")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"scaling_factor": 0.5, "shift_factor": 0.1}))
    return folder


@pytest.fixture
def tokenizer(codec: Path) -> LatentTokenizer:
    tokenizer = load_tokenizer(str(codec), SIZE, PATCH)
    assert isinstance(tokenizer, LatentTokenizer)
    return tokenizer


def photos(count: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


# ---- what they compute


def test_sizes(tokenizer):
    assert (tokenizer.grid, tokenizer.token_dim, tokenizer.channels, tokenizer.image_channels) == (4, 16, 4, 3)
    assert (tokenizer.stride, tokenizer.scale, tokenizer.shift) == (4, 0.5, 0.1)
    assert tokenizer.has_images
    pixels = load_tokenizer("pixels", 8, 2, channels=1)
    assert isinstance(pixels, PixelTokenizer)
    assert (pixels.grid, pixels.token_dim, pixels.image_channels, pixels.has_images) == (4, 4, 1, True)
    assert pixels.to("cpu") is pixels


def test_encode_and_decode_are_the_autoencoder_with_scale_and_shift(tokenizer, codec):
    network, x = load_autoencoder(codec), to_float(torch.from_numpy(photos()))
    latents = network.encoder(x)
    tokens = tokenizer.encode(x)
    assert_close(tokens, patchify((latents - 0.1) * 0.5, PATCH))
    assert_close(unpatchify(tokens, PATCH) / 0.5 + 0.1, latents)
    y = tokenizer.decode(tokens)
    assert_close(y, network.decode(latents).clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert y.shape == x.shape


def test_tokens_of_the_posterior(tokenizer):
    """(mean + exp(logvar / 2) noise - shift) scale, in numpy."""
    moments, noise = torch.randn(3, 8, 8, 8), torch.randn(3, 4, 8, 8)
    mean, logvar = np.split(moments.numpy(), 2, axis=1)
    expected = (mean + np.exp(logvar / 2) * noise.numpy() - 0.1) * 0.5
    assert_close(unpatchify(tokenizer.tokens(moments, noise), PATCH), torch.from_numpy(expected))
    assert_close(unpatchify(tokenizer.tokens(moments), PATCH), torch.from_numpy((mean - 0.1) * np.float32(0.5)))


def test_a_deterministic_autoencoder_has_no_noise(tokenizer):
    moments = tokenizer.moments(to_float(torch.from_numpy(photos())))
    assert moments.dtype == torch.float32
    assert moments.shape == (2, 8, 8, 8)
    assert_close(tokenizer.tokens(moments, torch.ones(2, 4, 8, 8)), tokenizer.tokens(moments), rtol=0, atol=1e-6)


def test_autocast_changes_nothing(tokenizer):
    x = to_float(torch.from_numpy(photos()))
    expected = tokenizer.encode(x), tokenizer.decode(tokenizer.encode(x))
    with torch.autocast("cpu", torch.bfloat16):
        tokens = tokenizer.encode(x)
        assert torch.equal(tokens, expected[0])
        assert torch.equal(tokenizer.decode(tokens), expected[1])


def test_decode_has_gradients_and_its_weights_none(tokenizer):
    """Also after a sampler loaded the weights in inference mode; the gradient against finite differences."""
    tokens = 0.3 * torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        tokenizer.decode(tokens)
    given = tokens.clone().requires_grad_()
    tokenizer.decode(given).double().mean().backward()
    assert all(p.grad is None and not p.requires_grad for p in tokenizer._loaded().parameters())
    direction = given.grad / given.grad.norm()
    with torch.no_grad():
        high, low = (tokenizer.decode(tokens + step * direction).double().mean() for step in (1e-2, -1e-2))
    assert float(given.grad.norm()) == pytest.approx(float(high - low) / 2e-2, rel=0.02)


def test_weights_that_a_sampler_moves_can_serve_gradients_later(codec):
    """On a GPU the move made new tensors, inference tensors in a sampler: RL failed at its first update."""
    tokenizer = load_tokenizer(str(codec), 32, 1).to("meta")
    with torch.inference_mode():
        tokenizer._loaded()
    assert not any(p.is_inference() for p in tokenizer._loaded().parameters())


@pytest.mark.parametrize(
    ("token_dim", "width"), [(1, 1024), (16, 1024), (17, 1152), (32, 1536), (64, 2048), (256, 4096)]
)
def test_recommended_head_width(token_dim, width):
    assert recommended_head_width(token_dim) == width


# ---- files


def test_json_form(tokenizer, codec):
    values = json.loads(json.dumps(tokenizer_to_dict(tokenizer)))
    assert values["kind"] == "latents"
    assert "folder" not in values
    assert tokenizer_from_dict(values, codec) == tokenizer
    assert not tokenizer_from_dict(values).has_images
    pixels = PixelTokenizer(image_size=8, channels=1, patch_size=2)
    assert tokenizer_from_dict(json.loads(json.dumps(tokenizer_to_dict(pixels)))) == pixels


def test_latents_of_a_taesd_have_a_range(tokenizer, codec):
    low, high = tokenizer.token_range
    assert (low, high) == ((-3 - tokenizer.shift) * tokenizer.scale, (3 - tokenizer.shift) * tokenizer.scale)
    values = tokenizer_to_dict(tokenizer)
    del values["magnitude"]  # a folder that an older marval wrote
    assert tokenizer_from_dict(values, codec).token_range == (low, high)
    assert tokenizer_from_dict(values).token_range is None, "of an autoencoder that is not at hand nothing is known"


def test_without_its_autoencoder_there_are_no_images():
    tokenizer = LatentTokenizer(image_size=256, channels=16, patch_size=1, stride=16, scale=0.2325)
    assert (tokenizer.grid, tokenizer.has_images) == (16, False)
    with pytest.raises(ValueError, match=r"not in its folder: use sample_tokens\(\)"):
        tokenizer.decode(torch.zeros(1, 256, 16))


def test_the_autoencoder_of_another_model_is_refused(tokenizer, codec):
    values = tokenizer_to_dict(tokenizer) | {"stride": 8, "image_size": 64}
    with pytest.raises(ValueError, match=r"codec holds an autoencoder of 4 channels and stride 4, .* with 4 and 8"):
        tokenizer_from_dict(values, codec)


def test_weights_are_read_when_needed(tokenizer, codec):
    (codec / WEIGHTS).unlink()
    assert tokenizer.tokens(torch.zeros(1, 8, 8, 8)).shape == (1, 16, 16)
    with pytest.raises(ValueError, match=r"lacks diffusion_pytorch_model\.safetensors"):
        tokenizer.encode(torch.zeros(1, 3, SIZE, SIZE))


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / WEIGHTS).unlink(), "codec lacks diffusion_pytorch_model.safetensors: pickled or sharded"),
        (truncate, r"safetensors is not a whole safetensors file"),
        (lambda f: (f / CONFIG).unlink(), r"codec/config\.json does not exist"),
        (lambda f: (f / CONFIG).write_text("[]"), r"describes no autoencoder .*\(no _class_name\)"),
    ],
)
def test_damaged_folders_are_refused_at_once(codec, damage, message):
    damage(codec)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(codec), SIZE, PATCH)


def test_image_size_must_fit(codec):
    with pytest.raises(ValueError, match="image size 36 is not a multiple of 8: the autoencoder's stride 4 times"):
        load_tokenizer(str(codec), 36, PATCH)


def test_hub_names(codec, monkeypatch):
    """A folder never touches the network; ``owner/name/subfolder`` asks for two files."""
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(codec.parent)

    monkeypatch.setattr(hub, "snapshot_download", download)
    load_tokenizer(str(codec), SIZE, PATCH)
    monkeypatch.chdir(codec.parent)
    load_tokenizer("codec", SIZE, PATCH)
    for typo in ("codex", "codec/nothing", str(codec.parent / "absent"), "./absent", "../absent/x"):
        with pytest.raises(ValueError, match="no such folder; give `pixels`, a folder, or owner/name"):
            load_tokenizer(typo, SIZE, PATCH)
    assert asked == []
    tokenizer = load_tokenizer("owner/model/codec", SIZE, PATCH)
    assert asked == [("owner/model", [f"codec/{CONFIG}", f"codec/{WEIGHTS}"])]
    assert tokenizer == load_tokenizer(str(codec), SIZE, PATCH)


def test_the_hub_without_a_network(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'no-one/nothing' is no folder and cannot be had from the hub: ") as error:
        load_tokenizer("no-one/nothing", SIZE, PATCH)
    assert "\n" not in str(error.value)


# ---- models of latents


@pytest.fixture
def model(tokenizer: LatentTokenizer, tiny_mar) -> Pipeline:
    """A student, so that drawing is quick."""
    sampling = SamplingConfig(ar_steps=3, guidance=1.5)
    return Pipeline(
        tiny_mar(token_dim=16), tokenizer, ["ant", "bee", "cat"], sampling, StudentConfig(), {"data": "none"}
    )


def test_a_saved_model_has_its_autoencoder(model, codec, tmp_path):
    model.save(tmp_path / "model")
    model.save(tmp_path / "model")  # as a run does, again and again
    folder = tmp_path / "model" / "tokenizer"
    assert (folder / WEIGHTS).samefile(codec / WEIGHTS)
    loaded = marval.load(tmp_path / "model")
    assert loaded.tokenizer == model.tokenizer
    expected = model.sample(["ant", "cat"], seed=3)
    assert expected.shape == (2, SIZE, SIZE, 3)
    assert np.array_equal(loaded.sample(["ant", "cat"], seed=3), expected)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer" / CONFIG).samefile(codec / CONFIG)


def test_an_image_is_the_decoded_tokens(model):
    tokens = model.sample_tokens([0, 1], seed=5)
    expected = (model.tokenizer.decode(tokens) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(model.sample([0, 1], seed=5, batch_size=1), expected)


def test_inpainting(model):
    """Kept tokens are those of the posterior's mode; all kept is a reconstruction."""
    images, keep = photos(3), np.zeros((4, 4), bool)
    assert np.array_equal(
        model.sample([0], num_images=3, images=images, keep=~keep, batch_size=2),
        (model.tokenizer.decode(model.tokenizer.encode(to_float(torch.from_numpy(images)))) * 255)
        .round().to(torch.uint8).permute(0, 2, 3, 1).numpy(),
    )  # fmt: skip
    keep[:2] = True
    drawn = {}
    model.tokenizer.decode = lambda tokens: drawn.setdefault("tokens", tokens).new_zeros(len(tokens), 3, SIZE, SIZE)
    model.sample([0], num_images=3, images=images, keep=keep)
    known = model.tokenizer.encode(to_float(torch.from_numpy(images)))
    assert torch.equal(drawn["tokens"][:, :8], known[:, :8])
    assert not bool((drawn["tokens"][:, 8:] == known[:, 8:]).any())
    with pytest.raises(ValueError, match=r"images must be uint8 NHWC \(3, 32, 32, 3\); got uint8 \(3, 16, 32, 3\)"):
        model.sample([0], num_images=3, images=images[:, :16], keep=keep)


def test_without_its_autoencoder_a_model_draws_tokens(model, tmp_path):
    model.save(tmp_path / "model")
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "model" / "tokenizer" / name).unlink()
    loaded = marval.load(tmp_path / "model")
    assert torch.equal(loaded.sample_tokens([1]), model.sample_tokens([1]))
    with pytest.raises(ValueError, match="autoencoder that is not in its folder"):
        loaded.sample([1])


def test_token_only_work_needs_no_diffusers(model, codec, tmp_path):
    """Even where the autoencoder is diffusers': only its config is read."""
    save_tensors(codec / "none.safetensors", {"x": torch.zeros(1)})
    (codec / "none.safetensors").replace(codec / WEIGHTS)
    kl = {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [8, 8, 8]}
    write_json(codec / CONFIG, kl)
    model.save(tmp_path / "model")
    code = f"""if True:
        import sys
        from marval.pipeline import load
        assert load({str(tmp_path / "model")!r}).sample_tokens([0]).shape == (1, 16, 16)
        assert not {{"diffusers", "transformers", "huggingface_hub"}} & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_to_moves_the_autoencoder(model):
    moved = []
    model.tokenizer.to = lambda device: moved.append(device)
    assert model.to("cpu") is model
    assert moved == ["cpu"]


def test_a_device_given_before_the_weights_are_read(tokenizer):
    assert tokenizer.to("meta") is tokenizer
    assert next(tokenizer._loaded().parameters()).is_meta


# ---- averaged and raw weights


def run_folder(path: Path, model: Pipeline, state: dict[str, object]) -> Path:
    model.save(path)
    save_state(path / "checkpoint.pt", {**state, "ema": {}, "step": 1, "extra": {}})
    return path


@pytest.mark.parametrize("part", ["network", "student", "head"])
def test_raw_weights(model, tiny_mar, tmp_path, part):
    """Of a teacher, of a student trained whole, and of one whose backbone is the teacher's."""
    trained = tiny_mar(seed=1, token_dim=16)
    state = {"student": trained.head.state_dict()} if part == "head" else {part: trained.state_dict()}
    folder = run_folder(tmp_path / "run", model, state)
    raw, averaged = marval.load(folder, weights="raw"), marval.load(folder)
    for name, tensor in raw.network.state_dict().items():
        owner = model.network if part == "head" and not name.startswith("head.") else trained
        assert torch.equal(tensor, owner.state_dict()[name]), name
    assert not torch.equal(raw.sample_tokens([0]), averaged.sample_tokens([0]))
    assert torch.equal(averaged.sample_tokens([0]), model.sample_tokens([0]))
    assert raw.provenance == {"data": "none", "weights": "raw"}


def test_raw_weights_that_are_not_there(model, tiny_mar, tmp_path):
    with pytest.raises(ValueError, match="unknown weights 'best': choose ema or raw"):
        Pipeline.load(tmp_path, weights="best")  # pyright: ignore
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model has no checkpoint\.pt, so only averaged weights"):
        marval.load(tmp_path / "model", weights="raw")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is no checkpoint of marval train, distill or rl"):
        marval.load(run_folder(tmp_path / "a", model, {}), weights="raw")
    wrong = {"network": tiny_mar(width=32, token_dim=16).state_dict()}
    with pytest.raises(ValueError, match=r"b/checkpoint\.pt: tensor '.*' has shape"):
        marval.load(run_folder(tmp_path / "b", model, wrong), weights="raw")


def test_files_are_as_readable_as_others(model, tmp_path):
    model.save(tmp_path / "model")
    (tmp_path / "plain").touch()
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
