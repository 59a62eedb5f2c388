"""What becomes of buffers that a module writes inside transforms, beside the same calls without transforms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from functorch_lite import (
    _commits,
    functional_call,
    functionalize,
    grad,
    hessian,
    hvp,
    jacfwd,
    jacobian,
    jacrev,
    jit,
    jvp,
    linearize,
    stack_module_state,
    trace,
    value_and_grad,
    vjp,
    vmap,
)


class Net(nn.Module):
    """Batch norm, a buffer that is written in place, one that is replaced, and one that is only read."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x):
        y = self.norm(self.layer(x)) * self.scale
        self.mean.mul_(0.9).add_(y.sin().mean(0), alpha=0.1)
        self.count = self.count + 1
        return y


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def x():
    return torch.rand(4, 3, dtype=torch.float64)


def _params(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def _buffers(net):
    return {name: buffer.detach().clone() for name, buffer in net.named_buffers()}


def _after(net, *inputs):
    """The buffers after plain calls."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for x in inputs:
            net(x)
    return _buffers(net)


def _loss(net, x, **options):
    return lambda params: functional_call(net, params, x, **options).sin().sum()


TRANSFORMS = {
    "none": lambda f, p: f(p),
    "grad": lambda f, p: grad(f)(p),
    "value_and_grad": lambda f, p: value_and_grad(f)(p),
    "vjp": lambda f, p: vjp(f, p),
    "jvp": lambda f, p: jvp(f, (p,), (p,)),
    "linearize": lambda f, p: linearize(f, p),
    "grad_grad": lambda f, p: grad(lambda q: sum(g.sum() for g in grad(f)(q).values()))(p),
    "jacrev": lambda f, p: jacrev(f)(p),
    "jacfwd": lambda f, p: jacfwd(f)(p),
    "jacfwd_chunks": lambda f, p: jacfwd(f, chunk_size=3)(p),
    "jacobian": lambda f, p: jacobian(f)(p),
    "hessian": lambda f, p: hessian(f)(p),
    "hessian_chunks": lambda f, p: hessian(f, chunk_size=3)(p),
    "hvp": lambda f, p: hvp(f, (p,), (p,)),
    "functionalize": lambda f, p: functionalize(f)(p),
    "grad_functionalize": lambda f, p: grad(functionalize(f))(p),
    "functionalize_grad": lambda f, p: functionalize(grad(f))(p),
    "vmap_same": lambda f, p: vmap(lambda _: f(p))(torch.ones(5)),
    "grad_vmap": lambda f, p: grad(lambda p: vmap(lambda a: a * f(p))(torch.ones(5)).sum())(p),
    "jit": lambda f, p: jit(f)(p),
    "jit_grad": lambda f, p: jit(grad(f))(p),
    "jit_hessian": lambda f, p: jit(hessian(f))(p),
    "inductor_grad": lambda f, p: jit(grad(f), "inductor")(p),
    "trace": lambda f, p: trace(grad(f))(p)(p),
    "no_grad": lambda f, p: torch.no_grad()(f)(p),
    "inference": lambda f, p: torch.inference_mode()(f)(p),
    "inference_grad": lambda f, p: torch.inference_mode()(grad(f))(p),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_commit_is_what_plain_calls_do(net, x, name):
    expected = _after(net, x)
    params, own = _params(net), dict(net.named_buffers())
    TRANSFORMS[name](_loss(net, x, state="commit"), params)
    assert_close(_buffers(net), expected)
    assert all(buffer is own[key] for key, buffer in net.named_buffers())
    assert not any(buffer.requires_grad for buffer in net.buffers())
    assert not _commits.waiting


@pytest.mark.parametrize("name", TRANSFORMS)
def test_commits_of_several_calls_follow_each_other(net, x, name):
    expected = _after(net, x, x + 1)

    def loss(params):
        first = _loss(net, x, state="commit")(params)
        return first * _loss(net, x + 1, state="commit")(params)

    TRANSFORMS[name](loss, _params(net))
    assert_close(_buffers(net), expected)


def test_a_compiled_step_commits_in_each_call(net, x):
    expected = _after(net, x, x, x)
    step = jit(grad(_loss(net, x, state="commit")))
    for _ in range(3):
        step(_params(net))
    assert_close(_buffers(net), expected)


def test_commit_into_given_buffers(net, x):
    expected, own = _after(net, x), _buffers(net)
    given = _buffers(net)
    tensors = dict(given)
    grad(lambda params: functional_call(net, (params, given), x, state="commit").sum())(_params(net))
    assert_close(given, expected)
    assert all(given[name] is tensor for name, tensor in tensors.items())
    assert_close(_buffers(net), own)


def test_commit_of_compiled_call_into_arguments(net, x):
    expected, given = _after(net, x), _buffers(net)
    step = jit(grad(lambda params, buffers: functional_call(net, (params, buffers), x, state="commit").sum()))
    step(_params(net), given)
    assert_close(given, expected)


def test_return(net, x):
    before, expected = _buffers(net), _after(net, x)
    output, buffers = functional_call(net, _params(net), x, state="return")
    assert_close(buffers, expected)
    assert_close(output, copy.deepcopy(net)(x).detach())
    _, (_, buffers) = jit(grad(lambda p: _sum_and_state(net, p, x), has_aux=True))(_params(net)), (None, buffers)
    assert_close(buffers, expected)
    gradient, buffers = grad(lambda p: _sum_and_state(net, p, x), has_aux=True)(_params(net))
    assert_close(buffers, expected)
    output, buffers = functional_call(net, (_params(net), buffers), x + 1, state="return")
    assert_close(buffers, _after(net, x, x + 1))
    assert_close(_buffers(net), before)


def _sum_and_state(net, params, x):
    output, buffers = functional_call(net, params, x, state="return")
    return output.sum(), buffers


def test_return_of_each_example(net):
    xs = torch.rand(5, 4, 3, dtype=torch.float64)
    rows = [_after(net, x) for x in xs]
    expected = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    params = _params(net)
    _, buffers = vmap(lambda x: functional_call(net, params, x, state="return"))(xs)
    assert_close(buffers, expected)
    _, buffers = vmap(grad(lambda p, x: _sum_and_state(net, p, x), has_aux=True), (None, 0))(params, xs)
    assert_close(buffers, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_return_under_torch_compile(net, x, backend):
    step = torch.compile(
        lambda params, x: grad(lambda p: _sum_and_state(net, p, x), has_aux=True)(params),
        fullgraph=True,
        backend=backend,
    )
    expected = grad(lambda p: _sum_and_state(net, p, x), has_aux=True)(_params(net))
    assert_close(step(_params(net), x), expected)
    assert_close(expected[1], _after(net, x))


@pytest.mark.parametrize("state", ["commit", "error"])
def test_torch_compile_says_that_it_cannot(x, state):
    norm = nn.BatchNorm1d(3).double()
    step = lambda params: grad(lambda p: functional_call(norm, p, x, state=state).sum())(params)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="state='return', or functorch_lite.jit"):
        torch.compile(step, fullgraph=True, backend="eager")(_params(norm))


def test_commit_beside_a_graph_of_torch_compile(net, x):
    expected = _after(net, x)
    step = lambda params: grad(lambda p: functional_call(net, p, x, state="commit").sum())(params)
    torch.compile(step, backend="eager")(_params(net))  # with a graph break
    assert_close(_buffers(net), expected)


def test_error_names_the_buffer(net, x):
    before = _buffers(net)
    with pytest.raises(ValueError, match="Net writes its buffer 'mean'.*state='return'.*state='commit'"):
        functional_call(net, {}, x, state="error")
    norm = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    for call in (
        lambda: functional_call(norm, {}, x.float(), state="error"),
        lambda: grad(lambda p: functional_call(norm, p, x.float(), state="error").sum())(_params(norm)),
        lambda: vmap(lambda x: functional_call(norm, {}, x, state="error"))(x.float()[None]),
        lambda: jit(lambda x: functional_call(norm, {}, x, state="error"))(x.float()),
    ):
        with pytest.raises(ValueError, match=r"BatchNorm1d '1' writes its buffer 'running_mean' \('1.running_mean'\)"):
            call()
    assert_close(_buffers(net), before)
    assert norm[1].num_batches_tracked == 0
    norm.eval()
    assert_close(functional_call(norm, {}, x.float(), state="error"), norm(x.float()))


def test_a_value_of_each_example_cannot_be_committed(net):
    xs, before = torch.rand(5, 4, 3, dtype=torch.float64), _buffers(net)
    for call in (
        lambda: vmap(lambda x: functional_call(net, {}, x, state="commit"))(xs),
        lambda: vmap(grad(lambda x: functional_call(net, {}, x, state="commit").sum()))(xs),
        lambda: jit(vmap(lambda x: functional_call(net, {}, x, state="commit")))(xs),
    ):
        with pytest.raises(
            ValueError, match="'mean'.* differs between the examples.*state='return'.*replace_all_batch"
        ):
            call()
    assert_close(_buffers(net), before)
    assert not _commits.waiting


def test_what_all_examples_agree_on_is_committed():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, x):
            self.calls += 1
            return x * 2

    module = Counts()
    vmap(lambda x: functional_call(module, {}, x, state="commit"))(torch.rand(5))
    assert module.calls == 1
    vmap(lambda x: functional_call(module, {}, x, state="commit"), chunk_size=2)(torch.rand(5))
    assert module.calls == 2
    vmap(vmap(lambda x: functional_call(module, {}, x, state="commit")), chunk_size=1)(torch.rand(5, 2))
    assert module.calls == 3


def test_nothing_is_committed_if_the_transform_fails(net, x):
    before = _buffers(net)

    def broken(params):
        functional_call(net, params, x, state="commit")
        raise KeyError("after the call")

    vector = lambda params: functional_call(net, params, x, state="commit")
    for call, error in ((broken, KeyError), (vector, ValueError)):  # a gradient of a vector
        with pytest.raises(error):
            grad(call)(_params(net))
        with pytest.raises(error):
            vmap(lambda _, call=call: grad(call)(_params(net)))(torch.ones(2))
    with pytest.raises(KeyError):
        jit(broken)(_params(net))
    assert_close(_buffers(net), before)
    assert not _commits.waiting
    assert not _commits._depths


def test_commit_in_a_checkpoint(net, x):
    """It is computed again, and written once."""
    expected = _after(net, x)
    loss = _loss(net, x, state="commit")
    grad(lambda params: checkpoint(loss, params, use_reentrant=False))(_params(net))
    assert_close(_buffers(net), expected)


def test_a_new_shape_cannot_be_committed():
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(0))

        def forward(self, x):
            self.seen = torch.cat([self.seen, x])
            return x

    module = Grows()
    with pytest.raises(ValueError, match=r"new value of 'seen' has shape \(2,\), but the buffer has \(0,\).*'return'"):
        functional_call(module, {}, torch.ones(2), state="commit")
    _, buffers = functional_call(module, {}, torch.ones(2), state="return")
    assert_close(buffers, {"seen": torch.ones(2)})
    assert module.seen.shape == (0,)


def test_tied_buffers_and_absent_ones(x):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("a", torch.zeros(2))
            self.register_buffer("b", self.a)
            self.register_buffer("late", None)

        def forward(self, x):
            self.b += 1
            return x * self.a.sum()

    module = Two()
    output, buffers = functional_call(module, {}, x, state="return")
    assert_close(output, x * 2)
    assert_close(buffers, {"a": torch.ones(2)})
    functional_call(module, {}, x, state="commit")
    assert module.a is module.b
    assert_close(module.a, torch.ones(2))
    assert module.late is None


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_commits_its_vectors(wrap, x):
    torch.manual_seed(0)
    layer = wrap(nn.Linear(3, 2).double())
    params, before = _params(layer), _buffers(layer)
    layer(x)
    expected = _buffers(layer)
    with torch.no_grad():
        for buffer, old in zip(layer.buffers(), before.values(), strict=True):
            buffer.copy_(old)
    assert any(not torch.equal(before[name], expected[name]) for name in expected)
    grad(_loss(layer, x, state="commit"))(params)
    assert_close(_buffers(layer), expected)


# Ensembles: each model has its own slice of the given buffers.

ENSEMBLES = {
    "vmap": lambda call, p, b: vmap(call)(p, b),
    "chunks": lambda call, p, b: vmap(call, chunk_size=2)(p, b),
    "vmap_grad": lambda call, p, b: vmap(grad(lambda p, b: call(p, b).sum()))(p, b),
    "grad_vmap": lambda call, p, b: grad(lambda p: vmap(call)(p, b).sum())(p),
    "jvp_vmap": lambda call, p, b: jvp(lambda p: vmap(call)(p, b), (p,), (p,)),
    "jit_vmap": lambda call, p, b: jit(vmap(call))(p, b),
    "vmap_jit": lambda call, p, b: vmap(jit(call))(p, b),
    "jit_vmap_grad": lambda call, p, b: jit(vmap(grad(lambda p, b: call(p, b).sum())))(p, b),
    "functionalize_vmap": lambda call, p, b: functionalize(vmap(call))(p, b),
    "vmap_functionalize": lambda call, p, b: vmap(functionalize(call))(p, b),
    "vmap_vmap": lambda call, p, b: vmap(lambda p, b: vmap(lambda a: a * call(p, b).sum())(torch.ones(2)))(p, b),
}


@pytest.mark.parametrize("name", ENSEMBLES)
@pytest.mark.parametrize("twice", [False, True])
def test_ensemble_commits(x, name, twice):
    torch.manual_seed(0)
    models = [Net().double() for _ in range(3)]
    rows = [_after(model, *([x, x + 1] if twice else [x])) for model in models]
    params, buffers = stack_module_state(models)
    params = {key: p.detach() for key, p in params.items()}

    def call(params, buffers):
        output = functional_call(models[0], (params, buffers), x, state="commit")
        return output + functional_call(models[0], (params, buffers), x + 1, state="commit") if twice else output

    ENSEMBLES[name](call, params, buffers)
    assert_close(buffers, {key: torch.stack([row[key] for row in rows]) for key in rows[0]})


def test_ensemble_in_another_dimension(x):
    """In a permuted buffer, and with a mapped input."""
    models = [Net().double() for _ in range(3)]
    xs = torch.rand(3, 4, 3, dtype=torch.float64)
    rows = [_after(model, x) for model, x in zip(models, xs, strict=True)]
    params, buffers = stack_module_state(models)
    last = {name: b.movedim(0, -1).contiguous() for name, b in buffers.items()}
    call = lambda p, b, x: functional_call(models[0], (p, b), x, state="commit")
    vmap(call, in_dims=(0, -1, 0))(params, last, xs)
    for name, buffer in last.items():
        assert_close(buffer, torch.stack([row[name] for row in rows], -1))


# Random state.


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_follows_the_randomness_mode(randomness):
    net = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5))
    params, xs = _params(net), torch.ones(2, 3)
    call = lambda x: functional_call(net, params, x)
    first, second = vmap(call, randomness=randomness)(xs)
    assert torch.equal(first == 0, second == 0) == (randomness == "same")
    with pytest.raises(Exception, match="randomness"):
        vmap(call)(xs)
    net.eval()
    assert_close(vmap(call)(xs), net(xs))


def test_dropout_of_an_ensemble_beside_statistics():
    """The state of both: a mask for each model, and the statistics that follow from it."""
    models = [nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2, momentum=1.0, affine=False)) for _ in range(3)]
    params, buffers = stack_module_state(models)
    x = torch.rand(8, 2)
    call = lambda p, b: functional_call(models[0], (p, b), x, state="return")
    output, after = vmap(call, randomness="different", in_dims=(None, 0))(params, buffers)
    assert not torch.equal(output[0], output[1])
    torch.manual_seed(3)
    vmap(lambda p, b: functional_call(models[0], (p, b), x, state="commit"), (None, 0), randomness="same")(
        params, buffers
    )
    torch.manual_seed(3)
    expected = nn.functional.dropout(x, 0.5).mean(0)
    assert_close(buffers["1.running_mean"], expected.expand(3, 2))
    assert after["1.running_mean"].shape == (3, 2)
