"""The command line: what every verb writes, and how it refuses what it cannot do."""

import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors.torch import load_file, save_file

from marval.__main__ import RESUMED, USAGE, VERBS, main
from marval.pipeline import Pipeline

SMALL = ["--model.width", 16, "--model.depth", 1, "--model.heads", 2, "--model.head-width", 16, "--model.head-depth", 1]
TEACH = ["train", "digits", *SMALL, "--steps", 2, "--batch", 8, "--sampling.head-steps", 2]


def run(*args: object) -> None:
    main([str(arg) for arg in args])


def written(path: Path) -> list[Path]:
    """Every file and folder at and under a path."""
    return [path, *path.rglob("*")] if path.exists() else []


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes of six 8x8 images."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(noise):
        path = tmp_path / "data" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "data"


# ---- what the verbs do


def test_usage_and_help(capsys: pytest.CaptureFixture[str]):
    for args in ([], ["--help"], ["-h"]):
        main(args)
        assert capsys.readouterr().out == USAGE + "\n"
    for verb in VERBS:
        assert re.search(rf"^  {verb}( RECIPE| .RECIPE.)?  ", USAGE, re.MULTILINE), verb
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        captured = capsys.readouterr()
        assert not stop.value.code
        assert "--" in captured.out
        assert ("--resume" in captured.out) == (verb in RESUMED)
        assert captured.err == ""


def test_train_distill_rl_from_a_shell(tmp_path: Path, image_folder: Path):
    out = {name: tmp_path / name for name in ("classifier", "teacher", "student", "aligned")}
    common = ["--steps", 2, "--batch", 8, "--sample-every", 2, "--ar-steps", 4]
    run("train-classifier", "--data", image_folder, "--out", out["classifier"], "--epochs", 1)
    run("train", "digits", "--data", image_folder, *TEACH[2:], "--sample-every", 2, "--out", out["teacher"])
    run("distill", "digits", "--teacher", out["teacher"], "--data", image_folder, *common, "--out", out["student"])
    run("rl", "digits", "--student", out["student"], "--classifier", out["classifier"], *common, "--eval-images", 8,
        "--out", out["aligned"])  # fmt: skip
    for name in ("teacher", "student", "aligned"):
        model = Pipeline.load(out[name])
        assert model.class_names == ["cat", "dog"]
        assert (model.student is None) == (name == "teacher")
        assert model.sample(["dog"]).shape == (1, 8, 8, 3)
        meta = json.loads((out[name] / "meta.json").read_text())
        assert (meta["step"], meta["config"]["steps"]) == (2, 2)
        with Image.open(out[name] / "samples" / "step-000002.png") as grid:
            assert grid.size[1] > 4 * 64
        assert len((out[name] / "metrics.jsonl").read_text().splitlines()) >= 1


def test_rl_says_which_update_it_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "my_rewards.py"
    file.write_text(
        "def bright(images, prompts):\n    return images.mean((1, 2, 3))\nbright.differentiable = True\n"
        "def dark(images, prompts):\n    return -bright(images, prompts)\n"
    )
    common = ["--student", tiny.student(), "--reward", f"{file}:bright", "--anchor", 0, "--gsim.lr", 3e-3, "--ema", 0.5]
    common += ["--steps", 2, "--batch", 8, "--ar-steps", 4, "--eval-images", 8, "--sample-every", 0, "--collapse", 0]
    for name, more, said in (
        ("bright", [], ", best of update 2"),
        ("dark", ["--held-out", f"{file}:dark"], " is the one given: no update was better"),
    ):
        run("rl", "digits", *common, *more, "--out", tmp_path / name)
        assert capsys.readouterr().out == f"aligned student in {tmp_path / name}{said}\n"


def test_sample_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sample = ["sample", "--model", tiny.teacher(), "--classes", "3,7", "--num-images", 5, "--seed", 4]
    run(*sample, "--out", tmp_path / "a")
    assert capsys.readouterr().out == f"5 images, grid.png and samples.npz in {tmp_path / 'a'}\n"
    names = ["0000_3.png", "0001_7.png", "0002_3.png", "0003_7.png", "0004_3.png"]
    assert sorted(os.listdir(tmp_path / "a")) == [*names, "grid.png", "samples.npz"]
    with np.load(tmp_path / "a" / "samples.npz") as file:
        images, labels = file["images"], file["labels"]
    assert images.shape == (5, 8, 8, 1)
    assert images.dtype == np.uint8
    assert labels.tolist() == [3, 7, 3, 7, 3]
    for name, image in zip(names, images, strict=True):
        with Image.open(tmp_path / "a" / name) as png:
            assert np.array_equal(np.asarray(png), image[..., 0])
    assert np.array_equal(images, Pipeline.load(tiny.teacher()).sample([3, 7], num_images=5, seed=4))

    run(*sample, "--out", tmp_path / "b", "--batch-size", 2)
    with np.load(tmp_path / "b" / "samples.npz") as file:
        assert np.array_equal(file["images"], images)

    run("sample", "--model", tiny.student(), "--out", tmp_path / "all", "--order", "raster", "--ar-steps", 16)
    with np.load(tmp_path / "all" / "samples.npz") as file:
        assert file["labels"].tolist() == list(range(10))
    run("sample", "--model", tiny.student(), "--out", tmp_path / "none", "--classes", "none")
    assert (tmp_path / "none" / "0000_none.png").exists()


def test_import_mar(tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint = shared / "golden" / "mar_tiny" / "checkpoint-last.pth"
    run("import-mar", checkpoint, "--heads", 4, "--out", tmp_path / "ema")
    assert "(ema), 16 tokens of 16" in capsys.readouterr().out
    run("import-mar", checkpoint, "--heads", 4, "--weights", "raw", "--out", tmp_path / "raw")
    ema, raw = (load_file(tmp_path / name / "model.safetensors") for name in ("ema", "raw"))
    assert ema.keys() == raw.keys()
    assert any(not ema[name].equal(raw[name]) for name in ema)
    tokens = Pipeline.load(tmp_path / "ema").sample_tokens([4], seed=1, ar_steps=2, head_steps=3)
    assert tokens.shape == (1, 16, 16)
    assert tokens.isfinite().all()

    err = tiny.refused(capsys, "import-mar", checkpoint, "--preset", "mar-b", "--out", tmp_path / "b")
    assert "mar_tiny/checkpoint-last.pth" in err
    assert "preset" in err
    err = tiny.refused(capsys, "import-mar", checkpoint, "--out", tmp_path / "b")
    assert "--preset" in err
    assert "--heads" in err
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(checkpoint.read_bytes()[:5000])
    assert "damaged.pth" in tiny.refused(capsys, "import-mar", damaged, "--heads", 4, "--out", tmp_path / "b")
    assert not written(tmp_path / "b")


def test_a_closed_pipe_is_no_error():
    """As `marval --help | head -n 0` would."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "marval", "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_interrupt_says_how_to_go_on(tmp_path: Path):
    args = [*TEACH, "--steps", 100000, "--log-every", 1, "--out", tmp_path / "run"]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs of a shell ignore it
    with tiny.start(args, preexec_fn=heed) as process:
        tiny.wait_for(tmp_path / "run" / "metrics.jsonl", process)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert err.splitlines()[-1].endswith("stopped; a run goes on from its last checkpoint with --resume")
    assert "Traceback" not in err


@pytest.mark.parametrize("line", ["loading", "open http://"])
def test_an_interrupt_ends_the_demo(line):
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with tiny.start(["demo", "digits/student", "--port", 0], preexec_fn=heed) as process:
        assert any(said.startswith(line) for said in process.stdout)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
    assert (process.returncode, err) == (0, "")


# ---- what they refuse: exit code 2, one line on stderr that names the value and the remedy, nothing written


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["tarin"], ["no such verb", "'train'"]),
        (["train"], ["name a recipe first", "digits"]),
        (["distill", "--out", "x"], ["name a recipe first", "digits"]),
        (["train", "digist"], ["unknown recipe 'digist'", "'digits'"]),
        (["train", "digits", "--step", "3", "--out", "x"], ["unknown flag --step ", "'--steps'", "--help"]),
        (["sample", "--modle", "m", "--out", "x"], ["unknown flag --modle", "'--model'"]),
        (["train", "digits"], ["--out"]),
        (["train", "digits", "--steps", "many", "--out", "x"], ["train: --steps 'many' is no integer; see marval"]),
        (["train", "digits", "--model.grid", "9", "--out", "x"], ["model.grid is 4 by data", "leave --model.grid out"]),
        (["train", "digits", "--processes", "2", "--out", "x"], ["--processes is for --dry-run", "torchrun"]),
        (["train", "digits", "--steps", "0", "--out", "x"], ["steps must be at least 1", "got 0"]),
        (["train", "digits", "--device", "tpu", "--out", "x"], ["'tpu'", "cpu or cuda"]),
        (["train", "digits", "--data", "nowhere", "--out", "x"], ["'nowhere' does not exist", "sub-folder per class"]),
        (["train", "digits", "--patch-size", "3", "--out", "x"], ["8", "multiple", "3"]),
        (["train", "digits", "--model.width", "30", "--out", "x"], ["30", "multiple", "4"]),
        (["train", "digits", "--sampling.ar-steps", "17", "--out", "x"], ["17", "16"]),
        (["distill", "digits", "--teacher", "nowhere", "--out", "x"], ["'nowhere' does not exist", "model's folder"]),
        (["distill", "digits", "--student.t-init", "2000", "--out", "x"], ["distill: t_init must be in", "2000"]),
        (["rl", "digits", "--student", "nowhere", "--out", "x"], ["'nowhere' does not exist", "model's folder"]),
        (["train", "digits", "--patch-size", "0", "--out", "x"], ["patch_size must be at least 1", "0"]),
        (["train", "digits", "--seed", "-1", "--out", "x"], ["seed must not be negative", "-1"]),
        (["bench", "--model", "nowhere", "--batch", "1;2"], ["--batch '1;2' must be numbers separated by commas"]),
        (["train-classifier", "--data", "nowhere", "--out", "x"], ["'nowhere' does not exist"]),
        (["train-classifier", "--data", "digits", "--epochs", "0", "--out", "x"], ["epochs 0"]),
        (["import-mar", "nowhere.pth", "--heads", "2", "--out", "x"], ["nowhere.pth does not exist"]),
        (["quickstart", "--num-images", "5", "--out", "x"], ["num_images", "100", "5"]),
        (["quickstart", "--train.seed", "5", "--out", "x"], ["quickstart: --train.seed 5", "give --seed 5"]),
        (["quickstart", "--distill.seed", "5", "--seed", "6", "--out", "x"], ["--distill.seed 5", "give --seed 5"]),
        (["quickstart", "--rl.seed", "5", "--out", "x"], ["--rl.seed 5", "give --seed 5"]),
        (["quickstart", "--rl.classifier", "net", "--out", "x"], ["--rl.classifier net: ", "marval rl"]),
        (["quickstart", "--rl.judge", "net", "--out", "x"], ["--rl.judge net: ", "marval rl"]),
        (["quickstart", "--train.data", "mine", "--out", "x"], ["--train.data mine: ", "marval train"]),
        (["quickstart", "--distill.data", "mine", "--out", "x"], ["--distill.data mine: ", "marval distill"]),
    ],
)
def test_refused_settings(
    args: list[str], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    err = tiny.refused(capsys, *args)
    for part in parts:
        assert part in err
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("model", "args", "parts"),
    [
        ("teacher", ["--classes", "3,eleven"], ["unknown class 'eleven'", "[0, 9]"]),
        ("teacher", ["--classes", "10"], ["unknown class '10'", "[0, 9]"]),
        ("teacher", ["--classes", ","], ["names no class", "all or none"]),
        ("teacher", ["--ar-steps", "17"], ["17", "16"]),
        ("teacher", ["--ar-steps", "0"], ["at least 1", "0"]),
        ("teacher", ["--head-steps", "1001"], ["1001", "1000"]),
        ("teacher", ["--evaluations", "2"], ["evaluations 2 is for students"]),
        ("student", ["--evaluations", "3"], ["evaluations must be 1 for this student, got 3"]),
        ("teacher", ["--guidance", "-1"], ["guidance must not be negative", "-1"]),
        ("teacher", ["--order", "spiral"], ["'spiral'", "raster"]),
        ("teacher", ["--temperature", "nan"], ["temperature", "nan"]),
        ("teacher", ["--num-images", "0"], ["at least 1", "0"]),
        ("teacher", ["--batch-size", "0"], ["batch size must be at least 1", "0"]),
        ("teacher", ["--batch-size", "-1"], ["batch size must be at least 1", "-1"]),
        ("teacher", ["--seed", "-1"], ["seed", "-1"]),
        ("student", ["--guidance", "3"], ["1.5", "3.0", "guidance range"]),
        ("student", ["--solver", "euler"], ["euler"]),
    ],
)
def test_refused_sampling(
    model: str, args: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):  # fmt: skip
    err = tiny.refused(capsys, "sample", "--model", getattr(tiny, model)(), "--out", tmp_path / "out", *args)
    for part in parts:
        assert part in err
    assert not written(tmp_path / "out")


def missing(file: Path) -> None:
    tensors = load_file(file)
    del tensors["mask_token"]
    save_file(tensors, file)


def extra(file: Path) -> None:
    tensors = load_file(file)
    save_file({**tensors, "surplus": tensors["mask_token"].clone()}, file)


def misshapen(file: Path) -> None:
    tensors = load_file(file)
    tensors["mask_token"] = tensors["mask_token"][..., :-1].contiguous()
    save_file(tensors, file)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (missing, ["'mask_token' is missing"]),
        (extra, ["unexpected tensor 'surplus'"]),
        (misshapen, ["'mask_token' has shape [1, 1, 31], expected [1, 1, 32]", "config.json"]),
        (truncated, ["not a whole safetensors file", "again"]),
        (Path.unlink, ["does not exist", "complete model folder"]),
    ],
)
def test_refused_weights(
    damage: Callable[[Path], None], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):  # fmt: skip
    model = tmp_path / "model"
    shutil.copytree(tiny.teacher(), model)
    damage(model / "model.safetensors")
    for args in (["sample", "--model", model], ["distill", "digits", "--teacher", model]):
        err = tiny.refused(capsys, *args, "--out", tmp_path / "out")
        for part in [str(model / "model.safetensors"), *parts]:
            assert part in err
    assert not written(tmp_path / "out")


def test_refused_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tmp_path / "model"
    shutil.copytree(tiny.teacher(), model)
    whole = json.loads((model / "config.json").read_text())
    for damage in ({"format": 99}, {"class_names": ["a"]}, {"tokenizer": {"kind": "words"}}, {"model": {"widht": 3}}):
        (model / "config.json").write_text(json.dumps({**whole, **damage}))
        assert str(model / "config.json") in tiny.refused(capsys, "sample", "--model", model, "--out", tmp_path / "out")
    (model / "config.json").write_text("{")
    assert "cannot be read as JSON" in tiny.refused(capsys, "sample", "--model", model, "--out", tmp_path / "out")
    assert not written(tmp_path / "out")


def corrupt_jpeg(folder: Path) -> Path:
    path = folder / "bad.jpg"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    return path


def deep_png(folder: Path) -> Path:
    path = folder / "bad.png"
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(path)
    return path


def palette_png(folder: Path) -> Path:
    path = folder / "bad.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).quantize(4).save(path)
    return path


def oblong_png(folder: Path) -> Path:
    path = folder / "bad.png"
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(path)
    return path


def no_images(folder: Path) -> Path:
    for path in folder.iterdir():
        path.unlink()
    return folder


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (corrupt_jpeg, ["replace or remove it"]),
        (deep_png, ["more than 8 bits", "save it with 8 bits"]),
        (palette_png, ["palette", "convert it to RGB"]),
        (oblong_png, ["not square", "--image-size"]),
        (no_images, ["has no images", "remove it"]),
    ],
)
def test_refused_images(
    damage: Callable[[Path], Path], parts: list[str], tmp_path: Path, image_folder: Path,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    bad = damage(image_folder / "dog")
    for args in ([*TEACH, "--data"], ["train-classifier", "--data"]):
        err = tiny.refused(capsys, *args, image_folder, "--out", tmp_path / "out")
        for part in [str(bad), *parts]:
            assert part in err
    assert not written(tmp_path / "out")


def test_refused_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, full = tmp_path / "file", tmp_path / "full"
    file.write_text("mine")
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    verbs = {
        "train": TEACH,
        "distill": ["distill", "digits", "--teacher", tiny.teacher()],
        "rl": ["rl", "digits", "--student", tiny.student(), "--classifier", tiny.classifier()],
        "sample": ["sample", "--model", tiny.teacher()],
        "train-classifier": ["train-classifier", "--data", "digits", "--epochs", 1],
        "quickstart": ["quickstart"],
    }
    for verb, args in verbs.items():
        for out, remedy in ((full, "choose another --out"), (file, "--out"), (file / "x", "choose another --out")):
            err = tiny.refused(capsys, *args, "--out", out)
            assert err.startswith(f"marval {verb}: ")
            assert str(out) in err
            assert remedy in err, err
    assert file.read_text() == "mine"
    assert os.listdir(full) == ["mine.txt"]
    evaluate = ["evaluate", "--model", tiny.student(), "--reference", "digits", "--features", tiny.classifier()]
    assert "exists" in tiny.refused(capsys, *evaluate, "--out", full / "mine.txt")
    assert str(file) in tiny.refused(capsys, *evaluate, "--out", file / "results.json")
    bench = ["bench", "--model", tiny.student(), "--repeats", 1, "--json"]
    assert str(file) in tiny.refused(capsys, *bench, file / "x")
    assert "exists: choose another --json" in tiny.refused(capsys, *bench, file)


def test_where_an_error_came_from():
    """One line, or with MARVAL_TRACEBACK the whole way."""
    for value, ways in (("", 0), ("1", 1)):
        environment = {**tiny.environment(), "MARVAL_TRACEBACK": value}
        with tiny.start(["sample", "--model", "nowhere", "--out", "x"], env=environment) as process:
            err = process.communicate(timeout=60)[1]
        assert err.count("Traceback") == ways
        assert "model 'nowhere' does not exist" in err


@pytest.mark.parametrize("size", [1 << 10, 1 << 17])
@pytest.mark.parametrize("verb", ["train", "import-mar"])
def test_a_full_disk(size: int, verb: str, tmp_path: Path, request: pytest.FixtureRequest):
    """No file may grow past a limit: before the run's first file, or in the middle of its checkpoint or weights."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    args = [*TEACH, "--model.width", 64, "--sample-every", 0]
    if verb == "import-mar":
        checkpoint = request.getfixturevalue("shared") / "golden" / "mar_tiny" / "checkpoint-last.pth"
        args = [verb, checkpoint, "--heads", 4]
    with tiny.start([*args, "--out", tmp_path / "out"], preexec_fn=limit) as process:
        err = process.communicate(timeout=120)[1]
    lines = [line for line in re.split(r"[\r\n]+", err) if line and "it/s" not in line]
    assert process.returncode == 2, err
    assert len(lines) == 1, err
    assert str(tmp_path) in lines[0]
    left = [path.name for path in written(tmp_path) if path.is_file()]
    assert set(left) <= {"meta.json", "metrics.jsonl"}, left


def test_refused_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    evaluate = ["evaluate", "--model", tiny.student(), "--features", tiny.classifier(), "--out", tmp_path / "out.json"]
    empty = tmp_path / "empty"
    empty.mkdir()
    np.savez(tmp_path / "other.npz", things=np.zeros(3))
    np.savez(tmp_path / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "oblong.npz", mu=np.zeros(64), sigma=np.zeros((64, 3)))
    whole = (tmp_path / "other.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for reference in ("nowhere", "empty", "other.npz", "small.npz", "oblong.npz", "cut.npz"):
        err = tiny.refused(capsys, *evaluate, "--num-images", 10, "--reference", tmp_path / reference)
        assert ("features" if reference == "small.npz" else str(tmp_path / reference)) in err, err
    err = tiny.refused(capsys, *evaluate, "--num-images", 1, "--reference", "digits")
    assert "at least 2 images, got 1" in err
    assert not (tmp_path / "out.json").exists()


def test_a_header_that_claims_too_much_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tmp_path / "model"
    shutil.copytree(tiny.student(), model)
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    assert "safetensors" in tiny.refused(capsys, "bench", "--model", model, "--repeats", 1)


def test_evaluate_writes_its_protocol(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "results.json"
    main(["evaluate", "--model", str(tiny.student()), "--reference", "digits", "--features", str(tiny.classifier()),
          "--num-images", "30", "--out", str(out)])  # fmt: skip
    results = json.loads(out.read_text())
    assert results["fid"] > 0
    assert 0 <= results["accuracy"] <= 1
    assert results["protocol"]["num_images"] == 30
    assert f"{results['fid']:.4f}" in capsys.readouterr().out


def test_an_order_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sample = ["sample", "--model", str(tiny.student()), "--classes", "3"]
    raster = ",".join(map(str, range(16)))
    main([*sample, "--order", raster, "--out", str(tmp_path / "a")])
    main([*sample, "--order", "raster", "--out", str(tmp_path / "b")])
    assert (tmp_path / "a" / "grid.png").read_bytes() == (tmp_path / "b" / "grid.png").read_bytes()
    capsys.readouterr()
    assert "position 1 occurs 2 times" in tiny.refused(
        capsys, *sample, "--order", "0,1,1," + raster[6:], "--out", tmp_path / "c"
    )
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(given, expected):
    code = "import os, sys; from marval.__main__ import main; main(); print(os.environ.get('GOMP_SPINCOUNT'))"
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code, "--help"], env=env | given, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == expected
    library = code.replace("main()", "main(['--help'])")
    done = subprocess.run([sys.executable, "-c", library], env=env | given, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == given.get("GOMP_SPINCOUNT", "None")
