"""Validation of what users pass to functorch_lite.compile, and every message they can meet from it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import fx, nn


def check_operator(caller: str, operator: Any) -> None:
    """Require an operator of torch.ops, with or without its overload."""
    if not isinstance(operator, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        raise TypeError(
            f"{caller}: got {operator!r}, expected operators; name them as in torch.ops.aten.tanh_backward or "
            f"torch.ops.aten.tanh_backward.default."
        )


def check_has_decomposition(caller: str, operator: Any, found: dict[Any, Any]) -> None:
    """Require that PyTorch can write an operator with others."""
    if not found:
        raise ValueError(
            f"{caller}: got {operator}, expected operators that torch._decomp.decomposition_table can take apart; "
            f"leave it out, or put your own function for it into the dict that {caller} returns."
        )


def refuse_torchscript(error: Exception) -> NoReturn:
    """Raise: a graph has something that TorchScript does not know."""
    raise NotImplementedError(
        "ts_compile: got a graph that TorchScript cannot express, for the reason above; compile it with "
        "functorch_lite.compile.inductor, or run it with nop."
    ) from error


def flat_outputs(caller: str, outputs: Any) -> Sequence[Any]:
    """What a graph returns, which has to be a list or tuple of values."""
    if not isinstance(outputs, (list, tuple)):
        raise TypeError(
            f"{caller}: got a graph that returns a single value, expected a list or tuple; let the traced function "
            f"return [result]."
        )
    return outputs


def refuse_missing_cpp_compiler(error: Exception) -> NoReturn:
    """Raise: Inductor cannot compile for the CPU."""
    raise RuntimeError(
        "inductor: got no C++ compiler on this machine, expected g++ or clang++; install one, name it in the "
        "environment variable CXX, or run the graph with functorch_lite.compile.nop."
    ) from error


def static_positions(caller: str, fn: Any, argnums: Any) -> tuple[int, ...]:
    """The sorted positions that ``static_argnums`` names."""
    given = () if argnums is None else (argnums,) if isinstance(argnums, int) else argnums
    if not isinstance(given, (tuple, list)) or not all(type(i) is int and i >= 0 for i in given):
        raise TypeError(
            f"{caller}: got static_argnums={argnums!r}, expected positions of arguments; pass an int or a tuple of "
            f"ints, counted from 0."
        )
    if given and isinstance(fn, nn.Module):
        raise TypeError(
            f"{caller}: got static_argnums for a module, expected them for a function only; let the module have the "
            f"values as attributes."
        )
    return tuple(sorted(set(given)))


def static_values(caller: str, positions: Sequence[int], args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments at some positions, by which graphs are found again."""
    if positions[-1] >= len(args):
        raise ValueError(
            f"{caller}: got {len(args)} positional arguments, expected one at position {positions[-1]}, which is in "
            f"static_argnums; pass it by position."
        )
    for position in positions:
        if isinstance(args[position], torch.Tensor) or not isinstance(args[position], Hashable):
            raise TypeError(
                f"{caller}: got a {type(args[position]).__name__} as static argument {position}, expected a hashable "
                f"constant; leave the position out of static_argnums, or pass for example a tuple or a string."
            )
    return tuple(args[position] for position in positions)


def check_graph_of_operators(caller: str, gm: fx.GraphModule) -> None:
    """Refuse graphs that call modules, which have a state that a graph does not show."""
    for node in gm.graph.find_nodes(op="call_module"):
        raise TypeError(
            f"{caller}: got a graph that calls the module {node.target!r}, expected one of operators; trace it with "
            f"functorch_lite.compile.make_fx."
        )


def check_folder(caller: str, save_dir: str | None, offload_to_disk: bool) -> None:
    """Require a folder for what is to be kept on disk."""
    if offload_to_disk and save_dir is None:
        raise ValueError(
            f"{caller}: got offload_to_disk=True without save_dir, expected a folder for the results; pass "
            f"save_dir='some/folder'."
        )


def refuse_graph_that_works(caller: str) -> NoReturn:
    """Raise: there is nothing to look for."""
    raise ValueError(
        f"{caller}: got a graph that does not fail, expected module_fails(graph, inputs) to return True for it; call "
        f"module_fails with the graph and inputs to see why."
    )


def warn_of_flaky_check(caller: str) -> None:
    """Warn: a check contradicts itself."""
    warnings.warn(
        f"{caller}: got different answers of module_fails for one graph, expected the same each time; the search goes "
        f"on with the majority of several answers, which takes longer. Set the random seed in module_fails.",
        stacklevel=3,
    )


def picture_format(caller: str, path: str, has_matplotlib: bool) -> str:
    """The suffix of a file name, if pictures can be written in that format."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(
            f"{caller}: got the file name {path!r}, expected one that ends with .svg, .png or .pdf; .svg is written "
            f"without any other package."
        )
    if suffix != ".svg" and not has_matplotlib:
        raise ImportError(
            f"{caller}: got the file name {path!r}, expected matplotlib to be installed for {suffix} files; install it "
            f"(pip install matplotlib), or choose a name that ends with .svg."
        )
    return suffix


def corner_radius(caller: str, shape: Any, radii: dict[Any, float]) -> float:
    """How round boxes of a shape are."""
    if shape not in radii:
        raise ValueError(
            f"{caller}: got dot_graph_shape={shape!r}, expected one of "
            f"{', '.join(repr(known) for known in radii)}; leave it out for round corners."
        )
    return radii[shape]


def check_no_graphviz(caller: str, prog: Any) -> None:
    """Refuse the name of a Graphviz program."""
    if prog is not None:
        raise ValueError(
            f"{caller}: got prog={prog!r}, expected None, for graphs are laid out without Graphviz; leave it out."
        )


def refuse_branch(location: str) -> NoReturn:
    """Raise: the values of tensors decide which code runs."""
    raise NotImplementedError(
        f"compile: {location}, the values of a tensor decide what Python does (if, while, an index, a size), and a "
        f"graph is made before there are values. Use torch.where or another operator, pass a Python value as an "
        f"argument, which gives another graph for each, or leave this part out of what is compiled."
    )


def refuse_data(location: str) -> NoReturn:
    """Raise: the values of tensors are read."""
    raise NotImplementedError(
        f"compile: {location}, the numbers of a tensor are read (.tolist(), .numpy(), torch.tensor of tensors), and a "
        f"graph is made before there are any. Use PyTorch's operators, or leave this part out of what is compiled."
    )


def refuse_backward(location: str) -> NoReturn:
    """Raise: .backward() inside of what is compiled."""
    raise NotImplementedError(
        f"compile: {location}, .backward() is called inside the function, and gradients would be written into .grad "
        f"behind the graph's back. Use torch.autograd.grad or functorch_lite.grad inside, or call backward() on what "
        f"the compiled function returns."
    )


def refuse_fake(location: str, reason: str) -> NoReturn:
    """Raise: PyTorch's fake tensors do not know an operator."""
    raise NotImplementedError(
        f"compile: {location}, the function calls something that cannot be traced: {reason} Leave this part out of "
        f"what is compiled, or make it a torch.library.custom_op with register_fake."
    )


def check_traceable(name: str, tensor: torch.Tensor) -> None:
    """Refuse tensors that fake tensors do not know."""
    if tensor.is_nested or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else "quantized"
        raise NotImplementedError(
            f"compile: argument {name} is a {kind} tensor, which cannot be traced. Pass "
            f"{'padded tensors and a mask' if tensor.is_nested else 'x.dequantize()'}."
        )


def check_hash(name: str, value: Any, key: Any) -> None:
    """Require something that graphs can be found again by."""
    try:
        hash(key)
    except TypeError:
        raise TypeError(
            f"compile: argument {name} is a {type(value).__name__}, which has no hash, so that there is no telling "
            f"when it changes. Pass a tensor (torch.as_tensor), or a hashable value such as a tuple or a string."
        ) from None


def refuse_generator() -> NoReturn:
    """Raise: a random generator is no argument."""
    raise NotImplementedError(
        "compile: the function draws from a torch.Generator that is no argument. If the function makes it, the graph "
        "would go on drawing where the last call ended. Pass the generator as an argument."
    )


def refuse_kept_tensors(count: int) -> NoReturn:
    """Raise: Python objects outside hold what was traced."""
    raise NotImplementedError(
        f"compile: the function keeps {count} of the tensors that it makes (in an attribute, a list, a closure), as an "
        f"optimizer does in its first step. A compiled function would not make them again in each call. Return them, "
        f"write into tensors that are there before, or call the function once without compiling it, so that they are."
    )


def refuse_subclass(caller: str) -> NoReturn:
    """Raise: a graph takes or returns plain tensors."""
    raise NotImplementedError(
        f"{caller}: got a function that takes or returns a tensor subclass, and a graph is made of plain tensors. Pass "
        f"the tensors that it is made of, or use functorch_lite.compile.aot_function."
    )


def refuse_written_view(caller: str) -> NoReturn:
    """Raise: a graph by itself cannot write so."""
    raise NotImplementedError(
        f"{caller}: got a function that changes the shape of an argument in place, or writes arguments that share "
        f"memory, which a graph by itself cannot do. Return the new tensor instead, or use functorch_lite.jit."
    )


def refuse_set(name: str) -> NoReturn:
    """Raise: an argument gets another memory."""
    raise NotImplementedError(
        f"compile: the function gives its argument {name} another memory or size (set_, .data = ..., resize_). Return "
        f"the new tensor from the function instead."
    )


def refuse_resize(location: str) -> NoReturn:
    """Raise: a tensor becomes larger in place."""
    raise NotImplementedError(
        f"compile: {location}, resize_ makes a tensor larger, which cannot be traced. Make a tensor of the new size "
        f"instead, and return it."
    )


def refuse_shared_memory() -> NoReturn:
    """Raise: inputs share memory in a way that is not known to autograd."""
    raise NotImplementedError(
        "compile: the function writes into an argument that shares memory with another one, and they are no views of "
        "one tensor that autograd knows. Pass a clone() of one of them, or one tensor, and take the views inside."
    )


def check_settings(changes: Mapping[str, object], known: Sequence[str]) -> None:
    """`Config.patch`: only settings that there are."""
    for name in changes:
        if name not in known:
            raise AttributeError(
                f"config.patch: got {name!r}, expected one of {', '.join(known)}; take one of these names."
            )


def check_memory_budget(budget: object) -> None:
    """A number from 0 to 1."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 <= budget <= 1:
        raise ValueError(
            f"min_cut_rematerialization_partition: got memory_budget={budget!r}, expected a number from 0 (save as "
            "little as possible) to 1 (compute nothing expensive again); choose one between."
        )


def check_recomputable(ordered: Iterable[object]) -> None:
    """``recomputable_ops`` has no operator that has to run exactly once."""
    for target in ordered:
        raise ValueError(
            f"min_cut_rematerialization_partition: got {target} among recomputable_ops, expected operators without "
            "random numbers and effects, which alone give the same result again; leave it out, and what it returns "
            "is saved."
        )


def check_placeholders(found: int, expected: int) -> None:
    """The joint graph has a placeholder for each of ``joint_inputs``."""
    if found != expected:
        raise ValueError(
            f"partition: got a joint graph with {found} placeholders and {expected} joint inputs, expected one "
            "placeholder for each; pass joint_inputs=(primals, tangents), both flat."
        )


def check_num_fwd_outputs(number: int, outputs: int) -> None:
    """There are that many outputs."""
    if not 0 <= number <= outputs:
        raise ValueError(
            f"partition: got num_fwd_outputs={number} for a joint graph with {outputs} outputs, expected a number "
            f"from 0 to {outputs}; count the outputs before the gradients."
        )


def refuse_missing_value(node: Any) -> NoReturn:
    """A node of which nothing is known."""
    raise ValueError(
        f"partition: got node {node.format_node()} without meta['val'], expected a fake value on every node; trace the "
        "joint graph with make_fx, or run FakeTensorProp over it."
    )


def refuse_dependent_output(node: Any) -> NoReturn:
    """A forward output that cannot be computed before the tangents are known."""
    raise ValueError(
        f"partition: got {node} among the first num_fwd_outputs outputs, which depends on a tangent, expected outputs "
        "of the forward pass; check num_fwd_outputs and the order of joint_inputs=(primals, tangents)."
    )


def refuse_unsavable(node: Any) -> NoReturn:
    """Neither to be saved nor to be computed again."""
    raise ValueError(
        f"partition: got {node.format_node()}, which the backward pass needs, expected a tensor, a number, or "
        "something that may be computed again; return a tensor from that operator."
    )
