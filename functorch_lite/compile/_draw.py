"""Pictures of graphs."""

from __future__ import annotations

import operator
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._dtype_abbrs import dtype_abbrs

from functorch_lite.compile import _checks, _layout
from functorch_lite.compile._layout import Box, Edge
from functorch_lite.compile._picture import CHARACTER, Line, Picture, Rectangle, Words

_MARGIN = 26.0
_NAME_SIZE, _DETAIL_SIZE = 12.5, 9.5
_LONGEST = 30

_TEXT, _FAINT, _WHITE = "#0f172a", "#64748b", "#ffffff"
_SAVED, _FRAME = "#d97706", "#d4d4d8"


class _Role(NamedTuple):
    """What a value is there for, and how that looks."""

    words: str
    fill: str
    stroke: str
    text: str = _TEXT
    detail: str = _FAINT


_INPUT = _Role("input", "#dbeafe", "#3b82f6")
_PARAMETER = _Role("parameter", "#d1fae5", "#059669")
_TANGENT = _Role("tangent", "#ede9fe", "#7c3aed")
_FORWARD = _Role("forward", "#f1f5f9", "#64748b")
_KEPT = _Role("saved for backward", "#fef3c7", _SAVED)
_BACKWARD = _Role("backward", "#fce7f3", "#db2777")
_OUTPUT = _Role("output", "#334155", "#334155", _WHITE, "#cbd5e1")
_GRADIENT = _Role("gradient", "#9d174d", "#9d174d", _WHITE, "#fbcfe8")
_ROLES = (_INPUT, _PARAMETER, _TANGENT, _FORWARD, _KEPT, _BACKWARD, _OUTPUT, _GRADIENT)

_RADII: dict[str | None, float] = {None: 6.0, "record": 6.0, "box": 0.0, "ellipse": 16.0, "oval": 16.0}


class _Item(NamedTuple):
    """A box with what is written in it."""

    box: Box
    role: _Role
    name: str
    details: list[str]
    tooltip: str
    module: str
    is_saved: bool


def _shape_of(value: Any, is_verbose: bool) -> str:
    """The dtype and shape of a value, as in ``f32[4, 6]``."""
    if isinstance(value, (tuple, list)):
        shapes = [_shape_of(v, is_verbose) for v in value if isinstance(v, Tensor)]
        return shapes[0] + (f" and {len(shapes) - 1} more" if len(shapes) > 1 else "") if shapes else ""
    if not isinstance(value, Tensor):
        return "" if value is None else f"{type(value).__name__} {value}"
    shape = f"{dtype_abbrs.get(value.dtype, value.dtype)}[{', '.join(map(str, value.shape))}]"
    return f"{shape} {tuple(value.stride())} {value.device}" if is_verbose else shape


def _operator_name(node: fx.Node) -> str:
    """The name of an operator without what all of them have in common."""
    target = node.target
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
        return str(packet).removeprefix("aten.").removeprefix("prims.")
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _shortened(text: str) -> str:
    half = (_LONGEST - 1) // 2
    return text if len(text) <= _LONGEST else f"{text[:half]}…{text[-half:]}"


def _source_line(node: fx.Node) -> tuple[str, str]:
    """Where the node comes from, as in ``model.py:12``, and the code there."""
    found = re.findall(r'File "(.*)", line (\d+).*\n\s*(.*)', node.stack_trace or "")
    if not found:
        return "", ""
    path, line, code = found[-1]
    return f"{os.path.basename(path)}:{line}", code.strip()


def _module_path(node: fx.Node) -> str:
    """The innermost module that was running."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0] if isinstance(stack[-1], tuple) else stack[-1]) if stack else ""
    return path.partition(".")[2] if "." in path else ""


class _Drawing:
    """A graph on its way to a picture."""

    def __init__(self, gm: fx.GraphModule, is_verbose: bool, with_source: bool, radius: float) -> None:
        self._graph, self._is_verbose, self._with_source, self._radius = gm.graph, is_verbose, with_source, radius
        self._items = dict[object, _Item]()
        self._edges = list[Edge]()

    def picture(self, title: str, num_primals: int | None, num_fwd_outputs: int | None) -> Picture:
        """Draw everything."""
        placeholders = self._graph.find_nodes(op="placeholder")
        self._tangents = set(placeholders if num_primals is None else placeholders[num_primals:])
        if num_primals is None:
            self._tangents = set()
        self._find_backward()
        for node in self._graph.nodes:
            if node.op != "output" and self._shown(node) is node:
                self._add(node)
        for node in list(self._items):
            for source in dict.fromkeys(map(self._shown, node.all_input_nodes)):  # type: ignore[attr-defined]
                self._connect(source, node)
        self._add_outputs(num_fwd_outputs)
        width, height = _layout.place([item.box for item in self._items.values()], self._edges)
        return self._compose(title, width, height)

    def _find_backward(self) -> None:
        """A node belongs to the backward pass if it was traced there, or needs a tangent."""
        self._backward = set[fx.Node]()
        for node in self._graph.nodes:
            is_later = not self._backward.union(self._tangents).isdisjoint(node.all_input_nodes)
            if node.op != "output" and (node.meta.get("partitioner_tag") == "is_backward" or is_later):
                self._backward.add(node)

    def _shown(self, node: fx.Node) -> fx.Node:
        """The node whose box stands for a node: that of the operator which has several results."""
        while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return node

    def _is_late(self, node: fx.Node) -> bool:
        return node in self._backward or node in self._tangents

    def _users(self, node: fx.Node) -> Iterator[fx.Node]:
        for user in node.users:
            if user.target is operator.getitem:
                yield from self._users(user)
            else:
                yield user

    def _role(self, node: fx.Node) -> _Role:
        if node.op == "placeholder" and self._is_late(node):
            return _TANGENT
        if node.op == "get_attr" or isinstance(node.meta.get("val"), nn.Parameter):
            return _PARAMETER
        if node.op == "placeholder":
            return _INPUT
        if self._is_late(node):
            return _BACKWARD
        return _KEPT if self._is_saved(node) else _FORWARD

    def _is_saved(self, node: fx.Node) -> bool:
        return not self._is_late(node) and any(user in self._backward for user in self._users(node))

    def _module(self, node: fx.Node) -> str:
        """The module that a node ran in, or the one that a parameter is used in."""
        if node.op not in ("placeholder", "get_attr"):
            return _module_path(node)
        users = {_module_path(user) for user in node.users if self._is_late(user) == self._is_late(node)}
        return users.pop() if len(users) == 1 else ""

    def _add(self, node: fx.Node) -> None:
        where, code = _source_line(node)
        name = str(node.target) if node.op in ("placeholder", "get_attr") else _operator_name(node)
        details = [_shape_of(node.meta.get("val"), self._is_verbose), where if self._with_source else ""]
        lines = [f"{node.name} = {node.target}" if node.op == "call_function" else node.name, details[0], where, code]
        module = self._module(node)
        tooltip = "\n".join(line for line in [*lines, module] if line)
        is_saved = self._is_saved(node)
        self._items[node] = self._item(self._role(node), name, details, self._is_late(node), tooltip, module, is_saved)

    def _item(
        self, role: _Role, name: str, details: list[str], is_late: bool, tooltip: str, module: str = "",
        is_saved: bool = False,
    ) -> _Item:  # fmt: skip
        name, details = _shortened(name), [_shortened(d) if not self._is_verbose else d for d in details if d]
        widths = [len(name) * _NAME_SIZE, *(len(d) * _DETAIL_SIZE for d in details)]
        height = 27.0 + 13.0 * len(details)
        box = Box(max(52.0, CHARACTER * max(widths) + 20.0), height, group=float(is_late))
        return _Item(box, role, name, details, tooltip, module, is_saved)

    def _connect(self, source: fx.Node, target: object) -> None:
        """Forward values go down, and those of the backward pass up again, beside what they belong to."""
        start, end = self._items[source].box, self._items[target].box
        self._edges.append(Edge(start, end, upwards=bool(start.group and end.group)))

    def _add_outputs(self, num_fwd_outputs: int | None) -> None:
        outputs = self._graph.output_node().args[0]
        entries = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        names = [str(node.target) for node in self._graph.find_nodes(op="placeholder") if node not in self._tangents]
        for i, entry in enumerate(entries):
            for node in dict.fromkeys(self._nodes_in(entry)):
                is_late = self._is_late(node)
                role, what = (_GRADIENT, "gradient") if is_late else (_OUTPUT, "output")
                name = f"{what} {i}" if len(entries) > 1 else what
                if num_fwd_outputs is not None and i >= num_fwd_outputs:
                    if self._tangents:
                        role, name, is_late = _GRADIENT, f"gradient of {names[i - num_fwd_outputs]}", True
                    else:
                        role, name = _KEPT, f"saved {i - num_fwd_outputs}"
                details = [_shape_of(node.meta.get("val"), is_verbose=False)]
                key = (i, node)
                self._items[key] = self._item(role, name, details, is_late, f"{name}: {node.name}")
                self._connect(self._shown(node), key)

    @staticmethod
    def _nodes_in(entry: Any) -> list[fx.Node]:
        nodes = list[fx.Node]()
        fx.map_arg(entry, nodes.append)
        return nodes

    def _compose(self, title: str, width: float, height: float) -> Picture:
        """Put title, legend, modules, lines and boxes on paper."""
        roles = [role for role in _ROLES if any(self._counts_as(item, role) for item in self._items.values())]
        legend_width = sum(30.0 + len(role.words) * CHARACTER * 11 for role in roles)
        title_width = len(title) * CHARACTER * 15
        top = _MARGIN + 58.0
        paper = max(width, legend_width, title_width) + 2 * _MARGIN
        picture = Picture(paper, top + height + _MARGIN, title)
        picture.shapes.append(Words(paper / 2, _MARGIN + 6, title, 15, _TEXT, bold=True))
        x = (paper - legend_width) / 2
        for role in roles:
            picture.shapes.append(Rectangle(x, _MARGIN + 17, 14, 14, role.fill, role.stroke, 3.0))
            picture.shapes.append(Words(x + 20, _MARGIN + 28, role.words, 11, _FAINT, is_left=True))
            x += 30.0 + len(role.words) * CHARACTER * 11
        self._move((paper - width) / 2, top)
        picture.shapes += self._module_frames()
        for edge in self._edges:
            color = "#c084a8" if edge.upwards else "#e0a346" if edge.target.group else "#94a3b8"
            picture.shapes.append(Line(edge.points, color))
        for item in self._items.values():
            picture.shapes += self._box(item)
        return picture

    @staticmethod
    def _counts_as(item: _Item, role: _Role) -> bool:
        return item.role is role or (role is _KEPT and item.is_saved)

    def _move(self, dx: float, dy: float) -> None:
        for item in self._items.values():
            item.box.x += dx
            item.box.y += dy
        for edge in self._edges:
            edge.points = [(x + dx, y + dy) for x, y in edge.points]

    def _box(self, item: _Item) -> Iterator[Rectangle | Words]:
        box, role = item.box, item.role
        left, top = box.x - box.width / 2, box.y - box.height / 2
        is_end = role in (_INPUT, _PARAMETER, _TANGENT, _OUTPUT, _GRADIENT)
        radius = box.height / 2 if is_end else min(self._radius, box.height / 2)
        stroke, thickness = (_SAVED, 2.0) if item.is_saved else (role.stroke, 1.2)
        yield Rectangle(left, top, box.width, box.height, role.fill, stroke, radius, thickness, item.tooltip)
        baseline = top + 18.0
        yield Words(box.x, baseline, item.name, _NAME_SIZE, role.text)
        for detail in item.details:
            baseline += 13.0
            yield Words(box.x, baseline, detail, _DETAIL_SIZE, role.detail)

    def _module_frames(self) -> Iterator[Rectangle | Words]:
        """A frame around what runs in a module, with its parameters or without, where nothing else is in it."""
        members = defaultdict[tuple[str, float], list[_Item]](list)
        for item in self._items.values():
            if item.module:
                members[item.module, item.box.group].append(item)
        taken = list[tuple[float, float, float, float]]()
        for (module, _), items in members.items():
            operators = [item for item in items if item.role in (_FORWARD, _KEPT, _BACKWARD)]
            for framed in (items, operators):
                inside = [item.box for item in framed]
                name = _shortened(module)
                left = min(b.x - b.width / 2 for b in inside) - 9
                right = max(max(b.x + b.width / 2 for b in inside) + 9, left + len(name) * CHARACTER * 9 + 12)
                top = min(b.y - b.height / 2 for b in inside) - 14
                bottom = max(b.y + b.height / 2 for b in inside) + 6
                frame = (left, top, right, bottom)
                others = [_extent(item.box) for item in self._items.values() if item.box not in inside]
                if not any(_overlap(frame, other) for other in [*others, *taken]):
                    taken.append(frame)
                    yield Rectangle(left, top, right - left, bottom - top, "#fafafa", _FRAME, 8.0, 1.0, module)
                    yield Words(left + 6, top + 10, name, 9, "#a1a1aa", is_left=True)
                    break


def _extent(box: Box) -> tuple[float, float, float, float]:
    return box.x - box.width / 2, box.y - box.height / 2, box.x + box.width / 2, box.y + box.height / 2


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _draw(
    gm: fx.GraphModule, path: str, title: str, dot_graph_shape: str | None, is_verbose: bool, with_source: bool,
    num_primals: int | None, num_fwd_outputs: int | None,
) -> Picture:  # fmt: skip
    radius = _checks.corner_radius("draw_graph", dot_graph_shape, _RADII)
    picture = _Drawing(gm, is_verbose, with_source, radius).picture(title, num_primals, num_fwd_outputs)
    picture.write(path if os.path.splitext(path)[1] else path + ".svg")
    return picture


def draw_graph(
    traced: fx.GraphModule,
    fname: str,
    figname: str = "fx_graph",
    clear_meta: bool = True,
    prog: None = None,
    parse_stack_trace: bool = False,
    dot_graph_shape: str | None = None,
    *,
    num_fwd_outputs: int | None = None,
) -> Picture:
    """Draw a graph, and write the picture to a file.

    Values go from top to bottom. Each box has the name of an operator and the dtype and shape of its result; in SVG
    files there is more when the mouse rests on it. Frames show the modules that operators ran in.

    Args:
        traced: The graph.
        fname: Where to write the picture. The name says in which format: ``.svg``, which needs no other package, or
            ``.png`` or ``.pdf``, for which matplotlib has to be installed. A name without a suffix gets ``.svg``.
        figname: The title of the picture. Default ``"fx_graph"``.
        clear_meta: Whether to leave out strides and devices. Default True.
        prog: Has to be None: no Graphviz program is needed.
        parse_stack_trace: Whether boxes show the file and line that they come from. Default False.
        dot_graph_shape: ``"record"`` for boxes with round corners, as None, or ``"box"``, ``"ellipse"``, ``"oval"``.
        num_fwd_outputs: Of the forward graph of a partition: the number of outputs that are not saved values. Default
            None: all of them.

    Returns:
        The picture, which notebooks show.

    Raises:
        ValueError: The name ends with another suffix, or an argument has none of the values above.
        ImportError: The format needs matplotlib, which is not installed.

    Example:
        >>> import os, tempfile, torch
        >>> from functorch_lite.compile import draw_graph, make_fx
        >>> graph = make_fx(lambda x: x.sin() + x.cos())(torch.rand(3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     picture = draw_graph(graph, os.path.join(folder, "graph.svg"), "sine and cosine")
        >>> picture  # doctest: +ELLIPSIS
        <Picture 'sine and cosine', ... x ..., written to ...graph.svg>
    """
    _checks.check_no_graphviz("draw_graph", prog)
    return _draw(traced, fname, figname, dot_graph_shape, not clear_meta, parse_stack_trace, None, num_fwd_outputs)


def draw_joint_graph(
    graph: fx.GraphModule,
    joint_inputs: tuple[Sequence[Any], Sequence[Any]],
    file_name: str = "full_graph.png",
    dot_graph_shape: str | None = None,
) -> Picture:
    """Draw the graph of a forward and a backward pass.

    The forward pass goes down on the left, and the backward pass up on the right. Between them are the values that are
    saved.

    Args:
        graph: A joint graph, such as a ``partition_fn`` gets it.
        joint_inputs: ``(primals, tangents)``, of which only the numbers matter.
        file_name: Where to write the picture, see `draw_graph`. Default ``"full_graph.png"``.
        dot_graph_shape: The shape of boxes, see `draw_graph`.

    Returns:
        The picture, which notebooks show.

    Raises:
        ValueError: The name ends with another suffix, or there is no such shape.
        ImportError: The format needs matplotlib, which is not installed.

    Example:
        >>> import os, tempfile, torch
        >>> from functorch_lite import vjp
        >>> from functorch_lite.compile import draw_joint_graph, make_fx
        >>> def joint(x, tangent):
        ...     output, pullback = vjp(lambda x: x.sin().exp(), x)
        ...     return [output, *pullback(tangent)]
        >>> graph = make_fx(joint)(torch.rand(3), torch.rand(3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     picture = draw_joint_graph(graph, ([torch.rand(3)], [torch.rand(3)]), os.path.join(folder, "joint.svg"))
        >>> "gradient of x" in picture.svg
        True
    """
    num_primals = len(joint_inputs[0])
    outputs = graph.graph.output_node().args[0]
    num_fwd_outputs = (len(outputs) if isinstance(outputs, (tuple, list)) else 1) - num_primals
    return _draw(graph, file_name, "joint graph", dot_graph_shape, False, False, num_primals, num_fwd_outputs)
