"""Every transform, and every ordered pair and triple, against nested `torch.autograd` and loops.

Triples take six functions each, others for each triple; FUNCTORCH_LITE_SWEEP=full takes all of them. From the fourth
derivative on there is one variable and a few functions, for the reference grows too fast.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.support.functions import FUNCTIONS, REFERENCES
from tests.support.transforms import compose, compositions, sample

FULL = os.environ.get("FUNCTORCH_LITE_SWEEP") == "full"
FUNCTIONS_PER_TRIPLE = 6

#: Writes into a tensor of zeros that it makes. Where only the tangent of a tangent differs between the examples of an
#: outer vmap (four triples of forward mode), the write is refused with an error that says so; it is never wrong.
WRITERS = {"write_into_constant"}


def _check(names: tuple[str, ...], function: str) -> None:
    x = sample(names, size=1 if _is_high_order(names) else 2)
    try:
        result = compose(names, FUNCTIONS[function], "ours")(x)
    except ValueError as error:
        if function in WRITERS and "writes batched values into a tensor that is not batched" in str(error):
            return
        raise
    expected = compose(names, REFERENCES.get(function, FUNCTIONS[function]), "reference")(x)
    torch.testing.assert_close(result, expected.detach(), rtol=1e-7, atol=1e-8)


def _is_high_order(names: tuple[str, ...]) -> bool:
    """Whether nested double backward needs minutes and gigabytes for more than one variable."""
    return sum({"vmap": 0, "hessian": 2}.get(name, 1) for name in names) >= 4


def _functions_for(names: tuple[str, ...]) -> list[str]:
    if _is_high_order(names):
        return ["sin", "polynomial", "exp_log", "in_place"]
    all_functions = list(FUNCTIONS)
    if FULL or len(names) < 3:
        return all_functions
    start = compositions(3).index(names) * FUNCTIONS_PER_TRIPLE
    return [all_functions[(start + i) % len(all_functions)] for i in range(FUNCTIONS_PER_TRIPLE)]


@pytest.mark.parametrize("names", compositions(1) + compositions(2) + compositions(3), ids="-".join)
def test_composition(names):
    for function in _functions_for(names):
        try:
            _check(names, function)
        except Exception as error:
            error.add_note(f"function: {function}")
            raise
