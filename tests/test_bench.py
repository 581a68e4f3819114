"""Timing: rows, their split, the ratio, and both kinds of folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from marval.__main__ import main
from marval.bench import bench, teacher_and_student, time_batch
from marval.pipeline import Pipeline


def test_rows_and_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    args = ["bench", "--model", tiny.student(), "--batch", "1,8", "--repeats", 3, "--json", tmp_path / "bench.json"]
    main([str(arg) for arg in args])
    results = json.loads((tmp_path / "bench.json").read_text())
    rows = results["rows"]
    assert [(row["batch"], row["model"]) for row in rows] == [
        (1, "teacher"), (1, "student"), (8, "teacher"), (8, "student"),
    ]  # fmt: skip
    for row in rows:
        parts = [row[f"{part}_seconds_per_image"] for part in ("transformer", "head", "tokenizer")]
        assert min(parts) > 0
        assert row["spread"] >= 0
    for teacher, student in zip(rows[::2], rows[1::2], strict=True):
        ratio = teacher["total_seconds_per_image"] / student["total_seconds_per_image"]
        assert results["speedup"][str(teacher["batch"])] == ratio
        assert teacher["head_seconds_per_image"] > student["head_seconds_per_image"]  # ten steps against one
    assert results["settings"]["head_steps"] == 10
    out = capsys.readouterr().out
    assert "transformer" in out
    assert out.count("teacher ") == 2
    assert f"the student is {results['speedup']['8']:.1f} x as fast" in out


def test_parts_sum_to_the_total_and_the_timed_loop_is_the_real_one(monkeypatch: pytest.MonkeyPatch):
    model = Pipeline.load(tiny.teacher())
    seconds = time_batch(model, model.settings(), 4, seed=0)
    assert seconds["transformer"] + seconds["head"] + seconds["tokenizer"] == pytest.approx(seconds["total"], rel=1e-9)
    drawn = []
    decode = type(model.tokenizer).decode

    def record(tokenizer: object, tokens: torch.Tensor) -> torch.Tensor:
        drawn.append(tokens)
        return decode(tokenizer, tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model.tokenizer), "decode", record)
    time_batch(model, model.settings(), 4, seed=6)
    expected = model.sample_tokens([0, 1, 2, 3], seed=6)
    np.testing.assert_array_equal(drawn[0].numpy(), expected.numpy())


def test_models_of_a_folder():
    teacher, student = teacher_and_student(tiny.student())
    original = Pipeline.load(tiny.teacher())
    ask = {"classes": [1, 2], "seed": 4, "ar_steps": 4, "head_steps": 3}
    assert teacher.student is None
    assert np.array_equal(teacher.sample(**ask), original.sample(**ask))
    assert np.array_equal(student.sample([1, 2], seed=4), Pipeline.load(tiny.student()).sample([1, 2], seed=4))

    results = bench(tiny.teacher(), [2], repeats=1, ar_steps=2, head_steps=2)
    assert [row["model"] for row in results["rows"]] == ["teacher", "student"]
    assert (results["settings"]["ar_steps"], results["settings"]["head_steps"]) == (2, 2)
    assert [row["spread"] for row in results["rows"]] == [0, 0]


@pytest.mark.parametrize(("batches", "repeats"), [([0], 1), ([-2], 1), ([1], 0)])
def test_refused(batches: list[int], repeats: int):
    with pytest.raises(ValueError, match="at least 1"):
        bench(tiny.student(), batches, repeats)
