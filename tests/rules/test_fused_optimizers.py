"""The fused steps of optimizers under vmap: an ensemble of models, against torch.optim one model at a time."""

from __future__ import annotations

import functools
import itertools
import warnings

import pytest
import torch
from torch import Tensor
from torch.optim._functional import adagrad, adam, adamw, sgd

from functorch_lite import vmap
from tests.support.oracles import loop_vmap

MODELS = 3
SHAPES = [(2, 3), (4,), ()]
WAYS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "one by one": {"foreach": False}}


@pytest.fixture(autouse=True)
def _no_loop():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _options(**choices):
    """Every combination of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def _check(step, states, dtype=torch.float64, tolerance=1e-12):
    """Compare three steps of an ensemble, taken in each of the ways, with those of every model by itself.

    ``step(k, how, counts, grads, params, *states)`` takes step k; there are so many states of each parameter.
    """
    torch.manual_seed(0)
    params = [torch.randn(MODELS, *shape, dtype=dtype) for shape in SHAPES]
    gradients = [[torch.randn_like(x) for x in params] for _ in range(3)]
    trained = [[x.clone() for x in params] for _ in WAYS]
    for ensemble, how in zip(trained, WAYS.values(), strict=True):
        kept = [[torch.zeros_like(x) for x in params] for _ in range(states)]
        counts = [torch.zeros(()) for _ in params]
        for k, grads in enumerate(gradients):
            vmap(functools.partial(step, k, how, counts))([x.clone() for x in grads], ensemble, *kept)
    for i in range(MODELS):
        model = [x[i].clone() for x in params]
        kept = [[torch.zeros_like(x) for x in model] for _ in range(states)]
        counts = [torch.zeros(()) for _ in params]
        for k, grads in enumerate(gradients):
            step(k, {"foreach": False}, counts, [x[i].clone() for x in grads], model, *kept)
        for ensemble in trained:
            for x, y in zip(ensemble, model, strict=True):
                torch.testing.assert_close(x[i], y, rtol=tolerance, atol=tolerance)


ADAM = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6}


@pytest.mark.parametrize("optimizer", [adam, adamw])
@pytest.mark.parametrize(
    "options", _options(lr=[0.1], weight_decay=[0, 0.2], amsgrad=[False, True], maximize=[False, True])
)
def test_adam(optimizer, options):
    def step(k, how, counts, grads, params, means, squares, largest):
        largest = largest if options["amsgrad"] else []
        optimizer(params, grads, means, squares, largest, counts, **how, **options, **ADAM)

    _check(step, states=3)


@pytest.mark.parametrize(
    "options",
    [
        *_options(lr=[0.1], weight_decay=[0, 0.2], momentum=[0.9], nesterov=[False, True], maximize=[False, True]),
        *_options(lr=[0.1], weight_decay=[0.2], momentum=[0, 0.9], dampening=[0.3], nesterov=[False], maximize=[True]),
    ],
)
def test_sgd(options):
    def step(k, how, counts, grads, params, velocities):
        buffers = [None] * len(params) if k == 0 or options["momentum"] == 0 else list(velocities)
        sgd(params, grads, buffers, **how, **{"dampening": 0.0, **options})
        if k == 0 and options["momentum"]:
            for velocity, buffer in zip(velocities, buffers, strict=True):
                velocity.copy_(buffer)

    _check(step, states=1)


@pytest.mark.parametrize(
    "options", _options(lr=[0.1], lr_decay=[0.0, 0.3], weight_decay=[0.0, 0.2], maximize=[False, True])
)
def test_adagrad(options):
    def step(k, how, counts, grads, params, sums):
        adagrad(params, grads, sums, counts, eps=1e-6, **how, **options)

    _check(step, states=1)


def test_single_precision_corrects_the_bias_in_double():
    options = {"beta1": 0.9, "beta2": 0.9999, "eps": 1e-8, "lr": 0.1, "weight_decay": 0.0}

    def step(k, how, counts, grads, params, means, squares):
        adam(params, grads, means, squares, [], counts, amsgrad=False, maximize=False, **how, **options)

    _check(step, states=2, dtype=torch.float32, tolerance=2e-6)


#: Each fused step as a function of tensors only, with a rate, a scale and a cancellation that differ between models.
#: PyTorch's own kernel, run in a loop, is what to compare with.
def _call(fused, lists, **options):
    def func(*tensors: Tensor) -> list[Tensor]:
        tensors = [x.clone() for x in tensors]
        *operands, lr, scale, found_inf = tensors
        count = len(SHAPES)
        groups = [operands[i * count : (i + 1) * count] for i in range(lists)]
        fused(*groups, lr=lr, grad_scale=scale, found_inf=found_inf, **options)
        return operands

    return func


STEPS = {
    "adam": (torch._fused_adam_, 6, {**ADAM, "amsgrad": True}),
    "adamw": (torch._fused_adamw_, 6, {**ADAM, "amsgrad": True}),
    "sgd": (torch._fused_sgd_, 3, {"momentum": 0.9, "dampening": 0.1, "nesterov": True, "is_first_step": False}),
    "adagrad": (torch._fused_adagrad_, 4, {"lr_decay": 0.1, "eps": 1e-6}),
}


@pytest.mark.parametrize("places", ["all", "last", "scalars unbatched", "nested"])
@pytest.mark.parametrize("name", STEPS)
def test_scaled_and_cancelled_steps_with_a_rate_for_each_model(name, places):
    fused, lists, options = STEPS[name]
    func = _call(fused, lists, weight_decay=0.1, maximize=True, **options)
    torch.manual_seed(0)
    counts = name != "sgd"
    shapes = SHAPES * (lists - counts) + [()] * len(SHAPES) * counts
    operands = [torch.rand(MODELS, *shape) + 0.5 for shape in shapes]
    lr, scale, found_inf = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 4.0, 2.0]), torch.tensor([0.0, 1.0, 0.0])
    args, dims = [*operands, lr, scale, found_inf], (0,) * (len(operands) + 3)
    if places == "last":
        args, dims = [x.movedim(0, -1) for x in args], tuple(x.dim() - 1 for x in args)
    elif places == "scalars unbatched":
        args, dims = [*operands, lr[0], scale[1], found_inf[0]], (0,) * len(operands) + (None,) * 3
    expected = loop_vmap(func, dims, args)
    if places == "nested":
        actual = [x[0] for x in vmap(vmap(func))(*[x[None] for x in args])]
    else:
        actual = vmap(func, dims)(*args)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_functional_steps_return_what_the_others_write():
    params, grads = [[torch.randn(MODELS, *shape) for shape in SHAPES] for _ in range(2)]
    options = {"lr": 0.1, "lr_decay": 0.0, "weight_decay": 0.0, "eps": 1e-6, "maximize": False}

    def step(params, grads, sums, counts):
        return torch.ops.aten._fused_adagrad(params, grads, sums, counts, **options)

    before = [x.clone() for x in params]
    sums, counts = [torch.zeros_like(x) for x in params], [torch.ones(MODELS) for _ in params]
    stepped, _, new_sums, _ = vmap(step)(params, grads, sums, counts)
    for x, y, new_x, total, old in zip(params, grads, stepped, new_sums, before, strict=True):
        assert torch.equal(x, old)
        torch.testing.assert_close(total, y * y)
        torch.testing.assert_close(new_x, x - 0.1 * y / (y.abs() + 1e-6))


def test_unscaling_finds_the_models_with_infinite_gradients():
    def func(x, y, found, scale):
        grads, found = [x.clone(), y.clone()], found.clone()
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found, scale)
        return [*grads, found]

    x, y = torch.randn(4, 2, 3), torch.randn(4)
    x[1, 0, 2], y[2] = float("inf"), float("nan")
    args = [x, y, torch.tensor([0.0, 0.0, 0.0, 1.0])[:, None], torch.tensor([0.5, 0.25, 2.0, 1.0])[:, None]]
    actual, expected = vmap(func)(*args), loop_vmap(func, (0,) * 4, args)
    assert expected[2].flatten().tolist() == [0, 1, 1, 1]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_scale_shrinks_and_grows():
    def func(scale, tracker, found):
        scale, tracker = scale.clone(), tracker.clone()
        result = torch._amp_update_scale_(scale, tracker, found, 2.0, 0.5, 3)
        return [scale, tracker, result]

    scale = torch.tensor([8.0, 8.0, 8.0, 2.0**127])
    args = [scale, torch.tensor([0, 2, 2, 2], dtype=torch.int32), torch.tensor([0.0, 0.0, 1.0, 0.0])]
    actual, expected = vmap(func)(*args), loop_vmap(func, (0,) * 3, args)
    assert expected[0].tolist() == [8, 16, 4, 2.0**127]
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
