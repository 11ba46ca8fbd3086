"""A flow with a model's dependencies: global variables, and members of plates or steps of chains given these."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.core.checks import integer
from pyro_flows.core.recurrence import recurrence
from pyro_flows.core.transform import FlowTransform
from pyro_flows.nets.dense import MLP

__all__ = ["Plated"]

PAIRS = 8  # globals up to which features have products
LEARNED = 8  # features of the network
STEEP = 4.0  # largest logarithm of a scale, in units of the start's


class Plated(FlowTransform):
    r"""Moves global variables by a flow, and each member of a plate by a small map that depends on them.

    The vector holds global variables :math:`g` and groups of ``J`` members with ``d`` variables each. Globals are
    :math:`g = f(x_g)` with any flow. Member :math:`j` with ancestors' variables :math:`p` (those of its class, for a
    pupil) is

    .. math::
        y_j = m_j(g) + W_j(g)\, p + e^{s_j(g) + V_j(g) p} \odot \Lambda_j(g)\, t(x_j),
        \qquad t(x) = \sinh(e^{\tau_j(g)} \operatorname{asinh} x + \epsilon_j(g)),

    with unit lower triangular :math:`\Lambda`.  The inverse solves these for :math:`x_j`.  All of :math:`m, s, \tau,
    \epsilon` are linear in features of the globals that all members share (1, :math:`g`, bent ones, products, and
    a small network), :math:`W, V, \Lambda` in 1 and :math:`g`; the coefficients are each member's own.  Members of a
    group are thus independent given globals and ancestors, and parameters, memory and time grow linearly with their
    number.

    Members can also be steps of chains, such as the states of a time series. Step :math:`t` then has
    :math:`C_t(g)\, y_{t-1}` in addition, with a matrix :math:`C_t` that is linear in all features of
    globals that are kept within :math:`\sqrt G + 1` units, so that no chain explodes in their tails. From base to data,
    steps follow each other in :math:`\log_2` of their number of operations on whole chains; from data to base, all are
    solved at once.

    Each direction costs one pass of the globals' flow in that direction, and a product of matrices per group.

    Args:
        input_dim: number of variables.
        flow: the flow of the globals, in the order of their places; ``None`` without globals.
        members: for each group the members' places in the vector, integers of shape ``(J, d)``, ancestors before
            their descendants.
        ancestors: for each group the places of the members' ancestors, shape ``(J, a)`` with ``a`` from 0.
        lengths: for each group the number of members in a row that form a chain; by default 1, no chains.
        differences: for each group whether its places hold differences between steps of chains, the first step first,
            in place of the steps; by default not.

    Raises:
        ValueError: if places repeat or lie outside the vector, if ancestors are no earlier members, if lengths do not
            divide the numbers of members, or if the flow has another number of dimensions than the rest.

    Example:
        >>> members = torch.tensor([[1], [2], [3]])  # three members of one variable
        >>> layer = pf.transforms.Plated(4, pf.iaf(1), [members])
        >>> layer(torch.randn(5, 4)).shape
        torch.Size([5, 4])

    References:
        Amortized Variational Inference for Simple Hierarchical Models (Agrawal & Domke, 2021), arXiv:2111.03144;
        ADAVI: Automatic Dual Amortized Variational Inference (Rouillard & Wassermann, 2021), arXiv:2106.12248.
        Sinh-arcsinh distributions (Jones & Pewsey, 2009).
    """

    order: Tensor  # places: globals first, then the groups
    undo: Tensor
    pairs: Tensor  # of globals

    def __init__(
        self,
        input_dim: int,
        flow: FlowTransform | None,
        members: Sequence[Tensor],
        ancestors: Sequence[Tensor] | None = None,
        lengths: Sequence[int] | None = None,
        differences: Sequence[bool] | None = None,
    ) -> None:
        super().__init__(input_dim)
        size = self.event_shape.numel()
        places = [torch.as_tensor(each).long().cpu() for each in members]
        above = [each[:, :0] for each in places] if ancestors is None else [torch.as_tensor(a).cpu() for a in ancestors]
        local = torch.cat([each.flatten() for each in places]) if places else torch.zeros(0, dtype=torch.long)
        first, rest = torch.zeros(size, dtype=torch.bool), 0
        if not len(local) or local.min() < 0 or local.max() >= size or len(local.unique()) < len(local):
            raise ValueError(f"Plated: expected members as different places from 0 to {size - 1}, of shapes (J, d)")
        if len(above) != len(places):
            raise ValueError(f"Plated: expected ancestors of {len(places)} groups, got {len(above)}")
        for own, upper in zip(places, above, strict=True):
            if own.dim() != 2 or upper.shape[:1] != own.shape[:1] or not first[upper.long()].all():
                raise ValueError(
                    "Plated: expected places of shape (J, d), with ancestors of shape (J, a) among earlier groups, got "
                    f"{tuple(own.shape)} and {tuple(upper.shape)}"
                )
            first[own] = True
        rest = size - len(local)
        if (0 if flow is None else flow.event_shape.numel()) != rest or (flow is not None and flow.context_dim):
            raise ValueError(
                f"Plated: expected a flow of the {rest} dimensions that are no members, without context, got {flow!r}"
            )
        self.lengths = [1] * len(places) if lengths is None else list(lengths)
        for own, length in zip(places, self.lengths, strict=True):
            integer("Plated", "lengths", length)
            if len(own) % length:
                raise ValueError(f"Plated: expected chains of {length} steps each, got {len(own)} members")
        self.differences = [False] * len(places) if differences is None else list(differences)
        self.flow = flow
        order = torch.cat([(~first).nonzero().squeeze(-1), local])
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("undo", order.argsort(), persistent=False)
        self.shapes = [tuple(each.shape) for each in places]
        self.num_globals = rest
        pairs = torch.tensor(list(itertools.permutations(range(rest if rest <= PAIRS else 0), 2))).long()
        self.register_buffer("pairs", pairs.reshape(-1, 2).T, persistent=False)
        self.net = MLP(rest, LEARNED, hidden_dims=(16, 16), zero_init=False) if rest else None
        plain, linear = self.num_features, 1 + rest
        for k, (own, upper) in enumerate(zip(places, above, strict=True)):
            (count, dim), over = own.shape, upper.shape[1]
            self.register_buffer(f"above_{k}", self.undo[upper.long()], persistent=False)
            shape = plain + (LEARNED if rest else 0), 4 * count * dim
            self.register_parameter(f"coefficients_{k}", nn.Parameter(torch.zeros(shape)))
            each = dim * (dim - 1) // 2 + 2 * dim * over
            links = nn.Parameter(torch.zeros(linear, count * each)) if each else None
            self.register_parameter(f"links_{k}", links)
            moved = (count - count // self.lengths[k]) * dim * dim
            carries = nn.Parameter(torch.zeros(shape[0], moved)) if moved else None
            self.register_parameter(f"carries_{k}", carries)
        if flow is not None:
            self.sampling_cost, self.density_cost = flow.sampling_cost, flow.density_cost

    @property
    def num_features(self) -> int:
        """The number of features without the network's."""
        count = self.num_globals
        return 1 + 3 * count + (count * (count - 1) if count <= PAIRS else 0)

    def features(self, g: Tensor) -> Tensor:
        r"""Returns 1, the globals ``(n, G)``, their :math:`\log\cosh` and :math:`\tanh`, and products if they are few.

        None grows faster than the globals, so that maps stay sensible in their tails.
        """
        count, one, bent = g.shape[-1], g.new_ones(len(g), 1), g.tanh()
        parts = [one, g, _log_cosh(g), bent]
        if 1 < count <= PAIRS:
            i, j = self.pairs
            parts.append(g.index_select(-1, i) * bent.index_select(-1, j))
        return torch.cat(parts, -1)

    def _learned(self, k: int) -> tuple[Tensor, Tensor | None]:
        """Returns a group's coefficients, and those of links within members and to ancestors."""
        held: Any = self._parameters  # faster than attributes
        return held[f"coefficients_{k}"], held[f"links_{k}"]

    def _carries(self, k: int, g: Tensor) -> Tensor:
        """Returns what steps of chains take over from those before, ``(n, chains, length - 1, d, d)``."""
        (count, dim), length = self.shapes[k], self.lengths[k]
        learned: Any = self._parameters[f"carries_{k}"]
        features = self._features(_within(g))
        return (features @ learned).view(len(features), count // length, length - 1, dim, dim)

    def _members(self, g: Tensor, k: int, features: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        """Returns mean, log-scale, shift and log-tail ``(n, J, d)``, and links ``(n, J, d(d-1)/2)`` of a group."""
        (count, dim), n = self.shapes[k], len(g)
        coefficients, links = self._learned(k)
        mean, scale, shift, tail = (features @ coefficients).view(n, 4, count, dim).unbind(1)
        below = dim * (dim - 1) // 2
        if links is None:
            return mean, STEEP * (scale / STEEP).tanh(), shift, tail.tanh(), mean[..., :0]
        found = torch.unflatten(features[:, : len(links)] @ links, -1, (count, -1))
        place = getattr(self, f"above_{k}")
        over = place.shape[1]
        if over:
            p = before.index_select(-1, place.flatten()).view(n, count, over, 1)
            weights = found[..., below:].reshape(n, count, 2, dim, over)
            moved = (weights @ p.unsqueeze(2)).squeeze(-1)
            mean, scale = mean + moved[:, :, 0], scale + moved[:, :, 1]
        return mean, STEEP * (scale / STEEP).tanh(), shift, tail.tanh(), found[..., :below]

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1]).index_select(-1, self.order)
        g, ladj = self._globals("_forward_and_ladj", rows)
        features, parts, at = self._features(g), [g], self.num_globals
        for k, (count, dim) in enumerate(self.shapes):
            u = rows[:, at : at + count * dim].view(-1, count, dim)
            mean, scale, shift, tail, links = self._members(g, k, features, torch.cat(parts, -1))
            v, log_slope = _bent(u, shift, tail)
            own = mean + scale.exp() * _linked(v, links, 1.0)
            if self.lengths[k] > 1:
                own = recurrence(self._carries(k, g), own.unflatten(1, (-1, self.lengths[k])))
                if self.differences[k]:
                    own = own - F.pad(own[:, :, :-1], (0, 0, 1, 0))
            parts.append(own.flatten(1))
            ladj = ladj + (log_slope + scale).sum((-2, -1))
            at += count * dim
        y = torch.cat(parts, -1).index_select(-1, self.undo)
        return y.view(x.shape), ladj.view(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = y.reshape(-1, y.shape[-1]).index_select(-1, self.order)
        g = rows[:, : self.num_globals]
        x, ladj = self._globals("_inverse_and_ladj", rows)
        features, parts, at = self._features(g), [x], self.num_globals
        for k, (count, dim) in enumerate(self.shapes):
            own = rows[:, at : at + count * dim].view(-1, count, dim)
            mean, scale, shift, tail, links = self._members(g, k, features, rows)
            if self.lengths[k] > 1:
                chains = own.unflatten(1, (-1, self.lengths[k]))
                if self.differences[k]:
                    chains = chains.cumsum(2)
                    own = chains.flatten(1, 2)
                carried = (self._carries(k, g) @ chains[:, :, :-1, :, None]).squeeze(-1)
                mean = mean + F.pad(carried, (0, 0, 1, 0)).flatten(1, 2)
            u, log_slope = _unbent(_solved((own - mean) * (-scale).exp(), links), shift, tail)
            ladj = ladj - (log_slope + scale).sum((-2, -1))
            parts.append(u.flatten(1))
            at += count * dim
        return torch.cat(parts, -1).index_select(-1, self.undo).view(y.shape), ladj.view(y.shape[:-1])

    def _globals(self, direction: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        g = rows[:, : self.num_globals]
        return (g, rows.new_zeros(len(rows))) if self.flow is None else getattr(self.flow, direction)(g, None)

    def _features(self, g: Tensor) -> Tensor:
        plain = self.features(g)
        return plain if self.net is None else torch.cat([plain, self.net(g).squeeze(-1).tanh()], -1)

    @torch.no_grad()
    def fit(
        self,
        k: int,
        g: Tensor,
        mean: Tensor,
        factor: Tensor,
        slopes: Tensor,
        carries: Tensor | None = None,
        shift: Tensor | None = None,
        tail: Tensor | None = None,
    ) -> None:
        r"""Sets a group's coefficients, by least squares, to conditional distributions at some values of the globals.

        Args:
            k: the group.
            g: globals, shape ``(n, G)``.
            mean: the members' means where their ancestors and the steps before are 0, shape ``(n, J, d)``.
            factor: lower triangular factors of their covariances given these, shape ``(n, J, d, d)``.
            slopes: the means' derivatives with respect to the ancestors, shape ``(n, J, d, a)``.
            carries: the same with respect to the step before, shape ``(n, chains, length - 1, d, d)``.
            shift: :math:`\epsilon`, shape ``(n, J, d)``; by default 0.
            tail: :math:`\tau`, as wide; by default 0.
        """
        plain, dim = self.features(g), self.shapes[k][1]
        straight = 1 + self.num_globals
        size = factor.diagonal(dim1=-2, dim2=-1)
        bends = [torch.zeros_like(mean) if each is None else each for each in (shift, tail)]
        wanted = torch.stack([mean, size.log(), bends[0], bends[1].clamp(-0.9, 0.9).atanh()], 1).flatten(1)
        coefficients, links = self._learned(k)
        coefficients.zero_()
        coefficients[: plain.shape[1]] = _least_squares(plain, wanted, straight)
        learned = self._parameters[f"carries_{k}"]
        if learned is not None and carries is not None:
            learned.zero_()
            learned[: plain.shape[1]] = _least_squares(self.features(_within(g)), carries.flatten(1), straight)
        if links is None:
            return
        row, column = torch.tril_indices(dim, dim, -1, device=g.device)
        unit = (factor / size.unsqueeze(-1))[..., row, column]
        flat = torch.cat([unit, slopes.flatten(-2), torch.zeros_like(slopes).flatten(-2)], -1).flatten(1)
        links.copy_(_least_squares(plain[:, : len(links)], flat, straight))

    def extra_repr(self) -> str:
        groups = ", ".join(
            f"{count} x {dim}" + f" in chains of {length}" * (length > 1)
            for (count, dim), length in zip(self.shapes, self.lengths, strict=True)
        )
        return f"{super().extra_repr()}, {self.num_globals} globals, members: {groups}"


def _least_squares(inputs: Tensor, outputs: Tensor, straight: int) -> Tensor:
    """Solves by the first, ``straight`` columns, then by all columns for what these leave.

    Both by a slight ridge, because a few values of the globals may not tell all features apart.
    """
    found = outputs.new_zeros(inputs.shape[1], outputs.shape[1])
    for part in (inputs[:, :straight], inputs):
        gram = part.mT @ part
        gram = gram + 1e-8 * gram.diagonal().amax() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        found[: part.shape[1]] += torch.linalg.solve(gram, part.mT @ (outputs - inputs @ found))
    return found


def _within(g: Tensor) -> Tensor:
    """Keeps globals where most of a standard normal is, by their distance from 0."""
    most = g.shape[-1] ** 0.5 + 1
    length = (g.square().sum(-1, keepdim=True) + 1e-12).sqrt() / most
    return g * (length.tanh() / length)


def _bent(x: Tensor, shift: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Skews normal variables and changes their tails; returns values and logarithms of slopes."""
    inner = tail.exp() * x.asinh() + shift
    return inner.sinh(), tail + _log_cosh(inner) - 0.5 * (x * x).log1p()


def _unbent(y: Tensor, shift: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Undoes :func:`_bent`; the logarithms of slopes are those of the way there."""
    inner = y.asinh()
    x = ((inner - shift) * (-tail).exp()).sinh()
    return x, tail + _log_cosh(inner) - 0.5 * (x * x).log1p()


def _log_cosh(x: Tensor) -> Tensor:
    size = x.abs()
    return size + (-2 * size).exp().log1p() - 0.6931471805599453


def _linked(v: Tensor, links: Tensor, sign: float) -> Tensor:
    """Adds to each variable of a member those before it, times the links."""
    if not links.shape[-1]:
        return v
    parts, at = [v[..., :1]], 0
    for i in range(1, v.shape[-1]):
        parts.append(v[..., i : i + 1] + sign * (links[..., at : at + i] * v[..., :i]).sum(-1, keepdim=True))
        at += i
    return torch.cat(parts, -1)


def _solved(w: Tensor, links: Tensor) -> Tensor:
    """Undoes :func:`_linked`."""
    if not links.shape[-1]:
        return w
    parts, at = [w[..., :1]], 0
    for i in range(1, w.shape[-1]):
        known = torch.cat(parts, -1)
        parts.append(w[..., i : i + 1] - (links[..., at : at + i] * known).sum(-1, keepdim=True))
        at += i
    return torch.cat(parts, -1)
