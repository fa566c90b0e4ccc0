"""Writes one group of definitions and bindings, in an order in which a worker can rebuild them."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, Protocol

from tpool.tensors.byvalue import NAMED_TYPES, Reduced, class_attributes, reduce_here, reduce_skeleton
from tpool.tensors.catalogue import Catalogue
from tpool.tensors.names import (
    MISSING,
    annotated_names,
    importable,
    is_class,
    is_function,
    main_namespace,
    of_main,
    reachable,
)
from tpool.tensors.payload import DefinitionId, GroupId, Payload
from tpool.tensors.registry import BIND, DEFINE, FILL, LACK, definition, inherited

__all__ = ["GroupPickler", "GroupWriter"]


class GroupPickler(Protocol):
    """What a group is written with (see ``pickler.py``): one memo over all units.

    Attributes:
        copies: namespaces that are no module's, see ``byvalue.reduce_function``.
    """

    copies: dict[int, dict[str, Any]]

    def write(self, kind: str, key: object, body: list[Any]) -> list[Any]:
        """Pickle one unit; gives the mark that ``undo`` needs. If it raises, nothing was written."""
        ...

    def undo(self, mark: list[Any]) -> None:
        """Forget the unit written last."""
        ...

    def finish(self) -> Payload | None:
        """All units; None if there are none."""
        ...

    def close(self) -> None:
        """Let go of everything but the finished payload."""
        ...


class GroupWriter:
    """Puts definitions and bindings into one group, in an order in which they can be rebuilt.

    Rebuilding runs code of the user (``__setstate__``, what ``__reduce__`` names, ``__init_subclass__``), and that
    must find what it mentions. So a unit that turns out to need a definition is written after it; a definition is
    complete when the names it mentions are bound; and a cycle is entered at the class without its attributes.

    Names are bound from a plan, made beforehand and without recursion: a program is a deeper graph than the stack is.

    Attributes:
        members: by id(): objects that this group defines or finds inherited, and how streams refer to them.
        defined: those that it defines, by id.
        names: names that they mention, bound or to be bound or not.
        bound: names that this group binds, and to what.
        requires: earlier groups.
    """

    def __init__(self, catalogue: Catalogue, open_group: Callable[[Any], GroupPickler]) -> None:
        self.members: dict[int, tuple[object, Reduced]] = {}
        self.defined: dict[DefinitionId, object] = {}
        self.names: dict[str, None] = {}
        self.bound: dict[str, object] = {}
        self.requires: set[GroupId] = set()
        self._catalogue = catalogue
        self._pickler = open_group(self)
        self._hooks: list[tuple[type, dict[str, Any]]] = []
        self._begun: set[str] = set()  # names of which no plan need think any more
        self._urgent = False  # whether what is defined now will be used while the group is loaded
        # Of the unit that is being pickled: what it needs first, and what functions inside it mention.
        self._needs: list[tuple[Any, str | None]] = []
        self._mentioned: list[str] = []

    def finish(self) -> Payload | None:
        """The group's payload."""
        while self._hooks:
            self._fill(*self._hooks.pop(0))
        return self._pickler.finish()

    def close(self) -> None:
        """Let go of all that was pickled; the payload has what it needs."""
        self._pickler.close()
        del self._pickler

    def define(self, obj: Any, name: str | None = None) -> None:
        """Make sure that a definition exists, with all that it mentions."""
        catalogue = self._catalogue
        known = catalogue.known(obj)
        if known is not None:
            self.requires.add(known.group)
        if known is not None or id(obj) in self.members:
            return
        qualname = catalogue.inherited_name(obj, name)
        if qualname is not None:
            self.members[id(obj)] = (obj, (inherited, (qualname,)))
            self.bind_all(catalogue.names.globals_within(obj))
            return
        definition_id = catalogue.new_id()
        self.members[id(obj)] = (obj, (definition, (definition_id,)))
        try:
            self._write(DEFINE, definition_id, [obj])
        except BaseException:
            del self.members[id(obj)]
            raise
        self.defined[definition_id] = obj
        if is_class(obj):
            self._complete_class(obj)
        found = reachable(main_namespace(), obj, name)
        if found is not None:
            self.bind_all([found.split(".")[0]])

    def bind_all(self, names: Iterable[str]) -> None:
        """Make sure that these names are bound, where the caller has them."""
        for name in self._plan(names):
            if name not in self._begun:
                self._begun.add(name)
                self._bind(name)

    def _plan(self, names: Iterable[str]) -> list[str]:
        """These names and all that they lead to, each after what it leads to."""
        order: list[str] = []
        seen: set[str] = set()
        path: list[tuple[str | None, Iterator[str]]] = [(None, iter(names))]
        while path:
            for name in path[-1][1]:
                # What an earlier plan will come to, waits for its turn; unless it is wanted now.
                if name not in self._begun and name not in seen and (self._urgent or name not in self.names):
                    seen.add(name)
                    path.append((name, iter(self._leads_to(name))))
                    break
            else:
                done, _ = path.pop()
                if done is not None:
                    order.append(done)
        self.names.update(dict.fromkeys(order))
        return order

    def _leads_to(self, name: str) -> list[str]:
        value = main_namespace().get(name, MISSING)
        within = self._catalogue.names.globals_within
        return [each for obj in (value, type(value)) if _may_be_defined(obj) for each in within(obj)]

    def reduce(self, obj: Any, name: str | None, message: GroupPickler) -> Any:
        """How a unit refers to a function, a class, or another object that is known by its name."""
        catalogue = self._catalogue
        known = catalogue.known(obj)
        if known is not None:
            self.requires.add(known.group)
            return known.reference
        if importable(obj):
            return NotImplemented
        if catalogue.is_definition(obj, name):
            member = self.members.get(id(obj))
            if member is None:
                self._needs.append((obj, name))
                return list, ()  # never read: this unit is written again
            if member[1][0] is inherited:
                return member[1]
            if is_class(obj):
                return reduce_skeleton(obj)
        if of_main(obj):
            self._mentioned.extend(catalogue.names.globals_of(obj))
        return reduce_here(obj, message.copies, catalogue.names)

    def _complete_class(self, cls: type) -> None:
        methods, others, hooks = class_attributes(cls)
        if type(cls) in (type, ABCMeta) and not methods.keys().isdisjoint(_REBUILDERS):
            # Rebuilding an instance among its own attributes runs these, and they may look at others of them.
            self._fill(cls, {name: _provisional(value) for name, value in others.items()})
        for method in methods.values():
            with suppress(Exception):  # it will be left out below
                self._define_if_needed(getattr(method, "__func__", method))
        self._fill(cls, methods)
        self.bind_all(annotated_names(cls))
        self._fill(cls, others)
        # Last of all: rebuilding subclasses must not run it, for what it did in the caller travels as state.
        self._hooks.append((cls, hooks))

    def _define_if_needed(self, obj: Any) -> None:
        if _may_be_defined(obj) and self._catalogue.is_definition(obj):
            self.define(obj)

    def _fill(self, cls: type, attributes: dict[str, Any]) -> None:
        if not attributes:
            return
        try:
            self._write(FILL, cls.__qualname__, [cls, attributes])
        except MemoryError:
            raise
        except Exception:  # one by one, to leave out only what cannot travel
            for name, value in attributes.items():
                try:
                    self._write(FILL, cls.__qualname__, [cls, {name: value}])
                except MemoryError:
                    raise
                except Exception as error:
                    self._write(LACK, name, [cls, _reason(error)])

    def _bind(self, name: str) -> None:
        value = main_namespace().get(name, MISSING)
        if value is MISSING:
            return
        previous = self._catalogue.binding_group(name)
        if previous is not None:
            self.requires.add(previous)
        current = self._catalogue.is_current(name, value)
        urgent, self._urgent = self._urgent, False  # the plan has seen to what this needs
        try:
            # Known to be needed, so better before than after a vain attempt to pickle the value. And what a forked
            # worker has inherited may mention names that have changed since.
            for obj in (value, type(value)):
                self._define_if_needed(obj)
            if not current:
                self._write(BIND, name, [value])
        except MemoryError:
            raise
        except Exception as error:
            self._write(LACK, name, [None, _reason(error)])
        finally:
            self._urgent = urgent
        if not current:
            self.bound[name] = value

    def _write(self, kind: str, key: object, body: list[Any]) -> None:
        """Write one unit, after what it needs, and before the names that it mentions."""
        while True:
            self._needs, self._mentioned = [], []
            mark = self._pickler.write(kind, key, body)
            needs, mentioned = self._needs, self._mentioned
            if not needs:
                break
            self._pickler.undo(mark)
            urgent, self._urgent = self._urgent, True
            try:
                for obj, name in needs:
                    self.define(obj, name)
            finally:
                self._urgent = urgent
        self.bind_all(mentioned)


def _may_be_defined(obj: object) -> bool:
    """Ask no more of any object than its type: what is global may be a proxy whose attributes raise."""
    return (is_class(obj) or is_function(obj) or type(obj) in NAMED_TYPES) and not importable(obj)


_REBUILDERS = ("__new__", "__init__", "__setstate__")


def _provisional(value: object) -> object:
    """What an attribute is until it can be rebuilt."""
    kind = type(value)
    if kind in (list, dict, set):
        return kind()
    return value if kind in (bool, int, float, str, bytes) else None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
