"""Builders of flows of images ``(C, H, W)`` and series ``(C, T)``, with an event of that shape on both sides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Size

from pyro_flows.core.chain import Chain
from pyro_flows.core.checks import integer
from pyro_flows.core.transform import FlowTransform
from pyro_flows.nets.activations import Activation
from pyro_flows.nets.convolutional import image_shape
from pyro_flows.transforms import ActNorm, Conv1x1, ConvCoupling, Split, Squeeze
from pyro_flows.univariate.base import Affine, Univariate

__all__ = ["glow", "multiscale_realnvp"]

_LEAST_SIDE = 4  # of the papers' coarsest scale


def squeezes(builder: str, option: str, event: Size, wanted: int | None, least: int) -> int:
    """The number of squeezes: ``wanted``, or as many as keep sides of ``_LEAST_SIDE``, and ``least`` where possible."""
    possible = min((n & -n).bit_length() - 1 for n in event[1:])
    if wanted is None:
        sensible = max((k for k in range(possible + 1) if min(event[1:]) >> k >= _LEAST_SIDE), default=0)
        wanted = max(sensible, min(least, possible), 1 if least else 0)
    if wanted > possible:
        raise ValueError(
            f"{builder}: expected sides that can be halved {wanted} times, got event shape {tuple(event)}, which "
            f"allows {possible}; set a smaller {option}, pad the data to multiples of {2**wanted}, or crop it"
        )
    return wanted


def squeezed(shape: Size, parts: Iterable[FlowTransform]) -> list[FlowTransform]:
    """Parts of the squeezed image, between the squeeze and its inverse."""
    squeeze = Squeeze(shape)
    return [Squeeze(shape).inv, *parts, squeeze]


def halved(shape: Size) -> tuple[Size, Size]:
    """The squeezed shape, and its half that goes on after a split."""
    channels, *sides = Squeeze(shape).event_shape
    return Size((channels, *sides)), Size((channels // 2, *sides))


def multiscale_realnvp(
    event_shape: Iterable[int],
    *,
    context_dim: int = 0,
    num_scales: int | None = None,
    num_couplings: int = 3,
    hidden_channels: int = 32,
    num_blocks: int = 2,
    kernel_size: int | Sequence[int] = 3,
    activation: Activation = "relu",
    max_log_scale: float = 3.0,
    univariate: Univariate | None = None,
) -> Chain:
    """Multi-scale RealNVP: affine couplings of images at several scales; half of the numbers leave at each.

    From data to base, each scale has ``num_couplings`` couplings with alternating checkerboard masks, a squeeze, as
    many with alternating channel masks, and a split: half of the channels are Gaussian given the others, which go on to
    the next scale.  The last scale has ``num_couplings + 1`` checkerboards.  Squeezes are undone on the base side.
    Each direction costs one pass of a convolutional network per coupling and split.  A fresh flow is the identity.

    The paper's networks have batch normalization, and its splits are standard normals.

    Args:
        event_shape: ``(C, H, W)`` or ``(C, T)``.
        context_dim: size of the context, 0 for none.
        num_scales: one more than the squeezes; by default the most with coarsest sides of 4 or more: 2 for 8 x 8, 3 for
            28 x 28, 4 for 32 x 32 (paper: down to 4 x 4).
        num_couplings: number of checkerboards, and of channel couplings, of each scale (paper: 3).
        hidden_channels: width of the finest networks, doubled by each squeeze (paper: 64 for CIFAR-10, else 32).
        num_blocks: residual blocks of each network (paper: 8 for CIFAR-10, 4 for other images of 32 x 32, 2 for 64 x
            64).
        kernel_size: of the networks (paper: 3); or three, as for :func:`glow`.
        activation: of the networks (paper: ReLU).
        max_log_scale: bound of the smooth clip on log-scales (paper: tanh times a learned scale).
        univariate: another family of scalar maps for the couplings.

    Raises:
        ValueError: if the event is no image or series, or cannot be squeezed that often.

    Example:
        >>> flow = pf.Flow(pf.multiscale_realnvp((1, 8, 8), num_blocks=1))
        >>> flow.log_prob(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2])

    References:
        Density estimation using Real NVP (Dinh et al., 2016), section 3.6, arXiv:1605.08803.
    """
    event = image_shape("multiscale_realnvp", event_shape)
    count = integer("multiscale_realnvp", "num_couplings", num_couplings)
    wanted = None if num_scales is None else integer("multiscale_realnvp", "num_scales", num_scales) - 1
    last = squeezes("multiscale_realnvp", "num_scales", event, wanted, least=0)
    width = integer("multiscale_realnvp", "hidden_channels", hidden_channels)
    family = Affine(max_log_scale) if univariate is None else univariate
    options: dict[str, Any] = {"context_dim": context_dim, "kernel_size": kernel_size, "activation": activation}

    def couplings(shape: Size, mask: str, number: int, level: int) -> list[FlowTransform]:
        more = {"hidden_channels": width << level, "num_blocks": num_blocks, **options}
        if mask == "checkerboard" and shape[1:].numel() == 1 and shape[0] > 1:
            mask = "channels"  # one place only
        return [ConvCoupling(shape, family, mask=mask, flip=k % 2 == 1, **more) for k in reversed(range(number))]

    def scale(shape: Size, level: int) -> list[FlowTransform]:
        if level == last:
            return couplings(shape, "checkerboard", count + 1, level)
        whole, half = halved(shape)
        more = {"hidden_channels": width << (level + 1), "max_log_scale": max_log_scale, **options}
        split = Split(Chain(scale(half, level + 1)), whole, **more)
        coarse = squeezed(shape, [split, *couplings(whole, "channels", count, level + 1)])
        return [*coarse, *couplings(shape, "checkerboard", count, level)]

    return Chain(scale(event, 0))


def glow(
    event_shape: Iterable[int],
    *,
    context_dim: int = 0,
    num_scales: int | None = None,
    num_layers: int = 8,
    hidden_channels: int = 64,
    num_blocks: int = 1,
    kernel_size: int | Sequence[int] = 3,
    activation: Activation = "relu",
    max_log_scale: float = 3.0,
    univariate: Univariate | None = None,
    start: str = "rotation",
) -> Chain:
    """Glow: layers of activation normalization, an invertible 1x1 convolution and a coupling, at several scales.

    From data to base, each scale has a squeeze, ``num_layers`` layers (:class:`~pyro_flows.transforms.ActNorm`,
    :class:`~pyro_flows.transforms.Conv1x1`, :class:`~pyro_flows.transforms.ConvCoupling` of half of the channels), and,
    except for the last, a split: half of the channels are Gaussian given the others, which go on.  Squeezes are undone
    on the base side.  Each direction costs one pass of a network per layer and split.

    Until its first batch in training mode sets the normalization, a flow is a product of rotations, or with
    ``start="identity"`` the identity, to rounding.

    Args:
        event_shape: ``(C, H, W)`` or ``(C, T)``.
        context_dim: size of the context, 0 for none; couplings and splits see it.
        num_scales: number of scales, each with a squeeze; by default the most with coarsest sides of 4 or more, and at
            least two where sides allow it: 2 for 8 x 8 and 28 x 28, 3 for 32 x 32 (paper: :math:`L = 3`).
        num_layers: number of layers of each scale (paper: :math:`K = 32`, and 48 for ImageNet).
        hidden_channels: width of the networks (paper: 512).
        num_blocks: residual blocks of each network (paper: one convolution in their place, without a skip).
        kernel_size: of all convolutions of the networks; or three, of the first, those of the blocks, and the last
            (paper: 3, 1 and 3).
        activation: of the networks (paper: ReLU).
        max_log_scale: bound of the smooth clip on log-scales (paper: a sigmoid).
        univariate: another family of scalar maps for the couplings.
        start: of the 1x1 convolutions: ``"rotation"`` (paper), ``"permutation"`` or ``"identity"``.

    Raises:
        ValueError: if the event is no image or series, or cannot be squeezed that often.

    Example:
        >>> flow = pf.Flow(pf.glow((3, 8, 8), num_layers=2, hidden_channels=16)).eval()
        >>> flow.sample((2,)).shape
        torch.Size([2, 3, 8, 8])

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018), arXiv:1807.03039.
    """
    event = image_shape("glow", event_shape)
    integer("glow", "num_layers", num_layers)
    wanted = None if num_scales is None else integer("glow", "num_scales", num_scales)
    count = squeezes("glow", "num_scales", event, wanted, least=2)
    family = Affine(max_log_scale) if univariate is None else univariate
    options: dict[str, Any] = {
        "context_dim": context_dim,
        "hidden_channels": hidden_channels,
        "kernel_size": kernel_size,
        "activation": activation,
    }

    def layer(shape: Size) -> list[FlowTransform]:
        coupling = ConvCoupling(shape, family, mask="channels", num_blocks=num_blocks, **options)
        return [coupling, Conv1x1(shape, start=start), ActNorm(shape)]

    def scale(shape: Size, level: int) -> list[FlowTransform]:
        whole, half = halved(shape)
        parts = [part for _ in range(num_layers) for part in layer(whole)]
        if level + 1 < count:
            inner = Chain(scale(half, level + 1))
            parts = [Split(inner, whole, max_log_scale=max_log_scale, **options), *parts]
        return squeezed(shape, parts)

    return Chain(scale(event, 0))
