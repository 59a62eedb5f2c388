"""functional_call and its friends, and per-sample gradients of small networks."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from functorch_lite import (
    functional_call,
    grad,
    hessian,
    jvp,
    replace_all_batch_norm_modules_,
    stack_module_state,
    vmap,
)

from ..support.oracles import finite_difference_jvp


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.conv2, self.bn2 = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(3, 4)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0]


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(6, 3), nn.Linear(3, 2)

    def forward(self, tokens):
        return self.out(self.bag(tokens))


def _cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )


def _transformer():
    return nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.0, batch_first=True)


def _tokens(*sizes):
    return torch.randint(6, sizes)


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), lambda: torch.rand(3, 3)),
    "cnn_group_norm": (_cnn, lambda: torch.rand(3, 1, 6, 6)),
    "resnet_block_eval": (lambda: Block().eval(), lambda: torch.rand(3, 2, 4, 4)),
    "lstm_cell": (Recurrent, lambda: torch.rand(3, 2, 3)),
    "transformer_train": (_transformer, lambda: torch.rand(3, 2, 4)),
    "transformer_eval": (lambda: _transformer().eval(), lambda: torch.rand(3, 2, 4)),
    "embedding_bag": (Bag, lambda: _tokens(3, 4)),
}


def _double(x):
    return x.double() if x.is_floating_point() else x


def _state(module):
    return {name: p.detach() for name, p in module.named_parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_per_sample_gradients(name):
    torch.manual_seed(0)
    make, data = NETWORKS[name]
    module, xs = make().double(), _double(data())
    loss = lambda params, x: functional_call(module, params, (x[None],)).sin().sum()  # noqa: E731
    result = vmap(grad(loss), in_dims=(None, 0))(_state(module), xs)
    names, params = zip(*module.named_parameters(), strict=True)
    rows = [torch.autograd.grad(module(x[None]).sin().sum(), params) for x in xs]
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(result[name], torch.stack(column))


@pytest.mark.parametrize("name", ["mlp", "cnn_group_norm", "resnet_block_eval"])
def test_ensemble(name):
    torch.manual_seed(0)
    make, data = NETWORKS[name]
    models, xs = [make().double() for _ in range(3)], _double(data())
    params, buffers = stack_module_state(models)
    call = lambda params, buffers, x: functional_call(models[0], (params, buffers), (x,))  # noqa: E731
    result = vmap(call, in_dims=(0, 0, None))(params, buffers, xs)
    torch.testing.assert_close(result, torch.stack([model(xs) for model in models]))


def test_functional_call_leaves_the_module():
    layer = nn.Linear(2, 2)
    before = dict(layer.named_parameters())
    x = torch.rand(2)
    weight, bias = torch.rand(2, 2), torch.rand(2)
    torch.testing.assert_close(functional_call(layer, {"weight": weight, "bias": bias}, (x,)), weight @ x + bias)
    torch.testing.assert_close(functional_call(layer, ({"weight": weight}, {"bias": bias}), x), weight @ x + bias)
    torch.testing.assert_close(functional_call(layer, {"weight": weight}, kwargs={"input": x}), weight @ x + layer.bias)
    with pytest.raises(RuntimeError):
        functional_call(layer, {"weight": weight}, (torch.rand(3),))
    assert all(dict(layer.named_parameters())[name] is tensor for name, tensor in before.items())


def test_tied_weights():
    module, weight, x = Tied(), torch.rand(2, 2), torch.rand(2)
    for name in ("first.weight", "second.weight"):
        torch.testing.assert_close(functional_call(module, {name: weight}, x), weight @ (weight @ x))
    untied = functional_call(module, {"first.weight": weight}, x, tie_weights=False)
    torch.testing.assert_close(untied, module.second.weight @ (weight @ x))
    assert module.first.weight is module.second.weight
    with pytest.raises(ValueError, match="share one tensor"):
        functional_call(module, {"first.weight": weight, "second.weight": weight + 1}, x)


@pytest.mark.parametrize(
    ("state", "strict", "error", "message"),
    [
        ({"weigth": torch.ones(2, 2)}, False, ValueError, "no parameter or buffer named 'weigth'"),
        ({"weight": torch.ones(2, 2)}, True, ValueError, "'bias' are not given"),
        (({"bias": torch.ones(2)}, {"bias": torch.ones(2)}), False, ValueError, "more than one dictionary"),
        ({"bias": 1.0}, False, TypeError, "must be a tensor, got float"),
    ],
)
def test_functional_call_refuses(state, strict, error, message):
    with pytest.raises(error, match=message):
        functional_call(nn.Linear(2, 2), state, torch.ones(2), strict=strict)


def test_buffers_are_written_in_the_given_tensors():
    norm, x = nn.BatchNorm1d(2), torch.rand(4, 2)
    given = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    mean = given["running_mean"]
    functional_call(norm, given, x)
    assert given["running_mean"] is mean
    torch.testing.assert_close(mean, 0.1 * x.mean(0))
    assert given["num_batches_tracked"] == 1
    assert norm.running_mean.eq(0).all()
    assert norm.num_batches_tracked == 0


def test_stack_module_state():
    models = [nn.BatchNorm1d(2) for _ in range(3)]
    params, buffers = stack_module_state(models)
    assert {name: tuple(p.shape) for name, p in params.items()} == {"weight": (3, 2), "bias": (3, 2)}
    assert buffers["num_batches_tracked"].shape == (3,)
    assert all(p.requires_grad and p.is_leaf for p in params.values())


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "at least one module"),
        ([nn.Linear(1, 1), nn.Tanh()], "one class"),
        ([nn.Linear(1, 1), nn.Linear(1, 1).eval()], "training mode"),
        ([nn.Linear(1, 1), nn.Linear(1, 2)], "differs between the modules"),
    ],
)
def test_stack_module_state_refuses(models, message):
    with pytest.raises(ValueError, match=message):
        stack_module_state(models)


def test_batch_norm_without_statistics_maps():
    net = replace_all_batch_norm_modules_(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    xs = torch.rand(3, 4, 2)
    torch.testing.assert_close(vmap(net)(xs), torch.stack([net(x) for x in xs]))
    assert list(net.buffers()) == []


# Derivatives of a loss by the parameters and the input, against nested torch.autograd.


class Attention(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.attention, self.need_weights = nn.MultiheadAttention(4, 2, batch_first=True), need_weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class Lstm(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True, **options)

    def forward(self, x):
        return self.lstm(x)[0]


SMOOTH_NETWORKS = {
    "attention": (lambda: Attention(False), (2, 3, 4)),
    "attention_eval": (lambda: Attention(False).eval(), (2, 3, 4)),
    "attention_with_weights": (lambda: Attention(True), (2, 3, 4)),
    "transformer": (_transformer, (2, 3, 4)),
    "transformer_eval": (lambda: _transformer().eval(), (2, 3, 4)),
    "lstm": (lambda: Lstm(), (2, 3, 3)),
    "lstm_two_ways_projected": (lambda: Lstm(bidirectional=True, proj_size=2), (2, 3, 3)),
    "cnn_group_norm": (_cnn, (2, 1, 6, 6)),
}


@pytest.fixture(params=SMOOTH_NETWORKS)
def network(request):
    """(loss of parameters and input, variables, two directions)"""
    torch.manual_seed(0)
    make, sizes = SMOOTH_NETWORKS[request.param]
    module = make().double()
    names = list(_state(module))
    loss = lambda *xs: functional_call(module, dict(zip(names, xs, strict=False)), (xs[-1],)).sin().sum()  # noqa: E731
    variables = [*_state(module).values(), torch.rand(sizes, dtype=torch.float64)]
    return loss, variables, [tuple(torch.rand_like(x) for x in variables) for _ in range(2)]


def _plain_gradients(loss, variables, directions=()):
    xs = [x.clone().requires_grad_() for x in variables]
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(loss(*xs), xs, create_graph=True)
        for direction in directions:
            along = sum((g * v).sum() for g, v in zip(gradients, direction, strict=True))
            gradients = torch.autograd.grad(along, xs, create_graph=True, materialize_grads=True, allow_unused=True)
    return tuple(g.detach() for g in gradients)


def _all(loss, variables):
    return grad(loss, argnums=tuple(range(len(variables))))


@pytest.mark.parametrize("grad_mode", [True, False])
def test_forward_mode(network, grad_mode):
    """Without grad mode modules in evaluation take PyTorch's fast path."""
    loss, variables, (v, _) = network
    with torch.set_grad_enabled(grad_mode):
        tangent = jvp(loss, tuple(variables), v)[1]
    torch.testing.assert_close(tangent, finite_difference_jvp(loss, variables, v), atol=1e-6, rtol=1e-6)


def test_second_derivatives(network):
    loss, variables, (v, _) = network
    gradient = _all(loss, variables)
    expected = _plain_gradients(loss, variables, [v])
    torch.testing.assert_close(jvp(gradient, tuple(variables), v)[1], expected)
    along = lambda *xs: sum((g * d).sum() for g, d in zip(gradient(*xs), v, strict=True))  # noqa: E731
    torch.testing.assert_close(_all(along, variables)(*variables), expected)
    torch.testing.assert_close(_all(lambda *xs: jvp(loss, xs, v)[1], variables)(*variables), expected)


def test_third_derivatives(network):
    """Against differences of second ones: PyTorch's third derivative of layer norm is wrong."""
    loss, variables, (v, w) = network
    hvp = lambda *xs: jvp(_all(loss, variables), xs, v)[1]  # noqa: E731
    plain = lambda *xs: torch.cat([g.flatten() for g in _plain_gradients(loss, xs, [v])])  # noqa: E731
    third = torch.cat([g.flatten() for g in jvp(hvp, tuple(variables), w)[1]])
    expected = finite_difference_jvp(plain, variables, w)
    torch.testing.assert_close(third, expected, rtol=1e-6, atol=1e-7 * expected.abs().max().item())


def test_second_derivatives_of_examples(network):
    loss, variables, (v, _) = network
    x = variables[-1]
    hvp = lambda x: jvp(_all(loss, variables), (*variables[:-1], x[None]), (*v[:-1], v[-1][:1]))[1]  # noqa: E731
    expected = [_plain_gradients(loss, [*variables[:-1], one[None]], [(*v[:-1], v[-1][:1])]) for one in x]
    torch.testing.assert_close(vmap(hvp)(x), tuple(torch.stack(column) for column in zip(*expected, strict=True)))


def test_hessian(network):
    loss, variables, _ = network
    bias, others = variables[1], [variables[0], *variables[2:]]
    by_bias = lambda bias: loss(others[0], bias, *others[1:])  # noqa: E731
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.autograd.functional.hessian(by_bias, bias)
    torch.testing.assert_close(hessian(by_bias)(bias), expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_modules_do_not_keep_what_they_were_called_with(kind):
    model = nn.Sequential(kind(2, 3, bidirectional=True))
    given = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    kept = [weakref.ref(tensor) for tensor in given.values()]
    functional_call(model, given, torch.ones(4, 2))
    given.clear()
    assert [ref() for ref in kept] == [None] * len(kept)
    assert all(any(w is p for p in model.parameters()) for w in model[0]._flat_weights)
