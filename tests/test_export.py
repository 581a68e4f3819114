"""An exported folder is the model and its card, and nothing of the run."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from small_codec import make_codec

import marval
from marval.checkpoint import save_state, write_json
from marval.config import EvaluateConfig, SamplingConfig, StudentConfig
from marval.evaluate import evaluate_folder
from marval.export import export, without_folders
from marval.measure import weights_digest
from marval.pipeline import Pipeline
from marval.tokenizers import PixelTokenizer, load_tokenizer


@pytest.fixture
def model(tiny_mar) -> Pipeline:
    """A student of a 0.1 run on a folder somewhere on this machine."""
    tokenizer = PixelTokenizer(image_size=8, channels=1, patch_size=2)
    provenance = {"verb": "rl", "data": "/home/me/data/ants", "data_licence": "CC0", "reward": "/home/me/nice.py:score"}
    sampling = SamplingConfig(ar_steps=3, guidance=1.5)
    return Pipeline(tiny_mar(), tokenizer, ['a "big" ant', "bee", "cat"], sampling, StudentConfig(), provenance)


@pytest.fixture
def run(model: Pipeline, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    model.save(folder)
    save_state(folder / "checkpoint.pt", {"step": 1, "optimizer": {"exp_avg": torch.zeros(9)}})
    write_json(
        folder / "meta.json", {"verb": "rl", "step": 60, "config": {"lr": 1e-4, "classifier": "/home/me/judge/"}}
    )
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def results(model: Pipeline, **values: object) -> dict[str, object]:
    """As `marval evaluate` writes them."""
    protocol = {
        "model": weights_digest(model), "guidance": 1.5, "ar_steps": 3, "head_steps": 1, "num_images": 5000, "seed": 0,
        "features": "an ant network",
    }  # fmt: skip
    timing = {"seconds_per_image": 0.01, "batch": 8}
    return {"fid": 3.25, "accuracy": 0.75, "protocol": protocol, "timing": timing, "versions": {}, **values}


def card(folder: Path) -> tuple[dict[str, object], str]:
    """Front matter as the hub reads it, and the text below."""
    hub = pytest.importorskip("huggingface_hub")
    loaded = hub.ModelCard.load(folder / "README.md")
    return loaded.data.to_dict(), loaded.text


def test_it_draws_the_same_images(run, model, tmp_path):
    assert export(run, tmp_path / "out").endswith(f"weights, config and model card -> {tmp_path / 'out'}")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "model.safetensors"
    ]  # fmt: skip
    exported = marval.load(tmp_path / "out")
    assert np.array_equal(exported.sample([0, 1], seed=2), model.sample([0, 1], seed=2))
    assert exported.provenance == {"verb": "rl", "data": "ants", "data_licence": "CC0", "reward": "nice.py:score"}
    assert not any(b"/home/me" in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_the_autoencoder_comes_along(tiny_mar, tmp_path):
    tokenizer = load_tokenizer(str(make_codec(tmp_path / "codec")), 32, 2)
    model = Pipeline(tiny_mar(token_dim=16), tokenizer, ["x", "y", "z"], SamplingConfig(ar_steps=2, head_steps=2))
    model.save(tmp_path / "model")
    assert "config, autoencoder and" in export(tmp_path / "model", tmp_path / "out")
    exported = marval.load(tmp_path / "out")
    assert np.array_equal(exported.sample([0], seed=2), model.sample([0], seed=2))
    assert "patches of 2x2 latents with 4 channels, 4 pixels apart" in card(tmp_path / "out")[1]
    for path in (tmp_path / "model" / "tokenizer").iterdir():
        path.unlink()
    assert "autoencoder and" not in export(tmp_path / "model", tmp_path / "tokens")
    assert not (tmp_path / "tokens" / "tokenizer").exists()
    assert "sample_tokens(" in card(tmp_path / "tokens")[1]


def test_the_card(run, model, tmp_path):
    write_json(tmp_path / "results.json", results(model))
    export(run, tmp_path / "ants", "Apache-2.0", tmp_path / "results.json")
    front, text = card(tmp_path / "ants")
    assert (front["license"], front["library_name"]) == ("apache-2.0", "marval")
    assert front["pipeline_tag"] == "unconditional-image-generation"
    assert {"class-conditional", "one-step"} <= set(front["tags"])
    for part in (
        "# ants", "one-step MARVAL student, aligned with a reward", "images of 8x8", "3 AR steps", "guidance 1.5",
        "Trained on ants; licence of the data: CC0.", "Weights: Apache-2.0.", "arxiv.org/abs/2511.15190",
    ):  # fmt: skip
        assert part in text, part
    numbers = text.split("```text\n")[1].split("```")[0]
    assert "3.2500" in numbers
    assert "an ant network" in numbers
    settings = json.loads(text.split("```json\n")[1].split("```")[0])
    assert settings["run"] == {"verb": "rl", "step": 60, "config": {"lr": 1e-4, "classifier": "judge"}}


def test_the_code_in_the_card_runs(run, model, tmp_path, monkeypatch):
    export(run, tmp_path / "ants")
    code = card(tmp_path / "ants")[1].split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, np.ndarray] = {}
    exec(code, names)
    assert np.array_equal(names["images"], model.sample(['a "big" ant'], seed=0))
    assert (tmp_path / "image.png").exists()


@pytest.mark.parametrize(
    ("licence", "front"),
    [
        (None, {"license": "other", "license_name": "not-stated"}),
        ("MIT", {"license": "mit"}),
        ("ImageNet terms, research only", {"license": "other", "license_name": "imagenet-terms-research-only"}),
    ],
)
def test_licences(run, tmp_path, licence, front):
    export(run, tmp_path / "out", licence)
    found, text = card(tmp_path / "out")
    assert {name: found.get(name) for name in front} == front
    assert f"Weights: {licence or 'no licence stated'}." in text


def test_a_sweep_is_a_table(run, model, tmp_path):
    rows = [results(model), results(model, fid=2.5)]
    write_json(tmp_path / "sweep.json", {"rows": rows})
    export(run, tmp_path / "out", numbers=tmp_path / "sweep.json")
    numbers = card(tmp_path / "out")[1].split("```text\n")[1].split("```")[0]
    assert "3.250" in numbers
    assert "2.500" in numbers


def test_an_evaluation_for_real(run, tmp_path):
    """What `marval evaluate` writes, as it does."""
    config = EvaluateConfig(num_images=20, reference="digits", features=str(tiny.classifier()))
    evaluate_folder(run, tmp_path / "results.json", config)
    export(run, tmp_path / "out", "cc-by-4.0", tmp_path / "results.json")
    front, text = card(tmp_path / "out")
    assert front["license"] == "cc-by-4.0"
    measured = json.loads((tmp_path / "results.json").read_text())
    assert f"{measured['fid']:.4f}" in text
    assert "num images" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fid": 3}, r"numbers\.json is no result of marval evaluate: KeyError 'protocol'"),
        ([1], r"numbers\.json is no result of marval evaluate"),
        ({"rows": []}, "is no result of marval evaluate"),
        ({"fid": 1.0, "timing": {"seconds_per_image": 1, "batch": 1}, "protocol": {"model": "sha256 0"}},
         r"holds numbers of other weights \(sha256 0\): evaluate this model"),
    ],
)  # fmt: skip
def test_numbers_that_are_not_this_models(run, tmp_path, content, message):
    write_json(tmp_path / "numbers.json", content)
    with pytest.raises(ValueError, match=message):
        export(run, tmp_path / "out", numbers=tmp_path / "numbers.json")
    assert not (tmp_path / "out").exists()


def test_errors(run, tmp_path):
    with pytest.raises(ValueError, match=r"absent' does not exist: give a model's folder"):
        export(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(ValueError, match=r"none\.json does not exist"):
        export(run, tmp_path / "out", numbers=tmp_path / "none.json")
    with pytest.raises(ValueError, match="run exists and is not empty: choose another --out"):
        export(run, run)
    with pytest.raises(ValueError, match="run exists and is not empty: choose another --out"):  # looked at first
        export(tmp_path / "absent", run)


def test_paths_are_cut():
    values = {"a": "/x/y", "b": ["~/z/", "C:\\u\\v", "runs/w", "a/b of c", 3, None], "c": {"d": "sha256 1/2"}}
    cut = {"a": "y", "b": ["z", "v", "runs/w", "a/b of c", 3, None], "c": {"d": "sha256 1/2"}}
    assert without_folders(values) == cut
    for text, expected in (
        ("pickscore:/home/alice/secret/pick", "pickscore:pick"),
        ("0.5*clip:/home/alice/c + 0.5*/home/alice/r.py:f", "0.5*clip:c + 0.5*r.py:f"),
        ("/home/my pictures/x", "x"),
        ("/home/alice smith/rewards/r.py:f", "r.py:f"),
        ("/data/a, b/x", "x"),
        ("pickscore:/home/my secret/pick", "pickscore:pick"),
        ("Apache-2.0 / MIT", "Apache-2.0 / MIT"),
        ("~/a/emoji, encoded at 32 px", "emoji, encoded at 32 px"),
        ("MIT (https://x.org/y), clip:openai/clip", "MIT (https://x.org/y), clip:openai/clip"),
    ):
        assert without_folders(text) == expected


def test_half_and_name(run: Path, tmp_path: Path):
    export(run, tmp_path / "first", half=True)
    export(tmp_path / "first", tmp_path / "second", half=True, name="digits/student")
    assert 'marval.load("digits/student")' in (tmp_path / "second" / "README.md").read_text()
    files = [folder / "model.safetensors" for folder in (run, tmp_path / "first", tmp_path / "second")]
    assert files[1].read_bytes() == files[2].read_bytes()
    assert files[1].stat().st_size < 0.6 * files[0].stat().st_size
    exact, half = (marval.load(file.parent).sample_tokens([1, 2], seed=3) for file in files[:2])
    assert 0 < float((exact - half).abs().mean()) < 0.02
