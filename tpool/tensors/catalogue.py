"""What one pool has sent by value, as its group writer has to know it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from tpool.tensors.byvalue import Reduced
from tpool.tensors.names import MISSING, CodeNames, is_class, is_python_class, main_namespace, reachable
from tpool.tensors.payload import DefinitionId, GroupId

__all__ = ["Binding", "Catalogue", "Known"]


@dataclass(slots=True, eq=False)
class Known:
    """A definition: the object, how a stream refers to it, and the group that holds it.

    ``opcodes`` is that reference pickled, once it was asked for: to be put into a stream, without its ends.
    """

    obj: object
    reference: Reduced
    group: GroupId
    opcodes: bytes = b""


@dataclass(slots=True, eq=False)
class Binding:
    """The object that a name was last bound to, and the group that did it."""

    value: object
    group: GroupId


class Catalogue:
    """What one pool has sent by value. Written when a group is complete, under the lock of ``Definitions``.

    Attributes:
        baseline: what forked workers have inherited: global names of ``__main__`` and their values.
        names: what code refers to.
        definitions: by id() of the object, which is kept alive.
        objects: the same objects, by the id they travel by.
        bindings: by name; what was last sent, which is kept alive, so that identity tells a new value.
    """

    def __init__(self, baseline: dict[str, object]) -> None:
        self.baseline = baseline
        self.names = CodeNames()
        self.definitions: dict[int, Known] = {}
        self.objects: dict[DefinitionId, object] = {}
        self.bindings: dict[str, Binding] = {}
        self._ids = itertools.count(1)

    def is_definition(self, obj: Any, name: str | None = None) -> bool:
        """Whether something that cannot be imported travels by id."""
        if is_class(obj):
            return is_python_class(obj)
        return bool(reachable(main_namespace(), obj, name) or self.inherited_name(obj, name))

    def inherited_name(self, obj: Any, name: str | None) -> str | None:
        """The name under which a forked worker has the same object."""
        return reachable(self.baseline, obj, name) if self.baseline else None

    def known(self, obj: object) -> Known | None:
        """The definition of an object that an earlier group defines."""
        return self.definitions.get(id(obj))

    def new_id(self) -> DefinitionId:
        """An id for one more definition."""
        return DefinitionId(next(self._ids))

    def is_current(self, name: str, value: object) -> bool:
        """Whether workers have this value under a name, as far as the caller is concerned."""
        binding = self.bindings.get(name)
        return value is (self.baseline.get(name, MISSING) if binding is None else binding.value)

    def binding_group(self, name: str) -> GroupId | None:
        """The group that last bound a name."""
        binding = self.bindings.get(name)
        return None if binding is None else binding.group
