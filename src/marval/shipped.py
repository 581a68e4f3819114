"""Models that come with marval, by names such as `fashion-mnist/student`."""

from pathlib import Path

FOLDER = Path(__file__).parent / "checkpoints"


def names() -> list[str]:
    """All of them, sorted."""
    return sorted(file.parent.relative_to(FOLDER).as_posix() for file in FOLDER.glob("*/*/config.json"))


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
