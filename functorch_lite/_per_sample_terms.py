"""What one use of a parameter adds to its gradient: each example's part, its norm, and weighted sums over examples."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = Sequence[int]


class Term:
    """A term of a parameter's gradient, one for each of ``batch_size`` examples."""

    def gradients(self) -> Tensor:
        """Each example's: (examples, *shape of the parameter)."""
        raise NotImplementedError

    def gradients_are_cheaper(self) -> bool:
        """Than what has the same norms and sums."""
        return False

    def square_norms(self) -> Tensor:
        """Of each example's."""
        raise NotImplementedError

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Of all examples', in the parameter's shape."""
        raise NotImplementedError


class Dense(Term):
    """A term that is small, or is known in full anyway."""

    def __init__(self, gradients: Tensor) -> None:
        self._gradients = gradients

    def gradients(self) -> Tensor:
        return self._gradients

    def gradients_are_cheaper(self) -> bool:
        return True


class Product(Term):
    """A sum over places of outer products of a cotangent and an input, in groups: linear layers, convolutions."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Cotangents (examples, groups, places, outputs) and inputs (examples, groups, places, inputs)."""
        raise NotImplementedError

    def shape(self) -> Shape:
        """Of the parameter."""
        raise NotImplementedError

    def gradients(self) -> Tensor:
        cotangents, inputs = self.factors()
        return _products(cotangents, inputs).reshape(inputs.shape[0], *self.shape())

    def gradients_are_cheaper(self) -> bool:
        places, outputs, inputs = self.sizes()
        return places > 1 and places * (outputs + inputs) > outputs * inputs

    def square_norms(self) -> Tensor:
        return _square_norms_of_products(*self.factors())

    def sizes(self) -> tuple[int, int, int]:
        """Places, outputs and inputs of the factors."""
        raise NotImplementedError


class LinearWeight(Product):
    """Of ``F.linear``. ``x`` is (examples, *, inputs) and ``cotangent`` (examples, *, outputs)."""

    def __init__(self, x: Tensor, cotangent: Tensor, transposed: bool = False) -> None:
        self._x = x.to(cotangent.dtype)
        self._cotangent = cotangent
        if transposed:
            self._x, self._cotangent = self._cotangent, self._x

    def factors(self) -> tuple[Tensor, Tensor]:
        places = (self._x.shape[0], 1, -1)
        return (
            self._cotangent.reshape(*places, self._cotangent.shape[-1]),
            self._x.reshape(*places, self._x.shape[-1]),
        )

    def sizes(self) -> tuple[int, int, int]:
        outputs, inputs = self.shape()
        return self._x[0].numel() // inputs, outputs, inputs

    def shape(self) -> Shape:
        return (self._cotangent.shape[-1], self._x.shape[-1])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        cotangents, inputs = (factor.squeeze(1) for factor in self.factors())
        weights = weights.to(cotangents.dtype)[:, None, None]
        if cotangents.shape[-1] < inputs.shape[-1]:
            cotangents = cotangents * weights
        else:
            inputs = inputs * weights
        return cotangents.flatten(0, 1).mT @ inputs.flatten(0, 1)


class ConvWeight(Product):
    """Of a convolution. ``x`` is (examples * n, channels, *) and ``cotangent`` like what the convolution returns."""

    def __init__(self, x: Tensor, cotangent: Tensor, weight: Tensor, batch_size: int, options: dict[str, Any]) -> None:
        self._x, self._cotangent, self._weight = x.to(cotangent.dtype), cotangent, weight
        self._batch_size, self._options = batch_size, options

    def factors(self) -> tuple[Tensor, Tensor]:
        groups = self._options["groups"]
        patches = _patches(self._x, self._weight.shape[2:], self._options)
        return self._by_place(self._cotangent.flatten(2), groups), self._by_place(patches, groups)

    def _by_place(self, columns: Tensor, groups: int) -> Tensor:
        """From (examples * n, groups * k, m) to (examples, groups, n * m, k)."""
        split: Tensor = columns.unflatten(1, (groups, -1)).mT
        n = columns.shape[0] // self._batch_size
        if n > 1:
            split = split.unflatten(0, (self._batch_size, n)).transpose(1, 2).flatten(2, 3)
        return split

    def sizes(self) -> tuple[int, int, int]:
        outputs = self._weight.shape[0] // self._options["groups"]
        places = self._cotangent.numel() // (self._batch_size * self._weight.shape[0])
        return places, outputs, self._weight[0].numel()

    def shape(self) -> Shape:
        return self._weight.shape

    def gradients(self) -> Tensor:
        places, outputs, _ = self.sizes()
        if self._x.device.type != "cpu" or outputs >= places:
            return super().gradients()
        # A convolution with a group for each example, which needs no patches.
        cotangents, xs = (
            t.unflatten(0, (self._batch_size, -1)).transpose(0, 1).flatten(1, 2) for t in (self._cotangent, self._x)
        )
        shape = self._weight.shape
        like = self._weight.expand(self._batch_size, *shape).flatten(0, 1)
        joined = self._backward(cotangents, xs, like, self._batch_size)
        return joined.view(self._batch_size, *shape)

    def _backward(self, cotangent: Tensor, x: Tensor, like: Tensor, examples: int) -> Tensor:
        options = self._options
        place = options["stride"], options["padding"], options["dilation"], False, [0] * (x.dim() - 2)
        mask = (False, True, False)
        backward = torch.ops.aten.convolution_backward
        result: Tensor = backward(cotangent, x, like, None, *place, options["groups"] * examples, mask)[1]
        return result

    def weighted_sum(self, weights: Tensor) -> Tensor:
        n = self._x.shape[0] // self._batch_size
        weights = weights.to(self._cotangent.dtype).repeat_interleave(n) if n > 1 else weights.to(self._cotangent.dtype)
        weighted = self._cotangent * weights.view(-1, *[1] * (self._cotangent.dim() - 1))
        return self._backward(weighted, self._x, self._weight, 1)


class EmbeddingWeight(Term):
    """Of a table whose rows are looked up. ``ids`` is (examples, *), ``cotangent`` (examples, *, features)."""

    def __init__(self, ids: Tensor, cotangent: Tensor, rows: int, padding: int | None) -> None:
        self.ids = ids.reshape(ids.shape[0], -1)
        cotangent = cotangent.reshape(*self.ids.shape, cotangent.shape[-1])
        self.cotangent = cotangent if padding is None else cotangent * (self.ids != padding).unsqueeze(-1)
        self.rows = rows

    def gradients(self) -> Tensor:
        zeros = self.cotangent.new_zeros(self.ids.shape[0], self.rows, self.cotangent.shape[-1])
        return zeros.scatter_add(1, self.ids.unsqueeze(-1).expand_as(self.cotangent), self.cotangent)

    def square_norms(self) -> Tensor:
        # Cotangents of one row are added up: in the order of the rows, which are then numbered as they come.
        ids, order = self.ids.sort(1)
        numbers = F.pad(ids.diff(dim=1) != 0, (1, 0)).cumsum(1)
        places = torch.empty_like(numbers).scatter(1, order, numbers).unsqueeze(-1).expand_as(self.cotangent)
        return _square_norms(torch.zeros_like(self.cotangent).scatter_add(1, places, self.cotangent))

    def dot(self, cotangents: Tensor, inputs: Tensor) -> Tensor:
        """The scalar product with the gradient that has these factors."""
        cotangents, inputs = cotangents.squeeze(1), inputs.squeeze(1)
        at_ids = cotangents.gather(2, self.ids.unsqueeze(1).expand(-1, cotangents.shape[1], -1))
        return (_precise(at_ids) * _precise(inputs @ self.cotangent.mT)).flatten(1).sum(1)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        weighted = self.cotangent * weights.to(self.cotangent.dtype)[:, None, None]
        zeros = weighted.new_zeros(self.rows, weighted.shape[-1])
        return zeros.index_add(0, self.ids.flatten(), weighted.flatten(0, 1))


class Wanted(enum.Enum):
    """What the gradients are for."""

    GRADIENTS = enum.auto()
    NORMS = enum.auto()
    #: The norms, and then sums weighted by them.
    SUMS = enum.auto()


class Total:
    """The whole gradient of a parameter. Keeps no more of each term than what is wanted needs."""

    def __init__(self, parameter: Tensor, batch_size: int, wanted: Wanted) -> None:
        self._like, self._batch_size, self._wanted = parameter, batch_size, wanted
        #: How many terms there may be.
        self.uses = 0
        self._terms: list[Term] = []
        self._gradients: Tensor | None = None
        self._norms: Tensor | None = None

    @property
    def is_zero(self) -> bool:
        """Whether no term came."""
        return not self._terms and self._gradients is None and self._norms is None

    def add(self, term: Term) -> None:
        """Add a term. Its gradients are made here if they will be."""
        if self._wanted is Wanted.GRADIENTS or term.gradients_are_cheaper():
            gradients = term.gradients().to(self._like.dtype)
            self._gradients = gradients if self._gradients is None else self._gradients + gradients
        elif self._wanted is Wanted.NORMS and self.uses == 1:
            self._norms = term.square_norms()
        else:
            self._terms.append(term)

    def gradients(self) -> Tensor:
        """Each example's: (examples, *shape of the parameter)."""
        for term in self._terms:
            gradients = term.gradients().to(self._like.dtype)
            self._gradients = gradients if self._gradients is None else self._gradients + gradients
        self._terms = []
        if self._gradients is None:
            return self._like.new_zeros(self._batch_size, *self._like.shape)
        return self._gradients

    def square_norms(self) -> Tensor:
        """Of each example's."""
        if self._norms is None and self._gradients is None and self._terms:
            self._norms = square_norms_of_sum(self._terms)
        if self._norms is None:
            self._norms = _square_norms(self.gradients())
        return self._norms

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Of all examples', in the parameter's shape."""
        if self._gradients is not None:
            rows = self._gradients.flatten(1)
            return (weights.to(rows.dtype) @ rows).view(self._like.shape)
        total = torch.zeros_like(self._like)
        for i, term in enumerate(self._terms):
            part = term.weighted_sum(weights).to(self._like.dtype)
            total = part if i == 0 else total + part
        return total


def _precise(values: Tensor) -> Tensor:
    """In a dtype that sums of squares fit into."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _square_norms(gradients: Tensor) -> Tensor:
    rows = _precise(gradients.flatten(1))
    return (rows * rows).sum(1)


def _products(cotangents: Tensor, inputs: Tensor) -> Tensor:
    """(examples, groups, outputs, inputs)."""
    return cotangents.mT * inputs if cotangents.shape[2] == 1 else cotangents.mT @ inputs


def _square_norms_of_products(cotangents: Tensor, inputs: Tensor) -> Tensor:
    cotangents, inputs = _precise(cotangents), _precise(inputs)
    if cotangents.shape[2] == 1:
        return (cotangents.square().sum((2, 3)) * inputs.square().sum((2, 3))).sum(1)
    return ((cotangents @ cotangents.mT) * (inputs @ inputs.mT)).flatten(1).sum(1)


def square_norms_of_sum(terms: list[Term]) -> Tensor | None:
    """Of several terms, without their gradients; None where those are needed."""
    if len(terms) == 1:
        return terms[0].square_norms()
    linear = [term.factors() for term in terms if isinstance(term, LinearWeight)]
    tables = [term for term in terms if isinstance(term, EmbeddingWeight)]
    if len(linear) + len(tables) < len(terms):
        return None
    table = _joined_tables(tables) if tables else None
    if not linear:
        return table.square_norms() if table is not None else None
    cotangents, inputs = (torch.cat(factors, 2) for factors in zip(*linear, strict=True))
    norms = _square_norms_of_products(cotangents, inputs)
    return norms if table is None else norms + table.square_norms() + 2 * table.dot(cotangents, inputs)


def _joined_tables(tables: list[EmbeddingWeight]) -> EmbeddingWeight:
    ids = torch.cat([table.ids for table in tables], 1)
    return EmbeddingWeight(ids, torch.cat([table.cotangent for table in tables], 1), tables[0].rows, None)


def _patches(x: Tensor, kernel: Shape, options: dict[str, Any]) -> Tensor:
    """What each place of a convolution sees: (n, channels * size of the kernel, places)."""
    stride, padding, dilation = options["stride"], options["padding"], options["dilation"]
    if math.prod(kernel) == 1 and not any(padding):
        steps: Any = (..., *[slice(None, None, step) for step in stride])
        return x[steps].flatten(2)
    if len(kernel) == 2:
        return F.unfold(x, tuple(kernel), dilation, padding, stride)
    if len(kernel) == 1:
        return F.unfold(x.unsqueeze(2), (1, *kernel), (1, *dilation), (0, *padding), (1, *stride))
    x = F.pad(x, [side for amount in reversed(padding) for side in (amount, amount)])
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(dim, gap * (size - 1) + 1, step)[..., ::gap]
    dims = len(kernel)
    # (n, channels, *places, *kernel) -> (n, channels, *kernel, *places)
    x = x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return x.flatten(1, 1 + dims).flatten(2)
