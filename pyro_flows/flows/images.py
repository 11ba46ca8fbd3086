"""Builders of flows of images ``(C, H, W)`` and series ``(C, T)``, with an event of that shape on both sides."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Size

from pyro_flows.core.chain import Chain
from pyro_flows.core.transform import FlowTransform
from pyro_flows.nets.activations import Activation
from pyro_flows.nets.convolutional import image_shape
from pyro_flows.transforms import ActNorm, Conv1x1, ConvCoupling, Split, Squeeze
from pyro_flows.univariate.base import Affine, Univariate

__all__ = ["glow", "multiscale_realnvp"]

_LEAST_SIDE = 4  # of the coarsest scale of the papers


def _count(builder: str, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{builder}: expected {name} to be an integer >= 1, got {value!r}")
    return value


def _squeezes(builder: str, event: Size, asked: int | None, least: int) -> int:
    """How often to squeeze: as asked, or while sides are even and stay above ``_LEAST_SIDE``, and so often at least."""
    possible = min((n & -n).bit_length() - 1 for n in event[1:])
    if asked is None:
        sensible = max((k for k in range(possible + 1) if min(event[1:]) >> k >= _LEAST_SIDE), default=0)
        asked = max(sensible, min(least, possible), 1 if least else 0)
    if asked > possible:
        raise ValueError(
            f"{builder}: expected sides that can be halved {asked} times, got event shape {tuple(event)}, which allows "
            f"{possible}; ask for fewer scales, pad the data to sides that are multiples of {2**asked}, or crop it"
        )
    return asked


def _squeezed(shape: Size, parts: Iterable[FlowTransform]) -> list[FlowTransform]:
    """Parts that act on the squeezed image, between what undoes a squeeze and the squeeze."""
    squeeze = Squeeze(shape)
    return [Squeeze(shape).inv, *parts, squeeze]


def _half(shape: Size) -> tuple[Size, Size]:
    """The squeezed shape, and the half of it that a split lets through."""
    channels, *sides = Squeeze(shape).event_shape
    return Size((channels, *sides)), Size((channels // 2, *sides))


def multiscale_realnvp(
    event_shape: Iterable[int],
    *,
    context_dim: int = 0,
    num_scales: int | None = None,
    num_couplings: int = 3,
    channels: int = 32,
    num_blocks: int = 2,
    kernel_size: int = 3,
    activation: Activation = "relu",
    max_log_scale: float = 3.0,
    univariate: Univariate | None = None,
) -> Chain:
    r"""Multi-scale RealNVP: affine couplings of images at several scales, half of the numbers leaving at each.

    From data to base, each scale has ``num_couplings`` couplings with checkerboard masks in turns, a squeeze, as many
    with channel masks in turns, and a split: half of the channels are Gaussian given the others, which go on to the
    next scale.  The last scale has ``num_couplings + 1`` checkerboards.  Squeezes are undone on the base side, so the
    base is an event of the image's shape.  Both directions cost as many passes of a convolutional network as there
    are couplings and splits.  A fresh flow is the identity.

    Args:
        event_shape: ``(C, H, W)`` or ``(C, T)``.
        context_dim: size of the context, 0 for none.
        num_scales: number of scales, one more than there are squeezes; by default as many as leave the coarsest scale a
            side of 4 or more: 2 for 8 x 8, 3 for 28 x 28, and 4 for 32 x 32 (paper: down to 4 x 4).
        num_couplings: checkerboards, and channel couplings, of each scale (paper: 3).
        channels: hidden channels of the finest scale's networks, twice as many after each squeeze as in the paper
            (there 64 for CIFAR-10, else 32).
        num_blocks: residual blocks of each network (paper: 8 for CIFAR-10, 4 for other images of 32 x 32, 2 for those
            of 64 x 64).
        kernel_size: of the networks' convolutions (paper: 3).
        activation: of the networks (paper: ReLU).
        max_log_scale: bound of the smooth clip on log-scales (paper: tanh times a learnt scale).
        univariate: another family of scalar maps in place of the affine one of the couplings.

    Raises:
        ValueError: if the event is no image or series, or cannot be squeezed that often.

    The paper has batch normalisation in the networks and between the couplings; here there is none, so the density of
    an image does not depend on others in its batch.  Its split has a standard normal, not one given the other half.

    References:
        Density estimation using Real NVP (Dinh et al., 2016), section 3.6, arXiv:1605.08803.
    """
    event = image_shape("multiscale_realnvp", event_shape)
    count = _count("multiscale_realnvp", "num_couplings", num_couplings)
    asked = None if num_scales is None else _count("multiscale_realnvp", "num_scales", num_scales) - 1
    squeezes = _squeezes("multiscale_realnvp", event, asked, least=0)
    width = _count("multiscale_realnvp", "channels", channels)
    family = Affine(max_log_scale) if univariate is None else univariate
    options = {"context_dim": context_dim, "kernel_size": kernel_size, "activation": activation}

    def couplings(shape: Size, mask: str, number: int, level: int) -> list[FlowTransform]:
        more = {"channels": width << level, "num_blocks": num_blocks, **options}
        if mask == "checkerboard" and shape[1:].numel() == 1 and shape[0] > 1:
            mask = "channels"  # one place only
        # From data to base the first of them moves what a plain mask moves.
        return [ConvCoupling(shape, family, mask=mask, flip=k % 2 == 1, **more) for k in reversed(range(number))]

    def scale(shape: Size, level: int) -> list[FlowTransform]:
        if level == squeezes:
            return couplings(shape, "checkerboard", count + 1, level)
        whole, half = _half(shape)
        more = {"channels": width << (level + 1), "max_log_scale": max_log_scale, **options}
        split = Split(Chain(scale(half, level + 1)), whole, **more)
        coarse = _squeezed(shape, [split, *couplings(whole, "channels", count, level + 1)])
        return [*coarse, *couplings(shape, "checkerboard", count, level)]

    return Chain(scale(event, 0))


def glow(
    event_shape: Iterable[int],
    *,
    context_dim: int = 0,
    num_scales: int | None = None,
    num_steps: int = 8,
    channels: int = 64,
    num_blocks: int = 1,
    kernel_size: int = 3,
    activation: Activation = "relu",
    max_log_scale: float = 3.0,
    univariate: Univariate | None = None,
    start: str = "rotation",
) -> Chain:
    r"""Glow: steps of activation normalisation, an invertible 1x1 convolution and a coupling, at several scales.

    From data to base, each scale has a squeeze, ``num_steps`` steps (:class:`~pyro_flows.transforms.ActNorm`,
    :class:`~pyro_flows.transforms.Conv1x1`, :class:`~pyro_flows.transforms.ConvCoupling` of half of the channels), and,
    but for the last, a split: half of the channels are Gaussian given the others, which go on to the next scale.
    Squeezes are undone on the base side, so the base is an event of the image's shape.  Both directions cost as many
    passes of a convolutional network as there are steps and splits.

    A fresh flow is a product of rotations, or with ``start="identity"`` the identity to rounding, until its first batch
    sets the normalisation, which happens in training mode; see :class:`~pyro_flows.transforms.ActNorm`.

    Args:
        event_shape: ``(C, H, W)`` or ``(C, T)``.
        context_dim: size of the context, 0 for none; couplings and splits see it.
        num_scales: number of scales, each of which squeezes; by default as many as leave the coarsest scale a side of 4
            or more, and two at least, where sides are even so often: 2 for 8 x 8 and 28 x 28, and 3 for 32 x 32, as in
            the paper (its :math:`L`).
        num_steps: steps of each scale (paper: :math:`K = 32`, and 48 for ImageNet).
        channels: hidden channels of the networks (paper: 512).
        num_blocks: residual blocks of each network (paper: three convolutions, of 3, 1 and 3, without residual ones).
        kernel_size: of the networks' convolutions (paper: 3).
        activation: of the networks (paper: ReLU).
        max_log_scale: bound of the smooth clip on log-scales (paper: a sigmoid in place of the exponential).
        univariate: another family of scalar maps in place of the affine one of the couplings.
        start: of the 1x1 convolutions: ``"rotation"`` (paper), ``"permutation"`` or ``"identity"``.

    Raises:
        ValueError: if the event is no image or series, or cannot be squeezed that often.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018), arXiv:1807.03039.
    """
    event = image_shape("glow", event_shape)
    steps = _count("glow", "num_steps", num_steps)
    asked = None if num_scales is None else _count("glow", "num_scales", num_scales)
    squeezes = _squeezes("glow", event, asked, least=2)
    family = Affine(max_log_scale) if univariate is None else univariate
    options = {"context_dim": context_dim, "channels": channels, "kernel_size": kernel_size, "activation": activation}

    def step(shape: Size) -> list[FlowTransform]:
        coupling = ConvCoupling(shape, family, mask="channels", num_blocks=num_blocks, **options)
        return [coupling, Conv1x1(shape, start=start), ActNorm(shape)]

    def scale(shape: Size, level: int) -> list[FlowTransform]:
        whole, half = _half(shape)
        parts = [part for _ in range(steps) for part in step(whole)]
        if level + 1 < squeezes:
            inner = Chain(scale(half, level + 1))
            parts = [Split(inner, whole, max_log_scale=max_log_scale, **options), *parts]
        return _squeezed(shape, parts)

    return Chain(scale(event, 0))
