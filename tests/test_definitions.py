"""Functions and classes by value: real scripts as ``__main__``, with a bare worker that does not import them."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bare_worker import ScriptServer, make_memory, received

from tpool.errors import TransportError
from tpool.tensors.definitions import Definitions
from tpool.tensors.leases import Memory, table
from tpool.tensors.names import CodeNames, importable, lookup, reachable
from tpool.tensors.pickler import Codec
from tpool.tensors.registry import Unsendable, definition, inherited


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptServer]:
    server = ScriptServer()
    yield server
    server.close()


@pytest.fixture
def run(server) -> Callable[..., str]:
    return server.run


# One namespace -----------------------------------------------------------------------------------------------------


def test_what_an_initializer_sets_is_what_tasks_see(run):
    run("""
        model = None

        def initialize(value):
            global model
            model = [value]

        def task(x):
            model.append(x)
            return model, sum(model)

        call(initialize, 5)
        assert call(task, 1) == ([5, 1], 6)
        assert call(task, 1) == ([5, 1, 1], 7)
        assert call(lambda: model) == [5, 1, 1], "a lambda has the same namespace"
        assert model is None, "nothing of it comes back"
    """)


def test_the_callers_value_replaces_it_only_when_the_name_is_bound_again(run):
    run("""
        limit = 1

        def raise_limit():
            global limit
            limit += 10
            return limit

        def get():
            return limit

        assert call(get) == 1
        assert call(raise_limit) == 11
        assert call(get) == 11
        limit = 2
        assert call(get) == 2
        assert call(raise_limit) == 12
        same = limit
        limit = same
        assert call(get) == 12, "bound to the same object: no news"
        assert call(raise_limit) == 22
    """)


def test_a_name_bound_again_is_seen_through_other_functions_too(run):
    run("""
        scale = 2

        def inner(x):
            return x * scale

        def outer(x):
            return inner(x)

        class Doubler:
            def run(self, x):
                return outer(x)

        assert call(outer, 3) == 6
        assert call(Doubler().run, 3) == 6
        assert call(lambda x: outer(x), 3) == 6
        scale = 5
        assert call(outer, 3) == 15
        scale = 7
        assert call(Doubler().run, 3) == 21
        scale = 9
        assert call(lambda x: outer(x), 3) == 27
        holder = Doubler()
        scale = 11
        assert call(getattr, holder, "run")(1) == 11, "an instance alone brings what its methods mention"
    """)


def test_a_name_that_comes_to_exist_later_is_bound_then(run):
    run("""
        def early():
            try:
                return late
            except NameError as error:
                return str(error)

        assert call(early) == "name 'late' is not defined"
        late = 3
        assert call(early) == 3
        del late
        assert call(early) == 3, "what was sent stays"
    """)


def test_builtins_are_not_bound_but_what_hides_them_is(run):
    run("""
        import __main__

        def f(x):
            return len(x), str(x)

        assert call(f, "ab") == (2, "ab")
        assert call(lambda: "len" in vars(__main__)) is False
        len = lambda x: "mine"
        assert call(f, "ab") == ("mine", "ab")
    """)


def test_modules_are_bound_by_reference_with_the_submodules_that_are_used(run):
    run("""
        import xml
        import xml.dom.minidom
        import concurrent.futures as cf
        import json as j

        def parse(text):
            return xml.dom.minidom.parseString(text).documentElement.tagName

        assert call(parse, "<a/>") == "a"
        assert call(lambda: cf.Future().done()) is False
        assert call(lambda: j.dumps([1])) == "[1]"

        def imports_inside():
            import colorsys
            from os import path
            return colorsys.rgb_to_hsv(0, 0, 0), path.sep

        assert call(imports_inside) == ((0.0, 0.0, 0), "/")
    """)


def test_values_that_alias_each_other_do_so_in_the_worker(run):
    run("""
        import torch
        weights = torch.zeros(3)
        state = {"weights": weights}
        names = []
        alias = names

        class Model:
            shared = names

        def step(extra=names):
            weights.add_(1)
            names.append(1)
            return state["weights"].tolist(), alias, extra, Model.shared

        assert call(step) == ([1.0] * 3, [1], [1], [1])
        assert weights.tolist() == [1.0] * 3, "tensors go by handle, and are shared"
    """)


def test_the_package_of_a_relative_import_travels(tmp_path):
    package = tmp_path / "somepackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("VALUE = 42\n")
    (package / "run.py").write_text(
        "from bare_worker import Caller\n"
        "from . import helper\n"
        "def f():\n"
        "    from .helper import VALUE\n"
        "    return VALUE, helper.VALUE, __name__\n"
        "class C:\n"
        "    pass\n"
        "caller = Caller()\n"
        "assert caller.call(f) == (42, 42, '__main__')\n"
        "assert type(caller.call(C)) is C\n"
        "caller.close()\n"
    )
    run_python("-m", "somepackage.run", path=tmp_path)


def test_a_script_without_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from bare_worker import Caller\n"
        "import dataclasses\n"
        "@dataclasses.dataclass\n"
        "class Point:\n"
        "    x: int\n"
        "def move(point, by=1):\n"
        "    return Point(point.x + by)\n"
        "caller = Caller()\n"
        "assert caller.call(move, Point(1)) == Point(2)\n"
        "caller.close()\n"
    )
    run_python(str(script), path=tmp_path)


def run_python(*arguments: str, path: Path) -> None:
    """A real interpreter of its own."""
    repository = Path(__file__).parent.parent
    code = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": f"{path}:{repository}:{repository / 'tests'}",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert code.returncode == 0, code.stdout + code.stderr
    assert not code.stdout + code.stderr


# What cannot travel ------------------------------------------------------------------------------------------------


def test_a_global_that_cannot_be_pickled_does_not_stop_the_send(run):
    run("""
        import threading
        from tpool.errors import TransportError
        lock = threading.Lock()
        stream = (x for x in "ab")
        file = open("/proc/self/status")

        def uses(which):
            if which == "lock":
                with lock:
                    pass
            if which == "stream":
                return next(stream)
            if which == "call":
                lock()
            if which == "file":
                return file.read()
            return "unused"

        def why(which):
            try:
                return uses(which)
            except TransportError as error:
                return str(error)

        assert call(why, "none") == "unused"
        for which, reason in ("lock", "_thread.lock"), ("stream", "generator"), ("file", "TextIOWrapper"):
            text = call(why, which)
            assert "could not be sent" in text and reason in text and "initializer" in text, text
        assert "_thread.lock" in call(why, "call")
        assert "lock" in call(lambda: repr(lock))
        file.close()
        lock = 5
        assert call(lambda: lock) == 5, "bound again"
    """)


def test_a_global_may_be_a_proxy_that_answers_nothing(run):
    run("""
        class Proxy:
            def __getattribute__(self, name):
                raise RuntimeError("working outside of a context")
        proxy = Proxy()

        def f(use):
            return proxy.value if use else "unused"

        assert call(f, False) == "unused"
    """)


def test_a_program_may_be_a_deeper_graph_than_the_stack(run):
    run(
        "\n".join(f"def f{n}(x): return x or f{(n + 1) % 3000}(1), g{n}" for n in range(3000))
        + "\n"
        + "\n".join(f"class K{n}:\n    def run(self): return f{n}, g{(n + 7) % 3000}" for n in range(300))
        + "\n"
        + "\n".join(f"def g{n}(): return K{n % 300}, f{(n * 7) % 3000}" for n in range(3000)),
        """
        assert call(f0, 1)[0] == 1
        assert call(lambda: len([name for name in globals() if name[0] in "fgK"])) == 6300
        """,
    )


def test_an_attribute_of_a_class_that_cannot_be_pickled_is_left_out_alone(run):
    run("""
        import threading

        class Counter:
            guard = threading.Lock()
            step = 2

            def next(self, x):
                return x + self.step

            def guarded(self, default=threading.Lock()):
                pass

            def fails(self):
                with self.guard:
                    pass

        assert call(Counter().next, 1) == 3
        try:
            call(Counter().fails)
        except ValueError as error:
            assert "attribute 'guard' of class 'Counter'" in str(error), error
        else:
            raise AssertionError
    """)


def test_the_pool_itself_may_be_global(run):
    run("""
        class Pool:
            def __reduce__(self):
                raise NotImplementedError("pool objects cannot be passed between processes")
            def map(self, f):
                return call(f)

        pool = Pool()

        def f():
            return "ran"

        def main():
            return pool.map(f)

        assert main() == "ran"
        assert call(lambda: (f(), repr(pool)))[0] == "ran"
    """)


def test_a_function_that_is_sent_itself_fails_as_pickle_does(run):
    run("""
        import threading

        def f(lock=threading.Lock()):
            pass

        for attempt in range(2):
            try:
                call(f)
            except TypeError as error:
                assert "cannot pickle '_thread.lock' object" in str(error)
            else:
                raise AssertionError
        assert call(len, "abc") == 3, "nothing is left half done"
    """)


def test_locks_and_pipes_among_the_globals_travel_as_if_inherited(run):
    run("""
        import multiprocessing
        context = multiprocessing.get_context("spawn")
        forked = multiprocessing.get_context("fork").Lock()
        lock = context.Lock()
        mine, theirs = context.Pipe()
        counter = context.Value("i", 4)

        def f(which):
            if which == "forked":
                forked.acquire()
            with lock:
                counter.value += 1
                theirs.send("hello")

        lock.acquire()
        lock.release()
        call(f, "")
        assert counter.value == 5
        assert mine.recv() == "hello"
        try:
            call(f, "forked")
        except ValueError as error:
            assert "get_context('forkserver')" in str(error), error
        else:
            raise AssertionError
    """)


def test_a_stand_in_says_so_in_every_use():
    stand_in = Unsendable("the global 'pool'", "TypeError: no")
    uses: list[Callable[[], object]] = [
        lambda: stand_in.attribute,
        lambda: setattr(stand_in, "attribute", 1),
        lambda: stand_in(),
        lambda: stand_in[0],
        lambda: len(stand_in),
        lambda: bool(stand_in),
        lambda: list(stand_in),
        lambda: stand_in + 1,
        lambda: 1 + stand_in,
        lambda: stand_in == 1,
        lambda: stand_in < 1,
        lambda: 1 in stand_in,
        lambda: float(stand_in),
        lambda: stand_in.__reduce_ex__(2),
    ]
    for use in uses:
        with pytest.raises(TransportError, match="the global 'pool' could not be sent to this worker"):
            use()
    assert "global 'pool'" in repr(stand_in)


# Functions ---------------------------------------------------------------------------------------------------------


def test_functions_of_many_kinds(run):
    run("""
        from __future__ import annotations
        import functools, contextlib, typing

        def even(n): return n == 0 or odd(n - 1)
        def odd(n): return n != 0 and even(n - 1)
        assert call(even, 10) and not call(odd, 10)

        def decorate(function):
            @functools.wraps(function)
            def wrapper(*args):
                return "wrapped", function(*args)
            wrapper.tag = "tagged"
            return wrapper

        @decorate
        def decorated(x):
            "doc"
            return x + offset
        offset = 10
        assert call(decorated, 1) == ("wrapped", 11)
        assert call(lambda: (decorated.tag, decorated.__doc__, decorated.__wrapped__(1))) == ("tagged", "doc", 11)
        offset = 20
        assert call(decorated, 1) == ("wrapped", 21), "names mentioned by what is wrapped"

        def defaults(a, b=[1], *, c={"x": 2}, **rest): return a, b, c, rest
        assert call(lambda: defaults(0, d=1)) == (0, [1], {"x": 2}, {"d": 1})

        def annotated(x: Thing, y: "typing.List[int]") -> Thing: return typing.get_type_hints(annotated)
        class Thing: pass
        assert call(annotated, 1, 2) == {"x": Thing, "y": typing.List[int], "return": Thing}

        @functools.lru_cache(maxsize=7)
        def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)
        assert call(fibonacci, 30) == 832040
        assert call(lambda: fibonacci.cache_parameters()["maxsize"]) == 7
        assert call(lambda: fibonacci) is fibonacci

        @functools.singledispatch
        def show(x): return "object"
        @show.register
        def _(x: int): return "int"
        @show.register(list)
        def _(x): return [show(each) for each in x]
        assert call(show, [1, "a"]) == ["int", "object"]

        @contextlib.contextmanager
        def managed():
            yield offset
        def use():
            with managed() as value:
                return value
        assert call(use) == 20

        def generate(n):
            yield from range(n)
        assert call(lambda: list(generate(3))) == [0, 1, 2]

        async def asynchronous(): return offset
        import asyncio
        assert call(lambda: asyncio.run(asynchronous())) == 20

        partial = functools.partial(defaults, 1, b=2)
        assert call(partial) == (1, 2, {"x": 2}, {})

        def outer_class():
            class Local:
                value = offset  # a global that only the body of a class mentions
            return Local.value
        assert call(outer_class) == 20
    """)


def test_functions_that_share_variables_still_do(run):
    run("""
        def make_counter():
            count = 0
            def up():
                nonlocal count
                count += 1
            def get():
                return count
            return up, get

        def both(up, get):
            up(); up()
            return get()

        assert call(both, *make_counter()) == 2

        def make_factorial():
            def factorial(n):
                return 1 if n < 2 else n * factorial(n - 1)
            return factorial
        assert call(make_factorial(), 5) == 120

        up, get = make_counter()
        def through_globals():
            up()
            return get()
        assert call(through_globals) == 1
        assert call(through_globals) == 2
    """)


def test_functions_that_are_not_of_main(run):
    run("""
        import sys, types
        from functools import partial
        space = {"__name__": "__main__", "factor": 3}
        exec("def times(x): return x * factor", space)
        assert call(space["times"], 2) == 6, "its namespace is its own"

        from contextlib import contextmanager
        helper = contextmanager(lambda: (yield 1))  # its globals are those of contextlib
        def use():
            with helper() as value:
                return value
        assert call(use) == 1

        made = types.ModuleType("made")
        exec("scale = 4\\ndef f(x): return x * scale", made.__dict__)
        assert call(made.f, 2) == 8, "a module that nobody can import"

        import torch, logging
        logger = logging.getLogger("mine")
        @torch.no_grad()
        def without_gradient(x):
            logger.debug("quiet")
            return (x * 2).requires_grad
        assert call(without_gradient, torch.ones(1, requires_grad=True)) is False
    """)


def test_a_worker_makes_functions_and_classes(run):
    run("""
        base = 5

        def make_adder(n):
            return lambda x: x + n + base

        adder = call(make_adder, 1)
        base = 100
        assert adder(1) == 102, "it lives in the caller's main"

        def make_instance():
            class Made:
                def __init__(self): self.x = 1
                def value(self): return self.x + base
            return Made()

        made = call(make_instance)
        assert made.value() == 101
        again = call(lambda thing: thing, made)
        assert type(again) is type(made)
        assert call(lambda thing: thing.value(), made) == 101

        def bind_new_global():
            global fresh
            fresh = lambda: 7
            return fresh
        assert call(bind_new_global)() == 7
        assert "fresh" not in globals()
    """)


# Classes -----------------------------------------------------------------------------------------------------------


def test_classes_of_many_kinds(run):
    run("""
        import abc, collections, dataclasses, enum, typing

        class Base:
            def __init__(self, x): self.x = x
            def describe(self): return "base"
        class Derived(Base):
            def __init__(self, x):
                super().__init__(x)
                self.own = __class__
            def describe(self): return "derived of " + super().describe()
        assert call(lambda: Derived(1).describe()) == "derived of base"
        came = call(Derived, 3)
        assert type(came) is Derived and came.own is Derived and came.x == 3

        class A: pass
        class B: friend = A
        A.friend = B
        A.myself = A()
        assert call(lambda: A.friend.friend is A and B.friend is A)
        assert call(lambda: type(A.myself) is A)

        @dataclasses.dataclass
        class Point:
            x: int
            y: list = dataclasses.field(default_factory=list)
        @dataclasses.dataclass(frozen=True, slots=True)
        class Frozen:
            x: int = 3
        assert call(lambda p: dataclasses.replace(p, x=2), Point(1)) == Point(2)
        assert call(lambda: dataclasses.fields(Point)[0].default is dataclasses.MISSING)
        assert call(Frozen) == Frozen()
        assert call(lambda: hasattr(Frozen(), "__dict__")) is False
        def derive():
            @dataclasses.dataclass
            class More(Point):
                z: int = 0
            return More(1).z
        assert call(derive) == 0

        class Slotted:
            __slots__ = ("a", "__b")
            def __init__(self): self.a, self.__b = 1, 2
            def both(self): return self.a, self.__b
        assert call(lambda s: (s.both(), hasattr(s, "__dict__")), Slotted()) == ((1, 2), False)
        assert call(Slotted).both() == (1, 2)

        class Color(enum.Enum):
            RED = 1
            GREEN = 2
            ROUGE = 1
            def nice(self): return self is Color.RED
        class Planet(enum.Enum):
            EARTH = (5.9, 6.3)
            def __init__(self, mass, radius): self.mass, self.radius = mass, radius
        class Flags(enum.Flag):
            A = 1
            B = 2
            BOTH = 3
        class Number(enum.IntEnum):
            ONE = enum.auto()
        assert call(lambda c: (c, c.nice(), Color.ROUGE, Color["ROUGE"], Color(2)), Color.RED) == (
            Color.RED, True, Color.RED, Color.RED, Color.GREEN)
        assert call(lambda: Color.RED) is Color.RED
        assert call(lambda: Planet.EARTH.mass) == 5.9
        assert call(lambda f: (f | Flags.B, Flags.BOTH.name), Flags.A) == (Flags.BOTH, "BOTH")
        assert call(lambda: Number.ONE + 1) == 2

        Pair = collections.namedtuple("Pair", "a b")
        class Typed(typing.NamedTuple):
            a: int
            b: str = "b"
        class Movie(typing.TypedDict):
            name: str
        assert call(lambda: (Pair(1, 2), Typed(1))) == (Pair(1, 2), Typed(1))
        assert type(call(Pair, 1, 2)) is Pair
        assert call(lambda: Movie(name="x")) == {"name": "x"}

        class Shape(abc.ABC):
            @abc.abstractmethod
            def area(self): ...
            @property
            def twice(self): return 2 * self.area()
            @classmethod
            def kind(cls): return cls.__name__
            @staticmethod
            def zero(): return 0
        class Square(Shape):
            def area(self): return 9
        Shape.register(int)
        assert call(lambda: (Square().twice, Square.kind(), Square.zero())) == (18, "Square", 0)
        assert call(lambda: isinstance(1, Shape))
        assert call(Square().area) == 9 and call(Square.kind) == "Square" and call(Square.zero) == 0
        def instantiate():
            try:
                Shape()
            except TypeError:
                return "abstract"
        assert call(instantiate) == "abstract"

        T = typing.TypeVar("T")
        P = typing.ParamSpec("P")
        UserId = typing.NewType("UserId", int)
        class Box(typing.Generic[T]):
            def __init__(self, x: T): self.x = x
            def map(self, f: typing.Callable[P, T]) -> "Box[T]": return Box(f(self.x))
        class IntBox(Box[int]): pass
        class Sized(typing.Protocol):
            def size(self) -> int: ...
        assert call(lambda: IntBox(1).map(lambda x: x + 1).x) == 2
        assert call(lambda: (Box[int], T, P, UserId(3), UserId)) == (Box[int], T, P, 3, UserId)
        assert call(lambda: typing.get_type_hints(Box.map)["return"]) == Box[T]
        assert call(lambda: Sized) is Sized

        import ctypes
        class Vector(ctypes.Structure):
            _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_double)]
            def __init__(self, *args): super().__init__(*args)
        assert call(lambda: (Vector(1, 2.5).y, Vector.x.offset)) == (2.5, 0)

        class Outer:
            class Inner:
                value = 4
        assert call(lambda: Outer.Inner.value) == 4
        assert type(call(Outer.Inner)) is Outer.Inner

        class MyError(ValueError):
            def __init__(self, code): super().__init__(f"code {code}"); self.code = code
            def __reduce__(self): return MyError, (self.code,)
        def fail(): raise MyError(7)
        try:
            call(fail)
        except MyError as error:
            assert error.code == 7
    """)


def test_metaclasses_and_hooks_are_not_run_again(run):
    run("""
        created = []

        class Meta(type):
            def __new__(mcls, name, bases, namespace, **options):
                created.append(name)
                cls = super().__new__(mcls, name, bases, namespace)
                cls.fields = sorted(k for k in namespace if not k.startswith("_"))
                return cls
            def __call__(cls, *args):
                return super().__call__(*args)
            def __setattr__(cls, name, value):
                if name == "sealed":
                    raise AttributeError(name)
                super().__setattr__(name, value)
        class Record(metaclass=Meta):
            a = 1
            b = 2
            __sealed__ = True
        assert call(lambda: (Record.fields, created, type(Record) is Meta)) == (["a", "b"], ["Record"], True)

        registry = {}
        class Plugin:
            local = []
            def __init_subclass__(cls, /, *, key, **rest):
                super().__init_subclass__(**rest)
                assert key not in registry, "registered twice"
                registry[key] = cls
                cls.local.append(cls)
        class First(Plugin, key="first"): pass
        class Second(Plugin, key="second"): pass
        assert call(lambda: ([k for k in registry], registry["first"] is First, Plugin.local == [First, Second])) == (
            ["first", "second"], True, True)
        assert call(First).__class__ is First
        def more():
            class Third(Plugin, key="third"): pass
            return sorted(registry)
        assert call(more) == ["first", "second", "third"], "but the hook is there"

        class Singleton:
            instance = None
            def __new__(cls):
                if cls.instance is None:
                    cls.instance = super().__new__(cls)
                return cls.instance
        one = Singleton()
        assert call(lambda: Singleton() is one)

        class Missing:
            def __reduce__(self): return "MISSING"
        MISSING = Missing()
        assert call(lambda x: x is MISSING, MISSING)
        assert call(lambda: MISSING) is MISSING
    """)


def test_code_that_rebuilding_runs_finds_what_it_mentions(run):
    run("""
        import json
        factor = 3
        def helper(x): return x * factor

        class Heavy:
            def __init__(self, text): self.value = helper(len(json.loads(text)))
            def __reduce__(self): return Heavy, ("[1, 2]",)
        class Restored:
            def __init__(self): self.kept = 1
            def __getstate__(self): return {"kept": self.kept}
            def __setstate__(self, state): self.kept = helper(state["kept"])

        class Holder:
            default = Heavy("[1]")
            other = Restored()

        table = {"a": [Heavy("[]"), Restored()], "holder": Holder()}
        def f(): return table["a"][0].value, table["a"][1].kept, Holder.default.value, Holder.other.kept, helper(1)
        assert call(f) == (6, 3, 6, 3, 3), "also names that f itself mentions later"
        assert call(lambda item: item.kept, Restored()) == 3
    """)


def test_what_was_pickled_in_vain_is_not_taken_for_something_new(run):
    run("""
        import torch

        class Fresh:
            made = 0
            def __reduce__(self):
                Fresh.made += 1
                return torch.clone, (torch.full((1000,), float(Fresh.made)),)
        class Other: pass

        # Other turns out to be needed only after a first tensor has been pickled and died.
        things = [*(Fresh() for _ in range(20)), Other()]
        def f(): return [float(thing.max()) for thing in things[:20]]
        copying = Caller(sharing="copy")
        assert copying.call(f) == [float(n) for n in range(21, 41)]
        copying.close()
    """)


def test_torch_classes_of_main(run):
    run("""
        import torch
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(2, 1)
                self.scale = torch.nn.Parameter(torch.ones(1))
            def forward(self, x): return Double.apply(self.layer(x) * self.scale)
        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x): return x * 2
            @staticmethod
            def backward(ctx, gradient): return gradient * 2
        class Squares(torch.utils.data.Dataset):
            def __len__(self): return 4
            def __getitem__(self, i): return torch.tensor([float(i)])
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        def train(x):
            net(x).sum().backward()
            optimizer.step()
            return net.layer.weight
        before = net.layer.weight.detach().clone()
        x = torch.ones(1, 2)
        after = call(train, x)
        assert not torch.equal(before, after) and torch.equal(after, net.layer.weight), "one model, shared"
        assert type(call(lambda n: n, net)) is Net
        assert call(lambda d: len(d), Squares()) == 4
    """)


# Once, by id -------------------------------------------------------------------------------------------------------


def test_a_definition_travels_once_and_results_carry_the_id(run):
    run("""
        class Config:
            calls = 0
            def __init__(self, x): self.x = x

        def work(config):
            Config.calls += 1
            return Config(config.x + Config.calls)

        first = caller.codec.dumps((work, (Config(1),)))
        second = caller.codec.dumps((work, (Config(1),)))
        assert first.groups == second.groups and len(first.data) == len(second.data) < 200
        Config.calls = 50
        assert call(work, Config(1)).x == 2
        sent = list(caller.groups_sent)
        assert call(work, Config(1)).x == 3
        assert caller.groups_sent == sent, "nothing new to send"
        assert Config.calls == 50, "a result never changes a class of the caller's"
        assert call(lambda: work) is work and call(lambda: Config) is Config
        assert call(lambda: Config.__init__) is Config.__init__
    """)


def test_redefined_in_another_cell(run):
    run(
        """
        def f(): return "old " + g()
        def g(): return "old"
        class C:
            def which(self): return "old"
        instance = C()
        OldC = C
        assert call(f) == "old old"
        assert call(instance.which) == "old"
        """,
        """
        def g(): return "new"
        assert call(f) == "old new"
        """,
        """
        old_f = f
        def f(): return "new " + g()
        class C:
            def which(self): return "new"
        assert call(f) == "new new"
        assert call(old_f) == "old new"
        assert call(instance.which) == "old", "old instances live on"
        assert type(call(lambda: instance)) is OldC
        assert call(C().which) == "new"
        assert call(lambda: C().which()) == "new"
        assert type(call(C)) is C
        """,
    )


def test_dynamic_classes_go_by_id_too(run):
    run("""
        def make(n):
            class Made:
                number = n
            return Made
        One, Two = make(1), make(2)
        assert call(lambda c: c.number, One) == 1
        assert call(lambda c: c.number, Two) == 2
        assert call(lambda c: c, One) is One
        assert type(call(lambda c: c(), Two)) is Two
        assert call(lambda a, b: (a is b, a is type(b())), One, One) == (True, True)
    """)


def test_a_name_bound_again_and_again_does_not_pile_up(run):
    run("""
        import torch
        from tpool.tensors.leases import Memory, table
        data = None
        def total(): return float(data.sum())
        assert call(lambda: data) is None
        used = []
        for step in range(6):
            data = torch.full((50_000,), float(step))
            assert call(total) == step * 50_000
            used.append(table().allocator(caller.memory.arena).used_nbytes)
        assert used[-1] <= used[1], used

        # A worker that starts late gets what is current, and in the right order.
        known = set()
        first = caller.definitions.missing(tuple(range(1, 4)), known)
        assert known.issuperset(caller.codec.dumps(total).groups)
        assert caller.definitions.missing(caller.codec.dumps(total).groups, known) == []
    """)


def test_a_worker_never_gets_an_older_binding_after_a_newer_one(run):
    run("""
        value = 1
        def f(): return value
        def g(): return value
        early = caller.codec.dumps((f, ()))
        value = 2
        assert call(lambda: value) == 2
        caller.send(early)
        assert caller.answer() == 2
        assert call(g) == 2
    """)


def test_a_nested_worker(run):
    run("""
        import sys
        factor = 2
        class Item:
            def __init__(self, x): self.x = x
        def inner(item): return Item(item.x * factor)
        def outer(item):
            nested = Caller()
            try:
                answer = nested.call(inner, item)
                same = type(answer) is Item
                return answer, same
            finally:
                nested.close()
        answer, same = call(outer, Item(4))
        assert same and type(answer) is Item and answer.x == 8
    """)


def test_forked_workers_inherit(server):
    server.run(
        """
        import torch, threading
        lock = threading.Lock()
        big = [lock]
        mode = "old"
        class Kept:
            pass
        def f():
            with lock:
                return mode, len(big)
        def unchanged(): return f()
        class Late: pass
        caller = Caller(fresh_main=False)
        call = caller.call
        assert call(unchanged) == ("old", 1)
        assert all(caller.definitions.group(gid) is None for gid in caller.known), "nothing was sent"
        """,
        """
        mode = "new"
        assert call(unchanged) == ("new", 1), "what has changed since the fork is bound"
        assert type(call(Kept)) is Kept
        old_f, old_kept = f, Kept()
        def f(): return "redefined " + mode
        class Kept: pass
        assert call(unchanged) == "redefined new"
        assert call(old_f) == ("new", 1)
        assert type(call(lambda: old_kept)) is type(old_kept)
        assert type(call(Kept)) is Kept
        def after_the_fork(): return mode
        assert call(after_the_fork) == "new"
        caller.close()
        """,
        fork=True,
    )


# Parts -------------------------------------------------------------------------------------------------------------


def test_many_threads_define_at_once():
    code = "\\n".join(f"class C{i}:\\n    def get(self): return C{(i + 1) % 20}, value" for i in range(20))
    with main_module(code.replace("\\n", "\n") + "\nvalue = 1\n") as main:
        memory = make_memory()
        definitions = Definitions()
        codec = Codec(memory, definitions)
        payloads, errors = [], []
        start = threading.Barrier(4)

        def send(offset: int) -> None:
            start.wait()
            try:
                for i in range(20):
                    payloads.append(codec.dumps(getattr(main, f"C{(i + offset * 5) % 20}")))
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=send, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        ids = {payload.data for payload in payloads}
        assert len(ids) == 20, "each class has one id"
        retire(memory)


def test_what_a_name_was_bound_to_before_is_let_go():
    with main_module("class Value: pass\ndata = Value()\ndef f(): return data\ndef g(): return data") as main:
        memory = make_memory()
        codec = Codec(memory, Definitions())
        codec.dumps(main.f)
        codec.dumps(main.g)
        old = weakref.ref(main.data)
        main.data = main.Value()
        codec.dumps(main.f)
        gc.collect()
        assert old() is None
        retire(memory)


def test_reading_groups_never_waits_for_whoever_makes_one():
    with main_module("def f(): pass") as main:
        memory = make_memory()
        definitions = Definitions()
        codec = Codec(memory, definitions)
        payload = codec.dumps(main.f)
        done = threading.Event()

        def read() -> None:
            assert definitions.missing(payload.groups, set())
            definitions.group(payload.groups[0])
            codec.loads(received(payload))
            done.set()

        with definitions._lock:
            thread = threading.Thread(target=read)
            thread.start()
            assert done.wait(10)
        thread.join()
        retire(memory)


def test_markers_cannot_be_called():
    with pytest.raises(TransportError, match="definition 3"):
        definition(3)
    with pytest.raises(TransportError, match="f"):
        inherited("f")


def test_where_things_are_found():
    class Local:
        pass

    space = {"f": len, "C": Path}
    assert importable(Path)
    assert importable(subprocess.run)
    assert not importable(Local)
    assert not importable(lambda: None)
    assert not importable(3)
    assert lookup(space, "C.exists") is Path.exists
    assert reachable(space, Path) is None
    assert CodeNames().globals_of(retire) == ("table",)
    assert CodeNames().globals_of(retire_annotated) == ("table", "Memory")
    Local.__module__, Local.__qualname__ = "__mp_main__", "C"
    assert not importable(Local)
    assert reachable({"C": Local}, Local) == "C"


class main_module:
    """A module in the place of ``__main__``."""

    def __init__(self, code: str) -> None:
        import types

        self._module = types.ModuleType("__main__")
        self._code = code

    def __enter__(self):
        self._before = sys.modules["__main__"]
        sys.modules["__main__"] = self._module
        exec(self._code, self._module.__dict__)
        return self._module

    def __exit__(self, *_: object) -> None:
        sys.modules["__main__"] = self._before


def retire(memory):
    table().allocator(memory.arena).ledger.close()
    table().remove(memory.arena)


def retire_annotated(memory: Memory) -> None:
    table().remove(memory.arena)
