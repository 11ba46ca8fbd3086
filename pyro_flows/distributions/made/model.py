"""MADE as a distribution: one masked network gives all conditionals, for one order of the dimensions or for many."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Size, Tensor

from pyro_flows.core.checks import check_tensor, event_size
from pyro_flows.core.modes import lasting
from pyro_flows.distributions.made.autoregressive import AutoregressiveDistribution, AutoregressiveModel, one_by_one
from pyro_flows.distributions.made.composed import as_head
from pyro_flows.distributions.made.head import Head
from pyro_flows.distributions.made.network import CONNECTIVITIES, Member, SharedNetwork, draw_units
from pyro_flows.nets.activations import Activation
from pyro_flows.nets.degrees import as_order

__all__ = ["MADE", "check_observed", "impute", "split_log_prob"]


def impute(
    made: MADE, value: Tensor, observed: Tensor, num_samples: int, context: Tensor | None, number: int
) -> Tensor:
    """Draws of the missing dimensions, shape ``(num_samples, *batch, D)``; one sweep for each pattern of missingness.

    Args:
        made: the model.
        value: shape ``(*batch, D)``; what stands in missing places is not looked at.
        observed: boolean, of a shape that broadcasts to it: true where a dimension is known.
        num_samples: draws for each row.
        context: shape ``(*context_batch, context_dim)`` that broadcasts to the batch, or ``None``.
        number: which member, among those with such an order.
    """
    batch = value.shape[:-1]
    out = made.cast(value).expand(num_samples, *value.shape).reshape(num_samples, -1, value.shape[-1]).clone()
    for rows, known, member in _patterns(made, observed.expand(value.shape).reshape(-1, value.shape[-1]), number):
        given = out[:, rows].flatten(0, 1)
        own = None if context is None else _rows(context, batch)[rows].repeat(num_samples, 1)
        drawn = made.net.draw(made.head, len(given), own, member, given, known)
        out[:, rows] = drawn.unflatten(0, (num_samples, len(rows)))
    return out.view(num_samples, *value.shape)


def split_log_prob(
    made: MADE, value: Tensor, observed: Tensor, context: Tensor | None, number: int
) -> tuple[Tensor, Tensor]:
    """``(log p(observed), log p(missing | observed))`` in nats, each of the batch's shape; one pass a pattern.

    Arguments as for :func:`impute`.
    """
    batch, dims = value.shape[:-1], value.shape[-1]
    flat, seen = made.cast(value).reshape(-1, dims), observed.expand(value.shape).reshape(-1, dims)
    # What is missing must not show, whatever stands there; that it is finite is all that counts here.
    fine = torch.where(seen | flat.isfinite(), flat, 0.0)
    known, missing = (flat.new_zeros(len(flat)) for _ in range(2))
    for rows, _, member in _patterns(made, seen, number):
        own = None if context is None else _rows(context, batch)[rows]
        features = made.head.features(fine[rows])
        each = made.head.log_prob(flat[rows], made.net(features, own, member))
        mask = seen[rows]
        known = known.index_put((rows,), torch.where(mask, each, 0.0).sum(-1))
        missing = missing.index_put((rows,), torch.where(mask, 0.0, each).sum(-1))
    return known.view(batch), missing.view(batch)


def check_observed(made: MADE, value: Tensor, observed: Tensor) -> None:
    """Worded errors for a mask of another kind or shape, or one that leaves nothing to do."""
    check_tensor("MADE", "values as a tensor", value)
    check_tensor("MADE", "observed as a boolean tensor", observed)
    if observed.dtype != torch.bool:
        raise TypeError(f"MADE: expected observed to be boolean, got {observed.dtype}; use observed.bool()")
    try:
        fits = torch.broadcast_shapes(observed.shape, value.shape) == value.shape
    except RuntimeError:
        fits = False
    if not fits or value.shape[-1:] != made.event_shape:
        raise ValueError(
            f"MADE: expected values of shape (*batch, {made.input_dim}) and a mask that broadcasts to them, got "
            f"{tuple(value.shape)} and {tuple(observed.shape)}"
        )
    whole = observed.expand(value.shape)
    if not whole.any(-1).all():
        raise ValueError("MADE: the mask hides everything in some row: nothing is known there, so use .sample()")
    if whole.all(-1).any():
        raise ValueError("MADE: the mask hides nothing in some row: all is known there, so use .log_prob(value)")


def _patterns(made: MADE, observed: Tensor, number: int) -> Iterator[tuple[Tensor, int, Member]]:
    """Rows of each pattern, how many dimensions it knows, and the member that has these first."""
    kinds, which = torch.unique(observed, dim=0, return_inverse=True)
    for k, kind in enumerate(kinds):
        yield (which == k).nonzero().squeeze(-1), int(kind.sum()), made.member_for(kind, number)


def _rows(context: Tensor, batch: Size) -> Tensor:
    return context.expand(*batch, -1).reshape(-1, context.shape[-1])


ENDLESS = 16  # members of the ensemble where masks are drawn without end


HELD = 256  # members that are kept


class MADE(AutoregressiveModel):
    r"""Masked autoencoder for distribution estimation: :math:`p(x \mid c) = \prod_k p(x_{\pi_k} \mid x_{\pi_{<k}}, c)`.

    All :math:`D` conditionals come from one pass of one network, whose masks keep output :math:`i` from all inputs that
    do not come before :math:`i` in the order :math:`\pi`.  What the outputs mean is the head's business: binary,
    categorical or real values, pixel values, or a mixture of types.

    With ``order="any"`` the same weights serve all orders: each *member* is one order and one drawing of the hidden
    units' connections.  Training visits them one after another, by an explicit :meth:`resample_masks` before each step
    (which ``fit_density`` calls); in evaluation the density is the mean over an ensemble of members, and any dimensions
    can be imputed from any others.

    A density costs one pass for each member, a draw one sweep through the dimensions, in which each weight is used
    once: about one pass of arithmetic, and as many small steps as there are dimensions.

    Args:
        input_dim: the number of dimensions :math:`D`.
        head: ``"bernoulli"``, ``"normal"``, ``"mixture"``, ``"logistic"``, or a head such as
            ``CategoricalHead([3, 5])``.
        hidden_dims: widths of the hidden layers.
        context_dim: size of the context, 0 for none.
        order: ``"identity"``, ``"reverse"``, ``"random"`` (drawn once), the dimensions in the sequence in which they
            come, or ``"any"``: each member has one of its own.
        connectivity: degrees of the hidden units, ``"even"`` or ``"random"``, which each member draws anew.
        num_masks: how many members there are to go through; by default no end where they differ, else one.
        ensemble_size: members whose mean density counts in evaluation; by default all of a list, 16 of an endless one.
        direct: whether outputs also see the inputs before them without detour, by a linear layer.
        activation: of the hidden layers, by name or an elementwise function; by default ReLU for discrete values, and
            for real ones smooth and at first bounded, as in :func:`~pyro_flows.flows.maf`, against outliers.
        dropout: share of the network's inputs that are left out at random, in training mode and for ``log_prob`` alone;
            against overfitting where rows are few.
        mask_inputs: whether the network is also told who sees what in the member at hand, by inputs that are constantly
            1 under the same masks, as in the paper; for few members.
        seed: of all orders and connections; by default drawn from torch's random numbers.  It is saved in the
            ``state_dict``, and so are masks in that way.

    Raises:
        ValueError: for an order that is no permutation, sizes out of range, or an unknown head.

    References:
        MADE: Masked Autoencoder for Distribution Estimation (Germain, Gregor, Murray & Larochelle, 2015),
        arXiv:1502.03509; order-agnostic training: A Deep and Tractable Density Estimator (Uria, Murray & Larochelle,
        2014), arXiv:1310.1757.
    """

    def __init__(
        self,
        input_dim: int,
        head: str | Head = "bernoulli",
        *,
        hidden_dims: Sequence[int] = (500,),
        context_dim: int = 0,
        order: str | Sequence[int] | Tensor = "identity",
        connectivity: str = "even",
        num_masks: int | None = None,
        ensemble_size: int | None = None,
        direct: bool = True,
        activation: Activation | None = None,
        dropout: float = 0.0,
        mask_inputs: bool = False,
        seed: int | None = None,
    ) -> None:
        event = event_size(input_dim)
        if len(event) != 1:
            raise ValueError(f"MADE: expected input_dim to be an integer, got {input_dim!r}; for images see ConvMADE")
        super().__init__(event, as_head(head, input_dim), context_dim)
        self.hidden_dims = tuple(hidden_dims)
        for name, values in (("hidden_dims", self.hidden_dims), ("context_dim", (context_dim + 1,))):
            if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in values):
                raise ValueError(f"MADE: {name} must be positive integers (context_dim may be 0)")
        if not 0 <= dropout < 1:
            raise ValueError(f"MADE: expected 0 <= dropout < 1, got {dropout}")
        self.dropout = float(dropout)
        if connectivity not in CONNECTIVITIES:
            raise ValueError(f"MADE: expected connectivity to be one of {CONNECTIVITIES}, got {connectivity!r}")
        self.connectivity = connectivity
        self.any_order = isinstance(order, str) and order == "any"
        self.varied = self.any_order or (connectivity == "random" and bool(self.hidden_dims))
        if not self.varied and num_masks not in (None, 1):
            raise ValueError(
                f'MADE: with order={order!r} and connectivity="even" there is one member only; for {num_masks} give '
                'order="any" or connectivity="random"'
            )
        self.num_masks = num_masks if self.varied else 1
        if self.num_masks is not None:
            self._number(self.num_masks)
        self.ensemble_size = self._number(ensemble_size or self.num_masks or ENDLESS)
        # All orders and connections are a function of the seed; a state_dict holds it.
        self.seed = int(torch.randint(2**31, ())) if seed is None else int(seed)
        self.position = 0
        drawn = isinstance(order, str) and order == "random"
        fixed = torch.randperm(input_dim, generator=self._generator(-1)) if drawn else order
        fixed = torch.arange(input_dim) if self.any_order else as_order(input_dim, fixed)
        self.register_buffer("order", fixed, persistent=drawn)
        if activation is None:
            activation = "relu" if self.head.discrete else ("isru", "silu")
        self.net = SharedNetwork(self.head, self.hidden_dims, context_dim, direct, activation, mask_inputs)
        self._held: OrderedDict[object, Member] = OrderedDict()

    def _generator(self, number: int) -> Generator:
        return Generator().manual_seed((self.seed * 1_000_003 + number + 1) % 2**63)

    def _number(self, value: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"MADE: expected a number of members of at least 1, got {value!r}")
        if value > 1 and not self.varied:
            raise ValueError(f'MADE: there is one member only, not {value}: train with order="any" to have more')
        if self.num_masks is not None and value > self.num_masks:
            raise ValueError(f"MADE: there are {self.num_masks} members, not {value}; num_masks says how many")
        return value

    # Members.

    def member(self, number: int) -> Member:
        """The ``number``-th order and connections."""
        held = self._held.pop(number, None)
        if held is None:
            if not self.any_order and torch._C._functorch.is_functorch_wrapped_tensor(self.order):
                raise ValueError(
                    "MADE: the order is inside of a transform of torch.func (stacked buffers): score once with the "
                    "model before, which keeps its masks, or stack the parameters alone"
                )
            with lasting():
                generator = self._generator(number)
                order = torch.randperm(self.input_dim, generator=generator) if self.any_order else self.order.cpu()
                held = self._make(order, generator)
        return self._hold(number, held)

    def _hold(self, key: object, member: Member) -> Member:
        self._held[key] = member  # the latest last
        if len(self._held) > HELD:
            self._held.popitem(last=False)
        return member

    def _make(self, order: Tensor, generator: Generator) -> Member:
        units = draw_units(self.input_dim, self.hidden_dims, self.context_dim > 0, self.connectivity, generator)
        head = self.head
        return Member(order, units, direct=self.net.is_direct, num_params=head.num_params, features=head.num_features)

    def resample_masks(self) -> None:
        """Goes on to the next member: of the list, from its end to its beginning, or of the endless sequence."""
        self.position += 1
        if self.num_masks is not None:
            self.position %= self.num_masks

    def members(self) -> tuple[Member, ...]:
        """In training the one in use, in evaluation those of the ensemble."""
        if self.training:
            return (self.member(self.position),)
        return tuple(self.member(k) for k in range(self.ensemble_size))

    def ensemble(self, num_members: int, context: Tensor | None = None) -> AutoregressiveDistribution:
        """The mean density of the first ``num_members`` members."""
        members = tuple(self.member(k) for k in range(self._number(num_members)))
        return AutoregressiveDistribution(self, self._admit(context), members)

    def one(self, number: int = 0, context: Tensor | None = None) -> AutoregressiveDistribution:
        """The distribution of one member alone."""
        return AutoregressiveDistribution(self, self._admit(context), (self.member(number),))

    def member_for(self, observed: Tensor, number: int = 0) -> Member:
        """The member whose order has the observed dimensions first.

        Both parts come in a random order of their own, another one for each ``number``.

        Raises:
            ValueError: if the model knows one order only, and that does not begin with the observed dimensions.
        """
        known = observed.cpu()
        if not self.any_order:
            member = self.member(number)
            if known[member.order][: int(known.sum())].all():
                return member
            raise ValueError(
                "MADE: this model knows one order only, in which the observed dimensions do not come first; train one "
                'with order="any" to impute any dimensions from any others'
            )
        key = (number, *known.nonzero().squeeze(-1).tolist())
        held = self._held.pop(key, None)
        if held is None:
            generator = self._generator(-2 - number)
            drawn = torch.randperm(self.input_dim, generator=generator)
            held = self._make(torch.cat((drawn[known[drawn]], drawn[~known[drawn]])), generator)
        return self._hold(key, held)

    def impute(
        self,
        value: Tensor,
        observed: Tensor,
        num_samples: int = 1,
        context: Tensor | None = None,
        *,
        number: int = 0,
    ) -> Tensor:
        """Draws of the missing dimensions given the observed ones, shape ``(num_samples, *batch, D)``.

        From the conditional of one member, whose order has the observed dimensions first; members of an order-agnostic
        model agree as far as it is trained.  One sweep for each pattern of missingness.

        Args:
            value: shape ``(*batch, D)``; what stands in missing places, NaN included, is not looked at.
            observed: boolean, broadcasting to ``value``: true where a dimension is known.
            num_samples: draws for each row.
            context: shape ``(*context_batch, context_dim)``, if the model takes one.
            number: which of the members with such an order.

        Raises:
            ValueError: for a mask that hides everything or nothing in a row, or if the model knows one order only and
                that does not begin with the observed dimensions.
        """
        check_observed(self, value, observed)
        with torch.no_grad():
            return impute(self, value, observed, num_samples, self._admit(context), number)

    def log_prob_observed(
        self, value: Tensor, observed: Tensor, context: Tensor | None = None, *, number: int = 0
    ) -> Tensor:
        """Log-density in nats of the observed dimensions alone, shape ``(*batch,)``; arguments as of :meth:`impute`."""
        check_observed(self, value, observed)
        return split_log_prob(self, value, observed, self._admit(context), number)[0]

    def log_prob_missing(
        self, value: Tensor, observed: Tensor, context: Tensor | None = None, *, number: int = 0
    ) -> Tensor:
        """Log-density of the other dimensions of ``value``, given the observed ones, by one member's conditional."""
        check_observed(self, value, observed)
        return split_log_prob(self, value, observed, self._admit(context), number)[1]

    def relaxed(self, temperature: float) -> MADE:
        """The model of a continuous relaxation, with differentiable draws; shares the parameters.

        Draws take one pass of the network for each dimension, and so does their gradient.  Densities of relaxed values
        are those of another model, with continuous latents: the guide that is best for it need not be good for the
        discrete one, and at low temperatures float32 is coarse near 0 and 1.

        Args:
            temperature: the lower, the nearer to this model, and the more the gradients scatter.

        Raises:
            NotImplementedError: if the head has no relaxed form.
        """
        other = copy.copy(self)
        other._modules = {**self._modules, "head": self.head.relaxed(temperature).to(self.head.like)}
        return other

    # What the distribution asks for.

    def params(self, value: Tensor, context: Tensor | None = None, member: Member | None = None) -> Tensor:
        """Parameters of the conditionals, shape ``(*batch, D, num_params)``, as the head reads them; one pass."""
        member = self.members()[0] if member is None else member
        return self.net(self.head.features(self.cast(value)), context, member)

    def score(self, value: Tensor, context: Tensor | None, member: Member | None = None) -> Tensor:
        member = self.members()[0] if member is None else member
        value = self.cast(value)
        seen = F.dropout(self.head.features(value), self.dropout, self.training)
        return self.head.log_prob(value, self.net(seen, context, member)).sum(-1)

    def set_bias(self, bias: Tensor) -> None:
        self.net.output_bias().copy_(bias.T.reshape(-1))

    def draw(self, batch: Size, context: Tensor | None, member: Member | None = None) -> Tensor:
        rows = batch.numel()
        if context is not None:
            context = context.expand(*batch, -1).reshape(rows, context.shape[-1])
        member = self.members()[0] if member is None else member
        return self.net.draw(self.head, rows, context, member).view(*batch, self.input_dim)

    def rdraw(self, batch: Size, context: Tensor | None, member: Member | None = None) -> Tensor:
        member = self.members()[0] if member is None else member
        start = torch.zeros(*batch, self.input_dim, dtype=self.dtype, device=self.device)
        return one_by_one(lambda x: self.params(x, context, member), self.head, start, member.order)

    # State.

    def get_extra_state(self) -> dict[str, int]:
        """What orders and connections are drawn from, and which of them is in use."""
        return {"seed": self.seed, "position": self.position}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Takes the seed and the position of a ``state_dict``."""
        self.seed, self.position = state["seed"], state["position"]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._held.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": OrderedDict()}

    def extra_repr(self) -> str:
        order = "any order" if self.any_order else f"order {self.order.tolist() if self.input_dim < 9 else 'given'}"
        masks = "endless masks" if self.num_masks is None else f"{self.num_masks} mask(s)"
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"{self.input_dim}, hidden_dims={self.hidden_dims}, {order}, {masks}{context}"
