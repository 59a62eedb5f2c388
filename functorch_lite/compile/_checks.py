"""Messages of functorch_lite.compile."""

from __future__ import annotations

from typing import NoReturn


def refuse_shared_memory() -> NoReturn:
    """Raise: inputs share memory in a way that is not known to autograd."""
    raise NotImplementedError(
        "compile: the function writes into an argument that shares memory with another one, and they are no views of "
        "one tensor that autograd knows. Pass a clone() of one of them, or one tensor, and take the views inside."
    )
