"""Objects to payloads and back, in one process: streams, blocks, buffers, descriptors, errors."""

from __future__ import annotations

import array
import copyreg
import decimal
import gc
import io
import multiprocessing
import os
import pickle
import socket
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from bare_worker import make_memory, received
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tpool.errors import DecodeError, SharedMemoryExhausted, UnsupportedTensorError
from tpool.tensors.arena import Allocator, Arena, Ledger
from tpool.tensors.cures import add_cure
from tpool.tensors.definitions import Definitions
from tpool.tensors.leases import Block, Memory, table
from tpool.tensors.payload import STOP, Payload, Received
from tpool.tensors.pickler import INLINE_NBYTES, OUT_OF_BAND_NBYTES, Codec
from tpool.tensors.plain import dumps_plain


@pytest.fixture(scope="module")
def memory() -> Iterator[Memory]:
    memory = make_memory()
    yield memory
    ledger = table().allocator(memory.arena).ledger
    table().remove(memory.arena)
    ledger.close()


@pytest.fixture
def codec(memory) -> Codec:
    """Caller and worker in one: what it sends, it can read."""
    return Codec(memory, Definitions())


def blocks_in_use(memory: Memory) -> int:
    gc.collect()
    table().collect()
    return table().allocator(memory.arena).blocks_in_use


def round_trip(codec: Codec, obj: object) -> object:
    return codec.loads(received(codec.dumps(obj)))


# Streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "obj",
    [0, -1, 2**100, 1 << 60_000, True, None, 1.5, 2j, "", "text", b"", b"bytes", "x" * 100_000, b"x" * 100_000],
    ids=lambda obj: f"{type(obj).__name__}{len(obj) if isinstance(obj, (str, bytes)) else bool(obj)}",
)
def test_simple_values(codec, obj):
    payload = codec.dumps(obj)
    assert not payload.groups
    assert not payload.blocks
    assert round_trip(codec, obj) == obj


def test_a_plain_stream_is_plain_pickle(codec):
    for obj in (5, "a", [1, {"a": (2, None)}], Fraction(1, 3), decimal.Decimal("1.1"), len, Fraction):
        data = codec.dumps(obj).data
        assert data[-1] == STOP
        assert pickle.loads(data) == obj


def test_what_pickle_alone_will_do_is_seen_at_a_glance():
    for obj in ([], [1, "a", (2.5, None)], ([1], (2, [3])), [()], {}, [len]):
        assert pickle.loads(dumps_plain(obj)) == obj
    for obj in ([[1]], [1, ([2],)], list(range(100)), [torch.ones(1)], [object()], {1: 2}):
        assert dumps_plain(obj) is None
    cyclic = [1]
    cyclic.append((cyclic, 2))
    assert dumps_plain(cyclic) is None
    assert dumps_plain(cyclic[1]) is None


@pytest.mark.parametrize("nbytes", [INLINE_NBYTES - 100, INLINE_NBYTES + 1, 200_000])
@pytest.mark.parametrize("kind", [bytes, bytearray, str, list])
def test_long_streams_lie_in_one_block(codec, kind, nbytes):
    obj = {bytes: bytes(nbytes), bytearray: bytearray(nbytes), str: "é" * (nbytes // 2), list: [0] * (nbytes // 2)}[
        kind
    ]
    payload = codec.dumps(obj)
    assert isinstance(payload.data, Block) == (nbytes > INLINE_NBYTES)
    assert not payload.blocks
    assert round_trip(codec, obj) == obj
    assert round_trip(codec, [obj, torch.ones(2)])[0] == obj  # not plain


def test_large_bytes_are_copied_once_each_way(codec):
    """Seen by the peak of Python's own memory: none of it for sending, one of it for receiving."""
    import tracemalloc

    nbytes = 1 << 24
    obj = [bytes(nbytes), torch.ones(1)]
    tracemalloc.start()
    try:
        payload = codec.dumps(obj)
        assert tracemalloc.get_traced_memory()[1] < nbytes / 4
        message = received(payload)
        tracemalloc.reset_peak()
        result = codec.loads(message)
        assert tracemalloc.get_traced_memory()[1] < nbytes * 1.25
    finally:
        tracemalloc.stop()
    assert len(result[0]) == nbytes


def test_a_payload_can_be_sent_many_times(codec):
    payload = codec.dumps([torch.arange(3), np.arange(5000), bytes(50_000)])
    for _ in range(3):
        result = codec.loads(received(payload))
        assert result[0].tolist() == [0, 1, 2]
        assert result[1][-1] == 4999


def test_a_message_is_decoded_once(codec):
    for obj in (1, torch.ones(2)):
        message = received(codec.dumps(obj))
        codec.loads(message)
        with pytest.raises(DecodeError, match="before"):
            codec.loads(message)


def test_threads_may_share_a_codec(codec):
    results, start = [], threading.Barrier(4)

    def send(n: int) -> None:
        start.wait()
        results.extend(
            round_trip(codec, (n, i, torch.full((3,), n), lambda: (n, i)))[2].sum().item() for i in range(50)
        )

    threads = [threading.Thread(target=send, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted(3.0 * n for n in range(4) for _ in range(50))


class Node:
    def __init__(self, value: object = None) -> None:
        self.value = value
        self.links: list[object] = []


@st.composite
def graphs(draw: st.DrawFn) -> list[object]:
    """Objects that refer to each other, themselves included."""
    leaves = draw(st.lists(st.one_of(st.integers(), st.text(), st.binary(), st.floats(allow_nan=False)), max_size=4))
    nodes: list[object] = [draw(st.sampled_from([list, dict, Node, list]))() for _ in range(draw(st.integers(1, 5)))]
    tensors: list[object] = [torch.arange(n) for n in draw(st.lists(st.integers(1, 4), max_size=2))]
    arrays: list[object] = [np.arange(n) for n in draw(st.lists(st.sampled_from([0, 3, 600]), max_size=2))]
    for node in nodes:
        for _ in range(draw(st.integers(0, 3))):
            target = draw(st.sampled_from([*nodes, *leaves, *tensors, *arrays]))
            if draw(st.booleans()):
                target = (target, len)
            if isinstance(node, list):
                node.append(target)
            elif isinstance(node, dict):
                node[draw(st.integers(0, 3))] = target
            else:
                node.links.append(target)
    return nodes


def same(a: object, b: object, seen: dict[int, int]) -> bool:
    """Whether two graphs are alike, in values and in who is who."""
    if id(a) in seen:
        return seen[id(a)] == id(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, (torch.Tensor, np.ndarray)):
        seen[id(a)] = id(b)
        return a.tolist() == b.tolist() and a.dtype == b.dtype
    if isinstance(a, (list, dict, Node)):
        seen[id(a)] = id(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key], seen) for key in a)
    if isinstance(a, Node):
        return same(a.links, b.links, seen)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, seen) for x, y in zip(a, b, strict=True))
    return a == b


@given(graph=graphs())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_object_graphs_arrive_alike(codec, graph):
    assert same(graph, round_trip(codec, graph), {})


# Buffers -----------------------------------------------------------------------------------------------------------


def arrays_of_many_kinds() -> Iterator[np.ndarray]:
    base = np.arange(2000.0)
    yield base
    yield base.reshape(40, 50)
    yield np.asfortranarray(base.reshape(40, 50))
    yield base.reshape(40, 50)[::2, ::-3]
    yield base.reshape(10, 20, 10).transpose(2, 0, 1)
    yield np.zeros(700, dtype=[("a", "i4"), ("b", "f8", 2)])
    yield np.array(["text", "more"] * 1000)
    yield np.array("2020-01-01", dtype="M8[D]") + np.arange(900)
    yield np.arange(900).astype(">i8")
    yield np.zeros((0, 5000))
    yield np.array(3.5)
    yield np.arange(OUT_OF_BAND_NBYTES - 1, dtype="u1")
    yield np.arange(OUT_OF_BAND_NBYTES, dtype=np.uint8)
    yield np.array([1, "a", None, [2]] * 500, dtype=object)
    yield np.ma.masked_array(base, base > 3)


@pytest.mark.parametrize("array", list(arrays_of_many_kinds()), ids=lambda a: f"{a.dtype.char}{a.shape}")
def test_arrays(codec, array):
    result = round_trip(codec, array)
    assert result.dtype == array.dtype
    assert result.shape == array.shape
    assert (result == array).all()
    assert result.flags.writeable
    assert result.flags.f_contiguous or not array.flags.f_contiguous
    result[...] = array  # writeable indeed
    assert not np.shares_memory(result, array)


def test_large_arrays_go_by_block_and_small_ones_do_not(codec):
    assert len(codec.dumps(np.zeros(OUT_OF_BAND_NBYTES // 8)).blocks) == 1
    assert not codec.dumps(np.zeros(OUT_OF_BAND_NBYTES // 8 - 1)).blocks


@pytest.mark.parametrize("count", [10, 10_000])
def test_read_only_arrays_arrive_read_only(codec, count):
    array = np.arange(count)
    array.flags.writeable = False
    assert not round_trip(codec, array).flags.writeable


def test_an_array_keeps_its_block(codec, memory):
    """Of an array and of a read-only one, all that is left of the message is the array."""
    for read_only in (False, True):
        array = np.arange(5000)
        array.flags.writeable = not read_only
        message = received(codec.dumps(array))
        before = blocks_in_use(memory)
        result = codec.loads(message)
        del message
        assert blocks_in_use(memory) == before
        codec.dumps(np.zeros(5000))  # lands in the first free block
        assert (result == array).all()
        part = result[10:20]
        del result
        assert blocks_in_use(memory) == before
        assert part[0] == 10
        del part
        assert blocks_in_use(memory) == before - 1


def test_buffers_and_tensors_keep_their_places(codec):
    """Storages have indices, buffers an order; both lie among the same blocks."""
    obj = [
        np.arange(1000),
        torch.arange(5),
        np.arange(2000),
        torch.arange(7),
        pickle.PickleBuffer(bytearray(b"x" * 5000)),
    ]
    result = round_trip(codec, obj)
    assert result[0][-1] == 999
    assert result[1].tolist() == list(range(5))
    assert result[2][-1] == 1999
    assert result[3].tolist() == list(range(7))
    assert bytes(result[4]) == b"x" * 5000
    many = [np.full(600, n) for n in range(20)]
    assert [a[0] for a in round_trip(codec, many)] == list(range(20))


# Tensors -----------------------------------------------------------------------------------------------------------


def test_aliases_stay_aliases(codec):
    base = torch.arange(12.0)
    views = [base, base[2:], base.view(3, 4).T]
    result = round_trip(codec, views)
    result[0][3] = 100
    assert result[1][1] == 100
    assert result[2][3, 0] == 100
    assert base[3] == 100, "share is the default"


def test_value_semantics(memory):
    codec = Codec(memory, Definitions(), sharing="copy")
    base = torch.arange(2000.0)
    overlapping = [base[:1000], base[500:1500], base[:1000]]
    pointer = base.data_ptr()
    result = round_trip(codec, overlapping)
    result[0][500] = -1
    assert result[1][0] == -1, "aliases among what is sent are kept, also when the first try must be given up"
    assert base[500] == 500
    assert base.data_ptr() == pointer


def test_an_unsupported_tensor_is_told_at_once(codec):
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(UnsupportedTensorError, match="detach"):
        codec.dumps([1, weight * 2])


# Others' reducers --------------------------------------------------------------------------------------------------


class Registered:
    def __init__(self, value: int) -> None:
        self.value = value


def rebuild_registered(value: int) -> Registered:
    return Registered(value + 1)


@pytest.mark.parametrize("how", ["copyreg", "multiprocessing"])
def test_reducers_that_others_registered(codec, how):
    codec.dumps([0])  # later registrations count too
    if how == "copyreg":
        copyreg.pickle(Registered, lambda obj: (rebuild_registered, (obj.value,)))
        table = copyreg.dispatch_table
    else:
        ForkingPickler.register(Registered, lambda obj: (rebuild_registered, (obj.value,)))
        table = ForkingPickler._extra_reducers
    try:
        assert round_trip(codec, Registered(1)).value == 2
    finally:
        del table[Registered]
    assert round_trip(codec, Registered(1)).value == 1


def test_nothing_is_registered_globally(codec):
    before = dict(copyreg.dispatch_table), dict(ForkingPickler._extra_reducers)
    round_trip(codec, [torch.ones(1), lambda: 1])
    assert (dict(copyreg.dispatch_table), dict(ForkingPickler._extra_reducers)) == before
    assert type(pickle.loads(pickle.dumps(torch.ones(1)))) is torch.Tensor


def test_torchs_own_reducers_do_not_come_before_ours(codec):
    import torch.multiprocessing  # registers them

    payload = codec.dumps(torch.ones(4))
    assert len(payload.blocks) == 1
    assert not payload.fds


# Descriptors -------------------------------------------------------------------------------------------------------


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_sockets_and_pipes_travel(codec):
    left, right = socket.socketpair()
    reader, writer = multiprocessing.Pipe(duplex=False)
    with left, right, reader, writer:
        before = open_fds()
        payload = codec.dumps([right, writer])
        assert len(payload.fds) == 2
        result = codec.loads(received(payload))
        with result[0], result[1]:
            left.send(b"over")
            assert result[0].recv(10) == b"over"
            result[1].send("pipe")
            assert reader.recv() == "pipe"
            assert not result[1].readable
        del payload, result
        gc.collect()
        assert open_fds() == before


def test_a_payload_survives_the_object_it_was_made_from(codec):
    left, right = socket.socketpair()
    payload = codec.dumps(right)
    right.close()
    result = codec.loads(received(payload))
    with left, result:
        left.send(b"x")
        assert result.recv(1) == b"x"


@pytest.mark.parametrize("discard", [True, False])
def test_no_descriptor_is_left(codec, discard):
    left, right = multiprocessing.Pipe()
    with left, right:
        before = open_fds()
        message = received(codec.dumps([right, Unloadable()]))
        if discard:
            message.discard()
            message.discard()
        else:
            with pytest.raises(DecodeError):
                codec.loads(message)
        gc.collect()
        assert open_fds() == before


SPAWN = multiprocessing.get_context("spawn")


def test_locks_and_queues_travel_while_spawning(codec):
    lock, event, value, queue = SPAWN.Lock(), SPAWN.Event(), SPAWN.Value("i", 3), SPAWN.SimpleQueue()
    result = codec.loads(received(codec.dumps([lock, event, value, queue], spawning=True)))
    with result[0]:
        assert not lock.acquire(block=False)
    result[1].set()
    assert event.is_set()
    result[2].value += 1
    assert value.value == 4
    result[3].put("through")
    assert queue.get() == "through"
    for each in (queue, result[3]):
        each.close()


def test_otherwise_the_standard_librarys_own_error_applies(codec):
    for obj in (SPAWN.Lock(), SPAWN.Value("i")):
        with pytest.raises(RuntimeError, match="should only be shared between processes through inheritance"):
            codec.dumps(obj)
    codec.dumps(SPAWN.Lock(), spawning=True)
    with pytest.raises(RuntimeError, match="through inheritance"):
        codec.dumps(SPAWN.Lock())


def test_a_lock_of_a_fork_context_is_refused_with_the_cure(codec):
    for make in ("Lock", "Event", "Semaphore"):
        with pytest.raises(RuntimeError, match=r"get_context\('forkserver'\).*context='fork'"):
            codec.dumps([getattr(multiprocessing.get_context("fork"), make)()], spawning=True)


# Errors ------------------------------------------------------------------------------------------------------------


class Unpicklable:
    def __reduce__(self) -> object:
        raise ZeroDivisionError("mine")


def raise_on_load(kind: type[BaseException]) -> None:
    raise kind("mine")


class Unloadable:
    def __init__(self, kind: type[BaseException] = KeyError) -> None:
        self.kind = kind

    def __reduce__(self) -> object:
        return raise_on_load, (self.kind,)


def test_what_a_reducer_raises_is_raised_with_a_note(codec):
    with pytest.raises(ZeroDivisionError, match="mine") as info:
        codec.dumps([1, {"a": Unpicklable()}])
    if sys.version_info >= (3, 11):
        assert any("Unpicklable" in note for note in info.value.__notes__)


@pytest.mark.parametrize(("obj", "error"), [(threading.Lock(), TypeError), ((x for x in "a"), TypeError)])
def test_what_cannot_be_pickled_fails_as_with_pickle(codec, obj, error):
    with pytest.raises(error) as ours:
        codec.dumps([obj])
    with pytest.raises(error) as theirs:
        pickle.dumps([obj])
    assert str(ours.value).startswith(f"{theirs.value}: "), "pickle's words, and then the cure"
    add_cure(theirs.value)
    assert str(ours.value) == str(theirs.value)
    assert not getattr(ours.value, "__notes__", None), "the message names the type already"


def test_recursion_too_deep(codec):
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RecursionError):
        codec.dumps(deep)
    while deep:  # or its end would be recursive too
        deep = deep.pop()


@pytest.mark.parametrize("with_tensor", [False, True])
@pytest.mark.parametrize("kind", [KeyError, ZeroDivisionError, SystemExit])
def test_a_failing_decode_names_what_is_known(codec, kind, with_tensor):
    message = received(codec.dumps([Unloadable(kind), torch.ones(1) if with_tensor else None]))
    with pytest.raises(DecodeError, match="mine") as info:
        codec.loads(message)
    assert type(info.value.__cause__) is kind
    assert kind.__name__ in str(info.value)
    if with_tensor:
        assert "raise_on_load" in str(info.value)


def test_an_interrupt_is_no_decode_error(codec):
    with pytest.raises(KeyboardInterrupt):
        codec.loads(received(codec.dumps(Unloadable(KeyboardInterrupt))))


@pytest.mark.parametrize("data", [b"nonsense.", b"\x80\x05.", b"no trailer", b"x"])
def test_nonsense_is_a_decode_error(codec, data):
    with pytest.raises(DecodeError):
        codec.loads(Received(data))


def test_blocks_of_a_failed_send_are_released(codec, memory):
    before = blocks_in_use(memory)
    errors = []
    for _ in range(3):
        with pytest.raises(ZeroDivisionError) as info:
            codec.dumps([np.arange(5000), Unpicklable()])
        errors.append(info)  # its traceback lives
        assert blocks_in_use(memory) == before


def test_blocks_of_a_failed_decode_are_released(codec, memory):
    before = blocks_in_use(memory)
    payload = codec.dumps([np.arange(5000), bytes(50_000), Unloadable()])
    message = received(payload)
    del payload
    with pytest.raises(DecodeError):
        codec.loads(message)
    assert blocks_in_use(memory) == before


def test_blocks_are_released_with_payload_and_result(codec, memory):
    before = blocks_in_use(memory)
    payload = codec.dumps([torch.arange(5000), np.arange(5000), bytes(50_000)])
    assert blocks_in_use(memory) == before + 3
    result = codec.loads(received(payload))
    del payload
    assert blocks_in_use(memory) == before + 2, "the stream is gone, tensor and array live"
    del result
    assert blocks_in_use(memory) == before


def test_no_cycle_holds_a_message(codec, memory):
    before = blocks_in_use(memory)
    gc.disable()
    try:
        round_trip(codec, [torch.arange(5000), np.arange(5000), lambda: 1])
        table().collect()
        assert table().allocator(memory.arena).blocks_in_use == before
    finally:
        gc.enable()


def test_memory_that_is_short_is_told():
    arena = Arena.create(1 << 20)
    ledger = Ledger.create(1, 1 << 16)
    table().add(arena, Allocator(arena, ledger, 0))
    codec = Codec(Memory(arena, lambda seconds: False), Definitions())
    with pytest.raises(SharedMemoryExhausted):
        codec.dumps(bytes(1 << 18))
    with pytest.raises(SharedMemoryExhausted):
        codec.dumps([np.arange(1 << 16)])
    table().remove(arena)
    ledger.close()


# By value ----------------------------------------------------------------------------------------------------------


def test_dynamic_functions_and_classes_in_one_process(codec):
    count = 0

    def up() -> int:
        nonlocal count
        count += 1
        return count

    def get() -> int:
        return count

    up_again, get_again = round_trip(codec, (up, get))
    up_again()
    up_again()
    assert get_again() == 2
    assert get() == 0


def test_importable_things_go_by_reference(codec):
    for obj in (
        Node,
        round_trip,
        len,
        np.sum,
        torch.nn.Linear,
        io.BytesIO,
        type(None),
        type(len),
        Node.__init__,
        array.array,
    ):
        payload = codec.dumps(obj)
        assert not payload.groups
        assert round_trip(codec, obj) is obj


def test_a_dynamic_class_is_kept_by_the_pool_that_sent_it_and_by_nothing_else(memory):
    class Local:
        pass

    alive = weakref.ref(Local)
    codec = Codec(memory, Definitions())
    payload = codec.dumps(Local)
    assert payload.groups
    assert codec.loads(received(payload)) is Local
    del Local, codec, payload
    gc.collect()
    assert alive() is None


@contextmanager
def as_worker(memory: Memory) -> Iterator[Codec]:
    yield Codec(memory)


def test_a_group_that_cannot_be_loaded_names_what_failed(memory):
    class Broken:
        made = Unloadable()

    sender = Codec(memory, definitions := Definitions())
    payload = sender.dumps(Broken)
    ((gid, group),) = definitions.missing(payload.groups, set())
    with as_worker(memory) as worker, pytest.raises(DecodeError, match=r"Broken.*mine") as info:
        worker.load_group(gid, received(group))
    assert isinstance(info.value.__cause__, KeyError)


def test_what_was_pickled_in_vain_lives_until_the_group_is_complete(codec):
    """Storages are told apart by their addresses, so none may be used twice."""
    made: list[weakref.ref[torch.Tensor]] = []
    alive = []

    class Fresh:
        def __reduce__(self) -> object:
            alive.append([tensor() is not None for tensor in made])
            tensor = torch.ones(5)
            made.append(weakref.ref(tensor))
            return torch.clone, (tensor,)

    class Needed:
        pass

    class Root:
        things = (Fresh(), Needed())

    payload = codec.dumps(Root)
    assert alive == [[], [True]], "the second try knows what Needed is"
    assert payload.groups
    gc.collect()
    assert made[0]() is None


def test_payloads_are_small(codec):
    assert len(codec.dumps(7).data) < 10
    assert len(codec.dumps(torch.ones(3)).data) < 150
    assert isinstance(codec.dumps(7), Payload)
