"""MADE: one masked network for all conditionals."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Size, Tensor

from pyro_flows.core.checks import (
    check_context,
    check_tensor,
    choice,
    event_size,
    integer,
    layer_widths,
)
from pyro_flows.core.recipes import remembered
from pyro_flows.distributions.made.autoregressive import AutoregressiveDistribution, AutoregressiveModel
from pyro_flows.distributions.made.composed import as_head
from pyro_flows.distributions.made.head import Head
from pyro_flows.distributions.made.network import Member, Recent, SharedNetwork
from pyro_flows.distributions.shared import by_row
from pyro_flows.nets.activations import Activation
from pyro_flows.nets.degrees import as_order, even_degrees, least_degree

__all__ = ["MADE"]

ENDLESS = 16  # ensemble members, if their number is unlimited
HELD = 256  # cached members


@remembered
class MADE(AutoregressiveModel):
    r"""Masked autoencoder for distribution estimation: :math:`p(x \mid c) = \prod_k p(x_{\pi_k} \mid x_{\pi_{<k}}, c)`.

    One pass of one network gives all :math:`D` conditionals: masks let output :math:`i` see only the inputs before
    :math:`i` in the order :math:`\pi`.  The head turns outputs into distributions of binary, categorical or real
    values, levels, or a mixture of types.

    With ``order="any"`` the same weights serve all orders: each *member* is one order with one draw of the hidden
    units' connections.  In training, :meth:`resample_masks` before each step (``fit_density`` calls it) cycles through
    the members.  In evaluation the density is the mean over an ensemble, and any dimensions can be imputed from any
    others.

    A density costs one pass for each member.  A draw costs one sweep: about the arithmetic of one pass, in one small
    step for each dimension.

    Args:
        input_dim: the number of dimensions :math:`D`.
        head: ``"bernoulli"``, ``"normal"``, ``"mixture"``, ``"logistic"``, or a head such as
            ``CategoricalHead([3, 5])``.
        hidden_dims: widths of the hidden layers.
        context_dim: size of the context, 0 for none.
        order: ``"identity"``, ``"reverse"``, ``"random"`` (drawn once), a sequence of the dimensions, or ``"any"``: one
            for each member.
        connectivity: degrees of the hidden units, ``"even"`` or ``"random"`` (drawn for each member).
        num_masks: number of members; by default unlimited if they differ, else one.
        ensemble_size: members in the mean density of evaluation; by default all of a finite number, else 16.
        direct: whether outputs also see the inputs before them through a linear layer.
        activation: a name or an elementwise function; by default ReLU for discrete values, and for real ones smooth and
            at first bounded, against outliers, as in :func:`~pyro_flows.flows.maf`.
        dropout: share of the network's inputs that ``log_prob`` drops at random in training mode, against overfitting
            on few rows.
        mask_inputs: whether constant inputs of 1, under the same masks, tell each unit which inputs it sees, as in the
            paper; for few members.
        seed: seed of all orders, connections and thus masks, saved in the ``state_dict``; by default from torch's
            random numbers.

    Raises:
        ValueError: for an order that is not a permutation, sizes out of range, or an unknown head.

    Example:
        >>> made = pf.MADE(8, order="any").eval()
        >>> x = made.sample((5,))
        >>> made.log_prob(x).shape
        torch.Size([5])
        >>> observed = torch.tensor([True, False] * 4)
        >>> made.impute(x, observed, 10).shape  # ten draws of what is missing
        torch.Size([10, 5, 8])

    References:
        MADE (Germain, Gregor, Murray & Larochelle, 2015), arXiv:1502.03509.
        Order-agnostic training: A Deep and Tractable Density Estimator (Uria, Murray & Larochelle, 2014),
        arXiv:1310.1757.
    """

    order: Tensor

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
        super().__init__(event, as_head(head, input_dim), integer("MADE", "context_dim", context_dim, 0))
        self.hidden_dims = layer_widths("MADE", "hidden_dims", hidden_dims)
        if not 0 <= dropout < 1:
            raise ValueError(f"MADE: expected 0 <= dropout < 1, got {dropout}")
        self.dropout = float(dropout)
        self.connectivity = choice("MADE", "connectivity", connectivity, ("even", "random"))
        self.any_order = isinstance(order, str) and order == "any"
        self.varied = self.any_order or (connectivity == "random" and bool(self.hidden_dims))
        self.num_masks = num_masks if self.varied else 1
        if num_masks is not None:
            self._number("num_masks", num_masks)
        self.ensemble_size = self._number("ensemble_size", ensemble_size or self.num_masks or ENDLESS)
        self.seed = int(torch.randint(2**31, ())) if seed is None else int(seed)
        self.position = 0
        drawn = isinstance(order, str) and order == "random"
        fixed = torch.randperm(input_dim, generator=self._generator(-1), device="cpu") if drawn else order
        fixed = torch.arange(input_dim) if self.any_order else as_order(input_dim, fixed)
        self.register_buffer("order", fixed, persistent=drawn)
        if activation is None:
            activation = "relu" if self.head.discrete else ("isru", "silu")
        self.net = SharedNetwork(self.head, self.hidden_dims, context_dim, direct, activation, mask_inputs)
        self._held = Recent(HELD)

    def _generator(self, number: int) -> Generator:
        return Generator().manual_seed((self.seed * 1_000_003 + number + 1) % 2**63)

    def _number(self, what: str, value: int) -> int:
        integer("MADE", what, value)
        if value > 1 and not self.varied:
            raise ValueError(
                f"MADE: expected {what} to be 1, since this model has one member only, got {value}; build it with "
                'order="any" or connectivity="random" to have more'
            )
        if self.num_masks is not None and value > self.num_masks:
            raise ValueError(f"MADE: there are {self.num_masks} members, not {value}; num_masks says how many")
        return value

    # Members.

    def member(self, number: int) -> Member:
        """The order and connections of this number."""
        return self._held.find(number, lambda: self._make(number))

    def _make(self, number: int, known: Tensor | None = None) -> Member:
        """Draws a member by a generator of this number; the known dimensions come first."""
        if not self.any_order and torch._C._functorch.is_functorch_wrapped_tensor(self.order):
            raise ValueError(
                "MADE: the order is inside of a transform of torch.func (stacked buffers): score once with the model "
                "before, which keeps its masks, or stack the parameters alone"
            )
        generator = self._generator(number)
        order = torch.randperm(self.input_dim, generator=generator) if self.any_order else self.order.cpu()
        if known is not None:
            order = torch.cat((order[known[order]], order[~known[order]]))
        units, least = [], least_degree(self.input_dim, self.context_dim > 0)
        for width in self.hidden_dims:
            if self.connectivity == "even":
                units.append(even_degrees(self.input_dim, width, self.context_dim > 0))
            else:  # uniform from the least degree below
                units.append(torch.randint(least, self.input_dim, (width,), generator=generator))
                least = int(units[-1].min())
        return Member(order, units, self.net.is_direct, self.head)

    def resample_masks(self) -> None:
        """Moves on to the next member, cyclically.

        Example:
            >>> made = pf.MADE(8, order="any")
            >>> made.resample_masks()  # before each step of a training loop
            >>> made.log_prob(torch.randint(2, (5, 8)).float()).shape
            torch.Size([5])
        """
        self.position += 1
        if self.num_masks is not None:
            self.position %= self.num_masks

    def members(self) -> tuple[Member, ...]:
        """The current member in training, the ensemble in evaluation."""
        if self.training:
            return (self.member(self.position),)
        return tuple(self.member(k) for k in range(self.ensemble_size))

    def _in_use(self, member: Member | None) -> Member:
        return self.member(self.position if self.training else 0) if member is None else member

    def order_of(self, member: Member | None) -> Tensor:
        return self._in_use(member).order

    def ensemble(self, num_members: int, context: Tensor | None = None) -> AutoregressiveDistribution:
        """The mean density of the first ``num_members`` members."""
        members = tuple(self.member(k) for k in range(self._number("num_members", num_members)))
        return self.at_members(members, context)

    def one(self, number: int = 0, context: Tensor | None = None) -> AutoregressiveDistribution:
        """The distribution of one member."""
        return self.at_members((self.member(number),), context)

    def member_for(self, observed: Tensor, number: int = 0) -> Member:
        """A member whose order begins with the observed dimensions; ``number`` seeds the order within both parts.

        Raises:
            ValueError: if the model's only order does not begin with them.
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
        return self._held.find((number, *known.nonzero().squeeze(-1).tolist()), lambda: self._make(-2 - number, known))

    # Missing dimensions.

    def _patterns(
        self, value: Tensor, observed: Tensor, context: Tensor | None, number: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Member]]:
        """Each pattern of known dimensions with its rows, their contexts, and a member that has them first."""
        contexts = by_row(context, value.shape[:-1])
        patterns, which = torch.unique(observed, dim=0, return_inverse=True)
        for k, pattern in enumerate(patterns):
            rows = (which == k).nonzero().squeeze(-1)
            yield pattern, rows, None if contexts is None else contexts[rows], self.member_for(pattern, number)

    def _check_observed(self, value: Tensor, observed: Tensor, context: Tensor | None) -> Tensor:
        """The mask as rows; refuses rows all hidden or all known."""
        check_tensor("MADE", "values as a tensor", value)
        check_tensor("MADE", "observed as a boolean tensor", observed)
        if observed.dtype != torch.bool:
            raise TypeError(f"MADE: expected observed to be boolean, got {observed.dtype}; use observed.bool()")
        try:
            rows = observed.expand(value.shape).reshape(-1, *self.event_shape)
            fits = value.shape[-1:] == self.event_shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"MADE: expected values of shape (*batch, {self.input_dim}) and a mask that broadcasts to them, got "
                f"{tuple(value.shape)} and {tuple(observed.shape)}"
            )
        if not rows.any(-1).all():
            raise ValueError("MADE: the mask hides everything in some row: nothing is known there, so use .sample()")
        if rows.all(-1).any():
            raise ValueError("MADE: the mask hides nothing in some row: all is known there, so use .log_prob(value)")
        check_context(self, context)
        return rows

    @torch.no_grad()
    def impute(
        self,
        value: Tensor,
        observed: Tensor,
        num_samples: int = 1,
        context: Tensor | None = None,
        *,
        number: int = 0,
    ) -> Tensor:
        """Draws the missing dimensions given the observed ones, shape ``(num_samples, *batch, D)``.

        Draws follow the conditional of one member whose order begins with the observed dimensions; well-trained members
        agree.  The cost is one sweep for each pattern of missingness.

        Args:
            value: shape ``(*batch, D)``; missing entries, NaN included, are ignored.
            observed: boolean, broadcasting to ``value``: true where a dimension is known.
            num_samples: draws for each row.
            context: shape ``(*context_batch, context_dim)``, if the model takes one.
            number: which of the members with such an order.

        Raises:
            ValueError: for a row with everything or nothing hidden, or if the model's only order does not begin with
                the observed dimensions.

        Example:
            >>> made = pf.MADE(4, "normal", order="any")
            >>> value = torch.tensor([[1.0, float("nan"), 2.0, float("nan")]])
            >>> completed = made.impute(value, ~value.isnan(), num_samples=100)
            >>> completed.shape
            torch.Size([100, 1, 4])
        """
        seen = self._check_observed(value, observed, context)
        out = self.cast(value).expand(num_samples, *value.shape).reshape(num_samples, -1, self.input_dim).clone()
        for known, rows, own, member in self._patterns(value, seen, context, number):
            given = out[:, rows].flatten(0, 1)
            repeated = None if own is None else own.repeat(num_samples, 1)
            drawn = self.net.draw(self.head, len(given), repeated, member, given, int(known.sum()))
            out[:, rows] = torch.unflatten(drawn, 0, (num_samples, len(rows)))
        return out.view(num_samples, *value.shape)

    def _split_log_prob(
        self, value: Tensor, observed: Tensor, context: Tensor | None, number: int
    ) -> tuple[Tensor, Tensor]:
        """``(log p(observed), log p(missing | observed))`` in nats, of the batch shape; one pass a pattern."""
        seen = self._check_observed(value, observed, context)
        flat = self.cast(value).reshape(-1, self.input_dim)
        # Missing entries only have to be finite.
        fine = torch.where(seen | flat.isfinite(), flat, 0.0)
        known, missing = flat.new_zeros(len(flat)), flat.new_zeros(len(flat))
        for pattern, rows, own, member in self._patterns(value, seen, context, number):
            each = self.head.log_prob(flat[rows], self.params(fine[rows], own, member))
            known = known.index_put((rows,), torch.where(pattern, each, 0.0).sum(-1))
            missing = missing.index_put((rows,), torch.where(pattern, 0.0, each).sum(-1))
        return known.view(value.shape[:-1]), missing.view(value.shape[:-1])

    def log_prob_observed(
        self, value: Tensor, observed: Tensor, context: Tensor | None = None, *, number: int = 0
    ) -> Tensor:
        """Log-density in nats of the observed dimensions, shape ``(*batch,)``; arguments as in :meth:`impute`."""
        return self._split_log_prob(value, observed, context, number)[0]

    def log_prob_missing(
        self, value: Tensor, observed: Tensor, context: Tensor | None = None, *, number: int = 0
    ) -> Tensor:
        """Log-density of the missing dimensions of ``value`` given the observed ones."""
        return self._split_log_prob(value, observed, context, number)[1]

    def relaxed(self, temperature: float) -> MADE:
        """The model of a continuous relaxation, with differentiable draws; shares the parameters.

        Draws and their gradients cost one pass for each dimension.  The relaxed model has other densities and
        continuous latents, so its best guide need not suit the discrete model.  At low temperatures float32 is coarse
        near 0 and 1.

        Args:
            temperature: lower values are nearer to this model, with noisier gradients.

        Raises:
            NotImplementedError: if the head has no relaxed form.

        Example:
            >>> relaxed = pf.MADE(8).relaxed(temperature=0.5)
            >>> x = relaxed.rsample((5,))
            >>> bool(((x > 0) & (x < 1)).all())
            True
        """
        other = copy.copy(self)
        other._modules = {**self._modules, "head": self.head.relaxed(temperature).to(self.head.like)}
        return other

    # For the distribution.

    def params(self, value: Tensor, context: Tensor | None = None, member: Member | None = None) -> Tensor:
        return self.net(self.head.features(self.cast(value)), context, self._in_use(member))

    def score(self, value: Tensor, context: Tensor | None, member: Member | None = None) -> Tensor:
        value = self.cast(value)
        seen = F.dropout(self.head.features(value), self.dropout, self.training)
        return self.head.log_prob(value, self.net(seen, context, self._in_use(member))).sum(-1)

    def set_bias(self, bias: Tensor) -> None:
        self.net._weights()[1][-1].copy_(bias.T.reshape(-1))

    @property
    def linear(self) -> bool:
        """Whether the hidden units do not count yet, as in a fresh model, so that parameters are linear in values."""
        return bool(self.hidden_dims) and not self.net._weights()[0][-1].any()

    def set_slopes(self, slopes: Tensor) -> None:
        """Sets by how much each conditional's location moves with each earlier value, shape ``(D, D)``."""
        head = self.head
        direct = self.net.direct.view(head.num_params, self.input_dim, self.input_dim, head.num_features)
        direct.zero_()[..., 0] = head.locations().T.unsqueeze(-1) * slopes.to(direct)

    def draw(self, batch: Size, context: Tensor | None, member: Member | None = None) -> Tensor:
        drawn = self.net.draw(self.head, batch.numel(), by_row(context, batch), self._in_use(member))
        return drawn.view(*batch, self.input_dim)

    # State.

    def get_extra_state(self) -> dict[str, int]:
        """The seed and the current member's number."""
        return {"seed": self.seed, "position": self.position}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restores the seed and position of a ``state_dict``."""
        self.seed, self.position = state["seed"], state["position"]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._held.clear()

    def extra_repr(self) -> str:
        order = "any order" if self.any_order else f"order {self.order.tolist() if self.input_dim < 9 else 'given'}"
        masks = "endless masks" if self.num_masks is None else f"{self.num_masks} mask(s)"
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"{self.input_dim}, hidden_dims={self.hidden_dims}, {order}, {masks}{context}"
