"""New pages for large blocks: made before the first copy, by several threads, and never in the way."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch
from codec_peer import new_arena

import tpool
from tpool.tensors import leases, prefault
from tpool.tensors.arena import Arena
from tpool.tensors.leases import Memory
from tpool.tensors.memfd import PAGE_NBYTES
from tpool.tensors.prefault import PREFAULT_NBYTES

MIB = 1 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena, ledger = new_arena()
    yield arena
    leases.table().remove(arena)
    ledger.close()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that were started."""
    started: list[str] = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: (started.append(self.name), start(self))[1])
    return started


def resident_nbytes(arena: Arena, offset: int, nbytes: int) -> int:
    """How many bytes of this part of the file have pages."""
    found, position, end = 0, offset, offset + nbytes
    while position < end:
        try:
            first = os.lseek(arena.fd, position, os.SEEK_DATA)
        except OSError:  # no more data
            break
        position = min(os.lseek(arena.fd, first, os.SEEK_HOLE), end)
        found += max(0, position - first)
    return found


@pytest.fixture(autouse=True)
def _needs_linux_5_14(arena: Arena) -> None:
    prefault.prefault(arena.address, PAGE_NBYTES, 1)
    if not resident_nbytes(arena, 0, PAGE_NBYTES):
        pytest.skip("this kernel makes pages only as they are written")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("nbytes", [PREFAULT_NBYTES, 11 * MIB + PAGE_NBYTES, 32 * MIB])
def test_all_of_a_new_block_has_pages(arena: Arena, threads: list[str], nbytes: int, count: int) -> None:
    block = Memory(arena, lambda seconds: False, threads=lambda: count).allocate(nbytes)
    left_over = nbytes - resident_nbytes(arena, block.offset, nbytes)
    assert 0 <= left_over < prefault.MAX_THREADS * PAGE_NBYTES
    assert len(threads) == min(count, prefault.MAX_THREADS, nbytes // prefault.SHARE_NBYTES) - 1
    assert not any(bytes(block.view[start : start + 64]).strip(b"\0") for start in range(0, nbytes, MIB))


def test_a_small_one_and_a_lazy_one_have_none_and_a_warm_one_needs_none(arena: Arena, threads: list[str]) -> None:
    memory = Memory(arena, lambda seconds: False, threads=lambda: 2)
    small = memory.allocate(PREFAULT_NBYTES - 1)
    lazy = memory.allocate(PREFAULT_NBYTES, lazily=True)
    assert resident_nbytes(arena, lazy.offset, lazy.nbytes) == 0
    assert resident_nbytes(arena, small.offset, small.nbytes) <= PAGE_NBYTES
    assert not threads
    block = memory.allocate(PREFAULT_NBYTES)
    assert len(threads) == 1
    del block
    memory.allocate(PREFAULT_NBYTES)
    assert len(threads) == 1


def test_without_another_thread_to_be_had(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    block = Memory(arena, lambda seconds: False, threads=lambda: 2).allocate(16 * MIB)
    assert resident_nbytes(arena, block.offset, block.nbytes) == 8 * MIB
    block.view[:] = bytes(16 * MIB)


def test_bytes_that_are_there_stay_as_they_are(arena: Arena) -> None:
    block = Memory(arena, lambda seconds: False).allocate(8 * MIB)
    block.view[:] = bytes(range(256)) * (8 * MIB // 256)
    prefault.prefault(arena.address + block.offset, block.nbytes, 3)
    assert bytes(block.view) == bytes(range(256)) * (8 * MIB // 256)


def test_large_tensors_there_and_back() -> None:
    sent = [torch.full((3 * MIB,), float(number)) for number in range(4)]
    with tpool.Pool(2) as pool:
        for number, back in enumerate(pool.imap(torch.neg, [each.clone() for each in sent])):
            assert torch.equal(back, -sent[number])
