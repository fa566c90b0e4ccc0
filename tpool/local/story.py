"""What a worker tells of an exception: text that survives whatever the user's classes do."""

from __future__ import annotations

import traceback
from pathlib import Path

# Frames of these modules above the user's code say nothing to the user.
_NAMES = ("worker.py", "calls.py", "faltering.py", "lifetime.py", "seeding.py", "spans.py", "starring.py")
_OURS = {str(Path(__file__).with_name(name)) for name in _NAMES}
_OURS.add(str(Path(__file__).parent.with_name("ray") / "tasks.py"))


def safe_repr(value: object) -> str:
    """``repr`` of a user's object, which may raise."""
    try:
        return repr(value)
    except Exception as error:
        return f"<{type(value).__name__} whose repr() raised {type(error).__name__}>"


def format_remote(error: BaseException) -> str:
    """The traceback as text, without our own frames that stand above the user's code."""
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None and tb.tb_frame.f_code.co_filename in _OURS:
        tb = tb.tb_next
    try:
        lines = traceback.format_exception(type(error), error, tb)
    except Exception as reason:  # a __str__ or __notes__ of the user's that raises
        lines = [f"{type(error).__name__}: <its text could not be had: {type(reason).__name__}>\n"]
    return "".join(lines)
