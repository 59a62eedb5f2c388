"""Boxes, lines and words, written as SVG, or as PNG or PDF with matplotlib."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

from functorch_lite.compile import _checks

#: The width of a character of a monospaced font, for a height of 1.
CHARACTER = 0.602

_FONTS = "'DejaVu Sans Mono', ui-monospace, Menlo, Consolas, monospace"
_PAPER, _EDGE_OF_PAPER = "#ffffff", "#e2e8f0"


@dataclass
class Rectangle:
    """A box with round corners."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    stroke: str
    radius: float = 6.0
    thickness: float = 1.2
    tooltip: str = ""


@dataclass
class Line:
    """A line that is straight and curved in turn, with a head where it ends.

    The points are those where it changes; at each of them it is vertical.
    """

    points: Sequence[tuple[float, float]]
    stroke: str
    thickness: float = 1.3

    def head(self, size: float = 5.5) -> list[tuple[float, float]]:
        """The corners of the head."""
        (_, before), (x, y) = self.points[-2:]
        back = -size if y > before or (y == before and self.points[0][1] < y) else size
        return [(x, y), (x - size * 0.55, y + back), (x + size * 0.55, y + back)]


@dataclass
class Words:
    """A line of text, at the middle or the left end of its baseline."""

    x: float
    y: float
    text: str
    size: float
    color: str
    bold: bool = False
    is_left: bool = False


@dataclass
class Picture:
    """What was drawn. Notebooks show it, and ``svg`` is its text."""

    width: float
    height: float
    title: str
    shapes: list[Rectangle | Line | Words] = field(default_factory=list)
    path: str | None = None

    def __repr__(self) -> str:
        where = f"written to {self.path}" if self.path else "not written to a file"
        return f"<Picture {self.title!r}, {self.width:.0f} x {self.height:.0f}, {where}>"

    def _repr_svg_(self) -> str:
        return self.svg

    @property
    def svg(self) -> str:
        """The picture as the text of an SVG file."""
        size = f"{self.width:.0f} {self.height:.0f}"
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width:.0f}" height="{self.height:.0f}" '
            f'viewBox="0 0 {size}" font-family="{_FONTS}">',
            f"<title>{escape(self.title)}</title>",
            f'<rect width="100%" height="100%" rx="10" fill="{_PAPER}" stroke="{_EDGE_OF_PAPER}"/>',
        ]
        for shape in self.shapes:
            if isinstance(shape, Rectangle):
                lines.append(_svg_rectangle(shape))
            elif isinstance(shape, Line):
                lines.append(_svg_line(shape))
            else:
                lines.append(_svg_words(shape))
        return "\n".join([*lines, "</svg>\n"])

    def write(self, path: str) -> None:
        """Write a file whose name says in which format."""
        suffix = _checks.picture_format("draw_graph", path, bool(importlib.util.find_spec("matplotlib")))
        if folder := os.path.dirname(path):
            os.makedirs(folder, exist_ok=True)
        if suffix == ".svg":
            with open(path, "w", encoding="utf-8") as file:
                file.write(self.svg)
        else:
            _write_with_matplotlib(self, path)
        self.path = path


def _svg_rectangle(shape: Rectangle) -> str:
    attributes = (
        f'x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" height="{shape.height:.1f}" '
        f'rx="{shape.radius:.1f}" fill="{shape.fill}" stroke="{shape.stroke}" stroke-width="{shape.thickness}"'
    )
    return f"<rect {attributes}>" + (f"<title>{escape(shape.tooltip)}</title>" if shape.tooltip else "") + "</rect>"


def _svg_line(shape: Line) -> str:
    (x, y), *rest = shape.points
    path = [f"M{x:.1f} {y:.1f}"]
    for i, (next_x, next_y) in enumerate(rest):
        if i % 2 == 0:
            path.append(f"L{next_x:.1f} {next_y:.1f}")
        else:
            middle = (y + next_y) / 2
            path.append(f"C{x:.1f} {middle:.1f} {next_x:.1f} {middle:.1f} {next_x:.1f} {next_y:.1f}")
        x, y = next_x, next_y
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.head())
    return (
        f'<path d="{" ".join(path)}" fill="none" stroke="{shape.stroke}" stroke-width="{shape.thickness}"/>'
        f'<polygon points="{corners}" fill="{shape.stroke}"/>'
    )


def _svg_words(shape: Words) -> str:
    anchor = "" if shape.is_left else ' text-anchor="middle"'
    weight = ' font-weight="bold"' if shape.bold else ""
    # Another font than the one that was measured takes the same width.
    length = f' textLength="{len(shape.text) * CHARACTER * shape.size:.1f}"'
    return (
        f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size}" fill={quoteattr(shape.color)}'
        f'{anchor}{weight}{length} pointer-events="none">{escape(shape.text)}</text>'
    )


def _write_with_matplotlib(picture: Picture, path: str) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
    from matplotlib.path import Path

    # One unit is 1/72 inch, as are the sizes of fonts and lines.
    figure = Figure(figsize=(picture.width / 72, picture.height / 72), facecolor=_PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, picture.width), ylim=(picture.height, 0))
    axes.set_axis_off()
    for order, shape in enumerate(picture.shapes):
        if isinstance(shape, Rectangle):
            style = f"round,pad=0,rounding_size={shape.radius}" if shape.radius else "square,pad=0"
            box = FancyBboxPatch(
                (shape.x, shape.y), shape.width, shape.height, boxstyle=style, facecolor=shape.fill,
                edgecolor=shape.stroke, linewidth=shape.thickness, zorder=order,
            )  # fmt: skip
            axes.add_patch(box)
        elif isinstance(shape, Line):
            vertices, codes = [shape.points[0]], [Path.MOVETO]
            for i, (x, y) in enumerate(shape.points[1:]):
                before_x, middle = vertices[-1][0], (vertices[-1][1] + y) / 2
                vertices += [(x, y)] if i % 2 == 0 else [(before_x, middle), (x, middle), (x, y)]
                codes += [Path.LINETO] if i % 2 == 0 else [Path.CURVE4] * 3
            line = Path(vertices, codes)
            axes.add_patch(PathPatch(line, fill=False, edgecolor=shape.stroke, linewidth=shape.thickness, zorder=order))
            axes.add_patch(Polygon(shape.head(), facecolor=shape.stroke, edgecolor="none", zorder=order))
        else:
            axes.text(
                shape.x, shape.y, shape.text.replace("$", r"\$"), fontsize=shape.size, color=shape.color,
                family="DejaVu Sans Mono", weight="bold" if shape.bold else "normal",
                ha="left" if shape.is_left else "center", va="baseline", zorder=order,
            )  # fmt: skip
    # Viewers and file formats end at some tens of thousands of pixels.
    dpi = min(144.0, 72 * 30_000 / max(picture.width, picture.height))
    figure.savefig(path, dpi=dpi, facecolor=_PAPER)
