"""Docstrings are the reference: every public name has one, and it tells what goes in, what comes out, what is raised.

Parameters may be told by a method that a docstring refers to, as in "As ``map``": then that one's sections count.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import tpool

# What calls of our own checks raise, for whoever calls them; see ``Gate`` and ``options``.
RAISING = {"check_running", "check_process", "override"}
REFERENCE = re.compile(r"(?:As|as|see|See) ``(?:[A-Za-z]+\.)?(\w+)")

# A first line that begins so says what it gives, and needs no section for that.
NOUNS = ("A ", "An ", "The ", "Whether ", "What ", "Who ")


def public_names() -> Iterator[tuple[str, Any, Any]]:
    """(name, object, its class or None) of all that is public: the package's names, and methods of its classes."""
    for name in tpool.__all__:
        found = getattr(tpool, name)
        yield name, found, None
        if inspect.isclass(found) and not issubclass(found, BaseException):
            for attribute, value in methods(found):
                yield f"{name}.{attribute}", value, found


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that our own code defines."""
    for name in dir(cls):
        value = inspect.getattr_static(cls, name)
        module = getattr(value.fget if isinstance(value, property) else value, "__module__", None) or ""
        ours = module.startswith("tpool")
        if not name.startswith("_") and ours and (callable(value) or isinstance(value, property)):
            yield name, value


NAMES = {name: (found, cls) for name, found, cls in public_names()}
# Methods that the pool's other half calls; public for it and not for users.
SINK = {
    "resolve",
    "resolve_run",
    "drop",
    "finish",
    "has_consumable",
    "awaits_earlier",
    "lift_back_pressure",
    "abandon",
    "expect",
}
CALLABLES = sorted(
    name for name, (found, _) in NAMES.items() if inspect.isroutine(found) and name.rpartition(".")[2] not in SINK
)
CLASSES = sorted(name for name, (found, _) in NAMES.items() if inspect.isclass(found))


def section(doc: str, title: str) -> str:
    """The text of a section, or nothing."""
    found = re.search(rf"^{title}:\n((?:    .*\n|\n)*)", doc + "\n", re.MULTILINE)
    return found[1] if found else ""


def entries(doc: str, title: str) -> set[str]:
    """What a section has entries for."""
    names = re.findall(r"^    (\*{0,2}\w[\w.]*(?:, \w+)*)(?: \(.*?\))?:", section(doc, title), re.MULTILINE)
    return {part.strip("* ") for name in names for part in name.split(",")}


def told(doc: str, cls: type | None, title: str, seen: tuple[str, ...] = ()) -> set[str]:
    """The entries of a section, together with those of the methods that a docstring refers to."""
    found = entries(doc, title)
    for name in set(REFERENCE.findall(doc)) - set(seen):
        other = getattr(cls, name, None) or getattr(tpool, name, None)
        if other is not None and other.__doc__:
            found |= told(inspect.getdoc(other) or "", cls, title, (*seen, name))
    return found


def tells_what_it_gives(doc: str, cls: type | None, seen: tuple[str, ...] = ()) -> bool:
    """Whether a docstring, or that of a method that it refers to, tells what comes back."""
    if doc.startswith(NOUNS) or section(doc, "Returns"):
        return True
    others = [name for name in REFERENCE.findall(doc) if name not in seen]
    return any(
        tells_what_it_gives(inspect.getdoc(getattr(cls, name, None)) or "", cls, (*seen, name)) for name in others
    )


def statements(function: Callable[..., Any]) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def raises(function: Callable[..., Any]) -> bool:
    """Whether the source raises something, itself or by a check of ours."""
    for node in ast.walk(statements(function)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            return True
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in RAISING or name.startswith("check_"):
                return True
    return False


def parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "cls"}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_everything_public_has_a_docstring(name):
    found, _ = NAMES[name]
    doc = found.__doc__ or ""
    assert doc.strip(), "has none"
    assert doc.strip().splitlines()[0].rstrip().endswith((".", ":", "?")), "its first line is no sentence"
    assert "See Sink" not in doc or name.rpartition(".")[2] in SINK


@pytest.mark.parametrize("name", CALLABLES)
def test_arguments_are_told(name):
    function, cls = NAMES[name]
    doc = inspect.getdoc(function) or ""
    missing = {
        parameter
        for parameter in parameters(function) - told(doc, cls, "Args")
        if f"``{parameter}``" not in doc and f"{parameter})" not in doc.partition("\n")[0]
    }
    assert not missing
    assert entries(doc, "Args") <= parameters(function), "it tells of one that is not there"


@pytest.mark.parametrize("name", CALLABLES)
def test_what_comes_back_is_told(name):
    function, cls = NAMES[name]
    doc = inspect.getdoc(function) or ""
    gives = inspect.signature(function).return_annotation
    if gives in ("None", None, inspect.Signature.empty, "NoReturn"):
        return
    assert tells_what_it_gives(doc, cls)


@pytest.mark.parametrize("name", CALLABLES)
def test_what_is_raised_is_told(name):
    function, cls = NAMES[name]
    doc = inspect.getdoc(function) or ""
    if raises(function):
        assert told(doc, cls, "Raises")
    for error in entries(doc, "Raises"):
        found = getattr(tpool, error, None) or getattr(__builtins__, error, None) or __builtins__.get(error)
        assert "." in error or (inspect.isclass(found) and issubclass(found, BaseException)), error


@pytest.mark.parametrize("name", CLASSES)
def test_fields_and_arguments_of_classes_are_told(name):
    cls, _ = NAMES[name]
    doc = inspect.getdoc(cls) or ""
    if dataclasses.is_dataclass(cls):
        # What users make themselves has arguments; what they are given, attributes.
        assert entries(doc, "Args") | entries(doc, "Attributes") == {field.name for field in dataclasses.fields(cls)}
    elif issubclass(cls, enum.Enum) or "__init__" not in vars(cls):
        return
    elif name == "Pool" or issubclass(cls, BaseException):
        assert entries(doc, "Args") == parameters(cls.__init__)
