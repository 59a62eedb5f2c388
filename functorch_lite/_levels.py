"""The only place that opens and closes a level."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from functorch_lite import _C

LevelT = TypeVar("LevelT", bound=_C.Level)


@contextmanager
def opened(level: LevelT) -> Iterator[LevelT]:
    """Put ``level`` on the thread's stack for the body, and take it off whatever happens in it."""
    level.open()
    try:
        yield level
    finally:
        level.close()
