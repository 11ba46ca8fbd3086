"""A codec's interface to a model, and the cumulative probabilities of a head's levels."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyro_flows.core.checks import integer
from pyro_flows.distributions import MADE, ConvMADE
from pyro_flows.distributions.made import BernoulliHead, CategoricalHead, Head, LogisticMixtureHead, MixedHead

__all__ = [
    "Conditionals",
    "Edges",
    "NetworkConditionals",
    "Read",
    "cumulative",
    "digest_of",
    "level_counts",
    "snapshot",
]

Model = TypeVar("Model", bound=nn.Module)

#: Maps borders between levels to the probabilities of lying below.
Edges = Callable[[Tensor], Tensor]
#: Maps a step's dimensions and cumulative probabilities to numbers, shape ``(rows, n)``.
Read = Callable[[Tensor, Edges], Tensor]


def snapshot(model: Model) -> Model:
    """Copies a model to the CPU in double precision."""
    return copy.deepcopy(model).to("cpu", torch.float64).eval().requires_grad_(False)


class Conditionals(ABC):
    """The conditionals :math:`P(x_i | x_{<i}, c)` of whole numbers, in double precision on the CPU.

    Attributes:
        event_shape, context_dim: those of the model.
        model: the model's copy by :func:`snapshot`.
        others: numbers besides its tensors that identify it.
        levels: the number of levels of each dimension, shape ``(D,)``.
        steps: the dimensions in coding order, those of one step independent of each other.
        numbers: about how many numbers a pass holds per row.
    """

    model: nn.Module
    others: dict[str, Tensor]
    event_shape: Size
    context_dim: int
    levels: Tensor
    steps: list[Tensor]
    numbers: int

    @abstractmethod
    def edges(self, x: Tensor, context: Tensor | None) -> Edges:
        """Cumulative probabilities of all dimensions at rows of shape ``(rows, D)``; one pass."""

    @abstractmethod
    def find(self, rows: int, context: Tensor | None, read: Read) -> Tensor:
        """Assembles rows, shape ``(rows, D)``, from ``read`` step by step."""

    @abstractmethod
    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Log-mass in nats, shape ``(rows,)``."""

    def digest(self) -> bytes:
        """An eight-byte digest of the model."""
        others = {"levels": self.levels, "steps": torch.cat(self.steps), **self.others}
        return digest_of(type(self).__name__, self.model, others)


def digest_of(kind: str, model: nn.Module, others: dict[str, Tensor]) -> bytes:
    """An eight-byte digest of a model, of a kind, with other numbers that identify it."""
    made = hashlib.sha256(kind.encode())
    parts = {**others, **dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in sorted(parts):
        part = parts[name].detach().contiguous()
        array = part.double().numpy() if part.is_floating_point() else part.long().numpy()
        made.update(f"{name}{tuple(part.shape)}".encode())
        made.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return made.digest()[:8]


class _Reading(Head):
    """A head that reads coded values in place of drawing."""

    def __init__(self, head: Head, read: Read) -> None:
        super().__init__()
        self.head, self.read = head, read
        self.num_params, self.num_features = head.num_params, head.num_features
        self._input_dim = head.input_dim
        self.to(head.like)

    def code(self, value: Tensor, dims: Tensor | None = None) -> Tensor:
        return self.head.code(value, dims)

    def draws(self, dims: Tensor, z: Tensor, params: Tensor, x: Tensor, features: Tensor) -> list[Callable[[], object]]:
        rows, value = params.permute(2, 0, 1), x.T
        coded = features.unflatten(0, (len(dims), self.num_features)).permute(2, 0, 1)
        shared = features.data_ptr() == x.data_ptr()

        def run() -> None:
            value.copy_(self.read(dims, cumulative(self.head, rows, dims)))
            if not shared:
                coded.copy_(self.code(value, dims))

        return [run]


class NetworkConditionals(Conditionals):
    """The conditionals of a ``ConvMADE`` or a ``MADE``'s member; a sweep of draws becomes one of reading."""

    model: MADE | ConvMADE

    def __init__(self, model: MADE | ConvMADE, number: int = 0) -> None:
        self.levels = torch.tensor(level_counts(model.head))
        self.model = snapshot(model)
        self.event_shape, self.context_dim = model.event_shape, model.context_dim
        self.member = None
        if isinstance(self.model, MADE):
            self.number = self.model._number("number", integer("Codec", "number", number, 0) + 1) - 1
            self.member = self.model.member(self.number)
        units = [] if self.member is None else self.member.units
        self.others = {f"units {k}": each for k, each in enumerate(units)}
        order = self.model.order if self.member is None else self.member.order
        self.steps = list(order.split(1))
        dims, bits = len(self.levels), int(self.levels.max()).bit_length()
        net = model.net.numbers_per_draw if isinstance(model, ConvMADE) else 4 * sum(model.hidden_dims)
        self.numbers = dims * (6 * bits + 3 * model.head.num_params) + net

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        value = x.double().unflatten(1, self.event_shape)
        return self.model.params(value, context) if self.member is None else self.model.params(x, context, self.member)

    def edges(self, x: Tensor, context: Tensor | None) -> Edges:
        return cumulative(self.model.head, self._params(x, context))

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.model.head.log_prob(x.double(), self._params(x, context)).sum(-1)

    def find(self, rows: int, context: Tensor | None, read: Read) -> Tensor:
        head, model = _Reading(self.model.head, read), self.model
        with torch.random.fork_rng(devices=[]):  # the sweep's noise goes unused
            if isinstance(model, ConvMADE):
                return model.sweep(head, rows, context).flatten(1).long()
            drawn = model.net.draw(head, rows, context, model.member(self.number))
            model.net._idle.clear()
            return drawn.long()


def level_counts(head: Head) -> list[int]:
    """The number of levels 0, 1, ... of each dimension.

    Raises:
        ValueError: for a head without finitely many levels from 0.
    """
    if isinstance(head, CategoricalHead):
        return list(head.num_classes)
    if isinstance(head, MixedHead):
        return head._spread([level_counts(inner) for inner in head.heads])
    reach = head.constraint
    if isinstance(reach, type(constraints.boolean)):
        return [2] * head.input_dim
    low, high = (getattr(reach, name, None) for name in ("lower_bound", "upper_bound"))
    if isinstance(reach, constraints.integer_interval) and low == 0 and isinstance(high, int):
        return [high + 1] * head.input_dim
    raise ValueError(
        "Codec: expected a head of levels 0 to L - 1, such as BernoulliHead, CategoricalHead, LogisticMixtureHead or a "
        f"MixedHead of these, got {type(head).__name__}, whose values are {reach if reach else 'of other kinds'}"
    )


def cumulative(head: Head, params: Tensor, dims: Tensor | None = None) -> Edges:
    r"""The function :math:`k \mapsto P(x < k)`, for ``params`` of shape ``(*, n, num_params)``.

    The function takes whole numbers, shape ``(*, n)``, from 1 to the number of levels less 1, with an error of a few
    units in the last place of 1.
    """
    if type(head) is BernoulliHead:
        below = torch.sigmoid(-params.squeeze(-1))
        return lambda middle: below.expand(middle.shape)
    if type(head) is LogisticMixtureHead:
        logits, loc, log_scale = head._parts(params)
        weights, rate = torch.softmax(logits, -1), torch.exp(-log_scale)
        return lambda middle: (weights * torch.sigmoid((middle.unsqueeze(-1) - 0.5 - loc) * rate)).sum(-1)
    if type(head) is MixedHead:
        return lambda middle: head._each(
            dims,
            lambda inner, at, own: cumulative(inner, params.index_select(-2, at)[..., : inner.num_params], own)(
                middle.index_select(-1, at)
            ),
        )
    if type(head) is CategoricalHead:
        table = torch.softmax(head._logits(params, dims), -1)
    else:
        levels = [torch.full_like(params[..., 0], k) for k in range(max(level_counts(head)))]
        table = torch.stack([head.log_prob(level, params, dims) for level in levels], -1).exp()
    table = table.cumsum(-1)
    table = table / table[..., -1:]
    return lambda middle: table.gather(-1, (middle - 1).unsqueeze(-1)).squeeze(-1)
