"""Tiny models that several test files share: trained once, on first use; and the command line inside this process."""

import atexit
import functools
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

from marval.__main__ import main
from marval.config import DistillConfig, GSIMConfig, MARConfig, SamplingConfig, StudentConfig, TrainConfig
from marval.data import load_dataset
from marval.distill import distill
from marval.train import train
from marval.train_classifier import train_classifier

MODEL = MARConfig(width=32, depth=1, heads=2, buffer_size=2, head_width=32, head_depth=1)
SAMPLING = SamplingConfig(ar_steps=4, head_steps=10, solver="ddim")
LEAVE = """
import os
from marval.distributed import disconnect
disconnect()
sys.stdout.flush()
os._exit(0)
"""
"""Last lines of a script that torchrun runs in several processes; it has imported sys."""
_root = tempfile.TemporaryDirectory(prefix="marval-tests-")
atexit.register(_root.cleanup)


def folder(name: str) -> Path:
    """A place under the folder of this session, which its end removes."""
    return Path(_root.name) / name


@functools.cache
def teacher() -> Path:
    """Folder of a tiny teacher of the digits."""
    config = TrainConfig(
        steps=300, batch=32, head_batch_mul=2, lr=4e-3, warmup=20, sample_every=0, ema=0.98, model=MODEL,
        sampling=SAMPLING,
    )  # fmt: skip
    train(config, folder("teacher"))
    return folder("teacher")


@functools.cache
def student() -> Path:
    """Folder of its head-only one-step student."""
    config = DistillConfig(
        trained="head", steps=200, batch=32, ar_steps=4, warmup=5, sample_every=0, ema=0.95,
        student=StudentConfig(guidance=1.5), gsim=GSIMConfig(lr=1e-3, auxiliary_lr=2e-3),
    )  # fmt: skip
    distill(config, teacher(), folder("student"))
    return folder("student")


@functools.cache
def student_of_two() -> Path:
    """Folder of the same student, said to have two evaluations: its weights serve any."""
    shutil.copytree(student(), folder("two"))
    config = json.loads((folder("two") / "config.json").read_text())
    config["student"]["evaluations"] = 2
    (folder("two") / "config.json").write_text(json.dumps(config))
    return folder("two")


@functools.cache
def classifier() -> Path:
    """Folder of a small digit classifier, beside the models, where `marval evaluate` looks for it."""
    data, held_out = load_dataset("digits"), load_dataset("digits", "test")
    train_classifier(data, held_out, epochs=2, width=8, progress=False)[0].save(folder("classifier"))
    return folder("classifier")


def study(folder: Path) -> Path:
    """The folder, with teacher, student, classifier and a judge of the other kind, as the benchmarks take it."""
    for name, source in (("teacher", teacher()), ("student", student()), ("classifier", classifier())):
        (folder / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copy(source / file, folder / name)
    data = load_dataset("digits"), load_dataset("digits", "test")
    train_classifier(*data, arch="resnet", seed=1, epochs=1, width=8, progress=False)[0].save(folder / "judge")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line on stderr with which the command line refuses these arguments: exit code 2, no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert err.count("\n") == 1, err
    assert err.startswith("marval "), err
    return err


def environment() -> dict[str, str]:
    """For subprocesses: as many threads as here, so that sums are the same to the bit."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def start(args: Sequence[object], module: str = "marval", **options: object) -> subprocess.Popen[str]:
    """`python -m module args` with its output captured."""
    command = [sys.executable, "-m", module, *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{"env": environment(), **pipes, **options})  # type: ignore[call-overload]


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 60) -> None:
    """Until the process has made a file that is not empty; fails if it ends without, or takes too long."""
    end = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"no {path} after {seconds} s"
        time.sleep(0.002)


def free_port() -> int:
    """Of the loopback interface."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def benchmark(name: str) -> ModuleType:
    """A script of benchmarks/, imported; those that it shares code with lie beside it."""
    folder = str(Path(__file__).resolve().parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)
