"""hvp, vhp and gnvp: judged by whole Hessians of torch.autograd, by finite differences and by explicit matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import nn

import functorch_lite as fl
from functorch_lite import functional_call, gnvp, grad, hvp, jvp, vhp, vmap

HESSIAN_PRODUCTS = pytest.mark.parametrize("product", [hvp, vhp])


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def equal(got, expected):
    torch.testing.assert_close(got, expected)


X, Y, V, W = numbers(3), numbers(2, seed=1), numbers(3, seed=2), numbers(2, seed=3)
M = numbers(4, 3, seed=4)

FUNCTIONS = {
    "polynomial": lambda x, y: (x**3).sum() * y.prod(),
    "bilinear": lambda x, y: torch.outer(x, y).sin().sum(),
    "softmax": lambda x, y: torch.cat([x, y]).log_softmax(0)[1] * x[0],
    "norm": lambda x, y: F.layer_norm(torch.cat([x, y]), (5,)).pow(3).sum() + torch.linalg.vector_norm(x),
    "attention": lambda x, y: F.scaled_dot_product_attention(*[torch.outer(x, y)[None]] * 3).pow(2).sum(),
    "constant": lambda x, y: torch.ones((), dtype=x.dtype),
    "linear": lambda x, y: x.sum() + y[0],
}


def hessian_times(func, primals, vectors):
    """From the whole Hessian, by double backward."""
    blocks = torch.autograd.functional.hessian(func, primals)
    return tuple(
        sum(block.reshape(p.numel(), v.numel()) @ v.flatten() for block, v in zip(row, vectors, strict=True)).view_as(p)
        for p, row in zip(primals, blocks, strict=True)
    )


def by_finite_differences(func, primals, vectors, step=1e-5):
    """Central differences of the gradient along the vector."""
    gradients = []
    for sign in (1, -1):
        moved = [(p + sign * step * v).requires_grad_() for p, v in zip(primals, vectors, strict=True)]
        gradients.append(torch.autograd.grad(func(*moved), moved, materialize_grads=True, allow_unused=True))
    return tuple((a - b) / (2 * step) for a, b in zip(*gradients, strict=True))


@HESSIAN_PRODUCTS
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_products(product, name):
    func = FUNCTIONS[name]
    value, got = product(func, (X, Y), (V, W))
    equal(value, func(X, Y))
    if name != "constant":
        torch.testing.assert_close(got, by_finite_differences(func, (X, Y), (V, W)), rtol=1e-6, atol=1e-7)
    equal(got, hessian_times(func, (X, Y), (V, W)))


@HESSIAN_PRODUCTS
def test_pytrees_auxiliary_output_and_keywords(product):
    func = lambda tree, *, power: ((tree["x"] ** power).sum() * tree["y"][0].prod(), {"double": tree["x"] * 2, "n": 3})
    tree = lambda x, y: {"x": x, "y": [y]}
    value, (got,), aux = product(func, (tree(X, Y),), (tree(V, W),), has_aux=True, power=3)
    expected = hessian_times(FUNCTIONS["polynomial"], (X, Y), (V, W))
    equal(value, FUNCTIONS["polynomial"](X, Y))
    equal((got["x"], got["y"][0], aux["double"]), (*expected, X * 2))
    assert aux["n"] == 3


@HESSIAN_PRODUCTS
def test_the_function_runs_once(product):
    calls = []
    product(lambda x: calls.append(1) or (x**3).sum(), (X,), (V,))
    assert calls == [1]


@HESSIAN_PRODUCTS
def test_batches_of_vectors_and_points(product):
    func = lambda x: (x.sin() * x.sum()).prod()
    vectors, points = numbers(4, 3, seed=5), numbers(2, 3, seed=6)
    got = vmap(lambda x: vmap(lambda v: product(func, (x,), (v,))[1][0])(vectors))(points)
    expected = [[hessian_times(func, (x,), (v,))[0] for v in vectors] for x in points]
    equal(got, torch.stack([torch.stack(row) for row in expected]))


@HESSIAN_PRODUCTS
def test_derivatives_of_products(product):
    """By the point, the vector and a captured tensor at once; the reference is in formulas."""
    func = lambda x: product(lambda y: (x * y**4).sum(), (x**2,), (x.sin(),))[1][0].pow(2).sum()
    by_formula = lambda x: (12 * x * x**4 * x.sin()).pow(2).sum()
    x = X.clone().requires_grad_()
    equal((grad(func)(X),), torch.autograd.grad(by_formula(x), x))
    equal(fl.hessian(func)(X), torch.autograd.functional.hessian(by_formula, X))
    equal(jvp(func, (X,), (V,))[1], (grad(func)(X) * V).sum())
    equal(torch.autograd.grad(func(x), x), (grad(func)(X),))


@HESSIAN_PRODUCTS
def test_parameters_of_a_module(product):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    state = {name: p.detach() for name, p in model.named_parameters()}
    vector = {name: numbers(*p.shape, seed=i) for i, (name, p) in enumerate(state.items())}
    loss = lambda *tensors: functional_call(model, dict(zip(state, tensors, strict=True)), (M,)).pow(2).sum()
    _, (got,) = product(lambda state: loss(*state.values()), (state,), (vector,))
    equal(tuple(got.values()), hessian_times(loss, tuple(state.values()), tuple(vector.values())))


def test_single_precision():
    for product in (hvp, vhp):
        value, (got,) = product(lambda x: (x**3).sum(), (X.float(),), (V.float(),))
        assert value.dtype == got.dtype == torch.float32
        equal(got, (6 * X * V).float())


MODELS = {
    "linear": (lambda x, y: M @ x + y.sum(), lambda z: z.pow(4).sum()),
    "network": (lambda x, y: (M @ x.sin()).tanh() * y.prod(), lambda z: F.cross_entropy(z, torch.tensor(2))),
    "scalar": (lambda x, y: (x.sum() * y.sum()).exp(), lambda z: z**3),
    "ignores": (lambda x, y: M @ x, lambda z: z.pow(2).sum()),
}


def jacobian_rows(func, primals):
    """J[m,n] of a function of several tensors, all flattened."""
    blocks = torch.autograd.functional.jacobian(func, primals)
    return torch.cat([block.reshape(-1, p.numel()) for block, p in zip(blocks, primals, strict=True)], dim=1)


def gauss_newton_times(model, loss, primals, vectors):
    """J' H J v with explicit matrices."""
    output = model(*primals)
    jacobian = jacobian_rows(model, primals)
    curvature = torch.autograd.functional.hessian(loss, output).reshape(output.numel(), output.numel())
    product = jacobian.T @ curvature @ jacobian @ torch.cat([v.flatten() for v in vectors])
    parts = product.split([p.numel() for p in primals])
    return tuple(part.view_as(p) for part, p in zip(parts, primals, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_gauss_newton_products(name):
    model, loss = MODELS[name]
    value, got = gnvp(model, loss, (X, Y), (V, W))
    equal(value, loss(model(X, Y)))
    equal(got, gauss_newton_times(model, loss, (X, Y), (V, W)))


def test_gauss_newton_of_a_linear_model_is_the_hessian():
    model, loss = lambda x: M @ x, lambda z: z.pow(4).sum()
    equal(gnvp(model, loss, (X,), (V,)), hvp(lambda x: loss(model(x)), (X,), (V,)))


def test_gauss_newton_runs_the_model_and_the_loss_once():
    calls = []
    gnvp(lambda x: calls.append("model") or x.sin(), lambda z: calls.append("loss") or z.pow(2).sum(), (X,), (V,))
    assert calls == ["model", "loss"]


def test_gauss_newton_of_pytrees_and_keywords():
    model = lambda tree, *, scale: {"a": M @ tree["x"] * scale, "b": [tree["x"].sin()]}
    loss = lambda out: (out["a"] ** 2).sum() * out["b"][0].sum()
    flat = lambda x: torch.cat([M @ x * 2.0, x.sin()])
    value, (got,) = gnvp(model, loss, ({"x": X},), ({"x": V},), scale=2.0)
    on_flat = lambda z: (z[:4] ** 2).sum() * z[4:].sum()
    equal(value, on_flat(flat(X)))
    equal(pytree.tree_leaves(got), list(gauss_newton_times(flat, on_flat, (X,), (V,))))


def test_gauss_newton_under_transforms():
    model, loss = lambda x: (M @ x).sin(), lambda z: z.exp().sum()
    vectors, points = numbers(4, 3, seed=5), numbers(2, 3, seed=6)
    got = vmap(lambda x: vmap(lambda v: gnvp(model, loss, (x,), (v,))[1][0])(vectors))(points)
    expected = [[gauss_newton_times(model, loss, (x,), (v,))[0] for v in vectors] for x in points]
    equal(got, torch.stack([torch.stack(row) for row in expected]))
    energy = lambda x: (gnvp(lambda y: (M @ y).sin() * x[0], loss, (x,), (x * V,))[1][0] * V).sum()
    by_matrix = lambda x: (explicit(x) @ (x * V) * V).sum()

    def explicit(x):
        j = (M @ x).cos()[:, None] * M * x[0]
        return j.T @ torch.diag(((M @ x).sin() * x[0]).exp()) @ j

    x = X.clone().requires_grad_()
    equal((grad(energy)(X),), torch.autograd.grad(by_matrix(x), x))
    equal(fl.hessian(energy)(X), torch.autograd.functional.hessian(by_matrix, X))


def test_gauss_newton_is_positive_semi_definite_where_the_hessian_is_not():
    model, loss = lambda x: x**3 - x, lambda z: (z - 5).pow(2).sum()
    x, v = torch.full((3,), 0.1, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    assert (hvp(lambda x: loss(model(x)), (x,), (v,))[1][0] * v).sum() < (gnvp(model, loss, (x,), (v,))[1][0] * v).sum()
    assert (gnvp(model, loss, (-x * 10,), (v,))[1][0] * v).sum() >= 0
