"""Operators on lists of tensors under vmap, against a loop."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from functorch_lite import grad, jvp, vmap
from tests.support.oracles import loop_vmap

#: Every foreach operator of this PyTorch, in place and out of place.
OVERLOADS = {
    f"{schema.name}.{schema.overload_name}".removeprefix("aten::").removesuffix("."): schema
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("aten::_foreach_") and not schema.overload_name.endswith("out")
}
SHAPES = [(2, 3), (4,), ()]
#: One dimension for each tensor argument: alike, of which one call is made, and not alike.
PLACES = {"first": lambda i, rank: 0, "last": lambda i, rank: rank, "mixed": lambda i, rank: 0 if i % 2 else rank}


@pytest.fixture(autouse=True)
def _no_loop():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _function_and_examples(name):
    """The operator as a function of tensors only, which returns what it computes or writes, and one example of them."""
    schema = OVERLOADS[name]
    packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::"))
    overload = getattr(packet, schema.overload_name or "default")
    shapes = [(3, 3), (2, 2)] if "_mm" in name else SHAPES
    template, example = [], []
    for argument in schema.arguments:
        kind = str(argument.type)
        if kind == "List[Tensor]":
            template.append(slice(len(example), len(example) + len(shapes)))
            example += [torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1 for shape in shapes]
        elif kind == "Tensor":
            template.append(len(example))
            example.append(torch.rand((len(shapes),) if argument.name == "scalars" else (), dtype=torch.float64))
        elif kind == "List[number]":
            template.append([0.5, 2.0, 1.5])
        elif kind == "number":
            template.append(2.0)
        else:
            break  # options with defaults
    positional = len(template) - sum(argument.kwarg_only for argument in schema.arguments[: len(template)])
    keywords = {a.name: v for a, v in zip(schema.arguments[positional:], template[positional:], strict=False)}

    def func(*tensors: Tensor) -> list[Tensor]:
        tensors = list(tensors)
        values = [tensors[v] if isinstance(v, (slice, int)) else v for v in template[:positional]]
        written = schema.name.endswith("_")
        if written:
            values[0] = [x.clone() for x in values[0]]
        result = overload(*values, **keywords)
        return values[0] if written else list(result)

    return func, example


def _check(func, in_dims, args, example):
    for actual, expected in zip(vmap(func, in_dims)(*args), loop_vmap(func, in_dims, args, example), strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", OVERLOADS)
def test_all_batched(name, place):
    func, example = _function_and_examples(name)
    in_dims = tuple(PLACES[place](i, x.dim()) for i, x in enumerate(example))
    args = [torch.stack([x, x * 0.5, x * 0.8], dim) for x, dim in zip(example, in_dims, strict=True)]
    _check(func, in_dims, args, example)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("name", OVERLOADS)
def test_no_and_one_example(name, size):
    func, example = _function_and_examples(name)
    args = [x.expand(size, *x.shape) for x in example]
    _check(func, (0,) * len(args), args, example)


@pytest.mark.parametrize("name", OVERLOADS)
def test_some_elements_are_not_batched(name):
    func, example = _function_and_examples(name)
    written = OVERLOADS[name].name.endswith("_")
    dims = [0 if i % 2 == 0 or (written and i < len(SHAPES)) else None for i in range(len(example))]
    args = [x if dim is None else torch.stack([x, x * 0.5]) for x, dim in zip(example, dims, strict=True)]
    _check(func, tuple(dims), args, example)


@pytest.mark.parametrize("name", ["_foreach_add.List", "_foreach_mul_.ScalarList", "_foreach_addcdiv_.Tensor"])
def test_nested(name):
    func, example = _function_and_examples(name)
    args = [torch.rand(2, 3, *x.shape, dtype=x.dtype) for x in example]
    inner = [0 if i % 3 else x.dim() for i, x in enumerate(example)]
    moved = [x if dim == 0 else x.movedim(1, -1) for x, dim in zip(args, inner, strict=True)]
    actual = vmap(vmap(func, tuple(inner)))(*moved)
    expected = [loop_vmap(func, (0,) * len(args), [x[i] for x in args]) for i in range(2)]
    for y, first, second in zip(actual, *expected, strict=True):
        torch.testing.assert_close(y, torch.stack([first, second]))


def test_elements_of_different_dtypes():
    def func(x, n, s):
        return torch._foreach_add([x, n, s], [n, x, x], alpha=2)

    x, n, s = torch.rand(3, 2), torch.arange(3), torch.rand(3, dtype=torch.float64)
    _check(func, (0, 0, 0), [x, n, s], [])
    _check(func, (0, None, 0), [x, n[1], s], [])


def test_writing_into_parameters():
    def func(x, y):
        params = [x.clone(), y.clone()]
        torch._foreach_mul_(params, 0.5)
        torch._foreach_add_(params, [y, x], alpha=-1)
        torch._foreach_copy_(params[:1], params[1:])
        torch._foreach_zero_(params[1:])
        return params

    _check(func, (0, 1), [torch.rand(3, 2), torch.rand(2, 3)], [])


def test_writing_into_tensors_made_inside():
    def func(x):
        sums, copies = [torch.zeros(2), torch.ones(())], [torch.empty(2), torch.empty(2)]
        torch._foreach_add_(sums, [x, x.sum()], alpha=2)
        torch._foreach_copy_(copies, [x, torch.ones(2)])
        return *sums, *copies

    _check(func, (1,), [torch.rand(2, 3)], [])


def test_written_tensors_are_those_of_the_caller():
    x = torch.rand(3, 2)
    expected = x * 2 + 1

    def func(x):
        torch._foreach_mul_([x], 2)
        torch._foreach_add_([x], [torch.ones(2)])
        return x

    vmap(func)(x)
    torch.testing.assert_close(x, expected)


def test_derivatives():
    def func(x, y):
        a, b = torch._foreach_mul(torch._foreach_add([x, y], 1.0), [y, x])
        return (a * b.exp()).sum()

    def with_norm(x, y):  # which has no derivative in PyTorch's forward mode
        return torch._foreach_norm([x, x * y])[1] + func(x, y)

    x, y = torch.rand(3, 2), torch.rand(3, 2)
    gradients = vmap(grad(with_norm))(x, y)
    tangents = vmap(lambda x, y, v: jvp(lambda x: func(x, y), (x,), (v,))[1])(x, y, x)
    outside = grad(lambda x: vmap(with_norm)(x, y).sum())(x)
    for i in range(3):
        leaf = x[i].clone().requires_grad_()
        (expected,) = torch.autograd.grad(with_norm(leaf, y[i]), leaf)
        torch.testing.assert_close(gradients[i], expected)
        torch.testing.assert_close(outside[i], expected)
        (expected,) = torch.autograd.grad(func(leaf, y[i]), leaf)
        torch.testing.assert_close(tangents[i], expected @ x[i])


def test_lists_of_different_lengths():
    def func(x):
        return torch._foreach_add([x, x], [x.sum()])[0]

    with pytest.raises(ValueError, match=r"vmap: aten::_foreach_add got lists of 2 and of 1 elements\. All lists must"):
        vmap(func)(torch.rand(3, 2))


def test_another_number_of_scalars():
    def func(x, scalars):
        return torch._foreach_addcmul([x], [x], [x], scalars)[0]

    with pytest.raises(ValueError, match="got 1 tensors and 2 scalars. There must be one scalar for each tensor"):
        vmap(func)(torch.rand(3, 2), torch.rand(3, 2))


def test_lists_that_are_batched_alike_take_one_call():
    def func(x, y):
        return torch._foreach_maximum(torch._foreach_exp([x, y]), [y, x])

    x, y = torch.rand(3, 2), torch.rand(3, 2)
    alike, other = make_fx(vmap(func))(x, y), make_fx(vmap(func, (0, 1)))(x, y.t())
    assert [node.target.name() for node in alike.graph.nodes if "foreach" in str(node.target)] == [
        "aten::_foreach_exp",
        "aten::_foreach_maximum.List",
    ]
    assert not any("maximum" in str(node.target) for node in other.graph.nodes)
    for actual, expected in zip(other(x, y.t()), alike(x, y), strict=True):
        torch.testing.assert_close(actual, expected)
