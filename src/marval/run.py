"""The folder of a run: never overwritten, logged line by line, saved whole, resumed exactly.

config.json, model.safetensors   the averaged model so far, loadable at any time
checkpoint.pt                    networks, averages, optimizers, step: everything to go on
meta.json                        what ran: verb, settings, step, versions
metrics.jsonl                    one JSON object per line
samples/step-000500.png          sample grids
best/                            the best model, where quality is measured (marval.curve)
"""

import contextlib
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from marval import __version__
from marval.checkpoint import load_state, read_json, save_state, write_json
from marval.config import CurveConfig, RunConfig, filled, to_dict
from marval.data import ImageDataset, LazyImages, prefetch
from marval.distributed import World, restore, whole, whole_state
from marval.graphs import Call, Graphs, plainly
from marval.latents import LatentDataset
from marval.models.cpu import use_onednn
from marval.models.mar import MAR
from marval.shipped import classifier_folder

Rest = TypeVar("Rest")
Read = TypeVar("Read")
FREE = ("device", "shard", "accumulate", "activation_checkpointing", "compile", "graphs")
"""Settings that say how a run computes, not what: they may change on resume, as may the number of processes."""


def digest_of(path: Path) -> str:
    """Start of the SHA-256 of a file, or of the weights in a folder or of a classifier that comes with marval."""
    path = classifier_folder(path)
    with open(path if path.is_file() else path / "model.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


class Stateful(Protocol):
    """What a run saves: modules, optimizers, averages."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


def versions(device: torch.device) -> dict[str, Any]:
    """What a number was measured with."""
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


def new_folder(path: Path) -> Path:
    """Create a folder that must not hold anything yet.

    Raises:
        ValueError: it is not empty, or cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty: choose another --out")
    return writable_folder(path)


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
        settings = json.loads(json.dumps(to_dict(config)))
        for name, folder in (inputs or {}).items():
            settings[name] = f"sha256 {digest_of(folder)}"
        self.settings = settings
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
            extra.update(state["extra"])
            step = state["step"]
        steps = self.world.gather_rows(torch.tensor([step], device=self.world.device))
        if (steps != step).any():
            raise ValueError(f"{self.out} is not one folder for all processes: put --out where all machines see it")
        if self.world.is_main and self.metrics_file.exists():  # drop what was logged after the checkpoint
            lines = [line for line in self.metrics_file.read_text().splitlines(True) if line.endswith("\n")]
            self.metrics_file.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
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
        """Append one line to metrics.jsonl."""
        row = {name: float(value) for name, value in values.items()}
        if self.world.is_main:
            with open(self.metrics_file, "a") as file:
                file.write(json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in row.items()}}) + "\n")
        return row

    def is_due(self, every: int, step: int) -> bool:
        """Whether something that happens every so many updates happens after update ``step``; always at the end."""
        return every > 0 and (step % every == 0 or step == self.config.steps)

    def read_ahead(
        self, read: Callable[[int], Read], start: int, data: ImageDataset | LatentDataset, every: int = 1
    ) -> Iterator[Read]:
        """``read(step)`` of each remaining update, or of one in so many; one ahead, in the background, where data come
        from files."""
        steps = range(start, self.config.steps, every)
        on_disk = isinstance(data, LatentDataset) or isinstance(data.images, LazyImages)
        return prefetch(read, steps) if on_disk else map(read, steps)

    def progress(self, start: int) -> "Progress":
        """Iterate over the remaining updates with a progress bar."""
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
        """Close the bar early, saying why."""
        visible = not self.bar.disable
        self.bar.close()
        if visible:
            tqdm.write(why, file=sys.stderr)

    def show(self, values: dict[str, float]) -> None:
        """Losses to show beside the bar."""
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)


def is_bf16(precision: str, device: torch.device) -> bool:
    """What ``auto`` means: bf16 on CUDA, float32 on the CPU."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """The run's precision: bfloat16 matrix products, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=is_bf16(config.precision, device))


def prepare(network: MAR, config: RunConfig) -> None:
    """Switch on a network, before it is sharded, what the run asks for: activation checkpointing, compiled blocks.

    On the CPU, blocks that are not compiled multiply by oneDNN (`marval.models.cpu`).
    """
    network.activation_checkpointing = config.activation_checkpointing
    if config.compile:
        network.compile_blocks()
    elif network.fake_latent.device.type == "cpu":
        use_onednn(network)


def caller(config: CurveConfig, world: World) -> Call:
    """How an update's functions are called: plainly, or as the run asks for, from CUDA graphs.

    Raises:
        ValueError: graphs without CUDA, or on several processes.
    """
    if not config.graphs:
        return plainly
    if world.device.type != "cuda":
        raise ValueError(f"graphs need a CUDA device, but this run is on {world.device}: leave --graphs out")
    if world.size > 1:
        raise ValueError(f"graphs are for one process, not for {world.size}: leave --graphs out")
    return Graphs(world.device)


def add_weighted(sums: dict[str, Tensor], weight: float, values: dict[str, Tensor]) -> None:
    """Add weight times each value to the sum of its name."""
    for name, value in values.items():
        sums[name] = sums.get(name, torch.zeros_like(value.detach(), dtype=torch.float32)) + weight * value.detach()


def warmup_then_cosine(step: int, steps: int, warmup: int, decay: bool) -> float:
    """Factor of the learning rate: linear warm-up, then constant or cosine to zero at the last update."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) if decay else 1.0


class _Evaluate(nn.Module):
    """Holds a network and evaluates any function of it, so that DistributedDataParallel sees the forward pass."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


class Update:
    """One network's optimizer step from the gradients of its own parameters, averaged over the processes, checked and
    clipped. A loss may pass through other networks: they are left without gradients."""

    def __init__(
        self, name: str, module: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, world: World,
        call: Call = plainly,
    ):  # fmt: skip
        self.name, self.module, self.optimizer, self.call = name, module, optimizer, call
        self.parameters = list(module.parameters())
        self.config, self.world = config, world
        self.base_lr = [group["lr"] for group in optimizer.param_groups]
        assert call is plainly or optimizer.defaults.get("fused"), "others do not read found_inf"
        self.unchecked: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self.evaluate: nn.Module = _Evaluate(module)
        if world.size > 1 and not world.sharded:
            self.evaluate = DistributedDataParallel(self.evaluate, gradient_as_bucket_view=True)
        self.loss: Tensor | None = None

    def backward(
        self, function: Callable[..., tuple[Tensor, Rest]], *args: Any, weight: float = 1.0, last: bool = True
    ) -> tuple[Tensor, Rest]:
        """Call ``function(*args)``, which returns a loss and anything else, and add up weight times its gradient.

        The function is called in the run's precision.

        Args:
            last: no other call follows before `step`: the processes exchange their sums.

        Returns:
            What the function returned, the loss detached.

        Raises:
            FloatingPointError: as `check`, of the last update.
        """
        first = self.loss is None
        if first:
            self.check()
            self.loss = torch.zeros((), device=self.world.device)

        def both_ways(*args: Any) -> tuple[Tensor, Rest]:
            if first:  # sharded networks get gradients from the losses of others
                self.zero_grad()
            with autocast(self.config, self.world.device):
                loss, rest = self.evaluate(function, *args)
            (weight * loss).backward(inputs=None if self.world.sharded else self.parameters)
            return loss.detach(), rest

        distributed = isinstance(self.evaluate, DistributedDataParallel)
        with contextlib.nullcontext() if last or not distributed else self.evaluate.no_sync():  # type: ignore[operator]
            loss, rest = self.call((self.name, function, weight, first), both_ways, *args)
        assert self.loss is not None
        self.loss += weight * loss
        return loss, rest

    def zero_grad(self) -> None:
        """No gradients; or zeros, where graphs know their addresses."""
        if self.call is plainly:
            self.optimizer.zero_grad()
            return
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.zero_grad(set_to_none=False)

    def step(self, step: int, lr_factor: float = 1.0) -> Tensor:
        """Step the optimizer in update ``step``, counted from 0; returns the gradient's norm before clipping.

        With graphs nothing is waited for: a gradient that is not finite changes no weight, and the next `check` finds
        it.

        Raises:
            FloatingPointError: without graphs, as `check`.
        """
        assert self.loss is not None
        norm = self.call((self.name, "norm"), self._norm)
        good = torch.isfinite(norm + self.loss)
        if self.call is plainly:
            all_good = self.world.means({"good": good})["good"]  # all processes raise, or none
            self.unchecked = step, torch.tensor(all_good), None
            self.check()
        else:
            self.optimizer.found_inf = (~good).float()  # type: ignore[attr-defined] # read by fused optimizers
            event = torch.cuda.Event() if good.is_cuda else None
            self.unchecked = step, good.to("cpu", non_blocking=True), event
            if event is not None:
                event.record()
        clipping = norm.nan_to_num(nan=math.inf)  # by NaN all would be NaN, and `check` could not tell which was
        nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_grad, clipping)
        for group, lr in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = lr * lr_factor
        self.optimizer.step()
        if self.call is plainly:
            self.zero_grad()
        self.loss = None
        return norm

    def _norm(self) -> Tensor:
        return whole(nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))

    def check(self) -> None:
        """Raises FloatingPointError if loss or gradient of the last update were not finite; names the update, the
        network and the tensor."""
        if self.unchecked is None:
            return
        step, good, event = self.unchecked
        self.unchecked = None
        if event is not None:
            event.synchronize()
        if good < 1:
            gradients = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
            bad = [
                f"gradient of {name}" for name, gradient in gradients.items() if not whole(gradient).isfinite().all()
            ]
            what = (bad or ["loss"])[0]
            raise FloatingPointError(f"step {step + 1}: the {what} of the {self.name} is not finite")
