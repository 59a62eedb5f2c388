"""Tensor subclasses that are made of plain tensors, of which graphs take and return the latter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True)
class _Layout:
    """How a subclass is made of tensors."""

    kind: Any
    names: tuple[str, ...]
    parts: tuple[_Layout | None, ...]
    context: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def build(self, tensors: Iterator[Any]) -> Any:
        """The subclass, of the next tensors."""
        parts = {
            name: next(tensors) if part is None else part.build(tensors)
            for name, part in zip(self.names, self.parts, strict=True)
        }
        return self.kind.__tensor_unflatten__(parts, self.context, self.shape, self.stride)


def is_subclass(value: Any) -> bool:
    """Whether this is a tensor made of others."""
    return type(value) not in _PLAIN and isinstance(value, Tensor) and is_traceable_wrapper_subclass(value)


_PLAIN = (Tensor, torch.nn.Parameter)


def _layout_of(value: Any) -> _Layout | None:
    if not is_subclass(value):
        return None
    names, context = value.__tensor_flatten__()
    parts = tuple(_layout_of(getattr(value, name)) for name in names)
    return _Layout(type(value), tuple(names), parts, context, tuple(value.shape), value.stride())


def plain_tensors(value: Any) -> list[Any]:
    """What a subclass is made of; anything else is itself."""
    if not is_subclass(value):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [plain for name in names for plain in plain_tensors(getattr(value, name))]


class Packing:
    """A list in which some values are subclasses, as the list of the plain tensors in it."""

    def __init__(self, example: Sequence[Any]) -> None:
        self._layouts = [_layout_of(value) for value in example]
        self._counts = [len(plain_tensors(value)) for value in example]
        self._is_trivial = not any(self._layouts)
        #: The length of the list of plain tensors.
        self.count = sum(self._counts)

    def flatten(self, values: Sequence[Any]) -> list[Any]:
        """The plain tensors."""
        return list(values) if self._is_trivial else [plain for value in values for plain in plain_tensors(value)]

    def unflatten(self, plain: Sequence[Any]) -> list[Any]:
        """The list with its subclasses."""
        if self._is_trivial:
            return list(plain)
        tensors = iter(plain)
        return [next(tensors) if layout is None else layout.build(tensors) for layout in self._layouts]

    def places(self, i: int) -> range:
        """Where value i is among the plain tensors."""
        start = sum(self._counts[:i])
        return range(start, start + self._counts[i])
