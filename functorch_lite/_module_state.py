"""Other tensors in the place of a module's own, and what becomes of the buffers that a call writes."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from functorch_lite import _C, _commits, _module_checks

#: Tensors that a module holds elsewhere, too: those of recurrent modules, and those of the hooks of weight_norm,
#: spectral_norm and pruning, which set an attribute in each call.
_RECURRENT = re.compile(r"(weight|bias)_(ih|hh|hr)_l\d+")
_OF_HOOK = re.compile(r"(.+)_(?:g|v|u|orig|mask)")

#: Two threads must not exchange the tensors of one module.
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
os.register_at_fork(after_in_child=_locks.clear)  # the threads that held them are not there


def lock_of(module: nn.Module) -> AbstractContextManager[Any]:
    """What a thread holds while it calls the module with other tensors."""
    if torch.compiler.is_compiling():
        return nullcontext()
    lock = _locks.get(module)
    return _locks.setdefault(module, threading.RLock()) if lock is None else lock


class Slots:
    """Where a module keeps its tensors, by all names of them."""

    def __init__(self, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            _module_checks.refuse_script("")
        self.owners: dict[str, nn.Module] = {}
        self.places: dict[str, tuple[dict[str, Any], str]] = {}
        #: None for an entry that is absent, as the bias of a layer without one.
        self.tensors: dict[str, Tensor | None] = {}
        self.buffers: list[str] = []
        for path, owner in module.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            self.owners[path] = owner
            if isinstance(owner, torch.jit.ScriptModule):
                continue
            for tensors in (owner._parameters, owner._buffers):
                for key, tensor in tensors.items():
                    self.places[prefix + key] = (tensors, key)
                    self.tensors[prefix + key] = tensor
            self.buffers += [prefix + key for key in owner._buffers]

    def owner(self, name: str) -> nn.Module | None:
        """The submodule that has a tensor of this name, or would have it."""
        return self.owners.get(name.rpartition(".")[0])

    def is_known(self, name: str) -> bool:
        """Whether a tensor can be given under a name: an entry, or what a parametrization computes."""
        owner = self.owner(name)
        if isinstance(owner, torch.jit.ScriptModule):
            _module_checks.refuse_script(name.rpartition(".")[0])
        key = name.rpartition(".")[2]
        return name in self.places or (owner is not None and key in getattr(owner, "parametrizations", ()))

    def names_of_each(self) -> list[list[str]]:
        """The names of each tensor."""
        groups: dict[Tensor, list[str]] = {}
        for name, tensor in self.tensors.items():
            if tensor is not None:
                groups.setdefault(tensor, []).append(name)
        return list(groups.values())

    def now(self, name: str) -> Tensor | None:
        """What the module has in an entry."""
        tensors, key = self.places[name]
        tensor: Tensor | None = tensors[key]
        return tensor

    def put(self, values: Mapping[str, Tensor | None]) -> None:
        """Put tensors into entries."""
        for name, value in values.items():
            tensors, key = self.places[name]
            tensors[key] = value


@contextmanager
def swapped(slots: Slots, given: Mapping[str, Tensor | None]) -> Iterator[None]:
    """While it is entered, the module has the given tensors."""
    entries = {name: tensor for name, tensor in given.items() if name in slots.places}
    derived = _derived_attributes(slots, entries)
    with _without_parametrizations(slots, given) if len(entries) < len(given) else nullcontext():
        try:
            slots.put(entries)
            yield
        finally:
            slots.put({name: slots.tensors[name] for name in entries})
            for attributes, key, value in derived:
                attributes[key] = value
            _update_recurrent(slots, entries)


def _derived_attributes(slots: Slots, names: Iterable[str]) -> list[tuple[dict[str, Any], str, Any]]:
    found = []
    for name in names:
        key = _OF_HOOK.fullmatch(slots.places[name][1])
        owner = slots.owner(name) if key is not None else None
        if key is not None and owner is not None and isinstance(owner.__dict__.get(key[1]), Tensor):
            found.append((owner.__dict__, key[1], owner.__dict__[key[1]]))
    return found


@contextmanager
def _without_parametrizations(slots: Slots, given: Mapping[str, Tensor | None]) -> Iterator[None]:
    """Given tensors in the place of those that parametrizations compute, as attributes of a class that hides them."""
    by_owner: dict[nn.Module, dict[str, Any]] = {}
    for name in given.keys() - slots.places.keys():
        path, _, key = name.rpartition(".")
        by_owner.setdefault(slots.owners[path], {})[key] = given[name]
    classes = {owner: type(owner) for owner in by_owner}
    try:
        for owner, attributes in by_owner.items():
            owner.__class__ = type(classes[owner].__name__, (classes[owner],), attributes)
        yield
    finally:
        for owner, cls in classes.items():
            owner.__class__ = cls


def _update_recurrent(slots: Slots, names: Iterable[str]) -> None:
    """Recurrent modules have a list of their weights, which otherwise keeps the given ones until the next call."""
    paths = {name.rpartition(".")[0] for name in names if _RECURRENT.fullmatch(slots.places[name][1])}
    for path in paths:
        owner = slots.owners[path]
        if isinstance(owner, nn.RNNBase):
            owner._update_flat_weights()


class Copies:
    """Copies of a module's buffers, or of those that are given for them, for a call to write."""

    def __init__(self, slots: Slots, given: Mapping[str, Tensor | None], commits: bool) -> None:
        self._slots = slots
        targets = {name: given.get(name, slots.tensors[name]) for name in slots.buffers}
        self._targets = {name: target for name, target in targets.items() if target is not None}
        # Of a tensor with several names, one.
        self._copies: dict[Tensor, Tensor] = {}
        for target in self._targets.values():
            if target not in self._copies:
                self._copies[target] = (_commits.current(target) if commits else target).clone()
        self._versions = {target: _version(copy) for target, copy in self._copies.items()}
        self.given = {name: self._copies[target] for name, target in self._targets.items()}

    def written(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, the tensor that was copied, what it has become) of what the call has written, once for each."""
        seen: set[Tensor] = set()
        for name, target in self._targets.items():
            value = self._slots.now(name)
            if target in seen or value is None or not self._is_written(target, value):
                continue
            seen.add(target)
            yield name, target, value

    def now(self) -> dict[str, Tensor]:
        """All buffers after the call, each under one name."""
        names = {target: name for name, target in reversed(self._targets.items())}
        values = {name: self._slots.now(name) for name in reversed(names.values())}
        return {name: value for name, value in values.items() if value is not None}

    def _is_written(self, target: Tensor, value: Tensor) -> bool:
        copy = self._copies[target]
        return value is not copy or was_written(target, copy, self._versions[target])

    def refuse_writes(self) -> None:
        """Raise if the call has written a buffer."""
        for name, _, _ in self.written():
            _module_checks.refuse_write(name, self._slots.owners[name.rpartition(".")[0]])

    def commit(self) -> None:
        """Have what the call has written be written into what was copied."""
        for name, target, value in self.written():
            _commits.commit(target, value, name)


def _version(copy: Tensor) -> int | None:
    """None if writes are not counted: in inference mode, and in a graph of torch.compile."""
    if torch.compiler.is_compiling() or _C.innermost_value(copy).is_inference():
        return None
    return copy._version


def was_written(original: Tensor, copy: Tensor, version: int | None) -> bool:
    """Whether a copy is not what it was. Batch-norm kernels write one-dimensional tensors and do not count it."""
    if version is not None:
        if copy._version != version:
            return True
        if copy.dim() != 1 or not copy.is_floating_point():
            return False
    values = [_C.innermost_value(tensor) for tensor in (original, copy)]
    if any(isinstance(value, FakeTensor) or value.is_meta for value in values):
        return True
    with _C.Outside(), torch.no_grad():
        return not torch.equal(*values)
