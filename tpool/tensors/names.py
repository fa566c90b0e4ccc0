"""Where functions and classes are found, and which names of a module their code refers to."""

from __future__ import annotations

import dis
import functools
import sys
import types
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import cloudpickle.cloudpickle as _cloudpickle

__all__ = [
    "BUILTIN_TYPES",
    "MAIN",
    "MISSING",
    "CodeNames",
    "annotated_names",
    "found_by_name",
    "importable",
    "is_class",
    "is_function",
    "is_python_class",
    "lookup",
    "main_namespace",
    "of_main",
    "reachable",
]

MAIN = frozenset({"__main__", "__mp_main__"})
"""Modules that no other process can import by name (the second is what ``multiprocessing`` calls its copy)."""

# Bits of a type's __flags__ (CPython's Include/object.h). A type that C code made is not on the heap, or immutable.
_HEAP_TYPE = 1 << 9
_IMMUTABLE_TYPE = 1 << 8

MISSING = object()
"""What a name that does not exist is bound to."""

BUILTIN_TYPES: dict[int, str] = {id(kind): name for kind, name in _cloudpickle._BUILTIN_TYPE_NAMES.items()}
"""Names in module ``types`` of the interpreter's own types, by id(): a metaclass may make its classes unhashable."""


def main_namespace() -> dict[str, Any]:
    """The global names of this process's ``__main__``."""
    return vars(sys.modules["__main__"])


def is_class(obj: object) -> bool:
    """Whether it is a class. Its type is asked, here and elsewhere: a proxy's ``__class__`` may raise."""
    return issubclass(type(obj), type)


def is_function(obj: object) -> bool:
    """Whether it is a function in Python."""
    return type(obj) is types.FunctionType


def is_python_class(obj: Any) -> bool:
    """Whether it is a class that a ``class`` statement could have made, so that it can be made once more."""
    return is_class(obj) and obj.__flags__ & (_HEAP_TYPE | _IMMUTABLE_TYPE) == _HEAP_TYPE


def of_main(obj: Any) -> bool:
    """Whether it is a function whose globals are those of this process's ``__main__``."""
    return is_function(obj) and obj.__globals__ is main_namespace()


def lookup(namespace: dict[str, Any], qualname: str) -> object:
    """What is found under a dotted name, looking into classes only; ``MISSING`` if nothing is."""
    first, *rest = qualname.split(".")
    found = namespace.get(first, MISSING)
    for name in rest:
        found = getattr(found, name, MISSING) if is_class(found) else MISSING
    return found


def reachable(namespace: dict[str, Any], obj: Any, name: str | None = None) -> str | None:
    """The dotted name under which an object of ``__main__`` is found there; None if something else is there.

    Args:
        namespace: of ``__main__``.
        obj: which.
        name: its dotted name, if it has none of its own.
    """
    if getattr(obj, "__module__", None) not in MAIN:
        return None
    name = name or _name_of(obj)
    return name if name is not None and lookup(namespace, name) is obj else None


def found_by_name(obj: Any) -> bool:
    """Whether a function or class is importable, as far as that is quickly seen: what this denies may still be."""
    module_name = getattr(obj, "__module__", None)
    if module_name in MAIN or _cloudpickle._PICKLE_BY_VALUE_MODULES:
        return False
    module = sys.modules.get(module_name)  # type: ignore[arg-type]
    return module is not None and vars(module).get(_name_of(obj)) is obj  # type: ignore[arg-type]


def importable(obj: Any) -> bool:
    """Whether a function, class or other named object is found by every process in the module it says it is of."""
    if found_by_name(obj):  # for nearly all; what this does not find, cloudpickle may
        return True
    if getattr(obj, "__module__", None) in MAIN:
        return False
    if not is_function(obj) and not is_class(obj):
        return False
    return bool(_cloudpickle._should_pickle_by_reference(obj))


def _name_of(obj: Any) -> str | None:
    name = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None)
    return name if isinstance(name, str) else None


# Which names a function refers to ----------------------------------------------------------------------------------

# LOAD_NAME: the body of a class inside a function. LOAD_FROM_DICT_OR_GLOBALS: the same from Python 3.12 on.
_GLOBAL_OPS = frozenset({"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})

# What belongs to the module itself and not to the program.
_NOT_BOUND = frozenset({"__builtins__", "__loader__", "__name__", "__spec__"})


class CodeNames:
    """Remembers, for each code object, which global names and which attributes it mentions. Any thread may call."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[types.CodeType, tuple[tuple[str, ...], tuple[str, ...]]] = (
            weakref.WeakKeyDictionary()
        )

    def globals_of(self, function: types.FunctionType) -> tuple[str, ...]:
        """Global names that the function, what is nested in it, and its annotations in text refer to."""
        return self._of_code(function.__code__)[0] + annotated_names(function)

    def globals_within(self, obj: Any) -> tuple[str, ...]:
        """Names of ``__main__`` that a function or class refers to, with all functions that it holds."""
        names: dict[str, None] = {}
        seen: set[int] = set()
        pending = [obj]
        while pending:
            part = pending.pop()
            if id(part) not in seen:
                seen.add(id(part))
                pending.extend(_parts_of(part))
                if of_main(part):
                    names.update(dict.fromkeys(self.globals_of(part)))
        return tuple(names)

    def submodules_of(self, function: types.FunctionType) -> list[types.ModuleType]:
        """Modules that the function reaches as attributes of a package, which somebody must have imported."""
        names, attributes = self._of_code(function.__code__)
        values: list[Any] = [function.__globals__.get(name) for name in names]
        values += _cell_contents(function)
        found: list[types.ModuleType] = []
        pending = [value for value in values if issubclass(type(value), types.ModuleType)]
        while pending:
            package = pending.pop()
            for attribute in attributes:
                module = sys.modules.get(f"{package.__name__}.{attribute}")
                if module is not None and module not in found:
                    found.append(module)
                    pending.append(module)
        return found

    def _of_code(self, code: types.CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
        known = self._known.get(code)
        if known is None:
            names: dict[str, None] = {}
            attributes: dict[str, None] = {}
            for each in _with_nested(code):
                attributes.update(dict.fromkeys(each.co_names))
                for instruction in dis.get_instructions(each):
                    if instruction.opname in _GLOBAL_OPS:
                        names[instruction.argval] = None
                    elif instruction.opname == "IMPORT_NAME":
                        names["__package__"] = None  # in case that it is a relative import
            known = self._known[code] = (tuple(n for n in names if n not in _NOT_BOUND), tuple(attributes))
        return known


def _with_nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_nested(constant)


def annotated_names(obj: Any) -> tuple[str, ...]:
    """Names in annotations that are text (``from __future__ import annotations``); tools evaluate them."""
    names: dict[str, None] = {}
    with suppress(NameError):  # Python 3.14 evaluates annotations now, and a name may be missing
        for annotation in dict(getattr(obj, "__annotations__", None) or {}).values():
            if isinstance(annotation, str):
                with suppress(SyntaxError, ValueError):  # any text is allowed there
                    names.update(dict.fromkeys(compile(annotation, "<annotation>", "eval").co_names))
    return tuple(names)


def _cell_contents(function: types.FunctionType) -> list[Any]:
    contents = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty cell
            contents.append(cell.cell_contents)
    return contents


def _parts_of(obj: Any) -> list[Any]:
    """What a function, method, property, cached function or class of ``__main__`` holds that may be a function."""
    if is_function(obj):
        return [*_cell_contents(obj), *vars(obj).values()]
    if is_class(obj):
        return [*vars(obj).values(), *obj.__bases__, type(obj)] if obj.__module__ in MAIN else []
    if issubclass(type(obj), property):
        return [obj.fget, obj.fset, obj.fdel]
    if issubclass(type(obj), (classmethod, staticmethod, functools.cached_property, functools._lru_cache_wrapper)):
        return [getattr(obj, "func", None), getattr(obj, "__wrapped__", None)]
    return []
