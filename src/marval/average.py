"""One model from several of one start: the mean of their weights."""

from collections.abc import Sequence
from pathlib import Path

import torch

from marval.checkpoint import save_tensors
from marval.matching import AUXILIARY, read_scores
from marval.pipeline import Pipeline
from marval.run import new_folder
from marval.tokenizers import tokenizer_to_dict

FARTHEST = 0.5
"""Of a model from the mean, over the length of the mean: those that went on from one model are 0.01 from it, a teacher
and its student 0.1 from each other; of unrelated ones it would be 0.7 or more."""


def average(folders: Sequence[Path], out: Path) -> str:
    """Write the mean of models that were trained from the same weights, each in its own way or from its own seed (a
    "model soup", Wortsman et al. 2022, arXiv 2203.05482); returns one line about it.

    It is often better than each of them, as a longer average or a larger batch would be. Defaults of sampling are those
    of the first. If all have a scores.safetensors of one teacher it has one too, so that `marval rl` and `marval
    distill --start` can go on from it.

    Raises:
        ValueError: fewer than two models, models of different kinds or starts, or ``out`` is not empty.
    """
    if len(folders) < 2:
        raise ValueError(f"give two models or more, got {len(folders)}")
    models = [Pipeline.load(folder) for folder in folders]
    first = models[0]
    for folder, model in zip(folders, models, strict=True):
        for what, its, wanted in (
            ("sizes", model.network.config, first.network.config),
            ("classes", model.class_names, first.class_names),
            ("tokens", tokenizer_to_dict(model.tokenizer), tokenizer_to_dict(first.tokenizer)),
            ("settings of a student", model.student, first.student),
        ):
            if its != wanted:
                raise ValueError(f"{folder} has other {what} than {folders[0]}: give models of one kind")
    states = [model.network.state_dict() for model in models]
    mean = _mean(states)
    whole = torch.cat([tensor.flatten() for tensor in mean.values()])
    for folder, state in zip(folders, states, strict=True):
        far = (torch.cat([state[name].flatten() for name in mean]) - whole).norm() / whole.norm()
        if not far < FARTHEST:
            raise ValueError(
                f"{folder} is {far:.2g} of its length away from the mean: only models that went on from the same one "
                "can be averaged"
            )
    first.network.load_state_dict(mean)
    first.provenance = first.provenance | {"averaged": [model.provenance for model in models]}
    files = [folder / "scores.safetensors" for folder in folders]
    scores = [read_scores(folder) for folder in folders] if all(file.exists() for file in files) else []
    same = bool(scores) and all(_equal(other["teacher"], scores[0]["teacher"]) for other in scores)
    new_folder(out)
    if same:
        auxiliary = _mean([one["auxiliary"] for one in scores])
        parts = {"teacher.": scores[0]["teacher"], AUXILIARY: auxiliary}
        save_tensors(out / "scores.safetensors", {p + name: x for p, part in parts.items() for name, x in part.items()})
    first.save(out)
    return f"mean of {len(models)} models, with{'' if same else 'out'} scores -> {out}"


def _mean(states: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())
