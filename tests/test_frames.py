"""Frames that nobody of ours would write: they never come out as something else, and end only their worker."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import socket

import pool_tasks as tasks
import pytest
from forking import fork
from hypothesis import given, settings
from hypothesis import strategies as st
from support import wait_until

import tpool
from tpool.errors import ProtocolError
from tpool.local import wire
from tpool.local.channel import Frame
from tpool.local.wire import Kind
from tpool.messages import InitializerFailed, TasksFinished

DEADLINE = 30


class Trap:
    """Whoever unpickles this has been tricked."""

    def __reduce__(self):
        return os._exit, (99,)


@pytest.fixture(scope="module")
def pool():
    with tpool.Pool(1) as pool:
        pool.apply_async(tasks.identity, (1,)).get(DEADLINE)
        yield pool


@pytest.fixture
def member(pool):
    (member,) = pool._engine._members.values()
    before = member.held, member.starving, member.token
    yield member
    member.held, member.starving, member.token = before
    member._stop_starving()


HEADS = st.sampled_from(
    [
        wire.RESULT.pack(1, 0, 0.5, 0, 0, 0),
        wire.RESULT.pack(1, 0, 0.5, 1, 4, 0),
        wire.RESULT.pack(1, 0, 0.5, 0, 1 << 31, 1 << 60),
        wire.pack_count(7),
        b"",
    ]
)
PAYLOADS = st.one_of(
    st.binary(max_size=60),
    st.just(wire.pack_payload(pickle.dumps(Trap()))),
    st.builds(
        lambda flags, fds, blocks, nbytes, rest: wire._PAYLOAD.pack(flags, fds, blocks, nbytes) + rest,
        st.integers(0, 255),
        st.integers(0, 3),
        st.sampled_from([0, 1, 2, 1 << 31]),
        st.sampled_from([0, 1, 8, 1 << 31]),
        st.binary(max_size=100),
    ),
)


@settings(deadline=None, max_examples=300)
@given(kind=st.integers(0, 40), head=HEADS, payload=PAYLOADS)
def test_the_parent_refuses_what_a_worker_cannot_say(pool, kind, head, payload):
    (member,) = pool._engine._members.values()
    before = member.held, member.token
    if kind == Kind.ARENA:
        return  # needs a descriptor, which whoever writes garbage does not send; see below
    events = []
    try:
        member.understand([Frame(kind, head + payload, [])], events)
    except ProtocolError:
        pass
    else:
        for event in events:  # a result or an error was understood, and nothing was unpickled
            if isinstance(event, TasksFinished):
                event.results[0][2].discard()
            elif isinstance(event, InitializerFailed):
                event.error.discard()
    finally:
        member.held, member.token = before
        member.outbox.replies = 1  # the one result that there was
        member._unsettled = 0
        member._stop_starving()


def test_a_frame_without_its_descriptor_is_refused(member):
    with pytest.raises(ProtocolError):
        member.understand([Frame(Kind.ARENA, wire.pack_id(7), [])], [])


def test_a_block_outside_its_arena_is_refused(pool, member):
    arena = pool._engine._memory._slots[0]
    for offset, nbytes in [(0, arena.nbytes + 1), (arena.nbytes, 64), (1, 64), (0, 0), (1 << 63, 64)]:
        handle = wire._PAYLOAD.pack(0, 0, 1, 0) + wire._BLOCK.pack(arena.id, offset, nbytes)
        frame = Frame(Kind.RESULT, wire.RESULT.pack(1, 0, 0.5, 0, 0, member.outbox.entries) + handle, [])
        with pytest.raises(ProtocolError):
            member.understand([frame], [])
        member.outbox.replies = 1


def test_a_worker_that_writes_garbage_is_replaced():
    with tpool.Pool(1) as pool:
        pid = pool.apply_async(os.getpid).get(DEADLINE)
        with pytest.raises(tpool.WorkerLostError, match="no message of ours"):
            pool.apply_async(write_garbage).get(DEADLINE)
        assert pool.apply_async(os.getpid).get(DEADLINE) != pid


def write_garbage():
    for fd in range(3, 100):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
            sock.sendall(random.Random(0).randbytes(1000))
    signal.pause()


@pytest.mark.parametrize("seed", range(4))
def test_a_worker_ends_at_garbage(seed):
    """Whatever it reads first; it neither hangs nor runs what it read."""
    from tpool.local.process import worker_main

    ours, theirs = socket.socketpair()
    claims_fd = os.eventfd(0)
    draw = random.Random(seed)

    def child():
        ours.close()
        devnull = os.open(os.devnull, os.O_WRONLY)  # the story that it prints is not this test's
        os.dup2(devnull, 2)
        worker_main(theirs.detach(), claims_fd)

    pid = fork(child)
    theirs.close()
    os.close(claims_fd)
    with ours:
        body = draw.randbytes(draw.randrange(8, 200))
        ours.sendall(draw.choice([body, b"\x04\0\0\0\0\0\x0ct" + pickle.dumps(Trap())]))
        ours.shutdown(socket.SHUT_WR)
        statuses = []
        wait_until(lambda: statuses.append(os.waitpid(pid, os.WNOHANG)) or statuses[-1][0], DEADLINE)
    assert os.waitstatus_to_exitcode(statuses[-1][1]) in (0, 1)
