"""linearize and linear_transpose: judged by double backward of torch.autograd, by jvp, and by matrices."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import functorch_lite as fl
from functorch_lite import grad, hessian, jacfwd, jacrev, jvp, linear_transpose, linearize, make_fx, vjp, vmap
from tests.transforms.test_jvp import FUNCTIONS, by_double_backward

Pair = namedtuple("Pair", ["a", "b"])


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def equal(got, expected):
    torch.testing.assert_close(got, expected)


X, Y, T, U = (numbers(3, seed=seed) for seed in range(4))
M = numbers(4, 3, seed=4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_outputs_and_tangents(name):
    f = FUNCTIONS[name]
    output, jvp_fn = linearize(f, X, Y)
    equal(output, f(X, Y))
    for tangents in ((T, U), (U, T)):
        equal(jvp_fn(*tangents), by_double_backward(f, (X, Y), tangents))


@pytest.mark.parametrize("make", [lambda a, b: {"a": a, "b": b}, lambda a, b: [a, (b,)], Pair])
def test_pytrees(make):
    def f(tree, c):
        a, b = pytree.tree_leaves(tree)
        return make(a * b, (b * c).sin())

    output, jvp_fn = linearize(f, make(X, Y), X)
    tangent = jvp_fn(make(T, U), U)
    assert type(output) is type(tangent) is type(make(X, X))
    equal(pytree.tree_leaves(output), [X * Y, (Y * X).sin()])
    equal(pytree.tree_leaves(tangent), [T * Y + X * U, (Y * X).cos() * (U * X + Y * U)])


def test_auxiliary_output_and_keywords():
    f = lambda x, *, power: (x**power, {"twice": x * 2, "name": "aux"})
    output, jvp_fn, aux = linearize(f, X, has_aux=True, power=3)
    equal((output, jvp_fn(T), aux["twice"]), (X**3, 3 * X**2 * T, X * 2))
    assert aux["name"] == "aux"
    equal(grad(lambda x: linearize(f, x, has_aux=True, power=3)[2]["twice"].sum())(X), torch.full_like(X, 2))


def test_outputs_that_do_not_depend_on_the_primals():
    output, jvp_fn = linearize(lambda x: (Y, x.detach(), x), X)
    equal(output, (Y, X, X))
    equal(jvp_fn(T), (torch.zeros_like(Y), torch.zeros_like(X), T))


def test_integer_outputs_have_a_tangent_of_zeros():
    (values, indices), jvp_fn = linearize(lambda x: tuple(x.sort()), X)
    tangent, zeros = jvp_fn(T)
    equal((tangent, zeros), (T[indices], torch.zeros_like(indices)))
    equal(linearize(torch.argmax, X)[1](T), torch.tensor(0))


def test_complex_functions():
    z, t = torch.complex(X, Y), torch.complex(T, U)
    equal(linearize(lambda z: z**3, z)[1](t), 3 * z**2 * t)
    equal(linearize(torch.conj_physical, z)[1](t), t.conj().resolve_conj())
    equal(linearize(lambda z: z.abs(), z)[1](t), (z.conj() * t).real / z.abs())
    equal(linearize(lambda x: x * z, X)[1](T), T * z)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shapes_and_dtypes(shape, dtype):
    x, t = numbers(*shape, dtype=dtype), numbers(*shape, seed=1, dtype=dtype)
    equal(linearize(lambda x: x * x, x)[1](t), x * t + t * x)


def test_writes_in_place():
    def f(x):
        y = x * 2
        y[0] = x[1] * x[2]
        return y.mul_(x).exp_()

    expected = by_double_backward(lambda x: (torch.stack([x[1] * x[2], 2 * x[1], 2 * x[2]]) * x).exp(), (X,), (T,))
    equal(linearize(f, X)[1](T), expected)


def test_the_function_runs_once():
    calls = []
    _, jvp_fn = linearize(lambda x: calls.append(1) or x.sin(), X)
    for t in (T, U):
        jvp_fn(t)
    vmap(jvp_fn)(torch.stack([T, U]))
    assert calls == [1]


def test_the_map_of_a_random_function_is_one_map():
    output, jvp_fn = linearize(lambda x: nn.functional.dropout(x, 0.5), torch.ones(64))
    equal(jvp_fn(torch.ones(64)), output)
    equal(jvp_fn(torch.ones(64)), output)


def test_a_jacobian_comes_out_of_it():
    f = lambda x: torch.outer(x.sin(), x.exp()) @ M.T
    columns = vmap(linearize(f, X)[1], out_dims=-1)(torch.eye(3, dtype=X.dtype))
    equal(columns, jacrev(f)(X))


def test_it_is_the_transpose_of_the_pullback():
    f = lambda x, y: {"a": torch.outer(x, y).sin(), "b": x.cumprod(0)}
    output, jvp_fn = linearize(f, X, Y)
    v = pytree.tree_map(lambda leaf: numbers(*leaf.shape, seed=9), output)
    pushed, pulled = jvp_fn(T, U), vjp(f, X, Y)[1](v)
    forwards = sum((v[key] * pushed[key]).sum() for key in v)
    equal(forwards, (pulled[0] * T).sum() + (pulled[1] * U).sum())


class TestDerivatives:
    """Of the map by its tangent, and of what surrounds linearize by what the function captures and is given."""

    @staticmethod
    def through(push):
        """A scalar function in which the point, the captured tensor and the tangent depend on x."""
        return lambda x: push(lambda y: (y * y.sum() * x).sin() * M[0], x * 2, x.exp()).pow(2).sum()

    BY_LINEARIZE = staticmethod(lambda f, x, t: linearize(f, x)[1](t))
    BY_FORMULA = staticmethod(lambda f, x, t: torch.autograd.functional.jvp(f, x, t, create_graph=True)[1])

    def test_first(self):
        x = X.clone().requires_grad_()
        (expected,) = torch.autograd.grad(self.through(self.BY_FORMULA)(x), x)
        equal(grad(self.through(self.BY_LINEARIZE))(X), expected)

    def test_second(self):
        expected = torch.autograd.functional.hessian(self.through(self.BY_FORMULA), X)
        for second in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacfwd(f))):
            equal(second(self.through(self.BY_LINEARIZE))(X), expected)

    def test_under_vmap(self):
        xs = torch.stack([X, Y])
        gradient = grad(self.through(self.BY_LINEARIZE))
        equal(vmap(gradient)(xs), torch.stack([gradient(x) for x in xs]))

    def test_plain_autograd_outside(self):
        x = X.clone().requires_grad_()
        (got,) = torch.autograd.grad(self.through(self.BY_LINEARIZE)(x), x)
        equal(got, grad(self.through(self.BY_LINEARIZE))(X))

    def test_by_the_tangent(self):
        f = lambda x: torch.outer(x, x).exp()
        _, jvp_fn = linearize(f, X)
        equal(jacrev(jvp_fn)(T), jacrev(f)(X))
        equal(jacfwd(jvp_fn)(T), jacrev(f)(X))
        equal(jvp(jvp_fn, (T,), (U,)), (jvp_fn(T), jvp_fn(U)))
        equal(linearize(jvp_fn, T)[1](U), jvp_fn(U))
        equal(linear_transpose(jvp_fn, T)(f(X))[0], vjp(f, X)[1](f(X))[0])

    def test_of_a_gradient(self):
        f = lambda x: (x**4).sum() * x[0]
        gradient, hvp_fn = linearize(grad(f), X)
        equal(gradient, grad(f)(X))
        equal(vmap(hvp_fn)(torch.eye(3, dtype=X.dtype)), torch.autograd.functional.hessian(f, X))


def test_batches_of_points_and_of_tangents():
    f = lambda x: x.sin() * x.sum()
    points, tangents = numbers(2, 3, seed=5), numbers(4, 3, seed=6)
    got = vmap(lambda x: vmap(linearize(f, x)[1])(tangents))(points)
    equal(got, torch.stack([torch.stack([by_double_backward(f, (x,), (t,)) for t in tangents]) for x in points]))


def test_captured_parameters_and_modules():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.LayerNorm(24), nn.Linear(24, 2)).double()
    x, t = numbers(2, 1, 8), numbers(2, 1, 8, seed=1)
    tangent = linearize(model, x)[1](t)
    equal(tangent, by_double_backward(model, (x,), (t,)).detach())
    # PyTorch's own third derivative of layer norm is wrong.
    normalize = lambda x: (x - x.mean(-1, True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    composed = lambda x: model[4](normalize(model[:3](x)))
    expected = torch.autograd.functional.jvp(composed, x, t, create_graph=True)[1]
    equal(torch.autograd.grad(tangent.sum(), model[0].weight), torch.autograd.grad(expected.sum(), model[0].weight))


def test_it_can_be_traced():
    graph = make_fx(lambda x, t: linearize(lambda x: x.sin() * 2, x)[1](t))(X, T)
    equal(graph(Y, U), 2 * Y.cos() * U)


def test_the_first_graph_is_freed():
    # What the map needs are the cosine and the exponential. The first graph has saved the sine's argument too.
    x = numbers(100_000)
    f = lambda x: (x * 2).sin().exp().sum()
    with fl._C.MemoryMeter(x.device) as meter:
        _, jvp_fn = linearize(f, x)
    assert meter.live < 3.5 * x.nbytes
    equal(jvp_fn(torch.ones_like(x)), (2 * (2 * x).cos() * (2 * x).sin().exp()).sum())


TRANSPOSED = {
    "matrix": (lambda x: M @ x, M),
    "reversed": (lambda x: x.flip(0) * 2, 2 * torch.eye(3, dtype=X.dtype).flip(0)),
    "padded": (lambda x: nn.functional.pad(x, (1, 0)), torch.eye(4, 3, dtype=X.dtype).roll(1, 0)),
    "scan": (lambda x: x.cumsum(0), torch.ones(3, 3, dtype=X.dtype).tril()),
    "differences": (lambda x: x.diff(), torch.tensor([[-1.0, 1, 0], [0, -1, 1]], dtype=X.dtype)),
    "zero": (torch.zeros_like, torch.zeros(3, 3, dtype=X.dtype)),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposes(name):
    func, matrix = TRANSPOSED[name]
    v = numbers(len(matrix), seed=7)
    transpose_fn = linear_transpose(func, torch.full_like(X, torch.nan))  # the values do not count
    equal(transpose_fn(v), (matrix.T @ v,))
    equal(linear_transpose(lambda v: transpose_fn(v)[0], v)(X), (matrix @ X,))


def test_transposes_of_several_arguments():
    func = lambda tree, z: {"a": M @ tree["x"] + tree["y"], "b": 2 * z}
    example = {"x": X, "y": torch.zeros(4, dtype=X.dtype)}
    got = linear_transpose(func, example, Y)({"a": M[:, 0], "b": T})
    equal(got, ({"x": M.T @ M[:, 0], "y": M[:, 0]}, 2 * T))


def test_transposes_of_complex_functions_are_not_conjugated():
    matrix = torch.complex(M, numbers(4, 3, seed=5))
    v = torch.complex(numbers(4, seed=6), numbers(4, seed=7))
    equal(linear_transpose(lambda z: matrix @ z, torch.zeros(3, dtype=v.dtype))(v), (matrix.T @ v,))
    equal(linear_transpose(lambda x: matrix @ x.to(v.dtype), X)(v), ((matrix.T @ v).real,))


def test_transposes_under_transforms():
    batch = numbers(5, 4, seed=8)
    equal(vmap(linear_transpose(lambda x: M @ x, X))(batch), (batch @ M,))
    scale, v = batch[:, :3], batch[:, 1:]
    equal(vmap(lambda a, v: linear_transpose(lambda x: a * x, X)(v)[0])(scale, v), scale * v)
    by_matrix = lambda m: linear_transpose(lambda x: m @ x, X)(batch[0])[0].sin().sum()
    m = M.clone().requires_grad_()
    expected = torch.autograd.grad((m.T @ batch[0]).sin().sum(), m)
    equal((grad(by_matrix)(M),), expected)
    equal(hessian(by_matrix)(M), hessian(lambda m: (m.T @ batch[0]).sin().sum())(M))
    equal(make_fx(linear_transpose(lambda x: M @ x, X))(batch[0])(batch[1]), (M.T @ batch[1],))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_no_sign_of_a_function_that_is_not_linear(dtype):
    weight = numbers(300, 1000, dtype=dtype)
    linear_transpose(lambda x: weight @ x, torch.empty(1000, dtype=dtype))
    linear_transpose(lambda x: x.cumsum(0).sum() - x.sum(), torch.empty(100_000, dtype=dtype))
