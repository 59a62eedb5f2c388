"""torch.library.custom_op with register_autograd under transforms."""

from __future__ import annotations

import pytest
import torch

from functorch_lite import LoopFallbackWarning, grad, hessian, jacfwd, jvp, vmap
from tests.support.nesting import COMPOSITIONS, OURS, REFERENCE, compose

DOUBLE = torch.float64


@torch.library.custom_op("custom_operator_test::square", mutates_args=())
def square(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    return factor * x * x


@square.register_fake
def _(x, factor=1.0):
    return torch.empty_like(x)


def keep(ctx, inputs, output):
    x, ctx.factor = inputs
    ctx.save_for_backward(x)


square.register_autograd(lambda ctx, g: (3 * ctx.factor * ctx.saved_tensors[0] * g, None), setup_context=keep)


@square.register_vmap
def _(info, in_dims, x, factor=1.0):
    return square(x, factor), in_dims[0]


@torch.library.custom_op("custom_operator_test::pair", mutates_args=())
def pair(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x * y, (x > y).long()


def keep_both(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.mark_non_differentiable(output[1])


pair.register_autograd(
    lambda ctx, g, _: (g * ctx.saved_tensors[1], 2 * g * ctx.saved_tensors[0]), setup_context=keep_both
)


@torch.library.custom_op("custom_operator_test::total", mutates_args=())
def total(xs: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(xs).sum(0)


total.register_autograd(lambda ctx, g: [g, g], setup_context=lambda ctx, inputs, output: None)


@torch.library.custom_op("custom_operator_test::numpy_sine", mutates_args=())
def numpy_sine(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.numpy()).sin()


numpy_sine.register_autograd(lambda ctx, g: torch.from_numpy(g.numpy()), setup_context=lambda ctx, inputs, output: None)


@pytest.fixture
def x():
    return torch.tensor([0.4, 1.3, -0.8], dtype=DOUBLE)


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_agrees_with_nested_autograd(composition, x):
    function = lambda x: square(x, 2.0)
    result = compose(composition, OURS, function)(x)
    torch.testing.assert_close(result, compose(composition, REFERENCE, function)(x))


@pytest.mark.filterwarnings("ignore::functorch_lite.LoopFallbackWarning")
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_several_outputs_and_no_vmap(composition, x):
    function = lambda x: pair(x, x.sin())[0]
    result = compose(composition, OURS, function)(x)
    torch.testing.assert_close(result, compose(composition, REFERENCE, function)(x))


def test_loop_warns(x):
    with pytest.warns(LoopFallbackWarning, match="custom_operator_test::pair"):
        torch.testing.assert_close(vmap(grad(lambda v: pair(v, v.detach())[0]))(x), x)


def test_jacobians(x):
    torch.testing.assert_close(jacfwd(square)(x), torch.diag(3 * x))
    torch.testing.assert_close(hessian(lambda x: square(x).sum())(x), 3 * torch.eye(3, dtype=DOUBLE))
    push = lambda y: jvp(lambda y: pair(x, y), (y,), (torch.ones_like(y),))
    (_, mask), (tangent, no_tangent) = push(x + 1)
    torch.testing.assert_close(tangent, 2 * x)
    torch.testing.assert_close(no_tangent, torch.zeros_like(mask))


def test_forward_mode_that_cannot_be_derived(x):
    torch.testing.assert_close(grad(lambda x: total([x, x * x]).sum())(x), 1 + 2 * x)
    with pytest.raises(NotImplementedError, match=r"^jvp: the operator custom_operator_test_total.*list of tensors"):
        jvp(lambda x: total([x, x]), (x,), (x,))
    with pytest.raises(NotImplementedError, match=r"^jvp: the operator custom_operator_test_numpy_sine.*numpy"):
        jvp(numpy_sine, (x,), (x,))


def test_operator_without_a_derivative(x):
    @torch.library.custom_op("custom_operator_test::bare", mutates_args=())
    def bare(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        jvp(bare, (x,), (x,))
    torch.testing.assert_close(jvp(lambda y: y * bare(x), (x,), (x,))[1], x * (x + 1))
