"""Training of a teacher: it learns, its settings act, its data may be a folder, and it stops where it must."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from marval.config import MARConfig, SamplingConfig, TrainConfig
from marval.distributed import World
from marval.ema import EMA
from marval.images import save_png
from marval.pipeline import Pipeline
from marval.tokenizers import load_tokenizer
from marval.train import adamw, build_teacher, sizes, train
from marval.update import Update, warmup_then_cosine

SHORT = TrainConfig(
    steps=3, batch=8, log_every=1, sample_every=0, warmup=2, model=tiny.MODEL, sampling=tiny.SAMPLING
)  # fmt: skip


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in tiny.metrics(out)]


def test_the_loss_falls_on_digits():
    rows = tiny.metrics(tiny.teacher())
    assert [row["step"] for row in rows] == list(range(20, 301, 20))
    assert np.mean([row["mse"] for row in rows[-3:]]) < 0.4 < rows[0]["mse"]
    for row in rows:
        assert row["loss"] == pytest.approx(row["mse"] + row["vb"], rel=1e-4)
    assert "CC BY 4.0" in str(Pipeline.load(tiny.teacher()).provenance)


def test_activation_checkpointing_changes_nothing(tmp_path: Path):
    for value in (False, True):
        model = dataclasses.replace(tiny.MODEL, dropout=0.1)
        train(dataclasses.replace(SHORT, model=model, activation_checkpointing=value), tmp_path / str(value))
    assert losses(tmp_path / "True") == losses(tmp_path / "False")


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_compiled_blocks_change_nothing(tmp_path: Path):
    for value in (False, True):
        train(dataclasses.replace(SHORT, compile=value), tmp_path / str(value))
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-4)


def test_every_setting_changes_the_run(tmp_path: Path):
    variants = {
        "plain": {},
        "bf16": {"precision": "bf16"},
        "seed": {"seed": 1},
        "inference": {"mask_ratios": "inference"},
        "classes": {"class_drop": 0.9},
        "shift": {"shift": 2},
        "timesteps": {"head_batch_mul": 1},
        "patches": {"patch_size": 4},
        "lr": {"lr": 1e-2},
        "dropout": {"model": dataclasses.replace(tiny.MODEL, dropout=0.5)},
        "warmup": {"warmup": 1},
        "decay": {"decay": False},
        "flip": {"flip": True},
        "clip": {"clip_grad": 1e-3},
    }
    found = {}
    for name, changes in variants.items():
        train(dataclasses.replace(SHORT, steps=5, **changes), tmp_path / name)  # the rate decays from the fourth on
        found[name] = tuple(row[key] for row in tiny.metrics(tmp_path / name) for key in ("loss", "grad_norm"))
        assert np.isfinite(found[name]).all()
    assert len(set(found.values())) == len(variants)
    assert found["clip"] == pytest.approx(found["plain"], rel=0.02), "Adam takes no notice of a scale"
    assert found["bf16"] == pytest.approx(found["plain"], rel=0.02)
    sizes = Pipeline.load(tmp_path / "patches").network.config
    assert (sizes.grid, sizes.token_dim) == (2, 16)


def test_the_optimizer():
    """Only matrices of the backbone decay, by the rate that was asked for, and the schedule reaches every group."""
    tokenizer = load_tokenizer("pixels", 8, 2, 1)
    config = dataclasses.replace(SHORT, weight_decay=0.3, lr=0.01)
    network = build_teacher(config, tokenizer, ["a", "b"]).network
    optimizer = adamw(network, config)
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    names = {name for name, p in network.named_parameters() if id(p) in decayed}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert {"class_emb.weight", "decoder_embed.weight"} < names
    assert not any(name.startswith("head.") or name.endswith(".bias") for name in names)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(network.parameters()))
    update = Update("teacher", network, optimizer, config, World(0, 1, torch.device("cpu")))
    update.backward(lambda: (network.class_emb.weight.sum(), None))
    update.step(0, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0025, 0.0025]


def test_a_wider_head_for_wider_tokens():
    """In proportion to the square root of a token's channels, beyond 16."""
    for patch_size, factor in ((2, 1), (8, 2)):
        tokenizer = load_tokenizer("pixels", 8, patch_size, 1)
        wider, plain = (
            sizes(dataclasses.replace(SHORT, patch_size=patch_size, widen_head=widen), tokenizer, 10).head_width
            for widen in (True, False)
        )
        assert wider == factor * plain


def test_nothing_else_in_the_process_changes(tmp_path: Path):
    """The global generator goes on as if there had been no training; a folder may be named by a string."""
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    train(dataclasses.replace(SHORT, steps=1), str(tmp_path / "run"))
    assert torch.equal(torch.randn(3), expected)


def test_a_folder_of_colour_images(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3), dtype=np.uint8)
    for i, image in enumerate(noise):
        (tmp_path / "data" / ("cat", "dog")[i % 2]).mkdir(parents=True, exist_ok=True)
        save_png(tmp_path / "data" / ("cat", "dog")[i % 2] / f"{i}.png", image)
    config = dataclasses.replace(SHORT, data=str(tmp_path / "data"), image_size=8, patch_size=4, sample_every=3)
    sampling = SamplingConfig(ar_steps=4, head_steps=2)
    model = train(dataclasses.replace(config, sampling=sampling), tmp_path / "run")
    assert model.class_names == ["cat", "dog"]
    assert model.sample(["dog", None]).shape == (2, 8, 8, 3)
    assert model.network.config.token_dim == 3 * 4 * 4
    assert (tmp_path / "run" / "samples" / "step-000003.png").exists()
    with pytest.raises(ValueError, match="image size 8 is not a multiple of the patch size 3"):
        train(dataclasses.replace(config, patch_size=3), tmp_path / "other")


def test_what_is_shipped_is_the_average(tmp_path: Path):
    model = train(dataclasses.replace(SHORT, ema=0.0), tmp_path / "last")
    slow = train(dataclasses.replace(SHORT, ema=0.99), tmp_path / "mean")
    state = torch.load(tmp_path / "mean" / "checkpoint.pt", weights_only=True)
    assert losses(tmp_path / "last") == losses(tmp_path / "mean")
    name = "head.input_proj.weight"
    assert torch.equal(model.network.state_dict()[name], state["network"][name])
    assert not torch.equal(slow.network.state_dict()[name], state["network"][name])
    assert torch.equal(load_file(tmp_path / "mean" / "model.safetensors")[name], state["ema"]["average"][name])


def test_average_of_a_parameter():
    module = torch.nn.Linear(1, 1, bias=False)
    ema, expected = EMA(module, 0.5), module.weight.item()
    for n in range(12):
        with torch.no_grad():
            module.weight.fill_(float(n))
        ema.update(module)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    averaged = ema.averaged()
    assert averaged.weight.item() == pytest.approx(expected, rel=1e-5)
    ema.update(module)
    assert averaged.weight.item() == pytest.approx(expected, rel=1e-5), "a copy"
    assert module.weight.item() == 11


def test_learning_rate():
    factors = [warmup_then_cosine(step, 100, 10, True) for step in range(101)]
    assert factors[:10] == [(i + 1) / 10 for i in range(10)]
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0)
    assert warmup_then_cosine(60, 100, 10, False) == 1


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path):
    with pytest.raises(
        FloatingPointError, match=r"step \d+: the (loss|gradient of [\w.]+) of the teacher is not finite"
    ):
        train(dataclasses.replace(SHORT, steps=20, lr=1e30, warmup=0, clip_grad=1e30), tmp_path / "run")
    assert not list(tmp_path.glob("run/*.safetensors"))

    weight = torch.nn.Parameter(torch.zeros(2))
    module = torch.nn.ParameterDict({"scale": weight})

    def update(loss: Callable[[Tensor], Tensor], step: int, weights: tuple[float, ...] = (1.0,)) -> Tensor:
        optimizer, world = torch.optim.SGD([weight], 0.1), World(0, 1, torch.device("cpu"))
        result = Update("auxiliary", module, optimizer, SHORT, world)
        for part in weights:
            assert result.backward(lambda: (loss(weight), "rest"), weight=part)[1] == "rest"
        return result.step(step)

    with pytest.raises(FloatingPointError, match="step 8: the loss of the auxiliary is not finite"):
        update(lambda w: w.sum() + float("nan"), 7)
    with pytest.raises(FloatingPointError, match="step 9: the gradient of scale of the auxiliary is not finite"):
        update(lambda w: (w * float("inf")).sum(), 8)
    assert torch.equal(weight, torch.zeros(2)), "a bad gradient is never applied"
    assert update(lambda w: 30 * w.sum(), 9, (0.5, 0.25, 0.25)) == pytest.approx(30 * 2**0.5)
    torch.testing.assert_close(weight.detach().norm(), torch.tensor(0.3))  # clipped to a norm of 3


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ValueError, match="is not empty and not a run of marval: choose another --out"):
            train(SHORT, tmp_path, resume)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0}, {"batch": -1}, {"lr": 0.0}, {"ema": 1.0}, {"class_drop": 1.0}, {"head_batch_mul": 0},
        {"shift": -1}, {"clip_grad": 0.0}, {"sample_every": -1}, {"save_every": 0}, {"log_every": 0},
        {"lr": float("nan")}, {"warmup": -1}, {"weight_decay": -0.1}, {"patch_size": 0}, {"seed": -1},
        {"precision": "fp16"}, {"mask_ratios": "none"},
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_named(changes: dict[str, object]):
    name, value = next(iter(changes.items()))
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        dataclasses.replace(SHORT, **changes)


def test_bad_sizes_are_named():
    for changes in ({"depth": 0}, {"dropout": 1.0}, {"heads": 3}, {"buffer_size": 0}, {"head_depth": 0}):
        name, value = next(iter(changes.items()))
        with pytest.raises(ValueError, match=f"model.{name}.*{value}"):
            MARConfig(**{**vars(tiny.MODEL), **changes})


def test_the_same_seed_gives_the_same_bits_with_threads(tmp_path: Path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = [train(dataclasses.replace(SHORT, steps=60, batch=64), tmp_path / name) for name in ("a", "b")]
    finally:
        torch.set_num_threads(before)
    first, second = (run.network.state_dict() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
