"""vmap of every operator in PyTorch's sample database against a loop, in all forms: see tests/support/sweep.py.

FUNCTORCH_LITE_SWEEP=full takes every sample, dtype and place of the batch dimension.
"""

from __future__ import annotations

import os
from collections.abc import Collection

import pytest

from functorch_lite import level_depth
from tests.support import exceptions, ops
from tests.support.sweep import Report, sweep

FULL = os.environ.get("FUNCTORCH_LITE_SWEEP") == "full"


def _check(report: Report, kind: str, known: Collection[str]) -> None:
    found = report.forms_with(kind)
    named = {form for form in report.tallies if f"{report.name} ({form})" in known}
    if report.name in known:
        assert found, f"{report.name} is among the exceptions and has no {kind}"
    else:
        assert found == named, report.all(kind)[:3]


@pytest.mark.parametrize("name", ops.OPS)
def test_operator(name):
    report = sweep(ops.OPS[name], extent=ops.FULL if FULL else ops.SHORT)
    assert not report.all("wrong")
    _check(report, "refusals", exceptions.REFUSED)
    _check(report, "crashes", exceptions.FAILING)
    _check(report, "loops", exceptions.LOOPING)
    assert level_depth() == 0
