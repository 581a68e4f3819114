"""A killed run, resumed, ends in the same bytes as one that was left alone."""

import functools
import json
import shutil
import signal
from pathlib import Path

import pytest
import tiny

from marval.__main__ import main
from marval.checkpoint import load_state, save_state

COMMON = ["--steps", 40, "--batch", 16, "--save-every", 8, "--log-every", 1, "--sample-every", 0]
MODEL = ["--model.width", 32, "--model.depth", 1, "--model.heads", 2, "--model.head-width", 32, "--model.dropout", 0.2]


def command(verb: str, out: Path) -> list[str]:
    """A run of 40 updates that saves at every 8th and uses all that a resume must bring back."""
    curve = ["--eval-every", 8, "--eval-images", 20, "--features", tiny.classifier(), "--patience", 5]
    args: list[object] = {
        "train": [*MODEL, "--sampling.head-steps", 5, "--shift", 1, *curve],
        "distill": ["--teacher", tiny.teacher(), "--ar-steps", 4, "--rollout", 0.5, "--trained", "all",
                    "--context-updates", 4, *curve],
        "rl": ["--student", tiny.student(), "--classifier", tiny.classifier(), "--judge", tiny.classifier(),
               "--ar-steps", 4, "--eval-every", 8, "--eval-images", 20, "--patience", 0],
    }[verb]  # fmt: skip
    return [str(arg) for arg in (verb, "digits", *COMMON, *args, "--out", out)]


@functools.cache
def finished(verb: str) -> Path:
    """The folder of the run that nothing interrupted."""
    out = tiny.folder(f"finished-{verb}")
    main(command(verb, out))
    return out


def same(a: Path, b: Path) -> None:
    """All that a run leaves is equal bit for bit, but for what tells the time."""
    files = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
    for name in files:
        if name.suffix in (".safetensors", ".jsonl") or name == Path("config.json"):
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert {Path("model.safetensors"), Path("metrics.jsonl"), Path("config.json")} < set(files)


@pytest.mark.parametrize("verb", ["train", "distill", "rl"])
def test_killed_and_resumed(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    args = command(verb, out)
    with tiny.start(args) as process:
        tiny.wait_for(out / "checkpoint.pt", process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed: give it more updates"
    assert json.loads((out / "meta.json").read_text())["step"] < 40
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # as a process that dies within a write leaves it

    assert "add --resume to go on, or choose another --out" in tiny.refused(capsys, *args)
    assert "steps = 40, not 41: resume with the same settings" in tiny.refused(capsys, *args, "--resume", "--steps", 41)
    other = "train" if verb != "train" else "distill"
    err = tiny.refused(capsys, *command(other, out), "--resume")
    assert f"holds a run of `marval {verb}`, not of `marval {other}`" in err

    whole = (out / "checkpoint.pt").read_bytes()
    (out / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    err = tiny.refused(capsys, *args, "--resume")
    assert f"{out / 'checkpoint.pt'} cannot be read" in err
    assert "damaged" in err
    (out / "checkpoint.pt").write_bytes(whole)

    main([*args, "--resume"])
    same(out, finished(verb))


@pytest.mark.parametrize("verb", ["train", "distill", "rl"])
def test_killed_before_the_first_checkpoint(verb: str, tmp_path: Path):
    shutil.copytree(finished(verb), tmp_path / "run")
    for name in ("checkpoint.pt", "model.safetensors", "config.json"):
        (tmp_path / "run" / name).unlink()
    main([*command(verb, tmp_path / "run"), "--resume"])
    same(tmp_path / "run", finished(verb))


@pytest.mark.parametrize("verb", ["train", "distill", "rl"])
def test_resume_of_a_finished_run_changes_nothing(verb: str):
    out = finished(verb)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    main([*command(verb, out), "--resume"])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_resume_of_a_run_that_stopped_early_changes_nothing(tmp_path: Path):
    """With a learning rate of zero no evaluation is better than the first."""
    args = [*command("rl", tmp_path / "run"), "--gsim.lr", "0", "--patience", "1", "--anchor", "0"]
    main(args)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert json.loads(before["meta.json"])["step"] == 8
    main([*args, "--resume"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_settings_that_an_earlier_version_did_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Are their defaults, nested ones too."""
    shutil.copytree(finished("distill"), tmp_path / "run")
    meta = json.loads((tmp_path / "run" / "meta.json").read_text())
    del meta["config"]["student"]["evaluations"], meta["config"]["class_drop"]
    (tmp_path / "run" / "meta.json").write_text(json.dumps(meta))
    main([*command("distill", tmp_path / "run"), "--resume"])
    line = tiny.refused(capsys, *command("distill", tmp_path / "run"), "--resume", "--student.evaluations", 2)
    assert "was started with student = " in line


def test_a_checkpoint_of_another_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As of the first marval, whose auxiliary had a backbone: one line that names the file."""
    shutil.copytree(finished("distill"), tmp_path / "run")
    file = tmp_path / "run" / "checkpoint.pt"
    state = load_state(file)
    state["auxiliary"] = state["student"]
    save_state(file, state)
    line = tiny.refused(capsys, *command("distill", tmp_path / "run"), "--resume")
    assert f"{file}: the weights of its auxiliary have other names than this version's" in line
