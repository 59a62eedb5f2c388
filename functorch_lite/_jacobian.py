"""Jacobians and Hessians: compositions of vmap, vjp and jvp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from functorch_lite import _C, _checks, _tree
from functorch_lite._basis import ChunkSize, apply_to_basis
from functorch_lite._boundary import MadeOf, boundary
from functorch_lite._jacobian_blocks import by_rows, dtype_of_rows, from_columns, needs_imaginary_rows
from functorch_lite._jvp import push_leaves
from functorch_lite._linear import Pushforward
from functorch_lite._vjp import value_and_pullback


def _check_holomorphic(transform: str, primals: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """A real output of a complex input has no complex derivative."""
    for primal in primals:
        if not primal.is_complex():
            continue
        for output in outputs:
            if not output.is_complex():
                raise ValueError(
                    f"{transform}: a real output ({output.dtype}) of a complex input ({primal.dtype}) has no complex "
                    f"derivative. Use grad or vjp, whose convention covers this case, or differentiate with respect "
                    f"to the real and imaginary parts."
                )


def _check_aux(transform: str, aux: Any) -> None:
    """There is one auxiliary output, not one for each pass."""
    level = _C.current_level()
    for leaf in _tree.flatten(aux)[0]:
        if isinstance(leaf, Tensor) and isinstance(level, _C.VmapLevel) and level.unwrap(leaf)[1] is not None:
            raise ValueError(
                f"{transform}: the auxiliary output depends on random numbers, which differ between the passes with "
                f"randomness='different'. Pass randomness='same', or compute it outside {transform}."
            )


def jacrev(
    func: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: ChunkSize = None,
) -> Callable[..., Any]:
    """Return a function that computes the Jacobian of ``func`` in reverse mode, one backward pass for each output.

    For ``func: x[n] -> y[m]``, the result is ``J[m,n]``; in general its shape is that of the output followed by that
    of the input. The passes run together under `vmap`.

    Args:
        func: Returns a pytree of tensors; with ``has_aux`` a pair (output, aux).
        argnums: Which positional arguments are differentiated; negative ones count from the end. Default 0.
        has_aux: Whether ``func`` also returns auxiliary output. Default False.
        chunk_size: At most this many backward passes at once, to bound memory; ``"auto"`` for as many as fit into the
            `memory_budget`. Default None, all.

    Returns:
        A function that returns the Jacobian: with the structure of the output, and in place of each of its tensors
        the structure of the argument (a tuple of them for a tuple of argnums); with ``has_aux`` (Jacobian, aux).
        For a holomorphic function it is the complex derivative, the same as `jacfwd` gives.

    Raises:
        TypeError: A selected argument is not a floating-point or complex tensor, or an output is not a tensor.
        ValueError: ``argnums`` or ``chunk_size`` is out of range, or a real output depends on a complex input.

    Note:
        A complex function of complex inputs is taken to be holomorphic; of a real input it may be any.

    Example:
        >>> import torch
        >>> from functorch_lite import jacrev
        >>> jacrev(lambda x: x**2)(torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
    """
    _checks.check_callable("jacrev", func)
    _checks.check_chunk_size_or_auto("jacrev", chunk_size)
    return _reverse("jacrev", func, argnums, has_aux, chunk_size)


def _reverse(
    transform: str,
    func: Callable[..., Any],
    argnums: int | tuple[int, ...],
    has_aux: bool,
    chunk_size: ChunkSize,
) -> Callable[..., Any]:
    """`jacrev`, with messages in the name of ``transform``."""

    def jacobian(*args: Any, **kwargs: Any) -> Any:
        _, aux, pullback, arguments = value_and_pullback(transform, func, argnums, has_aux, args, kwargs)
        _check_holomorphic(transform, pullback.primals, pullback.outputs)
        result = by_rows(pullback, arguments, chunk_size)
        return (result, aux) if has_aux else result

    made_of: MadeOf = (_reverse, (transform, func, argnums, has_aux, chunk_size), {})
    return boundary(transform, jacobian, like=func, made_of=made_of)


def jacfwd(
    func: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    randomness: str = "error",
    chunk_size: ChunkSize = None,
) -> Callable[..., Any]:
    """Return a function that computes the Jacobian of ``func`` in forward mode, one pass for each input.

    The result is that of `jacrev`; forward mode is cheaper where there are fewer inputs than outputs.

    Args:
        func: As for `jacrev`.
        argnums: As for `jacrev`.
        has_aux: As for `jacrev`.
        randomness: What random operators in ``func`` do between the passes, as for `vmap`. Default ``"error"``.
        chunk_size: At most this many passes at once, or ``"auto"``, as for `jacrev`. Default None, all.

    Returns:
        As for `jacrev`.

    Raises:
        TypeError: As for `jacrev`.
        ValueError: As for `jacrev`.

    Example:
        >>> import torch
        >>> from functorch_lite import jacfwd
        >>> jacfwd(lambda x: x**2)(torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
    """
    _checks.check_callable("jacfwd", func)
    _checks.check_chunk_size_or_auto("jacfwd", chunk_size)
    _checks.check_randomness("jacfwd", randomness)
    return _forward("jacfwd", func, argnums, has_aux, randomness, chunk_size)


def _forward(
    transform: str,
    func: Callable[..., Any],
    argnums: int | tuple[int, ...],
    has_aux: bool,
    randomness: str,
    chunk_size: ChunkSize,
) -> Callable[..., Any]:
    """`jacfwd`, with messages in the name of ``transform``."""

    def jacobian(*args: Any, **kwargs: Any) -> Any:
        arguments = _tree.Arguments(transform, args, argnums)
        primals, spec = _tree.flatten(arguments.selected)
        if not primals:  # no basis vector to run forward mode on
            return _reverse(transform, func, argnums, has_aux, chunk_size)(*args, **kwargs)
        for i, leaf in enumerate(primals):
            if not _tree.is_differentiable(leaf):
                _checks.check_differentiable(transform, leaf, arguments.names()[i])
        seen: dict[str, Any] = {}

        def from_primals(lifted: list[Tensor]) -> Any:
            return func(*arguments.replaced(_tree.unflatten(lifted, spec)), **kwargs)

        def linear(*tangents: Tensor) -> Any:
            outputs, derivatives, seen["spec"], aux = push_leaves(
                transform, func, from_primals, primals, tangents, has_aux=has_aux
            )
            _check_holomorphic(transform, primals, outputs)
            if has_aux:
                _check_aux(transform, aux)
            return (derivatives, aux) if has_aux else derivatives

        columns, aux = apply_to_basis(linear, primals, chunk_size, has_aux=has_aux, randomness=randomness)
        result = _tree.unflatten(from_columns(columns, primals, spec, arguments), seen["spec"])
        return (result, aux) if has_aux else result

    made_of: MadeOf = (_forward, (transform, func, argnums, has_aux, randomness, chunk_size), {})
    return boundary(transform, jacobian, like=func, made_of=made_of)


def hessian(
    func: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: ChunkSize = None,
    randomness: str = "error",
) -> Callable[..., Any]:
    """Return a function that computes the Hessian of ``func``: forward mode over reverse mode.

    For ``func: x[n] -> y[]`` the result is ``H[n,n]``; in general the shape is that of the output followed twice by
    that of the input.

    Args:
        func: As for `jacrev`.
        argnums: As for `jacrev`. A tuple of k gives k by k blocks, as nested tuples.
        has_aux: As for `jacrev`.
        chunk_size: At most this many forward passes at once, or ``"auto"``, as for `jacrev`. Default None, all.
        randomness: As for `jacfwd`.

    Returns:
        A function that returns the Hessian; with ``has_aux`` (Hessian, aux).

    Raises:
        TypeError: As for `jacrev`.
        ValueError: As for `jacrev`.

    Example:
        >>> import torch
        >>> from functorch_lite import hessian
        >>> hessian(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    _checks.check_callable("hessian", func)
    _checks.check_chunk_size_or_auto("hessian", chunk_size)
    _checks.check_randomness("hessian", randomness)
    gradient = _reverse("hessian", func, argnums, has_aux, None)
    return _forward("hessian", gradient, argnums, has_aux, randomness, chunk_size)


def _cheaper(
    transform: str, func: Callable[..., Any], argnums: int | tuple[int, ...], has_aux: bool, chunk_size: ChunkSize
) -> Callable[..., tuple[Any, Any, Any]]:
    """A function that returns (value, aux, Jacobian), by rows or by columns, whichever are fewer."""
    _checks.check_callable(transform, func)
    _checks.check_chunk_size_or_auto(transform, chunk_size)

    def run(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        value, aux, pullback, arguments = value_and_pullback(transform, func, argnums, has_aux, args, kwargs)
        primals, outputs = pullback.primals, pullback.outputs
        _check_holomorphic(transform, primals, outputs)
        n_columns = sum(primal.numel() for primal in primals)
        n_rows = sum(output.numel() for output in outputs) * (1 + needs_imaginary_rows(pullback))
        if n_rows <= n_columns or not primals:
            return value, aux, by_rows(pullback, arguments, chunk_size)
        pushforward = Pushforward(pullback)
        columns, _ = apply_to_basis(lambda *tangents: pushforward.push(tangents), primals, chunk_size)
        blocks = from_columns(columns, primals, pullback.primals_spec, arguments, dtype=dtype_of_rows)
        return value, aux, _tree.unflatten(blocks, pullback.output_spec)

    return run


def jacobian(
    func: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: ChunkSize = None,
) -> Callable[..., Any]:
    """Return a function that computes the Jacobian of ``func``, in the mode that takes fewer passes.

    ``func`` is evaluated once. If it has no more outputs than inputs, counting elements, there is a backward pass for
    each output, as in `jacrev`. Otherwise there is one for each input, of the linear map that `linearize` records: the
    backward pass of every operator in ``func`` has to be differentiable. `jacfwd` gives the same, keeps nothing of
    ``func`` in memory, and evaluates it in each chunk.

    Args:
        func: As for `jacrev`.
        argnums: As for `jacrev`.
        has_aux: As for `jacrev`.
        chunk_size: At most this many passes at once, or ``"auto"``, as for `jacrev`. Default None, all.

    Returns:
        As for `jacrev`.

    Raises:
        TypeError: As for `jacrev`.
        ValueError: As for `jacrev`.

    Example:
        >>> import torch
        >>> from functorch_lite import jacobian
        >>> jacobian(lambda x: x**2)(torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
    """
    run = _cheaper("jacobian", func, argnums, has_aux, chunk_size)

    def matrix(*args: Any, **kwargs: Any) -> Any:
        _, aux, result = run(*args, **kwargs)
        return (result, aux) if has_aux else result

    made_of = (jacobian, (func, argnums), {"has_aux": has_aux, "chunk_size": chunk_size})
    return boundary("jacobian", matrix, like=func, made_of=made_of)


def value_and_jacobian(
    func: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: ChunkSize = None,
) -> Callable[..., Any]:
    """Return a function that computes the value and the Jacobian of ``func``, which it evaluates once.

    Args:
        func: As for `jacrev`.
        argnums: As for `jacrev`.
        has_aux: As for `jacrev`.
        chunk_size: As for `jacobian`.

    Returns:
        A function that returns (value, Jacobian), or ((value, aux), Jacobian). The Jacobian is that of `jacobian`.

    Raises:
        TypeError: As for `jacrev`.
        ValueError: As for `jacrev`.

    Example:
        >>> import torch
        >>> from functorch_lite import value_and_jacobian
        >>> value_and_jacobian(lambda x: x.sum() ** 2)(torch.tensor([1.0, 2.0]))
        (tensor(9.), tensor([6., 6.]))
    """
    run = _cheaper("value_and_jacobian", func, argnums, has_aux, chunk_size)

    def both(*args: Any, **kwargs: Any) -> Any:
        value, aux, result = run(*args, **kwargs)
        return ((value, aux) if has_aux else value), result

    made_of = (value_and_jacobian, (func, argnums), {"has_aux": has_aux, "chunk_size": chunk_size})
    return boundary("value_and_jacobian", both, like=func, made_of=made_of)
