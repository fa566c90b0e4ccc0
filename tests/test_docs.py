"""Every example in the documents runs and does what it says: docstrings, the README, the page for newcomers."""

from __future__ import annotations

import asyncio
import doctest
import importlib
import inspect
import itertools
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import run_script

import tpool

ROOT = Path(__file__).parent.parent
SECONDS = 60


def modules_with_examples() -> list[str]:
    names = []
    for path in sorted((ROOT / "tpool").rglob("*.py")):
        if re.search(r"^\s*>>> ", path.read_text(), re.MULTILINE):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names.append(".".join(part for part in parts if part != "__init__"))
    return names


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_in_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    names = {"asyncio": asyncio, "itertools": itertools, "time": time, "torch": torch, "tpool": tpool}
    outcome = doctest.testmod(importlib.import_module(name), extraglobs=names)
    assert outcome.attempted
    assert not outcome.failed


# What is pasted into a fresh interpreter ----------------------------------------------------------------------------

README, PAGE = ROOT / "README.md", ROOT / "examples" / "COMING_FROM.md"


def snippets(page: Path) -> list[str]:
    """The blocks of Python on a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def snippet(page: Path, word: str) -> str:
    """The one block in which a word stands."""
    (found,) = [text for text in snippets(page) if word in text]
    return found


def run(source: str) -> list[str]:
    """The lines that a script prints."""
    ran = run_script(source, SECONDS, options=("-W", "error::ResourceWarning")).expect_success()
    assert ran.stderr == ""
    return ran.stdout.splitlines()


def paste(source: str) -> tuple[str, str]:
    """What the interactive interpreter prints when somebody pastes this; there a blank line ends each block."""
    command = [sys.executable, "-i", "-q", "-c", "import sys; sys.ps1 = sys.ps2 = ''"]
    ran = subprocess.run(command, input=source + "\n\n", capture_output=True, text=True, timeout=SECONDS, check=False)
    return ran.stdout, ran.stderr


def test_the_readmes_first_example():
    text = snippet(README, "weights = ")
    more = "\nprint(len(scores), scores[0].shape, i, torch.equal(scores[3], score(batches[3])))"
    assert run(text + more) == ["100 torch.Size([64]) 1000 True"]


def test_the_readmes_list_of_settings():
    """All keywords that a pool takes stand there, with the defaults that it has."""
    text = snippet(README, "processes=None")
    assert run(text + "\nprint(pool)")[0].startswith("<tpool.Pool state=CLOSE pool_size=")
    listed = {}
    exec(text.replace("tpool.Pool(", "dict(").replace("pool.close()", ""), listed)
    parameters = inspect.signature(tpool.Pool).parameters
    assert listed["pool"].keys() <= parameters.keys()
    for name, value in listed["pool"].items():
        assert value == parameters[name].default or (name, value) == ("preload", [])
    for name in parameters.keys() - listed["pool"].keys():
        assert f"{name}=" in README.read_text(), f"{name} stands nowhere"


def test_the_readmes_example_of_what_is_beyond_the_standard_library():
    lines = run(snippet(README, "import asyncio"))
    assert sorted(eval(lines[0])) == [1.0, 2.0, 3.0]
    assert lines[1] == "[4.0, 1.0, 2.0]"
    assert "[0.0, 0.5, 1.0, 1.5]" in lines
    assert lines[-2:] == ["[32, 9]", "[4, 5]"]


def test_the_readmes_pools_on_ray_can_be_asked_for(monkeypatch):
    """The cluster is the reader's, so only what describes it is made."""
    asked = []
    monkeypatch.setattr(tpool, "Pool", lambda processes, engine: asked.append((processes, engine)))
    exec(snippet(README, 'engine="ray"'), {"tpool": tpool})
    assert asked == [
        (64, "ray"),
        (8, tpool.RayEngine(address="10.0.0.1:6379", num_gpus=1, start_timeout=600)),
    ]


def test_no_snippet_of_the_readme_is_left_out():
    assert len(snippets(README)) == 4


def test_the_page_for_newcomers():
    """One after the other in one interpreter, as somebody who reads it would."""
    printed = [
        ["[6, 20]", "42", "42"],
        ["torch.Size([32, 3, 8, 8])"] * 3 + ["torch.Size([4, 3, 8, 8])"],
        ["[1, 2, 4, 8]", "[32, 9]"],
        ["[1.0, 2.0, 3.0]", "4.0"],
        ["['Hello Ada', 'Hello Grace']"],
        ["[1.0, 5.0, 9.0]"],
    ]
    assert len(snippets(PAGE)) == len(printed)
    assert run("\nprint('--')\n".join(snippets(PAGE))) == "\n--\n".join(map("\n".join, printed)).split("\n")


def test_pasted_into_the_interpreter():
    """Functions of the interactive ``__main__`` have no source, and travel all the same."""
    pasted = [snippet(PAGE, "def greet"), snippet(README, "weights = "), "print(len(scores))"]
    out, err = paste("\n\n".join(pasted))
    assert err.strip() == ""
    assert "['Hello Ada', 'Hello Grace']" in out
    assert out.rstrip().endswith("100")


def test_whatever_the_page_names_is_there():
    """A keyword, method or file that the tables name exists."""
    text = README.read_text() + PAGE.read_text()
    for name in set(re.findall(r"`pool\.(\w+)", text)):
        assert hasattr(tpool.Pool, name), name
    for name in set(re.findall(r"`tpool\.(\w+)", text)) - {"local", "tensors"}:
        assert hasattr(tpool, name), name
    for name in set(re.findall(r"`(?:examples/)?([\w/]+\.(?:ipynb|py))`", text)):
        assert (ROOT / "examples" / name).exists(), name
