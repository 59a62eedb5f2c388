"""What cannot be traced, in the user's terms."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from functorch_lite.compile import _checks
from functorch_lite.compile._annotations import LIBRARIES


@contextmanager
def explained() -> Iterator[None]:
    """Says what cannot be traced in the user's terms."""
    try:
        yield
    except RuntimeError as error:
        refuse = _reason_of(error)
        if refuse is None:
            raise
        try:
            refuse(_location(error))
        except NotImplementedError as explained:
            raise explained from error


def _reason_of(error: RuntimeError) -> Callable[[str], NoReturn] | None:
    if isinstance(error, GuardOnDataDependentSymNode):
        return _checks.refuse_branch
    if isinstance(error, _UNTRACEABLE):
        return functools.partial(_checks.refuse_fake, reason=f"{error}.")
    return next((refuse for text, refuse in _REASONS.items() if text in str(error)), None)


_UNTRACEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
_REASONS: dict[str, Callable[[str], NoReturn]] = {
    "Cannot access data pointer of Tensor": _checks.refuse_data,
    "Cannot access storage of": _checks.refuse_data,
    "called inside torch.vmap": _checks.refuse_backward,
    "There was no fake impl registered": functools.partial(_checks.refuse_fake, reason="it has no fake form."),
    "Attempted to resize a view tensor to a larger size": _checks.refuse_resize,
}


def _location(error: BaseException) -> str:
    """The line of the user's code that raised."""
    found = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(LIBRARIES)]
    return f"at {found[-1].filename}:{found[-1].lineno}" if found else "in the function"
