"""linearize and linear_transpose: linear maps as functions, by transposing once or twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_lite import _C, _checks, _tree
from functorch_lite._boundary import boundary
from functorch_lite._vjp import Pullback, output_and_pullback


class Pushforward:
    """The linear map from tangents of the inputs to tangents of the outputs, at the point of a pullback.

    A pullback is linear in the cotangents, so pulling back through *it* gives its transpose. What that needs of the
    first graph is in the second one, and the rest is freed: the pullback cannot be used again.
    """

    def __init__(self, pullback: Pullback) -> None:
        self._primals, self._primals_spec = pullback.primals, pullback.primals_spec
        self._outputs, self._output_spec = pullback.outputs, pullback.output_spec
        # An output of integers has no cotangent, and a tangent of zeros.
        self._moving = [i for i, output in enumerate(self._outputs) if _tree.is_differentiable(output)]

        def pull(moving: tuple[Tensor, ...]) -> list[Tensor]:
            cotangents = list(self._outputs)
            for i, cotangent in zip(self._moving, moving, strict=True):
                cotangents[i] = cotangent
            return pullback.pull(cotangents, keep_graph=False)

        zeros = tuple(torch.zeros_like(self._outputs[i]) for i in self._moving)
        self._transpose = Pullback("linearize", pullback.func, zeros, list)
        self._transpose.run(pull, has_aux=False)

    def push(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """Tangents of the outputs, zeros where one does not depend on the inputs."""
        moving = dict(zip(self._moving, self._transpose.pull(tangents, keep_graph=True), strict=True))
        return [moving[i] if i in moving else torch.zeros_like(output) for i, output in enumerate(self._outputs)]

    def __call__(self, *tangents: Any, **unknown: Any) -> Any:
        """Push tangents with the structure of the primals."""
        _checks.check_no_options("jvp_fn", "tangents", unknown)
        leaves = _tree.leaves_like("jvp_fn", "tangents", tangents, "primals", self._primals, self._primals_spec)
        return _tree.unflatten(self.push(leaves), self._output_spec)


def linearize(
    func: Callable[..., Any], *primals: Any, has_aux: bool = False, **kwargs: Any
) -> tuple[Any, Callable[..., Any]] | tuple[Any, Callable[..., Any], Any]:
    """Evaluate ``func`` and return the function that pushes tangents forward through it.

    For ``func: x[n] -> y[m]`` with Jacobian ``J[m,n]``, the returned ``jvp_fn`` maps ``t[n]`` to ``J @ t``, as `jvp`
    does. It does not evaluate ``func`` again: it replays the linear map that was recorded here, which is worth it for
    several tangents at one point.

    Args:
        func: Takes the primals, returns a pytree of tensors; with ``has_aux`` a pair (output, aux).
        primals: Pytrees of floating-point or complex tensors, all of which are differentiated.
        has_aux: Whether ``func`` also returns auxiliary output. Default False.
        kwargs: Passed on to ``func``, not differentiated.

    Returns:
        ``(output, jvp_fn)``, or ``(output, jvp_fn, aux)``. ``jvp_fn`` takes one tangent for each primal, with its
        structure, shapes and dtypes, and returns the tangent of the output: zeros where that does not depend on the
        primals. It may be called many times, also under other transforms, and be differentiated.

    Raises:
        TypeError: A primal or an output is not a tensor, or a primal has an integer dtype.
        ValueError: The tangents do not fit the primals.

    Note:
        The map is recorded in reverse mode and transposed: the backward pass of an operator has to be differentiable,
        and a forward-mode formula is not needed. The transpose of a transpose as forward mode is due to Jamie
        Townsend (A new trick for calculating Jacobian vector products, 2017).

    Example:
        >>> import torch
        >>> from functorch_lite import linearize
        >>> output, jvp_fn = linearize(torch.sin, torch.zeros(2))
        >>> jvp_fn(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    return _linearize(func, primals, has_aux, kwargs)


def _run_linearize(
    func: Callable[..., Any], primals: tuple[Any, ...], has_aux: bool, kwargs: dict[str, Any]
) -> tuple[Any, Callable[..., Any]] | tuple[Any, Callable[..., Any], Any]:
    output, aux, pullback = output_and_pullback("linearize", func, primals, has_aux, kwargs)
    jvp_fn = boundary("jvp_fn", Pushforward(pullback))
    return (output, jvp_fn, aux) if has_aux else (output, jvp_fn)


_linearize = boundary("linearize", _run_linearize)


def linear_transpose(func: Callable[..., Any], *example: Any) -> Callable[..., Any]:
    """Return the transpose of a linear function.

    For ``func: x[n] -> A @ x`` with ``A[m,n]``, the returned ``transpose_fn`` maps ``v[m]`` to ``A.T @ v``. Complex
    matrices are not conjugated, as in JAX.

    Args:
        func: Linear in its arguments, all of them together. Returns a pytree of tensors.
        example: Arguments of ``func``: pytrees of floating-point or complex tensors, of which the shapes, dtypes and
            devices count, not the values.

    Returns:
        ``transpose_fn``, which takes cotangents with the structure, shapes and dtypes of the output, and returns a
        tuple with one entry for each argument. It may be called many times, also under other transforms.

    Raises:
        TypeError: An argument or an output is not a tensor, or an argument has an integer dtype.
        ValueError: ``func`` was found not to be linear, or the cotangents do not fit the output.

    Note:
        ``func`` is evaluated once, at ones. Outside other transforms and tracers it is tested there whether the value
        is the derivative times ones, which finds ``x**2`` and ``x + 1``, and not ``x.abs()``.

    Example:
        >>> import torch
        >>> from functorch_lite import linear_transpose
        >>> transpose_fn = linear_transpose(lambda x: x.cumsum(0), torch.zeros(3))
        >>> transpose_fn(torch.tensor([1.0, 10.0, 100.0]))
        (tensor([111., 110., 100.]),)
    """
    return _linear_transpose(func, example)


def _run_linear_transpose(func: Callable[..., Any], example: tuple[Any, ...]) -> Callable[..., Any]:
    ones = _tree.map_tensors(torch.ones_like, example)
    _, _, pullback = output_and_pullback("linear_transpose", func, ones, False, {})
    pullback.called = "transpose_fn"
    if _has_readable_values([*pullback.primals, *pullback.outputs]) and not _is_linear_at_ones(pullback):
        _checks.refuse_nonlinear(func)

    def transpose_fn(*cotangents: Any, **unknown: Any) -> Any:
        # A pullback is the conjugate transpose.
        return _conjugate(pullback(*_conjugate(cotangents), **unknown))

    return boundary("transpose_fn", transpose_fn)


_linear_transpose = boundary("linear_transpose", _run_linear_transpose)


def _conjugate(tree: Any) -> Any:
    return _tree.map_tensors(lambda leaf: torch.conj_physical(leaf) if leaf.is_complex() else leaf, tree)


def _has_readable_values(leaves: Sequence[Tensor]) -> bool:
    traced = torch._C._len_torch_dispatch_stack() > 0
    return not traced and not any(_C.is_wrapper(leaf) or leaf.is_meta or type(leaf) is not Tensor for leaf in leaves)


def _is_linear_at_ones(pullback: Pullback) -> bool:
    """Whether f(x) = J x at x = ones, as far as <f(x), v> = <x, J' v> tells, with the signs of f(x) as v."""
    with torch.no_grad():
        pulled = pullback.pull([output.sgn() for output in pullback.outputs], keep_graph=True)
        value = sum(y.abs().sum(dtype=torch.float32).item() for y in pullback.outputs if _tree.is_differentiable(y))
        derivative = sum(g.real.sum(dtype=torch.float32).item() for g in pulled)
        terms = sum(g.abs().sum(dtype=torch.float32).item() for g in pulled)
    tolerance = 1e-2 * max(value, terms)
    # Sums that overflow say nothing.
    return not math.isfinite(tolerance) or abs(value - derivative) <= tolerance
