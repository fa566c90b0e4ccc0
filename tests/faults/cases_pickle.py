"""Things that do not pickle in the sender or unpickle in the receiver: that task fails, with the story."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from .script import Env, case, main, mark, refuse_timeout, square


class Unpicklable:
    """Fails where it is pickled."""

    def __reduce__(self):
        raise TypeError("Unpicklable objects stay at home")


class Unreadable:
    """Fails where it is unpickled."""

    def __init__(self):
        self.word = "hello"

    def __setstate__(self, state):
        raise ValueError("Unreadable objects cannot be restored")


def unreadable_away(home):
    """Rebuilds quietly at home; elsewhere it fails."""
    if os.getpid() != home:
        raise ValueError("Unreadable away from home")
    return UnreadableCall(home)


class UnpicklableCall(Unpicklable):
    def __call__(self, value):
        return value


class UnreadableCall:
    def __init__(self, home):
        self.home = home

    def __reduce__(self):
        return unreadable_away, (self.home,)

    def __call__(self, value):
        return value


class NeedsTwo(Exception):
    """The commonest exception that cannot be unpickled: its arguments are not those of its base."""

    def __init__(self, code, detail):
        super().__init__(f"code {code}: {detail}")
        self.code = code


class HoldsLock(Exception):
    def __init__(self, message):
        super().__init__(message)
        self.lock = threading.Lock()


class BadRepr:
    def __reduce__(self):
        raise TypeError("BadRepr stays at home")

    def __repr__(self):
        raise RuntimeError("not even a repr")


class BadStr(Exception):
    def __str__(self):
        raise RuntimeError("not even a str")

    __repr__ = __str__


class ExitsWhenRead:
    def __reduce__(self):
        return sys.exit, (9,)


class InterruptsWhenRead:
    def __reduce__(self):
        return interrupt, ()


def interrupt():
    raise KeyboardInterrupt


def identity(value):
    return value


def give(kind, *args):
    return kind(*args)


def throw(kind, *args):
    raise kind(*args)


def nested(depth):
    made = []
    for _ in range(depth):
        made = [made]
    return made


def fails_alone(env: Env, get, *words, kinds=Exception, pool):
    """This task fails with these words somewhere in its story; its neighbours do not fail, and the pool goes on."""
    before = [pool.apply_async(square, (value,)) for value in range(5)]
    error = env.raises(get, kinds)
    after = [pool.apply_async(square, (value,)) for value in range(5)]
    got = [result.get(15) for result in before + after]
    assert got == [0, 1, 4, 9, 16] * 2, got
    story, link = "", error
    while link is not None:
        story += f"{type(link).__name__}: {safe_text(link)}\n"
        link = link.__cause__
    missing = [word for word in words if word not in story]
    assert not missing, f"{missing} not told by: {story}"
    return error


def safe_text(error):
    try:
        return str(error)
    except Exception as failure:
        return f"<{failure}>"


@case(3, "an argument that does not pickle", spawn=True)
def argument_stays(env: Env):
    pool = env.shared()
    fails_alone(env, lambda: pool.apply_async(identity, (Unpicklable(),)).get(10), "Unpicklable", pool=pool)


@case(3, "a `threading.Lock` as argument: the message names the type")
def argument_lock(env: Env):
    pool = env.shared()
    fails_alone(env, lambda: pool.apply_async(identity, (threading.Lock(),)).get(10), "lock", pool=pool)


@case(3, "an argument of `map` that does not pickle", spawn=True)
def argument_of_map(env: Env):
    pool = env.shared()
    fails_alone(env, lambda: pool.map(identity, [1, 2, Unpicklable(), 4]), "Unpicklable", pool=pool)


@case(3, "an argument of `imap` that does not pickle: only that item", needs="imap")
def argument_of_imap(env: Env):
    pool = env.shared()
    results = pool.imap(identity, iter([0, 1, Unpicklable(), 3, 4]))
    got = []
    for _ in range(5):
        try:
            got.append(results.next(15))
        except StopIteration:
            break
        except Exception as error:
            refuse_timeout(error, "nothing came")
            got.append("error")
    assert got == [0, 1, "error", 3, 4], got
    env.usable(pool)


@case(3, "an argument that does not unpickle in the worker", spawn=True)
def argument_unreadable(env: Env):
    pool = env.shared()
    get = pool.apply_async(identity, (Unreadable(),)).get
    fails_alone(env, lambda: get(10), "cannot be restored", pool=pool)


@case(3, "an argument of `map` that does not unpickle in the worker")
def argument_of_map_unreadable(env: Env):
    pool = env.shared()
    fails_alone(env, lambda: pool.map_async(identity, [1, Unreadable(), 3]).get(10), "cannot be restored", pool=pool)


@case(3, "an argument whose module the worker cannot import")
def module_missing(env: Env):
    pool = env.pool(2)
    env.worker_pids(pool)  # started before the module's directory is on the path
    directory = Path(os.environ["FAULTS_DIR"]) / "late"
    directory.mkdir(exist_ok=True)
    (directory / "only_the_caller.py").write_text("class Thing:\n    pass\n")
    sys.path.insert(0, str(directory))
    try:
        import only_the_caller
    finally:
        sys.path.remove(str(directory))
    get = pool.apply_async(identity, (only_the_caller.Thing(),)).get
    fails_alone(env, lambda: get(10), "only_the_caller", pool=pool)


@case(3, "a function that does not pickle", spawn=True)
def function_stays(env: Env):
    pool = env.shared()
    fails_alone(env, lambda: pool.apply_async(UnpicklableCall(), (1,)).get(10), "Unpicklable", pool=pool)


@case(3, "a function of `map` that does not pickle")
def function_of_map_stays(env: Env):
    pool = env.shared()
    fails_alone(env, lambda: pool.map_async(UnpicklableCall(), [1, 2]).get(10), "Unpicklable", pool=pool)


@case(3, "a function that does not unpickle in the worker")
def function_unreadable(env: Env):
    pool = env.shared()
    get = pool.apply_async(UnreadableCall(os.getpid()), (1,)).get
    fails_alone(env, lambda: get(10), "away from home", pool=pool)


@case(3, "a result that does not pickle", spawn=True)
def result_stays(env: Env):
    pool = env.shared()
    kind = env.needs_tpool("MaybeEncodingError")
    get = pool.apply_async(give, (Unpicklable,)).get
    error = fails_alone(env, lambda: get(10), "Unpicklable", kinds=kind, pool=pool)
    assert not env.is_tpool or "stay at home" in error.exc, error


@case(3, "a result of `map` that does not pickle")
def result_of_map_stays(env: Env):
    pool = env.shared()
    kind = env.needs_tpool("MaybeEncodingError")
    fails_alone(env, lambda: pool.map_async(give, [int, Unpicklable]).get(10), "Unpicklable", kinds=kind, pool=pool)


@case(3, "one result of `imap` that does not pickle: only that item", needs="imap")
def result_of_imap_stays(env: Env):
    pool = env.shared()
    results = pool.imap(give, [int, Unpicklable, str])
    assert results.next(15) == 0
    env.raises(lambda: results.next(15), env.needs_tpool("MaybeEncodingError"))
    assert results.next(15) == ""
    env.usable(pool)


@case(3, "a result that does not unpickle in the caller", spawn=True)
def result_unreadable(env: Env):
    pool = env.shared()
    kind = env.needs_tpool("DecodeError")
    get = pool.apply_async(give, (Unreadable,)).get
    fails_alone(env, lambda: get(10), "cannot be restored", kinds=kind, pool=pool)


@case(3, "a result of `map` that does not unpickle in the caller")
def result_of_map_unreadable(env: Env):
    pool = env.shared()
    kind = env.needs_tpool("DecodeError")
    get = pool.map_async(give, [int, Unreadable]).get
    fails_alone(env, lambda: get(10), "cannot be restored", kinds=kind, pool=pool)


@case(3, "one result of `imap` that does not unpickle: only that item", needs="imap")
def result_of_imap_unreadable(env: Env):
    pool = env.shared()
    results = pool.imap(give, [int, Unreadable, str])
    assert results.next(15) == 0
    env.raises(lambda: results.next(15), env.needs_tpool("DecodeError"))
    assert results.next(15) == ""
    env.usable(pool)


@case(3, "a result whose unpickling raises `SystemExit`")
def result_exits(env: Env):
    pool = env.shared()
    get = pool.apply_async(give, (ExitsWhenRead,)).get
    fails_alone(env, lambda: get(10), kinds=BaseException, pool=pool)


@case(3, "a result whose unpickling raises `KeyboardInterrupt`")
def result_interrupts(env: Env):
    pool = env.shared()
    get = pool.apply_async(give, (InterruptsWhenRead,)).get
    fails_alone(env, lambda: get(10), kinds=BaseException, pool=pool)


@case(3, "an exception that does not pickle: type, text and traceback are told", spawn=True)
def exception_stays(env: Env):
    pool = env.shared()
    get = pool.apply_async(throw, (HoldsLock, "what went wrong")).get
    words = ["HoldsLock", "what went wrong"] + (["in throw"] if env.is_tpool else [])
    fails_alone(env, lambda: get(10), *words, pool=pool)


@case(3, "an exception that does not unpickle (required arguments): type, text and traceback are told", spawn=True)
def exception_unreadable(env: Env):
    pool = env.shared()
    get = pool.apply_async(throw, (NeedsTwo, 42, "out of paper")).get
    words = ["NeedsTwo", "out of paper"] + (["in throw"] if env.is_tpool else [])
    fails_alone(env, lambda: get(10), *words, pool=pool)


@case(3, "such an exception in `map`")
def exception_of_map_unreadable(env: Env):
    pool = env.shared()
    get = pool.map_async(throw_needs_two, [1, 2, 3]).get
    fails_alone(env, lambda: get(10), "NeedsTwo", "out of paper", pool=pool)


def throw_needs_two(value):
    if value == 2:
        raise NeedsTwo(value, "out of paper")
    return value


@case(3, "an exception's own type, arguments and remote traceback arrive")
def exception_arrives(env: Env):
    pool = env.shared()
    get = pool.apply_async(throw, (ZeroDivisionError, "by nothing")).get
    error = fails_alone(env, lambda: get(10), "by nothing", "in throw", kinds=ZeroDivisionError, pool=pool)
    assert error.args == ("by nothing",), error.args


@case(3, "a result whose `repr` raises and that does not pickle")
def result_without_repr(env: Env):
    pool = env.shared()
    get = pool.apply_async(give, (BadRepr,)).get
    fails_alone(env, lambda: get(10), pool=pool)


@case(3, "an exception whose `str` raises")
def exception_without_str(env: Env):
    pool = env.shared()
    get = pool.apply_async(throw, (BadStr,)).get
    fails_alone(env, lambda: get(10), pool=pool)


@case(3, "an argument nested too deep to pickle")
def argument_too_deep(env: Env):
    pool = env.shared()
    deep = nested(100_000)
    fails_alone(env, lambda: pool.apply_async(identity, (deep,)).get(10), "RecursionError", pool=pool)
    while deep:  # taken apart by hand: its own deallocation recurses
        deep = deep.pop()


@case(3, "a result nested too deep to pickle")
def result_too_deep(env: Env):
    pool = env.shared()
    get = pool.apply_async(nested, (100_000,)).get
    fails_alone(env, lambda: get(10), "RecursionError", pool=pool)


class SlowToPack:
    """Pickling it takes as long as the event is not set."""

    def __init__(self, event):
        self.event = event

    def __reduce__(self):
        mark("packing")
        self.event.wait(20)
        return int, ()


class SlowToRead:
    def __reduce__(self):
        return wait_at_home, (os.getppid(),)


RELEASED = threading.Event()
READING = threading.Event()


def wait_at_home(_):
    import __main__

    __main__.READING.set()
    __main__.RELEASED.wait(20)
    return "read"


@case(3, "an argument that takes for ever to pickle stalls nobody else")
def slow_to_pack(env: Env):
    pool = env.shared()
    env.usable(pool)
    event = threading.Event()
    thread = threading.Thread(target=lambda: pool.apply_async(identity, (SlowToPack(event),)).get(20))
    thread.start()
    try:
        env.wait_for("packing")
        with env.within(1.0, "other tasks"):
            env.usable(pool)
    finally:
        event.set()
        thread.join()


@case(3, "a result that takes for ever to unpickle stalls nobody else")
def slow_to_read(env: Env):
    pool = env.shared()
    RELEASED.clear()
    READING.clear()
    result = pool.apply_async(give, (SlowToRead,))
    thread = threading.Thread(target=lambda: result.get(25))
    thread.start()
    try:
        assert READING.wait(15), "nobody began to read it"
        with env.within(1.0, "other tasks"):
            env.usable(pool)
    finally:
        RELEASED.set()
        thread.join()
    assert result.get(5) == "read"


@case(3, "200 bad tasks among 200 good ones")
def many_bad_ones(env: Env):
    pool = env.shared()
    kinds = [int, Unpicklable, Unreadable, NeedsTwo]
    results = [pool.apply_async(give if index % 4 < 3 else throw, _arguments(kinds, index)) for index in range(400)]
    outcomes = []
    for result in results:
        try:
            outcomes.append(result.get(20))
        except Exception as error:
            refuse_timeout(error, "a task has no outcome")
            outcomes.append("error")
    assert outcomes == [0, "error", "error", "error"] * 100, outcomes[:8]
    env.usable(pool)


def _arguments(kinds, index):
    return (kinds[index % 4],) if index % 4 < 3 else (NeedsTwo, 1, "x")


if __name__ == "__main__":
    main()
