"""Functions and classes as pickle's reduce values, so that they travel by value.

The machinery is cloudpickle's; what differs, and why:

- A function's globals are not copied if they are a module's: the receiver uses its own module of that name. So all
  functions of one ``__main__`` share one namespace there.
- Cells keep their identity, so functions that share a ``nonlocal`` variable still do.
- A class goes in two parts, skeleton and attributes, so that the writer may put other definitions between them. Its
  hooks (``__init_subclass__``, a metaclass that travels by value) are not run again: what they did travels as state.
- ``__slots__`` are slots in the receiver too, aliases of enums stay, and their members keep their attributes.
- ``functools.cache``, ``functools.singledispatch``, ``typing.NewType`` and its kin, which pickle only by name.

Nothing here knows of ids, groups or payloads: see ``definitions``.
"""

from __future__ import annotations

import builtins
import copyreg
import ctypes
import dataclasses
import enum
import functools
import importlib
import io
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

import cloudpickle.cloudpickle as _cloudpickle

from tpool.tensors.names import (
    BUILTIN_TYPES,
    MAIN,
    CodeNames,
    importable,
    is_class,
    is_function,
    is_python_class,
    main_namespace,
)

__all__ = [
    "DISPATCH",
    "NAMED_TYPES",
    "Reduced",
    "class_attributes",
    "fill_class",
    "reduce_class",
    "reduce_here",
    "reduce_skeleton",
]

Reduced = tuple[Any, ...]


def reduce_here(obj: Any, copies: dict[int, dict[str, Any]], names: CodeNames) -> Any:
    """By value: a function, a type of the interpreter's, or what else pickles only by name; or NotImplemented.

    Args:
        obj: which.
        copies: of one stream: the copy of each namespace that is no module's, by the id of the original.
        names: what code refers to.
    """
    if is_function(obj):
        return _reduce_function(obj, copies, names)
    if is_class(obj):
        name = BUILTIN_TYPES.get(id(obj))
        # Some types in C are not found where they say: pickle will tell.
        return NotImplemented if name is None else (_cloudpickle._builtin_type, (name,))
    return _reduce_named(obj)


# Functions ---------------------------------------------------------------------------------------------------------


def _reduce_function(function: Any, copies: dict[int, dict[str, Any]], names: CodeNames) -> Reduced:
    if function.__code__ is _SINGLEDISPATCH:
        return _make_singledispatch, (dict(function.registry),)
    namespace: str | dict[str, Any] | None = _home_of(function)
    values: dict[str, Any] = {}
    if namespace is None:
        source = function.__globals__
        namespace = copies.setdefault(id(source), {k: source[k] for k in _MODULE_NAMES if k in source})
        values = {name: source[name] for name in names.globals_of(function) if name in source}
    arguments = (function.__code__, namespace, function.__name__, function.__closure__)
    own = {name: getattr(function, name) for name in _FUNCTION_STATE if hasattr(function, name)}
    state = (own, dict(vars(function)), values, names.submodules_of(function))
    return _make_function, arguments, state, None, None, _fill_function


_MODULE_NAMES = ("__name__", "__package__", "__path__", "__file__")
_FUNCTION_STATE = (
    "__qualname__",
    "__module__",
    "__doc__",
    "__defaults__",
    "__kwdefaults__",
    "__annotations__",
    "__type_params__",
)


def _home_of(function: types.FunctionType) -> str | None:
    """The name of the module whose names are the function's globals, if the receiver has that module."""
    space = function.__globals__
    if space is main_namespace():
        return "__main__"
    name = space.get("__name__")
    module = sys.modules.get(name) if isinstance(name, str) and name not in MAIN else None
    if module is None or vars(module) is not space or getattr(module, "__spec__", None) is None:
        return None
    return None if _cloudpickle._is_registered_pickle_by_value(module) else name


def _make_function(
    code: types.CodeType,
    namespace: str | dict[str, Any],
    name: str,
    closure: tuple[types.CellType, ...] | None,
) -> types.FunctionType:
    if isinstance(namespace, str):
        # __main__ is this process's, which need not be the module that an import would find.
        namespace = vars(sys.modules.get(namespace) or importlib.import_module(namespace))
    namespace.setdefault("__builtins__", builtins)
    return types.FunctionType(code, namespace, name, None, closure)


def _fill_function(function: Any, state: tuple[dict[str, Any], dict[str, Any], dict[str, Any], object]) -> None:
    own, attributes, values, _ = state  # the last: submodules, imported by being named
    for name, value in own.items():
        setattr(function, name, value)
    vars(function).update(attributes)
    function.__globals__.update(values)


# Compared by identity: each singledispatch function runs this very code.
_a_singledispatch: Any = functools.singledispatch(len)
_SINGLEDISPATCH: types.CodeType = _a_singledispatch.__code__


def _make_singledispatch(registry: dict[type, Any]) -> Any:
    function = functools.singledispatch(registry.pop(object))
    for cls, implementation in registry.items():
        function.register(cls, implementation)
    return function


def _reduce_cell(cell: types.CellType) -> Reduced:
    # The cell comes first and its contents later, for they may refer to the function whose cell it is.
    try:
        contents = cell.cell_contents
    except ValueError:  # empty
        return _make_cell, ()
    return _make_cell, (), (contents,), None, None, _fill_cell


def _make_cell() -> types.CellType:
    return types.CellType()


def _fill_cell(cell: types.CellType, state: tuple[Any]) -> None:
    cell.cell_contents = state[0]


# Classes -----------------------------------------------------------------------------------------------------------


def reduce_class(cls: type) -> Reduced:
    """A class by value, whole."""
    methods, others, hooks = class_attributes(cls)
    return (*reduce_skeleton(cls), {**methods, **others, **hooks}, None, None, fill_class)


def reduce_skeleton(cls: type) -> tuple[Callable[..., type], tuple[Any, ...]]:
    """A class by value without its attributes, which follow by ``fill_class``."""
    if issubclass(cls, enum.Enum):
        bases, name, qualname, _, module, tracker, extra = _cloudpickle._enum_getnewargs(cls)
        members = {member_name: member.value for member_name, member in cls.__members__.items()}  # aliases too
        return _cloudpickle._make_skeleton_enum, (bases, name, qualname, members, module, tracker, extra)
    _, name, bases, namespace, tracker, _ = _cloudpickle._class_getnewargs(cls)
    if "__total__" not in vars(cls):  # the metaclass of a TypedDict wants the bases as they were written
        bases = cls.__bases__
    for attribute in ("__qualname__", "__orig_bases__", "__slots__"):
        if attribute in vars(cls):
            namespace[attribute] = getattr(cls, attribute)
    namespace["__qualname__"] = cls.__qualname__
    metaclass: type | None = type(cls)
    builder = next(kind for kind in type(cls).__mro__ if importable(kind))
    if not importable(metaclass) and not is_python_class(metaclass):
        metaclass = None  # that of ctypes.Structure, say, which has no name; a base will tell
    return _make_class, (metaclass, builder, name, bases, namespace, tracker)


def _make_class(
    metaclass: Any, builder: Any, name: str, bases: tuple[Any, ...], namespace: dict[str, Any], tracker: str
) -> type:
    """An empty class; a metaclass that travels by value is not asked, but the ``builder`` that it derives from is."""
    resolved = types.resolve_bases(bases)
    if metaclass is None:
        metaclass = builder = type(resolved[0])
    cls = builder.__new__(metaclass, name, resolved, namespace)
    builder.__init__(cls, name, resolved, namespace)
    return _cloudpickle._lookup_class_or_track(tracker, cls)  # type: ignore[no-any-return]


def class_attributes(cls: type) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What ``fill_class`` sets on a skeleton: methods, other attributes, and hooks that subclassing would run."""
    attributes, _ = _cloudpickle._class_getstate(cls)
    if issubclass(cls, enum.Enum):
        for name in (*_ENUM_OWN, *cls.__members__):
            attributes.pop(name, None)
        attributes[_MEMBERS] = {
            name: {key: value for key, value in vars(member).items() if key not in _MEMBER_OWN}
            for name, member in cls.__members__.items()
        }
    methods: dict[str, Any] = {}
    others: dict[str, Any] = {}
    hooks: dict[str, Any] = {}
    for name, value in attributes.items():
        if name in ("__orig_bases__", "__slots__"):
            continue  # in the skeleton
        if issubclass(type(value), types.MemberDescriptorType) and value.__objclass__ is cls:
            continue  # a slot, made with the skeleton
        if type(value) is _CTYPES_FIELD:
            continue  # made with the attribute _fields_
        kind = methods if issubclass(type(value), _METHOD_TYPES) else others
        (hooks if name == "__init_subclass__" else kind)[name] = value
    return methods, others, hooks


class _Structure(ctypes.Structure):
    _fields_ = (("field", ctypes.c_int),)


_CTYPES_FIELD = type(vars(_Structure)["field"])
_METHOD_TYPES = (types.FunctionType, classmethod, staticmethod, property)

# Made anew with the members of an enum.
_ENUM_OWN = (
    "_generate_next_value_",
    "_member_names_",
    "_member_map_",
    "_member_type_",
    "_value2member_map_",
    "_unhashable_values_",
    "_unhashable_values_map_",
    "_hashable_values_",
    "__new__",
)
_MEMBER_OWN = frozenset({"_value_", "_name_", "__objclass__", "_sort_order_"})
_MEMBERS = " members"  # no attribute of a class: not an identifier


def fill_class(cls: Any, attributes: dict[str, Any]) -> None:
    """Give a skeleton its attributes."""
    for name, state in attributes.pop(_MEMBERS, {}).items():
        vars(cls.__members__[name]).update(state)
    # Not through a metaclass's own __setattr__: that may refuse, or count.
    by_value = is_python_class(type(cls)) and not importable(type(cls))
    set_attribute = type.__setattr__ if by_value else setattr
    for subclass in attributes.pop("_abc_impl", ()):
        cls.register(subclass)
    for name, value in attributes.items():
        set_attribute(cls, name, value)
    if "__firstlineno__" in attributes:  # Python 3.13 forgets it when __module__ is set
        set_attribute(cls, "__firstlineno__", attributes["__firstlineno__"])


# What pickles only by name -----------------------------------------------------------------------------------------

NAMED_TYPES: tuple[type, ...] = tuple(
    kind
    for kind in (
        functools._lru_cache_wrapper,
        typing.NewType,
        typing.ParamSpec,
        getattr(typing, "TypeVarTuple", None),
    )
    if isinstance(kind, type)
)
"""Types of objects that are made in modules, like functions, and whose ``__reduce__`` knows only their name."""


def _reduce_named(obj: Any) -> Reduced:
    if isinstance(obj, functools._lru_cache_wrapper):
        return _make_cached, (obj.__wrapped__, obj.cache_parameters()), dict(vars(obj))
    if isinstance(obj, typing.NewType):
        return typing.NewType, (obj.__name__, obj.__supertype__), {"__module__": obj.__module__}
    if isinstance(obj, NAMED_TYPES):
        return type(obj), (obj.__name__,)  # type: ignore[attr-defined]
    # One of the caller's own, whose __reduce__ gives a name.
    return copyreg.__newobj__, (type(obj),), getattr(obj, "__dict__", None)  # type: ignore[attr-defined]


def _make_cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _reduce_dataclass_sentinel(obj: object) -> str:
    return next(name for name in ("MISSING", "KW_ONLY", "_HAS_DEFAULT_FACTORY") if getattr(dataclasses, name) is obj)


def _reduce_text_file(obj: io.TextIOWrapper) -> Reduced:
    # cloudpickle would send the whole contents of the file.
    for name in ("stdout", "stderr"):
        if obj is getattr(sys, name):
            return getattr, (sys, name)
    raise TypeError(f"cannot pickle {type(obj).__name__!r} object")


DISPATCH: dict[type, Callable[[Any], Any]] = {
    **_cloudpickle.Pickler._dispatch_table,
    types.CellType: _reduce_cell,
    io.TextIOWrapper: _reduce_text_file,
    type(dataclasses.MISSING): _reduce_dataclass_sentinel,
    type(dataclasses.KW_ONLY): _reduce_dataclass_sentinel,
    type(dataclasses._HAS_DEFAULT_FACTORY): _reduce_dataclass_sentinel,  # type: ignore[attr-defined]
}
"""Reducers by exact type: cloudpickle's, and ours."""
