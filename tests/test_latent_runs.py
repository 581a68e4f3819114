"""The whole path on an autoencoder's latents: encode, train, distil, align, measure, export; from images and shards."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from small_codec import make_codec, write_images

import marval
from marval import pipeline
from marval import train as training
from marval.__main__ import main
from marval.config import DistillConfig, GSIMConfig, MARConfig, RLConfig, SamplingConfig, TrainConfig
from marval.data import load_dataset
from marval.diffusion import Schedule
from marval.distill import distill
from marval.rl import rl
from marval.tokenizers import to_float
from marval.train import teacher_loss, train

MODEL = MARConfig(width=32, depth=1, heads=2, buffer_size=2, head_width=32, head_depth=1)
COMMON = {"steps": 3, "batch": 6, "log_every": 1, "save_every": 3, "sample_every": 3}
CONFIG = TrainConfig(
    **COMMON, patch_size=2, image_size=32, flip=True, model=MODEL,
    sampling=SamplingConfig(ar_steps=4, head_steps=3, solver="ddim"),
)  # fmt: skip
REWARD = "def dark(images, prompts):\n    return -images.mean((1, 2, 3))\ndark.differentiable = True\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, an autoencoder, latents, and a teacher of the latents."""
    root = tmp_path_factory.mktemp("latents")
    write_images(root / "images", [f"{name}/{i}.jpg" for name in ("ant", "bee") for i in range(5)])
    make_codec(root / "codec")
    args = ["encode", "--images", root / "images", "--tokenizer", root / "codec", "--image-size", 32]
    main([str(arg) for arg in [*args, "--shard-size", 4, "--out", root / "latents"]])
    train(dataclasses.replace(CONFIG, data=str(root / "latents")), root / "teacher")
    return root


def test_a_teacher_of_latents(made: Path, monkeypatch: pytest.MonkeyPatch):
    model = marval.load(made / "teacher")
    assert model.class_names == ["ant", "bee"]
    assert model.label("ANT") == model.label("0") == 0
    with pytest.raises(ValueError, match=r"unknown class 'beee' \(did you mean 'bee'\?\): give an index in \[0, 1\]"):
        model.label("beee")
    sizes = model.network.config
    assert (sizes.grid, sizes.token_dim) == (4, 16)
    images = model.sample(["ant", None], seed=1)
    assert images.shape == (2, 32, 32, 3)
    monkeypatch.setattr(pipeline, "DECODED", 1)
    assert np.abs(model.sample(["ant", None], seed=1).astype(int) - images).max() <= 1, "decoded one by one"
    assert (made / "teacher" / "samples" / "step-000003.png").exists()
    keep = np.eye(4, dtype=bool)
    completed = model.sample(["bee"], images=images[:1], keep=keep)
    assert completed.shape == (1, 32, 32, 3)
    assert all(np.isfinite(list(row.values())).all() for row in tiny.metrics(made / "teacher"))


def test_training_from_images_and_from_latents_sees_the_same_tokens(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Those of the images, by a deterministic autoencoder, but for float16 on the disk."""
    seen: list[torch.Tensor] = []

    def loss(network: torch.nn.Module, schedule: Schedule, tokens: torch.Tensor, *rest: torch.Tensor) -> Any:
        seen.append(tokens)
        return teacher_loss(network, schedule, tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "teacher_loss", loss)
    config = dataclasses.replace(CONFIG, data=str(made / "images"), tokenizer=str(made / "codec"), flip=False)
    model = train(config, tmp_path / "run")
    train(dataclasses.replace(CONFIG, data=str(made / "latents"), flip=False), tmp_path / "of latents")
    assert (tmp_path / "run" / "tokenizer").is_dir()
    assert model.sample(["bee"]).shape == (1, 32, 32, 3)
    images = load_dataset(str(made / "images"), "all", 32).images
    known = model.tokenizer.encode(to_float(torch.from_numpy(images[np.arange(len(images))])))
    assert known.std() > 0.05
    for tokens in seen:
        apart = torch.cdist(tokens.flatten(1), known.flatten(1)).min(1).values / known.flatten(1).norm(dim=1).mean()
        assert apart.max() < 1e-2
    assert [len(tokens) for tokens in seen] == [6] * 6


def test_latents_cannot_be_shifted(made: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="latents, which cannot be shifted: leave --shift out"):
        train(dataclasses.replace(CONFIG, data=str(made / "latents"), shift=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("trained", ["head", "all"])
def test_distil_align_and_export(made: Path, trained: str, tmp_path: Path):
    distilled = DistillConfig(**COMMON, data=str(made / "latents"), ar_steps=4, flip=True, trained=trained, rollout=0.5)  # type: ignore[arg-type]
    distill(distilled, made / "teacher", tmp_path / "student")
    (tmp_path / "reward.py").write_text(REWARD)
    aligned = RLConfig(
        **COMMON, ar_steps=4, reward=f"{tmp_path / 'reward.py'}:dark", eval_images=6, eval_every=1,
        gsim=GSIMConfig(lr=1e-3, auxiliary_lr=1e-3), trained=trained, patience=0, anchor=0.01, accumulate=2,
    )  # type: ignore[arg-type]  # fmt: skip
    model = rl(aligned, tmp_path / "student", tmp_path / "aligned")
    held_out = [row["reward_heldout"] for row in tiny.metrics(tmp_path / "aligned") if "reward_heldout" in row]
    assert max(held_out) > held_out[0], "the gradient reaches the tokens through the autoencoder's decoder"
    main(["export", "--model", str(tmp_path / "aligned"), "--out", str(tmp_path / "shipped")])
    shipped = marval.load(tmp_path / "shipped")
    assert np.array_equal(shipped.sample(["ant", "bee"], seed=3), model.sample(["ant", "bee"], seed=3))
    assert not (tmp_path / "shipped" / "checkpoint.pt").exists()


def test_raw_weights(made: Path):
    raw, averaged = (marval.load(made / "teacher", weights=weights).network.state_dict() for weights in ("raw", "ema"))
    saved = load_file(made / "teacher" / "model.safetensors")
    name = "head.input_proj.weight"
    assert (averaged[name] == saved[name]).all()
    assert (raw[name] != saved[name]).any()


def test_latents_of_another_autoencoder_are_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_codec(tmp_path / "codec", gain=2.0)
    args = ["encode", "--images", made / "images", "--tokenizer", tmp_path / "codec", "--image-size", 32]
    main([str(arg) for arg in [*args, "--out", tmp_path / "latents"]])
    args = ["distill", "digits", "--teacher", made / "teacher", "--data", tmp_path / "latents", "--out", tmp_path / "x"]
    assert "latents of another autoencoder than the teacher's" in tiny.refused(capsys, *args)
    assert not (tmp_path / "x").exists()
