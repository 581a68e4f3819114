"""ImageNet's 1,000 classes: WordNet ids and English names, in the order of the class index of every public model."""

import functools
from collections.abc import Sequence
from importlib import resources


@functools.cache
def _classes() -> tuple[tuple[str, str], ...]:
    lines = resources.files("marval").joinpath("assets/imagenet_classes.txt").read_text("ascii").splitlines()
    return tuple((line[:9], line[10:]) for line in lines)


def classes() -> list[tuple[str, str]]:
    """(WordNet id, name) of every class; sources and licence are in assets/imagenet_classes_LICENSE.txt."""
    return list(_classes())


def names() -> list[str]:
    """The 1,000 names, all different, such as "goldfish"."""
    return [name for _, name in _classes()]


def index_of_wnid() -> dict[str, int]:
    """Class index of each WordNet id, such as "n01443537" -> 1; the ids ascend."""
    return {wnid: index for index, (wnid, _) in enumerate(_classes())}


def class_indices(known: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Index of each wanted class among the known ones; None if one is missing.

    Classes are found by name; ImageNet's 1,000 also by WordNet id.
    """
    index = {name: i for i, name in enumerate(known)}
    if list(known) == names():
        index = index_of_wnid() | index
    return [index[name] for name in wanted] if all(name in index for name in wanted) else None


def __getattr__(attribute: str) -> list[tuple[str, str]]:
    """``CLASSES``: `classes()`, read when first asked for."""
    if attribute == "CLASSES":
        return classes()
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
