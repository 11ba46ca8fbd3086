"""Normal chains by their precisions: matrices of blocks beside the diagonal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_flows.core.recurrence import times

__all__ = ["chain_conditionals"]

Inverse = Callable[[Tensor], Tensor]


def chain_conditionals(diagonal: Tensor, below: Tensor, inverse: Inverse) -> tuple[Tensor, Tensor]:
    r"""Returns covariances :math:`D_t` and weights :math:`W_t` of a chain given each step before.

    A normal vector with a precision of blocks :math:`H_{t,t}` and :math:`H_{t+1,t}` has the conditionals
    :math:`x_t \mid x_{t-1} \sim N(W_t x_{t-1}, D_t)` around its mean.

    Args:
        diagonal: :math:`H_{t,t}`, shape ``(..., T, d, d)``.
        below: :math:`H_{t+1,t}`, shape ``(..., T - 1, d, d)``.
        inverse: inverts symmetric blocks ``(..., d, d)``.

    Returns:
        :math:`D`, shape ``(..., T, d, d)``, and :math:`W`, shape ``(..., T - 1, d, d)``.
    """
    variance, across = _band_of_inverse(diagonal, below, inverse)
    weights = times(across, inverse(variance[..., :-1, :, :]))
    given = variance[..., 1:, :, :] - times(weights, across.mT)
    return torch.cat([variance[..., :1, :, :], 0.5 * (given + given.mT)], -3), weights


def _band_of_inverse(diagonal: Tensor, below: Tensor, inverse: Inverse) -> tuple[Tensor, Tensor]:
    r"""Returns blocks :math:`t, t` and :math:`t + 1, t` of the inverse, by cyclic reduction.

    Every other step is integrated out, which leaves a chain of half the length: :math:`\log_2 T` operations on chains.

    References:
        On Direct Methods for Solving Poisson's Equations (Buzbee, Golub & Nielson, 1970).
    """
    steps = diagonal.shape[-3]
    if steps == 1:
        return inverse(diagonal), below
    own = inverse(diagonal[..., 1::2, :, :])
    right = (steps - 1) // 2  # steps gone that have one after them
    left_link, right_link = below[..., 0::2, :, :], below[..., 1::2, :, :]
    left = times(own, left_link)
    after = times(own[..., :right, :, :], right_link.mT)
    rest = diagonal[..., 0::2, :, :].clone()
    rest[..., : own.shape[-3], :, :] -= times(left_link.mT, left)
    rest[..., 1 : right + 1, :, :] -= times(right_link, after)
    far = -times(right_link, left[..., :right, :, :])
    variance, across = _band_of_inverse(0.5 * (rest + rest.mT), far, inverse)
    # A step that went is -left @ before - after @ next, and noise of its own.
    before, following = variance[..., : own.shape[-3], :, :], variance[..., 1 : right + 1, :, :]
    with_before = -times(left, before)
    with_before[..., :right, :, :] -= times(after, across)
    with_next = -times(left[..., :right, :, :], across.mT) - times(after, following)
    gone = own - times(with_before, left.mT)
    gone[..., :right, :, :] -= times(with_next, after.mT)
    whole = torch.empty_like(diagonal)
    whole[..., 0::2, :, :], whole[..., 1::2, :, :] = variance, gone
    links = torch.empty_like(below)
    links[..., 0::2, :, :] = with_before
    links[..., 1::2, :, :] = with_next.mT
    return whole, links
