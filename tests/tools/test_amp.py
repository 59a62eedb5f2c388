"""Autocast and GradScaler around and inside of transforms, beside eager PyTorch."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from functorch_lite import functional_call, grad, hvp, jacrev, jit, jvp, vjp, vmap

bf16 = lambda: torch.autocast("cpu", torch.bfloat16)
nothing = contextlib.nullcontext


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))


@pytest.mark.parametrize(("outside", "inside"), [(bf16, nothing), (nothing, bf16), (bf16, bf16)])
@pytest.mark.parametrize("compile_it", [False, True])
def test_per_example_gradients(outside, inside, compile_it):
    """Dtypes and numbers of a loop; the gradients have the parameters' dtype."""
    net = _net()
    params, xs = {name: p.detach() for name, p in net.named_parameters()}, torch.rand(4, 3)
    dtypes = []

    def loss(params, x):
        with inside():
            output = functional_call(net, params, x)
            dtypes.append(output.dtype)
            return output.float().square().sum()

    with outside():
        found = vmap(grad(loss), in_dims=(None, 0))
        found = (jit(found) if compile_it else found)(params, xs)
    assert set(dtypes) == {torch.bfloat16}
    rows = []
    for x in xs:
        net.zero_grad()
        with outside():
            loss(dict(net.named_parameters()), x).backward()
        rows.append({name: p.grad.clone() for name, p in net.named_parameters()})
    for name in params:
        assert found[name].dtype == torch.float32
        assert_close(found[name], torch.stack([row[name] for row in rows]), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_dtypes_of_every_transform(where):
    a, b = torch.rand(3, 3), torch.rand(3, 3)
    pulled = (a @ b) @ b.T

    def product(a):
        with bf16() if where == "inside" else nothing():
            return a @ b

    with bf16() if where == "outside" else nothing():
        expected = product(a)
        assert expected.dtype == torch.bfloat16
        assert vmap(product)(a[None]).dtype == torch.bfloat16
        output, vjp_fn = vjp(product, a)
        assert output.dtype == torch.bfloat16
        assert vjp_fn(output)[0].dtype == torch.float32
        assert_close(vjp_fn(output)[0], pulled, atol=0.05, rtol=0.05)
        output, tangent = jvp(product, (a,), (a,))
        assert (output.dtype, tangent.dtype) == (torch.bfloat16, torch.bfloat16)
        assert_close(tangent, expected, atol=0.05, rtol=0.05)
        assert jacrev(product)(a).dtype == torch.float32
        assert_close(vmap(product)(a[None])[0], expected)


def test_a_region_without_autocast_inside():
    a = torch.rand(3, 3)

    def mixed(a):
        with torch.autocast("cpu", enabled=False):
            first = a @ a
        return first, a @ a

    with bf16():
        first, second = vmap(mixed)(a[None])
    assert first.dtype == torch.float32
    assert second.dtype == torch.bfloat16
    assert_close(first[0], a @ a)


def test_second_derivatives():
    w, v = torch.rand(3, 3), torch.rand(3, 3)
    loss = lambda w: (w @ w).float().sin().sum()
    with bf16():
        _, (found,) = hvp(loss, (w,), (v,))
    _, (expected,) = hvp(loss, (w,), (v,))
    assert found.dtype == torch.float32
    assert_close(found, expected, atol=0.3, rtol=0.1)


def test_the_cache_of_casts_does_not_keep_levels():
    """Autocast caches casts of parameters; inside a level those would be wrappers."""
    layer, x = nn.Linear(3, 3), torch.rand(2, 3)
    with bf16():
        params = dict(layer.named_parameters())
        first = grad(lambda p: functional_call(layer, p, x).float().sum())(params)
        plain = layer(x)
        second = grad(lambda p: functional_call(layer, p, x).float().sum())(params)
        plain.float().sum().backward()
    assert_close(first, second)
    assert_close(layer.weight.grad, first["weight"])


def test_grad_scaler():
    """Scaled gradients are unscaled, a step with an infinite one is left out."""
    net = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, params = torch.rand(4, 3), dict(net.named_parameters())
    for factor, is_taken in ((1.0, True), (torch.inf, False)):
        before = {name: p.detach().clone() for name, p in params.items()}
        loss = lambda p, factor=factor: functional_call(net, p, x).square().mean() * factor
        gradients = grad(lambda p: scaler.scale(loss(p)))(params)
        for name, p in params.items():
            p.grad = gradients[name]
        scaler.step(optimizer)
        scaler.update()
        if is_taken:
            plain = grad(loss)(before)
            assert_close(params, {name: (before[name] - 0.1 * plain[name]).requires_grad_() for name in before})
        else:
            assert_close({name: p.detach() for name, p in params.items()}, before)
            assert scaler.get_scale() == 512.0
