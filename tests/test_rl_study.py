"""The study of RL at its smallest size: rows are not measured again, other models are refused; and the page."""

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch

from marval.checkpoint import read_json, write_json
from marval.monitor import image_statistics
from marval.pipeline import Pipeline


@pytest.fixture(scope="module")
def scripts() -> tuple[ModuleType, ModuleType]:
    return tiny.benchmark("rl_study"), tiny.benchmark("rl_page")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.study(tmp_path_factory.mktemp("models"))
    shutil.copy(tiny.student() / "scores.safetensors", folder / "student")
    return folder


@pytest.fixture
def quick(scripts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(scripts[1], "QUICK", tmp_path)
    return tmp_path / "rl_study.json"


def test_the_page_is_of_the_committed_results(scripts, monkeypatch, tmp_path):
    docs = scripts[1].places(False)
    copy = tmp_path / "rl.md"
    shutil.copy(docs.page, copy)
    trial = scripts[1].Places(docs.results, copy, tmp_path)
    monkeypatch.setattr(scripts[1], "places", lambda quick: trial)
    scripts[0].main(["page"])
    assert copy.read_text() == docs.page.read_text(), "run python benchmarks/rl_study.py page"
    pictures = sorted(tmp_path.glob("rl_*.png"))
    assert pictures
    assert all(file.read_bytes() == (docs.pictures / file.name).read_bytes() for file in pictures)


def test_run_resume_page_refuse(scripts, models, quick, tmp_path, capsys):
    run = ["run", "digits", str(models), "--quick", "--stages", "algorithms,best_of_n,intermediates,cost,memory"]
    scripts[0].main([*run, "--seeds", "0"])
    assert "rows are missing: about" in capsys.readouterr().out
    found = read_json(quick)["digits"]
    rows = found["rows"]
    assert {key.partition("/")[0] for key in rows} == {
        "student", "algorithms", "best of n", "intermediates", "cost", "memory",
    }  # fmt: skip
    written = quick.read_bytes()
    scripts[0].main([*run, "--seeds", "0"])
    assert quick.read_bytes() == written, "what is there is not measured again"

    student, gradient = rows["student/0"], rows["algorithms/gradient, log-probability/0"]
    for same in (gradient["before"], rows["best of n/1/0"]["values"]):
        assert [same[name] for name in scripts[1].SHOWN] == pytest.approx([student[name] for name in scripts[1].SHOWN])
    assert gradient["seconds_per_image"] > 0
    reads = rows["best of n/2, reads the class (0 or 1)/0"]
    assert reads["before"]["accuracy"] == student["accuracy"]
    assert reads["values"]["reward"] >= reads["before"]["reward"]
    assert rows["best of n/2/0"]["values"]["reward"] > student["reward"]
    glimpses = rows["intermediates/one AR step, anchor none/0"]["glimpses"]
    assert len(glimpses) == 3
    assert len(glimpses[0]["single"]) == 8
    assert glimpses[0]["single"][-1] == pytest.approx(glimpses[0]["whole"]), "the last step's image is the whole one"
    assert glimpses[0]["correlation"][-1] == pytest.approx(1)
    assert all(-1 <= value < 1 for value in glimpses[0]["correlation"][:-1])

    scripts[0].main(["page", "--quick"])
    page = (quick.parent / "rl.md").read_text()
    scripts[0].main(["page", "--quick"])
    assert (quick.parent / "rl.md").read_text() == page, "written anew, not twice"
    assert "| best of 2, reads the class (0 or 1) |" in page
    assert "| GSIM anchor |" in page
    assert str(models) not in page + quick.read_text(), "no path of this machine"

    other = tmp_path / "other"
    shutil.copytree(models, other)
    shutil.copy(models / "classifier/model.safetensors", other / "judge")
    with pytest.raises(ValueError, match=r"rl_study.json was measured with weights = "):
        scripts[0].main(["run", "digits", str(other), "--quick"])
    (other / "student/scores.safetensors").unlink()
    with pytest.raises(ValueError, match=r"student has no scores.safetensors"):
        scripts[0].main(["run", "digits", str(other), "--quick"])
    with pytest.raises(ValueError, match="unknown stage 'anchor': choose of algorithms, best_of_n, anchors"):
        scripts[0].main([*run[:-1], "anchor"])


def test_guards_halves_and_another_process(scripts, models, quick, monkeypatch, tmp_path):
    """Rows that stop by themselves; those that a process beside this one writes meanwhile are neither lost nor done."""
    study = scripts[0]
    monkeypatch.setattr(study, "SKIPPED", {"digits": [f"anchors/{name}" for name in study.ANCHORS if name != "none"]})
    for name in ("INK", "MIXED"):
        monkeypatch.setattr(study, name, ())
    bench = study.Bench("digits", models, True, tmp_path)
    bench.run(["memory"], [0])
    rows = read_json(quick)["digits"]["rows"]
    theirs = {"student/1": rows["student/0"], "anchors/none/0": {"theirs": True}}
    write_json(quick, {"digits": read_json(quick)["digits"] | {"rows": rows | theirs}, "fashion-mnist": {"rows": {}}})
    bench.run(["anchors"], [0])
    everything = read_json(quick)
    assert everything["fashion-mnist"] == {"rows": {}}
    rows = everything["digits"]["rows"]
    assert rows["student/1"] == rows["student/0"]
    assert rows["anchors/none/0"] == {"theirs": True}
    half = rows["student/0"]["reward"] / 2
    assert rows["anchors/hinge at half the student's/0"]["hinge"] == half
    target = rows["anchors/target at half the student's/0"]
    assert target["target"] == half
    assert ("has reached the target" in target["stop"]) == (target["curve"][-1]["reward"] >= half)
    assert "anchors/none, shipped guards/0" in rows
    assert study.GUARDS == {"patience": 3, "collapse": 5, "select": "judge"}


def test_images_are_remembered_of_the_student_alone(scripts, models, quick, tmp_path):
    bench = scripts[0].Bench("digits", models, True, tmp_path)
    draws, labels = bench.draws, list(range(10))
    first = draws.sample(bench.student, labels, seed=3)
    assert draws.sample(Pipeline.load(models / "teacher"), labels, seed=3).tolist() != first.tolist()
    again = Pipeline.load(models / "student")
    again.sampling = bench.student.sampling
    assert draws.sample(again, labels, seed=3) is first
    with draws.anew():
        drawn = draws.sample(again, labels, seed=3)
    assert drawn is not first
    assert (drawn == first).all()
    assert (again.sample(labels, seed=3) == first).all(), "the same images as in float32 without the study"
    with torch.no_grad():
        next(again.network.head.parameters()).mul_(1.5)
    assert draws.sample(again, labels, seed=3).tolist() != first.tolist()


def test_a_glimpse_is_what_training_on_one_step_sees(scripts, models, quick, tmp_path):
    """Known tokens of a single step are those of the whole image's, and only the hidden ones are drawn at once."""
    bench, seen = scripts[0].Bench("digits", models, True, tmp_path), []

    def brightness(images, prompts):
        seen.append(images)
        return images.mean((1, 2, 3))

    found = bench.glimpse(bench.student, bench.config(), brightness)
    whole, *singles = seen
    assert found["single"] == [pytest.approx(float(images.mean())) for images in singles]
    share = [float(((images - whole).abs() > 1e-4).float().mean()) for images in singles]
    assert share[-1] == 0, "the last step's image is the whole one"
    assert share == sorted(share, reverse=True), "the fewer are hidden, the fewer differ"
    assert image_statistics(whole)["brightness"] == pytest.approx(found["whole"])


def row(reward: float, judge: float = -0.1, fid: float = 1.0, recall: float = 0.8) -> dict[str, float]:
    return {"reward": reward, "judge": judge, "fid": fid, "recall": recall}


def test_what_counts_as_hacked(scripts):
    hacked, student = scripts[1].hacked, row(-0.2)
    assert not hacked(student, student)
    assert not hacked(student, row(-0.1, judge=-0.109, fid=1.5, recall=0.4))
    assert hacked(student, row(-0.1, judge=-0.111)), "the judge falls while the reward rises"
    assert not hacked(student, row(-0.3, judge=-0.111)), "both fall: worse, not hacked"
    assert hacked(student, row(-0.3, fid=1.51))
    assert hacked(student, row(-0.3, recall=0.39))
    runs = {"0": {"before": student, "kept": student}, "1": {"before": student, "kept": row(0, fid=2)}}
    assert scripts[1].verdict(runs) == "1 of 2"
    assert scripts[1].verdict({"0": runs["0"]}) == "no"
    assert scripts[1].verdict({"0": {"kept": student}}) == "", "a row of before there was a rule"


def test_when_rl_has_paid(scripts):
    """RL of 60 s with the reward of the best of 4, images of 10 ms: 60 = 3 * 0.01 N."""
    rows: dict[str, Any] = {
        f"best of n/{n}/{seed}": {"values": row(reward)} for seed in range(2)
        for n, reward in ((1, -0.4), (2, -0.3), (4, -0.2), (8, -0.1))
    }  # fmt: skip
    rows |= {f"best of n/{n}, reads the class (0 or 1)/0": {"values": row(9.0)} for n in (1, 2)}
    key = "algorithms/gradient, log-probability"
    timed = {"run_seconds": 60.0, "seconds_per_image": 0.01}
    rows |= {f"{key}/{seed}": timed | {"kept": row(-0.2)} for seed in range(2)}
    assert scripts[1].against_best(rows, key) == [
        "60.00 ± 0.00", "10.00 ± 0.00", "1.12 ± 0.00", "+0.016 ± 0.000", "+0.200 ± 0.000",
        *["+0.000 ± 0.000"] * 4, "4.00 ± 0.00", "2000 ± 0",
    ]  # fmt: skip
    assert scripts[1].of_best(2.0, {1: -0.4, 4: -0.2}) == pytest.approx(-0.3)
    assert scripts[1].of_best(9.0, {1: -0.4, 4: -0.2}) == -0.2
    rows[f"{key}/1"]["kept"] = row(-0.05)
    assert scripts[1].against_best(rows, key)[9].startswith("> 6.00")
    assert scripts[1].equal_n(-0.25, {1: -0.4, 2: -0.3, 4: -0.2}) == (pytest.approx(2 * 2**0.5), False)
    rows = {f"{key}/0": timed | {"kept": row(-0.5)}, **{k: v for k, v in rows.items() if k.startswith("best")}}
    assert scripts[1].against_best(rows, key)[4::5] == ["-0.100", ""], "no better than the student"
