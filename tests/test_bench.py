"""Timing: rows, their split, the ratio, and both kinds of folder; the floor against PyTorch's counter."""

import functools
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from marval import masking
from marval.__main__ import main
from marval.bench import (
    NO_STUDENT,
    PARTS,
    bench,
    clocks,
    largest_within,
    median_and_spread,
    peak_memory,
    reset_peak,
    split_batch,
    table,
    teacher_and_student,
    time_batch,
    times_in_turn,
)
from marval.config import PRESETS
from marval.costs import Work, without_data
from marval.diffusion import cosine_schedule, respace
from marval.floor import H200, Load, by_part, floor_seconds, sampling_loads
from marval.models.mar import MAR
from marval.pipeline import Pipeline
from marval.sampling import diffusion_chain, few_evaluations, last, unmask

# ---- bench


def test_rows_and_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    args = ["bench", "--model", tiny.student(), "--batch", "1,8", "--ar-steps", "2,4", "--repeats", 2]
    main([str(arg) for arg in [*args, "--json", tmp_path / "bench.json", "--budget", 1e6]])
    results = json.loads((tmp_path / "bench.json").read_text())
    rows = results["rows"]
    assert [(row["batch"], row["ar_steps"], row["model"]) for row in rows] == [
        (batch, k, model) for batch in (1, 8) for k in (2, 4) for model in ("teacher", "student")
    ]
    for row in rows:
        assert min(row["parts"][part] for part in ("encoder", "decoder", "head", "tokenizer")) > 0
        assert row["spread"] >= 0
        assert row["peak_memory"] > 2**20
        assert row["over_floor"] > 1
    for teacher, student in zip(rows[::2], rows[1::2], strict=True):
        ratio = teacher["seconds_per_image"] / student["seconds_per_image"]
        assert results["speedup"][f"batch {teacher['batch']}, K {teacher['ar_steps']}"] == ratio
        assert teacher["parts"]["head"] > student["parts"]["head"]  # ten steps against one
        assert teacher["floor_seconds_per_image"] > 2 * student["floor_seconds_per_image"]
    assert results["settings"]["head_steps"] == 10
    assert results["machine"]["cores"] >= 1
    assert results["budget"]["ar_steps"] == 16  # every K fits
    out = capsys.readouterr().out
    assert all(part in out for part in PARTS)
    assert out.count("teacher ") == 4
    assert results["student"] == "distilled"
    assert f"batch 8, K 4: the student is {results['speedup']['batch 8, K 4']:.1f} x as fast" in out
    assert "within 1e+06 ms per image at batch 1: K = 16" in out
    assert all(len(line) <= 120 for line in out.splitlines())


def test_parts_sum_to_the_total_and_the_timed_loop_is_the_real_one(monkeypatch: pytest.MonkeyPatch):
    model = Pipeline.load(tiny.teacher())
    drawn = []
    decode = type(model.tokenizer).decode

    def record(tokenizer: object, tokens: torch.Tensor) -> torch.Tensor:
        drawn.append(tokens)
        return decode(tokenizer, tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model.tokenizer), "decode", record)
    parts = split_batch(model, model.settings(), 4, seed=6)
    assert set(parts) == set(PARTS)
    assert min(parts.values()) > 0
    time_batch(model, model.settings(), 4, seed=6)
    expected = model.sample_tokens([0, 1, 2, 3], seed=6)
    for tokens in drawn:
        np.testing.assert_array_equal(tokens.numpy(), expected.numpy())


def test_clocks_leave_nothing_behind():
    model = Pipeline.load(tiny.student())
    before = [dict(vars(x)) for x in (model, model.network, model.tokenizer)]
    with clocks(model) as seconds:
        model.sample([1], refresh_every=2)
    assert seconds["encoder"] == 0  # a cached backbone counts as the decoder
    assert seconds["decoder"] > 0
    assert [dict(vars(x)) for x in (model, model.network, model.tokenizer)] == before


def test_models_of_a_folder():
    teacher, student = teacher_and_student(tiny.student())
    original = Pipeline.load(tiny.teacher())
    ask = {"classes": [1, 2], "seed": 4, "ar_steps": 4, "head_steps": 3}
    assert teacher.student is None
    assert np.array_equal(teacher.sample(**ask), original.sample(**ask))
    assert np.array_equal(student.sample([1, 2], seed=4), Pipeline.load(tiny.student()).sample([1, 2], seed=4))

    results = bench(tiny.teacher(), [2], repeats=1, ar_steps=[2], head_steps=2, precision="bf16", refresh_every=2)
    assert [row["model"] for row in results["rows"]] == ["teacher", "student"]
    assert results["student"] == NO_STUDENT
    assert "no student in this folder: the rows named so are the teacher's head, evaluated once" in table(results)
    assert "the student is" not in table(results)
    assert (results["settings"]["refresh_every"], results["settings"]["head_steps"]) == (2, 2)
    assert results["settings"]["dtype"] == "bf16"


def test_evaluations():
    one, two = (bench(tiny.student_of_two(), [2], repeats=1, evaluations=n, head_steps=3) for n in (1, 2))
    assert (one["settings"]["evaluations"], two["settings"]["evaluations"]) == (1, 2)
    assert "; student: 2 evaluations" in table(two)
    operations = [
        row["floor_seconds_per_image"] * results["rates"]["matmul"] for results in (one, two) for row in results["rows"]
    ]
    assert operations[0] == pytest.approx(operations[2])  # of the teacher
    assert operations[1] < operations[3]


def test_a_turn_warms_up():
    """Of the batches that fill a turn the first is not counted; a batch that fills it alone is."""
    calls: list[str] = []

    def batch(name: str, seconds: float, repeat: int) -> float:
        calls.append(f"{name}{repeat}")
        return seconds if len(calls) > 1 and calls[-2] == calls[-1] else 2 * seconds

    of = {"slow": functools.partial(batch, "s", 0.1), "fast": functools.partial(batch, "f", 0.02)}
    assert times_in_turn(of, 2) == {"slow": [0.2, 0.2], "fast": [0.02, 0.02]}
    assert calls == ["s0", "f0", "f0", "s1", "f1", "f1", "s2", "f2", "f2"]


@pytest.mark.parametrize(("batches", "repeats"), [([0], 1), ([-2], 1), ([1], 0)])
def test_refused(batches: list[int], repeats: int):
    with pytest.raises(ValueError, match="at least 1"):
        bench(tiny.student(), batches, repeats)


def test_the_largest_k_within_a_budget(monkeypatch: pytest.MonkeyPatch):
    model = Pipeline.load(tiny.student())
    monkeypatch.setattr("marval.bench.time_batch", lambda model, config, batch, seed: 0.01 * config.ar_steps * batch)
    for budget, k in ((0.001, None), (0.01, 1), (0.055, 5), (0.16, 16), (9.0, 16)):
        found = largest_within(model, budget, 4, 1, {})
        assert found["ar_steps"] == k
        assert found["seconds_per_image"] == (None if k is None else pytest.approx(0.01 * k))


def test_median_and_spread():
    assert median_and_spread([3.0]) == (3.0, 0.0)
    assert median_and_spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, pytest.approx(2 / 3))


def test_peak_memory_of_graphs_is_what_their_pool_holds(monkeypatch: pytest.MonkeyPatch):
    """A replay allocates nothing, so PyTorch's count of tensors does not see it."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 9)
    assert [peak_memory(torch.device("cuda"), graphs) for graphs in (False, True)] == [5, 9]


def test_peak_memory_sees_an_allocation_that_is_gone():
    cpu = torch.device("cpu")
    reset_peak(cpu)
    before = peak_memory(cpu)
    torch.ones(64 * 2**20)  # 256 MiB
    assert peak_memory(cpu) >= before + 200 * 2**20


# ---- the floor


@pytest.mark.parametrize(("preset", "guided", "head_steps", "ar_steps"), [
    ("mar-b", True, 3, 3), ("mar-b", False, 1, 4), ("mar-h", False, 1, 2),
])  # fmt: skip
def test_operations_are_those_of_pytorchs_counter(preset: str, guided: bool, head_steps: int, ar_steps: int):
    model, batch = PRESETS[preset], 2
    with torch.device("meta"):
        network = MAR(model).requires_grad_(False).eval()
    noise: Any = SimpleNamespace(device="meta")
    z = torch.zeros(batch, model.num_tokens, model.token_dim, device="meta")
    orders = torch.zeros(batch, model.num_tokens, dtype=torch.long, device="meta")
    counts = masking.masked_counts(model.num_tokens, ar_steps)
    with without_data(), torch.no_grad(), Work() as work:
        draw = few_evaluations(network.head, cosine_schedule(), (755,))
        if guided:
            draw = diffusion_chain(network.head, respace(cosine_schedule(), head_steps), noise, "ddim")
        last(unmask(network, draw, orders[:, 0], orders, counts, z, guidance=2.0, needs_null=guided))
    loads = sampling_loads(model, ar_steps, batch, head_steps=head_steps, guided=guided)
    least = sum(part.operations for part in by_part(loads).values())
    assert least <= work.operations <= 1.01 * least  # the last block computes a few queries that nothing reads


@pytest.mark.parametrize("preset", PRESETS)
def test_weights_are_those_of_the_network(preset: str):
    """Each part's matrices, biases and norms, but for embeddings, which are looked up."""
    model = PRESETS[preset]
    with torch.device("meta"):
        network = MAR(model)
    counted = {"encoder": 0, "decoder": 0, "head": 0}
    for name, parameter in network.named_parameters():
        embeds = any(part in name for part in ("class_emb", "latent", "pos_embed", "mask_token", "time_embed"))
        part = "head" if name.startswith("head.") else "decoder" if name.startswith("decoder") else "encoder"
        counted[part] += 0 if embeds else 4 * parameter.numel()
    parts = by_part(sampling_loads(model, 1, batch=7))
    assert {part: load.weights for part, load in parts.items()} == pytest.approx(counted, rel=1e-12)


def test_what_the_floor_is_made_of():
    model = PRESETS["mar-b"]
    student, large = (by_part(sampling_loads(model, 16, batch)) for batch in (1, 4))
    teacher = by_part(sampling_loads(model, 16, 1, head_steps=100, guided=True))
    for part in student:
        assert large[part].operations == 4 * student[part].operations
        assert large[part].weights == student[part].weights  # read once for the whole batch
        assert large[part].activations == 4 * student[part].activations
    assert teacher["decoder"].operations == 2 * student["decoder"].operations
    assert teacher["head"].operations == pytest.approx(200 * student["head"].operations, rel=0.05)
    assert teacher["head"].weights == pytest.approx(100 * student["head"].weights, rel=0.05)
    bf16 = by_part(sampling_loads(model, 16, 1, itemsize=2))
    assert bf16["head"].bytes == student["head"].bytes / 2

    loads = [{"encoder": Load(2, 1, 1), "decoder": Load(4, 1, 0), "head": Load()}] * 3
    assert floor_seconds(loads, rate=1, bandwidth=1) == {"encoder": 6, "decoder": 12, "head": 0, "total": 18}
    assert floor_seconds(loads, rate=1, bandwidth=0.5)["encoder"] == 12  # two bytes take longer than two operations
    seconds = floor_seconds(sampling_loads(model, 256, 1, itemsize=2), *H200)["total"]
    assert 0.005 < seconds < 0.1  # the published times of MAR-B at batch 1 are far above


# ---- the page


@pytest.fixture(scope="module")
def speed_floor() -> ModuleType:
    return tiny.benchmark("speed_floor")


def test_the_page_shows_the_committed_results(speed_floor):
    """Otherwise: python benchmarks/speed_floor.py."""
    text = speed_floor.PAGE.read_text()
    assert speed_floor.page(text, speed_floor.rate_in(text)) == text


def test_measurements_reach_the_tables(speed_floor, tmp_path):
    (tmp_path / "imagenet_scale.json").write_text((speed_floor.RESULTS / "imagenet_scale.json").read_text())
    row = {
        "batch": 1, "seconds_per_image": 12.5, "spread": 0.013, "measurements": 48, "reference_over_this": 6.25,
        "over_floor": 1.23, "parts": {"encoder": 4.0, "decoder": 8.0, "head": 0.5}, "ar_steps": 16,
    }  # fmt: skip
    cached = {**row, "model": "student, full pass every 4", "over_floor": 0.4}
    result = {
        "benchmark": "against_reference", "date": "2026-11-23", "machine": {"cpu": "a CPU", "threads": 2},
        "settings": {"preset": "mar-b", "ar_steps": 16, "guidance": 2.9, "head_steps": 100, "dtype": "float32",
                     "reference_precision": "float32, no autocast", "generations": 3},
        "errors": {"teacher": 4e-6}, "rows": [{**row, "model": "student"}, cached],
    }  # fmt: skip
    (tmp_path / "side.json").write_text(json.dumps(result))
    drawn = {**row, "size": "mar-h", "model": "student", "mode": "bf16+graphs", "over_floor": 3.21}
    theirs = {**drawn, "size": "mar-b", "model": "reference teacher", "mode": "bf16 by autocast", "ar_steps": 64}
    theirs |= {"measured_head_steps": [5, 25, 100], "extrapolated": False, "extrapolation_error": 0.021}
    cut = {**theirs, "extrapolated": True, "extrapolation_error": None, "ar_steps": 256, "measurements": 3}
    suite = {"benchmark": "gpu_suite", "date": "2026-11-23", "machine": {"gpu": "NVIDIA H200"}}
    suite |= {"versions": {"torch": "2.11.0"}, "stages": [drawn, theirs, cut]}
    same = {"stage": "same tokens, float32+graphs", "largest_error": 2e-5}
    suite["stages"] += [same, {"stage": "golden", "largest_error": 3e-7}]
    for stage, rate in zip(suite["stages"], (785e12, 792e12), strict=False):
        stage["rates"] = {"bf16": rate, "float32": 51e12, "bandwidth": 4.3e12}
    update = {"size": "mar-b", "batch": 96, "floor_seconds": 0.1, "over_floor": 2.0, "tokens_per_second": 1e5}
    update |= {"peak_memory": 2**30, "measurements": 6}
    for verb, seconds in (("distill head", 0.2), ("distill all", 0.9)):
        suite["stages"].append({**update, "verb": verb, "seconds_per_update": seconds})
    (tmp_path / "gpu.json").write_text(json.dumps(suite))
    steps = {"benchmark": "time_over_floor", "machine": {"cpu": "a CPU", "threads": 2}, "date": "2026-11-23"}
    alone = {"size": "mar-l", "ar_steps": 256, "batch": 16, "model": "teacher", "over_floor": 1.56}
    whole = {"size": "mar-b", "ar_steps": 16, "batch": 1, "model": "student", "over_floor": 7.77}  # measured above
    (tmp_path / "steps.json").write_text(json.dumps({**steps, "command": "a command", "rows": [alone, whole]}))
    on_gpu = {"machine": {"cpu": "another", "threads": 8, "gpu": "NVIDIA H200"}, "command": "gpu command"}
    few = {**alone, "batch": 256, "model": "student", "over_floor": 1.87}
    (tmp_path / "steps_gpu.json").write_text(json.dumps({**steps, **on_gpu, "rows": [few]}))
    text = speed_floor.tables(0.1e12, tmp_path)
    assert text.count("| 1.56 |") == 1
    (line,) = (line for line in text.splitlines() if line.startswith("| mar-l | 256 | 256 |"))
    assert line.endswith("| 1.87 |")
    assert "(`a command`; a CPU, 2 threads, 2026-11-23" in text
    assert "`gpu command`; NVIDIA H200, 2026-11-23" in text
    assert "7.77" not in text
    assert "float32 (the reference: float32, no autocast); a CPU" in text
    floors = [
        line.split(" | ") for line in text.splitlines() if line.startswith(("| mar-b | 16 | 1 |", "| mar-h | 16 | 1 |"))
    ]
    assert floors[0][8] == "1.23"  # not the cached one, which computes less
    assert floors[1][-1] == "3.21 |"
    assert "| 1 | student | 12.5 | 1.3 % | 48 | 6.25 | 1.23 | 4 | 8 | 0.5 |" in text
    assert "| mar-h | student | bf16+graphs | 1 | 16 | 12,500 | 1.3 % | 48 |" in text
    assert "| mar-b | reference teacher, extrapolated | bf16 by autocast | 1 | 256 | 12,500 | 1.3 % | 3 |" in text
    assert "from 5 and 25 denoising steps where the whole chain was timed too (K = 64, batch 1): +2.1 %." in text
    assert "NVIDIA H200, PyTorch 2.11.0, 2026-11-23, TFLOP/s of bf16 785 to 792, of float32 51 to 51" in text
    assert "against recorded ones): float32+graphs 2e-05; golden 3e-07." in text
    assert "| mar-b | distill head | 96 | 0.2 | 6 |" in text
    assert "mar-b: head-only distillation makes 4.50 times the updates per second" in text
    assert "5.62 times the updates per second" in text  # 3.98 s over 0.708 s
    with pytest.raises(ValueError, match="the page must have"):
        speed_floor.page("no markers", 1e12)


def test_single_ar_steps_over_their_floor(tmp_path, capsys):
    script, out = tiny.benchmark("time_over_floor"), tmp_path / "rows.json"
    words = [str(out), "--sizes", "tiny", "--batches", "1,2", "--steps", "3", "--repeats", "1"]
    script.main(words)
    first = out.read_text()
    rows = json.loads(first)["rows"]
    assert [(row["ar_steps"], row["batch"], row["model"]) for row in rows] == [
        (16, batch, model) for batch in (1, 2) for model in ("student", "teacher")
    ]
    assert all(row["over_floor"] > 1 and row["measured_ar_steps"] == [2, 8, 13] for row in rows)
    script.main(words)  # nothing is measured twice
    assert out.read_text() == first
    out.write_text(first.replace('"machine": {', '"machine": {"gpu": "NVIDIA H200",', 1))
    with pytest.raises(SystemExit):
        script.main([*words, "--sizes", "tiny"])
    assert "rows.json was measured on another device than cpu" in capsys.readouterr().err


def test_several_ar_steps_in_a_row_over_their_floor(tmp_path, monkeypatch):
    """As on a GPU, whose AR steps alone would wait for the host."""
    script, out = tiny.benchmark("time_over_floor"), tmp_path / "rows.json"
    monkeypatch.setitem(script.WINDOWS, "cpu", (1, 4))
    drawn, unmask = [], script.unmask
    monkeypatch.setattr(script, "unmask", lambda *args, **more: (drawn.append(args[4]), unmask(*args, **more))[1])
    script.main([str(out), "--sizes", "tiny", "--models", "student", "--steps", "3", "--repeats", "1"])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["measured_ar_steps"] == [1, 2, 3, 4, 6, 7, 8, 9, 11, 12, 13, 14]
    assert all(len(counts) == 1 + 4 + 1 for counts in drawn)
    assert row["over_floor"] > 1


def test_training_by_pytorchs_operations_and_by_ours(tmp_path, speed_floor):
    tiny.benchmark("cpu_training").main([str(tmp_path / "cpu.json"), "--updates", "2", "--rounds", "1"])
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert [(row["recipe"], row["verb"], row["updates"]) for row in rows] == [
        ("digits", verb, 2) for verb in ("train", "distill")
    ]
    assert all(row[way] > 0 for row in rows for way in ("pytorch", "marval"))
    assert "| digits | distill | 64 | float32 |" in speed_floor.cpu_training(tmp_path)
