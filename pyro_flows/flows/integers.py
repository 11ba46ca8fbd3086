"""The builder of integer discrete flows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Size

from pyro_flows.core.chain import Chain
from pyro_flows.core.checks import event_size, integer
from pyro_flows.core.transform import FlowTransform
from pyro_flows.flows.images import halved, squeezed, squeezes
from pyro_flows.nets.convolutional import image_shape
from pyro_flows.transforms import IntegerCoupling, IntegerSplit

__all__ = ["idf"]


def idf(
    event_shape: int | Iterable[int],
    *,
    num_layers: int = 4,
    num_parts: int = 2,
    context_dim: int = 0,
    levels: int = 256,
    num_scales: int | None = None,
    hidden_dims: Sequence[int] | None = None,
    kernel_size: int = 3,
) -> Chain:
    r"""Integer discrete flow: a bijection of whole numbers by rounded shifts, for exact masses and compression.

    A layer divides the channels into ``num_parts`` parts, at random but for the first layer, and shifts one after
    the other given all others: :math:`y_p = x_p + \lfloor s\, t_p(y_{<p}, x_{>p}, c) \rceil`.  A vector is an event of
    channels without places.  Images and series are squeezed at each scale, go through ``num_layers`` layers, and at all
    scales but the last half of the channels leave.  ``Flow(idf(...))`` is a distribution over whole numbers, whose base
    is an :class:`~pyro_flows.distributions.IntegerLogistics`, given the kept half for a half that leaves.

    There is no log-determinant.  Both directions are exact, and cost one pass in float64 for each part of each layer.
    A fresh flow is the identity.  Gradients take rounding for the identity.

    The paper moves one part in a layer, with ``num_parts=4`` (75 % kept); all parts in turn, with 2 or 4, are the
    later paper's.

    Args:
        event_shape: an ``input_dim``, ``(C, T)`` or ``(C, H, W)``.
        num_layers: layers of each scale, of ``num_parts`` couplings each (paper: 8 couplings in each of 3 scales).
        num_parts: parts of a layer, at most as many as channels.
        context_dim: size of the context, 0 for none; couplings and the base see it.
        levels: the number of values that the data mostly have, from 0; a scale, no bound (paper: 256).
        num_scales: of images and series, each with a squeeze; by default the most with coarsest sides of 4 or more, and
            at least two where sides allow it: 2 for 8 x 8 and 28 x 28, 3 for 32 x 32 (paper: 3).
        hidden_dims: widths of the networks; by default two layers of ``4 * input_dim``, from 64 to 256, for vectors,
            and (32, 32) for images and series (paper: a DenseNet of 512 channels).
        kernel_size: of the first and the last layer of the networks of images (paper: 3).

    Raises:
        ValueError: for sizes out of range, or sides that cannot be halved that often.

    Example:
        >>> flow = pf.Flow(pf.idf(4, levels=10))
        >>> x = flow.sample((5,))
        >>> bool((x == x.round()).all())
        True
        >>> flow.log_prob(x).shape  # log-masses
        torch.Size([5])

    References:
        Integer Discrete Flows and Lossless Compression (Hoogeboom et al., 2019), arXiv:1905.07376.
        General Invertible Transformations for Flow-based Generative Modeling (Tomczak, 2020), arXiv:2011.15056.
    """
    event = event_size(event_shape)
    integer("idf", "num_layers", num_layers)
    integer("idf", "num_parts", num_parts, 2)
    if hidden_dims is None:
        hidden_dims = (min(max(4 * event[0], 64), 256),) * 2 if len(event) == 1 else (32, 32)
    options: dict[str, Any] = {
        "context_dim": context_dim,
        "levels": levels,
        "hidden_dims": hidden_dims,
        "kernel_size": kernel_size,
    }

    def layer(shape: Size, first: bool) -> list[FlowTransform]:
        channels = shape[0]
        if num_parts > channels > 1:
            raise ValueError(
                f"idf: expected num_parts to be at most the number of channels, {channels}, got {num_parts}; set a "
                "smaller one, or squeeze more often (num_scales)"
            )
        parts = (torch.arange(channels) if first else torch.randperm(channels)).tensor_split(min(num_parts, channels))
        kept = [torch.ones(channels, dtype=torch.bool).index_fill(0, part, False) for part in parts]
        return [IntegerCoupling(shape, mask, **options) for mask in kept]

    def layers(shape: Size) -> list[FlowTransform]:
        return [part for k in reversed(range(num_layers)) for part in layer(shape, k == 0)]

    if len(event) == 1:
        if num_scales is not None:
            raise ValueError(f"idf: num_scales is for images and series, got it for an event of shape {tuple(event)}")
        return Chain(layers(event))
    image_shape("idf", event)
    wanted = None if num_scales is None else integer("idf", "num_scales", num_scales)
    count = squeezes("idf", "num_scales", event, wanted, least=2)

    def scale(shape: Size, level: int) -> list[FlowTransform]:
        whole, half = halved(shape)
        inner = [IntegerSplit(Chain(scale(half, level + 1)), whole)] if level + 1 < count else []
        return squeezed(shape, [*inner, *layers(whole)])

    return Chain(scale(event, 0))
