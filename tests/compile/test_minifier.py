"""The minifier ends with the operators that fail, and its scripts reproduce the failure."""

import os
import random
import subprocess
import sys
import warnings

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from functorch_lite.compile._minifier import minifier

aten = torch.ops.aten


def operators(gm):
    return [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]


def targets(gm):
    return [node.target for node in operators(gm)]


def relu_of_a_sin(gm, inputs=None):
    """The failure that is looked for. The graph has to be one that runs."""
    gm(*inputs)
    return any(
        node.target is aten.relu.default
        and node.args[0].op != "placeholder"
        and node.args[0].target is aten.sin.default
        for node in gm.graph.nodes
    )


def large_graph(length=300, bug_at=137, seed=0):
    """Random operators, one of them the relu of a sin, on values of shape (4, 6)."""
    chosen = random.Random(seed)
    x, w = torch.rand(4, 6), torch.rand(6, 6)

    def f(x, w):
        values = [x]
        while len(values) < length:
            a, b = chosen.choice(values[-8:]), chosen.choice(values[-8:])
            kind = chosen.randrange(6)
            if len(values) == bug_at:
                values += [values[-1].sin()]
                values += [values[-1].relu()]
            elif kind == 0:
                values.append(a @ w * 0.1)
            elif kind == 1:
                values.append(torch.nn.functional.layer_norm(a, (6,)))
            elif kind == 2:
                values.append(torch.cat(a.split(2))) if chosen.random() < 0.2 else values.append(a.tanh())
            else:
                values.append((a + b).cos() if kind == 3 else a - b if kind == 4 else a * b)
        return values[-1], values[-3], None, values[-2].sum()

    return make_fx(f)(x, w), [x, w]


@pytest.mark.parametrize("bug_at", [3, 137, 290])
def test_ends_with_the_operators_that_fail(bug_at, capsys):
    gm, inputs = large_graph(bug_at=bug_at)
    assert len(operators(gm)) > 300
    code = gm.code
    small, small_inputs = minifier(gm, inputs, relu_of_a_sin)
    assert targets(small) == [aten.sin.default, aten.relu.default]
    assert relu_of_a_sin(small, small_inputs)
    assert [i.shape for i in small_inputs] == [(1, 1)]
    assert len(small.graph.output_node().args[0]) == 1
    assert gm.code == code
    printed = capsys.readouterr().out
    assert f"minifier: {len(operators(gm))} nodes -> " in printed
    assert len(small.graph.nodes) == 4


def test_takes_few_checks():
    gm, inputs = large_graph()
    checks = 0

    def counted(gm, inputs):
        nonlocal checks
        checks += 1
        return relu_of_a_sin(gm, inputs)

    minifier(gm, inputs, counted)
    assert checks < 100


def run_script(text, tmp_path):
    namespace = {"__name__": "reproduction"}
    exec(compile(text, "reproduction.py", "exec"), namespace)
    return namespace["graph"], namespace["inputs"]


def printed_script(capsys):
    return "".join(line for line in capsys.readouterr().out.splitlines(True) if not line.startswith("minifier: "))


def test_the_script_reproduces_the_failure(capsys, tmp_path):
    gm, inputs = large_graph()
    small, small_inputs = minifier(gm, inputs, relu_of_a_sin)
    script = printed_script(capsys)
    graph, inputs = run_script(script, tmp_path)
    assert relu_of_a_sin(graph, inputs)
    assert targets(graph) == targets(small)
    assert_close(inputs, small_inputs, rtol=0, atol=0)
    (tmp_path / "reproduction.py").write_text(script)
    script_run = [sys.executable, str(tmp_path / "reproduction.py")]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(script_run, capture_output=True, text=True, env=found)
    assert done.stdout.strip() == "True", done.stderr  # the check can be imported, and so the script calls it


def is_wrong(gm, inputs):
    """A compiler that takes cos for sin, told from a graph by numbers."""
    wrong = fx.GraphModule(gm, gm.graph)
    expected = gm(*inputs)
    for node in wrong.graph.nodes:
        if node.target is aten.sin.default:
            node.target = aten.cos.default
    wrong.recompile()
    return any(not torch.allclose(g, e) for g, e in zip(wrong(*inputs), expected, strict=True))


def test_numbers_that_matter_are_kept(capsys, tmp_path):
    # sin and cos agree at pi / 4: ones will do, and ones times that will not
    gm = make_fx(lambda x: [x.exp().sin() * x, x.sum()])(torch.rand(3))
    small, inputs = minifier(gm, [torch.rand(3)], is_wrong)
    assert targets(small) == [aten.sin.default]
    assert is_wrong(small, inputs)
    assert is_wrong(*run_script(printed_script(capsys), tmp_path))


def large_values(gm, inputs):
    return inputs[0].shape == (20, 20) and float(inputs[0][3, 4]) == 7.5 and len(operators(gm)) > 0


@pytest.mark.parametrize("save", [False, True])
def test_values_that_are_too_many_go_into_a_file(save, capsys, tmp_path):
    x = torch.rand(20, 20)
    x[3, 4] = 7.5
    folder = str(tmp_path / "made") if save else None
    gm, (value,) = minifier(make_fx(lambda x: [x.sin() + 1])(x), [x], large_values, save_dir=folder)
    assert_close(value, x)
    text = printed_script(capsys)
    _, (read,) = run_script(text, tmp_path)
    assert torch.equal(read, x) == save
    assert ("the values were others" in text) == (not save)
    if save:
        assert (tmp_path / "made" / "reproduction.py").read_text() == text.removesuffix("\n")


@pytest.mark.parametrize(
    "value",
    [
        (torch.arange(6.0) / 7).reshape(3, 2).t(),
        torch.tensor([[1.5, float("nan")], [float("inf"), 0.0]]),
        torch.tensor(3),
        torch.rand(2, 0),
        torch.complex(torch.tensor([0.1, 0.2]), torch.tensor([1 / 3, 0.7])),
        torch.tensor([True, False]),
        torch.tensor([0.1, 0.2, 0.3], dtype=torch.bfloat16),
        torch.tensor([0.1, 0.2, 1 / 3], requires_grad=True),
        torch.zeros(2),
        torch.ones(2, dtype=torch.int64),
        4,
        2.5,
        torch.randn(20, 20, generator=torch.Generator().manual_seed(0)),
    ],
    ids=repr,
)
def test_inputs_are_written_exactly(value, tmp_path):
    from functorch_lite.compile._reproduction import script

    gm = fx.symbolic_trace(lambda x: [x * 2])
    _, (read,) = run_script(script(gm, [value]), tmp_path)
    if not isinstance(value, torch.Tensor):
        assert read == value
        return
    assert_close(read, value, rtol=0, atol=0, equal_nan=True)
    assert (read.stride(), read.requires_grad) == (value.stride(), value.requires_grad)


def test_script_imports_what_the_code_needs(tmp_path):
    import math
    import operator

    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(operator.mul, (graph.call_function(math.floor, (2.5,)), x))
    z = graph.call_function(aten.full.default, ([2], float("inf")), {"device": torch.device("cpu")})
    nan = graph.call_function(aten.full.default, ([2], float("nan")))
    graph.output([graph.call_method("add", (y, z)), nan])
    from functorch_lite.compile._reproduction import script

    gm = fx.GraphModule(torch.nn.Module(), graph)
    read, inputs = run_script(script(gm, [torch.ones(2)]), tmp_path)
    assert_close(list(read(*inputs)), list(gm(torch.ones(2))), equal_nan=True)


def test_results_of_one_operator_are_removed_together():
    def f(x):
        mean, variance = torch.var_mean(x, dim=0)
        for part in torch.split(x.cos() + mean, 1):
            variance = variance + part
        return [variance.sin().relu(), torch.std_mean(x)]

    gm = make_fx(f)(torch.rand(4, 3))
    small, inputs = minifier(gm, [torch.rand(4, 3)], relu_of_a_sin)
    assert targets(small) == [aten.sin.default, aten.relu.default]


def test_a_failure_of_an_operator_with_several_results():
    def fails(gm, inputs):
        gm(*inputs)
        return any(t is aten.var_mean.correction for t in targets(gm)) and len(gm.graph.output_node().args[0]) > 1

    gm = make_fx(lambda x: [x.cos(), *(m.exp() for m in torch.var_mean(x.sin(), dim=0)), x.sum()])(torch.rand(4, 3))
    small, inputs = minifier(gm, [torch.rand(4, 3)], fails)
    assert fails(small, inputs)
    assert len(operators(small)) <= 3


def test_a_graph_that_returns_a_single_value():
    def fails(gm, inputs):
        return gm(*inputs).dim() >= 0 and relu_of_a_sin(gm, inputs)

    small, _ = minifier(make_fx(lambda x: x.exp().sin().relu().sum())(torch.rand(3)), [torch.rand(3)], fails)
    assert targets(small) == [aten.sin.default, aten.relu.default]


def test_parameters_become_inputs():
    root = torch.nn.Module()
    root.inner = torch.nn.Module()
    root.inner.weight = torch.nn.Parameter(torch.rand(3))
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("inner.weight")
    relu = graph.call_function(aten.relu.default, (graph.call_function(aten.sin.default, (weight,)),))
    graph.output([graph.call_function(aten.add.Tensor, (relu, x))])
    small, inputs = minifier(fx.GraphModule(root, graph), [torch.rand(3)], relu_of_a_sin)
    assert targets(small) == [aten.sin.default, aten.relu.default]
    assert len(inputs) == 1


def test_sizes_in_arguments_shrink_with_the_inputs():
    def fails(gm, inputs):
        gm(*inputs)
        return aten.view.default in targets(gm)

    gm = make_fx(lambda x: [x.view(2, 6).exp()])(torch.rand(12))
    small, inputs = minifier(gm, [torch.rand(12)], fails)
    assert fails(small, inputs)
    assert targets(small) == [aten.view.default]


def test_a_graph_that_crashes_in_eager_mode():
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.exp.default, (graph.call_function(aten.cos.default, (x,)),))
    bad = graph.call_function(aten.mm.default, (y, y))
    graph.output([graph.call_function(aten.sin.default, (bad,)), graph.call_function(aten.sum.default, (x,))])

    def crashes(gm, inputs):
        try:
            gm(*inputs)
        except RuntimeError:
            return True
        return False

    small, inputs = minifier(fx.GraphModule(torch.nn.Module(), graph), [torch.rand(2, 3)], crashes)
    assert targets(small) == [aten.mm.default]
    assert [tuple(i.shape) for i in inputs] == [(2, 3)]


def test_inputs_that_are_written_into():
    gm = make_fx(lambda x: [x.add_(1).sin().relu()])(torch.rand(3))
    x = torch.rand(3)
    kept = x.clone()
    small, _ = minifier(gm, [x], relu_of_a_sin)
    assert targets(small) == [aten.sin.default, aten.relu.default]
    assert_close(x, kept)


@pytest.mark.parametrize("options", [{}, {"offload_to_disk": True}, {"max_granularity": 4}])
def test_options(options, tmp_path):
    gm, inputs = large_graph(length=40, bug_at=20)
    small, _ = minifier(gm, inputs, relu_of_a_sin, save_dir=str(tmp_path / "kept"), **options)
    assert targets(small) == [aten.sin.default, aten.relu.default]
    assert ((tmp_path / "kept" / "relu.pt").exists()) == ("offload_to_disk" in options)


def test_without_intermediate_results():
    gm, inputs = large_graph(length=40, bug_at=20)
    small, small_inputs = minifier(gm, inputs, relu_of_a_sin, skip_offload=True)
    assert relu_of_a_sin(small, small_inputs)
    assert 2 < len(operators(small)) <= 30  # the operators that the sin needs are still there


def test_dump_state_gets_the_result(capsys):
    got = []
    gm, inputs = large_graph(length=20, bug_at=10)
    small, small_inputs = minifier(gm, inputs, relu_of_a_sin, lambda *state: got.append(state))
    ((dumped, dumped_inputs),) = got
    assert (dumped, dumped_inputs) == (small, small_inputs)
    assert "class Graph" not in capsys.readouterr().out


@pytest.mark.parametrize("skip_sanity", [False, True])
def test_refuses_a_graph_that_does_not_fail(skip_sanity):
    gm = make_fx(lambda x: [x.sin()])(torch.rand(3))
    with pytest.raises(ValueError, match=r"^minifier: got a graph that does not fail, expected .*; call module_fails"):
        minifier(gm, [torch.rand(3)], relu_of_a_sin, skip_sanity=skip_sanity)


def test_an_exception_of_the_first_check_is_not_hidden():
    def broken(gm, inputs):
        raise ZeroDivisionError("in the check")

    with pytest.raises(ZeroDivisionError, match="in the check"):
        minifier(make_fx(lambda x: [x.sin()])(torch.rand(3)), [torch.rand(3)], broken)


def test_refuses_modules():
    with pytest.raises(
        TypeError, match=r"^minifier: got a graph that calls the module '0', expected .*; trace it with"
    ):
        minifier(fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(2, 2))), [torch.rand(2)], relu_of_a_sin)


def test_refuses_to_keep_results_nowhere():
    with pytest.raises(
        ValueError, match=r"^minifier: got offload_to_disk=True without save_dir, expected .*; pass save"
    ):
        minifier(*large_graph(length=5, bug_at=2), relu_of_a_sin, offload_to_disk=True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lie", ["fails where it does not", "does not fail where it does"])
def test_a_check_that_is_sometimes_wrong(lie, seed):
    chosen = random.Random(seed)

    def flaky(gm, inputs):
        truth = relu_of_a_sin(gm, inputs)
        if truth == (lie == "does not fail where it does") and chosen.random() < 0.2:
            return not truth
        return truth

    gm, inputs = large_graph(length=100, bug_at=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small, small_inputs = minifier(gm, inputs, flaky, skip_sanity=True)
    assert relu_of_a_sin(small, small_inputs)
    assert len(operators(small)) <= 6


def test_a_search_that_went_astray_begins_again():
    answers = 0

    def first_always(gm, inputs):
        nonlocal answers
        answers += 1
        return answers <= 10 or relu_of_a_sin(gm, inputs)

    gm, inputs = large_graph(length=100, bug_at=50)
    with pytest.warns(
        UserWarning, match=r"^minifier: got different answers of module_fails for one graph, expected .*Set"
    ):
        small, _ = minifier(gm, inputs, first_always)
    assert targets(small) == [aten.sin.default, aten.relu.default]
