from __future__ import annotations

import os
import signal
import struct
from collections import deque
from collections.abc import Iterator

import pool_tasks as tasks
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support import wait_until

import tpool
from tpool.errors import ProtocolError
from tpool.local import outbox as module
from tpool.local.answers import LocalResult
from tpool.local.member import Member
from tpool.local.outbox import MAX_DATA_NBYTES, RING_NBYTES, Form, Outbox, Outboxes
from tpool.local.poller import Poller
from tpool.tensors import leases


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
        self.payloads: set[int] = set()
        self.next = 0
        self.expected = 0

    def teardown(self) -> None:
        while self.socket:
            self.hear_a_reply()
        self.look()
        assert self.expected == self.next  # everything arrived
        self.outboxes.close()

    @rule(nbytes=st.integers(0, MAX_DATA_NBYTES + 1), count=st.integers(1, 100), handles=st.booleans())
    def answer(self, nbytes: int, count: int, handles: bool) -> None:
        for _ in range(count):
            data = struct.pack("<Q", self.next) + bytes(nbytes)
            if handles:
                self.answer_with_handles(data)
            elif not self.worker.put(7, self.next, 0.5, data):
                self.reply()
            else:
                self.next += 1

    def answer_with_handles(self, data: bytes) -> None:
        """As a worker does, which begins leases in between."""
        if not self.worker.has_room(data):
            self.reply()
            return
        assert self.worker.put(7, self.next, 0.5, data, handles=True), "there was no room, after all"
        self.payloads.add(self.next)
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
        for job, first, results, times, form in runs:
            assert (job, first, list(times)) == (7, self.expected, [0.5] * len(results))
            for result in results:
                expected = self.values.pop(self.expected, None)
                assert (form is Form.VALUE) == (expected is not None)
                assert (form is Form.PAYLOAD) == (self.expected in self.payloads)
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


def tensor_or_die(item: tuple[int, int]) -> torch.Tensor:
    return torch.full((20,), die_at(item))


@pytest.fixture
def left_by_handle(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The payloads with handles that came by outbox."""
    seen: list[bytes] = []
    receive = Member._receive_left

    def noted(self: Member, body: bytes, seconds: float) -> LocalResult:
        seen.append(body)
        return receive(self, body, seconds)

    monkeypatch.setattr(Member, "_receive_left", noted)
    return seen


@pytest.mark.parametrize("fatal", [300, 377, 555])
def test_tensors_that_were_left_before_a_crash_arrive_too(fatal: int, left_by_handle: list[bytes]) -> None:
    for _ in until_many(left_by_handle):
        lost = []
        with tpool.Pool(1) as pool:
            results = pool.imap(tensor_or_die, [(index, fatal) for index in range(1000)])
            for index in range(1000):
                try:
                    assert torch.equal(next(results), torch.full((20,), index))
                except tpool.WorkerLostError:
                    lost.append(index)
        assert lost == [fatal]


def test_the_memory_of_tensors_that_were_left_is_given_back(left_by_handle: list[bytes]) -> None:
    with tpool.Pool(2) as pool:
        for _ in until_many(left_by_handle):
            kept = list(pool.imap_unordered(tasks.make_tensor, range(1500)))
            assert sorted(int(tensor[0]) for tensor in kept) == list(range(1500))
        del kept[5:]
        wait_until(lambda: in_use(pool) == len(kept), 30, "the others are given back")
        assert all(bool((tensor == tensor[0]).all()) for tensor in kept)
        kept.clear()
        wait_until(lambda: in_use(pool) == 0, 30, "all are given back")


nested: list[tpool.Pool] = []


def open_nested() -> None:
    nested.append(tpool.Pool(1))
    nested[0].apply(tasks.identity, (1,))


def close_nested() -> None:
    with nested.pop() as pool:
        pool.close()
        pool.join()


def tensor_or_nested(index: int) -> torch.Tensor:
    return nested[0].apply(tasks.make_tensor, (index,)) if index == 400 else torch.full((20,), float(index))


def test_a_nested_pools_memory_outlives_what_was_left_before_it(
    left_by_handle: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its arena comes right before the result that needs it; only then what lies in the outbox is taken, here."""
    monkeypatch.setattr(Poller, "take_outboxes", lambda self, events, give_up: None)
    with tpool.Pool(1, open_nested, worker_exit=close_nested) as pool:
        for _ in until_many(left_by_handle):
            for index, tensor in enumerate(pool.imap(tensor_or_nested, range(500))):
                assert float(tensor[0]) == index
        del tensor
        pool.close()
        pool.join()


def until_many(left: list[bytes]) -> Iterator[int]:
    """Again and again until many results were left: on a busy machine tasks may be too slow to be sent ahead."""
    for attempt in range(10):
        yield attempt
        if len(left) > 300:
            return
    pytest.fail(f"of thousands of results only {len(left)} were left")


def in_use(pool: tpool.Pool) -> int:
    """How many blocks of its workers' arenas live in this process."""
    table = leases.table()
    table.collect()
    return sum(len(table._mapped[arena.id].offsets) for arena in pool._engine._memory._slots)


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
