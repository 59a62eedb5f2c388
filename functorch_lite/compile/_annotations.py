"""Where the nodes of a traced graph come from: source lines, modules, and the pass in which they ran."""

from __future__ import annotations

import bisect
import linecache
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
LIBRARIES = (_PACKAGE, os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.__file__) + os.sep)

#: Where the traced function and its backward pass are called.
_RUN = os.path.join(os.path.dirname(__file__), "_run.py")
_MODULES = os.path.dirname(nn.modules.__file__) + os.sep

#: On nodes that ran during the backward pass.
BACKWARD_TAG = "is_backward"


def is_backward(node: fx.Node) -> bool:
    """Whether the node was traced during the backward pass."""
    return node.meta.get("partitioner_tag") == BACKWARD_TAG


class Annotations(TorchDispatchMode):
    """Marks nodes while they are traced. A node of the backward pass has the source of the forward node it belongs to.

    Autograd numbers the operations of the forward pass, and its nodes remember their number: that tells which belongs
    to which.
    """

    supports_higher_order_operators = True

    def __init__(self, graph: fx.Graph, modules: ModuleStack) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph, self._modules = graph, modules
        self._sources: dict[int, dict[str, Any]] = {}
        self._numbers: list[int] = []  # sorted
        self._seen = len(graph.nodes)
        self.in_backward = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if len(self._graph.nodes) > self._seen:
            self._mark(self._meta())
        return result

    def _mark(self, meta: dict[str, Any]) -> None:
        node = self._graph._root.prev
        for _ in range(len(self._graph.nodes) - self._seen):
            node.meta.update(meta)
            node = node.prev
        self._seen = len(self._graph.nodes)

    def _meta(self) -> dict[str, Any]:
        if source := getattr(_running, "source", None):
            return dict(source)
        meta: dict[str, Any] = {}
        if trace := _user_stack():
            meta["stack_trace"] = trace
        if self.in_backward:
            return {**self._source_of_running_node(), **meta, "partitioner_tag": BACKWARD_TAG}
        if self._modules.current:
            meta["nn_module_stack"] = dict(self._modules.current)
        # The operator that is running took its number before it came here.
        number = torch._C._autograd._get_sequence_nr() - 1
        if number not in self._sources:
            bisect.insort(self._numbers, number)
            self._sources[number] = meta
        return meta

    def _source_of_running_node(self) -> dict[str, Any]:
        """That of the operator that made it."""
        running = torch._C._current_autograd_node()
        if running is None:
            return {}
        # An operator may take several numbers, and is known by the last. A node for a write through a view is made
        # when the operator has run.
        number = running._sequence_nr()
        before = reversed(self._numbers[: bisect.bisect_right(self._numbers, number)])
        after = self._numbers[bisect.bisect_left(self._numbers, number) :]
        candidates = [*before, *after] if running.name() == "CopySlices" else [*after[:1], *before]
        return next((source for i in candidates if (source := self._sources[i])), {})


def _user_stack() -> str:
    """The frames of user code that the traced function, or its backward pass, is in, as a traceback prints them.

    Where a library calls itself, its innermost module stands for the user's code.
    """
    lines: list[str] = []
    module = ""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _begins_run(frame):
        name = frame.f_code.co_filename
        if not name.startswith(LIBRARIES):
            lines.append(_line(frame))
        elif name.startswith(_MODULES) and frame.f_code.co_name == "forward":
            module = module or _line(frame)
        frame = frame.f_back
    return ("".join(reversed(lines)) or module) if frame is not None else ""


def _begins_run(frame: FrameType) -> bool:
    return frame.f_code.co_filename == _RUN and frame.f_code.co_name in ("forward", "backward")


def _line(frame: FrameType) -> str:
    name = frame.f_code.co_filename
    code = linecache.getline(name, frame.f_lineno).strip() or "(the source is not known)"
    return f'  File "{name}", line {frame.f_lineno}, in {frame.f_code.co_name}\n    {code}\n'


_running = threading.local()


class SourceKeeper(fx.Interpreter):
    """Runs a graph, so that the nodes of another graph that is traced meanwhile have the sources of its nodes."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        _running.source = {key: n.meta[key] for key in ("stack_trace", "nn_module_stack") if key in n.meta}
        try:
            return super().run_node(n)
        finally:
            _running.source = None


class ModuleStack:
    """The modules that are running, outermost first, and all that have run."""

    def __init__(self) -> None:
        #: key -> (path, class), the form in which torch.fx keeps it.
        self.current: dict[str, tuple[str, type]] = {}
        self._running: list[tuple[nn.Module, str]] = []
        self.seen: dict[nn.Module, None] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follows all calls of modules in the enclosed code."""
        before = module_hooks.register_module_forward_pre_hook(self._enter)
        after = module_hooks.register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        path = type(module).__name__
        if self._running:
            parent, parent_path = self._running[-1]
            names = [name for name, child in parent.named_children() if child is module]
            path = f"{parent_path}.{names[0] if names else path}"
        self._running.append((module, path))
        self.seen[module] = None
        self.current[str(len(self._running))] = (path, type(module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.current.pop(str(len(self._running)), None)
        self._running.pop()
