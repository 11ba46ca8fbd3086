"""Maps of surprise: the exact conditional density of each pixel, read off a flow of one orientation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyro_flows.core.chain import Chain
from pyro_flows.core.checks import admit
from pyro_flows.core.transform import Conditioned, FlowTransform, Inverse
from pyro_flows.core.wrap import Wrap
from pyro_flows.distributions import Dequantized, Flow
from pyro_flows.infer.density.units import is_plain_flow
from pyro_flows.infer.uses.anomaly import evaluating
from pyro_flows.transforms import ActNorm, Autoregressive, LogitPixels, Rescaling, Standardization

__all__ = ["is_elementwise", "leaves_of", "pixel_scores", "single_base", "surprise"]

_Leaf = tuple[FlowTransform, Tensor | None, bool]


@torch.no_grad()
def pixel_scores(model: Flow | Dequantized, value: Tensor, context: Tensor | None = None, *, draws: int = 8) -> Tensor:
    r"""How surprising each dimension is, given those before it: :math:`-\log p(y_i \mid y_{<i}, c)` in nats.

    For a flow whose parts are all triangular in one and the same order of the dimensions, or elementwise, this is
    exact: with :math:`x = f^{-1}(y)`, it is :math:`-\log b(x_i) - \log \partial x_i / \partial y_i`, and its sum over
    the event is :math:`-\log p(y)`.  What surprises at a pixel is about the pixels before it in that order alone.  One
    pass in the density direction, and about one more for the slopes of triangular parts.

    Args:
        model: a :class:`~pyro_flows.distributions.flow.Flow` of parts such as ``Mint`` layers of one orientation,
            ``Autoregressive`` ones of one order, ``ActNorm``, ``Rescaling``, ``Standardization``, ``LogitPixels`` and
            elementwise transforms of torch, over a base of independent dimensions; or a
            :class:`~pyro_flows.distributions.dequantization.Dequantized` of one, with uniform noise.  A part of
            another kind takes part if it has ``log_slopes(y, context)``, and the attributes ``order`` and ``lower`` of
            a ``Mint`` layer.
        value: data, shape ``(*batch, *event_shape)``; whole numbers for a ``Dequantized``.
        context: shape ``(*batch, context_dim)``, for a flow that takes one.
        draws: of the noise, over which maps are averaged, for a ``Dequantized``.

    Returns:
        Shape ``(*batch, *event_shape)``, in nats; divide by ``math.log(2)`` for bits.

    Raises:
        ValueError: where parts go through the dimensions in different orders, or mix them in a way that is not known;
            for values outside of the support, or a base of dependent dimensions.
        TypeError: for a model of another kind.

    References:
        MintNet: Building Invertible Neural Networks with Masked Convolutions (Song et al., 2019), arXiv:1907.07945.
    """
    if isinstance(model, Dequantized):
        if model.dequantizer is not None:
            raise ValueError(
                "pixel_scores: noise from a dequantizer has no density pixel by pixel; give Dequantized(flow, levels), "
                "without it"
            )
        flow, values = model.flow, model.intensities(value, draws, fresh=False).unbind(0)
    else:
        flow, values = model, (value,)
    if not is_plain_flow(flow):
        raise TypeError(f"pixel_scores: expected a Flow, or a Dequantized of one, got {type(flow).__name__}")
    context = flow.inner_context(context)
    with evaluating(flow):
        return sum(surprise(flow, each, context) for each in values) / len(values)


def surprise(
    flow: Flow, value: Tensor, context: Tensor | None, who: str = "pixel_scores", by_time: bool = False
) -> Tensor:
    r""":math:`-\log p(y_i \mid y_{<i}, c)` in nats, with a graph where one is wanted.

    Args:
        flow: of one orientation.
        value: shape ``(*batch, *event_shape)``.
        context: as the chain sees it.
        who: asks, for messages.
        by_time: whether the order has to be that of the steps of a series.
    """
    value = admit(flow.chain, value, context, data_side=True)
    if value.numel() and not flow.chain.codomain.check(value).all():
        told = (
            "pad series, and tell their lengths" if by_time else "a Dequantized takes whole numbers and adds the noise"
        )
        raise ValueError(
            f"{who}: expected values in the support, {flow.chain.codomain}, got some outside of it; {told}"
        )
    single = single_base(flow.base(), flow, who)
    known: tuple[str, list[int]] | None = None
    if by_time:
        places = torch.arange(flow.chain.event_shape.numel(), device="cpu").view(flow.chain.event_shape)
        known = ("time", places.T.flatten().tolist())
    total = torch.zeros_like(value)
    leaves = list(leaves_of(flow.chain, context, False))
    for k in reversed(range(len(leaves))):
        part, own, inverse = leaves[k]
        name = f"{type(part).__name__} (part {k} of {len(leaves)})"
        order = _order(part, name, who)
        if order is not None:
            if known is not None and known[1] != order:
                raise ValueError(
                    f"{who}: {name} goes through the dimensions in another order than {known[0]}, so that there "
                    "are no conditionals to read off; build a flow of one orientation, e.g. Mint layers that are all "
                    "lower=True and of the same order"
                )
            known = (name, order)
        if not inverse and hasattr(part, "inverse_and_log_slopes"):
            value, slopes = part.inverse_and_log_slopes(value, own)
            total = total + slopes
            continue
        moved = (part._forward_and_ladj if inverse else part._inverse_and_ladj)(value, own)[0]
        if inverse:
            total = total - _log_slopes(part, value, moved, own)
        else:
            total = total + _log_slopes(part, moved, value, own)
        value = moved
    return -(single.log_prob(value) + total)


def leaves_of(part: FlowTransform, context: Tensor | None, inverse: bool) -> Iterator[_Leaf]:
    """Parts that are no containers, from base to data, each with its context and whether it stands for its inverse."""
    if isinstance(part, Chain):
        for inner in reversed(list(part)) if inverse else part:
            yield from leaves_of(inner, context, inverse)
    elif isinstance(part, Inverse):
        yield from leaves_of(part.transform, context, not inverse)
    elif isinstance(part, Conditioned):
        yield from leaves_of(part.transform, part.context, inverse)
    else:
        yield part, context if part.context_dim else None, inverse


def _order(part: FlowTransform, name: str, who: str) -> list[int] | None:
    """The dimensions in the sequence in which a triangular part goes through them; ``None`` for an elementwise one."""
    if isinstance(part, (ActNorm, LogitPixels, Rescaling, Standardization)) or is_elementwise(part):
        return None
    if isinstance(part, Autoregressive):
        return part.net.order.tolist()
    if not all(hasattr(part, each) for each in ("log_slopes", "order", "lower")):
        raise ValueError(
            f"{who}: {name} mixes the dimensions in no order that is known, so that there are no conditionals "
            "to read off; build a flow of one orientation, of Mint or Autoregressive layers and elementwise parts"
        )
    places = torch.arange(part.event_shape.numel(), device="cpu").view(part.event_shape)
    places = (places if part.order == "channel" else places.movedim(0, -1)).flatten()
    return (places if part.lower else places.flip(0)).tolist()


def is_elementwise(part: FlowTransform) -> bool:
    """Whether a part is one of torch's transforms of single numbers."""
    return isinstance(part, Wrap) and part.transform.domain.event_dim == part.transform.codomain.event_dim == 0


def _log_slopes(part: FlowTransform, base: Tensor, data: Tensor, context: Tensor | None) -> Tensor:
    """Logarithms of the slopes from data to base, of the shape of either."""
    if isinstance(part, ActNorm):
        return -part.log_scale.expand(data.shape)
    if isinstance(part, Standardization):
        return -part.scale.log().expand(data.shape)
    if isinstance(part, Rescaling):
        return part._log_scale(data, context)[0].expand(data.shape)
    if isinstance(part, Wrap):
        return -part.transform.log_abs_det_jacobian(base, data).expand(data.shape)
    if isinstance(part, Autoregressive):
        # The network sees the side that is fast, and moves it to the other.
        seen, sign = (data, 1) if part.fast == "density" else (base, -1)
        flat = part._flat(seen)
        return sign * part._shaped(part.univariate.forward(flat, part.net(flat, context))[1])
    return part.log_slopes(data) if context is None else part.log_slopes(data, context)


def single_base(base: Distribution, flow: Flow, who: str) -> Distribution:
    """The distributions of single dimensions that a base consists of."""
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
