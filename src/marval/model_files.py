"""The files of a model's folder: config.json and model.safetensors, and an autoencoder in tokenizer/ if it has one."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from marval.checkpoint import load_strictly, load_tensors, read_json, read_raw_weights, save_tensors, write_json
from marval.config import MARConfig, SamplingConfig, StudentConfig, check, from_dict, to_dict
from marval.models.autoencoders import CONFIG, link_autoencoder
from marval.models.mar import MAR
from marval.shipped import autoencoder_folder
from marval.tokenizers import LatentTokenizer, Tokenizer, tokenizer_from_dict, tokenizer_to_dict

FORMAT = 1


class Model(NamedTuple):
    """What a folder holds, in the order of the arguments of `marval.pipeline.Pipeline`."""

    network: MAR
    tokenizer: Tokenizer
    class_names: list[str]
    sampling: SamplingConfig
    student: StudentConfig | None
    provenance: dict[str, Any]


def read_config(folder: Path) -> tuple[MARConfig, StudentConfig | None, dict[str, Any]]:
    """Sizes of the network of a model's folder, how it is evaluated if it is a student, and the whole config.json.

    Raises:
        ValueError: there is no config.json of marval; names the file.
    """
    file = folder / "config.json"
    config = read_json(file)
    if not isinstance(config, dict) or config.get("format") != FORMAT or "model" not in config:
        raise ValueError(f"{file} does not describe a marval model (format {FORMAT})")
    try:
        student = None if config["student"] is None else from_dict(StudentConfig, config["student"])
        return from_dict(MARConfig, config["model"]), student, config
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from None


def read_model(folder: Path, weights: Literal["ema", "raw"], dtype: Literal["float32", "bf16"]) -> Model:
    """The model of a folder, on the CPU; for the arguments see `marval.pipeline.Pipeline.load`.

    Raises:
        ValueError: something is missing, damaged or does not fit; names the file and the tensor.
    """
    check(weights in ("ema", "raw"), f"unknown weights {weights!r}: choose ema or raw")
    check(dtype in ("float32", "bf16"), f"unknown dtype {dtype!r}: choose float32 or bf16")
    sizes, student, config = read_config(folder)
    try:
        with torch.device("meta"):  # the weights follow: none are drawn
            network = MAR(sizes, bool(student and student.guidance_range))
        codec = autoencoder_folder(folder)
        tokenizer = tokenizer_from_dict(config["tokenizer"], codec if (codec / CONFIG).exists() else None)
        sampling = from_dict(SamplingConfig, config["sampling"])
        names = config["class_names"]
        check(
            (tokenizer.grid, tokenizer.token_dim) == (sizes.grid, sizes.token_dim),
            f"the tokenizer makes {tokenizer.grid}x{tokenizer.grid} tokens of {tokenizer.token_dim}, "
            f"the model takes {sizes.grid}x{sizes.grid} of {sizes.token_dim}",
        )
        check(len(names) == sizes.num_classes, f"{len(names)} class names for {sizes.num_classes} classes")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    file, provenance = folder / "model.safetensors", config.get("provenance") or {}
    if weights == "ema":
        tensors = load_tensors(file)
    else:
        tensors, file, provenance = read_raw_weights(folder), folder / "checkpoint.pt", provenance | {"weights": "raw"}
    load_strictly(network.to_empty(device="cpu"), tensors, str(file))
    if dtype == "bf16":
        network.to_bf16()
    return Model(network, tokenizer, names, sampling, student, provenance)


def write_model(folder: Path, model: Model, half: bool) -> None:
    """Write ``config.json`` and ``model.safetensors`` (float16 if ``half``), and link the autoencoder's files."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model.tokenizer, LatentTokenizer) and model.tokenizer.folder is not None:
        link_autoencoder(model.tokenizer.folder, folder / "tokenizer")
    tensors = model.network.state_dict()
    save_tensors(folder / "model.safetensors", {name: x.half() if half else x for name, x in tensors.items()})
    config = {
        "format": FORMAT,
        "model": to_dict(model.network.config),
        "student": None if model.student is None else to_dict(model.student),
        "tokenizer": tokenizer_to_dict(model.tokenizer),
        "sampling": to_dict(model.sampling),
        "class_names": model.class_names,
        "provenance": model.provenance,
    }
    write_json(folder / "config.json", config)
