"""Compare vmap with the loop on every case of an operator.

Run as a program it prints what happened, as a table by form:
`python -m tests.support.sweep [--peer] [--full] [PART OF A NAME ...]`.
"""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.testing._internal.opinfo.core import OpInfo

import functorch_lite as fl
from tests.support import command_line, exceptions, forms, ops
from tests.support.cases import Case, cases_of
from tests.support.forms import Function, Side
from tests.support.oracles import ShapesDiffer

#: Relative to each number, and to the largest one of a tensor, for sums may be rounded in another order.
TOLERANCE = {torch.float64: 1e-7, torch.complex128: 1e-7, torch.bfloat16: 2e-2}
DEFAULT_TOLERANCE = 1e-5

_LOOP_WARNINGS = r"vmap: (\S+) has no batching rule|.*not yet implemented the batching rule for (\S+)\. "


def _our_vjp(func: Function, primals: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]):
    outputs, pullback = fl.vjp(func, *primals)
    return [*outputs, *pullback(list(cotangents))]


def _our_jvp(func: Function, primals: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor]):
    outputs, tangents_out = fl.jvp(func, tuple(primals), tuple(tangents))
    return [*outputs, *tangents_out]


OURS = Side("functorch_lite", lambda f, dims, mode: fl.vmap(f, dims, randomness=mode), _our_vjp, _our_jvp)


def peer() -> Side:
    """torch.func, as another side."""
    torch._C._functorch._set_vmap_fallback_warning_enabled(True)

    def vjp(func: Function, primals: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]):
        outputs, pullback = torch.func.vjp(func, *primals)
        return [*outputs, *pullback(list(cotangents))]

    def jvp(func: Function, primals: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor]):
        outputs, tangents_out = torch.func.jvp(func, tuple(primals), tuple(tangents))
        return [*outputs, *tangents_out]

    return Side("torch.func", lambda f, dims, mode: torch.func.vmap(f, dims, randomness=mode), vjp, jvp)


@dataclass
class Tally:
    """What one side did in the cases of one form of an operator.

    A case passes if the results are those of the loop. ``looped`` of the passes ran an operator once for each example;
    ``loops`` are their names. Of the others there is a message each.
    """

    cases: int = 0
    passes: int = 0
    looped: int = 0
    wrong: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)

    def numbers(self) -> list[int]:
        """The columns of the table."""
        return [self.cases, self.passes, self.looped, len(self.wrong), len(self.refusals), len(self.crashes)]


@dataclass
class Report:
    """What happened to one operator: a tally for each form and side, and where the first side is behind the second."""

    name: str
    tallies: dict[str, dict[str, Tally]] = field(default_factory=dict)
    behind: list[str] = field(default_factory=list)

    def all(self, kind: str, side: str = OURS.name) -> list[str]:
        """The messages of one kind in all forms, or the operators that loop."""
        return [f"{form}, {x}" for form, sides in self.tallies.items() for x in getattr(sides[side], kind)]

    def forms_with(self, kind: str, side: str = OURS.name) -> set[str]:
        """The forms that have such messages."""
        return {form for form, sides in self.tallies.items() if getattr(sides[side], kind)}


@dataclass
class Outcome:
    """What one side did in one case."""

    kind: str
    message: str = ""
    loops: tuple[str, ...] = ()


def _difference(actual: list[torch.Tensor], expected: list[torch.Tensor], only_shapes: bool) -> str:
    if len(actual) != len(expected):
        return f"{len(actual)} results instead of {len(expected)}"
    for k, (y, z) in enumerate(zip(actual, expected, strict=True)):
        if (y.shape, y.dtype) != (z.shape, z.dtype):
            return f"result {k}: {y.dtype}{list(y.shape)} instead of {z.dtype}{list(z.shape)}"
        if only_shapes or y.layout != torch.strided:
            continue
        if not _is_close(y, z):
            return f"result {k}: other numbers"
    return ""


def _is_close(y: torch.Tensor, z: torch.Tensor) -> bool:
    if not (y.is_floating_point() or y.is_complex()):
        return torch.equal(y, z)
    tolerance = TOLERANCE.get(y.dtype, DEFAULT_TOLERANCE)
    sizes = z.abs()
    largest = sizes[sizes.isfinite()].max().item() if sizes.isfinite().any() else 0.0
    return torch.allclose(y, z, rtol=tolerance, atol=tolerance * max(1.0, largest), equal_nan=True)


class _Comparison:
    """A case with the arguments and the results of the loop."""

    def __init__(self, name: str, case: Case) -> None:
        self.name, self.case = name, case
        self.valid, self.expected = False, None
        for mildly in (False, True):
            args = case.arguments(mildly)
            try:
                self.expected = case.expected(args, same_randomness=False)
            except ShapesDiffer:
                pass
            except Exception:  # not a valid call: try milder variations
                continue
            self.valid, self.mildly = True, mildly
            return

    def of(self, side: Side) -> Outcome:
        """Run the side, and compare."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", _LOOP_WARNINGS)
            kind, message = self._kind(side)
        loops = {next(filter(None, re.match(_LOOP_WARNINGS, str(w.message)).groups())) for w in caught}
        return Outcome(kind, message, tuple(sorted(loops)))

    def _kind(self, side: Side) -> tuple[str, str]:
        try:
            try:
                actual = self._run(side, "error")
            except Exception as error:
                if "randomness" not in str(error) or self.expected is None:
                    raise
                return self._random(side)
        except Exception as error:
            text = str(error).strip() or traceback.format_exc(limit=-1)
            clear = (
                re.match("(vmap|grad|jvp): |Inside vmap", text)
                if side is OURS
                else re.search("vmap|batching rule", text)
            )
            return "refusals" if clear else "crashes", f"{type(error).__name__}: {text[:300]}"
        if self.expected is None:
            return "wrong", "a result, though the examples have results of different shapes"
        return self._judge(actual, self.expected, self.name in exceptions.ONLY_SHAPES)

    def _random(self, side: Side) -> tuple[str, str]:
        """Different random numbers have nothing but a shape; the same ones are those of the loop."""
        kind, message = self._judge(self._run(side, "different"), self.expected, True)
        if kind == "passes":
            same = self.case.expected(self.case.arguments(self.mildly), same_randomness=True)
            kind, message = self._judge(self._run(side, "same"), same, False)
        return kind, message

    def _run(self, side: Side, randomness: str) -> list[torch.Tensor]:
        return self.case.run(side, self.case.arguments(self.mildly), randomness)

    @staticmethod
    def _judge(actual: list[torch.Tensor], expected: list[torch.Tensor], only_shapes: bool) -> tuple[str, str]:
        difference = _difference(actual, expected, only_shapes)
        return ("wrong", difference) if difference else ("passes", "")


def _has_no_answer(name: str, form: str, case: Case) -> bool:
    if name in exceptions.WRONG_OUT and form.startswith("out"):
        return True
    if name in exceptions.WRONG_VJP and form == "vjp":
        return True
    if name in exceptions.SIZE_FROM_DATA:
        return case.levels[0].size == 0
    return name in exceptions.CONTIGUOUS_ONLY and any(any(level.in_dims) for level in case.levels)


def sweep(
    op: OpInfo,
    sides: Sequence[Side] = (OURS,),
    which: Iterable[str] = forms.FORMS,
    extent: ops.Extent = ops.SHORT,
) -> Report:
    """Run the cases of the operator in some of its forms."""
    # torch.manual_seed, which the samples call too, spends most of its time on devices that are not there.
    with patch.object(torch, "manual_seed", torch.default_generator.manual_seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _sweep(op, sides, which, extent)


def _sweep(op: OpInfo, sides: Sequence[Side], which: Iterable[str], extent: ops.Extent) -> Report:
    report = Report(ops.name_of(op))
    for form in which:
        tallies = report.tallies[form] = {side.name: Tally() for side in sides}
        for dtype, case in cases_of(op, form, extent):
            comparison = None if _has_no_answer(report.name, form, case) else _Comparison(report.name, case)
            if comparison is None or not comparison.valid:
                continue
            label = f"{str(dtype).removeprefix('torch.')}, {case.label}"
            outcomes = [comparison.of(side) for side in sides]
            for side, outcome in zip(sides, outcomes, strict=True):
                _count(tallies[side.name], outcome, label, comparison.expected is not None)
            if len(outcomes) == 2 and comparison.expected is not None and (reason := _behind(*outcomes)):
                report.behind.append(f"{form}, {label}: {reason}")
    return report


def _count(tally: Tally, outcome: Outcome, label: str, has_answer: bool) -> None:
    # Where examples have results of different shapes, there is nothing to pass.
    tally.cases += has_answer
    if outcome.kind == "passes":
        tally.passes += 1
        tally.looped += bool(outcome.loops)
        tally.loops = sorted({*tally.loops, *outcome.loops})
    elif has_answer or outcome.kind != "refusals":
        getattr(tally, outcome.kind).append(f"{label}: {outcome.message}")


def _behind(ours: Outcome, theirs: Outcome) -> str:
    """What the peer does in a case and we do not, if anything."""
    if theirs.kind == "passes" and ours.kind != "passes":
        return f"{ours.kind}: {ours.message}"
    if theirs.kind == "passes" and ours.loops and not theirs.loops:
        return f"loops: {', '.join(ours.loops)}"
    return ""


def _print_table(reports: Sequence[Report]) -> None:
    print()
    columns = ("cases", "passes", "looped", "wrong", "refusals", "crashes")
    sides = command_line.print_sums(reports, columns, forms.FORMS)
    for side in sorted(sides, key=lambda side: side != OURS.name):
        loops = {x.split(", ", 1)[1] for report in reports for x in report.all("loops", side)}
        print(f"{side} runs once for each example: {', '.join(sorted(loops)) or 'nothing'}")


def _print_report(report: Report) -> None:
    messages = {kind: report.all(kind) for kind in ("wrong", "crashes", "refusals", "loops")}
    messages["behind the peer"] = report.behind
    for kind, texts in messages.items():
        for text in texts[:3]:
            print(f"{report.name}: {kind}: " + " ".join(text.split())[:300], flush=True)
        if len(texts) > 3:
            print(f"{report.name}: {kind}: ... {len(texts)} in all", flush=True)


def _read(data: dict[str, Any]) -> Report:
    tallies = {form: {side: Tally(**x) for side, x in sides.items()} for form, sides in data["tallies"].items()}
    return Report(data["name"], tallies, data["behind"])


def main() -> None:
    """Print what happened to the operators whose names contain one of the parts."""
    command_line.run(
        "tests.support.sweep",
        forms.FORMS,
        ops.SHORT,
        lambda op, with_peer, names, extent: sweep(op, [OURS, peer()] if with_peer else [OURS], names, extent),
        _read,
        _print_report,
        _print_table,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
