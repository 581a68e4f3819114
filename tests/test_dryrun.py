"""The plan of a run against real runs, closed forms, and what sharding must change."""

import dataclasses
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
import torch

from marval.__main__ import main
from marval.config import (
    PRESETS,
    DistillConfig,
    EvaluateConfig,
    MARConfig,
    RLConfig,
    SamplingConfig,
    StudentConfig,
    TrainConfig,
)
from marval.costs import Work
from marval.distill import distill
from marval.dryrun import machine_rate, plan, table
from marval.models.lora import adapt
from marval.models.mar import MAR
from marval.rl import rl
from marval.train import train

SIZES = {"grid": 4, "token_dim": 4, "num_classes": 10}  # of the digits
MODEL = MARConfig(**SIZES, width=64, depth=2, heads=4, buffer_size=8, head_width=64, head_depth=2)  # type: ignore[arg-type]
ONE_MASK: dict[str, Any] = {"mask_ratios": "inference"}  # with one AR step all tokens are masked in every update


def peak_of(function: Callable[[], Any]) -> int:
    """Bytes alive at once in a real run, networks and data included."""
    with Work() as work:
        function()
    return work.peak


def train_config(**changes: Any) -> TrainConfig:
    settings = {"steps": 1, "batch": 96, "model": MODEL, "sample_every": 0, "device": "cpu", **ONE_MASK}
    return TrainConfig(**{**settings, "sampling": SamplingConfig(ar_steps=1), **changes})


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}, {"accumulate": 3, "head_batch_mul": 8}])
def test_memory_is_that_of_real_training(changes: dict[str, Any], tmp_path: Path):
    planned = plan("train", train_config(**changes), MODEL, this_machine=False)["memory"]
    measured = peak_of(lambda: train(train_config(**changes), tmp_path / "run"))
    assert planned["total"] == pytest.approx(measured, rel=0.05)
    assert planned["activations"] > 0.6 * planned["total"]  # so the comparison is about them


def test_activations_are_what_autograd_saves():
    """The sum of different storages that a real forward pass saves, counted by hooks."""
    from marval.diffusion import cosine_schedule
    from marval.models.mar import MAR
    from marval.train import teacher_loss

    network, count, length = MAR(MODEL), 32, 16
    saved: dict[int, torch.Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    masked = torch.arange(length).expand(count, length)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        teacher_loss(
            network, cosine_schedule(), torch.zeros(count, length, 4), masked[:, :0], masked, torch.zeros(count).long(),
            torch.zeros(count, length, 4).long(), torch.zeros(count, length, 4, 4),
        )  # fmt: skip
    bytes_saved = sum(x.untyped_storage().nbytes() for x in saved.values())
    planned = plan("train", train_config(batch=count), MODEL, this_machine=False)["memory"]["activations"]
    assert bytes_saved < planned < 1.25 * bytes_saved  # and the temporaries


@pytest.mark.parametrize(
    ("trained", "auxiliary", "accumulate"),
    [("head", "head", 1), ("all", "head", 1), ("all", "head", 4), ("all", "network", 1)],
)
def test_memory_is_that_of_a_real_distillation(trained: Any, auxiliary: Any, accumulate: int, tmp_path: Path):
    config = DistillConfig(
        steps=1, batch=1024, accumulate=accumulate, ar_steps=1, trained=trained, auxiliary=auxiliary, sample_every=0,
        device="cpu",
    )  # fmt: skip
    model = dataclasses.replace(tiny.MODEL, **SIZES)
    planned = plan("distill", config, model, this_machine=False)["memory"]["total"]
    teacher = tiny.teacher()
    measured = peak_of(lambda: distill(config, teacher, tmp_path / "run"))
    assert planned == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_memory_is_that_of_real_rl(checkpoint: bool, tmp_path: Path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def bright(images, prompts):\n    return images.mean((1, 2, 3))\n\nbright.differentiable = True\n"
    )
    config = RLConfig(
        steps=1, batch=512, ar_steps=4, reward=f"{reward}:bright", checkpoint_ar_steps=checkpoint, eval_images=10,
        sample_every=0, anchor=0.0, trained="all", device="cpu",
    )  # fmt: skip
    model = dataclasses.replace(tiny.MODEL, **SIZES)
    planned = plan("rl", config, model, student=StudentConfig(), this_machine=False)
    student = tiny.student()
    measured = peak_of(lambda: rl(config, student, tmp_path / "run"))
    assert planned["memory"]["total"] == pytest.approx(measured, rel=0.15 if checkpoint else 0.25)
    anchored = plan("rl", dataclasses.replace(config, anchor=1.0), model, student=StudentConfig(), this_machine=False)
    assert anchored["operations"]["image"] > planned["operations"]["image"]
    assert anchored["memory"]["weights"] > planned["memory"]["weights"]


def test_rl_counts_reference_adapters_and_what_is_watched():
    settings = {"steps": 10, "batch": 16, "ar_steps": 4, "reward": "f.py:g", "eval_images": 20, "device": "cpu"}
    settings["kl"] = 0.0
    model = dataclasses.replace(MODEL, depth=1, head_depth=1)

    def planned(**changes: Any) -> dict[str, Any]:
        return plan("rl", RLConfig(**{**settings, **changes}), model, this_machine=False)

    plain, kl, lora = planned(), planned(kl=0.1), planned(trained="lora", lora_rank=2)
    network = adapt(MAR(model), 2)
    heads = plain["parameters"]["trained"] / 2  # student and auxiliary
    assert lora["parameters"]["trained"] - heads == sum(p.numel() for p in network.parameters())
    assert lora["memory"]["average"] == 4 * (lora["parameters"]["trained"] - heads)
    assert kl["operations"]["image"] > 1.2 * plain["operations"]["image"]
    group = {"algorithm": "group", "anchor": 0.0}
    once, twice = (planned(**group, inner_updates=n)["operations"]["image"] for n in (1, 2))
    assert once < twice < 2 * once
    anchored = [planned(**{**group, "anchor": 1.0}, inner_updates=n)["operations"]["image"] for n in (1, 2)]
    assert anchored[1] - anchored[0] > 1.01 * (twice - once)  # each of them has its own term of the anchor

    assert plain["operations"]["run"] > 160 * plain["operations"]["image"]  # the looks
    pytest.importorskip("transformers")
    watched = planned(held_out="imagereward:a/b,clip:a/b,hps:c/d.pt,aesthetic:e/f:g", eval_every=5)
    frozen = watched["parameters"]["frozen"]["held-out rewards"]
    assert frozen == pytest.approx(2 * 427.6e6 + 986.1e6 + 447e6, rel=0.01)  # two ViT-L/14, ViT-H/14, ImageReward
    assert watched["memory"]["frozen"] == 4 * frozen
    assert watched["operations"]["image"] == plain["operations"]["image"]
    looks = watched["operations"]["run"] - 160 * watched["operations"]["image"]
    assert looks > 20 * 6 * (2 * 162e9 + 335e9 + 120e9)  # of an image through the towers, and more


def test_operations_equal_the_closed_form():
    width, depth, buffer, length, head = 64, 2, 8, 16, 64
    tokens = {"encoder": buffer, "decoder": buffer + length}  # all are masked
    blocks = sum(2 * n * 12 * width**2 * depth for n in tokens.values())
    attention = sum(4 * n**2 * width * depth for n in tokens.values())
    embed = 2 * (256 * head + head * head) * 4 + 2 * width * head  # of 4 timesteps, and of the condition
    denoise = 2 * 4 * (4 * head + 2 * (5 * head**2) + 2 * head**2 + 8 * head)
    first = 2 * (256 * head * 4 + 4 * 4 * head) * length  # no gradient of the sinusoids and of the noisy tokens
    forward = blocks + 2 * buffer * width**2 + length * (embed + denoise)
    found = plan("train", train_config(), MODEL, this_machine=False)["operations"]["image"]
    expected = 3 * forward - first + 3.5 * attention  # attention computes its scores again in the backward pass
    assert found == pytest.approx(expected, rel=0.01)
    again = plan("train", train_config(activation_checkpointing=True), MODEL, this_machine=False)["operations"]["image"]
    # a block is computed again, but for its last layer, whose output nothing needs
    assert again == pytest.approx(expected + 2 / 3 * blocks + attention, rel=0.01)


def test_published_sizes_and_bf16():
    config = TrainConfig(batch=2, steps=10, classes="imagenet", model=PRESETS["mar-b"])
    found = plan("train", config, PRESETS["mar-b"], this_machine=False)
    assert found["parameters"]["total"] == 207_924_768
    assert found["precision"] == "bf16"
    assert found["epochs"] == pytest.approx(20 / 1_281_167)
    memory = found["memory"]
    assert memory["weights"] == memory["gradients"] == memory["average"] == memory["optimizer"] / 2 == 4 * 207_924_768

    # bf16 halves what a block saves but for its norms; the casts of the weights do not grow with the batch
    small = dataclasses.replace(PRESETS["mar-b"], depth=1, head_depth=1)

    def activations(precision: Any, batch: int) -> int:
        settings = dataclasses.replace(config, batch=batch, precision=precision)
        return plan("train", settings, small, this_machine=False)["memory"]["activations"]

    slopes = [activations(precision, 8) - activations(precision, 4) for precision in ("bf16", "float32")]
    assert 0.5 < slopes[0] / slopes[1] < 0.8


def test_processes_and_sharding():
    config = DistillConfig(steps=100, batch=64, ar_steps=4, trained="head", precision="bf16", accumulate=2)
    model = dataclasses.replace(MODEL, depth=1, head_depth=1)
    one = plan("distill", config, model, this_machine=False)
    four = plan("distill", config, model, 4, this_machine=False)
    split = plan("distill", dataclasses.replace(config, shard=True), model, 4, this_machine=False)
    assert (one["batch"]["part"], four["batch"]["part"]) == (32, 8)
    assert four["operations"]["run"] == pytest.approx(one["operations"]["run"], rel=1e-3)
    assert four["time"]["H200"]["seconds"] == pytest.approx(one["time"]["H200"]["seconds"] / 4, rel=1e-3)
    for name in ("weights", "optimizer", "average"):
        assert four["memory"][name] == one["memory"][name] == pytest.approx(4 * split["memory"][name], rel=1e-3)
    assert split["memory"]["activations"] == four["memory"]["activations"] < one["memory"]["activations"]
    assert split["memory"]["gathered"] > 0
    json.dumps(split)
    text = table(split)
    assert "4 processes" in text
    assert "split over the processes (FSDP2)" in text
    assert "in 2 parts of 8" in text
    assert "each at 33% of 790 TFLOP/s" in text
    assert all(len(line) <= 120 for line in text.splitlines())
    with pytest.raises(ValueError, match="batch 64 is too small for 40 processes with 2 parts each"):
        plan("distill", config, MODEL, 40)


def test_contexts_that_stay_cost_once():
    """What is saved are the teacher's passes, whatever is trained: the student's conditions are made anew."""
    model = dataclasses.replace(MODEL, depth=1, head_depth=1)
    saved = []
    for trained in ("head", "all"):
        config = DistillConfig(steps=100, batch=8, ar_steps=4, trained=trained, rollout=0.5, save_every=8)
        plans = [
            plan("distill", dataclasses.replace(config, context_updates=n), model, images_per_epoch=80,
                 this_machine=False)
            for n in (1, 2, 4)
        ]  # fmt: skip
        one, two, four = (planned["operations"]["run"] for planned in plans)
        assert one - two == pytest.approx(2 * (two - four))
        assert 0 < one - two < one / 2
        assert [planned["epochs"] for planned in plans] == [10, 5, 2.5]
        saved.append(one - two)
    assert saved[0] == pytest.approx(saved[1])


def test_evaluation_sums_its_settings():
    config = EvaluateConfig(num_images=100, batch=10, ar_steps="2,4", guidance="2", head_steps="20", device="cpu")
    model = dataclasses.replace(MODEL, depth=1, head_depth=1)
    teacher = plan("evaluate", config, model, 2, this_machine=False)
    assert (teacher["images"], teacher["steps"]) == (200, 20)  # of two processes one has a chunk to draw
    assert teacher["memory"]["gradients"] == teacher["memory"]["optimizer"] == 0
    assert "trained" in table(teacher)
    student = plan("evaluate", config, model, 2, student=StudentConfig(), this_machine=False)
    few, many = (student["operations"]["image"], teacher["operations"]["image"])
    # the student runs the backbone once per AR step and the head once per token, the teacher twice and 2 x 20 times
    head = 2 * 16 * (4 * 64 + 5 * 64**2 + 2 * 64**2 + 8 * 64)
    assert many - 2 * few == pytest.approx(38 * head, rel=0.05)


def test_processes_of_an_evaluation_draw_whole_chunks():
    model = dataclasses.replace(MODEL, depth=1, head_depth=1)

    def planned(num_images: int, processes: int, **changes: Any) -> dict[str, Any]:
        config = EvaluateConfig(num_images=num_images, ar_steps="1", head_steps="2", device="cpu", **changes)
        return plan("evaluate", config, model, processes, this_machine=False)

    alone, eight, few, even = planned(1000, 1), planned(1000, 8), planned(6, 8), planned(2000, 8)
    assert eight["batch"] == {"total": 1000, "process": 250, "part": 250, "parts": 1}
    assert (alone["steps"], eight["steps"], even["steps"]) == (4, 1, 1)
    assert eight["memory"] == alone["memory"]
    assert eight["operations"]["run"] == alone["operations"]["run"]
    assert eight["time"]["H200"]["seconds"] == pytest.approx(alone["time"]["H200"]["seconds"] / 4)
    assert eight["time"]["H200"]["seconds"] == pytest.approx(even["time"]["H200"]["seconds"])
    thrown = "1,000 images more are drawn and thrown away, as every process draws chunks of 250"
    assert thrown in eight["notes"]
    assert alone["notes"] == even["notes"] == ["the network of the features is not counted"]
    assert (few["batch"]["total"], few["batch"]["process"], few["steps"]) == (6, 6, 1)
    uneven = planned(300, 3, batch=100)  # 250 images and 50, while the third process repeats the last 50
    assert (uneven["batch"]["total"], uneven["batch"]["process"], uneven["steps"]) == (200, 100, 3)
    assert uneven["time"]["H200"]["seconds"] == pytest.approx(even["time"]["H200"]["seconds"], rel=0.01)


def test_evaluations_of_a_curve_draw_whole_chunks():
    config = TrainConfig(
        steps=10, batch=8, eval_every=10, eval_images=100, features="inception", sampling=SamplingConfig(ar_steps=1),
        device="cpu",
    )  # fmt: skip
    for processes in (1, 4):
        planned = plan("train", config, MODEL, processes, this_machine=False)
        looks, time = of_looks(planned), planned["time"]["H200"]
        updates = planned["operations"]["run"] - looks
        assert time["seconds"] * time["rate"] == pytest.approx(updates + processes * looks)  # each draws all 100


def test_text_says_what_was_read_and_what_is_assumed():
    config = RLConfig(reward="f.py:g", batch=64, ar_steps=1, anchor=0.0, device="cpu")
    model = dataclasses.replace(MODEL, depth=1, head_depth=1)
    texts = []
    for accumulate in (1, 4):
        planned = plan("rl", dataclasses.replace(config, accumulate=accumulate), model, 2, this_machine=False)
        texts.append(table(planned))
    assert "no data was read and no network made in memory" in texts[0]
    assert "each at an assumed 22% of 790 TFLOP/s" in texts[0]
    assert "expect longer" not in texts[0]
    assert "measured 11 % with 16 images at a time on a GPU; with parts of 8 expect longer" in texts[1]
    assert all(len(line) <= 120 for line in texts[1].splitlines())


@pytest.mark.parametrize("trained", ["head", "all"])
def test_precision_does_not_change_the_operations_of_several_evaluations(trained: Literal["head", "all"]):
    """The first of them are without gradients, the last has all."""
    made = DistillConfig(trained=trained, batch=4, ar_steps=4, student=StudentConfig(evaluations=2), device="cpu")
    operations = [
        plan("distill", dataclasses.replace(made, precision=precision), MODEL, this_machine=False)["operations"]
        for precision in ("bf16", "float32")
    ]
    assert operations[0] == operations[1]


def test_a_teacher_has_no_evaluations():
    with pytest.raises(ValueError, match="--evaluations is for students"):
        plan("evaluate", EvaluateConfig(evaluations="2", device="cpu"), MODEL, this_machine=False)


def test_a_model_that_comes_along(capsys: pytest.CaptureFixture[str]):
    """By its name, with what it draws with by itself: K = 8."""
    planned = []
    for more in ([], ["--ar-steps", "8"], ["--ar-steps", "16"]):
        args = ["evaluate", "digits", "--model", "digits/student", "--dry-run", "--device", "cpu", *more]
        main(args)
        planned.append(re.search(r"operations .*", capsys.readouterr().out))
    one, same, twice = (found and found[0] for found in planned)
    assert one == same != twice
    main(["rl", "digits", "--student", "digits/student", "--dry-run", "--device", "cpu"])
    assert "trained" in capsys.readouterr().out


def of_looks(planned: dict[str, Any]) -> float:
    """Operations between the updates of a run."""
    return planned["operations"]["run"] - planned["images"] * planned["operations"]["image"]


@pytest.mark.parametrize("token_dim", [4, 16])
def test_evaluations_of_a_curve_cost_what_evaluating_costs(token_dim: int):
    """Of pixels and of KL-16's latents: 3 evaluations in 25 updates, the last at the end."""
    model = MARConfig(**{**SIZES, "token_dim": token_dim}, width=32, depth=1, heads=2, head_width=32, head_depth=1)  # type: ignore[arg-type]
    watched = {"batch": 8, "steps": 25, "eval_every": 10, "eval_images": 40, "features": "inception", "device": "cpu"}
    images = 3 * 40
    latents: dict[str, Any] = {"pixels": False, "this_machine": False}
    plans = []
    for head_steps in (None, 5):
        made = TrainConfig(**watched, eval_head_steps=head_steps, sampling=SamplingConfig(ar_steps=4, head_steps=20))
        plans.append(plan("train", made, model, **latents))
        measured = EvaluateConfig(ar_steps="4", head_steps=str(head_steps or 20), guidance="1.5", batch=8, device="cpu")
        expected = plan("evaluate", measured, model, **latents)["operations"]["image"]
        assert of_looks(plans[-1]) == pytest.approx(images * expected, rel=1e-6)
    made = DistillConfig(**watched, ar_steps=4)
    plans.append(plan("distill", made, model, **latents))
    measured = EvaluateConfig(ar_steps="4", batch=8, device="cpu")
    expected = plan("evaluate", measured, model, student=StudentConfig(), **latents)["operations"]["image"]
    assert of_looks(plans[-1]) == pytest.approx(images * expected, rel=1e-6)
    for planned in plans:
        assert "3 evaluations of 40 images are counted, but for the network of the features" in table(planned)
        assert ("autoencoder" in planned["parameters"]["frozen"]) == (token_dim == 16)
    plain = plan("distill", dataclasses.replace(made, eval_every=0, features=""), model, **latents)
    assert of_looks(plain) == pytest.approx(0, abs=1)
    assert (plain["notes"], plain["parameters"]["frozen"]) == ([], {})
    if token_dim == 16:  # decoding takes more than an update of this network
        assert plans[-1]["memory"]["between"] > plain["memory"]["total"]


def test_rl_decodes_once_for_all_rewards():
    model = MARConfig(grid=4, width=32, depth=1, heads=2, head_width=32, head_depth=1)  # of ImageNet: KL-16
    config = RLConfig(
        reward="f.py:g", held_out="f.py:h,f.py:i", batch=8, ar_steps=4, steps=25, eval_every=10, eval_images=40,
        range_seeds=2, anchor=0.0, device="cpu",
    )  # fmt: skip
    measured = EvaluateConfig(ar_steps="4", batch=8, device="cpu")
    expected = plan("evaluate", measured, model, student=StudentConfig(), this_machine=False)["operations"]["image"]
    found = of_looks(plan("rl", config, model, this_machine=False))
    assert found == pytest.approx((2 + 3) * 40 * expected, rel=1e-6)


def test_autoencoder_is_that_of_the_recipe_or_of_the_folder():
    from marval import recipes

    small = {"depth": 1, "head_depth": 1, "width": 32, "heads": 2, "head_width": 32}
    cheap = {"batch": 16, "ar_steps": 1, "anchor": 0.0, "reward": "f.py:g", "held_out": "", "select": "reward"}
    runs: list[tuple[Any, str, Any, bool]] = [
        ("rl", "fashion-mnist", dataclasses.replace(recipes.RL["fashion-mnist"](), **cheap), False),
        ("evaluate", "fashion-mnist", recipes.EVALUATE["fashion-mnist"](), False),
        ("evaluate", "imagenet256-b", recipes.EVALUATE["imagenet256-b"](), True),
    ]
    for verb, name, config, has in runs:
        model = dataclasses.replace(recipes.sizes(name, config), **small)
        assert model.token_dim == 16
        for pixels, expected in ((None, has), (has, not has)):
            planned = plan(verb, config, model, pixels=pixels, student=StudentConfig(), this_machine=False)
            assert ("autoencoder" in planned["parameters"]["frozen"]) == expected, (name, verb, pixels)


def test_rate_of_this_machine():
    start = time.perf_counter()
    rate = machine_rate()
    assert time.perf_counter() - start < 5
    x = torch.ones(512, 512)
    begin = time.perf_counter()
    torch.mm(x, x)
    assert 1e9 < rate < 1e15
    assert rate > 0.02 * 2 * 512**3 / (time.perf_counter() - begin)


def test_nothing_of_the_plan_stays_behind():
    before = (torch.autocast, torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention)
    with pytest.raises(ValueError, match="number of AR steps must be in"):
        plan("distill", DistillConfig(batch=4, ar_steps=99), MODEL)
    assert before == (
        torch.autocast, torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention
    )  # fmt: skip
