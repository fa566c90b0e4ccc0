from __future__ import annotations

import fcntl
import gc
import mmap
import os
import resource
from pathlib import Path

import pytest
from forking import run_in_fork

from tpool.errors import PlatformError, ProtocolError
from tpool.tensors.memfd import PAGE_NBYTES, Arena, create_memfd

MIB = 1 << 20


def mapped(arena: Arena) -> bool:
    return f"{arena.address:x}-" in Path("/proc/self/maps").read_text()


def test_both_sides_see_the_same_bytes_and_no_memory_is_used_before() -> None:
    arena = Arena.create(8 << 30)
    assert os.fstat(arena.fd).st_blocks == 0
    peer = Arena.attach(os.dup(arena.fd), arena.id)
    assert (peer.id, peer.nbytes) == (arena.id, 8 << 30)
    assert peer.address != arena.address
    arena.view((8 << 30) - 3, 3)[:] = b"abc"
    assert bytes(peer.view((8 << 30) - 3, 3)) == b"abc"
    assert os.fstat(arena.fd).st_blocks * 512 == PAGE_NBYTES
    arena.close()
    peer.close()


def test_an_arena_is_never_larger_than_addresses_go() -> None:
    arena = Arena.create(1 << 64)
    assert arena.nbytes <= 1 << 46
    arena.close()


def test_ids_differ_and_the_size_is_whole_pages() -> None:
    first, second = Arena.create(1), Arena.create(PAGE_NBYTES + 1)
    assert first.id != second.id
    assert (first.nbytes, second.nbytes) == (PAGE_NBYTES, 2 * PAGE_NBYTES)
    first.close()
    second.close()


def test_descriptors_are_close_on_exec() -> None:
    arena = Arena.create(MIB)
    fd = os.dup(arena.fd)
    os.set_inheritable(fd, True)
    peer = Arena.attach(fd, 1)
    assert not os.get_inheritable(arena.fd)
    assert not os.get_inheritable(peer.fd)
    arena.close()
    peer.close()


def test_one_descriptor_for_each_arena() -> None:
    before = len(os.listdir("/proc/self/fd"))
    arena = Arena.create(MIB)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    arena.close()
    arena.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_views_outlive_the_arena_and_the_mapping_goes_with_the_last() -> None:
    arena = Arena.create(MIB)
    view = arena.view(100, 50)
    view[:] = bytes(range(50))
    arena.close()
    derived = view[10:20].toreadonly()
    del view
    assert bytes(derived) == bytes(range(10, 20))
    assert mapped(arena)
    del derived
    assert not mapped(arena)


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, -1), (0, MIB + 1), (MIB, 1), (1 << 70, 1)])
def test_views_stay_within_the_arena(offset: int, nbytes: int) -> None:
    arena = Arena.create(MIB)
    with pytest.raises(ProtocolError):
        arena.view(offset, nbytes)
    arena.close()


def test_a_closed_arena_gives_no_views() -> None:
    arena = Arena.create(MIB)
    arena.close()
    with pytest.raises(ValueError, match="closed"):
        arena.view(0, 1)
    with pytest.raises(ValueError, match="closed"):
        arena.guard(0)


def test_discard_gives_back_only_the_pages_that_lie_wholly_inside() -> None:
    arena = Arena.create(MIB)
    arena.view(0, 5 * PAGE_NBYTES)[:] = b"x" * (5 * PAGE_NBYTES)
    arena.discard(PAGE_NBYTES // 2, 3 * PAGE_NBYTES)
    content = bytes(arena.view(0, 5 * PAGE_NBYTES))
    assert content == b"x" * PAGE_NBYTES + bytes(2 * PAGE_NBYTES) + b"x" * (2 * PAGE_NBYTES)
    arena.discard(1, PAGE_NBYTES)
    assert bytes(arena.view(0, PAGE_NBYTES)) == b"x" * PAGE_NBYTES
    arena.close()


def test_nobody_can_cut_an_arena_short() -> None:
    arena = Arena.create(MIB)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 0)
    arena.close()


def unsealed() -> int:
    fd = os.memfd_create("other", os.MFD_CLOEXEC)
    os.ftruncate(fd, MIB)
    return fd


def empty() -> int:
    fd = os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


@pytest.mark.parametrize("make", [unsealed, empty, lambda: os.open("/dev/null", os.O_RDWR), lambda: os.pidfd_open(1)])
def test_only_memory_of_a_pool_is_attached_and_else_the_descriptor_closed(make) -> None:  # type: ignore[no-untyped-def]
    fd = make()
    with pytest.raises(ProtocolError):
        Arena.attach(fd, 1)
    with pytest.raises(OSError):
        os.fstat(fd)


def test_a_low_limit_of_address_space_makes_a_smaller_arena() -> None:
    def child() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_NBYTES
        resource.setrlimit(resource.RLIMIT_AS, (used + 300 * MIB,) * 2)
        arena = Arena.create(1 << 40)
        assert arena.nbytes == 256 * MIB
        with pytest.raises(PlatformError, match="ulimit"):
            Arena.create(1 << 40)

    assert run_in_fork(child) == 0


def test_a_low_limit_of_file_size_makes_a_smaller_arena() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 20, hard))
    try:
        arena = Arena.create(1 << 34)
        assert 64 << 20 <= arena.nbytes <= 100 << 20
        arena.close()
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, hard))
        with pytest.raises(PlatformError):
            Arena.create(1 << 34)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_memory_of_a_dead_mapping_in_a_garbage_cycle_is_unmapped() -> None:
    arena = Arena.create(MIB)
    cycle: list[object] = [arena.view(0, 10)]
    cycle.append(cycle)
    arena.close()
    del cycle
    gc.collect()
    assert not mapped(arena)


def test_create_memfd_closes_what_it_cannot_use() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OverflowError):
        create_memfd("x", 1 << 63)
    assert len(os.listdir("/proc/self/fd")) == before
    assert mmap.PAGESIZE == PAGE_NBYTES
