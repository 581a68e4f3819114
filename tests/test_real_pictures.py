"""The measurement of real pictures at its smallest size: every verb, resumed, extended, refused; and its arithmetic."""

import json
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from marval.checkpoint import read_json, write_json
from marval.data import load_dataset
from marval.features import load_features
from marval.metrics import frechet_distance, moments_of
from marval.pipeline import Pipeline


@pytest.fixture(scope="module")
def scripts() -> tuple[ModuleType, ModuleType]:
    return tiny.benchmark("real_pictures"), tiny.benchmark("results_page")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.study(tmp_path_factory.mktemp("models"))


@pytest.fixture
def quick(scripts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for module in scripts:
        monkeypatch.setattr(module, "QUICK", tmp_path)
    return tmp_path / "real_pictures_digits.json"


def drawn(folder: Path) -> dict[str, int]:
    """When each file of images was written."""
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("images-*.npz")}


def test_rows_of_a_student_of_several_evaluations(scripts):
    """After its row of one, at its own K."""
    rows = scripts[0].all_rows(8, [4], False, (10,), (10,), [4, 2])
    names = [row.name for row in rows if row.model == "student"]
    assert names == ["student-k8", "student-k8-4", "student-k8-2", "student-k4"]


def test_chunks_drawn_at_once_as_on_a_gpu(scripts, models, quick, monkeypatch, tmp_path):
    """The images and files of smaller batches; what is missing is drawn again."""
    real_pictures = scripts[0]
    monkeypatch.setattr(real_pictures, "CHUNK", 4)
    monkeypatch.setattr(real_pictures, "CHUNKS_ON_A_GPU", 2)
    study = real_pictures.Study("digits", models, sets=tmp_path, quick=True)
    row = next(row for row in study.rows if row.model == "student")
    images = study.draw(row, 0, 18)[0]
    real, calls = study.models["student"], []

    def sample(labels: list[int], **settings: Any) -> np.ndarray:
        calls.append((settings["first_image"], len(labels)))
        return real.sample(labels, **settings)

    gpu = SimpleNamespace(type="cuda")
    study.models["student"] = SimpleNamespace(device=gpu, class_names=real.class_names, sample=sample)
    assert np.array_equal(study.draw(row, 0, 18)[0], images)
    assert calls == [(0, 8), (8, 8), (16, 2)]
    files = sorted(tmp_path.glob("*/images-*.npz"), key=lambda file: (file.parent.stat().st_mtime_ns, file.name))[-5:]
    assert [file.name[7:13] for file in files] == ["000000", "000004", "000008", "000012", "000016"]
    files[2].unlink()
    assert np.array_equal(study.draw(row, 0, 19)[0][:18], images)
    assert calls[3:] == [(8, 8), (16, 3)]
    study.models["student"].sample = lambda labels, **settings: np.zeros((len(labels), 8, 8, 1), np.uint8)
    with pytest.raises(FloatingPointError, match=r"student-k4-seed1-.*: images 0 to 7 are all the same"):
        study.draw(row, 1, 18)


def test_rows_while_rl_goes_on(scripts, models, quick, tmp_path):
    """A model that is not finished binds no row of the others."""
    shutil.copytree(models, tmp_path / "models")
    (tmp_path / "models" / "aligned").mkdir()
    run = ["run", "digits", str(tmp_path / "models"), "--quick", "--seeds", "0", "--rows"]
    scripts[0].main([*run, "student-k4"])
    aligned = Pipeline.load(tmp_path / "models" / "student")
    for scale in (1.1, 1.2):
        with torch.no_grad():
            next(aligned.network.head.parameters()).mul_(scale)
        aligned.save(tmp_path / "models" / "aligned")
        scripts[0].main([*run, "student-k8"])
    scripts[0].main([*run, "aligned-k4"])
    rows = read_json(quick)["rows"]
    assert list(rows) == ["student-k4/0", "student-k8/0", "aligned-k4/0"]
    assert {row["device"] for row in rows.values()} == {"cpu"}
    aligned.network.head.input_proj.weight.data.mul_(2)
    aligned.save(tmp_path / "models" / "aligned")
    with pytest.raises(ValueError, match="was measured with aligned = "):
        scripts[0].main([*run, "aligned-k4"])


def test_run_resume_clock_page(scripts, models, quick, capsys):
    real_pictures = scripts[0]
    some = ["run", "digits", str(models), "--quick", "--seeds", "0", "--rows", "real*,student-k4,teacher-k4-4-*"]
    real_pictures.main(some)
    first = read_json(quick)
    assert list(first["rows"]) == [
        "real-test/0", "real-half/0", "teacher-k4-4-ddpm/0", "teacher-k4-4-ddim/0", "student-k4/0",
    ]  # fmt: skip
    written, files = quick.read_bytes(), drawn(quick.parent)
    assert len(files) == 3
    real_pictures.main(some)
    assert quick.read_bytes() == written, "what is there is not measured again"

    lost = dict(first["rows"])
    del lost["student-k4/0"]
    write_json(quick, first | {"rows": lost})
    real_pictures.main(some)
    assert read_json(quick)["rows"] == first["rows"], "measured again from the images on disk"
    assert drawn(quick.parent) == files

    real_pictures.main(["run", "digits", str(models), "--quick", "--seeds", "0,1"])
    rows = read_json(quick)["rows"]
    assert {key.rpartition("/")[2] for key in rows} == {"0", "1"}
    assert rows["student-k4/0"]["values"] != rows["student-k4/1"]["values"]
    assert {key.partition("/")[0] for key in rows} >= {"untrained-k4", "student-k8", "teacher-k4-1-ddpm"}
    assert "teacher-k4-1-ddim/0" not in rows, "one step is the same with both solvers"

    grid = np.asarray(Image.open(quick.parent / "images" / "pictures_digits.png"))
    assert grid.shape[:2] == (1 + 57 * 3, 1 + 57 * 20), "real, teacher, student; two of each class"
    scripts[0].main(["page", "--quick"])
    page = (quick.parent / "results.md").read_text()
    assert "![Images of every model](images/pictures_digits.png)" in page
    assert not (quick.parent / "images" / "results_digits.png").exists(), "no plot without times"
    real_pictures.main(["clock", "digits", str(models), "--quick", "--batch", "1"])
    times = read_json(quick)["clock"]
    assert times["teacher-k4-4-ddpm"].keys() == times["student-k4"].keys() == {"1"}
    scripts[0].main(["page", "--quick"])
    clocked = (quick.parent / "results.md").read_text()
    assert clocked != page
    scripts[0].main(["page", "--quick"])
    assert (quick.parent / "results.md").read_text() == clocked, "written anew, not twice"
    assert "| student, 1 step | 4 |" in clocked
    assert np.asarray(Image.open(quick.parent / "images" / "results_digits.png")).std() > 10
    assert str(models) not in clocked + json.dumps(read_json(quick)), "no path of this machine"


def test_numbers_are_the_library_s(scripts, models, quick):
    """And those of more images need the missing images only."""
    study = scripts[0].Study("digits", models, quick=True)
    study.run("student-k4", [3], 50)
    study.run("student-k4", [3], 300)
    values = read_json(quick)["rows"]["student-k4/3"]["values"]
    assert list(values) == ["20", "50", "300"]
    images = Pipeline.load(models / "student").sample([i % 10 for i in range(300)], seed=3, batch_size=100)
    judge = load_features(str(models / "judge"))
    test = moments_of(judge(load_dataset("digits", "test").images).pooled)
    for count in (20, 50, 300):
        found, part = values[str(count)], images[:count]
        assert found["images"] == count
        seen = judge(part)
        assert seen.logits is not None
        assert found["accuracy"] == pytest.approx((seen.logits.argmax(1).numpy() == np.arange(count) % 10).mean())
        assert found["fid_judge_test"] == pytest.approx(frechet_distance(test, moments_of(seen.pooled)), rel=1e-3)
        assert 0 <= found["recall"] <= 1


def test_refusals(scripts, models, quick, tmp_path):
    real_pictures = scripts[0]
    run = ["run", "digits", str(models), "--quick", "--seeds", "0", "--rows"]
    real_pictures.main([*run, "real-test"])
    with pytest.raises(ValueError, match=r"--rows 'students' is none of real-test, .*student-k4"):
        real_pictures.main([*run, "students"])
    other = tmp_path / "other"
    shutil.copytree(models, other)
    network = Pipeline.load(other / "student")
    with torch.no_grad():
        next(network.network.head.parameters()).mul_(1.5)
    network.save(other / "student")
    with pytest.raises(ValueError, match=r"real_pictures_digits.json was measured with student = 'sha256"):
        real_pictures.main(["run", "digits", str(other), "--quick", "--rows", "real-test"])
    with pytest.raises(ValueError, match=r"real_pictures_digits.json was measured with judge = "):
        real_pictures.main([*run, "real-test", "--judge", str(models / "classifier")])


def test_rows_of_both_halves_are_apart(scripts, models, quick):
    """The floor: no image of one half is in the other, and both together are the training split."""
    study = scripts[0].Study("digits", models, quick=True)
    parts = {split: load_dataset("digits", split) for split in ("train", "test")}
    index = torch.arange(len(parts["train"]))[:, None].float()
    real = {"judge": {"train": index, "test": index[:3]}}
    images, labels, against = study.real(study.rows[1], 0, 10_000, parts, real)
    other = against["judge"]["train"].flatten().long().tolist()
    mine = sorted(set(range(len(parts["train"]))) - set(other))
    assert len(mine) + len(other) == len(parts["train"])
    order = np.lexsort(images.reshape(len(images), -1).T)
    expected = parts["train"].images[mine]
    assert np.array_equal(images[order], expected[np.lexsort(expected.reshape(len(expected), -1).T)])
    assert len(labels) == len(images)


def result_of(values: dict[str, dict[str, Any]], seconds: dict[str, float]) -> dict[str, Any]:
    """A file of results with given FIDs, 100 images and two seeds."""
    rows: dict[str, Any] = {}
    for name, row in values.items():
        for seed, fid in enumerate(row["fid"]):
            found = {"images": 100, "accuracy": 0.9, "precision": 0.8, "recall": 0.7}
            found |= {f"fid_{n}_{s}": fid for n in ("classifier", "judge") for s in ("test", "train")}
            about = {"model": "student", "ar_steps": 8, "head_steps": 1, "solver": "ancestral"} | row
            rows[f"{name}/{seed}"] = about | {"seed": seed, "values": {"100": found}}
    clock = {name: {"1": {"seconds_per_image": s, "repeats": 10, "load_average": 0.1}} for name, s in seconds.items()}
    return {"rows": rows, "clock": clock, "protocol": {"ar_steps": 8}}


def test_the_verdict_names_what_beats_the_student(scripts):
    page = scripts[1]
    teacher: dict[str, Any] = {"model": "teacher"}
    results = result_of(
        {
            "teacher-k8-4-ddpm": teacher | {"head_steps": 4, "fid": [9.0, 8.0]},
            "student-k8": {"fid": [2.0, 3.0]},
            "aligned-k8": {"model": "aligned", "fid": [1.5]},
            "teacher-k8-100-ddpm": teacher | {"head_steps": 100, "fid": [1.0, 1.2]},
            "teacher-k8-50-ddim": teacher | {"head_steps": 50, "solver": "ddim", "fid": [2.0, 2.6]},
        },
        {"student-k8": 0.01, "teacher-k8-100-ddpm": 0.4},
    )  # fmt: skip
    rows = page.grouped(results)
    assert list(rows) == ["teacher-k8-100-ddpm", "teacher-k8-50-ddim", "teacher-k8-4-ddpm", "student-k8", "aligned-k8"]
    rows["student-k8"][0]["values"]["20"] = {"fid_judge_test": 7.0}
    text = page.verdict(results, rows, ("20", "100"))
    assert "the judge's features: student 2.50 ± 0.71, aligned 1.50, teacher with 100 DDPM steps 1.10 ± 0.14." in text
    assert "20 images" not in text, "no teacher has so few"
    assert "at batch 1: 100 steps, DDPM (40); 50 steps, DDIM.\n" in text
    assert "At batch 1 the student is 40.0 times as fast" in text
    assert "batch 64" not in text


def test_rows_are_compared_at_the_number_of_images_that_most_have(scripts):
    rows = {name: [{"values": dict.fromkeys(counts)}] for name, counts in
            {"a": ("20", "100"), "b": ("20", "100"), "c": ("20",)}.items()}  # fmt: skip
    assert scripts[1].counts_of(rows) == ["20", "100"]
    rows["c"][0]["values"]["100"] = None
    assert scripts[1].counts_of(rows) == ["100"], "the smaller number tells nothing more"
    rows["c"].append({"values": {"20": None}})
    assert scripts[1].counts_of(rows) == ["100", "20"], "of c, two seeds have only the smaller"


def test_rows_of_several_devices_are_told_apart(scripts):
    page = scripts[1]
    about = {"machine": {"threads": 1, "cores": 2, "cpu": "Z80"}, "versions": {"torch": "2"}, "date": "today"}
    gpu = about | {"machine": about["machine"] | {"gpu": "H200"}}
    results = {"rows": {str(i): {"device": "cuda" if i else "cpu"} for i in range(3)}, "about rows": {"cuda": gpu}}
    assert page.where(results, "bf16") == (on_gpu := "today, H200 (`--device cuda`), bf16, PyTorch 2")
    results["about rows"]["cpu"] = about
    on_cpu = "today, 1 of 2 cores of Z80, bf16, PyTorch 2"
    assert page.where(results, "bf16") == f"{on_gpu} (2 rows and seeds); {on_cpu} (1 rows and seeds)"
