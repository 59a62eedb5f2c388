"""jacrev, jacfwd and hessian: structures, chunks, dtypes and complex functions. Judged row by row and analytically."""

from __future__ import annotations

import pytest
import torch
import torch.utils._pytree as pytree

import functorch_lite as fl
from functorch_lite import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

BOTH = pytest.mark.parametrize("jacobian", [jacrev, jacfwd])


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def equal(got, expected):
    torch.testing.assert_close(got, expected)


def row_by_row(func, *args):
    """The Jacobian of a real function of real tensors, one torch.autograd.grad for each element of the output."""
    args = [arg.detach().clone().requires_grad_() for arg in args]
    output = func(*args)
    rows = [
        torch.autograd.grad(element, args, retain_graph=True, materialize_grads=True) if element.requires_grad else None
        for element in output.reshape(-1)
    ]
    return tuple(
        torch.stack([torch.zeros_like(arg) if row is None else row[i] for row in rows]).view(output.shape + arg.shape)
        for i, arg in enumerate(args)
    )


def hessian_by_autograd(func, *args):
    return torch.autograd.functional.hessian(func, args)


X, Y, M = numbers(3), numbers(4, seed=1), numbers(2, 3, seed=2)


def mixed(x, y):
    return torch.outer(x.sin(), y.exp()) * x.sum()


@BOTH
@pytest.mark.parametrize("argnums", [0, 1, -1])
def test_argnums_int(jacobian, argnums):
    equal(jacobian(mixed, argnums)(X, Y), row_by_row(mixed, X, Y)[argnums])


@BOTH
@pytest.mark.parametrize("argnums", [(0,), (0, 1), (1, 0), (-1, 0)])
def test_argnums_tuple(jacobian, argnums):
    expected = row_by_row(mixed, X, Y)
    equal(jacobian(mixed, argnums)(X, Y), tuple(expected[i] for i in argnums))


@BOTH
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 12, 1000])
def test_chunks_change_nothing(jacobian, chunk_size):
    equal(jacobian(mixed, (0, 1), chunk_size=chunk_size)(X, Y), jacobian(mixed, (0, 1))(X, Y))


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 1000])
def test_chunks_of_a_hessian_change_nothing(chunk_size):
    f = lambda x, y: mixed(x, y).sum()
    equal(hessian(f, (0, 1), chunk_size=chunk_size)(X, Y), hessian_by_autograd(f, X, Y))


@BOTH
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_auxiliary_output(jacobian, chunk_size):
    f = lambda x: (x.sin(), {"twice": x * 2, "name": "aux", "n": 3})
    result, aux = jacobian(f, has_aux=True, chunk_size=chunk_size)(X)
    equal(result, torch.diag(X.cos()))
    equal(aux["twice"], X * 2)
    assert (aux["name"], aux["n"]) == ("aux", 3)


def test_auxiliary_output_of_a_hessian():
    result, aux = hessian(lambda x: ((x**3).sum(), [x * 2, "aux"]), has_aux=True)(X)
    equal(result, torch.diag(6 * X))
    equal(aux[0], X * 2)
    assert aux[1] == "aux"


@BOTH
def test_keyword_arguments(jacobian):
    f = lambda x, *, w, power=1: w * x**power
    equal(jacobian(f)(X, w=X, power=2), torch.diag(2 * X**2))


def test_keyword_arguments_of_a_hessian():
    equal(hessian(lambda x, *, w: (w * x**2).sum())(X, w=X), torch.diag(2 * X))


@BOTH
def test_pytrees_in(jacobian):
    f = lambda d: d["w"] @ d["b"][0]
    result = jacobian(f)({"w": M, "b": [X]})
    expected = row_by_row(lambda w, b: w @ b, M, X)
    equal(result, {"w": expected[0], "b": [expected[1]]})


@BOTH
def test_pytrees_out(jacobian):
    result = jacobian(lambda x: {"s": x.sin(), "rest": (x.sum(), [torch.outer(x, x)])})(X)
    outer = row_by_row(lambda x: torch.outer(x, x), X)[0]
    equal(result, {"s": torch.diag(X.cos()), "rest": (torch.ones_like(X), [outer])})


@BOTH
def test_pytrees_in_and_out_and_argnums(jacobian):
    f = lambda p, y: (p["x"] * 2, {"o": torch.outer(p["x"], y)})
    result = jacobian(f, (0, 1))({"x": X}, Y)
    one = row_by_row(lambda x, y: x * 2, X, Y)
    two = row_by_row(torch.outer, X, Y)
    equal(result, (({"x": one[0]}, one[1]), {"o": ({"x": two[0]}, two[1])}))


@BOTH
def test_several_outputs(jacobian):
    result = jacobian(lambda x: (x.exp(), x.prod()))(X)
    equal(result, (torch.diag(X.exp()), row_by_row(lambda x: x.prod(), X)[0]))


@BOTH
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 2)])
def test_shapes(jacobian, shape):
    x = numbers(*shape)
    f = lambda x: x.sin() * x.sum()
    equal(jacobian(f)(x), row_by_row(f, x)[0])
    equal(jacobian(lambda x: f(x).sum())(x), row_by_row(lambda x: f(x).sum(), x)[0])


@BOTH
def test_empty_input_and_empty_output(jacobian):
    assert jacobian(torch.sin)(torch.ones(0)).shape == (0, 0)
    assert jacobian(lambda x: x.sum())(torch.ones(0)).shape == (0,)
    assert jacobian(lambda x: x[:0])(torch.ones(3)).shape == (0, 3)
    assert jacobian(lambda x: (x, x.sum()), chunk_size=1)(torch.ones(2, 0))[1].shape == (2, 0)


def test_empty_hessian():
    assert hessian(lambda x: x.sin().sum())(torch.ones(0)).shape == (0, 0)


@BOTH
def test_outputs_that_do_not_depend_on_the_input(jacobian):
    equal(jacobian(lambda x: (Y, x.detach(), x))(X)[0], torch.zeros(4, 3, dtype=X.dtype))
    equal(jacobian(lambda x: x.detach())(X), torch.zeros(3, 3, dtype=X.dtype))
    equal(jacobian(lambda x, y: x * 2, 1)(X, Y), torch.zeros(3, 4, dtype=X.dtype))


@pytest.mark.parametrize("argnums", [0, 1, (0,), (0, 1), (1, 0)])
def test_hessian_blocks(argnums):
    f = lambda x, y: (mixed(x, y) ** 2).sum()
    blocks = hessian_by_autograd(f, X, Y)
    if isinstance(argnums, int):
        expected = blocks[argnums][argnums]
    else:
        expected = tuple(tuple(blocks[i][j] for j in argnums) for i in argnums)
    equal(hessian(f, argnums)(X, Y), expected)


def test_hessian_of_a_pytree():
    result = hessian(lambda d: (d["a"] ** 2 * d["b"]).sum())({"a": X, "b": X * 2})
    zeros, cross = torch.zeros(3, 3, dtype=X.dtype), torch.diag(2 * X)
    equal(result, {"a": {"a": torch.diag(4 * X), "b": cross}, "b": {"a": cross, "b": zeros}})


def test_hessian_of_several_outputs():
    first, second = hessian(lambda x: ((x**3).sum(), x**2))(X)
    equal(first, torch.diag(6 * X))
    expected = torch.zeros(3, 3, 3, dtype=X.dtype)
    for i in range(3):
        expected[i, i, i] = 2
    equal(second, expected)


@pytest.mark.parametrize("outer", [jacrev, jacfwd])
@pytest.mark.parametrize("inner", [jacrev, jacfwd])
def test_every_way_to_a_hessian(outer, inner):
    f = lambda x: (x.sin() * x.sum() ** 2).sum()
    equal(outer(inner(f))(X), hessian_by_autograd(f, X)[0][0])


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_real_dtypes(jacobian, dtype):
    x = X.to(dtype)
    result = jacobian(lambda x: x * x)(x)
    assert result.dtype == dtype
    equal(result, torch.diag(2 * x))
    assert hessian(lambda x: (x * x).sum())(x).dtype == dtype


@BOTH
def test_inputs_of_two_dtypes(jacobian):
    a, b = jacobian(lambda x, y: x.double() * y, (0, 1))(X.float(), X)
    # Reverse mode counts in the input's dtype, forward mode in the output's, as in torch.func.
    assert a.dtype == (torch.float32 if jacobian is jacrev else torch.float64)
    equal(a.float(), torch.diag(X).float())
    equal(b, torch.diag(X.float().double()))


Z = torch.complex(numbers(3), numbers(3, seed=1))
HOLOMORPHIC = {
    "square": (lambda z: z**2, lambda z: 2 * z),
    "exp": (torch.exp, torch.exp),
    "sin": (torch.sin, torch.cos),
    "reciprocal": (torch.reciprocal, lambda z: -1 / z**2),
    "multiple": (lambda z: (2 + 3j) * z, lambda z: torch.full_like(z, 2 + 3j)),
    "two conjugations": (lambda z: (z.conj() ** 2).conj(), lambda z: 2 * z),
}


@BOTH
@pytest.mark.parametrize("name", HOLOMORPHIC)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_holomorphic_functions(jacobian, name, chunk_size):
    function, derivative = HOLOMORPHIC[name]
    equal(jacobian(function, chunk_size=chunk_size)(Z).resolve_conj(), torch.diag(derivative(Z)))


def test_second_derivative_of_a_holomorphic_function():
    z = Z[0]
    for outer in (jacrev, jacfwd):
        for inner in (jacrev, jacfwd):
            equal(outer(inner(lambda z: z**3))(z).resolve_conj(), 6 * z)


@BOTH
def test_complex_linear_map(jacobian):
    a = torch.complex(numbers(2, 3, seed=3), numbers(2, 3, seed=4))
    equal(jacobian(lambda z: a @ z)(Z).resolve_conj(), a)


@BOTH
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_complex_functions_of_real_inputs(jacobian, chunk_size):
    result = jacobian(lambda x: torch.exp(2j * x) + x, chunk_size=chunk_size)(X)
    equal(result, torch.diag(2j * torch.exp(2j * X) + 1))


@BOTH
def test_complex_and_real_outputs_of_a_real_input(jacobian):
    a, b = jacobian(lambda x: (x.sin(), 1j * x**2))(X)
    equal(a, torch.diag(X.cos()))
    equal(b, torch.diag(2j * X))


@BOTH
def test_complex_output_of_a_real_and_a_complex_input(jacobian):
    a, b = jacobian(lambda x, z: x * z, (0, 1))(X, Z)
    equal(a, torch.diag(Z))
    equal(b.resolve_conj(), torch.diag(X + 0j))


@BOTH
@pytest.mark.parametrize("function", [torch.abs, torch.real, torch.angle])
def test_real_functions_of_complex_inputs_are_refused(jacobian, function):
    with pytest.raises(ValueError, match=r"real output \(torch.float64\) of a complex input \(torch.complex128\)"):
        jacobian(function)(Z)
    assert fl.level_depth() == 0


def test_randomness_of_forward_mode():
    f = lambda x: x * torch.rand(3, dtype=x.dtype)
    with pytest.raises(RuntimeError, match="randomness"):
        jacfwd(f)(X)
    torch.manual_seed(0)
    result = jacfwd(f, randomness="same")(X)
    torch.manual_seed(0)
    equal(result, torch.diag(torch.rand(3, dtype=X.dtype)))
    rows = jacfwd(lambda x: x.sum() * torch.rand(3, dtype=x.dtype), randomness="different")(X)
    assert not torch.equal(rows[:, 0], rows[:, 1])


def test_inputs_that_require_grad_stay_connected():
    for jacobian in (jacrev, jacfwd):
        x = X.clone().requires_grad_()
        (second,) = torch.autograd.grad(jacobian(lambda x: x**3)(x).sum(), x)
        equal(second, 6 * X)


@BOTH
def test_jacobians_of_a_batch(jacobian):
    batch = numbers(5, 3)
    equal(vmap(jacobian(mixed), in_dims=(0, None))(batch, Y), torch.stack([row_by_row(mixed, x, Y)[0] for x in batch]))


# The calls that torch.func knows too, where its semantics are right.
SHARED = {
    "grad": lambda t: t.grad(lambda x: (x.sin() * x).sum())(X),
    "grad argnums": lambda t: t.grad(lambda x, y: mixed(x, y).sum(), argnums=(0, 1))(X, Y),
    "grad aux": lambda t: t.grad(lambda x: (x.exp().sum(), x * 2), has_aux=True)(X),
    "grad_and_value": lambda t: t.grad_and_value(lambda x: (x**3).sum())(X),
    "grad_and_value aux": lambda t: t.grad_and_value(lambda x: ((x**3).sum(), [x]), has_aux=True)(X),
    "grad kwargs": lambda t: t.grad(lambda x, *, w: (x * w).sum())(X, w=X),
    "vjp": lambda t: t.vjp(mixed, X, Y)[1](mixed(X, Y)),
    "vjp aux": lambda t: t.vjp(lambda x: (x.sin(), x), X, has_aux=True)[2],
    "vjp several": lambda t: t.vjp(lambda x: (x.sin(), x.exp()), X)[1]((X, X)),
    "jvp": lambda t: t.jvp(mixed, (X, Y), (X, Y)),
    "jvp aux": lambda t: t.jvp(lambda x: (x.sin(), {"x": x}), (X,), (X,), has_aux=True),
    "jvp strict": lambda t: t.jvp(torch.sin, (X,), (X,), strict=True),
    "vmap": lambda t: t.vmap(torch.dot)(M, M),
    "vmap in_dims": lambda t: t.vmap(torch.mul, in_dims=(1, None), out_dims=1)(M, M[:, 0]),
    "vmap dict": lambda t: t.vmap(lambda d: d["a"] @ d["b"], in_dims=({"a": 0, "b": None},))({"a": M, "b": X}),
    "vmap chunks": lambda t: t.vmap(torch.sin, out_dims=-1, chunk_size=2)(numbers(5, 2)),
    "vmap grad": lambda t: t.vmap(t.grad(lambda x: x.sin().sum()))(M),
    "jacrev": lambda t: t.jacrev(mixed, argnums=(0, 1))(X, Y),
    "jacrev chunks": lambda t: t.jacrev(mixed, chunk_size=2)(X, Y),
    "jacrev aux": lambda t: t.jacrev(lambda x: (x.sin(), x), has_aux=True)(X),
    "jacfwd": lambda t: t.jacfwd(mixed, argnums=(0, 1))(X, Y),
    "jacfwd aux": lambda t: t.jacfwd(lambda x: ({"s": x.sin()}, x), has_aux=True)(X),
    "jacfwd randomness": lambda t: t.jacfwd(mixed, argnums=1, randomness="same")(X, Y),
    "hessian": lambda t: t.hessian(lambda x: mixed(x, Y).sum())(X),
    "hessian argnums": lambda t: t.hessian(lambda x, y: mixed(x, y).sum(), argnums=(0, 1))(X, Y),
}


@pytest.mark.parametrize("name", SHARED)
def test_same_result_as_torch_func(name):
    import torch.func

    ours, theirs = SHARED[name](fl), SHARED[name](torch.func)
    assert pytree.tree_structure(ours) == pytree.tree_structure(theirs)
    equal(pytree.tree_leaves(ours), pytree.tree_leaves(theirs))


def test_the_definitions_in_terms_of_each_other():
    f = lambda x: mixed(x, Y).reshape(-1)
    matrix = jacrev(f)(X)
    equal(matrix @ X, jvp(f, (X,), (X,))[1])
    equal(matrix.sum(0), vjp(f, X)[1](torch.ones(12, dtype=X.dtype))[0])
    equal(matrix.sum(0), grad(lambda x: f(x).sum())(X))
