"""vmap: run a function of one example on a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functorch_lite import _C, _checks, _tree
from functorch_lite._boundary import boundary

_RANDOMNESS = {"error": _C.Randomness.error, "same": _C.Randomness.same, "different": _C.Randomness.different}


def vmap(
    func: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: str = "error",
    *,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """Map ``func`` over a dimension of its arguments, all examples at once.

    ``func`` is written for one example: inside it the mapped dimension is invisible. If ``func: x[*] -> y[*]``, then
    ``vmap(func): x[B,*] -> y[B,*]``, with every operator run once on the whole batch.

    Args:
        func: Takes and returns pytrees of tensors. Keyword arguments are passed on and not mapped.
        in_dims: Which dimension of each tensor argument is mapped: an int (negative ones count from the end), None
            for an argument that is the same for all examples, or a tuple of these with the structure of the
            positional arguments, or a prefix of it. Default 0.
        out_dims: Where the mapped dimension goes in each output: an int, None for an output that does not depend on
            the example, or a structure that is a prefix of the output. Default 0.
        randomness: What random operators do inside: ``"error"``, ``"same"`` numbers for all examples, or
            ``"different"`` ones. Default ``"error"``.
        chunk_size: At most this many examples at once, to bound memory. Default None, all.

    Returns:
        A function of the same arguments with the mapped dimension added. Its outputs may be views of the arguments.

    Raises:
        ValueError: The structure of ``in_dims`` or ``out_dims`` does not fit, batch sizes differ, or no argument is
            mapped.
        TypeError: The function returned something other than tensors and None.
        NotImplementedError: An operator cannot run on a batch, such as ``.item()`` or boolean masks.
        EscapedTensorError: A tensor from inside is used after the call.

    Example:
        >>> import torch
        >>> from functorch_lite import vmap
        >>> vmap(torch.dot)(torch.ones(2, 3), torch.ones(2, 3))
        tensor([3., 3.])
        >>> vmap(torch.mul, in_dims=(0, None), out_dims=1)(torch.ones(2, 3), torch.ones(3)).shape
        torch.Size([3, 2])
    """
    _checks.check_callable("vmap", func)
    _checks.check_randomness("vmap", randomness)
    _checks.check_chunk_size("vmap", chunk_size)
    mode = _RANDOMNESS[randomness]

    def mapped(*args: Any, **kwargs: Any) -> Any:
        leaves, spec, dims, batch_size = _flatten_inputs(func, in_dims, args)
        if chunk_size is None or batch_size <= chunk_size:
            return _map(func, leaves, spec, dims, batch_size, out_dims, mode, kwargs)
        outputs = []
        chunks = _C.Chunks(batch_size, generators_in_use())
        for start in range(0, batch_size, chunk_size):
            size = min(chunk_size, batch_size - start)
            chunk = [
                leaf if dim is None else leaf.narrow(dim, start, size) for leaf, dim in zip(leaves, dims, strict=True)
            ]
            chunks.begin(size)
            outputs.append(_map(func, chunk, spec, dims, size, out_dims, mode, kwargs, chunks))
        return _join_chunks(func, outputs, out_dims)

    made_of = (vmap, (func, in_dims, out_dims, randomness), {"chunk_size": chunk_size})
    return boundary("vmap", mapped, like=func, made_of=made_of)


def _map(
    func: Callable[..., Any],
    leaves: Sequence[Any],
    spec: _tree.Spec,
    dims: Sequence[int | None],
    batch_size: int,
    out_dims: Any,
    randomness: _C.Randomness,
    kwargs: dict[str, Any],
    chunks: _C.Chunks | None = None,
) -> Any:
    with _C.VmapLevel(batch_size, randomness, chunks) as level:
        lifted = [leaf if dim is None else level.lift(leaf, dim) for leaf, dim in zip(leaves, dims, strict=True)]
        output = func(*_tree.unflatten(lifted, spec), **kwargs)
        out_leaves, out_spec = _tree.flatten(output)
        flat_dims = [out_dims] * len(out_leaves) if _tree.is_dim(out_dims) else _flat_out_dims(func, out_dims, output)
        results = _tree.unwrap(level, out_leaves)
    placed = [
        value
        if bdim is not None and bdim == out_dim
        else _place(func, value, bdim, out_dim, batch_size, partial(_path_of_leaf, output, i))
        for i, ((value, bdim), out_dim) in enumerate(zip(results, flat_dims, strict=True))
    ]
    return _tree.unflatten(placed, out_spec)


def map_rows(
    func: Callable[..., Any],
    rows: Sequence[Tensor],
    batch_size: int,
    out_dims: Any,
    randomness: str,
    chunks: _C.Chunks | None = None,
) -> Any:
    """What ``func`` returns for tensors with the batch in front, `vmap` without its checks."""
    leaves, spec = _tree.flatten(tuple(rows))
    return _map(func, leaves, spec, [0] * len(leaves), batch_size, out_dims, _RANDOMNESS[randomness], {}, chunks)


def map_chunks(
    func: Callable[..., Any],
    chunk_of: Callable[[int, int], Sequence[Tensor]],
    batch_size: int,
    chunk_size: int,
    out_dims: Any,
    randomness: str,
) -> list[Any]:
    """What ``func`` returns for each chunk of a batch. ``chunk_of(start, stop)`` gives its arguments.

    No two chunks of arguments are in memory at one time.
    """
    chunks = _C.Chunks(batch_size, generators_in_use())

    def on_chunk(start: int, size: int) -> Any:
        chunks.begin(size)
        return map_rows(func, chunk_of(start, start + size), size, out_dims, randomness, chunks)

    return [on_chunk(start, min(chunk_size, batch_size - start)) for start in range(0, batch_size, chunk_size)]


def map_as(level: _C.VmapLevel, func: Callable[..., Any], in_dims: Any) -> Callable[..., Any]:
    """``func`` mapped as ``level`` maps: with its randomness, and as the same chunk of a batch."""

    def mapped(*args: Any) -> Any:
        leaves, spec, dims, batch_size = _flatten_inputs(func, in_dims, args)
        return _map(func, leaves, spec, dims, batch_size, 0, level.randomness, {}, level.chunks)

    return mapped


def generators_in_use() -> list[torch.Generator]:
    """The generators that random operators draw from if they are given none."""
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *cuda]


def _path_of_leaf(output: Any, index: int) -> str:
    return _tree.paths(output)[index]


def _flatten_inputs(
    func: Callable[..., Any], in_dims: Any, args: tuple[Any, ...]
) -> tuple[list[Any], _tree.Spec, list[int | None], int]:
    if not args:
        name = _checks.name_of(func)
        raise ValueError(f"vmap({name}): called without positional arguments; there is nothing to map over.")
    leaves, spec = _tree.flatten(args)
    dims = _flat_in_dims(func, in_dims, args, leaves)
    batch_size = None
    first = 0
    for i, dim in enumerate(dims):
        if dim is None:
            continue
        leaf = leaves[i]
        shape = leaf.shape if isinstance(leaf, Tensor) else ()
        rank = len(shape)
        if not -rank <= dim < rank:
            _refuse_in_dim(func, args, i, leaf, dim)
        if dim < 0:
            dims[i] = dim = dim + rank
        size = shape[dim]
        if batch_size is None:
            batch_size, first = size, i
        elif size != batch_size:
            paths = _argument_paths(args)
            raise ValueError(
                f"vmap({_checks.name_of(func)}): all mapped dimensions must have one size, got {batch_size} in "
                f"{paths[first]} (shape {tuple(leaves[first].shape)}, in_dim {dims[first]}) and {size} in {paths[i]} "
                f"(shape {tuple(shape)}, in_dim {dim})."
            )
    if batch_size is None:
        raise ValueError(
            f"vmap({_checks.name_of(func)}): in_dims={in_dims!r} maps no argument. Give at least one tensor an integer "
            f"in_dim."
        )
    return leaves, spec, dims, batch_size


def _argument_paths(args: tuple[Any, ...]) -> list[str]:
    return [f"argument {i}{path}" for i, arg in enumerate(args) for path in _tree.paths(arg)]


def _flat_in_dims(func: Callable[..., Any], in_dims: Any, args: tuple[Any, ...], leaves: list[Any]) -> list[int | None]:
    if _tree.is_dim(in_dims):
        return [in_dims] * len(leaves)
    # A list works as a tuple does, for the arguments are a tuple.
    flat = _tree.broadcast_dims(tuple(in_dims) if isinstance(in_dims, list) else in_dims, args)
    if flat is None:
        plural = "s" * (len(args) != 1)
        raise ValueError(
            f"vmap({_checks.name_of(func)}): in_dims={in_dims!r} does not fit the {len(args)} positional "
            f"argument{plural}. Give one int or None for all, or a tuple with an entry for each argument; an entry may "
            f"be an int, None, or a structure like the argument's."
        )
    return flat


def _refuse_in_dim(func: Callable[..., Any], args: tuple[Any, ...], index: int, leaf: Any, dim: int) -> None:
    name, path = _checks.name_of(func), _argument_paths(args)[index]
    if not isinstance(leaf, Tensor):
        raise ValueError(
            f"vmap({name}): {path} has in_dim {dim} but is a {type(leaf).__name__}, not a tensor. Pass None as its "
            f"in_dim if it is the same for all examples."
        )
    if leaf.dim() == 0:
        raise ValueError(
            f"vmap({name}): {path} has in_dim {dim}, but its shape is (): it has no dimension to map. Pass None as its "
            f"in_dim if it is the same for all examples."
        )
    raise ValueError(
        f"vmap({name}): {path} has in_dim {dim}, but its shape is {tuple(leaf.shape)}. Pass a dimension in "
        f"[-{leaf.dim()}, {leaf.dim()}), or None if it is the same for all examples."
    )


def _flat_out_dims(func: Callable[..., Any], out_dims: Any, output: Any) -> list[int | None]:
    flat = _tree.flat_out_dims(out_dims, output)
    if flat is None and isinstance(out_dims, (tuple, list)) and len(out_dims) == 1 and isinstance(output, Tensor):
        flat = list(out_dims)
    if flat is None:
        raise ValueError(
            f"vmap({_checks.name_of(func)}): out_dims={out_dims!r} does not fit the output, a "
            f"{type(output).__name__}. Give one int or None for all, or a structure like the output's."
        )
    return flat


def _place(
    func: Callable[..., Any],
    value: Any,
    bdim: int | None,
    out_dim: int | None,
    batch_size: int,
    path: Callable[[], str],
) -> Any:
    """Move the batch dimension of a result from ``bdim`` (None: the same for all examples) to ``out_dim``."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        if out_dim is None:
            return value
        raise TypeError(
            f"vmap({_checks.name_of(func)}): the function must return tensors, got {type(value).__name__} at "
            f"output{path()}. Return a tensor, or give that output out_dims=None to pass it on as it is."
        )
    if out_dim is None:
        if bdim is not None:
            raise ValueError(
                f"vmap({_checks.name_of(func)}): output{path()} has out_dims=None but differs between examples. Give "
                f"it an integer."
            )
        return value
    rank = value.dim() + (bdim is None)
    if not -rank <= out_dim < rank:
        raise ValueError(
            f"vmap({_checks.name_of(func)}): out_dims={out_dim} is out of range for output{path()}, which has {rank} "
            f"dimensions with the batch. Pass a dimension in [-{rank}, {rank})."
        )
    out_dim %= rank
    if bdim is None:
        value, bdim = value.expand(batch_size, *value.shape), 0
    return value if bdim == out_dim else value.movedim(bdim, out_dim)


def _join_chunks(func: Callable[..., Any], outputs: list[Any], out_dims: Any) -> Any:
    dims = _flat_out_dims(func, out_dims, outputs[0])
    flat = [_tree.flatten(output) for output in outputs]
    spec = flat[0][1]
    joined = []
    for i, dim in enumerate(dims):
        pieces = [leaves[i] for leaves, _ in flat]
        joined.append(pieces[0] if dim is None or pieces[0] is None else torch.cat(pieces, dim))
    return _tree.unflatten(joined, spec)
