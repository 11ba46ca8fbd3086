"""Maps of surprise by exact conditional densities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyro_flows.core.checks import admit
from pyro_flows.core.modes import evaluating
from pyro_flows.core.transform import FlowTransform
from pyro_flows.distributions import Dequantized, Flow
from pyro_flows.distributions.queries.layers import is_elementwise, leaves_of, order_of
from pyro_flows.infer.density.units import is_plain_flow

__all__ = ["pixel_flow", "pixel_scores", "single_base", "surprise"]


@torch.no_grad()
def pixel_scores(
    model: Flow | Dequantized, value: Tensor, context: Tensor | None = None, *, num_noise_samples: int = 8
) -> Tensor:
    r"""How surprising each dimension is, given those before it: :math:`-\log p(y_i \mid y_{<i}, c)` in nats.

    Exact for a flow whose layers are elementwise or triangular in one order of the dimensions.  With
    :math:`x = f^{-1}(y)`, a score is :math:`-\log b(x_i) - \log \partial x_i / \partial y_i`; an event's scores add up
    to :math:`-\log p(y)`.  The cost is one pass in the density direction, and about one more for slopes.

    Args:
        model: a :class:`~pyro_flows.distributions.flow.Flow` over independent dimensions, with layers such as ``Mint``
            of one orientation, ``Autoregressive`` of one order, ``ActNorm``, ``Rescaling``, ``Standardization``,
            ``LogitPixels`` and elementwise transforms of torch; or a
            :class:`~pyro_flows.distributions.dequantization.Dequantized` of such a flow, with uniform noise.  Other
            layers need ``log_slopes(y, context)`` and the attributes ``order`` and ``lower`` of a ``Mint`` layer.
        value: data, shape ``(*batch, *event_shape)``; whole numbers for a ``Dequantized``.
        context: shape ``(*batch, context_dim)``, if the flow takes one.
        num_noise_samples: noise draws to average over, for a ``Dequantized``.

    Returns:
        Shape ``(*batch, *event_shape)``, in nats; divide by ``math.log(2)`` for bits.

    Raises:
        ValueError: for layers of different or unknown orders, values outside the support, or a base of dependent
            dimensions.
        TypeError: for a model of another kind.

    Example:
        >>> flow = pf.Flow(pf.mintnet((1, 4, 4), num_layers=1, one_sided=True))
        >>> y = torch.randn(5, 1, 4, 4)
        >>> scores = pf.infer.pixel_scores(flow, y)
        >>> torch.allclose(scores.sum((1, 2, 3)), -flow.log_prob(y), atol=1e-3)
        True

    References:
        MintNet (Song et al., 2019), arXiv:1907.07945.
    """
    flow = pixel_flow(model, "pixel_scores")
    values = model.intensities(value, num_noise_samples, fresh=False) if isinstance(model, Dequantized) else [value]
    context = flow.inner_context(context)
    with evaluating(flow):
        return torch.stack([surprise(flow, each, context) for each in values]).mean(0)


def pixel_flow(model: object, who: str) -> Flow:
    """The flow that has a density pixel by pixel, of a model itself or of a ``Dequantized``."""
    if isinstance(model, Dequantized):
        if model.dequantizer is not None:
            raise ValueError(
                f"{who}: expected a Dequantized with uniform noise, got one with a dequantizer, whose noise has no "
                "density pixel by pixel; give Dequantized(flow, levels), without it"
            )
        model = model.flow
    if not is_plain_flow(model):
        raise TypeError(f"{who}: expected a Flow, or a Dequantized of one, got {type(model).__name__}")
    return model


def surprise(
    flow: Flow, value: Tensor, context: Tensor | None, who: str = "pixel_scores", by_time: bool = False
) -> Tensor:
    r"""Returns :math:`-\log p(y_i \mid y_{<i}, c)` in nats, differentiably; the context is in the units of the chain.

    ``who`` is the caller's name for messages; ``by_time`` demands the order of a series.
    """
    value = admit(flow.chain, value, context, data_side=True)
    if value.numel() and not flow.chain.codomain.check(value).all():
        told = "pad series, and give their lengths" if by_time else "a Dequantized takes whole numbers and adds noise"
        raise ValueError(
            f"{who}: expected values in the support, {flow.chain.codomain}, got some outside of it; {told}"
        )
    single = single_base(flow.base(), flow, who)
    known: tuple[str, list[int]] | None = None
    if by_time:
        places = torch.arange(flow.chain.event_shape.numel(), device="cpu").view(flow.chain.event_shape)
        known = ("time", places.T.flatten().tolist())
    total = torch.zeros_like(value)
    found = leaves_of(flow.chain, context)
    for k, leaf in reversed(list(enumerate(found))):
        name = f"{type(leaf.part).__name__} (part {k} of {len(found)})"
        order = _order(leaf.part, name, who)
        if order is not None:
            if known is not None and known[1] != order:
                raise ValueError(
                    f"{who}: {name} takes the dimensions in another order than {known[0]}, so that there are no "
                    "conditionals to read; build a flow of one orientation, e.g. Mint layers that are all lower=True "
                    "and of the same order"
                )
            known = (name, order)
        value, slopes = leaf.to_base_and_slopes(value)
        total = total + slopes
    return -(single.log_prob(value) + total)


def _order(part: FlowTransform, name: str, who: str) -> list[int] | None:
    """The dimensions in a triangular layer's order; ``None`` for an elementwise layer."""
    if is_elementwise(part):
        return None
    order = order_of(part)
    if order is None:
        raise ValueError(
            f"{who}: {name} mixes the dimensions in no order that is known, so that there are no conditionals to read; "
            "build a flow of one orientation, of Mint or Autoregressive layers and elementwise parts"
        )
    return order


def single_base(base: Distribution, flow: Flow, who: str) -> Distribution:
    """The distributions of a base's single dimensions."""
    inner = base
    while isinstance(inner, Independent):
        inner = inner.base_dist
    if inner.event_shape or inner.batch_shape != flow.chain.event_shape:
        raise ValueError(
            f"{who}: expected a base of independent dimensions, such as the default one, got "
            f"{type(inner).__name__} of batch shape {tuple(inner.batch_shape)} and event shape "
            f"{tuple(inner.event_shape)}"
        )
    return inner
