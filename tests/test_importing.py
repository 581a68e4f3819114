"""Published checkpoints become folders, strictly; everything else is refused with the reason. Parity: test_golden."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_codec import make_codec
from torch import Tensor

import marval
from marval import imagenet, importing
from marval.checkpoint import load_strictly, read_mar_checkpoint
from marval.importing import import_kl16, import_mar, import_taesd
from marval.models.autoencoders import CONFIG, WEIGHTS, describe


def written(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


# ---- MAR


@pytest.fixture
def golden(shared: Path) -> Path:
    return shared / "golden" / "mar_tiny" / "checkpoint-last.pth"


@pytest.fixture
def save_mar(tiny_mar, tmp_path) -> Callable[..., Path]:
    """``save_mar(**sizes)``: a MAR in the layout of the published files."""

    def save(**sizes: object) -> Path:
        path = tmp_path / "checkpoint-last.pth"
        state = {name.replace("head.", "diffloss.net."): t for name, t in tiny_mar(**sizes).state_dict().items()}
        args = argparse.Namespace(vae_stride=16, patch_size=1)
        torch.save({"model": state, "model_ema": dict(state), "epoch": 7, "args": args}, path)
        return path

    return save


def codec_of_stride_16(folder: Path, scale: float) -> Path:
    """16 channels, as KL-16, but small."""
    torch.manual_seed(0)
    network = importing.TAESD(16, (1,) * 5, (1,) * 5, 4, 4)
    parts = {}
    for part, first in (("encoder", 0), ("decoder", 1)):
        state = getattr(network, part).state_dict()
        parts[part] = folder.with_name(f"{folder.name}_{part}.safetensors")
        save_file({f"{int(n.split('.')[0]) + first}.{n.split('.', 1)[1]}": t for n, t in state.items()}, parts[part])
    import_taesd(parts["encoder"], parts["decoder"], folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"scaling_factor": scale}))
    return folder


def test_ema_and_raw_and_safetensors(golden, tmp_path):
    message = import_mar(golden, tmp_path / "ema", heads=4)
    assert "(ema), 16 tokens of 16 (tokens only: no --tokenizer)" in message
    import_mar(golden, tmp_path / "raw", heads=4, weights="raw")
    saved = read_mar_checkpoint(golden, "raw")[0]
    names = {name.replace("head.", "diffloss.net."): tensor.contiguous() for name, tensor in saved.items()}
    save_file(names, tmp_path / "raw.safetensors")
    message = import_mar(tmp_path / "raw.safetensors", tmp_path / "st", heads=4)
    assert "(as in the file), 16 tokens of 16" in message
    tokens = {
        name: marval.load(tmp_path / name).sample_tokens([4], ar_steps=2, head_steps=3) for name in ("ema", "raw")
    }
    assert torch.equal(marval.load(tmp_path / "st").sample_tokens([4], ar_steps=2, head_steps=3), tokens["raw"])
    assert not torch.equal(tokens["ema"], tokens["raw"])
    model = marval.load(tmp_path / "st")
    assert model.provenance["weights"] == "as in the file"
    with pytest.raises(ValueError, match="import it again with --tokenizer"):
        model.sample([0])


def test_with_a_tokenizer(golden, tmp_path):
    codec = codec_of_stride_16(tmp_path / "codec", 0.2325)
    assert "(images)" in import_mar(golden, tmp_path / "model", heads=4, tokenizer=str(codec))
    model = marval.load(tmp_path / "model")
    assert model.sample([0, 1], ar_steps=2, head_steps=2).shape == (2, 64, 64, 3)
    assert (tmp_path / "model" / "tokenizer" / WEIGHTS).samefile(codec / WEIGHTS)
    for spec, message in (
        (codec_of_stride_16(tmp_path / "scaled", 0.5), r"16 channels, stride 16, factor 0.5; .* factor 0.2325"),
        (make_codec(tmp_path / "small"), r"4 channels, stride 4, factor 1; .* 16 channels, stride 16, factor 0.2325"),
        ("pixels", "'pixels' has pixels; .*checkpoint-last.pth was trained on 16 channels"),
        (tmp_path / "absent", "no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            import_mar(golden, tmp_path / "other", heads=4, tokenizer=str(spec))
        assert not written(tmp_path / "other")


def test_imagenet_names_and_preset_defaults(save_mar, tiny_mar, tmp_path, monkeypatch):
    checkpoint = save_mar(num_classes=1000)
    monkeypatch.setitem(importing.PRESETS, "mar-l", tiny_mar(num_classes=1000).config)
    import_mar(checkpoint, tmp_path / "model", preset="mar-l")
    model = marval.load(tmp_path / "model")
    assert model.class_names == imagenet.names()
    assert model.label("goldfish") == 1
    assert (model.sampling.guidance, model.sampling.guidance_schedule, model.sampling.ar_steps) == (3.0, "linear", 16)
    with pytest.raises(ValueError, match=r"is 16 wide, which is no multiple of 12 attention heads: check"):
        import_mar(checkpoint, tmp_path / "b", preset="mar-b")
    with pytest.raises(ValueError, match=r"checkpoint-last\.pth has grid 4, but preset mar-h has 16"):
        import_mar(checkpoint, tmp_path / "b", preset="mar-h")
    import_mar(save_mar(), tmp_path / "small", heads=2)
    assert marval.load(tmp_path / "small").class_names == ["0", "1", "2"]


def test_presets_have_the_published_guidance_at_64_steps():
    assert importing.GUIDANCE == {"mar-b": 2.9, "mar-l": 3.0, "mar-h": 3.2}
    assert importing.GUIDANCE.keys() == importing.PRESETS.keys()


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(path, weights_only=True)
    change(saved["model_ema"])
    torch.save(saved, path)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda s: s.pop("mask_token"), {"heads": 2}, "tensor 'mask_token' is missing"),
        (lambda s: s.update(more=torch.zeros(1)), {"heads": 2}, "unexpected tensor 'more'"),
        (lambda s: s.update(mask_token=torch.zeros(1, 1, 3)), {"heads": 2}, r"'mask_token' has shape \[1, 1, 3\]"),
        (lambda s: s.update(mask_token=3), {"heads": 2}, "entry 'mask_token' is no tensor but int: it is a MAR model"),
        (lambda s: s.pop("z_proj.weight"), {"heads": 2}, "is not a MAR checkpoint: tensor 'z_proj.weight' is missing"),
        (None, {"heads": 3}, "is 16 wide, which is no multiple of 3 attention heads"),
        (None, {"heads": 0}, "--heads 0 must be at least 1"),
        (None, {}, "give either --preset .* or --heads"),
        (None, {"heads": 2, "preset": "mar-b"}, "give either --preset .* or --heads"),
        (None, {"preset": "mar-s"}, "unknown preset 'mar-s': choose mar-b, mar-l, mar-h"),
    ],
)
def test_mar_that_does_not_fit(save_mar, tmp_path, change, arguments, message):
    checkpoint = save_mar()
    if change is not None:
        edit(checkpoint, change)
    with pytest.raises(ValueError, match=message) as error:
        import_mar(checkpoint, tmp_path / "model", **arguments)
    assert "\n" not in str(error.value)
    assert not written(tmp_path / "model")


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("importer", ["mar", "kl16", "taesd"])
def test_a_file_that_runs_code_is_refused(tmp_path, importer):
    file, trace, out = tmp_path / "checkpoint.pth", tmp_path / "executed", tmp_path / "out"
    torch.save({"model": {}, "model_ema": {}, "args": Malicious(trace)}, file)
    with pytest.raises(ValueError, match=r"checkpoint\.pth cannot be read safely: it holds a posix\.mkdir, not only"):
        run_importer(importer, file, out)
    assert not trace.exists()
    assert not written(out)
    torch.load(file, weights_only=False)
    assert trace.exists(), "the file is harmless: this test proves nothing"


def run_importer(importer: str, file: Path, out: Path) -> None:
    if importer == "mar":
        import_mar(file, out, heads=2)
    elif importer == "kl16":
        import_kl16(file, out)
    else:
        import_taesd(file, file, out)


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ({"epoch": 3}, {"mar": "no state dict 'model_ema' .found: epoch", "kl16": "dict 'model' .found: epoch"}),
        ([1], {"mar": "found: list", "kl16": "found: list", "taesd": "found: list"}),
        ({"model": {"a": 1}, "model_ema": {"a": 1}}, {"mar": "entry 'a' is no tensor but int", "kl16": "entry 'a'"}),
        ({"model": {"mask_token": torch.zeros(1)}}, {"kl16": "it is a MAR model, for marval import-mar"}),
        ({"model": {"encoder.down.0.block.0.norm1.weight": torch.zeros(1)}},
         {"mar": "no state dict 'model_ema' .*it is an autoencoder in MAR's layout, for marval import-kl16"}),
        ({"1.conv.0.weight": torch.zeros(1)}, {"kl16": "it is a TAESD encoder, for marval import-taesd"}),
        ({"1.weight": torch.zeros(1)}, {"taesd": "is no TAESD encoder: its tensors have other names"}),
        ({"model": argparse.Namespace(a=1)}, {"kl16": "has no state dict 'model'"}),
    ],
)  # fmt: skip
def test_files_of_another_kind(tmp_path, content, messages):
    file = tmp_path / "wrong.pth"
    torch.save(content, file)
    for importer, message in messages.items():
        with pytest.raises(ValueError, match=rf"wrong\.pth.*{message}") as error:
            run_importer(importer, file, tmp_path / "out")
        assert "\n" not in str(error.value)
        assert not written(tmp_path / "out")


@pytest.mark.parametrize("importer", ["mar", "kl16", "taesd"])
def test_damaged_files(tmp_path, importer, save_mar):
    whole = save_mar().read_bytes()
    for name, content in (("part.pth", whole[:5000]), ("noise.pth", b"not a pickle"), ("empty.pth", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is no file of torch.save, or not a whole one: fetch it again"):
            run_importer(importer, tmp_path / name, tmp_path / "out")
    (tmp_path / "part.safetensors").write_bytes(b"\x10" + bytes(100))
    with pytest.raises(ValueError, match=r"part\.safetensors is not a whole safetensors file"):
        run_importer(importer, tmp_path / "part.safetensors", tmp_path / "out")
    with pytest.raises(ValueError, match=r"absent\.pth does not exist"):
        run_importer(importer, tmp_path / "absent.pth", tmp_path / "out")
    with pytest.raises(ValueError, match="is a folder: give the file in it"):
        run_importer(importer, tmp_path, tmp_path / "out")
    assert not written(tmp_path / "out")


def test_an_out_that_holds_something_is_left_alone(golden, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(ValueError, match="out exists and is not empty: choose another --out"):
        import_mar(golden, tmp_path / "out", heads=4)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("mask_token"), r"file: tensor 'mask_token' is missing \(1 in all\)"),
        (lambda state: state.update(extra=torch.zeros(1)), r"file: unexpected tensor 'extra' \(1 in all\)"),
        (lambda state: state.update(mask_token=torch.zeros(1, 1, 7)), r"'mask_token' has shape \[1, 1, 7\]"),
    ],
)
def test_load_strictly(tiny_mar, change, message):
    network = tiny_mar()
    state = dict(network.state_dict())
    change(state)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_strictly(network, state, "file")
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


# ---- KL-16: what does not fit (what fits is in test_golden)


@pytest.fixture
def kl16_names(shared: Path) -> dict[str, Tensor]:
    """Tensors of KL-16's names and shapes that take no space."""
    pytest.importorskip("diffusers")
    shapes = json.loads((shared / "golden" / "kl16" / "keys.json").read_text())["state_dict_shapes"]
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


def test_every_tensor_that_does_not_fit_is_named(kl16_names, tmp_path):
    del kl16_names["encoder.mid.attn_1.q.bias"], kl16_names["decoder.up.3.block.0.nin_shortcut.weight"]
    kl16_names |= {"loss.logvar": torch.zeros(1), "quant_conv.bias": torch.zeros(8)}
    kl16_names["encoder.down.4.attn.0.q.weight"] = torch.zeros(512, 512)
    torch.save({"model": kl16_names}, tmp_path / "kl16.ckpt")
    with pytest.raises(ValueError, match=r"kl16\.ckpt is not MAR's KL-16: ") as error:
        import_kl16(tmp_path / "kl16.ckpt", tmp_path / "out")
    assert set(str(error.value).split("KL-16: ")[1].split("; ")) == {
        "decoder.up.3.block.0.nin_shortcut.weight is missing",
        "encoder.mid.attn_1.q.bias is missing",
        "loss.logvar is unexpected",
        "encoder.down.4.attn.0.q.weight is [512, 512], not [512, 512, 1, 1]",
        "quant_conv.bias is [8], not [32]",
    }
    assert not written(tmp_path / "out")


def test_another_autoencoder(kl16_names, tmp_path):
    """Stable Diffusion's, say: 4 channels."""
    for name, shape in (("quant_conv.weight", (8, 8, 1, 1)), ("decoder.conv_in.weight", (512, 4, 3, 3))):
        kl16_names[name] = torch.zeros(1).expand(shape)
    save_file({name: tensor[..., :1].contiguous() for name, tensor in kl16_names.items()}, tmp_path / "a.safetensors")
    torch.save({"model": kl16_names}, tmp_path / "sd.ckpt")
    with pytest.raises(ValueError, match=r"decoder.conv_in.weight is \[512, 4, 3, 3\], not \[512, 16, 3, 3\]; quant"):
        import_kl16(tmp_path / "sd.ckpt", tmp_path / "out")
    with pytest.raises(ValueError, match=r"conv_in.weight is \[128, 3, 3, 1\], not \[128, 3, 3, 3\]"):
        import_kl16(tmp_path / "a.safetensors", tmp_path / "out")


# ---- TAESD: what does not fit (what fits is in test_autoencoders)


def test_taesd_files_that_do_not_fit(shared, tmp_path):
    weights = shared / "data" / "weights"
    encoder, decoder = (weights / f"taef2_{part}.pth" for part in ("encoder", "decoder"))
    message = import_taesd(encoder, decoder, tmp_path / "taef2")
    assert message.startswith("TAESD, 2,677,027 parameters, 32 channels, stride 8 -> ")
    assert describe(tmp_path / "taef2").kind == "AutoencoderTinyPool"
    with pytest.raises(ValueError, match=r"taef2_decoder\.pth is no TAESD encoder: it is a TAESD decoder"):
        import_taesd(decoder, encoder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"resnet20-12fca82f\.th: entry 'best_prec1' is no tensor but float"):
        import_taesd(weights / "resnet20-12fca82f.th", decoder, tmp_path / "out")
    state = torch.load(encoder, weights_only=True)
    for change, expected in (
        (lambda s: s.pop("12.pool.1.bias"), r"encoder\.pth: tensor '12\.pool\.1\.bias' is missing"),
        (lambda s: s.update({"2.bias": torch.zeros(64)}), r"unexpected tensor '2\.bias'"),
        (lambda s: s.update({"14.weight": torch.zeros(16, 64, 3, 3)}), r"makes 16 channels, .*decoder\.pth takes 32"),
        (lambda s: s.update({"4.conv.2.weight": torch.zeros(8, 64, 3, 3)}), r"'4\.conv\.2\.weight' has shape \[8"),
    ):
        changed = dict(state)
        change(changed)
        torch.save(changed, tmp_path / "encoder.pth")
        with pytest.raises(ValueError, match=expected):
            import_taesd(tmp_path / "encoder.pth", decoder, tmp_path / "out")
        assert not written(tmp_path / "out")
