"""torch.optim with gradients of grad(), beside backward(); inside of transforms; its state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from functorch_lite import functional_call, grad, grad_and_value, jit, vmap

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused_adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "foreach_adam": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


@pytest.fixture
def problem():
    """A network, and the loss of its parameters."""
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.rand(8, 3), torch.rand(8, 1)
    return net.double(), lambda net, p: (functional_call(net, p, x.double()) - y.double()).square().mean()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_backward(problem, name):
    net, loss = problem
    other = copy.deepcopy(net)

    def ours(net, optimizer):
        params = dict(net.named_parameters())

        def closure():
            gradients, value = grad_and_value(lambda p: loss(net, p))(params)
            for key, p in params.items():
                p.grad = gradients[key]
            return value

        return lambda: optimizer.step(closure)

    def plain(net, optimizer):
        def closure():
            optimizer.zero_grad()
            value = loss(net, {})
            value.backward()
            return value

        return lambda: optimizer.step(closure)

    optimizers = [OPTIMIZERS[name](model.parameters()) for model in (net, other)]
    steps = [ours(net, optimizers[0]), plain(other, optimizers[1])]
    for _ in range(4):
        assert_close(steps[0](), steps[1]())
    assert_close(dict(net.named_parameters()), dict(other.named_parameters()))
    assert_close(optimizers[0].state_dict(), optimizers[1].state_dict())
    # What is saved and loaded goes on in the same way.
    again = OPTIMIZERS[name](net.parameters())
    again.load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    assert_close(ours(net, again)(), steps[1]())
    assert_close(dict(net.named_parameters()), dict(other.named_parameters()))


@pytest.mark.parametrize("step", ["foreach", "fused"])
def test_a_step_of_each_model_of_an_ensemble(step):
    """PyTorch's functional forms under vmap: each model has its own state."""
    torch.manual_seed(0)
    params, momenta = torch.rand(3, 4), torch.rand(3, 4)

    def update(p, m):
        p, m, g = p.clone(), m.clone(), grad(lambda p: p.sin().sum())(p)
        if step == "foreach":
            torch._foreach_mul_([m], 0.9)
            torch._foreach_add_([m], [g])
            torch._foreach_add_([p], [m], alpha=-0.1)
        else:
            torch._fused_sgd_([p], [g], [m], weight_decay=0.0, momentum=0.9, lr=0.1, dampening=0.0, nesterov=False,
                              maximize=False, is_first_step=False)  # fmt: skip
        return p, m

    found = vmap(update)(params, momenta)
    rows = []
    for p, m in zip(params, momenta, strict=True):
        p = p.clone().requires_grad_()
        optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
        optimizer.state[p]["momentum_buffer"] = m.clone()
        p.sin().sum().backward()
        optimizer.step()
        rows.append((p.detach(), optimizer.state[p]["momentum_buffer"]))
    assert_close(found, tuple(torch.stack(column) for column in zip(*rows, strict=True)))


def test_stacked_parameters_are_those_of_an_optimizer():
    """An ensemble is trained by one optimizer, as the models are one by one."""
    torch.manual_seed(0)
    x, weights = torch.rand(8, 3), torch.rand(5, 3)
    stacked = weights.clone().requires_grad_()
    one_by_one = [w.clone().requires_grad_() for w in weights]
    loss = lambda w: (x @ w).sin().mean()
    optimizers = [torch.optim.Adam([stacked]), torch.optim.Adam(one_by_one)]
    for _ in range(3):
        stacked.grad = vmap(grad(loss))(stacked)
        optimizers[0].step()
        optimizers[1].zero_grad()
        sum(loss(w) for w in one_by_one).backward()
        optimizers[1].step()
    assert_close(stacked, torch.stack(one_by_one))


def test_differentiable_steps():
    """The gradient through a step of an inner loop, by the learning rate."""
    w, x = torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)

    def after(rate):
        inner = lambda w: (w * x).sin().sum()
        for_step = w
        for _ in range(3):
            for_step = for_step - rate * grad(inner)(for_step)
        return inner(for_step)

    rate = torch.tensor(0.1, dtype=torch.float64)
    eps = 1e-6
    expected = (after(rate + eps) - after(rate - eps)) / (2 * eps)
    assert_close(grad(after)(rate), expected, atol=1e-7, rtol=1e-6)


def test_a_scheduler_and_clipping(problem):
    net, loss = problem
    other = copy.deepcopy(net)
    results = []
    for model, ours in ((net, True), (other, False)):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        params = dict(model.named_parameters())
        for _ in range(3):
            optimizer.zero_grad()
            if ours:
                for key, gradient in jit(grad(lambda p, m=model: loss(m, p)))(params).items():
                    params[key].grad = gradient
            else:
                loss(model, {}).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
        results.append(params)
    assert_close(*results)
