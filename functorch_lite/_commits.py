"""State that is computed inside transforms and written when the outermost of them has returned.

A call that commits is inside of calls of transforms, whose frames are on the stack. The outermost of those keeps what
is to be written, without levels and derivatives, and writes it when it succeeds. While a function is traced, the
tracer's call is outermost, so that the writes are part of the graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

from functorch_lite import _C, _module_checks

#: Batches that are computed in chunks, each with the level of the chunk.
Chunks = list[tuple[_C.Chunks, _C.VmapLevel]]


@dataclass
class _Commit:
    """One tensor that will be written."""

    target: Tensor
    value: Tensor
    #: What the next chunk of the same batch begins with; None for what the target has.
    before: Tensor | None
    chunks: Chunks

    def is_of_the_batch_of(self, place: _Place) -> bool:
        """Whether it was made in the same chunked `vmap`, of whatever chunk."""
        return any(a is b for a, _ in self.chunks for b, _ in place.chunks())

    def is_of_another_chunk(self, place: _Place) -> bool:
        """Whether it was made for other examples of the same batch."""
        return any(a is b and x is not y for a, x in self.chunks for b, y in place.chunks())


#: By the frame of the outermost call: its commits, by the identity of the target.
waiting: dict[FrameType, dict[int, _Commit]] = {}
#: The frames of `outermost`, with the number of levels around them.
_depths: dict[FrameType, int] = {}
#: The code of the calls that users make; `_boundary` puts it here.
boundary_code: list[CodeType] = []


@dataclass
class _Place:
    """A tensor of this level as it is below all levels of the outermost call."""

    tensor: Tensor
    #: The vmap levels around, outermost first, and the dimension that each maps.
    mapped: list[tuple[_C.VmapLevel, int | None]]

    def chunks(self) -> Chunks:
        """The batches of which this call sees a chunk, and the tensor has no dimension."""
        return [(level.chunks, level) for level, dim in self.mapped if dim is None and level.chunks is not None]

    def lifted(self, value: Tensor) -> Tensor:
        """A tensor like that below, at this level."""
        for level, dim in self.mapped:
            value = value if dim is None else level.lift(value, dim)
        return value


def _outermost_call() -> tuple[FrameType | None, int]:
    """The frame that will write, and the number of levels around it."""
    found, frame = None, sys._getframe(1)
    while frame is not None:
        if frame in _depths:
            return frame, _depths[frame]
        if any(frame.f_code is code for code in boundary_code):
            found = frame
        frame = frame.f_back  # type: ignore[assignment]
    return found, 0


def _below(level: Any, tensor: Tensor) -> Tensor:
    """The tensor one level below one that has no batches."""
    if not _C.is_wrapper(tensor):
        return tensor
    outside = level.outside_of(tensor) if isinstance(level, _C.FunctionalizeLevel) else None
    if outside is not None and level.lift(outside) is tensor:
        return outside
    below: Tensor = level.value_of(tensor)
    return below


def _place(target: Tensor, depth: int) -> _Place:
    level = _C.current_level()
    if level is None or _C.level_depth() <= depth:
        return _Place(target, [])
    if isinstance(level, _C.VmapLevel):
        target, dim = level.unwrap(target)
    else:
        target = _below(level, target)
    with _C.Below():
        place = _place(target, depth)
    if isinstance(level, _C.VmapLevel):
        place.mapped.append((level, dim))
    return place


def _value(value: Tensor, dims: Sequence[int | None], depth: int, name: str) -> Tensor:
    """The value below all levels, laid out as the target, which vmap levels map as ``dims`` say, outermost first."""
    level = _C.current_level()
    if level is None or _C.level_depth() <= depth:
        return value.detach()
    if not isinstance(level, _C.VmapLevel):
        value = _below(level, value)
        with _C.Below():
            return _value(value, dims, depth, name)
    *outer, to = dims
    value, dim = level.unwrap(value)
    if dim is not None and to is None:
        raise ValueError(_module_checks.batched_commit(name))
    with _C.Below():
        if to is not None:
            value = _repeated(value, to, level.batch_size) if dim is None else value.movedim(dim, to)
        return _value(value, outer, depth, name)


def _repeated(value: Tensor, dim: int, size: int | torch.SymInt) -> Tensor:
    return value.unsqueeze(dim).expand(*value.shape[:dim], size, *value.shape[dim:])


def current(target: Tensor) -> Tensor:
    """What ``target`` will be, as far as is known."""
    frame, depth = _outermost_call()
    if frame is None or frame not in waiting:
        return target
    place = _place(target, depth)
    commit = waiting[frame].get(id(place.tensor))
    if commit is None:
        return target
    value = commit.before if commit.is_of_another_chunk(place) else commit.value
    return target if value is None else place.lifted(value)


def commit(target: Tensor, value: Tensor, name: str) -> None:
    """Write ``value`` into ``target`` when the outermost transform has succeeded; now if there is none."""
    _module_checks.check_shape(name, value, target)
    frame, depth = _outermost_call()
    place = _place(target, depth)
    plain = _value(value, [dim for _, dim in place.mapped], depth, name)
    if frame is None:
        _write([_Commit(place.tensor, plain, None, [])])
        return
    commits = waiting.setdefault(frame, {})
    earlier = commits.get(id(place.tensor))
    before = None
    if earlier is not None:
        before = earlier.before if earlier.is_of_the_batch_of(place) else earlier.value
    commits[id(place.tensor)] = _Commit(place.tensor, plain, before, place.chunks())


def _write(commits: Sequence[_Commit]) -> None:
    with torch.no_grad():
        for one in commits:
            one.target.copy_(one.value)


def finish(frame: FrameType) -> None:
    """Write what waits for the call of this frame, which has succeeded."""
    _write(list(waiting.pop(frame, {}).values()))


def discard(frame: FrameType) -> None:
    """Forget it, as the call has raised."""
    waiting.pop(frame, None)


def outermost(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that is traced: what it commits is written in the trace."""
    frame = sys._getframe()
    _depths[frame] = _C.level_depth()
    try:
        result = function(*args)
        finish(frame)
        return result
    finally:
        del _depths[frame]
        discard(frame)
