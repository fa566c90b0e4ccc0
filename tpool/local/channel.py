"""Pipe-backed queue: framed messages, with file descriptors, over one end of a stream socketpair.

A frame on the wire is a header of eight bytes and a body::

    | body_nbytes u32 | fd_count u16 | kind u8 | magic u8 | body ... |

Descriptors ride as ``SCM_RIGHTS`` on the first bytes of their frame; the kernel takes at most 253 at once
(``SCM_MAX_FD``), so a frame with more is written in several calls, each with its share. They arrive in order, so
the receiver keeps one queue of descriptors and each complete frame takes its own from the front.

Frames are written whole into a backlog and flushed as far as the socket takes them: on a blocking socket (the
worker's side) that is always all; on a non-blocking one (the parent's side) ``backlogged`` says that the rest waits
for the socket to become writable. A channel belongs to one thread at a time.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from dataclasses import dataclass

from tpool.errors import ProtocolError

HEADER = struct.Struct("<IHBB")
MAGIC = 0x74
# Linux: SCM_MAX_FD, include/net/scm.h. 254 is EINVAL.
MAX_FDS_PER_WRITE = 253
# A frame carries handles, not bytes: 100,000 blocks are 2.4 MB. Beyond this it is garbage, not a frame.
MAX_BODY_NBYTES = 1 << 28
# Larger reads save calls when results pour in; each one costs an allocation of this size that is mostly given back.
READ_NBYTES = 1 << 16
# Linux: IOV_MAX. More parts than this cannot be written in one call.
MAX_PARTS_PER_WRITE = 1024
# As numbers: the socket module's are enums, whose arithmetic costs a microsecond per read.
_MSG_CMSG_CLOEXEC, _MSG_CTRUNC = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_CTRUNC)
_MSG_NOSIGNAL = int(socket.MSG_NOSIGNAL)
_ANCILLARY_NBYTES = socket.CMSG_SPACE(MAX_FDS_PER_WRITE * 4)


@dataclass(slots=True, eq=False)
class Frame:
    """One message as it was read; whoever takes it owns its descriptors."""

    kind: int
    body: bytes
    fds: list[int]

    def close_fds(self) -> None:
        """Close the descriptors that nobody took."""
        while self.fds:
            os.close(self.fds.pop())


class Channel:
    """One end of a socketpair, speaking frames.

    Args:
        sock: a connected ``AF_UNIX`` stream socket; the channel owns it.

    Invariants: ``_backlog`` holds parts in the order they must be written and no empty ones; ``_pending_fds``
    belongs to the first part of the backlog that has not been touched yet.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._backlog: deque[tuple[bytes | memoryview, tuple[int, ...]]] = deque()
        self._chunks: list[bytes] = []
        self._have_nbytes = 0
        self._need_nbytes = HEADER.size
        self._received_fds: deque[int] = deque()

    def fileno(self) -> int:
        """The socket's descriptor, for polling."""
        return self._sock.fileno()

    @property
    def backlogged(self) -> bool:
        """Whether something waits to be written."""
        return bool(self._backlog)

    # Writing ------------------------------------------------------------------------------------------------------

    def put(self, kind: int, body: bytes, fds: tuple[int, ...] = ()) -> None:
        """Add a frame to the backlog without writing it.

        The descriptors stay the caller's and must stay open until the frame is flushed.
        """
        if len(body) > MAX_BODY_NBYTES:
            raise ProtocolError(f"a frame of {len(body)} bytes is over the limit of {MAX_BODY_NBYTES}")
        head = HEADER.pack(len(body), len(fds), kind, MAGIC)
        if not fds:
            self._backlog.append((head + body, ()))
            return
        self._put_with_fds(head + body, fds)

    def _put_with_fds(self, frame: bytes, fds: tuple[int, ...]) -> None:
        # Each write with descriptors needs at least one byte of its own to ride on, and the header has eight.
        writes = -(-len(fds) // MAX_FDS_PER_WRITE)
        if writes > len(frame):
            raise ProtocolError(f"{len(fds)} descriptors do not fit a frame of {len(frame)} bytes")
        for i in range(writes - 1):
            share = fds[i * MAX_FDS_PER_WRITE : (i + 1) * MAX_FDS_PER_WRITE]
            self._backlog.append((frame[i : i + 1], share))
        self._backlog.append((frame[writes - 1 :], fds[(writes - 1) * MAX_FDS_PER_WRITE :]))

    def flush(self) -> bool:
        """Write the backlog as far as the socket takes it.

        Returns:
            True when nothing is left.

        Raises:
            OSError: the other end is gone (``BrokenPipeError``, ``ConnectionResetError``).
        """
        backlog = self._backlog
        while backlog:
            parts, fds = self._next_write()
            try:
                written = self._send(parts, fds)
            except BlockingIOError:
                return False
            self._drop_written(written)
        return True

    def _next_write(self) -> tuple[list[bytes | memoryview], tuple[int, ...]]:
        """The parts that may go out together: descriptors only on the first of them."""
        backlog = self._backlog
        first, fds = backlog[0]
        if fds or len(backlog) == 1:
            return [first], fds
        parts: list[bytes | memoryview] = []
        for part, part_fds in backlog:
            if part_fds or len(parts) == MAX_PARTS_PER_WRITE:
                break
            parts.append(part)
        return parts, ()

    def _send(self, parts: list[bytes | memoryview], fds: tuple[int, ...]) -> int:
        if fds:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))
            return self._sock.sendmsg(parts, [rights], _MSG_NOSIGNAL)
        if len(parts) == 1:
            return self._sock.send(parts[0], _MSG_NOSIGNAL)
        return self._sock.sendmsg(parts, (), _MSG_NOSIGNAL)

    def _drop_written(self, nbytes: int) -> None:
        backlog = self._backlog
        while nbytes:
            part, _ = backlog[0]
            if nbytes < len(part):
                # The descriptors went with the first byte; the rest of the part travels without them.
                backlog[0] = (memoryview(part)[nbytes:], ())
                return
            nbytes -= len(part)
            backlog.popleft()

    # Reading ------------------------------------------------------------------------------------------------------

    def receive(self) -> list[Frame]:
        """Read once and return the frames that are complete now, possibly none.

        Blocks for the first byte on a blocking socket.

        Raises:
            BlockingIOError: nothing to read on a non-blocking socket.
            EOFError: the other end was closed; a frame cut off in the middle is dropped with its descriptors.
            ProtocolError: the bytes are not frames.
            OSError: the connection broke.
        """
        chunk, ancillary, flags, _ = self._sock.recvmsg(READ_NBYTES, _ANCILLARY_NBYTES, _MSG_CMSG_CLOEXEC)
        if ancillary:
            self._take_fds(ancillary)
        if flags & _MSG_CTRUNC:
            raise ProtocolError("file descriptors were lost on the way: this process is at its descriptor limit")
        if not chunk:
            raise EOFError("the channel was closed by the other end")
        self._have_nbytes += len(chunk)
        if self._chunks or self._have_nbytes < self._need_nbytes:
            # A frame larger than one read: join once when it is complete, not at each piece.
            self._chunks.append(chunk)
            if self._have_nbytes < self._need_nbytes:
                return []
            chunk = b"".join(self._chunks)
            self._chunks.clear()
        return self._split(chunk)

    def _take_fds(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                usable = len(data) - len(data) % 4
                self._received_fds.extend(struct.unpack(f"{usable // 4}i", data[:usable]))

    def _split(self, data: bytes) -> list[Frame]:
        frames = []
        position, end = 0, len(data)
        need = HEADER.size
        while end - position >= HEADER.size:
            body_nbytes, fd_count, kind, magic = HEADER.unpack_from(data, position)
            if magic != MAGIC or body_nbytes > MAX_BODY_NBYTES:
                raise ProtocolError("the bytes on the channel are not a frame")
            need = HEADER.size + body_nbytes
            if end - position < need:
                break
            if fd_count > len(self._received_fds):
                raise ProtocolError(f"a frame claims {fd_count} descriptors, {len(self._received_fds)} arrived")
            fds = [self._received_fds.popleft() for _ in range(fd_count)] if fd_count else []
            frames.append(Frame(kind, data[position + HEADER.size : position + need], fds))
            position += need
            need = HEADER.size
        self._have_nbytes = end - position
        self._need_nbytes = need
        if position < end:
            self._chunks.append(data[position:])
        return frames

    def close(self) -> None:
        """Close the socket and every descriptor that arrived but was not taken."""
        while self._received_fds:
            os.close(self._received_fds.popleft())
        self._backlog.clear()
        self._sock.close()


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected stream sockets, close-on-exec: (the parent's, non-blocking; the worker's, blocking)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    return ours, theirs


def connection() -> tuple[socket.socket, socket.socket, int]:
    """What joins a parent and a worker: a ``channel_pair``, and a semaphore of claims (an eventfd), non-blocking.

    Raises:
        OSError: this process is at its limit of descriptors; nothing is left open.
    """
    ours, theirs = channel_pair()
    try:
        return ours, theirs, os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    except OSError:
        ours.close()
        theirs.close()
        raise
