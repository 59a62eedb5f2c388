"""Where the boxes of a graph go: layers, so that edges lead from one to the next and meet no box.

The method is the one of Sugiyama, Tagawa and Toda (Methods for visual understanding of hierarchical system structures,
1981): assign layers, cut long edges into pieces, order the layers by barycenters, and then place what is in them.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

_SPACE = 18.0  # between boxes
_BEND_SPACE = 9.0  # between a line and whatever is beside it
_GROUP_SPACE = 44.0
_SWEEPS = 24


@dataclass(eq=False)
class Box:
    """Something with a place in a layer: a box, or a point where a long line goes through."""

    width: float
    height: float
    group: float = 0
    is_bend: bool = False
    layer: int = 0
    x: float = 0.0
    y: float = 0.0


@dataclass
class Edge:
    """A value that goes from one box to another. ``upwards`` says which of them is drawn above."""

    source: Box
    target: Box
    upwards: bool = False
    points: list[tuple[float, float]] = field(default_factory=list)
    bends: list[Box] = field(default_factory=list)

    @property
    def upper(self) -> Box:
        """The end that is drawn above."""
        return self.target if self.upwards else self.source

    @property
    def lower(self) -> Box:
        """The end that is drawn below."""
        return self.source if self.upwards else self.target

    @property
    def pieces(self) -> list[tuple[Box, Box]]:
        """From layer to layer, in the direction of the value."""
        stops = [self.source, *self.bends, self.target]
        return list(zip(stops, stops[1:], strict=False))


def place(boxes: Sequence[Box], edges: Sequence[Edge]) -> tuple[float, float]:
    """Give boxes a center and edges their points, and return width and height of the whole."""
    if not boxes:
        return 0.0, 0.0
    _assign_layers(boxes, edges)
    layers = _with_bends(boxes, edges)
    neighbours = _Neighbours(edges)
    _order(layers, neighbours)
    _place_across(layers, neighbours)
    _place_down(layers, neighbours)
    _route(boxes, edges)
    return _move_to_origin([box for layer in layers for box in layer], edges)


def _assign_layers(boxes: Sequence[Box], edges: Sequence[Edge]) -> None:
    """Each box below all that is above it, and as far down as that makes no edges longer."""
    below, above = defaultdict[Box, set[Box]](set), defaultdict[Box, set[Box]](set)
    for edge in edges:
        below[edge.upper].add(edge.lower)
        above[edge.lower].add(edge.upper)
    missing = {box: len(above[box]) for box in boxes}
    ordered = [box for box in boxes if not missing[box]]
    for box in ordered:
        for other in below[box]:
            other.layer = max(other.layer, box.layer + 1)
            missing[other] -= 1
            if not missing[other]:
                ordered.append(other)
    ends = {box for box in boxes if not below[box] and len(above[box]) == 1}
    for box in reversed(ordered):
        if below[box] and len(above[box]) <= len(below[box]):
            box.layer = min(other.layer for other in below[box] - ends or below[box]) - 1
    for box in ends:
        box.layer = max(other.layer for other in above[box]) + 1
    top = min(box.layer for box in boxes)
    for box in boxes:
        box.layer -= top


def _with_bends(boxes: Sequence[Box], edges: Sequence[Edge]) -> list[list[Box]]:
    """The layers. Edges of one value share their bends as far as they go together."""
    layers: list[list[Box]] = [[] for _ in range(max(box.layer for box in boxes) + 1)]
    for box in boxes:
        layers[box.layer].append(box)
    shared = dict[tuple[Box, int], Box]()
    for edge in edges:
        step = -1 if edge.upwards else 1
        for layer in range(edge.source.layer + step, edge.target.layer, step):
            if (edge.source, layer) not in shared:
                bend = Box(0.0, 0.0, edge.source.group, is_bend=True, layer=layer)
                shared[edge.source, layer] = bend
                layers[layer].append(bend)
            bend = shared[edge.source, layer]
            bend.group = max(bend.group, (edge.source.group + edge.target.group) / 2)
            edge.bends.append(bend)
    return layers


class _Neighbours:
    """Who is connected with whom in the layer above and below, and how strongly."""

    def __init__(self, edges: Sequence[Edge]) -> None:
        self.above, self.below = defaultdict[Box, dict[Box, float]](dict), defaultdict[Box, dict[Box, float]](dict)
        degree = Counter(box for edge in edges for box in (edge.source, edge.target))
        for edge in edges:
            for first, second in edge.pieces:
                upper, lower = (first, second) if first.layer < second.layer else (second, first)
                # Long lines are to be straight before anything else is, then those between operators.
                strength = (1.0, 2.0, 24.0)[first.is_bend + second.is_bend]
                if not first.is_bend and not second.is_bend and 1 in (degree[first], degree[second]):
                    strength = 0.1
                self.below[upper][lower] = self.above[lower][upper] = strength

    def all(self, box: Box) -> dict[Box, float]:
        return self.above[box] | self.below[box]


def _crossings(layers: Sequence[Sequence[Box]], neighbours: _Neighbours) -> int:
    count = 0
    for upper, lower in zip(layers, layers[1:], strict=False):
        position = {box: i for i, box in enumerate(lower)}
        seen: list[int] = []
        for box in upper:
            ends = sorted(position[other] for other in neighbours.below[box])
            count += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return count


def _order(layers: list[list[Box]], neighbours: _Neighbours) -> None:
    """Sort each layer by where the neighbours are, downwards and upwards in turn, and keep the best."""
    for layer in layers:
        layer.sort(key=lambda box: box.group)
    best, fewest = [list(layer) for layer in layers], _crossings(layers, neighbours)
    for sweep in range(_SWEEPS):
        downwards = sweep % 2 == 0
        for fixed, layer in _pairs(layers, downwards):
            position = {box: i for i, box in enumerate(fixed)}
            sides = neighbours.above if downwards else neighbours.below
            own = {box: float(i) for i, box in enumerate(layer)}
            barycenter = {
                box: sum(position[o] for o in sides[box]) / len(sides[box]) if sides[box] else own[box] for box in layer
            }
            layer.sort(key=lambda box, barycenter=barycenter: (box.group, barycenter[box]))  # type: ignore[misc]
        crossings = _crossings(layers, neighbours)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    layers[:] = best


def _pairs(layers: list[list[Box]], downwards: bool) -> Iterable[tuple[list[Box], list[Box]]]:
    ordered = layers if downwards else layers[::-1]
    return zip(ordered, ordered[1:], strict=False)


def _distance(left: Box, right: Box) -> float:
    space = _BEND_SPACE if left.is_bend or right.is_bend else _SPACE
    if left.group != right.group:
        space = max(space, _GROUP_SPACE if not (left.is_bend and right.is_bend) else space)
    return (left.width + right.width) / 2 + space


def _place_across(layers: Sequence[Sequence[Box]], neighbours: _Neighbours) -> None:
    """Pull everything towards its neighbours, as far as the others in its layer permit."""
    for layer in layers:
        for left, right in zip(layer, layer[1:], strict=False):
            right.x = left.x + _distance(left, right)
        middle = (layer[0].x + layer[-1].x) / 2
        for box in layer:
            box.x -= middle
    # Looking to one side only makes long lines straight at once, looking to both then puts things into the middle.
    for sweep in range(3 * _SWEEPS):
        downwards = sweep % 2 == 0
        one_sided = neighbours.above if downwards else neighbours.below
        for layer in layers if downwards else reversed(layers):
            _settle(layer, one_sided.__getitem__ if sweep < _SWEEPS else neighbours.all)


def _settle(layer: Sequence[Box], neighbours_of: Callable[[Box], dict[Box, float]]) -> None:
    """The places closest to the desired ones with enough distance: a weighted isotonic regression."""
    offset, blocks = 0.0, list[list[float]]()  # weight, weight * place, number of boxes
    offsets = []
    for i, box in enumerate(layer):
        offset += _distance(layer[i - 1], box) if i else 0.0
        offsets.append(offset)
        pulls = neighbours_of(box)
        weight = sum(pulls.values()) or 0.01
        desired = sum(other.x * pull for other, pull in pulls.items()) / weight if pulls else box.x
        blocks.append([weight, weight * (desired - offset), 1])
        while len(blocks) > 1 and blocks[-2][1] * blocks[-1][0] > blocks[-1][1] * blocks[-2][0]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    places = [place / weight for weight, place, count in blocks for _ in range(int(count))]
    for box, x, shift in zip(layer, places, offsets, strict=True):
        box.x = x + shift


def _place_down(layers: Sequence[Sequence[Box]], neighbours: _Neighbours) -> None:
    """Rows as high as their boxes, further apart where lines have a long way to the side."""
    y = 0.0
    for layer in layers:
        height = max(box.height for box in layer)
        for box in layer:
            box.y = y + height / 2
        shifts = [abs(box.x - other.x) for box in layer for other in neighbours.below[box]]
        y += height + min(64.0, 26.0 + 0.1 * max(shifts, default=0.0))


def _route(boxes: Sequence[Box], edges: Sequence[Edge]) -> None:
    """Lines leave a box at one point, and enter it at different ones."""
    ports: dict[tuple[Box, bool], dict[object, list[float]]] = defaultdict(lambda: defaultdict(list))
    for edge in edges:
        first, last = edge.pieces[0], edge.pieces[-1]
        ports[edge.source, not edge.upwards]["out"].append(first[1].x)
        ports[edge.target, edge.upwards][last[0]].append(last[0].x)
    at = dict[tuple[Box, bool, object], float]()
    for (box, is_bottom), ends in ports.items():
        ordered = sorted(ends, key=lambda end, ends=ends: sum(ends[end]) / len(ends[end]))  # type: ignore[misc]
        spacing = min(16.0, (box.width - 20.0) / len(ordered))
        for i, end in enumerate(ordered):
            at[box, is_bottom, end] = box.x + (i - (len(ordered) - 1) / 2) * spacing
    bands = _bands(boxes)
    for edge in edges:
        source, target, sign = edge.source, edge.target, -1 if edge.upwards else 1
        start = at[source, not edge.upwards, "out"], source.y + sign * source.height / 2
        end = at[target, edge.upwards, edge.pieces[-1][0]], target.y - sign * target.height / 2
        edge.points = [start, (start[0], source.y + sign * bands[source.layer])]
        for bend in edge.bends:
            edge.points += [(bend.x, bend.y - sign * bands[bend.layer]), (bend.x, bend.y + sign * bands[bend.layer])]
        edge.points += [(end[0], target.y - sign * bands[target.layer]), end]


def _bands(boxes: Sequence[Box]) -> dict[int, float]:
    """Half of the height of each layer."""
    bands = defaultdict[int, float](float)
    for box in boxes:
        bands[box.layer] = max(bands[box.layer], box.height / 2)
    return bands


def _move_to_origin(boxes: Sequence[Box], edges: Sequence[Edge]) -> tuple[float, float]:
    left = min(box.x - box.width / 2 for box in boxes)
    for box in boxes:
        box.x -= left
    for edge in edges:
        edge.points = [(x - left, y) for x, y in edge.points]
    return max(box.x + box.width / 2 for box in boxes), max(box.y + box.height / 2 for box in boxes)
