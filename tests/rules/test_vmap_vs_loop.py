"""vmap of every operator in PyTorch's sample database against a loop, with each argument batched at each place."""

from __future__ import annotations

import pytest

from functorch_lite import level_depth
from tests.support import exceptions, ops
from tests.support.sweep import sweep


@pytest.mark.parametrize("name", ops.OPS)
def test_operator(name):
    report = sweep(ops.OPS[name])
    assert not report.wrong, report.wrong[:3]
    assert bool(report.refusals) == (name in exceptions.REFUSED), report.refusals[:3]
    assert bool(report.crashes) == (name in exceptions.FAILING), report.crashes[:3]
    assert bool(report.loops) == (name in exceptions.LOOPING), report.loops
    assert level_depth() == 0
