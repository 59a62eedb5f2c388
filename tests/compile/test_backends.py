"""Compilers of graphs: what they compile computes what the function computes, and inputs are freed in time."""

import weakref

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from functorch_lite.compile._backends import make_boxed_compiler, make_boxed_func, nop, print_compile, ts_compile

aten = torch.ops.aten


def several_kinds(x, w, b, n):
    """Matrix products, a derivative, a convolution, views, numbers, random draws, several results of one operator."""
    y = torch.nn.functional.gelu(x @ w + b)
    z = torch.nn.functional.layer_norm(y, (y.shape[-1],))
    (g,) = torch.autograd.grad(z.to(torch.float64).square().sum(), w, retain_graph=True)
    image = torch.nn.functional.conv2d(z[None, None], torch.ones(1, 1, 2, 2))
    drawn = torch.bernoulli(x.sigmoid()), torch.rand(x.shape[0]), torch.nn.functional.dropout(x, 0.5)
    joined = torch.cat([x.std(dim=0), torch.full((2,), float("inf"))]).clamp(max=3)
    return [z, g, None, x.shape[0] * n, image, *drawn, joined, *x.split(2), torch.ones(x.shape[0] * 2)]


def its_inputs():
    torch.manual_seed(0)
    return [torch.randn(4, 5), torch.randn(5, 6, requires_grad=True), torch.randn(6), 3]


def its_graph(tracing_mode="real"):
    """The graph as the pipeline makes it: without gradients to record."""
    gm = make_fx(several_kinds, tracing_mode=tracing_mode)(*its_inputs())
    if tracing_mode == "real":  # make_fx has written the number into the graph
        next(iter(node for node in gm.graph.nodes if node.name.startswith("n"))).meta["val"] = 3
    return gm


def agree(compiled, graph_inputs):
    inputs = its_inputs()
    torch.manual_seed(1)
    with torch.no_grad():
        got = compiled(graph_inputs)
    torch.manual_seed(1)
    expected = several_kinds(*inputs)
    assert [g is None for g in got] == [e is None for e in expected]
    assert_close([g for g in got if g is not None], [e for e in expected if e is not None])


@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
@pytest.mark.parametrize("compiler", [nop, print_compile, ts_compile])
def test_computes_what_the_function_computes(compiler, tracing_mode):
    gm = its_graph(tracing_mode)
    code = gm.code
    compiled = compiler(gm, its_inputs())
    assert compiled._boxed_call
    for _ in range(4):  # TorchScript changes its mind after some calls
        agree(compiled, its_inputs())
    assert gm.code == code


def test_boxed_function():
    boxed = make_boxed_func(lambda x, y: x - y)
    assert boxed._boxed_call
    assert boxed([5, 3]) == 2
    assert make_boxed_func(boxed) is boxed


def test_boxed_compiler_passes_on_graph_and_inputs():
    seen = []

    @make_boxed_compiler
    def compiler(gm, example_inputs):
        seen.append((gm, example_inputs))
        return lambda x: -x

    gm, inputs = fx.symbolic_trace(lambda x: x), [torch.ones(2)]
    assert_close(compiler(gm, inputs)([torch.ones(2)]), -torch.ones(2))
    assert seen == [(gm, inputs)]
    assert compiler.__name__ == "compiler"


def probed(watched, alive):
    """The graph of sin(x) * y and then cos, which notes after each operator which inputs are alive."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")

    def probe(value):
        alive.append([w() is not None for w in watched])
        return value

    a = graph.call_function(probe, (graph.call_function(torch.sin, (x,)),))
    b = graph.call_function(probe, (graph.call_function(torch.mul, (a, y)),))
    graph.output((graph.call_function(torch.cos, (b,)),))
    return fx.GraphModule(torch.nn.Module(), graph)


def test_inputs_are_freed_after_their_last_use():
    inputs, alive = [torch.rand(3), torch.rand(3)], []
    expected = (inputs[0].sin() * inputs[1]).cos()
    boxed = nop(probed([weakref.ref(i) for i in inputs], alive), inputs)
    (result,) = boxed(inputs)
    assert alive == [[False, True], [False, False]]
    assert inputs == []
    assert_close(result, expected)


def test_a_plain_call_keeps_its_inputs():  # so that the test above can fail
    inputs, alive = [torch.rand(3), torch.rand(3)], []
    probed([weakref.ref(i) for i in inputs], alive)(*inputs)
    assert alive == [[True, True], [True, True]]


def test_boxed_graph_without_inputs_and_with_attributes():
    root = torch.nn.Module()
    root.weight = torch.nn.Parameter(torch.ones(2))
    graph = fx.Graph()
    graph.output((graph.get_attr("weight"),))
    (result,) = nop(fx.GraphModule(root, graph), [])([])
    assert result is root.weight


def test_boxed_graph_with_one_input_and_annotations():
    def f(x: torch.Tensor, y: float = 2.0):
        return x * y

    assert_close(nop(fx.symbolic_trace(f), [])([torch.ones(2), 3.0]), torch.full((2,), 3.0))
    assert_close(nop(fx.symbolic_trace(lambda x: x.sin()), [])([torch.ones(2)]), torch.ones(2).sin())


def test_print_compile_shows_names_dtypes_shapes_and_source_lines(capsys):
    gm = make_fx(lambda weight: weight.sin().sum())(torch.ones(2, 3, dtype=torch.float64))
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.stack_trace = 'File "/home/model.py", line 12, in forward\n    y = weight.sin().sum()'
    print_compile(gm, [])
    printed = capsys.readouterr().out
    assert 'weight_1: "f64[2, 3]"' in printed
    assert 'sum_1: "f64[]" = torch.ops.aten.sum.default(sin)' in printed
    assert "/home/model.py:12" in printed
    assert "y = weight.sin().sum()" in printed


def test_torchscript_reads_parameters_at_each_call():
    root = torch.nn.Module()
    root.weight = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    graph = fx.Graph()
    graph.output((graph.call_function(aten.mul.Tensor, (graph.placeholder("x"), graph.get_attr("weight"))),))
    compiled = ts_compile(fx.GraphModule(root, graph), [])
    root.weight.fill_(3.0)
    assert_close(compiled([torch.ones(2)]), (torch.full((2,), 3.0),))


def test_torchscript_refuses_python_functions():
    gm = probed([], [])
    with pytest.raises(
        NotImplementedError, match=r"^ts_compile: got a graph that TorchScript cannot .*; compile it with"
    ):
        ts_compile(gm, [])
