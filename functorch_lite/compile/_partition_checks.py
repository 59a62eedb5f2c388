"""Validation of what the partitioners and the settings are given, and every message about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn


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
