"""Equations that hold between the transforms, and two levels whose values meet."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from functorch_lite import grad, jacfwd, jacrev, jvp, vjp, vmap
from tests.support.functions import FUNCTIONS

every_function = pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS.keys())


def _close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


def _random(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(sizes, dtype=torch.float64, generator=generator) * 0.8 + 0.2


@every_function
def test_forward_and_reverse_jacobians_agree(f):
    x = _random(2)
    _close(jacfwd(f)(x), jacrev(f)(x))


@every_function
def test_vjp_is_linear(f):
    y, vjp_fn = vjp(f, _random(2))
    u, v = _random(*y.shape, seed=1), _random(*y.shape, seed=2)
    _close(vjp_fn(2 * u - 3 * v)[0], 2 * vjp_fn(u)[0] - 3 * vjp_fn(v)[0])


@every_function
def test_pushing_and_pulling_are_adjoint(f):
    x, t = _random(2), _random(2, seed=1)
    y, pushed = jvp(f, (x,), (t,))
    v = _random(*y.shape, seed=2)
    _close((v * pushed).sum(), (vjp(f, x)[1](v)[0] * t).sum())


@every_function
def test_gradient_of_a_sum_over_examples(f):
    xs = _random(3, 2)
    of_one = lambda x: f(x).sum()  # noqa: E731
    _close(grad(lambda xs: vmap(of_one)(xs).sum())(xs), vmap(grad(of_one))(xs))


@every_function
def test_mapped_dimension_can_be_anywhere(f):
    xs = _random(2, 3)
    _close(vmap(f, in_dims=1)(xs), vmap(f)(xs.movedim(1, 0)))
    _close(vmap(f, in_dims=-1, out_dims=-1)(xs), vmap(f)(xs.movedim(-1, 0)).movedim(0, -1))


@every_function
def test_nested_vmap_is_vmap_of_a_flattened_batch(f):
    xs = _random(3, 4, 2)
    _close(vmap(vmap(f))(xs), vmap(f)(xs.flatten(0, 1)).unflatten(0, (3, 4)))


# Each maps a function of x[2] to y[] into one of x[2, 2], a batch for vmap, rows that are added for the others.
LEVELS = {
    "vmap": (vmap, lambda f: lambda x: torch.stack([f(row) for row in x])),
    "grad": (lambda f: grad(lambda x: f(x[0]) + f(x[1])), lambda f: lambda x: _reference_grad(f, x)),
    "jvp": (
        lambda f: lambda x: jvp(lambda x: f(x[0]) + f(x[1]), (x,), (torch.ones_like(x),))[1],
        lambda f: lambda x: _reference_grad(f, x).sum(),
    ),
}


def _reference_grad(f, x):
    x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
    return torch.autograd.grad(f(x[0]) + f(x[1]), x, create_graph=True)[0]


@pytest.mark.parametrize(("outer", "inner"), list(product(LEVELS, repeat=2)))
def test_values_of_two_levels_meet(outer, inner):
    fresh = _random(2, 2, seed=3)

    def function(side):
        def of_outer(x):
            of_inner = lambda y: (x * y.sin() + (x.exp() @ y) * x.cumsum(0) + y**2 * x.prod()).sum()  # noqa: E731
            return LEVELS[inner][side](of_inner)(fresh).sum() * x.sum()

        return LEVELS[outer][side](of_outer)

    x = _random(2, 2)
    _close(function(0)(x), function(1)(x).detach())
