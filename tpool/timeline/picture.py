"""A timeline as a picture: SVG that needs nothing else.

One lane for each thread that encodes and each worker. What is too narrow to be drawn by itself is added up by column,
and drawn as high as the share of the column that it fills; so the picture stays small, whatever the number of tasks,
and a lane of short tasks shows how busy it was.
"""

from __future__ import annotations

import html
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from tpool.timeline.columns import Columns
from tpool.timeline.spans import EncodeSpan, LifeSpan, Spans, TaskSpan

__all__ = ["html_page", "svg_picture"]

WIDTH, LEFT, RIGHT = 1200, 118, 152
LANE, GAP, TOP = 28, 8, 62
PLOT = WIDTH - LEFT - RIGHT
# Colours that people with any colour vision tell apart (Okabe and Ito 2008), but for the two of the transfers.
COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#7f6fb0", "#5b8c2a", "#8c564b", "#3d4f5f")
OTHERS = "#7a8794"
RECEIVE, SEND, ENCODE = "#f0b429", "#e0622f", "#b8860b"
LOST, BACK, START = "#c0143c", "#eef1f5", "#d5dbe4"
FONT = "font-family='system-ui, -apple-system, Segoe UI, DejaVu Sans, sans-serif'"
CALLS_NAMED = 25
MARGIN = 0.05  # the most that there is before the first task, as a share of the time that tasks ran
LABEL_WIDTH = 6.4  # of a letter, about


def svg_picture(title: str, spans: Spans) -> str:
    """The whole picture.

    Args:
        title: what it shows.
        spans: what happened.
    """
    counts = Counter(task.call for task in spans.tasks)
    colours = {call: COLOURS[n] if n < len(COLOURS) else OTHERS for n, (call, _) in enumerate(counts.most_common())}
    threads, workers = spans.threads(), spans.workers()
    scale = Scale(spans)
    bottom = TOP + (len(threads) + len(workers)) * (LANE + GAP)
    height = bottom + 44 + 22 * -(-(min(len(counts), CALLS_NAMED) + 4) // 4)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}' "
        f"style='max-width:100%;height:auto' {FONT} font-size='12'>",
        f"<rect width='{WIDTH}' height='{height}' fill='#ffffff'/>",
        _text(16, 26, title, "font-size='15' font-weight='600' fill='#1b2733'"),
        _text(16, 46, _summary(spans, scale), "fill='#5a6775'"),
        *_axis(scale, bottom),
        *_lanes(spans, threads, workers, colours, scale),
        *_legend(bottom + 34, colours, counts, any(task.fate == "lost" for task in spans.tasks)),
        "</svg>",
    ]
    return "\n".join(parts)


def html_page(title: str, svg: str) -> str:
    """A page of its own around the picture."""
    head = f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
    style = "<style>body{margin:16px;background:#fff} svg{display:block;margin:auto}</style>"
    return f"{head}{style}</head><body>\n{svg}\n</body></html>\n"


class Scale:
    """From seconds to pixels: the tasks fill the width; what was before them only if nothing else was.

    Attributes:
        first, last: the seconds at both ends.
    """

    def __init__(self, spans: Spans) -> None:
        times = [(span.began, span.ended) for some in (spans.tasks, spans.encodings) for span in some]
        if spans.tasks:
            # What was encoded while the workers were only starting would take all the width, and shows nothing.
            began, ended = min(task.began for task in spans.tasks), max(task.ended for task in spans.tasks)
            margin = (ended - began) * MARGIN
            times = [(max(first, began - margin), last) for first, last in times if last > began - margin]
        times = times or [(life.began, life.ended or life.ready or life.began) for life in spans.lives] or [(0.0, 1.0)]
        self.first = min(began for began, _ in times)
        self.last = max(max(ended for _, ended in times), self.first + 1e-6)
        self._factor = PLOT / (self.last - self.first)

    def x(self, seconds: float) -> float:
        """Where this moment is; the ends for what lies beyond."""
        return LEFT + min(PLOT, max(0.0, (seconds - self.first) * self._factor))


def _summary(spans: Spans, scale: Scale) -> str:
    text = f"{len(spans.tasks):,} tasks in {duration(scale.last - scale.first)}"
    return text + (f"; {spans.dropped:,} older events were dropped" if spans.dropped else "")


def duration(seconds: float) -> str:
    """A time, for people."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def _axis(scale: Scale, bottom: int) -> Iterator[str]:
    span = scale.last - scale.first
    step = 10.0 ** len(str(int(span))) if span >= 1 else 1.0
    while span / step < 5:
        step /= 10
    step *= next(factor for factor in (5, 2, 1) if span / (step * factor) >= 5)
    for tick in range(int(span / step) + 1):
        x = scale.x(scale.first + tick * step)
        yield f"<line x1='{x:.1f}' y1='{TOP - 6}' x2='{x:.1f}' y2='{bottom}' stroke='#dfe4ea'/>"
        label = duration(tick * step) if tick else "0"
        yield _text(x, bottom + 14, label, "fill='#5a6775' font-size='11' text-anchor='middle'")


def _lanes(
    spans: Spans, threads: list[str], workers: list[int], colours: dict[str, str], scale: Scale
) -> Iterator[str]:
    y = TOP
    for thread in threads:
        yield from _caller_lane(y, thread, [span for span in spans.encodings if span.thread == thread], scale)
        y += LANE + GAP
    of_worker: dict[int, Spans] = defaultdict(Spans)
    for task in spans.tasks:
        of_worker[task.worker].tasks.append(task)
    for life in spans.lives:
        of_worker[life.worker].lives.append(life)
    for reading in spans.readings:
        of_worker[reading.worker].readings.append(reading)
    for worker in workers:
        yield from _worker_lane(y, worker, of_worker[worker], colours, scale)
        y += LANE + GAP


def _lane(y: int, name: str, note: str) -> Iterator[str]:
    yield _text(LEFT - 10, y + LANE / 2 + 4, _short(name, 16), "text-anchor='end' fill='#1b2733'")
    yield _text(WIDTH - RIGHT + 10, y + LANE / 2 + 4, note, "fill='#5a6775' font-size='11'")


def _caller_lane(y: int, thread: str, spans: Sequence[EncodeSpan], scale: Scale) -> Iterator[str]:
    total = sum(span.ended - span.began for span in spans)
    yield from _lane(y, thread, f"encoded for {duration(total)}")
    yield _rect(LEFT, y, PLOT, LANE, BACK)
    columns = Columns(scale.x, LEFT)
    for span in spans:
        x, width = scale.x(span.began), scale.x(span.ended) - scale.x(span.began)
        if width < 1:
            columns.add(span.began, span.ended, ENCODE)
        else:
            yield _rect(
                x, y, width, LANE, ENCODE, f"encode: {duration(span.ended - span.began)}, {span.nbytes:,} bytes"
            )
    yield from _columns(columns, y)


def _worker_lane(y: int, worker: int, own: Spans, colours: dict[str, str], scale: Scale) -> Iterator[str]:
    busy = sum(task.ended - task.began for task in own.tasks) / (scale.last - scale.first)
    yield from _lane(y, f"worker {worker}", f"{len(own.tasks):,} tasks, {busy:.0%} busy")
    for life in own.lives:
        yield from _life(y, life, scale)
    columns = Columns(scale.x, LEFT)
    for reading in own.readings:
        columns.add(reading.began, reading.ended, RECEIVE)
    for task in own.tasks:
        if scale.x(task.ended) - scale.x(task.began) < 1.5:
            columns.add(task.began, task.received, RECEIVE)
            columns.add(task.received, task.ran, LOST if task.fate == "lost" else colours[task.call])
            columns.add(task.ran, task.ended, SEND)
        else:
            yield from _task(y, task, colours[task.call], scale)
    yield from _columns(columns, y)
    for life in own.lives:
        if life.lost and life.ended is not None and scale.first <= life.ended <= scale.last:
            x = scale.x(life.ended)
            yield (
                f"<g stroke='{LOST}' stroke-width='2.5'><title>{html.escape(life.why)}</title>"
                f"<path d='M{x:.1f} {y - 3}v{LANE + 6}M{x - 4:.1f} {y - 5}l8 8m0 -8l-8 8' fill='none'/></g>"
            )


def _life(y: int, life: LifeSpan, scale: Scale) -> Iterator[str]:
    end = scale.x(scale.last if life.ended is None else life.ended)
    ready = scale.x(scale.last if life.ready is None else life.ready)
    started = scale.x(life.began)
    if min(ready, end) - started >= 0.5:
        yield _rect(started, y + LANE / 3, min(ready, end) - started, LANE / 3, START, f"process {life.pid} starts")
    if end - ready >= 0.5:
        yield _rect(ready, y, end - ready, LANE, BACK, f"process {life.pid}")


def _task(y: int, task: TaskSpan, colour: str, scale: Scale) -> Iterator[str]:
    began, received, ran, ended = map(scale.x, (task.began, task.received, task.ran, task.ended))
    story = f"{task.call}, task {task.task}: {duration(task.ended - task.began)}"
    story += f"; {task.fate}" if task.fate else (
        f" (receive {duration(task.received - task.began)}, {task.received_nbytes:,} bytes; "
        f"send {duration(task.ended - task.ran)}, {task.sent_nbytes:,} bytes)"
    )  # fmt: skip
    gap = 0.6 if ended - began > 4 else 0.0  # so that neighbours are told apart
    yield f"<g><title>{html.escape(story)}</title>"
    yield _rect(
        received, y, ran - received - (gap if ran == ended else 0), LANE, LOST if task.fate == "lost" else colour
    )
    if received - began >= 0.2:
        yield _rect(began, y, received - began, LANE, RECEIVE)
    if ended - ran >= 0.2:
        yield _rect(ran, y, max(0.2, ended - ran - gap), LANE, SEND)
    label = task.call if ran - received >= len(task.call) * LABEL_WIDTH + 8 else f"{task.task}"
    if ran - received >= len(label) * LABEL_WIDTH + 8:
        yield _text(
            (received + ran) / 2, y + LANE / 2 + 4, label, "fill='#ffffff' text-anchor='middle' font-size='11'"
        )
    yield "</g>"


def _columns(columns: Columns, y: int) -> Iterator[str]:
    for x, width, share, before, colour in columns.bars():
        height = LANE * share
        yield _rect(x, y + LANE * (1 - before) - height, width, height, colour)


def _legend(y: int, colours: dict[str, str], counts: Counter[str], lost: bool) -> Iterator[str]:
    entries = [(colour, f"{_short(call, 26)} ({counts[call]:,})") for call, colour in colours.items()][:CALLS_NAMED]
    if lost:
        entries.append((LOST, "lost with its worker"))
    entries += [(RECEIVE, "receive: decode"), (SEND, "send: encode the result"), (ENCODE, "encode in the caller")]
    for number, (colour, text) in enumerate(entries):
        x, row = LEFT + number % 4 * 250, y + number // 4 * 22
        yield _rect(x, row, 12, 12, colour)
        yield _text(x + 18, row + 10.5, text, "fill='#1b2733'")


def _rect(x: float, y: float, width: float, height: float, colour: str, story: str = "") -> str:
    head = f"<rect x='{x:.1f}' y='{y:.1f}' width='{max(0.0, width):.1f}' height='{height:.1f}' fill='{colour}'"
    return f"{head}><title>{html.escape(story)}</title></rect>" if story else f"{head}/>"


def _text(x: float, y: float, text: str, style: str) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' {style}>{html.escape(text)}</text>"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
