"""Shrinking a graph that shows a failure to the few operators that cause it."""

from __future__ import annotations

import copy
import functools
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from functorch_lite.compile import _checks, _reproduction

Fails = Callable[[fx.GraphModule, Sequence[Any]], bool]

_REPLACES_OPERATOR = "replaces_operator"

#: A check that contradicts itself is asked about each graph until one answer leads by so many votes.
_LEAD = 8


@dataclass
class _Case:
    """A graph and its inputs."""

    graph: fx.Graph
    inputs: list[Any]

    @property
    def gm(self) -> fx.GraphModule:
        """A module of its own, which may be changed."""
        return fx.GraphModule(torch.nn.Module(), copy.deepcopy(self.graph))

    @property
    def operators(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op not in ("placeholder", "output")]

    @property
    def returned(self) -> Any:
        return self.graph.output_node().args[0]

    @property
    def size(self) -> tuple[int, ...]:
        """What is to become smaller, the most important first."""
        outputs = len(self.returned) if isinstance(self.returned, (list, tuple)) else 1
        numbers = sum(i.numel() for i in self.inputs if isinstance(i, Tensor))
        return len(self.operators), len(self.inputs), outputs, numbers


def _copies(inputs: Sequence[Any]) -> list[Any]:
    """Inputs that a graph may write into."""
    return [i.detach().clone().requires_grad_(i.requires_grad) if isinstance(i, Tensor) else i for i in inputs]


class _Values(fx.Interpreter):
    """What the operators of a graph return, as far as it runs."""

    def __init__(self, case: _Case, folder: str | None, keeps_nothing: bool) -> None:
        super().__init__(case.gm)
        self._folder, self._keeps_nothing, self._known = folder, keeps_nothing, dict[str, Any]()
        self.runs = True
        try:
            with torch.no_grad():
                self.run(*_copies(case.inputs))
        except Exception:  # that may be the failure
            self.runs = False

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op not in ("placeholder", "output") and not self._keeps_nothing:
            # Operators that write may change it later.
            kept = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), value)
            if self._folder is not None:
                path = os.path.join(self._folder, f"{n.name}.pt")
                torch.save(kept, path)
                kept = path
            self._known[n.name] = kept
        return value

    def __getitem__(self, node: fx.Node) -> Any:
        """The value of a node, None if there is none that could be an input."""
        value = self._known.get(node.name)
        if self._folder is not None and value is not None:
            value = torch.load(value)
        return value if isinstance(value, (Tensor, int, float)) else None


def _with_plain_inputs(gm: fx.GraphModule, inputs: Sequence[Any]) -> _Case:
    """The graph with its parameters and constants as inputs. What values were when it was traced is forgotten."""
    graph, copies, attributes = fx.Graph(), dict[fx.Node, fx.Node](), list[Any]()
    for node in gm.graph.find_nodes(op="placeholder"):
        copies[node] = graph.node_copy(node)
    for node in gm.graph.find_nodes(op="get_attr"):
        attribute: Any = gm
        for name in str(node.target).split("."):
            attribute = getattr(attribute, name)
        attributes.append(attribute)
        copies[node] = graph.placeholder(node.name)
    for node in gm.graph.nodes:
        if node not in copies and node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.map_arg(gm.graph.output_node().args[0], copies.__getitem__))
    for node in graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key == "stack_trace"}
    return _Case(graph, [*inputs, *attributes])


def _returning(case: _Case, returned: Any, removed: set[fx.Node], values: _Values) -> _Case | None:
    """The graph with other outputs and without some nodes. What is needed of those becomes an input."""
    graph, copies, inputs = fx.Graph(), dict[fx.Node, fx.Node](), list[Any]()
    for node, value in zip(case.graph.find_nodes(op="placeholder"), case.inputs, strict=True):
        if node not in removed:
            copies[node] = graph.node_copy(node)
            inputs.append(value)
    for node in case.operators:
        if node in removed and any(user not in removed and user.op != "output" for user in node.users):
            if (value := values[node]) is None:
                return None
            copies[node] = graph.placeholder(node.name)
            copies[node].meta[_REPLACES_OPERATOR] = True
            inputs.append(value)
    for node in case.operators:
        if node not in removed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.map_arg(returned, copies.get))
    # Other inputs that nobody uses may be the reason of the failure.
    placeholders = graph.find_nodes(op="placeholder")
    useless = [node for node in placeholders if _REPLACES_OPERATOR in node.meta and not node.users]
    inputs = [value for node, value in zip(placeholders, inputs, strict=True) if node not in useless]
    for node in useless:
        graph.erase_node(node)
    return _Case(graph, inputs)


def _without(case: _Case, removed: set[fx.Node], values: _Values) -> _Case | None:
    """The graph without some nodes, and without the outputs among them."""
    returned = case.returned
    if isinstance(returned, (list, tuple)):
        returned = type(returned)(r for r in returned if not (isinstance(r, fx.Node) and r in removed))
    return None if returned in removed else _returning(case, returned, removed, values)


def _resized(case: _Case, size: int, smaller: int, in_arguments: bool) -> _Case:
    """The graph on inputs that are cut off: each dimension of one size gets another."""

    def cut(tensor: Tensor) -> Tensor:
        for dim in range(tensor.dim()):
            if tensor.shape[dim] == size:
                tensor = tensor.narrow(dim, 0, smaller)
        return tensor

    graph = copy.deepcopy(case.graph)
    if in_arguments:
        for node in graph.nodes:
            node.args = fx.node.map_aggregate(node.args, lambda a: smaller if type(a) is int and a == size else a)
    return _Case(graph, _copies([cut(i) if isinstance(i, Tensor) else i for i in case.inputs]))


def _replaced(node: fx.Node, by: fx.Node, n: fx.Node) -> fx.Node:
    return by if n is node else n


class _Search:
    """The smallest failing graph so far, and the ways to a smaller one."""

    def __init__(
        self, check: Fails, start: _Case, folder: str | None, max_granularity: int | None, keeps_nothing: bool
    ) -> None:
        self._check, self._folder, self._max_granularity = check, folder, max_granularity
        self._keeps_nothing = keeps_nothing
        self._lead, self.checks = 1, 0
        self.history = [start]

    @property
    def case(self) -> _Case:
        return self.history[-1]

    def ask(self, case: _Case) -> bool:
        """One run of the check. An exception is another failure than the one that is sought."""
        self.checks += 1
        try:
            return bool(self._check(case.gm, _copies(case.inputs)))
        except Exception:
            return False

    def fails(self, case: _Case) -> bool:
        lead = 0
        while abs(lead) < self._lead:
            lead += 1 if self.ask(case) else -1
        return lead > 0

    def be_careful(self) -> None:
        """From now on let a majority decide, and go back to what fails by that."""
        self._lead = _LEAD
        while len(self.history) > 1 and not self.fails(self.case):
            self.history.pop()

    def accept(self, case: _Case | None, how: str) -> bool:
        """Go on with a graph if it is smaller and fails."""
        if case is None or case.size >= self.case.size or not self.fails(case):
            return False
        before, after = len(self.case.operators), len(case.operators)
        self.history.append(case)
        print(f"minifier: {before} nodes -> {after}, {len(case.inputs)} inputs ({how}; check {self.checks})")
        return True

    def run(self) -> None:
        """Apply all ways until none helps."""
        size: tuple[int, ...] = ()
        while size != self.case.size:
            size = self.case.size
            self._values = _Values(self.case, self._folder, self._keeps_nothing)
            self._end_earlier()
            self._remove_ranges(self._output_positions, self._without_outputs, "fewer outputs")
            self.accept(self._without_dead_code(), "no dead code")
            self._remove_ranges(self._units, self._without_units, "fewer operators")
            while any(self.accept(case, "an earlier output") for case in self._earlier_outputs()):
                pass
            self._remove_ranges(self._unused_inputs, self._without_nodes, "fewer inputs")
            self._cut_inputs()
        self._write_plainly()

    def _end_earlier(self) -> None:
        """Return an operator that comes before the others, found by bisection."""
        case, operators = self.case, self.case.operators
        low, high = 0, len(operators) - 1
        while low < high:
            middle = (low + high) // 2
            end = operators[middle]
            returned = type(case.returned)([end]) if isinstance(case.returned, (list, tuple)) else end
            if self.accept(_returning(case, returned, set(operators[middle + 1 :]), self._values), "an earlier end"):
                high = middle
            else:
                low = middle + 1

    def _remove_ranges(
        self, items: Callable[[], Sequence[Any]], without: Callable[[Sequence[Any]], _Case | None], how: str
    ) -> None:
        """Delta debugging: remove half of the items, then quarters, and so on down to single ones."""
        size = max(1, min(len(items()) // 2, self._max_granularity or len(items())))
        while True:
            position = 0
            while chunk := items()[position : position + size]:
                if not self.accept(without(chunk), how):
                    position += size
            if size == 1:
                return
            size //= 2

    def _output_positions(self) -> Sequence[int]:
        return range(len(self.case.returned)) if isinstance(self.case.returned, (list, tuple)) else ()

    def _without_outputs(self, positions: Sequence[int]) -> _Case | None:
        kept = [r for i, r in enumerate(self.case.returned) if i not in positions]
        return _returning(self.case, type(self.case.returned)(kept), set(), self._values) if kept else None

    def _earlier_outputs(self) -> Iterator[_Case | None]:
        """Return what an operator gets instead of what it gives, for operators with no other purpose."""
        case = self.case
        for node in case.operators:
            if all(user.op == "output" for user in node.users):
                for source in node.all_input_nodes:
                    if source.op == "placeholder" or self._values[source] is not None:
                        returned = fx.map_arg(case.returned, functools.partial(_replaced, node, source))
                        yield _returning(case, returned, {node}, self._values)

    def _without_dead_code(self) -> _Case:
        graph = copy.deepcopy(self.case.graph)
        graph.eliminate_dead_code()
        return _Case(graph, self.case.inputs)

    def _units(self) -> list[list[fx.Node]]:
        """The operators, together with the nodes that take their results apart."""
        operators = self.case.operators
        taken = {node: node.args[0] for node in operators if node.target is operator.getitem}
        return [[o, *(n for n, source in taken.items() if source is o)] for o in operators if o not in taken]

    def _without_units(self, units: Sequence[list[fx.Node]]) -> _Case | None:
        return self._without_nodes([node for unit in units for node in unit])

    def _unused_inputs(self) -> list[fx.Node]:
        return [node for node in self.case.graph.find_nodes(op="placeholder") if not node.users]

    def _without_nodes(self, nodes: Sequence[fx.Node]) -> _Case | None:
        return _without(self.case, set(nodes), self._values)

    def _cut_inputs(self) -> None:
        """Make dimensions smaller. A graph that does not run on such inputs would fail for another reason."""
        if not _Values(self.case, None, keeps_nothing=True).runs:
            return
        sizes = {s for i in self.case.inputs if isinstance(i, Tensor) for s in i.shape if s > 1}
        for size in sorted(sizes, reverse=True):
            for smaller in sorted({1, 2, size // 2} - {size, 0}):
                for in_arguments in (False, True):
                    case = _resized(self.case, size, smaller, in_arguments)
                    if _Values(case, None, keeps_nothing=True).runs and self.accept(case, f"size {size} -> {smaller}"):
                        break

    def _write_plainly(self) -> None:
        """Give inputs values that a script can write down."""
        for position, value in enumerate(self.case.inputs):
            if not isinstance(value, Tensor):
                continue
            for values in (_reproduction.plain, _reproduction.drawn):
                inputs = list(self.case.inputs)
                inputs[position] = values(value.detach()).requires_grad_(value.requires_grad)
                case = _Case(self.case.graph, inputs)
                if self.fails(case):
                    self.history.append(case)
                    break


def minifier(
    fail_f: fx.GraphModule,
    inps: Sequence[Any],
    module_fails: Fails,
    dump_state: Callable[[fx.GraphModule, Sequence[Any]], None] | None = None,
    *,
    save_dir: str | None = None,
    offload_to_disk: bool = False,
    skip_offload: bool = False,
    skip_sanity: bool = False,
    max_granularity: int | None = None,
) -> tuple[fx.GraphModule, list[Any]]:
    """Shrink a graph that fails to a small one that still fails.

    A graph fails if ``module_fails(graph, inputs)`` returns True: because a compiler crashes on it, because its result
    is wrong, or whatever is looked for. Operators are removed, results that the others need become inputs, and inputs
    become smaller, as long as the graph fails. Each step is printed, and at the end a script with what is left.

    Args:
        fail_f: A graph of operators, such as a compiler gets it. It stays as it is.
        inps: Its inputs.
        module_fails: Called with a graph and inputs, both of which it may change. An exception counts as another
            failure than the one that is looked for: catch the one that is meant.
        dump_state: Called with the result instead of printing a script.
        save_dir: Folder for the script, ``reproduction.py``, and for input values that are too many to be written into
            it. Default None: it is only printed, and such inputs are random.
        offload_to_disk: Whether intermediate results are kept in ``save_dir`` instead of in memory. Default False.
        skip_offload: Whether intermediate results are not kept at all. What one operator needs of another then cannot
            become an input. Default False.
        skip_sanity: Whether to believe that the graph fails, without a check. Default False.
        max_granularity: How many nodes are removed at once, at most. Default None: half of them.

    Returns:
        ``(graph, inputs)``. Parameters and constants of the graph have become inputs.

    Raises:
        TypeError: The graph calls modules.
        ValueError: The graph does not fail, or there is no folder to keep results in.

    Example:
        >>> import torch
        >>> from functorch_lite.compile import make_fx, minifier
        >>> graph = make_fx(lambda x, y: ((x + y).cos() * x).sin().relu())(torch.rand(3), torch.rand(3))
        >>> def has_relu(graph, inputs):
        ...     return any(node.target is torch.ops.aten.relu.default for node in graph.graph.nodes)
        >>> small, inputs = minifier(graph, [torch.rand(3), torch.rand(3)], has_relu)  # doctest: +ELLIPSIS
        minifier: 5 nodes -> ...
        >>> [node.name for node in small.graph.nodes], inputs
        (['sin', 'relu', 'output'], [tensor([1.])])

    Note:
        A check that does not always give the same answer is asked several times, and a warning says so.

    References:
        Andreas Zeller and Ralf Hildebrandt, Simplifying and isolating failure-inducing input, IEEE Transactions on
        Software Engineering 28(2), 2002.
    """
    _checks.check_graph_of_operators("minifier", fail_f)
    _checks.check_folder("minifier", save_dir, offload_to_disk)
    if save_dir is not None:
        os.makedirs(save_dir, exist_ok=True)
    start = _with_plain_inputs(fail_f, inps)
    search = _Search(module_fails, start, save_dir if offload_to_disk else None, max_granularity, skip_offload)
    if not skip_sanity and not module_fails(start.gm, _copies(start.inputs)):
        _checks.refuse_graph_that_works("minifier")
    search.run()
    answers = [search.ask(search.case) for _ in range(3)]
    if not any(answers) and search.case is start:
        _checks.refuse_graph_that_works("minifier")
    if not all(answers):  # so one of the answers on the way here may have been wrong
        _checks.warn_of_flaky_check("minifier")
        search.be_careful()
        search.run()
    gm, inputs = search.case.gm, search.case.inputs
    if dump_state is not None:
        dump_state(gm, inputs)
        return gm, inputs
    reproduction = _reproduction.script(gm, inputs, module_fails, save_dir)
    print(reproduction)
    if save_dir is not None:
        with open(os.path.join(save_dir, "reproduction.py"), "w", encoding="utf-8") as file:
            file.write(reproduction)
    return gm, inputs
