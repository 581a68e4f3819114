"""Files: model folders (model.safetensors + config.json), the state of a run, and other people's checkpoints.

Everything is written under a temporary name, flushed to the disk and renamed: a file is whole or it is not there.
Everything is read strictly: a missing or unexpected tensor or a wrong shape is an error that names it.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write(temporary path)``, then fsync and rename to ``path``; as readable as any new file of the user."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (RuntimeError, SafetensorError) as error:  # how torch.save and safetensors report a full disk
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, values: Any) -> None:
    """Indented JSON, atomically."""
    write_atomically(path, lambda p: p.write_text(json.dumps(values, indent=1) + "\n"))


def read_json(path: Path) -> Any:
    """JSON, or a ValueError that names the file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: is {path.parent} a folder that marval wrote?") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], compressed: bool = False) -> None:
    """An .npz file, atomically."""
    save = np.savez_compressed if compressed else np.savez

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # given a path, numpy appends .npz to it
            save(file, **arrays)  # type: ignore[arg-type]

    write_atomically(path, write)


def sha256(path: Path) -> str:
    """Hexadecimal checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda p: save_file(contiguous, p))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ValueError: the file is missing, truncated or of another format.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: is {path.parent} a complete model folder?") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy or export it again") from None


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes of the tensors of a safetensors file, which is checked to be whole, without reading them.

    Raises:
        ValueError: the file is missing, truncated or of another format.
    """
    with _opened(path) as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Fill the module; every name and shape must fit.

    Raises:
        ValueError: names the first missing, unexpected or misshapen tensor, and ``source``.
    """
    expected = module.state_dict()
    if missing := sorted(set(expected) - set(tensors)):
        raise ValueError(f"{source}: tensor {missing[0]!r} is missing ({len(missing)} in all)")
    if unexpected := sorted(set(tensors) - set(expected)):
        raise ValueError(f"{source}: unexpected tensor {unexpected[0]!r} ({len(unexpected)} in all)")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)}, expected {list(expected[name].shape)}"
            raise ValueError(f"{source}: tensor {name!r} has shape {shapes}: config.json describes another model")
    module.load_state_dict(dict(tensors))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """The state of a run (nested dicts of tensors and plain values), atomically."""
    write_atomically(path, lambda p: torch.save(state, p))


def load_state(path: Path) -> dict[str, Any]:
    """State written by `save_state`; unpickles tensors and plain values only.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: there is nothing to resume; run without --resume") from None
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}): it is damaged or not marval's") from None


def read_pickle(path: Path, allowed: Sequence[type] = ()) -> Any:
    """What `torch.save` wrote: tensors, plain values, and objects of the ``allowed`` classes; nothing is executed.

    Raises:
        ValueError: the file is missing or damaged, or holds anything else, which the message names.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist" if not path.exists() else f"{path} is a folder: give the file in it")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many types
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"{path} cannot be read safely: it holds a {found.group(1)}, not only tensors") from None
        raise ValueError(f"{path} is no file of torch.save, or not a whole one: fetch it again") from None


def read_state_dict(path: Path, key: str | None = None, allowed: Sequence[type] = ()) -> tuple[dict[str, Tensor], Any]:
    """Tensors by name of a .safetensors file, or of entry ``key`` of a pickle (None: of the whole), and all of it.

    Raises:
        ValueError: as `load_tensors` and `read_pickle`; there is no such entry; it holds something else than tensors.
    """
    if path.suffix == ".safetensors":
        return load_tensors(path), None
    saved = read_pickle(path, allowed)
    found = saved if key is None else saved.get(key) if isinstance(saved, dict) else None
    if not isinstance(found, dict):
        has = ", ".join(map(str, list(saved)[:5])) if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(
            f"{path} has no state dict{'' if key is None else f' {key!r}'} (found: {has}): {_guess(saved)}"
        )
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: entry {name!r} is no tensor but {type(value).__name__}: {_guess(saved)}")
    return found, saved


def _guess(saved: Any) -> str:
    """What an unexpected file is."""
    inner = saved.get("model", saved) if isinstance(saved, dict) else ()
    return kind_of_checkpoint(inner if isinstance(inner, dict) else ()) or "it is another kind of file"


def kind_of_checkpoint(names: Container[str]) -> str:
    """What a state dict with these names is, and what imports it; empty if unknown."""
    signs = {
        "mask_token": "it is a MAR model, for marval import-mar",
        "encoder.down.0.block.0.norm1.weight": "it is an autoencoder in MAR's layout, for marval import-kl16",
        "encoder.down_blocks.0.resnets.0.norm1.weight": "it is a diffusers AutoencoderKL: its folder is a tokenizer",
        "encoder.layers.0.weight": "it is a diffusers AutoencoderTiny: its folder is a tokenizer",
        "1.conv.0.weight": "it is a TAESD encoder, for marval import-taesd",
        "3.conv.0.weight": "it is a TAESD decoder, for marval import-taesd",
    }
    return next((kind for name, kind in signs.items() if name in names), "")


def read_mar_checkpoint(path: Path, weights: str = "ema") -> tuple[dict[str, Tensor], argparse.Namespace | None]:
    """State dict of a published MAR checkpoint, with our names, and its training arguments.

    Only tensors and ``argparse.Namespace`` are unpickled; anything else in the file is refused.

    Args:
        path: checkpoint-last.pth; or a .safetensors file with one state dict, raw or averaged, and no arguments.
        weights: ``ema`` (what the authors evaluate) or ``raw``.

    Raises:
        ValueError: the file is no such checkpoint.
    """
    key = {"ema": "model_ema", "raw": "model"}[weights]
    tensors, saved = read_state_dict(path, key, [argparse.Namespace])
    return {name.replace("diffloss.net.", "head."): t.float() for name, t in tensors.items()}, (saved or {}).get("args")


def read_raw_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of model.safetensors, with the trained part as it is and not averaged, from the run's checkpoint.pt.

    Raises:
        ValueError: the folder is not that of a run with a checkpoint.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise ValueError(f"{folder} has no checkpoint.pt, so only averaged weights: the folder of a run has both")
    saved = read_pickle(path)
    part = saved.get("network", saved.get("student")) if isinstance(saved, dict) else None
    if part is None:
        raise ValueError(f"{path} is no checkpoint of marval train, distill or rl: it has no network or student")
    if any(name.endswith((".up", ".down")) for name in part):
        raise ValueError(f"{folder} is of a run that trained adapters, which are kept as averages alone: ask for ema")
    prefix = "" if "mask_token" in part else "head."  # the whole MAR, or its head on the teacher's backbone
    return load_tensors(folder / "model.safetensors") | {prefix + name: tensor for name, tensor in part.items()}
