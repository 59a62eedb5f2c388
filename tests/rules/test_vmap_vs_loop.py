"""vmap of every operator in PyTorch's sample database against a loop, in all forms: see tests/support/sweep.py.

FUNCTORCH_LITE_SWEEP=full takes every sample, dtype and place of the batch dimension.
"""

from __future__ import annotations

import os

import pytest

from functorch_lite import level_depth
from tests.support import exceptions, ops
from tests.support.sweep import sweep

EXTENT = ops.FULL if os.environ.get("FUNCTORCH_LITE_SWEEP") == "full" else ops.SHORT


@pytest.mark.parametrize("name", ops.OPS)
def test_operator(name):
    report = sweep(ops.OPS[name], extent=EXTENT)
    assert not report.all("wrong")
    for kind, known in (
        ("refusals", exceptions.REFUSED),
        ("crashes", exceptions.FAILING),
        ("loops", exceptions.LOOPING),
    ):
        messages = report.all(kind)
        assert bool(messages) == (name in known), (kind, messages[:3])
    assert level_depth() == 0
