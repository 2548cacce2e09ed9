"""Draws curves as an SVG file, with the standard library alone. It knows no run and no event."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

Points = Sequence[tuple[int, float]]

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 40, 44
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#475569")
_SMOOTH_FROM = 30  # points; a shorter curve is shown as it is
_MOST_POINTS = 2000  # more than pixels there are show nothing more


def write_loss_plot(points: Mapping[str, Points], path: Path) -> None:
    """Write one picture with a curve for each name: (step, value) pairs, in order of the steps.

    A long curve is drawn pale, with a moving average over it. Values that are not finite are left out; without any
    point the picture says so.
    """
    curves = {name: [(s, v) for s, v in curve if math.isfinite(v)] for name, curve in points.items()}
    path.write_text(_svg({name: curve for name, curve in curves.items() if curve}), encoding="utf-8")


def _svg(curves: Mapping[str, Points]) -> str:
    everything = [point for curve in curves.values() for point in curve]
    if not everything:
        return _document(f'<text x="{_WIDTH / 2}" y="{_HEIGHT / 2}" text-anchor="middle">No points yet</text>')
    frame = _Frame(everything)
    parts = [frame.grid()]
    for index, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        long = len(curve) >= _SMOOTH_FROM
        parts.append(frame.line(curve, colour, opacity=0.3 if long else 1.0))
        if long:
            parts.append(frame.line(_smooth(curve), colour))
        parts.append(_legend(index, name, colour, curve[-1][1]))
    return _document("\n".join(parts))


class _Frame:
    """Turns steps and values into pixels."""

    def __init__(self, points: Points) -> None:
        steps, values = [step for step, _ in points], [value for _, value in points]
        self.steps = _ticks(min(steps), max(steps), 8, whole=True)
        self.values = _ticks(min(values), max(values), 6)
        self._x = (min(steps), max(steps))
        self._y = (min(self.values[0], min(values)), max(self.values[-1], max(values)))

    def line(self, curve: Points, colour: str, opacity: float = 1.0) -> str:
        if len(curve) == 1:
            x, y = self._place(*curve[0])
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
        every = math.ceil(len(curve) / _MOST_POINTS)
        shown = [*curve[::every], curve[-1]]
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self._place(*point) for point in shown))
        return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.8" opacity="{opacity:g}"/>'

    def grid(self) -> str:
        parts = []
        for value in self.values:
            _, y = self._place(self._x[0], value)
            parts += [
                f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e2e8f0"/>',
                f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>',
            ]
        for step in self.steps:
            x, _ = self._place(step, self._y[0])
            parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{step:.0f}</text>')
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        return "\n".join([*parts, f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">step</text>'])

    def _place(self, step: float, value: float) -> tuple[float, float]:
        x = _LEFT + _share(step, *self._x) * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - _share(value, *self._y) * (_HEIGHT - _TOP - _BOTTOM)
        return x, y


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at or below `low` to at or above `high`."""
    span = (high - low) or max(abs(high), 1.0)
    size = 10.0 ** math.floor(math.log10(span / most))
    size *= next(factor for factor in (1, 2, 5, 10, 20) if span / (size * factor) <= most)
    if whole:
        size = max(1.0, size)
        first, last = math.ceil(low / size), math.floor(high / size)  # steps keep to their own range
        return [index * size for index in range(first, last + 1)] or [low]
    return [index * size for index in range(math.floor(low / size), math.ceil(high / size) + 1)]


def _smooth(curve: Points) -> list[tuple[int, float]]:
    """Exponential moving average, corrected for its beginning."""
    weight = 1 - 1 / max(2.0, len(curve) / 25)
    mean = total = 0.0
    smooth = []
    for step, value in curve:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        smooth.append((step, mean / total))
    return smooth


def _legend(index: int, name: str, colour: str, last: float) -> str:
    x = _LEFT + index * 210
    return (
        f'<rect x="{x}" y="14" width="14" height="4" fill="{colour}"/>'
        f'<text x="{x + 20}" y="20">{escape(name)} {last:.4g}</text>'
    )


def _document(body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" font-family="sans-serif" font-size="12" fill="#334155">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
    )
