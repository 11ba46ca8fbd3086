"""Builders of flows of vectors, each the identity when fresh.

``hidden_dims=None`` means two hidden layers of width ``4 * input_dim``, at least 64 and at most 512.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_flows.core.chain import Chain
from pyro_flows.core.checks import choice, event_size, integer
from pyro_flows.nets.activations import Activation
from pyro_flows.transforms import Autoregressive, Coupling, Rescaling
from pyro_flows.transforms.coupling import Mask, coupling_mask
from pyro_flows.univariate.base import Affine, Shift, Univariate
from pyro_flows.univariate.spline import Spline

__all__ = ["iaf", "maf", "ncsf", "nice", "nsf", "realnvp"]

Order = str | Sequence[int] | Tensor


def _hidden(event_shape: int | Iterable[int], hidden_dims: Sequence[int] | None) -> Sequence[int]:
    if hidden_dims is not None:
        return hidden_dims
    return (min(max(64, 4 * event_size(event_shape).numel()), 512),) * 2


def _couplings(
    event_shape: int | Iterable[int], univariate: Univariate, num_layers: int, mask: Mask, **options: Any
) -> list[Coupling]:
    """Layers in pairs, the second of which moves what the first keeps; a random mask is drawn anew for each pair."""
    layers: list[Coupling] = []
    random = isinstance(mask, str) and mask == "random"
    for k in range(integer("", "num_layers", num_layers)):
        if k % 2 == 0:
            kept = coupling_mask(event_size(event_shape), mask)
        layers.append(Coupling(event_shape, univariate, mask=kept, flip=k % 2 == 1, save_mask=random, **options))
    return layers


def nice(
    input_dim: int | Iterable[int],
    *,
    context_dim: int = 0,
    num_layers: int = 4,
    hidden_dims: Sequence[int] | None = None,
    mask: Mask = "alternating",
    rescale: bool = True,
    residual: bool = False,
    activation: Activation = "silu",
) -> Chain:
    r"""NICE: additive couplings and a diagonal rescaling layer.

    From data to base, :math:`h = f_1 \circ \dots \circ f_n(y)` by couplings :math:`h_m = y_m - m(y_k)` of unit
    Jacobian, then :math:`x = e^{s} h`; :math:`\log|\det \partial x / \partial y| = \sum_i s_i`.  Both directions cost
    ``num_layers`` passes of a dense network.

    Args:
        input_dim: the number of dimensions, or an event shape.
        context_dim: size of the context, 0 for none; couplings and rescaling then depend on it.
        num_layers: number of couplings (paper: 4).
        hidden_dims: widths of each conditioner's hidden layers (paper: five of 1000; here by size, see the module).
        mask: which dimensions the first coupling keeps: ``"half"``, ``"alternating"``, ``"random"`` or boolean; the
            second moves those, and so on (paper: alternating).
        rescale: whether to end, on the base side, with the rescaling layer.
        residual: whether conditioners have residual blocks.
        activation: of the conditioners (paper: ReLU).

    The paper's base is logistic; here it is whatever base the chain is given.

    References:
        NICE: Non-linear Independent Components Estimation (Dinh et al., 2014), arXiv:1410.8516.
    """
    options: dict[str, Any] = {"context_dim": context_dim, "residual": residual, "activation": activation}
    hidden = _hidden(input_dim, hidden_dims)
    layers = _couplings(input_dim, Shift(), num_layers, mask, hidden_dims=hidden, **options)
    if rescale:
        # Conditional scales need no depth of their own: one layer as wide as the couplings' first.
        widths = tuple(hidden)[:1]
        return Chain([Rescaling(input_dim, hidden_dims=widths, **options), *layers])
    return Chain(layers)


def realnvp(
    input_dim: int | Iterable[int],
    *,
    context_dim: int = 0,
    num_layers: int = 8,
    hidden_dims: Sequence[int] | None = None,
    mask: Mask = "alternating",
    residual: bool = False,
    activation: Activation = "silu",
    max_log_scale: float = 3.0,
    univariate: Univariate | None = None,
) -> Chain:
    r"""RealNVP: affine couplings, :math:`y_m = x_m e^{s(x_k)} + m(x_k)`.

    Both directions cost ``num_layers`` passes of a dense network; the triangular Jacobian gives
    :math:`\log|\det| = \sum s`.

    Args:
        input_dim: the number of dimensions, or an event shape.
        context_dim: size of the context, 0 for none.
        num_layers: number of couplings (paper: depends on the scale; 5 or 10 in the MAF paper's comparison).
        hidden_dims: widths of each conditioner's hidden layers (here by size, see the module).
        mask: which dimensions the first coupling keeps: ``"half"``, ``"alternating"``, ``"random"`` (a new draw for
            each pair of layers) or boolean; the second moves those, and so on.
        residual: whether conditioners have residual blocks (paper: convolutional residual ones).
        activation: of the conditioners (paper: ReLU).
        max_log_scale: bound of the smooth clip on log-scales (paper: tanh times a learned scale).
        univariate: another family of scalar maps in place of the affine one.

    References:
        Density estimation using Real NVP (Dinh et al., 2016), arXiv:1605.08803.
    """
    family = Affine(max_log_scale) if univariate is None else univariate
    options: dict[str, Any] = {"context_dim": context_dim, "residual": residual, "activation": activation}
    return Chain(
        _couplings(input_dim, family, num_layers, mask, hidden_dims=_hidden(input_dim, hidden_dims), **options)
    )


def _autoregressive(
    input_dim: int | Iterable[int],
    fast: str,
    num_layers: int,
    order: Order,
    adjacency: Tensor | None,
    **options: Any,
) -> Chain:
    layers = []
    for k in range(integer("", "num_layers", num_layers)):
        if isinstance(order, str) and order == "alternating":
            each: Order = "identity" if k % 2 == 0 or adjacency is not None else "reverse"
        else:
            each = order
        layers.append(Autoregressive(input_dim, fast=fast, order=each, adjacency=adjacency, **options))
    return Chain(layers)


def maf(
    input_dim: int | Iterable[int],
    *,
    context_dim: int = 0,
    num_layers: int = 5,
    hidden_dims: Sequence[int] | None = None,
    order: Order = "alternating",
    adjacency: Tensor | None = None,
    residual: bool = False,
    activation: Activation = ("isru", "silu"),
    max_log_scale: float = 2.0,
    univariate: Univariate | None = None,
) -> Chain:
    r"""Masked autoregressive flow: :math:`x_i = y_i e^{s_i(y_{<i})} + m_i(y_{<i})` in each layer, from data to base.

    Density costs ``num_layers`` passes of a masked network.  Sampling is exact, goes through ``input_dim`` steps per
    layer, and uses each weight once: about the arithmetic of one dense pass per layer.

    Args:
        input_dim: the number of dimensions, or an event shape.
        context_dim: size of the context, 0 for none.
        num_layers: number of autoregressive layers (paper: 5 and 10).
        hidden_dims: widths of each network's hidden layers (paper: one or two of 100 to 1024; here by size, see the
            module).
        order: ``"alternating"`` (natural and reversed in turns, as in the paper), ``"identity"``, ``"reverse"``,
            ``"random"`` (drawn for each layer) or a permutation for all layers.
        adjacency: boolean matrix in place of the order: which outputs may see which inputs; the same in all layers.
        residual: whether networks have residual blocks.
        activation: of the networks (paper: ReLU); the first layer's is bounded, so that an input far out does not
            throw the others far.
        max_log_scale: bound of the smooth clip on log-scales (paper: none); a tight one keeps layers from blowing up
            each other's outliers.
        univariate: another family of scalar maps in place of the affine one.

    The paper writes the same family from base to data, :math:`y_i = x_i e^{\alpha_i} + \mu_i`, and puts batch
    normalization between layers; here there is none.

    References:
        Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017), arXiv:1705.07057.
    """
    options: dict[str, Any] = {"context_dim": context_dim, "residual": residual, "activation": activation}
    options["univariate"] = Affine(max_log_scale) if univariate is None else univariate
    options["hidden_dims"] = _hidden(input_dim, hidden_dims)
    return _autoregressive(input_dim, "density", num_layers, order, adjacency, **options)


def iaf(
    input_dim: int | Iterable[int],
    *,
    context_dim: int = 0,
    num_layers: int = 3,
    hidden_dims: Sequence[int] | None = None,
    order: Order = "alternating",
    adjacency: Tensor | None = None,
    residual: bool = False,
    activation: Activation = "silu",
    max_log_scale: float = 5.0,
    univariate: Univariate | None = None,
) -> Chain:
    r"""Inverse autoregressive flow: :math:`y_i = x_i e^{s_i(x_{<i})} + m_i(x_{<i})` in each layer.

    Sampling, and scoring one's own samples, costs ``num_layers`` passes of a masked network.  The density of other
    points is exact, goes through ``input_dim`` steps per layer, and uses each weight once.

    Args:
        input_dim: the number of dimensions, or an event shape.
        context_dim: size of the context, 0 for none.
        num_layers: number of autoregressive layers (paper: up to 8).
        hidden_dims: widths of each network's hidden layers (here by size, see the module).
        order: ``"alternating"``, ``"identity"``, ``"reverse"``, ``"random"`` or a permutation, as for :func:`maf`.
        adjacency: boolean matrix in place of the order, as for :func:`maf`.
        residual: whether networks have residual blocks (paper: in its autoregressive ResNets).
        activation: of the networks (paper: ELU).
        max_log_scale: bound of the smooth clip on log-scales.
        univariate: another family of scalar maps in place of the affine one.

    The paper's layer is :math:`\sigma x + (1 - \sigma) m` with a sigmoid gate; here it is the affine form.

    References:
        Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016), arXiv:1606.04934.
    """
    options: dict[str, Any] = {"context_dim": context_dim, "residual": residual, "activation": activation}
    options["univariate"] = Affine(max_log_scale) if univariate is None else univariate
    options["hidden_dims"] = _hidden(input_dim, hidden_dims)
    return _autoregressive(input_dim, "sampling", num_layers, order, adjacency, **options)


def nsf(
    input_dim: int | Iterable[int],
    *,
    autoregressive: bool = False,
    context_dim: int = 0,
    num_layers: int | None = None,
    hidden_dims: Sequence[int] | None = None,
    bins: int = 8,
    bound: float = 5.0,
    boundary: str = "linear",
    mask: Mask = "alternating",
    order: Order = "alternating",
    adjacency: Tensor | None = None,
    residual: bool = False,
    activation: Activation = "silu",
) -> Chain:
    r"""Neural spline flow: each dimension moved by a monotone rational-quadratic spline.

    With couplings, as by default, both directions cost ``num_layers`` passes of a dense network.  Autoregressive, as
    :func:`maf`: density costs ``num_layers`` passes of a masked network, and sampling as many sweeps of ``input_dim``
    steps, each weight used once.  Splines learn densities with several modes and sharp edges in few layers; they act on
    :math:`[-B, B]` in each dimension, so data should be standardized.

    Args:
        input_dim: the number of dimensions, or an event shape.
        autoregressive: whether layers are autoregressive rather than couplings.
        context_dim: size of the context, 0 for none.
        num_layers: number of layers (paper: 10); by default 6 couplings, or 3 autoregressive layers.
        hidden_dims: widths of each network's hidden layers (paper: two residual blocks of 128 or 256; here by size, see
            the module).
        bins: number of bins of each spline (paper: 8).
        bound: half the side :math:`B` of the square in which a spline bends (paper: 3).
        boundary: ``"linear"``: beyond the square a spline goes on as a line with a slope that is learned;
            ``"identity"``: it is the identity there, as in the paper.
        mask: of couplings, as for :func:`realnvp`.
        order: of autoregressive layers, as for :func:`maf`.
        adjacency: of autoregressive layers, as for :func:`maf`.
        residual: whether networks have residual blocks (paper: yes).
        activation: of the networks (paper: ReLU).

    The paper mixes dimensions by a permutation and an LU-decomposed linear layer before each spline layer; here masks
    and orders alternate, and such layers can be put in between by hand.

    References:
        Neural Spline Flows (Durkan et al., 2019), arXiv:1906.04032.
    """
    choice("nsf", "boundary", boundary, ("linear", "identity"))
    options: dict[str, Any] = {"context_dim": context_dim, "residual": residual, "activation": activation}
    options["hidden_dims"] = _hidden(input_dim, hidden_dims)
    family = Spline(bins, bound, boundary)
    if autoregressive:
        layers = 3 if num_layers is None else num_layers
        return _autoregressive(input_dim, "density", layers, order, adjacency, univariate=family, **options)
    return Chain(_couplings(input_dim, family, 6 if num_layers is None else num_layers, mask, **options))


def ncsf(
    input_dim: int | Iterable[int],
    *,
    periodic: Tensor | Sequence[bool] | None = None,
    context_dim: int = 0,
    num_layers: int = 6,
    hidden_dims: Sequence[int] | None = None,
    bins: int = 8,
    bound: float = 5.0,
    mask: Mask = "alternating",
    residual: bool = False,
    activation: Activation = "silu",
) -> Chain:
    r"""Neural circular spline flow: couplings by circular splines, for angles, tori, and angles among other numbers.

    An angle :math:`x` in radians, taken modulo :math:`2\pi`, is moved by a rational-quadratic spline of
    :math:`[-\pi, \pi]` onto itself with the same slope at both ends, and rotated; conditioners see angles by their
    cosine and sine.  So the density is continuous and periodic in each angle.  Both directions cost ``num_layers``
    passes of a dense network, twice as many with angles and other dimensions in both halves of the mask.

    A :class:`~pyro_flows.distributions.Flow` over it has by default a base that is uniform in the angles.  As with
    Pyro's ``VonMises``, the support is real and the density integrates to 1 over one turn.

    Args:
        input_dim: the number of dimensions, or an event shape.
        periodic: boolean, shape ``event_shape``, true where a dimension is an angle; all by default.
        context_dim: size of the context, 0 for none.
        num_layers: number of steps, each of which moves half the dimensions.
        hidden_dims: widths of each conditioner's hidden layers (here by size, see the module).
        bins: number of bins of each spline (paper: 3 to 32).
        bound: half the side of the square in which the spline of a dimension that is no angle bends.
        mask: which dimensions the first step keeps, as for :func:`realnvp`; the second moves those, and so on.
        residual: whether conditioners have residual blocks.
        activation: of the conditioners.

    References:
        Normalizing Flows on Tori and Spheres (Rezende et al., 2020), arXiv:2002.02428.
    """
    event = event_size(input_dim)
    angle = torch.ones(event, dtype=torch.bool) if periodic is None else torch.as_tensor(periodic).bool().cpu()
    if angle.shape != event:
        raise ValueError(f"ncsf: expected periodic to have shape {tuple(event)}, got {tuple(angle.shape)}")
    options: dict[str, Any] = {"context_dim": context_dim, "residual": residual, "activation": activation}
    options |= {"hidden_dims": _hidden(input_dim, hidden_dims), "periodic": angle}
    random = isinstance(mask, str) and mask == "random"
    layers = []
    for k in range(integer("", "num_layers", num_layers)):
        if k % 2 == 0:
            kept = coupling_mask(event, mask)
        moved = kept if k % 2 and event.numel() > 1 else ~kept
        for some, family in ((angle, Spline(bins, boundary="circular")), (~angle, Spline(bins, bound))):
            if (moved & some).any():
                layers.append(Coupling(input_dim, family, mask=~(moved & some), save_mask=random, **options))
    return Chain(layers)
