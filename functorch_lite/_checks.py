"""Validation of what users pass in, and every message they can meet from the Python side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch.utils._pytree as pytree
from torch import Tensor, nn


class EscapedTensorError(RuntimeError):
    """A tensor was used after the `vmap` that made it had returned, or in another thread.

    Inside `vmap` a tensor stands for one example of a batch. It lives as long as the call of the mapped function; what
    outlives the call is what the function returns, with the batch dimension put back::

        kept = []
        functorch_lite.vmap(lambda x: kept.append(x))(xs)
        kept[0] + 1  # EscapedTensorError: return x instead of appending it

    Tensors that escape from `grad`, `vjp` or `jvp` have no hidden dimension: they behave as their value.
    """


class LoopFallbackWarning(UserWarning):
    """`vmap` runs an operator example by example, because it has no batching rule and no decomposition."""


def name_of(func: object) -> str:
    """How messages call the user's function."""
    return getattr(func, "__name__", type(func).__name__)


def refuse_type(message: str) -> NoReturn:
    """Raise a TypeError."""
    raise TypeError(message)


def check_remove(remove: object) -> None:
    """Require what `functionalize` knows to remove."""
    if remove not in ("mutations", "mutations_and_views"):
        raise ValueError(
            f"functionalize: got remove={remove!r}, expected 'mutations' (views stay views) or 'mutations_and_views' "
            f"(they become copies)."
        )


def check_one_vmap_rule(function: Any) -> None:
    """Refuse a Function that says twice how it is mapped."""
    if function.generate_vmap_rule:
        raise ValueError(
            f"vmap: torch.autograd.Function {function.__name__} has generate_vmap_rule = True and a vmap staticmethod, "
            f"two answers to one question. Remove one of them."
        )


def check_may_be_written(transform: str, name: str, target: Tensor, is_captured: bool, result: Tensor) -> None:
    """Refuse a write of a Function that would lose a derivative."""
    if is_captured and result.requires_grad:
        raise ValueError(
            f"{transform}: {name} writes a value that depends on the differentiated inputs into a tensor captured from "
            f"outside (ctx.mark_dirty). The derivative would be lost. Pass it a tensor that the function creates, for "
            f"example a clone of the captured one."
        )
    # Asking a view whether it is a leaf would fix its place in the graph, which the write is about to change.
    if target.requires_grad and not target._is_view() and target.is_leaf:
        raise ValueError(
            f"{transform}: {name} writes into the input that is differentiated (ctx.mark_dirty). Pass it a copy, "
            f"x.clone()."
        )


def check_gradient_count(name: str, gradients: tuple[Any, ...], count: int) -> None:
    """Require a gradient for each argument; more of them may only be None."""
    if len(gradients) < count or any(gradient is not None for gradient in gradients[count:]):
        raise ValueError(
            f"grad: the backward pass of {name} must return a gradient for each of its {count} arguments, None for "
            f"those without, got {len(gradients)}."
        )


def refuse_jvp(name: str, error: Exception) -> NoReturn:
    """Raise: no forward-mode derivative can be derived from a backward pass."""
    raise NotImplementedError(
        f"jvp: {name} has no jvp staticmethod, and none can be derived: its backward pass wants the numbers of a "
        f"tensor, as numpy and .item() do. Write it with PyTorch's operators, or give the torch.autograd.Function a "
        f"staticmethod jvp(ctx, *tangents), with a tangent for each argument, that returns those of the outputs."
    ) from error


def refuse_second_derivative(name: str, reason: str) -> NoReturn:
    """Raise: the derivative of a backward pass was asked for."""
    raise NotImplementedError(
        f"{name} is differentiated a second time, but its backward pass {reason}. Write the backward pass with "
        f"PyTorch's operators, or as another torch.autograd.Function with a derivative of its own, and without "
        f"once_differentiable."
    )


def needs_memory(error: RuntimeError) -> bool:
    """Whether code failed because it wanted numbers (for numpy, or a Python value) from a tensor inside a transform."""
    parts = (
        "doesn't have storage",
        "Cannot access storage",
        "has no memory of its own",
        "Can't call numpy() on Tensor that requires grad",
        "cannot run on batched values",
    )
    return any(part in str(error) for part in parts)


def refuse_numbers(transform: str, name: str, advice: str, error: Exception) -> NoReturn:
    """Raise: a Function cannot run on a batch."""
    raise NotImplementedError(
        f"{transform}: {name} wants the numbers of a tensor, as numpy and .item() do. {advice}"
    ) from error


def refuse_tensor_lists(name: str) -> NoReturn:
    """Raise: forward mode of an operator with lists of tensors."""
    raise NotImplementedError(
        f"jvp: {name} takes a list of tensors, and its forward-mode derivative cannot be derived from "
        f"register_autograd. Call it inside a functorch_lite.custom_jvp function."
    )


def refuse_capture(transform: str, name: str) -> NoReturn:
    """Raise: a function with a derivative rule depends on something that the rule does not know."""
    raise ValueError(
        f"{transform}: {name} uses a tensor that is differentiated and is no differentiated argument. Its "
        f"rule has no derivative for that tensor, which would be lost. Make the tensor an argument of the function, "
        f"or use x.detach() inside if it is to be a constant."
    )


def check_no_dual(is_dual: bool) -> None:
    """Refuse the dual tensors of PyTorch outside of any level."""
    if is_dual:
        raise NotImplementedError(
            "jvp: custom_vjp and custom_jvp functions do not know the dual tensors of torch.autograd.forward_ad. Use "
            "functorch_lite.jvp."
        )


def refuse_keyword_only(name: str, keyword: str) -> NoReturn:
    """Raise: an argument has no position."""
    refuse_type(
        f"{name}: the argument {keyword!r} can be given by keyword only, and the rule is about positions. Make it a "
        f"positional argument; it may then be passed by name, too."
    )


def check_has_rule(name: str, rule: Any, advice: str) -> None:
    """Require that the rule of a function was given."""
    if rule is None:
        raise TypeError(f"{name} has no derivative rule. {advice}")


def check_rule_count(name: str, rules: int, arguments: int) -> None:
    """Require a rule for each argument."""
    if rules != arguments:
        raise TypeError(
            f"{name}: defjvps was given {rules} rules, and the function was called with {arguments} arguments."
        )


def refuse_rule_result(name: str, rule: str, expected: str, got: Any) -> NoReturn:
    """Raise: a rule returned something of another form."""
    described = f"a tuple of {len(got)}" if isinstance(got, tuple) else type(got).__name__
    refuse_type(f"{name}: {rule} must return {expected}, got {described}.")


def refuse_rule_leaf(name: str, what: str, got: Any, like: tuple[Any, Any], of: str) -> NoReturn:
    """Raise: a rule returned a tensor of another shape or dtype, or no tensor."""
    shape, dtype = like
    expected = f"the shape and dtype of {of}, {tuple(shape)} and {dtype}"
    if not isinstance(got, Tensor):
        refuse_type(f"{name}: {what} must be a tensor with {expected}, got {type(got).__name__}.")
    raise ValueError(f"{name}: {what} must have {expected}, got {tuple(got.shape)} and {got.dtype}.")


def argument_positions(transform: str, argnums: Any, count: int, name: str = "argnums") -> tuple[int, ...]:
    """The non-negative positions that ``argnums``, the argument ``name``, selects among ``count`` positional ones."""
    if type(argnums) is int and 0 <= argnums < count:
        return (argnums,)
    given = (argnums,) if isinstance(argnums, int) else argnums
    if not isinstance(given, tuple) or not all(isinstance(i, int) and not isinstance(i, bool) for i in given):
        refuse_type(f"{transform}: {name} must be an int or a tuple of ints, got {argnums!r}.")
    if not given:
        raise ValueError(f"{transform}: {name} is empty; name at least one positional argument.")
    for i in given:
        if not -count <= i < count:
            raise ValueError(
                f"{transform}: {name}={argnums!r} selects positional argument {i}, but the function was called with "
                f"{count} positional argument{'s' * (count != 1)}. Pass what it selects by position."
            )
    positions = tuple(i % count for i in given)
    if len(set(positions)) != len(positions):
        raise ValueError(f"{transform}: {name}={argnums!r} selects the same argument twice.")
    return positions


def check_callable(transform: str, func: Any) -> None:
    """Require a function."""
    if not callable(func):
        refuse_type(f"{transform}: expected a function as first argument, got {type(func).__name__}.")


def compiler_of(called: str, backend: Any, named: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The compiler that is given, or named."""
    if callable(backend):
        compiler: Callable[..., Any] = backend
        return compiler
    if backend not in named:
        raise ValueError(
            f"{called}: got backend={backend!r}, expected {', '.join(map(repr, named))} or a compiler of graphs; pass "
            f"one of these."
        )
    return named[backend]


def many_graphs(name: str, count: int, changed: tuple[str, str | None, str] | None, dynamic: bool) -> str:
    """A warning: compiling takes longer than it saves."""
    what = "" if changed is None else f" The last time {changed[0]} was {changed[2]} and before that {changed[1]}."
    sizes = "" if dynamic else " For changing sizes, use jit(..., dynamic=True)."
    return (
        f"jit: {name} was compiled {count} times, for arguments that differ from each other.{what} For changing "
        f"numbers, pass tensors, as in torch.tensor(0.1) for 0.1.{sizes}"
    )


DONATION_WITH_GRADIENTS = (
    "jit: donated arguments keep their memory, for the results require grad, and their derivative may need it. Call "
    "the function under torch.no_grad(), or detach the arguments."
)


def check_module(called: str, module: Any) -> None:
    """Require an nn.Module."""
    if not isinstance(module, nn.Module):
        refuse_type(f"{called}: expected a module as first argument, got {type(module).__name__}.")


#: Transforms that differentiate all arguments of a function, and have no argnums.
_GIVEN_PRIMALS = ("vjp", "jvp", "linearize", "linear_transpose", "hvp", "vhp", "gnvp")


def check_differentiable(transform: str, leaf: Any, name: str) -> None:
    """Require a real or complex tensor."""
    way_out = (
        f"capture it in the function, as in {transform}(lambda x: f(x, constant), ...)"
        if transform in _GIVEN_PRIMALS
        else "leave the argument out of argnums"
    )
    if not isinstance(leaf, Tensor):
        refuse_type(
            f"{transform}: {name} is a {type(leaf).__name__} and cannot be differentiated. Pass a torch.Tensor, or "
            f"{way_out}."
        )
    if not (leaf.is_floating_point() or leaf.is_complex()):
        refuse_type(
            f"{transform}: {name} has dtype {leaf.dtype}; derivatives exist for floating-point and complex tensors "
            f"only. Convert it, for example with .to(torch.float32), or {way_out}."
        )


def no_derivative(transform: str, operator: str, argument: str | None) -> str:
    """What to say of an operator without a derivative."""
    by = f" by its argument '{argument}'" if argument else ""
    return (
        f"{transform}: the operator {operator} has no derivative{by}. If the result is to be differentiated as if that "
        f"were a constant, pass x.detach(); otherwise write it with other operators, or give a function of your own a "
        f"derivative with functorch_lite.custom_vjp or custom_jvp."
    )


def freed_graph(transform: str) -> str:
    """What to say if a backward pass inside the function has freed what that of the transform needs."""
    return (
        f"{transform}: backward() or torch.autograd.grad has run inside the function and freed the part of the graph "
        f"that {transform} needs. Pass it retain_graph=True, or create_graph=True if its result is differentiated, or "
        f"use functorch_lite.grad inside."
    )


def no_derivative_of_out(transform: str, operator: str) -> str:
    """What to say of an operator that writes a differentiated result into its ``out`` argument."""
    return (
        f"{transform}: {operator}(..., out=tensor) cannot be differentiated. Use what {operator}(...) returns, and "
        f"tensor.copy_(result) if it has to be written into a tensor that the function made."
    )


def not_picklable(transform: str) -> str:
    """What it returned holds tensors of one evaluation."""
    return (
        f"{transform}: got it to pickle, expected what a transform makes of a function, such as vmap(f). This holds "
        f"what one evaluation has saved; call the transform again where you need it."
    )


def check_pair(transform: str, func: Any, output: Any) -> None:
    """Require the (output, aux) that ``has_aux=True`` promises."""
    if not (isinstance(output, tuple) and len(output) == 2):
        got = f"a tuple of {len(output)}" if isinstance(output, tuple) else type(output).__name__
        refuse_type(f"{transform}: has_aux=True expects {name_of(func)} to return (output, aux), got {got}.")


def check_some_primals(transform: str, func: Any, primals: tuple[Any, ...]) -> None:
    """Require something to differentiate with respect to."""
    if not primals:
        raise ValueError(f"{transform}: {name_of(func)} was given no primals to differentiate.")


def check_argument_tuple(transform: str, name: str, given: Any) -> None:
    """Require a tuple of positional arguments."""
    if not isinstance(given, tuple) or not given:
        got = "an empty tuple" if isinstance(given, tuple) else type(given).__name__
        refuse_type(f"{transform}: {name} must be a tuple with an entry for each argument, got {got}.")


def check_no_options(called: str, what: str, options: dict[str, Any]) -> None:
    """Refuse the options that torch.autograd.grad would take."""
    if options:
        refuse_type(
            f"{called}: takes {what} by position only, got the keyword argument {next(iter(options))!r}. It may "
            f"be called many times and be differentiated as it is: options such as retain_graph are not needed."
        )


def refuse_nonlinear(func: Any) -> NoReturn:
    """Raise: a function was found not to be linear."""
    raise ValueError(
        f"linear_transpose: {name_of(func)} is not linear: its value at ones is not its derivative times ones. Use "
        f"vjp for the transposed derivative at a point, and leave out constant terms: only the linear part of "
        f"x -> A x + b has a transpose."
    )


def check_scalar_output(transform: str, func: Any, output: Any) -> None:
    """Require a real number."""
    if not isinstance(output, Tensor):
        hint = " Pass has_aux=True if the rest is auxiliary." if isinstance(output, tuple) else ""
        refuse_type(
            f"{transform}: {name_of(func)} must return a single tensor, the value to differentiate, got "
            f"{type(output).__name__}.{hint}"
        )
    if output.dim() != 0:
        raise ValueError(
            f"{transform}: {name_of(func)} must return a scalar (a tensor of shape ()), got shape "
            f"{tuple(output.shape)}. Reduce it, for example with .sum(), or use jacrev or vjp."
        )
    if output.is_complex():
        raise ValueError(
            f"{transform}: {name_of(func)} returned a complex number ({output.dtype}), which has no gradient. Return a "
            f"real one, for example .abs() or .real, or use jacrev for a holomorphic function."
        )
    if not output.is_floating_point():
        raise ValueError(
            f"{transform}: {name_of(func)} returned dtype {output.dtype}, which has no gradient. Return a "
            f"floating-point number."
        )


def check_model_output(model: Any, leaves: Sequence[Tensor], paths: Sequence[str]) -> None:
    """Require numbers that a loss has a second derivative with respect to."""
    for leaf, path in zip(leaves, paths, strict=True):
        if not (leaf.is_floating_point() or leaf.is_complex()):
            refuse_type(
                f"gnvp: output{path} of {name_of(model)} has dtype {leaf.dtype}, and the loss cannot be differentiated "
                f"with respect to it. Return floating-point or complex tensors only."
            )


def check_tensor_outputs(transform: str, func: Any, leaves: Sequence[Any], paths: Sequence[str]) -> None:
    """Require tensors everywhere."""
    for leaf, path in zip(leaves, paths, strict=True):
        if leaf is None and not path:
            refuse_type(f"{transform}: {name_of(func)} returned None. Return a tensor: is a return statement missing?")
        if not isinstance(leaf, Tensor) and not path:
            refuse_type(
                f"{transform}: {name_of(func)} must return a tensor, got {type(leaf).__name__}. Compute with tensors "
                f"to the end: .item(), float() and the like lose the derivative."
            )
        if not isinstance(leaf, Tensor):
            refuse_type(
                f"{transform}: {name_of(func)} must return tensors, got {type(leaf).__name__} at output{path}. Return "
                f"it as auxiliary output (has_aux=True) if it is not to be differentiated."
            )


class _Star:
    def __repr__(self) -> str:
        return "*"


def describe_structure(spec: pytree.TreeSpec) -> str:
    """A tree as one would write it, with stars for its leaves: ``{'a': *, 'b': [*, *]}``."""
    return repr(pytree.tree_unflatten([_Star()] * spec.num_leaves, spec))


def check_same_structure(transform: str, what: str, got: Any, expected: Any, of: str) -> None:
    """Require that two trees have one structure."""
    if got != expected:
        raise ValueError(
            f"{transform}: {what} must have the structure of {of}: expected {describe_structure(expected)}, got "
            f"{describe_structure(got)}, where * is a tensor."
        )


def check_like(transform: str, what: str, got: Any, expected: Tensor, of: str) -> None:
    """Require a tensor of another's shape, and a dtype that converts to its own."""
    if not isinstance(got, Tensor):
        refuse_type(f"{transform}: {what} must be a tensor like {of}, got {type(got).__name__}.")
    if got.shape != expected.shape:
        raise ValueError(
            f"{transform}: {what} must have the shape of {of}, {tuple(expected.shape)}, got {tuple(got.shape)}."
        )
    if got.dtype != expected.dtype:
        raise ValueError(f"{transform}: {what} must have the dtype of {of}, {expected.dtype}, got {got.dtype}.")


def check_chunk_size(transform: str, chunk_size: Any) -> None:
    """Require None or a positive int."""
    if chunk_size is None:
        return
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size <= 0:
        raise ValueError(f"{transform}: chunk_size must be None or a positive int, got {chunk_size!r}.")


def check_chunk_size_or_auto(transform: str, chunk_size: Any) -> None:
    """Require None, "auto" or a positive int."""
    valid = chunk_size is None or (isinstance(chunk_size, int) and not isinstance(chunk_size, bool) and chunk_size > 0)
    if not valid and chunk_size != "auto":
        raise ValueError(f"{transform}: chunk_size must be None, 'auto' or a positive int, got {chunk_size!r}.")


def check_memory_budget(nbytes: Any) -> None:
    """Require a positive number of bytes."""
    if not isinstance(nbytes, int) or isinstance(nbytes, bool) or nbytes <= 0:
        raise ValueError(f"memory_budget: expected a positive int, a number of bytes, got {nbytes!r}.")


def refuse_unknown_memory(device: Any) -> NoReturn:
    """Raise: nothing tells how much memory a device has left."""
    raise NotImplementedError(
        f"chunk_size='auto': the memory that is available on device {device} is not known here. Set it, as in "
        f"with functorch_lite.memory_budget(nbytes): ..., or pass an int as chunk_size."
    )


def check_randomness(transform: str, randomness: Any) -> None:
    """Require one of the three settings."""
    if randomness not in ("error", "same", "different"):
        raise ValueError(f"{transform}: randomness must be 'error', 'same' or 'different', got {randomness!r}.")


def refuse_unreturned_write(name: str, target: Tensor) -> NoReturn:
    """Raise: an autograd.Function on a tape writes into an argument that it does not return."""
    raise NotImplementedError(
        f"checkpoint: {name} writes in place into an argument (shape {tuple(target.shape)}, dtype {target.dtype}) that "
        f"it does not return. Return it, after ctx.mark_dirty, or write into a clone."
    )


def refuse_checkpointed_write(function: str, target: Tensor) -> None:
    """Refuse an autograd.Function that would write into the same memory again when it is computed again."""
    raise NotImplementedError(
        f"checkpoint: {function} writes in place into a tensor from outside the "
        f"checkpointed function (shape {tuple(target.shape)}, dtype {target.dtype}). It would be written again when "
        f"the function is computed again. Pass a clone."
    )


def no_dependence(transform: str, func: object, path: str) -> str:
    """What to say of an output that does not depend on the primals."""
    return (
        f"{transform}: output{path} of {name_of(func)} does not depend on the primals, and strict=True. "
        f"Pass strict=False for a tangent of zeros."
    )


# torch.compile.


def no_torch_compile(error: Exception) -> str:
    return (
        f"functorch_lite: torch.compile does not understand the transforms in this version of torch ({error}). Call "
        f"compiled functions inside transforms, and not the other way round."
    )


def compiled_map() -> str:
    return (
        "vjp, linearize, linear_transpose: the function that they return cannot be passed into a compiled function, "
        "nor out of one. Call them, and it, in the same compiled function, or both outside."
    )


def compiled_chunks() -> str:
    return (
        "vmap: got chunk_size and a randomness other than 'error' in a compiled function, where chunks cannot share "
        "one stream of random numbers. Leave out chunk_size, or call this vmap outside torch.compile."
    )


def compiled_stack() -> str:
    return (
        "stack_module_state: the stacked parameters are new leaves that require grad, which a compiled function cannot "
        "make. Call it outside torch.compile and pass what it returns."
    )


def compiled_auto_chunks() -> str:
    return (
        "chunk_size='auto' measures memory, which a compiled function cannot. Pass a number, or call this transform "
        "outside torch.compile."
    )


def compiled_custom(name: str) -> str:
    return f"{name}: was made inside the compiled function. Define it, and its rule, outside torch.compile."


def compiled_capture(name: str) -> str:
    return (
        f"{name}: it or its rule uses a tensor that is no argument, which torch.compile cannot see. Pass the tensor as "
        f"an argument."
    )


def check_no_buffers(transform: str, names: list[str]) -> None:
    """Refuse a module with buffers, which its function would not take. PyTorch's error has this type, too."""
    if names:
        raise RuntimeError(
            f"{transform}: got a module with buffers ({', '.join(names)}), expected one without; use "
            f"{transform}_with_buffers."
        )


def check_a_tensor_for_each(function: str, kind: str, names: Sequence[str], given: int) -> None:
    """Require as many tensors as a module has."""
    if given != len(names):
        raise ValueError(
            f"{function}: got {given} {kind} tensors, expected {len(names)}: {', '.join(names) or 'none'}. Pass those "
            f"that came with the function, or others in their order."
        )


def refuse_autograd_functional(kind: str) -> NoReturn:
    """Refuse what would silently be zero where autograd records nothing."""
    raise NotImplementedError(
        f"torch.autograd.functional: got a call inside {kind} of functorch_lite, where torch.autograd records nothing; "
        f"expected one outside, or directly inside grad, vjp or jacrev. Use jacobian, hessian, vjp, jvp, hvp or vhp of "
        f"functorch_lite in its place."
    )


def refuse_folded_constants(kind: str) -> NoReturn:
    """Refuse what would lose the derivatives of outer levels: PyTorch's own transforms get wrong numbers from it."""
    raise NotImplementedError(
        f"torch.func.linearize: got a call inside {kind} of functorch_lite, but it keeps constants without their "
        f"derivatives; expected one outside of other transforms. Use functorch_lite.linearize in its place, or "
        f"functorch_lite.overlay(), which puts ours in the place of theirs."
    )


def nested_forward_mode() -> str:
    """What to say of PyTorch's forward mode inside ours."""
    return (
        "jvp: got torch.func.jvp, jacfwd, hessian or linearize, or torch.autograd.forward_ad, inside forward mode of "
        "functorch_lite; PyTorch has one forward mode level, which is in use. Use functorch_lite's jvp, jacfwd, "
        "hessian or linearize in its place, or functorch_lite.overlay(), which puts ours in the places of theirs."
    )


def batched_number_in_torch_func() -> str:
    """What to say where torch.func takes a tensor of ours for one of its own."""
    return (
        "vmap: a transform of torch.func got an integer without dimensions that vmap of functorch_lite has batched, "
        "which it cannot tell from one of its own; expected none. Use functorch_lite's transform in its place, or "
        "functorch_lite.overlay(), which puts ours in the places of theirs, or give the integer a dimension: n[None]."
    )
