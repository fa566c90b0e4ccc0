"""How much memory the items of a stream take that are drawn and not yet consumed."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence

Piece = tuple[Hashable, int]
"""A piece of shared memory that an item refers to: what tells it from all others, and how many bytes."""


class Outstanding:
    """The weights of the items that are drawn and not consumed. Used by one thread.

    A piece of shared memory that several of them refer to counts once: a tensor that is sent again takes no more.

    An unordered stream may consume another item than the oldest; what counts as outstanding is then the latest ones,
    as many as there are. The latest item of all stays: it tells what the next one may take.

    Attributes:
        nbytes: of all of them.
    """

    __slots__ = ("_added", "_count", "_items", "_users", "nbytes")

    def __init__(self) -> None:
        self.nbytes = 0
        self._added = 0  # the sum of what each of them made it more
        self._count = 0
        # (how many such items, own bytes, what each added, pieces); only items without pieces are put together
        self._items: deque[tuple[int, int, int, Sequence[Piece]]] = deque()
        self._users: dict[Piece, int] = {}  # how many items refer to a piece

    @property
    def mean_nbytes(self) -> int:
        """By how much an item made it more, in the mean."""
        return self._added // self._count if self._count else 0

    def add(self, own_nbytes: int, pieces: Sequence[Piece]) -> None:
        """An item was drawn, with so many bytes of its own and these pieces of shared memory."""
        added = own_nbytes
        for piece in pieces:
            users = self._users.get(piece, 0)
            self._users[piece] = users + 1
            if not users:
                added += piece[1]
        self.nbytes += added
        self._added += added
        self._count += 1
        self._items.append((1, own_nbytes, added, pieces))

    def add_light(self, count: int, nbytes: int) -> None:
        """So many items were drawn, with so many bytes in all."""
        each = nbytes // count
        self.nbytes += each * count
        self._added += each * count
        self._count += count
        self._items.append((count, each, each, ()))

    def keep(self, count: int) -> None:
        """Only the latest ``count`` are outstanding."""
        items = self._items
        while (surplus := self._count - max(1, count)) > 0:
            alike, own_nbytes, added, pieces = items.popleft()
            if alike > surplus:
                items.appendleft((alike - surplus, own_nbytes, added, pieces))
                alike = surplus
            self._count -= alike
            self.nbytes -= alike * own_nbytes
            self._added -= alike * added
            for piece in pieces:
                users = self._users.pop(piece) - 1
                if users:
                    self._users[piece] = users
                else:
                    self.nbytes -= piece[1]
