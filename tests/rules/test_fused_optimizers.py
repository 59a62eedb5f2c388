"""The fused steps of optimizers under vmap: an ensemble of models, against torch.optim one model at a time."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor
from torch.optim._functional import adam

from functorch_lite import vmap
from tests.support.oracles import loop_vmap

MODELS = 3
SHAPES = [(2, 3), (4,), ()]


@pytest.fixture(autouse=True)
def _no_loop():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _options(**choices):
    """Every combination of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def _models(dtype=torch.float64):
    """Parameters and the gradients of three steps, for all models at once."""
    torch.manual_seed(0)
    params = [torch.randn(MODELS, *shape, dtype=dtype) for shape in SHAPES]
    return params, [[torch.randn_like(x) for x in params] for _ in range(3)]


def _train_one_by_one(optimizer, options, dtype=torch.float64):
    """What torch.optim does with each of the models: their parameters, stacked."""
    params, gradients = _models(dtype)
    results = []
    for i in range(MODELS):
        leaves = [x[i].clone().requires_grad_() for x in params]
        stepper = optimizer(leaves, foreach=False, fused=False, **options)
        for step in gradients:
            for leaf, grad in zip(leaves, step, strict=True):
                leaf.grad = grad[i].clone()
            stepper.step()
        results.append([x.detach() for x in leaves])
    return [torch.stack(column) for column in zip(*results, strict=True)]


def _assert_same(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


ADAM = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6}


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("options", _options(lr=[0.1], weight_decay=[0, 0.2], amsgrad=[False, True], maximize=[False, True]))
def test_adam(decoupled, options):
    params, gradients = _models()
    fused = torch._fused_adamw_ if decoupled else torch._fused_adam_

    def step(count, params, grads, means, squares, largest):
        counts = [torch.tensor(count) for _ in params]
        fused(params, grads, means, squares, largest if options["amsgrad"] else [], counts, **options, **ADAM)

    states = [[torch.zeros_like(x) for x in params] for _ in range(3)]
    for count, grads in enumerate(gradients):
        vmap(step, (None, 0, 0, 0, 0, 0))(count + 1.0, params, grads, *states)
    optimizer = torch.optim.AdamW if decoupled else torch.optim.Adam
    _assert_same(params, _train_one_by_one(optimizer, {**options, "betas": (0.9, 0.99), "eps": 1e-6}))


@pytest.mark.parametrize(
    "options",
    _options(lr=[0.1], weight_decay=[0, 0.2], momentum=[0.9], nesterov=[False, True], maximize=[False, True])
    + _options(lr=[0.1], weight_decay=[0.2], momentum=[0, 0.9], dampening=[0.3], nesterov=[False], maximize=[True]),
)
def test_sgd(options):
    params, gradients = _models()
    buffers = [torch.zeros_like(x) for x in params]

    def step(is_first, params, grads, buffers):
        buffers = buffers if options["momentum"] else []
        torch._fused_sgd_(params, grads, buffers, is_first_step=is_first, **{"dampening": 0.0, **options})

    for count, grads in enumerate(gradients):
        vmap(step, (None, 0, 0, 0))(count == 0, params, grads, buffers)
    _assert_same(params, _train_one_by_one(torch.optim.SGD, options))


@pytest.mark.parametrize("options", _options(lr=[0.1], lr_decay=[0.0, 0.3], weight_decay=[0.0, 0.2], maximize=[False, True]))
def test_adagrad(options):
    params, gradients = _models()
    sums = [torch.zeros_like(x) for x in params]

    def step(count, params, grads, sums):
        torch._fused_adagrad_(params, grads, sums, [torch.tensor(count) for _ in params], eps=1e-6, **options)

    for count, grads in enumerate(gradients):
        vmap(step, (None, 0, 0, 0))(count + 1.0, params, grads, sums)
    _assert_same(params, _train_one_by_one(torch.optim.Adagrad, {**options, "eps": 1e-6}))


def test_single_precision_corrects_the_bias_in_double():
    params, gradients = _models(torch.float32)
    states = [[torch.zeros_like(x) for x in params] for _ in range(2)]
    counts = torch.zeros(MODELS)
    options = {"beta1": 0.9, "beta2": 0.9999, "eps": 1e-8, "lr": 0.1, "weight_decay": 0.0}

    def step(count, params, grads, means, squares):
        torch._fused_adam_(params, grads, means, squares, [], [count] * 3, amsgrad=False, maximize=False, **options)

    for grads in gradients:
        counts += 1
        vmap(step)(counts, params, grads, *states)
    expected = _train_one_by_one(torch.optim.Adam, {"betas": (0.9, 0.9999), "lr": 0.1}, torch.float32)
    for x, y in zip(params, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)


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
    params, (grads, *_) = _models()
    options = {"lr": 0.1, "lr_decay": 0.0, "weight_decay": 0.0, "eps": 1e-6, "maximize": False}

    def step(params, grads, sums, counts):
        return torch.ops.aten._fused_adagrad(params, grads, sums, counts, **options)

    before = [x.clone() for x in params]
    sums, counts = [torch.zeros_like(x) for x in params], [torch.ones(MODELS) for _ in params]
    stepped, _, new_sums, _ = vmap(step)(params, grads, sums, counts)
    _assert_same(params, before)
    _assert_same(new_sums, [x * x for x in grads])
    _assert_same(stepped, [x - 0.1 * y / (y.abs() + 1e-6) for x, y in zip(params, grads, strict=True)])


def test_optimizer_function_of_torch():
    """torch.optim's own function for a fused step runs inside vmap."""
    params, gradients = _models()
    states = [[torch.zeros_like(x) for x in params] for _ in range(2)]
    counts = torch.zeros(MODELS, len(SHAPES))

    def step(params, grads, means, squares, counts):
        adam(
            params, grads, means, squares, [], list(counts.unbind()), fused=True,
            amsgrad=False, beta1=0.9, beta2=0.99, lr=0.1, weight_decay=0.0, eps=1e-6, maximize=False,
        )

    for grads in gradients:
        vmap(step)(params, grads, *states, counts)
    assert torch.equal(counts, torch.full((MODELS, len(SHAPES)), 3.0))
    _assert_same(params, _train_one_by_one(torch.optim.Adam, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-6}))


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
