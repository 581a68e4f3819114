"""Rewards: values, gradients, a user's file, and what is refused."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from marval import imagenet
from marval.data import load_dataset
from marval.features import load_features
from marval.models.classifier import Classifier
from marval.reward_checks import check_reward, check_varies
from marval.reward_files import code_files
from marval.reward_models import ClassifierLogProb, ReadsClass
from marval.rewards import UserReward, Verifiable, WeightedSum, calibrate, class_prompts, load_reward
from marval.scoring import Reward, score
from marval.tokenizers import to_float

NAMES = list("0123456789")
TEMPLATE = "a picture of {class}"
PROMPTS = [f"a picture of {name}" for name in NAMES]


@pytest.fixture(scope="module")
def folder() -> Path:
    return tiny.classifier()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return to_float(torch.from_numpy(load_dataset("digits", "test").images[:50]))


def load(spec: str, classifier: Path | str = "", template: str = TEMPLATE) -> Reward:
    return load_reward(spec, classifier=str(classifier), class_names=NAMES, template=template, device="cpu")


def test_prompts():
    assert class_prompts("{class} or not {class}", ["cat"]) == ["cat or not cat"]
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
    (tmp_path / "few.py").write_text("def images_only(images):\n    return images.mean((1, 2, 3))\n")
    for spec, message in (
        (f"{file}:blue", r"has no function 'blue': it has bright, dark"),
        (f"{file}:number", r"is 3, not a function"),
        (f"{tmp_path}/few.py:images_only", r"is called as images_only\(images, prompts\): too many positional"),
        (f"{tmp_path}/nowhere.py:f", r"does not exist: give path/to/file.py:function"),
        (f"{tmp_path}/broken.py:f", r"fails on import: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        (f"{tmp_path}/notes.txt:f", r"its name must end in .py"),
        ("beauty", r"unknown reward 'beauty': choose classifier, reads-class, pickscore:SOURCE,"),
    ):
        with pytest.raises(ValueError, match=message):
            load(spec)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], "returned a list: it must return"),
        (torch.ones(2, 1), r"torch.float32 of shape \(2, 1\): it must return a floating-point tensor of shape \(2,\)"),
        (torch.ones(()), r"of shape \(\)"),
        (torch.tensor([0, 2]), "torch.int64 of shape"),
        (torch.tensor([1.0, float("nan")]), r"reward of image 1 \('b'\) is nan"),
        (torch.tensor([float("-inf"), 1.0]), r"reward of image 0 \('a'\) is -inf: it must be finite"),
        (
            torch.tensor([1.0, 1e300], dtype=torch.float64),
            r"reward of image 1 \('b'\) is 1e\+300: it must be within float32",
        ),
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
    with pytest.raises(ValueError, match="reward 'reward' calls itself differentiable but its result carries no grad"):
        check_reward(UserReward(reward), torch.rand(2, 1, 8, 8), ["a", "b"])


def overwritten(x: Tensor) -> Tensor:
    """What its gradient needs is gone."""
    y = torch.sigmoid(x.mean((1, 2, 3)))
    z = y * y
    y.add_(1)
    return z


class Picky(torch.autograd.Function):
    """x, whose gradient is refused for the image that TRIED[2] is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.bad = bool(torch.isin(TRIED.mean((1, 2, 3))[2], x))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        if ctx.bad:
            raise KeyError("no")
        return gradients[0]


TRIED = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.mean((1, 2, 3)) * 0 + 2, "its gradient is zero for all 4 trial images: it is 2 for all of them"),
        (lambda x: (x.mean((1, 2, 3)) * 100).round(), "its gradient is zero for all 4 trial images$"),
        (lambda x: (x.mean((1, 2, 3)) - x.mean((1, 2, 3))[2]).abs().sqrt(), "its gradient in image 2 .'c'. is not fin"),
        (
            lambda x: (x.mean((1, 2, 3)) * 100).round() + 1e-12 * x.mean((1, 2, 3)),
            "its gradient is too small to change it for all 4 trial images$",
        ),
        (lambda x: torch.ones(4, requires_grad=True) * 2, "its result carries no gradient to the images"),
        (lambda x: overwritten(x), r"its gradient fails on image 0 .'a'.: RuntimeError: .*modified by an inplace"),
        (
            lambda x: Picky.apply(x.mean((1, 2, 3))),
            r"fails on image 2 .'c'.: KeyError: 'no' .test_rewards.py, line \d+",
        ),
    ],
)
def test_a_gradient_that_cannot_teach(function: Callable[[Tensor], Tensor], message: str):
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        return function(images)

    reward.differentiable = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=message):
        check_reward(UserReward(reward), TRIED, list("abcd"))


@pytest.mark.parametrize("size", [9, 20])
def test_a_gradient_in_few_images_is_told_of(size: int, capsys: pytest.CaptureFixture[str]):
    """As of a clamp, which is no mistake; trial images may be more than are tried at a time."""
    images = torch.arange(size).div(size).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    for clamp, told in ((0.2, True), (0.7, False)):

        def clamped(images: Tensor, prompts: list[str], clamp: float = clamp) -> Tensor:
            return images.mean((1, 2, 3)).clamp(max=clamp)

        clamped.differentiable = True  # type: ignore[attr-defined]
        values = check_reward(UserReward(clamped), images, ["a"] * size)
        torch.testing.assert_close(values, images[:, 0, 0, 0].clamp(max=clamp))
        share = f"{int((images[:, 0, 0, 0] < clamp).sum())} of {size} trial images: nothing is learned from the others"
        warning = f"marval: warning: reward 'clamped' has a gradient in only {share}\n"
        assert capsys.readouterr().err == (warning if told else "")


def test_what_a_reward_does_to_its_images_stays_with_it():
    def in_place(images: Tensor, prompts: list[str]) -> Tensor:
        images.detach().numpy()[:] *= 255  # numpy tells torch nothing
        return images.mul_(2).mean((1, 2, 3))

    in_place.differentiable = True  # type: ignore[attr-defined]
    images = torch.rand(3, 1, 8, 8)
    before = images.clone()
    for reward in (UserReward(in_place), WeightedSum([UserReward(in_place)] * 2, [1, 1])):
        found = score(reward, images, ["a"] * 3)
        assert torch.equal(images, before)
        assert torch.equal(score(reward, images.requires_grad_(), ["a"] * 3), found)
        images = images.detach()

    def fails(images: Tensor, prompts: list[str]) -> Tensor:
        raise KeyError(float(images.mul_(0).sum()))

    with pytest.raises(ValueError, match="fails on image 0"):
        score(UserReward(fails), images, ["a"] * 3)
    assert torch.equal(images, before)


def test_images_are_numbered_from_the_first_of_the_batch():
    def check(images: Tensor, prompts: list[str]) -> Tensor:
        assert "bad" not in prompts, "bad"
        return images.new_tensor([0, 0.5])

    x = torch.rand(2, 1, 8, 8)
    infinite = UserReward(lambda images, prompts: images.new_tensor([0, float("inf")]))
    for reward, message in ((infinite, "is inf"), (Verifiable(check), "verifiable"), (UserReward(check), "fails on")):
        for whole in (reward, WeightedSum([reward], [1])):
            with pytest.raises(ValueError, match=rf"{message}.*image 9|image 9.*{message}"):
                score(whole, x, ["good", "bad" if message == "fails on" else "good"], first=8)


def test_a_constant_black_box_is_refused():
    images, prompts = torch.rand(40, 1, 8, 8), ["a digit"] * 40

    def one_of_many(images: Tensor, prompts: list[str]) -> Tensor:
        return (images == chosen).all((1, 2, 3)).float()

    chosen = images[36]  # in another chunk than the first
    check_varies(UserReward(one_of_many), images, prompts)
    with pytest.raises(
        ValueError, match="reward 'one_of_many' is 0 for all 36 images of the starting student: there is"
    ):
        check_varies(UserReward(one_of_many), images[:36], prompts[:36])


def test_a_reward_that_raises_names_the_image():
    def picky(images: Tensor, prompts: list[str]) -> Tensor:
        if "bad" in prompts:
            raise KeyError("nothing known\nof this")
        return images.mean((1, 2, 3))

    def crowded(images: Tensor, prompts: list[str]) -> Tensor:
        assert len(images) < 3, "too many"
        return images.mean((1, 2, 3))

    def full(images: Tensor, prompts: list[str]) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    x = torch.rand(3, 1, 8, 8)
    for reward, message in (
        (picky, r"reward 'picky' fails on image 1 \('bad'\): KeyError: .* \(test_rewards.py, line \d+\)$"),
        (crowded, r"reward 'crowded' fails on the whole batch of 3, but on no image alone: AssertionError: too many"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            score(UserReward(reward), x, ["good", "bad", "bad"])
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match=message):  # named once, also as a part
            score(WeightedSum([UserReward(reward), UserReward(brightness)], [1, 1]), x, ["good", "bad", "bad"])
    with pytest.raises(torch.OutOfMemoryError):
        score(UserReward(full), x, ["a"] * 3)
    with pytest.raises(ValueError, match="got 2 prompts for 3 images"):
        score(UserReward(picky), x, ["a", "b"])


def test_truths_become_numbers():
    x = torch.rand(3, 1, 8, 8)
    for truths in (torch.tensor([True, False, True]), torch.tensor([1, 0, 1]), torch.tensor([1, 0, 1]).byte()):
        found = score(UserReward(lambda images, prompts, truths=truths: truths), x, ["a"] * 3)
        assert found.dtype == torch.float32
        assert found.tolist() == [1.0, 0.0, 1.0]
    assert score(Verifiable(lambda images, prompts: [True, False, True]), x, ["a"] * 3).tolist() == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match=r"is 0.5 for image 1 \('b'\): a verifiable reward is 0 or 1"):
        score(Verifiable(lambda images, prompts: torch.tensor([1, 0.5, 0])), x, list("abc"))
    with pytest.raises(ValueError, match=r"of shape \(2,\): it must return"):
        score(Verifiable(lambda images, prompts: [True, False]), x, list("abc"))


def test_checks_of_a_users_file(tmp_path: Path):
    file = tmp_path / "checks.py"
    file.write_text(
        "def read(images):\n    return [str(round(float(image.mean() * 10))) for image in images]\n\n"
        "def bright(images, prompts):\n    return images.mean((1, 2, 3)) > 0.45\n"
    )
    x = torch.arange(10).view(10, 1, 1, 1).expand(-1, 1, 8, 8) / 10
    match, bright = load(f"exact-match:{file}:read"), load(f"verifiable:{file}:bright")
    assert not match.differentiable
    assert score(match, x, PROMPTS).tolist() == [1.0] * 10
    assert score(match, x, [PROMPTS[3]] * 10).tolist() == [float(i == 3) for i in range(10)]
    assert score(bright, x, PROMPTS).tolist() == [0.0] * 5 + [1.0] * 5
    with pytest.raises(ValueError, match=r"fails on image 0 \('a'\): ValueError: prompt 'a' belongs to no class"):
        score(match, x[:1], ["a"])
    with pytest.raises(ValueError, match="reward 'verifiable:' needs a model: give verifiable:FILE"):
        load("verifiable:")


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3))


brightness.differentiable = True


def test_weighted_sum(folder: Path, tmp_path: Path, images: Tensor):
    file = tmp_path / "a + b*c.py"
    file.write_text(
        "def bright(images, prompts):\n    return 50 + 7 * images.mean((1, 2, 3))\nbright.differentiable = True\n"
        "def bad(images, prompts):\n    return images.mean((1, 2, 3)) / 0\n"
        "def same(images, prompts):\n    return images.mean((1, 2, 3)) * 0 + 3\n"
    )
    prompts = [PROMPTS[i % 10] for i in range(50)]
    total = load(f"0.5*classifier + -2e-1*{file}:bright", folder)
    assert isinstance(total, WeightedSum)
    assert total.weights == [0.5, -0.2]
    parts = [load("classifier", folder)(images, prompts), 50 + 7 * brightness(images, prompts)]
    torch.testing.assert_close(total.parts(images, prompts), torch.stack(parts))
    torch.testing.assert_close(check_reward(total, images, prompts), 0.5 * parts[0] - 0.2 * parts[1])
    calibrated = calibrate(total, images, prompts)
    scaled = [(part - part.mean()) / part.std(correction=0) for part in parts]
    torch.testing.assert_close(check_reward(calibrated, images, prompts), 0.5 * scaled[0] - 0.2 * scaled[1])
    assert not load(f"1*reads-class + 1*{file}:bright", folder).differentiable
    assert code_files(f"0.5*classifier + -2e-1*{file}:bright + 1*verifiable:b.py:f") == [file, Path("b.py")]
    assert code_files(f"{file}:bright") == [file]
    assert code_files("pickscore:folder") == []
    file.write_text(
        file.read_text()
        + "def dull(images, prompts):\n    return 0 * images.sum((1, 2, 3))\ndull.differentiable = True\n"
    )
    with pytest.raises(ValueError, match="dull' calls itself differentiable but its gradient is zero"):
        check_reward(load(f"1*classifier + 1*{file}:dull", folder), images, prompts)  # the sum has a gradient
    for spec, message in (
        (f"1*classifier + 2*{file}:bad", r"reward '.*:bad': the reward of image 0 \('a picture of 0'\) is inf"),
        (
            f"1*classifier + 2*{file}:same",
            "same' is 3 for all 50 images of the starting model: it cannot be normalised",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(load(spec, folder), images.clamp(min=0.01), prompts)
    for spec, message in (
        (f"1*classifier + 2*{file}:blue", "has no function 'blue'"),
        ("1*classifier + 2*beauty", "unknown reward 'beauty'"),
        ("0*classifier + 1*reads-class", "must not be 0"),
        ("0.5 * clip:", "reward 'clip:' needs a model: give clip:SOURCE"),
    ):
        with pytest.raises(ValueError, match=message):
            load(spec, folder)


@pytest.mark.parametrize("file", ["resnet20-12fca82f.th", "mobilenet_v2_dequant_fp16.npz"])
def test_published_classifiers(file: str, shared: Path):
    """The same logits as the feature network gives that `marval evaluate` uses, and a gradient."""
    path = shared / "data" / "weights" / file
    network = load_features(str(path))
    assert network.class_names is not None
    named = [network.class_names[2:5]]  # a model of some of its classes
    if network.class_names == imagenet.names():
        named.append([wnid for wnid, _ in imagenet.CLASSES[2:5]])
    for size, names in itertools.product((32, 40), named):
        x = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
        logits = network(x).logits
        assert logits is not None
        images, prompts = to_float(torch.from_numpy(x)), [f"a {name}" for name in names]
        found = {}
        for spec in ("classifier", "reads-class"):
            reward = load_reward(spec, classifier=str(path), class_names=names, template="a {class}", device="cpu")
            found[spec] = check_reward(reward, images, prompts)
        torch.testing.assert_close(found["classifier"], logits.log_softmax(1)[range(3), [2, 3, 4]])
        assert torch.equal(found["reads-class"], (logits.argmax(1) == torch.tensor([2, 3, 4])).float())
    with pytest.raises(ValueError, match=r"knows the classes .* but the model unicorn"):
        load_reward("classifier", classifier=str(path), class_names=["unicorn"], template="", device="cpu")
    with pytest.raises(ValueError, match=r"nowhere.th does not exist"):
        load_reward("classifier", classifier="nowhere.th", class_names=["cat"], template="", device="cpu")
