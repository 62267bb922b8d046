"""Two kinds of plots as SVG text: bars of a few series side by side, and lines through points. Light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, TOP, BAR, GAP = 760, 190, 110, 58, 13, 16
COLOURS = ("#2563eb", "#9ca3af", "#d6b656", "#7c3aed", "#059669", "#dc2626")
STYLE = """<style>
text { font: 12px system-ui, sans-serif; fill: #1f2937 } .title { font-weight: 600; font-size: 14px }
.faint { fill: #6b7280 } .axis { stroke: #9ca3af } .mark { stroke: #dc2626; stroke-width: 2 }
@media (prefers-color-scheme: dark) { text { fill: #e5e7eb } .faint { fill: #9ca3af } }
</style>"""
MISSING = "not measured yet"


@dataclass(frozen=True)
class Group:
    """Bars that stand together, in the order of the series; None: not measured. `mark`: a target across the bars."""

    label: str
    values: tuple[float | None, ...]
    mark: float | None = None


def bars(title: str, unit: str, series: Sequence[str], groups: Sequence[Group]) -> str:
    """Horizontal bars, all to one scale from 0."""
    known = [value for group in groups for value in (*group.values, group.mark) if value is not None]
    scale = (WIDTH - LEFT - RIGHT) / max([*known, 1e-9])
    parts = _head(title, [*series, "target (line)"] if any(group.mark for group in groups) else series)
    y = TOP
    for group in groups:
        height = BAR * len(series)
        parts.append(_text(LEFT - 8, y + height / 2 + 4, group.label, anchor="end"))
        for index, value in enumerate(group.values):
            top = y + index * BAR
            width = 0.0 if value is None else value * scale
            parts.append(f'<rect x="{LEFT}" y="{top}" width="{width:.1f}" height="{BAR - 2}" fill="{COLOURS[index]}"/>')
            said = MISSING if value is None else f"{number(value)} {unit}"
            parts.append(_text(LEFT + width + 5, top + BAR - 3, said, "faint"))
        if group.mark is not None:
            x = LEFT + group.mark * scale
            parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 2}" y2="{y + height}"/>')
        y += height + GAP
    return _whole(parts, y)


@dataclass(frozen=True)
class Line:
    label: str
    points: tuple[tuple[float, float], ...]


def lines(title: str, x_name: str, y_name: str, drawn: Sequence[Line], mark: float | None = None) -> str:
    """Points joined by lines, y from 0 to the largest. `mark`: a horizontal line."""
    height, bottom = 240, TOP + 240
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points] + ([mark] if mark is not None else [])
    left, wide = 60, WIDTH - 90
    x_scale, y_scale = wide / max([*xs, 1e-9]), height / max([*ys, 1e-9])
    parts = _head(title, [line.label for line in drawn])
    parts.append(f'<path class="axis" fill="none" d="M{left} {TOP}V{bottom}H{left + wide}"/>')
    for part in range(5):
        x, y = max([*xs, 0.0]) * part / 4, max([*ys, 0.0]) * part / 4
        parts.append(_text(left + x * x_scale, bottom + 16, f"{x:.3g}", "faint", "middle"))
        parts.append(_text(left - 6, bottom - y * y_scale + 4, f"{y:.3g}", "faint", "end"))
    parts.append(_text(left + wide / 2, bottom + 34, f"{x_name}; upwards: {y_name}", anchor="middle"))
    if mark is not None:
        y = bottom - mark * y_scale
        parts.append(f'<line class="mark" x1="{left}" x2="{left + wide}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for line, colour in zip(drawn, COLOURS, strict=False):
        places = [(left + x * x_scale, bottom - y * y_scale) for x, y in sorted(line.points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places]
    if not xs:
        parts.append(_text(left + wide / 2, TOP + height / 2, MISSING, "faint", "middle"))
    return _whole(parts, bottom + 44)


def number(value: float) -> str:
    """With as many digits as tell something."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _head(title: str, legend: Sequence[str]) -> list[str]:
    parts = [_text(12, 20, title, "title")]
    x = 12.0
    for index, name in enumerate(legend):
        colour = COLOURS[5] if name.endswith("(line)") else COLOURS[index]
        parts.append(f'<rect x="{x:.0f}" y="30" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(x + 14, 39, name, "faint"))
        x += 32 + 6.6 * len(name)
    return parts


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _whole(parts: Sequence[str], height: float) -> str:
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}>', STYLE, *parts, "</svg>"]) + "\n"
