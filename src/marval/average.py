"""One model from several of one start: the mean of their weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from marval.checkpoint import save_tensors
from marval.matching import AUXILIARY, TEACHER, read_scores
from marval.pipeline import Pipeline
from marval.run import check_empty, new_folder

FARTHEST = 0.5
"""Of a model from the mean, over the length of the mean: those that went on from one model are 0.01 from it, a teacher
and its student 0.1 from each other; of unrelated ones it would be 0.7 or more."""


def average(folders: Sequence[Path], out: Path) -> str:
    """Write the mean of models that were trained from the same weights, each in its own way or from its own seed (a
    "model soup", Wortsman et al. 2022, arXiv 2203.05482); returns one line about it.

    It is often better than each of them, as a longer average or a larger batch would be. Defaults of sampling and the
    autoencoder are those of the first. If all have a scores.safetensors of one teacher it has one too, so that `marval
    rl` and `marval distill --start` can go on from it.

    Raises:
        ValueError: fewer than two models, models of different kinds or starts, or ``out`` is not empty.
    """
    if len(folders) < 2:
        raise ValueError(f"give two models or more, got {len(folders)}")
    check_empty(out)
    models = [Pipeline.load(folder) for folder in folders]
    first = models[0]
    for folder, model in zip(folders, models, strict=True):
        for what, its, wanted in (
            ("sizes", model.network.config, first.network.config),
            ("classes", model.class_names, first.class_names),
            ("tokens", model.tokenizer, first.tokenizer),
            ("settings of a student", model.student, first.student),
        ):
            if its != wanted:
                raise ValueError(f"{folder} has other {what} than {folders[0]}: give models of one kind")
    states = [model.network.state_dict() for model in models]
    mean = _mean(states)
    for folder, state in zip(folders, states, strict=True):
        far = _length({name: x - mean[name] for name, x in state.items()}) / _length(mean)
        if not far < FARTHEST:
            raise ValueError(
                f"{folder} is {far:.2g} of its length away from the mean: only models that went on from the same one "
                "can be averaged"
            )
    scores, without = {}, [folder for folder in folders if not (folder / "scores.safetensors").exists()]
    about = f"without scores, as {without[0]} has none" if without else "with scores"
    if not without:
        parts = [read_scores(folder) for folder in folders]
        teacher = parts[0]["teacher"]
        others = [f for f, part in zip(folders, parts, strict=True) if not _equal(part["teacher"], teacher)]
        if others:
            raise ValueError(f"{others[0]} is a student of another teacher than {folders[0]}")
        scores = {f"{TEACHER}{name}": x for name, x in teacher.items()}
        scores |= {f"{AUXILIARY}{name}": x for name, x in _mean([part["auxiliary"] for part in parts]).items()}
    first.network.load_state_dict(mean)
    own = [model.provenance for model in models]
    kept = {name: own[0][name] for name in ("verb", "data", "data_licence", "teacher", "reward") if name in own[0]}
    shared = {name: value for name, value in kept.items() if all(other.get(name) == value for other in own)}
    first.provenance = shared | {"averaged": own}
    new_folder(out)
    first.save(out)
    if scores:
        save_tensors(out / "scores.safetensors", scores)
    return f"mean of {len(models)} models, {about} -> {out}"


def _mean(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """In double precision, so that what all share, as a frozen backbone, stays what it is to the bit."""
    return {name: torch.stack([state[name].double() for state in states]).mean(0).float() for name in states[0]}


def _length(state: Mapping[str, Tensor]) -> float:
    return sum(float(x.double().square().sum()) for x in state.values()) ** 0.5


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())
