"""jvp: values, tangents, auxiliary output, strictness. Judged by double backward of torch.autograd."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
import torch.utils._pytree as pytree

from functorch_lite import _C, grad, jacfwd, jvp, vjp, vmap

Pair = namedtuple("Pair", ["a", "b"])


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def equal(got, expected):
    torch.testing.assert_close(got, expected)


def by_double_backward(func, primals, tangents):
    """The tangent of one output: the derivative by the cotangent of the pullback."""
    primals = [primal.detach().clone().requires_grad_() for primal in primals]
    output = func(*primals)
    cotangent = torch.zeros_like(output).requires_grad_()
    pulled = torch.autograd.grad(output, primals, cotangent, create_graph=True, materialize_grads=True)
    inner = sum((p * t).sum() for p, t in zip(pulled, tangents, strict=True))
    return torch.autograd.grad(inner, cotangent)[0]


X, Y, T, U = (numbers(3, seed=seed) for seed in range(4))

FUNCTIONS = {
    "sin": lambda x, y: x.sin() * y,
    "matrix": lambda x, y: torch.outer(x, y).exp(),
    "scalar": lambda x, y: (x * y).sum().tanh(),
    "softmax": lambda x, y: (x + y).softmax(0),
    "sorted": lambda x, y: x.sort().values * y,
    "view": lambda x, y: torch.cat([x[1:], y[:1]]).view(3, 1) * 2,
    "norm": lambda x, y: torch.linalg.vector_norm(x - y),
    "solve": lambda x, y: torch.linalg.solve(torch.outer(x, y) + 5 * torch.eye(3, dtype=x.dtype), y),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_tangents(name):
    f = FUNCTIONS[name]
    output, tangent = jvp(f, (X, Y), (T, U))
    equal(output, f(X, Y))
    equal(tangent, by_double_backward(f, (X, Y), (T, U)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inner_product_with_the_pullback(name):
    f = FUNCTIONS[name]
    output, vjp_fn = vjp(f, X, Y)
    v = numbers(*output.shape, seed=9)
    a, b = vjp_fn(v)
    equal((jvp(f, (X, Y), (T, U))[1] * v).sum(), (a * T).sum() + (b * U).sum())


def test_auxiliary_output():
    f = lambda x: (x.sin(), {"twice": x * 2, "name": "aux"})
    output, tangent, aux = jvp(f, (X,), (T,), has_aux=True)
    equal((output, tangent, aux["twice"]), (X.sin(), T * X.cos(), X * 2))
    assert aux["name"] == "aux"


def test_auxiliary_output_carries_no_tangent():
    _, tangent = jvp(lambda x: jvp(lambda y: (y, x.sin()), (x,), (x,), has_aux=True)[2], (X,), (T,))
    equal(tangent, T * X.cos())


def test_keyword_arguments():
    f = lambda x, *, w, power=1: w * x**power
    equal(jvp(f, (X,), (T,), w=Y, power=3), (Y * X**3, Y * 3 * X**2 * T))


@pytest.mark.parametrize("make", [lambda a, b: {"a": a, "b": b}, lambda a, b: [a, (b,)], Pair])
def test_pytrees(make):
    def f(tree, c):
        a, b = pytree.tree_leaves(tree)
        return make(a * b, (b * c).sin())

    output, tangent = jvp(f, (make(X, Y), X), (make(T, U), U))
    assert type(output) is type(tangent) is type(make(X, X))
    equal(pytree.tree_leaves(output), [X * Y, (Y * X).sin()])
    equal(pytree.tree_leaves(tangent), [T * Y + X * U, (Y * X).cos() * (U * X + Y * U)])


def test_outputs_that_do_not_depend_on_the_primals():
    output, tangent = jvp(lambda x: (Y, x.detach(), x), (X,), (T,))
    equal(output, (Y, X, X))
    equal(tangent, (torch.zeros_like(Y), torch.zeros_like(X), T))


def test_integer_outputs_have_a_tangent_of_zeros():
    (values, indices), (tangent, zeros) = jvp(lambda x: tuple(x.sort()), (X,), (T,))
    equal(tangent, T[indices])
    equal(zeros, torch.zeros_like(indices))


def test_strict():
    equal(jvp(torch.sin, (X,), (T,), strict=True), (X.sin(), T * X.cos()))
    with pytest.raises(ValueError, match="strict=True"):
        jvp(lambda x: (x, Y), (X,), (T,), strict=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_integer_primals_are_refused(dtype):
    ones = torch.ones(3, dtype=dtype)
    with pytest.raises(TypeError, match=str(dtype)):
        jvp(lambda x: x * 2, (ones,), (ones,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_real_dtypes(dtype):
    x, t = X.to(dtype), T.to(dtype)
    output, tangent = jvp(lambda x: x * x, (x,), (t,))
    assert output.dtype == tangent.dtype == dtype
    equal(tangent, x * t + t * x)


def test_complex_primals():
    z, t = torch.complex(X, Y), torch.complex(T, U)
    equal(jvp(lambda z: z**3, (z,), (t,))[1], 3 * z**2 * t)
    equal(jvp(torch.conj_physical, (z,), (t,))[1], t.conj().resolve_conj())
    equal(jvp(lambda z: z.real, (z,), (t,))[1], T)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_shapes(shape):
    x, t = numbers(*shape), numbers(*shape, seed=1)
    equal(jvp(torch.sin, (x,), (t,)), (x.sin(), t * x.cos()))


def test_linear_in_the_tangent():
    push = lambda t: jvp(FUNCTIONS["softmax"], (X, Y), (t, t))[1]
    equal(push(2 * T + U), 2 * push(T) + push(U))


def test_second_derivatives():
    one = torch.ones_like(X)
    f = lambda x: x**4
    equal(jvp(lambda x: jvp(f, (x,), (one,))[1], (X,), (one,))[1], 12 * X**2)
    equal(jvp(grad(lambda x: f(x).sum()), (X,), (T,))[1], 12 * X**2 * T)
    equal(grad(lambda x: (jvp(f, (x,), (T,))[1]).sum())(X), 12 * X**2 * T)


def test_tangents_of_a_batch():
    tangents = torch.stack([T, U])
    equal(vmap(lambda t: jvp(torch.sin, (X,), (t,))[1])(tangents), tangents * X.cos())


def test_writes_in_place_carry_the_tangent():
    def f(x):
        y = x.clone()
        y[0] = y[1] * y[2]
        return y.mul_(x)

    expected = by_double_backward(lambda x: torch.stack([x[1] * x[2], x[1], x[2]]) * x, (X,), (T,))
    equal(jvp(f, (X,), (T,))[1], expected)


WEIGHT, STACK = numbers(3, 3, seed=5), numbers(2, 3, 3, seed=6)
MATRIX_PRODUCTS = {
    "mm": lambda x: torch.outer(x, x).mm(WEIGHT) + WEIGHT.mm(torch.outer(x, x)),
    "mv": lambda x: WEIGHT.mv(x) * torch.outer(x, x).mv(X),
    "bmm": lambda x: STACK.bmm(torch.outer(x, x).expand(2, 3, 3)) + torch.outer(x, x).expand(2, 3, 3).bmm(STACK),
    "linear": lambda x: torch.nn.functional.linear(x.sin(), WEIGHT, X),
    "complex": lambda x: (WEIGHT + 0j).mv(x + 1j * x**2).abs(),
}


@pytest.mark.parametrize("name", MATRIX_PRODUCTS)
def test_matrix_products_with_constants(name):
    f = MATRIX_PRODUCTS[name]
    expected = by_double_backward(f, (X,), (T,))
    equal(jvp(f, (X,), (T,))[1], expected)
    equal(vmap(lambda t: jvp(f, (X,), (t,))[1])(torch.stack([T, U]))[0], expected)
    second = lambda x: jvp(f, (x,), (T,))[1]
    formula = lambda x: torch.autograd.functional.jvp(f, x, T, create_graph=True)[1]
    equal(jvp(second, (X,), (U,))[1], by_double_backward(formula, (X,), (U,)))


def test_a_captured_weight_needs_no_zeros():
    weight, x = numbers(200, 200), numbers(200)
    with _C.MemoryMeter(x.device) as meter:
        jacobian = jacfwd(lambda x: weight @ x)(x)
    assert meter.peak < 6 * weight.nbytes  # and not one matrix of zeros for each of the 200 inputs
    equal(jacobian, weight)
