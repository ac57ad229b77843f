"""The page of a grid: charts and tables in one HTML file that needs nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from qatc.compare.summary import FOOTNOTE, Row, cells_of, shown, tables, varying

WIDTH, HEIGHT = 560, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 44
COLORS = 8
LEAST_KL = 1e-6
"""Smaller divergences are drawn there: the axis is logarithmic."""

Curve = Sequence[Sequence[float]]
Labelled = tuple[Row, str, int]
"""A row, the label of its series, and that one's number."""

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --dim: #656d76; --line: #d8dee4;
  --page: #ffffff; --c0: #2a6fdb; --c1: #d9480f; --c2: #1f8a4c; --c3: #8e44ad; --c4: #b8860b;
  --c5: #c2255c; --c6: #0b7f8c; --c7: #5f6b7a; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --dim: #9aa4af; --line: #3a424c;
  --page: #0f1419; --c0: #6ea8fe; --c1: #ff9a5c; --c2: #5fd38d; --c3: #cf9bf0; --c4: #e8c252;
  --c5: #ff86b0; --c6: #56cbd8; --c7: #b3bdc8; } }
body { background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif;
  margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem; }
figure { margin: 0; flex: 1 1 22rem; max-width: 36rem; }
figcaption, .note { color: var(--dim); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--dim); font-size: 12px; }
svg .label { fill: var(--text); font-size: 11px; }
.axis { stroke: var(--line); stroke-width: 1; }
.curve { fill: none; stroke-width: 1.6; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 0.25rem 0.6rem; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
"""


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels.

    Args:
        low, high: values at its ends; positive where it is logarithmic.
        start, end: pixels at its ends.
        logarithmic: whether equal ratios take equal room.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (self._on_scale(v) for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def _on_scale(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def ticks(self) -> list[float]:
        """Round values between the ends, about five of them."""
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            few = (1,) if len(decades) > 4 else (1, 2, 5)
            found = [digit * 10.0**decade for decade in decades for digit in few]
        else:
            rough = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(power * s for s in (1, 2, 5, 10) if power * s >= rough)
            first = math.ceil(self.low / step)
            found = [step * (first + i) for i in range(12)]
        return [value for value in found if self.low <= value <= self.high]


def axis_over(values: Sequence[float], start: float, end: float, logarithmic: bool = False) -> Axis:
    """An axis with some room around the values."""
    low, high = min(values), max(values)
    if logarithmic:
        room = max((high / low) ** 0.06, 1.2)
        return Axis(low / room, high * room, start, end, True)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Axis(low - room, high + room, start, end)


def to_html(rows: Sequence[Row], failed: Mapping[str, str]) -> str:
    """The page of all grids."""
    body = ["<h1>Comparison</h1>", f'<p class="note">{escape(FOOTNOTE)}</p>']
    for name, own in tables(rows).items():
        body.append(f"<h2>{escape(name)}</h2>")
        first = [row for row in own if row.text == own[0].text]
        for model in dict.fromkeys(str(row.setting["model"]) for row in first):
            body += _charts([row for row in first if str(row.setting["model"]) == model], model)
        body.append(_table(own))
    if failed:
        items = "".join(
            f"<li><code>{escape(name)}</code>: {escape(error)}</li>"
            for name, error in failed.items()
        )
        body.append(f"<h2>Failed</h2><ul>{items}</ul>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>Comparison</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _charts(rows: Sequence[Row], model: str) -> list[str]:
    """The figures of one model: KL against size and operations, over steps and over layers."""
    names = [name for name in varying(rows) if name not in ("model", "bits")]
    labels = [_series(row, names) for row in rows]
    number = {label: index for index, label in enumerate(dict.fromkeys(labels))}
    points = [(row, label, number[label]) for row, label in zip(rows, labels, strict=True)]
    drawn = [
        (_scatter(points, across, up), f"{up.caption} against {across.caption}")
        for up in _UP
        for across in _ACROSS
    ]
    curves = [(row, label, number, row.curve) for row, label, number in points]
    drawn.append((_lines(curves, "step"), "KL on the training rows, first seed"))
    by_layer = [(*point, [*enumerate(point[0].layers, start=1)]) for point in points]
    drawn.append((_lines(by_layer, "layer"), "KL of the layers up to each one, first seed"))
    figures = "".join(
        f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
        for svg, caption in drawn
        if svg
    )
    legend = "".join(
        f'<li><svg viewBox="0 0 14 14" style="display:inline-block;width:0.9em">'
        f"{_mark(index, 7, 7)}</svg> {escape(label)}</li>"
        for label, index in number.items()
    )
    legend = f'<ul class="legend">{legend}</ul>' if len(number) > 1 else ""
    return [f"<h3>{escape(shown(model))}</h3>", legend, f'<div class="charts">{figures}</div>']


def _bits(row: Row) -> str:
    return row.bits or shown(row.setting.get("bits", "4-8-4"))


def _series(row: Row, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {shown(row.setting.get(name))}" for name in names) or row.method


@dataclass(frozen=True)
class _Figure:
    """A figure of a row as a chart shows it.

    Attributes:
        name: in ``FIGURES``.
        scale: from there to the chart.
        title: of the axis.
        caption: in words.
        logarithmic: whether the axis is.
    """

    name: str
    scale: float
    title: str
    caption: str
    logarithmic: bool = False

    def __call__(self, row: Row) -> float | None:
        found = row.figures[self.name]
        if found is None:
            return None
        return (
            max(found.mean * self.scale, LEAST_KL) if self.logarithmic else found.mean * self.scale
        )


_UP = (
    _Figure("kl", 1, "KL", "KL", logarithmic=True),
    _Figure("perplexity", 1, "perplexity", "Perplexity", logarithmic=True),
    _Figure("accuracy", 100, "accuracy %", "Accuracy"),
)
_ACROSS = (
    _Figure("bytes", 1e-6, "MB of weights", "size"),
    _Figure("operations_per_token", 1e-9, "10^9 bit operations per token", "bit operations"),
)


def _scatter(series: Sequence[Labelled], of_x: _Figure, of_y: _Figure) -> str:
    points = [
        (label, number, value, height, _bits(row))
        for row, label, number in series
        if (value := of_x(row)) is not None and (height := of_y(row)) is not None
    ]
    if not points:
        return ""
    x = axis_over([p[2] for p in points], LEFT, WIDTH - RIGHT)
    y = axis_over([p[3] for p in points], HEIGHT - BOTTOM, TOP, of_y.logarithmic)
    marks: list[str] = []
    taken: list[tuple[float, float]] = []
    for label, number, value, height, bits in points:
        across, down = x(value), y(height)
        tip = f"{bits}, {label}: {value:.4g} {of_x.title}, {of_y.title} {height:.4g}"
        marks.append(f"<g>{_mark(number, across, down)}<title>{escape(tip)}</title></g>")
        if all(abs(across - a) > 46 or abs(down - d) > 12 for a, d in taken):
            taken.append((across, down))
            side, anchor = (7, "start") if across < WIDTH / 2 else (-7, "end")
            marks.append(_label(across + side, down + 4, bits, "label", anchor))
    what = f"{of_y.caption} against {of_x.title}"
    return _svg(x, y, of_x.title, of_y.title, "".join(marks), what)


def _lines(series: Sequence[tuple[Row, str, int, Curve]], across: str) -> str:
    """KL over something, a line for each row."""
    lines = [
        (f"{_bits(row)}, {label}", number, [(place, max(kl, LEAST_KL)) for place, kl in curve])
        for row, label, number, curve in series
    ]
    points = [point for _, _, line in lines for point in line]
    if not points:
        return ""
    x = axis_over([p[0] for p in points], LEFT, WIDTH - RIGHT)
    y = axis_over([p[1] for p in points], HEIGHT - BOTTOM, TOP, logarithmic=True)
    drawn = []
    for tip, number, line in lines:
        if line:
            path = " ".join(f"{x(place):.1f},{y(kl):.1f}" for place, kl in line)
            drawn.append(
                f'<polyline class="curve" style="stroke:var(--c{number % COLORS})"'
                f' points="{path}"><title>{escape(tip)}</title></polyline>'
            )
    return _svg(x, y, across, "KL", "".join(drawn), f"KL by {across}")


def _svg(x: Axis, y: Axis, title: str, up: str, marks: str, what: str) -> str:
    base = HEIGHT - BOTTOM
    parts = [*_grid(x, y, base), marks]
    parts.append(_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, title, anchor="middle"))
    parts.append(_label(LEFT, TOP - 3, up, anchor="end"))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(what)}">'
        f"{''.join(parts)}</svg>"
    )


def _grid(x: Axis, y: Axis, base: float) -> Iterator[str]:
    line = '<line class="axis" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'
    for value in y.ticks():
        yield line.format(LEFT, y(value), WIDTH - RIGHT, y(value))
        yield _label(LEFT - 6, y(value) + 4, f"{value:g}", anchor="end")
    yield line.format(LEFT, base, WIDTH - RIGHT, base)
    for value in x.ticks():
        yield line.format(x(value), base, x(value), base + 4)
        yield _label(x(value), base + 18, f"{value:g}", anchor="middle")


def _label(x: float, y: float, text: str, kind: str = "tick", anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


_SHAPES: tuple[Callable[[float, float], str], ...] = (
    lambda x, y: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"',
    lambda x, y: f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"',
    lambda x, y: f'<path d="M{x:.1f} {y - 5:.1f}L{x + 5:.1f} {y + 4:.1f}H{x - 5:.1f}Z"',
    lambda x, y: (
        f'<path d="M{x:.1f} {y - 6:.1f}L{x + 6:.1f} {y:.1f}L{x:.1f} {y + 6:.1f}'
        f'L{x - 6:.1f} {y:.1f}Z"'
    ),
)


def _mark(number: int, x: float, y: float) -> str:
    """A point of a series: eight colours in each of four shapes."""
    shape = _SHAPES[number // COLORS % len(_SHAPES)]
    return f'{shape(x, y)} style="fill:var(--c{number % COLORS})"/>'


def _table(rows: Sequence[Row]) -> str:
    header, *lines = cells_of(rows)
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
