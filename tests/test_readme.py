"""What the README shows works: commands, links, code."""

import re
import runpy
import shlex
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from small_codec import write_images

from marval.__main__ import VERBS, main
from marval.config import RLConfig
from marval.rl import rl

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def blocks(text: str, *languages: str) -> list[str]:
    """Contents of the fenced code blocks in these languages; of all if none is given."""
    found = re.findall(r"^```([\w-]*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [code for language, code in found if not languages or language in languages]


def commands() -> list[list[str]]:
    """Every `marval VERB ...` of the shell blocks, split into words."""
    lines = "\n".join(blocks(README, "", "sh", "bash", "console", "shell")).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line.removeprefix("$ "), comments=True)
        starts = [i for i, word in enumerate(words) if word == "marval" or word.endswith("/marval")]
        if starts and len(words) > starts[0] + 1:
            rest = words[starts[0] + 1 :]
            ends = [i for i, word in enumerate(rest) if word in ("|", "&&", ";", ">")]
            found.append(rest[: ends[0]] if ends else rest)
    return found


def test_the_first_commands():
    start = "\n".join(blocks(README)[:3])
    assert re.search(r"^.*\bmarval quickstart\b", start, re.MULTILINE)
    assert re.search(r"^.*\bpytest\b", start, re.MULTILINE)


def test_continuous_integration_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    tests = re.search(r"^.*\bpytest\b.*$", "\n".join(blocks(README)), re.MULTILINE)
    assert tests
    assert "README.md" in script or tests.group().strip().removeprefix("$ ") in script


def test_command_lines_parse(capsys: pytest.CaptureFixture[str]):
    assert commands()
    for words in commands():
        if words == ["--help"]:
            continue
        assert words[0] in VERBS, words
        with pytest.raises(SystemExit) as stop:  # an unknown flag is refused before the help is shown
            main([*words, "--help"])
        assert not stop.value.code, f"{words}: {capsys.readouterr().err}"
    capsys.readouterr()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"(?:src|href|srcset)=\"([^\"]+)\"", text)
    targets += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / unquote(path) if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ +(.+)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_compiles(page: Path):
    for code in blocks(page.read_text(), "python", "py"):
        lines = code.splitlines()
        if any(line.startswith(">>> ") for line in lines):
            lines = [line[4:] for line in lines if line.startswith((">>> ", "... "))]
        compile("\n".join(lines), page.name, "exec")


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    made = {}
    for code in blocks(README, "python"):
        exec(compile(code, "README.md", "exec"), made)
    assert [path.name for path in tmp_path.iterdir()] == ["sneaker.png"]
    assert np.array_equal(made["completed"][:, :, :4], made["images"][:, :, :4]), "the left half stays"


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """But that which takes a minute, toy_2d.py."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", [f"{name}/{i}.jpg" for name in ("ant", "bee") for i in range(3)])
    for words in (["sample.py"], ["own_images.py", "photos", "runs", "2"]):
        monkeypatch.setattr("sys.argv", words)
        runpy.run_path(str(ROOT / "examples" / words[0]), run_name="__main__")
    assert (tmp_path / "grid.png").exists()
    assert "(4, 32, 32, 3) uint8 NHWC" in capsys.readouterr().out
    ink = f"{ROOT / 'examples' / 'own_reward.py'}:ink"
    config = RLConfig(
        steps=1, batch=4, reward=ink, ar_steps=4, eval_images=4, range_seeds=2, sample_every=0, anchor=0.0
    )
    rl(config, "digits/student", "ink")


def test_no_placeholder_is_left_in_a_page():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"\b(TABLE|MATMUL|TODO|TBD|XXX)\b", page.read_text()), page
