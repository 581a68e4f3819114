"""Trackers get what metrics.jsonl gets, also after a run was killed and resumed."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
import tiny

from marval.config import TrainConfig
from marval.run import Run
from marval.train import train


def settings(tracker: str) -> TrainConfig:
    return TrainConfig(
        steps=6, batch=8, save_every=3, sample_every=3, log_every=1, model=tiny.MODEL, sampling=tiny.SAMPLING,
        tracker=tracker,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def killed_and_resumed(tracker: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """Lines of metrics.jsonl of a run that dies after update 5, whose last checkpoint is of 3, and goes on."""

    def show_and_die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        log = Run.log
        patch.setattr(Run, "log", lambda run, step, **row: show_and_die() if step > 5 else log(run, step, **row))
        with pytest.raises(KeyboardInterrupt):
            train(settings(tracker), out)
    train(settings(tracker), out, resume=True)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = killed_and_resumed("tensorboard", tmp_path / "run", monkeypatch)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(lines[0]) - {"step"}
    for name in events.Tags()["scalars"]:
        seen = {event.step: event.value for event in events.Scalars(name)}
        assert Counter(event.step for event in events.Scalars(name)) == dict.fromkeys(range(1, 7), 1)
        assert seen == pytest.approx({line["step"]: line[name] for line in lines}, rel=1e-5)
    assert [event.step for event in events.Images("samples")] == [3, 6]
    assert (events.Images("samples")[0].width, events.Images("samples")[0].height) == (651, 261)


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    lines = killed_and_resumed("wandb", tmp_path / "run", monkeypatch)
    made = wandb.run
    assert (made.project, made.name, made.config["batch"]) == ("marval", "run", 8)
    assert made.summary["loss"] == pytest.approx(lines[-2]["loss"], rel=1e-5)  # the last one waits for the next
    folder = tmp_path / "run" / "wandb"
    assert made.id == (folder / "id").read_text()
    assert {path.name.split("-")[-1] for path in folder.glob("offline-run-*")} == {made.id}
    made.finish()


def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tracker wandb needs a package: pip install wandb"):
        train(settings("wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
