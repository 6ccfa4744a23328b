"""Line and bar charts as SVG: scales, axes, series. Colours are CSS classes; style.py says what they look like."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

FONT = 12  # pixels, of all texts but titles and ticks
#: Widths of characters in pixels at that size; of all others the last one.
WIDTHS = ((" .,:;'|!ijlI", 3.2), ("-()[]/frt", 4.6), ("mwMW%@", 10.2), ("ABCDEGHKNOPQRSTUVXYZ&+×", 8.2), ("", 6.8))


def text_width(text: str, bold: bool = False) -> float:
    """Pixels that a text needs, about."""
    wide = sum(next(wide for letters, wide in WIDTHS if not letters or letter in letters) for letter in text)
    return 1.13 * wide if bold else wide


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high`` onto pixels; ``ticks`` are the values that are written."""

    low: float
    high: float
    ticks: Sequence[float]
    label: str = ""
    log: bool = False

    def share(self, value: float) -> float:
        """0 at low, 1 at high."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def axis_from_zero(highest: float, label: str = "", lines: int = 5, step: float = 0) -> Axis:
    """A linear axis to a round number at or above ``highest``; ``step`` between its lines where one is given."""
    step = step or round_step(highest / lines)
    count = math.ceil(highest * 1.02 / step)
    return Axis(0, count * step, [step * i for i in range(count + 1)], label)


def round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least ``least``."""
    power = 10 ** math.floor(math.log10(least)) if least > 0 else 1
    return next((m * power for m in (1, 2, 2.5, 5) if m * power >= least * 0.999), 10 * power)


def log_axis(values: Sequence[float], label: str = "", ticks: Sequence[float] | None = None, pad: float = 1.0) -> Axis:
    """A logarithmic axis around the values; ticks at 1, 2, 5 times powers of ten unless given."""
    values = [value for value in values if value > 0] or [1]
    low, high = min(values) / pad, max(values) * pad
    if low == high:
        low, high = low / 1.5, high * 1.5
    if ticks is None:
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        every = [m * 10.0**p for p in powers for m in (1, 2, 5)]
        ticks = [t for t in every if low <= t <= high]
        if len(ticks) < 3:  # out to the next round numbers
            low = max(t for t in every if t <= low)
            high = min(t for t in (*every, 10.0 ** (powers[-1] + 1)) if t >= high)
            ticks = [*every, high]
        elif len(ticks) > 8:
            ticks = [t for t in ticks if f"{t:e}"[0] == "1"]
    inside = sorted({t for t in ticks if low * 0.999 <= t <= high * 1.001})
    return Axis(low, high, inside, label, log=True)


@dataclass
class Series:
    """Points (x, y) of one candidate. ``style`` is a class of style.py; ``labels`` stand at the points."""

    name: str
    points: list[tuple[float, float]]
    style: str
    labels: list[str] = field(default_factory=list)
    dashed: bool = False
    area: bool = False  # filled down to the axis, no markers
    below: bool = False  # labels under the points, where something runs above them


def number(value: float) -> str:
    """As a person writes it: 16k for 16384, 20,000, 0.25."""
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}k"
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


class Plot:
    """One set of axes. Adding draws; ``svg`` gives the whole.

    ``head``: at least as many pixels are above the axes, so that those of neighbours begin at one height.
    """

    def __init__(
        self,
        width: int,
        height: int,
        x: Axis,
        y: Axis,
        title: str = "",
        legend: Sequence[Series] = (),
        head: float = 0,
    ):
        self.width, self.height, self.x, self.y, self.title = width, height, x, y, title
        self.parts: list[str] = []
        self.taken: list[tuple[float, float, float]] = []  # by values: left, right and base line
        top = 6
        if title:
            top += 20
            self.text(0, 15, title, "title")
        if legend:
            top = self.legend(legend, top)
        if y.label:
            top = max(top, head - 28)
            self.text(0, top + 12, y.label, "muted")
            top += 20
        self.left = 10 + max((text_width(number(t)) for t in y.ticks), default=13)
        self.right = width - 12
        self.top = max(top + 8, head)
        self.bottom = height - (42 if x.label else 24)
        self.grid()

    def legend(self, series: Sequence[Series], top: float) -> float:
        """Names with their colours, as many a line as fit; returns where they end."""
        parts, end = legend_parts(series, self.width, top)
        self.parts += parts
        return end

    def px(self, value: float) -> float:
        return round(self.left + self.x.share(value) * (self.right - self.left), 1)

    def py(self, value: float) -> float:
        return round(self.bottom - self.y.share(value) * (self.bottom - self.top), 1)

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "start") -> None:
        where = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.parts.append(f'<text class="{style}" x="{x:g}" y="{y:g}"{where}>{escape(text)}</text>')

    def grid(self) -> None:
        for tick in self.y.ticks:
            y = self.py(tick)
            zero = " zero" if tick == 0 else ""
            self.parts.append(
                f'<line class="grid{zero}" x1="{self.left:g}" x2="{self.right:g}" y1="{y:g}" y2="{y:g}"/>'
            )
            self.text(self.left - 6, y + 4, number(tick), "tick", "end")
        end = 0.0
        for tick in self.x.ticks:
            x, half = self.px(tick), text_width(number(tick)) / 2
            if x - half >= end:  # one that would run into the one before is left out
                self.text(x, self.bottom + 18, number(tick), "tick", "middle")
                end = x + half + 4
        if self.x.label:
            self.text((self.left + self.right) / 2, self.height - 6, self.x.label, "muted", "middle")

    def add(self, series: Series) -> None:
        """A line with a marker at each point, or an area; what a logarithmic axis has no place for is left out."""
        points = [(x, y) for x, y in series.points if (x > 0 or not self.x.log) and (y > 0 or not self.y.log)]
        places = [(self.px(x), self.py(y)) for x, y in points]
        if not places:
            return
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
        if series.area:
            path += f"L{places[-1][0]:g} {self.bottom:g}L{places[0][0]:g} {self.bottom:g}Z"
            self.parts.append(f'<path class="area {series.style}" d="{path}"/>')
            return
        dashed = " dashed" if series.dashed else ""
        self.parts.append(f'<path class="line {series.style}{dashed}" d="{path}"/>')
        for (x, y), (value_x, value_y) in zip(places, points, strict=True):
            told = f"{series.name}: {value_y:g} at {number(value_x)}"
            radius = 4 if series.style == "own" else 2 if series.dashed else 3
            self.parts.append(
                f'<circle class="dot {series.style}" cx="{x:g}" cy="{y:g}" r="{radius}">'
                f"<title>{escape(told)}</title></circle>"
            )
        for i in reversed(range(min(len(places), len(series.labels)))):  # the last one matters most
            if series.labels[i]:
                x, y = places[i]
                last = i + 1 == len(places)
                climb = 0 if last else (y - places[i + 1][1]) / max(places[i + 1][0] - x, 1)
                wide = text_width(series.labels[i], bold=True)
                where = self.under(x, y, wide) if series.below else self.over(x, y, wide, climb)
                self.label(*where, wide, series.labels[i], series.style)

    def under(self, x: float, y: float, wide: float) -> tuple[float, float]:
        """Where a value under its point begins, inside of the picture."""
        return min(max(x - wide / 2, self.left - 4), self.width - wide), min(y + 18, self.bottom - 4)

    def over(self, x: float, y: float, wide: float, climb: float) -> tuple[float, float]:
        """Where a value above its point begins: inside of the picture, beside a line that climbs away from it."""
        if climb > 0.25 and x - wide < self.left:
            return x + 10, y + 13
        start = x + 6 - wide if climb > 0.25 else x - wide / 2
        start = min(max(start, self.left - 4), self.width - wide)
        return start, y - 9 if y - 9 > self.top - 6 else y + 18

    def label(self, x: float, y: float, wide: float, text: str, style: str) -> None:
        """A value, unless another stands there already."""
        if any(
            abs(y - other_y) < FONT and x < other_end and start < x + wide for start, other_end, other_y in self.taken
        ):
            return
        self.taken.append((x, x + wide, y))
        self.text(round(x, 1), round(y, 1), text, f"value {style}")

    def level(self, value: float, text: str) -> None:
        """A horizontal line with its name."""
        y = self.py(value)
        self.parts.append(f'<line class="level" x1="{self.left:g}" x2="{self.right:g}" y1="{y:g}" y2="{y:g}"/>')
        self.text(self.left + 6, y - 5, text, "muted")

    def svg(self) -> str:
        return frame(self.width, self.height, "".join(self.parts), self.title)


def legend_parts(series: Sequence[Series], width: float, top: float) -> tuple[list[str], float]:
    at, line, parts = 0.0, top + 12, []
    for one in series:
        wide = 26 + 1.03 * text_width(one.name)
        if at and at + wide > width:
            at, line = 0.0, line + 18
        if one.area:
            parts.append(f'<rect class="area {one.style}" x="{at:g}" y="{line - 9:g}" width="18" height="10"/>')
        else:
            parts.append(
                f'<line class="line {one.style}{" dashed" if one.dashed else ""}" x1="{at + 1:g}" x2="{at + 17:g}" '
                f'y1="{line - 4:g}" y2="{line - 4:g}"/>'
            )
        parts.append(f'<text class="legend" x="{at + 24:g}" y="{line:g}">{escape(one.name)}</text>')
        at += wide + 18
    return parts, line + 8


def legend(series: Sequence[Series], width: int) -> str:
    """A legend for several plots."""
    parts, end = legend_parts(series, width, 0)
    return frame(width, end + 6, "".join(parts), "")


def bars(width: int, items: Sequence[tuple[str, float, str, str]], label: str, wide_names: bool) -> str:
    """Horizontal bars: (name, value, text, style) each; names beside the bars, or above them where it is narrow."""
    parts = []
    highest = max(value for _, value, _, _ in items)
    gutter = max(text_width(name) for name, *_ in items) + 18 if wide_names else 0
    room = width - gutter - max(text_width(text, bold=True) for _, _, text, _ in items) - 12
    step, y = (34 if wide_names else 46), 4
    for name, value, text, style in items:
        top = y if wide_names else y + 18
        if wide_names:
            parts.append(
                f'<text class="legend" x="{gutter - 12:g}" y="{top + 17:g}" text-anchor="end">{escape(name)}</text>'
            )
        else:
            parts.append(f'<text class="legend" x="0" y="{y + 12:g}">{escape(name)}</text>')
        long = max(2.0, room * value / highest)
        parts.append(f'<rect class="bar {style}" x="{gutter:g}" y="{top:g}" width="{long:.1f}" height="24" rx="3"/>')
        parts.append(f'<text class="value {style}" x="{gutter + long + 8:.1f}" y="{top + 17:g}">{escape(text)}</text>')
        y += step
    return frame(width, y + 2, "".join(parts), label)


def frame(width: float, height: float, content: str, label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(label, quote=True)}">{content}</svg>'
    )


def beside(pictures: Sequence[str], columns: int, gap: int = 24, above: str = "") -> str:
    """Several SVGs of one size in a grid, as one; ``above`` them another."""
    sizes = [size(picture) for picture in pictures]
    wide, high = max(w for w, _ in sizes), max(h for _, h in sizes)
    lines = math.ceil(len(pictures) / columns)
    top = size(above)[1] + 8 if above else 0
    content = [above] if above else []
    for i, picture in enumerate(pictures):
        x, y = (i % columns) * (wide + gap), top + (i // columns) * (high + gap)
        content.append(picture.replace("<svg ", f'<svg x="{x:g}" y="{y:g}" ', 1))
    columns = min(columns, len(pictures))
    return frame(columns * wide + (columns - 1) * gap, top + lines * high + (lines - 1) * gap, "".join(content), "")


def size(picture: str) -> tuple[float, float]:
    """Width and height of an SVG made here."""
    return tuple(float(picture.partition(f' {side}="')[2].partition('"')[0]) for side in ("width", "height"))
