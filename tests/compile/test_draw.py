"""Pictures of graphs: lines meet no boxes, words fit, colours say what a value is there for."""

import importlib.util
import random
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from functorch_lite import vjp
from functorch_lite.compile import _draw
from functorch_lite.compile._draw import draw_graph, draw_joint_graph
from functorch_lite.compile._layout import Box, Edge, place
from functorch_lite.compile._picture import CHARACTER, Line, Rectangle, Words

SVG = "{http://www.w3.org/2000/svg}"


def mlp(x, weight, bias):
    hidden = torch.nn.functional.layer_norm((x @ weight + bias).tanh(), (6,))
    return hidden.log_softmax(-1), hidden.sum()


def inputs():
    return [torch.rand(4, 5), torch.rand(5, 6), torch.rand(6)]


def joint_graph():
    """(graph, (primals, tangents))."""
    primals, tangents = inputs(), [torch.rand(4, 6), torch.rand(())]

    def joint(x, weight, bias, out_tangent, sum_tangent):
        outputs, pullback = vjp(mlp, x, weight, bias)
        return [*outputs, *pullback((out_tangent, sum_tangent))]

    gm = make_fx(joint)(*primals, *tangents)
    gm.graph.eliminate_dead_code()
    return gm, (primals, tangents)


def rectangles(picture):
    """The boxes of nodes: those with a tooltip, without the frames of modules."""
    return [s for s in picture.shapes if isinstance(s, Rectangle) and s.tooltip and s.stroke != _draw._FRAME]


def words(picture):
    return [shape.text for shape in picture.shapes if isinstance(shape, Words)]


def box_of(picture, name):
    (found,) = [r for r in rectangles(picture) if r.tooltip.split("\n")[0].split(" = ")[0] == name]
    return found


def along(points):
    """Points on a line, as an SVG viewer draws it."""
    for i, ((x, y), (to_x, to_y)) in enumerate(zip(points, points[1:], strict=False)):
        for t in (k / 8 for k in range(9)):
            if i % 2 == 0:
                yield x + (to_x - x) * t, y + (to_y - y) * t
            else:  # a cubic curve whose control points are at half the height
                s, middle = 1 - t, (y + to_y) / 2
                yield (
                    (s**3 + 3 * s * s * t) * x + (3 * s * t * t + t**3) * to_x,
                    s**3 * y + 3 * s * s * t * middle + 3 * s * t * t * middle + t**3 * to_y,
                )


def random_layout(count, seed):
    """Boxes and edges of a graph with a forward and a backward part."""
    chosen = random.Random(seed)
    boxes = [Box(chosen.uniform(40, 160), chosen.choice([27, 40, 53]), float(i > count * 0.6)) for i in range(count)]
    edges = []
    for i in range(1, count):
        for j in {chosen.randrange(max(0, i - 8), i), chosen.randrange(i)}:
            edges.append(Edge(boxes[j], boxes[i], upwards=bool(boxes[i].group and boxes[j].group)))
    return boxes, edges


def extent(box):
    return box.x - box.width / 2, box.y - box.height / 2, box.x + box.width / 2, box.y + box.height / 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [1, 2, 10, 60, 200])
def test_lines_and_boxes_keep_apart(count, seed):
    boxes, edges = random_layout(count, seed)
    width, height = place(boxes, edges)
    for i, a in enumerate(boxes):
        left, top, right, bottom = extent(a)
        assert left >= -1e-6
        assert top >= -1e-6
        assert right <= width + 1e-6
        assert bottom <= height + 1e-6
        for b in boxes[:i]:
            other = extent(b)
            assert left >= other[2] + 8 or other[0] >= right + 8 or top >= other[3] + 20 or other[1] >= bottom + 20
    for edge in edges:
        for x, y in along(edge.points):
            for box in boxes:
                left, top, right, bottom = extent(box)
                assert not (left + 1e-6 < x < right - 1e-6 and top + 1e-6 < y < bottom - 1e-6)


@pytest.mark.parametrize("count", [10, 60])
def test_lines_lead_from_the_value_to_who_uses_it(count):
    boxes, edges = random_layout(count, 0)
    place(boxes, edges)
    for edge in edges:
        (x, y), (to_x, to_y) = edge.points[0], edge.points[-1]
        sign = -1 if edge.upwards else 1
        assert y == pytest.approx(edge.source.y + sign * edge.source.height / 2)
        assert to_y == pytest.approx(edge.target.y - sign * edge.target.height / 2)
        assert abs(x - edge.source.x) < edge.source.width / 2
        assert abs(to_x - edge.target.x) < edge.target.width / 2
        assert (to_y - y) * sign > 0


def test_a_symmetrical_graph_is_drawn_symmetrically():
    top, left, right, bottom = (Box(60, 30) for _ in range(4))
    place([top, left, right, bottom], [Edge(top, left), Edge(top, right), Edge(left, bottom), Edge(right, bottom)])
    assert top.x == pytest.approx(bottom.x)
    assert top.x - left.x == pytest.approx(right.x - top.x)
    assert left.y == right.y


def test_a_chain_is_straight():
    boxes = [Box(60 + i, 30) for i in range(50)]
    place(boxes, [Edge(a, b) for a, b in zip(boxes, boxes[1:], strict=False)])
    assert max(box.x for box in boxes) - min(box.x for box in boxes) < 0.5


def test_a_parameter_stands_beside_its_use():
    chain = [Box(60, 30) for _ in range(9)]
    parameter, transposed = Box(60, 30), Box(60, 30)
    links = [Edge(a, b) for a, b in zip(chain, chain[1:], strict=False)]
    place([*chain, parameter, transposed], [*links, Edge(parameter, transposed), Edge(transposed, chain[7])])
    assert transposed.y == chain[6].y
    assert parameter.y == chain[5].y


def test_colours_of_a_joint_graph(tmp_path):
    gm, joint_inputs = joint_graph()
    picture = draw_joint_graph(gm, joint_inputs, str(tmp_path / "joint.svg"))
    later = set()  # independently: what depends on a tangent
    for node in gm.graph.nodes:
        if node.name.endswith("tangent_1") or any(i in later for i in node.all_input_nodes):
            later.add(node)

    def users(node):
        return [u for user in node.users for u in (users(user) if "getitem" in user.name else [user])]

    checked = 0
    for node in gm.graph.nodes:
        if node.op == "output" or "getitem" in node.name:
            continue
        box, checked = box_of(picture, node.name), checked + 1
        is_saved = node not in later and any(u in later and u.op != "output" for u in users(node))
        assert (box.stroke == "#d97706") == is_saved
        if node.op == "placeholder":
            expected = _draw._TANGENT if node in later else _draw._INPUT
        else:
            expected = _draw._BACKWARD if node in later else _draw._KEPT if is_saved else _draw._FORWARD
        assert box.fill == expected.fill
    assert checked > 15
    texts = words(picture)
    assert [t for t in texts if t.startswith("gradient of")] == [
        "gradient of x_1",
        "gradient of weight_1",
        "gradient of bias_1",
    ]
    assert "output 0" in texts
    assert "output 1" in texts
    assert "log_softmax" not in texts  # names are those of the operators
    assert "_log_softmax" in texts
    legend = texts[1 : 1 + 7]
    assert legend == ["input", "tangent", "forward", "saved for backward", "backward", "output", "gradient"]


def test_backward_nodes_are_known_by_their_tag(tmp_path):
    gm = make_fx(lambda x: [x.sin(), x.cos().exp()])(torch.rand(3))
    for node in gm.graph.nodes:
        if node.name == "exp":
            node.meta["partitioner_tag"] = "is_backward"
    picture = draw_graph(gm, str(tmp_path / "graph.svg"))
    assert box_of(picture, "exp").fill == _draw._BACKWARD.fill
    assert box_of(picture, "cos").fill == _draw._KEPT.fill
    assert box_of(picture, "sin").fill == _draw._FORWARD.fill


def test_saved_outputs_and_parameters(tmp_path):
    gm = make_fx(lambda x, w: [(x * w).exp(), x])(torch.rand(3), torch.rand(3))
    gm.graph.find_nodes(op="placeholder")[1].meta["val"] = torch.nn.Parameter(torch.rand(3))
    picture = draw_graph(gm, str(tmp_path / "graph.svg"), num_fwd_outputs=1)
    assert "output 0" in words(picture)
    assert "saved 0" in words(picture)
    assert box_of(picture, "w_1").fill == _draw._PARAMETER.fill


def test_words_fit_into_their_boxes(tmp_path):
    gm, joint_inputs = joint_graph()
    picture = draw_joint_graph(gm, joint_inputs, str(tmp_path / "joint.svg"))
    for box in rectangles(picture):
        inside = [
            s
            for s in picture.shapes
            if isinstance(s, Words) and box.x < s.x < box.x + box.width and box.y < s.y < box.y + box.height
        ]
        assert len(inside) in (1, 2)
        for text in inside:
            assert len(text.text) * CHARACTER * text.size <= box.width - 10


def test_lines_of_a_traced_graph(tmp_path):
    gm, joint_inputs = joint_graph()
    picture = draw_joint_graph(gm, joint_inputs, str(tmp_path / "joint.svg"))
    lines = [s for s in picture.shapes if isinstance(s, Line)]
    shown = {n: n.args[0] if "getitem" in n.name else n for n in gm.graph.nodes}
    expected = {
        (shown[i], n) for n in gm.graph.nodes if n.op != "output" and "getitem" not in n.name for i in n.all_input_nodes
    }
    assert len(lines) == len(expected) + len(gm.graph.output_node().args[0])


def test_svg_is_well_formed_and_says_what_is_where(tmp_path):
    path = tmp_path / "made" / "graph.svg"
    gm = make_fx(lambda x: torch.where(x < 1, x, x.double()))(torch.rand(2, 3))
    for node in gm.graph.nodes:
        node.stack_trace = 'File "/home/model.py", line 12, in forward\n    y = where(x < 1, x & x)'
    picture = draw_graph(gm, str(path), "a < b & c")
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    assert root.tag == SVG + "svg"
    assert root.find(SVG + "title").text == "a < b & c"
    texts = [text.text for text in root.iter(SVG + "text")]
    assert {"x_1", "f32[2, 3]", "lt", "b8[2, 3]", "where", "f64[2, 3]", "output"} <= set(texts)
    tooltips = [title.text for rect in root.iter(SVG + "rect") for title in rect.iter(SVG + "title")]
    assert "lt = aten.lt.Scalar\nb8[2, 3]\nmodel.py:12\ny = where(x < 1, x & x)" in tooltips
    background = next(root.iter(SVG + "rect"))
    assert (background.get("width"), background.get("fill")) == ("100%", "#ffffff")
    assert picture._repr_svg_() == path.read_text(encoding="utf-8")
    assert repr(picture).endswith(f"written to {path}>")


def test_what_options_show(tmp_path):
    gm = make_fx(lambda x: x.t().sin())(torch.rand(2, 3))
    for node in gm.graph.nodes:
        node.stack_trace = 'File "/home/model.py", line 12, in forward\n    y = x.t()'
    path = str(tmp_path / "graph")
    plain = words(draw_graph(gm, path))
    assert "f32[3, 2]" in plain
    assert "model.py:12" not in plain
    assert "model.py:12" in words(draw_graph(gm, path, parse_stack_trace=True))
    assert "f32[3, 2] (1, 3) cpu" in words(draw_graph(gm, path, clear_meta=False))
    assert box_of(draw_graph(gm, path, dot_graph_shape="box"), "t").radius == 0
    assert box_of(draw_graph(gm, path, dot_graph_shape="ellipse"), "t").radius > 10
    assert (tmp_path / "graph.svg").exists()


def test_symbolic_shapes_numbers_and_results_of_several_values(tmp_path):
    gm = make_fx(lambda x: [torch.var_mean(x, dim=0)[1], x.shape[0] * 2], tracing_mode="symbolic")(torch.rand(4, 3))
    shapes = {str(s) for s in gm.graph.find_nodes(op="placeholder")[0].meta["val"].shape}
    texts = words(draw_graph(gm, str(tmp_path / "graph.svg")))
    assert any(t.startswith("f32[") and all(s in t for s in shapes) for t in texts)
    assert any(t.endswith(" and 1 more") for t in texts)
    assert any(t.startswith("SymInt 2*s") for t in texts)
    assert "getitem" not in texts


def test_frames_of_modules(tmp_path):
    gm = make_fx(lambda x: (x.sin().cos() + 1).exp().log() * x.tanh())(torch.rand(3))
    paths = {"sin": "Net.first", "cos": "Net.first", "exp": "Net.last.inner", "log": "Net.last.inner"}
    for node in gm.graph.nodes:
        if node.name in paths:
            node.meta["nn_module_stack"] = {"1": ("Net", torch.nn.Module), "2": (paths[node.name], torch.nn.Module)}
    picture = draw_graph(gm, str(tmp_path / "graph.svg"))
    frames = {s.tooltip: s for s in picture.shapes if isinstance(s, Rectangle) and s.stroke == _draw._FRAME}
    assert set(frames) <= {"first", "last.inner"}
    assert frames
    assert set(frames) <= set(words(picture))
    for path, frame in frames.items():
        for node in gm.graph.nodes:
            if node.op == "output":
                continue
            box = box_of(picture, node.name)
            is_inside = frame.x < box.x < frame.x + frame.width and frame.y < box.y < frame.y + frame.height
            assert is_inside == (paths.get(node.name) == f"Net.{path}")
    assert "first" in box_of(picture, "sin").tooltip


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("PNG", b"\x89PNG")])
def test_other_formats(suffix, start, tmp_path):
    gm, joint_inputs = joint_graph()
    path = tmp_path / f"graph.{suffix}"
    picture = draw_joint_graph(gm, joint_inputs, str(path))
    assert path.read_bytes().startswith(start)
    if suffix == "png":
        from matplotlib.image import imread

        pixels = imread(path)
        assert pixels.shape[:2] == pytest.approx((picture.height * 2, picture.width * 2), abs=2)
        tangent = box_of(picture, "out_tangent_1")
        x, y = (tangent.x + tangent.width / 2) * 2, (tangent.y + 5) * 2
        color = "#" + "".join(f"{round(float(c) * 255):02x}" for c in pixels[int(y), int(x), :3])
        assert color == _draw._TANGENT.fill


def test_says_that_matplotlib_is_missing(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    gm = make_fx(torch.sin)(torch.rand(3))
    with pytest.raises(
        ImportError, match=r"^draw_graph: got the file name .*graph.png', expected matplotlib .*pip install"
    ):
        draw_graph(gm, str(tmp_path / "graph.png"))
    draw_graph(gm, str(tmp_path / "graph.svg"))


@pytest.mark.parametrize("name", ["graph.dot", "graph.jpeg"])
def test_refuses_other_formats(name):
    with pytest.raises(ValueError, match=rf"^draw_graph: got the file name '{name}', expected one that ends with .svg"):
        draw_graph(make_fx(torch.sin)(torch.rand(3)), name)


def test_refuses_programs_and_shapes(tmp_path):
    gm, path = make_fx(torch.sin)(torch.rand(3)), str(tmp_path / "graph.svg")
    with pytest.raises(ValueError, match=r"^draw_graph: got prog='neato', expected None, .*; leave it out"):
        draw_graph(gm, path, prog="neato")
    with pytest.raises(
        ValueError, match=r"^draw_graph: got dot_graph_shape='star', expected one of .*'box'.*; leave it"
    ):
        draw_graph(gm, path, dot_graph_shape="star")


def test_other_kinds_of_nodes(tmp_path):
    root = torch.nn.Module()
    root.weight, root.layer = torch.nn.Parameter(torch.ones(2)), torch.nn.Linear(2, 2)
    graph = fx.Graph()
    x = graph.call_module("layer", (graph.placeholder("x"),))
    graph.output({"a": graph.call_method("view", (graph.call_function(torch.add, (x, graph.get_attr("weight"))), -1))})
    picture = draw_graph(fx.GraphModule(root, graph), str(tmp_path / "graph.svg"))
    assert {"layer", "weight", "add", "view", "parameter"} <= set(words(picture))
    empty = fx.Graph()
    empty.output(None)
    draw_graph(fx.GraphModule(root, empty), str(tmp_path / "empty.svg"))


def test_the_graph_stays_as_it_is_and_pictures_are_the_same_each_time(tmp_path):
    gm, joint_inputs = joint_graph()
    code, meta = gm.code, [dict(node.meta) for node in gm.graph.nodes]
    first = draw_joint_graph(gm, joint_inputs, str(tmp_path / "a.svg"))
    second = draw_joint_graph(gm, joint_inputs, str(tmp_path / "b.svg"))
    assert first.svg == second.svg
    assert gm.code == code
    assert [dict(node.meta) for node in gm.graph.nodes] == meta
