"""Operations with a derivative of their own, and how each level treats one of them as a single operation.

An autodiff level gets the values from the same unit one level down, and records one node with the unit's derivative. A
vmap level hands down the unit mapped over the batch. So the forward pass runs once, below all levels, on plain tensors.
What it keeps in its context rises from level to level: a tensor that is an argument becomes the argument of that level,
one that is an output its output, and any other a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from functorch_lite import _C, _checks, _functionalize, _tree

plain_apply: Callable[..., Any] = Function.apply.__func__  # type: ignore[attr-defined]

# The attribute of PyTorch's ctx that holds the unit, or in forward mode the call.
_ATTRIBUTE = "_functorch_lite"
_SEEN_BELOW = "_functorch_lite_seen_below"


class Context(FunctionCtx):
    """What the passes of a unit get as ``ctx``: that of one level, or of one example."""

    _TENSORS = ("to_save", "saved_for_forward", "dirty_tensors", "non_differentiable", "saved_tensors", "outputs")
    _OURS = frozenset((*_TENSORS, "needs_input_grad", "materialize_grads", "is_seen_below"))

    # What the methods of FunctionCtx set.
    to_save: tuple[Any, ...] = ()
    saved_for_forward: tuple[Any, ...] = ()
    dirty_tensors: tuple[Tensor, ...] = ()
    non_differentiable: tuple[Tensor, ...] = ()
    materialize_grads = True
    #: Whether a level below this one differentiates the arguments, too.
    is_seen_below = False
    # What backward and jvp find.
    saved_tensors: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()

    def __init__(self, needs_input_grad: Sequence[bool]) -> None:
        self.needs_input_grad = tuple(needs_input_grad)

    def attributes(self) -> dict[str, Any]:
        """What the user's code has set."""
        return {name: value for name, value in vars(self).items() if name not in self._OURS}

    def moved(self, move: Callable[[Tensor, str], Tensor]) -> Context:
        """The same at another level, to which ``move`` takes a tensor of the named field."""
        result = Context(self.needs_input_grad)
        result.materialize_grads, result.is_seen_below = self.materialize_grads, self.is_seen_below
        for field in self._TENSORS:
            tensors = getattr(self, field)
            if tensors:
                setattr(result, field, tuple(move(x, field) if isinstance(x, Tensor) else x for x in tensors))
        attributes = self.attributes()
        if attributes:
            vars(result).update(_tree.map_tensors(lambda x: move(x, "attributes"), attributes))
        return result

    def hand_to(self, ctx: Any) -> None:
        """Give PyTorch's own ``ctx`` what the backward pass needs."""
        ctx.save_for_backward(*self.to_save)
        if self.non_differentiable:
            ctx.mark_non_differentiable(*self.non_differentiable)
        if not self.materialize_grads:
            ctx.set_materialize_grads(False)
        vars(ctx).update(self.attributes())
        setattr(ctx, _SEEN_BELOW, self.is_seen_below)

    @staticmethod
    def of_backward(ctx: Any) -> Context:
        """What PyTorch's own ``ctx`` holds, as values: the level that saved it may be closed."""
        context = Context(ctx.needs_input_grad)
        strip = _C.strip_closed_levels
        context.saved_tensors = tuple(saved if saved is None else strip(saved) for saved in ctx.saved_tensors)
        attributes = dict(vars(ctx))
        del attributes[_ATTRIBUTE]
        context.is_seen_below = attributes.pop(_SEEN_BELOW)
        if attributes:
            vars(context).update(_tree.map_tensors(strip, attributes))
        return context


class Unit:
    """An operation with a derivative of its own."""

    name: str
    #: What PyTorch records; made by `node_named`.
    node: type[Node]
    #: What its author can do if it cannot run on a batch.
    advice: str

    def forward(self, context: Context, *args: Any) -> Any:
        """The outputs, from plain tensors or batched ones. Keeps in ``context`` what the derivative needs."""
        raise NotImplementedError

    def backward(self, context: Context, *grads: Any) -> Any:
        """The gradients of the arguments, as plain code at the level that asks."""
        raise NotImplementedError

    def jvp(self, context: Context, *tangents: Any) -> Any:
        """The tangents of the outputs, as plain code at the level that asks."""
        raise NotImplementedError

    def rule(self, needs_context: bool) -> Callable[[Call, Sequence[Any]], Any] | None:
        """How a vmap level calls the unit with batched arguments, if the unit knows better than to be mapped."""
        return None


class Call:
    """One call of a unit on its way through the levels."""

    def __init__(self, unit: Unit, needs: Sequence[bool], keeps_context: bool = False) -> None:
        self.unit = unit
        #: Which arguments some level differentiates.
        self.needs = tuple(needs)
        #: At a level of forward mode, which arguments have a tangent. (The forward pass cannot see that itself.)
        self.has_tangent: tuple[bool, ...] = ()
        #: Whether a level above needs the context.
        self.keeps_context = keeps_context
        #: What the forward pass kept, in tensors of the level that was last reached on the way up.
        self.context: Context
        #: At that level, the arguments that were written into, each with what it is now.
        self.written: list[tuple[Tensor, Tensor]] = []

    def run(self, args: Sequence[Any]) -> Any:
        """Run the forward pass, which nobody differentiates."""
        self.context = Context(self.needs)
        with torch.no_grad():
            outputs = self.unit.forward(self.context, *args)
        self.context.outputs = as_tuple(outputs)
        return outputs


class Node(Function):
    """What a level records. The last argument is the `Call`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        """The outputs, from one level down."""
        *args, call = args  # type: ignore[assignment]
        level = _C.current_level()
        has_tangent = call.has_tangent
        ctx.needs_input_grad = has_tangent or ctx.needs_input_grad[:-1]
        call.needs = tuple(a or b for a, b in zip(call.needs, ctx.needs_input_grad, strict=True))
        # In reverse mode, holding on to the outputs, which the call does, would be a cycle.
        setattr(ctx, _ATTRIBUTE, call if has_tangent else call.unit)
        if isinstance(level, _C.AutodiffLevel):
            return _one_level_down(level, ctx, call, args)
        outputs = call.run(args)
        call.context.hand_to(ctx)
        ctx.mark_dirty(*call.context.dirty_tensors)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradients of all arguments."""
        unit = getattr(ctx, _ATTRIBUTE)
        results = as_tuple(unit.backward(Context.of_backward(ctx), *grads))
        count = len(ctx.needs_input_grad)
        _checks.check_gradient_count(unit.name, results, count)
        return (*results[:count], None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """The tangents of all outputs. The code that computes them sees values."""
        call = getattr(ctx, _ATTRIBUTE)
        level = _C.current_level()
        assert isinstance(level, _C.AutodiffLevel)
        context = call.context.moved(lambda tensor, _: level.value_of(tensor))
        context.saved_tensors = context.saved_for_forward or context.to_save
        context.needs_input_grad = ctx.needs_input_grad
        with _C.Below():
            results = call.unit.jvp(context, *(_map(level.value_of, tangent) for tangent in tangents[:-1]))
        lifted = tuple(_map(level.lift_constant, result) for result in as_tuple(results))
        return lifted if isinstance(results, tuple) else lifted[0]


def node_named(name: str) -> type[Node]:
    """A class of nodes that PyTorch shows under this name."""
    return type(name, (Node,), {})


def apply(unit: Unit, *args: Any) -> Any:
    """Call a unit from code at the innermost level."""
    return _apply(Call(unit, [False] * len(args)), args)


def _apply(call: Call, args: Sequence[Any]) -> Any:
    level = _C.current_level()
    if isinstance(level, _C.VmapLevel):
        return _apply_at_vmap(level, call, args)
    if level is None:
        return plain_apply(call.unit.node, *args, call)
    if isinstance(level, _C.TapeLevel):
        return _apply_on_tape(level, call, args)
    if isinstance(level, _C.FunctionalizeLevel):
        return _apply_functionalized(level, call, args)
    call.has_tangent = ()
    if level.kind == "jvp":
        call.has_tangent = tuple(isinstance(arg, Tensor) and level.tangent_of(arg) is not None for arg in args)
    # What carries the derivative of another level is a constant of this one.
    constants = [level.lift_constant(arg) if _is_foreign(level, arg) else arg for arg in args]
    outputs = plain_apply(call.unit.node, *constants, call)
    originals = {id(new): arg for new, arg in zip(constants, args, strict=True) if new is not arg}
    for target, result in call.written:
        target = originals.get(id(target), target)
        _checks.check_may_be_written(level.kind, call.unit.name, target, level.value_of(target) is target, result)
        level.take_derivative(target, result)
        originals[id(result)] = target
    if originals:
        outputs = _like(outputs, tuple(originals.get(id(output), output) for output in as_tuple(outputs)))
        call.context = call.context.moved(lambda tensor, _: originals.get(id(tensor), tensor))
    return outputs


def _apply_on_tape(level: _C.TapeLevel, call: Call, args: Sequence[Any]) -> Any:
    """A unit is one step of a tape: it is called again, and its derivative is its own at every level."""
    leaves, spec = _tree.flatten(tuple(args))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def run(call: Call, tensors: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        """The outputs, and all tensors among them and, if a level above needs it, in the context."""
        given = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            given[i] = tensor
        outputs = _apply(call, _tree.unflatten(given, spec))
        found = [output for output in as_tuple(outputs) if isinstance(output, Tensor)]
        if call.keeps_context:
            call.context.moved(lambda tensor, _: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return outputs, found

    def again(tensors: list[Tensor]) -> list[Tensor]:
        found = run(Call(call.unit, needs, call.keeps_context), tensors)[1]
        assert len(found) == len(results)
        return found

    tensors = [leaves[i] for i in places]
    needs = call.needs
    versions = [tensor._version for tensor in tensors]
    with _C.Below():
        values = _distinct([level.value_of(tensor) for tensor in tensors])
        outputs, results = run(call, values)
    known = dict(zip(map(id, values), tensors, strict=True))
    lifted = level.record(again, tensors, results)
    for result, here in zip(results, lifted, strict=True):
        known.setdefault(id(result), here)
    for i, (tensor, version) in enumerate(zip(tensors, versions, strict=True)):
        if tensor._version == version:
            continue
        if level.is_from_outside(tensor):
            _checks.refuse_checkpointed_write(call.unit.name, tensor)
        written = next((here for r, here in zip(results, lifted, strict=True) if r is values[i]), None)
        if written is None:
            _checks.refuse_unreturned_write(call.unit.name, tensor)
        level.take_place(tensor, written)
    call.context = call.context.moved(lambda tensor, _: known.get(id(tensor), tensor))
    return _like(
        outputs, tuple(known[id(output)] if isinstance(output, Tensor) else output for output in as_tuple(outputs))
    )


def _is_foreign(level: _C.AutodiffLevel, arg: Any) -> bool:
    return isinstance(arg, Tensor) and level.value_of(arg) is arg and _C.is_differentiated_below(arg)


def _one_level_down(level: _C.AutodiffLevel, ctx: Any, call: Call, args: Sequence[Any]) -> Any:
    """The outputs as constants of an autodiff level. Fills its ``ctx``, and the context for a level above."""
    values = [_map(level.value_of, arg) for arg in args]
    is_seen_below = is_differentiated_below(args)
    is_forward = bool(call.has_tangent)
    call.keeps_context = True
    with _C.Below():
        values = _distinct(values)
        if _C.current_level() is None and not is_seen_below:
            outputs = call.run(values)
            for tensor in call.context.dirty_tensors:  # as PyTorch does, whoever wrote
                torch.autograd.graph.increment_version(tensor)
        else:
            outputs = _apply(call, values)
    known = dict(zip(map(id, values), args, strict=True))
    call.written = []
    for tensor in call.context.dirty_tensors:
        if id(tensor) in known:
            # PyTorch would count the write again, and find modified what a level below has saved. So it sees a new
            # result here, and `_apply` puts that into the argument's place.
            result = level.lift_constant(tensor)
            call.written.append((known[id(tensor)], result))
            known[id(tensor)] = result
    # In forward mode, PyTorch would want a view as the tangent of an argument that is returned.
    returned = {id(tensor): known[id(tensor)] for tensor in call.context.dirty_tensors} if is_forward else dict(known)
    raised = _raised(call.context, outputs, returned, known, lambda output, _: level.lift_constant(output))

    def lift(tensor: Tensor, _: str) -> Tensor:
        found: Tensor = known[id(tensor)] if id(tensor) in known else level.lift_constant(tensor)
        return found

    call.context = call.context.moved(lift)
    call.context.is_seen_below = is_seen_below
    call.context.hand_to(ctx)
    return raised


def _apply_at_vmap(level: _C.VmapLevel, call: Call, args: Sequence[Any]) -> Any:
    leaves, spec = _tree.flatten(tuple(args))
    unwrapped = _tree.unwrap(level, leaves)
    is_batched = any(dim is not None for _, dim in unwrapped)
    rule = call.unit.rule(call.keeps_context)
    if is_batched and rule is not None:
        return rule(call, args)
    if rule is None and not is_differentiated_below(leaves):
        return explained(level, call.unit, lambda: call.run(args))
    mapped = Mapped(call.unit, level, args) if is_batched else None
    below = Call(mapped or call.unit, call.needs, call.keeps_context)
    with _C.Below():
        values = _distinct([value for value, _ in unwrapped])
        outputs = _apply(below, _tree.unflatten(values, spec))
    known = {id(value): leaf for value, leaf in zip(values, leaves, strict=True) if isinstance(leaf, Tensor)}
    if mapped is None:
        raised = _raised(below.context, outputs, dict(known), known, lambda output, _: output)
        call.context = below.context.moved(lambda tensor, _: known.get(id(tensor), tensor))
        return raised
    raised = _raised(
        below.context, outputs, dict(known), known, lambda output, i: _lift(level, output, mapped.out_dims[i])
    )
    call.context = mapped.lifted(level, below.context, known)
    return raised


class Mapped(Unit):
    """A unit mapped over the batch of a vmap level, one level below it: its forward pass and its derivative."""

    def __init__(self, unit: Unit, level: _C.VmapLevel, args: Sequence[Any]) -> None:
        self.unit = unit
        self.name, self.node, self.advice = unit.name, unit.node, unit.advice
        self.level = level
        #: The batch dimension of each leaf of the arguments, and of each argument.
        self.leaf_dims = [dim for _, dim in _tree.unwrap(level, _tree.flatten(tuple(args))[0])]
        self.arg_dims = [dim for _, dim in _tree.unwrap(level, args)]
        #: After the forward pass: that of each output, and of each tensor in the fields of the context.
        self.out_dims: list[int | None] = []
        self.dims: dict[str, list[int | None]] = {}

    def forward(self, context: Context, *args: Any) -> Any:
        """The outputs, all of them batched."""
        leaves, spec = _tree.flatten(args)
        with _C.VmapLevel(self.level.batch_size, self.level.randomness, self.level.chunks) as level:
            lifted = [_lift(level, leaf, dim) for leaf, dim in zip(leaves, self.leaf_dims, strict=True)]
            inner = Context(context.needs_input_grad)
            each = _tree.unflatten(lifted, spec)
            outputs = explained(level, self.unit, lambda: self.unit.forward(inner, *each))
            inner.outputs = as_tuple(outputs)
            known = {id(x): (leaf, dim) for x, leaf, dim in zip(lifted, leaves, self.leaf_dims, strict=True)}
            for output in inner.outputs:
                if isinstance(output, Tensor):
                    known[id(output)] = self._batched(*known.get(id(output), level.unwrap(output)))
            self.out_dims = [known[id(x)][1] if isinstance(x, Tensor) else None for x in inner.outputs]

            def lower(tensor: Tensor, field: str) -> Tensor:
                value, dim = known.get(id(tensor)) or level.unwrap(tensor)
                self.dims.setdefault(field, []).append(dim)
                return value

            lowered = inner.moved(lower)
        vars(context).update(vars(lowered))
        return _like(outputs, lowered.outputs)

    def lifted(self, level: _C.VmapLevel, context: Context, known: dict[int, Any]) -> Context:
        """A context that this unit filled, for code at a vmap level."""
        dims = {field: iter(found) for field, found in self.dims.items()}
        if context.saved_tensors:
            dims["saved_tensors"] = iter(self.dims["saved_for_forward" if context.saved_for_forward else "to_save"])

        known = dict(known)

        def lift(tensor: Tensor, field: str) -> Tensor:
            dim = next(dims[field])
            found: Tensor = known.setdefault(id(tensor), _lift(level, tensor, dim))
            return found

        return context.moved(lift)

    def backward(self, context: Context, *grads: Any) -> Any:
        """Gradients with the batch dimension of their argument, summed where all examples share the argument."""
        results = self._differentiate(self.unit.backward, context, grads, self.out_dims)
        # There may be a gradient too many, which is for the node to say.
        dims = [*self.arg_dims, *[None] * (len(results) - len(self.arg_dims))]
        return tuple(
            x if x is None else x.sum(found) if dim is None else x.movedim(found, dim)
            for (x, found), dim in zip(results, dims, strict=False)
        )

    def jvp(self, context: Context, *tangents: Any) -> Any:
        """Tangents with the batch dimension of their output."""
        results = self._differentiate(self.unit.jvp, context, tangents, self.arg_dims)
        return tuple(
            x if x is None or dim is None else x.movedim(found, dim)
            for (x, found), dim in zip(results, self.out_dims, strict=False)
        )

    def _differentiate(
        self, method: Callable[..., Any], context: Context, vectors: Sequence[Any], dims: Sequence[int | None]
    ) -> list[tuple[Any, Any]]:
        """What ``method`` returns for the whole batch, each result with its batch dimension."""
        with _C.VmapLevel(self.level.batch_size, self.level.randomness) as level:
            each = self.lifted(level, context, {})
            lifted = [_lift(level, vector, dim) for vector, dim in zip(vectors, dims, strict=True)]
            results = _tree.unwrap(level, as_tuple(method(each, *lifted)))
        return [self._batched(*result) if isinstance(result[0], Tensor) else result for result in results]

    def _batched(self, value: Tensor, dim: int | None) -> tuple[Tensor, int]:
        return (value.expand(self.level.batch_size, *value.shape), 0) if dim is None else (value, dim)


def _apply_functionalized(level: _C.FunctionalizeLevel, call: Call, args: Sequence[Any]) -> Any:
    leaves, spec = _tree.flatten(tuple(args))
    unit: Unit = Functionalized(call.unit, level.keep_views)
    if not is_differentiated_below(leaves):
        try:
            return call.run(args)
        except RuntimeError as error:
            if not _checks.needs_memory(error):
                raise
            unit = call.unit  # on tensors that have memory
    below = Call(unit, call.needs, call.keeps_context)
    with _C.Below():
        values = _distinct([level.value_of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])
        outputs = _apply(below, _tree.unflatten(values, spec))
    known = {id(value): leaf for value, leaf in zip(values, leaves, strict=True) if isinstance(leaf, Tensor)}
    for value in below.context.dirty_tensors:
        level.write(known[id(value)], value)
    raised = _raised(below.context, outputs, dict(known), known, lambda output, _: level.lift_new(output))
    call.context = below.context.moved(lambda tensor, _: known.setdefault(id(tensor), level.lift_new(tensor)))
    return raised


class Functionalized(Unit):
    """A unit of a functionalize level, one level below it: its passes write nothing but what is marked as written."""

    def __init__(self, unit: Unit, keep_views: bool) -> None:
        self.unit, self.keep_views = unit, keep_views
        self.name, self.node, self.advice = unit.name, unit.node, unit.advice

    def forward(self, context: Context, *args: Any) -> Any:
        """The outputs of the unit, and what it keeps."""
        inner = Context(context.needs_input_grad)
        structure: Any = None
        kept: list[Tensor] = []

        def run(*args: Any) -> Any:
            nonlocal structure
            structure = self.unit.forward(inner, *args)
            inner.outputs = as_tuple(structure)
            inner.moved(lambda tensor, _: kept.append(tensor) or tensor)  # type: ignore[func-returns-value]
            return kept

        try:
            values = iter(_functionalize.run(self.keep_views, run, args))
        except RuntimeError as error:
            if not _checks.needs_memory(error):
                raise
            return self.unit.forward(context, *args)  # on tensors that have memory
        vars(context).update(vars(inner.moved(lambda *_: next(values))))
        return _like(structure, context.outputs)

    def backward(self, context: Context, *grads: Any) -> Any:
        """The unit's own, without writes."""
        return self._run(self.unit.backward, context, grads)

    def jvp(self, context: Context, *tangents: Any) -> Any:
        """The unit's own, without writes."""
        return self._run(self.unit.jvp, context, tangents)

    def _run(self, method: Callable[..., Any], context: Context, vectors: Sequence[Any]) -> Any:
        tensors: list[Tensor] = []
        context.moved(lambda tensor, _: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]

        def run(tensors: list[Tensor], vectors: Sequence[Any]) -> Any:
            lifted = iter(tensors)
            return method(context.moved(lambda *_: next(lifted)), *vectors)

        return _functionalize.run(self.keep_views, run, (tensors, vectors))


def explained(level: _C.Level, unit: Unit, forward: Callable[[], Any]) -> Any:
    """Run a forward pass on wrappers, and say what the unit needs if that cannot be."""
    try:
        return forward()
    except RuntimeError as error:
        if not _checks.needs_memory(error):
            raise
        _checks.refuse_numbers(level.kind, unit.name, unit.advice, error)


def is_differentiated_below(args: Iterable[Any]) -> bool:
    """Whether a level below the innermost, or plain PyTorch, differentiates with respect to one of these."""
    return any(_C.is_differentiated_below(arg) for arg in args if isinstance(arg, Tensor))


def as_tuple(results: Any) -> tuple[Any, ...]:
    """A single result as a tuple."""
    return results if isinstance(results, tuple) else (results,)


def _like(outputs: Any, others: tuple[Any, ...]) -> Any:
    """One result where ``outputs`` is one, a tuple where it is a tuple."""
    return others if isinstance(outputs, tuple) else others[0]


def _map(function: Callable[[Tensor], Tensor], arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return function(arg)
    return arg if arg is None or isinstance(arg, (int, float, str)) else _tree.map_tensors(function, arg)


def _distinct(values: list[Any]) -> list[Any]:
    """The values without repetition: two arguments of one value must be told apart when the context rises."""
    if len(set(map(id, values))) == len(values):
        return values
    seen: set[int] = set()
    result = []
    for value in values:
        is_repeated = isinstance(value, Tensor) and id(value) in seen
        seen.add(id(value))
        result.append(value.view_as(value) if is_repeated else value)
    return result


def _lift(level: _C.VmapLevel, value: Any, dim: int | None) -> Any:
    return value if value is None or dim is None else level.lift(value, dim)


def _raised(
    context: Context,
    outputs: Any,
    returned: dict[int, Any],
    known: dict[int, Any],
    lift: Callable[[Tensor, int], Tensor],
) -> Any:
    """The outputs one level up.

    ``returned`` has arguments by the id of their value: an output that is this value is the argument itself. (If a
    level below has recorded that it was returned, it is another tensor.) ``known`` gets, by the id of what the forward
    pass returned, what that is here.
    """
    raised = []
    for i, (raw, output) in enumerate(zip(context.outputs, as_tuple(outputs), strict=True)):
        if isinstance(output, Tensor):
            if id(output) not in returned:
                returned[id(output)] = lift(output, i)
            output = returned[id(output)]
            known.setdefault(id(raw), output)
        raised.append(output)
    return _like(outputs, tuple(raised))
