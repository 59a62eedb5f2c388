"""Products of second-derivative matrices with vectors, without the matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from functorch_lite import _checks, _tree
from functorch_lite._boundary import boundary
from functorch_lite._jvp import push_forward
from functorch_lite._vjp import Pullback, output_and_pullback


def hvp(
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    vectors: tuple[Any, ...],
    *,
    has_aux: bool = False,
    **kwargs: Any,
) -> Any:
    """Evaluate ``func`` and the product of its Hessian with a vector: forward mode over reverse mode.

    For ``func: x[n] -> y[]`` with Hessian ``H[n,n]`` and vector ``v[n]``, returns ``y`` and ``H @ v``. Of several
    primals, ``H`` has the mixed derivatives too.

    Args:
        func: Takes the primals, returns a real tensor of shape (); with ``has_aux`` a pair (value, aux).
        primals: A tuple of pytrees, the positional arguments of ``func``.
        vectors: The vector, with the structure, shapes and dtypes of the primals.
        has_aux: Whether ``func`` also returns auxiliary output. Default False.
        kwargs: Passed on to ``func``, not differentiated.

    Returns:
        ``(value, product)``, or ``(value, product, aux)``; the product is a tuple with one entry for each primal.

    Raises:
        TypeError: ``primals`` or ``vectors`` is not a tuple, or a leaf is not a floating-point or complex tensor.
        ValueError: The vectors do not fit the primals, or the value is not a real scalar.

    Note:
        For many vectors at one point, ``linearize(grad(func), x)`` gives ``v -> H @ v`` once and for all. The method
        is Pearlmutter's (Fast exact multiplication by the Hessian, Neural Computation 6, 1994).

    Example:
        >>> import torch
        >>> from functorch_lite import hvp
        >>> value, (product,) = hvp(lambda x: (x**3).sum(), (torch.tensor([1.0, 2.0]),), (torch.ones(2),))
        >>> product
        tensor([ 6., 12.])
    """
    return _hvp(func, primals, vectors, has_aux, kwargs)


def _run_hvp(
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    vectors: tuple[Any, ...],
    has_aux: bool,
    kwargs: dict[str, Any],
) -> Any:
    _checks.check_callable("hvp", func)
    gradient = _gradient("hvp", func, has_aux, kwargs)
    _, product, (value, aux) = push_forward("hvp", gradient, primals, vectors, "vectors", has_aux=True)
    return (value, product, aux) if has_aux else (value, product)


_hvp = boundary("hvp", _run_hvp)


def _gradient(
    transform: str, func: Callable[..., Any], has_aux: bool, kwargs: dict[str, Any]
) -> Callable[..., tuple[Any, tuple[Any, Any]]]:
    """A function of the primals that returns (gradient, (value, aux))."""

    def gradient(*primals: Any) -> tuple[Any, tuple[Any, Any]]:
        value, aux, pullback = output_and_pullback(transform, func, primals, has_aux, kwargs)
        _checks.check_scalar_output(transform, func, value)
        grads = pullback.pull([torch.ones_like(value)], keep_graph=False)
        return _tree.unflatten(grads, pullback.primals_spec), (value, aux)

    return gradient


def vhp(
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    vectors: tuple[Any, ...],
    *,
    has_aux: bool = False,
    **kwargs: Any,
) -> Any:
    """Evaluate ``func`` and the product of a vector with its Hessian: reverse mode over reverse mode.

    For ``func: x[n] -> y[]`` with Hessian ``H[n,n]`` and vector ``v[n]``, returns ``y`` and ``v @ H``, the same numbers
    as `hvp`. It needs no forward-mode formulas; where there are any, `hvp` is usually faster and takes less memory.

    Args:
        func: As for `hvp`.
        primals: As for `hvp`.
        vectors: As for `hvp`.
        has_aux: As for `hvp`.
        kwargs: As for `hvp`.

    Returns:
        As for `hvp`.

    Raises:
        TypeError: As for `hvp`.
        ValueError: As for `hvp`.

    Example:
        >>> import torch
        >>> from functorch_lite import vhp
        >>> value, (product,) = vhp(lambda x: (x**3).sum(), (torch.tensor([1.0, 2.0]),), (torch.ones(2),))
        >>> product
        tensor([ 6., 12.])
    """
    return _vhp("vhp", func, primals, vectors, has_aux, kwargs)


def _run_vhp(
    transform: str,
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    vectors: tuple[Any, ...],
    has_aux: bool,
    kwargs: dict[str, Any],
) -> Any:
    _checks.check_callable(transform, func)
    _checks.check_argument_tuple(transform, "primals", primals)
    _checks.check_argument_tuple(transform, "vectors", vectors)
    gradient = _gradient(transform, func, has_aux, kwargs)
    _, (value, aux), pullback = output_and_pullback(transform, gradient, primals, True, {})
    leaves = _tree.leaves_like(transform, "vectors", vectors, "primals", pullback.primals, pullback.primals_spec)
    product = _tree.unflatten(pullback.pull(leaves, keep_graph=False), pullback.primals_spec)
    return (value, product, aux) if has_aux else (value, product)


_vhp = boundary("vhp", _run_vhp)


def gnvp(
    model: Callable[..., Any],
    loss: Callable[[Any], Any],
    primals: tuple[Any, ...],
    vectors: tuple[Any, ...],
    **kwargs: Any,
) -> Any:
    """Evaluate a loss of a model's output and the product of its generalised Gauss-Newton matrix with a vector.

    For ``model: x[n] -> z[m]`` with Jacobian ``J[m,n]``, and ``loss: z[m] -> y[]`` with Hessian ``H[m,m]``, returns
    ``y`` and ``J.T @ H @ J @ v``: the Hessian of the composition without the second derivatives of the model,
    positive semi-definite if the loss is convex. The model is evaluated once.

    Args:
        model: Takes the primals, returns a pytree of floating-point or complex tensors.
        loss: Takes that output as its one argument, returns a real tensor of shape ().
        primals: A tuple of pytrees, the positional arguments of ``model``.
        vectors: The vector, with the structure, shapes and dtypes of the primals.
        kwargs: Passed on to ``model``, not differentiated.

    Returns:
        ``(value, product)``: the loss, and a tuple with one entry for each primal.

    Raises:
        TypeError: ``primals`` or ``vectors`` is not a tuple, or a leaf is not a floating-point or complex tensor.
        ValueError: The vectors do not fit the primals, or the loss is not a real scalar.

    Note:
        The method is N. N. Schraudolph's (Fast curvature matrix-vector products for second-order gradient descent,
        Neural Computation 14, 2002).

    Example:
        >>> import torch
        >>> from functorch_lite import gnvp
        >>> value, (product,) = gnvp(torch.sin, lambda z: (z**2).sum(), (torch.zeros(2),), (torch.ones(2),))
        >>> product
        tensor([2., 2.])
    """
    return _gnvp(model, loss, primals, vectors, kwargs)


def _run_gnvp(
    model: Callable[..., Any],
    loss: Callable[[Any], Any],
    primals: tuple[Any, ...],
    vectors: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    _checks.check_callable("gnvp", model)
    _checks.check_callable("gnvp", loss)

    # One forward pass carries the tangents and keeps the pullback.
    def forward(*lifted: Any) -> tuple[Any, Pullback]:
        output, _, pullback = output_and_pullback("gnvp", model, lifted, False, kwargs)
        return output, pullback

    output, tangent, pullback = push_forward("gnvp", forward, primals, vectors, "vectors", has_aux=True)
    _checks.check_model_output(model, pullback.outputs, _tree.paths(output))
    # A loss is small beside its model, so reverse over reverse, which more operators have.
    value, (cotangent,) = _run_vhp("gnvp", loss, (output,), (tangent,), False, {})
    product = pullback.pull(_tree.flatten(cotangent)[0], keep_graph=False)
    return value, _tree.unflatten(product, pullback.primals_spec)


_gnvp = boundary("gnvp", _run_gnvp)
