"""The ablation of the distillation at its smallest size: variants differ in one setting, rows are kept, the page."""

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny
from PIL import Image

from marval import recipes
from marval.checkpoint import read_json
from marval.config import DistillConfig, to_dict

QUICK = "real_pictures", "results_page", "distill_ablation"


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    return tiny.benchmark("distill_ablation")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.study(tmp_path_factory.mktemp("models"))


@pytest.fixture
def quick(ablation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in QUICK:
        monkeypatch.setattr(sys.modules[name], "QUICK", tmp_path)
    return tmp_path / "distill_ablation_digits.json"


def flat(config: DistillConfig) -> dict[str, object]:
    values = to_dict(config)
    for part in ("gsim", "student"):
        values |= {f"{part}.{name}": value for name, value in values.pop(part).items()}
    return values


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_each_variant_changes_one_setting_of_the_recipe(ablation, name):
    base = recipes.DISTILL[name]()
    axes = ablation.axes(base)
    named = {
        "lambda of L2": {"gsim.lam"}, "distance": {"gsim.distance"},
        "trained": {"trained", "auxiliary", "context_updates"}, "auxiliary updates": {"gsim.auxiliary_updates"},
        "t_init": {"student.t_init"}, "t_max": {"gsim.t_range"}, "contexts": {"rollout"},
        "mask ratios": {"mask_ratios"}, "updates": {"steps"},
        "guidance": {"student.guidance", "student.guidance_range"},
    }  # fmt: skip
    assert named.keys() == axes.keys()
    for axis, values in axes.items():
        assert base in values.values(), f"the recipe's own value of {axis} is not among those that are tried"
        assert len(set(values.values())) == len(values)
        for config in values.values():
            assert {key for key, value in flat(config).items() if value != flat(base)[key]} <= named[axis]
    assert [config.gsim.lam for config in axes["lambda of L2"].values()] == [1, 0.5, 0, -0.4]
    alone = [config.student.guidance for config in axes["guidance"].values() if not config.student.guidance_range]
    assert alone == [1, 2, 3]


def test_run_resume_page(ablation, models, quick, capsys, monkeypatch):
    run = ["run", "digits", str(models), "--quick", "--axes", "lambda of L2,guidance,updates"]
    ablation.main([*run, "--seeds", "0"])
    assert "12 rows are missing: about" in capsys.readouterr().out
    first = read_json(quick)
    assert list(first["rows"]) == [
        "teacher/0", "untrained/0", "recipe/0", "lambda of L2: 1/0", "lambda of L2: 0.5/0", "lambda of L2: 0/0",
        "guidance: w = 1 alone/0", "guidance: w = 2 alone/0", "guidance: w = 3 alone/0", "updates: 1/0", "updates: 2/0",
        "updates: 8/0",
    ]  # fmt: skip
    assert list(first["rows"]["recipe/0"]["values"]) == ["1", "2", "3"]
    assert list(first["rows"]["guidance: w = 3 alone/0"]["values"]) == ["3"]
    assert first["rows"]["updates: 8/0"]["cpu_seconds"] > 0
    assert first["rows"]["lambda of L2: 1/0"]["values"] != first["rows"]["lambda of L2: 0/0"]["values"]
    written = quick.read_bytes()
    ablation.main([*run, "--seeds", "0"])
    assert quick.read_bytes() == written, "what is there is not done again"

    ablation.main([*run[:-1], "updates", "--seeds", "1"])
    assert "recipe/1" in read_json(quick)["rows"]
    ablation.main(["page", "--quick"])
    page = (quick.parent / "results.md").read_text()
    ablation.main(["page", "--quick"])
    assert (quick.parent / "results.md").read_text() == page
    assert "| lambda of L2 | **-0.4** | 2 |" in page
    assert "| guidance | w = 3 alone | 3 |" in page
    assert "mask ratios | training" not in page, "not measured, not shown"
    assert "Below the recipe in every seed" in page
    assert str(models) not in page + quick.read_text()
    assert np.asarray(Image.open(quick.parent / "images" / "results_ablation_digits.png")).std() > 10

    with pytest.raises(ValueError, match="unknown axis 'lambda': choose of lambda of L2, distance"):
        ablation.main([*run[:-1], "lambda"])
    changed = dataclasses.replace(recipes.DISTILL["digits"](), ema=0.5)
    monkeypatch.setitem(recipes.DISTILL, "digits", lambda: changed)
    with pytest.raises(ValueError, match=r"distill_ablation_digits.json was measured with recipe = "):
        ablation.main(run)


def test_what_is_better_than_the_recipe(ablation):
    def row(seed: int, classifier: float, judge: float) -> dict[str, object]:
        values = {"fid_classifier_train": classifier, "fid_judge_train": judge}
        return {"seed": seed, "values": {"2": values}}

    rows = {
        "recipe/0": row(0, 2.0, 1.0), "recipe/1": row(1, 3.0, 2.0), "a/0": row(0, 1.9, 0.9), "a/1": row(1, 2.9, 1.9),
        "b/0": row(0, 1.0, 0.5), "b/1": row(1, 1.0, 2.1), "c/0": row(0, 0.1, 0.1),
    }  # fmt: skip
    names = {"axis": {name: name for name in ("recipe", "a", "b", "c")}}
    results = {"rows": rows, "axes": names, "protocol": {"recipe": {"student": {"guidance": 2.0}}}}
    assert ablation.better(results).endswith("features: a.")
    assert json.dumps(results)
