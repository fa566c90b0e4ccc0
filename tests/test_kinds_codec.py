"""Every kind, from one process to another and back, through the codec alone; and what the two modes promise."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import kinds
import numpy as np
import pytest
import torch
from codec_peer import Peering, codec_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kinds import KINDS, Kind, quiet, same

from tpool.errors import UnsupportedTensorError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(ComplexHalf|quantize|prototype|beta state|TypedStorage|nvariant|jit).*"
)

MODES = {"share": ("share", True), "share without swap": ("share", False), "copy": ("copy", True)}


@pytest.fixture(scope="module")
def peering() -> Iterator[Peering]:
    peering = Peering()
    yield peering
    peering.close()
    kinds.forget_scratch()


def travel(peering: Peering, obj: Any, mode: str, kind: str = "", act: str = "echo") -> Any:
    """There and back: what the child answers, decoded."""
    sharing, can_swap = MODES[mode]
    codec = codec_for(peering.arena, sharing, can_swap)
    with quiet():
        received = peering.ask(kind, codec.dumps(obj), sharing=sharing, can_swap=can_swap, act=act)
        return codec.loads(received)


def marked(kind: Kind) -> Any:
    marks = []
    if kind.cuda:
        marks = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
    elif "by name" in kind.name:
        marks = [pytest.mark.leaves("torch starts a process that outlives the tensors it names")]
    return pytest.param(kind, id=kind.name, marks=marks)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [marked(kind) for kind in KINDS if kind.status != "refused"])
def test_kind_arrives_and_returns(peering: Peering, kind: Kind, mode: str) -> None:
    with quiet():
        arrived = travel(peering, kind.make(), mode, kind.name)
        kind.check(kind.make(), arrived)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [marked(kind) for kind in KINDS if kind.status == "refused"])
def test_kind_is_refused(peering: Peering, kind: Kind, mode: str) -> None:
    sharing, can_swap = MODES[mode]
    with pytest.raises(UnsupportedTensorError, match=kind.note):
        codec_for(peering.arena, sharing, can_swap).dumps([kind.make()])
