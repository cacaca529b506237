"""Where the lines of a chart lie in an SVG drawing; the template puts them there."""

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT = 620, 180, 60
"""Of the plot, in the drawing's own units; LEFT is the room for the axis."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A measured quantity over steps."""

    name: str
    points: Sequence[Point]
    """(step, value)"""
    colour: str
    dots: bool = False
    """A dot for each point too, for few and exact ones."""


@dataclass(frozen=True)
class Line:
    """A series in the drawing's units."""

    name: str
    colour: str
    points: str
    dots: tuple[tuple[float, float, str], ...]
    """x, y, and what stands beside the pointer."""


@dataclass(frozen=True)
class Chart:
    """A drawing, with the values at its edges."""

    title: str
    lines: tuple[Line, ...]
    ticks: tuple[tuple[float, str], ...]
    """Heights and their values."""
    first: int
    last: int
    """Steps at the left and the right edge."""
    width: int = LEFT + WIDTH
    height: int = HEIGHT
    left: int = LEFT


def draw(title: str, series: Sequence[Series]) -> Chart | None:
    """The chart of all series on common axes; None without a point."""
    points = [point for one in series for point in one.points]
    if not points:
        return None
    steps, values = [step for step, _ in points], [value for _, value in points]
    first, last, lowest, highest = min(steps), max(steps), min(values), max(values)

    def place(point: Point) -> Point:
        x = LEFT + WIDTH * (point[0] - first) / ((last - first) or 1)
        return round(x, 1), round(y(point[1]), 1)

    def y(value: float) -> float:
        return 6 + (HEIGHT - 12) * (highest - value) / ((highest - lowest) or 1)

    lines = tuple(
        Line(
            one.name,
            one.colour,
            " ".join(f"{x:g},{y:g}" for x, y in outline([place(point) for point in one.points])),
            tuple((*place((step, value)), f"step {step:g}: {value:.4g}") for step, value in one.points)
            if one.dots
            else (),
        )
        for one in series
        if one.points
    )
    ticks = tuple((y(value), f"{value:.3g}") for value in dict.fromkeys((highest, (highest + lowest) / 2, lowest)))
    return Chart(title, lines, ticks, int(first), int(last))


def outline(points: Sequence[Point]) -> list[Point]:
    """The points, or, where there are more than two for a unit of width, the highest and the lowest of each unit.

    Every value stays within the drawn line, and no peak is lost.
    """
    if len(points) <= 2 * WIDTH:
        return list(points)
    columns: dict[int, list[Point]] = {}
    for point in points:
        columns.setdefault(int(point[0]), []).append(point)
    kept = []
    for column in columns.values():
        extremes = {min(column, key=lambda point: point[1]), max(column, key=lambda point: point[1])}
        kept += sorted(extremes)
    return kept
