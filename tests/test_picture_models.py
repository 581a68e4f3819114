"""benchmarks/picture_models.py: from a data set's files to models and rows, at the smallest size."""

import shlex
from pathlib import Path

import pytest
import tiny

from marval.checkpoint import read_json
from marval.pipeline import Pipeline
from marval.recipes import DISTILL, RL

picture_models = tiny.benchmark("picture_models")


def test_emoji_from_the_files_to_a_student(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """Commands run; called again, none begins anew, and only what is not finished goes on."""
    monkeypatch.chdir(tmp_path)
    args = ["emoji", str(shared / "data"), "runs/small", "--quick"]
    some = "data,teacher,student"
    picture_models.main([*args, "--stages", some])
    for role in ("teacher", "student"):
        assert read_json(tmp_path / "runs/small" / role / "meta.json")["step"] == 2
        assert Pipeline.load(tmp_path / "runs/small" / role).network.config.num_tokens == 64
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npz")}
    meta = tmp_path / "runs/small/student/meta.json"
    meta.write_text(meta.read_text().replace('"step": 2', '"step": 1'))
    capfd.readouterr()
    picture_models.main([*args, "--stages", some])
    out = capfd.readouterr().out
    assert "teacher: runs/small/teacher is there" in out
    assert out.count("--resume") == 1
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npz")} == before


@pytest.mark.parametrize("recipe", picture_models.PICTURES)
def test_commands_of_every_recipe(recipe: str, capsys: pytest.CaptureFixture[str]):
    picture_models.main([recipe, "downloads", "runs/mine", "--weights", "weights", "--device", "cuda", "--print"])
    lines = capsys.readouterr().out.splitlines()
    names = [line.partition(":")[0] for line in lines]
    assert names[0] == "data"
    assert names[-4:] == ["teacher", "student", "aligned", "rows"]
    assert ("latents" in names) == (recipe.endswith("-cpu") or recipe == "imagenette64")
    assert ("judge" in names) == (not recipe.startswith(("cifar10", "imagenette64")))
    assert all(recipe in shlex.split(line) for line in lines[-4:-1])
    assert recipe in DISTILL
    assert recipe in RL


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cifar10 needs published weights: give --weights FOLDER"):
        picture_models.main(["cifar10", "downloads", "runs/mine", "--print"])
    with pytest.raises(ValueError, match=r"real_pictures_emoji\.json holds rows of other models: give FOLDER another"):
        picture_models.main(["emoji", "downloads", "runs/emoji", "--stages", "data"])
    with pytest.raises(ValueError, match="--stages 'techer' is none of data, classifier, judge, teacher, "):
        picture_models.main(["emoji", "downloads", "runs/mine", "--stages", "techer", "--print"])
