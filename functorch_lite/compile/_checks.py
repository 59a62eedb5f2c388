"""Validation of what users pass to functorch_lite.compile, and every message they can meet from it."""

from __future__ import annotations

from typing import Any, NoReturn

import torch


def check_operator(caller: str, operator: Any) -> None:
    """Require an operator of torch.ops, with or without its overload."""
    if not isinstance(operator, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        raise TypeError(
            f"{caller}: got {operator!r}, expected operators; name them as in torch.ops.aten.tanh_backward or "
            f"torch.ops.aten.tanh_backward.default."
        )


def check_has_decomposition(caller: str, operator: Any, found: dict[Any, Any]) -> None:
    """Require that PyTorch can write an operator with others."""
    if not found:
        raise ValueError(
            f"{caller}: got {operator}, expected operators that torch._decomp.decomposition_table can take apart; "
            f"leave it out, or put your own function for it into the dict that {caller} returns."
        )


def refuse_torchscript(error: Exception) -> NoReturn:
    """Raise: a graph has something that TorchScript does not know."""
    raise NotImplementedError(
        "ts_compile: got a graph that TorchScript cannot express, for the reason above; compile it with "
        "functorch_lite.compile.inductor, or run it with nop."
    ) from error


def refuse_shared_memory() -> NoReturn:
    """Raise: inputs share memory in a way that is not known to autograd."""
    raise NotImplementedError(
        "compile: the function writes into an argument that shares memory with another one, and they are no views of "
        "one tensor that autograd knows. Pass a clone() of one of them, or one tensor, and take the views inside."
    )
