"""What is missing given what is known, by the member of a MADE whose order has the known dimensions first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Size, Tensor

from pyro_flows.boundary import check_tensor
from pyro_flows.distributions.made.members import Member

if TYPE_CHECKING:
    from pyro_flows.distributions.made.model import MADE

__all__ = ["check_observed", "impute", "split_log_prob"]


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
