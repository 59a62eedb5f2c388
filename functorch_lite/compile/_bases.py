"""Inputs that become views of others.

Inputs that lie in one memory, which the function writes, become views of one input, their base. A conjugated or negated
view becomes the view of what it is made of: a graph takes tensors as they lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from functorch_lite.compile import _checks
from functorch_lite.compile._effects import Write
from functorch_lite.compile._run import Input


@dataclass
class _Member:
    """An input as a view of its base."""

    base: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: Any
    is_base: bool


@dataclass
class _Bits:
    """An input as a conjugated or negated view of another."""

    place: int
    is_conj: bool
    is_neg: bool

    def __call__(self, tensors: Sequence[Any]) -> Any:
        x = tensors[self.place]
        x = torch._neg_view(x) if self.is_neg else x
        return x.conj() if self.is_conj else x


@dataclass
class Argument:
    """An output that is an argument."""

    number: int


class Bases:
    """The inputs of a function, with others in the place of views."""

    def __init__(self, groups: list[list[int]], tensors: Sequence[Tensor]) -> None:
        self._groups = groups
        grouped = {i for group in groups for i in group}
        self._others = [i for i in range(len(tensors)) if i not in grouped]
        bases = [self._base(group, tensors) for group in groups]
        self._places: list[int | _Member | _Bits] = [0] * len(tensors)
        for place, i in enumerate(self._others, start=len(bases)):
            x = tensors[i]
            self._places[i] = _Bits(place, x.is_conj(), x.is_neg()) if x.is_conj() or x.is_neg() else place
        for number, group in enumerate(groups):
            for i in group:
                tensor = tensors[i]
                self._places[i] = _Member(
                    number, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor is bases[number]
                )

    def tensors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Bases and other inputs, for the original ones."""
        return [self._base(group, tensors) for group in self._groups] + [
            _without_bits(tensors[i]) for i in self._others
        ]

    def inputs(self, inputs: Sequence[Input], tensors: Sequence[Tensor]) -> list[Input]:
        """The same for what describes them."""
        bases = self.tensors(tensors)
        result = []
        for group, base in zip(self._groups, bases, strict=False):
            name = "_".join(["base_of", *(inputs[i].name for i in group)])
            result.append(Input(name, base, base.requires_grad, base.is_leaf))
        for i, x in zip(self._others, bases[len(result) :], strict=True):
            result.append(replace(inputs[i], tensor=x, is_leaf=x.is_leaf))
        return result

    def function(self, function: Callable[[list[Any]], list[Any]]) -> Callable[[list[Any]], list[Any]]:
        """``function``, taking bases and other inputs."""

        def of_bases(tensors: list[Any]) -> list[Any]:
            with torch.enable_grad():  # as the arguments were made
                given = [self._view(place, tensors) for place in self._places]
            numbers = {id(x): i for i, x in enumerate(given)}
            return [Argument(numbers[id(leaf)]) if id(leaf) in numbers else leaf for leaf in function(list(given))]

        return of_bases

    @staticmethod
    def _view(place: int | _Member | _Bits, tensors: list[Any]) -> Any:
        if isinstance(place, int):
            return tensors[place]
        if isinstance(place, _Bits):
            return place(tensors)
        base = tensors[place.base]
        return base if place.is_base else base.as_strided(place.size, place.stride, place.offset)

    @staticmethod
    def _base(group: Sequence[int], tensors: Sequence[Tensor]) -> Tensor:
        """The tensor that all of a group are views of: autograd's, or one of the whole memory."""
        members = [tensors[i] for i in group]
        bases = [x if x._base is None else x._base for x in members]
        if all(base is bases[0] for base in bases):
            return bases[0]
        has_bits = any(x.is_conj() or x.is_neg() for x in members)
        if has_bits or any(x.requires_grad for x in members) or len({x.dtype for x in members}) > 1:
            _checks.refuse_shared_memory()
        storage = members[0].untyped_storage()
        size = storage.nbytes() // members[0].element_size()
        return torch.empty(0, dtype=members[0].dtype, device=members[0].device).set_(storage, 0, (size,), (1,))


def _without_bits(tensor: Tensor) -> Tensor:
    x = tensor.conj() if tensor.is_conj() else tensor
    return torch._neg_view(x) if x.is_neg() else x


def of_views(tensors: Sequence[Tensor]) -> Bases | None:
    """What conjugated and negated views are made of, or None if there are none."""
    return Bases([], tensors) if any(x.is_conj() or x.is_neg() for x in tensors) else None


def of_written(writes: Sequence[Write], shared: list[list[int]], tensors: Sequence[Tensor]) -> Bases | None:
    """The bases of inputs that share memory and of which one is written, or None."""
    written = {write.input for write in writes}
    groups = [group for group in shared if written.intersection(group)]
    return Bases(groups, tensors) if groups else None
