"""torch.autograd.Function under transforms: its own derivative is used at every level, or a clear error is raised."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import Function

from functorch_lite import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

DOUBLE = torch.float64


class Tripled(Function):
    """x -> x^2 with a derivative that only it knows: 3x."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x * g

    @staticmethod
    def jvp(ctx, t):
        return 3 * ctx.saved_tensors[0] * t


class Scaled(Function):
    """(x, w, power) -> w * x^power with the derivatives 10 and 20."""

    @staticmethod
    def forward(x, w, power):
        return w * x**power, x + w

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, ctx.power = inputs
        ctx.save_for_backward(x, w, output[0])

    @staticmethod
    def backward(ctx, g, h):
        assert ctx.power == 2
        return 10 * g + h, 20 * g + h, None


class OldStyle(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] * g


@pytest.fixture
def x():
    return torch.tensor([0.5, 2.0, -1.0], dtype=DOUBLE)


@pytest.mark.parametrize("function", [Tripled, OldStyle])
def test_one_level(function, x):
    f = function.apply
    torch.testing.assert_close(grad(lambda x: f(x).sum())(x), 3 * x)
    torch.testing.assert_close(vmap(f)(x), x * x)
    torch.testing.assert_close(vmap(grad(f))(x), 3 * x)
    torch.testing.assert_close(jacrev(f)(x), torch.diag(3 * x))


def test_second_derivative_is_that_of_the_backward_pass(x):
    gradient = grad(lambda x: Tripled.apply(x).sum())
    torch.testing.assert_close(grad(lambda x: gradient(x).sum())(x), torch.full_like(x, 3))
    torch.testing.assert_close(hessian(lambda x: Tripled.apply(x).sum())(x), 3 * torch.eye(3, dtype=DOUBLE))


def test_value_of_an_inner_level_uses_the_derivative_at_the_outer(x):
    both = lambda x: vjp(Tripled.apply, x)[0].sum()
    torch.testing.assert_close(grad(both)(x), 3 * x)
    torch.testing.assert_close(grad(lambda x: vmap(Tripled.apply)(x).sum())(x), 3 * x)
    torch.testing.assert_close(grad(lambda x: vmap(vmap(Tripled.apply))(x[None]).sum())(x), 3 * x)
    weight = x.clone().requires_grad_()
    vmap(lambda i: Tripled.apply(weight * i))(torch.ones(2, dtype=DOUBLE)).sum().backward()
    torch.testing.assert_close(weight.grad, 6 * x)


def test_forward_mode(x):
    push = lambda f: lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(push(Tripled.apply)(x), 3 * x)
    torch.testing.assert_close(jacfwd(Tripled.apply)(x), torch.diag(3 * x))


def test_shared_arguments_and_constants(x):
    def loss(x, w):
        return sum(y.sum() for y in vmap(lambda x: Scaled.apply(x, w, 2), in_dims=0)(x))

    w = torch.tensor(3.0, dtype=DOUBLE)
    dx, dw = grad(loss, argnums=(0, 1))(x, w)
    torch.testing.assert_close(dx, torch.full_like(x, 11))
    torch.testing.assert_close(dw, torch.tensor(63.0, dtype=DOUBLE))


class ScaledIf(Function):
    """(x, None, w) -> w * x with the derivatives 10 w and 10 x."""

    @staticmethod
    def forward(x, nothing, w):
        assert nothing is None
        return w * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, nothing, w = inputs
        assert nothing is None
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 10 * g * w, None, 10 * g * x


def test_argument_that_is_none_under_vmap(x):
    w = torch.tensor(3.0, dtype=DOUBLE)
    dx, dw = grad(lambda x, w: vmap(lambda v: ScaledIf.apply(v, None, w))(x).sum(), argnums=(0, 1))(x, w)
    torch.testing.assert_close(dx, torch.full_like(x, 30))
    torch.testing.assert_close(dw, 10 * x.sum())


@pytest.mark.parametrize("function", [Tripled, OldStyle])
def test_call_that_no_batched_argument_reaches(function, x):
    w = torch.tensor(2.0, dtype=DOUBLE)
    inside = lambda w: vmap(lambda v: v * function.apply(w))(x).sum()
    torch.testing.assert_close(grad(inside)(w), 3 * w * x.sum())
    leaf = w.clone().requires_grad_()
    inside(leaf).backward()
    torch.testing.assert_close(leaf.grad, 3 * w * x.sum())


def test_old_style_at_several_levels_is_refused(x):
    with pytest.raises(NotImplementedError, match=r"OldStyle has forward\(ctx.*more than one level.*setup_context"):
        grad(lambda x: vmap(OldStyle.apply)(x).sum())(x)
