"""Derivatives of special functions that PyTorch takes to be constant, against finite differences."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from functorch_lite import grad, hessian, jvp, vmap

special = torch.special
FUNCTIONS = {
    **{
        name: getattr(special, name)
        for name in (
            "bessel_j0",
            "bessel_j1",
            "bessel_y0",
            "bessel_y1",
            "modified_bessel_i0",
            "modified_bessel_i1",
            "modified_bessel_k0",
            "modified_bessel_k1",
            "scaled_modified_bessel_k0",
            "scaled_modified_bessel_k1",
        )
    },
    **{f"hermite_h {n}": partial(special.hermite_polynomial_h, n=n) for n in (0, 1, 3)},
    **{f"hermite_he {n}": partial(special.hermite_polynomial_he, n=torch.tensor(float(n))) for n in (0, 1, 3)},
}


def differences(f, x, h=1e-4):
    return (8 * (f(x + h) - f(x - h)) - (f(x + 2 * h) - f(x - 2 * h))) / (12 * h)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_to_third_order(name):
    f = FUNCTIONS[name]
    x = torch.tensor([0.7, 1.5, 2.5], dtype=torch.float64)
    first, second = vmap(grad(f)), vmap(hessian(f))
    equal = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)
    equal(first(x), differences(f, x))
    equal(jvp(f, (x,), (torch.ones_like(x),))[1], differences(f, x))
    equal(second(x), differences(first, x))
    equal(vmap(grad(grad(f)))(x), second(x))
    equal(vmap(grad(hessian(f)))(x), differences(second, x))


@pytest.mark.parametrize(("name", "third"), [("bessel_j1", -0.375), ("modified_bessel_i1", 0.375), ("i1", 0.375)])
def test_at_zero(name, third):
    f = getattr(special, name)
    for order, expected in enumerate([0.0, 0.5, 0.0, third, 0.0]):
        torch.testing.assert_close(f(torch.tensor(0.0)), torch.tensor(expected), msg=f"derivative {order}")
        f = grad(f)
