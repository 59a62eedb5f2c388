"""Compare vmap with the loop on every case of an operator.

Run as a program it prints the state of all operators: `python -m tests.support.sweep [PART OF A NAME ...]`.
"""

from __future__ import annotations

import collections
import sys
import warnings
from dataclasses import dataclass, field

import torch
from torch.testing._internal.opinfo.core import OpInfo

import functorch_lite
from tests.support import exceptions, ops
from tests.support.oracles import ShapesDiffer, loop_vmap

#: Relative and absolute tolerance by dtype.
TOLERANCE = {torch.float64: 1e-6, torch.complex128: 1e-6, torch.bfloat16: 3e-2, torch.float16: 3e-2}


@dataclass
class Report:
    """What happened in the cases of one operator: a message for each, by kind."""

    passes: int = 0
    wrong: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    loops: set[str] = field(default_factory=set)

    @property
    def kind(self) -> str:
        """The worst that happened."""
        if self.wrong:
            return "wrong"
        if self.crashes:
            return "crashes"
        if self.refusals:
            return "refuses"
        return "passes" if self.passes else "has no case"


def _compare(actual: list[torch.Tensor], expected: list[torch.Tensor], only_shapes: bool) -> str:
    if len(actual) != len(expected):
        return f"{len(actual)} results instead of {len(expected)}"
    for k, (y, z) in enumerate(zip(actual, expected, strict=True)):
        if (y.shape, y.dtype) != (z.shape, z.dtype):
            return f"result {k}: {y.dtype}{list(y.shape)} instead of {z.dtype}{list(z.shape)}"
        tolerance = TOLERANCE.get(y.dtype, 1e-4)
        exact = only_shapes or y.layout != torch.strided
        if not exact and not torch.allclose(y.cpu(), z.cpu(), rtol=tolerance, atol=tolerance, equal_nan=True):
            return f"result {k}: other numbers"
    return ""


def _expected(alternatives: list[ops.Case]) -> tuple[ops.Case, list[torch.Tensor] | None] | None:
    for case in alternatives:
        try:
            return case, loop_vmap(case.func, case.in_dims, case.args, case.example)
        except ShapesDiffer:
            return case, None
        except Exception:  # not a valid call: try milder variations
            continue
    return None


def _run(alternatives: list[ops.Case], name: str, report: Report, where: str) -> None:
    reference = _expected(alternatives)
    if reference is None:
        return
    case, expected = reference
    where = f"{where}, {case.label}"
    only_shapes = name in exceptions.ONLY_SHAPES
    randomness = "error"
    while True:
        torch.manual_seed(0)
        try:
            actual = functorch_lite.vmap(case.func, case.in_dims, randomness=randomness)(*case.args)
            break
        except Exception as error:
            if "randomness='error'" in str(error) and randomness == "error":
                randomness, only_shapes = "different", True
                continue
            if str(error).startswith("vmap: "):
                report.refusals.append(f"{where}: {error}")
            else:
                report.crashes.append(f"{where}: {type(error).__name__}: {str(error)[:300]}")
            return
    if expected is None:
        report.wrong.append(f"{where}: a result, though the examples have results of different shapes")
        return
    difference = _compare(actual, expected, only_shapes)
    if difference:
        report.wrong.append(f"{where}: {difference}")
    else:
        report.passes += 1


def sweep(op: OpInfo) -> Report:
    """Run all cases of the operator, out of place and in place."""
    report = Report()
    name = ops.name_of(op)
    for dtype in ops.dtypes_of(op):
        for in_place in (False, True):
            for alternatives in ops.cases_of(op, dtype, in_place):
                if name in exceptions.CONTIGUOUS_ONLY and any(alternatives[0].in_dims):
                    continue
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("ignore")
                    warnings.simplefilter("always", functorch_lite.LoopFallbackWarning)
                    _run(alternatives, name, report, str(dtype).removeprefix("torch."))
                loops = [w for w in caught if w.category is functorch_lite.LoopFallbackWarning]
                report.loops |= {str(w.message).split()[1] for w in loops}
    return report


def main(parts: list[str]) -> None:
    """Print the state of the operators whose names contain one of the parts."""
    torch.set_num_threads(1)
    kinds: collections.Counter[str] = collections.Counter()
    looping = collections.Counter()
    for name, op in ops.OPS.items():
        if parts and not any(part in name for part in parts):
            continue
        report = sweep(op)
        kinds[report.kind] += 1
        looping.update(report.loops)
        kinds["loops"] += bool(report.loops)
        if report.kind not in ("passes", "has no case") or report.loops:
            loops = f" (loops: {', '.join(sorted(report.loops))})" if report.loops else ""
            print(f"{name}: {report.kind}, {report.passes} cases pass{loops}", flush=True)
            for kind in (report.wrong, report.crashes, report.refusals):
                for message in kind[:2]:
                    print("    " + message[:260].replace("\n", " "))
    print(dict(kinds))
    print("operators that loop:", dict(looping.most_common()))


if __name__ == "__main__":
    main(sys.argv[1:])
