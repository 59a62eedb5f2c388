"""Opacus: per-sample gradients by vmap(grad) in its functorch mode, and private training on them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.support import assert_equal_on_both

opacus = pytest.importorskip("opacus", reason="opacus is not installed: make clients")
from opacus.grad_sample import GradSampleModule  # noqa: E402
from opacus.layers import DPLSTM, DPMultiheadAttention  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore", "error::functorch_lite.LoopFallbackWarning")


class Scale(nn.Module):
    """A layer that Opacus has no rule for, and so leaves to functorch in every mode."""

    def __init__(self, size):
        super().__init__()
        self.factor, self.bias = nn.Parameter(torch.randn(size)), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return (x * self.factor).tanh() + self.bias


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(10, 6), DPLSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(self.embedding(x))[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(10, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.attention = DPMultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.embedding(x)
        return self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def convolutional():
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.GroupNorm(2, 4), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(4 * 25, 8)),
        *(nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)),
    )


MODELS = {
    "convolutional": (convolutional, lambda n: torch.randn(n, 1, 8, 8)),
    "unknown layer": (lambda: nn.Sequential(nn.Linear(5, 4), Scale(4), nn.Linear(4, 3)), lambda n: torch.randn(n, 5)),
    "lstm": (Lstm, lambda n: torch.randint(10, (n, 7))),
    "attention": (Attention, lambda n: torch.randint(10, (n, 7))),
}


def loop(model, x, y):
    """Per-sample gradients one by one."""
    samples = [F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) for i in range(len(x))]
    rows = [torch.autograd.grad(loss, list(model.parameters())) for loss in samples]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(("name", "force_functorch"), [*((name, True) for name in MODELS), ("unknown layer", False)])
def test_per_sample_gradients(name, force_functorch):
    """`GradSampleModule(model, force_functorch=True)`, against a loop. Layers without a rule need no force."""
    make, inputs = MODELS[name]

    def example():
        model = make()
        x, y = inputs(5), torch.randint(3, (5,))
        expected = loop(model, x, y)
        private = GradSampleModule(model, force_functorch=force_functorch, loss_reduction="sum")
        F.cross_entropy(private(x), y, reduction="sum").backward()
        return [p.grad_sample for p in private.parameters()], expected

    ours, expected = assert_equal_on_both(example)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_private_training(name):
    """Opacus' first example, `PrivacyEngine.make_private`, with grad_sample_mode="functorch"."""
    make, inputs = MODELS[name]

    def example():
        model = make()
        loader = DataLoader(TensorDataset(inputs(24), torch.randint(3, (24,))), batch_size=6)
        engine = opacus.PrivacyEngine()
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode="functorch",
        )
        losses = []
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses, [p.detach() for p in model.parameters()], engine.get_epsilon(delta=1e-5)

    assert_equal_on_both(example, rtol=1e-4, atol=1e-5)


def test_fast_gradient_clipping():
    """Its ghost mode, for layers that have no rule of it."""
    make, inputs = MODELS["unknown layer"]

    def example():
        model = make()
        criterion = nn.CrossEntropyLoss()
        loader = DataLoader(TensorDataset(inputs(24), torch.randint(3, (24,))), batch_size=6)
        model, optimizer, criterion, loader = opacus.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            criterion=criterion,
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode="ghost",
        )
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert_equal_on_both(example, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_its_own_tests_of_per_sample_gradients():
    """The tests that Opacus ships, of all its layers in its hooks and functorch modes, pass on our transforms."""
    pytest.importorskip("hypothesis", reason="Opacus' tests need hypothesis, which is not installed: make clients")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.clients.overlaid", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-c", "/dev/null", "--pyargs", "opacus.tests.grad_samples"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert int(re.search(r"calls of ours: (\d+)", done.stdout)[1]) > 100
