"""The side-by-side with the reference MAR: its stand-ins, the map of names, the recorded numbers, what is reported."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from marval.config import MARConfig, SamplingConfig
from marval.models.cpu import OneDNNLinear

ROOT = Path(__file__).resolve().parents[1]
CONFIG = SamplingConfig(ar_steps=4, head_steps=5, guidance=2.9, guidance_schedule="linear")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return tiny.benchmark("against_reference")


@pytest.fixture(scope="module")
def checkout() -> Path:
    """A checkout of LTH14/mar: $MARVAL_REFERENCE, or ../mar beside the project."""
    path = Path(os.environ.get("MARVAL_REFERENCE", ROOT.parent / "mar"))
    if not (path / "models" / "mar.py").is_file():
        pytest.skip("needs a checkout of LTH14/mar: name it by MARVAL_REFERENCE")
    return path


@pytest.fixture(scope="module")
def models(benchmark, checkout):
    """The reference and our contenders, of a tiny size."""
    network = benchmark.random_network(benchmark.SIZES["tiny"], torch.device("cpu"))
    code = benchmark.load_code(checkout)
    return benchmark.contenders(code, network, CONFIG.head_steps, CONFIG.guidance, 2, "float32", False)


def test_weights_without_a_reference(benchmark):
    network = benchmark.random_network(benchmark.SIZES["tiny"], torch.device("cpu"))
    assert all(parameter.any() for parameter in network.parameters())
    names = benchmark.their_names(network.state_dict())
    assert "diffloss.net.res_blocks.1.mlp.0.weight" in names
    assert "encoder_blocks.0.attn.qkv.weight" in names
    assert not any(name.startswith("head.") for name in names)
    assert len(names) == len(network.state_dict())


def test_it_says_what_is_no_checkout(benchmark, tmp_path):
    with pytest.raises(SystemExit, match=r"no checkout of LTH14/mar: it has no models/mar\.py"):
        benchmark.main(["--reference", str(tmp_path), "--preset", "tiny"])


def test_imports_leave_nothing_behind(benchmark, checkout):
    before = (dict(sys.modules), list(sys.path), torch.Tensor.cuda)
    benchmark.load_code(checkout)
    assert (sys.path, torch.Tensor.cuda) == before[1:]
    assert not {"models", "models.mar", "diffusion"} & (set(sys.modules) - set(before[0]))


def test_a_real_timm_stays(benchmark, tmp_path, monkeypatch):
    """What it imports may be parts of PyTorch, which cannot be imported twice; stand-ins go."""
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in [name for name in sys.modules if name.startswith("timm")]:
        monkeypatch.delitem(sys.modules, name)
    for name, text in {
        "site/timm/__init__.py": "",
        "site/timm/models/__init__.py": "",
        "site/timm/models/vision_transformer.py": "import timm_needs\nBlock = 'real'",
        "site/timm_needs.py": "",
        "mar/models/mar.py": "from timm.models.vision_transformer import Block\nimport diffusion",
        "mar/diffusion.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = set(sys.modules)
    try:
        assert benchmark.load_code(tmp_path / "mar").Block == "real"
        assert {"timm", "timm_needs"} <= set(sys.modules)
        assert not {"models", "models.mar", "diffusion", "scipy"} & (set(sys.modules) - before)
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("timm"):
                del sys.modules[name]


def test_same_tokens(benchmark, models):
    labels = torch.tensor([3, 0])
    errors = benchmark.compare(models[0], models[1:], CONFIG, labels)
    assert set(errors) == {"teacher", "student"}
    assert errors["teacher"] < 1e-5
    unguided = benchmark.dataclasses.replace(CONFIG, guidance=1.0)
    assert benchmark.compare(models[0], models[1:2], unguided, labels)["teacher"] < 1e-5


def test_a_difference_is_found(benchmark, models):
    """Another guidance, another temperature, other noise, other weights."""
    labels = torch.tensor([1])
    tape = benchmark.Tape()
    with tape.recording(models[0].reference):
        expected = models[0].draw(CONFIG, labels, clocked=False).tokens
    for change in ({}, {"guidance": 3.0}, {"temperature": 0.0}):
        config = benchmark.dataclasses.replace(CONFIG, **change)
        noise = benchmark.Replay(tape, CONFIG.ar_steps, torch.device("cpu"))
        error = benchmark.largest_error(models[1].draw(config, labels, False, noise=noise).tokens, expected)
        assert (error > benchmark.TOLERANCE) == bool(change)
    tape.starts[-1] = tape.starts[-1] + 0.1
    noise = benchmark.Replay(tape, CONFIG.ar_steps, torch.device("cpu"))
    assert (
        benchmark.largest_error(models[1].draw(CONFIG, labels, False, noise=noise).tokens, expected)
        > benchmark.TOLERANCE
    )

    models[1].model.network.mask_token[0, 0, 0] += 1  # also in the reference: the tensors are the same
    try:
        assert benchmark.compare(models[0], models[1:2], CONFIG, labels)["teacher"] < 1e-5
    finally:
        models[1].model.network.mask_token[0, 0, 0] -= 1
    replaced = models[0].reference.mask_token
    models[0].reference.mask_token = torch.nn.Parameter(replaced.flip(-1))
    try:
        with pytest.raises(ValueError, match="teacher: a token differs by"):
            benchmark.compare(models[0], models[1:2], CONFIG, labels)
    finally:
        models[0].reference.mask_token = replaced


def test_autocast_keeps_the_weights_of_the_reference(benchmark, models):
    """It casts each weight once per generation: its cache holds only what requires gradients."""
    assert all(parameter.requires_grad for parameter in models[0].reference.parameters())
    assert not any(parameter.requires_grad for parameter in models[1].model.network.parameters())
    casts = 0

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal casts
            casts += func is torch.ops.aten._to_copy.default and args[0].shape == weight.shape
            return func(*args, **(kwargs or {}))

    weight = models[0].reference.diffloss.net.res_blocks[0].adaLN_modulation[1].weight
    bf16 = benchmark.Theirs(models[0].reference, "bf16")
    with Counted():
        bf16.draw(CONFIG, torch.tensor([1]), clocked=False)
    assert casts == len(models[0].reference.diffloss.net.res_blocks)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of PyTorch's own compiler
def test_fast_ones_leave_the_network_alone(benchmark):
    """Neither packed nor compiled, nor cast; the same tensors where they can be."""
    sizes = MARConfig(grid=2, num_classes=2, width=384, depth=1, heads=4, buffer_size=1, head_width=64, head_depth=1)
    network = benchmark.random_network(sizes, torch.device("cpu"))
    kinds = [type(module) for module in network.modules()]
    for settings in ({}, {"compile": True}, {"dtype": "bf16"}):
        made = benchmark.pipelines(network, 2.9, **settings)
        assert made["teacher"].network is made["student"].network
        assert made["teacher"].network is not network
        packed = any(isinstance(module, OneDNNLinear) for module in made["teacher"].network.modules())
        assert packed == ("compile" not in settings)
        same = made["teacher"].network.mask_token.data_ptr() == network.mask_token.data_ptr()
        assert same == ("dtype" not in settings)
    assert [type(module) for module in network.modules()] == kinds
    assert not any(module._compiled_call_impl for module in network.modules())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_the_reference_on_the_cpu_of_a_machine_with_a_gpu(benchmark, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    here = torch.zeros(1)
    with benchmark.environment(torch.device("cpu")):
        assert here.cuda() is here


def test_one_ar_step_without_clocks_has_a_bandwidth_in_its_floor(benchmark, models):
    """On CUDA the floor counts bytes too, whatever K is."""
    config = benchmark.dataclasses.replace(CONFIG, ar_steps=1)
    measured = {model.name: [benchmark.Measured(torch.empty(0), [1.0], {})] for model in models[:2]}
    rates = {"matmul": [1e18], "bandwidth": [1e9]}
    floors = [
        benchmark.summary(measured, models[:2], config, benchmark.SIZES["tiny"], 1, rates, 2, on_cpu)[0][
            "floor_seconds_per_image"
        ]
        for on_cpu in (True, False)
    ]
    assert floors[1] > 1000 * floors[0] > 0


def test_the_whole_benchmark(benchmark, checkout, tmp_path, capsys):
    file = tmp_path / "found.json"
    words = ["--reference", str(checkout), "--preset", "tiny", "--ar-steps", "3", "--head-steps", "4", "--batch", "2"]
    benchmark.main([*words, "--generations", "2", "--device", "cpu", "--json", str(file)])
    found = json.loads(file.read_text())
    rows = {row["model"]: row for row in found["rows"]}
    assert list(rows) == [
        "reference teacher", "teacher", "student", "teacher, full pass every 4", "student, full pass every 4",
    ]  # fmt: skip
    for name, row in rows.items():
        assert row["measurements"] == 6
        assert len(row["step_seconds"]) == len(row["reference_over_this_by_step"]) == 3
        assert sum(row["parts"].values()) < 2 * 2 * row["seconds_per_image"]
        assert row["head_steps"] == (1 if "student" in name else 4)
        assert row["over_floor"] > 1
    assert rows["reference teacher"]["reference_over_this"] == 1
    reference, student = (rows[name]["seconds_per_image"] for name in ("reference teacher", "student"))
    assert rows["student"]["reference_over_this"] == pytest.approx(reference / student)
    assert rows["teacher"]["operations_per_image"] > 2 * rows["student"]["operations_per_image"]
    assert found["errors"]["teacher"] < 1e-4
    assert found["machine"]["cpu"]
    assert str(checkout) not in file.read_text()  # no path of this machine
    out = capsys.readouterr().out
    assert "same tokens as the reference: teacher" in out
    assert found["settings"]["reference_precision"] == "float32, no autocast"
    assert "the reference: float32, no autocast" in out
    assert all(len(line) <= 120 for line in out.splitlines())


# ---- the GPU suite


@pytest.fixture
def suite(benchmark, tmp_path):
    """The GPU suite at its smallest size, on the CPU."""
    module = tiny.benchmark("gpu_suite")
    found = module.Suite(tmp_path / "found.json", torch.device("cpu"), module.TINY, 1)
    return module, found


def test_a_whole_chain_and_an_extrapolated_one(benchmark, checkout, suite, monkeypatch):
    """Of a time that is linear in the denoising steps both are exact; two cuts and the whole are timed in turn."""
    module, one = suite
    drawn = []

    def linear(theirs, config, labels, clocked):
        drawn.append((config.head_steps, config.ar_steps, int(theirs.reference.diffloss.gen_diffusion.num_timesteps)))
        return benchmark.Measured(torch.empty(0), [3.0 + 2.0 * config.head_steps], {})

    monkeypatch.setattr(module.side.Theirs, "draw", linear)
    code = benchmark.load_code(checkout)
    both = module.reference(one, code, 2, 3, (2, 3, 4))
    assert drawn == [(n, 3, n) for n in (2, *(2, 3, 4) * 3)]  # a whole generation first, to warm up
    assert (both["seconds_per_image"], both["extrapolation_error"], both["extrapolated"]) == (11 / 2, 0, False)
    cut = module.reference(one, code, 2, 3, (2, 3))
    assert (cut["seconds_per_image"], cut["extrapolation_error"], cut["extrapolated"]) == (11 / 2, None, True)
    assert (cut["head_steps"], cut["measurements"], cut["measured_head_steps"]) == (4, 3, [2, 3])
    one.stage_end = 0.0
    assert module.reference(one, code, 2, 3, (4,))["measurements"] == 1


def test_the_suite_with_the_reference(benchmark, checkout, suite):
    module, one = suite
    planned = {name: (work, seconds) for name, work, seconds in module.stages(one, checkout)}
    names = list(planned)
    timed = [name for name in names if "reference teacher" in name]
    assert names.index("same tokens as the reference, float32") < min(names.index(name) for name in timed)
    for name in ("rates", "same tokens as the reference, float32", *timed):
        one.run(name, *planned[name])
    _, same, *rows = one.result["stages"]
    assert set(same["errors"]) == {"teacher", "student"}
    assert 0 < same["errors"]["teacher"] < same["tolerance"] == benchmark.TOLERANCE
    assert [row["extrapolated"] for row in rows] == [False, False, True]
    assert all(row["seconds_per_image"] > 0 and row["measurements"] >= 1 for row in rows)


def test_what_compiles_comes_early_and_has_time(suite):
    module, one = suite
    one.device, one.scale = torch.device("cuda"), module.FULL  # nothing touches it
    planned = [(name, seconds) for name, _, seconds in module.stages(one, None)]
    assert [name for name, _ in planned[1:4]] == [
        "mar-b student bf16+graphs batch 1 K 64", "mar-b student bf16+compile+graphs batch 1 K 64",
        "mar-b student bf16+graphs batch 1 K 256",
    ]  # fmt: skip
    assert all(seconds == 150 for name, seconds in planned if "compile" in name)
    assert len({name for name, _ in planned}) == len(planned)


@pytest.mark.filterwarnings("ignore")  # of PyTorch's own compiler
def test_stages_that_compile_start_anew_and_fail_where_the_compiler_gives_up(suite):
    from torch import _dynamo

    one_more = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    for _ in range(2):
        with suite[0].compiler(["bf16", "compile"]), _dynamo.config.patch(recompile_limit=1):
            assert one_more(torch.zeros(1)) == 1
            with pytest.raises(_dynamo.exc.FailOnRecompileLimitHit):
                one_more(torch.zeros(2))
    assert not _dynamo.config.fail_on_recompile_limit_hit


def test_updates_that_run_out_of_time_are_kept(suite):
    module, one = suite
    one.rates["float32"], one.stage_end = 1e9, 0.0
    found = module.training(one, "train", "tiny")
    assert found["measurements"] == 1
    assert found["operations_per_update"] > 0
