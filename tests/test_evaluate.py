"""Evaluations: equal to plain formulas, whatever the batch, the processes and the interruptions; references; sweeps."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from marval import reference as references
from marval.bench import seconds_per_image
from marval.config import EvaluateConfig
from marval.data import load_dataset
from marval.draw import head_evaluations_per_token, sample_in_turn
from marval.evaluate import evaluate_folder
from marval.features import classifier_features, load_features
from marval.images import center_crop, save_png
from marval.measure import measure
from marval.metrics import frechet_distance, inception_score, kernel_distance, moments_of, precision_recall
from marval.models.classifier import Classifier
from marval.pipeline import Pipeline
from marval.quickstart import read as read_by
from marval.reference import load_reference
from marval.rng import generator
from marval.tables import WIDTH
from marval.tokenizers import to_float

FREE = ("timing", "versions")
"""What may differ between two runs of one evaluation."""
TWO_MAPS = """
def two(images):
    return images.flatten(1)[:, :20], images.mean((2, 3)) + images[:, :, 0, :10].flatten(1)
"""


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """25 images are three chunks."""
    monkeypatch.setattr(references, "CHUNK", 10)


def config(**settings: Any) -> EvaluateConfig:
    defaults = {"reference": "digits", "num_images": 25, "features": str(tiny.classifier()), "ar_steps": "2"}
    return EvaluateConfig(**{**defaults, "device": "cpu", **settings})


def read(path: Path) -> dict[str, Any]:
    """Results without what may differ."""
    return {name: value for name, value in json.loads(path.read_text()).items() if name not in FREE}


# ---- images in memory


def test_a_classifier_reads_images():
    network, data = Classifier.load(tiny.classifier()), load_dataset("digits", "test")
    moments, accuracy, log_prob = read_by(classifier_features(network), data.images, data.labels)
    logits = network(to_float(torch.from_numpy(data.images))).detach()
    labels = torch.from_numpy(data.labels)
    assert moments.count == len(data)
    assert accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert log_prob == pytest.approx(-float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)


def test_images_in_turn_do_not_depend_on_the_batch():
    model = Pipeline.load(tiny.student())
    images, labels = sample_in_turn(model, ["7", 2, None], 8, seed=3)
    assert labels.tolist() == [7, 2, 10, 7, 2, 10, 7, 2]
    again, _ = sample_in_turn(model, ["7", 2, None], 8, seed=3, batch_size=3)
    assert np.array_equal(images, again)
    assert np.array_equal(images, model.sample([7, 2, None], num_images=8, seed=3))


def test_evaluations_of_the_head():
    teacher, student = Pipeline.load(tiny.teacher()), Pipeline.load(tiny.student())
    assert head_evaluations_per_token(teacher) == 20  # ten steps, twice for guidance
    assert head_evaluations_per_token(student) == 1
    assert seconds_per_image({"student": student, "teacher": teacher}, 4, repeats=2).keys() == {"student", "teacher"}


# ---- references


def test_references_agree(tmp_path: Path):
    """The training digits by name, as a folder, as an .npz of images and as an .npz of statistics."""
    network, data = Classifier.load(tiny.classifier()), load_dataset("digits", "train")
    features = classifier_features(network)
    by_name = load_reference("digits", features).moments
    assert by_name.count == len(data)
    expected = network.features(to_float(torch.from_numpy(data.images))).detach().double().numpy()
    np.testing.assert_allclose(by_name.mu, expected.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_name.sigma, np.cov(expected.T), rtol=1e-4, atol=1e-5)

    np.savez(tmp_path / "images.npz", images=data.images)
    np.savez(tmp_path / "adm.npz", arr_0=data.images)
    np.savez(tmp_path / "statistics.npz", mu=by_name.mu.astype(np.float32), sigma=by_name.sigma)
    (tmp_path / "folder" / "nested").mkdir(parents=True)
    for i, image in enumerate(data.images[:60]):
        save_png(tmp_path / "folder" / ("nested" if i >= 40 else "") / f"{i:04d}.png", image)
    for name in ("images.npz", "adm.npz", "statistics.npz"):
        moments = load_reference(str(tmp_path / name), features).moments
        np.testing.assert_allclose(moments.mu, by_name.mu, rtol=1e-6)
        np.testing.assert_allclose(moments.sigma, by_name.sigma, rtol=1e-6, atol=1e-9)
    first = moments_of(features(data.images[:60]).pooled)
    for size in (None, 8):
        reference = load_reference(str(tmp_path / "folder"), features, size, channels=1)
        np.testing.assert_allclose(reference.moments.sigma, first.sigma, rtol=1e-5, atol=1e-7)
        assert reference.count == 60


def test_a_large_split_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.py").write_text("def pixels(images):\n    return images.flatten(1)[:, ::7]\n")
    network = load_features(f"{tmp_path / 'mine.py'}:pixels")
    for i in range(10):
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        save_png(tmp_path / "data" / "ab"[i % 2] / f"{i}.png", pixels)
    whole = load_reference(f"{tmp_path / 'data'}:train", network, 16)
    monkeypatch.setattr("marval.data.IN_MEMORY", 0)
    monkeypatch.setattr("marval.data.read_equal", None)
    parts = load_reference(f"{tmp_path / 'data'}:train", network, 16)
    assert (parts.count, parts.source) == (8, "training split")
    np.testing.assert_array_equal(parts.moments.mu, whole.moments.mu)
    (tmp_path / "data" / "index.json").write_text("{}")
    for name in ("data", "data:train"):
        with pytest.raises(ValueError, match=r"data holds latents, and images are compared: give the images"):
            load_reference(str(tmp_path / name), network, 16)


def test_photographs_are_cropped_to_the_model(tmp_path: Path):
    """A folder of any sizes, by ADM's and MAR's centre crop."""
    (tmp_path / "mine.py").write_text("def pixels(images):\n    return images.flatten(1)[:, ::7]\n")
    network = load_features(f"{tmp_path / 'mine.py'}:pixels")
    (tmp_path / "photos").mkdir()
    expected = []
    for i in range(5):
        photo = Image.fromarray(np.random.default_rng(i).integers(0, 256, (40 + i, 30, 3), np.uint8))
        photo.save(tmp_path / "photos" / f"{i}.png")
        expected.append(np.asarray(center_crop(photo, 16)))
    reference = load_reference(str(tmp_path / "photos"), network, 16)
    flat = np.stack(expected).astype(np.float64) / 255
    flat = flat.transpose(0, 3, 1, 2).reshape(5, -1)[:, ::7]
    np.testing.assert_allclose(reference.moments.mu, flat.mean(0), rtol=1e-6)
    assert "centre-cropped to 16x16" in reference.source


def test_a_saved_reference_gives_the_same_numbers(tmp_path: Path):
    (tmp_path / "mine.py").write_text(TWO_MAPS)
    kept = tmp_path / "kept" / "digits.npz"
    evaluate_folder(tiny.student(), tmp_path / "a.json", config(), save_reference=kept)
    evaluate_folder(tiny.student(), tmp_path / "b.json", config(reference=str(kept)))
    a, b = read(tmp_path / "a.json"), read(tmp_path / "b.json")
    for name in ("fid", "kid", "kid_std", "precision", "recall", "inception_score", "accuracy"):
        assert a[name] == b[name], name
    assert b["protocol"]["reference_images"] == 1437
    with pytest.raises(ValueError, match=r"kept/digits\.npz was made with penultimate layer of a conv classifier"):
        evaluate_folder(
            tiny.student(), tmp_path / "c.json", config(reference=str(kept), features=f"{tmp_path / 'mine.py'}:two")
        )
    with pytest.raises(ValueError, match="exists: choose another --save-reference"):
        evaluate_folder(tiny.student(), tmp_path / "c.json", config(), save_reference=kept)


def test_statistics_alone(tmp_path: Path):
    """As MAR's file: no KID, precision and recall, and the results say so. ADM's files also have images."""
    data, network = load_dataset("digits", "train"), load_features(str(tiny.classifier()))
    moments = load_reference("digits", network).moments
    np.savez(tmp_path / "mar.npz", mu=moments.mu, sigma=moments.sigma)
    np.savez(tmp_path / "adm.npz", mu=moments.mu, sigma=moments.sigma, arr_0=data.images[:300])
    for name in ("mar", "adm"):
        evaluate_folder(tiny.student(), tmp_path / f"{name}.json", config(reference=str(tmp_path / f"{name}.npz")))
    mar, adm = read(tmp_path / "mar.json"), read(tmp_path / "adm.json")
    assert mar["fid"] == adm["fid"]
    assert mar["left_out"].keys() == {"sfid", "kid", "precision", "recall"}
    assert adm["left_out"].keys() == {"sfid"}
    assert not {"kid", "precision", "recall"} & mar.keys()
    assert mar["protocol"]["reference_images"] == "unknown"
    assert "and its 300 images" in adm["protocol"]["reference_source"]


# ---- evaluations


def plain(images: np.ndarray, network: Any, labels: np.ndarray, seed: int) -> dict[str, float]:
    """Every number by plain numpy, or by the function that tests/test_metrics.py compares with it."""

    def features(images: np.ndarray, kind: str) -> torch.Tensor:
        return torch.cat([getattr(network(images[i : i + 10]), kind) for i in range(0, len(images), 10)])

    real = features(load_dataset("digits", "train").images, "pooled")
    fake, logits = features(images, "pooled"), features(images, "logits")
    a, b = fake.double().numpy(), real.double().numpy()
    moments = [references.Moments(x.mean(0), np.cov(x.T), len(x)) for x in (a, b)]
    kid, kid_std = kernel_distance(fake, real, generator(seed, 0x41D))
    precision, recall = precision_recall(fake, real)
    score, score_std = inception_score(logits)
    return {
        "fid": frechet_distance(*moments), "kid": kid, "kid_std": kid_std, "precision": precision, "recall": recall,
        "inception_score": score, "inception_score_std": score_std,
        "accuracy": float((logits.argmax(1).numpy() == labels).mean()),
    }  # fmt: skip


@pytest.mark.usefixtures("small_chunks")
def test_results_and_their_protocol(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Chunk by chunk as all at once; one table of fewer than 100 columns; nothing left behind."""
    out = tmp_path / "a" / "out.json"
    evaluate_folder(tiny.student(), out, config(num_images=45, seed=5, batch=4))
    results, printed = json.loads(out.read_text()), capsys.readouterr().out
    model, network = Pipeline.load(tiny.student()), load_features(str(tiny.classifier()))
    images, labels = sample_in_turn(model, range(10), 45, seed=5, ar_steps=2)
    for name, value in plain(images, network, labels, 5).items():
        assert results[name] == pytest.approx(value, rel=1e-7, abs=1e-12), name
    protocol = results["protocol"]
    assert (protocol["num_images"], protocol["seed"], protocol["ar_steps"], protocol["head_steps"]) == (45, 5, 2, 1)
    assert (protocol["reference_images"], protocol["kind"], protocol["precision"]) == (1437, "student", "float32")
    assert "conv classifier" in protocol["features"]
    assert {"torch", "marval", "platform"} <= results["versions"].keys()
    assert results["timing"]["seconds_per_image"] > 0
    assert results["left_out"] == {"sfid": "the network has no spatial features"}
    assert f"{results['fid']:.4f}" in printed
    assert max(map(len, printed.replace(str(tmp_path), "").splitlines())) <= WIDTH
    assert os.listdir(out.parent) == ["out.json"]


@pytest.mark.usefixtures("small_chunks")
def test_the_batch_changes_nothing(tmp_path: Path):
    for batch in (1, 7, 250):
        evaluate_folder(tiny.teacher(), tmp_path / f"{batch}.json", config(batch=batch))
    first = read(tmp_path / "1.json")
    assert first == read(tmp_path / "7.json") == read(tmp_path / "250.json")
    assert (first["protocol"]["kind"], first["protocol"]["head_steps"]) == ("teacher", 10)


def test_rewards_and_spatial_features(tmp_path: Path):
    """Means with their intervals, of prompts that name the class; sFID over a map that the network gives."""
    (tmp_path / "mine.py").write_text(
        "import torch\ndef bright(images, prompts):\n"
        "    return images.mean((1, 2, 3)) + torch.tensor([float(p.split()[-1]) for p in prompts])\n"
    )
    spec = f"{tmp_path / 'mine.py'}:bright"
    png = tmp_path / "png"
    evaluate_folder(tiny.student(), tmp_path / "r.json", config(rewards=spec, prompt="a {class}"), png=png)
    reward = read(tmp_path / "r.json")["rewards"][spec]
    images, labels = sample_in_turn(Pipeline.load(tiny.student()), range(10), 25, seed=0, ar_steps=2)
    values = images.mean((1, 2, 3)) / 255 + labels
    assert reward["mean"] == pytest.approx(values.mean(), rel=1e-5)
    assert reward["interval95"] == pytest.approx(1.96 * values.std(ddof=1) / 5, rel=1e-5)
    files = sorted(png.iterdir())
    assert [path.name for path in files][:2] == ["000000_0.png", "000001_1.png"]
    assert len(files) == 25
    assert np.array_equal(np.asarray(Image.open(files[12])), images[12, :, :, 0])

    network = load_features(str(tiny.classifier()))
    both = references.FeatureNetwork(
        "two maps", "", "x", None, torch.device("cpu"),
        lambda x: references_features(network.run(x).pooled, x),
    )  # fmt: skip
    reference = load_reference("digits", both)
    results = measure(Pipeline.load(tiny.student()), reference, both, config(), {"ar_steps": 2})
    real, fake = (x[:, :4, :5, 0].reshape(len(x), -1) / 255.0 for x in (load_dataset("digits").images, images))
    expected = frechet_distance(*(references.Moments(x.mean(0), np.cov(x.T)) for x in (real, fake)))
    assert results["sfid"] == pytest.approx(expected, rel=1e-5)
    assert results["left_out"].keys() == {"inception_score", "accuracy"}


@pytest.mark.usefixtures("small_chunks")
def test_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Each half is what an evaluation of that model alone gives; the difference of rewards is taken image by image."""
    (tmp_path / "mine.py").write_text("def bright(images, prompts):\n    return images.mean((1, 2, 3))\n")
    bright = f"{tmp_path / 'mine.py'}:bright"
    settings = config(rewards=f"{bright}, classifier,0.5*reads-class + 1*{bright}", features="")
    tiny.classifier()  # beside the models: the default of --features, which the rewards ask
    for name, folder in (("after", tiny.student()), ("before", tiny.teacher())):
        evaluate_folder(folder, tmp_path / f"{name}.json", settings)
    capsys.readouterr()
    out, png = tmp_path / "pair" / "out.json", tmp_path / "png"
    evaluate_folder(tiny.student(), out, settings, png=png, before=tiny.teacher())
    printed, pair = capsys.readouterr().out, json.loads(out.read_text())
    differences = {name: reward.pop("difference") for name, reward in pair["rewards"].items()}
    halves = {"before": pair.pop("before"), "after": pair}
    for name, half in halves.items():
        assert {k: v for k, v in half.items() if k not in FREE} == read(tmp_path / f"{name}.json"), name
    assert sorted(path.name for path in png.iterdir()) == ["after", "before"]

    drawn = [sample_in_turn(Pipeline.load(f), range(10), 25, seed=0, ar_steps=2)[0] for f in (
        tiny.student(), tiny.teacher())]  # fmt: skip
    change = (drawn[0].astype(float) - drawn[1]).mean((1, 2, 3)) / 255
    assert differences[bright]["mean"] == pytest.approx(change.mean(), rel=1e-4)
    assert differences[bright]["interval95"] == pytest.approx(1.96 * change.std(ddof=1) / 5, rel=1e-4)
    unpaired = sum(half["rewards"][bright]["interval95"] ** 2 for half in halves.values()) ** 0.5
    assert differences[bright]["interval95"] < unpaired
    assert max(map(len, printed.replace(str(tmp_path), "").splitlines())) <= WIDTH
    rows = {line.split("  ")[1]: line.split() for line in printed.splitlines() if line.startswith("  ")}
    assert rows["FID"][1:] == [f"{halves['before']['fid']:.4f}", f"{pair['fid']:.4f}",
                               f"{pair['fid'] - halves['before']['fid']:+.4f}"]  # fmt: skip
    assert rows["bright"][-3:] == [f"{change.mean():+.4f}", "+-", f"{differences[bright]['interval95']:.4f}"]
    assert "teacher; then student" in printed
    assert sorted(os.listdir(out.parent)) == ["out.json"]

    evaluate_folder(tiny.student(), out, settings, png=png, resume=True, before=tiny.teacher())
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--before compares two models at one setting: give one value"):
        evaluate_folder(tiny.student(), out, config(ar_steps="2,4"), before=tiny.teacher())
    with pytest.raises(ValueError, match="draws other classes, images or tokens than"):
        evaluate_folder(tiny.student(), tmp_path / "x.json", config(), before=Path("fashion-mnist/student"))

    other = Pipeline.load(tiny.teacher())  # with other defaults of its own
    other.sampling = dataclasses.replace(other.sampling, ar_steps=1, guidance=1.0)
    other.save(tmp_path / "other")
    features = str(tiny.classifier())
    for name, folder in (("same", tiny.teacher()), ("other", tmp_path / "other")):
        evaluate_folder(
            tiny.student(), tmp_path / f"{name}.json", config(features=features, ar_steps=""), before=folder
        )
    assert read(tmp_path / "other.json")["before"]["fid"] == read(tmp_path / "same.json")["before"]["fid"]


def references_features(pooled: torch.Tensor, images: torch.Tensor) -> Any:
    from marval.features import Features

    return Features(pooled, images[:, :4, :5, 0].flatten(1).float() / 255)


# ---- interruptions and processes


@pytest.mark.usefixtures("small_chunks")
def test_code_of_a_reward_may_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from marval import measure as module

    (tmp_path / "mine.py").write_text("def zero(images, prompts):\n    return images.mean((1, 2, 3)) * 0\n")
    settings, real = config(rewards=f"{tmp_path / 'mine.py'}:zero"), module.draw_chunk

    def stops(model: Pipeline, labels: Any, first: int, *args: Any) -> np.ndarray:
        if first > 0:
            raise KeyboardInterrupt
        return real(model, labels, first, *args)

    monkeypatch.setattr(module, "draw_chunk", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate_folder(tiny.student(), tmp_path / "out.json", settings)
    monkeypatch.setattr(module, "draw_chunk", real)
    (tmp_path / "mine.py").write_text("def zero(images, prompts):\n    return images.mean((1, 2, 3)) * 0 + 1\n")
    with pytest.raises(ValueError, match=r"was begun with code of mine\.py = "):
        evaluate_folder(tiny.student(), tmp_path / "out.json", settings, resume=True)

    done = tmp_path / "done.json"
    evaluate_folder(tiny.student(), done, settings)
    evaluate_folder(tiny.student(), done, settings, resume=True)
    with pytest.raises(ValueError, match=r"done\.json exists, with prompt = '.*', not 'a \{class\}': choose another"):
        evaluate_folder(tiny.student(), done, dataclasses.replace(settings, prompt="a {class}"), resume=True)
    (tmp_path / "mine.py").write_text("def zero(images, prompts):\n    return images.mean((1, 2, 3)) * 0 + 2\n")
    with pytest.raises(ValueError, match=r"done\.json exists, with code of mine\.py = '.*', not '.*': choose another"):
        evaluate_folder(tiny.student(), done, settings, resume=True)


def test_a_kill_after_the_results_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """They are there: what was kept for a resume goes, and nothing is drawn."""
    from marval import evaluate as module

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    out, other = tmp_path / "out.json", tmp_path / "other.json"
    with monkeypatch.context() as patched:
        patched.setattr(module, "shutil", SimpleNamespace(rmtree=killed))
        for seed, file in enumerate((out, other)):
            with pytest.raises(KeyboardInterrupt):
                evaluate_folder(tiny.student(), file, config(seed=seed))
    results, partials = out.read_bytes(), [file.with_name(f"{file.name}.partial") for file in (out, other)]
    evaluate_folder(tiny.student(), out, config(), resume=True)
    assert "finished before" in capsys.readouterr().out
    assert (partials[0].exists(), out.read_bytes()) == (False, results)

    partials[1].rename(partials[0])  # of other results
    with pytest.raises(ValueError, match=r"holds an unfinished evaluation, and .* another, finished one: remove one"):
        evaluate_folder(tiny.student(), out, config(), resume=True)
    assert partials[0].exists()


@pytest.mark.usefixtures("small_chunks")
def test_an_interrupted_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped between chunks, in the second row of a sweep: what is done is not drawn again, the results are equal."""
    from marval import measure as module

    settings = config(ar_steps="2,4")
    evaluate_folder(tiny.student(), tmp_path / "whole.json", settings)
    real, drawn = module.draw_chunk, []

    def stops(model: Pipeline, labels: Any, first: int, *args: Any) -> np.ndarray:
        if len(drawn) == 4:
            raise KeyboardInterrupt
        drawn.append(first)
        return real(model, labels, first, *args)

    monkeypatch.setattr(module, "draw_chunk", stops)
    out = tmp_path / "resumed.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate_folder(tiny.student(), out, settings)
    assert drawn == [0, 10, 20, 0]
    assert not out.exists()
    with pytest.raises(ValueError, match="unfinished evaluation: add --resume"):
        evaluate_folder(tiny.student(), out, settings)
    for other, words in (
        (config(ar_steps="2,4", seed=1), "was begun with seed = 0, not 1"),
        (config(ar_steps="2,3"), "was begun with ar_steps = 4, not 3"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate_folder(tiny.student(), out, other, resume=True)
    with pytest.raises(ValueError, match="was begun with model = "):
        evaluate_folder(tiny.teacher(), out, config(ar_steps="2,4"), resume=True)
    drawn.clear()
    evaluate_folder(tiny.student(), out, settings, resume=True)
    assert drawn == [10, 20]
    rows = [json.loads(path.read_text())["rows"] for path in (tmp_path / "whole.json", out)]
    for a, b in zip(*rows, strict=True):
        assert {k: v for k, v in a.items() if k not in FREE} == {k: v for k, v in b.items() if k not in FREE}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "resumed.json", "resumed.png", "whole.json", "whole.png",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"resumed\.json exists"):
        evaluate_folder(tiny.student(), out, settings)
    before = out.read_bytes()
    evaluate_folder(tiny.student(), out, settings, resume=True)  # of what is finished nothing is left to do
    assert (drawn, out.read_bytes()) == ([10, 20], before)
    for model, other, message in (
        (tiny.student(), config(ar_steps="2,4", seed=1), "with seed = 0, not 1: choose another --out"),
        (tiny.student(), config(ar_steps="2,3"), "with ar_steps = 4, not 3"),
        (tiny.student(), config(ar_steps="2"), "with 2 rows, not 1"),
        (tiny.teacher(), config(ar_steps="2,4"), "with model = "),
        (tiny.student(), config(ar_steps="2,4", rewards="classifier"), r"with rewards \[\], not \['classifier'\]"),
    ):
        with pytest.raises(ValueError, match=rf"resumed\.json exists, {message}"):
            evaluate_folder(model, out, other, resume=True)
    with pytest.raises(ValueError, match=r"is finished, without .*pictures: choose another --out, or leave --png out"):
        evaluate_folder(tiny.student(), out, settings, resume=True, png=tmp_path / "pictures")


WORK = (
    """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from marval import reference
from marval.config import EvaluateConfig
from marval.evaluate import evaluate_folder
reference.CHUNK = 10
config = EvaluateConfig(
    reference="digits", num_images=25, features={features!r}, ar_steps="2", device="cpu", batch=6, shard={shard}
)
evaluate_folder(Path({model!r}), Path({out!r}), config, png=Path({png!r}))
"""
    + tiny.LEAVE
)


@pytest.mark.usefixtures("small_chunks")
def test_the_number_of_processes_changes_nothing(tmp_path: Path):
    """25 images in chunks of 10, 10 and 5 over 3 processes, and over 2 with sharded weights, of which one idles."""
    evaluate_folder(tiny.student(), tmp_path / "1.json", config(), png=tmp_path / "png1")
    expected = read(tmp_path / "1.json")
    started: list[tuple[str, subprocess.Popen[str]]] = []
    for count, shard in ((3, False), (2, True)):
        name = f"{count}{'s' if shard else ''}"
        values = {
            "tests": str(Path(__file__).parent), "features": str(tiny.classifier()), "shard": shard,
            "model": str(tiny.student()), "out": str(tmp_path / f"{name}.json"), "png": str(tmp_path / f"png{name}"),
        }  # fmt: skip
        script = tmp_path / f"work{name}.py"
        script.write_text(WORK.format(**values))
        args = ["--nnodes", 1, "--nproc-per-node", count, "--master-addr", "127.0.0.1", "--master-port"]
        started.append((name, tiny.start([*args, tiny.free_port(), script], "torch.distributed.run")))
    for name, process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out.count("written to") == 1
        assert read(tmp_path / f"{name}.json") == expected, name
        pictures = sorted(path.name for path in (tmp_path / f"png{name}").iterdir())
        assert pictures == sorted(path.name for path in (tmp_path / "png1").iterdir())
        for picture in pictures:
            assert (tmp_path / f"png{name}" / picture).read_bytes() == (tmp_path / "png1" / picture).read_bytes()


# ---- sweeps


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Each row is what an evaluation with these settings alone gives; a table, a plot."""
    out = tmp_path / "sweep.json"
    evaluate_folder(tiny.teacher(), out, config(guidance="1.0,2.0", ar_steps="2,4", head_steps="4"))
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    found = [(row["protocol"]["guidance"], row["protocol"]["ar_steps"]) for row in rows]
    assert found == [(1, 2), (1, 4), (2, 2), (2, 4)]
    evaluate_folder(tiny.teacher(), tmp_path / "one.json", config(guidance="2", ar_steps="4", head_steps="4"))
    assert {name: value for name, value in rows[3].items() if name not in FREE} == read(tmp_path / "one.json")
    for row in rows:
        assert f"{row['fid']:.3f}" in printed
    assert max(map(len, printed.replace(str(tmp_path), "").splitlines())) <= WIDTH
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.size == (1080, 456)


@pytest.mark.usefixtures("small_chunks")
def test_a_reward_that_fails_names_the_image(tmp_path: Path):
    """Counted over all chunks, in a sum as well."""
    (tmp_path / "mine.py").write_text(
        "seen = []\ndef odd(images, prompts):\n    seen.extend(prompts)\n"
        "    return [0.5 if p == '3' and len(seen) > 21 else 1 for p in prompts]\n"
    )
    spec = f"verifiable:{tmp_path / 'mine.py'}:odd"
    for i, rewards in enumerate((spec, f"1*reads-class + 1*{spec}")):
        with pytest.raises(ValueError, match=r"is 0\.5 for image 23 \('3'\)"):
            evaluate_folder(tiny.student(), tmp_path / f"{i}.json", config(rewards=rewards, prompt="{class}"))


def test_evaluations_of_a_student_are_its_head_steps(tmp_path: Path):
    out = tmp_path / "sweep.json"
    evaluate_folder(tiny.student_of_two(), out, config(evaluations="1,2"))
    rows = json.loads(out.read_text())["rows"]
    assert [row["protocol"]["head_steps"] for row in rows] == [1, 2]
    assert rows[0]["fid"] != rows[1]["fid"]


def test_refused(tmp_path: Path):
    (tmp_path / "small.npz").write_bytes(b"")
    np.savez(tmp_path / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    (tmp_path / "there.json").write_text("mine")
    (tmp_path / "odd.json.partial").mkdir()
    (tmp_path / "mine.py").write_text("def r(images, prompts):\n    return images\n")
    for settings, words in (
        ({"reference": ""}, "name what to compare with: --reference"),
        ({"reference": str(tmp_path / "small.npz")}, "has 3 pooled features, penultimate layer .* gives 64: use the"),
        ({"reference": str(tmp_path / "half.npz")}, "must have both mu and sigma"),
        ({"reference": "nowhere"}, "nowhere does not exist"),
        ({"features": "nothing"}, "no feature network 'nothing'"),
        ({"guidance": "0.5"}, "this student was distilled for a constant guidance"),
        ({"ar_steps": "2,99"}, "99"),
        ({"weights": "raw", "reference": str(tmp_path)}, "checkpoint|holds no images"),
        ({"rewards": "nothing"}, "unknown reward 'nothing'"),
        ({"rewards": "clip:nowhere"}, "'clip:nowhere': 'nowhere' is neither a folder nor a hub name such as"),
        (
            {"rewards": "1*reads-class", "features": f"{tmp_path / 'mine.py'}:r"},
            r"'1\*reads-class' asks the network of --features, and .*mine.py:r is no classifier: name a folder",
        ),
        ({"rewards": f"{tmp_path / 'mine.py'}:r"}, "the reward returned"),
        ({"order": "upwards"}, "unknown order 'upwards'"),
        ({"inception_weights": "x"}, "--inception-weights goes with"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words) as error:
            evaluate_folder(tiny.student(), tmp_path / "x" / "out.json", config(**settings))
        assert "\n" not in str(error.value), settings
        assert not (tmp_path / "x" / "out.json.partial").exists()
    for settings, words in (
        ({"num_images": 1}, "at least 2 images, got 1"),
        ({"guidance": "1.0;2"}, "guidance '1.0;2' must be numbers separated by commas, such as 1.0,1.2,1.5"),
        ({"ar_steps": "2.5"}, "ar_steps '2.5' must be numbers separated by commas, such as 16,32,64"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"weights": "mean"}, "unknown weights 'mean'"),
        ({"batch": 0}, "batch size must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            config(**settings)
    with pytest.raises(ValueError, match="exists: choose another --out"):
        evaluate_folder(tiny.student(), tmp_path / "there.json", config())
    with pytest.raises(ValueError, match="it is not of marval: choose another --out"):
        evaluate_folder(tiny.student(), tmp_path / "odd.json", config(), resume=True)
    with pytest.raises(ValueError, match="exists: choose another --png"):
        evaluate_folder(tiny.student(), tmp_path / "out.json", config(), png=tmp_path)


def test_raw_weights(tmp_path: Path):
    """As they were last trained, not their average: other weights, other numbers, named."""
    for weights in ("ema", "raw"):
        evaluate_folder(tiny.teacher(), tmp_path / f"{weights}.json", config(weights=weights))
    ema, raw = read(tmp_path / "ema.json"), read(tmp_path / "raw.json")
    assert (ema["protocol"]["weights"], raw["protocol"]["weights"]) == ("ema", "raw")
    assert ema["protocol"]["model"] != raw["protocol"]["model"]
    assert ema["fid"] != raw["fid"]
