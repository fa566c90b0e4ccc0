"""A function of several arguments, called with an item that holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


class Starred:
    """Calls ``function(*item)``; travels in the function's place.

    Args:
        function: the user's.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, item: Iterable[Any]) -> Any:
        """Call the user's function."""
        return self._function(*item)
