"""laplace-torch: posteriors over weights, from Jacobians and per-sample gradients by torch.func, or from curvlinops."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.support import assert_equal_on_both

laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed: make clients")
from laplace import curvature  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore", "error::functorch_lite.LoopFallbackWarning")


def regression():
    """A network trained on a noisy sine, as in its regression example."""
    torch.manual_seed(711)
    x = torch.rand(60, 1) * 8
    y = x.sin() + torch.randn_like(x) * 0.3
    model = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1))
    return (
        trained(model, nn.MSELoss(), x, y),
        DataLoader(TensorDataset(x, y), batch_size=20),
        torch.linspace(-5, 13, 20)[:, None],
    )


def classification():
    torch.manual_seed(711)
    x = torch.randn(60, 4)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return (
        trained(model, nn.CrossEntropyLoss(), x, y),
        DataLoader(TensorDataset(x, y), batch_size=20),
        torch.randn(10, 4),
    )


def trained(model, loss, x, y):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model


TASKS = {"regression": regression, "classification": classification}
BACKENDS = {
    "curvlinops GGN": curvature.CurvlinopsGGN,
    "curvlinops EF": curvature.CurvlinopsEF,
    "GGN": curvature.GGNInterface,
    "EF": curvature.EFInterface,
}


def fitted(task, backend, subset, structure):
    model, loader, x = TASKS[task]()
    posterior = laplace.Laplace(
        model, task, subset_of_weights=subset, hessian_structure=structure, backend=BACKENDS[backend]
    )
    posterior.fit(loader)
    posterior.optimize_prior_precision(method="marglik", n_steps=10)
    result = posterior(x) if task == "regression" else (posterior(x, link_approx="probit"),)
    return (
        *(r.detach() for r in result),
        posterior.log_marginal_likelihood().detach(),
        posterior.prior_precision.detach(),
    )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("backend", "structure", "subset"),
    [
        ("curvlinops GGN", "full", "all"),
        ("curvlinops GGN", "full", "last_layer"),
        ("curvlinops GGN", "diag", "all"),
        ("curvlinops GGN", "kron", "all"),
        ("curvlinops EF", "full", "all"),
        ("GGN", "full", "all"),
        ("EF", "full", "all"),
        ("EF", "full", "last_layer"),
        ("EF", "diag", "all"),
    ],
)
def test_fit_tune_predict(task, subset, backend, structure):
    """Its first example: fit, tune the prior, predict. Other last-layer fits call no transform."""
    assert_equal_on_both(lambda: fitted(task, backend, subset, structure), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_ella(task):
    """Its example of accelerated linearised Laplace, whose features are Jacobian-vector products."""

    def example():
        model, loader, x = TASKS[task]()
        ella = laplace.ELLA(model, task, subsample_size=20, n_eigenvalues=5, backend=curvature.GGNInterface)
        ella.fit(loader)
        result = ella(x) if task == "regression" else (ella(x),)
        return [r.detach() for r in result]

    assert_equal_on_both(example, rtol=1e-3, atol=1e-3)


def test_functional_laplace():
    """Its example of a Gaussian process posterior over functions."""

    def example():
        model, loader, x = regression()
        posterior = laplace.FunctionalLaplace(model, "regression", n_subset=30, backend=curvature.CurvlinopsGGN)
        posterior.fit(loader)
        posterior.optimize_prior_precision()
        return [r.detach() for r in posterior(x)]

    assert_equal_on_both(example, rtol=1e-3, atol=1e-3)


def test_training_by_the_marginal_likelihood():
    """Its example of online hyperparameter tuning."""

    def example():
        model, loader, x = regression()
        posterior, *_ = laplace.marglik_training(
            model, loader, "regression", "full", curvature.GGNInterface, n_epochs=6, n_hypersteps=3, marglik_frequency=2
        )
        return [r.detach() for r in posterior(x)]

    assert_equal_on_both(example, rtol=1e-3, atol=1e-3)
