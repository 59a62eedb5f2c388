"""Recurrent networks: vmap against a loop over examples, derivatives against torch.autograd."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import functorch_lite
from functorch_lite import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

B, T, N, F, H = 3, 4, 2, 3, 2


@pytest.fixture(autouse=True)
def no_loops():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", functorch_lite.LoopFallbackWarning)
        yield


def rand(*shape):
    return torch.rand(*shape, dtype=torch.float64) * 2 - 1


NETWORKS = {
    "tanh": lambda **options: nn.RNN(F, H, **options),
    "relu": lambda **options: nn.RNN(F, H, nonlinearity="relu", **options),
    "gru": lambda **options: nn.GRU(F, H, **options),
    "lstm": lambda **options: nn.LSTM(F, H, **options),
    "lstm_projection": lambda **options: nn.LSTM(F, 3, proj_size=H, **options),
}
OPTIONS = {
    "plain": {},
    "no_bias": {"bias": False},
    "two_layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


def make(kind, options="plain", **more):
    return NETWORKS[kind](**OPTIONS[options], **more).double()


def outputs(result):
    """The output and the last states, flat."""
    y, last = result
    return (y.data if isinstance(y, PackedSequence) else y, *(last if isinstance(last, tuple) else (last,)))


def initial_state(module, *batch):
    """Random states as the module takes them, with dimensions in front."""
    runs = module.num_layers * (2 if module.bidirectional else 1)
    lead, sequences = batch[:-1], batch[-1:]
    hidden = rand(*lead, runs, *sequences, H)
    return (hidden, rand(*lead, runs, *sequences, module.hidden_size)) if module.mode == "LSTM" else hidden


def weights(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def compare(actual, expected):
    torch.testing.assert_close(actual, tuple(torch.stack(column) for column in zip(*expected, strict=True)))


def pick(tree, i):
    return torch.utils._pytree.tree_map(lambda x: x[i], tree)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_network(kind, options):
    module = make(kind, options)
    x, state = rand(B, T, N, F), initial_state(module, B, T if module.batch_first else N)
    models = [make(kind, options) for _ in range(B)]
    params, _ = stack_module_state(models)
    with torch.no_grad():
        compare(vmap(lambda x: outputs(module(x)))(x), [outputs(module(x[i])) for i in range(B)])
        compare(
            vmap(lambda x: outputs(module(x, pick(state, 0))), in_dims=2)(x.movedim(0, 2)),
            [outputs(module(x[i], pick(state, 0))) for i in range(B)],
        )
        compare(
            vmap(lambda s: outputs(module(x[0], s)))(state),
            [outputs(module(x[0], pick(state, i))) for i in range(B)],
        )
        call = lambda p, x, s: outputs(functional_call(module, p, (x, s)))
        for places in [(0, None, None), (0, 0, None), (0, None, 0), (0, 0, 0)]:
            given = [
                value if place == 0 else pick(value, 0) for place, value in zip(places, (params, x, state), strict=True)
            ]
            compare(
                vmap(call, in_dims=places)(*given),
                [
                    outputs(models[i](x[i if places[1] == 0 else 0], pick(state, i if places[2] == 0 else 0)))
                    for i in range(B)
                ],
            )


@pytest.mark.parametrize("kind", NETWORKS)
def test_unbatched_input(kind):
    module, x = make(kind, "all"), rand(B, T, F)
    state = initial_state(module, B)
    state = pick(state, slice(None)) if isinstance(state, tuple) else state
    with torch.no_grad():
        compare(vmap(lambda x: outputs(module(x)))(x), [outputs(module(example)) for example in x])


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("size", [0, 1])
def test_small_batches(kind, size):
    module, x = make(kind, "all"), rand(size, N, T, F)
    params = {name: p.expand(size, *p.shape) for name, p in weights(module).items()}
    example = outputs(module(rand(N, T, F)))
    for result in (
        vmap(lambda x: outputs(module(x)))(x),
        vmap(lambda p: outputs(functional_call(module, p, (x.sum(0),))))(params),
    ):
        assert [y.shape for y in result] == [(size, *y.shape) for y in example]


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_single_precision(kind):
    """Where plain PyTorch has a fused kernel."""
    module, x = make(kind, "all").float(), rand(B, N, T, F).float()
    params, _ = stack_module_state([module] * B)
    expected = [outputs(module(example)) for example in x]
    compare(vmap(lambda x: outputs(module(x)))(x), expected)
    compare(vmap(lambda p, x: outputs(functional_call(module, p, (x,))))(params, x), expected)
    ours = jvp(lambda x: module(x)[0], (x[0],), (x[1],))[1]
    exact = copy.deepcopy(module).double()
    theirs = jvp(lambda x: exact(x)[0], (x[0].double(),), (x[1].double(),))[1]
    torch.testing.assert_close(ours, theirs.float())


@pytest.mark.parametrize("options", ["no_bias", "all"])
def test_jacobian_in_single_precision(options):
    """The backward pass of PyTorch's fused kernel, for many cotangents."""
    module, x = make("lstm", options), rand(T, N, F)
    f = lambda module, p, x: torch.cat([y.sum(1).flatten() for y in outputs(functional_call(module, p, (x,)))])
    single = lambda tree: torch.utils._pytree.tree_map(torch.Tensor.float, tree)
    exact = jacrev(lambda p, x: f(module, p, x), argnums=(0, 1))(weights(module), x)
    module.float()
    actual = jacrev(lambda p, x: f(module, p, x), argnums=(0, 1))(weights(module), x.float())
    torch.testing.assert_close(actual, single(exact))
    state_only = jacrev(lambda x: module(x)[1][1].sum(1).flatten())(x.float())
    count = 2 * module.num_layers if module.bidirectional else 1
    torch.testing.assert_close(state_only, actual[1][-state_only.shape[0] :])
    assert state_only.shape[0] == count * H


def test_pullback_in_single_precision():
    """Derivatives and batches of a pullback, which runs the backward pass of PyTorch's fused kernel."""
    module, x, v = make("lstm", "all"), rand(N, T, F), rand(2, N, T, 2 * H)

    def results(convert):
        pull = vjp(lambda x: module(x)[0], convert(x))[1]
        along = jvp(pull, (convert(v[0]),), (convert(v[1]),))[1][0]
        return vmap(pull)(convert(v))[0], along, grad(lambda v: pull(v)[0].sin().sum())(convert(v[0]))

    exact = results(lambda x: x)
    module.float()
    torch.testing.assert_close(results(torch.Tensor.float), tuple(y.float() for y in exact))


@pytest.mark.parametrize("weights_batched", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_nested_vmap(kind, weights_batched):
    module, x = make(kind, "all"), rand(2, B, N, T, F)
    models = [make(kind, "all") for _ in range(B)] if weights_batched else [module] * B
    params, _ = stack_module_state(models) if weights_batched else (weights(module), None)
    call = lambda p, x: functional_call(module, p, (x,))[0]
    in_dims = (0 if weights_batched else None, 0)
    inner = vmap(vmap(call, in_dims), in_dims=(None, 0))(params, x)
    outer = vmap(vmap(call, in_dims=(None, 0)), in_dims)(params, x.transpose(0, 1)).transpose(0, 1)
    expected = torch.stack([torch.stack([models[i](x[o, i])[0] for i in range(B)]) for o in range(2)])
    torch.testing.assert_close(inner, expected)
    torch.testing.assert_close(outer, expected)


def loss(module, params, x, *state):
    return sum(y.sin().sum() for y in outputs(functional_call(module, params, (x, *state))))


def autograd(module, params, x):
    """The gradients by weights and input."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    x = x.detach().clone().requires_grad_()
    results = torch.autograd.grad(loss(module, leaves, x), [*leaves.values(), x])
    return dict(zip(leaves, results[:-1], strict=True)), results[-1]


@pytest.mark.parametrize("options", ["plain", "no_bias", "all"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_per_sample_gradients(kind, options):
    module, xs = make(kind, options), rand(B, T, N, F)
    models = [make(kind, options) for _ in range(B)]
    params, _ = stack_module_state(models)
    gradients = grad(lambda p, x: loss(module, p, x), argnums=(0, 1))
    for in_dims, ours, samples in [
        ((None, 0), weights(module), [(weights(module), x) for x in xs]),
        ((0, 0), params, [(weights(model), x) for model, x in zip(models, xs, strict=True)]),
        ((0, None), params, [(weights(model), xs[0]) for model in models]),
    ]:
        by_params, by_x = vmap(gradients, in_dims)(ours, xs if in_dims[1] == 0 else xs[0])
        for i, sample in enumerate(samples):
            expected_params, expected_x = autograd(module, *sample)
            torch.testing.assert_close(pick(by_params, i), expected_params)
            torch.testing.assert_close(by_x[i], expected_x)


@pytest.mark.parametrize("kind", NETWORKS)
def test_gradient_of_a_batch(kind):
    """grad around vmap."""
    module, xs = make(kind, "all"), rand(B, N, T, F)
    params, _ = stack_module_state([make(kind, "all") for _ in range(B)])
    shared = grad(lambda p: vmap(lambda x: loss(module, p, x))(xs).sum())(weights(module))
    expected = [autograd(module, weights(module), x)[0] for x in xs]
    for name, g in shared.items():
        torch.testing.assert_close(g, sum(e[name] for e in expected))
    ensemble = grad(lambda p: vmap(lambda p: loss(module, p, xs[0]))(p).sum())(params)
    for i in range(B):
        torch.testing.assert_close(pick(ensemble, i), autograd(module, pick(params, i), xs[0])[0])


@pytest.mark.parametrize("kind", NETWORKS)
def test_jacobians(kind):
    module, x = make(kind, "bidirectional"), rand(T, N, F)
    f = lambda x: module(x)[0].cos().sum(0)
    expected = torch.autograd.functional.jacobian(f, x)
    torch.testing.assert_close(jacrev(f)(x), expected)
    torch.testing.assert_close(jacfwd(f)(x), expected)
    params, _ = stack_module_state([make(kind, "bidirectional") for _ in range(2)])
    member = lambda p: functional_call(module, p, (x,))[0].sum((0, 1))
    for jacobian in (jacrev, jacfwd):
        result = vmap(jacobian(member))(params)
        for i in range(2):
            p = pick(params, i)
            by_name = lambda *values, p=p: member(dict(zip(p, values, strict=True)))
            theirs = torch.autograd.functional.jacobian(by_name, tuple(p.values()))
            torch.testing.assert_close(pick(result, i), dict(zip(p, theirs, strict=True)))


@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm_projection"])
def test_hessian(kind):
    module, xs = make(kind), rand(2, 2, 1, F)
    f = lambda x: module(x)[0].sin().sum()
    expected = torch.stack([torch.autograd.functional.hessian(f, x) for x in xs])
    torch.testing.assert_close(vmap(hessian(f))(xs), expected)


@pytest.mark.parametrize("kind", ["tanh", "relu", "gru", "lstm"])
@pytest.mark.parametrize("rank", [1, 2])
def test_cells(kind, rank):
    cell = {"tanh": nn.RNNCell, "relu": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}[kind]
    options = {"nonlinearity": kind} if cell is nn.RNNCell else {}
    models = [cell(F, H, **options).double() for _ in range(B)]
    params, _ = stack_module_state(models)
    x, h = rand(B, 4, F)[:, 0] if rank == 1 else rand(B, N, F), rand(B, H) if rank == 1 else rand(B, N, H)
    state = (h, h.cos()) if kind == "lstm" else h
    call = lambda p, x, s: torch.utils._pytree.tree_leaves(functional_call(models[0], p, (x, s)))
    for in_dims in itertools.product((0, None), repeat=3):
        if in_dims == (None, None, None):
            continue
        given = [a if d == 0 else pick(a, 0) for a, d in zip((params, x, state), in_dims, strict=True)]
        example = lambda i, given=given, in_dims=in_dims: [
            pick(a, i) if d == 0 else a for a, d in zip(given, in_dims, strict=True)
        ]
        compare(tuple(vmap(call, in_dims)(*given)), [call(*example(i)) for i in range(B)])
        total = lambda *a: sum(y.sin().sum() for y in call(*a))
        ours = vmap(grad(total), in_dims)(*given)
        for i in range(B):
            p, *rest = example(i)
            leaves = [v.detach().clone().requires_grad_() for v in p.values()]
            theirs = torch.autograd.grad(total(dict(zip(p, leaves, strict=True)), *rest), leaves)
            torch.testing.assert_close(list(pick(ours, i).values()), list(theirs))


# Dropout between layers.


@pytest.mark.parametrize("weights_batched", [False, True])
def test_dropout(weights_batched):
    module = make("lstm", "two_layers", dropout=0.5)
    x = rand(T, 50, F).expand(B, T, 50, F)
    params = (
        {name: p.expand(B, *p.shape) for name, p in weights(module).items()} if weights_batched else weights(module)
    )
    call = lambda p, x: functional_call(module, p, (x,))[0]
    run = lambda randomness: vmap(call, (0 if weights_batched else None, 0), randomness=randomness)(params, x)
    different, same = run("different"), run("same")
    assert not different[0].equal(different[1])
    torch.testing.assert_close(same[0], same[1])
    with pytest.raises(
        RuntimeError, match=r"vmap: the function called the random operator aten::lstm.*randomness='error'"
    ):
        run("error")
    module.eval()
    torch.testing.assert_close(run("error")[0], module(x[0])[0])


def test_dropout_of_an_unbatched_input():
    module, x = make("gru", "two_layers", dropout=0.5), rand(T, 50, F)
    draws = lambda randomness: vmap(lambda b: module(x)[0] + 0 * b, randomness=randomness)(torch.zeros(B))
    different, same = draws("different"), draws("same")
    assert not different[0].equal(different[1])
    torch.testing.assert_close(same[0], same[1])


def test_dropout_keeps_its_distribution():
    """Ones through a layer that copies its input: what dropout left, and how large."""
    module = nn.RNN(1, 1, num_layers=2, nonlinearity="relu", bias=False, dropout=0.25)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.fill_(1.0 if "ih" in name else 0.0)
    y = vmap(lambda x: module(x)[0], randomness="different")(torch.ones(B, 1, 4000, 1))
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert ((y > 0).float().mean((1, 2, 3)) - 0.75).abs().max() < 0.05


# Packed sequences.


@pytest.mark.parametrize("weights_batched", [False, True])
@pytest.mark.parametrize("options", ["plain", "two_layers", "bidirectional"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_packed_sequences(kind, options, weights_batched):
    module, lengths = make(kind, options), torch.tensor([2, 4, 1])
    models = [make(kind, options) for _ in range(B)] if weights_batched else [module] * B
    params, _ = stack_module_state(models) if weights_batched else (weights(module), None)
    x, state = rand(B, T, 3, F), initial_state(module, B, 3)
    pack = lambda x: pack_padded_sequence(x, lengths, enforce_sorted=False)
    call = lambda p, x, s: outputs(functional_call(module, p, (pack(x), s)))
    in_dims = (0 if weights_batched else None, 0, 0)
    compare(vmap(call, in_dims)(params, x, state), [outputs(models[i](pack(x[i]), pick(state, i))) for i in range(B)])
    total = lambda *a: sum(y.sin().sum() for y in call(*a))
    by_params, by_x = vmap(grad(total, argnums=(0, 1)), in_dims)(params, x, state)
    for i in range(B):
        leaves = {name: p.detach().clone().requires_grad_() for name, p in weights(models[i]).items()}
        leaf = x[i].clone().requires_grad_()
        *expected, expected_x = torch.autograd.grad(total(leaves, leaf, pick(state, i)), [*leaves.values(), leaf])
        torch.testing.assert_close(list(pick(by_params, i).values()), expected)
        torch.testing.assert_close(by_x[i], expected_x)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("features", [(), (F,), (F, 2)])
def test_packing_and_padding(batch_first, features):
    lengths = torch.tensor([4, 3, 1])
    xs = rand(B, *((3, T) if batch_first else (T, 3)), *features)

    def f(x):
        packed = pack_padded_sequence(x, lengths, batch_first=batch_first)
        squares = PackedSequence(packed.data.sin(), packed.batch_sizes)
        padded, again = pad_packed_sequence(squares, batch_first, padding_value=2.0, total_length=T + 1)
        assert again.equal(lengths)
        return packed.data, padded

    for in_dim in (0, xs.dim() - 1):
        compare(vmap(f, in_dim)(xs.movedim(0, in_dim)), [f(x) for x in xs])
    total = lambda x: sum((y**3).sum() for y in f(x))
    gradients = [torch.autograd.functional.jacobian(total, x) for x in xs]
    torch.testing.assert_close(vmap(grad(total))(xs), torch.stack(gradients))
    torch.testing.assert_close(grad(lambda xs: vmap(total)(xs).sum())(xs), torch.stack(gradients))
    torch.testing.assert_close(vmap(hessian(total))(xs)[0], torch.autograd.functional.hessian(total, xs[0]))


def test_packing_checks_the_lengths():
    with pytest.raises(RuntimeError, match="sorted"):
        vmap(lambda x: pack_padded_sequence(x, torch.tensor([1, 2])).data)(rand(B, T, 2, F))


def test_packed_sequence_from_outside():
    module, packed = make("gru"), pack_padded_sequence(rand(T, 3, F), torch.tensor([4, 2, 2]))
    models = [make("gru") for _ in range(B)]
    params, _ = stack_module_state(models)
    compare(
        vmap(lambda p: outputs(functional_call(module, p, (packed,))))(params),
        [outputs(model(packed)) for model in models],
    )


def test_lengths_that_differ_between_examples():
    lengths = torch.tensor([[4, 2], [3, 1], [2, 2]])
    with pytest.raises(ValueError, match=r"vmap: aten::_pack_padded_sequence got lengths that are batched"):
        vmap(pack_padded_sequence)(rand(B, T, N, F), lengths)
    module = make("lstm")
    call = lambda data, sizes: torch.lstm(
        data, sizes, (torch.zeros(1, N, H).double(),) * 2, list(module.parameters()), True, 1, 0.0, False, False
    )
    sizes = torch.tensor([[2, 1], [2, 1]])
    with pytest.raises(ValueError, match=r"vmap: aten::lstm got batch_sizes that are batched"):
        vmap(call)(rand(2, 3, F), sizes)


def test_no_time_steps():
    module, x = make("gru"), rand(0, N, F)
    params, _ = stack_module_state([module] * B)
    with pytest.raises(ValueError, match="gru: expected at least one time step, got none"):
        vmap(lambda p: functional_call(module, p, (x,)))(params)


# The module itself.


@pytest.mark.parametrize("kind", NETWORKS)
def test_module_is_as_before(kind):
    """A network keeps a list of its weights beside its parameters, which must not keep the wrappers."""
    module, x = make(kind), rand(T, N, F)
    expected = module(x)[0].detach()
    params, _ = stack_module_state([make(kind) for _ in range(B)])
    vmap(lambda p: functional_call(module, p, (x,))[0])(params)
    grad(lambda p: functional_call(module, p, (x,))[0].sum())(weights(module))
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module):
        torch.testing.assert_close(again(x)[0], expected)
    assert all(a is b for a, b in zip(module._flat_weights, module.parameters(), strict=True))
    torch.testing.assert_close(module.float()(x.float())[0], expected.float())
