"""Recipes: the published settings, whole and consistent with each other; what their docstrings say of time."""

import dataclasses
import re
from typing import Any

import pytest
import torch

from marval import recipes
from marval.config import PRESETS, DistillConfig, GSIMConfig, SamplingConfig, TrainConfig
from marval.dryrun import plan
from marval.importing import GUIDANCE
from marval.reward_files import listed, short_name

SIZES = ("b", "l", "h")
PICTURES = [name + size for name in ("cifar10", "imagenette64", "emoji") for size in ("", "-cpu")]


def test_every_verb_has_every_recipe():
    names = {"digits", "fashion-mnist", *PICTURES, *(f"imagenet256-{size}" for size in SIZES)}
    for made in (recipes.TRAIN, recipes.DISTILL, recipes.RL, recipes.EVALUATE):
        assert set(made) == names
        for make in made.values():
            assert make() == make()
            assert make.__doc__


@pytest.mark.parametrize(
    ("kind", "name", "value", "known"),
    [
        (DistillConfig, "auxiliary", "netwrok", "head, network"),
        (GSIMConfig, "distance", "l2", "pseudo-huber, squared"),
        (TrainConfig, "mask_ratios", "tokens", "training, inference"),
        (SamplingConfig, "solver", "euler", "ancestral, ddim"),
    ],
)  # fmt: skip
def test_a_misspelt_choice_is_refused(kind: Any, name: str, value: str, known: str):
    with pytest.raises(ValueError, match=f"unknown {name} '{value}': choose one of {known}"):
        kind(**{name: value})


@pytest.mark.parametrize("size", SIZES)
def test_teacher_has_the_published_settings(size: str):
    config, preset = recipes.TRAIN[f"imagenet256-{size}"](), f"mar-{size}"
    assert dataclasses.replace(config.model, dropout=0.0) == PRESETS[preset]
    assert config.steps * config.batch / 1_281_167 == pytest.approx(800, rel=1e-5)
    assert config.warmup / config.steps == pytest.approx(1 / 8, rel=1e-5)
    found = {name: getattr(config, name) for name in (
        "batch", "lr", "decay", "ema", "weight_decay", "clip_grad", "class_drop", "head_batch_mul", "mask_ratios",
        "image_size", "patch_size", "flip",
    )}  # fmt: skip
    assert found == {
        "batch": 2048, "lr": 8e-4, "decay": False, "ema": 0.9999, "weight_decay": 0.02, "clip_grad": 3.0,
        "class_drop": 0.1, "head_batch_mul": 4, "mask_ratios": "training", "image_size": 256, "patch_size": 1,
        "flip": True,
    }  # fmt: skip
    assert config.model.dropout == 0.1
    assert config.sampling.guidance == GUIDANCE[preset]
    assert config.sampling.guidance_schedule == "linear"


@pytest.mark.parametrize("size", SIZES)
def test_student_and_aligned_fit_each_other(size: str):
    student, aligned = recipes.DISTILL[f"imagenet256-{size}"](), recipes.RL[f"imagenet256-{size}"]()
    assert student.steps * student.batch / 1_281_167 == pytest.approx(30, rel=1e-3)
    assert aligned.steps * aligned.batch / 1_281_167 == pytest.approx(5, rel=1e-3)
    assert student.ar_steps == aligned.ar_steps == 64
    assert student.student.guidance == 1.2
    assert 1e-6 <= aligned.gsim.lr < student.gsim.lr <= 1e-5
    assert aligned.prompt == "a high-quality and harmonious picture of {class}"
    assert aligned.reward.startswith("pickscore:")
    evaluation = recipes.EVALUATE[f"imagenet256-{size}"]()
    assert (evaluation.num_images, evaluation.features) == (50_000, "inception")
    assert evaluation.rewards == f"{aligned.reward},{aligned.held_out}"
    assert evaluation.prompt == aligned.prompt
    names = [short_name(spec) for spec in listed(evaluation.rewards)]
    assert names == ["pickscore", "clip", "imagereward", "hps", "aesthetic"]


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_fit_each_other_and_the_machine(name: str):
    from marval.models.mar import MAR

    teacher, student, aligned = recipes.TRAIN[name](), recipes.DISTILL[name](), recipes.RL[name]()
    made = recipes.sizes(name, teacher)
    assert made == recipes.sizes(name, student) == recipes.sizes(name, aligned)
    few = name in ("cifar10-cpu", "emoji-cpu")
    tokens, dim = (16 if few else 64), (32 if few or "imagenette" in name else 48)
    assert (made.num_tokens, made.token_dim, made.num_classes) == (tokens, dim, 10)
    assert teacher.data == student.data
    assert teacher.sampling.ar_steps == student.ar_steps == aligned.ar_steps
    assert teacher.flip == student.flip
    assert made.head_depth >= 6
    on_cpu = name.endswith("-cpu")
    assert {config.precision for config in (teacher, student, aligned)} == {"bf16" if on_cpu else "auto"}
    assert teacher.batch <= 64 or not on_cpu
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MAR(made).parameters())
    if not on_cpu:
        assert 2 * parameters < 16 * 2**20, "run whole in minutes; its weights travel in float16"
    else:
        assert 24 * parameters < 64 * 2**20, "checkpoint.pt (16 bytes each), model.safetensors and best/ travel"
    reference = recipes.EVALUATE[name]().reference.removesuffix(":train")
    assert teacher.data.startswith(reference.removesuffix(".npz"))


def test_plans_with_a_small_autoencoder():
    made = dataclasses.replace(recipes.RL["imagenette64"](), batch=2, ar_steps=1)
    latents, pixels = (
        plan("rl", made, recipes.sizes(name, made), this_machine=False) for name in ("imagenette64", "cifar10")
    )
    decoding = 2e9  # about what a 64x64 image takes
    assert latents["operations"]["image"] > pixels["operations"]["image"] + decoding


def test_data_of_the_recipes_is_the_users():
    from marval.data import load_data

    config = recipes.TRAIN["imagenet256-b"]()
    assert config.data == recipes.DISTILL["imagenet256-b"]().data
    with pytest.raises(ValueError, match=config.data):
        load_data(config.data, "train", config.image_size, config.classes)


def test_sizes_are_those_of_the_networks_that_runs_make():
    from marval.data import load_data
    from marval.tokenizers import load_tokenizer
    from marval.train import build_teacher

    config, data = recipes.TRAIN["digits"](), load_data("digits", "train")
    tokenizer = load_tokenizer(config.tokenizer, data.images.shape[1], config.patch_size, data.images.shape[3])
    made = build_teacher(config, tokenizer, data.class_names).network.config
    assert made == recipes.sizes("digits", config) == recipes.sizes("digits", recipes.RL["digits"]())
    assert recipes.sizes("digits", recipes.EVALUATE["digits"]()) == made
    fashion = recipes.sizes("fashion-mnist", recipes.RL["fashion-mnist"]())
    assert (fashion.grid, fashion.token_dim, fashion.width) == (7, 16, 128)
    for size in SIZES:
        name = f"imagenet256-{size}"
        assert recipes.sizes(name, recipes.DISTILL[name]()) == PRESETS[f"mar-{size}"]
        assert recipes.sizes(name, recipes.TRAIN[name]()).dropout == 0.1
    own = dataclasses.replace(config, data="photos", image_size=32)
    assert (recipes.sizes("digits", own).grid, recipes.sizes("digits", own).token_dim) == (16, 12)
    with pytest.raises(ValueError, match="a dry run reads no data: give --image-size"):
        recipes.sizes("digits", dataclasses.replace(config, data="photos"))


def seconds(docstring: str | None) -> float:
    """Of "Dry run: 1.4 hours." in a docstring."""
    found = re.search(r"Dry run: ([\d.]+) (hours|days)\.", docstring or "")
    assert found, docstring
    return float(found[1]) * {"hours": 3600, "days": 86400}[found[2]]


@pytest.mark.parametrize(("verb", "made"), [("train", recipes.TRAIN), ("distill", recipes.DISTILL)])
def test_time_in_the_docstring_is_that_of_the_plan(verb: Any, made: dict[str, Any]):
    make = made["imagenet256-b"]
    planned = plan(verb, make(), recipes.sizes("imagenet256-b", make()), 8, this_machine=False)
    assert seconds(make.__doc__) == pytest.approx(planned["time"]["H200"]["seconds"], rel=0.05)
    assert planned["epochs"] == pytest.approx({"train": 800, "distill": 30 / 4}[verb], rel=1e-3)
    for size in "lh":
        assert seconds(made[f"imagenet256-{size}"].__doc__) > 1.9 * seconds(make.__doc__)
