"""vjp and the gradients built on it: reverse mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_lite import _C, _checks, _tree
from functorch_lite._boundary import boundary


class Pullback:
    """The linear map from cotangents of the outputs to cotangents of the inputs, at one point.

    Holds what the forward pass saved; may be called many times and under any later transform.
    """

    def __init__(
        self, transform: str, func: Callable[..., Any], primals: tuple[Any, ...], names: Callable[[], list[str]]
    ) -> None:
        self._transform = transform
        self.called = "vjp_fn"  # in messages
        self._level = _C.AutodiffLevel(False, transform)
        self.primals, self.primals_spec = _tree.flatten(primals)
        for i, leaf in enumerate(self.primals):
            if not _tree.is_differentiable(leaf):
                _checks.check_differentiable(transform, leaf, names()[i])
        self.func = func

    def run(self, call: Callable[[Any], Any], has_aux: bool) -> tuple[Any, Any]:
        """Run the forward pass: ``call`` gets the lifted primals. Returns the output and aux as values."""
        level = self._level
        with level:
            self._inputs = [level.lift_variable(leaf) for leaf in self.primals]
            output = call(_tree.unflatten(self._inputs, self.primals_spec))
            aux = None
            if has_aux:
                _checks.check_pair(self._transform, self.func, output)
                output, aux = output
                aux = _tree.map_tensors(level.value_of, aux)
            self._outputs, self.output_spec = _tree.flatten(output)
            if not all(isinstance(leaf, Tensor) for leaf in self._outputs):
                _checks.check_tensor_outputs(self._transform, self.func, self._outputs, _tree.paths(output))
            self.outputs = [level.value_of(leaf) for leaf in self._outputs]
        return _tree.unflatten(self.outputs, self.output_spec), aux

    def pull(self, cotangents: Sequence[Tensor], keep_graph: bool) -> list[Tensor]:
        """Cotangents of the primals, zeros where an output does not depend on one."""
        grads = self._level.backward(self._outputs, list(cotangents), self._inputs, keep_graph)
        return [
            torch.zeros_like(primal) if grad is None else grad for grad, primal in zip(grads, self.primals, strict=True)
        ]

    def __call__(self, *cotangents: Any, **unknown: Any) -> Any:
        """Pull back cotangents with the structure of the output; a tuple output may be passed as several arguments."""
        _checks.check_no_options(self.called, "cotangents", unknown)
        given = cotangents[0] if len(cotangents) == 1 else cotangents
        leaves, spec = _tree.flatten(given)
        _checks.check_same_structure(self.called, "the cotangents", spec, self.output_spec, "the function's output")
        for i, (leaf, output) in enumerate(zip(leaves, self.outputs, strict=True)):
            if not _tree.is_like(leaf, output):
                path = _tree.paths(given)[i]
                _checks.check_like(self.called, f"the cotangent{path}", leaf, output, f"output{path}")
        return _tree.unflatten(self.pull(leaves, keep_graph=True), self.primals_spec)


def vjp(
    func: Callable[..., Any], *primals: Any, has_aux: bool = False, **kwargs: Any
) -> tuple[Any, Callable[..., Any]] | tuple[Any, Callable[..., Any], Any]:
    """Evaluate ``func`` and return the function that pulls cotangents back through it.

    For ``func: x[n] -> y[m]`` with Jacobian ``J[m,n]``, the returned ``vjp_fn`` maps ``v[m]`` to ``v @ J``. Complex
    inputs follow PyTorch's convention: the result is the conjugate of the derivative times ``v``.

    Args:
        func: Takes the primals, returns a pytree of tensors; with ``has_aux`` a pair (output, aux).
        primals: Pytrees of floating-point or complex tensors, all of which are differentiated.
        has_aux: Whether the second of the function's two results is auxiliary: returned and not differentiated.
        kwargs: Passed on to ``func``, not differentiated.

    Returns:
        ``(output, vjp_fn)``, or ``(output, vjp_fn, aux)``. ``vjp_fn`` takes cotangents with the structure, shapes and
        dtypes of the output, and returns a tuple with one entry for each primal. It may be called many times, also
        under other transforms.

    Raises:
        TypeError: A primal or an output is not a tensor, or a primal has an integer dtype.
        ValueError: The cotangents do not fit the output.

    Example:
        >>> import torch
        >>> from functorch_lite import vjp
        >>> output, vjp_fn = vjp(torch.sin, torch.zeros(2))
        >>> vjp_fn(torch.ones(2))
        (tensor([1., 1.]),)
    """
    return _vjp(func, primals, has_aux, kwargs)


def _run_vjp(
    func: Callable[..., Any], primals: tuple[Any, ...], has_aux: bool, kwargs: dict[str, Any]
) -> tuple[Any, Callable[..., Any]] | tuple[Any, Callable[..., Any], Any]:
    output, aux, pullback = output_and_pullback("vjp", func, primals, has_aux, kwargs)
    vjp_fn = boundary("vjp_fn", pullback)
    return (output, vjp_fn, aux) if has_aux else (output, vjp_fn)


_vjp = boundary("vjp", _run_vjp)


def output_and_pullback(
    transform: str, func: Callable[..., Any], primals: tuple[Any, ...], has_aux: bool, kwargs: dict[str, Any]
) -> tuple[Any, Any, Pullback]:
    """Run ``func`` and keep its pullback with respect to all primals. Returns (output, aux, pullback)."""
    _checks.check_callable(transform, func)
    _checks.check_some_primals(transform, func, primals)
    pullback = Pullback(transform, func, primals, lambda: [f"primals{path}" for path in _tree.paths(primals)])
    return *pullback.run(lambda lifted: func(*lifted, **kwargs), has_aux), pullback


def value_and_pullback(
    transform: str,
    func: Callable[..., Any],
    argnums: int | tuple[int, ...],
    has_aux: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, Any, Pullback, _tree.Arguments]:
    """Run ``func`` and keep its pullback with respect to the arguments that ``argnums`` selects."""
    arguments = _tree.Arguments(transform, args, argnums)
    pullback = Pullback(transform, func, arguments.selected, arguments.names)
    output, aux = pullback.run(lambda lifted: func(*arguments.replaced(lifted), **kwargs), has_aux)
    return output, aux, pullback, arguments


def _value_and_grad(
    transform: str, func: Callable[..., Any], argnums: int | tuple[int, ...], has_aux: bool
) -> Callable[..., tuple[Any, Any, Any]]:
    """A function that returns (value, aux, grads)."""
    _checks.check_callable(transform, func)

    def run(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        value, aux, pullback, arguments = value_and_pullback(transform, func, argnums, has_aux, args, kwargs)
        _checks.check_scalar_output(transform, func, value)
        grads = pullback.pull([torch.ones_like(value)], keep_graph=False)
        return value, aux, arguments.shaped(_tree.unflatten(grads, pullback.primals_spec))

    return run


def grad(func: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable[..., Any]:
    """Return a function that computes the gradient of ``func``.

    Args:
        func: Returns a real tensor of shape (); with ``has_aux`` a pair (value, aux).
        argnums: Which positional arguments are differentiated; negative ones count from the end. Default 0.
        has_aux: Whether ``func`` also returns auxiliary output. Default False.

    Returns:
        A function of the same arguments (keyword arguments too) that returns the gradient with the structure, shapes
        and dtypes of the argument, a tuple of them for a tuple of argnums; with ``has_aux`` the pair (gradient, aux).
        An argument that the value does not depend on has a gradient of zeros.

    Raises:
        TypeError: A selected argument holds something other than floating-point or complex tensors.
        ValueError: ``argnums`` is out of range, or the value is not a real scalar.

    Example:
        >>> import torch
        >>> from functorch_lite import grad
        >>> grad(torch.sin)(torch.tensor(0.0))
        tensor(1.)
        >>> grad(grad(lambda x: x**3))(torch.tensor(2.0))
        tensor(12.)

    Note:
        ``torch.no_grad`` inside ``func`` is respected, and around the call it does not matter: as in
        ``torch.func.grad``, the transform is what asks for the derivative.
    """
    run = _value_and_grad("grad", func, argnums, has_aux)

    def gradient(*args: Any, **kwargs: Any) -> Any:
        _, aux, grads = run(*args, **kwargs)
        return (grads, aux) if has_aux else grads

    return boundary("grad", gradient, like=func, made_of=(grad, (func, argnums, has_aux), {}))


def grad_and_value(
    func: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """Return a function that computes the gradient and the value of ``func``, in this order.

    Args:
        func: As for `grad`.
        argnums: As for `grad`.
        has_aux: As for `grad`.

    Returns:
        A function that returns (gradient, value), or (gradient, (value, aux)).

    Raises:
        TypeError: As for `grad`.
        ValueError: As for `grad`.

    Example:
        >>> import torch
        >>> from functorch_lite import grad_and_value
        >>> grad_and_value(lambda x: x**2)(torch.tensor(3.0))
        (tensor(6.), tensor(9.))
    """
    run = _value_and_grad("grad_and_value", func, argnums, has_aux)

    def gradient_and_value(*args: Any, **kwargs: Any) -> Any:
        value, aux, grads = run(*args, **kwargs)
        return grads, (value, aux) if has_aux else value

    return boundary(
        "grad_and_value", gradient_and_value, like=func, made_of=(grad_and_value, (func, argnums, has_aux), {})
    )


def value_and_grad(
    func: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """Return a function that computes the value and the gradient of ``func``, in this order, as in JAX.

    Args:
        func: As for `grad`.
        argnums: As for `grad`.
        has_aux: As for `grad`.

    Returns:
        A function that returns (value, gradient), or ((value, aux), gradient).

    Raises:
        TypeError: As for `grad`.
        ValueError: As for `grad`.

    Example:
        >>> import torch
        >>> from functorch_lite import value_and_grad
        >>> value_and_grad(lambda x: x**2)(torch.tensor(3.0))
        (tensor(9.), tensor(6.))
    """
    run = _value_and_grad("value_and_grad", func, argnums, has_aux)

    def both(*args: Any, **kwargs: Any) -> Any:
        value, aux, grads = run(*args, **kwargs)
        return ((value, aux) if has_aux else value), grads

    return boundary("value_and_grad", both, like=func, made_of=(value_and_grad, (func, argnums, has_aux), {}))
