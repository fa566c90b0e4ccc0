"""The parts of the engine on Ray that need no Ray: what is asked, journals, private memory, parcels."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tpool
from tpool.errors import TransportError, UnsupportedTensorError
from tpool.local.crew import SlotRecord
from tpool.ray import parcels
from tpool.ray.codec import RayCodec
from tpool.ray.journal import CALLS, NBYTES, Address, Journal, Journals, Page
from tpool.ray.member import Member, SentCall
from tpool.ray.private import MAPPED_NBYTES, PrivateMemory
from tpool.ray.tasks import Call, TaskRunner
from tpool.tensors.definitions import Definitions

# What is asked ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"address": 3}, TypeError),
        ({"address": "ray://head:10001"}, ValueError),
        ({"num_cpus": -1}, ValueError),
        ({"num_gpus": True}, TypeError),
        ({"resources": {"tpu": "many"}}, TypeError),
        ({"start_timeout": 0}, ValueError),
        ({"start_timeout": math.inf}, ValueError),
    ],
)
def test_what_cannot_be_asked(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="tpu" if "resources" in arguments else next(iter(arguments))):
        tpool.RayEngine(**arguments)


def test_how_many_workers_fit() -> None:
    total = {"CPU": 7.0, "GPU": 2.0}
    assert tpool.RayEngine(num_cpus=2).fits(total) == 3
    assert tpool.RayEngine(num_gpus=0.5).fits(total) == 4
    assert tpool.RayEngine(num_cpus=0).fits(total) == 0
    assert tpool.RayEngine(num_gpus=1, resources={"tpu": 2}).resources_text() == "1 CPU, 1 GPU, 2 tpu"


# Journals -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def journals() -> Iterator[Journals]:
    journals = Journals()
    yield journals
    journals.close()


def test_a_journal_tells_what_was_started_and_what_came_of_it(journals: Journals) -> None:
    address = journals.hand_over(3)
    assert address is not None
    theirs, ours = Journal.attach(address), journals.get(3)
    assert theirs is not None
    assert ours is not None
    assert (ours.call, ours.read(7)) == (0, None)
    theirs.begin(7)
    assert (ours.call, ours.read(7)) == (7, Page(0, []))
    for index in range(3):
        theirs.start()
        theirs.finish(1, index, 0.5, b"x" * index)
    theirs.start()
    written = Page(4, [(1, 0, 0.5, b""), (1, 1, 0.5, b"x"), (1, 2, 0.5, b"xx")])
    assert (ours.call, ours.read(7)) == (7, written)
    theirs.finish(1, 3, 0.5, None)  # not plain: from here on nothing can be told
    theirs.finish(1, 4, 0.5, b"y")
    assert ours.read(7) == written
    theirs.begin(8)
    assert (ours.call, ours.read(8), ours.read(7)) == (8, Page(0, []), written)
    for call in range(9, 7 + CALLS):
        theirs.begin(call)
    assert ours.read(7) == written
    theirs.begin(7 + CALLS)
    assert (ours.call, ours.read(7)) == (7 + CALLS, None)
    theirs.close()


def test_a_journal_that_is_full_ends_before_what_does_not_fit(journals: Journals) -> None:
    address = journals.hand_over(0)
    assert address is not None
    theirs, ours = Journal.attach(address), journals.get(0)
    assert theirs is not None
    assert ours is not None
    theirs.begin(1)
    for index in range(10_000):
        theirs.start()
        theirs.finish(1, index, 0.0, b"z" * 100)
    page = ours.read(1)
    assert page is not None
    told = [index for _, index, _, _ in page.records]
    assert told == list(range(len(told)))
    assert 0 < len(told) < NBYTES / 100
    theirs.close()


def test_what_a_dead_worker_had_done_and_could_not_say(journals: Journals) -> None:
    """It had ended its first call, whose answer was on the way, and ran the second."""
    address = journals.hand_over(0)
    assert address is not None
    theirs, ours = Journal.attach(address), journals.get(0)
    assert theirs is not None
    member = Member(0, 0, None, SimpleNamespace(codec=None, memory=None, ray=SimpleNamespace(get=None)), SlotRecord())
    member.keeps_journal = True
    member.calls = {number: SentCall(number, count, open=False) for number, count in ((1, 4), (2, 5), (3, 2))}
    member.calls[1].count, member.calls[1].answered = 3, 1
    for call, count in ((1, 4), (2, 3)):
        theirs.begin(call)
        for index in range(count):
            theirs.start()
            theirs.finish(call, index, 0.5, b"done")
    theirs.start()
    events: list[Any] = []
    assert member.settle_estate(ours, events) == 3
    assert member.held == 4, "one ran, three were not started"
    told = [(job, index) for event in events for job, index, _, _ in event.results]
    assert told == [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2)]
    theirs.close()


def test_a_journal_is_known_by_its_token(journals: Journals, tmp_path: Any) -> None:
    address = journals.hand_over(0)
    assert address is not None
    assert Journal.attach(Address(address.pid, address.fd, b"?" * 16)) is None
    assert Journal.attach(Address(address.pid, 100_000, address.token)) is None
    with open(tmp_path / "other", "wb") as file:
        assert Journal.attach(Address(os.getpid(), file.fileno(), address.token)) is None


# Memory and parcels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [10, MAPPED_NBYTES * 2])
def test_what_is_not_the_stores_is_copied(nbytes: int) -> None:
    memory = PrivateMemory(1 << 30)
    source = bytes(nbytes)
    view = memory.view(source)
    view[0] = 1
    assert source[0] == 0
    assert memory.mapped_nbytes == 0
    memory.close()


def test_a_parcel_is_a_snapshot_and_large_ones_are_put() -> None:
    stored: list[Any] = []

    def put(buffers: Any) -> int:
        stored.append([bytes(buffer.raw()) for buffer in buffers])
        return len(stored) - 1

    codec, worker = RayCodec(Definitions()), RayCodec()
    small, large = torch.ones(10), torch.ones(100_000)
    parcel = parcels.pack(codec.dumps({"small": small, "large": large, "part": large[5:7]}), put)
    large.fill_(2)
    assert (len(stored), parcel.nbytes > large.nbytes) == (1, True)
    refs: list[Any] = []
    stream, inline, place = parcel.wire(refs)
    assert (inline, place, refs) == ((), 0, [0])
    received = parcels.unpack(stream, stored[0], lambda buffer: memoryview(bytearray(buffer)))
    arrived: Any = worker.loads(received)
    assert arrived["large"].equal(torch.ones(100_000))
    arrived["large"][5] = 3
    assert arrived["part"].tolist() == [3, 1]
    assert parcels.pack(codec.dumps(small), put).ref is None
    assert parcels.pack(codec.dumps([b"x" * 100_000]), put).stream is None


def test_what_means_something_on_one_machine_only_is_refused() -> None:
    outgoing = RayCodec().new_outgoing("copy")
    with pytest.raises(TransportError, match="on this machine only"):
        outgoing.add_fd(0, None)
    with pytest.raises(UnsupportedTensorError, match=r"tensor\.cpu\(\)"):
        outgoing.token()


# The body of a worker -----------------------------------------------------------------------------------------------


def test_what_was_recalled_is_not_started() -> None:
    runner, codec = TaskRunner(), RayCodec(Definitions())
    payload = codec.dumps_call(abs, (-1,), {})
    assert runner.recall(1) == (0, 0)
    reply, buffers = runner.run(Call(1, [], [(1, 0, payload)]), ())
    assert (reply.answers, buffers) == ([], None)
    reply, _ = runner.run(Call(2, [], [(1, 0, payload), (1, 1, payload)]), ())
    assert [answer[:3] for answer in reply.answers] == [(1, 0, "value"), (1, 1, "value")]
