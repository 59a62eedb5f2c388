"""Compiled modules do what eager ones do, while they are trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.support import observations
from tests.support.compiled_cases import MODULES, Counting
from tests.support.observations import EAGER, compared, described, tensors_of

STEPS = 3


def _double(module):
    """The module in float64, whose rounding does not hide errors."""
    return module.to(torch.float64)


def _loss(output):
    return sum(y.sin().sum() for y in tensors_of(output) if y.requires_grad)


def train(module, call, make_input, steps=STEPS):
    """What can be seen of some steps of gradient descent: outputs, gradients, parameters, buffers, random numbers."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    seen = {}
    for step in range(steps):
        output = call(make_input())
        for i, y in enumerate(tensors_of(output)):
            seen |= described(f"step {step}, output {i}", y)
        seen[f"step {step}, structure"] = torch.utils._pytree.tree_structure(output)
        optimizer.zero_grad()
        _loss(output).backward()
        for name, p in module.named_parameters():
            seen[f"step {step}, gradient of {name}"] = p.grad
        optimizer.step()
        seen |= {f"step {step}, {name}": x.detach().clone() for name, x in module.state_dict().items()}
        seen[f"step {step}, random state"] = torch.get_rng_state()
    return seen


def _tolerance(key):
    """The first outputs are equal to the last bit. Gradients are rounded otherwise, and so what follows from them."""
    return 0.0 if key.startswith(("step 0, output", "step 0, random")) else 1e3


def _assert_same(actual, expected):
    assert not list(compared(actual, expected, _tolerance))


def _made(name):
    torch.manual_seed(0)
    make, make_input = MODULES[name]
    module = _double(make())
    return module, copy.deepcopy(module), make_input


@pytest.mark.parametrize("min_cut", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_training(name, min_cut):
    module, eager, make_input = _made(name)
    compiled = observations.ours().module(module, min_cut)
    expected = train(eager, eager, make_input)
    _assert_same(train(module, compiled, make_input), expected)


@pytest.mark.parametrize("name", MODULES)
def test_training_compiled_for_arguments(name):
    module, eager, make_input = _made(name)
    compiled = observations.ours().module_for(module, [make_input()])
    _assert_same(train(module, compiled, make_input), train(eager, eager, make_input))


@pytest.mark.parametrize("name", ["mlp", "resnet_block", "transformer_dropout", "dictionary"])
def test_last_batch_is_smaller(name):
    module, eager, make_input = _made(name)
    compiled = observations.ours().module(module)
    last = lambda: make_input()[:1]
    for make in (make_input, last, make_input):
        _assert_same(train(module, compiled, make, 1), train(eager, eager, make, 1))


@pytest.mark.parametrize("name", ["resnet_block", "transformer_dropout", "counting"])
def test_switching_between_training_and_evaluation(name):
    module, eager, make_input = _made(name)
    compiled = observations.ours().module(module)
    for mode in (True, False, True, False):
        module.train(mode)
        eager.train(mode)
        _assert_same(train(module, compiled, make_input, 1), train(eager, eager, make_input, 1))


def test_switching_the_compiled_module():
    module, eager, make_input = _made("transformer_dropout")
    compiled = observations.ours().module(module)
    x = make_input()
    compiled.eval()
    eager.eval()
    assert torch.equal(compiled(x), eager(x))
    compiled.train()
    eager.train()
    torch.manual_seed(2)
    y = compiled(x)
    torch.manual_seed(2)
    assert torch.equal(y, eager(x))


def test_freezing_between_calls():
    module, eager, make_input = _made("mlp")
    compiled = observations.ours().module(module)
    for flag in (True, False, True):
        for net in (module, eager):
            net[0].weight.requires_grad_(flag)
            net[0].weight.grad = None
        _assert_same(train(module, compiled, make_input, 1), train(eager, eager, make_input, 1))


def test_parameters_are_replaced_between_calls():
    module, eager, make_input = _made("mlp")
    compiled = observations.ours().module(module)
    compiled(make_input())
    for net in (module, eager):
        net[0].weight = nn.Parameter(torch.ones_like(net[0].weight))
        net.load_state_dict({name: x * 2 for name, x in net.state_dict().items()})
    _assert_same(train(module, compiled, make_input, 1), train(eager, eager, make_input, 1))


def test_the_input_has_a_gradient():
    module, eager, make_input = _made("resnet_block")
    x = make_input().requires_grad_()
    found = [
        torch.autograd.grad(_loss(net(x)), [x, *module_.parameters()])
        for net, module_ in ((observations.ours().module(module), module), (eager, eager))
    ]
    torch.testing.assert_close(*found)


def test_gradients_accumulate():
    module, eager, make_input = _made("mlp")
    compiled = observations.ours().module(module)
    x = make_input()
    for _ in range(2):
        _loss(compiled(x)).backward()
        _loss(eager(x)).backward()
    for p, q in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_without_grad_mode():
    module, eager, make_input = _made("counting")
    compiled = observations.ours().module(module)
    x = make_input()
    with torch.no_grad():
        for _ in range(2):
            y, z = compiled(x), eager(x)
            assert torch.equal(y, z)
            assert not y.requires_grad
    assert torch.equal(compiled(x), eager(x))
    assert module.calls == eager.calls == 3


def test_keyword_arguments():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, *, scale, shift=None):
            y = self.layer(x) * scale
            return y if shift is None else y + shift

    module, x = _double(Scaled()), torch.rand(2, 4, dtype=torch.float64)
    compiled = observations.ours().module(module)
    for options in ({"scale": 2.0}, {"scale": 3.0}, {"scale": x[:, :1]}, {"scale": 2.0, "shift": x[0, :3]}):
        assert torch.equal(compiled(x, **options), module(x, **options))


def test_the_compiled_module_has_the_same_parameters():
    module = _double(Counting())
    compiled = observations.ours().module(module)
    assert isinstance(compiled, nn.Module)
    assert {id(p) for p in compiled.parameters()} == {id(p) for p in module.parameters()}
    assert {id(p) for p in compiled.buffers()} == {id(p) for p in module.buffers()}


@pytest.mark.parametrize("name", MODULES)
def test_training_is_the_same_whenever_it_runs(name):
    module, eager, make_input = _made(name)
    compiled = EAGER.module(module)
    _assert_same(train(module, compiled, make_input), train(eager, eager, make_input))
