"""Results of a chunk move into shared memory as they are made; and nobody notices but by the memory."""

from __future__ import annotations

from time import monotonic
from typing import Any

import pool_tasks as tasks
import pytest
import torch

import tpool
from tpool.local.calls import EARLY_NBYTES, JobCalls, Marks
from tpool.local.wire import Mode
from tpool.tensors.payload import Received
from tpool.tensors.placed import Placed
from tpool.tensors.plain import dumps_plain

DEADLINE = 30
LARGE = EARLY_NBYTES // 4  # float32 values


def told(pool: tpool.Pool, kind: str, numel: int, chunksize: int = 6) -> list[bool]:
    """Of a chunk's results, whether the one before lay in shared memory when each was made."""
    results: list[Any] = pool.map(tasks.tell_if_the_last_moved, [(kind, numel)] * 6, chunksize)
    return [bool((result[0] if kind == "in a tuple" else result)[0]) for result in results]


@pytest.mark.parametrize(
    ("sharing", "kind", "numel", "moved"),
    [
        ("share", "plain", LARGE, True),
        ("share", "plain", LARGE - 1, False),
        ("share", "with grad", LARGE, False),
        ("share", "in a tuple", LARGE, False),
        ("copy", "plain", LARGE, False),
    ],
)
def test_a_large_result_has_moved_when_the_next_one_is_made(sharing: Any, kind: str, numel: int, moved: bool) -> None:
    with tpool.Pool(1, sharing=sharing) as pool:
        assert told(pool, kind, numel) == [False, *[moved] * 5]


def test_a_buffer_that_each_call_fills_anew_is_one_tensor_as_ever() -> None:
    with tpool.Pool(1) as pool:
        first, second, third = pool.map(tasks.fill_the_same, range(3), 3)
        assert first is second is third
        assert bool(first.eq(2).all())


def test_other_kinds_and_errors_among_them() -> None:
    with tpool.Pool(1) as pool:
        with pytest.raises(KeyError):
            pool.map(tasks.make_sparse_or_fail, range(6), 6)
        results = pool.map(tasks.make_sparse_or_fail, [0, 1, 2, 4, 5, 2], 6)
        assert [result.is_sparse for result in results] == [False, False, True, False, False, True]
        assert [float(result[7]) for result in results if not result.is_sparse] == [0, 1, 4, 5]
        del results
        assert pool.apply(tasks.identity, (1,)) == 1


def test_without_memory_for_them_it_is_said_once_and_the_pool_goes_on() -> None:
    with tpool.Pool(1, memory="64MB") as pool:
        pool.apply(tasks.identity, (1,))
        since = monotonic()
        with pytest.raises(tpool.SharedMemoryExhausted):
            pool.map(torch.ones, [5_000_000] * 8, 8)
        assert monotonic() - since < DEADLINE
        assert len(pool.map(torch.ones, [5_000_000] * 3, 3)) == 3


class Codec:
    """As little of a codec as a chunk needs; to move a tensor takes a second."""

    sharing = "share"
    can_swap = True

    memory = None

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def loads(self, received: Any) -> Any:
        return received

    def place(self, storage: Any, tensor: Any) -> int:
        self._clock.now += 1
        return 0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("known", [True, False], ids=["moved", "copied"])
def test_the_time_it_takes_is_transfer_and_none_of_the_functions(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    clock = Clock()
    kept = []

    def function(numel: int) -> torch.Tensor:
        clock.now += 10
        kept.append(torch.zeros(numel))
        return kept[-1]

    def copy(values: list[Any], memory: None, least_nbytes: int) -> None:
        if not known and values[-1].nbytes >= least_nbytes:
            clock.now += 1
            values[-1] = Placed(None, "float32", (LARGE,), 4 * LARGE)  # type: ignore[arg-type]

    monkeypatch.setattr("tpool.local.calls.monotonic", clock)
    monkeypatch.setattr("tpool.local.calls.place_last", copy)

    calls = JobCalls(Mode.MAP, Received(dumps_plain(None) or b""))
    calls._payload, calls._function = None, function
    codec: Any = Codec(clock)
    monkeypatch.setattr("tpool.local.calls.Outgoing", lambda memory: codec)
    marks = Marks()
    chunk: Any = [LARGE, LARGE, LARGE, 3, LARGE]
    calls.call(codec, chunk, marks)
    marks.ended()
    assert clock.now - 100 == 53  # after the short one nothing is moved before the chunk is
    assert marks.ran - marks.decoded == 50
    marks.decoded = 0.0
    calls.call(codec, [LARGE], marks)  # type: ignore[arg-type]
    marks.ended()
    assert marks.ran == clock.now - (not known), "nothing of the chunk before is counted again"
