"""Products with identity matrices are left out, and nothing else is."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from functorch_lite import hessian, jacfwd, jacrev, vmap
from functorch_lite.compile import aot_function, inductor
from functorch_lite.compile._folding import products_with_identities

aten = torch.ops.aten


def eye(n=3):
    return torch.eye(n, dtype=torch.float64)


X = torch.randn(3, 4, dtype=torch.float64)
STACK = torch.randn(5, 3, 4, dtype=torch.float64)

IDENTITIES = {
    "left": (lambda x: eye() @ x, X),
    "right": (lambda x: x @ eye(4), X),
    "transposed and added to zeros": (lambda x: (eye().T + torch.zeros_like(x)[:, :1]) @ x, X),
    "a column of identities": (lambda x: eye().expand(5, 3, 3).reshape(15, 3) @ x, X),
    "one for each of a batch": (lambda x: torch.bmm(eye().expand(5, 3, 3), x), STACK),
    "columns for each of a batch": (lambda x: torch.bmm(eye().repeat(5, 2, 1), x), STACK),
    "right of a batch": (lambda x: torch.bmm(x, eye(4).expand(5, 4, 4)), STACK),
    "written by hand": (lambda x: (torch.arange(3)[:, None] == torch.arange(3)).double() @ x, X),
}
OTHERS = {
    "twice the identity": (lambda x: 2 * eye() @ x, X),
    "wide": (lambda x: torch.eye(2, 3, dtype=torch.float64) @ x, X),
    "a column on the right": (lambda x: x[:, :1] @ torch.ones(1, 1, dtype=torch.float64).expand(1, 4), X),
    "tall on the right": (lambda x: x @ eye(2).repeat(2, 1), X),
    "reversed": (lambda x: eye().flip(0) @ x, X),
    "random": (lambda x: torch.bernoulli(eye()) @ x, X),
    "of inputs": (lambda x: (x @ x.T) @ x, X),
}


@pytest.mark.parametrize(("f", "x"), IDENTITIES.values(), ids=IDENTITIES)
def test_finds_identities(f, x):
    ((node, product),) = products_with_identities(make_fx(f)(x).graph).items()
    left, right = (argument.meta["val"] for argument in node.args)
    unread = torch.empty(left.shape if right.shape == x.shape else right.shape)
    factors = (unread, x) if right.shape == x.shape else (x, unread)
    assert_close(product(*factors), f(x), rtol=0, atol=0)


@pytest.mark.parametrize(("f", "x"), OTHERS.values(), ids=OTHERS)
def test_leaves_others(f, x):
    assert not products_with_identities(make_fx(f)(x).graph)


def test_zeros_of_an_identity_meet_infinities():
    x = torch.tensor([[1.0, torch.inf], [torch.nan, 2.0]])
    f = lambda x: [torch.eye(2) @ x]
    assert_close(inductor(make_fx(f)(x), [x])([x])[0], x, equal_nan=True)


def test_results_are_no_inputs():
    x = torch.randn(3, 3)
    f = lambda x: [torch.eye(3) @ x, x @ torch.eye(3)]
    first, second = inductor(make_fx(f)(x), [x])([x])
    first.zero_()
    assert_close(second, x)
    second.zero_()
    assert x.abs().sum() > 0


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
def test_derivatives(transform):
    w, xs = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)

    def f(w, x):
        return w.T @ torch.tanh(w @ x)

    left_out = []

    def compiler(gm, inputs):
        left_out.extend(products_with_identities(gm.graph))
        return inductor(gm, inputs)

    mapped = vmap(transform(f, 1), (None, 0))
    assert_close(aot_function(mapped, compiler)(w, xs), mapped(w, xs))
    assert left_out
