"""What a call does: values, memory, gradients, random numbers. Compiled code is judged by what eager PyTorch does.

An implementation of ``functorch.compile`` is a parameter everywhere: ours, PyTorch's as a peer, or one that errs on
purpose. ``differences`` runs a case with and without it on equal arguments, in several circumstances.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

import functorch_lite

Observation = dict[str, Any]

#: Gradients are sums, which may be rounded in another order.
SUMMED = 8.0


def as_it_is(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The compiler that leaves graphs as they are."""
    return graph


@dataclass(frozen=True)
class Implementation:
    """Who compiles.

    Attributes:
        name: What tables call it.
        api: Has the names of ``functorch.compile``.
        guards: Whether a compiled function looks at its arguments, and compiles again for others.
        makes_lists: Whether it returns lists in the place of tuples.
        refusals: What is found in the type and text of errors that name what is wrong.
    """

    name: str
    api: Any
    guards: bool = True
    makes_lists: bool = False
    refusals: str = r"^\w+: (compile|aot_\w+|functionalize|vmap|grad|vjp|jvp)\b.*: "

    def function(
        self,
        func: Callable[..., Any],
        min_cut: bool = False,
        replay: bool = False,
        donated: bool = False,
        **options: Any,
    ) -> Callable[..., Any]:
        """The function compiled, with graphs that run as they are, or are recorded and replayed."""
        if donated:
            compiled = functorch_lite.jit(lambda args: func(*args), donate_argnums=0)
            return lambda *args: compiled(args)
        compiler = self.api.replay if replay else as_it_is
        return self.api.aot_function(func, compiler, partition_fn=self._partition(min_cut), **options)

    def module(self, module: torch.nn.Module, min_cut: bool = False, **options: Any) -> torch.nn.Module:
        """The module compiled, with graphs that run as they are."""
        return self.api.aot_module(module, as_it_is, partition_fn=self._partition(min_cut), **options)

    def module_for(self, module: torch.nn.Module, args: Sequence[Any], min_cut: bool = False) -> Callable[..., Any]:
        """The module compiled for these arguments at once."""
        return self.api.aot_module_simplified(module, args, as_it_is, partition_fn=self._partition(min_cut))

    def _partition(self, min_cut: bool) -> Callable[..., Any]:
        api = self.api
        return api.min_cut_rematerialization_partition if min_cut else api.default_partition


#: Compiles nothing.
EAGER = Implementation(
    "eager",
    SimpleNamespace(
        aot_function=lambda func, *_, **__: func,
        aot_module=lambda module, *_, **__: module,
        aot_module_simplified=lambda module, *_, **__: module,
        default_partition=None,
        min_cut_rematerialization_partition=None,
    ),
)


def ours() -> Implementation:
    """This package's."""
    import functorch_lite.compile

    return Implementation("functorch_lite", functorch_lite.compile)


def peer() -> Implementation:
    """PyTorch's. A function that it has compiled takes any later argument for one like the first."""
    import functorch.compile

    refusals = "DataDependent|DynamicOutputShape|UnsupportedOperator|not supported|not implemented"
    return Implementation("functorch.compile", functorch.compile, False, True, refusals)


def vectors(count: int) -> Callable[[int], list[Any]]:
    """Makes ``count`` tensors of shape [n, 2]."""
    return lambda n: [torch.rand(n, 2, dtype=torch.float64) for _ in range(count)]


def random_cotangent(y: Tensor) -> Tensor:
    """Dense, in the order of dimensions."""
    return torch.randn_like(y, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Case:
    """A function and what to call it with.

    Attributes:
        func: The function.
        leaves: Makes tensors and others from a size. Floating-point tensors are to be differentiated.
        arguments: Makes the arguments from the leaves: copies to be written into, views, containers.
        captured: Tensors from outside that the function uses.
        used: The numbers of the outputs that have a cotangent; None for all.
        cotangent: Makes the cotangent of an output.
        after: What is done to the output after the call.
        circumstances: Names of those to be called in; None for all.
    """

    func: Callable[..., Any]
    leaves: Callable[[int], Sequence[Any]] = field(default_factory=lambda: vectors(1))
    arguments: Callable[..., Sequence[Any]] = lambda *leaves: leaves
    captured: Sequence[Tensor] = ()
    used: Sequence[int] | None = None
    cotangent: Callable[[Tensor], Tensor] = random_cotangent
    after: Callable[[Any], Any] | None = None
    circumstances: Sequence[str] | None = None


@dataclass(frozen=True)
class Circumstance:
    """How a case is called."""

    name: str
    seed: int
    size: int = 3
    requires_grad: bool = True
    grad_mode: bool = True

    @property
    def guard(self) -> tuple[int, bool, bool]:
        """Calls that differ in it need different graphs."""
        return self.size, self.requires_grad, self.grad_mode


#: In the order in which one compiled function goes through them.
CIRCUMSTANCES = (
    Circumstance("first call", 0),
    Circumstance("second call", 1),
    Circumstance("other sizes", 2, size=4),
    Circumstance("no input requires grad", 3, requires_grad=False),
    Circumstance("no_grad", 4, grad_mode=False),
    Circumstance("larger sizes", 5, size=6),
    Circumstance("call like the first", 6),
)
VARIANTS: dict[str, dict[str, Any]] = {"default": {}, "min_cut": {"min_cut": True}, "dynamic": {"dynamic": True}}


def observe(case: Case, func: Callable[..., Any], at: Circumstance) -> Observation:
    """Call ``func``, which is the case's function in some form, and note everything that can be seen from outside."""
    torch.manual_seed(at.seed)
    leaves = list(case.leaves(at.size))
    differentiable = [x for x in tensors_of(leaves) if x.dtype.is_floating_point or x.is_complex()]
    for x in differentiable:
        x.requires_grad_(at.requires_grad)
    before = [x.detach().clone() for x in case.captured]
    args = case.arguments(*leaves)
    inputs = tensors_of(args)
    versions = [x._version for x in inputs]
    try:
        with torch.set_grad_enabled(at.grad_mode):
            output = func(*args)
            if case.after:
                case.after(output)
        seen = _outputs(output, inputs)
        for i, (x, version) in enumerate(zip(inputs, versions, strict=True)):
            seen |= described(f"input {i}", x)
            seen[f"input {i}, is written"] = x._version > version
            seen[f"input {i}, has a grad_fn"] = x.grad_fn is not None
        for i, x in enumerate(case.captured):
            seen |= described(f"captured {i}", x)
        seen["random state"] = torch.get_rng_state()
        sources = [*differentiable, *(x for x in case.captured if x.requires_grad)]
        results = [y for y in [*_chosen(output, case.used), *inputs] if at.grad_mode and y.requires_grad]
        seen |= _gradients(results, [x for x in sources if x.requires_grad], case.cotangent)
    finally:
        with torch.no_grad():
            for x, old in zip(case.captured, before, strict=True):
                x.copy_(old)
    return seen


def tensors_of(tree: Any) -> list[Tensor]:
    """All tensors of a structure."""
    return [x for x in _pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _chosen(output: Any, used: Sequence[int] | None) -> list[Tensor]:
    outputs = tensors_of(output)
    return outputs if used is None else [outputs[i] for i in used]


def described(name: str, x: Any) -> Observation:
    """A tensor, or another leaf of a structure, under this name."""
    if not isinstance(x, Tensor):
        return {name: x, f"{name}, type": type(x)}
    return {
        name: x.detach().clone(),
        f"{name}, type": (type(x), x.dtype, x.device),
        f"{name}, sizes": x.shape,
        f"{name}, strides": x.stride(),
        f"{name}, flags": (x.requires_grad, x.is_conj(), x.is_neg(), x.is_inference()),
    }


def _place(x: Tensor) -> tuple[int, int]:
    return x.untyped_storage().data_ptr(), x.storage_offset()


def _outputs(output: Any, inputs: Sequence[Tensor]) -> Observation:
    """The outputs, and which are one object or share memory with an input or an earlier output."""
    leaves, spec = _pytree.tree_flatten(output)
    seen: Observation = {"structure": spec}
    earlier = {f"input {i}": x for i, x in enumerate(inputs)}
    for i, y in enumerate(leaves):
        name = f"output {i}"
        seen |= described(name, y)
        if not isinstance(y, Tensor):
            continue
        seen[f"{name}, is"] = [other for other, x in earlier.items() if x is y]
        place, is_empty = _place(y), y.untyped_storage().nbytes() == 0
        shares = {other: x for other, x in earlier.items() if not is_empty and _place(x)[0] == place[0]}
        seen[f"{name}, shares memory with"] = list(shares)
        # Of memory that the function made, nobody knows where a result begins.
        seen[f"{name}, begins"] = [place[1] - _place(x)[1] for x in shares.values()]
        earlier[name] = y
    return seen


def _gradients(
    results: Sequence[Tensor], sources: Sequence[Tensor], cotangent: Callable[[Tensor], Tensor]
) -> Observation:
    """Zeros where there is none: a compiled function does not know which of its outputs is used."""
    if not results or not sources:
        return {}
    gradients = torch.autograd.grad(
        results, sources, [cotangent(y) for y in results], allow_unused=True, materialize_grads=True
    )
    return {f"gradient of leaf {i}": g.detach() for i, g in enumerate(gradients)}


def same(actual: Any, expected: Any, tolerance: float = 0.0) -> bool:
    """Whether two observed things are equal. A tolerance is in units of the last place of the largest number."""
    if not isinstance(expected, Tensor):
        return type(actual) is type(expected) and actual == expected
    if not isinstance(actual, Tensor) or (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        return False
    if tolerance and expected.numel() and (expected.is_floating_point() or expected.is_complex()):
        sizes = expected.abs()
        tolerance *= torch.finfo(expected.dtype).eps * sizes[sizes.isfinite()].amax().item()
    return torch.allclose(actual, expected, rtol=0, atol=tolerance, equal_nan=True)


def of_gradients(key: str) -> float:
    """The tolerance of one call."""
    return SUMMED if key.startswith("gradient") else 0.0


def compared(
    actual: Observation, expected: Observation, tolerance: Callable[[str], float] = of_gradients
) -> Iterator[str]:
    """In words, what differs."""
    for key in [*expected, *(key for key in actual if key not in expected)]:
        if key not in actual:
            yield f"{key} is missing"
        elif key not in expected:
            yield f"{key} is {_short(actual[key])}, and eager has none"
        elif not same(actual[key], expected[key], tolerance(key)):
            yield f"{key} is {_short(actual[key])}, expected {_short(expected[key])}"


def _short(x: Any) -> str:
    text = str(x.tolist() if isinstance(x, Tensor) else x)
    return text if len(text) < 120 else f"{text[:117]}..."


def differences(implementation: Implementation, case: Case, variant: str = "default") -> list[str]:
    """Everything that differs from eager in one variant of compiling, in all circumstances; also what raises."""
    found: list[str] = []
    made: dict[Any, Callable[..., Any]] = {}
    for at in CIRCUMSTANCES:
        if case.circumstances is not None and at.name not in case.circumstances:
            continue
        key = None if implementation.guards else at.guard
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = observe(case, case.func, at)
            try:
                if key not in made:
                    made[key] = implementation.function(case.func, **VARIANTS[variant])
                actual = observe(case, made[key], at)
            except Exception as error:
                found.append(f"{variant}, {at.name}: raises {type(error).__name__}: {error}")
                continue
        if implementation.makes_lists:
            actual["structure"] = expected["structure"]
        found += [f"{variant}, {at.name}: {text}" for text in compared(actual, expected)]
    return found
