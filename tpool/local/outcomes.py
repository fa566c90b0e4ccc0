"""What came of a task, as a payload: its value, or its exception."""

from __future__ import annotations

import traceback
from typing import Any

from tpool.errors import MaybeEncodingError, TpoolError
from tpool.local.calls import Marks, leave_early
from tpool.local.story import format_remote, safe_repr
from tpool.tensors.payload import Payload
from tpool.tensors.pickler import Codec
from tpool.tensors.plain import dumps_plain

__all__ = ["encode_error", "encode_value"]


def encode_value(codec: Codec, held: list[Any], marks: Marks) -> Payload | bytes:
    """A value, as a plain stream where that is enough.

    Args:
        codec: pickles.
        held: what the task has just returned, alone in a list that nobody else knows; empty afterwards.
        marks: is told so.

    Raises:
        TpoolError: it cannot travel.
        MaybeEncodingError: pickling it raised.
    """
    marks.ended()
    leave_early(held, codec)
    value = held.pop()
    try:
        stream = dumps_plain(value)
        return codec.dumps(value) if stream is None else stream
    except TpoolError:
        raise  # tells what cannot travel, and why, better than we could
    except Exception as error:
        raise MaybeEncodingError(error, safe_repr(value)) from error


def encode_error(codec: Codec, error: BaseException) -> tuple[Payload, str]:
    """An exception as (payload, traceback text)."""
    tb = format_remote(error)
    try:
        payload = codec.dumps(error)
    except Exception as reason:
        payload = codec.dumps(MaybeEncodingError(reason, safe_repr(error)))
    # The frames of the traceback hold the task's arguments.
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = None
    return payload, tb
