"""Forward mode of common operators where the sweep of all operators does not look, against what is known."""

from __future__ import annotations

import math

import pytest
import torch
from measuring import peak_bytes
from torch.testing import assert_close

from functorch_lite import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

X = torch.tensor([0.3, 0.7, 1.2], dtype=torch.float64)
Y = torch.tensor([1.1, 0.4, 1.2], dtype=torch.float64)


def test_sinc_at_zero():
    zero = torch.zeros((), dtype=torch.float64)
    assert_close(jvp(torch.sinc, (zero,), (zero + 1,))[1], zero)
    assert_close(jacfwd(jacfwd(torch.sinc))(zero), torch.tensor(-(math.pi**2) / 3, dtype=torch.float64))


@pytest.mark.parametrize("choose", [torch.maximum, torch.minimum])
def test_equal_arguments_share_the_tangent(choose):
    ones = torch.ones_like(X)
    for tangents in ((ones, 0 * ones), (0 * ones, ones)):
        assert_close(jvp(choose, (X, Y), tangents)[1], vjp(choose, X, Y)[1](ones)[0 if tangents[0][0] else 1])


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, -1, 0.5, 2.0])
def test_powers(exponent):
    x = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    f = lambda x: x**exponent
    assert_close(jvp(f, (x,), (torch.ones_like(x),))[1], vmap(grad(f))(x))


@pytest.mark.parametrize(
    "f",
    [
        lambda a, b: a + b,
        lambda a, b: 2 - a * b,
        lambda a, b: torch.add(a, b, alpha=3),
        lambda a, b: torch.sub(b, a, alpha=0.5),
        lambda a, b: a / b,
        lambda a, b: torch.atan2(a, b),
        lambda a, b: torch.maximum(a, b),
    ],
)
@pytest.mark.parametrize("shapes", [((3,), (2, 3)), ((2, 1), (3,)), ((), (2, 2))])
def test_arguments_that_are_broadcast(f, shapes):
    a, b = (torch.rand(shape, dtype=torch.float64) + 0.5 for shape in shapes)
    assert_close(jacfwd(f, (0, 1))(a, b), jacrev(f, (0, 1))(a, b))
    assert_close(jacfwd(lambda a: f(a, b))(a), jacrev(lambda a: f(a, b))(a))
    assert_close(jacfwd(lambda b: f(a, b))(b), jacrev(lambda b: f(a, b))(b))


def test_dtypes_that_are_promoted():
    a, b = torch.rand(3), torch.rand(3, dtype=torch.float64)
    for f in (torch.add, torch.mul, torch.div, torch.atan2, torch.maximum):
        assert_close(jacfwd(lambda a, f=f: f(a, b))(a), jacfwd(lambda a, f=f: f(a, b))(a.double()), check_dtype=False)
        value, tangent = jvp(f, (a, b), (a, b))
        assert value.dtype == tangent.dtype == torch.float64


@pytest.mark.parametrize("f", [torch.tanh, torch.sigmoid, torch.sqrt, torch.tan, torch.exp])
def test_complex(f):
    z = torch.tensor([0.3 + 0.4j, -0.2 + 0.1j], dtype=torch.complex128)
    assert_close(jacfwd(f)(z), jacrev(f)(z))
    assert_close(jacfwd(f)(z.conj()), jacrev(f)(z.conj()))

    def first(z):
        return jacrev(f)(z).diagonal()

    assert_close(jacfwd(first)(z), jacrev(first)(z))


@pytest.mark.parametrize("f", [torch.add, torch.sub, torch.neg, torch.div])
def test_the_tangent_of_a_result_is_its_own(f):
    """A write into the result must not change the tangent of an argument."""

    def written(x):
        y = f(x) if f is torch.neg else f(x, 1)
        y.mul_(3)
        return x + y

    slope = {torch.add: 4.0, torch.sub: 4.0, torch.neg: -2.0, torch.div: 4.0}[f]
    assert_close(jvp(written, (X,), (torch.ones_like(X),))[1], torch.full_like(X, slope))


def test_results_that_are_written_into_below_reverse_mode():
    def written(x):
        y = x / Y
        y.mul_(x)
        z = torch.sinc(x)
        z.add_(y)
        return (z * torch.erfinv(x / 2)).sum()

    def plain(x):
        return ((torch.sinc(x) + x / Y * x) * torch.erfinv(x / 2)).sum()

    def slope(f):
        return lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]

    assert_close(grad(slope(written))(X), grad(slope(plain))(X))


@pytest.mark.parametrize("f", [torch.tanh, torch.sigmoid, torch.nn.functional.softplus, torch.relu])
def test_hessians_take_no_more_memory_than_those_of_torch_func(f):
    w = torch.randn(48, 48) / 7
    x = torch.randn(48)

    def loss(x):
        for _ in range(3):
            x = f(w @ x)
        return x.pow(2).sum()

    peaks = []
    for transform in (hessian, torch.func.hessian):
        transform(loss)(x)
        peaks.append(peak_bytes(lambda transform=transform: transform(loss)(x)))
    assert peaks[0] <= peaks[1]


def test_a_batch_in_one_argument():
    xs = torch.stack([X, Y])
    got = vmap(lambda x: jvp(lambda x: x * Y + Y / x, (x,), (Y,))[1])(xs)
    assert_close(got, torch.stack([jvp(lambda x: x * Y + Y / x, (x,), (Y,))[1] for x in xs]))
