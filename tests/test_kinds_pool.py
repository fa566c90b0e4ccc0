"""Every kind through a real pool: as an argument and as a result, under every start method and in every mode.

One pool of one worker goes through the whole table, so that a run of it costs seconds; what failed is told together.
The codec alone, and what each mode promises, are in ``test_kinds_codec``.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import kinds
import pytest
import torch
from kinds import KINDS, KINDS_BY_NAME, Kind, quiet
from methods import METHODS

import tpool
import tpool.engines
from tpool.errors import UnsupportedTensorError
from tpool.local.setup import Settings

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(ComplexHalf|quantize|prototype|beta state|TypedStorage|nvariant|jit).*"
)

MODES = {"share": ("share", True), "share without swap": ("share", False), "copy": ("copy", True)}


@contextmanager
def one_worker(method: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tpool.Pool]:
    """A pool of one worker, which leaves no files behind."""
    sharing, can_swap = MODES[mode]
    monkeypatch.setattr(tpool.engines, "Settings", functools.partial(Settings, can_swap=can_swap))
    with quiet(), tpool.Pool(1, context=method, sharing=sharing) as pool:
        yield pool
        pool.apply(kinds.forget_scratch)
    kinds.forget_scratch()


# In the worker -----------------------------------------------------------------------------------------------------


def check_and_return(name: str, arrived: Any) -> Any:
    with quiet():
        kind = KINDS_BY_NAME[name]
        kind.check(kind.make(), arrived)
        return arrived


def make(name: str) -> Any:
    with quiet():
        return KINDS_BY_NAME[name].make()


# In the caller -----------------------------------------------------------------------------------------------------


def send(pool: tpool.Pool, kind: Kind) -> None:
    """As an argument; and what arrived is sent on, back to where it came from."""
    kind.check(kind.make(), pool.apply(check_and_return, (kind.name, kind.make())))


def fetch(pool: tpool.Pool, kind: Kind) -> None:
    """As a result."""
    kind.check(kind.make(), pool.apply(make, (kind.name,)))


def failures(pool: tpool.Pool, chosen: Iterable[Kind], *directions: Callable[[tpool.Pool, Kind], None]) -> list[str]:
    """What went wrong, a paragraph for each."""
    found = []
    for kind in chosen:
        for direction in directions:
            try:
                if kind.status == "refused":
                    with pytest.raises(UnsupportedTensorError, match=re.escape(kind.note)):
                        direction(pool, kind)
                else:
                    direction(pool, kind)
            except (Exception, pytest.fail.Exception) as error:
                found.append(f"{direction.__name__} {kind.name!r}: {error!r}\n{error.__cause__ or ''}")
    return found


CPU_KINDS = [kind for kind in KINDS if not kind.cuda]
# torch's own manager of named memory is a process that nobody ends.
NAMED_KINDS = [kind for kind in CPU_KINDS if "by name" in kind.name]
# What a mode means does not depend on how the worker was started: these pairs are for once in a while.
SLOW = {("spawn", "share without swap"), ("spawn", "copy"), ("fork", "share without swap")}
RUNS = [
    pytest.param(method, mode, marks=[pytest.mark.slow] if (method, mode) in SLOW else [])
    for method in METHODS
    for mode in MODES
]


@pytest.mark.parametrize(("method", "mode"), RUNS)
def test_every_kind_arrives_or_is_refused(method: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [kind for kind in CPU_KINDS if kind not in NAMED_KINDS]
    with one_worker(method, mode, monkeypatch) as pool:
        assert "\n".join(failures(pool, chosen, send, fetch)) == ""


@pytest.mark.leaves("torch starts a process that outlives the tensors it names")
@pytest.mark.parametrize("mode", MODES)
def test_named_memory_arrives(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with one_worker("forkserver", mode, monkeypatch) as pool:
        assert "\n".join(failures(pool, NAMED_KINDS, send, fetch)) == ""


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_every_kind_on_a_gpu_arrives(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with one_worker(method, "share", monkeypatch) as pool:
        assert "\n".join(failures(pool, [kind for kind in KINDS if kind.cuda], send, fetch)) == ""


def test_the_matrix_notices_what_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [
        dataclasses.replace(KINDS_BY_NAME["torch.float32"], status="refused", note="never"),
        dataclasses.replace(KINDS_BY_NAME["non-leaf tensor"], status="exact"),
        dataclasses.replace(KINDS_BY_NAME["storage offset"], make=lambda: kinds.number(20)),
    ]
    with one_worker("forkserver", "share", monkeypatch) as pool:
        assert len(failures(pool, wrong, send, fetch)) == 2 * len(wrong)
