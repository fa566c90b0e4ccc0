from __future__ import annotations

import os

import pytest

from tpool.errors import ProtocolError
from tpool.tensors.ledger import Ledger
from tpool.tensors.memfd import PAGE_NBYTES, create_memfd


@pytest.mark.parametrize("counters", [0, 1, 65, 600])
def test_all_processes_see_one_sum(counters: int) -> None:
    ledger = Ledger.create(counters, 1000)
    peer = Ledger.attach(os.dup(ledger.fd))
    assert (peer.counters, peer.budget_nbytes) == (counters, 1000)
    for index in range(counters):
        (ledger if index % 2 else peer).set_committed(index, index + 1)
    assert ledger.committed_nbytes() == peer.committed_nbytes() == counters * (counters + 1) // 2
    assert [peer.committed_nbytes(index) for index in range(counters)] == list(range(1, counters + 1))
    with pytest.raises(IndexError):
        ledger.set_committed(counters, 1)
    ledger.close()
    peer.close()
    peer.close()
    assert ledger.committed_nbytes() == peer.committed_nbytes()


def test_waiting_is_seen_by_the_others() -> None:
    ledger = Ledger.create(3, 1 << 40)
    assert not ledger.anyone_waiting()
    ledger.set_waiting(1, True)
    assert ledger.anyone_waiting()
    assert ledger.anyone_waiting(besides=0)
    assert not ledger.anyone_waiting(besides=1)
    assert ledger.committed_nbytes() == 0
    ledger.set_waiting(2, True)
    assert ledger.anyone_waiting(besides=1)
    ledger.set_waiting(1, False)
    ledger.set_waiting(2, False)
    assert not ledger.anyone_waiting()
    ledger.close()


def test_what_is_no_ledger_is_refused_and_closed() -> None:
    fd = create_memfd("x", PAGE_NBYTES)
    with pytest.raises(ProtocolError):
        Ledger.attach(fd)
    with pytest.raises(OSError):
        os.fstat(fd)


def test_more_counters_than_fit_are_refused() -> None:
    ledger = Ledger.create(1, 1)
    ledger._words[1] = 4000
    with pytest.raises(ProtocolError):
        Ledger.attach(os.dup(ledger.fd))
    ledger.close()


def test_a_ledger_that_grows_is_counted_whole_by_whoever_mapped_it_before() -> None:
    ledger = Ledger.create(2, 100)
    earlier = Ledger.attach(os.dup(ledger.fd))
    ledger.grow(4)
    ledger.set_committed(3, 70)
    ledger.set_waiting(2, True)
    assert earlier.committed_nbytes() == 70
    assert earlier.anyone_waiting(besides=1)
    assert earlier.counters == 4
    with pytest.raises(ValueError, match="this pool can grow to"):
        ledger.grow(4000)
    assert earlier.committed_nbytes() == 70
    earlier.close()
    ledger.close()
