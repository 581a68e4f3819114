"""Two processes do what one does with the same global batch: gloo on the CPU, started by torchrun."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from marval.__main__ import main
from marval.distributed import World

TORCHRUN = ["--nnodes", 1, "--nproc-per-node", 2, "--master-addr", "127.0.0.1", "--master-port"]
WORK = """
import sys
from pathlib import Path
from test_distributed import work
from marval.distributed import disconnect
work(Path(sys.argv[1]), *map(Path, sys.argv[2:]))
disconnect()
"""
TOLERANCE = {"rtol": 2e-3, "atol": 1e-4}
"""Of losses and rewards: sums over the batch are taken in another order, and Adam without momentum amplifies that."""
LOCAL = {"token_std", "data_std", "entropy"}
"""Watched per process and averaged, which is not the same over half a batch."""


def work(out: Path, teacher: Path, student: Path, classifier: Path) -> None:
    """Every loop and an evaluation, into folders under ``out``."""
    from marval.config import DistillConfig, GSIMConfig, RLConfig, TrainConfig
    from marval.distill import distill
    from marval.evaluate import evaluate_folder
    from marval.rl import rl
    from marval.train import train

    common = {"steps": 4, "batch": 16, "log_every": 1, "sample_every": 0}
    gsim = GSIMConfig(auxiliary_updates=2)
    train(TrainConfig(**common, model=tiny.MODEL, sampling=tiny.SAMPLING, shift=1), out / "train")
    distill(DistillConfig(**common, ar_steps=4, gsim=gsim, trained="all", rollout=0.5), teacher, out / "distill")
    aligned = RLConfig(
        **common, ar_steps=4, classifier=str(classifier), judge=str(classifier), eval_every=2, eval_images=20
    )
    rl(aligned, student, out / "rl")
    group = {"algorithm": "group", "reward": "reads-class", "group_size": 4, "kl": 0.1, "anchor": 0.0}
    rl(RLConfig(**{**vars(aligned), **group}), student, out / "group")
    evaluate_folder(student, "digits", out / "results.json", 25, classifier, 3, "cpu", {})


def torchrun(*args: object) -> str:
    """Output of two processes; raises if one fails."""
    with tiny.start(
        [*TORCHRUN, tiny.free_port(), *args], "torch.distributed.run", cwd=Path(__file__).parent
    ) as processes:
        out, err = processes.communicate(timeout=300)
    assert processes.returncode == 0, err
    return out


def test_loops_and_evaluation(tmp_path: Path):
    folders = [tiny.teacher(), tiny.student(), tiny.classifier()]
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    work(one, *folders)
    (tmp_path / "work.py").write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{WORK}")
    torchrun(tmp_path / "work.py", two, *folders)

    for verb in ("train", "distill", "rl", "group"):
        rows = [tiny.metrics(out / verb) for out in (one, two)]
        assert len(rows[0]) >= 4
        for a, b in zip(*rows, strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - LOCAL:
                np.testing.assert_allclose(b[name], a[name], **TOLERANCE, err_msg=f"{verb} {name} {a['step']}")
        weights = [load_file(out / verb / "model.safetensors") for out in (one, two)]
        for name, value in weights[0].items():
            np.testing.assert_allclose(weights[1][name], value, rtol=0, atol=2e-3, err_msg=f"{verb} {name}")
    a, b = (json.loads((out / "results.json").read_text()) for out in (one, two))
    np.testing.assert_allclose(b["fid"], a["fid"], rtol=1e-6)
    assert b["accuracy"] == a["accuracy"]
    assert b["protocol"] == a["protocol"]


def test_samples_do_not_depend_on_the_number_of_processes(tmp_path: Path):
    args = ["sample", "--model", tiny.student(), "--num-images", 7, "--seed", 5, "--classes", "4,2", "--out"]
    main([str(arg) for arg in (*args, tmp_path / "one")])
    out = torchrun("-m", "marval", *args, tmp_path / "two")
    assert out.count("7 images") == 1
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1]
    with np.load(tmp_path / "one" / "samples.npz") as one, np.load(tmp_path / "two" / "samples.npz") as two:
        assert np.array_equal(one["images"], two["images"])
        assert np.array_equal(one["labels"], two["labels"])


def test_shares_of_a_batch():
    device = torch.device("cpu")
    assert [World(rank, 3, device).rows(12) for rank in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    with pytest.raises(ValueError, match="batch 16 must be a multiple of the number of processes, 3"):
        World(0, 3, device).rows(16)
