"""Autoencoders: parity with diffusers, gradients, and what a folder may not be."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_codec import make_codec
from torch.testing import assert_close

from marval.checkpoint import load_tensors, save_tensors
from marval.images import center_crop
from marval.importing import import_taesd
from marval.models.autoencoders import CONFIG, TAESD, WEIGHTS, describe, link_autoencoder, load_autoencoder
from marval.tokenizers import load_tokenizer, to_float, to_uint8


def images(size: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(size))


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random AutoencoderKL with attention in its last resolution, as diffusers saves it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    kl = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16], norm_num_groups=4, latent_channels=5, scaling_factor=0.5, shift_factor=0.25,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("kl")
    kl.save_pretrained(folder)
    return folder


def test_autoencoder_kl_is_diffusers(kl_folder):
    from diffusers import AutoencoderKL

    theirs, ours = AutoencoderKL.from_pretrained(kl_folder), load_autoencoder(kl_folder)
    x = images(16)
    with torch.no_grad():
        posterior = theirs.encode(2 * x - 1).latent_dist
        moments = ours.moments(x)
        assert torch.equal(moments, torch.cat([posterior.mean, posterior.logvar], dim=1))
        assert torch.equal(ours.decode(posterior.mean), (theirs.decode(posterior.mean).sample + 1) / 2)
    config = describe(kl_folder)
    assert (config.latent_channels, config.stride, config.scale, config.shift) == (5, 2, 0.5, 0.25)
    assert moments.shape == (2, 10, 8, 8)


def test_attention_names_of_old_folders(kl_folder, tmp_path):
    """Before diffusers 0.15: query, key, value, proj_attn; and 1x1 convolutions in the first ones."""
    link_autoencoder(kl_folder, tmp_path)
    tensors = load_tensors(tmp_path / WEIGHTS)
    old = {}
    for name, tensor in tensors.items():
        for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(now, then)
        old[name] = tensor[..., None, None] if "query.weight" in name else tensor
    assert set(old) != set(tensors)
    (tmp_path / WEIGHTS).unlink()  # a hard link: never write into it
    save_tensors(tmp_path / WEIGHTS, old)
    x = images(16)
    assert torch.equal(load_autoencoder(tmp_path).moments(x), load_autoencoder(kl_folder).moments(x))


def test_plain_taesd_is_diffusers_autoencoder_tiny(tmp_path):
    """A folder that diffusers wrote; and the same weights in TAESD's own two files."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"num_encoder_blocks": [1, 2, 1], "num_decoder_blocks": [2, 1, 1], "latent_channels": 6}
    widths = {"encoder_block_out_channels": [12] * 3, "decoder_block_out_channels": [10] * 3}
    theirs = diffusers.AutoencoderTiny(**blocks, **widths).eval()
    theirs.save_pretrained(tmp_path / "diffusers")
    for part, first in (("encoder", 0), ("decoder", 1)):
        tensors = getattr(theirs, part).layers.state_dict().items()
        names = {f"{int(name.split('.')[0]) + first}.{name.split('.', 1)[1]}": tensor for name, tensor in tensors}
        torch.save(names, tmp_path / f"{part}.pth")
    import_taesd(tmp_path / "encoder.pth", tmp_path / "decoder.pth", tmp_path / "taesd")
    x = images(16)
    with torch.no_grad():
        latents = theirs.encode(2 * x - 1).latents
        decoded = (theirs.decode(5 * latents).sample + 1) / 2
        for name in ("diffusers", "taesd"):
            ours = load_autoencoder(tmp_path / name)
            mean, logvar = ours.moments(x).chunk(2, dim=1)
            assert_close(mean, latents, rtol=1e-5, atol=1e-6)
            assert_close(ours.decode(5 * mean), decoded, rtol=1e-5, atol=1e-5)
            assert bool((logvar == -30).all())
    assert describe(tmp_path / "taesd").stride == 4
    reloaded = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "taesd")  # ours is theirs
    assert_close(reloaded.encode(2 * x - 1).latents, latents, rtol=1e-5, atol=1e-6)


def test_pool_is_added_to_the_input_at_the_lowest_resolution_only():
    """Against the formula: x + pool(x), then relu(. + conv(.))."""
    torch.manual_seed(0)
    network = TAESD(2, (1, 2), (1, 1), 4, 4, pool=True)
    pools = [name for name, _ in network.named_parameters() if name.endswith("pool.0.weight")]
    assert pools == ["encoder.3.pool.0.weight", "encoder.4.pool.0.weight", "decoder.2.pool.0.weight"]
    block, x = network.encoder[3], torch.randn(1, 4, 3, 3)
    state = block.state_dict()
    wide = torch.einsum("oi,bihw->bohw", state["pool.0.weight"][..., 0, 0], x).reshape(1, 4, -1)
    normal = (wide - wide.mean(2, keepdim=True)) / (wide.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()
    y = x + torch.einsum("oi,bihw->bohw", state["pool.3.weight"][..., 0, 0], normal.relu().view(1, 16, 3, 3))
    assert_close(block(x), (y + block.conv(y)).relu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "every", "expected"), [(256, 100, 32.60), (64, 10, 25.59)])
def test_taef2_reconstructs_photographs(shared, tmp_path, size, every, expected):
    """Mean PSNR of some photographs, cropped as ADM does; of all 200 it is 28.7 dB at 256 px and 26.0 dB at 64 px."""
    weights = shared / "data" / "weights"
    import_taesd(weights / "taef2_encoder.pth", weights / "taef2_decoder.pth", tmp_path / "taef2")
    tokenizer = load_tokenizer(str(tmp_path / "taef2"), size, 1)
    assert (tokenizer.grid, tokenizer.token_dim) == (size // 8, 32)
    files = sorted((shared / "data" / "imagenet_photos").glob("*/*.JPEG"))[::every]
    crops = [np.asarray(center_crop(Image.open(file).convert("RGB"), size)) for file in files]
    x = to_float(torch.from_numpy(np.stack(crops)))
    with torch.no_grad():
        tokens = tokenizer.encode(x)
        y = to_float(to_uint8(tokenizer.decode(tokens)))
    psnr = float(-10 * torch.log10((y - x).square().mean((1, 2, 3))).mean())
    assert psnr == pytest.approx(expected, abs=0.05)
    assert 0.8 < float(tokens.std()) < 1.0


def test_links(tmp_path, monkeypatch):
    source, target = make_codec(tmp_path / "codec"), tmp_path / "other"
    link_autoencoder(source, target)
    link_autoencoder(source, target)
    assert all((target / name).samefile(source / name) for name in (CONFIG, WEIGHTS))
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another file system")))
    link_autoencoder(source, tmp_path / "copy")
    for name in (CONFIG, WEIGHTS):
        assert not (tmp_path / "copy" / name).samefile(source / name)
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()
    (target / WEIGHTS).unlink()
    size = (source / WEIGHTS).stat().st_size
    (target / WEIGHTS).write_bytes(bytes(size))  # of the same architecture, say
    with pytest.raises(ValueError, match=r"other holds another autoencoder than .*codec"):
        link_autoencoder(source, target)
    (target / WEIGHTS).write_bytes(b"another")
    with pytest.raises(ValueError, match=r"other holds another autoencoder than .*codec"):
        link_autoencoder(source, target)
    assert (target / WEIGHTS).read_bytes() == b"another"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderDC"}, r"config\.json describes no autoencoder .*\(AutoencoderDC\): known are"),
        ({"_class_name": None}, r"\(no _class_name\)"),
        ({"latent_channels": None}, r"config\.json is no complete config of an AutoencoderTiny: KeyError"),
        ({"act_fn": "silu"}, r"act_fn 'silu' is not supported, only 'relu'"),
        ({"num_encoder_blocks": None}, "no complete config"),
        ({"decoder_block_out_channels": None}, "no complete config"),
        ({"latent_channels": 5}, r"safetensors: tensor 'decoder.0.weight' has shape \[8, 4, 3, 3\]"),
        ({"num_encoder_blocks": [1, 2, 1]}, r"safetensors: tensor '.*' is missing"),
    ],
)
def test_wrong_configs(tmp_path, change, message):
    folder = make_codec(tmp_path / "codec")
    change_config(folder, **change)
    with pytest.raises(ValueError, match=message) as error:
        load_autoencoder(folder)
    assert "\n" not in str(error.value)


def test_kl_config_that_diffusers_refuses(kl_folder, tmp_path):
    link_autoencoder(kl_folder, tmp_path)
    config = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).unlink()
    (tmp_path / CONFIG).write_text(config.replace("AttnDownEncoderBlock2D", "NoSuchBlock"))
    with pytest.raises(ValueError, match=r"config\.json: diffusers refuses it: NoSuchBlock"):
        load_autoencoder(tmp_path)


def test_without_diffusers(kl_folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers.models.autoencoders.autoencoder_kl", None)
    with pytest.raises(ValueError, match=r"needs diffusers: pip install 'marval\[latents\]'"):
        load_autoencoder(kl_folder)
