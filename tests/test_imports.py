"""Imports run downwards only, and start fast."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import marval

SOURCE = Path(marval.__file__).parent
MATHEMATICS = {"diffusion", "gsim", "masking", "policy", "rng"}
LOOPS = {"train", "distill", "rl", "quickstart", "run", "matching", "evaluate", "bench", "report", "importing"} | {
    "update", "average", "export", "encode", "draw", "reference", "tables", "dryrun", "costs", "features", "metrics",
    "demo", "measure", "networks", "selection", "needs", "train_classifier", "sampling_costs", "update_costs",
}  # fmt: skip
DATA = {
    "tokenizers", "sampling", "masking", "checkpoint", "config", "distributed", "watch", "ema", "data", "latents",
    "images", "batches", "listing", "imagenet", "devices", "log", "arguments", "model_files",
}  # fmt: skip
REWARDS = {"scoring", "reward_models", "rewards", "reward_checks"}
MODULES = {".".join(p.relative_to(SOURCE).with_suffix("").parts): p for p in SOURCE.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def ours(path: Path) -> set[str]:
    """The modules of marval that a file imports, as ``models.mar``."""
    names = {name.removeprefix("marval.") for name in imported(path) if name.startswith("marval.")}
    return {name for name in names if name in MODULES}


def third_party(path: Path) -> set[str]:
    tops = {name.split(".")[0] for name in imported(path)}
    return tops - set(sys.stdlib_module_names) - {"marval", ""}


def test_the_parser_sees_imports():
    assert {"rl", "rewards"} & ours(MODULES["rl"]) == {"rewards"}
    assert {"train", "distill", "recipes"} <= ours(MODULES["__main__"])
    assert third_party(MODULES["rng"]) == {"numpy", "torch"}


def test_mathematics_stands_alone():
    for name in MATHEMATICS:
        assert third_party(MODULES[name]) <= {"torch", "numpy"}, name
        assert ours(MODULES[name]) <= MATHEMATICS, name


def test_layers():
    for name, path in MODULES.items():
        below: set[str] = set()
        if name.startswith("models."):
            below = LOOPS | {"data", "sampling", "pipeline"} | REWARDS
        elif name in DATA:
            below = LOOPS | {"pipeline"}
        elif name == "pipeline" or name in REWARDS:
            below = LOOPS
        elif name != "__main__":
            below = {"__main__", "cli"}
        assert not ours(path) & below, name


def test_third_parties():
    """Extras are imported inside the functions that need them, and what nobody may need never."""
    core = {"torch", "numpy", "PIL", "safetensors", "tqdm"}
    for name, path in MODULES.items():
        assert not third_party(path) & {"torchvision", "timm", "accelerate"}, name
        assert "tyro" not in third_party(path) or name == "cli", name
        body = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in body}
        tops = {str(name).split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"marval"}
        assert tops <= core, name


def test_every_module_has_its_place_in_the_map():
    """CONTRIBUTING.md names each, and none that is gone."""
    text = (SOURCE.parents[1] / "CONTRIBUTING.md").read_text()
    table = text.split("Where to find what")[1].split("What we ask")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert named == {name.removeprefix("models.") for name in MODULES if not name.endswith("__init__")}


def test_no_cycles():
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for below in ours(MODULES[name]):
                visit(below, (*above, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_what_a_notebook_finds():
    assert {"load", "Pipeline"} < set(dir(marval)) == set(marval.__all__)
    code = "import marval\nmarval.rl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "module 'marval' has no attribute 'rl': from marval.rl import rl" in done.stderr


def test_torch_is_not_imported_before_it_is_needed():
    code = """if True:
        import sys
        import marval
        from marval.__main__ import main
        main(["--help"])
        assert not {"torch", "numpy", "tyro"} & set(sys.modules)
        assert marval.load.__name__ == "load"
        assert "torch" in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
