"""TorchOpt: optimizers as functions, under vmap and grad, and implicit differentiation by functorch.vjp."""

import doctest
import functools
import importlib

import functorch
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from functorch_lite import overlay
from tests.clients.support import assert_equal_on_both

torchopt = pytest.importorskip("torchopt", reason="torchopt is not installed: make clients")
pytestmark = pytest.mark.filterwarnings(
    "ignore:We've integrated functorch into PyTorch",
    "ignore:There is a performance drop",  # PyTorch's vmap has no rule for addcmul_
    "ignore:`torch.jit.script` is deprecated",
)


def classifier():
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2), nn.LogSoftmax(-1))


def points(count=30):
    x = torch.randn(count, 2)
    return x, (x[:, 0] * x[:, 1] > 0).long()


OPTIMIZERS = {
    "adam": lambda: torchopt.adam(lr=0.1),
    "adamw": lambda: torchopt.adamw(lr=0.1),
    "sgd with momentum": lambda: torchopt.sgd(lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda: torchopt.rmsprop(lr=0.01),
    "adagrad": lambda: torchopt.adagrad(lr=0.1),
    "clipped": lambda: torchopt.chain(torchopt.clip.clip_grad_norm(max_norm=0.5), torchopt.sgd(lr=0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_functional_optimizer(name):
    """TorchOpt's first example: a functional training loop, with gradients by functorch."""

    def example():
        func, params = functorch.make_functional(classifier())
        x, y = points()
        optimizer = OPTIMIZERS[name]()
        state = optimizer.init(params)
        losses = []
        for _ in range(5):
            grads, loss = functorch.grad_and_value(lambda params: F.nll_loss(func(params, x), y))(params)
            updates, state = optimizer.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
            losses.append(loss.detach())
        return losses, [p.detach() for p in params]

    losses, _ = assert_equal_on_both(example)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["adam", "sgd with momentum", "rmsprop"])
def test_parallel_training(name):
    """Its example of an ensemble: the optimizer's step runs inside vmap."""

    def example():
        models = [classifier() for _ in range(3)]
        func, params, buffers = functorch.combine_state_for_ensemble(models)
        x, y = points()
        optimizer = OPTIMIZERS[name]()
        state = functorch.vmap(optimizer.init)(params)

        def step(params, buffers, state):
            loss_of = lambda params: F.nll_loss(func(params, buffers, x), y)
            grads, loss = functorch.grad_and_value(loss_of)(params)
            updates, state = optimizer.update(grads, state, inplace=False)
            return loss, torchopt.apply_updates(params, updates, inplace=False), state

        losses = []
        for _ in range(5):
            loss, params, state = functorch.vmap(step)(params, buffers, state)
            losses.append(loss)
        return losses, list(params)

    assert_equal_on_both(example)


def maml(norm):
    """Its MAML example: vmap over tasks trains a network for each, and backward() goes through it all."""
    net = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), norm, nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 9, 3))
    ).double()
    func, params, buffers = functorch.make_functional_with_buffers(net)
    inputs, targets = torch.randn(2, 4, 6, 1, 8, 8).double(), torch.randint(3, (2, 4, 6))
    inner = torchopt.sgd(lr=0.1)

    def loss_of_task(grad, support, support_targets, query, query_targets):
        task_params, state = params, inner.init(params)
        for _ in range(3):
            inner_loss = lambda params: F.cross_entropy(func(params, buffers, support), support_targets)
            updates, state = inner.update(grad(inner_loss)(task_params), state, inplace=False)
            task_params = torchopt.apply_updates(task_params, updates, inplace=False)
        logits = func(task_params, buffers, query)
        return F.cross_entropy(logits, query_targets), (logits.argmax(1) == query_targets).sum() / len(query)

    def outer_step(optimizer, losses):
        optimizer.zero_grad()
        losses.sum().backward()
        gradients = [p.grad.clone() for p in params]
        optimizer.step()
        return losses.detach(), gradients

    return params, loss_of_task, outer_step, (inputs[0], targets[0], inputs[1], targets[1])


def test_maml_of_a_batch_of_tasks():
    def example():
        params, loss_of_task, outer_step, batch = maml(nn.GroupNorm(2, 4))
        optimizer = torch.optim.Adam(params, lr=1e-3)
        results = []
        for _ in range(3):
            losses, accuracies = functorch.vmap(functools.partial(loss_of_task, functorch.grad))(*batch)
            results.append((outer_step(optimizer, losses), accuracies))
        return results, [p.detach() for p in params]

    assert_equal_on_both(example)


def test_maml_with_batch_norm():
    """With batch norm, as in TorchOpt's example, PyTorch's transforms get another gradient. Ours is that of a loop."""

    def gradients_by_autograd(loss):
        return lambda params: torch.autograd.grad(loss(params), params, create_graph=True)

    torch.manual_seed(0)
    params, loss_of_task, outer_step, batch = maml(nn.BatchNorm2d(4, track_running_stats=False))
    optimizer = torch.optim.SGD(params, lr=0)
    with overlay():
        losses, _ = functorch.vmap(functools.partial(loss_of_task, functorch.grad))(*batch)
    ours = outer_step(optimizer, losses)
    one_by_one = [loss_of_task(gradients_by_autograd, *task)[0] for task in zip(*batch, strict=True)]
    torch.testing.assert_close(ours, outer_step(optimizer, torch.stack(one_by_one)))


SOLVERS = {
    "cg": lambda: torchopt.linear_solve.solve_cg(),
    "normal_cg": lambda: torchopt.linear_solve.solve_normal_cg(),
    "inv": lambda: torchopt.linear_solve.solve_inv(ns=False),
    "neumann": lambda: torchopt.linear_solve.solve_inv(ns=True, maxiter=100, alpha=0.1),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_implicit_differentiation(solver):
    """Its example of `custom_root`: the derivative of ridge regression by the penalty, against the closed form."""
    features, targets = torch.randn(20, 3).double(), torch.randn(20).double()

    def ridge_loss(params, penalty):
        return ((features @ params - targets) ** 2).mean() / 2 + penalty * (params**2).sum() / 2

    def closed_form(penalty):
        gram = features.T @ features / 20 + penalty * torch.eye(3).double()
        return torch.linalg.solve(gram, features.T @ targets / 20)

    def example():
        @torchopt.diff.implicit.custom_root(functorch.grad(ridge_loss, argnums=0), argnums=1, solve=SOLVERS[solver]())
        def ridge_solver(initial, penalty):
            return closed_form(penalty.detach())

        penalty = torch.tensor(0.7).double().requires_grad_()
        solution = ridge_solver(torch.zeros(3).double(), penalty)
        (derivative,) = torch.autograd.grad(solution.sum(), penalty)
        return derivative

    derivative = assert_equal_on_both(example)
    penalty = torch.tensor(0.7).double()
    step = 1e-6
    expected = (closed_form(penalty + step) - closed_form(penalty - step)).sum() / (2 * step)
    torch.testing.assert_close(derivative, expected, rtol=1e-4, atol=1e-6)


class Inner(torchopt.nn.ImplicitMetaGradientModule, linear_solve=torchopt.linear_solve.solve_normal_cg()):
    """The module of its iMAML example: the inner problem has a proximal term to the meta-parameters."""

    def __init__(self, meta):
        super().__init__()
        self.meta = meta
        self.net = torchopt.module_clone(meta, by="deepcopy", detach_buffers=True)

    def forward(self, x):
        return self.net(x)

    def objective(self, x, y):
        distance = sum(((p - q) ** 2).sum() for p, q in zip(self.net.parameters(), self.meta.parameters(), strict=True))
        return F.mse_loss(self(x), y) + distance / 2

    def solve(self, x, y):
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        with torch.enable_grad():
            for _ in range(50):
                optimizer.zero_grad()
                self.objective(x, y).backward(inputs=list(self.net.parameters()))
                optimizer.step()
        return self


def test_implicit_maml():
    def example():
        meta = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        x = torch.randn(8, 1).double()
        inner = Inner(meta)
        inner.solve(x, x.sin())
        F.mse_loss(inner(x + 1), (x + 1).sin()).backward()
        return [p.grad for p in meta.parameters()]

    gradients = assert_equal_on_both(example)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("module", ["cg", "normal_cg", "inv"])
def test_docstrings_of_the_solvers(module):
    """Its own examples. They are of single precision, and fail for some random numbers with any transforms."""
    module = importlib.import_module(f"torchopt.linear_solve.{module}")
    torch.manual_seed(0)
    with overlay():
        results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0
