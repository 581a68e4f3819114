"""Distillation: it improves the student, each setting does what it says, and its folder is complete."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from marval.config import DistillConfig, GSIMConfig, StudentConfig
from marval.data import load_dataset
from marval.distill import distill, make_student
from marval.draw import sample_in_turn
from marval.features import load_features
from marval.images import save_png
from marval.matching import Context, ScoreMatching, load_scores
from marval.metrics import frechet_distance, moments_of
from marval.pipeline import Pipeline

SHORT = DistillConfig(trained="head", steps=3, batch=8, ar_steps=4, log_every=1, sample_every=0, warmup=1)


def frechet(model: Pipeline) -> float:
    """Distance of 300 images to the digits over the small classifier's features."""
    network = load_features(str(tiny.classifier()))
    images, _ = sample_in_turn(model, range(10), 300, seed=1)
    real = load_dataset("digits").images
    return frechet_distance(*(moments_of(network(some).pooled) for some in (real, images)))


def test_a_student_is_better_than_one_untrained_step():
    """One evaluation of the teacher's head is blurred; 200 updates close most of the distance."""
    untrained = make_student(Pipeline.load(tiny.teacher()), dataclasses.replace(SHORT, ar_steps=4))
    assert frechet(Pipeline.load(tiny.student())) < 0.7 * frechet(untrained)
    y = [row["y"] for row in tiny.metrics(tiny.student())]
    assert np.mean(y[-3:]) < 0.7 * y[0]


def test_head_only_shares_the_teachers_backbone(tmp_path: Path):
    student = distill(SHORT, tiny.teacher(), tmp_path / "run")
    before, after = (load_file(path / "model.safetensors") for path in (tiny.teacher(), tmp_path / "run"))
    assert before.keys() == after.keys()
    for name, value in after.items():
        if not name.startswith("head."):
            assert torch.equal(value, before[name]), name
    assert not torch.equal(after["head.input_proj.weight"], before["head.input_proj.weight"])

    scores = load_file(tmp_path / "run" / "scores.safetensors")
    assert all(name.split(".")[:2] in (["teacher", "head"], ["auxiliary", "head"]) for name in scores)
    loaded = Pipeline.load(tmp_path / "run")
    assert loaded.student == SHORT.student
    assert np.array_equal(loaded.sample([5], seed=2), student.sample([5], seed=2))
    teacher, auxiliary = load_scores(tmp_path / "run", loaded.network, False)
    assert teacher.class_emb is loaded.network.class_emb
    assert not torch.equal(auxiliary.input_proj.weight, before["head.input_proj.weight"])
    assert torch.equal(teacher.head.input_proj.weight, before["head.input_proj.weight"])
    assert not any(p.requires_grad for p in teacher.head.parameters())


def test_training_everything_moves_the_backbone(tmp_path: Path):
    distill(dataclasses.replace(SHORT, trained="all"), tiny.teacher(), tmp_path / "run")
    before, after = (load_file(path / "model.safetensors") for path in (tiny.teacher(), tmp_path / "run"))
    for name in ("encoder_blocks.0.attn.qkv.weight", "head.input_proj.weight", "mask_token"):
        assert not torch.equal(before[name], after[name]), name
    scores = load_file(tmp_path / "run" / "scores.safetensors")
    assert {name.removeprefix("teacher.") for name in scores if name.startswith("teacher.")} == before.keys()
    assert all(torch.equal(scores[f"teacher.{name}"], value) for name, value in before.items())
    heads = {name for name in before if name.startswith("head.")}
    assert {name.removeprefix("auxiliary.") for name in scores if name.startswith("auxiliary.")} == heads
    assert not torch.equal(scores["auxiliary.head.input_proj.weight"], before["head.input_proj.weight"])


def test_a_student_of_a_range_of_guidance(tmp_path: Path):
    student = StudentConfig(guidance=1.5, guidance_range=(1.0, 4.0))
    config = dataclasses.replace(SHORT, student=student, steps=20, gsim=GSIMConfig(lr=5e-3))
    distill(config, tiny.teacher(), tmp_path / "run")
    model = Pipeline.load(tmp_path / "run")
    ask = {"classes": list(range(10)), "seed": 3}
    assert np.array_equal(model.sample(**ask), model.sample(**ask, guidance=1.5))
    assert not np.array_equal(model.sample(**ask, guidance=1.0), model.sample(**ask, guidance=4.0))
    linear = model.sample(**ask, guidance=4.0, guidance_schedule="linear")
    assert not np.array_equal(linear, model.sample(**ask, guidance=4.0))
    with pytest.raises(ValueError, match=r"serves guidance in \[1.0, 4.0\], got 4.5"):
        model.sample(**ask, guidance=4.5)
    with pytest.raises(ValueError, match=r"guidance 5.0 is outside guidance_range 1.0 4.0"):
        StudentConfig(guidance=5.0, guidance_range=(1.0, 4.0))


def test_every_setting_changes_the_run(tmp_path: Path):
    """Each differs from the same run without it, and none breaks."""
    variants = {
        "plain": {},
        "everything": {"trained": "all"},
        "network": {"trained": "all", "auxiliary": "network"},
        "rollout": {"rollout": 1.0},
        "contexts": {"context_updates": 2, "save_every": 2},
        "training": {"mask_ratios": "training"},
        "tokens": {"mask_ratios": "tokens"},
        "auxiliary": {"gsim": GSIMConfig(auxiliary_updates=2)},
        "lambda": {"gsim": GSIMConfig(lam=1.0)},
        "squared": {"gsim": GSIMConfig(distance="squared")},
        "guidance": {"student": StudentConfig(guidance=3.0)},
        "t-init": {"student": StudentConfig(t_init=600)},
        "evaluations": {"student": StudentConfig(evaluations=2)},
        "classes": {"class_drop": 0.9},
        "seed": {"seed": 1},
        "bf16": {"precision": "bf16"},
        "flip": {"flip": True},
        "warmup": {"warmup": 3},
        "decay": {"decay": False},
        "t-range": {"gsim": GSIMConfig(t_range=(20, 100))},
        "auxiliary-t-range": {"gsim": GSIMConfig(auxiliary_t_range=(0, 100))},
    }
    losses, auxiliary = {}, {}
    for name, changes in variants.items():
        config = dataclasses.replace(SHORT, steps=4, ar_steps=8, **changes)  # the rates decay from the third on
        distill(config, str(tiny.teacher()), str(tmp_path / name))
        rows = tiny.metrics(tmp_path / name)
        losses[name], auxiliary[name] = tuple(row["student_loss"] for row in rows), rows[0]["auxiliary_loss"]
        assert np.isfinite(losses[name]).all()
    assert len(set(losses.values())) == len(variants), losses
    assert auxiliary["t-range"] == auxiliary["plain"] != auxiliary["auxiliary-t-range"]


@pytest.mark.parametrize(("trained", "auxiliary"), [("head", "head"), ("all", "head"), ("all", "network")])
def test_going_on_from_a_student(trained: str, auxiliary: str, tmp_path: Path):
    """At a learning rate of zero it stays what it was, to the bit, and so does its auxiliary; without its scores
    the auxiliary is the teacher's again."""
    config = dataclasses.replace(SHORT, trained=trained, auxiliary=auxiliary, steps=40, gsim=GSIMConfig(lr=1e-3))
    distill(config, tiny.teacher(), tmp_path / "first")
    frozen = dataclasses.replace(config, steps=1, ema=0.0, gsim=GSIMConfig(lr=0.0, auxiliary_lr=1e-12))
    distill(frozen, tiny.teacher(), tmp_path / "on", start_folder=tmp_path / "first")
    (tmp_path / "bare").mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "first" / file, tmp_path / "bare")
    distill(frozen, tiny.teacher(), tmp_path / "on-bare", start_folder=tmp_path / "bare")
    first, on, bare = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "on", "on-bare"))
    assert first.keys() == on.keys()
    assert all(torch.equal(x, on[name]) and torch.equal(x, bare[name]) for name, x in first.items())
    first, on, bare = (load_file(tmp_path / name / "scores.safetensors") for name in ("first", "on", "on-bare"))
    weight = "auxiliary.head.input_proj.weight"
    assert all(torch.allclose(x, on[name], atol=1e-9) for name, x in first.items())
    assert torch.allclose(bare[weight], bare["teacher.head.input_proj.weight"], atol=1e-9)
    assert not torch.allclose(bare[weight], first[weight], atol=1e-4)
    distill(frozen, tiny.teacher(), tmp_path / "on", resume=True, start_folder=tmp_path / "first")
    for start in (tiny.student(), None):
        with pytest.raises(ValueError, match="was started with start = "):
            distill(frozen, tiny.teacher(), tmp_path / "on", resume=True, start_folder=start)


def test_going_on_from_what_does_not_fit(tmp_path: Path):
    for folder, changes, message in (
        (tiny.teacher(), {}, "holds a teacher"),
        (
            tiny.student(),
            {"student": StudentConfig(t_init=600)},
            "has t_init 300, the run 600: give its own, --student.t-init 300",
        ),
        (tiny.student(), {"student": StudentConfig(guidance_range=(1.0, 3.0))}, "has guidance_range None"),
        (tiny.student(), {"student": StudentConfig(guidance=3.0)}, "the run 3.0: give its own, --student.guidance 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            distill(dataclasses.replace(SHORT, **changes), tiny.teacher(), tmp_path / "run", start_folder=folder)
    everything, other = tmp_path / "everything", tmp_path / "teacher"
    moved = Pipeline.load(tiny.teacher())
    with torch.no_grad():
        moved.network.class_emb.weight.add_(1e-3)
    moved.save(other)
    distill(dataclasses.replace(SHORT, trained="all"), tiny.teacher(), everything)
    with pytest.raises(ValueError, match="student of another teacher"):
        distill(dataclasses.replace(SHORT, trained="all"), other, tmp_path / "run", start_folder=everything)
    with pytest.raises(ValueError, match="backbone of its own, or one in half precision: give --trained all"):
        distill(SHORT, tiny.teacher(), tmp_path / "run", start_folder=everything)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("trained", ["head", "all"])
def test_updates_on_the_same_contexts(trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The data change with every second update, the noise with each; the first update is the same as alone."""
    changes = {"steps": 4, "context_updates": 2, "save_every": 2, "trained": trained, "gsim": GSIMConfig(lr=3e-3)}
    met: list[Context] = []
    loss = ScoreMatching.student_loss

    def checked(matching: ScoreMatching, context: Context, *noise: torch.Tensor) -> object:
        """The student's conditions are those of its backbone now."""
        with torch.no_grad():
            assert torch.equal(context.student_condition, context.condition(matching.student))
        met.append(context)
        return loss(matching, context, *noise)

    monkeypatch.setattr(ScoreMatching, "student_loss", checked)
    distill(dataclasses.replace(SHORT, **changes), tiny.teacher(), tmp_path / "run")
    assert torch.equal(met[0].student_condition, met[1].student_condition) == (trained == "head")
    plain = dataclasses.replace(SHORT, **{**changes, "context_updates": 1})
    distill(plain, tiny.teacher(), tmp_path / "plain")
    rows, plain = tiny.metrics(tmp_path / "run"), tiny.metrics(tmp_path / "plain")
    means = [row["data_mean"] for row in rows]
    assert means[0] == means[1] != means[2] == means[3]
    assert len({row["token_mean"] for row in rows}) == 4
    assert rows[0]["student_loss"] == plain[0]["student_loss"]
    assert rows[2]["data_mean"] == plain[2]["data_mean"]


def test_what_cannot_be_distilled(tmp_path: Path):
    with pytest.raises(ValueError, match="holds a student: distillation starts from a teacher"):
        distill(SHORT, tiny.student(), tmp_path / "run")
    with pytest.raises(ValueError, match="17"):
        distill(dataclasses.replace(SHORT, ar_steps=17), tiny.teacher(), tmp_path / "run")
    wrong_classes = r"of the classes only; the teacher takes .* of the classes 0, 1, 2, 3, 4: give its own --data"
    with pytest.raises(ValueError, match=wrong_classes):
        distill(dataclasses.replace(SHORT, data=str(one_class(tmp_path))), tiny.teacher(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for wrong, message in (
        ({"t_range": (950, 20)}, "t_range must satisfy .* got 950 20"),
        ({"auxiliary_updates": 0}, "auxiliary_updates must be at least 1, got 0"),
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            GSIMConfig(**wrong)
    for changes in (
        {"rollout": 1.5},
        {"class_drop": 1.0},
        {"warmup": -1},
        {"trained": "tail"},
        {"ar_steps": 0},
        {"auxiliary": "network", "trained": "head"},
        {"context_updates": 0},
        {"context_updates": 3, "save_every": 250},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(changes))}.*{next(iter(changes.values()))}"):
            DistillConfig(**changes)
    with pytest.raises(ValueError, match=r"t_init must be in \[1, 950\], got 999"):
        StudentConfig(t_init=999)


def one_class(tmp_path: Path) -> Path:
    (tmp_path / "data" / "only").mkdir(parents=True)
    for i in range(3):
        save_png(tmp_path / "data" / "only" / f"{i}.png", np.zeros((8, 8, 1), np.uint8))
    return tmp_path / "data"


def test_a_student_that_diverges_stops_the_run(tmp_path: Path):
    config = dataclasses.replace(SHORT, steps=50, log_every=1, save_every=1, gsim=GSIMConfig(lr=0.3))
    with pytest.raises(FloatingPointError, match=r"step \d+: the student has diverged.*below --gsim.lr 0.3") as caught:
        distill(config, tiny.teacher(), tmp_path / "run")
    stopped = int(str(caught.value).split(":")[0].removeprefix("step "))
    assert tiny.metrics(tmp_path / "run")[-1]["step"] == stopped
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == stopped - 1
    with pytest.raises(FloatingPointError, match=f"step {stopped}: the student has diverged"):  # by the same limit
        distill(config, tiny.teacher(), tmp_path / "run", resume=True)


def test_a_learning_rate_that_explodes_stops_the_run(tmp_path: Path):
    config = dataclasses.replace(SHORT, steps=50, gsim=GSIMConfig(lr=1e30), clip_grad=1e30)
    with pytest.raises(
        FloatingPointError, match=r"step \d+: the (loss|gradient of [\w.]+) of the (student|auxiliary) is not fin"
    ):
        distill(config, tiny.teacher(), tmp_path / "run")
