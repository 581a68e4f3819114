"""Files: model folders (model.safetensors + config.json), the state of a run, and the import of MAR checkpoints.

Everything is written under a temporary name, flushed to the disk and renamed: a file is whole or it is not there.
Everything is read strictly: a missing or unexpected tensor or a wrong shape is an error that names it.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write(temporary path)``, then fsync and rename to ``path``."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
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


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda p: save_file(contiguous, p))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ValueError: the file is missing, truncated or of another format.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: is {path.parent} a complete model folder?") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy or export it again") from None


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
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: there is nothing to resume; run without --resume") from None
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}): it is damaged or not marval's") from None


def read_mar_checkpoint(path: Path, weights: str = "ema") -> tuple[dict[str, Tensor], argparse.Namespace | None]:
    """State dict of a published MAR checkpoint, with our names, and its training arguments.

    Only tensors and ``argparse.Namespace`` are unpickled; anything else in the file is refused.

    Args:
        weights: ``ema`` (what the authors evaluate) or ``raw``.

    Raises:
        ValueError: the file is no such checkpoint.
    """
    key = {"ema": "model_ema", "raw": "model"}[weights]
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception as error:
        reason = str(error).splitlines()[0][:160]
        raise ValueError(f"{path} is not a MAR checkpoint that can be read safely: {reason}") from None
    if not isinstance(saved, dict) or not isinstance(saved.get(key), dict):
        found = ", ".join(map(str, list(saved)[:5])) if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{path} has no {key!r} state dict (found: {found}): a MAR checkpoint-last.pth has")
    tensors = {}
    for name, value in saved[key].items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: entry {name!r} of {key!r} is not a tensor")
        tensors[name.replace("diffloss.net.", "head.")] = value.float()
    return tensors, saved.get("args")
