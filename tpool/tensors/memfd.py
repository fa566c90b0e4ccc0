"""Anonymous shared memory: sealed, sparse memfds and their mappings.

Nothing here has a name in the file system, so nothing is left behind when every process is killed, and no
``/dev/shm`` limit applies. Two choices differ from the obvious ones:

- ``mmap`` is called through ctypes, since Python's ``mmap`` duplicates the descriptor.
- Files are sealed against shrinking before anybody else sees them, and only sealed files are mapped. Otherwise a peer
  could cut the file short and kill us with SIGBUS at our next read.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import os
import secrets
import stat
import weakref

from tpool.errors import PlatformError, ProtocolError

__all__ = [
    "PAGE_NBYTES",
    "Arena",
    "Guard",
    "create_memfd",
    "discard_pages",
    "map_memfd",
    "memfd_nbytes",
    "populate_pages",
    "view_of",
]

PAGE_NBYTES = mmap.PAGESIZE

# Where limits are low an arena is made smaller, but not uselessly small.
_LEAST_NBYTES = 64 << 20

# Half the address space of a process: no arena is larger, whatever the budget.
_MOST_NBYTES = 1 << 46

# From <asm-generic/mman-common.h>; the mmap module does not have it before Python 3.13 everywhere.
_MADV_REMOVE = 9
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MAP_FAILED = ctypes.c_void_p(-1).value


@functools.cache
def _libc() -> ctypes.CDLL:
    """The C library with the three calls declared; loaded at the first mapping, not at import."""
    libc = ctypes.CDLL(None, use_errno=True)
    address, size = ctypes.c_void_p, ctypes.c_size_t
    libc.mmap.argtypes = [address, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mmap.restype = address
    libc.munmap.argtypes = [address, size]
    libc.madvise.argtypes = [address, size, ctypes.c_int]
    return libc


def create_memfd(name: str, nbytes: int) -> int:
    """A new sparse memfd of ``nbytes``, close-on-exec, whose size nobody can change any more.

    Args:
        name: shown in ``/proc/*/maps``; names nothing.
        nbytes: its size; no memory is used until pages are touched.

    Raises:
        OSError: EFBIG where RLIMIT_FSIZE is lower.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def memfd_nbytes(fd: int) -> int:
    """The size of a memfd that came from a peer.

    Raises:
        ProtocolError: it is no memfd of ours: no regular file, not sealed, or smaller than a page.
    """
    try:
        status = os.fstat(fd)
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:  # EINVAL: a file without seals; EBADF: nothing at all
        raise ProtocolError(f"descriptor {fd} is no shared memory of a pool: {error}") from error
    if not stat.S_ISREG(status.st_mode) or not seals & fcntl.F_SEAL_SHRINK or status.st_size < PAGE_NBYTES:
        raise ProtocolError(
            f"descriptor {fd} is no shared memory of a pool ({status.st_size} bytes, seals {seals:#x})"
        )
    return status.st_size


def map_memfd(fd: int, nbytes: int) -> tuple[memoryview, int]:
    """Map a memfd; the mapping lives as long as any buffer made from the view, or the view's ``obj``.

    Returns:
        A writable view of format 'B' over all of it, and its address.

    Raises:
        OSError: ENOMEM where RLIMIT_AS is lower or the address space is full.
    """
    libc = _libc()
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    address = libc.mmap(None, nbytes, protection, mmap.MAP_SHARED, fd, 0)
    if address is None or address == _MAP_FAILED:
        errno = ctypes.get_errno()
        raise OSError(errno, f"cannot map {nbytes} bytes of shared memory: {os.strerror(errno)}")
    exporter = (ctypes.c_ubyte * nbytes).from_address(address)
    # Each slice refers to the exporter, so it dies after the last of them. In a forked child the finaliser unmaps the
    # child's own copy of the mapping. Not at exit: threads may still read then, and the kernel unmaps anyway.
    weakref.finalize(exporter, libc.munmap, address, nbytes).atexit = False
    return memoryview(exporter).cast("B"), address


def discard_pages(address: int, nbytes: int) -> None:
    """Give whole pages of a mapping back to the system, for all processes that map them; they read as zeros then.

    Raises:
        PlatformError: the system cannot do that.
    """
    if _libc().madvise(address, nbytes, _MADV_REMOVE):
        errno = ctypes.get_errno()
        raise PlatformError(f"cannot discard {nbytes} bytes of shared memory: {os.strerror(errno)}")


def populate_pages(address: int, nbytes: int) -> None:
    """Have pages made for a part of a mapping, from a page's boundary; nothing happens where that cannot be done."""
    _libc().madvise(address, nbytes, _MADV_POPULATE_WRITE)  # EINVAL, ENOMEM: then they come as they are written


class Guard(ctypes.c_ubyte * _MOST_NBYTES):  # type: ignore[misc]  # an array type of ctypes is made at run time
    """What all views of one block keep alive: the exporter of their buffer, weakly referenced by the lease table.

    It claims addresses up to anywhere, so that one type serves all sizes (making a type costs 20 µs); only a slice of
    its buffer is ever seen. It is no memoryview itself for two reasons. A view of a view refers to the first exporter
    and does not keep the one between alive. And where it is made to (by a PickleBuffer between them), CPython 3.11
    crashes when the collector finds both in a garbage cycle.

    Attributes:
        mapping: keeps the arena mapped.
    """

    __slots__ = ("mapping",)

    mapping: object

    __hash__ = object.__hash__  # by identity, as they are compared; ctypes gives its arrays none


def view_of(guard: Guard, nbytes: int) -> memoryview:
    """A writable view of format 'B' of the block that the guard stands for."""
    return memoryview(guard).cast("B")[:nbytes]


class Arena:
    """Shared memory that one process owns and its peers map.

    Attributes:
        id: a random number that names the arena in every process.
        fd: the memfd, to be sent to peers; owned, -1 once closed.
        nbytes: its size, a multiple of a page.
        address: where it lies in this process.
        memory: a view of all of it; slices of it keep the mapping alive. None once closed.
    """

    __slots__ = ("__weakref__", "address", "fd", "id", "memory", "nbytes")

    def __init__(self, id: int, fd: int, nbytes: int) -> None:
        self.id = id
        self.nbytes = nbytes
        self.memory: memoryview | None
        self.memory, self.address = map_memfd(fd, nbytes)
        self.fd = fd

    @classmethod
    def create(cls, nbytes: int) -> Arena:
        """A new arena of ``nbytes``, rounded up to pages; of half, a quarter, ... of it where limits are low.

        Raises:
            PlatformError: not even 64 MiB could be had (or ``nbytes``, if that is less).
        """
        wanted = min(-(-nbytes // PAGE_NBYTES) * PAGE_NBYTES, _MOST_NBYTES)
        while True:
            try:
                return cls._create(wanted)
            except OSError as error:  # RLIMIT_AS, RLIMIT_FSIZE, or the address space is full
                if wanted <= _LEAST_NBYTES:
                    raise PlatformError(
                        f"cannot make an arena of {wanted} bytes of shared memory ({error}); raise the limits of"
                        " address space (ulimit -v) and file size (ulimit -f)"
                    ) from error
            wanted = max(wanted // 2 // PAGE_NBYTES * PAGE_NBYTES, _LEAST_NBYTES)

    @classmethod
    def _create(cls, nbytes: int) -> Arena:
        fd = create_memfd("tpool", nbytes)
        try:
            return cls(secrets.randbits(64), fd, nbytes)
        except OSError:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, id: int) -> Arena:
        """Map the arena behind ``fd``, which is taken over (and closed if this fails).

        Raises:
            ProtocolError: it is no shared memory of a pool.
            PlatformError: the address space has no room for it.
        """
        try:
            os.set_inheritable(fd, False)
            return cls(id, fd, memfd_nbytes(fd))
        except OSError as error:
            os.close(fd)
            raise PlatformError(f"cannot map an arena of this pool: {error}") from error
        except ProtocolError:
            os.close(fd)
            raise

    def guard(self, offset: int) -> Guard:
        """A new guard for the block that starts at this offset, which is not checked.

        Raises:
            ValueError: the arena was closed.
        """
        if self.memory is None:
            raise ValueError("the arena was closed")
        guard: Guard = Guard.from_address(self.address + offset)
        guard.mapping = self.memory.obj
        return guard

    def view(self, offset: int, nbytes: int) -> memoryview:
        """A writable view of format 'B' of a part, which keeps the mapping alive.

        Raises:
            ProtocolError: it is not within the arena.
            ValueError: the arena was closed.
        """
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ProtocolError(f"{nbytes} bytes at {offset} do not lie within an arena of {self.nbytes} bytes")
        if self.memory is None:
            raise ValueError("the arena was closed")
        return self.memory[offset : offset + nbytes]

    def discard(self, offset: int, nbytes: int) -> None:
        """Give the pages wholly inside back to the system; they read as zeros afterwards, in every process.

        Raises:
            PlatformError: the system cannot do that.
        """
        start = -(-offset // PAGE_NBYTES) * PAGE_NBYTES
        end = (offset + nbytes) // PAGE_NBYTES * PAGE_NBYTES
        if start < end and self.memory is not None:
            discard_pages(self.address + start, end - start)

    def find_pages(self, start: int, end: int) -> list[tuple[int, int]]:
        """Where there is memory between two offsets: ranges of whole pages, in order."""
        ranges: list[tuple[int, int]] = []
        position, end = -(-start // PAGE_NBYTES) * PAGE_NBYTES, end // PAGE_NBYTES * PAGE_NBYTES
        while position < end:
            try:
                first = os.lseek(self.fd, position, os.SEEK_DATA)
                position = min(os.lseek(self.fd, first, os.SEEK_HOLE), end)
            except OSError:  # ENXIO: no data from here on; EINVAL: this system cannot tell; EBADF: it was closed
                break
            if first < end:
                ranges.append((first, position))
        return ranges

    def close(self) -> None:
        """Close the descriptor; the mapping goes when the last view has died, so views stay valid."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            self.memory = None
            os.close(fd)
