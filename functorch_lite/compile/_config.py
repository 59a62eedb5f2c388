"""The settings of `functorch_lite.compile`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from functorch_lite.compile import _checks


@dataclass
class Config:
    """What `functorch_lite.compile` does where a call does not say otherwise.

    Attributes:
        memory_budget: The ``memory_budget`` of `min_cut_rematerialization_partition`.
        never_recompute: Operators whose results are saved and not computed again, whatever the budget: overloads
            such as ``torch.ops.aten.mm.default``, or packets such as ``torch.ops.aten.mm``.
        work_for_a_byte: How many bytes the backward pass may move to have one byte less to be saved, while the
            budget is 1.
        longest_chain: How many nodes in a row the backward pass may compute again, while the budget is 1. All of
            them are in memory at a time.
    """

    memory_budget: float = 1.0
    never_recompute: frozenset[Callable[..., Any]] = frozenset()
    work_for_a_byte: int = 16
    longest_chain: int = 32

    @contextmanager
    def patch(self, **changes: Any) -> Iterator[None]:
        """Change settings for the enclosed code.

        Args:
            **changes: The new values of some attributes.

        Returns:
            A context manager.

        Raises:
            AttributeError: There is no such setting.

        Example:
            >>> from functorch_lite.compile import config
            >>> with config.patch(memory_budget=0.5):
            ...     config.memory_budget
            0.5
            >>> config.memory_budget
            1.0
        """
        _checks.check_settings(changes, [field.name for field in fields(self)])
        before = {name: getattr(self, name) for name in changes}
        vars(self).update(changes)
        try:
            yield
        finally:
            vars(self).update(before)


#: The settings in force.
config = Config()
