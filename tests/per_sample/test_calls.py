"""What may be passed, what is random, in which dtype; and every message."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import functorch_lite as fl

from .reference import check, loop, norms_of, parameters

FUNCTIONS = {
    "per_sample_grads": fl.per_sample_grads,
    "per_sample_grad_norms": fl.per_sample_grad_norms,
    "clipped_grad_sum": lambda model, loss, **options: fl.clipped_grad_sum(model, loss, 1.0, **options),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _mlp(**options):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def _batch(n=5):
    return torch.randn(n, 4, dtype=torch.double), torch.randint(3, (n,))


# -- parameters and buffers


def test_some_parameters():
    model, batch = _mlp(), _batch()
    params = {name: p.detach() for name, p in model.named_parameters() if name.startswith("2")}
    expected = loop(model, F.cross_entropy, batch, names=params)
    gradients = fl.per_sample_grads(model, F.cross_entropy)(params, batch)
    assert list(gradients) == ["2.weight", "2.bias"]
    for name in params:
        torch.testing.assert_close(gradients[name], expected[name])
    sums, norms = fl.clipped_grad_sum(model, F.cross_entropy, 0.1)(params, batch)
    torch.testing.assert_close(norms, norms_of(expected))
    assert list(sums) == ["2.weight", "2.bias"]


def test_other_values_than_the_models():
    model, other, batch = _mlp(), _mlp(), _batch()
    found = fl.per_sample_grads(model, F.cross_entropy)(parameters(other), batch)
    for name, want in loop(other, F.cross_entropy, batch).items():
        torch.testing.assert_close(found[name], want)


def test_frozen_parameters_that_are_given_have_gradients():
    model, batch = _mlp(), _batch()
    expected = loop(model, F.cross_entropy, batch)
    model.requires_grad_(False)
    found = fl.per_sample_grads(model, F.cross_entropy)(dict(model.named_parameters()), batch)
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want)


def test_buffers_are_constants():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().eval()
    batch = _batch()
    given = {**parameters(model), "1.running_mean": torch.ones(3, dtype=torch.double)}
    found = fl.per_sample_grads(model, F.cross_entropy)(given, batch)
    assert list(found) == list(parameters(model))
    model[1].running_mean.fill_(1.0)
    for name, want in loop(model, F.cross_entropy, batch).items():
        torch.testing.assert_close(found[name], want)


def test_tied_parameters_by_any_of_their_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    batch = _batch()
    expected = loop(model, F.cross_entropy, batch)["0.weight"]
    for name in ("0.weight", "2.weight"):
        found = fl.per_sample_grads(model, F.cross_entropy)({name: model[0].weight.detach()}, batch)
        torch.testing.assert_close(found[name], expected)


# -- the batch


@pytest.mark.parametrize("size", [0, 1])
def test_small_batches(size):
    model, batch = _mlp(), _batch(size)
    params = parameters(model)
    gradients = fl.per_sample_grads(model, F.cross_entropy)(params, batch)
    assert {name: g.shape for name, g in gradients.items()} == {n: (size, *p.shape) for n, p in params.items()}
    norms = fl.per_sample_grad_norms(model, F.cross_entropy)(params, batch)
    assert norms.shape == (size,)
    sums, _ = fl.clipped_grad_sum(model, F.cross_entropy, 1.0)(params, batch)
    assert {name: g.shape for name, g in sums.items()} == {n: p.shape for n, p in params.items()}
    if size == 0:
        assert not any(g.any() for g in sums.values())
    else:
        check(model, F.cross_entropy, batch)


def test_batch_in_another_dimension():
    model = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0).double()
    x, target = torch.randn(3, 5, 4, dtype=torch.double), torch.randn(5, 3, 4, dtype=torch.double)
    check(model, F.mse_loss, (x, target), batch_dim=1)
    check(model, F.mse_loss, (x, target), batch_dim=-2)


def test_model_of_one_example():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            assert x.dim() == 1
            return self.layer(x)

    check(One().double(), F.cross_entropy, _batch(), batch_dim=None)


def test_pytrees():
    class Trees(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, pair, scale):
            assert pair["b"].shape == (1, 2)
            y = self.left(pair["a"]) + self.right(pair["b"]) * scale
            return {"logits": y, "size": y.square().mean(), "name": "trees"}

    model = Trees().double()
    pair = {"a": torch.randn(5, 4, dtype=torch.double), "b": torch.randn(5, 2, dtype=torch.double)}
    targets = {"class": torch.randint(3, (5,))}

    def loss(output, targets, weight):
        assert output["logits"].shape == (3,)
        assert output["name"] == "trees"
        return F.cross_entropy(output["logits"], targets["class"]) * weight + output["size"]

    weight = torch.rand(5, dtype=torch.double)
    found = fl.per_sample_grads(model, loss)(parameters(model), ((pair, 2.0), targets, weight))
    named = dict(model.named_parameters())
    for i in range(5):
        output = model({name: x[i : i + 1] for name, x in pair.items()}, 2.0)
        value = F.cross_entropy(output["logits"][0], targets["class"][i]) * weight[i] + output["size"]
        for (name, _), want in zip(named.items(), torch.autograd.grad(value, list(named.values())), strict=True):
            torch.testing.assert_close(found[name][i], want)


def test_loss_of_the_output_alone():
    check(_mlp(), lambda output: output.sin().sum(), (_batch()[0],))


def test_loss_that_depends_on_no_example():
    model = _mlp()
    found = fl.per_sample_grads(model, lambda output: model_norm(model))(parameters(model), (_batch()[0],))
    assert not any(g.any() for g in found.values())


def model_norm(model):
    """Of the module's own parameters, which are constants."""
    return sum(p.detach().square().sum() for p in model.parameters())


def test_a_part_without_derivative():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            with torch.no_grad():
                y = self.first(x)
            return self.second(y + self.first.bias.detach())

    check(Partly().double(), F.cross_entropy, _batch())


# -- random numbers


class Dropped(nn.Module):
    def __init__(self, weights=False):
        super().__init__()
        self.layer, self.head, self.weights = nn.Linear(4, 50), nn.Linear(50, 3), weights

    def forward(self, x):
        if self.weights:
            return F.linear(self.layer(x), F.dropout(self.head.weight, 0.5))
        return self.head(F.dropout(self.layer(x), 0.5))


@pytest.mark.parametrize("weights", [False, True], ids=["activations", "weights"])
def test_each_example_has_random_numbers_of_its_own(weights):
    model = Dropped(weights).double()
    x, target = torch.ones(3, 4, dtype=torch.double), torch.zeros(3, dtype=torch.long)
    found = fl.per_sample_grads(model, F.cross_entropy)(parameters(model), (x, target))["head.weight"]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_norms_and_sums_are_of_the_same_random_numbers():
    """With a bound that no gradient reaches, and one that all exceed."""
    model = Dropped().double()
    params, batch = parameters(model), _batch()
    torch.manual_seed(1)
    gradients = fl.per_sample_grads(model, F.cross_entropy)(params, batch)
    for bound in (1e6, 1e-6):
        torch.manual_seed(1)
        sums, norms = fl.clipped_grad_sum(model, F.cross_entropy, bound)(params, batch)
        torch.testing.assert_close(norms, norms_of(gradients))
        weights = (bound / norms).clamp(max=1)
        for name, g in gradients.items():
            torch.testing.assert_close(sums[name], torch.einsum("b,b...->...", weights, g), atol=1e-12, rtol=1e-7)


# -- dtypes


def test_autocast():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3))
    batch = torch.randn(5, 2, 5, 5), torch.randint(3, (5,))
    with torch.autocast("cpu", torch.bfloat16):
        gradients = fl.per_sample_grads(model, F.cross_entropy)(parameters(model), batch)
        sums, norms = fl.clipped_grad_sum(model, F.cross_entropy, 0.5)(parameters(model), batch)
        expected = loop(model, F.cross_entropy, batch)
    close = lambda got, want: torch.testing.assert_close(got, want, rtol=0.05, atol=0.02)
    close(norms, norms_of(expected))
    weights = (0.5 / norms_of(expected)).clamp(max=1)
    for name, want in expected.items():
        assert gradients[name].dtype == sums[name].dtype == torch.float32
        close(gradients[name], want)
        close(sums[name], torch.einsum("b,b...->...", weights, want))


def test_bfloat16():
    model = _mlp().bfloat16()
    batch = (torch.randn(5, 4, dtype=torch.bfloat16), torch.randint(3, (5,)))
    sums, norms = fl.clipped_grad_sum(model, F.cross_entropy, 0.5)(parameters(model), batch)
    assert norms.dtype == torch.float32
    assert all(g.dtype == torch.bfloat16 for g in sums.values())
    expected = norms_of({name: g.float() for name, g in loop(model, F.cross_entropy, batch).items()})
    torch.testing.assert_close(norms, expected, rtol=0.03, atol=0.01)


# -- the norms


def test_norms_that_are_zero():
    model = _mlp()
    sums, norms = fl.clipped_grad_sum(model, lambda output: output.sum() * 0, 1.0)(parameters(model), (_batch()[0],))
    assert not norms.any()
    assert not any(g.any() for g in sums.values())


def test_norm_bound_as_a_tensor():
    model, batch = _mlp(), _batch()
    bound = torch.tensor(0.1, dtype=torch.double)
    sums, _ = fl.clipped_grad_sum(model, F.cross_entropy, bound)(parameters(model), batch)
    expected, _ = fl.clipped_grad_sum(model, F.cross_entropy, 0.1)(parameters(model), batch)
    for name, want in expected.items():
        torch.testing.assert_close(sums[name], want)


@pytest.mark.parametrize("make", [lambda: nn.Linear(200, 300), lambda: nn.Conv2d(64, 64, 3)], ids=["linear", "conv"])
def test_norms_make_no_gradients(make):
    """No tensor has the size of all examples' gradients."""
    layer = make()
    x = torch.randn(8, 3, 200) if isinstance(layer, nn.Linear) else torch.randn(8, 64, 4, 4)
    graph = fl.trace(fl.clipped_grad_sum(layer, lambda output: output.sin().sum(), 1.0))(parameters(layer), (x,))
    values = [node.meta["val"] for node in graph.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert max(value.numel() for value in values) < 8 * layer.weight.numel() / 2


# -- functions that are kept


def test_threads():
    """Each with a model of its own, as functional_call puts parameters into the model."""
    model, batch = _mlp(), _batch()
    expected = fl.per_sample_grads(model, F.cross_entropy)(parameters(model), batch)
    results = []

    def run(own):
        results.append(fl.per_sample_grads(own, F.cross_entropy)(parameters(own), batch))

    threads = [threading.Thread(target=run, args=(copy.deepcopy(model),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for found in results:
        for name, want in expected.items():
            assert torch.equal(found[name], want)


def test_the_model_is_left_as_it_was():
    model, batch = _mlp(), _batch()
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    fl.clipped_grad_sum(model, F.cross_entropy, 1.0)(parameters(model), batch)
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])
        assert p.grad is None


# -- messages


@pytest.fixture(params=FUNCTIONS)
def called(request):
    return request.param


def _raises(kind, called, message):
    return pytest.raises(kind, match=rf"^{called}: .*{message}")


def test_no_module(called):
    with _raises(TypeError, called, "expected a module as first argument, got function"):
        FUNCTIONS[called](lambda x: x, F.cross_entropy)


def test_no_loss(called):
    with _raises(TypeError, called, "expected a function"):
        FUNCTIONS[called](_mlp(), 3)


def test_no_batch_dim(called):
    with _raises(TypeError, called, r"got batch_dim='first', expected an int.*or None.*; pass"):
        FUNCTIONS[called](_mlp(), F.cross_entropy, batch_dim="first")


def test_no_max_norm():
    for bound in (0, -1.0, "one", torch.ones(2), True):
        with pytest.raises(
            ValueError, match="^clipped_grad_sum: got max_norm=.*, expected a positive number or a tensor"
        ):
            fl.clipped_grad_sum(_mlp(), F.cross_entropy, bound)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            lambda params: list(params.values()),
            TypeError,
            "got params as list, expected a dictionary of tensors by name",
        ),
        (lambda params: {**params, "0.bias": None}, TypeError, "got params as NoneType for '0.bias', expected"),
        (lambda params: {}, ValueError, "got params without any parameter of Sequential, expected one at least; pass"),
        (lambda params: {**params, "0.bias": params["0.bias"].long()}, TypeError, "got dtype torch.int64 for '0.bias'"),
    ],
)
def test_params(called, change, kind, message):
    model = _mlp()
    with _raises(kind, called, message):
        FUNCTIONS[called](model, F.cross_entropy)(change(parameters(model)), _batch())


def test_unknown_parameter(called):
    model = _mlp()
    with pytest.raises(ValueError, match="no parameter or buffer named '1.weight'"):
        FUNCTIONS[called](model, F.cross_entropy)({**parameters(model), "1.weight": torch.ones(3)}, _batch())


def test_tied_names(called):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model[1].weight = model[0].weight
    params = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    with _raises(ValueError, called, "got params with '0.weight' and '1.weight', which are one parameter.*; pass one"):
        FUNCTIONS[called](model, F.cross_entropy)(params, _batch())


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        (torch.ones(3, 4), TypeError, r"got batch as Tensor, expected a tuple \(input, \*targets\); pass \(input,\)"),
        ((), TypeError, "got batch as an empty tuple"),
        ((3,), ValueError, "got batch without a tensor, expected examples"),
        (
            (torch.ones(3, 4), torch.ones(())),
            ValueError,
            r"got batch\[1\] of shape \(\), expected examples in dimension 0",
        ),
        (
            (torch.ones(3, 4), {"y": torch.ones(2)}),
            ValueError,
            r"got 3 examples in batch\[0\] and 2 in batch\[1\]\['y'\] \(dimension 0 of \(2,\)\)",
        ),
    ],
)
def test_batch(called, batch, kind, message):
    model = _mlp()
    with _raises(kind, called, message):
        FUNCTIONS[called](model, F.cross_entropy)(parameters(model), batch)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True)])
def test_batch_norm_in_training(called, layer):
    model = nn.Sequential(nn.Linear(4, 3), layer).double()
    kind = type(layer).__name__
    with _raises(ValueError, called, rf"got {kind} '1' in training mode.*nn.GroupNorm, or call .eval\(\)"):
        FUNCTIONS[called](model, F.cross_entropy)(parameters(model), _batch())


def test_output_without_batch(called):
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(4, 3, 2, batch_first=True)

        def forward(self, x):
            return self.layer(x)

    model = Sequence()
    x = torch.randn(5, 6, 4)
    with _raises(ValueError, called, r"got output\[1\]\[0\] of Sequence with shape \(2, 1, 3\).*; pass batch_dim=None"):
        FUNCTIONS[called](model, lambda output: output[0].sum())(parameters(model), (x,))


@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        (lambda output, target: output, ValueError, r"must return a scalar .*got shape \(3,\)"),
        (lambda output, target: (output.sum(), 1), TypeError, "must return a single tensor"),
        (lambda output, target: output.sum().long(), ValueError, "returned dtype torch.int64"),
    ],
)
def test_loss(called, loss, kind, message):
    model = _mlp()
    with _raises(kind, called, message):
        FUNCTIONS[called](model, loss)(parameters(model), _batch())


def test_write_into_what_a_derivative_needs(called):
    """The loop raises, too."""

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            x = x * 1
            y = self.layer(x)
            x.zero_()
            return y

    model = Writes().double()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        FUNCTIONS[called](model, F.cross_entropy)(parameters(model), _batch())
