"""The curve of quality of a run: the numbers of `marval evaluate`, best and last kept, early stop, refusals."""

import dataclasses
import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from small_codec import make_codec, write_images

from marval.__main__ import main
from marval.checkpoint import load_state, save_state
from marval.config import DistillConfig, EvaluateConfig, GSIMConfig, TrainConfig
from marval.curve import Curve, subset
from marval.data import load_data, load_dataset
from marval.distill import distill
from marval.distributed import World
from marval.features import load_features
from marval.measure import measure
from marval.monitor import HELD_OUT_SEED
from marval.pipeline import Pipeline
from marval.reference import load_reference, of_images
from marval.run import Run
from marval.train import train

ALONE = World(0, 1, torch.device("cpu"))
QUALITY = {"fid_heldout", "kid_heldout", "precision_heldout", "recall_heldout", "accuracy_heldout"}
TRAIN = TrainConfig(
    steps=12, batch=16, lr=4e-3, warmup=2, ema=0.5, log_every=6, save_every=100, sample_every=0, model=tiny.MODEL,
    sampling=tiny.SAMPLING,
)  # fmt: skip
DISTILL = DistillConfig(
    trained="head", steps=6, batch=8, ar_steps=4, warmup=1, log_every=6, save_every=100, sample_every=0
)


def watched(config: Any, **changes: Any) -> Any:
    """The same run with an evaluation of 30 images at every 4th update."""
    settings = {"eval_every": 4, "eval_images": 30, "features": str(tiny.classifier())}
    return dataclasses.replace(config, **{**settings, **changes})


def quality(out: Path) -> dict[float, dict[str, float]]:
    """What was measured, by update."""
    rows = [row for row in tiny.metrics(out) if "fid_heldout" in row]
    return {row.pop("step"): row for row in rows}


def test_best_and_last_are_kept_and_nothing_else_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(TRAIN, tmp_path / "plain")
    train(watched(TRAIN), tmp_path / "watched")
    curve, err = quality(tmp_path / "watched"), capsys.readouterr().err
    assert list(curve) == [4, 8, 12]
    for row in curve.values():
        assert row.keys() == QUALITY
    plain, last = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "watched"))
    assert all(torch.equal(plain[name], last[name]) for name in plain), "looking changes no update"
    others = [row for row in tiny.metrics(tmp_path / "watched") if "loss" in row]
    assert others == tiny.metrics(tmp_path / "plain")
    assert not (tmp_path / "plain" / "best").exists()

    step = min(curve, key=lambda step: curve[step]["fid_heldout"])
    best = Pipeline.load(tmp_path / "watched" / "best")
    assert best.provenance["best_update"] == step
    assert best.provenance["fid_heldout"] == curve[step]["fid_heldout"]
    assert best.sampling == TRAIN.sampling
    assert f"update {step}: FID {curve[step]['fid_heldout']:.4g}, KID" in err
    network = load_features(str(tiny.classifier()))
    protocol = EvaluateConfig(num_images=30, seed=TRAIN.seed + HELD_OUT_SEED, device="cpu")
    again = measure(best, load_reference("digits", network), network, protocol)
    for name in ("fid", "accuracy"):
        assert again[name] == pytest.approx(curve[step][f"{name}_heldout"], rel=1e-3), "as marval evaluate measures it"


def test_a_worse_model_does_not_replace_the_best(tmp_path: Path):
    """Of a learning rate that destroys the teacher after some updates, the model before is kept."""
    config = watched(TRAIN, steps=16, lr=0.1, warmup=12, ema=0.0, decay=False)
    train(config, tmp_path / "run")
    curve = quality(tmp_path / "run")
    step = min(curve, key=lambda step: curve[step]["fid_heldout"])
    assert step < 16
    kept = Pipeline.load(tmp_path / "run" / "best")
    assert kept.provenance["best_update"] == step
    name = "head.input_proj.weight"
    last = load_file(tmp_path / "run" / "model.safetensors")
    assert not torch.equal(kept.network.state_dict()[name], last[name])


def test_early_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """With a learning rate of zero no evaluation is better than the first; a resume knows that it had stopped."""
    config = watched(DISTILL, steps=40, eval_every=2, patience=2, gsim=GSIMConfig(lr=0.0))
    distill(config, tiny.teacher(), tmp_path / "run")
    assert list(quality(tmp_path / "run")) == [2, 4, 6]
    assert "in 2 evaluations since that of update 2, which is in" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "meta.json").read_text())["step"] == 6
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    assert tmp_path / "run" / "best" / "scores.safetensors" in before, "RL may start from it"
    distill(config, tiny.teacher(), tmp_path / "run", resume=True)
    assert "stopped: no FID below" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in files} == before


def test_a_killed_run_keeps_the_best_and_the_count(tmp_path: Path):
    """It stops after as many evaluations without a better one as it would have without the kill."""
    flags = ["--steps", 80, "--batch", 8, "--ar-steps", 4, "--sample-every", 0, "--save-every", 4, "--gsim.lr", 0]
    flags += ["--eval-every", 4, "--eval-images", 30, "--features", tiny.classifier(), "--patience", 6]
    args = ["distill", "digits", "--teacher", tiny.teacher(), *flags, "--out", tmp_path / "run"]
    meta = tmp_path / "run" / "meta.json"
    with tiny.start(args) as process:
        tiny.wait_for(meta, process)
        while process.poll() is None and json.loads(meta.read_text())["step"] < 12:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 12 <= json.loads(meta.read_text())["step"] < 28
    main([str(arg) for arg in [*args, "--resume"]])
    curve = quality(tmp_path / "run")
    assert list(curve) == list(range(4, 29, 4))
    assert Pipeline.load(tmp_path / "run" / "best").provenance["best_update"] == 4


def test_fewer_steps_of_the_chain(tmp_path: Path):
    model, data = Pipeline.load(tiny.teacher()), load_data("digits")
    with pytest.raises(ValueError, match="2000"):
        Curve(watched(TRAIN), model, data, ALONE, head_steps=2000)
    train(watched(TRAIN, steps=4, eval_head_steps=2), tmp_path / "few")
    train(watched(TRAIN, steps=4), tmp_path / "all")
    few, full = (Pipeline.load(tmp_path / name / "best") for name in ("few", "all"))
    assert few.sampling.head_steps == full.sampling.head_steps == tiny.SAMPLING.head_steps
    assert quality(tmp_path / "few")[4]["fid_heldout"] != quality(tmp_path / "all")[4]["fid_heldout"]


def test_a_reference_of_its_own(tmp_path: Path):
    """The held-out digits instead of the training ones; no more real images than an evaluation draws, but for FID."""
    data, model = load_data("digits"), Pipeline.load(tiny.student())
    config, own = watched(DISTILL), watched(DISTILL, reference="digits:test")
    curves = [Curve(settings, model, data, ALONE) for settings in (config, own)]
    for curve in curves:
        curve.begin(Run(tmp_path / "run", "distill", config, True, ALONE), 0)
    assert [curve.reference.count for curve in curves] == [1437, 360]
    whole = [load_reference(name, load_features(config.features)) for name in ("digits", "digits:test")]
    for curve, reference in zip(curves, whole, strict=True):
        assert curve.reference.features is not None
        assert reference.features is not None
        some = subset(reference.count, config)
        assert len(some) == 30
        assert torch.equal(curve.reference.features, reference.features[some]), "drawn first, or afterwards"
        assert curve.reference.moments.mu == pytest.approx(reference.moments.mu)
        assert curve.reference.moments.sigma == pytest.approx(reference.moments.sigma)


NETWORK = """import gc
from pathlib import Path

import torch


def live():
    tensors = (x for x in gc.get_objects() if type(x) is torch.Tensor and x.ndim == 2)
    return {x.untyped_storage().data_ptr(): len(x) for x in tensors}


def seen(images):
    rows = sum(count for place, count in live().items() if place not in before)
    with open(Path(__file__).with_suffix(".txt"), "a") as log:
        log.write(f"{len(images)} {rows}\\n")
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


before = live()  # of other tests
"""


def own_network(folder: Path) -> str:
    """Features of two numbers, by a function that logs the images of each call, and the rows of new tensors then."""
    (folder / "net.py").write_text(NETWORK)
    return f"{folder / 'net.py'}:seen"


def test_no_more_features_in_memory_than_are_used(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (2500, 2, 2, 1), np.uint8)
    network, some = load_features(own_network(tmp_path)), subset(2500, watched(TRAIN))
    reference = of_images("noise", "", 2500, lambda rows: images[np.array(rows)], network, ALONE, some)
    assert reference.features is not None
    mean = torch.from_numpy(images[some.numpy()] / 255).mean((1, 2, 3))
    assert torch.allclose(reference.features[:, 0].double(), mean, atol=1e-6)
    calls = [[int(number) for number in line.split()] for line in (tmp_path / "net.txt").read_text().splitlines()]
    assert sum(count for count, _ in calls) == 2500
    assert max(rows for _, rows in calls) < 1500


def test_no_work_before_the_folder_is_looked_at(tmp_path: Path):
    """Nor for a run that is finished: the network sees one image, to see whether it can."""
    config, log = watched(TRAIN, steps=2, eval_every=2, features=own_network(tmp_path)), tmp_path / "net.txt"
    train(config, tmp_path / "run")
    assert sum(int(line.split()[0]) for line in log.read_text().splitlines()) > 1437
    log.unlink()
    with pytest.raises(ValueError, match="already holds a run"):
        train(config, tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["1", "1"]
    distilled = watched(DISTILL, steps=2, eval_every=2, features=config.features)
    distill(distilled, tiny.teacher(), tmp_path / "student")
    log.unlink()
    with pytest.raises(ValueError, match="already holds a run"):
        distill(distilled, tiny.teacher(), tmp_path / "student")
    distill(distilled, tiny.teacher(), tmp_path / "student", resume=True)
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["1", "1"]


def test_a_resume_needs_the_same_network_and_reference(tmp_path: Path):
    images = load_dataset("digits", "test").images
    np.savez(tmp_path / "real.npz", images=images)
    config = watched(TRAIN, steps=1, features=own_network(tmp_path), reference=str(tmp_path / "real.npz"))
    train(config, tmp_path / "run")
    meta = tmp_path / "run" / "meta.json"
    meta.write_text(meta.read_text().replace('"steps": 1', '"steps": 2'))  # as if it had been stopped halfway
    config = dataclasses.replace(config, steps=2)

    np.savez(tmp_path / "real.npz", images=images[:180])
    with pytest.raises(
        ValueError, match=r"was begun with another reference than .*real\.npz, images as they are: their"
    ):
        train(config, tmp_path / "run", resume=True)
    np.savez(tmp_path / "real.npz", images=images)
    was = load_features(config.features).digest
    (tmp_path / "net.py").write_text(f"{NETWORK}\n")
    now = load_features(config.features).digest
    with pytest.raises(
        ValueError, match=f"features sha256 {was}, .*net.py:seen has {now}: put back what the run began"
    ):
        train(config, tmp_path / "run", resume=True)
    assert list(quality(tmp_path / "run")) == [1]
    own_network(tmp_path)
    state = load_state(tmp_path / "run" / "checkpoint.pt")
    del state["extra"]["network"], state["extra"]["reference"]  # as runs had none before
    save_state(tmp_path / "old.pt", state)
    train(config, tmp_path / "run", resume=True)
    (tmp_path / "old.pt").rename(tmp_path / "run" / "checkpoint.pt")
    train(config, tmp_path / "run", resume=True)
    assert list(quality(tmp_path / "run")) == [1, 2]


def test_a_run_that_began_before_there_were_evaluations_goes_on(tmp_path: Path):
    """A setting that its meta.json lacks counts as the default."""
    distill(dataclasses.replace(DISTILL, steps=2), tiny.teacher(), tmp_path / "run")
    meta = json.loads((tmp_path / "run" / "meta.json").read_text())
    for name in ("eval_every", "eval_images", "features", "reference", "patience"):
        del meta["config"][name]
    (tmp_path / "run" / "meta.json").write_text(json.dumps(meta))
    distill(dataclasses.replace(DISTILL, steps=2), tiny.teacher(), tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="was started with eval_every = 0, not 4: resume with the same settings"):
        distill(watched(DISTILL, steps=2), tiny.teacher(), tmp_path / "run", resume=True)


def test_what_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    np.savez(wrong := tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.eye(3))
    for flags, message in (
        (["--eval-every", 4], "eval_every 4 needs the network of FID: name it with --features (inception, a folder"),
        (["--features", "inception"], "features inception is for evaluations: say how often, --eval-every"),
        (["--patience", 3], "patience 3 is for evaluations: say how often, --eval-every"),
        (["--eval-every", -1], "eval_every must not be negative, got -1"),
        (["--eval-every", 4, "--features", "x", "--eval-images", 1], "eval_images must be at least 2"),
        (["--eval-every", 4, "--features", "x", "--eval-head-steps", 0], "eval_head_steps must be at least 1, got 0"),
        (["--eval-every", 4, "--features", tmp_path / "none"], "no feature network"),
        (["--eval-every", 4, "--features", tiny.classifier(), "--reference", tmp_path / "none"], "none does not exist"),
        (["--eval-every", 4, "--features", tiny.classifier(), "--reference", wrong], "3 pooled features, penultimate"),
    ):
        assert message in tiny.refused(capsys, "train", "digits", *flags, "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_latents_need_a_reference_and_an_autoencoder(tmp_path: Path):
    write_images(tmp_path / "images", [f"{name}/{i}.jpg" for name in ("ant", "bee") for i in range(3)])
    make_codec(tmp_path / "codec")
    args = ["encode", "--images", tmp_path / "images", "--tokenizer", tmp_path / "codec", "--image-size", 32]
    main([str(arg) for arg in [*args, "--out", tmp_path / "latents"]])
    (tmp_path / "seen.py").write_text("def seen(images):\n    return images.mean((2, 3))\n")
    config = TrainConfig(
        steps=2, batch=4, sample_every=0, model=tiny.MODEL, sampling=tiny.SAMPLING, data=str(tmp_path / "latents"),
        eval_every=1, eval_images=4, features=f"{tmp_path / 'seen.py'}:seen",
    )  # fmt: skip
    with pytest.raises(ValueError, match="are latents, and evaluations compare images: name real images, or"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    model = train(dataclasses.replace(config, reference=str(tmp_path / "images")), tmp_path / "run")
    assert list(quality(tmp_path / "run")) == [1, 2]
    assert Pipeline.load(tmp_path / "run" / "best").sample(["bee"]).shape == (1, 32, 32, 3)

    model.tokenizer = dataclasses.replace(model.tokenizer, folder=None)
    with pytest.raises(ValueError, match="works on latents of an autoencoder that is not in its folder"):
        Curve(config, model, load_data(config.data), ALONE)
