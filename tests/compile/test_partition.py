"""Partitions compute what the joint graph computes, and save and compute again what they may."""

import copy
import itertools
import random

import functorch.compile
import networkx
import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

import functorch_lite as fl
from functorch_lite.compile import _passes
from functorch_lite.compile._config import config
from functorch_lite.compile._minimum_cut import INFINITE, Network
from functorch_lite.compile._partition import default_partition, min_cut_rematerialization_partition
from functorch_lite.compile._partition_report import partition_report

from .joint_graphs import FUNCTIONS, JointGraph, joint_graph, joint_graph_of, tag

aten = torch.ops.aten
BUDGETS = [1, 0.9, 0.75, 0.5, 0.3, 0.1, 0]
OPTIONS = [None, *BUDGETS]  # None: the default partition
RANDOM = {aten.native_dropout.default, aten.rand_like.default, aten.bernoulli.p}
EXPENSIVE = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default}


def _split(joint, budget, **options):
    if budget is None:
        return joint.split(default_partition)
    return joint.split(min_cut_rematerialization_partition, memory_budget=budget, **options)


def _targets(module):
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def _placeholders(module):
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _returned(module):
    return list(module.graph.output_node().args[0])


def _report(joint, budget, **options):
    return partition_report(joint.module, *_split(joint, budget, **options))


def _run(joint, modules, primals=None, tangents=None):
    """The outputs and gradients, and what is saved."""
    primals, tangents = primals or joint.primals, tangents or joint.tangents
    forward, backward = modules
    torch.manual_seed(0)
    results = forward(*primals)
    outputs, saved = results[: joint.num_fwd_outputs], results[joint.num_fwd_outputs :]
    tensors = [value for value in saved if isinstance(value, Tensor)]
    numbers = [value for value in saved if not isinstance(value, Tensor)]
    assert saved == [*tensors, *numbers] or all(a is b for a, b in zip(saved, [*tensors, *numbers], strict=True))
    return [*outputs, *backward(*numbers, *tensors, *tangents)], saved


def _assert_same(results, expected):
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected, strict=True):
        assert (result is None) == (wanted is None)
        assert result is None or torch.equal(result, wanted)


def _assert_conventions(joint, modules):
    forward, backward = modules
    for module in modules:
        module.graph.lint()
        assert all("val" in node.meta for node in module.graph.nodes if node.op == "placeholder" or node.users)
    count = joint.num_fwd_outputs
    places = [node.name for node in _placeholders(joint.module)]
    assert [node.name for node in _placeholders(forward)] == places[: len(joint.primals)]
    saved = [node.name for node in _returned(forward)[count:]]
    assert len(set(saved)) == len(saved)  # nothing twice
    is_tensor = [isinstance(node.meta["val"], Tensor) for node in _returned(forward)[count:]]
    assert is_tensor == sorted(is_tensor, reverse=True)
    numbers = saved[sum(is_tensor) :]
    expected = [*numbers, *saved[: sum(is_tensor)], *places[len(joint.primals) :]]
    assert [node.name for node in _placeholders(backward)] == expected
    assert len(_returned(backward)) == len(_returned(joint.module)) - count


class TestSameNumbers:
    @pytest.mark.parametrize("budget", OPTIONS)
    @pytest.mark.parametrize("tagged", [False, True])
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_functions(self, name, tagged, budget):
        joint = joint_graph_of(name, "fake", tagged)
        modules = _split(joint, budget)
        _assert_conventions(joint, modules)
        results, saved = _run(joint, modules)
        _assert_same(results, joint.run())
        # A primal is handed on as it is, and no memory is saved twice.
        handed_on = [node.op == "placeholder" for node in _returned(modules[0])[joint.num_fwd_outputs :]]
        assert all(any(value is primal for primal in joint.primals) for value in itertools.compress(saved, handed_on))
        storages = [value.untyped_storage()._cdata for value in (*saved, *joint.primals)]
        assert len(set(storages)) == len(storages) - sum(handed_on)

    @pytest.mark.parametrize("budget", [None, 1, 0.5, 0])
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_simplified(self, name, budget):
        joint = joint_graph_of(name, "fake", True)
        module = fx.GraphModule(joint.module, _passes.simplify(joint.module.graph))
        simplified = JointGraph(module, joint.primals, joint.tangents, joint.num_fwd_outputs)
        _assert_same(_run(simplified, _split(simplified, budget))[0], joint.run())

    @pytest.mark.parametrize("budget", [None, 1, 0.5, 0])
    @pytest.mark.parametrize("name", ["mlp", "attention", "transformer", "recurrent"])
    def test_other_sizes(self, name, budget):
        joint = joint_graph_of(name, "symbolic", True)
        modules = _split(joint, budget)
        _assert_conventions(joint, modules)
        # Everything along the batch dimension is twice as long; results of random operators have another shape, too.
        grow = {"mlp": 0, "attention": 0, "transformer": 0, "recurrent": 1}[name]
        place = 0 if name in ("attention", "recurrent") else len(joint.primals) - 1
        primals = list(joint.primals)
        primals[place] = torch.cat([primals[place]] * 2, grow)
        tangents = [torch.cat([t, t]) for t in joint.tangents]
        torch.manual_seed(0)
        expected = joint.module(*primals, *tangents)
        _assert_same(_run(joint, modules, primals, tangents)[0], expected)

    @pytest.mark.parametrize("budget", [None, 1, 0])
    def test_in_place_random_numbers(self, budget):
        # On the CPU this draws into an empty tensor, so that the graph has operators that write.
        joint = joint_graph(lambda x, w: F.dropout(F.dropout(x @ w, 0.4).sin() @ w, 0.3), *torch.randn(2, 4, 4))
        assert aten.bernoulli_.float in _targets(joint.module)
        modules = _split(joint, budget)
        assert aten.bernoulli_.float not in _targets(modules[1])
        _assert_same(_run(joint, modules)[0], joint.run())


class TestDefault:
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_saves_what_autograd_saves(self, name):
        joint = joint_graph_of(name, "fake", True)
        leaves = [primal.detach().requires_grad_() for primal in joint.primals]
        storages = {}

        def save(tensor):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
            return tensor

        kept = []
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            outputs = joint.func(*leaves)
        assert outputs is not None
        for leaf in leaves:
            storages.pop(leaf.untyped_storage()._cdata, None)
        assert _report(joint, None).saved_bytes == sum(storages.values())

    def test_nothing_is_computed_again(self):
        for name in FUNCTIONS:
            assert _report(joint_graph_of(name, "fake"), None).recomputed == ()

    def test_a_checkpoint_stays_in_the_backward_pass(self):
        """What is computed for a second time after the backward pass has begun belongs there."""
        joint = JointGraph(
            fl.make_fx(_checkpointed, tracing_mode="fake")(*torch.ones(2, 3)), [torch.ones(3)], [torch.ones(3)], 1
        )
        joint.module.graph.set_codegen(fx.graph.CodeGen())
        for node in joint.module.graph.nodes:
            if node.op == "call_function" and node.name not in ("sin", "exp"):
                node.meta["partitioner_tag"] = "is_backward"
        joint.module = fx.GraphModule(joint.module, _passes.simplify(joint.module.graph))
        for budget in OPTIONS:
            forward, backward = _split(joint, budget)
            assert _targets(forward) == [aten.sin.default, aten.exp.default]
            assert [node.op for node in _returned(forward)[1:]] == ["placeholder"]
            assert _targets(backward).count(aten.sin.default) == 1
            _assert_same(_run(joint, (forward, backward))[0], joint.run())

    def test_a_base_is_saved_once(self):
        def func(x):
            y = x.exp()
            return y[0] * y[1] * y.t()[0, 0]

        forward, backward = joint_graph(func, torch.randn(2, 3)).split(default_partition)
        saved = _returned(forward)[1:]
        assert aten.exp.default in [node.target for node in saved]
        assert aten.select.int not in [node.target for node in saved]
        assert aten.select.int in _targets(backward)

    def test_several_results(self):
        joint = tag(joint_graph(lambda x: x.max(0)[0] * 2, torch.randn(4, 3)))
        forward, _ = joint.split(default_partition)
        assert [node.meta["val"].dtype for node in _returned(forward)[1:]] == [torch.int64]  # where the maximum is


def _checkpointed(x, tangent):
    y = x.sin().exp()
    return [y, x.sin().exp() * tangent * x.cos()]


def _scalar_program(seed):
    """Pointwise operators of vectors and scalars at random, with a product of matrices here and there."""
    rng = random.Random(seed)

    def program(x):
        values = [x @ x]
        for _ in range(5):
            y = rng.choice(values)
            values.append(rng.choice([Tensor.sin, Tensor.exp, lambda t: t * rng.choice(values), lambda t: t @ t])(y))
            if rng.random() < 0.3:
                values.append(values[-1].sum(0))
        return values[-1]

    return program


class TestMinimumCut:
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_fewer_bytes_for_a_smaller_budget(self, name):
        joint = joint_graph_of(name, "fake", True)
        reports = [_report(joint, budget) for budget in BUDGETS]
        nbytes = [report.saved_bytes for report in reports]
        assert nbytes == sorted(nbytes, reverse=True)
        # The kernel of attention keeps what it needs, and nothing of that is cheap.
        assert nbytes[0] < reports[0].default_bytes or name == "attention"
        assert nbytes[-1] < nbytes[0]
        for budget, saved in zip(BUDGETS, nbytes, strict=True):
            assert saved <= max(budget * nbytes[0], nbytes[-1])
        # Of those with a budget below 1, for which the same nodes may be computed again.
        flops = [report.recomputed_flops for report in reports[1:]]
        assert flops == sorted(flops)

    def test_a_budget_is_used(self):
        def func(x, *weights):
            for weight in weights:
                x = (x @ weight).tanh()
            return x

        joint = joint_graph(func, torch.randn(64, 32), *torch.randn(20, 32, 32))
        plain = _report(joint, 1).saved_bytes
        for budget in (0.9, 0.7, 0.5, 0.3, 0.1):
            share = _report(joint, budget).saved_bytes / plain
            assert budget - 0.06 < share <= budget  # a layer is 0.05

    @pytest.mark.parametrize(("budget", "longest"), [(0.5, 2), (0.25, 4)])
    def test_what_is_computed_again_is_spread(self, budget, longest):
        """Not one half of the network in one go, which would be in memory at a time."""

        def func(x, *weights):
            for weight in weights:
                x = (x @ weight).tanh()
            return x

        joint = tag(joint_graph(func, torch.randn(64, 32), *torch.randn(32, 32, 32)))
        _, backward = _split(joint, budget)
        saved = [n for n in _placeholders(backward) if n.name.startswith("tanh")]
        places = [-1, *sorted(int(n.name.removeprefix("tanh_").replace("tanh", "0")) for n in saved), 32]
        gaps = [after - before for before, after in itertools.pairwise(places)]
        assert max(gaps) <= longest

    @pytest.mark.parametrize("tagged", [False, True])
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_what_is_computed_again(self, name, tagged):
        joint = joint_graph_of(name, "fake", tagged)
        targets = {node.name: node.target for node in joint.module.graph.nodes}
        for budget in BUDGETS:
            again = {targets[name] for name in _report(joint, budget).recomputed}
            assert not again & RANDOM
            if budget == 1:
                assert not again & EXPENSIVE
        assert name == "pointwise chain" or again & EXPENSIVE  # with a budget of 0

    @pytest.mark.parametrize("seed", range(25))
    def test_the_best_of_all_choices(self, seed):
        """By trying every set of nodes to save."""
        module = fl.make_fx(_with_gradient(_scalar_program(seed)), tracing_mode="fake")(*torch.ones(2, 3, 3))
        joint = tag(JointGraph(module, [torch.ones(3, 3)], [torch.ones(3, 3)], 1))
        with config.patch(work_for_a_byte=3):
            forward, backward = _split(joint, 1)
            report = partition_report(module, forward, backward)
            found = _objective(joint, {n.name for n in _returned(forward)[1:]})
            nodes = [
                n.name for n in module.graph.nodes if n.op == "call_function" and not n.meta.get("partitioner_tag")
            ]
            best = min(_objective(joint, set(names)) for k in range(len(nodes) + 1) for names in _subsets(nodes, k))
        assert found == best
        assert report.saved_bytes <= report.default_bytes

    def test_recomputable_ops(self):
        joint = joint_graph_of("mlp", "fake", True)
        plain = _report(joint, 1)
        none, more = (_report(joint, 1, recomputable_ops=ops) for ops in ([], [aten.gelu, aten.addmm.default]))
        targets = {node.name: node.target for node in joint.module.graph.nodes}
        assert none.recomputed == ()
        assert none.saved_bytes > plain.saved_bytes
        assert {targets[name] for name in more.recomputed} == {aten.gelu.default, aten.addmm.default}

    @pytest.mark.parametrize("target", [aten.addmm, aten.addmm.default])
    def test_never_recompute(self, target):
        joint = joint_graph_of("mlp", "fake", True)
        with config.patch(never_recompute=frozenset([target])):
            report = _report(joint, 0)
        assert not any("addmm" in name for name in report.recomputed)
        assert any("addmm" in name for name in _report(joint, 0).recomputed)

    def test_long_chains(self):
        joint = joint_graph_of("pointwise chain", "fake", True)
        longest = {}
        for limit in (5, 20, 1000):
            with config.patch(longest_chain=limit):
                modules = _split(joint, 1)
            _assert_same(_run(joint, modules)[0], joint.run())
            again = set(partition_report(joint.module, *modules).recomputed)
            length = {}
            for node in modules[1].graph.nodes:
                if node.name in again:
                    length[node] = 1 + max((length.get(one, 0) for one in node.all_input_nodes), default=0)
            longest[limit] = max(length.values())
        assert longest[5] <= 5
        assert longest[20] <= 20
        assert longest[1000] > 50

    def test_expensive_for_what_it_saves(self):
        """A chain that takes more work than its bytes are worth is saved, however cheap each of its nodes."""

        def func(x):
            for _ in range(30):
                x = (x @ x).amax(1, keepdim=True).sin().expand(6, 6).exp()
            return x

        joint = joint_graph(func, torch.randn(6, 6))
        with config.patch(work_for_a_byte=1):
            strict = _report(joint, 1)
        assert len(strict.recomputed) < len(_report(joint, 1).recomputed)

    def test_the_budget_of_the_settings(self):
        joint = joint_graph_of("mlp", "fake")
        with config.patch(memory_budget=0):
            report = partition_report(joint.module, *joint.split(min_cut_rematerialization_partition))
        assert report == _report(joint, 0)
        assert partition_report(joint.module, *joint.split(min_cut_rematerialization_partition)) == _report(joint, 1)

    def test_options_of_others(self):
        joint = joint_graph_of("mlp", "fake")
        joint.split(min_cut_rematerialization_partition, compiler="inductor", static_lifetime_input_indices=[0])
        joint.split(default_partition, compiler="inductor", static_lifetime_input_indices=[0])

    def test_what_is_computed_again_is_computed_late(self):
        """So that not all of it is in memory at a time."""
        joint = joint_graph_of("mlp", "fake", True)
        _, backward = _split(joint, 1)
        again = [n for n in backward.graph.nodes if n.target is aten.gelu.default]
        first_use = [next(iter(n.users)) for n in again]
        order = {node: place for place, node in enumerate(backward.graph.nodes)}
        assert len(again) == 2
        for node, use in zip(again, first_use, strict=True):
            assert order[use] - order[node] <= 2


def _subsets(items, count):
    return itertools.combinations(items, count)


def _with_gradient(func):
    def joint(x, tangent):
        output, pull = fl.vjp(func, x)
        return [
            output,
            *pull(tangent if output.dim() == tangent.dim() else tangent.flatten()[: output.numel()].view_as(output)),
        ]

    return joint


def _objective(joint, names):
    """Bytes that are saved plus a third of what is written by computing again; None saved twice, primals free."""
    needed = [
        one
        for node in joint.module.graph.nodes
        if node.meta.get("partitioner_tag")
        for one in node.all_input_nodes
        if not one.meta.get("partitioner_tag")
    ]
    nbytes, work, seen = 0, 0, set()
    while needed:
        node = needed.pop()
        if node in seen or node.op == "placeholder":
            continue
        seen.add(node)
        size = node.meta["val"].nbytes
        if node.name in names:
            nbytes += size
        elif node.target is aten.mm.default:
            return float("inf")
        else:
            read = sum(one.meta["val"].nbytes for one in node.all_input_nodes)
            numel = max(one.meta["val"].numel() for one in (node, *node.all_input_nodes))
            is_view = node.target in (aten.expand.default, aten.t.default, aten.detach.default)
            is_sum = node.target is aten.sum.dim_IntList
            work += 0 if is_view else size + read + numel // 16 if is_sum else size
            needed += node.all_input_nodes
    return 3 * nbytes + work


class TestNetwork:
    @pytest.mark.parametrize("seed", range(40))
    def test_against_networkx(self, seed):
        rng = random.Random(seed)
        count = rng.randrange(4, 14)
        network, other = Network(), networkx.DiGraph()
        for _ in range(count - 2):
            network.vertex()
        other.add_nodes_from(range(count))
        for tail, head in itertools.permutations(range(count), 2):
            if rng.random() < 0.4 and head != network.SOURCE and tail != network.SINK:
                capacity = rng.choice([0, 1, 2, 5, INFINITE])
                network.edge(tail, head, capacity)
                other.add_edge(tail, head, capacity=capacity)
        value, _ = networkx.minimum_cut(other, network.SOURCE, network.SINK)
        side = network.minimum_cut()
        assert (side is None) == (value >= INFINITE)
        if side is None:
            return
        cost = _cost(other, side)
        assert cost == value
        # The nearest one to the sink: no part of its side does as well.
        inner = sorted(side - {network.SINK})
        for k in range(len(inner)):
            assert all(_cost(other, {*part, network.SINK}) > cost for part in itertools.combinations(inner, k))


def _cost(graph, side):
    return sum(c for tail, head, c in graph.edges.data("capacity") if head in side and tail not in side)


class TestOutputs:
    @pytest.mark.parametrize("budget", [None, 1, 0])
    def test_everything_that_may_be_returned(self, budget):
        """Inputs, what is saved, one thing twice; gradients that are None, constant, a primal, or a forward value."""

        def joint(x, y, tangent):
            z = x.exp()
            return [z, x, z, z.t(), None, tangent * z, z, y, torch.ones_like(y), None, tangent, 3]

        module = fl.make_fx(joint, tracing_mode="fake")(*torch.randn(3, 2, 2))
        graph = JointGraph(module, list(torch.randn(2, 2, 2)), [torch.randn(2, 2)], 5)
        modules = _split(graph, budget)
        _assert_conventions(graph, modules)
        results, saved = _run(graph, modules)
        expected = graph.run()
        assert results[-1] == expected[-1] == 3
        _assert_same(results[:-1], expected[:-1])
        assert results[1] is graph.primals[0]
        assert results[7] is graph.primals[1]
        assert results[10] is graph.tangents[0]

    @pytest.mark.parametrize("budget", [None, 1, 0])
    def test_constants(self, budget):
        table = torch.randn(3)
        func = _with_gradient(lambda x: (x * table).sin() * table)
        module = fl.make_fx(func, tracing_mode="fake", _allow_non_fake_inputs=True)(*torch.ones(2, 3))
        joint = JointGraph(module, [torch.randn(3)], [torch.randn(3)], 1)
        assert "get_attr" in [node.op for node in module.graph.nodes]
        modules = _split(joint, budget)
        assert "get_attr" not in [node.op for node in _returned(modules[0])[1:]]
        _assert_same(_run(joint, modules)[0], joint.run())

    @pytest.mark.parametrize("budget", [None, 1, 0])
    def test_sizes(self, budget):
        """A size is saved, not the tensor whose size it is."""

        def joint(x, y, tangent):
            return [x.sum() + y.sum(), tangent.expand(x.shape) * x.shape[0], tangent.expand(y.shape[0])]

        module = fl.make_fx(joint, tracing_mode="symbolic")(torch.ones(5, 3), torch.ones(5), torch.ones(()))
        graph = JointGraph(module, [torch.randn(7, 2), torch.randn(7)], [torch.randn(())], 1)
        for node in graph.module.graph.nodes:
            if node.op == "call_function" and node.target is not aten.sum.default:
                node.meta["partitioner_tag"] = "is_backward"
        modules = _split(graph, budget)
        _assert_conventions(graph, modules)
        results, saved = _run(graph, modules)
        assert sorted(saved) == [2, 7]  # the 7 once, though it is a size of two tensors
        _assert_same(results, graph.run())

    @pytest.mark.parametrize("budget", [None, 1, 0])
    def test_numbers_from_outside(self, budget):
        def joint(x, n, tangent):
            y = x.sin()
            return [y * n, tangent * n * x.cos(), None]

        module = fl.make_fx(joint, tracing_mode="symbolic")(torch.ones(3), 5, torch.ones(3))
        graph = JointGraph(module, [torch.randn(4), 6], [torch.randn(4)], 1)
        modules = _split(graph, budget)
        _assert_conventions(graph, modules)
        results, saved = _run(graph, modules)
        assert saved[-1] == 6
        _assert_same(results, graph.run())

    @pytest.mark.parametrize("budget", [None, 1, 0])
    def test_random_numbers_of_both_passes(self, budget):
        """Also those that nobody reads, and, without tags, those of the backward pass that depend on no tangent."""

        def joint(x, tangent):
            torch.rand_like(x)
            y = x * torch.rand_like(x)
            cotangent = tangent * torch.rand_like(tangent)
            noise = torch.rand_like(x)
            return [y, cotangent * noise]

        module = fl.make_fx(joint, tracing_mode="fake")(torch.ones(3), torch.ones(3))
        graph = JointGraph(module, [torch.randn(3)], [torch.randn(3)], 1)
        modules = _split(graph, budget)
        assert [_targets(m).count(aten.rand_like.default) for m in modules] == [2, 2]
        _assert_same(_run(graph, modules)[0], graph.run())


class TestReport:
    def test_numbers(self):
        def func(x, w):
            return (x @ w).sin().exp()

        joint = tag(joint_graph(func, torch.randn(4, 8), torch.randn(8, 16)))
        report = _report(joint, None)
        assert report.default_bytes == report.saved_bytes == 2 * 4 * 16 * 4
        assert (report.saved_tensors, report.saved_primals, report.primal_bytes) == (2, 2, 4 * (32 + 128))
        assert report.recomputed_flops == 0
        assert report.forward_flops == 2 * 4 * 8 * 16 + 2 * 64
        report = _report(joint, 0)
        assert (report.saved_bytes, report.saved_tensors, report.default_bytes) == (0, 0, 512)
        assert report.recomputed == ("mm", "sin", "exp")
        assert report.recomputed_flops == report.forward_flops
        assert str(report) == (
            "saved: 0 bytes in 0 tensors (default: 512)\n"
            "primals handed on: 2, 640 bytes\n"
            "computed again: 3 nodes, 1,152 flops (100% of forward)"
        )

    def test_dynamic_shapes(self):
        reports = [_report(joint_graph_of("mlp", mode, True), 0.5) for mode in ("fake", "symbolic")]
        assert reports[0].saved_bytes == reports[1].saved_bytes
        assert reports[0].recomputed_flops == reports[1].recomputed_flops


def _named_for_the_peer(joint):
    """A copy whose placeholders have the names that functorch.compile goes by, and whose forward nodes have a tag."""
    module = copy.deepcopy(joint.module)
    for node in module.graph.nodes:
        if node.op == "call_function" and "partitioner_tag" not in node.meta:
            node.meta["partitioner_tag"] = "is_forward"
    count = len(joint.primals)
    for place, node in enumerate(_placeholders(module)):
        node.name = node.target = f"primals_{place + 1}" if place < count else f"tangents_{place - count + 1}"
    module.recompile()
    return JointGraph(module, joint.primals, joint.tangents, joint.num_fwd_outputs)


def _saved_bytes(joint, forward):
    torch.manual_seed(0)
    saved = [value for value in forward(*joint.primals)[joint.num_fwd_outputs :] if isinstance(value, Tensor)]
    storages = {value.untyped_storage()._cdata: value.untyped_storage().nbytes() for value in saved}
    outside = {primal.untyped_storage()._cdata for primal in joint.primals}
    return sum(nbytes for storage, nbytes in storages.items() if storage not in outside)


@pytest.mark.parametrize("name", ["mlp", "convolutions", "attention", "transformer", "recurrent"])
def test_no_more_than_the_peer(name):
    joint = joint_graph_of(name, "fake", True)
    module = fx.GraphModule(joint.module, _passes.simplify(joint.module.graph))
    joint = JointGraph(module, joint.primals, joint.tangents, joint.num_fwd_outputs)
    named = _named_for_the_peer(joint)
    ours = _saved_bytes(joint, _split(joint, None)[0])
    assert ours <= _saved_bytes(joint, named.split(functorch.compile.default_partition)[0])
    ours = _saved_bytes(joint, _split(joint, 1)[0])
    assert ours <= _saved_bytes(joint, named.split(functorch.compile.min_cut_rematerialization_partition)[0])


class TestErrors:
    @pytest.fixture
    def joint(self):
        return joint_graph_of("mlp", "fake")

    @pytest.mark.parametrize("budget", [-0.1, 1.5, float("nan"), "half", True])
    def test_memory_budget(self, joint, budget):
        with pytest.raises(ValueError, match=r"got memory_budget=.*, expected a number from 0 .* to 1 .*; choose one"):
            _split(joint, budget)

    def test_recomputable_ops(self):
        joint = joint_graph_of("transformer", "fake")
        with pytest.raises(
            ValueError, match=r"got aten.native_dropout.default among recomputable_ops, expected .*; leave"
        ):
            _split(joint, 1, recomputable_ops=[aten.native_dropout, aten.gelu])

    @pytest.mark.parametrize("partition", [default_partition, min_cut_rematerialization_partition])
    def test_joint_inputs(self, joint, partition):
        with pytest.raises(ValueError, match=r"with 14 placeholders and 13 joint inputs, expected one .*; pass"):
            partition(joint.module, (joint.primals, []), num_fwd_outputs=1)

    @pytest.mark.parametrize("number", [-1, 100])
    def test_num_fwd_outputs(self, joint, number):
        with pytest.raises(ValueError, match=r"got num_fwd_outputs=.* with 14 outputs, expected .* 0 to 14; count"):
            default_partition(joint.module, joint.joint_inputs, num_fwd_outputs=number)

    def test_output_of_tangents(self, joint):
        with pytest.raises(
            ValueError, match=r"among the first num_fwd_outputs outputs, which depends on a tangent.*; check"
        ):
            default_partition(joint.module, joint.joint_inputs, num_fwd_outputs=2)

    def test_no_value(self):
        joint = joint_graph(torch.sin, torch.ones(3))
        for node in joint.module.graph.nodes:
            node.meta.pop("val", None)
        with pytest.raises(ValueError, match=r"without meta\['val'\], expected a fake value on every node; trace"):
            joint.split(default_partition)

    @pytest.mark.parametrize("partition", [default_partition, min_cut_rematerialization_partition])
    def test_unsavable(self, partition):
        joint = tag(joint_graph(lambda x: torch.native_dropout(x, 0.5, True)[0], torch.ones(3)))
        dropout = next(n for n in joint.module.graph.nodes if n.target is aten.native_dropout.default)
        last = next(n for n in joint.module.graph.nodes if n.target is aten.native_dropout_backward.default)
        last.args = (dropout, *last.args[1:])
        with pytest.raises(ValueError, match=r"native_dropout.*, which the backward pass needs, expected .*; return a"):
            joint.split(partition)

    def test_settings(self):
        with (
            pytest.raises(AttributeError, match=r"got 'budget', expected one of memory_budget, .*; take"),
            config.patch(budget=1),
        ):
            pass


def _use_and_fail():
    with config.patch(memory_budget=0.5, longest_chain=3):
        assert (config.memory_budget, config.longest_chain) == (0.5, 3)
        raise ZeroDivisionError


def test_settings_come_back():
    before = copy.copy(config)
    with pytest.raises(ZeroDivisionError):
        _use_and_fail()
    assert config == before
