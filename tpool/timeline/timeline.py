"""What ``Pool.timeline()`` gives: a record of who did what when, to be looked at, saved or computed with."""

from __future__ import annotations

import os
from pathlib import Path

from tpool.timeline.chrome import chrome_json
from tpool.timeline.picture import html_page, svg_picture
from tpool.timeline.spans import Spans

__all__ = ["Timeline"]


class Timeline:
    """The tasks and transfers of a pool up to the moment it was asked; in a notebook it shows itself as a picture.

    All times are seconds since the pool was made, by one clock for all processes (CLOCK_MONOTONIC).

    Attributes:
        title: the pool, in a line.
        tasks: each task in its worker, in order of their beginning; a chunk of a ``map`` counts once.
        readings: what workers read between tasks, that functions of a script need.
        encodings: what the caller's threads encoded for the workers; without plain values that became less than a
            kilobyte, which takes a microsecond or two.
        lives: the worker processes.
        dropped: how many older events are not in it, as no more were kept.
    """

    def __init__(self, title: str, spans: Spans) -> None:
        spans.tasks.sort(key=lambda task: task.began)
        self._spans = spans
        self.title = title
        self.tasks = tuple(spans.tasks)
        self.readings = tuple(spans.readings)
        self.encodings = tuple(spans.encodings)
        self.lives = tuple(spans.lives)
        self.dropped = spans.dropped

    def __repr__(self) -> str:
        dropped = f", {self.dropped} older events dropped" if self.dropped else ""
        return f"<tpool.Timeline of {len(self.tasks)} tasks{dropped}>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, in the form that its name tells.

        Args:
            path: ``.json``: a trace for ui.perfetto.dev or chrome://tracing; ``.svg`` or ``.html``: a picture that
                needs nothing else.

        Raises:
            ValueError: the name ends otherwise.
        """
        text = {".json": self._json, ".svg": self._svg, ".html": self._html}.get(Path(path).suffix.lower())
        if text is None:
            raise ValueError(
                f"a timeline is saved as .json (for ui.perfetto.dev), .svg or .html, not as {str(path)!r}"
            )
        Path(path).write_text(text(), encoding="utf-8")

    def _json(self) -> str:
        return chrome_json(self.title, self._spans)

    def _svg(self) -> str:
        return svg_picture(self.title, self._spans)

    def _html(self) -> str:
        return html_page(self.title, self._svg())

    def _repr_html_(self) -> str:
        return self._svg()
