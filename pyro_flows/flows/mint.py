"""The builder of MintNet: pairs of masked convolutional layers for images ``(C, H, W)`` and series ``(C, T)``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import Any

from torch import Size

from pyro_flows.core.chain import Chain
from pyro_flows.core.checks import integer, positive_integers
from pyro_flows.core.transform import FlowTransform
from pyro_flows.flows.images import halved, squeezed, squeezes
from pyro_flows.nets.convolutional import image_shape
from pyro_flows.transforms import ActNorm, Mint, Split

__all__ = ["MINTNET_CONFIGURATIONS", "mintnet"]

#: The paper's networks by data set, as options of ``mintnet``.
MINTNET_CONFIGURATIONS = MappingProxyType(
    {
        "mnist": MappingProxyType({"num_layers": 20, "num_groups": 45, "squeeze": 2}),
        "cifar10": MappingProxyType({"num_layers": 21, "num_groups": 85, "squeeze": 2}),
        "imagenet32": MappingProxyType({"num_layers": 21, "num_groups": 85, "squeeze": 2}),
    }
)


def mintnet(  # noqa: D417 -- the class documents the other options
    event_shape: Iterable[int],
    *,
    context_dim: int = 0,
    num_layers: int = 6,
    num_groups: int | Sequence[int] = 16,
    kernel_size: int = 3,
    order: str | None = None,
    squeeze: int = 0,
    split: bool = False,
    act_norm: bool = False,
    one_sided: bool = False,
    causal: bool = False,
    dilations: int | Sequence[int] | None = None,
    hidden_dims: Sequence[int] = (64,),
    activation: str = "elu",
    min_slope: float = 1e-3,
    attention: int = 0,
    head_dim: int = 16,
    window: int | None = None,
    shared_scale: bool = False,
    tolerance: float | None = None,
    max_sweeps: int | None = None,
    on_fail: str = "raise",
) -> Chain:
    """MintNet: pairs of :class:`~pyro_flows.transforms.Mint` layers, monotone maps by masked convolutions.

    From data to base, the first layer of each pair makes a coordinate depend on those before it, the second on those
    after it; the log-determinant is exact.  Density costs two passes per pair.  Sampling is exact and solves two
    triangular systems per pair, each by about as many passes as its longest chain of dependencies, or fewer.  Squeezes
    are undone on the base side.  A fresh flow is near the identity.

    The paper's networks are ``mintnet((3, 32, 32), **MINTNET_CONFIGURATIONS["cifar10"])`` and so on, with ``from
    pyro_flows.flows import MINTNET_CONFIGURATIONS``.

    Args:
        event_shape: ``(C, H, W)`` or ``(C, T)``.
        context_dim: size of the context, 0 for none.
        num_layers: number of pairs (paper: 20 for MNIST, 21 for CIFAR-10 and ImageNet32).
        num_groups: hidden maps per channel, reduced by squeezes as channels grow, or one number for each stage between
            squeezes (paper: 45 for MNIST, 85 for CIFAR-10).
        squeeze: number of squeezes, spread evenly over the pairs (paper: 2).
        split: whether half of the channels leave after each squeeze, Gaussian given the others (paper: no).
        act_norm: whether each pair has an :class:`~pyro_flows.transforms.ActNorm` on its data side (paper: no).
        one_sided: whether all layers have the first one's orientation, so that the flow is triangular and gives the
            density of each coordinate given those before it; needs ``squeeze=0``.
        causal: for series ``(C, T)``: all layers go by time, with parameters that all times share, so the flow
            continues beyond ``T``, see :class:`~pyro_flows.infer.Stream`.  Implies ``one_sided=True``,
            ``order="position"`` and ``shared_scale=True``.
        dilations: distances of the convolutions' taps, for the layers in the order in which data meet them, repeated if
            need be; by default 1, or 1, 2, 4, 8 if ``causal``.  A causal chain looks ``reach`` steps back, three halves
            of ``kernel_size - 1`` times the sum of the layers' dilations.
        kernel_size, order, hidden_dims, activation, min_slope: as in :class:`~pyro_flows.transforms.Mint` (paper: 3, by
            channel, ELU, 1e-12).
        attention, head_dim, window, shared_scale: as in ``Mint`` (paper: no attention).
        tolerance, max_sweeps, on_fail: as in ``Mint``.

    Raises:
        ValueError: if the event is no image or series, or cannot be squeezed that often, or options do not go together.

    Example:
        >>> flow = pf.Flow(pf.mintnet((1, 6, 6), num_layers=1, num_groups=4))
        >>> x = flow.sample((2,))
        >>> flow.log_prob(x).shape
        torch.Size([2])

    References:
        MintNet: Building Invertible Neural Networks with Masked Convolutions (Song et al., 2019), arXiv:1907.07945.
    """
    event = image_shape("mintnet", event_shape)
    if causal:
        if len(event) != 2:
            raise ValueError(f"mintnet: expected a series (C, T) for causal=True, got event shape {tuple(event)}")
        if order not in (None, "position"):
            raise ValueError(
                f"mintnet: causal=True goes by time, so it needs order='position', got order={order!r}; leave order out"
            )
        one_sided, order, shared_scale = True, "position", True
    _check(event, num_layers, squeeze, split, one_sided)
    if dilations is None:
        dilations = (1, 2, 4, 8) if causal else 1
    apart = positive_integers("mintnet", "dilations", dilations)
    groups = _groups(num_groups, squeeze, len(event) - 1)
    per_stage = num_layers // (squeeze + 1)
    options: dict[str, Any] = {
        "kernel_size": kernel_size,
        "order": order,
        "context_dim": context_dim,
        "hidden_dims": hidden_dims,
        "activation": activation,
        "min_slope": min_slope,
        "attention": attention,
        "head_dim": head_dim,
        "window": window,
        "shared_scale": shared_scale,
        "tolerance": tolerance,
        "max_sweeps": max_sweeps,
        "on_fail": on_fail,
    }

    def pair(shape: Size, width: int, before: int) -> list[FlowTransform]:
        # The layer that data meet first comes last.
        layers = [
            Mint(
                shape,
                num_groups=width,
                lower=one_sided or k == 1,
                dilation=apart[(2 * before + 1 - k) % len(apart)],
                **options,
            )
            for k in range(2)
        ]
        return [*layers, *([ActNorm(shape)] if act_norm else [])]

    def stage(shape: Size, level: int) -> list[FlowTransform]:
        count = per_stage if level < squeeze else num_layers - squeeze * per_stage
        met = level * per_stage  # pairs that data meet before this stage
        pairs = [part for k in reversed(range(count)) for part in pair(shape, groups[level], met + k)]
        if level == squeeze:
            return pairs
        whole, half = halved(shape)
        inner = stage(half if split else whole, level + 1)
        return [*squeezed(shape, [Split(Chain(inner), whole, context_dim=context_dim)] if split else inner), *pairs]

    return Chain(stage(event, 0))


def _check(event: Size, num_layers: int, squeeze: int, split: bool, one_sided: bool) -> None:
    integer("mintnet", "squeeze", squeeze, 0)
    integer("mintnet", "num_layers", num_layers)
    if num_layers <= squeeze:
        raise ValueError(
            f"mintnet: expected at least one pair of layers at each size, so num_layers > squeeze, got {num_layers} "
            f"and {squeeze}"
        )
    squeezes("mintnet", "squeeze", event, squeeze, least=0)
    if split and not squeeze:
        raise ValueError("mintnet: split=True needs squeeze >= 1: channels leave after squeezes")
    if one_sided and squeeze:
        raise ValueError(
            "mintnet: one_sided=True needs squeeze=0: a squeezed image has another order, so the whole flow "
            "would not be triangular"
        )


def _groups(num_groups: int | Sequence[int], squeeze: int, dims: int) -> list[int]:
    """The number of groups at each stage."""
    if isinstance(num_groups, int):
        integer("mintnet", "num_groups", num_groups)
        return [max(num_groups >> (dims * k), 1) for k in range(squeeze + 1)]
    groups = list(num_groups) if isinstance(num_groups, Iterable) and not isinstance(num_groups, str) else []
    if len(groups) != squeeze + 1:
        raise ValueError(
            f"mintnet: expected num_groups to be an integer or {squeeze + 1} of them, one more than there are squeezes"
            f", got {num_groups!r}"
        )
    return groups
