"""The arithmetic of free memory: size classes, whole pages, and free ranges by size."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TypeVar

from tpool.tensors.memfd import PAGE_NBYTES

__all__ = ["ALIGNMENT", "LARGE_NBYTES", "Extents", "align", "class_nbytes", "popped", "whole_pages_nbytes"]

# A cache line, and what torch's vectorised kernels like best.
ALIGNMENT = 64

# From here on classes are finer: 12.5 % would be a lot of bytes, and a budget may be just large enough. Below it
# coarser classes mean more reuse.
LARGE_NBYTES = 1 << 20

_T = TypeVar("_T")

_ALIGNMENT_SHIFT = ALIGNMENT.bit_length() - 1
_PAGE_SHIFT = PAGE_NBYTES.bit_length() - 1

# How many ranges of one size bucket are tried before larger ones are split. More: tighter packing; fewer: a slow
# search when thousands of holes are a little too small.
_TRIES = 32


def class_nbytes(nbytes: int) -> int:
    """The size of the block that is used for ``nbytes`` (at least 1): the next size class.

    8 classes to a doubling, so at most 12.5 % is lost, and 32 above LARGE_NBYTES; never less than 64 bytes apart, from
    a page on never less than a page apart.
    """
    bits = (nbytes - 1).bit_length()
    if nbytes < PAGE_NBYTES:
        shift = bits - 4 if bits > _ALIGNMENT_SHIFT + 4 else _ALIGNMENT_SHIFT
    else:
        shift = bits - (4 if nbytes <= LARGE_NBYTES else 6)
        if shift < _PAGE_SHIFT:
            shift = _PAGE_SHIFT
    return (nbytes + (1 << shift) - 1) >> shift << shift


def align(offset: int, nbytes: int) -> int:
    """The first place from ``offset`` on where a block of ``nbytes`` may begin."""
    mask = (ALIGNMENT if nbytes < PAGE_NBYTES else PAGE_NBYTES) - 1
    return offset + mask & ~mask


def whole_pages_nbytes(start: int, end: int) -> int:
    """The bytes of the pages that lie wholly between two offsets."""
    nbytes = (end >> _PAGE_SHIFT << _PAGE_SHIFT) - (start + PAGE_NBYTES - 1 >> _PAGE_SHIFT << _PAGE_SHIFT)
    return nbytes if nbytes > 0 else 0


class Extents:
    """Disjoint free ranges of an arena, in buckets by the bit length of their size.

    A range is always either in one bucket or in the hands of one caller: it is taken by one atomic ``list.remove`` or
    ``pop``. So a caller that is interrupted, or within which a collection runs user code that comes back here, can
    make a range invisible for a while but never give it out twice.
    """

    __slots__ = ("_buckets", "_largest")

    def __init__(self) -> None:
        self._buckets: list[list[tuple[int, int]]] = [[] for _ in range(64)]
        self._largest = 0  # no bucket above this one was ever used: there is nothing to look for

    def put(self, start: int, end: int) -> None:
        """Add a free range; an empty one is ignored."""
        if start < end:
            bucket = (end - start).bit_length()
            if bucket > self._largest:
                self._largest = bucket
            self._buckets[bucket].append((start, end))

    def take(self, nbytes: int) -> tuple[int, int] | None:
        """Take out a range in which an aligned block of ``nbytes`` fits: one of the smallest."""
        mask = (ALIGNMENT if nbytes < PAGE_NBYTES else PAGE_NBYTES) - 1
        buckets = [bucket for bucket in self._buckets[nbytes.bit_length() : self._largest + 1] if bucket]
        for tries in (_TRIES, None):
            for bucket in buckets:
                for extent in islice(reversed(bucket), tries):
                    if (extent[0] + mask & ~mask) + nbytes <= extent[1] and _remove(bucket, extent):
                        return extent
        return None

    def take_containing(self, start: int, end: int) -> tuple[int, int] | None:
        """Take out the range that contains all of ``start`` to ``end``."""
        for bucket in islice(self._buckets, (end - start).bit_length(), None):
            for extent in bucket:
                if extent[0] <= start and end <= extent[1] and _remove(bucket, extent):
                    return extent
        return None

    def take_all(self) -> Iterator[tuple[int, int]]:
        """Take out every range, one after the other, as they are asked for."""
        for bucket in self._buckets:
            yield from popped(bucket)

    def peek(self) -> list[tuple[int, int]]:
        """A copy of every range, in no order."""
        return [extent for bucket in self._buckets for extent in bucket]


def popped(items: list[_T]) -> Iterator[_T]:
    """Take out every item, the last one first."""
    while True:
        try:
            item = items.pop()
        except IndexError:  # not looked for before: a signal handler, or user code in a collection, may come between
            return
        yield item


def _remove(bucket: list[tuple[int, int]], extent: tuple[int, int]) -> bool:
    try:
        bucket.remove(extent)
    except ValueError:  # user code inside a collection took it since we looked
        return False
    return True
