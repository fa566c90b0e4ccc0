"""What a worker has received by value, and what a group of definitions consists of.

A group is a series of units, each pickled as a list ``[kind, key]`` and a list with its body:

========  ======================  =======================================================================
kind      key                     body
========  ======================  =======================================================================
DEFINE    id                      function, or class still without attributes
FILL      name, for messages      a class, and attributes for it
BIND      global name             its value
LACK      name                    the class whose attribute it is (None: a global), why it could not travel
========  ======================  =======================================================================
"""

from __future__ import annotations

import sys
import types
from typing import Any, NoReturn

from tpool.errors import TransportError
from tpool.tensors.byvalue import fill_class, reduce_class, reduce_here
from tpool.tensors.held import Keeper
from tpool.tensors.names import CodeNames, importable, is_python_class, lookup, main_namespace, reachable
from tpool.tensors.payload import DefinitionId

__all__ = ["BIND", "DEFINE", "FILL", "LACK", "Registry", "Unsendable", "definition", "inherited"]

DEFINE = "define"
FILL = "fill"
BIND = "bind"
LACK = "lack"


def definition(id: DefinitionId) -> NoReturn:
    """In a stream, stands for a definition that the receiver has."""
    raise TransportError(f"definition {id} is known only to the pool that made it")


def inherited(qualname: str) -> NoReturn:
    """In a stream, stands for what a forked worker had from the start."""
    raise TransportError(f"__main__.{qualname} is known only to the pool that forked this worker")


class Unsendable:
    """Stands in a worker for what could not be pickled; any use of it raises ``TransportError``."""

    def __init__(self, what: str, why: str) -> None:
        self.__dict__.update(what=what, why=why)

    def __repr__(self) -> str:
        return f"<{self.__dict__['what']}, which could not be sent>"

    def _raise(self, *_: object, **__: object) -> NoReturn:
        raise TransportError(
            f"{self.__dict__['what']} could not be sent to this worker ({self.__dict__['why']}); make it in the"
            " worker, in an initializer or where it is used; locks, queues and pipes may go by initargs"
        )

    __getattr__ = __setattr__ = __delattr__ = __call__ = __reduce_ex__ = _raise
    __enter__ = __exit__ = __iter__ = __next__ = __len__ = __bool__ = __contains__ = _raise
    __getitem__ = __setitem__ = __delitem__ = __int__ = __float__ = __index__ = _raise
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _raise
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _raise
    __hash__ = object.__hash__


class Registry:
    """What a worker has received by value: the other end of ``Definitions``.

    Groups are taken in by one thread; any may ask.

    Args:
        baseline: in a forked worker: the ``baseline`` of the caller's Definitions.

    Attributes:
        keeper: the objects that were put into the pool.
    """

    def __init__(self, baseline: dict[str, object] | None = None) -> None:
        self.baseline: dict[str, object] = {} if baseline is None else baseline
        self.names = CodeNames()
        self.keeper = Keeper()
        self._objects: dict[DefinitionId, object] = {}
        self._ids: dict[int, DefinitionId] = {}  # by id() of the object, which is kept alive

    def apply(self, kind: str, key: Any, body: list[Any]) -> None:
        """Take in one unit of a group."""
        if kind == DEFINE:
            self._objects[key] = body[0]
            self._ids[id(body[0])] = key
        elif kind == FILL:
            fill_class(*body)
        elif kind == BIND:
            main_namespace()[key] = body[0]
        elif body[0] is None:
            main_namespace()[key] = Unsendable(f"the global {key!r} of the caller's __main__", body[1])
        else:
            what = f"the attribute {key!r} of class {body[0].__qualname__!r}"
            fill_class(body[0], {key: Unsendable(what, body[1])})

    def resolve(self, id: DefinitionId) -> object:
        """What was received under this id."""
        return self._objects[id]

    def inherited(self, qualname: str) -> object:
        """What this worker had under a name of ``__main__`` when it was forked."""
        return lookup(self.baseline, qualname)

    def reduce(self, obj: Any, name: str | None, message: Any) -> Any:
        """How a result refers to a function, a class, or another object that is known by its name."""
        known = self._ids.get(id(obj))
        if known is not None:
            return definition, (known,)
        if importable(obj):
            return NotImplemented
        qualname = reachable(self.baseline, obj, name) if self.baseline else None
        if qualname is not None:
            return inherited, (qualname,)
        if is_python_class(obj):
            return reduce_class(obj)
        if _belongs_to_a_module(obj):
            return NotImplemented
        return reduce_here(obj, message.copies, self.names)


def _belongs_to_a_module(obj: Any) -> bool:
    """Whether it is a nested function or lambda of an importable module.

    As a result it is refused, as by the standard library: a program that counts on ``MaybeEncodingError`` gets it. As
    an argument, and from ``__main__``, such functions travel by value.
    """
    if not isinstance(obj, types.FunctionType) or obj.__module__ in (None, "__main__", "__mp_main__"):
        return False
    return getattr(sys.modules.get(obj.__module__), "__spec__", None) is not None
