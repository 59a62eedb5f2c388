"""Compiled functions inside transforms, transforms inside compiled functions, and higher derivatives."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils import _pytree

import functorch_lite as fl
from functorch_lite.compile import clear_compile_cache, num_of_recompilations
from tests.support import observations
from tests.support.functions import FUNCTIONS

compiled = observations.ours().function

FEW = ["polynomial", "in_place_view", "write_into_constant", "matmul", "softmax", "where", "layer_norm", "conv", "sort"]


def _weighted(f):
    """A number, of which every output has a part."""
    return lambda x: sum((y * torch.arange(1, y.numel() + 1, dtype=y.dtype).reshape(y.shape)).sum() for y in [f(x)])


TRANSFORMS = {
    "grad": lambda f: fl.grad(_weighted(f)),
    "vmap": fl.vmap,
    "vjp": lambda f: lambda x: fl.vjp(_weighted(f), x)[1](x.new_ones(())),
    "jvp": lambda f: lambda x: fl.jvp(f, (x,), (x * 2,)),
    "jacrev": fl.jacrev,
    "jacfwd": fl.jacfwd,
    "hessian": lambda f: fl.hessian(_weighted(f)),
    "vmap of grad": lambda f: fl.vmap(fl.grad(_weighted(f))),
    "vmap of jvp": lambda f: fl.vmap(lambda x: fl.jvp(f, (x,), (x * 2,))[1]),
    "grad of vmap": lambda f: fl.grad(lambda xs: fl.vmap(_weighted(f))(xs).sum()),
    "grad of grad": lambda f: fl.grad(lambda x: fl.grad(_weighted(f))(x).sin().sum()),
    "vmap of vmap": lambda f: fl.vmap(fl.vmap(f)),
    "jvp of grad": lambda f: lambda x: fl.jvp(fl.grad(_weighted(f)), (x,), (x * 2,))[1],
    "linearize": lambda f: lambda x: fl.linearize(f, x)[1](x * 2),
}


def _point(transform):
    """One example of two numbers, or a batch of them for each vmap."""
    torch.manual_seed(0)
    return torch.rand(*[3] * transform.count("vmap"), 2, dtype=torch.float64)


def _assert_same(actual, expected):
    leaves, structure = _pytree.tree_flatten(actual)
    wanted, other = _pytree.tree_flatten(expected)
    assert structure == other
    for y, z in zip(leaves, wanted, strict=True):
        assert type(y) is type(z)
        torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FEW)
def test_of_compiled(name, transform):
    f, T, x = FUNCTIONS[name], TRANSFORMS[transform], _point(transform)
    function = compiled(f)
    for _ in range(2):
        _assert_same(T(function)(x), T(f)(x))
    # Also after a plain call.
    one = x.flatten()[:2].clone()
    _assert_same(function(one), f(one))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FEW)
def test_compiled(name, transform):
    f, x = TRANSFORMS[transform](FUNCTIONS[name]), _point(transform)
    function = compiled(f)
    for _ in range(2):
        _assert_same(function(x), f(x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_of_compiled_and_compiled_gradient(name):
    f = _weighted(FUNCTIONS[name])
    x = _point("")
    expected = fl.grad(f)(x)
    _assert_same(fl.grad(compiled(f))(x), expected)
    _assert_same(compiled(fl.grad(f))(x), expected)
    _assert_same(fl.grad(compiled(f, min_cut=True))(x), expected)


@pytest.mark.parametrize(("outer", "inner"), itertools.product(("grad", "vmap", "jvp"), repeat=2))
def test_compiled_at_each_place(outer, inner):
    """T(U(f)) with a compiled function in place of each of the three, and of all."""
    f = FUNCTIONS["layer_norm" if "vmap" not in (outer, inner) else "conv"]

    def total(g):
        return lambda x: sum(y.sum() for y in _pytree.tree_leaves(g(x)))

    def nested(f, at):
        maybe = [compiled if i in at else lambda f: f for i in range(3)]
        g = TRANSFORMS[inner](maybe[0](f))
        return maybe[2](fl.grad(maybe[1](total(g))) if outer == "grad" else TRANSFORMS[outer](maybe[1](g)))

    x = _point(outer + inner)
    expected = nested(f, ())(x)
    for at in ((0,), (1,), (2,), (0, 1, 2)):
        _assert_same(nested(f, at)(x), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_double_backward(name):
    f, function = FUNCTIONS[name], compiled(FUNCTIONS[name])

    def second(f):
        x = _point("").requires_grad_()
        y = f(x)
        cotangent = torch.linspace(1, 2, y.numel(), dtype=y.dtype).reshape(y.shape).requires_grad_()
        (g,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
        return torch.autograd.grad(g.sin().sum(), (x, cotangent), allow_unused=True, materialize_grads=True)

    _assert_same(second(function), second(f))
    _assert_same(second(function), second(f))


@pytest.mark.parametrize("name", ["polynomial", "matmul", "in_place_view", "softmax", "layer_norm"])
def test_gradgradcheck(name):
    assert torch.autograd.gradgradcheck(compiled(FUNCTIONS[name]), (_point("").requires_grad_(),))


@pytest.mark.parametrize("name", ["polynomial", "matmul", "exp_log"])
def test_third_derivative(name):
    def third(f):
        x = _point("").requires_grad_()
        y = f(x).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = g.sin().sum()
        return g

    _assert_same(third(compiled(FUNCTIONS[name])), third(FUNCTIONS[name]))


def test_plain_autograd_through_a_transform_of_compiled():
    f = FUNCTIONS["matmul"]
    x = _point("").requires_grad_()
    for transform in ("grad", "vmap of grad", "jvp of grad"):
        x = _point(transform).requires_grad_()
        expected = torch.autograd.grad(TRANSFORMS[transform](f)(x).sum(), x)
        _assert_same(torch.autograd.grad(TRANSFORMS[transform](compiled(f))(x).sum(), x), expected)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_random_numbers_under_vmap(randomness):
    f = lambda x: x * torch.rand_like(x)
    xs = torch.ones(3, 2)
    torch.manual_seed(0)
    expected = fl.vmap(f, randomness=randomness)(xs)
    torch.manual_seed(0)
    assert torch.equal(fl.vmap(compiled(f), randomness=randomness)(xs), expected)


def test_random_numbers_under_vmap_are_refused():
    with pytest.raises(RuntimeError, match="randomness"):
        fl.vmap(compiled(torch.rand_like))(torch.ones(3, 2))


def test_in_dims_and_unbatched_arguments():
    f = lambda x, y, scale: (x @ y) * scale
    x, y = torch.rand(2, 3, 4, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    for in_dims in ((1, None, None), (None, 1, None), (1, 1, None)):
        args = (x if in_dims[0] is not None else x[:, 0], y, 2.0)
        _assert_same(fl.vmap(compiled(f), in_dims)(*args), fl.vmap(f, in_dims)(*args))


def test_a_tensor_of_an_outer_level_is_captured():
    def outer(compile):
        return fl.grad(lambda x: fl.grad(compile(lambda y: (x * y).sin().sum()))(x).sum())

    x = _point("")
    _assert_same(outer(compiled)(x), outer(lambda f: f)(x))


def test_compiled_inside_compiled():
    inner = compiled(lambda x: x.sin() * x)
    outer = compiled(lambda x: inner(x) + inner(x * 2))
    eager = lambda x: x.sin() * x + (x * 2).sin() * (x * 2)

    def gradient(f):
        x = _point("").requires_grad_()
        return torch.autograd.grad(f(x).sum(), x)

    _assert_same(gradient(outer), gradient(eager))


def test_per_sample_gradients_of_a_compiled_module():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    names, params = zip(*net.named_parameters(), strict=True)
    xs = torch.rand(5, 3, dtype=torch.float64)
    params = [p.detach() for p in params]

    def loss(params, x):
        return fl.functional_call(net, dict(zip(names, params, strict=True)), (x,)).sin().sum()

    expected = fl.vmap(fl.grad(loss), (None, 0))(params, xs)
    _assert_same(fl.vmap(fl.grad(compiled(loss)), (None, 0))(params, xs), expected)
    _assert_same(compiled(fl.vmap(fl.grad(loss), (None, 0)))(params, xs), expected)


# Sizes that are symbols.

DYNAMIC = {
    "pointwise": lambda x: (x.sin() * x).exp(),
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(),
    "product": lambda x: x @ x.t(),
    "softmax": lambda x: x.softmax(0) * x.shape[0],
    "cat": lambda x: torch.cat([x, x * 2]).reshape(2, -1, 2).sum(0),
    "expand": lambda x: x.sum(1, keepdim=True).expand(x.shape[0], 4),
    "arange": lambda x: x * torch.arange(x.shape[0], dtype=x.dtype).unsqueeze(1),
    "in place": lambda x: x.clone().mul_(2).add_(x),
    "slice": lambda x: x[: x.shape[0] // 2] * 2,
    "view": lambda x: x.view(-1).view(x.shape[1], x.shape[0]),
    "layer norm": lambda x: torch.nn.functional.layer_norm(x, (2,)),
    "linear": lambda x: torch.nn.functional.linear(x, torch.ones(3, 2, dtype=x.dtype)),
}
SIZES = (4, 6, 10, 5, 17)


def _rows(n):
    torch.manual_seed(n)
    return torch.rand(n, 2, dtype=torch.float64)


def _gradient(f, x):
    x = x.requires_grad_()
    y = f(x)
    cotangent = torch.linspace(1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    return y.detach(), torch.autograd.grad(y, x, cotangent)[0]


@pytest.mark.parametrize("name", DYNAMIC)
def test_one_graph_for_all_sizes(name):
    f = DYNAMIC[name]
    function = compiled(f, dynamic=True)
    clear_compile_cache()
    for n in SIZES:
        _assert_same(_gradient(function, _rows(n)), _gradient(f, _rows(n)))
    assert num_of_recompilations() == 1


@pytest.mark.parametrize("name", DYNAMIC)
def test_sizes_zero_and_one_are_right(name):
    f = DYNAMIC[name]
    function = compiled(f, dynamic=True)
    for n in (4, 1, 0, 7, 1):
        if n == 0 and name in ("softmax", "mean", "slice"):
            continue
        _assert_same(_gradient(function, _rows(n)), _gradient(f, _rows(n)))


def test_a_decision_on_a_size_is_a_guard():
    def f(x):
        return x * 2 if x.shape[0] > 8 else x * 3

    function = compiled(f, dynamic=True)
    clear_compile_cache()
    for n in (4, 6, 10, 5, 17):
        _assert_same(_gradient(function, _rows(n)), _gradient(f, _rows(n)))
    assert num_of_recompilations() == 2


def test_several_sizes_and_their_relation():
    def f(x, y):
        return x * y if x.shape == y.shape else x.sum() * y

    function = compiled(f, dynamic=True)
    for n, m in ((4, 4), (6, 6), (4, 6), (7, 3), (5, 5), (1, 4)):
        x, y = _rows(n), _rows(m)
        _assert_same(function(x, y), f(x, y))


def test_training_with_many_batch_sizes():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    function = observations.ours().module(net, dynamic=True)
    clear_compile_cache()
    for n in SIZES:
        x = _rows(n)
        expected = torch.autograd.grad(net(x).sin().sum(), list(net.parameters()))
        _assert_same(torch.autograd.grad(function(x).sin().sum(), list(net.parameters())), expected)
    assert num_of_recompilations() == 1
