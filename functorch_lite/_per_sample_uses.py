"""Where a model uses its parameters: a mode sees each call that takes one, and keeps what its gradients are made of."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from functorch_lite import _C
from functorch_lite._per_sample_terms import Term, Total, Wanted

# From the cotangent of what a call returned to a term of the parameter's gradient.
MakeTerm = Callable[[Tensor], Term]


class UnseenUse(Exception):
    """A parameter was used, or what it was used with was written, in a way that the calls do not show."""


@dataclass(eq=False)
class Source:
    """A parameter, or what was computed from parameters alone, and how the model used it."""

    #: As the model sees it.
    handle: Tensor
    #: The same at the autodiff level.
    tensor: Tensor
    version: int
    gradient: Total
    #: The value repeated for each example, a variable: what calls without a rule use, once there is one.
    repeated: Tensor | None = None


class _Tap(Function):
    """The identity. In the backward pass terms are made of the cotangent as soon as it is there."""

    @staticmethod
    def forward(
        ctx: Any, autodiff: _C.AutodiffLevel, known: list[tuple[Source, MakeTerm]], result: Tensor, token: Tensor
    ) -> Tensor:
        """A tensor of its own, as the model may write into it."""
        ctx.known = known
        ctx.set_materialize_grads(False)
        return autodiff.lift_constant(autodiff.value_of(result))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The cotangent of the result is its own."""
        (cotangent,) = grads
        if cotangent is not None:
            value = _C.strip_closed_levels(cotangent)
            with no_autocast(value):
                for source, make in ctx.known:
                    source.gradient.add(make(value))
            ctx.known = ()  # what terms were made of
        return None, None, cotangent, None


# Past the Python of Function.apply, which this package replaces, too.
_tap: Callable[..., Tensor] = super(Function, _Tap).apply


class Uses(TorchFunctionMode):
    """Watches a model that runs at a vmap level on top of an autodiff level."""

    def __init__(
        self,
        autodiff: _C.AutodiffLevel,
        vmap: _C.VmapLevel,
        rules: dict[Any, Callable[..., Any]],
        token: Tensor,
    ) -> None:
        super().__init__()
        self.autodiff, self.vmap, self._rules = autodiff, vmap, rules
        #: A variable that all recorded results depend on, so that the backward pass reaches them.
        self.token = token
        self.sources: dict[int, Source] = {}
        self._saved: list[tuple[Tensor, int]] = []

    def add(self, handle: Tensor, wanted: Wanted) -> Source:
        """Watch a tensor that all examples share."""
        tensor, dim = self.vmap.unwrap(handle)
        if dim is not None:  # what a random operator made of a parameter
            raise UnseenUse
        total = Total(self.autodiff.value_of(tensor), self.vmap.batch_size, wanted)
        self.sources[id(handle)] = source = Source(handle, tensor, tensor._version, total)
        return source

    def check_unwritten(self) -> None:
        """Require that nothing was written in place after it was used."""
        written = any(tensor._version != version for tensor, version in self._saved)
        if written or any(source.tensor._version != source.version for source in self.sources.values()):
            raise UnseenUse
        self._saved = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a call; one that takes a source by its rule."""
        kwargs = kwargs or {}
        if not self._has_source(args) and not (kwargs and self._has_source(kwargs.values())):
            return func(*args, **kwargs)
        if _C.current_level() is not self.vmap:
            return func(*args, **kwargs)  # inside a transform that the model calls
        rule = self._rules.get(func)
        if rule is not None:
            result = rule(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if self.same_for_all(*args, *kwargs.values()):
            return self._compute(func, args, kwargs)
        body = _body_of(func)
        if body is not None:
            with self:
                return body(*args, **kwargs)
        return func(*self._with_repeated(args), **{name: self._with_repeated(x) for name, x in kwargs.items()})

    # What rules use.

    def source_of(self, tensor: Any) -> Source | None:
        """The source that the model uses here, if it is one."""
        return self.sources.get(id(tensor))

    def same_for_all(self, *values: Any) -> bool:
        """Whether nothing here differs between examples."""
        for value in values:
            if isinstance(value, Tensor):
                if self.vmap.unwrap(value)[1] is not None:
                    return False
            elif isinstance(value, (list, tuple)) and not self.same_for_all(*value):
                return False
        return True

    def can_share(self, *tensors: Tensor | None) -> bool:
        """Whether all examples share these, and what they depend on is known: `shared` may take their values."""
        return all(
            tensor is None
            or id(tensor) in self.sources
            or (self.same_for_all(tensor) and not self.vmap.unwrap(tensor)[0].requires_grad)
            for tensor in tensors
        )

    def batch_of(self, tensor: Tensor) -> Tensor:
        """The value of a tensor that differs between examples, with these in front. For calls below the vmap level."""
        value, dim = self.vmap.unwrap(tensor)
        return value.movedim(dim, 0) if dim else value

    def shared(self, tensor: Tensor) -> Tensor:
        """The value of a tensor that all examples share, below the autodiff level."""
        return self.autodiff.value_of(self.vmap.unwrap(tensor)[0])

    def shared_or_none(self, tensor: Tensor | None) -> Tensor | None:
        """The same for an argument that may be left out."""
        return None if tensor is None else self.shared(tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        """The value below the autodiff level, for a term."""
        self._saved.append((tensor, tensor._version))
        return self.autodiff.value_of(tensor)

    def record(
        self, result: Tensor, *uses: tuple[Tensor | None, MakeTerm], shape: Sequence[int] | None = None
    ) -> Tensor:
        """Note that the cotangent of ``result`` makes terms for those of these tensors that are sources.

        Returns it as the model gets it, in ``shape``, whose first dimension is that of the examples.
        """
        known = [(source, make) for tensor, make in uses if (source := self.source_of(tensor)) is not None]
        for source, _ in known:
            source.gradient.uses += torch.is_grad_enabled()
        result = _tap(self.autodiff, known, result, self.token)
        return self.vmap.lift(result if shape is None else result.view(shape), 0)

    # Calls without a rule.

    def _has_source(self, values: Any) -> bool:
        return next(self._sources_in(values), None) is not None

    def _sources_in(self, values: Any) -> Iterator[Source]:
        sources = self.sources
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in sources:
                    yield sources[id(value)]
            elif isinstance(value, (list, tuple)):
                yield from self._sources_in(value)

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is computed from sources alone is a source, too."""
        result = func(*args, **kwargs)
        for leaf in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(leaf, Tensor) and id(leaf) not in self.sources and self.vmap.unwrap(leaf)[0].requires_grad:
                self.add(leaf, Wanted.GRADIENTS)
                for source in self._sources_in((*args, *kwargs.values())):
                    source.gradient.uses += 1
        return result

    def _with_repeated(self, value: Any) -> Any:
        """With each source as if every example had its own."""
        if isinstance(value, (list, tuple)) and self._has_source(value):
            return type(value)(map(self._with_repeated, value))
        source = self.source_of(value)
        if source is None:
            return value
        if source.repeated is None:
            with _C.Below():
                shared = self.autodiff.value_of(source.tensor)
                rows = self.autodiff.value_of(shared.expand(self.vmap.batch_size, *shared.shape))
                source.repeated = self.autodiff.lift_variable(rows)
            source.gradient.uses += 1
        return self.vmap.lift(source.repeated, 0)


_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Terms are summed in the dtype of the parameters, wherever autocast let the model run in another one."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


@functools.cache
def _body_of(func: Any) -> Callable[..., Any] | None:
    """A function of ``torch.nn.functional`` without the question whether a mode is there, so that it sees inside."""
    if not isinstance(func, types.FunctionType) or func.__globals__ is not vars(torch.nn.functional):
        return None
    namespace = {**func.__globals__, **dict.fromkeys(_CHECKS, lambda *args: False)}
    body = types.FunctionType(func.__code__, namespace, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body
