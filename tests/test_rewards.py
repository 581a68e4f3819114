"""Rewards: values, gradients, a user's file, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from marval.data import load_dataset
from marval.models.classifier import Classifier, train_classifier
from marval.rewards import (
    ClassifierLogProb,
    ReadsClass,
    Reward,
    UserReward,
    check_reward,
    class_prompts,
    load_reward,
    prompt_for,
)
from marval.tokenizers import to_float

NAMES = list("0123456789")
TEMPLATE = "a picture of {class}"
PROMPTS = [f"a picture of {name}" for name in NAMES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classifier")
    train, held_out = load_dataset("digits"), load_dataset("digits", "test")
    train_classifier(train, held_out, epochs=2, width=8, progress=False)[0].save(path)
    return path


@pytest.fixture(scope="module")
def images() -> Tensor:
    return to_float(torch.from_numpy(load_dataset("digits", "test").images[:50]))


def load(spec: str, classifier: Path | str = "", template: str = TEMPLATE) -> Reward:
    return load_reward(spec, classifier=str(classifier), class_names=NAMES, template=template, device="cpu")


def test_prompts():
    assert prompt_for("{class} or not {class}", "cat") == "cat or not cat"
    assert class_prompts("a {class}", ["cat", "dog"]) == ["a cat", "a dog"]
    assert class_prompts("a cat", ["cat"]) == ["a cat"]
    with pytest.raises(ValueError, match=r"prompt .a cat. is the same for all 2 classes: put \{class\} into it"):
        class_prompts("a cat", ["cat", "dog"])


def test_classifier_rewards(folder: Path, images: Tensor):
    logits = Classifier.load(folder)(images)
    asked = torch.arange(50) % 10
    prompts = [PROMPTS[i] for i in asked]
    log_prob, reads = load("classifier", folder), load("reads-class", folder)
    assert log_prob.differentiable
    assert not reads.differentiable
    expected = torch.log_softmax(logits, 1)[torch.arange(50), asked]
    torch.testing.assert_close(check_reward(log_prob, images, prompts), expected)
    torch.testing.assert_close(check_reward(reads, images, prompts), (logits.argmax(1) == asked).float())
    assert 0 < reads(images, prompts).sum() < 50
    as_read = [PROMPTS[i] for i in logits.argmax(1)]
    assert reads(images, as_read).tolist() == [1.0] * 50


def test_gradient_raises_the_reward(folder: Path, images: Tensor):
    reward = load("classifier", folder)
    images = images.clone().requires_grad_()
    prompts = [PROMPTS[3]] * 50
    before = reward(images, prompts)
    before.sum().backward()
    assert images.grad is not None
    with torch.no_grad():
        assert (reward(images + 1e-3 * images.grad, prompts) > before).float().mean() > 0.9
    assert isinstance(reward, ClassifierLogProb)
    assert all(p.grad is None for p in reward.classifier.parameters())


def test_classifier_rewards_refuse(folder: Path, images: Tensor):
    with pytest.raises(ValueError, match="'a picture of x' belongs to no class"):
        load("reads-class", folder)(images[:1], ["a picture of x"])
    with pytest.raises(ValueError, match="is the same for all 10 classes"):
        load("classifier", folder, template="a digit")
    with pytest.raises(ValueError, match="needs a classifier's folder: make one with marval train-classifier"):
        load("classifier")
    with pytest.raises(ValueError, match=r"config.json does not exist"):
        load("classifier", folder / "nowhere")
    with pytest.raises(ValueError, match="knows the classes 0, 1, 2, 3, 4, but the model cat, dog"):
        load_reward("classifier", classifier=str(folder), class_names=["cat", "dog"], template=TEMPLATE, device="cpu")
    classifier = Classifier.load(folder)
    with pytest.raises(ValueError, match="two classes have the same prompt"):
        ReadsClass(classifier, [*PROMPTS[:9], PROMPTS[0]])
    with pytest.raises(ValueError, match="3 prompts for 10 classes"):
        ReadsClass(classifier, PROMPTS[:3])


def test_user_file(tmp_path: Path, images: Tensor):
    file = tmp_path / "my_reward.py"
    file.write_text(
        "def bright(images, prompts):\n    return images.mean((1, 2, 3))\n\n"
        "def dark(images, prompts):\n    return -images.mean((1, 2, 3))\n\n"
        "dark.differentiable = True\nnumber = 3\n"
    )
    prompts = [PROMPTS[0]] * 50
    bright, dark = load(f"{file}:bright"), load(f"{file}:dark")
    assert (bright.differentiable, dark.differentiable) == (False, True)
    torch.testing.assert_close(check_reward(bright, images, prompts), images.mean((1, 2, 3)))
    torch.testing.assert_close(check_reward(dark, images, prompts), -images.mean((1, 2, 3)))
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "notes.txt").write_text("")
    for spec, message in (
        (f"{file}:blue", r"has no function 'blue': it has bright, dark"),
        (f"{file}:number", r"is a int, not a function"),
        (f"{tmp_path}/nowhere.py:f", r"does not exist: give path/to/file.py:function"),
        (f"{tmp_path}/broken.py:f", r"fails on import: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        (f"{tmp_path}/notes.txt:f", r"its name must end in .py"),
        ("beauty", r"unknown reward 'beauty': choose classifier, reads-class, clip:FOLDER,"),
    ):
        with pytest.raises(ValueError, match=message):
            load(spec)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], "returned a list: it must return"),
        (torch.ones(2, 1), r"torch.float32 of shape \(2, 1\): it must return a floating-point tensor of shape \(2,\)"),
        (torch.ones(()), r"of shape \(\)"),
        (torch.ones(2, dtype=torch.int64), "torch.int64 of shape"),
        (torch.tensor([1.0, float("nan")]), r"reward of image 1 \('b'\) is nan"),
        (torch.tensor([float("-inf"), 1.0]), r"reward of image 0 \('a'\) is -inf"),
    ],
)
def test_check_reward_refuses(result: object, message: str):
    def reward(images: Tensor, prompts: list[str]) -> object:
        return result

    with pytest.raises(ValueError, match=message):
        check_reward(UserReward(reward), torch.rand(2, 1, 8, 8), ["a", "b"])  # type: ignore[arg-type]


def test_check_reward_wants_the_gradient_it_is_promised():
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        return images.detach().mean((1, 2, 3))

    reward.differentiable = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="its result carries no gradient"):
        check_reward(UserReward(reward), torch.rand(2, 1, 8, 8), ["a", "b"])
