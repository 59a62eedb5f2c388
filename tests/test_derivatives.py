"""Derivatives of every operator in PyTorch's sample database: see tests/support/derivatives.py.

FUNCTORCH_LITE_SWEEP=full takes every sample.
"""

from __future__ import annotations

import os

import pytest

import functorch_lite as fl
from tests.support import derivatives, exceptions, ops

EXTENT = ops.FULL if os.environ.get("FUNCTORCH_LITE_SWEEP") == "full" else ops.Extent(1, None, None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, op in ops.OPS.items() if op.supports_autograd])
def test_operator(name):
    report = derivatives.sweep(ops.OPS[name], {derivatives.OURS: fl}, list(derivatives.FORMS), EXTENT)
    assert not report.all("wrong")
    refused = report.all("refused")
    if name not in exceptions.WITHOUT_DERIVATIVE:
        assert not refused
    elif EXTENT == ops.FULL:
        assert refused, f"{name} is among the exceptions and refuses nothing"
    assert fl.level_depth() == 0
