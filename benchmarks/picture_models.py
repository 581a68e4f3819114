"""Models of pictures, from a data set's own files to the rows of docs/results.md: every command in turn.

    python benchmarks/picture_models.py fashion-mnist DOWNLOADED runs/my-fashion
    python benchmarks/picture_models.py imagenette64 DOWNLOADED runs/my-photos --weights WEIGHTS --device cuda
    python benchmarks/picture_models.py imagenette64 DOWNLOADED runs/my-photos --weights WEIGHTS --print

The first argument is a recipe. DOWNLOADED: as prepare_data.py takes it (of Imagenette, only packed). WEIGHTS: a folder
with published weights under their own names, those of the tiny autoencoder taef2 for recipes in latents, ResNets for
CIFAR-10, MobileNetV2 for Imagenette. The rows go to benchmarks/results/real_pictures_NAME.json, NAME being that of the
folder of models: a name that is not there yet.

What is made is not made again, and what was interrupted goes on, so a GPU that is there for a few minutes at a time
will do. ``--stages`` runs some of them, as for several processes at once.
"""

import argparse
import dataclasses
import fnmatch
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from results_page import places

from marval.checkpoint import read_json
from marval.recipes import TRAIN

HERE = Path(__file__).parent
PICTURES = [
    name for name in TRAIN if name.removesuffix("-cpu") in ("fashion-mnist", "cifar10", "imagenette64", "emoji")
]
NETWORKS = {
    "cifar10": {"classifier": "resnet20-12fca82f.th", "judge": "resnet56-4bfd9763.th"},
    "imagenette64": {"judge": "mobilenet_v2_dequant_fp16.npz"},
}
"""Published ones of a data set; the others are trained."""
OF_ALIGNED = {"imagenette64": "--select fid --batch 64 --precision bf16", "cifar10": "--batch 64 --precision bf16"}
"""Settings of RL beside the recipe's, as its models of docs/results.md were made."""


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    command: list[str]
    made: Path | None = None
    """There once it has begun, or, if it cannot be resumed, once it has ended; None: it keeps account itself."""
    resumes: bool = False


def stages(
    recipe: str, downloaded: Path, folder: Path, weights: Path | None, device: str, quick: bool = False
) -> list[Stage]:
    """All that a recipe's models need, in order.

    Args:
        quick: a trial: one epoch, two updates, 40 images.

    Raises:
        ValueError: published weights are needed, and no folder is given.
    """
    data, config = recipe.removesuffix("-cpu"), TRAIN[recipe]()
    file, pictures, published = Path("data") / f"{data}.npz", Path("data") / data, NETWORKS.get(data, {})
    latents = config.data.endswith("-latents")
    if weights is None and (published or latents):
        raise ValueError(f"{recipe} needs published weights: give --weights FOLDER")
    marval = [sys.executable, "-m", "marval"]
    found = [Stage("data", [sys.executable, f"{HERE / 'prepare_data.py'}", data, f"{downloaded}", f"{file}"], file)]
    if latents:
        taef2, size = Path(config.tokenizer), "64" if data == "imagenette64" else "32"
        parts = [f"{weights}/taef2_{part}.pth" for part in ("encoder", "decoder")]
        encode = f"--images {pictures}/train --tokenizer {taef2} --image-size {size} --batch 64 --out {config.data}"
        found += [
            Stage("pictures", [*found[0].command[:-1], f"{pictures}"], pictures / "LICENCE.txt"),
            Stage("autoencoder", [*marval, "import-taesd", *parts, "--out", f"{taef2}"], taef2 / "config.json"),
            Stage("latents", [*marval, "encode", *encode.split(), "--device", device], Path(config.data), True),
        ]
    networks = {name: f"{weights}/{file_name}" for name, file_name in published.items()}
    for name, arch in (("classifier", ""), ("judge", "--arch resnet --seed 1")):
        if name not in published:
            networks[name] = f"{folder / name}"
            epochs = ["--epochs", "1"] if quick else []
            train = ["train-classifier", "--data", f"{file}", *arch.split(), "--device", device, "--out"]
            found.append(Stage(name, [*marval, *train, networks[name], *epochs], folder / name / "config.json"))
    fast = [] if quick else ["--graphs" if device == "cuda" else "--compile"]
    few = ["--steps", "2", "--batch", "8", "--sample-every", "0"] if quick else []
    reward = ["--classifier", networks["classifier"], "--judge", networks["judge"], "--reference", f"{file}:train"]
    held_out = ["--eval-images", "40", "--range-seeds", "2"] if quick else []
    for name, command in (
        ("teacher", ["train", recipe, *fast]),
        ("student", ["distill", recipe, "--teacher", f"{folder / 'teacher'}", *fast]),
        ("aligned", ["rl", recipe, "--student", f"{folder / 'student'}", *reward, *OF_ALIGNED.get(recipe, "").split()]),
    ):
        command = [*marval, *command, "--device", device, *few, *(held_out if name == "aligned" else [])]
        found.append(Stage(name, [*command, "--out", f"{folder / name}"], folder / name, True))
    rows = [sys.executable, f"{HERE / 'real_pictures.py'}", "run", folder.name, f"{folder}", "--precision", "bf16"]
    rows += ["--device", device, "--data", f"{file}", *(["--quick"] if quick else [])]
    rows += [part for name in published for part in (f"--{name}", networks[name])]
    return [*found, Stage("rows", rows)]


def is_whole(run: Path) -> bool:
    """Whether the run in a folder has made all of its updates: to resume it would load data and networks first."""
    meta = read_json(run / "meta.json") if (run / "meta.json").exists() else {}
    return "step" in meta and meta["step"] == meta["config"]["steps"]


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=PICTURES)
    parser.add_argument("downloaded", type=Path)
    parser.add_argument("folder", type=Path, help="for the models")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--stages", default="*", help='names or patterns, such as "teacher,student"')
    parser.add_argument("--print", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--quick", action="store_true", help="a trial: models of two updates, 40 images")
    given = parser.parse_args(args)
    found = stages(given.recipe, given.downloaded, given.folder, given.weights, given.device, given.quick)
    results = places(given.quick).results / f"real_pictures_{given.folder.name}.json"
    if results.exists() and not given.quick and not (given.folder / "teacher").exists():
        raise ValueError(f"{results} holds rows of other models: give FOLDER another name than {given.folder.name}")
    globs = given.stages.split(",")
    for glob in globs:
        if not fnmatch.filter([stage.name for stage in found], glob):
            raise ValueError(f"--stages {glob!r} is none of {', '.join(stage.name for stage in found)}")
    for stage in found:
        if not any(fnmatch.fnmatch(stage.name, glob) for glob in globs):
            continue
        command = stage.command
        if stage.made is not None and stage.made.exists():
            if not stage.resumes or is_whole(stage.made):
                print(f"{stage.name}: {stage.made} is there", flush=True)
                continue
            command = [*command, "--resume"]
        print(f"{stage.name}: {shlex.join(command)}", flush=True)
        if given.print:
            continue
        start = time.perf_counter()
        subprocess.run(command, check=True)
        print(f"{stage.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"{error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"{shlex.join(error.cmd)} ended with {error.returncode}")
