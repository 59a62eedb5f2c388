"""Validation of what users pass in, and every message they can meet from the Python side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch.utils._pytree as pytree
from torch import Tensor


class EscapedTensorError(RuntimeError):
    """A tensor was used after the `vmap` that made it had returned, or in another thread.

    Inside `vmap` a tensor stands for one example of a batch. It lives as long as the call of the mapped function; what
    outlives the call is what the function returns, with the batch dimension put back::

        kept = []
        functorch_lite.vmap(lambda x: kept.append(x))(xs)
        kept[0] + 1  # EscapedTensorError: return x instead of appending it

    Tensors that escape from `grad`, `vjp` or `jvp` have no hidden dimension: they behave as their value.
    """


class LoopFallbackWarning(UserWarning):
    """`vmap` runs an operator example by example, because it has no batching rule and no decomposition."""


def name_of(func: object) -> str:
    """How messages call the user's function."""
    return getattr(func, "__name__", type(func).__name__)


def refuse_type(message: str) -> NoReturn:
    """Raise a TypeError."""
    raise TypeError(message)


def refuse_single_level_function(name: str) -> NoReturn:
    """Raise: an old-style Function is differentiated at more than one level."""
    raise NotImplementedError(
        f"torch.autograd.Function {name} has forward(ctx, ...) and is differentiated at more than one level, or under "
        f"vmap with a level outside. Its own derivative would be ignored there. Split it into forward(...) and "
        f"setup_context(ctx, inputs, output), which works at every level."
    )


def check_one_vmap_rule(function: Any) -> None:
    """Refuse a Function that says twice how it is mapped."""
    if function.generate_vmap_rule:
        raise ValueError(
            f"vmap: torch.autograd.Function {function.__name__} has generate_vmap_rule = True and a vmap staticmethod, "
            f"two answers to one question. Remove one of them."
        )


def refuse_mark_dirty(name: str) -> NoReturn:
    """Raise: a Function writes in place where its derivative is mapped."""
    raise NotImplementedError(
        f"vmap: torch.autograd.Function {name} writes into an argument (ctx.mark_dirty) and is differentiated outside "
        f"this vmap. Give it a staticmethod vmap(info, in_dims, *args) that returns (outputs, out_dims), or let it "
        f"return a new tensor."
    )


def needs_memory(error: RuntimeError) -> bool:
    """Whether code failed because it wanted numbers (for numpy, or a Python value) from a tensor inside a transform."""
    parts = (
        "doesn't have storage",
        "Cannot access storage",
        "has no memory of its own",
        "cannot run on batched values",
    )
    return any(part in str(error) for part in parts)


def refuse_forward(transform: str, name: str, error: Exception) -> NoReturn:
    """Raise: the forward pass of a Function cannot run on wrappers."""
    if transform == "vmap":
        advice = (
            "Give it a staticmethod vmap(info, in_dims, *args) that returns (outputs, out_dims): it gets plain tensors."
        )
    else:
        advice = "Split it into forward(...) and setup_context(ctx, inputs, output): forward then gets plain tensors."
    raise NotImplementedError(
        f"{transform}: the forward pass of torch.autograd.Function {name} wants the numbers of a tensor, as numpy and "
        f".item() do. {advice}"
    ) from error


def argument_positions(transform: str, argnums: Any, count: int) -> tuple[int, ...]:
    """The non-negative positions that ``argnums`` selects among ``count`` positional arguments."""
    given = (argnums,) if isinstance(argnums, int) else argnums
    if not isinstance(given, tuple) or not all(isinstance(i, int) and not isinstance(i, bool) for i in given):
        refuse_type(f"{transform}: argnums must be an int or a tuple of ints, got {argnums!r}.")
    if not given:
        raise ValueError(f"{transform}: argnums is empty; name at least one positional argument.")
    for i in given:
        if not -count <= i < count:
            raise ValueError(
                f"{transform}: argnums={argnums!r} selects positional argument {i}, but the function was called with "
                f"{count} positional argument{'s' * (count != 1)}. Pass what is to be differentiated by position."
            )
    positions = tuple(i % count for i in given)
    if len(set(positions)) != len(positions):
        raise ValueError(f"{transform}: argnums={argnums!r} selects the same argument twice.")
    return positions


def check_callable(transform: str, func: Any) -> None:
    """Require a function."""
    if not callable(func):
        refuse_type(f"{transform}: expected a function as first argument, got {type(func).__name__}.")


#: Transforms that differentiate all arguments of a function, and have no argnums.
_GIVEN_PRIMALS = ("vjp", "jvp", "linearize", "linear_transpose", "hvp", "vhp", "gnvp")


def check_differentiable(transform: str, leaf: Any, name: str) -> None:
    """Require a real or complex tensor."""
    way_out = (
        f"capture it in the function, as in {transform}(lambda x: f(x, constant), ...)"
        if transform in _GIVEN_PRIMALS
        else "leave the argument out of argnums"
    )
    if not isinstance(leaf, Tensor):
        refuse_type(
            f"{transform}: {name} is a {type(leaf).__name__} and cannot be differentiated. Pass a torch.Tensor, or "
            f"{way_out}."
        )
    if not (leaf.is_floating_point() or leaf.is_complex()):
        refuse_type(
            f"{transform}: {name} has dtype {leaf.dtype}; derivatives exist for floating-point and complex tensors "
            f"only. Convert it, for example with .to(torch.float32), or {way_out}."
        )


def check_pair(transform: str, func: Any, output: Any) -> None:
    """Require the (output, aux) that ``has_aux=True`` promises."""
    if not (isinstance(output, tuple) and len(output) == 2):
        got = f"a tuple of {len(output)}" if isinstance(output, tuple) else type(output).__name__
        refuse_type(f"{transform}: has_aux=True expects {name_of(func)} to return (output, aux), got {got}.")


def check_some_primals(transform: str, func: Any, primals: tuple[Any, ...]) -> None:
    """Require something to differentiate with respect to."""
    if not primals:
        raise ValueError(f"{transform}: {name_of(func)} was given no primals to differentiate.")


def check_argument_tuple(transform: str, name: str, given: Any) -> None:
    """Require a tuple of positional arguments."""
    if not isinstance(given, tuple) or not given:
        got = "an empty tuple" if isinstance(given, tuple) else type(given).__name__
        refuse_type(f"{transform}: {name} must be a tuple with an entry for each argument, got {got}.")


def check_no_options(called: str, what: str, options: dict[str, Any]) -> None:
    """Refuse the options that torch.autograd.grad would take."""
    if options:
        refuse_type(
            f"{called}: takes {what} by position only, got the keyword argument {next(iter(options))!r}. It may "
            f"be called many times and be differentiated as it is: options such as retain_graph are not needed."
        )


def refuse_nonlinear(func: Any) -> NoReturn:
    """Raise: a function was found not to be linear."""
    raise ValueError(
        f"linear_transpose: {name_of(func)} is not linear: its value at ones is not its derivative times ones. Use "
        f"vjp for the transposed derivative at a point, and leave out constant terms: only the linear part of "
        f"x -> A x + b has a transpose."
    )


def check_scalar_output(transform: str, func: Any, output: Any) -> None:
    """Require a real number."""
    if not isinstance(output, Tensor):
        hint = " Pass has_aux=True if the rest is auxiliary." if isinstance(output, tuple) else ""
        refuse_type(
            f"{transform}: {name_of(func)} must return a single tensor, the value to differentiate, got "
            f"{type(output).__name__}.{hint}"
        )
    if output.dim() != 0:
        raise ValueError(
            f"{transform}: {name_of(func)} must return a scalar (a tensor of shape ()), got shape "
            f"{tuple(output.shape)}. Reduce it, for example with .sum(), or use jacrev or vjp."
        )
    if output.is_complex():
        raise ValueError(
            f"{transform}: {name_of(func)} returned a complex number ({output.dtype}), which has no gradient. Return a "
            f"real one, for example .abs() or .real, or use jacrev for a holomorphic function."
        )
    if not output.is_floating_point():
        raise ValueError(
            f"{transform}: {name_of(func)} returned dtype {output.dtype}, which has no gradient. Return a "
            f"floating-point number."
        )


def check_model_output(model: Any, leaves: Sequence[Tensor], paths: Sequence[str]) -> None:
    """Require numbers that a loss has a second derivative with respect to."""
    for leaf, path in zip(leaves, paths, strict=True):
        if not (leaf.is_floating_point() or leaf.is_complex()):
            refuse_type(
                f"gnvp: output{path} of {name_of(model)} has dtype {leaf.dtype}, and the loss cannot be differentiated "
                f"with respect to it. Return floating-point or complex tensors only."
            )


def check_tensor_outputs(transform: str, func: Any, leaves: Sequence[Any], paths: Sequence[str]) -> None:
    """Require tensors everywhere."""
    for leaf, path in zip(leaves, paths, strict=True):
        if leaf is None and not path:
            refuse_type(f"{transform}: {name_of(func)} returned None. Return a tensor: is a return statement missing?")
        if not isinstance(leaf, Tensor) and not path:
            refuse_type(
                f"{transform}: {name_of(func)} must return a tensor, got {type(leaf).__name__}. Compute with tensors "
                f"to the end: .item(), float() and the like lose the derivative."
            )
        if not isinstance(leaf, Tensor):
            refuse_type(
                f"{transform}: {name_of(func)} must return tensors, got {type(leaf).__name__} at output{path}. Return "
                f"it as auxiliary output (has_aux=True) if it is not to be differentiated."
            )


class _Star:
    def __repr__(self) -> str:
        return "*"


def describe_structure(spec: pytree.TreeSpec) -> str:
    """A tree as one would write it, with stars for its leaves: ``{'a': *, 'b': [*, *]}``."""
    return repr(pytree.tree_unflatten([_Star()] * spec.num_leaves, spec))


def check_same_structure(transform: str, what: str, got: Any, expected: Any, of: str) -> None:
    """Require that two trees have one structure."""
    if got != expected:
        raise ValueError(
            f"{transform}: {what} must have the structure of {of}: expected {describe_structure(expected)}, got "
            f"{describe_structure(got)}, where * is a tensor."
        )


def check_like(transform: str, what: str, got: Any, expected: Tensor, of: str) -> None:
    """Require a tensor of another's shape, and a dtype that converts to its own."""
    if not isinstance(got, Tensor):
        refuse_type(f"{transform}: {what} must be a tensor like {of}, got {type(got).__name__}.")
    if got.shape != expected.shape:
        raise ValueError(
            f"{transform}: {what} must have the shape of {of}, {tuple(expected.shape)}, got {tuple(got.shape)}."
        )
    if got.dtype != expected.dtype:
        raise ValueError(f"{transform}: {what} must have the dtype of {of}, {expected.dtype}, got {got.dtype}.")


def check_chunk_size(transform: str, chunk_size: Any) -> None:
    """Require None or a positive int."""
    if chunk_size is None:
        return
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size <= 0:
        raise ValueError(f"{transform}: chunk_size must be None or a positive int, got {chunk_size!r}.")


def check_chunk_size_or_auto(transform: str, chunk_size: Any) -> None:
    """Require None, "auto" or a positive int."""
    valid = chunk_size is None or (isinstance(chunk_size, int) and not isinstance(chunk_size, bool) and chunk_size > 0)
    if not valid and chunk_size != "auto":
        raise ValueError(f"{transform}: chunk_size must be None, 'auto' or a positive int, got {chunk_size!r}.")


def check_memory_budget(nbytes: Any) -> None:
    """Require a positive number of bytes."""
    if not isinstance(nbytes, int) or isinstance(nbytes, bool) or nbytes <= 0:
        raise ValueError(f"memory_budget: expected a positive int, a number of bytes, got {nbytes!r}.")


def refuse_unknown_memory(device: Any) -> NoReturn:
    """Raise: nothing tells how much memory a device has left."""
    raise NotImplementedError(
        f"chunk_size='auto': the memory that is available on device {device} is not known here. Set it, as in "
        f"with functorch_lite.memory_budget(nbytes): ..., or pass an int as chunk_size."
    )


def check_randomness(transform: str, randomness: Any) -> None:
    """Require one of the three settings."""
    if randomness not in ("error", "same", "different"):
        raise ValueError(f"{transform}: randomness must be 'error', 'same' or 'different', got {randomness!r}.")


def refuse_checkpointed_write(function: str, target: Tensor) -> None:
    """Refuse an autograd.Function that would write into the same memory again when it is computed again."""
    raise NotImplementedError(
        f"checkpoint: the torch.autograd.Function {function} writes in place into a tensor from outside the "
        f"checkpointed function (shape {tuple(target.shape)}, dtype {target.dtype}). It would be written again when "
        f"the function is computed again. Pass a clone."
    )
