"""Private memory for what lies in Ray's object store, whose bytes many processes share and nobody may change.

A torch tensor does not know read-only memory: a write into a tensor on a buffer of the store would change the object
for everybody (the mapping is writable, so there is not even a crash). So what arrives gets memory of its own:

- small buffers are copied;
- of large ones the pages are mapped once more, privately: reading costs nothing, and the kernel copies a page when it
  is first written. The file behind the store has no name; it is found among the descriptors of the raylet, by inode.
  Where that is not to be had (another user's raylet, no /proc), they are copied, too.

A private page that was not written shows the store's own, so the object must stay there: each mapping holds the buffer
it came from. Held objects cannot be spilled to disk, hence a budget, beyond which is copied.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pickle
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

__all__ = ["MAPPED_NBYTES", "PrivateMemory"]

MAPPED_NBYTES = 512 * 1024
"""A shorter buffer is copied: below, a mapping (20 us, and a fault for each 16 pages that are read) costs as much as
copying into memory that is warm."""

_PROT = mmap.PROT_READ | mmap.PROT_WRITE
_FLAGS = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
_FAILED = ctypes.c_void_p(-1).value


@dataclass(slots=True)
class _StoreFile:
    """The store's memory as this process has it mapped.

    Attributes:
        start, end: addresses.
        offset: of ``start`` in the file.
        fd: to that file, for reading; owned.
    """

    start: int
    end: int
    offset: int
    fd: int


class PrivateMemory:
    """Gives private, writable views of the store's buffers. Any thread may call.

    Args:
        budget_nbytes: how much may be mapped at a time.
    """

    def __init__(self, budget_nbytes: int) -> None:
        self._budget_nbytes = budget_nbytes
        self._libc = _libc()
        self._lock = threading.Lock()
        self._files: list[_StoreFile] = []
        self._searched: set[int] = set()  # mappings (by start) that were looked for, found or not
        self.mapped_nbytes = 0

    def view(self, buffer: Any) -> memoryview:
        """The bytes of a buffer, for the receiver alone."""
        shared = memoryview(buffer).cast("B")
        if shared.nbytes >= MAPPED_NBYTES and self.mapped_nbytes + shared.nbytes <= self._budget_nbytes:
            mapped = self._map(shared)
            if mapped is not None:
                return mapped
        return memoryview(bytearray(shared))

    def close(self) -> None:
        """Map nothing more; what is mapped stays as long as it is used."""
        with self._lock:
            self._budget_nbytes = 0
            files, self._files = self._files, []
            for file in files:
                os.close(file.fd)

    def _map(self, shared: memoryview) -> memoryview | None:
        address = _address_of(shared)
        with self._lock:
            file = self._file_at(address)
            if file is None:
                return None
            offset = file.offset + address - file.start
            skip = offset % mmap.PAGESIZE
            length = skip + shared.nbytes
            start = self._libc.mmap(None, length, _PROT, _FLAGS, file.fd, offset - skip)
        if start == _FAILED:
            return None
        array = (ctypes.c_ubyte * shared.nbytes).from_address(start + skip)
        self.mapped_nbytes += length
        # The finalizer holds the store's buffer: it is let go after the pages are.
        weakref.finalize(array, self._unmap, start, length, shared).atexit = False
        return pickle.PickleBuffer(array).raw()  # of format 'B', which memoryview(array) is not

    def _unmap(self, start: int, length: int, shared: memoryview) -> None:
        self._libc.munmap(start, length)
        self.mapped_nbytes -= length
        shared.release()

    def _file_at(self, address: int) -> _StoreFile | None:
        for file in self._files:
            if file.start <= address < file.end:
                return file
        for start, end, offset, device, inode in _mappings():
            if start <= address < end and start not in self._searched:
                self._searched.add(start)
                fd = _open_inode(device, inode, _raylets())
                if fd is not None:
                    self._files.append(_StoreFile(start, end, offset, fd))
                    return self._files[-1]
        return None


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


class _Buffer(ctypes.Structure):
    """``Py_buffer``, as far as it matters: ctypes itself gives addresses of writable memory alone."""

    _fields_: ClassVar = [("address", ctypes.c_void_p), ("rest", ctypes.c_byte * 256)]


def _address_of(view: memoryview) -> int:
    found = _Buffer()
    api = ctypes.pythonapi
    api.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(found), 0)
    address = int(found.address)
    api.PyBuffer_Release(ctypes.byref(found))
    return address


# Where the store's memory comes from --------------------------------------------------------------------------------


def _mappings() -> Iterator[tuple[int, int, int, int, int]]:
    """(start, end, offset, device, inode) of each mapping of this process that may be the store's."""
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and b"plasma" in fields[5] and fields[1][3:4] == b"s":
                start, end = (int(number, 16) for number in fields[0].split(b"-"))
                major, minor = (int(number, 16) for number in fields[3].split(b":"))
                yield start, end, int(fields[2], 16), os.makedev(major, minor), int(fields[4])


def _raylets() -> Iterator[int]:
    """Processes that may have the store's file open: our parent, if we are a worker of Ray's; then all raylets."""
    yield os.getppid()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it is gone
                if (entry / "comm").read_bytes() == b"raylet\n":
                    yield int(entry.name)


def _open_inode(device: int, inode: int, pids: Iterable[int]) -> int | None:
    """A descriptor of our own for a file that one of these processes has open."""
    for pid in pids:
        with contextlib.suppress(OSError):  # gone, or another user's
            for name in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{name}"
                with contextlib.suppress(OSError):  # closed since
                    status = os.stat(path)
                    if (status.st_dev, status.st_ino) == (device, inode):
                        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return None
