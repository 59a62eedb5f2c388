"""Draws the pictures of how_it_works.md: `python docs/pictures/draw.py`."""

from __future__ import annotations

from html import escape
from pathlib import Path

HERE = Path(__file__).parent

#: (fill, border) of what the pictures are about: vmap is blue, grad is pink, plain PyTorch green.
COLORS = {
    "vmap": ("#dbeafe", "#2563eb"),
    "grad": ("#fce7f3", "#db2777"),
    "torch": ("#d1fae5", "#059669"),
    "door": ("#fef3c7", "#d97706"),
    "none": ("#ffffff", "#94a3b8"),
}
TEXT, FAINT = "#0f172a", "#475569"


class Picture:
    """A list of SVG elements on a light ground, which is readable on dark pages, too."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="Helvetica, Arial, sans-serif" role="img"><title>{escape(title)}</title>',
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{FAINT}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="10" fill="#f8fafc"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, color: str, *, dashed: bool = False) -> None:
        """A rectangle with round corners."""
        fill, stroke = COLORS[color]
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{fill}" stroke="{stroke}" '
            f'stroke-width="1.5"{dash}/>'
        )

    def text(
        self, x: float, y: float, words: str, *, size: float = 13, faint: bool = False, code: bool = False,
        bold: bool = False, anchor: str = "middle",
    ) -> None:  # fmt: skip
        """One line of words; `anchor` is what x is: "start", "middle" or "end"."""
        family = ' font-family="DejaVu Sans Mono, Menlo, Consolas, monospace"' if code else ""
        weight = ' font-weight="bold"' if bold else ""
        self._parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{FAINT if faint else TEXT}"'
            f'{family}{weight} xml:space="preserve">{escape(words)}</text>'
        )

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """A line through the points with a head at its end."""
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<path d="{path}" fill="none" stroke="{FAINT}" stroke-width="1.6" marker-end="url(#head)"{dash}/>'
        )

    def labelled(
        self, x: float, y: float, width: float, height: float, color: str, title: str, *lines: str, code: bool = True
    ) -> None:
        """A box with a title and smaller lines below it, centred."""
        self.box(x, y, width, height, color)
        top = y + height / 2 + 4.5 - 8 * len(lines)
        self.text(x + width / 2, top, title, code=code)
        for i, line in enumerate(lines, 1):
            self.text(x + width / 2, top + 17 * i, line, size=11.5, faint=True)

    def cell(self, x: float, y: float, color: str) -> None:
        """A number of a tensor."""
        fill, stroke = COLORS[color]
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="18" height="18" rx="2" fill="{fill}" stroke="{stroke}" stroke-width="1"/>'
        )

    def number(self, x: float, y: float, opacity: float) -> None:
        """A number of a tensor, smaller, as dark as it is large."""
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="12" height="7.5" rx="1.5" fill="#059669" opacity="{opacity:.2f}"/>'
        )

    def write(self, name: str) -> None:
        """Write the file."""
        (HERE / name).write_text("\n".join([*self._parts, "</svg>"]) + "\n", encoding="utf-8")


def levels() -> None:
    """The stack of levels, and a tensor that is wrapped by each."""
    p = Picture(860, 330, "Levels and wrappers")
    p.text(30, 36, "vmap(grad(f), in_dims=(None, 0))(w, xs)", code=True, size=14, anchor="start")
    p.text(150, 74, "the stack of levels", bold=True)
    for y, color, title, line in (
        (90, "grad", "level 2: grad", "innermost: gets every call first"),
        (160, "vmap", "level 1: vmap", "its parent; batch size 64"),
        (230, "torch", "plain PyTorch", "no level"),
    ):
        p.labelled(30, y, 240, 52, color, title, line, code=False)
    for y in (142, 212):
        p.arrow((150, y), (150, y + 17))
    p.text(150, 310, "“one level down” is the next box below", size=11.5, faint=True)

    p.text(580, 74, "x, as f sees it", bold=True)
    p.box(330, 90, 500, 192, "grad")
    p.text(346, 112, "Wrapper of level 2: grad", anchor="start")
    p.text(814, 112, "shape [5], derivative: yes", size=11.5, faint=True, anchor="end")
    p.box(350, 126, 460, 142, "vmap")
    p.text(366, 148, "Wrapper of level 1: vmap, bdim = 0", anchor="start")
    p.text(794, 148, "shape [5]: the 64 is hidden", size=11.5, faint=True, anchor="end")
    p.box(370, 164, 420, 88, "torch")
    p.text(386, 186, "xs, a plain tensor", anchor="start")
    p.text(774, 186, "shape [64, 5]", size=11.5, faint=True, anchor="end")
    for i in range(130):
        p.number(386 + 14.6 * (i // 5), 196 + 10 * (i % 5), 0.25 + 0.1 * (3 * i % 7))
    p.text(580, 310, "each wrapper is a tensor without memory, whose value is one level down", size=11.5, faint=True)
    p.write("levels.svg")


def operator() -> None:
    """The way of one operator call through two levels and back."""
    p = Picture(860, 492, "The way of an operator through vmap(grad(f))")
    lanes = ((20, "grad", "level 2: grad"), (300, "vmap", "level 1: vmap"), (580, "torch", "plain PyTorch"))
    for x, color, title in lanes:
        p.box(x, 58, 260, 354, color, dashed=True)
        p.text(x + (18 if x == 20 else 80), 82, title, bold=True, anchor="start")
    p.labelled(40, 14, 220, 32, "none", "torch.sin(x)      in f")
    p.arrow((150, 46), (150, 97))
    p.labelled(40, 98, 220, 40, "door", "the door: who is innermost?", code=False)
    p.arrow((150, 138), (150, 155))
    p.labelled(40, 156, 220, 56, "none", "sin's autograd kernel", "records SinBackward on the wrapper", code=False)
    p.arrow((150, 212), (150, 229))
    p.labelled(40, 230, 220, 40, "none", "unwrap x; go one level down", code=False)
    p.arrow((260, 250), (290, 250), (290, 118), (319, 118))
    p.labelled(320, 98, 220, 40, "door", "the door: who is innermost?", code=False)
    p.arrow((430, 138), (430, 155))
    p.labelled(320, 156, 220, 56, "none", "batching rule of sin", "pointwise: the batch stays at dim 0", code=False)
    p.arrow((430, 212), (430, 229))
    p.labelled(320, 230, 220, 40, "none", "unwrap x; go one level down", code=False)
    p.arrow((540, 250), (570, 250), (570, 184), (599, 184))
    p.labelled(600, 156, 220, 56, "none", "kernel: torch.sin(xs)", "once, for all 64 examples", code=False)
    p.arrow((710, 212), (710, 340), (541, 340))
    p.text(720, 276, "sin(xs)", code=True, size=12, anchor="start")
    p.labelled(320, 312, 220, 56, "none", "wrap the result", "Wrapper(level 1, bdim = 0)", code=False)
    p.arrow((320, 340), (261, 340))
    p.labelled(40, 312, 220, 56, "none", "wrap the result", "Wrapper(level 2), grad_fn = SinBackward", code=False)
    p.arrow((150, 368), (150, 437))
    p.labelled(40, 438, 220, 36, "none", "y      in f")
    p.text(285, 461, "No level knows which others there are: so any nesting works.", faint=True, anchor="start")
    p.write("operator.svg")


def rule() -> None:
    """What a batching rule does with sum over a dimension."""
    p = Picture(860, 300, "A batching rule")
    p.text(30, 34, "vmap(lambda x: x.sum(dim=0))(xs)", code=True, size=14, anchor="start")

    def stack(x: float, y: float, rows: int, color: str, sheets: int) -> None:
        for sheet in reversed(range(sheets)):
            for i in range(rows):
                for j in range(3):
                    p.cell(x + 9 * sheet + 19 * j, y - 7 * sheet + 19 * i, color)

    p.text(110, 74, "what f sees", bold=True)
    p.text(110, 94, "x: shape [4, 3]", size=12)
    stack(82, 120, 4, "none", 1)
    p.text(110, 226, "sum(x, dim=0)", code=True, size=12.5)

    p.text(340, 74, "what there is", bold=True)
    p.text(340, 94, "value: shape [B, 4, 3], bdim = 0", size=12)
    stack(300, 134, 4, "vmap", 5)
    p.text(340, 240, "dim 0 of x is dim 1 of the value", size=11.5, faint=True)

    p.labelled(480, 128, 150, 60, "door", "sum(value, dim=1)", "one call, one level down")
    p.text(745, 74, "result", bold=True)
    p.text(745, 94, "shape [B, 3], bdim = 0", size=12)
    stack(705, 160, 1, "vmap", 5)
    p.text(745, 226, "f sees shape [3]", size=11.5, faint=True)
    p.arrow((160, 158), (285, 158))
    p.arrow((402, 158), (479, 158))
    p.arrow((630, 158), (695, 158))
    p.text(222, 148, "unwrap", size=11.5, faint=True)
    p.text(660, 148, "wrap", size=11.5, faint=True)
    row = "A rule is a row of a table: “reductions shift their dim argument” serves sum, mean, prod, amax, and others."
    p.text(430, 278, row, size=12, faint=True)
    p.write("rule.svg")


def replay() -> None:
    """The first call of a jit function, and the later ones."""
    p = Picture(860, 350, "jit: trace once, replay")
    p.text(30, 34, "fast = jit(vmap(grad(loss)))", code=True, size=14, anchor="start")
    p.text(30, 68, "first call", bold=True, anchor="start")
    p.text(30, 86, "a fraction of a second", size=11.5, faint=True, anchor="start")
    steps = (
        ("vmap", "run on fake tensors", ("all levels at work,", "no numbers yet")),
        ("none", "flat graph", ("ATen operators,", "no levels left")),
        ("none", "simplify", ("constants, views,", "common parts")),
        ("torch", "record the calls", ("operator by operator,", "with what is known")),
    )
    for i, (color, title, lines) in enumerate(steps):
        x = 30 + 208 * i
        p.labelled(x, 100, 170, 76, color, title, *lines, code=False)
        if i:
            p.arrow((x - 38, 138), (x - 1, 138))
    p.text(30, 226, "later calls", bold=True, anchor="start")
    p.text(30, 244, "microseconds, and the operators", size=11.5, faint=True, anchor="start")
    p.labelled(30, 258, 170, 64, "door", "find the program", "shapes, dtypes, modes (C++)", code=False)
    p.arrow((200, 290), (237, 290))
    p.box(238, 258, 592, 64, "torch")
    calls = ("mv", "relu", "sub", "mul", "where", "...")
    for i, name in enumerate(calls):
        x = 254 + 96 * i
        p.labelled(x, 274, 80, 32, "none", name)
        if i:
            p.arrow((x - 16, 290), (x - 1, 290))
    p.arrow((739, 176), (739, 257), dashed=True)
    p.text(729, 220, "the program", size=11.5, faint=True, anchor="end")
    loop = "a loop in C++: no Python, no levels, no autograd; a value is freed after its last use"
    p.text(534, 340, loop, size=11.5, faint=True)
    p.write("replay.svg")


if __name__ == "__main__":
    for draw in (levels, operator, rule, replay):
        draw()
