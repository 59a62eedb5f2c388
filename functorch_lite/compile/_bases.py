"""Inputs that lie in one memory, which the function writes: they become views of one input, their base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from functorch_lite.compile import _checks
from functorch_lite.compile._trace import Input, Write


@dataclass
class _Member:
    """An input as a view of its base."""

    base: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: Any
    is_base: bool


class Bases:
    """The inputs of a function, with bases in the place of inputs that share memory."""

    def __init__(self, groups: list[list[int]], tensors: Sequence[Tensor]) -> None:
        self._groups = groups
        grouped = {i for group in groups for i in group}
        self._others = [i for i in range(len(tensors)) if i not in grouped]
        bases = [self._base(group, tensors) for group in groups]
        self._places: list[int | _Member] = [0] * len(tensors)
        for place, i in enumerate(self._others):
            self._places[i] = len(bases) + place
        for number, group in enumerate(groups):
            for i in group:
                tensor = tensors[i]
                self._places[i] = _Member(
                    number, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor is bases[number]
                )

    def tensors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Bases and other inputs, for the original ones."""
        return [self._base(group, tensors) for group in self._groups] + [tensors[i] for i in self._others]

    def inputs(self, inputs: Sequence[Input], tensors: Sequence[Tensor]) -> list[Input]:
        """The same for what describes them."""
        result = []
        for group, base in zip(self._groups, self.tensors(tensors), strict=False):
            name = "_".join(["base_of", *(inputs[i].name for i in group)])
            differentiated = base.requires_grad and torch.is_grad_enabled()
            result.append(Input(name, base, differentiated, base.is_leaf))
        return result + [inputs[i] for i in self._others]

    def function(self, function: Callable[[list[Any]], list[Any]]) -> Callable[[list[Any]], list[Any]]:
        """``function``, taking bases and other inputs."""

        def of_bases(tensors: list[Any]) -> list[Any]:
            return function([self._view(place, tensors) for place in self._places])

        return of_bases

    @staticmethod
    def _view(place: int | _Member, tensors: list[Any]) -> Any:
        if isinstance(place, int):
            return tensors[place]
        base = tensors[place.base]
        return base if place.is_base else base.as_strided(place.size, place.stride, place.offset)

    @staticmethod
    def _base(group: Sequence[int], tensors: Sequence[Tensor]) -> Tensor:
        """The tensor that all of a group are views of: autograd's, or one of the whole memory."""
        members = [tensors[i] for i in group]
        bases = [x if x._base is None else x._base for x in members]
        if all(base is bases[0] for base in bases):
            return bases[0]
        if any(x.requires_grad for x in members) or len({x.dtype for x in members}) > 1:
            _checks.refuse_shared_memory()
        storage = members[0].untyped_storage()
        size = storage.nbytes() // members[0].element_size()
        return torch.empty(0, dtype=members[0].dtype, device=members[0].device).set_(storage, 0, (size,), (1,))


def find(writes: Sequence[Write], shared: list[list[int]], tensors: Sequence[Tensor]) -> Bases | None:
    """The bases of inputs that share memory and of which one is written, or None."""
    written = {write.input for write in writes}
    groups = [group for group in shared if written.intersection(group)]
    return Bases(groups, tensors) if groups else None
