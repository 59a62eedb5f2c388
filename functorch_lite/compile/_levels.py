"""Compiled functions inside transforms: each level calls the transformed function, compiled, one level down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.autograd import Function

from functorch_lite import _C, _units
from functorch_lite.compile import _random
from functorch_lite.compile._arguments import Arguments
from functorch_lite.compile._trace import CapturedWrapperError, refusing_wrappers

if TYPE_CHECKING:
    from functorch_lite.compile._function import CompiledLeaves

Names = Callable[[], list[str]]


def is_inlined(level: _C.Level) -> bool:
    """Whether the function runs at this level as if it were not compiled."""
    return level.kind in ("checkpoint", "functionalize")


def call(compiled: CompiledLeaves, leaves: list[Any], structure: Any, names: Names) -> tuple[list[Any], Any]:
    """Call at the innermost level."""
    leaves = [_C.strip_closed_levels(x) if isinstance(x, Tensor) and _C.is_wrapper(x) else x for x in leaves]
    try:
        with refusing_wrappers():
            return _transformed(compiled, leaves, structure, names)
    except CapturedWrapperError:  # an input that no level would know: the function runs without being compiled
        return compiled.function(leaves, structure)


def _transformed(compiled: CompiledLeaves, leaves: list[Any], structure: Any, names: Names) -> tuple[list[Any], Any]:
    level = _C.current_level()
    if isinstance(level, _C.VmapLevel):
        return _mapped(compiled, level, leaves, structure, names)
    assert isinstance(level, _C.AutodiffLevel)
    if level.kind == "jvp":
        return _with_tangents(compiled, level, leaves, structure, names)
    return _recorded(compiled, level, leaves, structure, names)


def _below(leaves: Sequence[Any], value_of: Callable[[Tensor], Tensor]) -> list[Any]:
    return [value_of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _derived(compiled: CompiledLeaves, key: Any, make: Callable[[], Any]) -> CompiledLeaves:
    from functorch_lite.compile._function import CompiledLeaves

    if key not in compiled.derived:
        compiled.derived[key] = CompiledLeaves(make(), compiled.options)
    return compiled.derived[key]


def _mapped(
    compiled: CompiledLeaves, level: _C.VmapLevel, leaves: list[Any], structure: Any, names: Names
) -> tuple[list[Any], Any]:
    unwrapped = [level.unwrap(leaf) if isinstance(leaf, Tensor) else (leaf, None) for leaf in leaves]
    dims = tuple(dim for _, dim in unwrapped)
    size, randomness = level.batch_size, level.randomness

    def make() -> Any:
        def mapped(leaves: list[Any], structure: Any) -> tuple[list[Any], Any]:
            batch = next((x.shape[dim] for x, dim in zip(leaves, dims, strict=True) if dim is not None), size)
            with _C.VmapLevel(batch, randomness) as inner:
                each = [x if dim is None else inner.lift(x, dim) for x, dim in zip(leaves, dims, strict=True)]
                outputs, found = compiled.function(each, structure)
                results = [inner.unwrap(x) if isinstance(x, Tensor) else (x, None) for x in outputs]
            values = [x if dim is None else x.movedim(dim, 0) for x, dim in results]
            return values, (found, tuple(dim is not None for _, dim in results))

        return mapped

    key = ("vmap", dims, None if any(d is not None for d in dims) else size, randomness.name)
    derived = _derived(compiled, key, make)
    with _C.Below():
        values, (found, is_batched) = derived.call([value for value, _ in unwrapped], structure, names)
    lifted = [level.lift(x, 0) if batched else x for x, batched in zip(values, is_batched, strict=True)]
    return lifted, found


def _with_tangents(
    compiled: CompiledLeaves, level: _C.AutodiffLevel, leaves: list[Any], structure: Any, names: Names
) -> tuple[list[Any], Any]:
    tangents = [level.tangent_of(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
    which = [i for i, tangent in enumerate(tangents) if tangent is not None]
    values = _below(leaves, level.value_of)
    if not which:
        with _C.Below():
            outputs, found = compiled.call(values, structure, names)
        return [level.lift_constant(x) if isinstance(x, Tensor) else x for x in outputs], found

    derived = _derived(compiled, ("jvp", tuple(which)), lambda: _pushed_forward(compiled, which))

    def all_names() -> list[str]:
        own = names()
        return own + [f"tangent_of_{own[i]}" for i in which]

    def lifted(value: Any, tangent: Tensor | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        return level.lift_constant(value) if tangent is None else level.lift_dual(value, tangent)

    with _C.Below():
        results, (found, count, written) = derived.call([*values, *(tangents[i] for i in which)], structure, all_names)
    for i, tangent in zip(written, results[2 * count :], strict=True):
        level.take_derivative(leaves[i], level.lift_dual(values[i], tangent))
    return [lifted(x, t) for x, t in zip(results[:count], results[count : 2 * count], strict=True)], found


def _pushed_forward(compiled: CompiledLeaves, which: Sequence[int]) -> Any:
    """From leaves and tangents of the selected ones to outputs, their tangents, and those of written leaves."""

    def pushed(leaves: list[Any], structure: Any) -> tuple[list[Any], Any]:
        primals, directions = leaves[: len(leaves) - len(which)], leaves[len(leaves) - len(which) :]
        with _C.AutodiffLevel(True, "jvp") as level:
            lifted = [level.lift_constant(x) if isinstance(x, Tensor) else x for x in primals]
            for i, direction in zip(which, directions, strict=True):
                lifted[i] = level.lift_dual(primals[i], direction)
            versions = [x._version if isinstance(x, Tensor) else 0 for x in lifted]
            outputs, found = compiled.function(list(lifted), structure)
            tangents = [level.tangent_of(x) if isinstance(x, Tensor) else None for x in outputs]
            values = _below(outputs, level.value_of)
            changed = [i for i, x in enumerate(lifted) if isinstance(x, Tensor) and x._version != versions[i]]
            new = {i: tangent for i in changed if (tangent := level.tangent_of(lifted[i])) is not None}
        return [*values, *tangents, *new.values()], (found, len(values), tuple(new))

    return pushed


def _recorded(
    compiled: CompiledLeaves, level: _C.AutodiffLevel, leaves: list[Any], structure: Any, names: Names
) -> tuple[list[Any], Any]:
    def is_variable(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and level.value_of(leaf) is not leaf and leaf.requires_grad

    which = tuple(i for i, leaf in enumerate(leaves) if is_variable(leaf))
    if which:
        arguments = Arguments(leaves)
        entry = compiled.find(arguments, structure, names)
        if not _units.is_differentiated_below([*leaves, *entry.specialization.trace.captured]):
            return entry.run(arguments.tensors, level), entry.structure
        if entry.writes:  # the gradient, which runs the function again, would write again
            return compiled.function(leaves, structure)
    values = _below(leaves, level.value_of)
    generators = _random.states(values)
    with _C.Below():
        outputs, found = compiled.call(values, structure, names)
    if not which:
        return [level.lift_constant(x) if isinstance(x, Tensor) else x for x in outputs], found
    pull = _derived(compiled, ("vjp", which), lambda: _pull_back(compiled, which))
    record = _Record(level, pull, structure, names, values, generators, which)
    tensors = iter(_units.plain_apply(_Node, record, leaves, outputs, *(leaves[i] for i in which)))
    return [next(tensors) if isinstance(x, Tensor) else x for x in outputs], found


@dataclass
class _Record:
    """What a node keeps: it computes the gradient from the arguments, which lower levels can differentiate."""

    level: _C.AutodiffLevel
    pull: CompiledLeaves
    structure: Any
    names: Names
    values: list[Any]
    generators: _random.States
    which: tuple[int, ...]


def _pull_back(compiled: CompiledLeaves, which: Sequence[int]) -> Any:
    """Gradients of the selected leaves, from the leaves and the gradients of the output's tensors."""

    def pulled(leaves: list[Any], structure: Any) -> tuple[list[Any], Any]:
        structure, count = structure
        primals, cotangents = leaves[:count], leaves[count:]
        level = _C.AutodiffLevel(False, "vjp")
        with level:
            lifted = [level.lift_constant(x) if isinstance(x, Tensor) else x for x in primals]
            variables = [level.lift_variable(primals[i]) for i in which]
            for i, variable in zip(which, variables, strict=True):
                lifted[i] = variable
            outputs, _ = compiled.function(lifted, structure)
            tensors = [x for x in outputs if isinstance(x, Tensor)]
        pairs = [(x, c) for x, c in zip(tensors, cotangents, strict=True) if c is not None]
        return level.backward([x for x, _ in pairs], [c for _, c in pairs], variables, False), None

    return pulled


class _Node(Function):
    """What a level records where a lower level differentiates, too."""

    @staticmethod
    def forward(ctx: Any, record: _Record, leaves: list[Any], outputs: list[Any], *variables: Any) -> Any:
        """New tensors of the level for the outputs."""
        ctx.record = record
        ctx.others = [x for i, x in enumerate(leaves) if i not in record.which]
        ctx.save_for_backward(*variables)
        ctx.set_materialize_grads(False)
        tensors = tuple(record.level.lift_constant(x) for x in outputs if isinstance(x, Tensor))
        ctx.mark_non_differentiable(*(x for x in tensors if not (x.is_floating_point() or x.is_complex())))
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradients of the differentiated leaves."""
        record = ctx.record
        leaves = list(record.values)
        if record.level.depth > 0:  # the pass itself may be differentiated here
            leaves = ctx.others
            for i, variable in zip(record.which, ctx.saved_tensors, strict=True):
                leaves = [*leaves[:i], variable, *leaves[i:]]

        def names() -> list[str]:
            return [*record.names(), *(f"tangent_{i}" for i in range(len(grads)))]

        with _random.drawn_from(record.generators):
            gradients, _ = record.pull.call([*leaves, *grads], (record.structure, len(leaves)), names)
        return (None, None, None, *gradients)
