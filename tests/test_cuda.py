"""CUDA: the rules that can be shown without a GPU, with stand-ins; and what needs one, skipped without."""

from __future__ import annotations

import types
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pool_tasks as tasks
import pytest
import torch
import torch.multiprocessing.reductions as torch_reductions
from codec_peer import new_arena
from support import process_info, wait_until

import tpool
from tpool.errors import PlatformError, UnsupportedTensorError
from tpool.tensors import arrivals, leases, reducers_layouts
from tpool.tensors.arena import Arena
from tpool.tensors.storages import Outgoing
from tpool.tensors.token import Token

needs_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEADLINE = 60

# Without a GPU -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    arena, ledger = new_arena()
    yield arena
    leases.table().collect()
    leases.table().remove(arena)
    ledger.close()


@pytest.fixture
def memory(arena: Arena) -> leases.Memory:
    return leases.Memory(arena, lambda seconds: False)


def put_reducers(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    monkeypatch.setattr(reducers_layouts, "_torch_reductions", types.SimpleNamespace(**functions))


def test_memory_of_another_process_is_copied_once_and_stays_aliased(
    memory: leases.Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = torch.arange(10.0)

    def reduce_tensor(tensor: torch.Tensor) -> Any:
        if tensor.untyped_storage()._cdata == received.untyped_storage()._cdata:
            raise RuntimeError("Attempted to send CUDA tensor received from another process; this is not supported")
        return "make", (tensor,)

    put_reducers(monkeypatch, reduce_tensor=reduce_tensor)
    sender = Outgoing(memory)
    sent = [reducers_layouts.cuda(tensor, sender)[1][2][0] for tensor in (received, received[3:].view(7, 1).t())]
    assert sent[0].tolist() == received.tolist()
    assert (sent[1].tolist(), sent[1].stride()) == ([received[3:].tolist()], (1, 1))
    assert len({tensor.untyped_storage()._cdata for tensor in sent}) == 1
    assert sent[0].data_ptr() != received.data_ptr()


def test_what_torch_cannot_send_is_refused_in_its_words(
    memory: leases.Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reduce_tensor(tensor: torch.Tensor) -> Any:
        raise RuntimeError("CUDA IPC is not supported on this platform")

    put_reducers(monkeypatch, reduce_tensor=reduce_tensor)
    with pytest.raises(UnsupportedTensorError, match="CUDA IPC is not supported"):
        reducers_layouts.cuda(torch.zeros(3), Outgoing(memory))


def test_one_token_stands_for_all_that_a_codec_sends(memory: leases.Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    put_reducers(
        monkeypatch,
        reduce_tensor=lambda tensor: (torch.zeros, (3,)),
        reduce_event=lambda event: (types.SimpleNamespace, ()),
    )
    token = Token(memory)
    assert token.block is None
    first, second = Outgoing(memory, token=token), Outgoing(memory, token=token)
    made_by = [reducers_layouts.cuda(torch.zeros(3), first) for _ in range(2)]
    made_by.append(reducers_layouts.cuda_event(object(), first))  # type: ignore[arg-type]
    reducers_layouts.cuda(torch.zeros(3), second)
    assert first.blocks == second.blocks == [token.block]
    watch = leases.table().watch(token.block.arena.id, token.block.offset, lambda: None)  # type: ignore[union-attr]
    assert watch is not None
    incoming = arrivals.Incoming(first.blocks, [])
    arrived = [incoming.leased(*arguments) for _, arguments in made_by]
    first.blocks.clear()
    second.blocks.clear()
    token.block = incoming = None  # type: ignore[assignment]
    view = arrived[0][1:]
    del arrived[:2]
    assert watch() is not None  # for the event, and the view
    del arrived
    assert watch() is not None
    del view
    assert watch() is None


def test_torch_has_reducers_for_events() -> None:
    torch_reductions.init_reductions()
    assert ForkingPickler._extra_reducers[torch.cuda.Event] is torch_reductions.reduce_event  # type: ignore[attr-defined]


def test_fork_after_cuda_was_initialised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(PlatformError, match="context='fork' cannot be used after CUDA was initialised"):
        tpool.Pool(1, context="fork")
    with tpool.Pool(1) as pool:
        assert pool.apply(abs, (-1,)) == 1


# With one ----------------------------------------------------------------------------------------------------------


def fill(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor.fill_(value)
    torch.cuda.synchronize()
    return tensor


def ones(count: int) -> torch.Tensor:
    return torch.ones(count, device="cuda")


def total(tensor: torch.Tensor) -> float:
    return float(tensor.sum())


def wait_for(event: torch.cuda.Event, tensor: torch.Tensor) -> float:
    event.wait()
    return float(tensor.sum())


def pid_and_ones() -> Any:
    import os

    return os.getpid(), ones(1000)


@pytest.fixture(params=["forkserver", "spawn"])
def pool(request: pytest.FixtureRequest) -> Iterator[tpool.Pool]:
    torch.zeros(1, device="cuda")
    with tpool.Pool(2, context=request.param) as pool:
        yield pool


class TestOnGpu:
    pytestmark = needs_gpu

    def test_memory_is_shared(self, pool: tpool.Pool) -> None:
        tensor = torch.zeros(10, device="cuda")
        pool.apply(fill, (tensor[2:], 5.0))
        assert tensor.tolist() == [0, 0] + [5] * 8

    def test_a_received_tensor_is_sent_on(self, pool: tpool.Pool) -> None:
        result = pool.apply(ones, (1000,))
        assert pool.map(total, [result] * 4, chunksize=1) == [1000] * 4
        assert pool.apply(total, (result[500:],)) == 500

    def test_an_argument_is_sent_back(self, pool: tpool.Pool) -> None:
        tensor = torch.zeros(10, device="cuda")
        assert pool.apply(fill, (tensor, 5.0)).tolist() == [5] * 10

    def test_events(self, pool: tpool.Pool) -> None:
        event = torch.cuda.Event(interprocess=True)
        tensor = torch.ones(1000, device="cuda")
        event.record()
        assert pool.apply(wait_for, (event, tensor)) == 1000

    def test_results_outlive_their_slot(self) -> None:
        with tpool.Pool(1, maxtasksperchild=1) as pool:
            results = [pool.apply(pid_and_ones) for _ in range(3)]
            assert [total(tensor) for _, tensor in results] == [1000] * 3
            pids = [pid for pid, _ in results]
            assert len(set(pids)) == 3
            del results
            wait_until(lambda: all(process_info(pid) is None for pid in pids), DEADLINE)

    def test_a_worker_that_reserves_too_much_is_replaced(self) -> None:
        with tpool.Pool(1, max_cuda_memory="300MB") as pool:
            pids = pool.map(tasks.reserve_on_gpu, [10**8, 10**8, 4 * 10**8, 10**8], chunksize=1)
            assert pids[0] == pids[1] == pids[2] != pids[3]
            assert "its CUDA memory of" in pool.stats().workers[0].losses[0]
