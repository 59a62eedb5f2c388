"""trace and eval_shape: the flat graph, and the shapes of what a function returns."""

import operator

import pytest
import torch
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import functorch_lite as fl
from tests.jit.test_jit import COMPOSITIONS

aten = torch.ops.aten


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_graph_is_called_as_the_function_is(name):
    function, arguments = COMPOSITIONS[name]
    graph = fl.trace(function)(*arguments())
    torch.manual_seed(1)
    args = arguments()
    got, expected = graph(*args), function(*args)
    assert pytree.tree_structure(got) == pytree.tree_structure(expected)
    assert_close(got, expected)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert all(target is operator.getitem or isinstance(target, torch._ops.OpOverload) for target in targets)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_shapes(name):
    function, arguments = COMPOSITIONS[name]
    args = arguments()
    got, expected = fl.eval_shape(function)(*args), function(*args)
    assert pytree.tree_structure(got) == pytree.tree_structure(expected)
    for x, y in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        if isinstance(y, torch.Tensor):
            assert x.device.type == "meta"
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
        else:
            assert x == y


def test_names_and_captured_tensors():
    weight = torch.nn.Parameter(torch.ones(2))
    offset = torch.zeros(2)
    graph = fl.trace(lambda x, options, *, y: x * weight + offset + options["a"] + y)(
        torch.ones(2), {"a": torch.ones(2), "b": "text"}, y=3
    )
    placeholders = [node.name for node in graph.graph.find_nodes(op="placeholder")]
    assert placeholders == ["x", "options_a", "options_b", "y"]
    assert dict(graph.named_parameters()) == {"weight": weight}
    assert dict(graph.named_buffers()) == {"offset": offset}
    with torch.no_grad():
        weight.mul_(2)
    assert_close(graph(torch.ones(2), {"a": torch.zeros(2), "b": "text"}, y=3), torch.full((2,), 5.0))
    weight.grad = None
    graph(torch.ones(2), {"a": torch.zeros(2), "b": "text"}, y=3).sum().backward()
    assert_close(weight.grad, torch.ones(2))


def test_writes_come_last():
    counter = torch.zeros(2)

    def f(x):
        x.mul_(2)
        counter.add_(x)
        return x, counter[1:], counter * 1

    graph = fl.trace(f)(torch.ones(2))
    assert counter.tolist() == [0, 0]
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets[-2:] == [aten.copy_.default] * 2
    x = torch.full((2,), 3.0)
    same, view, product = graph(x)
    assert same is x
    assert (x.tolist(), counter.tolist(), view.tolist(), product.tolist()) == ([6, 6], [6, 6], [6], [6, 6])


def test_one_tensor_twice():
    x = torch.ones(2)
    graph = fl.trace(lambda x, y: x * 2 + y)(x, x)
    assert len(graph.graph.find_nodes(op="placeholder")) == 2
    assert_close(graph(x, x), torch.full((2,), 3.0))


def test_sizes_as_symbols():
    graph = fl.trace(fl.vmap(fl.grad(lambda x: x.sin().sum())), dynamic=True)(torch.ones(3, 4))
    x = torch.randn(5, 7)
    assert_close(graph(x), x.cos())


def test_eval_shape_does_nothing():
    counter = torch.zeros(1)
    state = torch.get_rng_state()

    def f(x):
        counter.add_(1)
        return x @ x.mT + torch.rand(1)

    assert fl.eval_shape(f)(torch.empty(3, 4)).shape == (3, 3)
    assert counter.item() == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert fl.eval_shape(lambda x: x @ x.mT)(torch.empty(10**5, 4, device="meta")).shape == (10**5, 10**5)
