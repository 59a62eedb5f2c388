"""Programs: what is left out and what is kept, and that nothing that depends on data is."""

import pytest
import torch
from torch.testing import assert_close

import functorch_lite as fl
from functorch_lite import _C
from functorch_lite.compile import aot_function, make_fx, replay


def program_of(f, *args):
    """The lines of the program of a function of tensors, checked for the arguments and for others."""
    graph = make_fx(lambda *xs: list(f(*xs)))(*args)
    run = replay(graph, args)
    others = [torch.rand_like(x) if x.is_floating_point() else x for x in args]
    for given in (args, args, others):
        assert_close(run(list(given)), list(f(*given)))
    return repr(run.recording(args).program).splitlines()


def calls(lines):
    return [line.partition("(")[0].removeprefix("aten::") for line in lines if line.startswith("aten")]


X = torch.rand(3, 3)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x: [x.sin() + torch.zeros(3)], ["sin"]),
        (lambda x: [(torch.zeros(3, 3) + x).sin()], ["sin"]),
        (lambda x: [x.sin() - torch.zeros_like(x)], ["sin"]),
        (lambda x: [torch.ones(1) * x.sin()], ["sin"]),
        (lambda x: [x.sin() / torch.ones_like(x)], ["sin"]),
        (lambda x: [torch.eye(3) @ x.sin()], ["sin"]),
        (lambda x: [x.sin() @ torch.eye(3)], ["sin"]),
        (lambda x: [(torch.arange(3.0).exp() * 2).sum() * x], ["mul.Tensor"]),
        (lambda x: [x.sin().view(9)[3:].T.reshape(2, 3).unsqueeze(0)], ["sin"]),
        (lambda x: [x.sin(), x.cos()][:1], ["sin"]),
        (lambda x: x.sin().split(1), ["sin"]),
        # These are no identities.
        (lambda x: [torch.zeros(3, 3) - x], ["sub.Tensor"]),
        (lambda x: [torch.ones(3, 3) / x], ["div.Tensor"]),
        (lambda x: [x.sum(0) + torch.zeros(3, 3)], ["sum.dim_IntList", "add.Tensor"]),
        (lambda x: [x.double() * 1], ["_to_copy", "mul_.Tensor"]),
        (lambda x: [x.half() + torch.zeros(3, 3)], ["_to_copy", "add.Tensor"]),
        (lambda x: [torch.add(torch.zeros(3, 3), x, alpha=2)], ["add.Tensor"]),
        (lambda x: [torch.eye(3)[:2] @ x], ["mm"]),
        # Outputs are copies of what the program keeps.
        (lambda x: [torch.zeros(2) + 1], ["clone"]),
        (lambda x: [x + torch.zeros(3, 3)], ["clone"]),
    ],
)
def test_program(f, expected):
    assert calls(program_of(f, X)) == expected


def test_views_of_one_memory():
    lines = program_of(lambda x: [x.sin().T[1:].reshape(-1) + 1, x.sin().as_strided((2, 2), (1, 3), 2) * 2], X)
    assert "clone" in " ".join(calls(lines))


def test_complex_and_negative_views():
    z = torch.randn(3, dtype=torch.complex64)
    graph = make_fx(lambda z: [z.conj() * 2, torch.view_as_real(z * 2)[..., 1] + 1, (z * 3).imag * 2])(z)
    run = replay(graph, [z])
    for _ in range(2):
        w = torch.randn(3, dtype=torch.complex64)
        assert_close(run([w]), [w.conj() * 2, (w * 2).imag + 1, (w * 3).imag * 2])


def test_large_constants_are_made_in_each_run():
    lines = program_of(lambda x: [torch.zeros(1000, 1000) + x.sum()], X)
    assert "zeros" in calls(lines)


def test_sums_along_dimensions_of_size_one_are_views():
    def f(x):
        y = x.sin()[:, None]
        return [y.sum(1) * 2, y.sum((1,), True).exp(), x.cos()[None].sum((0,)).tanh()]

    assert "sum.dim_IntList" not in calls(program_of(f, X))
    for g in (
        lambda x: [x.sin(), x.sin()[None].sum(0)],
        lambda x: [y := x.sin(), y[None].sum(0), y[None].sum(0)],
        lambda x: [x[None].sum(0)],
        lambda x: [(y := x[None].sum(0)), y.exp(), y[0].exp(), x.exp()],
    ):
        outputs = replay(make_fx(g)(X), [X])
        for _ in range(2):
            x = torch.rand(3, 3)
            results = outputs([x])
            assert_close(results, g(x), rtol=0, atol=0)
            memories = [y.untyped_storage()._cdata for y in (*results, x)]
            assert len(set(memories)) == len(memories)
    assert "sum.dim_IntList" in calls(program_of(lambda x: [x.sum((0,)), x[:1].T.sum(1, dtype=torch.float64)], X))


def test_lists_and_several_results():
    program_of(lambda x: [torch.cat([x, torch.ones(1, 3), x * 2]), *torch.linalg.svd(x @ x.T + torch.eye(3))[1:2]], X)
    program_of(lambda x: [x.sort(0)[1], x.max(1)[0]], X)
    program_of(lambda x, i: [x[i], x.index_put((i,), x[:2])], X, torch.tensor([2, 0]))


def test_random_operators_run_in_their_order():
    def f(x):
        torch.rand(2)
        return [torch.rand(2), torch.bernoulli(x.abs().clamp(0, 1))]

    run = replay(make_fx(f)(X), [X])
    for _ in range(2):
        torch.manual_seed(3)
        got = run([X])
        torch.manual_seed(3)
        assert_close(got, f(X), rtol=0, atol=0)


def test_a_graph_that_writes():
    def f(x, y):
        x.mul_(2)
        z = torch.zeros(3)
        z[1] = y.sum()
        return [x + y, z]

    run = replay(make_fx(f)(X.clone(), X.clone()), [X, X])
    for _ in range(2):
        x, y = torch.rand(3, 3), torch.rand(3, 3)
        mine = x.clone()
        expected = f(mine, y)
        assert_close(run([x, y]), expected)
        assert_close(x, mine)


def test_each_size_is_recorded():
    compiled = aot_function(lambda x: x.sum(0) * x.shape[0] + torch.arange(x.shape[1]), replay, dynamic=True)
    for n, m in ((2, 3), (4, 3), (2, 3), (4, 5)):
        x = torch.rand(n, m)
        assert_close(compiled(x), x.sum(0) * n + torch.arange(m))


def test_inputs_of_other_sizes_are_refused():
    recorder = _C.Recorder(True)
    with recorder:
        y = recorder.lift(X).T.sin()
    program, _ = recorder.finish([y])
    assert_close(program.run([X * 2]), [(X * 2).T.sin()])
    with pytest.raises(RuntimeError, match="jit: got 2 inputs, expected 1"):
        program.run([X, X])
    with pytest.raises(RuntimeError, match="jit: a tensor lies in memory in another way than before"):
        program.run([torch.rand(2, 2)])


def test_what_cannot_be_recorded_runs_as_a_graph():
    graph = make_fx(lambda x: [x[x > 0.5] * 2])(X)
    run = replay(graph, [X])
    for _ in range(2):
        x = torch.rand(3, 3)
        assert_close(run([x]), [x[x > 0.5] * 2])


def test_frees_inputs_after_their_last_use():
    run = replay(make_fx(lambda x: [x.sin().cos() + 1])(X), [X])
    run([X])
    inputs = [torch.rand(3, 3)]
    run(inputs)
    assert inputs == []


def test_backward_pass():
    compiled = aot_function(lambda x: (x.sin() @ x).sum(), replay)
    for _ in range(3):
        x = torch.rand(3, 3, requires_grad=True)
        (expected,) = torch.autograd.grad((x.sin() @ x).sum(), x)
        assert_close(torch.autograd.grad(compiled(x), x)[0], expected)


def test_infinities():
    """An identity matrix is left out, and with it the NaN of infinity times zero."""
    x = torch.full((2, 2), float("inf"))
    compiled = fl.jit(lambda x: torch.eye(2) @ x)
    compiled(x)
    assert_close(compiled(x), x)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x: [x.sin().cos().mul(2) + 1], ["sin", "cos_", "mul_.Tensor", "add_.Tensor"]),
        (lambda x: [(x.sin() * x).exp()], ["sin", "mul_.Tensor", "exp_"]),
        # The input, what is returned, and what is used later stay as they are.
        (lambda x: [x * 2], ["mul.Tensor"]),
        (lambda x: (lambda y: [y, y.cos()])(x.sin()), ["sin", "cos"]),
        (lambda x: (lambda y: [y.cos(), y.exp()])(x.sin()), ["sin", "cos", "exp_"]),
        (lambda x: (lambda y: [y.cos(), y[1:] * 2])(x.sin()), ["sin", "cos", "mul.Tensor"]),
        (lambda x: (lambda y: [y + y.T])(x.sin()), ["sin", "add.Tensor"]),
        (lambda x: (lambda y: [y[0].cos(), y[0].exp()])(x.sin()), ["sin", "cos", "exp"]),
        (lambda x: (lambda y: [(y + torch.zeros(3, 3)).cos(), y.T.exp()])(x.sin()), ["sin", "cos", "exp"]),
        # Nor does what has another shape, dtype or layout.
        (lambda x: [x.sum(0) * x], ["sum.dim_IntList", "mul.Tensor"]),
        (lambda x: [x.sin() > 0.5], ["sin", "gt.Scalar"]),
        (lambda x: [x[0].sin().expand(3, 3) * x], ["sin", "mul.Tensor"]),
    ],
)
def test_writes_into_what_is_not_used_again(f, expected):
    assert calls(program_of(f, X)) == expected


def test_writes_into_views_of_other_dtypes():
    """The memory is that of a tensor that is read later through a view of another dtype."""
    program_of(lambda x: (lambda z: [z.exp(), torch.view_as_real(z) * 2])(torch.complex(x.sin(), x.cos())), X)
    program_of(lambda x: (lambda y: [y.view(torch.int32) + 1, y.exp()])(x.sin()), X)
    program_of(lambda x: (lambda z: [z.imag * 2, z.exp()])(torch.complex(x, x)), X)
