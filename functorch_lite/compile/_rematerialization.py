"""Which forward nodes to save so that the backward pass can compute the others again: minimum cuts.

The network has two vertices for each forward node, "known at the end of the forward pass" and "known in the backward
pass". A cut tells for each node on which side of it each vertex is, and costs

- the bytes of a node that is known in the forward pass and has to be carried over to be known in the backward pass;
- the work of a node that is known in the backward pass without being carried over, at a rate;
- nothing otherwise: nobody needs the node.

What comes from outside, and numbers, are known everywhere and are not in the network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable
from fractions import Fraction
from typing import Any, NamedTuple

from torch import fx
from torch._ops import HigherOrderOperator

from functorch_lite.compile import _checks, _costs, _nodes
from functorch_lite.compile._config import config
from functorch_lite.compile._joint import Joint
from functorch_lite.compile._minimum_cut import INFINITE, Network

# Of equal nodes some are computed again before others: their work counts a little differently. The order is one that
# spreads them evenly, as all that is computed again in one go is in memory at a time.
_WORK_UNIT = 1024
_SPREAD_BITS = 6

_KNOWN = ("placeholder", "get_attr")


class _Cut(NamedTuple):
    saved: list[fx.Node]
    again: list[fx.Node]  # those that are computed again
    nbytes: int
    work: int


def saved_within(budget: float, joint: Joint, recomputable_ops: Collection[Callable[..., Any]] | None) -> list[fx.Node]:
    """The nodes to save for a memory budget, as `min_cut_rematerialization_partition` defines it."""
    network = _Rematerialization(joint, recomputable_ops)
    plain = network.cheap_cut()
    if budget == 1:
        return plain.saved
    limit = Fraction(budget) * plain.nbytes
    small = network.cut(Fraction(0))
    large = network.cut(Fraction(INFINITE))
    if large.nbytes <= limit:
        return large.saved
    # Walk down the lower hull of all cuts, by the rate at which both ends would do, to the last corner that fits.
    while small.nbytes <= limit:
        rate = Fraction(large.nbytes - small.nbytes, small.work - large.work)
        between = network.cut(rate)
        if between.nbytes + rate * between.work == small.nbytes + rate * small.work:
            break
        if between.nbytes <= limit:
            small = between
        else:
            large = between
    return small.saved


class _Rematerialization:
    """The network of a joint graph."""

    def __init__(self, joint: Joint, recomputable_ops: Collection[Callable[..., Any]] | None) -> None:
        self._recomputable_ops = recomputable_ops
        if recomputable_ops is not None:
            ordered = [node for node in joint.module.graph.nodes if _nodes.is_ordered(node)]
            _checks.check_recomputable(n.target for n in ordered if _costs.is_among(n, recomputable_ops))
        self._written = _nodes.written_bases(joint.module.graph)
        self._read = [node for node in joint.read_by_backward() if self._is_unknown(node)]
        self._place = {node: place for place, node in enumerate(joint.module.graph.nodes)}
        self._nbytes: dict[fx.Node, int] = {}
        self._work: dict[fx.Node, int] = {}
        self._inputs: dict[fx.Node, list[fx.Node]] = {}
        self._fixed: set[fx.Node] = set()  # never computed again, so what they are computed of is of no interest
        todo = list(self._read)
        while todo:
            node = todo.pop()
            if node in self._inputs:
                continue
            is_savable = _nodes.is_tensor(node) and not _nodes.is_view(node)
            self._nbytes[node] = _costs.nbytes(node) if is_savable else INFINITE
            self._work[node] = _costs.work(node)
            if not self._is_recomputable(node):
                self._fixed.add(node)
            inputs = [] if node in self._fixed else node.all_input_nodes
            self._inputs[node] = [one for one in inputs if self._is_unknown(one)]
            todo += self._inputs[node]
        count: Counter[Hashable] = Counter()
        for node in sorted(self._inputs, key=self._place.__getitem__):
            kind = node.target, self._work[node]
            self._work[node] *= _WORK_UNIT + _spread(count[kind])
            count[kind] += 1
        self._dear = {node for node in self._inputs if not self._is_cheap(node)}

    def cheap_cut(self) -> _Cut:
        """The minimum cut that computes only cheap nodes again, and no long chains of them."""
        rate = Fraction(1, config.work_for_a_byte * _WORK_UNIT)
        fixed = self._fixed | self._dear
        ends = self._ends_of_chains(self.cut(rate, fixed).again)
        return self.cut(rate, fixed | ends)

    def cut(self, rate: Fraction, fixed: Collection[fx.Node] | None = None) -> _Cut:
        """The minimum cut at a rate of bytes for work, where the ``fixed`` nodes are never computed again."""
        network = Network()
        fixed = self._fixed if fixed is None else fixed
        before = {node: network.vertex() for node in self._inputs}
        after = {node: network.vertex() for node in self._inputs}
        for node, inputs in self._inputs.items():
            work = INFINITE if node in fixed else min(INFINITE, self._work[node] * rate.numerator)
            network.edge(network.SOURCE, before[node], work)
            network.edge(before[node], after[node], min(INFINITE, self._nbytes[node] * rate.denominator))
            for one in inputs:
                network.edge(after[one], before[node], INFINITE)
        for node in self._read:
            network.edge(after[node], network.SINK, INFINITE)
        side = network.minimum_cut()
        if side is None:
            _checks.refuse_unsavable(next(filter(self._is_stuck, self._fixed)))
        saved = [node for node in self._inputs if after[node] in side and before[node] not in side]
        again = [node for node in self._inputs if before[node] in side]
        return _Cut(saved, again, sum(map(self._nbytes.__getitem__, saved)), sum(map(self._work.__getitem__, again)))

    def _ends_of_chains(self, again: list[fx.Node]) -> set[fx.Node]:
        """The nodes to save so that no chain of nodes that are computed again is too long.

        All nodes of a chain live at a time when the backward pass reads the last one first.
        """
        length: dict[fx.Node, int] = {}
        ends = set()
        for node in sorted(again, key=self._place.__getitem__):
            own = 0 if self._work[node] == 0 else 1
            length[node] = own + max((length.get(one, 0) for one in self._inputs[node]), default=0)
            if length[node] > config.longest_chain:
                ends.add(node)
                length[node] = 0
        return ends

    def _is_unknown(self, node: fx.Node) -> bool:
        return node.op not in _KNOWN and not _nodes.is_number(node)

    def _is_recomputable(self, node: fx.Node) -> bool:
        if _nodes.is_ordered(node) or isinstance(node.target, HigherOrderOperator):
            return False
        if _costs.is_among(node, config.never_recompute):
            return False
        return not _nodes.touches(node, self._written)

    def _is_cheap(self, node: fx.Node) -> bool:
        if _nodes.is_view(node) or _nodes.is_getitem(node):
            return True
        if self._recomputable_ops is None:
            return _costs.is_cheap(node)
        return _costs.is_among(node, self._recomputable_ops)

    def _is_stuck(self, node: fx.Node) -> bool:
        return self._nbytes[node] == INFINITE and not all(map(_nodes.is_getitem, node.users))


def _spread(place: int) -> int:
    """A place in a row with its bits reversed: the halves of the row are those below and above 32, and so on."""
    return sum(1 << (_SPREAD_BITS - 1 - bit) for bit in range(_SPREAD_BITS) if place >> bit & 1)
