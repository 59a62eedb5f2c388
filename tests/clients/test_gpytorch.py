"""GPyTorch: additive kernels, which it computes by torch.vmap, and our transforms of its models."""

import pytest
import torch

from functorch_lite import grad, hessian, jacrev, jvp, overlay
from tests.clients.support import assert_equal_on_both, calls_of_ours

gpytorch = pytest.importorskip("gpytorch", reason="gpytorch is not installed: make clients")
pytestmark = pytest.mark.filterwarnings("ignore", "error::functorch_lite.LoopFallbackWarning")


class Regression(gpytorch.models.ExactGP):
    """The model of its tutorial on simple GP regression."""

    def __init__(self, x, y, likelihood, kernel):
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(kernel)

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


KERNELS = {
    "RBF": gpytorch.kernels.RBFKernel,
    "Matern": lambda: gpytorch.kernels.MaternKernel(nu=2.5),
    "periodic": gpytorch.kernels.PeriodicKernel,
    "rational quadratic": gpytorch.kernels.RQKernel,
}


def regression(kernel="RBF"):
    torch.manual_seed(0)
    x = torch.linspace(0, 1, 12, dtype=torch.float64)
    y = (x * 6).sin() + torch.randn(12, dtype=torch.float64) * 0.1
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    return Regression(x, y, likelihood, KERNELS[kernel]()).double(), likelihood.double(), x, y


def posterior_mean(model, x):
    model.train()  # its caches belong to one call
    model.eval()
    return model(x).mean


def differences(func, x, step=1e-5):
    """Its derivative by each element of a vector."""
    columns = [(func(x + step * e) - func(x - step * e)) / (2 * step) for e in torch.eye(len(x), dtype=x.dtype)]
    return torch.stack(columns, -1).detach()


def test_additive_kernel():
    """Its additive GP: sums of interaction terms, trained for a few steps."""

    def example():
        x, y = torch.rand(20, 3), torch.randn(20)
        likelihood = gpytorch.likelihoods.GaussianLikelihood()
        base = gpytorch.kernels.RBFKernel(batch_shape=torch.Size([3]), ard_num_dims=1)

        class Additive(Regression):
            def forward(self, x):
                covariances = self.covar_module.base_kernel(x.mT.unsqueeze(-1))
                covariance = gpytorch.utils.sum_interaction_terms(covariances, max_degree=2, dim=-3)
                return gpytorch.distributions.MultivariateNormal(self.mean_module(x), covariance)

        model = Additive(x, y, likelihood, base).train()
        objective = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = -objective(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    losses = assert_equal_on_both(example, rtol=1e-4, atol=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_jacobian_of_the_posterior_mean(kernel):
    model, *_ = regression(kernel)
    x = torch.tensor([0.13, 0.42, 0.77], dtype=torch.float64)
    mean = lambda x: posterior_mean(model, x)
    torch.testing.assert_close(jacrev(mean)(x), differences(mean, x), rtol=1e-4, atol=1e-5)
    with gpytorch.settings.trace_mode():  # its fused kernels refuse derivatives by inputs that do not require grad
        _, tangent = jvp(mean, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, differences(mean, x).sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_hessian_of_the_posterior_mean(kernel):
    model, *_ = regression(kernel)
    x = torch.tensor([0.13, 0.42], dtype=torch.float64)
    total = lambda x: posterior_mean(model, x).sin().sum()
    torch.testing.assert_close(hessian(total)(x), differences(grad(total), x), rtol=1e-4, atol=1e-4)


class Objective(torch.nn.Module):
    """The marginal likelihood as a module: kernels are evaluated late, while it computes."""

    def __init__(self, model, likelihood):
        super().__init__()
        self.model = model.train()
        self.mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)

    def forward(self, x, y):
        return self.mll(self.model(x), y)


def test_vmap_over_hyperparameters():
    """Marginal likelihoods and their gradients for several hyperparameters at once."""
    model, likelihood, x, y = regression()
    module = Objective(model, likelihood)
    params = {name: p.detach() for name, p in module.named_parameters()}
    several = {name: torch.stack([p - 0.3, p, p + 0.5]) for name, p in params.items()}
    objective = lambda params: torch.func.functional_call(module, params, (x, y))
    with overlay(), calls_of_ours() as calls:
        values = torch.vmap(objective)(several)
        gradients = torch.vmap(torch.func.grad(objective))(several)
    assert calls
    for i in range(3):
        one = {name: p[i].clone().requires_grad_() for name, p in several.items()}
        value = objective(one)
        torch.testing.assert_close(values[i], value.detach())
        expected = torch.autograd.grad(value, list(one.values()))
        torch.testing.assert_close([g[i] for g in gradients.values()], list(expected))
