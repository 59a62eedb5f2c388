"""jvp: forward mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_lite import _C, _checks, _tree
from functorch_lite._boundary import boundary


def jvp(
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    *,
    strict: bool = False,
    has_aux: bool = False,
    **kwargs: Any,
) -> Any:
    """Evaluate ``func`` and its derivative in one direction.

    For ``func: x[n] -> y[m]`` with Jacobian ``J[m,n]`` and tangent ``t[n]``, returns ``y`` and ``J @ t``.

    Args:
        func: Takes the primals, returns a pytree of tensors; with ``has_aux`` a pair (output, aux).
        primals: A tuple of pytrees, the positional arguments of ``func``.
        tangents: The direction, with the structure, shapes and dtypes of the primals.
        strict: Raise if an output does not depend on the primals, in place of a tangent of zeros. Default False.
        has_aux: Whether ``func`` also returns auxiliary output. Default False.
        kwargs: Passed on to ``func``, not differentiated.

    Returns:
        ``(output, tangents_out)``, or ``(output, tangents_out, aux)``.

    Raises:
        TypeError: ``primals`` or ``tangents`` is not a tuple, or a leaf is not a floating-point or complex tensor.
        ValueError: The tangents do not fit the primals, or ``strict`` found an independent output.

    Example:
        >>> import torch
        >>> from functorch_lite import jvp
        >>> jvp(torch.sin, (torch.zeros(2),), (torch.ones(2),))
        (tensor([0., 0.]), tensor([1., 1.]))
    """
    return _jvp(func, primals, tangents, strict, has_aux, kwargs)


def _run_jvp(
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    strict: bool,
    has_aux: bool,
    kwargs: dict[str, Any],
) -> Any:
    _checks.check_callable("jvp", func)
    output, tangents_out, aux = push_forward(
        "jvp", func, primals, tangents, strict=strict, has_aux=has_aux, kwargs=kwargs
    )
    return (output, tangents_out, aux) if has_aux else (output, tangents_out)


_jvp = boundary("jvp", _run_jvp)


def push_forward(
    transform: str,
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    called: str = "tangents",
    *,
    strict: bool = False,
    has_aux: bool = False,
    kwargs: dict[str, Any] | None = None,
) -> tuple[Any, Any, Any]:
    """`jvp` in the name of ``transform``, which calls the tangents ``called``. Returns (output, tangents, aux)."""
    _checks.check_argument_tuple(transform, "primals", primals)
    _checks.check_argument_tuple(transform, called, tangents)
    flat_primals, spec = _tree.flatten(primals)
    for i, primal in enumerate(flat_primals):
        if not _tree.is_differentiable(primal):
            _checks.check_differentiable(transform, primal, f"primals{_tree.paths(primals)[i]}")
    flat_tangents = _tree.leaves_like(transform, called, tangents, "primals", flat_primals, spec)

    def call(duals: list[Tensor]) -> Any:
        return func(*_tree.unflatten(duals, spec), **(kwargs or {}))

    values, tangents_out, output_spec, aux = push_leaves(
        transform, func, call, flat_primals, flat_tangents, strict=strict, has_aux=has_aux
    )
    return _tree.unflatten(values, output_spec), _tree.unflatten(tangents_out, output_spec), aux


def push_leaves(
    transform: str,
    func: Callable[..., Any],
    call: Callable[[list[Tensor]], Any],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    *,
    strict: bool = False,
    has_aux: bool = False,
) -> tuple[list[Tensor], list[Tensor], _tree.Spec, Any]:
    """Run ``call``, which runs ``func``, on duals. Returns its output as leaves, their tangents, the spec, and aux."""
    with _C.AutodiffLevel(True, transform) as level:
        output = call([level.lift_dual(p, t) for p, t in zip(primals, tangents, strict=True)])
        aux = None
        if has_aux:
            _checks.check_pair(transform, func, output)
            output, aux = output
            aux = _tree.map_tensors(level.value_of, aux)
        leaves, spec = _tree.flatten(output)
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                _checks.check_tensor_outputs(transform, func, leaves, _tree.paths(output))
        values = [level.value_of(leaf) for leaf in leaves]
        results = [level.tangent_of(leaf) for leaf in leaves]
    if strict:
        _check_depends(transform, func, output, results)
    return values, [_zeros_if_none(tangent, value) for tangent, value in zip(results, values, strict=True)], spec, aux


def _check_depends(transform: str, func: Callable[..., Any], output: Any, tangents: list[Tensor | None]) -> None:
    if any(tangent is None for tangent in tangents):
        path = _tree.paths(output)[tangents.index(None)]
        raise ValueError(_checks.no_dependence(transform, func, path))


def _zeros_if_none(tangent: Tensor | None, value: Tensor) -> Tensor:
    return torch.zeros_like(value) if tangent is None else tangent
