"""Fast paths do as the plain one: targets only, cached backbone, bf16 weights, compiled blocks, graphs of sampling and
of updates."""

import copy
import dataclasses
import itertools
import shutil
from collections.abc import Callable, Hashable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from marval import masking
from marval.config import DistillConfig, MARConfig, SamplingConfig, StudentConfig, TrainConfig
from marval.distill import distill
from marval.distributed import World
from marval.graphs import Graphs, key_of, plainly
from marval.models import cpu
from marval.models.cached import CachedBackbone
from marval.models.cpu import OneDNNLinear, use_onednn
from marval.models.mar import MAR, gather_tokens
from marval.pipeline import Pipeline
from marval.rng import ImageNoise, generator
from marval.sampling import TokenSampler
from marval.tokenizers import PixelTokenizer
from marval.train import train
from marval.update import Update, caller

L, COUNTS = 16, [16, 13, 8, 3, 0]


def network(depth: int = 2) -> MAR:
    """Random weights without zeros: a fresh head's last layers are zero, and its output depends on nothing."""
    config = MARConfig(grid=4, token_dim=4, num_classes=3, width=32, depth=depth, heads=4, buffer_size=3,
                       head_width=32, head_depth=2)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        mar, g = MAR(config), generator(5)
    with torch.no_grad():
        for parameter in mar.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return mar.eval()


def states() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, orders as the AR loop has them, labels."""
    noise = ImageNoise(3, [0, 1])
    orders = masking.sorted_within_steps(noise.permutation(L), COUNTS)
    return noise.randn(L, 4), orders, torch.tensor([2, 3])


def asked(orders: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Visible positions and those to be drawn in AR step k."""
    first, end = L - COUNTS[k], L - COUNTS[k + 1]
    return orders[:, :first], orders[:, first:end]


def model(student: bool, depth: int = 2) -> Pipeline:
    settings = SamplingConfig(ar_steps=5, head_steps=4, guidance=2.0)
    return Pipeline(network(depth), PixelTokenizer(image_size=8, channels=1, patch_size=2), ["a", "b", "c"], settings,
                    StudentConfig(guidance=2.0) if student else None)  # fmt: skip


def test_one_sort_serves_all_ar_steps():
    orders = ImageNoise(1, [0, 1, 2]).permutation(L)
    for counts in (COUNTS, [11, 8, 3, 0], [16, 10, 4]):  # generation; inpainting; a rollout that stops early
        grouped, borders = masking.sorted_within_steps(orders, counts), [0, *(L - c for c in counts), L]
        for first, end in itertools.pairwise(borders):
            assert torch.equal(grouped[:, first:end], orders[:, first:end].sort(dim=1).values)


@pytest.mark.parametrize("k", range(4))
def test_conditions_of_the_drawn_tokens_are_those_of_all(k: int):
    mar, (tokens, orders, labels) = network(), states()
    visible, target = asked(orders, k)
    every = mar.condition(tokens, visible, labels)
    assert_close(mar.condition(tokens, visible, labels, target), gather_tokens(every, target), rtol=1e-5, atol=1e-5)
    ascending = mar.condition(tokens, visible.sort(dim=1).values, labels)
    assert_close(every, ascending, rtol=1e-5, atol=1e-5)


def test_a_full_pass_of_the_cached_backbone_is_exact():
    mar, (tokens, orders, labels) = network(), states()
    cached = CachedBackbone(mar, refresh_every=1)
    for k in range(4):
        visible, target = asked(orders, k)
        exact = mar.condition(tokens, visible, labels, target)
        assert_close(cached.condition(tokens, orders, COUNTS, k, labels), exact, rtol=1e-5, atol=1e-5)


def test_a_cheap_pass_is_exact_where_old_tokens_do_not_change():
    """One block, whose encoder does not mix tokens: then the cached keys and values are as good as new."""
    mar, (tokens, orders, labels) = network(depth=1), states()
    with torch.no_grad():
        for parameter in mar.encoder_blocks[0].get_submodule("attn.proj").parameters():
            parameter.zero_()
    cached, both = CachedBackbone(mar, refresh_every=4), torch.cat([labels, torch.full((2,), 3)])
    for k in range(4):
        visible, target = (x.repeat(2, 1) for x in asked(orders, k))
        exact = mar.condition(tokens.repeat(2, 1, 1), visible, both, target)
        assert_close(cached.condition(tokens, orders, COUNTS, k, both), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("student", [True, False])
def test_refresh_every(student: bool):
    pipeline = model(student)
    draw = [pipeline.sample_tokens([0, 1, None], seed=4, refresh_every=n) for n in (1, 2, 5)]
    assert draw[1].isfinite().all()
    assert not torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[1], draw[2])
    alone = pipeline.sample_tokens([1], seed=4, first_image=1, refresh_every=2)
    assert_close(alone[0], draw[1][1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="refresh_every must be at least 1, got 0"):
        pipeline.sample(0, refresh_every=0)


def test_the_cached_backbone_moves_a_trained_model_little():
    pipeline = Pipeline.load(tiny.student())
    exact, cached = (pipeline.sample_tokens([0, 1, 2, 3] * 8, seed=1, refresh_every=n) for n in (1, 2))
    other = pipeline.sample_tokens([0, 1, 2, 3] * 8, seed=2)
    assert float((exact - cached).square().mean()) < 0.5 * float((exact - other).square().mean())


def test_halton_order_spreads_the_tokens():
    order = masking.halton_order(8)
    assert sorted(order.tolist()) == list(range(64))

    def nearest(positions: Tensor) -> float:
        points = torch.stack([positions // 8, positions % 8], dim=1).double()
        return float((torch.cdist(points, points) + 99 * torch.eye(len(points))).min(dim=1).values.mean())

    random = [nearest(ImageNoise(0, [i]).permutation(64)[0, :16]) for i in range(20)]
    assert nearest(order[:16]) > 1.2 * float(np.mean(random))
    moved = masking.shifted(order, 8, torch.tensor([0, 9]))
    assert moved[0].equal(order)
    assert sorted(moved[1].tolist()) == list(range(64))
    assert int(moved[1, 0]) == (order[0] // 8 + 1) % 8 * 8 + (order[0] % 8 + 1) % 8


def test_halton_order_of_an_image_does_not_depend_on_the_batch():
    pipeline = model(student=True)
    together = pipeline.sample_tokens([0, 1, 2], seed=1, order="halton")
    assert_close(pipeline.sample_tokens([1], seed=1, first_image=1, order="halton")[0], together[1])
    assert not torch.equal(together, pipeline.sample_tokens([0, 1, 2], seed=1))


@pytest.mark.parametrize("folder", [tiny.teacher, tiny.student])
def test_bf16_weights(folder):
    plain, half = Pipeline.load(folder()), Pipeline.load(folder(), dtype="bf16")
    dtypes = {p.dtype for name, p in half.network.named_parameters() if "final_layer.linear" not in name}
    assert dtypes == {torch.bfloat16}
    assert half.network.head.final_layer.linear.weight.equal(plain.network.head.final_layer.linear.weight)
    a, b = (m.sample([0, 1, 2, 3], seed=2).astype(float) for m in (plain, half))
    assert not np.array_equal(a, b)
    assert np.abs(a - b).mean() < 10  # of 255
    with pytest.raises(ValueError, match="unknown dtype 'half'"):
        Pipeline.load(folder(), dtype="half")  # type: ignore[arg-type]


def test_packed_linears(monkeypatch):
    monkeypatch.setattr(cpu, "PACKED", 32 * 32)
    plain, packed = network(), network()
    use_onednn(packed, pack=True)
    tokens, orders, labels = states()
    visible, target = asked(orders, 1)
    with torch.inference_mode():
        found, expected = (n.condition(tokens, visible, labels, target) for n in (packed, plain))
        assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_close(packed.condition(tokens, visible, labels, target), expected, rtol=1e-5, atol=1e-5)
    assert list(plain.state_dict()) == list(packed.state_dict())
    copied = copy.deepcopy(packed)
    with torch.inference_mode():
        assert_close(copied.condition(tokens, visible, labels, target), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # a changed weight is packed again
        for one in (plain, packed):
            one.decoder_blocks[0].get_submodule("mlp.fc1").get_parameter("weight").mul_(2)
        found, expected = (n.condition(tokens, visible, labels, target) for n in (packed, plain))
        assert_close(found, expected, rtol=1e-5, atol=1e-5)
        packed.to_bf16()
        assert packed.condition(tokens, visible, labels, target).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("inputs", "outputs", "shape"), [(12, 20, (6, 5)), (20, 12, (6, 5)), (512, 256, (2,)), (12, 20, (0, 5))]
)
def test_onednn_linear(monkeypatch, inputs, outputs, shape):
    """Small and large weights, many rows and none: the numbers and gradients of PyTorch's layer."""
    monkeypatch.setattr(cpu, "WORK", 1)
    called, original = [], cpu.product
    monkeypatch.setattr(cpu, "product", lambda *args: called.append(len(args)) or original(*args))
    for bias in (True, False):
        plain = torch.nn.Linear(inputs, outputs, bias=bias)
        fast = copy.deepcopy(plain)
        use_onednn(fast, pack=True)
        assert type(fast) is OneDNNLinear
        x, out_gradient = (torch.randn(*shape, n) for n in (inputs, outputs))
        found = []
        for layer in (plain, fast):
            mine = x.clone().requires_grad_()
            y = layer(mine)
            found.append((y, *torch.autograd.grad(y, [mine, *layer.parameters()], out_gradient)))
        assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
        fast.requires_grad_(False)  # a teacher: the gradient passes through
        mine = x.clone().requires_grad_()
        assert_close(torch.autograd.grad(fast(mine), mine, out_gradient)[0], found[0][1], rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            assert_close(fast(x), found[0][0].detach(), rtol=1e-5, atol=1e-5)
            assert_close(fast.then_gelu(x), F.gelu(found[0][0]), rtol=1e-5, atol=1e-5)
        assert_close(fast.then_gelu(x), F.gelu(found[0][0]), rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert fast(x).dtype == torch.bfloat16
    assert len(called) == (16 if 0 not in shape else 0)


def test_trained_layers_are_not_packed(monkeypatch):
    """A fused optimizer changes weights without counting their versions."""
    monkeypatch.setattr(cpu, "PACKED", 1)
    monkeypatch.setattr(cpu, "WORK", 1)
    layer = torch.nn.Linear(8, 8)
    use_onednn(layer)
    optimizer, x = torch.optim.Adam(layer.parameters(), 0.1, fused=True), torch.randn(3, 8)
    for _ in range(3):
        with torch.no_grad():
            assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        layer(x).square().sum().backward()
        optimizer.step()


def test_attention_in_bf16_on_the_cpu():
    exact = [torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7)]
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    expected = cpu.attention(*exact)
    with torch.autocast("cpu", torch.bfloat16):
        out = cpu.attention(*half)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            assert cpu.attention(*half).equal(out)
            mean = torch.stack([cpu.attention(*half, dropout=0.5) for _ in range(2000)]).float().mean(0)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), expected, rtol=0.05, atol=0.02)
    assert_close(mean, expected, rtol=0.1, atol=0.15)
    found = torch.autograd.grad(out.float().square().sum(), half)
    for a, b in zip(found, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert_close(a.float(), b, rtol=0.1, atol=0.05)


def held_by(function: Any) -> list[Any]:
    """What a function holds, and the functions that it holds."""
    held = [cell.cell_contents for cell in function.__closure__ or ()] + list(function.__defaults__ or ())
    inner = [x.evaluate if isinstance(x, TokenSampler) else x for x in held]
    return held + [x for one in inner if isinstance(one, FunctionType) for x in held_by(one)]


def test_recorded_functions_read_no_tensor_but_their_inputs():
    """A graph would read a tensor of the closure at its old address when it has long been freed."""
    kinds = []

    def recording(kind: object, function: Any, *inputs: Tensor) -> Tensor:
        kinds.append(kind)
        assert not [x for x in held_by(function) if isinstance(x, Tensor)], kind
        return function(*inputs)

    for student in (True, False):
        pipeline = model(student)
        pipeline.call = recording
        pipeline.sample_tokens([0, 1], seed=1)
        pipeline.sample([0, 1], seed=1)
    teacher = {("backbone", True), ("chain", 1.0)}
    assert set(kinds) == teacher | {("scalars",), ("AR step", ("student", (300,), 1.0), False), "images"}


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_compiled():
    plain, compiled = model(student=True, depth=1), model(student=True, depth=1).accelerate(compile=True)
    assert not any(isinstance(layer, OneDNNLinear) for layer in compiled.network.modules())  # the compiler refuses them
    assert_close(compiled.sample_tokens([0, 1], seed=1), plain.sample_tokens([0, 1], seed=1), rtol=1e-4, atol=1e-4)


def test_graphs_need_cuda():
    pipeline = model(student=True)
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device, but the model is on cpu"):
        pipeline.accelerate(graphs=True)
    assert pipeline.call is plainly
    pipeline.call = lambda kind, function, *inputs: function(*inputs)  # as good as any that is not plain
    with pytest.raises(ValueError, match="refresh_every 2 does not work with CUDA graphs"):
        pipeline.settings(refresh_every=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("student", [True, False])
def test_graphs_draw_the_same(student: bool):
    plain, graphed = (model(student).to("cuda") for _ in range(2))
    graphed.accelerate(graphs=True)
    for seed in (1, 2):
        for settings in ({}, {"guidance_schedule": "linear"} if not student else {}, {"ar_steps": 3}):
            expected = plain.sample_tokens([0, 1, None], seed=seed, **settings)
            assert_close(graphed.sample_tokens([0, 1, None], seed=seed, **settings), expected, rtol=1e-4, atol=1e-4)
            images = [each.sample([0, 1, None], seed=seed, **settings).astype(int) for each in (plain, graphed)]
            assert abs(images[0] - images[1]).max() <= 1
    assert isinstance(graphed.call, Graphs)
    recorded = len(graphed.call)
    graphed.sample([2, 1, 0], seed=3)
    assert len(graphed.call) == recorded


class Rehearsed:
    """Calls as `Graphs` does, without CUDA: the first call of a kind and shape computes several times."""

    def __init__(self):
        self.known = set()

    def __call__(self, kind: Hashable, function: Callable[..., Any], *inputs: Any) -> Any:
        leaves, structure = tree_flatten(inputs)
        key = key_of(kind, leaves, structure)
        with torch.random.fork_rng(devices=[]):  # which dropout reads
            for _ in range(0 if key in self.known else 2):
                function(*tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in leaves], structure))
        self.known.add(key)
        return tree_map_only(Tensor, Tensor.clone, function(*inputs))


def trained(folder: Path, **changes: Any) -> dict[str, Tensor]:
    """Weights of a student, all of it trained, after a few updates of its teacher, with dropout, and of itself."""
    common: dict[str, Any] = {"steps": 6, "batch": 8, "sample_every": 0, **changes}
    model = dataclasses.replace(tiny.MODEL, dropout=0.1)
    train(TrainConfig(model=model, sampling=tiny.SAMPLING, **common), folder / "teacher")
    student = StudentConfig(guidance_range=(1.0, 3.0), evaluations=2)
    config = DistillConfig(student=student, trained="all", auxiliary="network", ar_steps=4, **common)
    distill(config, folder / "teacher", folder / "student")
    return load_file(folder / "student" / "model.safetensors")


def test_updates_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = trained(tmp_path / "plain")
    calls = []
    for module in ("marval.train", "marval.distill"):
        monkeypatch.setattr(f"{module}.caller", lambda *_: calls.append(Rehearsed()) or calls[-1])
    rehearsed = trained(tmp_path / "rehearsed")
    assert all(torch.equal(rehearsed[name], plain[name]) for name in plain)
    kinds = [{kind if isinstance(kind, str) else kind[0] for kind, *_ in call.known} for call in calls]
    assert kinds == [{"teacher"}, {"context", "auxiliary", "student"}]


def test_a_bad_update_from_graphs_changes_nothing():
    """It is found one update later: until then, the weights must be as if it had not been."""
    weights = {name: torch.nn.Parameter(torch.ones(3)) for name in ("a", "b")}
    optimizer = torch.optim.Adam(weights.values(), 0.1, fused=True)
    module = torch.nn.ParameterDict(weights)
    update = Update("student", module, optimizer, TrainConfig(), World(0, 1, torch.device("cpu")), Rehearsed())

    def loss(factor: Tensor) -> tuple[Tensor, Tensor]:
        return module["a"].sum() + (factor * module["b"]).sum(), factor

    def state() -> list[Tensor]:
        moments = [x for values in optimizer.state_dict()["state"].values() for x in values.values()]
        return [x.detach().clone() for x in (*weights.values(), *moments)]

    update.backward(loss, torch.tensor(2.0))
    update.step(0)
    good = state()
    for bad in ("nan", "inf"):
        update.backward(loss, torch.tensor(float(bad)))
        update.step(1)
        assert all(map(torch.equal, state(), good))
        with pytest.raises(FloatingPointError, match="step 2: the gradient of b of the student is not finite"):
            update.backward(loss, torch.tensor(2.0)) if bad == "nan" else update.check()
        update.loss = None
    update.check()
    with pytest.raises(AssertionError, match="found_inf"):
        Update("student", module, torch.optim.SGD(weights.values(), 0.1), TrainConfig(), update.world, Rehearsed())


def test_calls_that_may_share_a_graph():
    x, y = torch.zeros(2, 3), torch.ones(2, 3)

    def key(*inputs: Any, kind: Hashable = "sum") -> Hashable:
        return key_of(kind, *tree_flatten(inputs))

    assert key(x, 1.0, {"a": (y, x)}) == key(y, 1.0, {"a": (x, x)})
    different = [
        key(x, 1), key(x, True), key(x, 1.0), key(1, x), key(x, x), key((x, x)), key(x, [x]), key(x[:1], 1),
        key(x.double(), 1), key({"a": x}), key({"b": x}), key(x, 1, kind="mean"),
    ]  # fmt: skip
    with torch.no_grad():
        different.append(key(x, 1))
    assert len(set(different)) == len(different)


@pytest.mark.parametrize(
    ("config", "world", "message"),
    [
        ({}, World(0, 1, torch.device("cpu")), "graphs need a CUDA device, but this run is on cpu: leave --graphs out"),
        ({}, World(0, 2, torch.device("cuda")), "graphs are for one process, not for 2"),
        ({"accumulate": 2}, None, "graphs do not work with accumulate 2: use one of them"),
        ({"activation_checkpointing": True}, None, "graphs do not work with activation_checkpointing True"),
    ],
)  # fmt: skip
def test_updates_that_graphs_cannot_record(config: dict[str, Any], world: World | None, message: str):
    with pytest.raises(ValueError, match=message):
        caller(TrainConfig(graphs=True, **config), world or World(0, 1, torch.device("cuda")))
    assert caller(TrainConfig(**config), world or World(0, 1, torch.device("cuda"))) is plainly


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bf16", 1e-3)])
def test_updates_from_graphs_train_the_same(
    tmp_path: Path, precision: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    for module in ("marval.train", "marval.distill"):
        monkeypatch.setattr(f"{module}.caller", lambda *args: calls.append(caller(*args)) or calls[-1])
    common = {"device": "cuda", "precision": precision}
    plain, graphed = (trained(tmp_path / str(graphs), graphs=graphs, **common) for graphs in (False, True))
    assert calls[:2] == [plainly, plainly]
    assert all(isinstance(call, Graphs) and len(call) > 0 for call in calls[2:])
    for name, weight in plain.items():
        assert_close(graphed[name], weight, rtol=1e-3, atol=tolerance)
