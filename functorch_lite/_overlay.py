"""Our transforms in the places where other packages look for PyTorch's, and back.

A *stand-in* is put in the place of each public function of `torch.func` and `functorch` that we have. It calls ours,
unless PyTorch itself is the caller. Modules that are loaded and hold PyTorch's function by a name of their own get it,
too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, TracebackType
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from functorch_lite import _ensemble, _functionalize, _jacobian, _jvp, _legacy, _linear, _modules, _vjp, _vmap

#: The modules of PyTorch that offer its transforms to others. The last ones have private names, and packages use them.
_PLACES = (
    "torch",
    "torch.func",
    "torch._functorch.deprecated",  # what `functorch` exports
    "torch._functorch.make_functional",
    "torch._functorch.batch_norm_replacement",
    "torch._functorch.apis",
    "torch._functorch.eager_transforms",
    "torch._functorch.functional_call",
)


def _jacrev(*args: Any, _preallocate_and_copy: bool = False, **kwargs: Any) -> Callable[..., Any]:
    """Memory for the result is always taken once."""
    return _jacobian.jacrev(*args, **kwargs)


def _vjp_of_theirs(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """The pullback may be called many times, and has a graph if somebody differentiates further out."""
    output, vjp_fn, *aux = _vjp.vjp(*args, **kwargs)

    def pull(cotangents: Any, retain_graph: bool = True, create_graph: bool | None = None) -> Any:
        return vjp_fn(cotangents)

    return output, pull, *aux


def _functional_call(
    module: Any,
    parameter_and_buffer_dicts: Any,
    args: Any = None,
    kwargs: Any = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
) -> Any:
    """A name that the module does not have becomes an attribute of it during the call, unless ``strict``."""
    given = parameter_and_buffer_dicts
    with contextlib.ExitStack() as attributes:
        if not strict:
            dictionaries = [given] if isinstance(given, dict) else list(given)
            others = {name: value for one in dictionaries for name, value in one.items() if _is_no_tensor(module, name)}
            if others:
                given = [{name: value for name, value in one.items() if name not in others} for one in dictionaries]
            for name, value in others.items():
                attributes.enter_context(_attribute(module, name, value))
        return _modules.functional_call(module, given, args, kwargs, tie_weights=tie_weights, strict=strict)


def _is_no_tensor(module: nn.Module, name: str) -> bool:
    """Whether a submodule exists but has no parameter or buffer of this name."""
    path, _, key = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return False
    return not (key in owner._parameters or key in owner._buffers or parametrize.is_parametrized(owner, key))


@contextlib.contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    path, _, key = name.rpartition(".")
    attributes = module.get_submodule(path).__dict__
    before = dict(attributes)
    attributes[key] = value
    try:
        yield
    finally:
        attributes.pop(key)
        if key in before:
            attributes[key] = before[key]


_OURS: dict[str, Any] = {
    "combine_state_for_ensemble": _legacy.combine_state_for_ensemble,
    "functional_call": _functional_call,
    "functionalize": _functionalize.functionalize,
    "grad": _vjp.grad,
    "grad_and_value": _vjp.grad_and_value,
    "hessian": _jacobian.hessian,
    "jacfwd": _jacobian.jacfwd,
    "jacrev": _jacrev,
    "jvp": _jvp.jvp,
    "linearize": _linear.linearize,
    "make_functional": _legacy.make_functional,
    "make_functional_with_buffers": _legacy.make_functional_with_buffers,
    "replace_all_batch_norm_modules_": _modules.replace_all_batch_norm_modules_,
    "stack_module_state": _ensemble.stack_module_state,
    "vjp": _vjp_of_theirs,
    "vmap": _vmap.vmap,
}
_CLASSES: dict[str, Any] = {
    "FunctionalModule": _legacy.FunctionalModule,
    "FunctionalModuleWithBuffers": _legacy.FunctionalModuleWithBuffers,
}


def is_of_torch(name: str) -> bool:
    """Whether a module is PyTorch's."""
    return name.partition(".")[0] in ("torch", "functorch")


def torch_is_calling() -> bool:
    """Whether the caller of a stand-in is PyTorch, such as flex attention, which needs its own transforms."""
    return is_of_torch(sys._getframe(2).f_globals.get("__name__", ""))


def _stand_in(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if torch_is_calling():
            return theirs(*args, **kwargs)
        return ours(*args, **kwargs)

    # Name, docstring and signature are theirs, so that it pickles and prints as what it stands for.
    return functools.update_wrapper(stand_in, theirs, updated=())


@functools.cache
def _pairs() -> list[tuple[Any, Any]]:
    """(theirs, what stands in for it), for each public function; a function that has two names is there once."""
    pairs: dict[int, tuple[Any, Any]] = {}
    for place in map(importlib.import_module, _PLACES):
        for name, ours in _OURS.items():
            theirs = vars(place).get(name)
            if theirs is not None and id(theirs) not in pairs:
                pairs[id(theirs)] = theirs, _stand_in(theirs, ours)
        for name, ours in _CLASSES.items():
            theirs = vars(place).get(name)
            if theirs is not None:
                pairs[id(theirs)] = theirs, ours
    return list(pairs.values())


def _loaded(of_torch: bool) -> Iterator[ModuleType]:
    """The loaded modules, without ours; those of PyTorch, or the places among them only."""
    places = (*_PLACES, "functorch", "functorch.experimental")
    for name, module in list(sys.modules.items()):
        ours = not isinstance(module, ModuleType) or name.partition(".")[0] == "functorch_lite"
        if not ours and (of_torch or name in places or not is_of_torch(name)):
            yield module


def _exchange(new: dict[int, Any], modules: Iterator[ModuleType]) -> None:
    """Replace each value of a module that is a key of ``new``, an object's id."""
    for module in modules:
        names = vars(module)
        for name, value in list(names.items()):
            if id(value) in new:
                names[name] = new[id(value)]


_lock = threading.RLock()
_open = 0  # how many `with` blocks
_installed = False  # for the whole program
_placed = False


def _update() -> None:
    """Put ours in place, or take them back, as the two above say. The lock is held."""
    global _placed
    wanted = _installed or _open > 0
    if wanted and not _placed:
        _exchange({id(theirs): ours for theirs, ours in _pairs()}, _loaded(of_torch=False))
    if _placed and not wanted:
        # What PyTorch has imported meanwhile from its own modules is given back, too.
        _exchange({id(ours): theirs for theirs, ours in _pairs()}, _loaded(of_torch=True))
    _placed = wanted


def theirs_by_stand_in() -> dict[Any, Any]:
    """What each stand-in that is in place stands for."""
    return {ours: theirs for theirs, ours in _pairs()} if _placed else {}


class overlay:  # noqa: N801
    """Have other packages run on our transforms where they ask for `torch.func`, `functorch` or `torch.vmap`.

    For a part of a program use it as a context manager, for all of it call ``overlay.install()``, and
    ``overlay.remove()`` to end that. In force, ``torch.func.vmap`` and the like are ours: for attribute look-ups, for
    modules that are imported meanwhile, and for modules that had done ``from torch.func import vmap`` before. PyTorch's
    own code keeps its own transforms. When the last block has been left and nothing is installed, all is as before.

    Blocks nest, an exception ends its block as usual, and one object may be used again. Modules belong to the process,
    and so all threads see the overlay while one of them is inside of a block.

    Example:
        >>> import torch
        >>> from functorch_lite import level_depth, overlay
        >>> depth = lambda x: x * level_depth()
        >>> with overlay():
        ...     torch.func.vmap(depth)(torch.ones(2))
        tensor([1., 1.])
        >>> torch.func.vmap(depth)(torch.ones(2))
        tensor([0., 0.])

    Note:
        Functions are found where they are attributes of a module. What a package has put elsewhere before, such as a
        default argument or the result of ``torch.func.vmap(f)``, stays PyTorch's. So do the names that we do not have:
        docs/clients.md lists them.
    """

    def __enter__(self) -> overlay:
        global _open
        with _lock:
            _open += 1
            _update()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _open
        with _lock:
            _open -= 1
            _update()

    @staticmethod
    def install() -> None:
        """Put our transforms in place until `remove` is called. Once installed, another call changes nothing."""
        global _installed
        with _lock:
            _installed = True
            _update()

    @staticmethod
    def remove() -> None:
        """Undo `install`. Blocks that are open stay in force until they are left."""
        global _installed
        with _lock:
            _installed = False
            _update()
