from __future__ import annotations

import os
import signal
import struct
from collections import deque
from collections.abc import Iterator

import pool_tasks as tasks
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import tpool
from tpool.errors import ProtocolError
from tpool.local import outbox as module
from tpool.local.outbox import MAX_DATA_NBYTES, RING_NBYTES, Outbox, Outboxes


@pytest.fixture
def ends() -> Iterator[tuple[Outbox, Outbox]]:
    outboxes = Outboxes.create(2)
    yield outboxes.outbox(1), outboxes.outbox(1)
    outboxes.close()


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.sampled_from([-(1 << 63), (1 << 63) - 1, 0, 1]),
    st.floats(allow_nan=False),
)


class OutboxMachine(RuleBasedStateMachine):
    """A worker that answers through its outbox and by socket, and a parent that hears of both in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.outboxes = Outboxes.create(1)
        self.worker, self.parent = self.outboxes.outbox(0), self.outboxes.outbox(0)
        self.socket: deque[tuple[int, int]] = deque()  # number of the result, entries before it
        self.values: dict[int, tuple[object]] = {}
        self.next = 0
        self.expected = 0

    def teardown(self) -> None:
        while self.socket:
            self.hear_a_reply()
        self.look()
        assert self.expected == self.next  # everything arrived
        self.outboxes.close()

    @rule(nbytes=st.integers(0, MAX_DATA_NBYTES + 1), count=st.integers(1, 100))
    def answer(self, nbytes: int, count: int) -> None:
        for _ in range(count):
            data = struct.pack("<Q", self.next) + bytes(nbytes)
            if not self.worker.put(7, self.next, 0.5, data):
                self.reply()
            else:
                self.next += 1

    @rule(values=st.lists(VALUES, min_size=1, max_size=100))
    def answer_with_values(self, values: list[object]) -> None:
        for value in values:
            if not self.worker.put_value(7, self.next, 0.5, value):
                self.reply()
            else:
                self.values[self.next] = (value,)
                self.next += 1

    @rule(value=VALUES, count=st.integers(1, 100))
    def answer_alike(self, value: object, count: int) -> None:
        self.answer_with_values([value] * count)

    @rule()
    def reply(self) -> None:
        self.socket.append((self.next, self.worker.entries))
        self.worker.replies += 1
        self.next += 1

    @rule()
    def look(self) -> None:
        self.check(self.parent.take())

    @precondition(lambda self: self.socket)
    @rule()
    def hear_a_reply(self) -> None:
        number, before = self.socket.popleft()
        self.check(self.parent.take(before))
        assert self.parent.entries == before
        assert number == self.expected  # nothing overtook it, and it nothing
        self.parent.replies += 1
        self.expected += 1

    def check(self, runs: list[module.Run]) -> None:
        for job, first, results, times, are_values in runs:
            assert (job, first, list(times)) == (7, self.expected, [0.5] * len(results))
            for result in results:
                expected = self.values.pop(self.expected, None)
                assert are_values == (expected is not None)
                if expected is None:
                    assert result[:8] == struct.pack("<Q", self.expected)
                else:
                    assert (type(result), result) == (type(expected[0]), expected[0])
                self.expected += 1

    @invariant()
    def what_is_left_is_seen(self) -> None:
        assert self.parent.has_entries == (self.parent.entries != self.worker.entries)


TestOutbox = OutboxMachine.TestCase
TestOutbox.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_full_outbox_takes_no_more_until_some_was_taken(ends: tuple[Outbox, Outbox]) -> None:
    worker, parent = ends
    while worker.put(1, worker.entries, 0.0, bytes(100)):
        pass
    assert worker.entries == RING_NBYTES // (32 + 104)
    ((_, _, streams, _, _),) = parent.take()
    assert len(streams) == worker.entries
    assert worker.put(1, worker.entries, 0.0, bytes(100))


def test_large_results_are_not_for_it(ends: tuple[Outbox, Outbox]) -> None:
    worker, parent = ends
    assert not worker.put(1, 0, 0.0, bytes(MAX_DATA_NBYTES + 1))
    assert not parent.has_entries


def test_the_bell_rings_once(ends: tuple[Outbox, Outbox]) -> None:
    worker, parent = ends
    assert not worker.take_bell()
    parent.ask_for_bell()
    assert worker.take_bell()
    assert not worker.take_bell()


def test_the_next_worker_begins_anew(ends: tuple[Outbox, Outbox]) -> None:
    worker, parent = ends
    worker.put(1, 0, 0.0, b"old")
    parent.ask_for_bell()
    parent.clear()
    assert not parent.has_entries
    assert not worker.take_bell()


def test_outboxes_do_not_overlap() -> None:
    outboxes = Outboxes.create(3)
    writers = [outboxes.outbox(slot) for slot in range(3)]
    for slot, writer in enumerate(writers):
        while writer.put(slot, 0, 0.0, bytes([slot]) * 1000):
            pass
    for slot in range(3):
        taken = outboxes.outbox(slot).take()
        assert taken
        assert all(job == slot and streams == [bytes([slot]) * 1000] for job, _, streams, _, _ in taken)
    outboxes.close()


@pytest.mark.parametrize(
    "vandal",
    [
        lambda words, ring: words.__setitem__(0, 1 << 60),  # more entries than there is room for
        lambda words, ring: ring.__setitem__(slice(28, 32), b"\xff" * 4),  # an entry larger than the ring
    ],
)
def test_garbage_is_no_entry(ends: tuple[Outbox, Outbox], vandal: object) -> None:
    worker, parent = ends
    worker.put(1, 0, 0.0, b"data")
    vandal(worker._words, worker._ring)  # type: ignore[operator]
    with pytest.raises(ProtocolError):
        parent.take()


def test_more_entries_than_there_are_were_not_left(ends: tuple[Outbox, Outbox]) -> None:
    with pytest.raises(ProtocolError, match="speaks of 1"):
        ends[1].take(1)


# Through a pool ----------------------------------------------------------------------------------------------------


def die_at(item: tuple[int, int]) -> int:
    index, fatal = item
    if index == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return index


@pytest.mark.parametrize("fatal", [300, 301, 377, 555])
def test_what_was_left_before_a_crash_arrives_and_one_task_is_lost(fatal: int) -> None:
    outcomes: dict[int, str] = {}
    with tpool.Pool(1) as pool:
        results = pool.imap(die_at, [(index, fatal) for index in range(1000)])
        for index in range(1000):
            try:
                assert next(results) == index
                outcomes[index] = "result"
            except tpool.WorkerLostError:
                outcomes[index] = "lost"
    assert [index for index, outcome in outcomes.items() if outcome == "lost"] == [fatal]


def test_a_result_does_not_wait_for_the_long_task_behind_it(tmp_path: object) -> None:
    path = f"{tmp_path}/go"
    os.mkfifo(path)
    with tpool.Pool(1) as pool:
        # Microsecond tasks, so that many are sent ahead; then one that blocks until its result was seen.
        results = pool.imap_unordered(tasks.open_if_path, [*range(2000), path, *range(2000, 2050)])
        seen = [next(results) for _ in range(2000)]
        assert seen == list(range(2000))
        with open(path, "w"):
            assert next(results) == path
        assert list(results) == list(range(2000, 2050))
