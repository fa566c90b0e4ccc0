"""Small storages of one message that share a block: where they lie, what stays true of them, how long they live."""

from __future__ import annotations

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from codec_peer import Far, Peering, codec_for
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS, quiet

from tpool.tensors import leases, moving, torch_private
from tpool.tensors.extents import ALIGNMENT
from tpool.tensors.pickler import Codec
from tpool.tensors.slabs import ALONE, SLAB_NBYTES, SMALL_NBYTES, Slabs
from tpool.tensors.storages import Outgoing


@pytest.fixture(params=["share", "copy"])
def codec(request: pytest.FixtureRequest, peering: Peering) -> Codec:
    return codec_for(peering.arena, request.param)


def numbered(count: int, numel: int = 256) -> list[torch.Tensor]:
    return [torch.full((numel,), float(number)) for number in range(count)]


def live_blocks(peering: Peering) -> int:
    leases.table().collect()
    allocator = leases.table().allocator(peering.arena)
    assert allocator is not None
    return allocator.blocks_in_use


def travel(peering: Peering, codec: Codec, obj: Any, act: str = "echo") -> Any:
    return codec.loads(peering.ask("", codec.dumps(obj), sharing=codec.sharing, act=act))


@given(sizes=st.lists(st.integers(1, 2 * SMALL_NBYTES), max_size=60))
@settings(deadline=None)
def test_no_two_storages_share_a_byte(peering: Peering, sizes: list[int]) -> None:
    blocks: list[leases.Block] = []
    slabs = Slabs(leases.Memory(peering.arena, lambda seconds: False).allocate, blocks)
    taken: dict[int, list[tuple[int, int]]] = {}
    for nbytes in sizes:
        block, start = slabs.claim(nbytes)
        assert start % ALIGNMENT == 0
        place = slabs.place(block, start, nbytes)
        index = place if isinstance(place, int) else place[0]
        assert blocks[index] is block
        if isinstance(place, int):
            assert (start, block.nbytes) == (0, nbytes)
        else:
            assert nbytes <= SMALL_NBYTES
            assert place[1:] == (start, nbytes)
            assert block.nbytes <= SLAB_NBYTES
        taken.setdefault(index, []).append((start, start + nbytes))
    for index, spans in taken.items():
        spans.sort()
        assert spans[-1][1] <= blocks[index].nbytes
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    small = sum(nbytes + ALIGNMENT for nbytes in sizes if nbytes <= SMALL_NBYTES)
    used = sum(block.nbytes for block in blocks if block.nbytes <= SLAB_NBYTES)
    assert used <= 3 * small + 4 * 2 * SMALL_NBYTES + sum(nbytes for nbytes in sizes if nbytes > SMALL_NBYTES)


def test_many_small_tensors_take_few_blocks_and_few_take_what_they_need(codec: Codec) -> None:
    assert len(codec.dumps(numbered(500)).blocks) < ALONE + 15
    payload = codec.dumps(numbered(ALONE))
    assert [block.nbytes for block in payload.blocks] == [1024] * ALONE


def test_every_value_arrives_and_returns(peering: Peering, codec: Codec) -> None:
    generator = random.Random(0)
    sent = [torch.arange(generator.randrange(1, 3000), dtype=torch.int16) + number for number in range(300)]
    back = travel(peering, codec, [tensor.clone() for tensor in sent])
    assert all(torch.equal(one, other) for one, other in zip(sent, back, strict=True))


def test_views_and_aliases_of_small_storages_stay_so(peering: Peering, codec: Codec) -> None:
    bases = numbered(20)
    sent = [
        [base, base[10:20], base.view(16, 16).t(), base.view(torch.int32), base.untyped_storage()] for base in bases
    ]
    for number, (base, part, turned, bits, storage) in enumerate(travel(peering, codec, sent)):
        assert torch.equal(base, bases[number])
        base[12] = 77
        assert part[2] == 77
        assert turned[12, 0] == 77
        assert bits[12] == torch.tensor(77.0).view(torch.int32)
        assert storage.data_ptr() == base.data_ptr()
        assert storage.nbytes() == 1024


def test_the_receivers_writes_are_seen(peering: Peering) -> None:
    tensors = numbered(50)
    travel(peering, codec_for(peering.arena, "share"), tensors, act="write")
    assert all(bool(tensor.eq(99).all()) for tensor in tensors)


def test_a_resend_moves_nothing(peering: Peering) -> None:
    codec = codec_for(peering.arena, "share")
    tensors = numbered(50)
    first = codec.dumps(tensors)
    addresses = [tensor.data_ptr() for tensor in tensors]
    before = live_blocks(peering)
    again = codec.dumps(tensors[::-1])
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    assert live_blocks(peering) == before
    assert len(again.blocks) == len(first.blocks)
    assert len(codec.dumps(tensors[-1]).blocks) == 1


def test_what_arrived_is_sent_on_without_a_copy(peering: Peering) -> None:
    codec = codec_for(peering.arena, "share")
    arrived = travel(peering, codec, 30, act="fresh_many")
    addresses = [tensor.data_ptr() for tensor in arrived]
    assert [tensor.data_ptr() for tensor in travel(peering, codec, arrived)] == addresses
    back = travel(peering, codec, arrived[17])
    assert back.data_ptr() == addresses[17]


def test_a_slab_lives_as_long_as_the_last_storage_in_it(peering: Peering, codec: Codec) -> None:
    before = live_blocks(peering)
    back = travel(peering, codec, numbered(40))
    kept = back[-1]
    del back
    assert kept.eq(39).all()
    more = travel(peering, codec, numbered(40, 250))  # would overwrite what was given back too early
    assert kept.eq(39).all()
    del kept, more
    peering.ask("", codec.dumps(None), sharing=codec.sharing)  # brings the give-backs
    assert live_blocks(peering) == before
    leases.table().check([peering.link.peer])


def dump_together(codec: Codec, obj: Any, barrier: threading.Barrier) -> Any:
    barrier.wait()
    return codec.dumps(obj)


def test_threads_that_send_the_same_small_tensors_find_them_moved_once(peering: Peering) -> None:
    codec = codec_for(peering.arena, "share")
    for _ in range(30):
        tensors, barrier = numbered(40), threading.Barrier(4)
        with ThreadPoolExecutor(4) as threads:
            futures = [threads.submit(dump_together, codec, tensors, barrier) for _ in range(4)]
        for payload in [future.result() for future in futures]:
            decoded = codec.loads(peering.ask("", payload, sharing="share"))
            assert [tensor.data_ptr() for tensor in decoded] == [tensor.data_ptr() for tensor in tensors]


def test_a_place_outside_its_slab_is_refused(peering: Peering) -> None:
    codec = codec_for(peering.arena, "share")
    payload = codec.dumps(numbered(10))
    payload.blocks[-1].nbytes = 64  # a shorter block than the stream counts on
    payload.blocks[-1].view = payload.blocks[-1].view[:64]
    with pytest.raises(Far, match=r"DecodeError: .*requested buffer length"):
        peering.ask("", payload, sharing="share")


@pytest.mark.filterwarnings("ignore:.*(ComplexHalf|quantize|prototype|beta state|TypedStorage|nvariant|jit).*")
@pytest.mark.leaves("torch starts a process that outlives the tensors it names")
@pytest.mark.parametrize("mode", ["share", "copy"])
def test_all_kinds_among_small_tensors(peering: Peering, mode: Any) -> None:
    chosen = [kind for kind in KINDS if kind.status != "refused" and not kind.cuda]
    codec = codec_for(peering.arena, mode)
    with quiet():
        sent = [(numbered(2), kind.make()) for kind in chosen]
        for kind, (few, arrived) in zip(chosen, travel(peering, codec, sent), strict=True):
            kind.check(kind.make(), arrived)
            assert [float(tensor[0]) for tensor in few] == [0, 1], kind.name


def test_memory_elsewhere_is_in_no_slab(peering: Peering) -> None:
    memory = leases.Memory(peering.arena, lambda seconds: False)
    slab, others = memory.allocate(4096), [memory.allocate(4096) for _ in range(8)]
    leases.table().note_slab(slab)
    begin = peering.arena.address + slab.offset
    assert leases.table().locate(begin + 64, 4032) is not None
    for address in (begin + 64, begin + 4096, begin + (1 << 40), begin - 64):
        assert leases.table().locate(address, 4096) is None or address in (
            peering.arena.address + block.offset for block in others
        )


def test_a_storage_of_a_later_message_does_not_land_in_an_old_slab(peering: Peering) -> None:
    memory = leases.Memory(peering.arena, lambda seconds: False)
    first, second = Outgoing(memory), Outgoing(memory)
    tensors = numbered(10)
    for tensor in tensors[:5]:
        first.place(tensor.untyped_storage(), tensor)
    for tensor in tensors[5:]:
        second.place(tensor.untyped_storage(), tensor)
    assert not {block.offset for block in first.blocks} & {block.offset for block in second.blocks}


@pytest.mark.parametrize("inner_sends", ["the tensor", "its list"])
@pytest.mark.parametrize("outer_sends", ["the tensor", "its list"])
@pytest.mark.parametrize("moment", ["before the copy", "after the copy", "after the last look"])
@pytest.mark.parametrize("numel", [1000, 5000])  # in a slab, and with a block of its own
def test_a_signal_handler_that_sends_what_is_being_sent(
    peering: Peering, monkeypatch: pytest.MonkeyPatch, numel: int, moment: str, outer_sends: str, inner_sends: str
) -> None:
    """In the same thread, in the middle of the move; played by what the move calls."""
    codec = codec_for(peering.arena, "share")
    tensors = [torch.full((numel,), 7.0) for _ in range(40)]
    tensor = tensors[5]  # the sixth to be moved, where all of them are
    calls = 0
    inner: list[Any] = []
    copy, look = moving._memmove, torch_private.only_owner

    def payload_of(what: str) -> Any:
        return codec.dumps([tensor] if what == "the tensor" else tensors)

    def interrupt() -> None:
        if not inner:
            inner.append(None)
            inner[0] = payload_of(inner_sends)
            tensor.add_(1)  # which the receiver of the inner message is to see

    def copy_interrupted(*arguments: int) -> None:
        nonlocal calls
        calls += 1
        met = calls == (6 if outer_sends == "its list" else 1)
        if met and moment == "before the copy":
            interrupt()
        copy(*arguments)
        if met and moment == "after the copy":
            interrupt()

    def look_interrupted(*arguments: Any) -> bool:
        found = look(*arguments)
        if moment == "after the last look" and arguments[1] is tensor:
            interrupt()
        return found

    monkeypatch.setattr(moving, "_memmove", copy_interrupted)
    monkeypatch.setattr(torch_private, "only_owner", look_interrupted)
    outer = payload_of(outer_sends)
    monkeypatch.undo()
    assert inner
    assert hasattr(tensor.untyped_storage(), moving._PARKED), "the outer move might have read memory that is gone"
    assert bool(tensor.eq(8).all())
    for payload, what in ((inner[0], inner_sends), (outer, outer_sends)):
        arrived = codec.loads(peering.ask("", payload, act="echo"))
        assert len(arrived) == (1 if what == "the tensor" else 40)
        assert [float(each[7]) for each in arrived] == [
            8.0 if len(arrived) == 1 or at == 5 else 7.0 for at in range(len(arrived))
        ]
        assert arrived[0 if len(arrived) == 1 else 5].data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("numel", [1000, 5000])
def test_a_storage_at_its_old_address_that_has_become_smaller_does_not_move(numel: int) -> None:
    tensor = torch.full((numel,), 7.0)
    storage = tensor.untyped_storage()
    before = storage.data_ptr()
    nbytes = 2 * storage.nbytes()  # as large as it was when it was looked at
    assert not moving.move_storage(storage, before, nbytes, torch.UntypedStorage(nbytes), tensor)
    assert storage.data_ptr() == before
    assert tensor.eq(7).all()


def test_a_large_storage_does_not_wait_for_the_copy_of_another_one(
    peering: Peering, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = codec_for(peering.arena, "share")
    first, *others = numbered(20, 5000)
    lock = moving._moving(first.untyped_storage(), first.nbytes)
    other = next(each for each in others if moving._moving(each.untyped_storage(), each.nbytes) is not lock)
    first_address, copy = first.data_ptr(), moving._memmove
    copying, go_on = threading.Event(), threading.Event()

    def copy_slowly(to: int, source: int, nbytes: int) -> None:
        if source == first_address:
            copying.set()
            assert go_on.wait(60)
        copy(to, source, nbytes)

    monkeypatch.setattr(moving, "_memmove", copy_slowly)
    with ThreadPoolExecutor(2) as executor:
        slow = executor.submit(codec.dumps, first)
        assert copying.wait(60)
        try:
            quick = executor.submit(codec.dumps, other).result(60)
            assert not slow.done()
        finally:
            go_on.set()
        payloads = [slow.result(60), quick]
    monkeypatch.undo()
    arrived = [codec.loads(peering.ask("", payload)) for payload in payloads]
    assert [float(each.sum()) for each in arrived] == [float(each.sum()) for each in (first, other)]


@pytest.mark.parametrize("outer", ["share", "copy"])
@pytest.mark.parametrize("numel", [1000, 5000])
def test_many_bytes_that_a_signal_handler_sends_in_the_middle_of_their_move_stay(
    peering: Peering, monkeypatch: pytest.MonkeyPatch, outer: Any, numel: int
) -> None:
    """So many that the inner message looks closely at what it has parked."""
    monkeypatch.setattr(moving, "PARKED_LIMIT_NBYTES", 1)
    tensor = torch.full((numel,), 7.0)
    copy = moving._memmove
    inner: list[Any] = []

    def copy_interrupted(*arguments: int) -> None:
        if not inner:
            inner.append(None)
            inner[0] = codec_for(peering.arena, "share").dumps([tensor])
            assert hasattr(tensor.untyped_storage(), moving._PARKED), "the outer copy reads memory that is gone"
        copy(*arguments)

    monkeypatch.setattr(moving, "_memmove", copy_interrupted)
    payload = codec_for(peering.arena, outer).dumps([tensor])
    monkeypatch.undo()
    assert inner
    for each in (inner[0], payload):
        assert codec_for(peering.arena, "share").loads(peering.ask("", each))[0].eq(7).all()


@pytest.mark.parametrize(("numel", "blocks"), [(256, 1), (5000, 40)])
def test_of_a_list_only_what_others_know_stays_parked(peering: Peering, numel: int, blocks: int) -> None:
    tensors = numbered(40, numel)
    known = tensors[7].numpy()
    view = tensors[9][:5]
    payload = codec_for(peering.arena, "share").dumps(tensors)
    parked = [at for at, tensor in enumerate(tensors) if vars(tensor.untyped_storage())]
    assert parked == [7, 9]
    assert known.tolist() == [7.0] * numel  # its memory is still there
    assert view.tolist() == [9.0] * 5
    assert len(payload.blocks) == blocks


@pytest.mark.parametrize("numel", [256, 5000])
def test_a_list_of_which_some_lie_in_blocks_and_some_are_sent_twice(peering: Peering, numel: int) -> None:
    codec = codec_for(peering.arena, "share")
    tensors = numbered(60, numel)
    kept = [codec.dumps(tensors[at]) for at in (10, 11, 59)]
    again = tensors[40].view(numel)
    before = {at: tensors[at].data_ptr() for at in (10, 11, 59)}
    back = travel(peering, codec, [*tensors, again])
    assert [float(tensor[3]) for tensor in back] == [*map(float, range(60)), 40.0]
    assert {at: tensors[at].data_ptr() for at in before} == before
    back[60][3] = 77
    assert float(back[40][3]) == float(tensors[40][3]) == 77
    assert len(kept) == 3
