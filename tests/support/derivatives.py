"""Derivatives of every operator, to second order and under vmap, against plain autograd and finite differences.

A derivative is judged by one number: its inner product with random vectors. To first order that is ``<G(x, c), u>``,
where ``G(x, c)`` is plain autograd's pullback of ``c`` at ``x``. To second order it is the rate at which this number
changes along ``(t, d, w)``, for ``(x, c, u)``. Plain autograd and finite differences compute both. Where they
agree, the number has to be plain autograd's; where not, and the function is smooth, finite differences are right.

Run as a program it prints what happened, as a table by form:
`python -m tests.support.derivatives [--peer] [--full] [PART OF A NAME ...]`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.opinfo.core import OpInfo

import functorch_lite as fl
from tests.support import command_line, exceptions, ops
from tests.support.forms import Differentiable, differentiable

Tensors = Sequence[Tensor]
Function = Callable[..., list[Tensor]]

OURS = "functorch_lite"
#: Relative to the sum of the absolute values of the products.
TOLERANCE = 1e-7
#: Of operators that round to few digits.
COARSE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.complex32: 4e-3, torch.float32: 1e-4, torch.complex64: 1e-4}
TOLERANCE_OF_DIFFERENCES = 3e-5
STEPS = (1e-4, 3e-5)
BATCH = 2
IN_PLACE = ", in place"
#: Of operators in place, a few: the others are the same formulas.
FORMS_IN_PLACE = ("vjp", "jvp", "vjp of vjp", "jvp of vjp", "vmap of vjp")
#: Jacobians of more entries exercise no other code.
LARGEST_JACOBIAN = 600


@dataclass(frozen=True)
class Vectors:
    """Directions: ``c``, ``d`` in the space of the outputs, ``u``, ``w``, ``t`` in that of the variables."""

    c: list[Tensor]
    d: list[Tensor]
    u: list[Tensor]
    w: list[Tensor]
    t: list[Tensor]

    @staticmethod
    def like(variables: Tensors, outputs: Tensors) -> Vectors:
        """Random ones."""
        of = lambda tensors: [torch.randn_like(x, memory_format=torch.contiguous_format) for x in tensors]
        return Vectors(of(outputs), of(outputs), of(variables), of(variables), of(variables))

    def flat(self) -> list[Tensor]:
        return [*self.c, *self.d, *self.u, *self.w, *self.t]

    @staticmethod
    def of_flat(flat: Tensors, n_outputs: int) -> Vectors:
        n = (len(flat) - 2 * n_outputs) // 3
        parts = list(torch.utils._pytree.tree_map(lambda x: x, list(flat)))
        taken = iter(parts)
        take = lambda count: [next(taken) for _ in range(count)]
        return Vectors(take(n_outputs), take(n_outputs), take(n), take(n), take(n))


def _pull(T: ModuleType, f: Function, x: Tensors, c: Tensors) -> list[Tensor]:
    return list(T.vjp(f, *x)[1](list(c)))


def _push(T: ModuleType, f: Function, x: Tensors, u: Tensors) -> list[Tensor]:
    return list(T.jvp(f, tuple(x), tuple(u))[1])


def _vjp_vjp(T: ModuleType, f: Function, x: Tensors, v: Vectors) -> list[Tensor]:
    return _pull(T, lambda *xc: _pull(T, f, xc[: len(x)], xc[len(x) :]), [*x, *v.c], v.u)


def _jvp_vjp(T: ModuleType, f: Function, x: Tensors, v: Vectors) -> list[Tensor]:
    return _push(T, lambda *xc: _pull(T, f, xc[: len(x)], xc[len(x) :]), [*x, *v.c], [*v.t, *v.d])


def _vjp_jvp(T: ModuleType, f: Function, x: Tensors, v: Vectors) -> list[Tensor]:
    return _pull(T, lambda *xu: _push(T, f, xu[: len(x)], xu[len(x) :]), [*x, *v.u], v.c)


def _jvp_jvp(T: ModuleType, f: Function, x: Tensors, v: Vectors) -> list[Tensor]:
    return _push(T, lambda *xu: _push(T, f, xu[: len(x)], xu[len(x) :]), [*x, *v.u], [*v.t, *v.w])


def _jvp_jvp_vjp(T: ModuleType, f: Function, x: Tensors, v: Vectors) -> list[Tensor]:
    return _push(T, lambda *x: _jvp_vjp(T, f, x, v), x, v.w)


def _vjp_jvp_vjp(T: ModuleType, f: Function, x: Tensors, v: Vectors) -> list[Tensor]:
    return _pull(T, lambda *x: _jvp_vjp(T, f, x, v), x, v.u)


def _vjp_vjp_vjp(T: ModuleType, f: Function, x: Tensors, v: Vectors) -> list[Tensor]:
    return _pull(T, lambda *x: _vjp_vjp(T, f, x, v), x, [*v.t, *v.d])


def _jacobian(name: str, **options: str) -> Callable[..., list[Tensor]]:
    def derivative(T: ModuleType, f: Function, x: Tensors, v: Vectors) -> list[Tensor]:
        blocks = getattr(T, name)(f, argnums=tuple(range(len(x))), **options)(*x)
        return [
            torch.tensordot(block.to(u.dtype), u, u.dim()) if u.dim() else block * u
            for row in blocks
            for block, u in zip(row, v.u, strict=True)
        ]

    return derivative


def _hessian(T: ModuleType, f: Function, x: Tensors, v: Vectors) -> list[Tensor]:
    scalar = lambda *x: sum((y * c).sum() for y, c in zip(f(*x), v.c, strict=True))
    argnums = tuple(range(len(x)))
    # torch.func.hessian takes no randomness.
    hessian = fl.hessian(scalar, argnums, randomness="same") if T is fl else T.hessian(scalar, argnums)
    blocks = hessian(*x)
    return [
        torch.tensordot(block.to(t.dtype), t, t.dim()) if t.dim() else block * t
        for row in blocks
        for block, t in zip(row, v.t, strict=True)
    ]


@dataclass(frozen=True)
class Form:
    """How a derivative is computed, and what its inner product with ``against`` should be.

    To first order it is ``<G(x, c), u>``; to second order the derivative of that along the ``moving`` vectors; to third
    order, where "x" is among them, the derivative of this for ``x`` along ``w``.
    """

    derive: Callable[[ModuleType, Function, Tensors, Vectors], list[Tensor]]
    against: Callable[[Vectors], list[Tensor]]
    moving: str = ""
    mapped: bool = False
    is_jacobian: bool = False


_FIRST = {
    "vjp": Form(lambda T, f, x, v: _pull(T, f, x, v.c), lambda v: v.u),
    "jvp": Form(lambda T, f, x, v: _push(T, f, x, v.u), lambda v: v.c),
}
_SECOND = {
    "vjp of vjp": Form(_vjp_vjp, lambda v: [*v.t, *v.d], "td"),
    "jvp of vjp": Form(_jvp_vjp, lambda v: v.u, "td"),
    "vjp of jvp": Form(_vjp_jvp, lambda v: [*v.t, *v.w], "tw"),
    "jvp of jvp": Form(_jvp_jvp, lambda v: v.c, "tw"),
}
_THIRD = {
    "jvp of jvp of vjp": Form(_jvp_jvp_vjp, lambda v: v.u, "tdx"),
    "vjp of jvp of vjp": Form(_vjp_jvp_vjp, lambda v: v.w, "tdx"),
    "vjp of vjp of vjp": Form(_vjp_vjp_vjp, lambda v: v.w, "tdx"),
}
_MAPPED = {
    f"vmap of {name}": Form(form.derive, form.against, form.moving, mapped=True)
    for name, form in (_FIRST | _SECOND).items()
    if name not in ("vjp of jvp", "jvp of jvp")
}
_JACOBIANS = {
    "jacrev": Form(_jacobian("jacrev"), lambda v: [c for c in v.c for _ in v.u], is_jacobian=True),
    "jacfwd": Form(_jacobian("jacfwd", randomness="same"), lambda v: [c for c in v.c for _ in v.u], is_jacobian=True),
    "hessian": Form(_hessian, lambda v: [u for u in v.u for _ in v.t], "t", is_jacobian=True),
}
FORMS = _FIRST | _SECOND | _MAPPED | _JACOBIANS | _THIRD


def inner(a: Tensors, b: Tensors) -> tuple[float, float]:
    """The real inner product, and the sum of the absolute values of its terms."""
    products = [(x.detach().conj() * y).real.double() for x, y in zip(a, b, strict=True)]
    return sum(float(p.sum()) for p in products), sum(float(p.abs().sum()) for p in products)


class Plain:
    """What plain autograd and finite differences say about one function at one point."""

    def __init__(self, f: Function, x: Tensors, v: Vectors, has_differences: bool = True) -> None:
        self.f, self.x, self.v = f, x, v
        self.tolerance = max([TOLERANCE, *(COARSE.get(y.dtype, 0.0) for y in [*x, *v.c])])
        #: Rounding to few digits is not smooth.
        self.has_differences = has_differences and self.tolerance == TOLERANCE
        #: Whether plain autograd's first derivative may be trusted.
        self.backward_is_right = True

    def _backward(self, x: Tensors, c: Tensors, create_graph: bool = False) -> list[Tensor]:
        outputs = self.f(*x)
        pairs = [(y, z) for y, z in zip(outputs, c, strict=True) if y.requires_grad]
        grads = torch.autograd.grad(
            [y for y, _ in pairs], x, [z for _, z in pairs], allow_unused=True, create_graph=create_graph
        )
        return [torch.zeros_like(a) if g is None else g for a, g in zip(x, grads, strict=True)]

    def exact(self, moving: str) -> float | None:
        """By the backward pass, differentiated again if something moves; None if PyTorch cannot."""
        if "x" in moving:
            return None
        try:
            if moving:
                return self._double_backward(moving)
            return inner(self._backward([a.detach().requires_grad_() for a in self.x], self.v.c), self.v.u)[0]
        except (RuntimeError, NotImplementedError):
            return None

    def _double_backward(self, moving: str) -> float:
        v = self.v
        x = [a.detach().requires_grad_() for a in self.x]
        c = [a.detach().requires_grad_() for a in v.c]
        grads = self._backward(x, c, create_graph=True)
        result = inner(grads, v.w)[0] if "w" in moving else 0.0
        roots = [(g, u) for g, u in zip(grads, v.u, strict=True) if g.requires_grad]
        if not roots:
            return result
        second = torch.autograd.grad([g for g, _ in roots], [*x, *c], [u for _, u in roots], allow_unused=True)
        wanted = ["t" in moving] * len(x) + ["d" in moving] * len(c)
        pairs = [(g, t) for g, t, use in zip(second, [*v.t, *v.d], wanted, strict=True) if use and g is not None]
        return result + inner([g for g, _ in pairs], [t for _, t in pairs])[0]

    def differences(self, moving: str, step: float) -> float:
        """By finite differences of fourth order: of the function or, if something moves, of its first derivative."""
        along = lambda name, base, direction, h: [
            a.detach() + h * b if name in moving else a.detach() for a, b in zip(base, direction, strict=True)
        ]

        def value(h: float) -> float:
            x, c, u = (
                along(*names, h)
                for names in (("t", self.x, self.v.t), ("d", self.v.c, self.v.d), ("w", self.v.u, self.v.w))
            )
            if self.backward_is_right:
                return inner(self._backward([a.requires_grad_() for a in x], c), u)[0]
            return self._central(lambda k: inner(self.f(*(a + k * b for a, b in zip(x, u, strict=True))), c)[0], step)

        shifted = lambda h, direction: [a.detach() + h * b for a, b in zip(self.x, direction, strict=True)]
        if "x" in moving:
            second = lambda h: Plain(self.f, shifted(h, self.v.w), self.v).exact(moving.removesuffix("x"))
            return math.nan if second(0.0) is None else self._central(second, step)
        try:
            if moving:
                return self._central(value, step if self.backward_is_right else 10 * step)
            return self._central(lambda h: inner(self.f(*shifted(h, self.v.u)), self.v.c)[0], step)
        except RuntimeError:
            return math.nan  # the function reads memory around its argument, of which a shifted copy has none

    @staticmethod
    def _central(value: Callable[[float], float], h: float) -> float:
        left2, left, here, right, right2 = (value(k * h) for k in (-2, -1, 0, 1, 2))
        if abs(right + left - 2 * here) > math.sqrt(h) * (1 + abs(here)):
            return math.nan  # a jump
        return (8 * (right - left) - (right2 - left2)) / (12 * h)


@dataclass
class Tally:
    """What one side did in the cases of one form of an operator."""

    cases: int = 0
    passes: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    #: At a kink or a jump: finite differences of two steps are different numbers.
    unjudged: int = 0

    def numbers(self) -> tuple[int, ...]:
        """How many there are of each."""
        return self.cases, self.passes, len(self.wrong), len(self.refused), self.unjudged


def _is_close(value: float, expected: float, size: float, tolerance: float) -> bool:
    if math.isnan(expected):
        return math.isnan(value)
    return abs(value - expected) <= tolerance * max(size, abs(expected), 1e-6)


class Judge:
    """Compares numbers with those of plain autograd and of finite differences, which are computed once."""

    def __init__(self, plain: Plain) -> None:
        self.plain = plain
        self.exact = functools.cache(plain.exact)
        self.differences = functools.cache(plain.differences)
        if plain.has_differences:
            first, fine = self.exact(""), self.differences("", STEPS[1])
            wrong = first is not None and not _is_close(first, fine, 1.0, self._rough)
            plain.backward_is_right = not (wrong and self._is_smooth("", 1.0))

    @property
    def _rough(self) -> float:
        return max(self.plain.tolerance, TOLERANCE_OF_DIFFERENCES)

    def _is_smooth(self, moving: str, size: float) -> bool:
        if not self.plain.has_differences:
            return False
        coarse, fine = (self.differences(moving, step) for step in STEPS)
        return not math.isnan(fine) and _is_close(coarse, fine, size, self._rough)

    def verdict(self, moving: str, value: float, size: float) -> str:
        """Empty if right, "unjudged", or what is expected."""
        # Third derivatives are differences of plain double backward.
        second = self.exact("td") if "x" in moving else 0.0
        if second is None or (second and self.verdict("td", second, 1.0)):
            return "unjudged"
        exact = self.exact(moving) if self.plain.backward_is_right else None
        fine = self.differences(moving, STEPS[1]) if self.plain.has_differences else math.nan
        agree = exact is not None and _is_close(exact, fine, size, self._rough)
        is_smooth = agree or self._is_smooth(moving, size)
        if agree or (exact is not None and not is_smooth):
            if _is_close(value, exact, size, self.plain.tolerance):
                return ""
            expected = f"{exact:.9g}"
        elif is_smooth and _is_close(value, fine, size, self._rough):
            return ""
        else:
            expected = f"{fine:.9g} (finite differences; plain autograd gives {exact})"
        return f"got {value:.9g}, expected {expected}" if is_smooth else "unjudged"


def _run_mapped(T: ModuleType, form: Form, case: Differentiable, x: Tensors, v: list[Vectors], share: bool):
    """The derivative for each example. ``x`` is batched unless it is shared."""
    n, m = len(x), len(v[0].c)
    stacked = [torch.stack(parts) for parts in zip(*(each.flat() for each in v), strict=True)]

    def of_one(*flat: Tensor) -> list[Tensor]:
        return list(form.derive(T, case.func, flat[:n], Vectors.of_flat(flat[n:], m)))

    in_dims = (*[None if share else 0] * n, *[0] * len(stacked))
    results = T.vmap(of_one, in_dims=in_dims, randomness="same")(*x, *stacked)
    return [[result[i] for result in results] for i in range(len(v))]


def check(
    case: Differentiable,
    form: Form,
    sides: dict[str, ModuleType],
    judges: dict[str, Judge],
    share: bool,
    has_differences: bool,
):
    """For each side a verdict: empty if right, "unjudged", "refused: ...", or what is wrong."""
    torch.manual_seed(1)
    x = case.primals()
    batch = BATCH if form.mapped else 1
    examples = [x] * batch
    if form.mapped and not share:
        stacked = [ops.batch(a, 0, batch, mildly=True) for a in x]
        examples = [[a[i].clone() for a in stacked] for i in range(batch)]
    outputs = case.func(*x)
    vectors = [Vectors.like(x, outputs) for _ in range(batch)]
    verdicts = {}
    for name, T in sides.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if form.mapped:
                    results = _run_mapped(T, form, case, x if share else stacked, vectors, share)
                else:
                    results = [form.derive(T, case.func, x, vectors[0])]
        except Exception as error:
            verdicts[name] = f"refused: {type(error).__name__}: {error}"
            continue
        verdict = ""
        for i, (point, v, result) in enumerate(zip(examples, vectors, results, strict=True)):
            key = f"{form.mapped} {share} {i}"
            if key not in judges:
                judges[key] = Judge(Plain(case.func, point, v, has_differences))
            verdict = verdict or judges[key].verdict(form.moving, *inner(result, form.against(v)))
        verdicts[name] = verdict
    return verdicts


@dataclass
class Report:
    """What the sides did with one operator."""

    name: str
    tallies: dict[str, dict[str, Tally]] = field(default_factory=dict)
    #: Cases that the second side passes and the first does not.
    behind: list[str] = field(default_factory=list)

    def all(self, kind: str) -> list[str]:
        """The messages of this kind, "wrong" or "refused", of this package."""
        return [text for sides in self.tallies.values() for text in getattr(sides[OURS], kind)]


def cases_of(op: OpInfo, extent: ops.Extent) -> Iterator[tuple[str, Differentiable]]:
    """The samples with something to differentiate."""
    for dtype in ops.derivative_dtypes_of(op, ops.FULL):
        for index, sample in enumerate(ops.samples_of(op, dtype, True, extent.samples)):
            if any(x.layout != torch.strided or x.is_quantized for x in ops.tensors_of(sample)):
                continue
            for label in ("", IN_PLACE):
                case = differentiable(op, sample, in_place=label == IN_PLACE)
                if case is not None:
                    yield f"sample {index}, {dtype}{label}", case


def sweep(op: OpInfo, sides: dict[str, ModuleType], forms: Sequence[str], extent: ops.Extent) -> Report:
    """Run all cases of an operator."""
    report = Report(ops.name_of(op))
    cases = cases_of(op, extent)
    for index, (label, case) in enumerate(cases):
        judges: dict[str, Judge] = {}
        x = case.primals()
        entries = sum(a.numel() for a in x) * max(sum(y.numel() for y in case.func(*x)), sum(a.numel() for a in x))
        is_complex = any(y.is_complex() for y in [*x, *case.func(*x)])
        for name in forms:
            form = FORMS[name]
            if label.endswith(IN_PLACE) and name not in FORMS_IN_PLACE:
                continue
            if form.is_jacobian and (is_complex or entries > LARGEST_JACOBIAN):
                continue
            share = index % 2 == 1 or report.name in exceptions.CONTIGUOUS_ONLY
            verdicts = check(case, form, sides, judges, share, report.name not in exceptions.NO_DIFFERENCES)
            for side, verdict in verdicts.items():
                tally = report.tallies.setdefault(name, {}).setdefault(side, Tally())
                tally.cases += 1
                if verdict == "":
                    tally.passes += 1
                elif verdict == "unjudged":
                    tally.unjudged += 1
                else:
                    kind = tally.refused if verdict.startswith("refused") else tally.wrong
                    kind.append(f"{name}, {label}: {verdict}")
            ours, *others = verdicts.values()
            if ours and "" in others:
                report.behind.append(f"{name}, {label}: {ours}")
    return report


def _print_report(report: Report) -> None:
    for form in report.tallies:
        for kind in ("wrong", "refused"):
            messages = getattr(report.tallies[form][OURS], kind)
            if messages:
                print(f"{report.name}: {kind} ({len(messages)}): {' '.join(messages[0].split())[:260]}", flush=True)


def _print_table(reports: Sequence[Report]) -> None:
    command_line.print_sums(reports, ("cases", "pass", "wrong", "refused", "unjudged"), FORMS)
    behind = [f"{report.name}: {text}" for report in reports for text in report.behind]
    print(f"passes of torch.func that are none of ours: {len(behind)}")


def _read(data: dict[str, Any]) -> Report:
    tallies = {form: {side: Tally(**x) for side, x in sides.items()} for form, sides in data["tallies"].items()}
    return Report(data["name"], tallies, data["behind"])


def main() -> None:
    """Print what happened to the operators whose names contain one of the parts."""
    command_line.run(
        "tests.support.derivatives",
        FORMS,
        ops.Extent(ops.SHORT.samples, None, None),
        lambda op, peer, names, extent: sweep(
            op, {OURS: fl, "torch.func": torch.func} if peer else {OURS: fl}, names, extent
        ),
        _read,
        _print_report,
        _print_table,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
