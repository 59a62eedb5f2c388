"""jvp: forward mode."""

from __future__ import annotations

from collections.abc import Callable
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
    for name, given in (("primals", primals), ("tangents", tangents)):
        if not isinstance(given, tuple) or not given:
            got = "an empty tuple" if isinstance(given, tuple) else type(given).__name__
            _checks.refuse_type(f"jvp: {name} must be a tuple with an entry for each argument, got {got}.")
    flat_primals, spec = _tree.flatten(primals)
    flat_tangents, tangents_spec = _tree.flatten(tangents)
    _checks.check_same_structure("jvp", "the tangents", tangents_spec, spec, "the primals")
    for i, (primal, tangent) in enumerate(zip(flat_primals, flat_tangents, strict=True)):
        path = _tree.paths(primals)[i] if not _fits(primal, tangent) else ""
        _checks.check_differentiable("jvp", primal, f"primals{path}")
        _checks.check_like("jvp", f"tangents{path}", tangent, primal, f"primals{path}")

    with _C.AutodiffLevel(True) as level:
        duals = [level.lift_dual(p, t) for p, t in zip(flat_primals, flat_tangents, strict=True)]
        output = func(*_tree.unflatten(duals, spec), **kwargs)
        aux = None
        if has_aux:
            _checks.check_pair("jvp", func, output)
            output, aux = output
            aux = _tree.map_tensors(level.value_of, aux)
        leaves, output_spec = _tree.flatten(output)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            _checks.check_tensor_outputs("jvp", func, leaves, _tree.paths(output))
        values = [level.value_of(leaf) for leaf in leaves]
        results = [level.tangent_of(leaf) for leaf in leaves]
    if strict and any(tangent is None for tangent in results):
        path = _tree.paths(output)[results.index(None)]
        raise ValueError(
            f"jvp: output{path} of {_checks.name_of(func)} does not depend on the primals, and strict=True. Pass "
            f"strict=False for a tangent of zeros."
        )
    tangents_out = [
        torch.zeros_like(value) if tangent is None else tangent for value, tangent in zip(values, results, strict=True)
    ]
    result = _tree.unflatten(values, output_spec), _tree.unflatten(tangents_out, output_spec)
    return (*result, aux) if has_aux else result


def _fits(primal: Any, tangent: Any) -> bool:
    return (
        _tree.is_differentiable(primal)
        and isinstance(tangent, Tensor)
        and primal.shape == tangent.shape
        and primal.dtype == tangent.dtype
    )


_jvp = boundary(_run_jvp)
