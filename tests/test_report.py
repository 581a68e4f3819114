"""The HTML report: every number, no outside resource, hostile strings, the same bytes twice, missing files."""

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from marval.report import write_report
from marval.shipped import MODELS

pytest.importorskip("matplotlib")
HOSTILE = "<script>alert('x')</script>\"&{{title}}"
STEPS = 3


def row(base: float) -> dict[str, float]:
    """One model's results; every number is different."""
    return {
        "fid": base + 0.012, "fid_heldout_features": base + 0.034, "accuracy": 0.9 - base / 10,
        "accuracy_heldout": 0.8 - base / 10, "reward": -base - 0.056, "seconds_per_image_batch1": base / 10,
        "seconds_per_image_batch256": base / 1000, "head_evaluations_per_token": round(100 * base), "ar_steps": STEPS,
        "num_images": 4321,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The files of a finished quickstart, with a hostile string wherever a string may be."""
    results = {
        "teacher": row(1), "student": row(2), "aligned": row(0.5),
        "one_step_untrained": {"fid": 9.876, "accuracy": 0.111},
        "fid_floor": 0.123, "speedup_batch1": 31.2, "speedup_batch256": 0.456,
        "settings": {
            "seed": 7, "guidance": 1.5, "features": f"features {HOSTILE}", "protocol": f"protocol {HOSTILE}",
            "stages": {"train": {"model": {HOSTILE: 64}, "class_names": [HOSTILE]}, HOSTILE: {"steps": 5}},
            "seconds": {"train": 90.0, "distill": 30.0},
        },
        "versions": {"marval": "0.0.9", "torch": HOSTILE, "python": "3", "platform": HOSTILE, "threads": 2},
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(results))
    rows: dict[str, list[dict[str, Any]]] = {
        "teacher": [{"step": i, "loss": 1 / i, "mse": 0.9 / i, "vb": -0.1, "grad_norm": 2.0} for i in range(1, 400)],
        "student": [{"step": i, "student_loss": -1.0, "y": float("nan")} for i in range(1, 4)],
        "aligned": [{"step": 1, "reward": -1.0}, {"step": 2, "reward_heldout": -2.0, "brightness": 0.5}],
    }
    for model in MODELS:
        (tmp_path / model).mkdir()
        (tmp_path / model / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[model]))
    rng = np.random.default_rng(0)
    visible = np.arange(16).reshape(4, 4) < 5 * np.arange(STEPS + 1)[:, None, None]
    arrays = {name: rng.integers(0, 256, (100, 8, 8, 1), dtype=np.uint8) for name in ("real", *MODELS)}
    for model in ("teacher", "student"):
        arrays[f"{model}_trace"] = rng.integers(0, 256, (STEPS + 1, 10, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", trace_visible=visible[:, None].repeat(10, axis=1), **arrays)  # pyright: ignore
    return tmp_path


class Page(HTMLParser):
    """Table cells, settings, tags and links of a page; closing tags must match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.links: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag in self.open[-1:]:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-")


def test_every_number_and_verdict_is_on_the_page(run: Path) -> None:
    page = Page(write_report(run).read_text())
    assert page.open == []
    cells = page.texts["td"]
    rows = dict(zip(page.texts["th"][10:], [cells[i : i + 9] for i in range(0, 36, 9)], strict=True))
    assert rows == {
        "teacher": ["1.012", "1.034", "80.0 %", "70.0 %", "-1.056", "100", "1.00", "100", "3"],
        "one step, untrained": ["9.876", "-", "11.1 %", *["-"] * 6],
        "student": ["2.012", "2.034", "70.0 %", "60.0 %", "-2.056", "200", "2.00", "200", "3"],
        "aligned": ["0.512", "0.534", "85.0 %", "75.0 %", "-0.556", "50.0", "0.500", "50", "3"],
    }
    summary = " ".join(page.texts["p"])
    for part in (
        "31.2 times", "0.456 times", "floor 0.123", "4,321", "from 1.012 to 2.012 (worse)",
        "from 70.0 % to 60.0 % (worse)", "from 2.012 to 0.512 (better)", "from -2.056 to -0.556 (better)",
    ):  # fmt: skip
        assert part in summary
    settings = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert [settings[name] for name in ("train", "guidance", "marval")] == ["90.0", "1.5", "0.0.9"]


def test_a_student_that_is_no_better_is_not_praised(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    results |= {"student": results["teacher"], "speedup_batch1": 0.9}
    (run / "results.json").write_text(json.dumps(results))
    summary = Page(write_report(run).read_text()).texts["p"][0]
    assert "0.900 times the teacher's speed, so no faster," in summary
    assert "from 1.012 to 1.012 (unchanged)" in summary


def test_nothing_is_loaded_from_outside(run: Path) -> None:
    text = write_report(run).read_text()
    assert "http" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#|\$)", text)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in Page(text).links)


def test_strings_are_escaped(run: Path) -> None:
    text = write_report(run).read_text()
    page = Page(text)
    assert page.count["script"] == 1
    assert f"features {HOSTILE}" in page.texts["p"][1]
    assert page.texts["p"][2] == f"protocol {HOSTILE}"
    assert f"model.{HOSTILE}" in page.texts["dt"]
    assert HOSTILE in page.texts["h3"]


def test_same_files_same_bytes_and_unique_ids(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    ids = re.findall(r'\bid="([^"]*)"', first.decode())
    assert len(ids) == len(set(ids)) > 0
    assert not list(run.glob(".*"))


def test_panels_are_those_with_values(run: Path) -> None:
    text = write_report(run).read_text()
    panels = re.findall(r'aria-label="(\w+: [^"]*)"', text)
    assert panels == ["teacher: denoising loss", "teacher: gradient norm", "student: GSIM losses", "aligned: reward",
                      "aligned: image statistics"]  # fmt: skip
    assert not re.search(r"#0[1-4a]0e0", text), "a stand-in colour was left in an SVG"


def test_strip_hides_exactly_the_tokens_that_are_not_drawn(run: Path) -> None:
    strip = Page(write_report(run).read_text()).links[5]
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(strip.split(",")[1]))))
    images = pixels.reshape(STEPS + 1, 9, 10, 9, 4).swapaxes(1, 2)[:, :, :8, :8]
    with np.load(run / "samples.npz") as file:
        trace, visible = file["student_trace"], file["trace_visible"].repeat(2, 2).repeat(2, 3)
    assert 0 < visible.mean() < 1
    np.testing.assert_array_equal(images[..., 3] == 255, visible)
    np.testing.assert_array_equal(images[visible][:, 0], trace[visible][:, 0])


@pytest.mark.parametrize("name", ["results.json", "samples.npz", "teacher/metrics.jsonl", "aligned/metrics.jsonl"])
def test_missing_or_damaged_file_is_named(run: Path, name: str) -> None:
    (run / name).write_text('{"step": 1')
    with pytest.raises(ValueError, match=f"{re.escape(name)}.*(cannot be read|is not JSON)"):
        write_report(run)
    (run / name).unlink()
    with pytest.raises(ValueError, match=f"{re.escape(name)} does not exist"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_missing_value_is_named(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    del results["student"]["accuracy"]
    (run / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"results\.json has no 'student\.accuracy'"):
        write_report(run)
    with np.load(run / "samples.npz") as file:
        arrays = {name: file[name] for name in file.files if name != "student_trace"}
    np.savez(run / "samples.npz", **arrays)
    (run / "results.json").write_text(json.dumps(results | {"student": row(2)}))
    with pytest.raises(ValueError, match=r"samples\.npz has no array .*student_trace"):
        write_report(run)


def test_without_matplotlib_the_remedy_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'marval\[report\]'"):
        write_report(run)
