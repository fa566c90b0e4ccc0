"""The bodies of the frames between a pool and its local workers: plain structs around opaque pickles.

Handles stand outside the pickle, so that whoever reads a frame takes the leases at once, without running anybody's
code; what is pickled is decoded later, by whoever needs it.

A payload on the wire::

    | flags u8 | - | fd_count u16 | block_count u32 | inline_nbytes u32 |
    | block_count x (arena id u64, offset u64, nbytes u64) | inline pickle |

With ``DATA_IN_BLOCK`` the pickle lies in the last block and nothing is inline.
"""

from __future__ import annotations

import marshal
import struct
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any

from tpool.errors import ProtocolError
from tpool.tensors.leases import Block
from tpool.tensors.pickler import Payload, Received


class Kind(IntEnum):
    """What a frame says; the first group goes both ways, the second to a worker, the third from one."""

    ARENA = 1
    GIVE_BACKS = 2

    HELLO = 10
    INITIALIZER = 11
    GROUP = 12
    JOB = 13
    TASKS = 14
    FORGET = 15
    RETIRE = 16
    HOPELESS = 17
    TRIM = 18
    PLAIN_TASKS = 19
    GRANT = 26
    SPAN = 33
    OBJECT = 30
    DROP_OBJECTS = 31

    READY = 20
    INITIALIZER_FAILED = 21
    RESULT = 22
    SETTLED = 23
    STARVING = 24
    TRIMMED = 34
    BELL = 25
    FALTERED = 27
    LINGERING = 28
    EXIT_FAILED = 29
    OVERWEIGHT = 32


class Mode(IntEnum):
    """How a job's function meets a task's payload."""

    APPLY = 0  # payload is ((args, kwds), function); the job has no payload of its own
    CALL = 1  # function(item)
    MAP = 2  # [function(item) for item in chunk]


class Status(IntEnum):
    """What a result frame carries."""

    VALUE = 0
    ERROR = 1


DATA_IN_BLOCK = 1

_PAYLOAD = struct.Struct("<BxHII")
_BLOCK = struct.Struct("<QQQ")
_ID = struct.Struct("<Q")
_GIVE_BACK = struct.Struct("<QQI")
_COUNT = struct.Struct("<I")
_PLACE = struct.Struct("<QQ")
TASK = struct.Struct("<QQ")
RESULT = struct.Struct("<QQdBIQ")  # job, index, seconds, status, nbytes of the traceback, outbox entries before it
JOB = struct.Struct("<QB")
SPAN = struct.Struct("<QQII")  # job, index, which of the stream's items is the first, and how many follow from there

ReceiveBlock = Callable[[int, int, int], Block]


def pack_payload(payload: Payload | bytes) -> bytes:
    """A payload, or a plain stream, as it stands in a frame's body; its descriptors go with the frame."""
    if isinstance(payload, bytes):
        return _PAYLOAD.pack(0, 0, 0, len(payload)) + payload
    flags = 0
    data = payload.data
    blocks = payload.blocks
    if isinstance(data, bytes):
        if not blocks:
            return _PAYLOAD.pack(flags, len(payload.fds), 0, len(data)) + data
    else:
        flags = DATA_IN_BLOCK
        blocks = [*blocks, data]
        data = b""
    head = _PAYLOAD.pack(flags, len(payload.fds), len(blocks), len(data))
    pack = _BLOCK.pack
    return b"".join([head, *[pack(block.arena.id, block.offset, block.nbytes) for block in blocks], data])


def unpack_payload(body: bytes, position: int, fds: list[int], receive: ReceiveBlock) -> tuple[Received, int]:
    """Read a payload, taking a lease on each of its blocks.

    Args:
        body: the frame's body.
        position: where the payload begins.
        fds: the frame's descriptors; the payload takes its own from the front.
        receive: takes the lease on (arena id, offset, nbytes).

    Returns:
        The payload, and where it ends.

    Raises:
        ProtocolError: the bytes are not a payload, or a handle points outside its arena.
    """
    try:
        flags, fd_count, block_count, inline_nbytes = _PAYLOAD.unpack_from(body, position)
    except struct.error as error:
        raise ProtocolError("a payload is cut off") from error
    position += _PAYLOAD.size
    if not (block_count or fd_count or flags):  # the common case of small results
        end = position + inline_nbytes
        if end > len(body):
            raise ProtocolError("a payload is longer than its frame")
        return Received(body[position:end], [], []), end
    end = position + block_count * _BLOCK.size + inline_nbytes
    if end > len(body) or fd_count > len(fds):
        raise ProtocolError("a payload is longer than its frame")
    blocks: list[Block] = []
    if block_count:
        numbers = struct.unpack_from(f"<{3 * block_count}Q", body, position)
        handles = iter(numbers)
        blocks = [receive(arena, offset, nbytes) for arena, offset, nbytes in zip(handles, handles, handles)]
        position += block_count * _BLOCK.size
    data: bytes | Block = body[position:end]
    if flags & DATA_IN_BLOCK:
        if not blocks:
            raise ProtocolError("a payload names a block it does not carry")
        data = blocks.pop()
    taken = fds[:fd_count]
    del fds[:fd_count]
    return Received(data, blocks, taken), end


class Items:
    """The payload of a span, or of what is left of one: a plain stream of a tuple of light items."""

    __slots__ = ("stream",)

    def __init__(self, stream: bytes) -> None:
        self.stream = stream


def pack_plain_tasks(tasks: Any) -> bytes:
    """A list of (job, index, plain stream), as a body; both ends are the same Python."""
    return marshal.dumps(tasks, 2)  # a newer format looks for shared objects, which takes longer


def unpack_plain_tasks(body: bytes) -> list[tuple[int, int, bytes]]:
    """The tasks of ``pack_plain_tasks``; only for what the parent wrote, as garbage may crash the interpreter."""
    tasks: list[tuple[int, int, bytes]] = marshal.loads(body)
    return tasks


def is_plain_result(body: bytes) -> bool:
    """Whether the payload of a RESULT frame is all in the frame."""
    text_nbytes = _unpack(RESULT, body)[4]
    flags, fd_count, block_count, _ = _unpack(_PAYLOAD, body, RESULT.size + text_nbytes)
    return not (flags or fd_count or block_count)


def all_blocks(payload: Payload | Received) -> list[Block]:
    """Every block that a payload names, that of the pickle itself included; a new list where there are any."""
    if isinstance(payload.data, bytes):
        return payload.blocks[:]
    return [*payload.blocks, payload.data]


def moved_nbytes(payload: Payload | Received) -> int:
    """How many bytes go by handle instead of through the pipe."""
    return sum([block.nbytes for block in all_blocks(payload)])


def carried_nbytes(payload: Payload | Received | bytes) -> int:
    """How many bytes of data a payload stands for, by handle and by copy."""
    if type(payload) is bytes:
        return len(payload)
    assert not isinstance(payload, bytes)
    nbytes = sum([block.nbytes for block in payload.blocks])
    data = payload.data
    return nbytes + (len(data) if isinstance(data, bytes) else data.nbytes)


def pack_give_backs(give_backs: list[tuple[int, int, int]]) -> bytes:
    """(arena id, offset, count) triples as a body."""
    return b"".join([_GIVE_BACK.pack(*give_back) for give_back in give_backs])


def unpack_give_backs(body: bytes) -> Iterator[tuple[int, int, int]]:
    """The triples of ``pack_give_backs``."""
    _check_multiple(body, _GIVE_BACK.size)
    yield from _GIVE_BACK.iter_unpack(body)


def pack_ids(ids: list[int]) -> bytes:
    """Ids as a body."""
    return struct.pack(f"<{len(ids)}Q", *ids)


def unpack_ids(body: bytes) -> tuple[int, ...]:
    """The ids of ``pack_ids``."""
    _check_multiple(body, _ID.size)
    return struct.unpack(f"<{len(body) // _ID.size}Q", body)


def pack_id(number: int) -> bytes:
    """One id, alone or in front of a payload."""
    return _ID.pack(number)


def unpack_id(body: bytes) -> int:
    """The id at the front of a body."""
    return int(_unpack(_ID, body)[0])


def pack_place(arena_id: int, offset: int) -> bytes:
    """Where a block lies, as a body."""
    return _PLACE.pack(arena_id, offset)


def unpack_place(body: bytes) -> tuple[int, int]:
    """The (arena id, offset) of ``pack_place``."""
    arena_id, offset = _unpack(_PLACE, body)
    return arena_id, offset


def pack_count(count: int) -> bytes:
    """A small number as a body."""
    return _COUNT.pack(count)


def unpack_count(body: bytes) -> int:
    """The number of ``pack_count``."""
    return int(_unpack(_COUNT, body)[0])


ID_NBYTES = _ID.size
COUNT_NBYTES = _COUNT.size


def unpack_head(layout: struct.Struct, body: bytes, position: int = 0) -> tuple[int, ...]:
    """The fixed fields that stand at ``position``; raises ProtocolError where the body is too short."""
    return _unpack(layout, body, position)


def _unpack(layout: struct.Struct, body: bytes, position: int = 0) -> tuple[int, ...]:
    try:
        return layout.unpack_from(body, position)
    except struct.error as error:
        raise ProtocolError(f"a frame of {len(body)} bytes is cut off") from error


def _check_multiple(body: bytes, nbytes: int) -> None:
    if len(body) % nbytes:
        raise ProtocolError(f"a frame of {len(body)} bytes does not hold whole entries of {nbytes}")
