"""Tensor subclasses made of plain tensors pass through: graphs take and return the plain ones."""

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from functorch_lite.compile import (
    aot_function,
    clear_compile_cache,
    min_cut_rematerialization_partition,
    nop,
    num_of_recompilations,
)


def two(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return TwoTensor(*(torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2)))


def parts(x):
    return [x.a, x.b] if isinstance(x, TwoTensor) else [x]


def assert_same(ours, expected):
    assert type(ours) is type(expected)
    for one, other in zip(parts(ours), parts(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("partition", [None, min_cut_rematerialization_partition])
def test_outputs_and_gradients(partition):
    def f(x, plain):
        return (x.sin() * plain).exp(), x.sum(), plain * 2

    compiled = aot_function(f, nop, **({"partition_fn": partition} if partition else {}))
    results = []
    for function in (f, compiled, compiled):
        x, plain = two(0, 3, 2).requires_grad_(), torch.arange(2.0, dtype=torch.float64)
        outputs = function(x, plain)
        gradient = torch.autograd.grad(outputs[0].sum() + outputs[1], x)
        results.append([*outputs, *gradient])
    for found in results[1:]:
        for ours, expected in zip(found, results[0], strict=True):
            assert_same(ours, expected)


def test_graphs_take_plain_tensors():
    seen = []

    def keep(graph, inputs):
        seen.append([tuple(x.shape) for x in inputs])
        assert not any(isinstance(x, TwoTensor) for x in inputs)
        return graph

    aot_function(lambda x, y: x * y, keep)(two(0, 3), torch.ones(3, dtype=torch.float64))
    assert seen == [[(3,), (3,), (3,)]]


def test_writes():
    x, expected = two(1, 4), two(1, 4)
    result = aot_function(lambda x: x.mul_(2).sum(), nop)(x)
    assert_same(result, expected.mul_(2).sum())
    assert_same(x, expected)


def test_what_a_subclass_is_made_of_is_part_of_the_key():
    clear_compile_cache()
    compiled = aot_function(lambda x: x + 1, nop)
    for x in (two(0, 3), two(1, 3), torch.ones(3, dtype=torch.float64)):
        assert_same(compiled(x), x + 1)
    assert num_of_recompilations() == 2
