"""Cases: a form of an operator, together with which of its arguments are batched, and where, at one or two levels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.testing._internal.opinfo.core import OpInfo

from tests.support import forms, ops
from tests.support.forms import Call, Function, Side
from tests.support.oracles import loop_vmap, plain_jvp, plain_vjp

LOOP = Side("loop", lambda func, in_dims, _: lambda *args: loop_vmap(func, in_dims, args), plain_vjp, plain_jvp)


@dataclass(frozen=True)
class Level:
    """One vmap: the size of the batch and its dimension in each argument."""

    size: int
    in_dims: tuple[int | None, ...]


@dataclass(frozen=True)
class Case:
    """One comparison: a call, mapped at some levels, the outermost first."""

    label: str
    call: Call
    levels: tuple[Level, ...]

    def arguments(self, mildly: bool) -> list[Tensor]:
        """New batches. Mild variations are for operators that are strict about their arguments."""
        torch.manual_seed(0)
        args = [x.clone() for x in self.call.args]
        for level in reversed(self.levels):
            args = [
                x if dim is None else ops.batch(x, dim, level.size, mildly)
                for x, dim in zip(args, level.in_dims, strict=True)
            ]
        return args

    def run(self, side: Side, args: Sequence[Tensor], randomness: str) -> list[Tensor]:
        """What the side gives for the case."""
        func = self.call.func(side)
        for level in reversed(self.levels):
            func = side.vmap(func, level.in_dims, randomness)
        torch.manual_seed(0)
        return func(*args)

    def expected(self, args: Sequence[Tensor], same_randomness: bool) -> list[Tensor]:
        """What the loop gives, with the same random numbers for all examples if asked for."""

        def seeded(*tensors: Tensor) -> list[Tensor]:
            torch.manual_seed(0)
            return func(*tensors)

        func = self.call.func(LOOP)
        mapped: Function = seeded if same_randomness else func
        if self.levels[0].size == 0:
            return loop_vmap(mapped, self.levels[0].in_dims, args, self.call.args)
        for level in reversed(self.levels):
            mapped = LOOP.vmap(mapped, level.in_dims, "")
        return mapped(*args)


Place = Callable[[int], int]
PLACES: dict[str, Place] = {"first": lambda rank: 0, "middle": lambda rank: (rank + 1) // 2, "last": lambda rank: rank}


def _levels(call: Call, *levels: tuple[int, Place, Iterable[int] | None]) -> tuple[Level, ...]:
    """Levels from (size, place, indices of the batched arguments or None for all), the outermost first."""
    ranks = [x.dim() for x in call.args]
    result: list[Level] = []
    for size, place, indices in reversed(levels):
        chosen = set(range(len(ranks))) if indices is None else {*indices, *call.written}
        dims = tuple(place(rank) if i in chosen else None for i, rank in enumerate(ranks))
        ranks = [rank + (dim is not None) for rank, dim in zip(ranks, dims, strict=True)]
        result.insert(0, Level(size, dims))
    return tuple(result)


def _places(call: Call) -> list[tuple[str, tuple[Level, ...]]]:
    """Where the batch may be."""
    first, last = PLACES["first"], PLACES["last"]
    places = {f"all {name}": _levels(call, (3, place, None)) for name, place in PLACES.items()}
    places["mixed"] = (Level(3, tuple(x.dim() if i % 2 else 0 for i, x in enumerate(call.args))),)
    if len(call.args) > 1:
        for i, group in enumerate(call.groups):
            for name, place in PLACES.items():
                places[f"only {i} {name}"] = _levels(call, (3, place, group))
    places["nested, last and first"] = _levels(call, (2, last, None), (3, first, None))
    places["nested, first and last"] = _levels(call, (2, first, None), (3, last, None))
    if len(call.groups) > 1:
        others = [i for group in call.groups[1:] for i in group]
        places["nested, 0 outside"] = _levels(call, (2, last, call.groups[0]), (3, first, others))
        places["nested, 0 inside"] = _levels(call, (2, first, others), (3, last, call.groups[0]))
    # For a scalar, all places are one.
    names: dict[tuple[Level, ...], str] = {}
    for name, levels in places.items():
        names.setdefault(levels, name)
    return [(name, levels) for levels, name in names.items()]


def _small_batches(call: Call) -> list[tuple[str, tuple[Level, ...]]]:
    return [
        ("batch of one", _levels(call, (1, PLACES["middle"], None))),
        ("empty batch", _levels(call, (0, PLACES["first"], None))),
    ]


def cases_of(op: OpInfo, form: str, extent: ops.Extent) -> Iterator[tuple[torch.dtype, Case]]:
    """The cases of one form of an operator."""
    derivative = form in forms.DERIVATIVES
    dtypes = ops.derivative_dtypes_of(op, extent) if derivative else ops.dtypes_of(op, form, extent)
    for dtype in dtypes:
        for index, sample in enumerate(ops.samples_of(op, dtype, derivative, extent.samples)):
            tensors = ops.tensors_of(sample)
            if not tensors or any(x.layout != torch.strided or x.is_quantized for x in tensors):
                continue
            call = forms.FORMS[form](op, sample)
            if call is None:
                continue
            choices = ops.pick(_places(call), extent.places, f"{ops.name_of(op)} {form} {dtype} {index}")
            if index == 0 or extent.places is None:
                choices += _small_batches(call)
            for label, levels in choices:
                yield dtype, Case(f"sample {index}, {label}", call, levels)
