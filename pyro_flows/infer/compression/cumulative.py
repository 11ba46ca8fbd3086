"""Cumulative probabilities of a head's levels, for entropy coding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_flows.distributions.made import BernoulliHead, CategoricalHead, Head, LogisticMixtureHead, MixedHead

__all__ = ["Edges", "cumulative", "level_counts"]

Edges = Callable[[Tensor], Tensor]


def level_counts(head: Head) -> list[int]:
    """The number of levels 0, 1, ... of each dimension.

    Raises:
        ValueError: for a head without finitely many levels from 0.
    """
    if isinstance(head, CategoricalHead):
        return list(head.num_classes)
    if isinstance(head, MixedHead):
        counts = [0] * head.input_dim
        for inner, places in zip(head.heads, head.places, strict=True):
            for place, count in zip(places, level_counts(inner), strict=True):
                counts[place] = count
        return counts
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
