"""Held-out numbers, the starting student's ranges, alarms."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from marval.config import RLConfig
from marval.distributed import connect
from marval.models.classifier import Classifier
from marval.monitor import Monitor, class_in_turn, image_statistics, networks_of, trial_size
from marval.pipeline import Pipeline
from marval.reward_files import short_name
from marval.rewards import UserReward, WeightedSum, load_reward
from marval.scoring import Reward

CONFIG = RLConfig(batch=16, ar_steps=4, eval_images=60, prompt="a {class}")
STATISTICS = {"brightness", "contrast", "saturation", "edge_density", "clipped", "entropy"}


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean((1, 2, 3))


def monitor(reward: Reward | None = None, **changes: object) -> tuple[Monitor, Pipeline]:
    student = Pipeline.load(tiny.student())
    config = dataclasses.replace(CONFIG, **changes)
    return Monitor.make(config, student, reward or UserReward(brightness), connect("cpu")), student


def plain(noise: float) -> Pipeline:
    """The student, painting everything black, if it predicts much noise, or white."""
    student = Pipeline.load(tiny.student())
    with torch.no_grad():
        for parameter in student.network.head.final_layer.parameters():
            parameter.zero_()
        student.network.head.final_layer.linear.bias[:4] = noise  # the token is at an end of its range
    return student


def test_colours():
    grey = torch.full((2, 3, 4, 4), 0.5)
    assert image_statistics(grey)["saturation"] == image_statistics(grey)["entropy"] == 0
    red = torch.stack([torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])])[:, :, None, None]
    values = image_statistics(red.expand(2, 3, 4, 4))
    assert values["saturation"] == values["clipped"] == 1
    assert values["entropy"] == pytest.approx(1)  # two colours, though each image has but one
    assert values["edge_density"] == 0
    assert values["brightness"] == pytest.approx(1 / 3)


def test_short_names():
    assert short_name("pickscore:yuvalkirstain/PickScore_v1") == "pickscore"
    assert short_name("some/folder/rewards.py:ink") == "ink"
    assert short_name("reads-class") == "reads-class"
    assert short_name("1*reads-class + 0.5*a/b.py:ink + 2*clip:x") == "reads-class + ink + clip"


def test_what_is_watched(tmp_path: Path):
    (tmp_path / "more.py").write_text("def darkness(images, prompts):\n    return 1 - images.mean((1, 2, 3))\n")
    folder = str(tiny.classifier())
    watching, student = monitor(
        judge=folder, classifier=folder, held_out=f"{tmp_path / 'more.py'}:darkness, reads-class", reference="digits"
    )
    values = watching.measure(student)
    names = STATISTICS | {"reward", "darkness", "reads-class", "judge", "accuracy", "fid", "kid", "precision", "recall"}
    assert values.keys() == {f"{name}_heldout" for name in names}
    assert values == watching.measure(student)
    assert values["darkness_heldout"] == pytest.approx(1 - values["reward_heldout"])
    assert values["reward_heldout"] == pytest.approx(values["brightness_heldout"], abs=1e-6)
    assert values["accuracy_heldout"] == pytest.approx(values["reads-class_heldout"])
    assert values["fid_heldout"] != watching.measure(student, 1)["fid_heldout"]
    assert watching.criterion(values) == values["judge_heldout"]
    for select, expected in (("fid", -values["fid_heldout"]), ("held-out", values["darkness_heldout"])):
        config = dataclasses.replace(watching.config, select=select)
        assert dataclasses.replace(watching, config=config).criterion(values) == expected


def test_alarms():
    """The student itself raises none on other seeds; a black one does; and a better number is never one."""
    watching, student = monitor(judge=str(tiny.classifier()))
    first = watching.measure(student)
    assert first["fid_heldout"] < 0.1 * watching.measure(plain(40.0))["fid_heldout"]  # against the student's own images
    ranges = watching.ranges(student, first)
    for name, (centre, spread) in ranges.items():
        assert spread >= 0.02 * abs(centre)
        assert first[name] == centre  # later looks share its noise
    assert watching.alarms(watching.measure(student, 1), ranges) == {}
    accuracy = watching.rows(student, 1)["accuracy"]
    assert ranges["accuracy_heldout"][1] >= float(accuracy.std()) / 60**0.5
    assert watching.alarms(first, ranges) == {}
    black = watching.measure(plain(40.0))
    assert black["brightness_heldout"] < 0.01
    alarms = watching.alarms(black, ranges)
    expected = {"reward", "brightness", "contrast", "clipped", "edge_density", "entropy", "fid", "kid", "recall"}
    assert {f"{name}_heldout" for name in expected} <= alarms.keys()
    assert alarms["brightness_heldout"] < 0 < alarms["fid_heldout"]
    assert watching.collapsed(alarms, black, ranges)
    assert not watching.collapsed({n: 9.0 for n in alarms if n.removesuffix("_heldout") in STATISTICS}, black, ranges)
    assert not watching.collapsed(dict(list(alarms.items())[:4]), first, ranges)
    recall = ranges["recall_heldout"][0]
    for share, alike in ((0.6, False), (0.4, True)):
        values = first | {"recall_heldout": share * recall}
        found = watching.collapsed({"recall_heldout": -9.0}, values, ranges)
        assert found.startswith("images are alike: recall_heldout") == alike, found
    assert not watching.collapsed({}, first | {"recall_heldout": 0.4 * recall}, ranges), "within its range"
    off = dataclasses.replace(watching, config=dataclasses.replace(watching.config, collapse=0))
    assert not off.collapsed(alarms, black, ranges)
    better = {"reward_heldout": 1e3, "fid_heldout": 0.0, "precision_heldout": 2.0, "accuracy_heldout": 2.0}
    assert watching.alarms(first | better, ranges) == {}
    assert list(watching.alarms(first | {"kid_heldout": float("nan")}, ranges)) == ["kid_heldout"]
    low, high = watching.limits("brightness_heldout", ranges)
    line = watching.line(20, "brightness_heldout", 0.0, ranges)
    expected_line = f"ALARM update 20: brightness_heldout 0 is outside {low:.4g} .. {high:.4g} (3 spreads over 4 seeds"
    assert line.startswith(expected_line)
    assert watching.stated(ranges)["brightness_heldout_low"] == low
    wide = dataclasses.replace(watching, config=dataclasses.replace(watching.config, range_width=1e6))
    assert wide.alarms(black, ranges) == {}


def test_without_a_network_there_are_no_distances():
    watching, student = monitor()
    assert watching.measure(student).keys() == {f"{name}_heldout" for name in STATISTICS | {"reward"}}
    assert watching.criterion({"reward_heldout": 3.0}) == 3.0
    assert not watching.independent
    ranges = watching.ranges(student, watching.measure(student))
    alarms = watching.alarms(watching.measure(plain(-40.0)), ranges)
    assert alarms.keys() == {f"{name}_heldout" for name in STATISTICS - {"saturation"}}, "of grey images"
    assert watching.collapsed(alarms, {}, ranges), "there is nothing else to tell"
    few = dataclasses.replace(watching, config=dataclasses.replace(watching.config, collapse=4))
    assert not few.collapsed(dict(list(alarms.items())[:4]), {}, ranges)


def test_features_of_the_trained_reward_are_not_watched():
    folder = str(tiny.classifier())
    names = {"class_names": list("0123456789"), "template": CONFIG.prompt, "device": "cpu"}
    for spec in ("classifier", "reads-class", "1*reads-class + 0.5*classifier"):
        reward = load_reward(spec, classifier=folder, **names)
        watching, _ = monitor(reward, classifier=folder)
        assert watching.network is None
        assert not watching.independent
    assert monitor(reward, classifier=folder, judge=folder)[0].network is not None
    assert monitor(classifier=folder)[0].independent
    with pytest.raises(ValueError, match="select fid needs --features or --judge: the reward optimises"):
        monitor(reward, classifier=folder, select="fid")


def test_the_rewards_own_network_is_not_independent(tmp_path: Path):
    """Whatever its folder is called, and whatever asks it."""
    folder, copied, other = tiny.classifier(), tmp_path / "copied", tmp_path / "other"
    shutil.copytree(folder, copied)
    classifier = Classifier.load(folder)
    with torch.no_grad():
        classifier.head.bias.add_(1)
    classifier.save(other)
    names = {"class_names": list("0123456789"), "template": CONFIG.prompt, "device": "cpu"}
    for spec in ("classifier", "0.5*reads-class + 1*classifier"):
        reward = load_reward(spec, classifier=str(folder), **names)
        given = {"classifier": str(folder), "reference": "digits"}
        for flag in ("judge", "features"):
            assert not monitor(reward, **given, **{flag: str(copied)})[0].independent
            assert monitor(reward, **given, **{flag: str(other)})[0].independent
        assert not monitor(reward, **given, held_out="reads-class, 1*classifier", judge=str(folder))[0].independent


def test_networks_of_a_reward():
    same = ("clip:some/CLIP/", f"pickscore:{Path.cwd()}/some/CLIP", "aesthetic:some/CLIP:head.pth")
    names = (*same, "a.py:brightness", "verifiable:./a.py:brightness")
    sum_of = WeightedSum([UserReward(brightness) for _ in names], [1] * len(names))
    for part, name in zip(sum_of.rewards, names, strict=True):
        part.name = name  # type: ignore[attr-defined]
    assert networks_of(sum_of, "") == {f"{Path.cwd()}/some/CLIP", f"{Path.cwd()}/a.py:brightness"}


@pytest.mark.parametrize("value", [0, 1])
def test_a_constant_reward_that_picks_the_best_is_told_of(
    value: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code = f"def same(images, prompts):\n    return images.new_full((len(images),), {value})\n"
    (tmp_path / "same.py").write_text(code)
    held_out = f"{tmp_path / 'same.py'}:same"
    for select, told in (("auto", True), ("reward", False)):
        watching, student = monitor(held_out=held_out, select=select)
        first = watching.measure(student)
        ranges = watching.ranges(student, first)
        warning = f"marval: warning: same is {value} for all 180 images of the starting student, and the model with"
        assert (warning in capsys.readouterr().err) == told
        assert "same_heldout" not in watching.alarms(first, ranges)


def test_size_of_a_trial():
    assert [trial_size(classes) for classes in (1, 8, 10, 64, 1000)] == [8, 8, 10, 64, 64]


def test_a_judge_of_other_classes(tmp_path: Path):
    """It may know more of them, in another order; not fewer."""
    classifier = Classifier.load(tiny.classifier())
    with torch.no_grad():
        for tensor in (classifier.head.weight, classifier.head.bias):
            tensor.copy_(tensor.flip(0))
    classifier.class_names.reverse()
    classifier.save(tmp_path / "reversed")
    numbers = []
    for judge in (tiny.classifier(), tmp_path / "reversed"):
        watching, student = monitor(judge=str(judge))
        numbers.append(watching.measure(student))
    for name in ("judge_heldout", "accuracy_heldout"):
        assert numbers[1][name] == pytest.approx(numbers[0][name], rel=1e-4)
    classifier.class_names[3] = "six"
    classifier.save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"classifier .*other knows the classes 9, 8, 7, six, 5, but the model"):
        monitor(judge=str(tmp_path / "other"))


def test_a_published_classifier_is_no_judge_of_digits(shared: Path):
    with pytest.raises(ValueError, match=r"th knows the classes airplane, .* but the model 0, 1"):
        monitor(judge=str(shared / "data/weights/resnet20-12fca82f.th"))


def test_classes_in_turn():
    assert [class_in_turn(i, 12, 5) for i in range(12)] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert [class_in_turn(i, 4, 1000) for i in range(5)] == [0, 250, 500, 750, 0]  # one to spare


def test_held_out_rewards_are_tried_and_named(tmp_path: Path):
    code = "def fid(images, prompts):\n    return images.mean((1, 2, 3))\ndef bad(images, prompts):\n    return 1\n"
    (tmp_path / "more.py").write_text(code)
    watching, _ = monitor(held_out=f"{tmp_path / 'more.py'}:fid")
    assert list(watching.rewards) == ["reward", f"{tmp_path / 'more.py'}:fid"]
    with pytest.raises(ValueError, match="bad': the reward returned a int"):
        monitor(held_out=f"{tmp_path / 'more.py'}:bad")


def test_a_wrong_network_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no feature network 'nothing'"):
        monitor(features="nothing")
    with pytest.raises(ValueError, match="unknown reward 'beauty'"):
        monitor(held_out="beauty")
