"""custom_vjp and custom_jvp: functions with derivative rules of their own. How levels treat them: `_operations.py`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_lite import _checks, _tree
from functorch_lite._boundary import boundary
from functorch_lite._operations import Leaves, Operation, Pull, call
from functorch_lite._transpose import transpose


class _Custom:
    """What `custom_vjp` and `custom_jvp` have in common: the arguments."""

    _decorator: str

    def __init__(self, func: Callable[..., Any], nondiff_argnums: Sequence[int] = ()) -> None:
        _checks.check_callable(self._decorator, func)
        self._func = func
        try:
            self._signature = inspect.signature(func)
        except ValueError:  # a builtin
            self._signature = inspect.signature(lambda *args: None)
        given = (nondiff_argnums,) if isinstance(nondiff_argnums, int) else tuple(nondiff_argnums)
        self._nondiff_argnums = given
        functools.update_wrapper(self, func)
        self._run = boundary(self._decorator, functools.partial(_call, self))

    @property
    def _name(self) -> str:
        return f"{self._decorator} function {_checks.name_of(self._func)}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self._run(args, kwargs)

    def _operation(self, arguments: _Arguments) -> Operation:
        raise NotImplementedError


def _call(custom: _Custom, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    bound = custom._signature.bind(*args, **kwargs)
    bound.apply_defaults()
    if bound.kwargs:
        _checks.refuse_keyword_only(custom._name, next(iter(bound.kwargs)))
    arguments = _Arguments(custom._decorator, bound.args, custom._nondiff_argnums)
    outputs = call(custom._operation(arguments), arguments.leaves)
    return _tree.unflatten(outputs, arguments.output_spec)


class _Arguments:
    """The positional arguments of one call: those with leaves to differentiate, and the others."""

    def __init__(self, decorator: str, args: tuple[Any, ...], nondiff_argnums: tuple[int, ...]) -> None:
        others = _checks.argument_positions(decorator, nondiff_argnums, len(args)) if nondiff_argnums else ()
        self.others = {i: args[i] for i in others}
        self.positions = [i for i in range(len(args)) if i not in self.others]
        self.leaves, self.spec = _tree.flatten(tuple(args[i] for i in self.positions))
        #: The structure of the output, once the function or its rule has run.
        self.output_spec: _tree.Spec = _tree.LEAF

    def primals(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The differentiated arguments."""
        result: tuple[Any, ...] = _tree.unflatten(list(leaves), self.spec)
        return result

    def all(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """All arguments, in order."""
        args = {**self.others, **dict(zip(self.positions, self.primals(leaves), strict=True))}
        return tuple(args[i] for i in range(len(args)))

    def paths(self) -> list[str]:
        """``argument 0['w']``, for each leaf."""
        primals = self.primals([0] * len(self.leaves))
        pairs = zip(self.positions, primals, strict=True)
        return [f"argument {i}{path}" for i, primal in pairs for path in _tree.paths(primal)]

    def flat_output(self, output: Any) -> Leaves:
        """The leaves of the output, whose structure is kept."""
        leaves, self.output_spec = _tree.flatten(output)
        return leaves


class _VjpOperation(Operation):
    def __init__(self, custom: custom_vjp, arguments: _Arguments) -> None:
        self.custom, self.arguments, self.name = custom, arguments, custom._name

    def value(self, leaves: Leaves) -> Leaves:
        return self.arguments.flat_output(self.custom._func(*self.arguments.all(leaves)))

    def vjp(self, leaves: Leaves) -> tuple[Leaves, list[Tensor], Pull]:
        result = self.custom._fwd(*self.arguments.all(leaves))
        if not (isinstance(result, tuple) and len(result) == 2):
            _checks.refuse_rule_result(self.name, "fwd", "(output, residuals)", result)
        kept, spec = _tree.flatten(result[1])
        others = [None if isinstance(x, Tensor) else x for x in kept]
        is_tensor = [isinstance(x, Tensor) for x in kept]
        likes = [(x.shape, x.dtype) if _tree.is_differentiable(x) else None for x in leaves]

        def pull(residuals: Sequence[Tensor], grads: Sequence[Tensor]) -> Leaves:
            each = iter(residuals)
            filled = [next(each) if here else x for x, here in zip(others, is_tensor, strict=True)]
            cotangent = _tree.unflatten(list(grads), self.arguments.output_spec)
            others_first = self.arguments.others.values()
            return self._leaves_of(self.custom._bwd(*others_first, _tree.unflatten(filled, spec), cotangent), likes)

        return self.arguments.flat_output(result[0]), [x for x in kept if isinstance(x, Tensor)], pull

    def _leaves_of(self, cotangents: Any, likes: Sequence[Any]) -> Leaves:
        """The cotangents of all leaves, None for zeros, as ``bwd`` has returned them."""
        count = len(self.arguments.positions)
        if not (isinstance(cotangents, tuple) and len(cotangents) == count):
            expected = f"a tuple of {count}, a cotangent for each differentiated argument"
            _checks.refuse_rule_result(self.name, "bwd", expected, cotangents)
        primals = self.arguments.primals(range(len(likes)))
        leaves: Leaves = []
        for position, primal, cotangent in zip(self.arguments.positions, primals, cotangents, strict=True):
            own_leaves, spec = _tree.flatten(primal)
            if cotangent is None:
                leaves.extend([None] * len(own_leaves))
                continue
            given, given_spec = _tree.flatten(cotangent)
            what = f"the cotangent of argument {position} that bwd returned"
            _checks.check_same_structure(self.name, what, given_spec, spec, "the argument")
            leaves.extend(given)
        for i, (leaf, like) in enumerate(zip(leaves, likes, strict=True)):
            if leaf is None or like is None:
                leaves[i] = None
            elif not isinstance(leaf, Tensor) or (leaf.shape, leaf.dtype) != like:
                path = self.arguments.paths()[i]
                _checks.refuse_rule_leaf(self.name, f"the cotangent of {path} that bwd returned", leaf, like, "it")
        return leaves

    def jvp(self, leaves: Leaves, tangents: list[Tensor | None]) -> tuple[Leaves, Leaves]:
        outputs, residuals, pull = self.vjp(leaves)
        places = [i for i, output in enumerate(outputs) if _tree.is_differentiable(output)]

        def linear(grads: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
            every = [torch.zeros_like(x) if isinstance(x, Tensor) else None for x in outputs]
            for i, grad in zip(places, grads, strict=True):
                every[i] = grad
            for result, tangent in zip(pull(residuals, every), tangents, strict=True):
                if result is not None and tangent is not None:
                    yield result, tangent

        pushed = dict(zip(places, transpose(linear, [outputs[i] for i in places]), strict=True))
        return outputs, [pushed.get(i) for i in range(len(outputs))]


class _JvpOperation(Operation):
    def __init__(self, custom: custom_jvp, arguments: _Arguments) -> None:
        self.custom, self.arguments, self.name = custom, arguments, custom._name

    def value(self, leaves: Leaves) -> Leaves:
        return self.arguments.flat_output(self.custom._func(*self.arguments.all(leaves)))

    def jvp(self, leaves: Leaves, tangents: list[Tensor | None]) -> tuple[Leaves, Leaves]:
        zeros: Leaves = [
            torch.zeros_like(x) if t is None and _tree.is_differentiable(x) else t
            for x, t in zip(leaves, tangents, strict=True)
        ]
        result = self.custom._rule(
            *self.arguments.others.values(), self.arguments.primals(leaves), self.arguments.primals(zeros)
        )
        if not (isinstance(result, tuple) and len(result) == 2):
            _checks.refuse_rule_result(self.name, "the jvp rule", "(output, output's tangent)", result)
        outputs = self.arguments.flat_output(result[0])
        pushed, spec = _tree.flatten(result[1])
        what = "the tangent that its jvp rule returned"
        _checks.check_same_structure(self.name, what, spec, self.arguments.output_spec, "the output")
        for i, (output, tangent) in enumerate(zip(outputs, pushed, strict=True)):
            if not _tree.is_differentiable(output):
                pushed[i] = None
            elif tangent is None:
                pushed[i] = torch.zeros_like(output)
            elif not isinstance(tangent, Tensor) or (tangent.shape, tangent.dtype) != (output.shape, output.dtype):
                path = _tree.paths(result[0])[i]
                like = (output.shape, output.dtype)
                _checks.refuse_rule_leaf(self.name, f"{what} for output{path}", tangent, like, "the output")
        return outputs, pushed

    def vjp(self, leaves: Leaves) -> tuple[Leaves, list[Tensor], Pull]:
        others = [None if isinstance(x, Tensor) else x for x in leaves]
        is_tensor = [isinstance(x, Tensor) for x in leaves]

        def pull(residuals: Sequence[Tensor], grads: Sequence[Tensor]) -> Leaves:
            each = iter(residuals)
            primals: Leaves = [next(each) if here else x for x, here in zip(others, is_tensor, strict=True)]
            places = [i for i, primal in enumerate(primals) if _tree.is_differentiable(primal)]

            def linear(tangents: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
                every: list[Tensor | None] = [None] * len(primals)
                for i, tangent in zip(places, tangents, strict=True):
                    every[i] = tangent
                for tangent_out, grad in zip(self.jvp(primals, every)[1], grads, strict=True):
                    if tangent_out is not None:
                        yield tangent_out, grad

            results = dict(zip(places, transpose(linear, [primals[i] for i in places]), strict=True))
            return [results.get(i) for i in range(len(primals))]

        return self.value(leaves), [x for x in leaves if isinstance(x, Tensor)], pull


class custom_vjp(_Custom):  # noqa: N801
    """Give a function a reverse-mode derivative of its own. A decorator, in the manner of JAX.

    Where an argument is differentiated, ``fwd`` runs in place of the function, and ``bwd`` in the backward pass. Both
    are plain code for the transforms outside, which differentiate and map what they do; so ``fwd`` had better call the
    function itself, which then keeps its rule there. Forward mode works too: it transposes ``bwd``, which is linear in
    the cotangent. Under `vmap` the function and its rule are mapped, without a loop.

    Args:
        func: Takes positional arguments, also given by name, and returns a tensor; both may be pytrees.
        nondiff_argnums: Positions of arguments that are not differentiated, such as functions and numbers. They come
            first in ``bwd``, in the order given here. Default none.

    Returns:
        A function of the same arguments, with a method `defvjp`, which has to be called before it.

    Raises:
        TypeError: No rule was given, or a rule returned something of another form.
        ValueError: A rule returned another structure or shape; or the function uses a tensor that is differentiated and
            no argument, for which the rule has no derivative.

    Example:
        >>> import torch
        >>> from functorch_lite import custom_vjp, grad
        >>> @custom_vjp
        ... def clip_gradient(x, bound):
        ...     return x.clone()
        >>> def fwd(x, bound):
        ...     return clip_gradient(x, bound), bound
        >>> def bwd(bound, g):
        ...     return g.clamp(-bound, bound), None
        >>> clip_gradient.defvjp(fwd, bwd)
        >>> grad(lambda x: 10 * clip_gradient(x, 2.0))(torch.tensor(1.0))
        tensor(2.)
    """

    _decorator = "custom_vjp"
    _fwd: Any = None
    _bwd: Any = None

    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
        """Set the rule.

        Args:
            fwd: Takes the arguments of the function and returns (output, residuals); residuals are any pytree.
            bwd: Takes the arguments of ``nondiff_argnums``, the residuals, and the cotangent, with the structure of
                the output. Returns a tuple with a cotangent for each other argument: with its structure, shapes and
                dtypes, or None for zeros, also as a leaf.

        Raises:
            TypeError: One of the two is not callable.

        Example:
            >>> import torch
            >>> from functorch_lite import custom_vjp, grad
            >>> sign = custom_vjp(torch.sign)
            >>> sign.defvjp(lambda x: (sign(x), None), lambda _, g: (g,))
            >>> grad(sign)(torch.tensor(3.0))
            tensor(1.)
        """
        for rule in (fwd, bwd):
            _checks.check_callable("defvjp", rule)
        self._fwd, self._bwd = fwd, bwd

    def _operation(self, arguments: _Arguments) -> Operation:
        _checks.check_has_rule(self._name, self._fwd, "Give it one with defvjp(fwd, bwd) before it is called.")
        return _VjpOperation(self, arguments)


class custom_jvp(_Custom):  # noqa: N801
    """Give a function a forward-mode derivative of its own. A decorator, in the manner of JAX.

    Where an argument is differentiated, the rule runs in place of the function, as plain code for the transforms
    outside. Reverse mode transposes it: the tangent that it returns has to be linear in the tangents it gets. For that
    the rule runs once more in the backward pass. Under `vmap` the function and its rule are mapped, without a loop.

    Args:
        func: Takes positional arguments, also given by name, and returns a tensor; both may be pytrees.
        nondiff_argnums: Positions of arguments that are not differentiated. They come first in the rule, in the order
            given here. Default none.

    Returns:
        A function of the same arguments, with the methods `defjvp` and `defjvps`, one of which has to be called before.

    Raises:
        TypeError: No rule was given, or it returned something of another form.
        ValueError: The rule returned another structure or shape; or the function uses a tensor that is differentiated
            and no argument, for which the rule has no derivative.

    Example:
        >>> import torch
        >>> from functorch_lite import custom_jvp, grad, jvp
        >>> @custom_jvp
        ... def safe_sqrt(x):
        ...     return x.sqrt()
        >>> @safe_sqrt.defjvp
        ... def _(primals, tangents):
        ...     y = safe_sqrt(*primals)
        ...     return y, tangents[0] / (2 * y.clamp(min=0.5))
        >>> grad(safe_sqrt)(torch.tensor(0.0))
        tensor(1.)
        >>> jvp(safe_sqrt, (torch.tensor(4.0),), (torch.tensor(1.0),))
        (tensor(2.), tensor(0.2500))
    """

    _decorator = "custom_jvp"
    _rule: Any = None

    def defjvp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Set the rule. A decorator.

        Args:
            rule: Takes the arguments of ``nondiff_argnums``, and then the tuples of the other arguments and of their
                tangents. An argument that is not differentiated has a tangent of zeros; a leaf that is no
                floating-point tensor has None. Returns (output, tangent of the output), in one structure; None stands
                for a tangent of zeros.

        Returns:
            The rule itself.

        Raises:
            TypeError: It is not callable.

        Example:
            >>> import torch
            >>> from functorch_lite import custom_jvp, grad
            >>> square = custom_jvp(lambda x: x * x)
            >>> rule = square.defjvp(lambda primals, tangents: (square(*primals), 3 * primals[0] * tangents[0]))
            >>> grad(square)(torch.tensor(2.0))
            tensor(6.)
        """
        _checks.check_callable("defjvp", rule)
        self._rule = rule
        return rule

    def defjvps(self, *rules: Callable[..., Any] | None) -> None:
        """Set the rule as one function for each argument; the tangents that they return are added.

        Args:
            rules: Each takes the tangent of its argument, the output, and all arguments, and returns a tangent of the
                output, which is a single tensor. None for an argument without a derivative.

        Raises:
            TypeError: One of them is neither callable nor None; or the function has ``nondiff_argnums``.

        Example:
            >>> import torch
            >>> from functorch_lite import custom_jvp, grad
            >>> product = custom_jvp(torch.mul)
            >>> product.defjvps(lambda t, output, x, y: t * y, None)
            >>> grad(product, argnums=(0, 1))(torch.tensor(2.0), torch.tensor(3.0))
            (tensor(3.), tensor(0.))
        """
        for rule in rules:
            if rule is not None:
                _checks.check_callable("defjvps", rule)
        if self._nondiff_argnums:
            raise TypeError(f"{self._name}: defjvps has no place for nondiff_argnums. Use defjvp.")

        def total(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
            _checks.check_rule_count(self._name, len(rules), len(primals))
            output = self(*primals)
            parts = [
                rule(tangent, output, *primals)
                for rule, tangent in zip(rules, tangents, strict=True)
                if rule is not None
            ]
            return output, sum(parts[1:], parts[0]) if parts else None

        self._rule = total

    def _operation(self, arguments: _Arguments) -> Operation:
        _checks.check_has_rule(self._name, self._rule, "Give it one with defjvp or defjvps before it is called.")
        return _JvpOperation(self, arguments)
