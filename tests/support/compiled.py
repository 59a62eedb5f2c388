"""Every operator compiled, forward and backward, against eager PyTorch.

Run as a program it prints what happened, as a table by form:
`python -m tests.support.compiled [--peer] [--full] [PART OF A NAME ...]`.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.testing._internal.opinfo.core import OpInfo

from tests.support import command_line, exceptions, observations, ops
from tests.support.forms import _Sample
from tests.support.observations import Implementation

#: Of functions that are not differentiated, beside the dtypes of derivatives.
PLAIN_DTYPES = (torch.float32, torch.int64)
#: Relative to the largest number: a fused kernel and its parts round differently.
TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4}
COARSE = 2e-2
#: Beside those of vmap's judge.
UNINITIALISED = {"empty", "empty_permuted"}
#: Some samples set it themselves, which the compiled function does only once.
SEED = 42

_PYTHON_VALUE = "it makes a Python value of a tensor, and goes on in one way or another"
_SIZE_FROM_DATA = "the size of a result depends on the data, and PyTorch has no symbolic size for it"
_NO_SYMBOLIC_SIZES = "PyTorch does not compute its shapes for symbolic sizes"
#: Operators that raise an error, or one form of them as in "geqrf (dynamic)", and why.
RAISING = {
    "allclose": _PYTHON_VALUE,
    "equal": _PYTHON_VALUE,
    "cov": _PYTHON_VALUE,
    "corrcoef": _PYTHON_VALUE,
    "istft": _PYTHON_VALUE,
    "tensor_split": _PYTHON_VALUE,
    "nn.functional.gaussian_nll_loss": _PYTHON_VALUE,
    "index_reduce.prod (double backward)": _PYTHON_VALUE,
    "scatter_reduce.prod (double backward)": _PYTHON_VALUE,
    "nn.functional.one_hot": _SIZE_FROM_DATA,
    "linalg.lstsq": _SIZE_FROM_DATA,
    "linalg.lstsq.grad_oriented": _SIZE_FROM_DATA,
    "nn.functional.ctc_loss": _SIZE_FROM_DATA,
    "nn.functional.fractional_max_pool3d (dynamic)": _NO_SYMBOLIC_SIZES,
    "geqrf (dynamic)": _NO_SYMBOLIC_SIZES,
    "resize_as_ (dynamic)": _NO_SYMBOLIC_SIZES,
    "nn.functional.hardshrink (dynamic)": _NO_SYMBOLIC_SIZES,
    "nn.functional.softshrink (dynamic)": _NO_SYMBOLIC_SIZES,
    "histogramdd (dynamic)": _NO_SYMBOLIC_SIZES,
    "to_sparse": "sparse tensors are not compiled",
}


@dataclass(frozen=True)
class Case:
    """A call of an operator: a function of the tensors of a sample, which are made anew for each run."""

    label: str
    func: Callable[..., Any]
    sample: _Sample
    differentiated: list[int]
    #: Whether the first tensor is written into.
    writes: bool = False

    def run(self, func: Callable[..., Any], order: int) -> list[Tensor]:
        """What ``func``, the function in some form, gives: outputs, written tensors, and gradients up to this order."""
        torch.manual_seed(SEED)
        leaves = [x.detach().clone(memory_format=torch.preserve_format) for x in self.sample.tensors]
        for i in self.differentiated if order > 0 else []:
            leaves[i].requires_grad_()
        args = [leaves[0].clone(), *leaves[1:]] if self.writes else leaves
        results = ops.tensors_of(func(*args))
        outputs = [*results, *args[:1]] if self.writes else results
        found = [y.detach().clone() for y in outputs]
        if order == 0:
            return found
        torch.manual_seed(1)
        sources = [leaves[i] for i in self.differentiated]
        return found + _gradients(_reached(outputs), sources, order)

    def nearby(self) -> Case:
        """The same for slightly other numbers."""
        sample = copy.copy(self.sample)
        sample.tensors = [x * 1.001 if x.is_floating_point() or x.is_complex() else x for x in sample.tensors]
        return replace(self, sample=sample)


def _reached(outputs: Sequence[Tensor]) -> list[Tensor]:
    unique = {id(y): y for y in outputs if y.requires_grad}
    return list(unique.values())


def _gradients(outputs: Sequence[Tensor], sources: Sequence[Tensor], order: int) -> list[Tensor]:
    if not outputs:
        return []
    cotangents = [observations.random_cotangent(y) for y in outputs]
    if order > 1:
        cotangents = [c.requires_grad_() for c in cotangents]
    gradients = torch.autograd.grad(
        outputs, sources, cotangents, create_graph=order > 1, allow_unused=True, materialize_grads=True
    )
    found = [g.detach() for g in gradients]
    if order == 1:
        return found
    return found + _gradients(_reached(gradients), [*sources, *cotangents], order - 1)


def _function(op: OpInfo, sample: Any) -> Case | None:
    at = _Sample(sample)
    return Case("", lambda *xs: sample.output_process_fn_grad(at.call(op, xs)), at, _variables(at))


def _in_place(op: OpInfo, sample: Any) -> Case | None:
    if op.inplace_variant is None or sample.broadcasts_input or not isinstance(sample.input, Tensor):
        return None
    at = _Sample(sample)
    return Case("", lambda *xs: at.call(op.inplace_variant, xs), at, _variables(at), writes=True)


def _donated(op: OpInfo, sample: Any) -> Case | None:
    """Beside a pointwise operator that uses the tensors last, and may write into them."""
    at = _Sample(sample)

    def func(*xs: Tensor) -> Any:
        result = sample.output_process_fn_grad(at.call(op, xs))
        return result, [x.neg() if x.dtype != torch.bool else x.logical_not() for x in xs]

    return Case("", func, at, _variables(at))


def _variables(at: _Sample) -> list[int]:
    return [k for k, i in enumerate(at.positions) if at.leaves[i].requires_grad]


@dataclass(frozen=True)
class Form:
    """How an operator is compiled and what is compared."""

    case: Callable[[OpInfo, Any], Case | None]
    order: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    has_peer: bool = True


FORMS = {
    "function": Form(_function),
    "in place": Form(_in_place),
    "min_cut": Form(_function, options={"min_cut": True}),
    "dynamic": Form(_function, options={"dynamic": True}),
    "double backward": Form(_function, order=2, has_peer=False),
    "replay": Form(_function, options={"replay": True}, has_peer=False),
    "replay in place": Form(_in_place, options={"replay": True}, has_peer=False),
    "donated": Form(_donated, order=0, options={"donated": True}, has_peer=False),
}


def _dtypes(op: OpInfo, form: Form) -> list[tuple[torch.dtype, bool]]:
    """The dtypes, and whether to differentiate."""
    derivatives = [(dtype, True) for dtype in ops.derivative_dtypes_of(op, ops.FULL) if op.supports_autograd]
    if form.order > 1:
        return derivatives
    return derivatives + [(dtype, False) for dtype in PLAIN_DTYPES if dtype in op.dtypes]


def cases_of(op: OpInfo, form: Form, extent: ops.Extent) -> Iterator[tuple[str, Case, int]]:
    """The cases of one form of an operator, and to which order they are differentiated."""
    for dtype, differentiated in _dtypes(op, form)[: extent.dtypes]:
        for index, sample in enumerate(ops.samples_of(op, dtype, differentiated, extent.samples)):
            if any(x.layout != torch.strided or x.is_quantized for x in ops.tensors_of(sample)):
                continue
            case = form.case(op, sample)
            if case is not None:
                yield f"{str(dtype).removeprefix('torch.')}, sample {index}", case, form.order * differentiated


@dataclass
class Tally:
    """What one side did in the cases of one form of an operator.

    A refusal is an error that names what is wrong, a crash any other.
    """

    cases: int = 0
    passes: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)

    def numbers(self) -> list[int]:
        """The columns of the table."""
        return [self.cases, self.passes, len(self.wrong), len(self.refused), len(self.crashed)]


@dataclass
class Report:
    """What the sides did with one operator."""

    name: str
    tallies: dict[str, dict[str, Tally]] = field(default_factory=dict)
    #: Cases that the second side passes and the first does not.
    behind: list[str] = field(default_factory=list)

    def all(self, kind: str, side: str) -> list[str]:
        """The messages of one kind of one side."""
        return [f"{form}, {x}" for form, sides in self.tallies.items() for x in getattr(sides.get(side, Tally()), kind)]


def _difference(actual: Sequence[Tensor], expected: Sequence[Tensor], only_shapes: bool) -> str:
    if len(actual) != len(expected):
        return f"{len(actual)} results instead of {len(expected)}"
    for k, (y, z) in enumerate(zip(actual, expected, strict=True)):
        if (y.shape, y.dtype) != (z.shape, z.dtype):
            return f"result {k}: {y.dtype}{list(y.shape)} instead of {z.dtype}{list(z.shape)}"
        if not only_shapes and not _is_close(y, z):
            return f"result {k}: other numbers"
    return ""


def _is_close(y: Tensor, z: Tensor) -> bool:
    if y.layout != torch.strided:
        y, z = y.to_dense(), z.to_dense()
    if not (y.is_floating_point() or y.is_complex()):
        return torch.equal(y, z)
    sizes = z.abs()[z.isfinite()]
    largest = sizes.max().item() if sizes.numel() else 0.0
    tolerance = TOLERANCE.get(y.dtype, COARSE)
    return torch.allclose(y, z, rtol=tolerance, atol=tolerance * max(1.0, largest), equal_nan=True)


def _judge(
    side: Implementation, form: Form, case: Case, order: int, expected: list[Tensor], only_shapes: bool
) -> tuple[str, str]:
    """The kind of outcome, and a message."""
    try:
        compiled = side.function(case.func, **form.options)
        if form.options.keys() & {"replay", "donated"}:  # what is recorded must not depend on the numbers
            with contextlib.suppress(RuntimeError):  # not a valid call
                case.nearby().run(compiled, order)
        # The second call takes what the first has compiled.
        runs = [case.run(compiled, order) for _ in range(2)]
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).strip()[:300]}"
        return ("refused" if re.search(side.refusals, text) else "crashed"), text
    found = next(filter(None, (_difference(run, expected, only_shapes) for run in runs)), "")
    return ("wrong", found) if found else ("passes", "")


def sweep(op: OpInfo, sides: Sequence[Implementation], forms: Sequence[str], extent: ops.Extent) -> Report:
    """Run all cases of an operator."""
    report = Report(ops.name_of(op))
    only_shapes = report.name in exceptions.ONLY_SHAPES | UNINITIALISED
    # torch.manual_seed, which the samples call too, spends most of its time on devices that are not there.
    with patch.object(torch, "manual_seed", torch.default_generator.manual_seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in forms:
            form = FORMS[name]
            present = [side for side in sides if form.has_peer or side.guards]
            tallies = report.tallies[name] = {side.name: Tally() for side in present}
            for label, case, order in cases_of(op, form, extent):
                if report.name in exceptions.WRONG_VJP:
                    order = 0
                try:
                    expected = case.run(case.func, order)
                except (RuntimeError, AssertionError):  # not a valid call, or no derivative of this order
                    continue
                kinds = {}
                for side in present:
                    kind, message = _judge(side, form, case, order, expected, only_shapes)
                    kinds[side.name] = kind
                    tally = tallies[side.name]
                    tally.cases += 1
                    if kind == "passes":
                        tally.passes += 1
                    else:
                        getattr(tally, kind).append(f"{label}: {message}")
                first, *others = kinds.values()
                if first != "passes" and "passes" in others:
                    report.behind.append(f"{name}, {label}: {first}")
    return report


def _print_report(report: Report) -> None:
    for side in dict.fromkeys(side for sides in report.tallies.values() for side in sides):
        for kind in ("wrong", "refused", "crashed"):
            messages = report.all(kind, side)
            if messages:
                print(
                    f"{report.name}: {side}: {kind} ({len(messages)}): {' '.join(messages[0].split())[:260]}",
                    flush=True,
                )


def _print_table(reports: Sequence[Report]) -> None:
    command_line.print_sums(reports, ("cases", "pass", "wrong", "refused", "crashed"), FORMS)
    behind = [f"{report.name}: {text}" for report in reports for text in report.behind]
    print(f"passes of the peer that are none of ours: {len(behind)}")
    for text in behind[:20]:
        print(f"  {text}")


def _read(data: dict[str, Any]) -> Report:
    tallies = {form: {side: Tally(**x) for side, x in sides.items()} for form, sides in data["tallies"].items()}
    return Report(data["name"], tallies, data["behind"])


def main() -> None:
    """Print what happened to the operators whose names contain one of the parts."""
    command_line.run(
        "tests.support.compiled",
        FORMS,
        ops.Extent(ops.SHORT.samples, None, None),
        lambda op, with_peer, names, extent: sweep(
            op, [observations.ours(), *([observations.peer()] if with_peer else [])], names, extent
        ),
        _read,
        _print_report,
        _print_table,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
