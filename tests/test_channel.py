"""The channel: frames arrive whole, in order and with their descriptors, whatever the socket does."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpool.errors import ProtocolError
from tpool.local.channel import HEADER, MAGIC, MAX_BODY_NBYTES, Channel, channel_pair


def make_pair() -> tuple[Channel, Channel]:
    ours, theirs = channel_pair()
    return Channel(ours), Channel(theirs)


@contextlib.contextmanager
def pair():
    ours, theirs = make_pair()
    try:
        yield ours, theirs
    finally:
        ours.close()
        theirs.close()


def receive(channel: Channel, count: int) -> list:
    frames = []
    while len(frames) < count:
        with contextlib.suppress(BlockingIOError):
            frames += channel.receive()
    return frames


bodies = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=300)), min_size=1, max_size=20)


@settings(deadline=None)
@given(bodies, st.lists(st.integers(1, 40), min_size=1))
def test_short_writes_and_reads_change_nothing(frames, steps):
    """The bytes of some frames, cut anywhere, give the same frames."""
    stream = b"".join(HEADER.pack(len(body), 0, kind, MAGIC) + body for kind, body in frames)
    writer, reader = socket.socketpair()
    channel = Channel(reader)
    got = []
    with writer, contextlib.closing(channel):
        position = 0
        for step in itertools.cycle(steps):
            writer.sendall(stream[position : position + step])
            position += step
            got += [(frame.kind, frame.body) for frame in channel.receive()]
            if position >= len(stream):
                break
    assert got == frames


@settings(deadline=None)
@given(bodies)
def test_frames_put_together_arrive_one_by_one(frames):
    with pair() as (ours, theirs):
        for kind, body in frames:
            ours.put(kind, body)
        assert ours.backlogged
        assert ours.flush()
        assert not ours.backlogged
        assert [(frame.kind, frame.body) for frame in receive(theirs, len(frames))] == frames


def identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


@pytest.mark.parametrize("count", [0, 1, 253, 254, 600])
def test_descriptors_arrive_in_order(count):
    with pair() as (ours, theirs):
        fds = [os.memfd_create(f"test-{number}") for number in range(count)]
        expected = [identity(fd) for fd in fds]
        ours.put(1, b"before")
        ours.put(2, b"with descriptors", tuple(fds))
        ours.put(3, b"after")
        assert ours.flush()
        for fd in fds:
            os.close(fd)
        frames = receive(theirs, 3)
        assert [(frame.kind, frame.body) for frame in frames] == [
            (1, b"before"),
            (2, b"with descriptors"),
            (3, b"after"),
        ]
        assert [identity(fd) for fd in frames[1].fds] == expected
        assert not frames[0].fds
        assert not frames[2].fds
        assert all(not os.get_inheritable(fd) for fd in frames[1].fds)
        for frame in frames:
            frame.close_fds()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 400_000)), min_size=1, max_size=8))
def test_a_non_blocking_end_waits_for_the_socket_and_loses_nothing(plan):
    """Frames larger than the socket's buffer, some with descriptors, written as the reader makes room."""
    with pair() as (ours, theirs):
        expected = []
        owned = []
        for number, (fd_count, nbytes) in enumerate(plan):
            fds = tuple(os.memfd_create("test") for _ in range(fd_count))
            owned += fds
            body = os.urandom(nbytes)
            ours.put(number, body, fds)
            expected.append((number, body, [identity(fd) for fd in fds]))
        got = []
        while len(got) < len(plan):
            done = ours.flush()
            assert done is not ours.backlogged
            for frame in theirs.receive():
                got.append((frame.kind, frame.body, [identity(fd) for fd in frame.fds]))
                frame.close_fds()
        for fd in owned:
            os.close(fd)
        assert got == expected


def test_a_blocking_end_writes_everything():
    with pair() as (ours, theirs):
        body = os.urandom(3_000_000)
        writer = threading.Thread(target=lambda: (theirs.put(7, body), theirs.flush()))
        writer.start()
        (frame,) = receive(ours, 1)
        writer.join()
        assert frame.body == body
        assert not theirs.backlogged


def test_nothing_to_read():
    with pair() as (ours, _), pytest.raises(BlockingIOError):
        ours.receive()


def test_end_of_file_between_frames_and_in_the_middle():
    with pair() as (ours, theirs):
        theirs.put(1, b"whole")
        theirs.flush()
        theirs.close()
        assert [frame.body for frame in ours.receive()] == [b"whole"]
        with pytest.raises(EOFError):
            ours.receive()
    writer, reader = socket.socketpair()
    channel = Channel(reader)
    fd = os.memfd_create("test")
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
    writer.sendmsg([HEADER.pack(100, 1, 1, MAGIC) + b"cut off"], rights)
    os.close(fd)
    writer.close()
    assert channel.receive() == []
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(EOFError):
        channel.receive()
    channel.close()
    assert len(os.listdir("/proc/self/fd")) == before - 2  # the socket, and the descriptor nobody took


def test_the_other_end_is_gone():
    with pair() as (ours, theirs):
        theirs.close()
        ours.put(1, b"to nobody")
        with pytest.raises(BrokenPipeError):
            ours.flush()


@settings(deadline=None)
@given(st.binary(min_size=HEADER.size, max_size=200))
def test_garbage_is_refused(garbage):
    """Bytes that are no frame raise or wait for more; they never come out as a frame unless they are one."""
    writer, reader = socket.socketpair()
    channel = Channel(reader)
    with writer, contextlib.closing(channel):
        writer.sendall(garbage)
        nbytes, fd_count, kind, magic = HEADER.unpack_from(garbage)
        try:
            frames = channel.receive()
        except ProtocolError:
            pass
        else:
            assert magic == MAGIC
            assert nbytes <= MAX_BODY_NBYTES
            for frame in frames[:1]:
                assert (frame.kind, len(frame.body), fd_count) == (kind, nbytes, 0)


def test_a_frame_that_is_too_large_is_refused_by_the_sender():
    class Huge(bytes):
        def __len__(self):
            return MAX_BODY_NBYTES + 1

    with pair() as (ours, _), pytest.raises(ProtocolError, match="limit"):
        ours.put(1, Huge())
