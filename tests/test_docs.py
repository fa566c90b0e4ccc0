"""Every example in a docstring runs and does what it says."""

from __future__ import annotations

import asyncio
import doctest
import importlib
import itertools
import time

import pytest

import tpool


@pytest.mark.parametrize("name", ["tpool", "tpool.pool", "tpool.maps", "tpool.imaps"])
def test_the_examples_in_docstrings(name):
    names = {"asyncio": asyncio, "itertools": itertools, "time": time, "tpool": tpool}
    outcome = doctest.testmod(importlib.import_module(name), extraglobs=names)
    assert outcome.attempted
    assert not outcome.failed
