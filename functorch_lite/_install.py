"""Import: check that the extension fits the running torch, then connect its two halves."""

import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def check_torch_version(built_for: str, running: str) -> None:
    """Raise an ImportError that tells how to rebuild if the two versions differ."""
    if built_for != running:
        raise ImportError(
            f"functorch_lite was built for torch {built_for}, but torch {running} is running. Build it again in its "
            f"source directory:\n    {REBUILD}"
        )


def _built_for() -> str:
    try:
        from functorch_lite._built_for import TORCH_VERSION
    except ImportError:
        raise ImportError(
            f"functorch_lite's C++ extension is not built. Build it in the source directory:\n    {REBUILD}"
        ) from None
    return TORCH_VERSION


check_torch_version(_built_for(), torch.__version__)


def connect() -> None:
    """Give the extension the Python functions that it calls."""
    from functorch_lite import (
        _C,
        _attention,
        _boundary,
        _checkpoint,
        _checks,
        _custom_function,
        _decompose,
        _functionalize,
        _library_rules,
        _new,
        _repr,
        _saved_tensors,
        _torch_autograd,
    )

    _C.set_python_side(
        _decompose.has_decomposition,
        _decompose.install_decomposition,
        _boundary.warn_loop,
        _boundary.user_location,
        _boundary.name_of_tensor,
        _checks.EscapedTensorError,
        _attention.attend_in_chunks,
        _attention.attend_backward,
        _functionalize.call_auto_functionalized,
    )
    _repr.install()
    _new.install()
    _custom_function.install()
    _checkpoint.install()
    _saved_tensors.install()
    _torch_autograd.install()
    _library_rules.install()
    import_after("torch._dynamo", "functorch_lite._dynamo")


class _After(importlib.abc.MetaPathFinder):
    """Finds a module as Python does, and has another one imported when its code has run."""

    def __init__(self, name: str, then: str) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_both(module: ModuleType) -> None:
            execute(module)
            _import_or_warn(self.then)

        spec.loader.exec_module = execute_both  # type: ignore[method-assign]
        return spec


def _import_or_warn(name: str) -> None:
    from functorch_lite import _checks

    try:
        importlib.import_module(name)
    except (ImportError, AttributeError) as error:  # it uses what PyTorch may change
        warnings.warn(_checks.no_torch_compile(error), stacklevel=2)


def import_after(name: str, then: str) -> None:
    """Import ``then`` when ``name`` is imported, now or later: it is slow to import, and may never be needed."""
    if name in sys.modules:
        _import_or_warn(then)
    else:
        sys.meta_path.insert(0, _After(name, then))
