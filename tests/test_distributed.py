"""Any number of processes, sharded or not, do what one does with the same global batch: gloo on the CPU, torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from marval.__main__ import main
from marval.checkpoint import load_state
from marval.config import DistillConfig, GSIMConfig, RLConfig, SamplingConfig, TrainConfig
from marval.distill import distill
from marval.distributed import World, connect
from marval.draw import refuse_cache
from marval.rl import rl
from marval.tokenizers import load_tokenizer
from marval.train import build_teacher, train

HERE = Path(__file__).parent
BATCH = 10
"""Images, and their 5 groups of 2, divide into no equal shares over 2 or 3 processes."""
TOLERANCE = {"rtol": 2e-3, "atol": 1e-4}
"""Of losses and rewards: sums over the batch are taken in another order, and Adam without momentum amplifies that."""
LOCAL = {"token_std", "data_std", "entropy"}
"""Watched per part and averaged, which is not the same over half a batch."""
VERBS = ("train", "distill", "rl", "group")


def work(out: Path, teacher: Path, student: Path, classifier: Path, steps: int = 4, **how: object) -> None:
    """Every loop, into folders under ``out``; goes on with what is there."""
    common = {"steps": steps, "batch": BATCH, "log_every": 1, "save_every": 2, "sample_every": 0, **how}
    distilled = {"ar_steps": 4, "gsim": GSIMConfig(auxiliary_updates=2), "auxiliary": "network", "rollout": 0.5}
    distilled |= {"context_updates": 2}
    aligned = {
        "ar_steps": 4,
        "classifier": str(classifier),
        "judge": str(classifier),
        "eval_every": 2,
        "eval_images": 20,
    }
    group = {"algorithm": "group", "reward": "reads-class", "group_size": 2, "kl": 0.1, "anchor": 0.0}
    constant = {"decay": False, "warmup": 0}  # the learning rate must not depend on the number of steps
    constant |= {"eval_every": 2, "eval_images": 20, "features": str(classifier)}
    train(TrainConfig(**common, **constant, model=tiny.MODEL, sampling=tiny.SAMPLING, shift=1), out / "train", True)
    distill(DistillConfig(**common, **constant, **distilled), teacher, out / "distill", True)
    rl(RLConfig(**common, **aligned), student, out / "rl", True)
    rl(RLConfig(**common, **aligned | group), student, out / "group", True)


def command(processes: int, *args: object) -> list[str]:
    nodes = ["--nnodes", 1, "--nproc-per-node", processes, "--master-addr", "127.0.0.1"]
    return [*map(str, nodes), "--master-port", str(tiny.free_port()), *map(str, args)]


def torchrun(processes: int, *args: object) -> str:
    """Output of so many processes; raises if one fails."""
    with tiny.start(command(processes, *args), "torch.distributed.run", cwd=HERE) as run:
        out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    return out


def work_in(processes: int, out: Path, **how: object) -> None:
    """`work` in so many processes."""
    folders = [str(path) for path in (out, tiny.teacher(), tiny.student(), tiny.classifier())]
    file = out.with_suffix(".py")
    file.write_text(
        f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(HERE)!r})\n"
        "from test_distributed import work\n"
        f"work(*map(Path, {folders!r}), **{how!r})\n{tiny.LEAVE}"
    )
    torchrun(processes, file)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    out = tmp_path_factory.mktemp("distributed") / "one"
    work(out, tiny.teacher(), tiny.student(), tiny.classifier())
    return out


def begun() -> dict[str, torch.Tensor]:
    """Weights of the teacher that `work` trains, before its first update."""
    tokenizer = load_tokenizer("pixels", 8, 2, 1)
    config = TrainConfig(model=tiny.MODEL, sampling=tiny.SAMPLING)
    return build_teacher(config, tokenizer, [str(i) for i in range(10)]).network.state_dict()


def same(a: Path, b: Path) -> None:
    for verb in VERBS:
        rows = [tiny.metrics(out / verb) for out in (a, b)]
        assert len(rows[0]) >= 4
        for x, y in zip(*rows, strict=True):
            assert x.keys() == y.keys()
            for name in x.keys() - LOCAL:
                np.testing.assert_allclose(y[name], x[name], **TOLERANCE, err_msg=f"{verb} {name} {x['step']}")
        weights = [load_file(out / verb / "model.safetensors") for out in (a, b)]
        assert weights[0].keys() == weights[1].keys()
        moved, apart = torch.zeros(2, dtype=torch.float64)
        folder = tiny.teacher() if verb == "distill" else tiny.student()
        start = begun() if verb == "train" else load_file(folder / "model.safetensors")
        for name, value in weights[0].items():
            if name in start:  # a guidance input is not
                moved += (value - start[name]).abs().sum()
                apart += (value - weights[1][name]).abs().sum()
        assert verb in ("rl", "group") or moved > 0  # what RL ships may be the start
        assert apart <= 0.02 * moved, verb  # Adam without momentum turns the sign of a gradient near zero into a step
        scores = [sorted(load_file(path)) for out in (a, b) if (path := out / verb / "scores.safetensors").exists()]
        assert scores in ([], scores[:1] * 2)


@pytest.mark.parametrize(
    ("processes", "how"),
    [
        (2, {}),
        (2, {"shard": True}),
        (3, {"shard": True, "activation_checkpointing": True}),
        (2, {"accumulate": 2}),
        (3, {}),
    ],
    ids=str,
)
def test_loops(processes: int, how: dict[str, object], alone: Path, tmp_path: Path):
    """DDP and FSDP2, in parts and recomputed, are one process with the same batch: the numbers that both log."""
    work_in(processes, tmp_path / "many", **how)
    same(alone, tmp_path / "many")


RL_WORK = (
    """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_distributed import whole_networks
whole_networks(Path({out!r}), Path({student!r}), Path({classifier!r}))
"""
    + tiny.LEAVE
)


def whole_networks(out: Path, student: Path, classifier: Path) -> None:
    """Two updates of RL, of the head, of everything and of adapters, with its anchor."""
    for trained in ("head", "all", "lora"):
        config = RLConfig(
            trained=trained, steps=2, batch=BATCH, ar_steps=2, classifier=str(classifier), log_every=1, sample_every=0,
            eval_every=2, eval_images=10, range_seeds=2, device="cpu",
        )  # fmt: skip
        rl(config, student, out / trained)


def test_rl_of_everything_and_of_adapters(tmp_path: Path):
    """Two processes are one, whatever part of a student that was distilled whole is trained."""
    student = tmp_path / "student"
    distill(DistillConfig(steps=2, batch=BATCH, ar_steps=2, sample_every=0), tiny.teacher(), student)
    folders = {"student": str(student), "classifier": str(tiny.classifier()), "here": str(HERE)}
    whole_networks(tmp_path / "one", student, tiny.classifier())
    (tmp_path / "two.py").write_text(RL_WORK.format(out=str(tmp_path / "two"), **folders))
    torchrun(2, tmp_path / "two.py")
    start = load_file(student / "model.safetensors")
    for trained in ("head", "all", "lora"):  # what was trained, not what is shipped: that may be the start
        one, two = (load_state(tmp_path / name / trained / "checkpoint.pt")["student"] for name in ("one", "two"))
        assert one.keys() == two.keys()
        if trained == "head":
            one, two = ({f"head.{name}": value for name, value in state.items()} for state in (one, two))
        moved, apart = torch.zeros(2, dtype=torch.float64)
        for name, value in one.items():
            if name in start or name.endswith(".up"):  # these start at zero
                moved += (value - start.get(name, 0)).abs().sum()
                apart += (value - two[name]).abs().sum()
        assert apart < 0.02 * moved, trained  # Adam without momentum turns the sign of a gradient near zero into a step
        rows = [tiny.metrics(tmp_path / name / trained) for name in ("one", "two")]
        for x, y in zip(*rows, strict=True):
            for name in x.keys() - LOCAL:
                np.testing.assert_allclose(y[name], x[name], **TOLERANCE, err_msg=f"{trained} {name} {x['step']}")


def test_accumulation(alone: Path, tmp_path: Path):
    work(tmp_path / "parts", tiny.teacher(), tiny.student(), tiny.classifier(), accumulate=5)
    same(alone, tmp_path / "parts")


def test_resume_with_other_processes(alone: Path, tmp_path: Path):
    """A checkpoint of two sharded processes goes on with one, and one of two with three."""
    work_in(2, tmp_path / "a", steps=2, shard=True)
    for path in (tmp_path / "a").glob("*/meta.json"):  # as if it had been asked for 4 updates and was killed after 2
        meta = json.loads(path.read_text())
        assert meta["step"] == 2
        meta["config"]["steps"] = 4
        path.write_text(json.dumps(meta))
    subprocess.run(["cp", "-r", tmp_path / "a", tmp_path / "b"], check=True)
    work(tmp_path / "a", tiny.teacher(), tiny.student(), tiny.classifier())
    same(alone, tmp_path / "a")
    work_in(3, tmp_path / "b")
    same(alone, tmp_path / "b")


def test_samples_do_not_depend_on_the_number_of_processes(tmp_path: Path):
    args = ["sample", "--model", tiny.student(), "--num-images", 7, "--seed", 5, "--classes", "4,2", "--out"]
    main([str(arg) for arg in (*args, tmp_path / "one")])
    out = torchrun(2, "-m", "marval", *args, tmp_path / "two")
    assert out.count("7 images") == 1
    torchrun(2, "-m", "marval", *args, tmp_path / "sharded", "--shard")
    names = ("one", "two", "sharded")
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in names]
    assert files[0] == files[1] == files[2]
    arrays = [dict(np.load(tmp_path / name / "samples.npz")) for name in names]
    for other in arrays[1:]:
        assert np.array_equal(arrays[0]["images"], other["images"])
        assert np.array_equal(arrays[0]["labels"], other["labels"])


def test_a_cached_backbone_of_a_network_that_is_split_is_refused():
    refuse_cache(False, SamplingConfig(refresh_every=2))
    with pytest.raises(ValueError, match="refresh_every 2 does not work with --shard"):
        refuse_cache(True, SamplingConfig(refresh_every=2))


@pytest.mark.parametrize("launcher", ["torchrun", "bare"])
def test_a_process_that_dies_ends_all(launcher: str, tmp_path: Path):
    """Within a minute, with a message that names it; also where nobody looks after the processes."""
    args = ["train", "digits", "--steps", 100000, "--save-every", 5, "--out", tmp_path / "run"]
    if launcher == "torchrun":
        processes = [tiny.start(command(3, "-m", "marval", *args), "torch.distributed.run", start_new_session=True)]
    else:
        processes = bare(3, f"marval.watch.LIMIT = 5\nmain({[str(arg) for arg in args]!r})")
    try:
        tiny.wait_for(tmp_path / "run" / "checkpoint.pt", processes[0])
        victim = processes[-1].pid if launcher == "bare" else worker(processes[0].pid, rank=1)
        os.kill(victim, signal.SIGKILL)
        died = time.monotonic()
        outputs = [process.communicate(timeout=70)[1] for process in processes]
        assert time.monotonic() - died < 60
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode != 0 for process in processes)
    if launcher == "torchrun":
        assert "rank      : 1" in outputs[0]
    else:
        assert all("stops: process 2 on " in output for output in outputs[:2]), outputs


def worker(parent: int, rank: int) -> int:
    """Process id of a rank that torchrun started."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat, environment = (path / "stat").read_text(), (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == parent and f"RANK={rank}".encode() in environment:
            return int(path.name)
    raise AssertionError(f"no process of rank {rank}")


def bare(size: int, code: str) -> list[subprocess.Popen[str]]:
    """So many processes that nobody looks after, as some schedulers start them."""
    code = f"import marval.watch\nfrom marval.__main__ import main\nfrom marval.distributed import *\n{code}"
    environment = {**tiny.environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(tiny.free_port())}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment, "WORLD_SIZE": str(size), "RANK": str(rank)},
        )
        for rank in range(size)
    ]  # fmt: skip


def test_an_error_of_one_process_reaches_the_others():
    code = (
        "world = connect('cpu')\ntry:\n    assert world.rank == 0, 'bad luck'\n    world.barrier()\n"
        "except Exception as error:\n    disconnect(error)"
    )
    err = [process.communicate(timeout=60)[1] for process in bare(2, code)]
    assert "marval: process 0 of 2 stops: process 1 failed with AssertionError: bad luck" in err[0]


def outputs(size: int, code: str) -> list[str]:
    return [process.communicate(timeout=60)[1] for process in bare(size, code)]


def test_the_watch_raises_no_false_alarm():
    """A process that starts late, one that ends early, and ends without `disconnect`."""
    late = "import os, time\nmarval.watch.LIMIT = 2\ntime.sleep(4 * int(os.environ['RANK']))\nworld = connect('cpu')\n"
    assert outputs(2, f"{late}world.barrier()\ntime.sleep(4 - 4 * world.rank)\n") == ["", ""]


def test_an_uncaught_error_of_the_first_process_reaches_the_others():
    err = outputs(2, "world = connect('cpu')\nassert world.rank > 0, 'bad luck'\nworld.barrier()")
    assert "AssertionError: bad luck" in err[0]
    assert "process 1 of 2 stops: process 0 failed with AssertionError: bad luck" in err[1]


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path):
    """Each process with a disk of its own: a resume would mix weights of different steps."""
    common = ["train", "digits", "--steps", "2", "--batch", "4", "--sample-every", "0", "--resume", "--out"]
    main([*common, str(tmp_path / "0")])
    code = f"import os\nmain({common!r} + [os.path.join({str(tmp_path)!r}, os.environ['RANK'])])"
    assert any("is not one folder for all processes" in err for err in outputs(2, code))


def test_parts_of_a_batch():
    device = torch.device("cpu")
    worlds = [World(rank, 3, device) for rank in range(3)]
    assert [world.rows(12) for world in worlds] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    assert [world.rows(10) for world in worlds] == [slice(0, 3), slice(3, 6), slice(6, 10)]
    for batch, accumulate, group in ((10, 1, 1), (10, 3, 1), (12, 2, 2), (16, 1, 4)):
        parts = [part for world in worlds for part in world.parts(batch, accumulate, group)]
        assert [i for part in parts for i in range(batch)[part.rows]] == list(range(batch))
        assert all((part.rows.stop - part.rows.start) % group == 0 for part in parts)
        assert sum(part.weight for part in parts) == pytest.approx(3)  # over processes, an average
        for part in parts:
            assert part.weight == pytest.approx(3 * (part.rows.stop - part.rows.start) / batch)
    with pytest.raises(ValueError, match="batch 5 is too small for 3 processes with 2 parts each"):
        worlds[0].parts(5, 2)
    with pytest.raises(ValueError, match="--shard splits a network over several processes"):
        connect("cpu", shard=True)
