"""Functions with derivatives of their own inside activation checkpoints: against the same without checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from functorch_lite import custom_jvp, custom_vjp, grad, hessian, jvp, vmap


class Product(Function):
    """x * exp(x), which saves an intermediate: a constant for second derivatives."""

    @staticmethod
    def forward(ctx, x):
        power = x.exp()
        ctx.save_for_backward(x, power)
        return x * power

    @staticmethod
    def backward(ctx, g):
        x, power = ctx.saved_tensors
        return g * (power + x * power)


@custom_vjp
def tripled_vjp(x):
    return x * x


tripled_vjp.defvjp(lambda x: (x * x, x), lambda x, g: (3 * x * g,))


@custom_jvp
def tripled_jvp(x):
    return x * x


tripled_jvp.defjvp(lambda primals, tangents: (primals[0] ** 2, 3 * primals[0] * tangents[0]))


def checkpointed(f):
    return lambda *args: checkpoint(f, *args, use_reentrant=False)


def summed(f):
    return lambda x: f(x).sum()


def push(f):
    return lambda x: jvp(f, (x,), (x.cos(),))[1]


COMPOSITIONS = {
    "grad(c(f))": lambda f, c: grad(summed(c(f))),
    "grad(c(grad(f)))": lambda f, c: grad(summed(c(grad(summed(f))))),
    "grad(c(vmap(grad(f))))": lambda f, c: grad(summed(c(vmap(grad(f))))),
    "jvp(c(f))": lambda f, c: push(c(f)),
    "jvp(c(grad(f)))": lambda f, c: push(c(grad(summed(f)))),
    "grad(c(jvp(f)))": lambda f, c: grad(summed(c(push(f)))),
    "grad(vmap(c(f)))": lambda f, c: grad(summed(vmap(c(f)))),
    "vmap(grad(c(f)))": lambda f, c: vmap(grad(c(f))),
    "grad(grad(c(f)))": lambda f, c: grad(summed(grad(summed(c(f))))),
    "hessian(c(f))": lambda f, c: hessian(summed(c(f))),
    "grad(c(c(f)))": lambda f, c: grad(summed(c(c(f)))),
}


@pytest.fixture
def x():
    return torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)


@pytest.mark.parametrize("f", [Product.apply, tripled_vjp, tripled_jvp], ids=["Function", "custom_vjp", "custom_jvp"])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_as_without_checkpoint(name, f, x):
    compose = COMPOSITIONS[name]
    torch.testing.assert_close(compose(f, checkpointed)(x), compose(f, lambda f: f)(x))


class Squared(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        ctx.save_for_backward(x.clone())
        return x.mul_(x)

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


@pytest.mark.parametrize("uses_result", [True, False])
def test_in_place(uses_result, x):
    def f(x):
        y = x * 2
        z = Squared.apply(y)
        return y.sin() + z if uses_result else y.sin()

    expected = (4 * x * x).cos() * 8 * x + 8 * x * uses_result
    torch.testing.assert_close(grad(summed(checkpointed(f)))(x), expected)
    torch.testing.assert_close(push(checkpointed(f))(x), expected * x.cos())


class Unreturned(Function):
    @staticmethod
    def forward(ctx, x, y):
        y.mul_(2)
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return 2 * g, None


def test_messages(x):
    closing = lambda x: _closing_over(x * 2)(x)
    with pytest.raises(ValueError, match=r"checkpoint: custom_vjp function .*is no differentiated argument.*detach"):
        grad(summed(checkpointed(closing)))(x)
    unreturned = lambda x: Unreturned.apply(x, x * 2)
    with pytest.raises(
        NotImplementedError, match=r"checkpoint: .*Unreturned writes in place .*\[?3.*mark_dirty.*clone"
    ):
        grad(summed(checkpointed(unreturned)))(x)


def _closing_over(v):
    f = custom_vjp(lambda x: x * v)
    f.defvjp(lambda x: (x * v, None), lambda _, g: (g * v,))
    return f
