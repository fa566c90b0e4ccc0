"""Every example in a docstring runs and does what it says."""

from __future__ import annotations

import asyncio
import doctest
import importlib
import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tpool

MODULES = ["", "batches", "imaps", "maps", "memory", "pool", "ray.spec", "seeing", "tensors.held"]


@pytest.mark.parametrize("name", [f"tpool.{name}".rstrip(".") for name in MODULES])
def test_the_examples_in_docstrings(name):
    names = {"asyncio": asyncio, "itertools": itertools, "time": time, "torch": torch, "tpool": tpool}
    outcome = doctest.testmod(importlib.import_module(name), extraglobs=names)
    assert outcome.attempted
    assert not outcome.failed


def test_the_readmes_example_of_what_is_beyond_the_standard_library(tmp_path):
    text = (Path(__file__).parent.parent / "README.md").read_text()
    (snippet,) = [part.partition("```")[0] for part in text.split("```python\n") if part.startswith("import asyncio")]
    script = tmp_path / "readme.py"
    script.write_text(snippet)
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert sorted(eval(lines[0])) == [1.0, 2.0, 3.0]
    assert lines[1] == "[4.0, 1.0, 2.0]"
    assert "[0.0, 0.5, 1.0, 1.5]" in lines
    assert lines[-2:] == ["[32, 9]", "[4, 5]"]
