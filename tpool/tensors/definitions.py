"""Functions and classes that travel by value: once per worker and version, later by id.

::

    caller's process                                          worker
      Definitions ── group: defines f, C; binds np, model ──►   Registry ──► the names of its __main__
          │  ▲                                                     │
          │  └──────── a result names C by id: the caller's own ───┘
          └── payload: "call definition 1", needs groups (1,) ──►

What travels by value, and how:

- functions, classes (and cached functions, ``NewType`` and the like) of ``__main__`` that are found there under their
  qualified name, and all classes that cannot be imported: as *definitions*, by id. A version is the object itself.
- other functions that cannot be imported (lambdas, nested ones, redefined ones): in the stream, each time.

All functions of the caller's ``__main__`` run in the worker's ``__main__``: one namespace per worker. The names that
they mention are *bound* there when they are first needed, and again only when the caller has bound the name to another
object since. So what an initializer or a task sets, stays. What cannot be pickled is bound to a stand-in that says so
when it is used: a function may mention a name that its worker never touches.

Definitions and bindings travel in *groups*, in the order in which they were made. Invariants: an object has one
definition; a group is made before the first payload that needs it is complete; a group that binds a name
again requires the one before, so that a worker never gets them in the wrong order.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import is_
from typing import Any

from tpool.tensors.byvalue import reduce_here
from tpool.tensors.catalogue import Binding, Catalogue, Known
from tpool.tensors.groups import GroupPickler, GroupWriter
from tpool.tensors.names import MISSING, importable, lookup, main_namespace, of_main
from tpool.tensors.payload import DefinitionId, GroupId, Payload

__all__ = ["Definitions"]

# Combinations of groups for which the names to watch are remembered. A pool has as many as it has functions.
_MAX_CLOSURES = 1024


@dataclass(slots=True, eq=False)
class _Group:
    """What was sent together.

    Attributes:
        payload: None if it needs not be sent: it is empty, or all it bound was bound again.
        names: global names that its definitions mention.
        requires: groups to be loaded before (or, where the payload was dropped, in its place).
        defines: whether it holds more than bindings.
        bound: how many of its bindings are the current ones.
        successors: groups that bound its names again.
    """

    payload: Payload | None
    names: tuple[str, ...]
    requires: frozenset[GroupId]
    defines: bool
    bound: int
    successors: frozenset[GroupId] = frozenset()


@dataclass(slots=True, eq=False)
class _Closure:
    """All that some groups need, valid while each of ``names`` still has its value in the caller's ``__main__``."""

    groups: tuple[GroupId, ...]
    names: tuple[str, ...]
    values: tuple[object, ...]


class Definitions:
    """What one pool has defined in its workers. Any thread may call; ``group`` and ``missing`` never wait.

    Args:
        baseline: for workers that are forked from the caller: ``dict(vars(__main__))`` at the fork. What is the same
            in it is not sent, for the worker has inherited it.
    """

    def __init__(self, baseline: dict[str, object] | None = None) -> None:
        self._catalogue = Catalogue({} if baseline is None else baseline)
        # Held while a group is made; whoever only reads (a payload without news, the handler) does without.
        self._lock = threading.RLock()
        self._groups: dict[GroupId, _Group] = {}
        self._closures: dict[frozenset[GroupId], _Closure] = {}
        self._mentions: dict[tuple[str, ...], GroupId] = {}

    # For the engine ------------------------------------------------------------------------------------------------

    def group(self, gid: GroupId) -> Payload | None:
        """One group, None if nothing of it need be sent (any more)."""
        return self._groups[gid].payload

    def missing(self, groups: Iterable[GroupId], known: set[GroupId]) -> list[tuple[GroupId, Payload]]:
        """The groups to send to a worker before a payload that needs ``groups``, in this order.

        Args:
            groups: of the payload.
            known: groups the worker has; those it will have now are added.
        """
        if known.issuperset(groups):
            return []
        found: dict[GroupId, Payload | None] = {}
        pending = list(groups)
        while pending:
            gid = pending.pop()
            if gid not in known and gid not in found:
                group = self._groups[gid]
                found[gid] = group.payload  # before `requires`: where this is None already, that names the successors
                pending.extend(group.requires)
        known.update(found)
        return [(gid, payload) for gid, payload in sorted(found.items()) if payload is not None]

    # For the pickler -----------------------------------------------------------------------------------------------

    def resolve(self, id: DefinitionId) -> object:
        """The caller's own object, named in a result."""
        return self._catalogue.objects[id]

    def inherited(self, qualname: str) -> object:
        """The caller's own object, of those that forked workers inherited."""
        return lookup(self._catalogue.baseline, qualname)

    def reduce(self, obj: Any, name: str | None, message: Any) -> Any:
        """How a payload refers to a function, a class, or another object that is known by its name.

        Args:
            obj: which.
            name: its qualified name, if not ``__qualname__``.
            message: the payload that is being made: ``needed`` (groups), ``copies``, ``open_group()``.
        """
        known = self._catalogue.definitions.get(id(obj))
        if known is None:
            if importable(obj):
                return NotImplemented
            if not self._catalogue.is_definition(obj, name):
                if of_main(obj):
                    message.needed.add(self._mention(self._catalogue.names.globals_of(obj), message.open_group))
                return reduce_here(obj, message.copies, self._catalogue.names)
            known = self._define(obj, name, message.open_group)
        message.needed.add(known.group)
        return known.reference

    def known(self, obj: object) -> Known | None:
        """The definition of an object that travels by value, if it has travelled before."""
        return self._catalogue.definitions.get(id(obj))

    def closure(self, roots: set[GroupId], open_group: Callable[[Any], GroupPickler]) -> tuple[GroupId, ...]:
        """All groups that a payload needs which refers to ``roots``; binds again what the caller has bound anew."""
        key = frozenset(roots)
        known = self._closures.get(key)
        if known is not None:
            get = main_namespace().get
            if all(map(is_, map(get, known.names, itertools.repeat(MISSING)), known.values)):
                return known.groups
        with self._lock:
            return self._renew(key, open_group).groups

    # Making groups -------------------------------------------------------------------------------------------------

    def _define(self, obj: Any, name: str | None, open_group: Callable[[Any], GroupPickler]) -> Known:
        with self._lock:
            if id(obj) not in self._catalogue.definitions:
                self._write(open_group, lambda writer: writer.define(obj, name))
            return self._catalogue.definitions[id(obj)]

    def _mention(self, names: tuple[str, ...], open_group: Callable[[Any], GroupPickler]) -> GroupId:
        """A group that has no definitions, for a function that travels in the stream and mentions names."""
        gid = self._mentions.get(names)
        if gid is None:
            with self._lock:
                gid = self._mentions[names] = self._write(open_group, lambda writer: writer.bind_all(names))
        return gid

    def _write(self, open_group: Callable[[Any], GroupPickler], fill: Callable[[GroupWriter], None]) -> GroupId:
        writer = GroupWriter(self._catalogue, open_group)
        try:
            fill(writer)
            return self._commit(writer)
        finally:
            writer.close()

    def _renew(self, roots: frozenset[GroupId], open_group: Callable[[Any], GroupPickler]) -> _Closure:
        while True:
            groups, names = self._reach(roots)
            space, is_current = main_namespace(), self._catalogue.is_current
            values = tuple(space.get(name, MISSING) for name in names)
            stale = [n for n, v in zip(names, values, strict=True) if v is not MISSING and not is_current(n, v)]
            if not stale:
                break
            self._write(open_group, lambda writer, stale=stale: writer.bind_all(stale))  # type: ignore[misc]
        if len(self._closures) >= _MAX_CLOSURES:
            self._closures.clear()
        closure = self._closures[roots] = _Closure(tuple(sorted(groups)), tuple(names), values)
        return closure

    def _reach(self, roots: Iterable[GroupId]) -> tuple[set[GroupId], dict[str, None]]:
        groups: set[GroupId] = set()
        names: dict[str, None] = {}
        pending = list(roots)
        while pending:
            gid = pending.pop()
            if gid in groups:
                continue
            groups.add(gid)
            group = self._groups[gid]
            pending.extend(group.requires)
            for name in group.names:
                names[name] = None
                binding = self._catalogue.bindings.get(name)
                if binding is not None:
                    pending.append(binding.group)
        return groups, names

    def _commit(self, writer: GroupWriter) -> GroupId:
        payload = writer.finish()
        gid = GroupId(len(self._groups) + 1)
        requires = frozenset(writer.requires)
        # The group first, what refers to it afterwards: others read without the lock.
        self._groups[gid] = _Group(payload, tuple(writer.names), requires, bool(writer.defined), len(writer.bound))
        for id, obj in writer.defined.items():
            self._catalogue.objects[id] = obj
        for key, (obj, reference) in writer.members.items():
            self._catalogue.definitions[key] = Known(obj, reference, gid)
        for name, value in writer.bound.items():
            old = self._catalogue.bindings.get(name)
            self._catalogue.bindings[name] = Binding(value, gid)
            if old is not None:
                self._supersede(old.group, gid)
        return gid

    def _supersede(self, gid: GroupId, successor: GroupId) -> None:
        """One binding of a group is no longer current: without any, its memory is given back.

        Else a caller that binds a big tensor to the same name again and again would keep each of them.
        """
        self._closures.clear()  # they hold the old value too
        group = self._groups[gid]
        group.bound -= 1
        group.successors |= {successor}
        if not group.bound and not group.defines:
            group.requires = group.successors
            group.payload = None
            # What was required for the sake of the order alone would make an endless chain.
            self._groups[successor].requires -= {gid}
