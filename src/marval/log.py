"""Where the lines of metrics.jsonl and the sample grids also go, if the user asks: TensorBoard, or Weights & Biases."""

import importlib.util
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image


class Tracker(Protocol):
    """One run's."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Numbers after update ``step``."""
        ...

    def picture(self, step: int, file: Path) -> None:
        """A sample grid, a PNG file."""
        ...


class TensorBoard:
    """Event files in ``out/tensorboard``; `tensorboard --logdir` shows those of all runs below a folder.

    Args:
        start: updates that are done: what was logged after them, by a run that was killed, is not shown.
    """

    def __init__(self, out: Path, settings: dict[str, Any], start: int):
        from torch.utils.tensorboard import SummaryWriter  # pyright: ignore[reportPrivateImportUsage]

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1 if start else None)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, step: int, file: Path) -> None:
        with Image.open(file) as image:
            pixels = np.atleast_3d(np.asarray(image))
        self.writer.add_image("samples", pixels, step, dataformats="HWC")
        self.writer.flush()


class WandB:
    """A run of the project ``marval`` (or WANDB_PROJECT's), named as the folder; with WANDB_MODE=offline nothing leaves
    the machine. A run that is resumed goes on under the same id, which lies in ``out/wandb/id``."""

    def __init__(self, out: Path, settings: dict[str, Any], start: int):
        import wandb  # pyright: ignore[reportMissingImports]  # not among what tests need

        file = out / "wandb" / "id"
        file.parent.mkdir(exist_ok=True)  # else wandb takes another folder
        known = file.read_text() if start and file.exists() else None
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "marval"), name=out.name, dir=out, config=settings, id=known,
                resume="allow", reinit="finish_previous",
            )  # fmt: skip
        except wandb.Error as error:
            remedy = "log in with `wandb login`, or set WANDB_MODE=offline"
            raise ValueError(f"wandb does not start ({error}): {remedy}") from None
        file.write_text(self.run.id)
        self.image = wandb.Image

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step)

    def picture(self, step: int, file: Path) -> None:
        self.run.log({"samples": self.image(str(file))}, step)


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB}


def check_tracker(name: str) -> None:
    """Raises ValueError if the package of a tracker is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(f"--tracker {name} needs a package: pip install {name}")


def tracker_of(name: str, out: Path, settings: dict[str, Any], start: int) -> Tracker | None:
    """The tracker of a run in a folder, of which ``start`` updates are done; None for ``none``.

    Raises:
        ValueError: its service refuses us.
    """
    return None if name == "none" else TRACKERS[name](out, settings, start)
