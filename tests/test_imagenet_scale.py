"""The benchmark at full size, at a tiny size: files in the published layouts through every stage, in one process."""

import argparse
import dataclasses
import json
import math
import os
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch

from marval.config import RunConfig
from marval.distributed import connect
from marval.run import Run

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    return tiny.benchmark("imagenet_scale")


def test_checkpoint_has_the_layout_of_the_published_ones(scale, shared):
    with torch.serialization.safe_globals([argparse.Namespace]):
        golden = torch.load(shared / "golden" / "mar_tiny" / "checkpoint-last.pth", weights_only=True)
    sizes = {"grid": 4, "num_classes": 5, "width": 32, "depth": 2, "heads": 4, "buffer_size": 4, "head_width": 48}
    ours = scale.mar_checkpoint(dataclasses.replace(scale.TINY, **sizes, head_depth=2))
    assert list(ours) == list(golden)
    for part in ("model", "model_ema"):
        assert type(ours[part]) is type(golden[part])
        assert {n: (t.shape, t.dtype) for n, t in ours[part].items()} == {
            n: (t.shape, t.dtype) for n, t in golden[part].items()
        }
    assert {*vars(golden["args"])} - {"model"} <= {*vars(ours["args"])}
    assert not torch.equal(ours["model"]["mask_token"], ours["model_ema"]["mask_token"])


def test_every_stage(scale, shared, tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "HEAD_STEPS", 4)
    images, keys = shared / "data" / "imagenet_photos", shared / "golden" / "kl16" / "keys.json"
    out = tmp_path / "scale.json"
    written = []

    def call(function: Any, *args: Any) -> Any:
        if function is scale.measure:
            written.append(len(json.loads(out.read_text())["rows"]) if out.exists() else 0)
            if args[0].stage == "sample student" and "sample student" not in failed:
                failed.append("sample student")
                raise torch.OutOfMemoryError("no more\nmemory")
        return function(*args)

    failed: list[str] = []
    rows = scale.benchmark(out, ["tiny"], "cpu", images, keys, call, map)
    assert written == list(range(len(rows)))  # a run that is interrupted keeps what it has
    assert json.loads(out.read_text())["rows"] == rows
    assert [row["stage"] for row in rows] == [case.stage for case in scale.cases("tiny", "cpu", tmp_path)]
    assert {row["stage"] for row in rows} == set(scale.STAGES)
    assert [row.get("error") for row in rows if row["stage"] == "sample student"] == ["OutOfMemoryError: no more", None]
    assert [row["equal"] for row in rows if "equal" in row] == [True, True]
    for row in rows:
        if "error" not in row:
            assert row["seconds"] > 0
            assert row["peak_memory"] > row.get("predicted_memory", 0)
    steps = {row["stage"]: row["timed_updates"] for row in rows if "timed_updates" in row}
    assert steps == {"train": 2, "distill head": 4, "distill all": 4, "rl": 1}
    losses = [row["metrics"] for row in rows if "metrics" in row]
    assert all(math.isfinite(value) for loss in losses for value in loss.values())
    assert all(set(loss) & {"mse", "student_loss", "reward"} for loss in losses)
    text = scale.table(rows)
    assert len(text.splitlines()) == len(rows) + 1
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "MARVAL_TRACEBACK" not in os.environ

    assert {f"{name}_heldout" for name in ("reward", "clip", "imagereward", "hps", "aesthetic")} <= set(losses[-1])
    again = scale.benchmark(out, ["tiny"], "cpu", images, keys, lambda f, *args: f(*args), map, ("rl",))
    assert [row["stage"] for row in again] == [row["stage"] for row in rows]
    assert [row["stage"] for row in again if "date" in row] == ["rl"]
    assert [row for row in again if row["stage"] != "rl"] == [row for row in rows if row["stage"] != "rl"]

    def fail(function: Any, *args: Any) -> Any:
        if function is scale.measure and args[0].stage == "rl":
            raise torch.OutOfMemoryError("no more")
        return function(*args)

    assert scale.benchmark(out, ["tiny"], "cpu", images, keys, fail, map, ("rl",))[-1]["error"].endswith("no more")
    assert json.loads(out.read_text())["rows"] == again  # what had been measured stays


def test_too_large_a_batch_gets_smaller(scale, tmp_path):
    asked = []

    def call(function: Any, case: Any) -> dict[str, Any]:
        if function is scale.predict:
            return {"predicted_memory": case.batch, "operations": 10 * case.batch}
        asked.append(case.batch)
        if case.batch > 29:
            raise torch.OutOfMemoryError
        return {"seconds": 2.0}

    case = scale.Case("mar-h", "cuda", tmp_path, "distill all", batch=33)
    row = scale.run_stage(case, {"predicted_memory": 33, "operations": 330}, 5.0, call)
    assert asked == [33, 31, 30, 29]
    assert (row["batch"], row["predicted_memory"], row["predicted_seconds"]) == (29, 29, 58)
    assert (row["images_per_second"], row["tokens_per_second"]) == (14.5, 256 * 14.5)


def test_the_batch_fills_the_limit_of_the_plan(scale, tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "predict", lambda case: {"predicted_memory": (30 + case.batch) * scale.GIB})
    case = scale.Case("mar-h", "cuda", tmp_path, "distill all", batch=256)
    assert scale.fit(case)[0].batch == 48
    assert scale.fit(dataclasses.replace(case, batch=40))[0].batch == 40
    assert scale.fit(dataclasses.replace(case, stage="sample teacher"))[0].batch == 256


def test_updates_are_timed_and_evaluations_are_not(scale, tmp_path):
    def loop() -> None:
        run = Run(tmp_path / "run", "rl", RunConfig(), False, connect("cpu"))
        run.log(0, reward_heldout=1.0)
        for step in range(3):
            run.log(step + 1, reward=1.0)
        run.log(3, reward_heldout=1.0)

    ends = scale.update_ends(loop)
    assert len(ends) == 3
    assert ends == sorted(ends)


def test_the_command(scale, tmp_path, capsys):
    for words, message in (
        ([str(tmp_path / "a.json"), "--sizes", "mar-x"], "unknown size 'mar-x': choose from tiny, mar-b"),
        ([str(tmp_path / "a.json"), "--images", str(tmp_path / "none")], "none does not exist: name it with --images"),
    ):
        with pytest.raises(SystemExit):
            scale.main(words)
        assert message in capsys.readouterr().err
    assert scale.fresh(os.getpid) != os.getpid()
