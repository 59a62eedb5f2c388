"""Convolution, pooling, padding, resampling and normalisation under vmap, against a loop over the examples."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_lite import (
    LoopFallbackWarning,
    grad,
    hessian,
    jacrev,
    jvp,
    replace_all_batch_norm_modules_,
    vmap,
)

B = 3


@pytest.fixture(autouse=True)
def _no_loop_fallback() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoopFallbackWarning)
        yield


@dataclass
class Case:
    """A function and the shapes of its tensor arguments for one example."""

    name: str
    func: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]


def case(name: str, func: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Case:
    return Case(name, func, shapes)


def norm_stats(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.batch_norm(x, mean, var.abs() + 1, weight, bias)


CONVOLUTIONS = [
    case("conv1d", lambda x, w, b: F.conv1d(x, w, b, padding=1), (2, 4, 5), (6, 4, 3), (6,)),
    case("conv1d-unbatched", lambda x, w, b: F.conv1d(x, w, b), (4, 5), (6, 4, 3), (6,)),
    case("conv2d", lambda x, w, b: F.conv2d(x, w, b, stride=2), (2, 4, 5, 4), (6, 4, 3, 2), (6,)),
    case("conv2d-no-bias", lambda x, w: F.conv2d(x, w, dilation=2), (1, 2, 5, 5), (3, 2, 2, 2)),
    case("conv2d-same", lambda x, w: F.conv2d(x, w, padding="same"), (1, 2, 4, 4), (3, 2, 2, 3)),
    case("conv2d-groups", lambda x, w, b: F.conv2d(x, w, b, groups=2, padding=1), (2, 4, 4, 3), (6, 2, 3, 3), (6,)),
    case("conv2d-depthwise", lambda x, w: F.conv2d(x, w, groups=4), (2, 4, 4, 3), (8, 1, 2, 2)),
    case("conv3d", lambda x, w, b: F.conv3d(x, w, b), (1, 2, 3, 3, 3), (3, 2, 2, 2, 2), (3,)),
    case("conv_transpose1d", lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2), (2, 4, 3), (4, 3, 2), (3,)),
    case(
        "conv_transpose2d-groups",
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
        (2, 4, 3, 4),
        (4, 3, 3, 2),
        (6,),
    ),
    case("conv_transpose3d", lambda x, w: F.conv_transpose3d(x, w), (1, 2, 2, 2, 2), (2, 3, 2, 2, 2)),
    case("conv_tbc", lambda x, w, b: torch.conv_tbc(x, w, b, 1), (5, 2, 3), (2, 3, 4), (4,)),
]

NORMS = [
    case("batch_norm", lambda x, w, b: F.batch_norm(x, None, None, w, b, True), (3, 4, 5), (4,), (4,)),
    case("batch_norm-2d", lambda x, w: F.batch_norm(x, None, None, w, None, True), (5, 3), (3,)),
    case("batch_norm-plain", lambda x: F.batch_norm(x, None, None, None, None, True), (2, 3, 2, 2)),
    case("batch_norm-eval", norm_stats, (2, 3, 2, 2), (3,), (3,), (3,), (3,)),
    case("layer_norm", lambda x, w, b: F.layer_norm(x, (4, 5), w, b), (2, 3, 4, 5), (4, 5), (4, 5)),
    case("layer_norm-vector", lambda x, w, b: F.layer_norm(x, (5,), w, b), (5,), (5,), (5,)),
    case("layer_norm-no-bias", lambda x, w: F.layer_norm(x, (5,), w), (3, 5), (5,)),
    case("layer_norm-plain", lambda x: F.layer_norm(x, (5,)), (3, 5)),
    case("group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), (3, 4, 3, 2), (4,), (4,)),
    case("group_norm-2d", lambda x, w: F.group_norm(x, 2, w), (3, 6), (6,)),
    case("group_norm-plain", lambda x: F.group_norm(x, 2), (2, 4, 3)),
    case("rms_norm", lambda x, w: F.rms_norm(x, (5,), w), (3, 5), (5,)),
    case("instance_norm", lambda x, w, b: F.instance_norm(x, None, None, w, b), (2, 3, 4, 4), (3,), (3,)),
    case("local_response_norm", lambda x: F.local_response_norm(x, 2), (2, 4, 3)),
]

IMAGES_1D = [(2, 3, 6), (3, 6)]
IMAGES_2D = [(2, 4, 6, 6), (4, 6, 6)]
IMAGES_3D = [(2, 2, 4, 4, 4), (2, 4, 4, 4)]


def pools() -> Iterator[Case]:
    table: list[tuple[list[tuple[int, ...]], dict[str, Callable[[Tensor], Tensor]]]] = [
        (
            IMAGES_1D,
            {
                "avg_pool1d": lambda x: F.avg_pool1d(x, 2, ceil_mode=True),
                "max_pool1d": lambda x: F.max_pool1d(x, 3, stride=2, padding=1),
                "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x, 4),
                "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x, 4),
                "lp_pool1d": lambda x: F.lp_pool1d(x.abs() + 1, 2, 2),
                "max_unpool1d": lambda x: F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2),
                "pad-constant": lambda x: F.pad(x, (1, 2), value=3.0),
                "pad-reflect": lambda x: F.pad(x, (1, 2), "reflect"),
                "pad-replicate": lambda x: F.pad(x, (1, 2), "replicate"),
                "pad-circular": lambda x: F.pad(x, (1, 2), "circular"),
            },
        ),
        (
            IMAGES_2D,
            {
                "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
                "max_pool2d": lambda x: F.max_pool2d(x, 2, dilation=2),
                "max_pool2d-indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[1].double() * x.mean(),
                "max_unpool2d": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
                "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
                "adaptive_avg_pool2d-1": lambda x: F.adaptive_avg_pool2d(x, 1),
                "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, (4, 3)),
                "lp_pool2d": lambda x: F.lp_pool2d(x.abs() + 1, 2, 2),
                "pad2-constant": lambda x: F.pad(x, (1, 0, -1, 2)),
                "pad2-reflect": lambda x: F.pad(x, (1, 2, 0, 1), "reflect"),
                "pad2-replicate": lambda x: F.pad(x, (1, 2, 0, 1), "replicate"),
                "unfold": lambda x: F.unfold(x, 2, stride=2, padding=1),
                "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
                "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 3),
            },
        ),
        (
            IMAGES_3D,
            {
                "avg_pool3d": lambda x: F.avg_pool3d(x, 2),
                "max_pool3d": lambda x: F.max_pool3d(x, 2, stride=1),
                "max_unpool3d": lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2),
                "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, (3, 2, 1)),
                "adaptive_avg_pool3d-1": lambda x: F.adaptive_avg_pool3d(x, 1),
                "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(x, (3, 2, 1)),
                "pad3-reflect": lambda x: F.pad(x, (1, 1, 0, 1, 1, 0), "reflect"),
                "pad3-replicate": lambda x: F.pad(x, (1, 1, 0, 1, 1, 0), "replicate"),
            },
        ),
    ]
    for shapes, functions in table:
        for (name, func), shape in itertools.product(functions.items(), shapes):
            yield case(f"{name}-{len(shape)}d", func, shape)
    yield case("pad-circular-4d", lambda x: F.pad(x, (1, 2, 1, 0), "circular"), (2, 3, 4, 4))
    yield case("fold-2d", lambda x: F.fold(x, (4, 5), 2, stride=2, padding=1), (12, 9))
    yield case("fold-3d", lambda x: F.fold(x, (4, 5), 2, stride=2, padding=1), (2, 12, 9))
    samples = torch.rand(2, 4, 2, dtype=torch.float64)
    fractional = torch.nn.functional.fractional_max_pool2d
    yield case("fractional2d-4d", lambda x: fractional(x, 2, 3, _random_samples=samples), (2, 4, 6, 6))
    yield case("fractional2d-3d", lambda x: fractional(x, 2, 3, _random_samples=samples[:1]), (4, 6, 6))
    samples3 = torch.rand(2, 2, 3, dtype=torch.float64)
    fractional3 = torch.nn.functional.fractional_max_pool3d
    yield case("fractional3d-5d", lambda x: fractional3(x, 2, 2, _random_samples=samples3), (2, 2, 4, 4, 4))
    yield case("fractional3d-4d", lambda x: fractional3(x, 2, 2, _random_samples=samples3[:1]), (2, 4, 4, 4))
    yield case("channel_shuffle", lambda x: F.channel_shuffle(x, 2), (2, 4, 3, 3))


def resamplings() -> Iterator[Case]:
    for mode, shape in [("nearest", (2, 3, 4)), ("nearest", (2, 3, 4, 3)), ("nearest", (1, 2, 2, 3, 2))]:
        yield case(f"{mode}-{len(shape)}d", lambda x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode), shape)
        exact = f"{mode}-exact"
        yield case(f"{exact}-{len(shape)}d", lambda x, mode=exact: F.interpolate(x, scale_factor=1.5, mode=mode), shape)
    for mode, shape in [
        ("linear", (2, 3, 4)),
        ("bilinear", (2, 3, 4, 3)),
        ("bicubic", (1, 2, 4, 3)),
        ("trilinear", (1, 2, 2, 3, 2)),
        ("area", (2, 3, 4, 4)),
    ]:
        yield case(mode, lambda x, mode=mode: F.interpolate(x, scale_factor=1.5, mode=mode), shape)
        if mode in ("bilinear", "bicubic"):
            yield case(f"{mode}-aa", lambda x, mode=mode: F.interpolate(x, (2, 2), mode=mode, antialias=True), shape)
    sample = lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False)  # noqa: E731
    yield case("grid_sample-4d", sample, (2, 3, 4, 4), (2, 3, 2, 2))
    yield case("grid_sample-5d", sample, (1, 2, 3, 3, 3), (1, 2, 2, 2, 3))
    yield case("affine_grid-4d", lambda t: F.affine_grid(t, [2, 3, 4, 3], align_corners=False), (2, 2, 3))
    yield case("affine_grid-5d", lambda t: F.affine_grid(t, [1, 3, 2, 3, 2], align_corners=True), (1, 3, 4))


CASES = [*CONVOLUTIONS, *NORMS, *pools(), *resamplings()]
FEW = [c for c in CASES if c.name in {"conv2d-groups", "layer_norm", "group_norm", "batch_norm", "max_pool2d-4d"}]
each_case = pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
each_of_few = pytest.mark.parametrize("c", FEW, ids=lambda c: c.name)


def batched_sets(c: Case) -> Iterator[tuple[bool, ...]]:
    """All choices of batched arguments, except none."""
    return (s for s in itertools.product([True, False], repeat=len(c.shapes)) if any(s))


def make(c: Case, batched: tuple[bool, ...], size: int = B) -> list[Tensor]:
    shapes = [(size, *shape) if is_batched else shape for shape, is_batched in zip(c.shapes, batched, strict=True)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def loop(func: Callable[..., Tensor], args: list[Tensor], batched: tuple[bool, ...]) -> Tensor:
    return torch.stack([func(*(a[i] if b else a for a, b in zip(args, batched, strict=True))) for i in range(B)])


def place(args: list[Tensor], batched: tuple[bool, ...], last: bool) -> tuple[list[Tensor], tuple[int | None, ...]]:
    """The batch dimensions moved to the end if asked for, in other memory; and the in_dims."""
    if not last:
        return args, tuple(0 if b else None for b in batched)
    moved = [a.movedim(0, -1).contiguous() if b else a for a, b in zip(args, batched, strict=True)]
    return moved, tuple(-1 if b else None for b in batched)


def loss_of(c: Case) -> Callable[..., Tensor]:
    """A number that depends on each element in its own way: sums of normalised values have no gradient."""

    def loss(*args: Tensor) -> Tensor:
        y = c.func(*args)
        weights = torch.linspace(0.3, 1.7, y.numel(), dtype=torch.float64).view(y.shape)
        return (y.sin() * weights).sum()

    return loss


def argnums_of(c: Case) -> tuple[int, ...]:
    # PyTorch differentiates batch norm by the input and the parameters, not by the running statistics.
    return tuple(range(3 if c.name == "batch_norm-eval" else len(c.shapes)))


def reference_gradients(c: Case, args: list[Tensor], batched: tuple[bool, ...]) -> list[Tensor]:
    rows = []
    for i in range(B):
        example = [a[i] if b else a for a, b in zip(args, batched, strict=True)]
        example = [a.detach().clone().requires_grad_(k in argnums_of(c)) for k, a in enumerate(example)]
        rows.append(torch.autograd.grad(loss_of(c)(*example), [example[k] for k in argnums_of(c)]))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@each_case
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_forward(c: Case, last: bool) -> None:
    for batched in batched_sets(c):
        args = make(c, batched)
        placed, in_dims = place(args, batched, last)
        torch.testing.assert_close(vmap(c.func, in_dims)(*placed), loop(c.func, args, batched))


@each_case
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_gradient_per_example(c: Case, last: bool) -> None:
    for batched in batched_sets(c):
        args = make(c, batched)
        placed, in_dims = place(args, batched, last)
        got = vmap(grad(loss_of(c), argnums_of(c)), in_dims)(*placed)
        torch.testing.assert_close(list(got), reference_gradients(c, args, batched))


@each_case
def test_gradient_of_batch(c: Case) -> None:
    for batched in batched_sets(c):
        args = make(c, batched)
        in_dims = tuple(0 if b else None for b in batched)
        got = grad(lambda *a, d=in_dims: vmap(loss_of(c), d)(*a).sum(), argnums_of(c))(*args)
        rows = reference_gradients(c, args, batched)
        expected = [row if batched[k] else row.sum(0) for k, row in zip(argnums_of(c), rows, strict=True)]
        torch.testing.assert_close(list(got), expected)


@each_case
def test_batch_of_size_zero(c: Case) -> None:
    for batched in batched_sets(c):
        one = [torch.randn(shape, dtype=torch.float64) for shape in c.shapes]
        args = make(c, batched, size=0)
        in_dims = tuple(0 if b else None for b in batched)
        assert vmap(c.func, in_dims)(*args).shape == (0, *c.func(*one).shape)
        if "unpool" in c.name:
            continue  # PyTorch's formula has a reshape that is ambiguous without elements
        for k, g in zip(argnums_of(c), vmap(grad(loss_of(c), argnums_of(c)), in_dims)(*args), strict=True):
            assert g.shape == (0, *c.shapes[k])


@each_of_few
def test_two_levels(c: Case) -> None:
    inner_sets = list(batched_sets(c))
    for inner, outer in itertools.product(inner_sets, inner_sets):
        args = [torch.randn(s, dtype=torch.float64) for s in c.shapes]
        args = [torch.randn(B, *a.shape, dtype=a.dtype) if i else a for a, i in zip(args, inner, strict=True)]
        args = [torch.randn(2, *a.shape, dtype=a.dtype) if o else a for a, o in zip(args, outer, strict=True)]
        dims = [tuple(0 if b else None for b in bs) for bs in (inner, outer)]
        differentiated = grad(loss_of(c), argnums_of(c))
        got = vmap(vmap(differentiated, dims[0]), dims[1])(*args)
        for i in range(2):
            example = [a[i] if o else a for a, o in zip(args, outer, strict=True)]
            torch.testing.assert_close([g[i] for g in got], reference_gradients(c, example, inner))


@each_of_few
def test_tangent_of_batch(c: Case) -> None:
    for batched in batched_sets(c):
        args = make(c, batched)
        tangents = [torch.randn_like(a) for a in args]
        in_dims = tuple(0 if b else None for b in batched)
        _, got = jvp(vmap(c.func, in_dims), tuple(args), tuple(tangents))
        _, per_example = vmap(lambda a, t: jvp(c.func, a, t), (in_dims, in_dims))(tuple(args), tuple(tangents))
        rule = lambda *a, s=batched: loop(c.func, list(a), s)  # noqa: E731
        _, expected = torch.autograd.functional.jvp(rule, tuple(args), tuple(tangents), strict=False)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(per_example, expected)


@each_of_few
def test_jacobian(c: Case) -> None:
    args = [torch.randn(shape, dtype=torch.float64) for shape in c.shapes]
    expected = torch.autograd.functional.jacobian(c.func, tuple(args))
    got = jacrev(c.func, tuple(range(len(args))))(*args)
    torch.testing.assert_close(tuple(got), expected)


@each_of_few
def test_second_derivatives(c: Case) -> None:
    args = [0.5 * torch.randn(shape, dtype=torch.float64) for shape in c.shapes]
    expected = torch.autograd.functional.hessian(loss_of(c), tuple(args))
    numbers = tuple(range(len(args)))
    got = jacrev(jacrev(loss_of(c), numbers), numbers)(*args)
    for got_row, expected_row in zip(got, expected, strict=True):
        torch.testing.assert_close(tuple(got_row), expected_row)


@each_of_few
def test_gradient_of_gradients_per_example(c: Case) -> None:
    """A gradient penalty: the outer derivative goes through the rules of the backward operators."""
    every = tuple(range(len(c.shapes)))

    def penalty(gradients: tuple[Tensor, ...]) -> Tensor:
        return sum((g.pow(2).sum() for g in gradients), torch.zeros((), dtype=torch.float64))

    for batched in batched_sets(c):
        args = make(c, batched)
        in_dims = tuple(0 if b else None for b in batched)
        got = grad(lambda *a, d=in_dims: penalty(vmap(grad(loss_of(c), every), d)(*a)), every)(*args)
        leaves = [a.clone().requires_grad_() for a in args]
        total = torch.zeros((), dtype=torch.float64)
        for i in range(B):
            example = [a[i] if b else a for a, b in zip(leaves, batched, strict=True)]
            total = total + penalty(torch.autograd.grad(loss_of(c)(*example), example, create_graph=True))
        torch.testing.assert_close(list(got), list(torch.autograd.grad(total, leaves)))


def test_repeat_keeps_the_batch() -> None:
    x = torch.randn(B, 2, 4)
    torch.testing.assert_close(vmap(lambda x: x.repeat(2, 1, 3))(x), torch.stack([e.repeat(2, 1, 3) for e in x]))


def test_hessian_of_convolution_per_example() -> None:
    x, w = torch.randn(B, 1, 2, 4, dtype=torch.float64), torch.randn(2, 2, 2, dtype=torch.float64)
    func = lambda x: F.conv1d(x, w).tanh().sum()  # noqa: E731
    expected = torch.stack([torch.autograd.functional.hessian(func, example) for example in x])
    torch.testing.assert_close(vmap(hessian(func))(x), expected)


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_average_of_channels_last_images(in_dim: int) -> None:
    """The composite operator reads the memory layout, which is not one example's."""
    x = torch.randn(2, B, 3, 3, 4, dtype=torch.float64).permute(0, 1, 4, 2, 3).movedim(1, in_dim)
    func = lambda x: F.adaptive_avg_pool2d(x, 1)  # noqa: E731
    expected = torch.stack([func(example) for example in x.unbind(in_dim)])
    torch.testing.assert_close(vmap(func, in_dim)(x), expected)
    loss = lambda x: func(x).sin().sum()  # noqa: E731
    expected = torch.stack(
        [torch.autograd.grad(loss(e := example.clone().requires_grad_()), e)[0] for example in x.unbind(in_dim)]
    )
    torch.testing.assert_close(vmap(grad(loss), in_dim)(x), expected)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_batched_running_statistics_are_updated(last: bool) -> None:
    x = torch.randn(B, 4, 3, 2, dtype=torch.float64)
    mean, var = torch.randn(B, 3, dtype=torch.float64), torch.rand(B, 3, dtype=torch.float64)
    expected_mean, expected_var = mean.clone(), var.clone()
    func = lambda x, m, v: F.batch_norm(x, m, v, training=True)  # noqa: E731
    expected = torch.stack([func(x[i], expected_mean[i], expected_var[i]) for i in range(B)])
    (x, mean, var), in_dims = place([x, mean, var], (True,) * 3, last)
    torch.testing.assert_close(vmap(func, in_dims)(x, mean, var), expected)
    torch.testing.assert_close(mean.movedim(in_dims[1], 0), expected_mean)
    torch.testing.assert_close(var.movedim(in_dims[2], 0), expected_var)


def test_statistics_of_one_batch_under_batched_weights() -> None:
    x, w = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(B, 3, dtype=torch.float64)
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    expected_mean, expected_var = mean.clone(), var.clone()
    expected = F.batch_norm(x, expected_mean, expected_var, training=True) * w[:, None, :, None]
    torch.testing.assert_close(vmap(lambda w: F.batch_norm(x, mean, var, w, training=True))(w), expected)
    torch.testing.assert_close((mean, var), (expected_mean, expected_var))


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, torch.nn.BatchNorm2d])
def test_shared_running_statistics_in_training_are_refused(kind: type[torch.nn.Module]) -> None:
    module = kind(3).double()
    x = torch.randn(B, 2, 3, *([4, 4] if kind is torch.nn.BatchNorm2d else []), dtype=torch.float64)
    with pytest.raises(ValueError, match="replace_all_batch_norm_modules_"):
        vmap(module)(x)
    assert torch.equal(module.running_mean, torch.zeros(3, dtype=torch.float64))
    module.eval()
    torch.testing.assert_close(vmap(module)(x), torch.stack([module(example) for example in x]))
    module.train()
    replace_all_batch_norm_modules_(module)
    torch.testing.assert_close(vmap(module)(x), torch.stack([module(example) for example in x]))


@pytest.mark.parametrize("norm", [F.batch_norm, F.instance_norm])
@pytest.mark.parametrize("batched", [(True,) * 5, (True, False, False, True, True), (False, True, False, True, True)])
def test_gradient_in_training_mode(norm: Callable[..., Tensor], batched: tuple[bool, ...]) -> None:
    """The statistics are written after autograd saved them, which does not make them stale."""

    def func(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return norm(x, mean.clone(), var.clone(), w, b, True).sin().square().sum()

    c = case("", func, (4, 3, 5), (3,), (3,), (3,), (3,))
    args = make(c, batched)
    args[4] = args[4].abs() + 1
    gradient = lambda *args: torch.cat([g.flatten() for g in torch.func.grad(func, (0, 1, 2))(*args)])  # noqa: E731
    actual = vmap(grad(func, (0, 1, 2)), tuple(0 if b else None for b in batched))(*args)
    torch.testing.assert_close(torch.cat([g.flatten(1) for g in actual], 1), loop(gradient, args, batched))


@pytest.mark.parametrize("name", ["_native_batch_norm_legit", "_native_batch_norm_legit_no_training"])
def test_batch_norm_variants(name: str) -> None:
    x, w, b = (torch.randn(B, *s, dtype=torch.float64) for s in [(4, 3, 2), (3,), (3,)])
    mean, var = torch.randn(B, 3, dtype=torch.float64), torch.rand(B, 3, dtype=torch.float64)
    func = lambda x, w, b, m, v: getattr(torch.ops.aten, name)(  # noqa: E731
        x, w, b, m, v, *([True] if name.endswith("legit") else []), 0.1, 1e-5
    )[0]
    stats = [mean.clone(), var.clone()]
    expected = loop(func, [x, w, b, *stats], (True,) * 5)
    torch.testing.assert_close(vmap(func)(x, w, b, mean, var), expected)
    torch.testing.assert_close((mean, var), tuple(stats))


def test_batch_norm_with_update() -> None:
    x, mean, var = torch.randn(B, 4, 3), torch.randn(B, 3), torch.rand(B, 3)
    func = lambda x, m, v: torch.ops.aten._batch_norm_with_update(x, None, None, m, v, 0.1, 1e-5)[0]  # noqa: E731
    stats = [mean.clone(), var.clone()]
    torch.testing.assert_close(vmap(func)(x, mean, var), loop(func, [x, *stats], (True,) * 3))
    torch.testing.assert_close((mean, var), tuple(stats))


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 2, 3, 4, 4)])
def test_jacobian_of_an_unbatched_maximum(shape: tuple[int, ...]) -> None:
    """The indices are those of one example, and some kernels read them as if they were in memory for each."""
    x = torch.randn(*shape, dtype=torch.float64)
    func = lambda x: F.adaptive_max_pool3d(x, (2, 3, 2))  # noqa: E731
    torch.testing.assert_close(jacrev(func)(x), torch.autograd.functional.jacobian(func, x))


@pytest.mark.parametrize("dim", [0, -1])
def test_tangent_of_glu(dim: int) -> None:
    x, v = torch.randn(2, B, 4, 6, dtype=torch.float64)
    func = lambda x, v: jvp(lambda x: F.glu(x, dim), (x,), (v,))[1]  # noqa: E731
    torch.testing.assert_close(vmap(func)(x, v), loop(func, [x, v], (True, True)))


def test_convolution_backward_of_batched_gradients() -> None:
    """Every combination of batched arguments of the backward operator itself."""
    for transposed, weight_shape, out in [(False, (6, 2, 3), 6), (True, (4, 3, 3), 6)]:
        length = 7 if transposed else 3
        shapes = ((2, out, length), (2, 4, 5), weight_shape)
        for mask in [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]:

            def backward(g: Tensor, x: Tensor, w: Tensor, t: bool = transposed, m: tuple[bool, ...] = mask) -> Tensor:
                results = torch.ops.aten.convolution_backward(g, x, w, [6], [1], [0], [1], t, [0], 2, m)
                return torch.cat([r.flatten() for r, wanted in zip(results, m, strict=True) if wanted])

            c = case("", backward, *shapes)
            for batched in batched_sets(c):
                args = make(c, batched)
                torch.testing.assert_close(
                    vmap(backward, tuple(0 if b else None for b in batched))(*args), loop(backward, args, batched)
                )
