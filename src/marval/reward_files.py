"""What a reward is made of, read off its name: the parts of a sum, and whether the files that it needs are there."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from marval.checkpoint import read_json, tensor_shapes
from marval.hub import hub_file
from marval.models.blip import TEXT_CONFIG, TOKENIZER, WEIGHTS
from marval.models.quality import Brisque
from marval.shipped import classifier_folder
from marval.user_code import check_function

KNOWN = (
    "classifier, reads-class, pickscore:SOURCE, clip:SOURCE, hps:SOURCE, imagereward:SOURCE, aesthetic:CLIP:HEAD, "
    "brisque:FOLDER, path/to/file.py:function, verifiable:FILE.py:function, exact-match:FILE.py:function, or a sum "
    "such as '0.7*pickscore:SOURCE + 0.3*clip:SOURCE'"
)
"""Rewards by name, see `marval.rewards.load_reward`."""
HPS_WEIGHTS, HPS_CLIP = "HPS_v2.1_compressed.pt", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""What the hub has of HPSv2.1 (xswu/HPSv2), and a CLIP of its size, whose other files it takes."""
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_CLIP_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Each whole, or in parts that <name>.index.json lists."""
_CLIP_PROCESSORS = (("preprocessor_config.json",), ("processor_config.json",))
"""Of CLIPImageProcessor.save_pretrained, and of CLIPProcessor's since transformers 5."""
_CLIP_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def summands(spec: str) -> list[tuple[float, str]]:
    """Weights and rewards of a sum; none of another reward."""
    if not re.match(rf"\s*{_NUMBER}\s*\*", spec):
        return []
    parts = (part.split("*", 1) for part in re.split(rf"\s\+\s+(?={_NUMBER}\s*\*)", spec))
    return [(float(weight), part.strip()) for weight, part in parts]


def parts_of(spec: str) -> list[str]:
    """The rewards of a sum; of another reward, itself."""
    return [part for _, part in summands(spec)] or [spec]


def short_name(spec: str) -> str:
    """pickscore:yuvalkirstain/PickScore_v1 -> pickscore, rewards.py:ink -> ink, 1*classifier + 2*clip:x -> classifier +
    clip."""
    return " + ".join(part.rpartition(":")[2] if ".py:" in part else part.partition(":")[0] for part in parts_of(spec))


def listed(specs: str) -> list[str]:
    """Rewards that stand comma-separated."""
    return [spec for part in specs.split(",") if (spec := part.strip())]


def code_files(spec: str) -> list[Path]:
    """The Python files that a reward is made of."""
    functions = (part.removeprefix("verifiable:").removeprefix("exact-match:") for part in parts_of(spec))
    return [Path(function.rpartition(":")[0]) for function in functions if ".py:" in function]


def code_of(specs: Sequence[str]) -> dict[str, Path]:
    """Their Python files, by a name for each: "code of FILE", with folders where two have one name."""
    files = list(dict.fromkeys(file for spec in specs for file in code_files(spec)))
    names = [file.name for file in files]
    return {f"code of {file.name if names.count(file.name) == 1 else file}": file for file in files}


def check_files(spec: str, classifier: str) -> None:
    """Look for what a reward is made of, in seconds, before any large file is read.

    Args:
        classifier: of the rewards ``classifier`` and ``reads-class``.

    Raises:
        ValueError: an unknown reward, a file that is missing or cut, a hub name that cannot be reached; names the
            reward, or the part of a sum, and the file.
    """
    for part in parts_of(spec):
        try:
            _check_one(part, classifier)
        except ValueError as error:
            raise ValueError(str(error) if repr(part) in str(error) else f"reward {part!r}: {error}") from None


def _check_one(spec: str, classifier: str) -> None:
    kind, _, source = spec.partition(":")
    checks: dict[str, Callable[[], object]] = {
        "clip": lambda: _check_clip(source),
        "pickscore": lambda: _check_clip(source),
        "hps": lambda: _check_clip(source, HPS_CLIP),
        "imagereward": lambda: _check_imagereward(source),
        "aesthetic": lambda: _check_aesthetic(source),
        "brisque": lambda: Brisque.load(Path(source)),
        "verifiable": lambda: check_function(source, "reward"),
        "exact-match": lambda: check_function(source, "reward"),
    }
    if kind in checks:
        if not source:
            form = next(form for form in KNOWN.split(", ") if form.startswith(f"{kind}:"))
            raise ValueError(f"reward {spec!r} needs a model: give {form}")
        checks[kind]()
    elif spec in ("classifier", "reads-class"):
        if not classifier:
            raise ValueError(f"reward {spec!r} needs a classifier's folder: make one with marval train-classifier")
        check_classifier(classifier)
    elif ":" not in spec:
        raise ValueError(f"unknown reward {spec!r}: choose {KNOWN}")
    else:
        check_function(spec, "reward")


def _check_exists(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"{file} does not exist" if not file.exists() else f"{file} is a folder: give the file in it")


def check_classifier(source: str) -> None:
    """The files of `marval.reward_models.load_classifier`, or ValueError."""
    if Path(source).suffix in (".th", ".npz"):
        _check_exists(Path(source))
        return
    folder = classifier_folder(source)
    read_json(folder / "config.json")
    tensor_shapes(folder / "model.safetensors")


def _check_clip(source: str, rest: str = "") -> None:
    """A folder of `Clip.load`, a file of open_clip's weights in one, or a hub name, where all but the weights may be
    those of ``rest``."""
    path = Path(source)
    if not path.exists():
        _check_name(source, "xswu/HPSv2" if rest else "openai/clip-vit-large-patch14")
        hub_file(rest or source, "config.json")
        return
    folder = path.parent if path.is_file() else path
    for choices in (("config.json",),), _CLIP_PROCESSORS, _CLIP_TOKENIZERS:
        if not any(all((folder / name).is_file() for name in names) for names in choices):
            raise ValueError(f"{folder} holds no whole CLIP: {choices[0][0]} is missing")
    if path.is_file():
        return
    for name in _CLIP_WEIGHTS:
        parts = [name]
        if (index := folder / f"{name}.index.json").is_file():
            parts = sorted(set(read_json(index).get("weight_map", {}).values()))
        elif not (folder / name).is_file():
            continue
        for part in parts:
            if not (folder / part).is_file():
                raise ValueError(f"{folder} holds no whole CLIP: {part} is missing")
            if part.endswith(".safetensors"):
                tensor_shapes(folder / part)
        return
    raise ValueError(f"{folder} holds no whole CLIP: {_CLIP_WEIGHTS[0]} is missing")


def _check_aesthetic(source: str) -> None:
    name, _, file = source.rpartition(":")
    if not name or not file:
        raise ValueError(f"reward 'aesthetic:{source}' needs a CLIP and a head: give aesthetic:CLIP:HEAD.pth")
    _check_clip(name)
    head_file(file)


def head_file(source: str) -> Path:
    """A file of an aesthetic head by its path, or by OWNER/NAME/FILE of the hub, or ValueError."""
    if not (path := Path(source)).exists() and source.count("/") == 2 and not source.startswith((".", "/")):
        owner, name, file = source.split("/")
        return hub_file(f"{owner}/{name}", file)
    _check_exists(path)
    return path


def _check_imagereward(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir():
        _check_name(source, "THUDM/ImageReward")
        hub_file(source, TEXT_CONFIG)
        return
    for name in (WEIGHTS, TEXT_CONFIG):
        _check_exists(folder / name)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise ValueError(f"{folder} has no tokenizer: copy tokenizer.json of {TOKENIZER} into it")


def _check_name(source: str, example: str) -> None:
    """Of a model of the hub; what is named like a file must be one."""
    if source.endswith((".pt", ".safetensors")):
        _check_exists(Path(source))
    if source.count("/") != 1 or source.startswith((".", "/")):
        raise ValueError(f"{source!r} is neither a folder nor a hub name such as {example}")
