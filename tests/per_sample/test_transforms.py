"""Per-sample gradients under other transforms, in graphs, and next to plain autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import functorch_lite as fl

from .reference import loop, norms_of, parameters
from .test_models import MODELS


def _cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
    ).double()


def _batch(n=5):
    return torch.randn(n, 1, 4, 4, dtype=torch.double), torch.randint(3, (n,))


def _reference(model):
    """The same functions by vmap of grad."""

    def loss(params, x, target):
        return F.cross_entropy(fl.functional_call(model, params, x[None])[0], target)

    def gradients(params, batch):
        return fl.vmap(fl.grad(loss), (None, 0, 0))(params, *batch)

    return gradients


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _close(got, want):
    assert list(got) == list(want)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_jit():
    model, batch = _cnn(), _batch()
    params, expected = parameters(model), loop(model, F.cross_entropy, batch)
    gradients = fl.jit(fl.per_sample_grads(model, F.cross_entropy))
    sums = fl.jit(fl.clipped_grad_sum(model, F.cross_entropy, 0.5))
    for _ in range(2):
        _close(gradients(params, batch), expected)
        found, norms = sums(params, batch)
        torch.testing.assert_close(norms, norms_of(expected))
        weights = (0.5 / norms).clamp(max=1)
        _close(found, {name: torch.einsum("b,b...->...", weights, g) for name, g in expected.items()})


def test_jit_for_any_batch_size():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    sums = fl.jit(fl.clipped_grad_sum(model, F.cross_entropy, 0.5), dynamic=True)
    for size in (5, 7):
        batch = torch.randn(size, 4, dtype=torch.double), torch.randint(3, (size,))
        found, norms = sums(parameters(model), batch)
        expected = loop(model, F.cross_entropy, batch)
        torch.testing.assert_close(norms, norms_of(expected))
        weights = (0.5 / norms).clamp(max=1)
        _close(found, {name: torch.einsum("b,b...->...", weights, g) for name, g in expected.items()})


def test_jit_is_traced_from_calls():
    """The graph has one convolution for the weight of all examples, and no gradients that a norm does not need."""
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    sums = fl.clipped_grad_sum(model, F.cross_entropy, 0.5)
    graph = fl.trace(sums)(parameters(model), (torch.randn(5, 20, dtype=torch.double), torch.randint(3, (5,))))
    shapes = [
        tuple(node.meta["val"].shape) for node in graph.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)
    ]
    assert (5, 30, 20) not in shapes


def test_vmap_over_models():
    models, batch = [_cnn() for _ in range(3)], _batch()
    params, _ = fl.stack_module_state(models)
    params = {name: p.detach() for name, p in params.items()}
    found = fl.vmap(fl.per_sample_grads(models[0], F.cross_entropy), (0, None))(params, batch)
    norms = fl.vmap(fl.per_sample_grad_norms(models[0], F.cross_entropy), (0, None))(params, batch)
    for i, model in enumerate(models):
        expected = loop(model, F.cross_entropy, batch)
        _close({name: g[i] for name, g in found.items()}, expected)
        torch.testing.assert_close(norms[i], norms_of(expected))


def _penalty(gradients):
    return lambda params, batch: sum(
        (g.flatten(1).square().sum(1) ** 2).sum() for g in gradients(params, batch).values()
    )


def test_grad_and_jvp_of_gradients():
    model, batch = _cnn(), _batch()
    params = parameters(model)
    ways = {name: torch.randn_like(p) for name, p in params.items()}
    ours, theirs = _penalty(fl.per_sample_grads(model, F.cross_entropy)), _penalty(_reference(model))
    _close(fl.grad(ours)(params, batch), fl.grad(theirs)(params, batch))
    for f in (fl.per_sample_grads(model, F.cross_entropy),):
        _, got = fl.jvp(lambda params: f(params, batch), (params,), (ways,))
        _, want = fl.jvp(lambda params: _reference(model)(params, batch), (params,), (ways,))
        _close(got, want)


def test_grad_of_norms_and_sums():
    model, batch = _cnn(), _batch()
    params = parameters(model)
    norms = fl.per_sample_grad_norms(model, F.cross_entropy)
    sums = fl.clipped_grad_sum(model, F.cross_entropy, 0.5)
    reference = _reference(model)

    def clipped(params):
        gradients = reference(params, batch)
        weights = (0.5 / norms_of(gradients)).clamp(max=1)
        return sum((weights @ g.flatten(1)).square().sum() for g in gradients.values())

    _close(
        fl.grad(lambda params: norms(params, batch).sum())(params),
        fl.grad(lambda params: norms_of(reference(params, batch)).sum())(params),
    )
    _close(
        fl.grad(lambda params: sum(g.square().sum() for g in sums(params, batch)[0].values()))(params),
        fl.grad(clipped)(params),
    )


def test_plain_autograd_outside():
    model, batch = _cnn(), _batch()
    params = dict(model.named_parameters())
    gradients = fl.per_sample_grads(model, F.cross_entropy)
    value = sum(g.square().sum() for g in gradients(params, batch).values())
    got = torch.autograd.grad(value, list(params.values()))
    want = fl.grad(lambda params: sum(g.square().sum() for g in _reference(model)(params, batch).values()))(
        parameters(model)
    )
    for g, w in zip(got, want.values(), strict=True):
        torch.testing.assert_close(g, w)


def test_no_grad_outside_keeps_nothing():
    model, batch = _cnn(), _batch()
    params = dict(model.named_parameters())
    with torch.no_grad():
        found, norms = fl.clipped_grad_sum(model, F.cross_entropy, 0.5)(params, batch)
    assert not any(g.requires_grad for g in found.values())
    assert not norms.requires_grad


def test_detached_parameters_keep_nothing():
    """Though the model's own parameters require grad."""
    model, batch = _cnn(), _batch()
    params = {"4.weight": model[4].weight.detach()}
    found = fl.per_sample_grads(model, F.cross_entropy)(params, batch)
    assert list(found) == ["4.weight"]
    assert not found["4.weight"].requires_grad


def test_derivative_by_the_input():
    """Of the norms, as for an attack on the privacy of an example."""
    model, (x, target) = _cnn(), _batch()
    params = parameters(model)
    norms = fl.per_sample_grad_norms(model, F.cross_entropy)
    got = fl.grad(lambda x: norms(params, (x, target)).sum())(x)
    want = fl.grad(lambda x: norms_of(_reference(model)(params, (x, target))).sum())(x)
    torch.testing.assert_close(got, want)


def test_torch_compile_leaves_it_out():
    model, batch = _cnn(), _batch()
    sums = fl.clipped_grad_sum(model, F.cross_entropy, 0.5)
    step = torch.compile(lambda params, batch: sums(params, (batch[0] * 2, batch[1]))[1] * 3, backend="eager")
    got = step(parameters(model), batch)
    expected = norms_of(loop(model, F.cross_entropy, (batch[0] * 2, batch[1]))) * 3
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["transformer_tied", "twice_gram", "in_place", "lists"])
def test_models_under_transforms(name):
    """Norms in a graph, mapped over models, and differentiated."""
    make, data = MODELS[name]
    model, batch = make().double(), tuple(x.double() if x.is_floating_point() else x for x in data())
    params, norms, reference = parameters(model), fl.per_sample_grad_norms(model, F.cross_entropy), _reference(model)
    expected = norms_of(loop(model, F.cross_entropy, batch))
    torch.testing.assert_close(fl.jit(norms)(params, batch), expected)
    copies = {name: torch.stack([p, p * 2]) for name, p in params.items()}
    torch.testing.assert_close(fl.vmap(norms, (0, None))(copies, batch)[0], expected)
    _close(
        fl.grad(lambda params: norms(params, batch).sum())(params),
        fl.grad(lambda params: norms_of(reference(params, batch)).sum())(params),
    )
