"""Jacobians and Hessians: compositions of vmap, vjp and jvp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_lite import _C, _checks, _tree
from functorch_lite._boundary import boundary
from functorch_lite._jvp import jvp
from functorch_lite._vjp import value_and_pullback
from functorch_lite._vmap import map_chunks, vmap


def _basis(leaves: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Rows ``start`` to ``stop`` of the standard basis of the space of all leaves, split and shaped like them."""
    if len(leaves) == 1:
        leaf = leaves[0]
        n = leaf.numel()
        rows = torch.eye(n, dtype=leaf.dtype, device=leaf.device)
        if stop - start < n:
            rows = rows[start:stop]
        return [rows if leaf.dim() == 1 else rows.view(stop - start, *leaf.shape)]
    offset = 0
    parts = []
    for leaf in leaves:
        n = leaf.numel()
        rows = torch.zeros(stop - start, n, dtype=leaf.dtype, device=leaf.device)
        first, last = max(start, offset), min(stop, offset + n)
        if first < last:
            rows[first - start : last - start, first - offset : last - offset].fill_diagonal_(1)
        parts.append(rows.view(stop - start, *leaf.shape))
        offset += n
    return parts


def _apply_to_basis(
    linear: Callable[..., Any],
    leaves: Sequence[Tensor],
    chunk_size: int | None,
    *,
    has_aux: bool = False,
    randomness: str = "error",
) -> tuple[list[Tensor], Any]:
    """``linear`` of every basis vector: for each of its results a tensor r[n,*], n counting all elements of the leaves.

    With ``has_aux``, ``linear`` returns (results, aux), and aux must be the same for every vector.
    """
    out_dims = (0, None) if has_aux else 0
    total = sum(leaf.numel() for leaf in leaves)
    if chunk_size is None or total <= chunk_size:
        pieces = [vmap(linear, out_dims=out_dims, randomness=randomness)(*_basis(leaves, 0, total))]
    else:
        starts = range(0, total, chunk_size)
        chunks = (_basis(leaves, start, min(start + chunk_size, total)) for start in starts)
        pieces = map_chunks(linear, chunks, total, out_dims, randomness)
    aux = pieces[0][1] if has_aux else None
    rows = [piece[0] for piece in pieces] if has_aux else pieces
    return rows[0] if len(rows) == 1 else [torch.cat(parts) for parts in zip(*rows, strict=True)], aux


def _parts(rows: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return (rows,) if len(sizes) == 1 else rows.split(sizes)


def _check_holomorphic(transform: str, primals: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """A real output of a complex input has no complex derivative."""
    for primal in primals:
        for output in outputs:
            if primal.is_complex() and not output.is_complex():
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
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """Return a function that computes the Jacobian of ``func`` in reverse mode, one backward pass for each output.

    For ``func: x[n] -> y[m]``, the result is ``J[m,n]``; in general its shape is that of the output followed by that
    of the input. The passes run together under `vmap`.

    Args:
        func: Returns a pytree of tensors; with ``has_aux`` a pair (output, aux).
        argnums: Which positional arguments are differentiated; negative ones count from the end. Default 0.
        has_aux: Whether ``func`` also returns auxiliary output. Default False.
        chunk_size: At most this many backward passes at once, to bound memory. Default None, all.

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
    _checks.check_chunk_size("jacrev", chunk_size)
    return _reverse("jacrev", func, argnums, has_aux, chunk_size)


def _reverse(
    transform: str,
    func: Callable[..., Any],
    argnums: int | tuple[int, ...],
    has_aux: bool,
    chunk_size: int | None,
) -> Callable[..., Any]:
    """`jacrev`, with messages in the name of ``transform``."""

    def jacobian(*args: Any, **kwargs: Any) -> Any:
        _, aux, pullback, arguments = value_and_pullback(transform, func, argnums, has_aux, args, kwargs)
        _check_holomorphic(transform, pullback.primals, pullback.outputs)
        sizes = [output.numel() for output in pullback.outputs]

        # rows[k]: [number of outputs, *shape of primal k]
        def rows_for(unit: complex) -> list[tuple[Tensor, ...]]:
            def linear(*cotangents: Tensor) -> list[Tensor]:
                if unit != 1:
                    cotangents = tuple(c * unit if c.is_complex() else torch.zeros_like(c) for c in cotangents)
                return pullback.pull(cotangents, keep_graph=True)

            # Nothing draws in a backward pass but a checkpoint, which computes the forward pass again.
            rows, _ = _apply_to_basis(linear, pullback.outputs, chunk_size, randomness="same")
            return [_parts(row, sizes) for row in rows]

        rows = rows_for(1) if pullback.outputs else []
        mixed = any(o.is_complex() and not p.is_complex() for o in pullback.outputs for p in pullback.primals)
        imaginary_rows = rows_for(1j) if mixed else rows
        blocks = []
        for i, output in enumerate(pullback.outputs):
            shaped = []
            for primal, parts, imaginary_parts in zip(pullback.primals, rows, imaginary_rows, strict=True):
                block = parts[i]
                if primal.is_complex():
                    block = block.conj()
                elif output.is_complex():
                    block = torch.complex(block, imaginary_parts[i])
                shape = output.shape + primal.shape
                shaped.append(block if block.shape == shape else block.reshape(shape))
            blocks.append(arguments.shaped(_tree.unflatten(shaped, pullback.primals_spec)))
        result = _tree.unflatten(blocks, pullback.output_spec)
        return (result, aux) if has_aux else result

    return boundary(jacobian, like=func)


def jacfwd(
    func: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    randomness: str = "error",
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """Return a function that computes the Jacobian of ``func`` in forward mode, one pass for each input.

    The result is that of `jacrev`; forward mode is cheaper where there are fewer inputs than outputs.

    Args:
        func: As for `jacrev`.
        argnums: As for `jacrev`.
        has_aux: As for `jacrev`.
        randomness: What random operators in ``func`` do between the passes, as for `vmap`. Default ``"error"``.
        chunk_size: At most this many passes at once, to bound memory. Default None, all.

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
    _checks.check_chunk_size("jacfwd", chunk_size)
    _checks.check_randomness("jacfwd", randomness)
    return _forward("jacfwd", func, argnums, has_aux, randomness, chunk_size)


def _forward(
    transform: str,
    func: Callable[..., Any],
    argnums: int | tuple[int, ...],
    has_aux: bool,
    randomness: str,
    chunk_size: int | None,
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

        def from_primals(*lifted: Tensor) -> Any:
            output = func(*arguments.replaced(_tree.unflatten(lifted, spec)), **kwargs)
            if has_aux:
                _checks.check_pair(transform, func, output)
                output, seen["aux"] = output
            leaves, seen["spec"] = _tree.flatten(output)
            if not all(isinstance(leaf, Tensor) for leaf in leaves):
                _checks.check_tensor_outputs(transform, func, leaves, _tree.paths(output))
            return (leaves, seen["aux"]) if has_aux else leaves

        def linear(*tangents: Tensor) -> Any:
            outputs, derivatives, *aux = jvp(from_primals, tuple(primals), tangents, has_aux=has_aux)
            _check_holomorphic(transform, primals, outputs)
            if has_aux:
                _check_aux(transform, aux[0])
            seen["shapes"] = [output.shape for output in outputs]
            return (derivatives, aux[0]) if has_aux else derivatives

        columns, aux = _apply_to_basis(linear, primals, chunk_size, has_aux=has_aux, randomness=randomness)
        sizes = [primal.numel() for primal in primals]
        blocks = []
        for shape, column in zip(seen["shapes"], columns, strict=True):
            # column: [number of inputs, *shape of the output]
            shaped = [
                part.movedim(0, -1).reshape(shape + primal.shape)
                for part, primal in zip(_parts(column, sizes), primals, strict=True)
            ]
            blocks.append(arguments.shaped(_tree.unflatten(shaped, spec)))
        result = _tree.unflatten(blocks, seen["spec"])
        return (result, aux) if has_aux else result

    return boundary(jacobian, like=func)


def hessian(
    func: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., Any]:
    """Return a function that computes the Hessian of ``func``: forward mode over reverse mode.

    For ``func: x[n] -> y[]`` the result is ``H[n,n]``; in general the shape is that of the output followed twice by
    that of the input.

    Args:
        func: As for `jacrev`.
        argnums: As for `jacrev`. A tuple of k gives k by k blocks, as nested tuples.
        has_aux: As for `jacrev`.
        chunk_size: At most this many forward passes at once, to bound memory. Default None, all.
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
    _checks.check_chunk_size("hessian", chunk_size)
    _checks.check_randomness("hessian", randomness)
    gradient = _reverse("hessian", func, argnums, has_aux, None)
    return _forward("hessian", gradient, argnums, has_aux, randomness, chunk_size)
