"""The graphs of small functions, as a compiler gets them. EXPECTTEST_ACCEPT=1 writes them anew."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx, nn

from tests.support import observations
from tests.support.compiled_cases import CASES, MODULES

aten = torch.ops.aten


@dataclass
class Graphs:
    """A compiler that keeps what it is handed."""

    forward: list[fx.GraphModule] = field(default_factory=list)
    backward: list[fx.GraphModule] = field(default_factory=list)

    def compilers(self) -> tuple[Any, Any]:
        """For the forward and the backward graphs."""

        def keeping(kept):
            def compiler(module, inputs):
                kept.append(module)
                return module

            return compiler

        return keeping(self.forward), keeping(self.backward)

    def text(self) -> str:
        """Both graphs, without the lines that release tensors."""
        return "\n".join(_readable(module) for module in [*self.forward, *self.backward])

    def nodes(self) -> list[fx.Node]:
        """All calls."""
        graphs = [module.graph for module in [*self.forward, *self.backward]]
        return [node for graph in graphs for node in graph.nodes if node.op == "call_function"]


def _readable(module):
    lines = [re.sub(r";  .*", "", line) for line in module.code.strip().splitlines() if line.strip()]
    return "\n".join(lines).replace("torch.ops.", "").replace("def forward(self, ", "def graph(")


def graphs_of(f, *args):
    """The graphs of a function or module, after one forward and backward pass."""
    graphs = Graphs()
    api = observations.ours().api
    compile = api.aot_module if isinstance(f, nn.Module) else api.aot_function
    outputs = observations.tensors_of(compile(f, *graphs.compilers())(*args))
    roots = [y for y in outputs if y.requires_grad]
    if roots:
        torch.autograd.backward(roots, [torch.ones_like(y) for y in roots])
    return graphs


def _variables(*shapes):
    return [torch.rand(shape).requires_grad_() for shape in shapes]


def test_pointwise():
    graphs = graphs_of(lambda x: x.sin(), *_variables((3,)))
    assert_expected_inline(
        graphs.text(),
        """\
def graph(x):
    sin = aten.sin.default(x)
    return [sin, x]
def graph(x, tangent):
    cos = aten.cos.default(x)
    mul = aten.mul.Tensor(tangent, cos)
    return [mul]""",
    )


def test_product():
    def f(x, weight, bias):
        return x @ weight + bias

    graphs = graphs_of(f, *_variables((3, 2), (2, 4), 4))
    assert_expected_inline(
        graphs.text(),
        """\
def graph(x, weight, bias):
    mm = aten.mm.default(x, weight)
    add = aten.add.Tensor(mm, bias)
    return [add, x, weight]
def graph(x, weight, tangent):
    sum_1 = aten.sum.dim_IntList(tangent, [0], True)
    view = aten.view.default(sum_1, [4])
    t = aten.t.default(x)
    mm_1 = aten.mm.default(t, tangent)
    t_1 = aten.t.default(weight)
    mm_2 = aten.mm.default(tangent, t_1)
    return [mm_2, mm_1, view]""",
    )


def test_in_place():
    def f(x):
        y = x * 2
        y[0] = 1.0
        y.add_(x)
        return y

    graphs = graphs_of(f, *_variables((3, 2)))
    assert_expected_inline(
        graphs.text(),
        """\
def graph(x):
    mul = aten.mul.Tensor(x, 2)
    _tensor_constant0 = self._tensor_constant0
    select = aten.select.int(mul, 0, 0)
    fill = aten.fill.Tensor(select, _tensor_constant0)
    select_scatter = aten.select_scatter.default(mul, fill, 0, 0)
    add = aten.add.Tensor(select_scatter, x)
    return [add]
def graph(tangent):
    new_empty_strided = aten.new_empty_strided.default(tangent, [3, 2], [2, 1])
    copy = aten.copy.default(new_empty_strided, tangent)
    as_strided = aten.as_strided.default(copy, [2], [1], 0)
    clone = aten.clone.default(as_strided, memory_format = torch.contiguous_format)
    zeros_like = aten.zeros_like.default(clone)
    copy_1 = aten.copy.default(as_strided, zeros_like)
    as_strided_scatter = aten.as_strided_scatter.default(copy, copy_1, [2], [1], 0)
    mul_1 = aten.mul.Tensor(as_strided_scatter, 2)
    add_1 = aten.add.Tensor(tangent, mul_1)
    return [add_1]""",
    )


def test_written_input():
    def f(x, running_mean):
        running_mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x - running_mean

    graphs = graphs_of(f, *_variables((3, 2)), torch.zeros(2))
    assert_expected_inline(
        graphs.text(),
        """\
def graph(x, running_mean):
    mul = aten.mul.Tensor(running_mean, 0.9)
    mean = aten.mean.dim(x, [0])
    add = aten.add.Tensor(mul, mean, alpha = 0.1)
    sub = aten.sub.Tensor(x, add)
    return [add, sub]
def graph(tangent):
    return [tangent, None]""",
    )


def test_views_are_not_in_the_graph():
    def f(x):
        y = x.exp()
        return y, y.t(), x[0]

    graphs = graphs_of(f, *_variables((3, 2)))
    assert_expected_inline(
        graphs.text(),
        """\
def graph(x):
    exp = aten.exp.default(x)
    return [exp, exp]
def graph(exp, tangent):
    mul = aten.mul.Tensor(tangent, exp)
    return [mul]""",
    )


def test_containers():
    def f(params, data):
        x, (y, scale) = data
        return {"loss": (params["w"] * x - y).pow(2).sum() * scale}

    (w,) = _variables(2)
    graphs = graphs_of(f, {"w": w}, (torch.rand(2), (torch.rand(2), 0.5)))
    assert_expected_inline(
        graphs.text(),
        """\
def graph(params_w, data_0, data_1_0):
    mul = aten.mul.Tensor(params_w, data_0)
    sub = aten.sub.Tensor(mul, data_1_0)
    pow_1 = aten.pow.Tensor_Scalar(sub, 2)
    sum_1 = aten.sum.default(pow_1)
    mul_1 = aten.mul.Tensor(sum_1, 0.5)
    return [mul_1, data_0, sub]
def graph(data_0, sub, tangent):
    mul_2 = aten.mul.Tensor(tangent, 0.5)
    expand = aten.expand.default(mul_2, [2])
    pow_2 = aten.pow.Tensor_Scalar(sub, 1.0)
    mul_3 = aten.mul.Scalar(pow_2, 2.0)
    mul_4 = aten.mul.Tensor(expand, mul_3)
    mul_5 = aten.mul.Tensor(mul_4, data_0)
    return [mul_5, None, None]""",
    )


SCALE = torch.ones(2)


def test_captured():
    graphs = graphs_of(lambda x: x * SCALE, *_variables((3, 2)))
    assert_expected_inline(
        graphs.text(),
        """\
def graph(x, SCALE):
    mul = aten.mul.Tensor(x, SCALE)
    return [mul, SCALE]
def graph(SCALE, tangent):
    mul_1 = aten.mul.Tensor(tangent, SCALE)
    return [mul_1, None]""",
    )


def test_nothing_to_differentiate():
    graphs = graphs_of(lambda x: (x.cos(), x.sum()), torch.rand(3))
    assert_expected_inline(
        graphs.text(),
        """\
def graph(x):
    cos = aten.cos.default(x)
    sum_1 = aten.sum.default(x)
    return [cos, sum_1]""",
    )


def test_common_subexpressions_and_dead_code():
    def f(x):
        x.tan()
        return x.sin() * x.sin()

    graphs = graphs_of(f, *_variables(3))
    assert_expected_inline(
        graphs.text(),
        """\
def graph(x):
    sin = aten.sin.default(x)
    mul = aten.mul.Tensor(sin, sin)
    return [mul, x, sin]
def graph(x, sin, tangent):
    mul_1 = aten.mul.Tensor(tangent, sin)
    cos = aten.cos.default(x)
    mul_3 = aten.mul.Tensor(mul_1, cos)
    add = aten.add.Tensor(mul_3, mul_3)
    return [add]""",
    )


def test_random():
    def f(x):
        return torch.dropout(x, 0.5, True)

    graphs = graphs_of(f, *_variables(3))
    assert_expected_inline(
        graphs.text(),
        """\
def graph(x):
    empty_like = aten.empty_like.default(x)
    bernoulli = aten.bernoulli.p(empty_like, 0.5)
    div = aten.div.Scalar(bernoulli, 0.5)
    mul = aten.mul.Tensor(x, div)
    return [mul, div]
def graph(div, tangent):
    mul_1 = aten.mul.Tensor(tangent, div)
    return [mul_1]""",
    )


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_module():
    graphs = graphs_of(Mlp(), torch.rand(4, 2))
    assert_expected_inline(
        graphs.text(),
        """\
def graph(first_weight, first_bias, second_weight, second_bias, x):
    t = aten.t.default(first_weight)
    addmm = aten.addmm.default(first_bias, x, t)
    relu = aten.relu.default(addmm)
    t_1 = aten.t.default(second_weight)
    addmm_1 = aten.addmm.default(second_bias, relu, t_1)
    return [addmm_1, second_weight, x, relu]
def graph(second_weight, x, relu, tangent):
    mm = aten.mm.default(tangent, second_weight)
    t_3 = aten.t.default(tangent)
    mm_1 = aten.mm.default(t_3, relu)
    sum_1 = aten.sum.dim_IntList(tangent, [0], True)
    view = aten.view.default(sum_1, [1])
    threshold_backward = aten.threshold_backward.default(mm, relu, 0)
    t_6 = aten.t.default(threshold_backward)
    mm_2 = aten.mm.default(t_6, x)
    sum_2 = aten.sum.dim_IntList(threshold_backward, [0], True)
    view_1 = aten.view.default(sum_2, [3])
    return [mm_2, view_1, mm_1, view, None]""",
    )


# What holds for all graphs.


def _arguments(case):
    torch.manual_seed(0)
    leaves = case.leaves(3)
    for x in observations.tensors_of(leaves):
        if x.is_floating_point() or x.is_complex():
            x.requires_grad_()
    return case.arguments(*leaves)


#: Operators whose schema says that they write.
def _writes(node):
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


HAS_WRITING_OPERATOR = {"custom_operator_that_writes", "custom_operator_that_writes_an_input"}


@pytest.mark.parametrize("name", [name for name in CASES if name not in HAS_WRITING_OPERATOR])
def test_nothing_is_in_place(name):
    case = CASES[name]
    graphs = graphs_of(case.func, *_arguments(case))
    assert not [node for node in graphs.nodes() if _writes(node)]


#: Operators that prepare an argument, or keep a copy of it, around the function.
AROUND = {aten.clone.default, aten.as_strided.default, aten._conj.default, aten._neg_view.default}
#: Cases with arguments that become views, through which gradients are pulled back outside of the function, too.
VIEWS = {"arguments_share_storage_without_overlap", "conjugated_argument", "negated_argument"}


def _is_around(node, name):
    if node.stack_trace:
        return False
    if node.meta.get("partitioner_tag") == "is_backward":
        return name in VIEWS
    return node.target in AROUND


#: The user's code that runs beside the function itself.
OTHER_CODE = {"backward", "<lambda>"}


@pytest.mark.parametrize("name", CASES)
def test_source_lines(name):
    """Each node of the forward and the backward graph knows the line of the user's code."""
    case = CASES[name]
    graphs = graphs_of(case.func, *_arguments(case))
    lines, first = inspect.getsourcelines(case.func)
    for node in graphs.nodes():
        if _is_around(node, name):
            continue
        found = re.findall(r'File ".*compiled_cases.py", line (\d+), in (\S+)\n', node.stack_trace or "")
        assert found, f"{node.format_node()} has the source {node.stack_trace}"
        line, function = found[0]
        assert function in OTHER_CODE or first <= int(line) < first + len(lines)


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_named(name):
    """Each node of the forward pass knows in which module it ran."""
    make, make_input = MODULES[name]
    module = make().double()
    graphs = graphs_of(module, make_input())
    classes = {type(child) for child in module.modules()}
    for node in (node for graph in graphs.forward for node in graph.graph.nodes if node.op == "call_function"):
        if _is_around(node, name):
            continue
        stack = list(node.meta["nn_module_stack"].values())
        assert stack[0][1] is type(module), node.format_node()
        assert {cls for _, cls in stack} <= classes


def test_submodules_have_paths():
    graphs = graphs_of(Mlp(), torch.rand(4, 2))
    paths = {
        node.target.overloadpacket.__name__: [path for path, _ in node.meta["nn_module_stack"].values()]
        for node in graphs.nodes()
        if node.meta.get("partitioner_tag") != "is_backward"
    }
    assert paths["relu"][-1].endswith("Mlp") or paths["relu"] == [""]
    assert paths["addmm"][-1].endswith("second")


@pytest.mark.parametrize("name", CASES)
def test_placeholders_are_named_after_arguments(name):
    case = CASES[name]
    graphs = graphs_of(case.func, *_arguments(case))
    parameters = list(inspect.signature(case.func).parameters)
    for module in graphs.forward:
        names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
        expected = (*parameters, *case.func.__globals__, "captured", "base_of")
        assert all(re.sub(r"_\d+$", "", one).startswith(expected) for one in names), names


@pytest.mark.parametrize(
    "name", ["arguments_are_views", "strided_arguments", "argument_with_an_offset", "conjugated_argument"]
)
def test_arguments_are_not_copied(name):
    graphs = graphs_of(CASES[name].func, *_arguments(CASES[name]))
    copies = [node for node in graphs.nodes() if node.target is aten.clone.default]
    # What the function copies itself has a source.
    assert not [node for node in copies if not node.stack_trace]


def test_values_have_shapes():
    graphs = graphs_of(Mlp(), torch.rand(4, 2))
    for node in graphs.nodes():
        assert isinstance(node.meta["val"], torch.Tensor), node.format_node()


def test_forward_and_backward_fit():
    """What the forward graph returns after its outputs is what the backward graph takes."""
    graphs = graphs_of(Mlp(), torch.rand(4, 2))
    returned = [node.name for node in graphs.forward[0].graph.output_node().args[0]]
    taken = [node.name for node in graphs.backward[0].graph.nodes if node.op == "placeholder"]
    assert returned[1:] == taken[: len(returned) - 1]
    assert len(graphs.backward[0].graph.output_node().args[0]) == 5
