"""Partitioners: what the forward pass saves for the backward pass, and what the backward pass computes again.

A joint graph is split in three steps. `Joint.read` tells which nodes are forward nodes. A partitioner chooses
which of these are saved. `Joint.split` makes the two modules: a forward node that the backward pass needs and that is
not saved is computed again there, right before it is read for the first time.

Three things hold for both partitioners:

- A view is never saved, but its base, which is the same memory.
- A tensor that comes from outside is saved as it is, which takes no memory, and so is a number.
- What is random or has effects stays in its pass, in its order, and runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import fx

from functorch_lite.compile import _checks, _rematerialization
from functorch_lite.compile._config import config
from functorch_lite.compile._joint import Joint, Modules


def default_partition(
    joint_module: fx.GraphModule, joint_inputs: Sequence[Any], *, num_fwd_outputs: int, **ignored: Any
) -> Modules:
    """Split a joint graph so that the forward pass saves what eager autograd saves.

    Each node stays in the pass in which it was traced, which its ``meta["partitioner_tag"]`` tells. In a graph without
    tags the nodes that depend on a tangent are those of the backward pass. Only views are computed again.

    Args:
        joint_module: The joint graph: placeholders for the primals and then for the tangents; one flat list of
            outputs, the gradients last.
        joint_inputs: The pair ``(primals, tangents)``.
        num_fwd_outputs: How many outputs are those of the function, not gradients.
        ignored: What other partitioners take.

    Returns:
        The forward module, from the primals to ``[*outputs, *saved_tensors, *saved_numbers]``, and the backward module,
        from ``[*saved_numbers, *saved_tensors, *tangents]`` to the gradients.

    Raises:
        ValueError: The graph does not fit ``joint_inputs`` or ``num_fwd_outputs``, or has nodes without a fake value.

    Example:
        >>> import torch
        >>> from functorch_lite import make_fx, vjp
        >>> from functorch_lite.compile import default_partition
        >>> def joint(x, tangent):
        ...     y, pull = vjp(lambda x: x.sin().exp(), x)
        ...     return [y, *pull(tangent)]
        >>> x, tangent = torch.ones(3), torch.ones(3)
        >>> forward, backward = default_partition(
        ...     make_fx(joint, tracing_mode="fake")(x, tangent), ([x], [tangent]), num_fwd_outputs=1
        ... )
        >>> y, *saved = forward(x)
        >>> torch.equal(backward(*saved, tangent)[0], x.cos() * y)
        True
    """
    joint = Joint.read(joint_module, joint_inputs, num_fwd_outputs)
    return joint.split(joint.read_by_backward())


def min_cut_rematerialization_partition(
    joint_module: fx.GraphModule,
    joint_inputs: Sequence[Any],
    *,
    num_fwd_outputs: int,
    memory_budget: float | None = None,
    recomputable_ops: Collection[Callable[..., Any]] | None = None,
    **ignored: Any,
) -> Modules:
    """Split a joint graph so that the forward pass saves little, and the backward pass computes the rest again.

    What is saved is a minimum cut of the forward graph, between what has to be saved and what the backward pass reads:
    it minimizes the bytes that are saved plus the work of computing again, at a rate that the budget sets. Primals and
    views cost nothing.

    - With a budget of 1 only cheap operators are computed again: pointwise ones, reductions, copies.
    - With a budget below 1 any operator may be, such as matrix products. The work is the smallest for which
      the bytes that are saved, primals aside, are at most that share of those with a budget of 1.
    - With a budget of 0 as few bytes are saved as possible.

    Random operators, those with effects, those of higher order, and ``config.never_recompute`` are never computed
    again.

    Args:
        joint_module: As for `default_partition`.
        joint_inputs: As for `default_partition`.
        num_fwd_outputs: As for `default_partition`.
        memory_budget: A number from 0 to 1. None: ``config.memory_budget``.
        recomputable_ops: The operators to take for cheap, overloads or packets. None: those of which it is known.
        ignored: What other partitioners take, as ``compiler``.

    Returns:
        The forward and the backward module, as those of `default_partition`.

    Raises:
        ValueError: As for `default_partition`; or ``memory_budget`` is no number from 0 to 1; or ``recomputable_ops``
            has a random operator or one with effects.

    Example:
        >>> import torch
        >>> from functorch_lite import make_fx, vjp
        >>> from functorch_lite.compile import min_cut_rematerialization_partition
        >>> def joint(x, tangent):
        ...     y, pull = vjp(lambda x: x.sin().exp(), x)
        ...     return [y, *pull(tangent)]
        >>> x, tangent = torch.ones(3), torch.ones(3)
        >>> forward, backward = min_cut_rematerialization_partition(
        ...     make_fx(joint, tracing_mode="fake")(x, tangent), ([x], [tangent]), num_fwd_outputs=1
        ... )
        >>> len(forward(x))  # y and x, of which the rest is computed again
        2

    Note:
        The rate is found as a multiplier of Lagrange: bytes and work of the minimum cuts for all rates are the
        lower hull of what is possible, and the budget chooses a corner of it. So a smaller budget never saves more
        bytes.

    References:
        T. Chen, B. Xu, C. Zhang, C. Guestrin, *Training Deep Nets with Sublinear Memory Cost*, 2016, for computing
        again in place of saving. J. Picard, *Maximal Closure of a Graph and Applications to Combinatorial Problems*,
        1976, for the minimum cut. H. Everett, *Generalized Lagrange Multiplier Method*, 1963, for the budget.
    """
    budget = config.memory_budget if memory_budget is None else memory_budget
    _checks.check_memory_budget(budget)
    joint = Joint.read(joint_module, joint_inputs, num_fwd_outputs)
    return joint.split(_rematerialization.saved_within(budget, joint, recomputable_ops))
