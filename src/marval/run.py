"""The folder of a run: never overwritten, logged line by line, saved whole, resumed exactly.

config.json, model.safetensors   the averaged model so far, loadable at any time
checkpoint.pt                    networks, averages, optimizers, step: everything to go on
meta.json                        what ran: verb, settings, step, versions
metrics.jsonl                    one JSON object per line; a tracker gets them too, if one is asked for (marval.log)
samples/step-000500.png          sample grids
best/                            the best model, where quality is measured (marval.curve)
"""

import contextlib
import copy
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from marval import __version__
from marval.batches import prefetch
from marval.checkpoint import load_state, read_json, save_state, sha256, write_atomically, write_json
from marval.config import RunConfig, filled, to_dict
from marval.data import ImageDataset
from marval.distributed import World, restore, whole_state
from marval.images import LazyImages, save_png
from marval.latents import LatentDataset
from marval.log import Tracker, check_tracker, tracker_of
from marval.shipped import classifier_folder

Read = TypeVar("Read")
FREE = ("device", "shard", "accumulate", "activation_checkpointing", "compile", "graphs", "tracker")
"""Settings that say how a run computes, not what: they may change on resume, as may the number of processes."""


def digest_of(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of a file, or of the weights of a model folder.

    Args:
        path: or the name of a classifier that comes with marval.
    """
    path = classifier_folder(path)
    return sha256(path if path.is_file() else path / "model.safetensors")[:16]


class Stateful(Protocol):
    """Anything with a state that a run saves: modules, optimizers, averages."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


def versions(device: torch.device) -> dict[str, Any]:
    """Versions of marval, PyTorch and Python, platform, threads and device, to be kept beside what was measured."""
    return {
        "marval": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def writable_folder(path: Path) -> Path:
    """Create the folder and prove that it takes files.

    Raises:
        ValueError: it cannot be written, or its disk is full.
    """
    probe = path / ".write-test"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(1 << 16))
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink()
            path.rmdir()
        raise ValueError(f"cannot write into {path}: {error.strerror}; choose another --out") from None
    return path


def check_empty(path: Path) -> None:
    """Raises ValueError if the folder holds anything."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty: choose another --out")


def new_folder(path: Path) -> Path:
    """Create a folder that must not hold anything yet.

    Raises:
        ValueError: it is not empty, or cannot be written.
    """
    check_empty(path)
    return writable_folder(path)


def check_folder(
    out: Path, verb: str, config: RunConfig, resume: bool, inputs: dict[str, Path] | None = None
) -> dict[str, Any]:
    """Check that ``out`` can hold this run, new or resumed with the same settings; returns the settings for meta.json.

    Writes nothing.

    Raises:
        ValueError: see `Run`.
    """
    check_tracker(config.tracker)
    settings = json.loads(json.dumps(to_dict(config)))
    for name, path in (inputs or {}).items():
        settings[name] = f"sha256 {digest_of(path)}"
    if resume and (out / "meta.json").exists():
        before = read_json(out / "meta.json")
        before["config"] = filled(before["config"], json.loads(json.dumps(to_dict(type(config)()))))
        if before["verb"] != verb:
            raise ValueError(f"{out} holds a run of `marval {before['verb']}`, not of `marval {verb}`")
        for name in settings | before["config"]:
            if name not in FREE and settings.get(name) != before["config"].get(name):
                values = f"{before['config'].get(name)!r}, not {settings.get(name)!r}"
                raise ValueError(f"{out} was started with {name} = {values}: resume with the same settings")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        if (out / "meta.json").exists():
            raise ValueError(f"{out} already holds a run: add --resume to go on, or choose another --out")
        raise ValueError(f"{out} is not empty and not a run of marval: choose another --out")
    return settings


class Run:
    """One run in one folder.

    Args:
        verb: train, distill or rl.
        inputs: model folders and files that the run starts from, by the name of their flag: a resume must find the
            same weights or code, wherever they lie.

    Raises:
        ValueError: the folder holds another run, or a run and ``resume`` was not asked for; or it is not writable.
    """

    def __init__(
        self, out: Path, verb: str, config: RunConfig, resume: bool, world: World, inputs: dict[str, Path] | None = None
    ):
        self.out, self.config, self.world, self.verb = out, config, world, verb
        self.metrics_file = out / "metrics.jsonl"
        self.tracker: Tracker | None = None
        self.settings = check_folder(out, verb, config, resume, inputs)
        world.barrier()  # every process has looked at the folder before one writes into it
        if world.is_main:
            writable_folder(out)
            if not (out / "meta.json").exists():
                self._write_meta(0)
        world.barrier()

    def _write_meta(self, step: int) -> None:
        meta = {"verb": self.verb, "step": step, "config": self.settings, "versions": versions(self.world.device)}
        write_json(self.out / "meta.json", {**meta, "saved": time.strftime("%Y-%m-%d %H:%M:%S")})

    def restore(self, stateful: dict[str, Stateful], extra: dict[str, Any]) -> int:
        """Load the last checkpoint, if there is one, into the objects and into ``extra``; returns the next step."""
        self.stateful, self.extra = stateful, extra
        step = -1
        if (self.out / "checkpoint.pt").exists():
            state = load_state(self.out / "checkpoint.pt")
            for name, target in stateful.items():
                if isinstance(target, nn.Module) and state[name].keys() != target.state_dict().keys():
                    what = f"the weights of its {name} have other names than this version's"
                    raise ValueError(f"{self.out / 'checkpoint.pt'}: {what}: go on with the version that wrote it")
                restore(target, state[name])
            extra.update(copy.deepcopy(state["extra"]))  # else views of a file that the next checkpoint replaces
            step = state["step"]
        steps = self.world.gather_rows(torch.tensor([step], device=self.world.device))
        if (steps != step).any():
            raise ValueError(f"{self.out} is not one folder for all processes: put --out where all machines see it")
        if self.world.is_main and self.metrics_file.exists():  # drop what was logged after the checkpoint
            lines = self.metrics_file.read_text().splitlines(True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            if kept != lines:
                write_atomically(self.metrics_file, lambda path: path.write_text("".join(kept)))
        if self.world.is_main:
            self.tracker = tracker_of(self.config.tracker, self.out, self.settings, max(step, 0))
        return max(step, 0)

    def save(self, step: int) -> None:
        """Write the checkpoint atomically. ``step`` updates are done."""
        state = {}
        if self.world.gathers:
            state = {
                name: whole_state(source.state_dict(), self.world.is_main) for name, source in self.stateful.items()
            }
        if self.world.is_main:
            save_state(self.out / "checkpoint.pt", {**state, "extra": self.extra, "step": step})
            self._write_meta(step)

    def log(self, step: int, **values: float | Tensor) -> dict[str, float]:
        """Append one line to metrics.jsonl, and tell the tracker; returns the values as floats."""
        row = {name: float(value) for name, value in values.items()}
        if self.world.is_main:
            with open(self.metrics_file, "a") as file:
                file.write(json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in row.items()}}) + "\n")
        if self.tracker is not None:
            self.tracker.log(step, row)
        return row

    def show(self, step: int, grid: np.ndarray) -> None:
        """Save a sample grid, uint8 HWC, as samples/step-*.png, and show it to the tracker."""
        file = self.out / "samples" / f"step-{step:06d}.png"
        file.parent.mkdir(exist_ok=True)
        save_png(file, grid)
        if self.tracker is not None:
            self.tracker.picture(step, file)

    def is_due(self, every: int, step: int) -> bool:
        """Whether what happens after every ``every`` updates happens after update ``step``, counted from 1.

        At 0 it never does, else also at the end of the run.
        """
        return every > 0 and (step % every == 0 or step == self.config.steps)

    def read_ahead(
        self, read: Callable[[int], Read], start: int, data: ImageDataset | LatentDataset, every: int = 1
    ) -> Iterator[Read]:
        """Iterate over ``read(step)`` of the remaining updates, or of one in ``every``.

        Where the data come from files, the next one is read in the background.
        """
        steps = range(start, self.config.steps, every)
        on_disk = isinstance(data, LatentDataset) or isinstance(data.images, LazyImages)
        return prefetch(read, steps) if on_disk else map(read, steps)

    def progress(self, start: int) -> "Progress":
        """The remaining updates, counted from 0, to iterate over with a progress bar."""
        return Progress(self.verb, start, self.config.steps, self.world.is_main)


class Progress:
    """Progress bar with ETA and the latest losses; quiet where stderr is no terminal, but for a line now and then."""

    def __init__(self, title: str, start: int, total: int, visible: bool):
        self.start, self.total = start, total
        interactive = sys.stderr.isatty()
        self.bar = tqdm(
            total=total, initial=start, desc=f"{title:<8}", disable=not visible, dynamic_ncols=True,
            mininterval=0.2 if interactive else 20, bar_format="{l_bar}{bar:24}{r_bar}",
        )  # fmt: skip

    def __iter__(self) -> Iterator[int]:
        try:
            for step in range(self.start, self.total):
                yield step
                self.bar.update()
        finally:
            self.bar.close()

    def stop(self, why: str) -> None:
        """Close the bar before the end, and say why on stderr."""
        visible = not self.bar.disable
        self.bar.close()
        if visible:
            tqdm.write(why, file=sys.stderr)

    def show(self, values: dict[str, float]) -> None:
        """Show losses beside the bar."""
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
