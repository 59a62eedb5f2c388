"""Compilers of graphs: what they compile computes what the function computes, and inputs are freed in time."""

import weakref

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import functorch_lite.compile
from functorch_lite.compile._backends import (
    make_boxed_compiler,
    make_boxed_func,
    memory_efficient_fusion,
    nop,
    print_compile,
    ts_compile,
)
from functorch_lite.compile._decompositions import default_decompositions
from functorch_lite.compile._inductor import inductor

aten = torch.ops.aten


def several_kinds(x, w, b, n):
    """Matrix products, a derivative, a convolution, views, numbers, random draws, several results of one operator."""
    y = torch.nn.functional.gelu(x @ w + b)
    z = torch.nn.functional.layer_norm(y, (y.shape[-1],))
    (g,) = torch.autograd.grad(z.to(torch.float64).square().sum(), w, retain_graph=True)
    image = torch.nn.functional.conv2d(z[None, None], torch.ones(1, 1, 2, 2))
    drawn = torch.bernoulli(x.sigmoid()), torch.rand(x.shape[0]), torch.nn.functional.dropout(x, 0.5)
    joined = torch.cat([x.std(dim=0), torch.full((2,), float("inf"))]).clamp(max=3)
    return [z, g, None, x.shape[0] * n, image, *drawn, joined, *x.split(2), torch.ones(x.shape[0] * 2)]


def its_inputs():
    torch.manual_seed(0)
    return [torch.randn(4, 5), torch.randn(5, 6, requires_grad=True), torch.randn(6), 3]


def its_graph(tracing_mode="real"):
    """The graph as the pipeline makes it: without gradients to record."""
    gm = make_fx(several_kinds, tracing_mode=tracing_mode)(*its_inputs())
    if tracing_mode == "real":  # make_fx has written the number into the graph
        next(iter(node for node in gm.graph.nodes if node.name.startswith("n"))).meta["val"] = 3
    return gm


def agree(compiled, graph_inputs):
    inputs = its_inputs()
    torch.manual_seed(1)
    with torch.no_grad():
        got = compiled(graph_inputs)
    torch.manual_seed(1)
    expected = several_kinds(*inputs)
    assert [g is None for g in got] == [e is None for e in expected]
    assert_close([g for g in got if g is not None], [e for e in expected if e is not None])


@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
@pytest.mark.parametrize("compiler", [nop, print_compile, ts_compile, inductor])
def test_computes_what_the_function_computes(compiler, tracing_mode):
    gm = its_graph(tracing_mode)
    code = gm.code
    compiled = compiler(gm, its_inputs())
    assert compiled._boxed_call
    for _ in range(4):  # TorchScript changes its mind after some calls
        agree(compiled, its_inputs())
    assert gm.code == code


def test_boxed_function():
    boxed = make_boxed_func(lambda x, y: x - y)
    assert boxed._boxed_call
    assert boxed([5, 3]) == 2
    assert make_boxed_func(boxed) is boxed


def test_boxed_compiler_passes_on_graph_and_inputs():
    seen = []

    @make_boxed_compiler
    def compiler(gm, example_inputs):
        seen.append((gm, example_inputs))
        return lambda x: -x

    gm, inputs = fx.symbolic_trace(lambda x: x), [torch.ones(2)]
    assert_close(compiler(gm, inputs)([torch.ones(2)]), -torch.ones(2))
    assert seen == [(gm, inputs)]
    assert compiler.__name__ == "compiler"


def probed(watched, alive):
    """The graph of sin(x) * y and then cos, which notes after each operator which inputs are alive."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")

    def probe(value):
        alive.append([w() is not None for w in watched])
        return value

    a = graph.call_function(probe, (graph.call_function(torch.sin, (x,)),))
    b = graph.call_function(probe, (graph.call_function(torch.mul, (a, y)),))
    graph.output((graph.call_function(torch.cos, (b,)),))
    return fx.GraphModule(torch.nn.Module(), graph)


def test_inputs_are_freed_after_their_last_use():
    inputs, alive = [torch.rand(3), torch.rand(3)], []
    expected = (inputs[0].sin() * inputs[1]).cos()
    boxed = nop(probed([weakref.ref(i) for i in inputs], alive), inputs)
    (result,) = boxed(inputs)
    assert alive == [[False, True], [False, False]]
    assert inputs == []
    assert_close(result, expected)


def test_a_plain_call_keeps_its_inputs():  # so that the test above can fail
    inputs, alive = [torch.rand(3), torch.rand(3)], []
    probed([weakref.ref(i) for i in inputs], alive)(*inputs)
    assert alive == [[True, True], [True, True]]


def test_boxed_graph_without_inputs_and_with_attributes():
    root = torch.nn.Module()
    root.weight = torch.nn.Parameter(torch.ones(2))
    graph = fx.Graph()
    graph.output((graph.get_attr("weight"),))
    (result,) = nop(fx.GraphModule(root, graph), [])([])
    assert result is root.weight


def test_boxed_graph_with_one_input_and_annotations():
    def f(x: torch.Tensor, y: float = 2.0):
        return x * y

    assert_close(nop(fx.symbolic_trace(f), [])([torch.ones(2), 3.0]), torch.full((2,), 3.0))
    assert_close(nop(fx.symbolic_trace(lambda x: x.sin()), [])([torch.ones(2)]), torch.ones(2).sin())


def test_print_compile_shows_names_dtypes_shapes_and_source_lines(capsys):
    gm = make_fx(lambda weight: weight.sin().sum())(torch.ones(2, 3, dtype=torch.float64))
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.stack_trace = 'File "/home/model.py", line 12, in forward\n    y = weight.sin().sum()'
    print_compile(gm, [])
    printed = capsys.readouterr().out
    assert 'weight_1: "f64[2, 3]"' in printed
    assert 'sum_1: "f64[]" = torch.ops.aten.sum.default(sin)' in printed
    assert "/home/model.py:12" in printed
    assert "y = weight.sin().sum()" in printed


def test_torchscript_reads_parameters_at_each_call():
    root = torch.nn.Module()
    root.weight = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    graph = fx.Graph()
    graph.output((graph.call_function(aten.mul.Tensor, (graph.placeholder("x"), graph.get_attr("weight"))),))
    compiled = ts_compile(fx.GraphModule(root, graph), [])
    root.weight.fill_(3.0)
    assert_close(compiled([torch.ones(2)]), (torch.full((2,), 3.0),))


def test_torchscript_refuses_python_functions():
    gm = probed([], [])
    with pytest.raises(
        NotImplementedError, match=r"^ts_compile: got a graph that TorchScript cannot .*; compile it with"
    ):
        ts_compile(gm, [])


class TestInductor:
    def split(self, joint, num_primals, num_fwd_outputs):
        """Forward and backward graph: what depends on no tangent runs forward, and is saved if used."""
        nodes = list(joint.graph.nodes)
        placeholders, results = joint.graph.find_nodes(op="placeholder"), joint.graph.output_node().args[0]
        behind = set(placeholders[num_primals:])
        for node in nodes:
            if behind & set(node.all_input_nodes):
                behind.add(node)
        used = dict.fromkeys(
            i for node in nodes if node in behind and node.op != "output" for i in node.all_input_nodes
        )
        saved = [node for node in used if node not in behind]
        sizes = [node for node in saved if isinstance(node.meta["val"], torch.SymInt)]
        tensors = [node for node in saved if node not in sizes]
        outputs, gradients = results[:num_fwd_outputs], results[num_fwd_outputs:]
        forward, backward = fx.Graph(), fx.Graph()
        copies = {}
        for node in nodes:
            if node not in behind and node.op != "output":
                copies[node] = forward.node_copy(node, copies.__getitem__)
        forward.output(fx.map_arg([*outputs, *tensors, *sizes], copies.__getitem__))
        copies = {}
        for node in [*sizes, *tensors]:
            copies[node] = backward.placeholder(node.name)
            copies[node].meta = dict(node.meta)
        for node in nodes:
            if node in behind and node.op != "output":
                copies[node] = backward.node_copy(node, copies.__getitem__)
        backward.output(fx.map_arg(list(gradients), copies.__getitem__))
        graphs = fx.GraphModule(joint, forward), fx.GraphModule(joint, backward)
        return *graphs, len(tensors), len(sizes)

    @pytest.mark.parametrize("tracing_mode", ["fake", "symbolic"])
    def test_forward_and_backward_graph(self, tracing_mode):
        def f(x, w, image):
            y = torch.nn.functional.gelu(x @ w) + torch.arange(x.shape[0])[:, None]
            z = torch.nn.functional.layer_norm(y, (y.shape[-1],)).softmax(-1)
            return z.sum(0), torch.nn.functional.conv2d(image, torch.ones(2, 3, 3, 3, dtype=x.dtype)), x.shape[0] * 2

        def joint(x, w, image, *tangents):
            outputs = f(x, w, image)
            return [*outputs, *torch.autograd.grad(outputs[:2], (x, w, image), tangents), None]

        def inputs(n):
            return [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((n, 7), (7, 6), (2, 3, 8, 8))]

        primals = inputs(5)
        tangents = [torch.randn_like(o) for o in f(*primals)[:2]]
        traced = make_fx(joint, tracing_mode=tracing_mode)(*primals, *tangents)
        forward, backward, num_tensors, num_sizes = self.split(traced, len(primals), 3)
        assert (num_sizes > 0) == (tracing_mode == "symbolic")
        examples = [node.meta["val"] for node in backward.graph.find_nodes(op="placeholder")]
        compiled_forward, compiled_backward = inductor(forward, primals), inductor(backward, examples)
        for n in (5, 9, 33, 2) if tracing_mode == "symbolic" else (5,):
            primals = inputs(n)
            expected = f(*primals)
            tangents = [torch.randn_like(o) for o in expected[:2]]
            with torch.no_grad():
                given = list(primals)
                *outputs, double = compiled_forward(given)[:3]
                assert given == []
                saved = compiled_forward(list(primals))[3:]
                tensors, sizes = saved[:num_tensors], saved[num_tensors:]
                gradients = compiled_backward([*sizes, *tensors, *tangents])
            assert double == expected[2] == 2 * n
            assert_close(outputs, list(expected[:2]))
            assert [o.stride() for o in outputs] == [e.stride() for e in expected[:2]]
            assert_close(gradients[:3], list(torch.autograd.grad(expected[:2], primals, tangents)))
            assert gradients[3:] == [None]

    def test_random_numbers_are_those_of_the_graph(self):
        def f(x):
            drawn = [torch.rand(8), x * torch.rand(8), torch.bernoulli(x), torch.nn.functional.dropout(x, 0.5)]
            torch.rand(8)  # used by nobody, and still drawn
            many = [
                torch.randn_like(x),
                torch.randperm(8),
                torch.multinomial(x, 2),
                torch.normal(x, x),
                torch.poisson(x),
            ]
            ways = [getattr(torch.empty_like(x), n)() for n in ("uniform_", "exponential_", "log_normal_", "cauchy_")]
            return [drawn[0] - x, *drawn[1:], *many, *ways, torch.empty_like(x).bernoulli_(x), torch.randint(9, (8,))]

        x = torch.rand(8)
        gm = make_fx(torch.func.functionalize(f))(x)
        compiled = inductor(gm, [x])
        torch.manual_seed(3)
        got, after = compiled([x]), torch.rand(1)
        torch.manual_seed(3)
        assert_close(got, f(x), rtol=0, atol=0)
        assert_close(after, torch.rand(1), rtol=0, atol=0)

    def test_graph_with_constants(self):
        constant = torch.arange(4.0)
        gm = make_fx(lambda x: (x * constant, None), tracing_mode="fake", _allow_non_fake_inputs=True)(torch.ones(4))
        assert gm.graph.find_nodes(op="get_attr")
        product, nothing = inductor(gm, [torch.ones(4)])([torch.full((4,), 2.0)])
        assert_close(product, 2 * constant)
        assert nothing is None

    def test_refuses_a_single_value(self):
        with pytest.raises(
            TypeError, match=r"^inductor: got a graph that returns a single value, expected .*; let the"
        ):
            inductor(make_fx(torch.sin)(torch.ones(2)), [torch.ones(2)])

    def test_says_that_there_is_no_cpp_compiler(self):
        from torch._inductor import config

        gm = make_fx(lambda x: [x.sin()])(torch.ones(2))
        with (
            config.patch({"cpp.cxx": ("no-such-compiler",)}),
            pytest.raises(
                RuntimeError, match=r"^inductor: got no C\+\+ compiler on this machine, expected .*; install one"
            ),
        ):
            inductor(gm, [torch.ones(2)])


class TestMemoryEfficientFusion:
    @pytest.fixture
    def calls(self, monkeypatch):
        """What was handed to the pipeline, which is tested elsewhere."""
        calls = []

        def pipeline(fn, **options):
            calls.append((fn, options))
            return fn

        for name in ("aot_function", "aot_module"):
            monkeypatch.setattr(functorch_lite.compile, name, pipeline, raising=False)
        monkeypatch.setattr(functorch_lite.compile, "min_cut_rematerialization_partition", "min cut", raising=False)
        return calls

    @pytest.mark.parametrize("fn", [torch.sin, torch.nn.Linear(2, 2)])
    def test_what_it_chooses(self, fn, calls):
        assert memory_efficient_fusion(fn) is fn
        ((given, options),) = calls
        assert given is fn
        assert options == {
            "fw_compiler": inductor,
            "bw_compiler": inductor,
            "partition_fn": "min cut",
            "decompositions": default_decompositions,
        }

    def test_options_replace_what_it_chooses(self, calls):
        memory_efficient_fusion(torch.sin, fw_compiler=nop, dynamic=True)
        assert calls[0][1]["fw_compiler"] is nop
        assert calls[0][1]["dynamic"] is True
        assert calls[0][1]["bw_compiler"] is inductor

    def test_static_arguments_are_compiled_once_for_each_value(self, calls):
        def f(a, x, b, *, scale=1):
            return (a, x, b, scale)

        compiled = memory_efficient_fusion(f, static_argnums=(2, 0))
        assert compiled("s", "x", 1) == ("s", "x", 1, 1)
        assert compiled("s", "y", 1, scale=3) == ("s", "y", 1, 3)
        assert len(calls) == 1
        assert calls[0][0]("z") == ("s", "z", 1, 1)
        assert compiled("s", "x", True) == ("s", "x", True, 1)
        assert len(calls) == 2
        assert compiled.__name__ == "f"

    @pytest.mark.parametrize("argnums", [-1, "ab", (0, 1.0), True])
    def test_refuses_what_is_no_position(self, calls, argnums):
        with pytest.raises(
            TypeError, match=r"^memory_efficient_fusion: got static_argnums=.*, expected .*; pass an int"
        ):
            memory_efficient_fusion(torch.sin, static_argnums=argnums)

    def test_refuses_static_arguments_of_a_module(self, calls):
        with pytest.raises(TypeError, match=r"^memory_efficient_fusion: got static_argnums for a module, .*; let the"):
            memory_efficient_fusion(torch.nn.Linear(2, 2), static_argnums=0)

    def test_refuses_too_few_arguments(self, calls):
        with pytest.raises(ValueError, match=r"^memory_efficient_fusion: got 1 positional .*position 1.*; pass it by"):
            memory_efficient_fusion(torch.add, static_argnums=1)(1)

    @pytest.mark.parametrize("value", [[1], torch.ones(1)])
    def test_refuses_values_that_are_no_constants(self, calls, value):
        with pytest.raises(TypeError, match=r"^memory_efficient_fusion: got a \w+ as static argument 0, .*; leave the"):
            memory_efficient_fusion(torch.add, static_argnums=0)(value)


def test_inductor_compiles_writes(monkeypatch):
    """Inductor itself has no kernel for most operators in place, and with CI in the environment says so by an error."""
    monkeypatch.setenv("CI", "true")

    def f(x, y):
        x.div_(2)
        return [x + y.clone().addcmul_(x, x), y.exp()]

    x, y = torch.rand(3), torch.rand(3)
    graph = make_fx(f)(x.clone(), y)
    expected, written = f(mine := x.clone(), y), x.clone()
    assert_close(inductor(graph, [x, y])([written, y]), expected)
    assert_close(written, mine)


@pytest.mark.parametrize(("products", "expected"), [(2, 0), (3, 1)])
def test_many_calls_between_kernels_are_made_in_cpp(products, expected):
    def f(w, x):
        for _ in range(products):
            x = (w @ x).sin()
        return [x]

    w, x = torch.randn(6, 6), torch.randn(6, 5)
    (got,), code = torch._inductor.utils.run_and_get_code(lambda: inductor(make_fx(f)(w, x), [w, x])([w, x]))
    assert sum("inductor_entry_impl" in module for module in code) == expected
    assert_close(got, f(w, x)[0])
