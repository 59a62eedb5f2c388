"""Run a model once on a batch of independent examples, and find each parameter's gradient as a sum of terms.

The model runs at a vmap level, which makes examples independent by construction, on top of an autodiff level. One
backward pass finds the cotangents of what the recorded calls returned. Where a parameter reached the loss past the
recorded calls, everything is done again with `vmap` of `grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from functorch_lite import _C, _checks, _per_sample_checks, _tree
from functorch_lite._modules import functional_call
from functorch_lite._per_sample_rules import RULES
from functorch_lite._per_sample_terms import Dense, Term, Total
from functorch_lite._per_sample_uses import Source, UnseenUse, Uses
from functorch_lite._vjp import grad
from functorch_lite._vmap import map_rows, vmap


@dataclass(frozen=True)
class State:
    """What a model is called with."""

    params: dict[str, Tensor]
    constants: dict[str, Tensor]


class Batch:
    """The examples: leaves of ``(input, *targets)``, of which the tensors have them in front."""

    def __init__(self, called: str, batch: Any, batch_dim: int | None) -> None:
        _per_sample_checks.check_batch(called, batch)
        self._leaves, self._spec = _tree.flatten(tuple(batch))
        inputs = len(_tree.flatten(batch[0])[0])
        self._places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        dims = [0 if batch_dim is None or i >= inputs else batch_dim for i in self._places]
        self.size = _per_sample_checks.batch_size(called, batch, [self._leaves[i] for i in self._places], dims)
        self.tensors = [self._leaves[i].movedim(dim, 0) for i, dim in zip(self._places, dims, strict=True)]

    def filled(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """``(input, *targets)`` with other tensors."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        batch: tuple[Any, ...] = _tree.unflatten(leaves, self._spec)
        return batch


class PerSample:
    """A model and a loss, and what is done with the gradients of each example's loss."""

    def __init__(self, called: str, model: nn.Module, loss: Callable[..., Any], batch_dim: int | None) -> None:
        _checks.check_module(called, model)
        _checks.check_callable(called, loss)
        _per_sample_checks.check_batch_dim(called, batch_dim)
        self.called, self.model, self.loss, self.batch_dim = called, model, loss, batch_dim
        #: Whether a parameter was used past the recorded calls: it will be again.
        self._falls_back = False

    def terms(self, params: Any, batch: Any) -> dict[str, Total]:
        """The gradient of each given parameter."""
        state = self._state(params)
        examples = Batch(self.called, batch, self.batch_dim)
        if examples.size == 0:
            return {name: Total([], p, 0) for name, p in state.params.items()}
        self._check_batch_norm()
        if not self._falls_back:
            try:
                return self._from_calls(state, examples)
            except UnseenUse:
                self._falls_back = True
        return self._from_transforms(state, examples)

    def _check_batch_norm(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, _NormBase) and module.training and module.track_running_stats:
                _per_sample_checks.refuse_batch_norm(self.called, name, module)

    def _state(self, params: Any) -> State:
        """The given parameters; the given buffers and the model's own parameters are constants."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        _per_sample_checks.check_params(self.called, self.model, params, own)
        given = {id(own[name]) for name in params if name in own}
        rest = {id(p): (name, p) for name, p in reversed(own.items()) if id(p) not in given}
        return State(
            {name: p for name, p in params.items() if name in own},
            {name: p.detach() for name, p in rest.values()} | {n: x for n, x in params.items() if n not in own},
        )

    def _loss_of_one(self, state: dict[str, Tensor], example: tuple[Any, ...]) -> Tensor:
        input, *targets = example
        dim = self.batch_dim
        if dim is not None:
            input = _tree.map_tensors(lambda x: x.unsqueeze(dim), input)
        output = functional_call(self.model, state, input)
        if self.batch_dim is not None:
            output = self._without_batch(output)
        value: Tensor = self.loss(output, *targets)
        _checks.check_scalar_output(self.called, self.loss, value)
        return value

    def _without_batch(self, output: Any) -> Any:
        """The output for the one example of a batch."""
        assert self.batch_dim is not None
        leaves, spec = _tree.flatten(output)
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) or leaf.dim() == 0:
                continue
            dim = self.batch_dim
            if not -leaf.dim() <= dim < leaf.dim() or leaf.shape[dim] != 1:
                _per_sample_checks.refuse_output(self.called, self.model, _tree.paths(output)[i], leaf, dim)
            leaves[i] = leaf.squeeze(dim)
        return _tree.unflatten(leaves, spec)

    def _from_transforms(self, state: State, examples: Batch) -> dict[str, Total]:
        """By `vmap` of `grad`."""

        def loss(params: dict[str, Tensor], *tensors: Tensor) -> Tensor:
            return self._loss_of_one({**state.constants, **params}, examples.filled(tensors))

        in_dims = (None, *[0] * len(examples.tensors))
        gradients = vmap(grad(loss), in_dims, randomness="different")(state.params, *examples.tensors)
        return {name: Total([Dense(gradients[name])], p, examples.size) for name, p in state.params.items()}

    def _from_calls(self, state: State, examples: Batch) -> dict[str, Total]:
        """By the recorded calls."""
        autodiff = _C.AutodiffLevel(False, self.called)
        with autodiff:
            seen = {name: autodiff.lift_variable(p) for name, p in state.params.items()}
            with _C.VmapLevel(examples.size, _C.Randomness.different) as level:
                uses = Uses(autodiff, level, RULES)
                sources = {name: uses.add(tensor) for name, tensor in seen.items()}
                lifted = examples.filled([level.lift(x, 0) for x in examples.tensors])
                with uses:
                    value = self._loss_of_one({**state.constants, **seen}, lifted)
                losses, dim = level.unwrap(value)
            if dim is None:
                losses = losses.expand(examples.size)
        uses.check_unwritten()
        terms = terms_of(autodiff, losses, list(sources.values()), list(uses.sources.values()))
        return {
            name: Total(terms[source], p, examples.size)
            for (name, source), p in zip(sources.items(), state.params.values(), strict=True)
        }


def terms_of(
    autodiff: _C.AutodiffLevel, losses: Tensor, parameters: list[Source], sources: list[Source]
) -> dict[Source, list[Term]]:
    """The terms of each parameter's gradient, by one backward pass."""
    results = list({id(result): result for source in sources for result, _ in source.uses}.values())
    ones = torch.ones_like(autodiff.value_of(losses))
    found = autodiff.backward([losses], [ones], [*results, *(source.tensor for source in parameters)], False)
    if any(cotangent is not None for cotangent in found[len(results) :]):
        raise UnseenUse
    cotangents = {id(result): cotangent for result, cotangent in zip(results, found, strict=False)}
    terms: dict[Source, list[Term]] = {}
    with no_autocast({"losses": losses}):
        for source in sources:
            used = ((make, cotangents[id(result)]) for result, make in source.uses)
            terms[source] = [make(cotangent) for make, cotangent in used if cotangent is not None]
    _pull_back_computed(autodiff, parameters, terms)
    return terms


def _pull_back_computed(autodiff: _C.AutodiffLevel, parameters: list[Source], terms: dict[Source, list[Term]]) -> None:
    """From what was computed from parameters to these."""
    computed = [source for source in terms if terms[source] and source not in parameters]
    if not computed:
        return
    totals = [Total(terms[source], autodiff.value_of(source.tensor), 0).gradients() for source in computed]
    variables = [source.tensor for source in parameters]

    def pull(*gradients: Tensor) -> list[Tensor | None]:
        return autodiff.backward([source.tensor for source in computed], gradients, variables, True)

    pulled = map_rows(pull, totals, totals[0].shape[0], 0, "error")
    for source, gradients in zip(parameters, pulled, strict=True):
        if gradients is not None:
            terms[source].append(Dense(gradients))


def no_autocast(tensors: dict[str, Tensor]) -> AbstractContextManager[Any]:
    """Terms are summed in the dtype of the parameters, wherever autocast let the model run in another one."""
    device = next(iter(tensors.values())).device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
