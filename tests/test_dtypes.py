"""The transforms in each floating-point and complex dtype, and on batches of no examples."""

from __future__ import annotations

import pytest
import torch

from functorch_lite import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

# f and its derivative; each acts on the entries of x[n] one by one, so the Jacobian is diagonal.
FUNCTIONS = {
    "sin": (torch.sin, torch.cos),
    "exp": (torch.exp, torch.exp),
    "cube": (lambda x: x * x * x, lambda x: 3 * x * x),
    "quotient": (lambda x: x / (x + 2), lambda x: 2 / (x + 2) ** 2),
    "tanh": (torch.tanh, lambda x: 1 - torch.tanh(x) ** 2),
}
REAL = [torch.float64, torch.float32, torch.bfloat16]
ALL = [*REAL, torch.complex128]
TOLERANCES = {torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2}}

every_function = pytest.mark.parametrize("name", FUNCTIONS)


def _close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCES.get(actual.dtype, {}))


def _sample(dtype):
    x = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    return (torch.complex(x, x.flip(0)) if dtype.is_complex else x).to(dtype)


@every_function
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_first_order(name, dtype):
    f, derivative = FUNCTIONS[name]
    x, v = _sample(dtype), _sample(dtype).flip(0)
    slope = derivative(x)
    _close(vmap(f)(x), f(x))
    _close(jvp(f, (x,), (v,))[1], slope * v)
    # PyTorch's convention: a pullback multiplies by the conjugate.
    _close(vjp(f, x)[1](v)[0], slope.conj() * v)
    _close(jacfwd(f)(x), torch.diag(slope))
    variable = x.clone().requires_grad_()
    _close(grad(lambda x: f(x).abs().sum())(x), torch.autograd.grad(f(variable).abs().sum(), variable)[0])
    rows = [torch.autograd.grad(y, variable, torch.ones_like(y), retain_graph=True)[0] for y in f(variable)]
    # The Jacobian of a holomorphic function is its complex derivative, in reverse mode too.
    _close(jacrev(f)(x), torch.stack(rows).conj().resolve_conj())


@every_function
@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_hessian(name, dtype):
    f, derivative = FUNCTIONS[name]
    x = _sample(dtype)
    variable = x.clone().requires_grad_()
    (second,) = torch.autograd.grad(derivative(variable).sum(), variable)
    _close(hessian(lambda x: f(x).sum())(x), torch.diag(second))


@every_function
def test_hessian_of_a_real_function_of_complex_numbers(name):
    f = FUNCTIONS[name][0]
    x, v = _sample(torch.complex128), _sample(torch.complex128).flip(0)
    slope = lambda x: grad(lambda x: f(x).abs().sum())(x)  # noqa: E731
    step = 1e-6
    expected = (slope(x + step * v) - slope(x - step * v)) / (2 * step)
    torch.testing.assert_close(jvp(slope, (x,), (v,))[1], expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="has no complex derivative"):
        hessian(lambda x: f(x).abs().sum())(x)


@every_function
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_no_examples(name, dtype):
    f = FUNCTIONS[name][0]
    total = lambda x: f(x).abs().sum()  # noqa: E731
    xs = torch.empty(0, 3, dtype=dtype)
    for result, sizes in [
        (vmap(f)(xs), (0, 3)),
        (vmap(grad(total))(xs), (0, 3)),
        (vmap(jacrev(f))(xs), (0, 3, 3)),
        (vmap(hessian(lambda x: f(x).sum()))(xs), (0, 3, 3)),
    ]:
        assert result.shape == sizes
        assert result.dtype == dtype
