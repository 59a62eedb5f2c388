"""custom_vjp and custom_jvp: which derivative is used at which level, and what the rules may be."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.autograd import Function

from functorch_lite import custom_jvp, custom_vjp, grad, hessian, jacfwd, jacrev, vjp, vmap
from tests.support.nesting import COMPOSITIONS, OURS, REFERENCE, compose

DOUBLE = torch.float64


@pytest.fixture
def x():
    return torch.tensor([0.4, 1.3, -0.8], dtype=DOUBLE)


def vjp_square(residuals=lambda x: x):
    """x^2 with the derivative 3 times a residual."""
    square = custom_vjp(lambda x: x * x)
    square.defvjp(lambda x: (square(x), residuals(x)), lambda r, g: (3 * r * g,))
    return square


def jvp_square():
    square = custom_jvp(lambda x: x * x)

    @square.defjvp
    def rule(primals, tangents):
        (x,), (t,) = primals, tangents
        return square(x), 3 * x * t

    return square


def torch_square(residuals=lambda x: x):
    """The same in PyTorch: the residuals are computed from the argument, and so differentiated."""

    class Square(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            return 3 * residuals(*ctx.saved_tensors) * g

    return Square.apply


def sines_by_vjp():
    """Two arguments in a dictionary and two outputs, with the true derivative."""

    @custom_vjp
    def f(args, power):
        return {"product": args["a"] * args["b"].sin() ** power}, [args["a"] + args["b"]]

    def fwd(args, power):
        return f(args, power), {"args": args, "power": power}

    def bwd(residuals, cotangents):
        a, b, n = residuals["args"]["a"], residuals["args"]["b"], residuals["power"]
        g, (h,) = cotangents[0]["product"], cotangents[1]
        return {"a": g * b.sin() ** n + h, "b": g * a * n * b.sin() ** (n - 1) * b.cos() + h}, None

    f.defvjp(fwd, bwd)
    return f


def sines_by_jvp():
    @custom_jvp
    def f(args, power):
        return {"product": args["a"] * args["b"].sin() ** power}, [args["a"] + args["b"]]

    @f.defjvp
    def rule(primals, tangents):
        (args, n), (t, none) = primals, tangents
        assert none is None
        a, b = args["a"], args["b"]
        product = t["a"] * b.sin() ** n + a * n * b.sin() ** (n - 1) * b.cos() * t["b"]
        return f(args, n), ({"product": product}, [t["a"] + t["b"]])

    return f


def of_vector(f):
    def call(x):
        output, (total,) = f({"a": x, "b": x.exp()}, power=2)
        return output["product"] + total**2

    return call


def plain_sines(args, power):
    return {"product": args["a"] * args["b"].sin() ** power}, [args["a"] + args["b"]]


CASES = {
    "vjp": (vjp_square(), torch_square()),
    "vjp, residual of ops": (vjp_square(torch.sin), torch_square(torch.sin)),
    "jvp": (jvp_square(), torch_square()),
    "vjp, pytrees": (of_vector(sines_by_vjp()), of_vector(plain_sines)),
    "jvp, pytrees": (of_vector(sines_by_jvp()), of_vector(plain_sines)),
}


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_nested_autograd(case, composition, x):
    ours, reference = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compose(composition, OURS, ours)(x)
    torch.testing.assert_close(result, compose(composition, REFERENCE, reference)(x))


@pytest.mark.parametrize("case", CASES)
def test_outside_of_transforms(case, x):
    ours, reference = CASES[case]
    torch.testing.assert_close(compose("grad∘grad", REFERENCE, ours)(x), compose("grad∘grad", REFERENCE, reference)(x))
    # Mapped, and differentiated by plain autograd twice, when the vmap is closed.
    mapped = lambda f: lambda v: f(torch.stack([v, 2 * v])).sum(0)
    torch.testing.assert_close(
        compose("grad∘grad", REFERENCE, mapped(vmap(ours)))(x),
        compose("grad∘grad", REFERENCE, mapped(REFERENCE.vmap(reference)))(x),
    )


@pytest.mark.parametrize("make", [vjp_square, jvp_square])
def test_jacobians(make, x):
    square = make()
    torch.testing.assert_close(jacrev(square)(x), torch.diag(3 * x))
    torch.testing.assert_close(jacfwd(square)(x), torch.diag(3 * x))
    torch.testing.assert_close(hessian(lambda x: square(x).sum())(x), 3 * torch.eye(3, dtype=DOUBLE))
    torch.testing.assert_close(vjp(square, x)[0], x * x)


def test_each_level_uses_the_rule_or_differentiates_it(x):
    """`fwd` computes the value itself: it is plain code for the level outside, whose derivative is 2x."""
    square = custom_vjp(lambda x: x * x)
    square.defvjp(lambda x: (x * x, x), lambda x, g: (3 * x * g,))
    value_of_inner = lambda x: vjp(square, x)[0].sum()
    torch.testing.assert_close(grad(value_of_inner)(x), 2 * x)
    torch.testing.assert_close(grad(lambda x: vjp(vjp_square(), x)[0].sum())(x), 3 * x)
