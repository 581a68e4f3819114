"""Models and classifiers that come with marval, by names such as `fashion-mnist/student`."""

from pathlib import Path

FOLDER = Path(__file__).parent / "checkpoints"
MODELS: tuple[str, ...] = ("teacher", "student", "aligned")
"""Folders of the models that the whole path makes, in the order in which each starts from the one before."""


def names() -> list[str]:
    """All models, by data set, teachers first."""
    folders = [file.parent for file in FOLDER.glob("*/*/config.json") if file.parent.name in MODELS]
    folders.sort(key=lambda folder: (folder.parent.name, MODELS.index(folder.name)))
    return [folder.relative_to(FOLDER).as_posix() for folder in folders]


def model_folder(path: str | Path) -> Path:
    """The folder as given if it exists, else that of the model of this name.

    Raises:
        ValueError: neither; names the models that there are.
    """
    path = Path(path)
    if path.is_dir():
        return path
    known = names()
    if path.as_posix() in known:
        return FOLDER / path
    problem = "is a file, not a folder" if path.exists() else "does not exist"
    shipped = f", or one of {', '.join(known)}" if known else ""
    raise ValueError(f"model {str(path)!r} {problem}: give a model's folder{shipped}")


def autoencoder_folder(model: Path) -> Path:
    """Where a model has its autoencoder, if any: below it, or beside it, for all models of a recipe that come along."""
    return (model.parent if model.resolve().is_relative_to(FOLDER.resolve()) else model) / "tokenizer"


def classifier_folder(path: str | Path) -> Path:
    """The path as given, or the folder of the classifier of this name, such as `fashion-mnist/judge`."""
    path = Path(path)
    return FOLDER / path if not path.exists() and (FOLDER / path / "config.json").is_file() else path
