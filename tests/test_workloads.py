"""What the benchmarks time agrees: ours, torch.func, by hand, and JAX."""

import pytest
import torch
import workloads
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import functorch_lite

ALL = workloads.workloads()


@pytest.mark.parametrize("workload", ALL, ids=lambda workload: workload.name)
class TestWorkloads:
    def test_transforms_and_by_hand(self, workload):
        got = workload.build(functorch_lite)(*workload.arguments)
        assert_close(got, workload.build(torch.func)(*workload.arguments))
        by_hand = workload.by_hand(*workload.arguments)
        assert_close(by_hand if isinstance(by_hand, torch.Tensor) else {name: by_hand[name] for name in got}, got)

    def test_jax(self, workload):
        jax = pytest.importorskip("jax")
        import workloads_jax

        arguments = pytree.tree_map(workloads_jax.array, workload.arguments)
        got = jax.jit(workloads_jax.BUILDERS[workload.name]())(*arguments)
        got = pytree.tree_map(lambda x: torch.tensor(x.tolist()), got)
        assert_close(got, workload.build(functorch_lite)(*workload.arguments), rtol=1e-4, atol=1e-5)


def test_larger_ones_are_the_same_workloads():
    larger = workloads.workloads(larger=True)
    assert [workload.name for workload in larger] == [workload.name for workload in ALL]
