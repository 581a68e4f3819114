"""The GPU suite at its smallest size on the CPU: every stage runs, errors and limits are recorded."""

import json
import time
from types import ModuleType

import pytest
import tiny
import torch


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    return tiny.benchmark("gpu_suite")


def test_every_stage(suite, tmp_path, capsys):
    found = suite.main(["--out", str(tmp_path / "found.json"), "--preset", "tiny", "--device", "cpu"])
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(found))
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert not [stage for stage in stages.values() if "error" in stage]
    assert len(capsys.readouterr().out.splitlines()) == len(found["stages"])
    drawn = [stage for stage in stages.values() if "model" in stage]
    assert {stage["model"] for stage in drawn} == {"teacher", "student"}
    for stage in drawn:
        assert stage["measurements"] >= 1
        assert stage["over_floor"] > 0.1  # above 1 on a quiet machine, but the rates are measured at another moment
        assert 0 < stage["transformer_matmul_share"] < 10
    for verb in ("train", "distill head", "distill all", "rl"):
        assert stages[f"tiny {verb}"]["tokens_per_second"] > 0
        assert stages[f"tiny {verb}"]["operations_per_update"] > 0
    most, least = (stages[f"tiny distill {part}"]["operations_per_update"] for part in ("all", "head"))
    assert most > 1.3 * least
    assert stages["same tokens, bf16"]["errors"]["student"]["median"] < 0.05


def test_plans_for_a_gpu_what_a_cpu_has_not(suite, tmp_path):
    full = suite.Suite(tmp_path / "x.json", torch.device("cuda"), suite.FULL, 9) if torch.cuda.is_available() else None
    if full is None:  # what does not touch the device
        full = suite.Suite(tmp_path / "x.json", torch.device("cpu"), suite.FULL, 9)
        full.device = torch.device("cuda")
    names = [name for name, _, _ in suite.stages(full, None)]
    assert len(names) == len(set(names))
    assert "mar-b student bf16+graphs batch 1 K 256" in names
    assert "mar-h student bf16+graphs batch 1 K 64" in names
    assert "same tokens, float32+graphs" in names


def test_errors_and_limits_are_recorded(suite, tmp_path, capsys):
    one = suite.Suite(tmp_path / "found.json", torch.device("cpu"), suite.TINY, 1)

    def fails() -> dict[str, object]:
        raise RuntimeError("no kernel image")

    def hangs() -> dict[str, object]:
        time.sleep(5)
        return {}

    one.run("fails", fails, 10)
    one.run("hangs", hangs, 1.1)
    one.run("works", lambda: {"seconds_per_image": 1.0}, 10)
    one.end = time.perf_counter()
    one.run("late", hangs, 10)
    written = json.loads((tmp_path / "found.json").read_text())["stages"]
    assert [stage.get("error") for stage in written] == [
        "RuntimeError: no kernel image", "TooLong: more than 1 s", None, None,
    ]  # fmt: skip
    assert written[3]["skipped"] == "no time left"
    assert "seconds_per_image 1" in capsys.readouterr().out


def test_stages_again(suite, tmp_path, capsys):
    """They join an earlier file, or replace what it has, if they succeed."""
    words = ["--out", str(tmp_path / "found.json"), "--preset", "tiny", "--device", "cpu"]
    suite.main([*words, "--stages", "golden", "tiny train"])
    before = json.loads((tmp_path / "found.json").read_text())["stages"]
    assert [stage["stage"] for stage in before] == ["rates", "tiny train", "golden"]
    with pytest.raises(SystemExit):
        suite.main(words)
    assert "found.json exists: name --stages to measure again" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        suite.main([*words, "--stages", "tiny sleep"])
    assert "--stages 'tiny sleep' is none of rates," in capsys.readouterr().err
    with pytest.raises(SystemExit):
        suite.main(["--preset", "full", *words[:2], *words[4:], "--stages", "rates"])
    assert "found.json was measured with sizes" in capsys.readouterr().err
    suite.main([*words, "--stages", "tiny train", "same tokens, bf16"])
    after = json.loads((tmp_path / "found.json").read_text())["stages"]
    assert [stage["stage"] for stage in after] == ["rates", "same tokens, bf16", "tiny train", "golden"]
    assert after[2] != before[1]
    assert after[3] == before[2]
    suite.main([*words, "--stages", "tiny train", "--minutes", "0"])  # no time: what was measured stays
    assert json.loads((tmp_path / "found.json").read_text())["stages"][1:] == after[1:]
