"""The forms of an operator: each makes a function of tensors, to be mapped, from a sample.

The derivative forms are vjp and jvp inside vmap. They need somebody who computes them, a `Side`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils import _pytree

from tests.support.ops import tensors_of

Function = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Side:
    """Who computes.

    ``vmap(func, in_dims, randomness)`` gives a function, ``vjp(func, primals, cotangents)`` and
    ``jvp(func, primals, tangents)`` the outputs, followed by the derivatives.
    """

    name: str
    vmap: Callable[[Function, Sequence[int | None], str], Function]
    vjp: Callable[[Function, Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
    jvp: Callable[[Function, Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Call:
    """One call of an operator as a function of tensors.

    Attributes:
        func: For each side the function that is mapped.
        args: Its arguments, of one example.
        groups: The indices of arguments that are batched together.
        written: The indices of arguments that it writes into, which have to be batched if any argument is.
    """

    func: Callable[[Side], Function]
    args: list[Tensor]
    groups: list[tuple[int, ...]]
    written: tuple[int, ...] = ()


class _Sample:
    """A sample as a function of its tensors."""

    def __init__(self, sample: SampleInput) -> None:
        self.leaves, self.spec = _pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        self.positions = [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor)]
        self.tensors = [self.leaves[i].detach() for i in self.positions]
        self.groups = [(i,) for i in range(len(self.tensors))]

    def call(self, func: Callable[..., object], tensors: Sequence[Tensor], **more: object) -> object:
        leaves = list(self.leaves)
        for i, x in zip(self.positions, tensors, strict=True):
            leaves[i] = x
        first, args, kwargs = _pytree.tree_unflatten(leaves, self.spec)
        return func(first, *args, **kwargs, **more)


def _function(op: OpInfo, sample: SampleInput, variant: Callable[..., object] | None = None) -> Call | None:
    at = _Sample(sample)
    return Call(lambda _: lambda *xs: tensors_of(at.call(variant or op, xs)), at.tensors, at.groups)


def _method(op: OpInfo, sample: SampleInput) -> Call | None:
    method = op.method_variant
    return _function(op, sample, method) if method and isinstance(sample.input, Tensor) else None


def _in_place(op: OpInfo, sample: SampleInput) -> Call | None:
    if op.inplace_variant is None or sample.broadcasts_input or not isinstance(sample.input, Tensor):
        return None
    at = _Sample(sample)

    def func(first: Tensor, *others: Tensor) -> list[Tensor]:
        first = first.clone()
        return [first, *tensors_of(at.call(op.inplace_variant, [first, *others]))]

    return Call(lambda _: func, at.tensors, at.groups, written=(0,))


def _results(op: OpInfo, at: _Sample) -> tuple[list[Tensor], _pytree.TreeSpec] | None:
    """Tensors to write the results into, and how the operator takes them."""
    if not op.supports_out:
        return None
    leaves, spec = _pytree.tree_flatten(at.call(op, at.tensors))
    return ([torch.zeros_like(x) for x in leaves], spec) if all(isinstance(x, Tensor) for x in leaves) else None


def _out(op: OpInfo, sample: SampleInput) -> Call | None:
    at = _Sample(sample)
    results = _results(op, at)
    if results is None:
        return None
    n = len(at.tensors)

    def func(*tensors: Tensor) -> list[Tensor]:
        outs = [x.clone() for x in tensors[n:]]
        return [*outs, *tensors_of(at.call(op, tensors[:n], out=_pytree.tree_unflatten(outs, results[1])))]

    written = tuple(range(n, n + len(results[0])))
    return Call(lambda _: func, [*at.tensors, *results[0]], at.groups, written)


def _out_made_inside(op: OpInfo, sample: SampleInput) -> Call | None:
    at = _Sample(sample)
    results = _results(op, at)
    if results is None:
        return None

    def func(*tensors: Tensor) -> list[Tensor]:
        outs = [torch.zeros(x.shape, dtype=x.dtype) for x in results[0]]
        return [*outs, *tensors_of(at.call(op, tensors, out=_pytree.tree_unflatten(outs, results[1])))]

    return Call(lambda _: func, at.tensors, at.groups)


@dataclass(frozen=True)
class Differentiable:
    """A sample as a function of the tensors that it is differentiated with respect to.

    Attributes:
        at: The sample.
        variables: The indices of those tensors among all of the sample.
        outputs: The function of all tensors, restricted to the outputs that have a derivative.
    """

    at: _Sample
    variables: list[int]
    outputs: Callable[[Sequence[Tensor]], list[Tensor]]

    def primals(self) -> list[Tensor]:
        """The point."""
        return _at(self.at.tensors, self.variables)

    def func(self, *primals: Tensor, others: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The function of the variables, at the sample's other tensors or at those given."""
        tensors = list(self.at.tensors if others is None else others)
        for k, x in zip(self.variables, primals, strict=True):
            tensors[k] = x
        return self.outputs(tensors)


def differentiable(op: OpInfo, sample: SampleInput, in_place: bool = False) -> Differentiable | None:
    """The sample as a function of its variables; None if there is nothing to differentiate."""
    if not op.supports_autograd:
        return None
    at = _Sample(sample)
    variant = op.get_op()
    if in_place:
        if op.inplace_variant is None or sample.broadcasts_input or not isinstance(sample.input, Tensor):
            return None
        variant = lambda x, *args, **kwargs: op.inplace_variant(x.clone(), *args, **kwargs)

    def all_outputs(tensors: Sequence[Tensor]) -> list[Tensor]:
        # The same random numbers whenever the function runs. Where a result is unique up to a phase or a sign only, the
        # sample says what of it has a derivative.
        torch.manual_seed(0)
        wrapped = lambda *args, **kwargs: op.gradcheck_wrapper(variant, *args, **kwargs)
        return tensors_of(
            at.call(lambda *args, **kwargs: sample.output_process_fn_grad(wrapped(*args, **kwargs)), tensors)
        )

    variables = [k for k, i in enumerate(at.positions) if at.leaves[i].requires_grad]
    try:
        chosen = [i for i, y in enumerate(all_outputs([at.leaves[i] for i in at.positions])) if y.requires_grad]
    except RuntimeError:
        if in_place:  # the results do not fit the argument
            return None
        raise
    if not variables or not chosen:
        return None
    return Differentiable(at, variables, lambda tensors: _at(all_outputs(tensors), chosen))


def _derivative(op: OpInfo, sample: SampleInput, forward: bool) -> Call | None:
    if forward and not op.supports_forward_ad:
        return None
    case = differentiable(op, sample)
    if case is None:
        return None
    shapes = case.primals() if forward else case.func(*case.primals())
    vectors = [torch.randn_like(x, memory_format=torch.contiguous_format) for x in shapes]
    at, n = case.at, len(case.at.tensors)

    def func(side: Side) -> Function:
        def derivative(*tensors: Tensor) -> list[Tensor]:
            others = tensors[:n]
            transform = side.jvp if forward else side.vjp
            return transform(
                lambda *primals: case.func(*primals, others=others), _at(tensors, case.variables), tensors[n:]
            )

        return derivative

    # The vectors first: they alone are batched in a Jacobian.
    return Call(func, [*at.tensors, *vectors], [tuple(range(n, n + len(vectors))), *at.groups])


def _at(items: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
    return [items[i] for i in indices]


PLAIN: dict[str, Callable[[OpInfo, SampleInput], Call | None]] = {
    "function": _function,
    "method": _method,
    "in place": _in_place,
    "out": _out,
    "out made inside": _out_made_inside,
}
DERIVATIVES: dict[str, Callable[[OpInfo, SampleInput], Call | None]] = {
    "vjp": partial(_derivative, forward=False),
    "jvp": partial(_derivative, forward=True),
}
FORMS = {**PLAIN, **DERIVATIVES}
