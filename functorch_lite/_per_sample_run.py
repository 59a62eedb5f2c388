"""Run a model once on a batch of independent examples, and find each parameter's gradient as a sum of terms.

The model runs at a vmap level, which makes examples independent by construction, on top of an autodiff level. One
backward pass finds the cotangents of what the recorded calls returned. Where a parameter reached the loss past the
recorded calls, everything is done again with `vmap` of `grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from functorch_lite import _C, _checks, _per_sample_checks, _tree
from functorch_lite._modules import functional_call
from functorch_lite._per_sample_rules import RULES
from functorch_lite._per_sample_terms import Dense, Total, Wanted
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

    def __init__(
        self, called: str, wanted: Wanted, model: nn.Module, loss: Callable[..., Any], batch_dim: int | None
    ) -> None:
        _checks.check_module(called, model)
        _checks.check_callable(called, loss)
        _per_sample_checks.check_batch_dim(called, batch_dim)
        self.called, self.wanted = called, wanted
        self.model, self.loss, self.batch_dim = model, loss, batch_dim
        #: Whether a parameter was used past the recorded calls: it will be again.
        self._falls_back = False

    def terms(self, params: Any, batch: Any) -> dict[str, Total]:
        """The gradient of each given parameter."""
        state = self._state(params)
        examples = Batch(self.called, batch, self.batch_dim)
        if examples.size == 0:
            return self._totals(state, examples)
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
        totals = self._totals(state, examples)
        for name, total in totals.items():
            total.add(Dense(gradients[name]))
        return totals

    def _totals(self, state: State, examples: Batch) -> dict[str, Total]:
        return {name: Total(p, examples.size, self.wanted) for name, p in state.params.items()}

    def _from_calls(self, state: State, examples: Batch) -> dict[str, Total]:
        """By the recorded calls."""
        autodiff = _C.AutodiffLevel(False, self.called)
        token = next(iter(state.params.values())).new_zeros(())
        with autodiff:
            seen = {name: autodiff.lift_variable(p) for name, p in state.params.items()}
            with _C.VmapLevel(examples.size, _C.Randomness.different) as level:
                uses = Uses(autodiff, level, RULES, autodiff.lift_variable(token))
                sources = {name: uses.add(tensor, self.wanted) for name, tensor in seen.items()}
                lifted = examples.filled([level.lift(x, 0) for x in examples.tensors])
                with uses:
                    value = self._loss_of_one({**state.constants, **seen}, lifted)
                losses, dim = level.unwrap(value)
            if dim is None:
                losses = losses.expand(examples.size)
        uses.check_unwritten()
        run_backward(uses, losses, list(sources.values()))
        return {name: source.gradient for name, source in sources.items()}


def run_backward(uses: Uses, losses: Tensor, parameters: list[Source]) -> None:
    """Find the gradient of each source. The recorded calls add their terms while this runs."""
    autodiff = uses.autodiff
    repeated = {source: source.repeated for source in uses.sources.values() if source.repeated is not None}
    ones = torch.ones_like(autodiff.value_of(losses))
    inputs = [uses.token, *repeated.values(), *(source.tensor for source in parameters)]
    _, *found = autodiff.backward([losses], [ones], inputs, False)
    if any(gradient is not None for gradient in found[len(repeated) :]):
        raise UnseenUse
    for source, gradient in zip(repeated, found, strict=False):
        if gradient is not None:
            source.gradient.add(Dense(gradient))
    _pull_back_computed(autodiff, parameters, [s for s in uses.sources.values() if s not in parameters])


def _pull_back_computed(autodiff: _C.AutodiffLevel, parameters: list[Source], computed: list[Source]) -> None:
    """From what was computed from parameters to these."""
    computed = [source for source in computed if not source.gradient.is_zero]
    if not computed:
        return
    rows = [source.gradient.gradients() for source in computed]
    variables = [source.tensor for source in parameters]

    def pull(*gradients: Tensor) -> list[Tensor | None]:
        return autodiff.backward([source.tensor for source in computed], gradients, variables, True)

    pulled = map_rows(pull, rows, rows[0].shape[0], 0, "error")
    for source, gradients in zip(parameters, pulled, strict=True):
        if gradients is not None:
            source.gradient.add(Dense(gradients))
