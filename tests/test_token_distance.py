"""The distance of a student's tokens to its teacher's: what is drawn is what models draw, and the page shows it."""

from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch

from marval.checkpoint import read_json
from marval.pipeline import Pipeline
from marval.rng import ImageNoise


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return tiny.benchmark("token_distance")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.study(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("role", ["teacher", "student"])
@torch.inference_mode()
def test_draws_are_those_of_the_model(script, models, role):
    """The last token of an image, given the others, as `Pipeline.draw_batch` completes it."""
    model = Pipeline.load(models / role)
    length, dim = model.network.config.num_tokens, model.network.config.token_dim
    labels, orders = torch.tensor([3, 5]), torch.arange(length).expand(2, length)
    known = torch.rand(2, length, dim, generator=torch.Generator().manual_seed(0)) * 2 - 1
    visible, target = orders[:, :-1], orders[:, -1:]
    config = model.settings(ar_steps=1, head_steps=None if model.student else 3)
    found = script.draws(model, config, known, visible, target, labels, 7, 4)
    assert found.shape == (2, 4, dim)
    rows = [0, 0, 0, 0, 1, 1, 1, 1]

    class Noise(ImageNoise):
        """Initial noise of the target alone, in the place of a whole image's."""

        def randn(self, *shape: int) -> torch.Tensor:
            return super().randn(1, dim).expand(-1, length, -1) if shape == (length, dim) else super().randn(*shape)

    kept = (orders < length - 1)[rows]
    whole = model.draw_batch(config, labels[rows], Noise(7, list(range(8))), orders[rows], known[rows], kept)
    assert torch.allclose(whole[:, -1].view(2, 4, dim), found, atol=1e-5)


def test_run_and_page(script, models, monkeypatch, tmp_path, capsys):
    import results_page

    monkeypatch.setattr(results_page, "QUICK", tmp_path)
    script.main(["run", "digits", str(models), "--quick", "--scales", "1.5"])
    results = read_json(tmp_path / "token_distance_digits.json")
    names = ["teacher, 3 steps", "teacher, 2 steps", "student, 1 step"]
    assert [row["model"] for row in results["rows"]] == 3 * names
    assert [row["visible"] for row in results["rows"][::3]] == sorted({row["visible"] for row in results["rows"]})
    distances = {
        name: sum(row["distance"] for row in results["rows"] if row["model"] == name)
        for name in names
    }  # fmt: skip
    assert distances["teacher, 3 steps"] == min(distances.values())
    script.main(["page", "--quick"])
    page = (tmp_path / "results.md").read_text()
    script.main(["page", "--quick"])
    assert (tmp_path / "results.md").read_text() == page
    assert "| w | model | AR step 1 of 4 (0 of 16 visible) |" in page
    assert "| 1.5 | student, 1 step |" in page
    assert str(models) not in page


def test_the_page_is_of_the_committed_results(script, monkeypatch, tmp_path):
    import results_page

    text = results_page.places(False).page.read_text()
    page = tmp_path / "results.md"
    page.write_text(text)
    docs = results_page.places(False)
    monkeypatch.setattr(script, "places", lambda quick: results_page.Places(docs.results, page, tmp_path))
    script.main(["page"])
    assert page.read_text() == text
