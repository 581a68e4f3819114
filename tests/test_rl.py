"""RL: both algorithms raise a simple reward, the anchors hold, runs stop early, bad rewards are refused."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from marval.algorithms import Batch, GroupGradient, RewardGradient
from marval.config import DistillConfig, GSIMConfig, RLConfig, StudentConfig
from marval.costs import Work
from marval.distill import distill
from marval.distributed import connect
from marval.masking import masked_counts
from marval.matching import Context, Noise, ScoreMatching
from marval.models.mar import gather_tokens
from marval.monitor import image_statistics
from marval.pipeline import Pipeline
from marval.policy import gaussian_log_prob
from marval.rewards import UserReward
from marval.rl import rl
from marval.sampling import last, unmask
from marval.scoring import RewardError
from marval.update import Update, autocast

CODE = """
def brightness(images, prompts):
    return images.mean((1, 2, 3))

brightness.differentiable = True

def black_box(images, prompts):
    return brightness(images, prompts).detach()

def darkness(images, prompts):
    return -brightness(images, prompts)

darkness.differentiable = True

def always(images, prompts):
    return images.new_ones(len(images))

def odd(images, prompts):
    m = images.mean((1, 2, 3))
    return m if images.requires_grad else -m

odd.differentiable = True

def grey(images, prompts):
    return -(brightness(images, prompts) - 0.5).square()

grey.differentiable = True

def picky(images, prompts):
    assert not any(prompt.endswith(" 4") for prompt in prompts), "no fours"
    return brightness(images, prompts)

picky.differentiable = True

def killed(images, prompts):
    from pathlib import Path
    marker = Path(__file__).with_name("calls-left")
    if marker.exists():
        left = int(marker.read_text()) - 1
        if left < 0:
            raise KeyboardInterrupt
        marker.write_text(str(left))
    return brightness(images, prompts)

killed.differentiable = True
"""
CONFIG = RLConfig(
    steps=12, batch=16, ar_steps=4, ema=0.5, log_every=1, eval_every=4, eval_images=40, sample_every=0, patience=0,
    anchor=0.0, kl=0.0, collapse=0, gsim=GSIMConfig(lr=3e-3, auxiliary_lr=3e-3),
)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "my_rewards.py").write_text(CODE)
    return tmp_path / "my_rewards.py"


def brightness(model: Pipeline) -> float:
    return float(model.sample(list(range(10)), num_images=100, seed=9).mean()) / 255


def aligned(out: Path, **changes: object) -> Pipeline:
    return rl(dataclasses.replace(CONFIG, **changes), tiny.student(), out)


def test_gradient_raises_a_differentiable_reward(file: Path, tmp_path: Path):
    before = brightness(Pipeline.load(tiny.student()))
    free = aligned(tmp_path / "free", reward=f"{file}:brightness")
    assert brightness(free) > before + 0.05
    assert brightness(Pipeline.load(tmp_path / "free")) == brightness(free)
    held_out = [row["reward_heldout"] for row in tiny.metrics(tmp_path / "free") if "reward_heldout" in row]
    assert len(held_out) == 4  # before the first update, and after every fourth
    assert held_out[-1] > held_out[0] + 0.05
    anchored = aligned(tmp_path / "anchored", reward=f"{file}:brightness", anchor=3.0)
    assert brightness(anchored) < brightness(free) - 0.02
    assert not (tmp_path / "free" / "scores.safetensors").exists()
    more = dataclasses.replace(CONFIG, reward=f"{file}:brightness", anchor=1.0, steps=2)
    assert rl(more, tmp_path / "anchored", tmp_path / "more").student == anchored.student
    message = r"scores.safetensors does not exist, which --anchor 1 needs: start from .*, or give --anchor 0$"
    with pytest.raises(ValueError, match=message):  # before the reward is made
        rl(dataclasses.replace(more, reward=f"{file}:nothing"), tmp_path / "free", tmp_path / "none")


def test_group_raises_a_black_box(file: Path, tmp_path: Path):
    before = brightness(Pipeline.load(tiny.student()))
    group = {"reward": f"{file}:black_box", "algorithm": "group", "batch": 32, "std": 0.2, "steps": 20}
    free = brightness(aligned(tmp_path / "free", **group))
    assert free > before + 0.03
    held = brightness(aligned(tmp_path / "kl", **group, kl=10.0))
    assert held < free - 0.02
    inner = brightness(aligned(tmp_path / "inner", **group, inner_updates=2, anchor=0.5))
    assert inner > before


def test_kl_holds_the_reward_gradient_too(file: Path, tmp_path: Path):
    reward = {"reward": f"{file}:brightness", "std": 0.2}
    free, held = (aligned(tmp_path / f"{kl}", **reward, kl=kl) for kl in (0.0, 0.3))
    assert brightness(Pipeline.load(tiny.student())) < brightness(held) < brightness(free) - 0.02
    rows = [row for row in tiny.metrics(tmp_path / "0.3") if "kl" in row]
    assert rows[0]["kl"] == 0  # nothing has moved yet
    assert all(row["kl"] > 0 for row in rows[1:])


def test_both_algorithms_reach_the_same_reward(file: Path, tmp_path: Path):
    """An optimum inside the range: both end near it, the black box by the policy gradient alone."""
    reward = {"reward": f"{file}:grey", "ema": 0.8}
    group = {"algorithm": "group", "batch": 64, "std": 0.2, "steps": 60}
    reached = [
        aligned(tmp_path / "gradient", **reward, steps=30, eval_every=30),
        aligned(tmp_path / "group", **reward, **group, eval_every=60),
    ]
    start = tiny.metrics(tmp_path / "group")[0]["reward_heldout"]
    ends = [tiny.metrics(tmp_path / name)[-1]["reward_heldout"] for name in ("gradient", "group")]
    assert start < -0.03
    assert all(end > 0.15 * start for end in ends), (start, ends)
    assert abs(brightness(reached[0]) - brightness(reached[1])) < 0.05


def test_random_steps(file: Path, tmp_path: Path):
    """As many as asked, others in each update, the same in each run of a seed."""
    reward = {"reward": f"{file}:brightness", "steps": 6, "grad_ar_steps": 1, "grad_ar_choice": "random"}
    norms = []
    for name in ("a", "b"):
        aligned(tmp_path / name, **reward, gsim=GSIMConfig(lr=1e-9))
        norms.append([row["grad_norm"] for row in tiny.metrics(tmp_path / name) if "grad_norm" in row])
    aligned(tmp_path / "last", **reward | {"grad_ar_choice": "last"}, gsim=GSIMConfig(lr=1e-9))
    last = [row["grad_norm"] for row in tiny.metrics(tmp_path / "last") if "grad_norm" in row]
    assert norms[0] == norms[1]
    assert max(norms[0]) > 1.5 * min(norms[0]), "tokens of early steps or of late ones: not the same gradient"
    assert max(last) < 1.5 * min(last)


def test_tokens_of_steps_without_gradient_are_constant():
    student = Pipeline.load(tiny.student())
    network, g = student.network.requires_grad_(True), torch.Generator().manual_seed(0)
    z, orders = torch.randn(2, 16, 4, generator=g), torch.randperm(16, generator=g).repeat(2, 1)
    counts = masked_counts(16, 4)
    draw = student.token_sampler(student.sampling)
    for recompute in (False, True):
        tokens = last(
            unmask(network, draw, torch.tensor([1, 2]), orders, counts, z, guidance=1.5, grad_ar_steps={0, 2},
                   checkpoint_ar_steps=recompute)
        )  # fmt: skip
        for k in range(4):
            drawn = orders[:, 16 - counts[k] : 16 - counts[k + 1]]
            part = gather_tokens(tokens, drawn).sum()
            (gradient,) = torch.autograd.grad(part, network.head.input_proj.weight, retain_graph=True)
            assert bool(gradient.any()) == (k in (0, 2)), k


def test_memory_of_a_rollout_does_not_grow_with_the_steps(file: Path):
    """With recomputation, twice the AR steps store twice the tokens and positions, and nothing else."""
    model = Pipeline.load(tiny.student())
    model.network.requires_grad_(True)
    g = torch.Generator().manual_seed(0)
    orders = torch.rand(32, 16, generator=g).argsort(1)
    z, exploration = torch.randn(2, 32, 16, 4, generator=g)
    labels, w = torch.arange(32) % 10, torch.full((32, 1), 1.5)
    stored: dict[tuple[int, bool], int] = {}
    for recompute in (True, False):
        for steps in (4, 8):
            config = RLConfig(ar_steps=steps, checkpoint_ar_steps=recompute)
            reward = UserReward(lambda images, prompts: images.mean((1, 2, 3)))
            reward.differentiable = True
            algorithm = RewardGradient(model, reward, config, model.network)
            batch = Batch(labels, [""] * 32, orders, z, w, exploration, frozenset(range(steps)))
            with Work() as work:
                loss, rollout = algorithm.loss(batch)
                stored[steps, recompute] = work.alive
                del loss, rollout
    # tokens before each step and those that it draws, float32, and positions of visible and drawn ones, int64
    per_step = 32 * 16 * (4 * 4 + 4 * 4 + 8 + 8)
    assert stored[8, True] - stored[4, True] <= 4 * per_step
    assert stored[8, False] - stored[4, False] > 20 * 4 * per_step


def test_what_is_trained(file: Path, tmp_path: Path):
    before = load_file(tiny.student() / "model.safetensors")
    for trained in ("head", "all", "lora"):
        aligned(tmp_path / trained, reward=f"{file}:brightness", trained=trained, steps=4, anchor=1.0)
        after = load_file(tmp_path / trained / "model.safetensors")
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert "head.input_proj.weight" in moved
        assert after.keys() == before.keys(), "adapters are merged"
        assert any(not name.startswith("head.") for name in moved) == (trained != "head")
        scores = load_file(tmp_path / trained / "scores.safetensors")
        assert any(name.startswith("teacher.encoder_blocks") for name in scores) == (trained != "head")
        if trained == "lora":
            assert not moved & {name for name in before if before[name].ndim == 1}
            difference = after["decoder_blocks.0.mlp.fc1.weight"] - before["decoder_blocks.0.mlp.fc1.weight"]
            assert torch.linalg.matrix_rank(difference, rtol=1e-3) <= 8
            model = Pipeline.load(tmp_path / trained)
            more = dataclasses.replace(CONFIG, reward=f"{file}:brightness", anchor=1.0, steps=2, trained="lora")
            assert rl(more, tmp_path / trained, tmp_path / "more").student == model.student


def test_adapters_learn_resume_and_serve_both_algorithms(file: Path, tmp_path: Path):
    before = brightness(Pipeline.load(tiny.student()))
    lora = {"trained": "lora", "lora_rank": 2, "save_every": 4, "anchor": 0.1}
    whole = aligned(tmp_path / "whole", reward=f"{file}:killed", **lora)
    assert brightness(whole) > before + 0.05
    marker = file.with_name("calls-left")
    marker.write_text("32")  # calls of the reward: 4 of trials, 12 of the first looks, then 1 per update and 3 per look
    with pytest.raises(KeyboardInterrupt):
        aligned(tmp_path / "part", reward=f"{file}:killed", **lora)
    assert json.loads((tmp_path / "part" / "meta.json").read_text())["step"] == 8
    marker.unlink()
    rl(dataclasses.replace(CONFIG, reward=f"{file}:killed", **lora), tiny.student(), tmp_path / "part", resume=True)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert tiny.metrics(tmp_path / "whole") == tiny.metrics(tmp_path / "part")
    group = {"reward": f"{file}:black_box", "algorithm": "group", "batch": 32, "std": 0.2, "kl": 0.01}
    assert brightness(aligned(tmp_path / "group", **group, **lora)) > before + 0.02


def test_hinge_and_truncated_gradients(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Below every reward, the hinge leaves nothing to learn; fewer AR steps with gradient give another gradient."""
    reward = {"reward": f"{file}:brightness", "steps": 4}
    aligned(tmp_path / "hinge", **reward, hinge=0.0)
    assert tiny.metrics(tmp_path / "hinge")[1]["above_hinge"] == 1
    assert "WARNING update 1: all rewards are above --hinge, so nothing is learned" in capsys.readouterr().err
    before, after = (load_file(path / "model.safetensors") for path in (tiny.student(), tmp_path / "hinge"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    norms = {}
    for steps, stored in ((0, True), (0, False), (4, True), (1, True)):
        out = tmp_path / f"{steps}-{stored}"
        aligned(out, **reward, grad_ar_steps=steps, checkpoint_ar_steps=stored)
        norms[steps, stored] = tiny.metrics(out)[1]["grad_norm"]
    assert norms[0, True] == norms[4, True] == pytest.approx(norms[0, False], rel=1e-5)
    assert norms[1, True] != pytest.approx(norms[0, True], rel=1e-2)


def test_images_of_a_group_differ_in_exploration_alone(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    group = {"reward": f"{file}:black_box", "algorithm": "group", "steps": 2}
    for std, dead in ((1e-6, 1.0), (0.2, 0.0)):
        aligned(tmp_path / f"{std}", **group, std=std)
        rows = tiny.metrics(tmp_path / f"{std}")
        assert [row["dead_groups"] for row in rows if "dead_groups" in row] == [dead] * 2
        warning = "WARNING update 1: the rewards of every group are equal, so nothing is learned from them"
        assert (warning in capsys.readouterr().err) == (dead == 1)


@pytest.mark.parametrize("algorithm", ["gradient", "group"])
def test_rollouts_have_the_students_temperature(algorithm: str, file: Path, tmp_path: Path):
    student = Pipeline.load(tiny.student())
    student.sampling = dataclasses.replace(student.sampling, temperature=0.0)
    student.save(tmp_path / "cold")
    config = dataclasses.replace(CONFIG, reward=f"{file}:brightness", algorithm=algorithm, steps=1, std=1e-3, batch=80)
    rl(config, tmp_path / "cold", tmp_path / "run")
    (first, rollouts, *_) = tiny.metrics(tmp_path / "run")
    assert rollouts["contrast"] == pytest.approx(first["contrast_heldout"], rel=0.03)


def test_inner_updates_anchor_the_student_as_it_is(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen, loss = [], ScoreMatching.student_loss

    def student_loss(self: ScoreMatching, context: Context, noise: Noise) -> tuple[torch.Tensor, dict]:
        seen.append(torch.equal(context.student_condition, context.condition(self.student)))
        return loss(self, context, noise)

    monkeypatch.setattr(ScoreMatching, "student_loss", student_loss)
    group = {"reward": f"{file}:black_box", "algorithm": "group", "steps": 1, "inner_updates": 3}
    aligned(tmp_path / "run", **group, trained="all", anchor=1.0)
    assert seen == [True] * 3


def test_kl_is_logged_per_token_with_gradient():
    config = RLConfig(algorithm="group", kl=1.0, group_size=2, batch=4, ar_steps=4, precision="float32")
    model = Pipeline.load(tiny.student())
    reference = copy.deepcopy(model.network.requires_grad_(True))
    with torch.no_grad():
        model.network.head.final_layer.linear.bias += 0.1
    update = Update("student", model.network.head, torch.optim.Adam([torch.zeros(1)]), config, connect("cpu"))
    algorithm = GroupGradient(model, UserReward(lambda images, prompts: images.mean((1, 2, 3))), config, reference)
    g = torch.Generator().manual_seed(0)
    z, exploration = torch.randn(2, 4, 16, 4, generator=g)
    orders, w = torch.rand(4, 16, generator=g).argsort(1), torch.full((4, 1), 1.5)
    rollout = algorithm.explore(Batch(torch.arange(4), [""] * 4, orders, z, w, exploration, frozenset(range(4))))

    def kl(*steps: int) -> float:
        batch = dataclasses.replace(rollout.batch, grad_steps=frozenset(steps))
        return float(algorithm.steps(dataclasses.replace(rollout, batch=batch), update, 1.0, last=True)["kl"])

    counts = masked_counts(16, 4)
    each = sum(kl(k) * (counts[k] - counts[k + 1]) for k in range(4)) / 16
    assert kl(0, 1, 2, 3) == pytest.approx(each, rel=1e-4)
    assert each > 0
    algorithm.config = dataclasses.replace(config, trained="all")  # the reference's own conditions, here the same
    assert kl(0, 1, 2, 3) == pytest.approx(each, rel=1e-4)
    with torch.no_grad():
        reference.decoder_norm.weight += 0.1
    assert kl(0, 1, 2, 3) > 1.01 * each


def test_a_run_that_dies_leaves_its_best_model(file: Path, tmp_path: Path):
    file.with_name("calls-left").write_text("28")
    with pytest.raises(KeyboardInterrupt):
        aligned(tmp_path / "run", reward=f"{file}:killed")
    rows = [row for row in tiny.metrics(tmp_path / "run") if "alarms" in row]
    model = Pipeline.load(tmp_path / "run")
    assert model.provenance["best_update"] == rows[-1]["step"] == 4
    assert brightness(model) > brightness(Pipeline.load(tiny.student()))


def test_code_of_a_reward_may_not_change(file: Path, tmp_path: Path):
    changes = {"reward": f"{file}:brightness", "held_out": f"{file}:darkness", "steps": 1}
    aligned(tmp_path / "run", **changes)
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ValueError, match=r"was started with code of my_rewards.py = 'sha256 .*: resume with the same"):
        rl(dataclasses.replace(CONFIG, **changes), tiny.student(), tmp_path / "run", resume=True)


def test_early_stop_keeps_the_best(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Dark images are the reward, bright ones are what the updates make: only the start is ever best."""
    model = aligned(tmp_path / "run", reward=f"{file}:odd", patience=2, steps=100)
    rows = tiny.metrics(tmp_path / "run")
    assert max(row["step"] for row in rows) == 8
    assert "stopped: no better held-out score since update 0" in capsys.readouterr().err
    assert model.provenance["best_update"] == 0
    before, after = (load_file(path / "model.safetensors") for path in (tiny.student(), tmp_path / "run"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_collapsing_run_stops_and_leaves_its_start(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The reward grows and grows, so only the alarms can tell."""
    changes = {"reward": f"{file}:brightness", "patience": 2, "steps": 100, "collapse": 5}
    changes |= {"classifier": str(tiny.classifier())}
    model = aligned(tmp_path / "run", **changes)
    err = capsys.readouterr().err
    assert "ALARM update 4: brightness_heldout" in err
    assert "(3 spreads over 4 seeds of the starting student)" in err
    assert "stopped: collapsed: " in err
    assert err.rstrip().endswith("; best is update 0")
    rows = [row for row in tiny.metrics(tmp_path / "run") if "alarms" in row]
    assert len(rows) == 3
    assert [row["alarms"] >= 5 for row in rows] == [False, True, True]
    assert rows[0]["brightness_heldout_low"] < rows[0]["brightness_heldout"] < rows[0]["brightness_heldout_high"]
    assert rows[1]["alarm_brightness_heldout"] > 3
    assert rows[2]["reward_heldout"] > rows[1]["reward_heldout"] > rows[0]["reward_heldout"]
    assert model.provenance["best_update"] == 0
    before, after = (load_file(path / "model.safetensors") for path in (tiny.student(), tmp_path / "run"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    rl(dataclasses.replace(CONFIG, **changes), tiny.student(), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    assert "stopped: collapsed: " in capsys.readouterr().err
    never = aligned(tmp_path / "never", **changes | {"patience": 0, "steps": 8, "target": 0.0})
    assert never.provenance["best_update"] == 0, "not kept where nothing stops either"
    assert max(row["step"] for row in tiny.metrics(tmp_path / "never")) == 8


def test_white_images_have_collapsed_where_nothing_else_is_watched(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Grey ones have five statistics that can raise an alarm."""
    model = aligned(tmp_path / "run", reward=f"{file}:brightness", patience=2, steps=100, collapse=5)
    assert "stopped: collapsed: 5 alarms (brightness_heldout, contrast_heldout, " in capsys.readouterr().err
    assert model.provenance["best_update"] == 0
    assert tiny.metrics(tmp_path / "run")[-1]["brightness_heldout"] > 0.9


def test_target_and_held_out_rewards(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    start = brightness(Pipeline.load(tiny.student()))
    changes = {"reward": f"{file}:brightness", "held_out": f"{file}:darkness", "select": "reward", "steps": 100}
    aligned(tmp_path / "run", **changes, target=start + 0.05)
    err = capsys.readouterr().err
    assert "stopped: held-out reward 0." in err
    assert "nothing is watched that the reward does not optimise" not in err
    rows = [row for row in tiny.metrics(tmp_path / "run") if "darkness_heldout" in row]
    assert rows[-1]["reward_heldout"] >= start + 0.05 > rows[-2]["reward_heldout"]
    assert rows[-1]["darkness_heldout"] == pytest.approx(-rows[-1]["reward_heldout"], abs=1e-5)
    assert Pipeline.load(tmp_path / "run").provenance["best_update"] == rows[-1]["step"]
    stopped = aligned(tmp_path / "held-out", **changes | {"select": "auto"}, patience=1)
    assert stopped.provenance["best_update"] == 0  # the brighter, the worse
    folder = str(tiny.classifier())
    stopped = aligned(tmp_path / "fid", **changes | {"select": "fid"}, classifier=folder, patience=1)
    assert stopped.provenance["best_update"] == 0
    assert "nothing is watched" not in capsys.readouterr().err
    aligned(tmp_path / "alone", reward=f"{file}:brightness", steps=1)
    assert "warning: nothing is watched that the reward does not optimise" in capsys.readouterr().err


def test_a_weighted_sum_is_normalised_on_the_starting_student(file: Path, tmp_path: Path):
    """0.05 of the classifier's log-probability outweighs brightness; 0.05 of its deviation does not."""
    before = brightness(Pipeline.load(tiny.student()))
    folder = str(tiny.classifier())
    reward = f"1*{file}:brightness + 0.05*classifier"
    model = aligned(tmp_path / "run", reward=reward, classifier=folder, eval_images=200, select="reward")
    rows = [row for row in tiny.metrics(tmp_path / "run") if "reward_heldout" in row]
    assert abs(rows[0]["reward_heldout"]) < 0.2
    assert rows[-1]["reward_heldout"] > 1  # deviations of single images
    assert brightness(model) > before + 0.03
    units = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["extra"]["units"]
    assert [len(values) for values in units] == [2, 2]


def test_schedule_of_the_anchor(file: Path, tmp_path: Path):
    config = RLConfig(anchor=2.0, anchor_final=0.5, steps=4)
    assert [config.anchor_at(step) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]
    assert RLConfig(anchor=2.0).anchor_at(77) == 2.0
    reward = {"reward": f"{file}:brightness", "steps": 3, "eval_every": 3}
    weights = {}
    for name, anchor in (("constant", {}), ("falling", {"anchor_final": 0.0})):
        aligned(tmp_path / name, **reward, anchor=3.0, **anchor)
        weights[name] = [row["grad_norm"] for row in tiny.metrics(tmp_path / name) if "grad_norm" in row]
    assert weights["constant"][0] == weights["falling"][0]
    assert weights["constant"][1] > weights["falling"][1]


def test_saving_the_best_leaves_the_average_alone(file: Path, tmp_path: Path):
    aligned(tmp_path / "run", reward=f"{file}:odd", save_every=1, steps=4, eval_every=1)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["extra"]["step"] == 0, "the best is the start"
    name = "input_proj.weight"
    assert not torch.equal(state["ema"]["average"][name], state["extra"]["weights"][name])
    assert torch.equal(
        load_file(tmp_path / "run" / "model.safetensors")[f"head.{name}"], state["extra"]["weights"][name]
    )


def test_classifier_reward_and_judge(tmp_path: Path):
    folder = str(tiny.classifier())
    aligned(tmp_path / "run", classifier=folder, judge=folder, steps=40, anchor=0.1)
    rows = [row for row in tiny.metrics(tmp_path / "run") if "judge_heldout" in row]
    assert rows[0]["judge_heldout"] == pytest.approx(rows[0]["reward_heldout"], rel=1e-4)
    assert max(row["judge_heldout"] for row in rows) > rows[0]["judge_heldout"] + 0.1
    watched = {"reward", "brightness", "contrast", "edge_density", "entropy", "clipped", "y", "grad_norm"}
    assert watched < tiny.metrics(tmp_path / "run")[1].keys()


@pytest.mark.parametrize("trained", ["head", "all"])
def test_a_student_of_a_range_of_guidance(trained: Literal["head", "all"], file: Path, tmp_path: Path):
    """Its head or all of it distilled: RL trains the head, anchored, beside its teacher, and leaves the backbone."""
    student = StudentConfig(guidance=1.5, guidance_range=(1.0, 3.0))
    config = DistillConfig(trained=trained, steps=2, batch=8, ar_steps=4, sample_every=0, student=student)
    distill(config, tiny.teacher(), tmp_path / "student")
    changed = dataclasses.replace(CONFIG, steps=2, anchor=1.0, reward=f"{file}:brightness")
    model = rl(changed, tmp_path / "student", tmp_path / "aligned")
    assert model.student == student
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("student", "aligned"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "head.input_proj.weight" in moved
    assert all(name.startswith("head.") for name in moved)
    scores = [load_file(tmp_path / name / "scores.safetensors") for name in ("student", "aligned")]
    assert scores[0].keys() == scores[1].keys()
    assert ("teacher.mask_token" in scores[1]) == (trained == "all")
    assert model.sample([1], guidance=2.0).shape == (1, 8, 8, 1)
    group = {"algorithm": "group", "reward": f"{file}:black_box", "precision": "bf16"}
    assert rl(dataclasses.replace(changed, **group), tmp_path / "student", tmp_path / "group").student == student


def test_the_policy_is_the_first_evaluation(file: Path, tmp_path: Path):
    """A student of several comes out with one, also where it draws with more by default."""
    shutil.copytree(tiny.student_of_two(), tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    config["sampling"]["evaluations"] = 2
    (tmp_path / "student" / "config.json").write_text(json.dumps(config))
    several = Pipeline.load(tmp_path / "student")
    assert not np.array_equal(several.sample(3, evaluations=1), several.sample(3))
    short = dataclasses.replace(CONFIG, steps=2, anchor=1.0, reward=f"{file}:brightness")
    found = [
        rl(short, folder, tmp_path / f"run-{i}") for i, folder in enumerate((tmp_path / "student", tiny.student()))
    ]
    assert found[0].student is not None
    assert found[0].student.evaluations == 1
    np.testing.assert_array_equal(*(model.sample(3) for model in found))


def test_what_is_refused(file: Path, tmp_path: Path):
    cases = {
        "is not differentiable: use --algorithm group": {"reward": f"{file}:black_box"},
        "unknown reward 'beauty'": {"reward": "beauty"},
        "needs a classifier's folder": {},
        "has no function 'nothing'": {"reward": f"{file}:nothing"},
        "is 1 for all 200 images of the starting student": {"reward": f"{file}:always", "algorithm": "group"},
        "is the same for all 10 classes": {"prompt": "a digit", "reward": f"{file}:brightness"},
        r"picky' fails on image 4 .*: no fours": {"reward": f"{file}:picky"},
        r":picky' fails on image 4 .*: no fours": {"reward": f"{file}:brightness", "held_out": f"{file}:picky"},
    }
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=message):
            aligned(tmp_path / "run", **changes)
    with pytest.raises(ValueError, match="holds a teacher: RL starts from a student"):
        rl(dataclasses.replace(CONFIG, reward=f"{file}:brightness"), tiny.teacher(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes").touch()
    for out, changes, message in (
        ("taken", {}, "is not empty and not a run of marval"),
        ("run", {"reference": "nowhere"}, "reference nowhere does not exist"),
    ):
        with pytest.raises(ValueError, match=message):  # before the reward, which would fail, is asked
            aligned(tmp_path / out, reward=f"{file}:picky", **changes)
    for changes in (
        {"batch": 12, "algorithm": "group"}, {"group_size": 1, "algorithm": "group"}, {"grad_ar_steps": 9},
        {"std": 0.0}, {"anchor": -1.0}, {"clip": 0.0}, {"inner_updates": 0}, {"algorithm": "ppo"}, {"eval_images": 0},
        {"lora_rank": 0}, {"trained": "tail"}, {"grad_ar_choice": "first"}, {"select": "fid"}, {"select": "judge"},
        {"select": "held-out"}, {"range_seeds": 1}, {"range_width": 0.0}, {"collapse": -1}, {"anchor_final": -2.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(changes))}.*{next(iter(changes.values()))}"):
            RLConfig(**changes)


def test_a_reward_that_fails_later_stops_the_run(tmp_path: Path):
    (tmp_path / "late.py").write_text(
        "calls = []\ndef late(images, prompts):\n    calls.append(0)\n"
        "    return images.mean((1, 2, 3)) / (0.0 if len(calls) > 4 else 1.0)\nlate.differentiable = True\n"
    )
    message = r"the reward of image 0 .* is (inf|nan): it must be finite"
    with pytest.raises(ValueError, match=message) as error:
        aligned(tmp_path / "run", reward=f"{tmp_path / 'late.py'}:late")
    assert str(error.value).startswith("evaluation of update 0: ")
    assert "the best model" not in str(error.value)  # there is none yet
    late = tmp_path / "late.py"
    late.write_text(late.read_text().replace("> 4", "> 17"))
    with pytest.raises(ValueError, match=rf"{message}; the best model so far, of update 0, is in {tmp_path / 'run'}2"):
        aligned(tmp_path / "run2", reward=f"{late}:late")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("m.detach()", "calls itself differentiable but its result carries no gradient to the images"),
        (
            "m + 0 * (m - m[3].detach()).abs().sqrt()",
            r"calls itself differentiable but its gradient in image 11 \(.*of \d'\) is not finite",
        ),
        ("m / (m != m[3])", r"the reward of image 11 \(.*of \d'\) is inf: it must be finite"),
    ],
)
def test_a_gradient_that_fails_later_names_update_reward_and_image(tmp_path: Path, result: str, message: str):
    """In the second part of the second update; the first part has images 0 to 7."""
    file = tmp_path / "late.py"
    file.write_text(
        "calls = []\ndef late(images, prompts):\n    m = images.mean((1, 2, 3))\n"
        "    calls.extend([0] if images.requires_grad else [])\n"  # 2 are of the trial
        f"    return {result} if len(calls) == 6 else m\nlate.differentiable = True\n"
    )
    where = f"; the best model so far, of update 0, is in {tmp_path / 'run'}"
    with pytest.raises(RewardError, match=f"^update 2: reward '.*:late'.* {message}{where}$"):
        aligned(tmp_path / "run", reward=f"{file}:late", accumulate=2)


def test_image_statistics():
    flat = image_statistics(torch.full((2, 1, 4, 4), 0.25))
    assert flat["brightness"] == 0.25
    assert flat["contrast"] == flat["edge_density"] == flat["clipped"] == 0
    assert flat["entropy"] == pytest.approx(0, abs=1e-6)
    stripes = torch.zeros(2, 1, 4, 4)
    stripes[..., ::2] = 1
    values = image_statistics(stripes)
    assert values["clipped"] == 1
    assert values["edge_density"] == 0.5  # every step to the right, none downwards
    assert values["entropy"] == pytest.approx(1)
    assert values["contrast"] == pytest.approx(float(np.std([0, 1] * 8, ddof=1)))


def test_bf16_gives_the_gradient_of_float32_and_a_reward_float32(file: Path, tmp_path: Path):
    asserted = "    assert images.dtype.itemsize == 4\n    return images.mean"
    file.write_text(file.read_text().replace("    return images.mean", asserted))
    for precision in ("float32", "bf16"):
        aligned(tmp_path / precision, reward=f"{file}:brightness", precision=precision, steps=4, trained="all")
    rows = [tiny.metrics(tmp_path / precision)[1] for precision in ("float32", "bf16")]
    assert rows[0]["grad_norm"] != rows[1]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=0.1)
    assert brightness(Pipeline.load(tmp_path / "bf16")) > brightness(Pipeline.load(tiny.student())) + 0.05


def test_bf16_recomputes_the_log_probability_exactly():
    config = RLConfig(algorithm="group", precision="bf16", group_size=2, batch=4, ar_steps=4)
    model = Pipeline.load(tiny.student())
    algorithm = GroupGradient(model, UserReward(lambda images, prompts: images.mean((1, 2, 3))), config, model.network)
    g = torch.Generator().manual_seed(0)
    z, exploration = torch.randn(2, 4, 16, 4, generator=g)
    orders = torch.stack([torch.randperm(16, generator=g) for _ in range(2)]).repeat_interleave(2, dim=0)
    w, steps = torch.full((4, 1), 1.5), frozenset(range(4))
    batch = Batch(torch.tensor([1, 1, 2, 2]), [""] * 4, orders, z, w, exploration, steps)
    rollout = algorithm.explore(batch)
    for k in range(4):
        with autocast(config.precision, z.device):
            target, condition = algorithm.condition(model.network, batch, rollout.actions, k)
            mean = algorithm.mean(model.network, batch, target, condition)
        log_prob = gaussian_log_prob(gather_tokens(rollout.actions, target), mean, config.std)
        assert torch.equal(log_prob, rollout.log_prob.gather(1, target))
