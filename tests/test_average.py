"""The mean of models of one start draws, and goes on; that of others is refused."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import marval
from marval.__main__ import main
from marval.average import average
from marval.config import DistillConfig, GSIMConfig, StudentConfig
from marval.distill import distill
from marval.models.mar import MAR
from marval.pipeline import Pipeline

FURTHER = DistillConfig(trained="all", steps=3, batch=16, ar_steps=4, warmup=1, sample_every=0, ema=0.0)


def test_mean_of_students(tmp_path: Path):
    """Weights and auxiliary are means; it draws; another run goes on from it with its auxiliary."""
    gsim = GSIMConfig(lr=1e-3, auxiliary_lr=1e-3)
    for seed in (1, 2):
        distill(dataclasses.replace(FURTHER, seed=seed, gsim=gsim), tiny.teacher(), tmp_path / str(seed))
    main(["average", str(tmp_path / "1"), str(tmp_path / "2"), "--out", str(tmp_path / "mean")])
    for file in ("model.safetensors", "scores.safetensors"):
        first, second, mean = (load_file(tmp_path / name / file) for name in ("1", "2", "mean"))
        assert first.keys() == mean.keys()
        assert all(torch.allclose(x, (first[name] + second[name]) / 2, atol=1e-7) for name, x in mean.items())
        assert any(not torch.allclose(x, second[name], atol=1e-4) for name, x in first.items())
    loaded = marval.load(tmp_path / "mean")
    assert loaded.sample(classes=["3"], seed=0).shape == (1, 8, 8, 1)
    assert len(loaded.provenance["averaged"]) == 2
    assert loaded.provenance["averaged"][0]["verb"] == "distill"
    frozen = dataclasses.replace(FURTHER, steps=1, gsim=GSIMConfig(lr=0.0, auxiliary_lr=1e-12))
    distill(frozen, tiny.teacher(), tmp_path / "on", start_folder=tmp_path / "mean")
    on = load_file(tmp_path / "on" / "scores.safetensors")
    assert all(torch.allclose(x, on[name], atol=1e-7) for name, x in mean.items())


def test_without_scores_of_all(tmp_path: Path):
    """Teachers have none, nor has a mean of which one model lacks them."""
    average([tiny.teacher(), tiny.teacher()], tmp_path / "teacher")
    mean, own = (load_file(folder / "model.safetensors") for folder in (tmp_path / "teacher", tiny.teacher()))
    assert all(torch.allclose(x, own[name], atol=1e-7) for name, x in mean.items())
    Pipeline.load(tiny.student()).save(tmp_path / "bare")
    said = average([tiny.student(), tmp_path / "bare"], tmp_path / "mean")
    assert f"without scores, as {tmp_path / 'bare'} has none" in said
    assert not (tmp_path / "mean" / "scores.safetensors").exists()


def test_what_is_shared_stays(tmp_path: Path):
    """The mean of three has the very backbone that they share, so head-only distillation goes on from it; and says
    nothing of itself that is true of one member."""
    member = Pipeline.load(tiny.student())
    member.provenance |= {"fid_heldout": 1.0, "data_licence": "own"}
    shutil.copytree(tiny.student(), tmp_path / "measured")
    member.save(tmp_path / "measured")
    average([tmp_path / "measured", tiny.student(), tiny.student()], tmp_path / "mean")
    provenance = marval.load(tmp_path / "mean").provenance
    assert provenance["verb"] == "distill"
    assert not {"fid_heldout", "data_licence"} & provenance.keys()
    assert [own.get("fid_heldout") for own in provenance["averaged"]] == [1.0, None, None]
    student = StudentConfig(guidance=1.5)
    config = dataclasses.replace(FURTHER, trained="head", steps=1, student=student)
    distill(config, tiny.teacher(), tmp_path / "on", start_folder=tmp_path / "mean")


def test_what_cannot_be_averaged(tmp_path: Path):
    with pytest.raises(ValueError, match="exists and is not empty: choose another --out"):  # looked at first
        average([tmp_path / "absent", tmp_path / "absent"], tiny.teacher())
    model = Pipeline.load(tiny.teacher())
    other, wider = tmp_path / "other", tmp_path / "wider"
    stranger = MAR(model.network.config)
    with torch.no_grad():
        for weight, own in zip(stranger.parameters(), model.network.parameters(), strict=True):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * own.std())
    Pipeline(stranger, model.tokenizer, model.class_names, model.sampling).save(other)
    sizes = dataclasses.replace(model.network.config, width=64)
    Pipeline(MAR(sizes), model.tokenizer, model.class_names, model.sampling).save(wider)
    foreign = tmp_path / "foreign"
    shutil.copytree(tiny.student(), foreign)
    scores = load_file(foreign / "scores.safetensors")
    save_file(
        scores | {n: x + 1 for n, x in scores.items() if n.startswith("teacher.")}, foreign / "scores.safetensors"
    )
    for folders, message in (
        ([tiny.student(), foreign], f"{foreign} is a student of another teacher than {tiny.student()}"),
        ([tiny.teacher()], "give two models or more, got 1"),
        ([tiny.teacher(), tiny.student()], f"{tiny.student()} has other settings of a student than {tiny.teacher()}"),
        ([tiny.teacher(), wider], "wider has other sizes than"),
        ([tiny.teacher(), other], "of its length away from the mean: only models that went on from the same one"),
    ):
        with pytest.raises(ValueError, match=message):
            average(folders, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
    with pytest.raises(ValueError, match="is not empty: choose another --out"):
        average([tiny.teacher(), tiny.teacher()], other)
