"""functional_call on all kinds of modules, beside torch.func.functional_call and plain modules with those tensors."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close

from functorch_lite import functional_call, grad, vmap


class Parent(nn.Module):
    """One submodule under two names, a list, a dictionary, and buffers of both kinds."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.again = self.layer
        self.factors = nn.ParameterList([torch.rand(2) for _ in range(2)])
        self.named = nn.ParameterDict({"shift": torch.rand(2)})
        self.register_buffer("kept", torch.rand(2))
        self.register_buffer("hidden", torch.rand(2), persistent=False)
        self.register_buffer("absent", None)
        self.register_parameter("missing", None)

    def forward(self, x, *, twice=False):
        x = self.layer(x) * self.factors[0] + self.again(x) * self.factors[1] + self.named["shift"]
        x = x + self.kept * self.hidden
        return 2 * x if twice else x


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT


class Counter(nn.Module):
    """Writes one buffer in place and replaces the other."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.mean.mul_(0.5).add_(x.mean(0))
        self.count = self.count + 1
        return x - self.mean


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.register_buffer("a", torch.ones(2))
        self.register_buffer("b", self.a)

    def forward(self, x):
        return self.second(self.first(x)) * self.a + self.b


def _parametrized():
    return parametrize.register_parametrization(nn.Linear(2, 2), "weight", Symmetric())


def _hooked():
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    net[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    net[0].register_forward_hook(lambda module, args, output: output + module.bias)
    net.register_forward_hook(lambda module, args, kwargs, output: output * 3, with_kwargs=True)
    return net


MODULES = {
    "parent": Parent,
    "parametrized": _parametrized,
    "parametrized_child": lambda: nn.Sequential(_parametrized(), nn.Tanh()),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(2, 2)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(2, 2)),
    "old_spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(2, 2)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(2, 2), "weight", 1),
    "hooked": _hooked,
    "counter": Counter,
    "tied": Tied,
    "batch_norm": lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
    "instance_norm": lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
    "lstm": lambda: nn.LSTM(2, 3),
    "compiled": lambda: torch.compile(nn.Linear(2, 2), backend="eager"),
    "no_bias": lambda: nn.Linear(2, 2, bias=False),
}


def _other(module, seed):
    """New tensors for all names: parameters, buffers."""
    generator = torch.Generator().manual_seed(seed)
    new = lambda t: torch.rand(t.shape, generator=generator) if t.is_floating_point() else t.clone()
    return (
        {name: new(p).requires_grad_() for name, p in module.named_parameters()},
        {name: new(b) for name, b in module.named_buffers()},
    )


def _loaded(module, params, buffers):
    """The module with those tensors."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            tensor.copy_({**params, **buffers}[name])
    return module


def _snapshot(module):
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: (tensor, tensor.detach().clone()) for name, tensor in tensors}


def _is_as_before(module, snapshot):
    now = _snapshot(module)
    assert list(now) == list(snapshot)
    for name, (tensor, value) in snapshot.items():
        assert now[name][0] is tensor
        assert_close(now[name][1], value)


@pytest.fixture(params=MODULES)
def make(request):
    return MODULES[request.param]


@pytest.fixture
def module(make):
    torch.manual_seed(0)
    return make()


@pytest.fixture
def x():
    return torch.rand(1, 3, 2)[0].requires_grad_()


def test_values_gradients_and_buffers(make, module, x):
    """As of a module with those tensors, and as of torch.func."""
    params, buffers = _other(module, 1)
    theirs = _other(module, 1)
    plain = _loaded(make(), params, buffers)
    before = _snapshot(module)
    first = lambda output: output[0] if isinstance(output, tuple) else output

    output = first(functional_call(module, (params, buffers), x))
    _is_as_before(module, before)
    output.sin().sum().backward()
    expected = first(plain(x))
    expected.sin().sum().backward()
    assert_close(output, expected)
    for name, p in plain.named_parameters():
        assert_close(params[name].grad, p.grad)
    assert_close(buffers, dict(plain.named_buffers()))

    theirs = {**theirs[0], **theirs[1]}  # of several, torch.func does not write what is replaced
    peer = first(torch.func.functional_call(module, theirs, (x,)))
    assert_close(output, peer)
    assert_close(buffers, {name: theirs[name] for name in buffers})


def test_gradients_of_a_transform(make, module, x):
    params, buffers = _other(module, 2)
    first = lambda output: output[0] if isinstance(output, tuple) else output
    loss = lambda params: first(functional_call(module, (params, buffers), x, state="return")[0]).sin().sum()
    plain = _loaded(make(), params, buffers)
    first(plain(x)).sin().sum().backward()
    if isinstance(module, Counter):
        return  # has none
    gradients = grad(loss)({name: p.detach() for name, p in params.items()})
    for name, p in plain.named_parameters():
        assert_close(gradients[name], p.grad)


@pytest.mark.parametrize("state", ["write", "commit", "return", "error"])
def test_exceptions_leave_the_module(module, state):
    params, buffers = _other(module, 3)
    before, given = _snapshot(module), {**params, **buffers}
    kept = dict(given)

    def broken(*_):
        raise KeyError("from a hook")

    module.register_forward_hook(broken)
    with pytest.raises(KeyError, match="from a hook"):
        functional_call(module, given, torch.rand(3, 2), state=state)
    _is_as_before(module, before)
    assert all(given[name] is tensor for name, tensor in kept.items())


def test_names_and_keywords():
    parent, x = Parent(), torch.rand(3, 2)
    weight = torch.rand(2, 2)
    for name in ("layer.weight", "again.weight"):  # one submodule: its tensors are tied
        found = functional_call(parent, {name: weight}, x, {"twice": True})
        expected = torch.func.functional_call(parent, {name: weight}, (x,), {"twice": True})
        assert_close(found, expected)
    assert_close(functional_call(parent, {"missing": weight, "absent": weight}, x), parent(x))
    assert parent.missing is None
    assert parent.absent is None
    everything = {**dict(parent.named_parameters()), **dict(parent.named_buffers())}
    assert_close(functional_call(parent, everything, x, strict=True), parent(x))
    del everything["hidden"]
    with pytest.raises(ValueError, match="'hidden' are not given"):
        functional_call(parent, everything, x, strict=True)


def test_an_entry_that_is_absent():
    x = torch.rand(3, 2)
    layer = nn.Linear(2, 2)
    assert_close(functional_call(layer, {"bias": None}, x), x @ layer.weight.T)
    layer = nn.Linear(2, 2, bias=False)
    bias = torch.rand(2)
    assert_close(functional_call(layer, {"bias": bias}, x), layer(x) + bias)
    assert layer.bias is None


def test_tied_names(x):
    """Both the tensors that are tied and those of one submodule under two names, beside torch.func."""
    for given in ({"first.weight": torch.rand(2, 2)}, {"second.weight": torch.rand(2, 2)}, {"b": torch.rand(2)}):
        module = Tied()
        for tie in (True, False):
            expected = torch.func.functional_call(module, dict(given), (x,), tie_weights=tie)
            assert_close(functional_call(module, given, x, tie_weights=tie), expected)
    different = {"a": torch.rand(2), "b": torch.rand(2)}
    with pytest.raises(ValueError, match="'a', 'b' share one tensor"):
        functional_call(module, different, x)


def test_what_a_parametrization_computes_can_be_given(x):
    layer = _parametrized()
    weight, bias = torch.rand(2, 2), torch.rand(2)
    assert_close(functional_call(layer, {"weight": weight, "bias": bias}, x), x @ weight.T + bias)
    original = {"parametrizations.weight.original": weight, "bias": bias}
    assert_close(functional_call(layer, original, x), x @ Symmetric()(weight).T + bias)
    slope = grad(lambda w: functional_call(layer, {"weight": w}, x.detach()).sum())(weight)
    assert_close(slope, x.detach().sum(0).expand(2, 2))
    assert parametrize.is_parametrized(layer, "weight")
    assert type(layer).__name__ == "ParametrizedLinear"
    child = nn.Sequential(layer)
    assert_close(functional_call(child, {"0.weight": weight}, x), x @ weight.T + layer.bias)


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_old_hooks_leave_no_tensor_of_the_call(wrap, x):
    layer = wrap(nn.Linear(2, 2))
    before = layer.weight
    given = {name: torch.rand_like(p) for name, p in layer.named_parameters()}
    kept = [weakref.ref(tensor) for tensor in given.values()]
    functional_call(layer, given, x)
    vmap(grad(lambda given: functional_call(layer.eval(), given, x.detach()).sum()))(
        {name: torch.stack([p, p]) for name, p in given.items()}
    )
    assert layer.weight is before
    given.clear()
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)


@pytest.mark.parametrize(
    ("make", "state", "error", "message"),
    [
        (lambda: nn.LazyLinear(2), {}, ValueError, "'weight' is a lazy tensor without a shape. Call the module once"),
        (lambda: torch.jit.script(nn.Linear(2, 2)), {}, TypeError, "the module is a ScriptModule"),
        (
            lambda: nn.Sequential(torch.jit.script(nn.Linear(2, 2))),
            {"0.weight": torch.rand(2, 2)},
            TypeError,
            "its submodule '0' is a ScriptModule",
        ),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), {}, TypeError, "nn.DataParallel copies its module to each device"),
        (
            lambda: torch.compile(nn.Linear(2, 2), backend="eager"),
            {"weight": torch.rand(2, 2)},
            ValueError,
            "OptimizedModule has no parameter or buffer named 'weight'. Did you mean '_orig_mod.weight'?",
        ),
        (
            lambda: nn.Linear(2, 2),
            {"weigth": torch.rand(2, 2)},
            ValueError,
            "no parameter or buffer named 'weigth'. Did you mean 'weight'?",
        ),
        (lambda: 3, {}, TypeError, "expected a module as first argument, got int"),
        (lambda: nn.Linear(2, 2), [1], TypeError, "must be a dictionary of tensors by name.*got a list of int"),
    ],
)
def test_refuses(make, state, error, message):
    with pytest.raises(error, match=message):
        functional_call(make(), state, torch.rand(3, 2))


def test_a_script_module_inside_keeps_its_tensors(x):
    net = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    weight = torch.rand(2, 2)
    found = functional_call(net, {"0.weight": weight}, x)
    assert_close(found, net[1](x @ weight.T + net[0].bias))


def test_options():
    layer = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="kwargs must be a dictionary, got list"):
        functional_call(layer, {}, torch.rand(2), [])
    with pytest.raises(ValueError, match="got state='keep', expected one of 'write'.*'commit'.*'return'.*'error'"):
        functional_call(layer, {}, torch.rand(2), state="keep")


@pytest.mark.parametrize("transformed", [False, True])
def test_backward_hooks(transformed):
    """They see the gradients that they see without a transform."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    seen = []

    def hook(module, inputs, outputs):
        seen.append([*inputs, *outputs])
        return (inputs[0] * 2,)

    handles = [
        net[1].register_full_backward_hook(hook),
        net[2].register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 3,)),
    ]
    params = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    x = torch.rand(4, 2, dtype=torch.float64)
    functional_call(net, params, x).sum().backward()
    (expected,) = seen
    seen.clear()
    loss = lambda params: functional_call(net, params, x).sum()
    if transformed:
        gradients = grad(loss)({name: p.detach() for name, p in params.items()})
    else:
        outputs = torch.func.functional_call(net, params, (x,)).sum()
        gradients = dict(zip(params, torch.autograd.grad(outputs, list(params.values())), strict=True))
    (found,) = seen
    assert_close(found, expected)
    for name, p in params.items():
        assert_close(gradients[name], p.grad)
    for handle in handles:
        handle.remove()


def test_backward_hooks_of_examples():
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double()
    net[1].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))
    params = {name: p.detach() for name, p in net.named_parameters()}
    xs = torch.rand(4, 2, dtype=torch.float64)
    loss = lambda params, x: functional_call(net, params, x).sum()
    found = vmap(grad(loss), in_dims=(None, 0))(params, xs)
    rows = []
    for x in xs:
        net.zero_grad()
        net(x).sum().backward()
        rows.append({name: p.grad.clone() for name, p in net.named_parameters()})
    assert_close(found, {name: torch.stack([row[name] for row in rows]) for name in params})


def test_threads_take_turns():
    """Each call sees the tensors that it was given, whatever other threads give."""
    net = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(20)])
    x = torch.ones(2)
    barrier, wrong = threading.Barrier(4), []

    def work(scale):
        given = {name: scale * torch.eye(2) for name, _ in net.named_parameters()}
        barrier.wait()
        for _ in range(30):
            found = functional_call(net, given, x)
            if not torch.equal(found, scale**20 * x):
                wrong.append((scale, found))

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (0.5, 1.0, 2.0, 0.25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_call_inside_a_call_of_the_same_module():
    layer = nn.Linear(2, 2, bias=False)
    inner, outer, x = torch.rand(2, 2), torch.rand(2, 2), torch.rand(2)
    depth = []

    def call_again(module, args):
        if depth:
            return None
        depth.append(1)
        return (functional_call(layer, {"weight": inner}, args),)

    layer.register_forward_pre_hook(call_again)
    assert_close(functional_call(layer, {"weight": outer}, x), outer @ (inner @ x))
