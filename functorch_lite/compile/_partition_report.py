"""What a partition saves and computes again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from functorch_lite.compile import _costs, _nodes
from functorch_lite.compile._joint import Joint


@dataclass(frozen=True)
class PartitionReport:
    """What a partition saves and computes again. Symbolic sizes count by their hints.

    Attributes:
        saved_bytes: Bytes of the tensors that the forward pass saves for the backward pass, primals aside.
        saved_tensors: How many there are.
        default_bytes: What `saved_bytes` would be if everything that the backward pass reads were saved, as
            `default_partition` does.
        primal_bytes: Bytes of the primals that are handed on to the backward pass. They are there in any case.
        saved_primals: How many there are.
        recomputed: The names of the nodes that the backward pass computes again, views aside.
        recomputed_flops: An estimate of the floating-point operations that these take.
        forward_flops: The same for the forward pass.
    """

    saved_bytes: int
    saved_tensors: int
    default_bytes: int
    primal_bytes: int
    saved_primals: int
    recomputed: tuple[str, ...]
    recomputed_flops: int
    forward_flops: int

    def __str__(self) -> str:
        """Three lines."""
        share = self.recomputed_flops / max(self.forward_flops, 1)
        return (
            f"saved: {self.saved_bytes:,} bytes in {self.saved_tensors} tensors (default: {self.default_bytes:,})\n"
            f"primals handed on: {self.saved_primals}, {self.primal_bytes:,} bytes\n"
            f"computed again: {len(self.recomputed)} nodes, {self.recomputed_flops:,} flops ({share:.0%} of forward)"
        )


def partition_report(
    joint_module: fx.GraphModule, forward_module: fx.GraphModule, backward_module: fx.GraphModule
) -> PartitionReport:
    """Tell what a partition saves and computes again.

    Args:
        joint_module: The joint graph.
        forward_module: The first result of a partitioner for this graph.
        backward_module: The second one.

    Returns:
        A `PartitionReport`.

    Example:
        >>> import torch
        >>> from functorch_lite import make_fx, vjp
        >>> from functorch_lite.compile._partition import default_partition
        >>> from functorch_lite.compile._partition_report import partition_report
        >>> def joint(x, tangent):
        ...     y, pull = vjp(lambda x: x.sin().exp(), x)
        ...     return [y, *pull(tangent)]
        >>> x, tangent = torch.ones(3), torch.ones(3)
        >>> graph = make_fx(joint, tracing_mode="fake")(x, tangent)
        >>> print(partition_report(graph, *default_partition(graph, ([x], [tangent]), num_fwd_outputs=1)))
        saved: 24 bytes in 2 tensors (default: 24)
        primals handed on: 0, 0 bytes
        computed again: 0 nodes, 0 flops (0% of forward)
    """
    placeholders = _placeholders(joint_module)
    primals = placeholders[: len(_placeholders(forward_module))]
    gradients = _nodes.returned(backward_module.graph)
    count = len(_nodes.returned(joint_module.graph)) - len(gradients)
    joint = Joint.read(joint_module, (primals, placeholders[len(primals) :]), count)
    saved = [node for node in _nodes.returned(forward_module.graph)[count:] if not _nodes.is_number(node)]
    by_default, _ = joint.saved(joint.read_by_backward())
    computed, handed_on = _apart(saved)
    names = {node.name for node in joint.forward}
    again = [n for n in backward_module.graph.nodes if n.op == "call_function" and n.name in names and _is_computed(n)]
    return PartitionReport(
        sum(map(_costs.nbytes, computed)),
        len(computed),
        sum(map(_costs.nbytes, _apart(by_default)[0])),
        sum(map(_costs.nbytes, handed_on)),
        len(handed_on),
        tuple(node.name for node in again),
        sum(map(_costs.flops, again)),
        sum(map(_costs.flops, forward_module.graph.nodes)),
    )


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _apart(nodes: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Those that are computed, and those that come from outside."""
    return [n for n in nodes if n.op != "placeholder"], [n for n in nodes if n.op == "placeholder"]


def _is_computed(node: fx.Node) -> bool:
    return not _nodes.is_view(node) and not _nodes.is_getitem(node)
