"""make_fx sees through the transforms: what it records are the operators that run, and no wrapper."""

from __future__ import annotations

import operator

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from functorch_lite import _C, functional_call, grad, hessian, jacfwd, jacrev, jvp, make_fx, vjp, vmap

MODES = ["real", "fake", "symbolic"]


def _elementwise(x):
    return x.sin() * x.exp()


def _scalar(x):
    return (x.sin() * x).sum()


def _pull(x):
    y, vjp_fn = vjp(_elementwise, x)
    return vjp_fn(y)[0]


TRANSFORMS = {
    "vmap": vmap(_elementwise),
    "grad": grad(_scalar),
    "vmap_grad": vmap(grad(_scalar)),
    "vjp": _pull,
    "jvp": lambda x: jvp(_elementwise, (x,), (x.cos(),))[1],
    "jacrev": jacrev(lambda x: _elementwise(x).sum(0)),
    "jacfwd": jacfwd(lambda x: _elementwise(x).sum(0)),
    "hessian": hessian(_scalar),
}


def _check_graph(traced):
    for node in traced.graph.nodes:
        if node.op == "call_function":
            is_aten = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"
            # Arithmetic of symbolic sizes is Python's.
            assert is_aten or node.target is operator.getitem or node.target.__module__ == "_operator", (
                node.format_node()
            )
        elif node.op == "get_attr":
            assert not _C.is_wrapper(getattr(traced, node.target))
        else:
            assert node.op in ("placeholder", "output")
    tensors = [*traced.parameters(), *traced.buffers()]
    tensors += [value for value in vars(traced).values() if isinstance(value, torch.Tensor)]
    assert not any(_C.is_wrapper(tensor) for tensor in tensors)


def _random(*sizes):
    return torch.rand(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(sizes)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_traced_transform(name, mode):
    f = TRANSFORMS[name]
    traced = make_fx(f, tracing_mode=mode)(torch.ones(2, 3, dtype=torch.float64))
    _check_graph(traced)
    for sizes in [(2, 3)] + [(5, 4), (3, 7)] * (mode == "symbolic"):
        x = _random(*sizes)
        torch.testing.assert_close(traced(x), f(x))
    assert _C.level_depth() == 0


@pytest.mark.parametrize("mode", MODES)
def test_hessian_of_a_network(mode):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    params = {name: p.detach() for name, p in net.named_parameters()}
    f = lambda params, x: hessian(lambda x: functional_call(net, params, (x,)).sum())(x)  # noqa: E731
    traced = make_fx(f, tracing_mode=mode)(params, _random(3))
    _check_graph(traced)
    other = {name: p * 0.5 for name, p in params.items()}
    x = _random(3) * 2
    torch.testing.assert_close(traced(other, x), f(other, x))


def test_small_graph():
    traced = make_fx(vmap(grad(lambda x: (x.sin() * 2).sum())))(torch.ones(2, 3))
    assert_expected_inline(
        traced.code.strip(),
        """\
def forward(self, x_1):
    sin = torch.ops.aten.sin.default(x_1)
    mul = torch.ops.aten.mul.Tensor(sin, 2);  sin = None
    sum_1 = torch.ops.aten.sum.dim_IntList(mul, [1]);  mul = None
    ones_like = torch.ops.aten.ones_like.default(sum_1, pin_memory = False);  sum_1 = None
    unsqueeze = torch.ops.aten.unsqueeze.default(ones_like, 1);  ones_like = None
    expand = torch.ops.aten.expand.default(unsqueeze, [2, 3]);  unsqueeze = None
    mul_1 = torch.ops.aten.mul.Tensor(expand, 2);  expand = None
    cos = torch.ops.aten.cos.default(x_1);  x_1 = None
    mul_2 = torch.ops.aten.mul.Tensor(mul_1, cos);  mul_1 = cos = None
    return mul_2""",
    )
