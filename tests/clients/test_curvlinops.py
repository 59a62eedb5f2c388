"""curvlinops: linear operators of curvature matrices, which it applies by vmap over jvp and jacrev."""

import doctest

import pytest
import torch
from torch import nn

from tests.clients.support import assert_equal_on_both

curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed: make clients")
from curvlinops.examples import functorch as by_functorch  # noqa: E402


def problem():
    """The small network and the data of curvlinops' tutorial on matrix-vector products."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 3)).double()
    data = [
        (torch.rand(4, 7).double(), torch.rand(4, 3).double()),
        (torch.rand(2, 7).double(), torch.rand(2, 3).double()),
    ]
    return model, list(model.parameters()), data


MATRICES = {
    "Hessian": (curvlinops.HessianLinearOperator, by_functorch.functorch_hessian),
    "GGN": (curvlinops.GGNLinearOperator, by_functorch.functorch_ggn),
    "EF": (curvlinops.EFLinearOperator, by_functorch.functorch_empirical_fisher),
}


@pytest.mark.parametrize("name", MATRICES)
def test_matrix_products(name):
    """Products with a vector and with the identity, against the matrix that its own checks compute."""
    operator_class, dense = MATRICES[name]
    model, params, data = problem()

    def example():
        operator = operator_class(model, nn.MSELoss(), params, data)
        vector = torch.rand(operator.shape[1], dtype=torch.float64)
        return operator @ vector, operator @ torch.eye(operator.shape[1], dtype=torch.float64)

    _, matrix = assert_equal_on_both(example)
    expected = assert_equal_on_both(lambda: dense(model, nn.MSELoss(), params, data).detach())
    torch.testing.assert_close(matrix.detach(), expected)


def test_block_diagonal_hessian():
    model, params, data = problem()

    def example():
        operator = curvlinops.HessianLinearOperator(model, nn.MSELoss(), params, data, block_sizes=[2, 4])
        return operator @ torch.eye(operator.shape[1], dtype=torch.float64)

    assert_equal_on_both(example)


@pytest.mark.parametrize("loss", [nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss])
def test_monte_carlo_fisher(loss):
    """The samples come from a generator of curvlinops', and are the same."""
    model, params, data = problem()
    if loss is nn.CrossEntropyLoss:
        data = [(x, y.argmax(1)) for x, y in data]
    if loss is nn.BCEWithLogitsLoss:
        data = [(x, y.round()) for x, y in data]

    def example():
        operator = curvlinops.FisherMCLinearOperator(model, loss(), params, data, mc_samples=3)
        return operator @ torch.eye(operator.shape[1], dtype=torch.float64)

    assert_equal_on_both(example)


def test_jacobians():
    model, params, data = problem()

    def example():
        jacobian = curvlinops.JacobianLinearOperator(model, params, data)
        transposed = curvlinops.TransposedJacobianLinearOperator(model, params, data)
        return (
            jacobian @ torch.eye(jacobian.shape[1], dtype=torch.float64),
            transposed @ torch.eye(transposed.shape[1], dtype=torch.float64),
        )

    jacobian, transposed = assert_equal_on_both(example)
    torch.testing.assert_close(jacobian.T, transposed)
    torch.testing.assert_close(jacobian.detach(), by_functorch.functorch_jacobian(model, params, data).detach())


def test_inverse_and_spectrum():
    """Conjugate gradients, traces and diagonals from products with the operators."""
    model, params, data = problem()

    def example():
        ggn = curvlinops.GGNLinearOperator(model, nn.MSELoss(), params, data)
        hessian = curvlinops.HessianLinearOperator(model, nn.MSELoss(), params, data)
        damped = ggn + 0.1 * curvlinops.examples.IdentityLinearOperator(
            [p.shape for p in params], ggn.device, ggn.dtype
        )
        inverse = curvlinops.CGInverseLinearOperator(damped, tolerance=1e-12, eps=0)
        return (
            inverse @ torch.ones(ggn.shape[1], dtype=torch.float64),
            curvlinops.hutchinson_trace(hessian, num_matvecs=5),
            curvlinops.xtrace(ggn, num_matvecs=6),
            curvlinops.hutchinson_diag(hessian, num_matvecs=5),
        )

    assert_equal_on_both(example)


def test_docstring_of_the_hessian():
    """The example in curvlinops' own documentation."""
    from curvlinops import hessian

    def example():
        results = doctest.testmod(hessian)
        return torch.tensor([results.attempted, results.failed])

    attempted, failed = assert_equal_on_both(example)
    assert attempted > 0
    assert failed == 0
