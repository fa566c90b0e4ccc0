"""Which exceptions of a task are tried again: found out in the worker, where the classes are known.

Results pass the pool's threads undecoded, so nobody there can say of what class an exception is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Faltered(BaseException):
    """Carries an exception from the call to the worker's loop, which tells the pool that it is one to be tried again.

    Args:
        error: what the user's function raised.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class Faltering:
    """A function whose exceptions of some classes are tried again; called in the worker in the function's place.

    Args:
        function: the user's.
        caught: the classes.
    """

    def __init__(self, function: Callable[..., Any], caught: tuple[type[BaseException], ...]) -> None:
        self._function = function
        self._caught = caught

    def __call__(self, *args: Any, **kwds: Any) -> Any:
        """Call the user's function.

        Raises:
            Faltered: it raised an exception of these classes.
            BaseException: it raised another.
        """
        try:
            return self._function(*args, **kwds)
        except self._caught as error:
            raise Faltered(error) from None
