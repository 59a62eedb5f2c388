"""The passes leave what a graph computes as it is: bit for bit, and with the memory that its outputs share."""

import operator
import random

import pytest
import torch
from torch import Tensor, fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import functorch_lite as fl
from functorch_lite.compile import _passes

from .joint_graphs import FUNCTIONS, joint_graph_of

aten = torch.ops.aten
PASSES = [
    _passes.eliminate_dead_code,
    _passes.eliminate_common_subexpressions,
    _passes.eliminate_no_ops,
    _passes.simplify,
]


def _trace(func, *args, **options):
    module = fl.make_fx(func, tracing_mode="fake", **options)(*args)
    module.graph.set_codegen(fx.graph.CodeGen())
    return module


def _targets(graph):
    return [node.target for node in graph.nodes if node.op == "call_function"]


def _bits(tensor):
    """All that can be seen of a tensor: NaN and -0 included."""
    parts = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    values = parts.resolve_neg().contiguous().view(torch.uint8) if parts.numel() else parts
    return tensor.dtype, tensor.shape, tensor.stride(), values.tolist()


def _shared(tensors):
    """The pairs of places that show the same memory, and those that are the same object."""
    pairs = [(i, j) for j in range(len(tensors)) for i in range(j)]
    memory = [t.untyped_storage()._cdata for t in tensors]
    return {p for p in pairs if memory[p[0]] == memory[p[1]]}, {p for p in pairs if tensors[p[0]] is tensors[p[1]]}


def _assert_same(module, graph, inputs):
    """The graph computes what the module does, draws the same numbers, and shares no memory that it does not."""
    results = []
    for candidate in (module, fx.GraphModule(module, graph)):
        candidate.graph.lint()
        torch.manual_seed(0)
        outputs = candidate(*inputs)
        assert len(outputs) == len(module.graph.output_node().args[0])
        results.append(
            (
                [_bits(o) if isinstance(o, Tensor) else o for o in outputs],
                _shared([t for t in (*inputs, *outputs) if isinstance(t, Tensor)]),
                torch.get_rng_state().tolist(),
            )
        )
    (values, (memory, objects), state), (values2, (memory2, objects2), state2) = results
    assert values == values2
    assert state == state2
    assert memory2 <= memory
    assert objects2 <= objects


@pytest.mark.parametrize("tracing_mode", ["fake", "symbolic"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_joint_graphs(name, tracing_mode):
    joint = joint_graph_of(name, tracing_mode)
    before = [node.format_node() for node in joint.module.graph.nodes]
    for run in PASSES:
        graph = run(joint.module.graph)
        assert [node.format_node() for node in joint.module.graph.nodes] == before  # left alone
        assert all("val" in node.meta for node in graph.nodes if node.op == "call_function" and node.users)
        _assert_same(joint.module, graph, [*joint.primals, *joint.tangents])


UNARY = [
    lambda x: x.clone(),
    lambda x: x.detach(),
    lambda x: x.view(x.shape),
    lambda x: x.expand(x.shape),
    lambda x: x[:],
    lambda x: x[0:2],
    lambda x: x.t() if x.dim() == 2 else x.clone(),
    lambda x: x.permute(*range(x.dim())),
    lambda x: x.expand(2, *x.shape)[1],
    lambda x: x + 0,
    lambda x: x + 0.0,
    lambda x: x - 0,
    lambda x: x - 0.0,
    lambda x: x - (-0.0),
    lambda x: x * 1,
    lambda x: x * 1.0,
    lambda x: x * True,
    lambda x: x / 1,
    lambda x: x.to(torch.float32),
    lambda x: x.to(torch.complex64),
    lambda x: x.contiguous(),
    aten._to_copy.default,
    lambda x: x.sum(0, keepdim=True).expand(x.shape),
    lambda x: x.neg(),
    lambda x: x.conj(),
    lambda x: torch.rand_like(x, dtype=torch.float32),
]
BINARY = [torch.add, torch.mul, torch.sub]


def _random_program(seed):
    rng = random.Random(seed)

    def program(*args):
        values = list(args)
        for _ in range(20):
            if rng.random() < 0.7:
                values.append(rng.choice(UNARY)(rng.choice(values)))
            else:
                x = rng.choice(values)
                others = [y for y in values if y.shape == x.shape]
                values.append(rng.choice(BINARY)(x, rng.choice(others)))
        return rng.sample(values, 6)

    return program


@pytest.mark.parametrize("seed", range(60))
def test_random_programs(seed):
    x = torch.tensor([[0.0, -0.0, float("nan")], [float("inf"), -1.0, 2.0]])
    inputs = [x, torch.arange(6).view(2, 3), torch.complex(x, x.flip(0))]
    module = _trace(_random_program(seed), *inputs)
    for run in PASSES:
        _assert_same(module, run(module.graph), inputs)


def test_random_programs_become_shorter():
    inputs = [torch.ones(2, 3), torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.complex64)]
    graphs = [_trace(_random_program(seed), *inputs).graph for seed in range(20)]
    for run in (_passes.eliminate_common_subexpressions, _passes.eliminate_no_ops, _passes.simplify):
        assert any(len(run(graph).nodes) < len(graph.nodes) for graph in graphs)


def _hand_written(build, *values):
    """A module of a graph that ``build`` makes of placeholders; fake values are found by running it."""
    graph = fx.Graph()
    placeholders = [graph.placeholder(f"x{i}") for i in range(len(values))]
    graph.output(build(graph.call_function, *placeholders))
    module = fx.GraphModule({}, graph)
    FakeTensorProp(module).propagate(*values)
    return module


class TestDeadCode:
    def test_what_nobody_reads_is_left_out(self):
        def build(call, x):
            call(aten.cos.default, (call(aten.sin.default, (x,)),))
            return [call(aten.exp.default, (x,))]

        module = _hand_written(build, torch.ones(3))
        assert _targets(_passes.eliminate_dead_code(module.graph)) == [aten.exp.default]

    def test_random_operators_stay(self):
        def build(call, x):
            call(aten.rand_like.default, (x,))
            call(aten.native_dropout.default, (x, 0.5, True))
            call(aten.native_dropout.default, (x, 0.5, False))  # draws nothing
            return [call(aten.rand_like.default, (x,))]

        module = _hand_written(build, torch.ones(3))
        graph = _passes.eliminate_dead_code(module.graph)
        kept = [aten.rand_like.default, aten.native_dropout.default, aten.rand_like.default]
        assert _targets(graph) == kept
        _assert_same(module, graph, [torch.ones(3)])

    def test_effects_stay(self, operators):
        def build(call, x):
            call(operators.say.default, (x,))
            call(operators.count_.default, (x,))
            call(aten._assert_async.msg, (x, "no"))
            return [call(aten.sin.default, (x,))]

        module = _hand_written(build, torch.ones(()))
        assert _targets(_passes.eliminate_dead_code(module.graph)) == _targets(module.graph)

    def test_random_branches_stay(self):
        module = _hand_written(lambda call, pred, x: [call(aten.exp.default, (x,))], torch.tensor(True), torch.ones(2))
        for name, branch in {"random": torch.rand_like, "plain": torch.cos}.items():
            setattr(module, name, fl.make_fx(branch, tracing_mode="fake")(torch.ones(2)))
        pred, x = (node for node in module.graph.nodes if node.op == "placeholder")
        with module.graph.inserting_before(module.graph.output_node()):
            random_branch, plain = module.graph.get_attr("random"), module.graph.get_attr("plain")
            kept = module.graph.call_function(torch.ops.higher_order.cond, (pred, random_branch, plain, (x,)))
            module.graph.call_function(torch.ops.higher_order.cond, (pred, plain, plain, (x,)))
        graph = _passes.eliminate_dead_code(module.graph)
        assert _targets(graph) == [aten.exp.default, torch.ops.higher_order.cond]
        assert [node.name for node in graph.nodes if node.target is torch.ops.higher_order.cond] == [kept.name]


def _count(x):
    x.add_(1)


@pytest.fixture(scope="module")
def operators():
    """Custom operators with effects."""
    with torch.library._scoped_library("test_passes", "FRAGMENT") as library:
        library.define("say(Tensor x) -> ()")
        library.define("count_(Tensor(a!) x) -> ()")
        library.impl("say", lambda x: None, "CompositeExplicitAutograd")
        library.impl("count_", _count, "CompositeExplicitAutograd")
        yield torch.ops.test_passes


class TestCommonSubexpressions:
    def test_equal_calls_are_one(self):
        def build(call, x):
            one, other = (call(aten.sin.default, (call(aten.view.default, (x, [6])),)) for _ in range(2))
            return [call(aten.add.Tensor, (one, other))]

        module = _hand_written(build, torch.ones(2, 3))
        graph = _passes.eliminate_common_subexpressions(module.graph)
        assert _targets(graph) == [aten.view.default, aten.sin.default, aten.add.Tensor]

    def test_several_results(self):
        def build(call, x):
            pairs = [call(aten.max.dim, (x, 0)) for _ in range(2)]
            one, other = (call(operator.getitem, (pair, 0)) for pair in pairs)
            return [call(aten.add.Tensor, (one, other))]

        module = _hand_written(build, torch.ones(2, 3))
        graph = _passes.eliminate_common_subexpressions(module.graph)
        assert _targets(graph) == [aten.max.dim, operator.getitem, aten.add.Tensor]

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ((aten.mul.Tensor, 1), (aten.mul.Tensor, 1.0)),
            ((aten.mul.Tensor, 0.0), (aten.mul.Tensor, -0.0)),
            ((aten.add.Tensor, True), (aten.add.Tensor, 1)),
            ((aten.add.Tensor, 1), (aten.sub.Tensor, 1)),
        ],
    )
    def test_unequal_arguments(self, one, other):
        def build(call, x):
            parts = [call(target, (x, number)) for target, number in (one, other)]
            return [call(aten.cat.default, (parts,))]

        module = _hand_written(build, torch.arange(3))
        assert len(_targets(_passes.eliminate_common_subexpressions(module.graph))) == 3

    def test_keyword_arguments(self):
        def build(call, x):
            parts = [call(aten.sum.dim_IntList, (x, [0]), {"dtype": dtype}) for dtype in (None, torch.float64, None)]
            return [call(aten.cat.default, (parts,))]

        module = _hand_written(build, torch.ones(3, 2))
        assert len(_targets(_passes.eliminate_common_subexpressions(module.graph))) == 3

    def test_random_numbers_are_drawn_again(self):
        def build(call, x):
            return [call(aten.sub.Tensor, tuple(call(aten.rand_like.default, (x,)) for _ in range(2)))]

        module = _hand_written(build, torch.ones(3))
        assert len(_targets(_passes.eliminate_common_subexpressions(module.graph))) == 3

    def test_the_backward_pass_keeps_what_it_computes_again(self):
        def build(call, x):
            parts = [call(aten.sin.default, (x,)) for _ in range(4)]
            for part in parts[2:]:
                part.meta["partitioner_tag"] = "is_backward"
            return [call(aten.cat.default, (parts,))]

        module = _hand_written(build, torch.ones(3))
        graph = _passes.eliminate_common_subexpressions(module.graph)
        tags = [node.meta.get("partitioner_tag") for node in graph.nodes if node.target is aten.sin.default]
        assert tags == [None, "is_backward"]

    def test_outputs_stay_apart(self):
        def build(call, x):
            parts = [call(aten.sin.default, (x,)) for _ in range(3)]
            return [parts[0], call(aten.view.default, (parts[1], [3])), call(aten.cos.default, (parts[2],))]

        module = _hand_written(build, torch.ones(3))
        graph = _passes.eliminate_common_subexpressions(module.graph)
        _assert_same(module, graph, [torch.ones(3)])
        assert _targets(graph).count(aten.sin.default) == 2

    def test_written_memory(self, operators):
        def build(call, x):
            y = call(aten.exp.default, (x,))
            before = call(aten.sin.default, (y,))
            call(operators.count_.default, (y,))
            return [call(aten.sub.Tensor, (before, call(aten.sin.default, (y,))))]

        module = _hand_written(build, torch.ones(3))
        graph = _passes.simplify(module.graph)
        assert torch.equal(fx.GraphModule(module, graph)(torch.ones(3))[0], module(torch.ones(3))[0])
        # The first call is before the write: what it reads is not what the second one does.
        assert _targets(graph).count(aten.sin.default) == 2


class TestNoOps:
    @pytest.mark.parametrize(
        ("call", "value"),
        [
            (lambda call, x: call(aten.clone.default, (x,)), torch.ones(3)),
            (lambda call, x: call(aten._to_copy.default, (x,), {"dtype": torch.float32}), torch.ones(3)),
            (lambda call, x: call(aten.alias.default, (x,)), torch.ones(3)),
            (lambda call, x: call(aten.detach.default, (x,)), torch.ones(3)),
            (lambda call, x: call(aten.view.default, (x, [2, 3])), torch.ones(2, 3)),
            (lambda call, x: call(aten._unsafe_view.default, (x, [2, 3])), torch.ones(2, 3)),
            (lambda call, x: call(aten.expand.default, (x, [2, -1])), torch.ones(2, 3)),
            (lambda call, x: call(aten.slice.Tensor, (x, 0, 0, 9223372036854775807)), torch.ones(2, 3)),
            (lambda call, x: call(aten.permute.default, (x, [0, 1])), torch.ones(2, 3)),
            (lambda call, x: call(aten.transpose.int, (x, 1, 1)), torch.ones(2, 3)),
            (lambda call, x: call(aten.add.Tensor, (x, 0)), torch.arange(3)),
            (lambda call, x: call(aten.sub.Tensor, (x, 0)), torch.ones(3)),
            (lambda call, x: call(aten.mul.Tensor, (x, 1)), torch.ones(3)),
            (lambda call, x: call(aten.div.Tensor, (x, 1.0)), torch.ones(3)),
        ],
    )
    def test_left_out(self, call, value):
        def build(make, x):
            return [make(aten.neg.default, (call(make, make(aten.neg.default, (x,))),))]

        module = _hand_written(build, value)
        graph = _passes.eliminate_no_ops(module.graph)
        assert _targets(graph) == [aten.neg.default] * 2
        _assert_same(module, graph, [value])

    @pytest.mark.parametrize(
        ("call", "value"),
        [
            (lambda call, x: call(aten.add.Tensor, (x, 0)), torch.tensor([-0.0])),
            (lambda call, x: call(aten.sub.Tensor, (x, -0.0)), torch.tensor([-0.0])),
            (lambda call, x: call(aten.mul.Tensor, (x, 1.0)), torch.arange(3)),
            (lambda call, x: call(aten.div.Tensor, (x, 1)), torch.arange(3)),
            (lambda call, x: call(aten.mul.Tensor, (x, 1)), torch.tensor([complex(float("inf"), 1)])),
            (
                lambda call, x: call(aten.clone.default, (x,), {"memory_format": torch.contiguous_format}),
                torch.ones(2, 3).t(),
            ),
            (lambda call, x: call(aten._to_copy.default, (x,), {"dtype": torch.float64}), torch.ones(3)),
            (lambda call, x: call(aten.view.dtype, (x, torch.int32)), torch.ones(3)),
            (lambda call, x: call(aten._conj.default, (x,)), torch.tensor([1j])),
            (lambda call, x: call(aten.transpose.int, (x, 0, 1)), torch.ones(3, 3)),
        ],
    )
    def test_stay(self, call, value):
        def build(make, x):
            return [
                make(
                    aten.abs.default,
                    (
                        call(
                            make,
                            make(aten.permute.default, (x, list(range(x_dims)))),
                        ),
                    ),
                )
            ]

        x_dims = value.dim()
        module = _hand_written(build, value)
        graph = _passes.eliminate_no_ops(module.graph)
        assert len(_targets(graph)) == 2  # without the permutation, which is none
        _assert_same(module, graph, [value])

    def test_an_output_does_not_become_an_input_or_another_output(self):
        def build(call, x):
            y = call(aten.sin.default, (x,))
            copy = call(aten.clone.default, (y,))
            view = call(aten.view.default, (call(aten.clone.default, (x,)), [3]))
            return [call(aten.clone.default, (x,)), call(aten.alias.default, (x,)), y, copy, view]

        module = _hand_written(build, torch.ones(3))
        graph = _passes.simplify(module.graph)
        _assert_same(module, graph, [torch.ones(3)])
        # The view of a copy is the copy: nobody else has it.
        assert len(_targets(graph)) == 5

    def test_an_output_may_become_what_nobody_else_has(self):
        def build(call, x):
            return [call(aten.clone.default, (call(aten.sin.default, (x,)),))]

        module = _hand_written(build, torch.ones(3))
        assert _targets(_passes.eliminate_no_ops(module.graph)) == [aten.sin.default]

    def test_a_copy_of_a_part_frees_the_rest(self):
        def build(call, x):
            part = call(aten.slice.Tensor, (call(aten.sin.default, (x,)), 0, 0, 2))
            return [call(aten.neg.default, (call(aten.clone.default, (part,)),))]

        module = _hand_written(build, torch.ones(1000))
        assert aten.clone.default in _targets(_passes.eliminate_no_ops(module.graph))

    def test_a_copy_that_is_written_stays(self, operators):
        def build(call, x):
            copy = call(aten.clone.default, (x,))
            call(operators.count_.default, (copy,))
            return [call(aten.neg.default, (copy,))]

        module = _hand_written(build, torch.ones(3))
        x = torch.ones(3)
        fx.GraphModule(module, _passes.simplify(module.graph))(x)
        assert torch.equal(x, torch.ones(3))

    def test_dynamic_shapes(self):
        def func(x):
            return [x.sin().view(x.shape).expand(x.shape)[:].cos()]

        module = fl.make_fx(func, tracing_mode="symbolic")(torch.ones(4, 5))
        module.graph.set_codegen(fx.graph.CodeGen())
        graph = _passes.simplify(module.graph)
        assert [t for t in _targets(graph) if t is not aten.sym_size.int] == [aten.sin.default, aten.cos.default]
        _assert_same(module, graph, [torch.randn(2, 3)])


def test_metadata_stay():
    joint = joint_graph_of("mlp", "fake")
    by_name = {node.name: node for node in joint.module.graph.nodes}
    for node in _passes.simplify(joint.module.graph).nodes:
        assert node.meta == by_name[node.name].meta
        assert node.stack_trace == by_name[node.name].stack_trace
