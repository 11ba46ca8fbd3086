"""Builders of flows of vectors, each the identity when fresh."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_flows.core.chain import Chain
from pyro_flows.core.checks import choice, event_size, integer, layer_widths
from pyro_flows.nets.activations import Activation
from pyro_flows.transforms import Autoregressive, Coupling, Rescaling
from pyro_flows.transforms.coupling import Mask, coupling_mask
from pyro_flows.univariate.base import Affine, Shift, Univariate
from pyro_flows.univariate.spline import Spline

__all__ = ["iaf", "maf", "ncsf", "nice", "nsf", "realnvp"]

Order = str | Sequence[int] | Tensor


def default_hidden(event_shape: int | Iterable[int], hidden_dims: Sequence[int] | None) -> tuple[int, ...]:
    """The widths of the networks, ``hidden_dims`` if given."""
    if hidden_dims is not None:
        return layer_widths("", "hidden_dims", hidden_dims)
    return (min(max(64, 4 * event_size(event_shape).numel()), 512),) * 2


def _kept(event_shape: int | Iterable[int], mask: Mask, num_layers: int) -> Iterator[Tensor]:
    """The dimensions that each layer keeps; the second of a pair moves them.  Each pair draws its random mask."""
    event = event_size(event_shape)
    for k in range(integer("", "num_layers", num_layers)):
        if k % 2 == 0:
            kept = coupling_mask(event, mask)
        yield ~kept if k % 2 and event.numel() > 1 else kept


def _couplings(
    event_shape: int | Iterable[int], univariate: Univariate, num_layers: int, mask: Mask, **options: Any
) -> list[Coupling]:
    options["save_mask"] = isinstance(mask, str) and mask == "random"
    kept = _kept(event_shape, mask, num_layers)
    return [Coupling(event_shape, univariate, mask=each, **options) for each in kept]


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
    r"""NICE: additive couplings and a diagonal rescaling layer; the paper's base is logistic.

    From data to base, :math:`h = f_1 \circ \dots \circ f_n(y)` by couplings :math:`h_m = y_m - m(y_k)` of unit
    Jacobian, then :math:`x = e^{s} h`; :math:`\log|\det \partial x / \partial y| = \sum_i s_i`.  Both directions cost
    ``num_layers`` passes of a dense network.

    Args:
        input_dim: number of dimensions, or an event shape.
        context_dim: size of the context, 0 for none; couplings and rescaling depend on it.
        num_layers: number of couplings (paper: 4).
        hidden_dims: widths of the hidden layers (paper: five of 1000).
        mask: the dimensions that the first coupling keeps, as for :func:`realnvp` (paper: alternating).
        rescale: whether the rescaling layer ends the flow on the base side.
        residual: whether conditioners have residual blocks.
        activation: activation of the conditioners (paper: ReLU).

    Example:
        >>> flow = pf.Flow(pf.nice(4))
        >>> x = flow.sample((5,))
        >>> flow.log_prob(x).shape
        torch.Size([5])

    References:
        NICE: Non-linear Independent Components Estimation (Dinh et al., 2014), arXiv:1410.8516.
    """
    options: dict[str, Any] = {"context_dim": context_dim, "residual": residual, "activation": activation}
    hidden = default_hidden(input_dim, hidden_dims)
    layers = _couplings(input_dim, Shift(), num_layers, mask, hidden_dims=hidden, **options)
    first = [Rescaling(input_dim, hidden_dims=hidden[:1], **options)] if rescale else []
    return Chain([*first, *layers])


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
        input_dim: number of dimensions, or an event shape.
        context_dim: size of the context, 0 for none.
        num_layers: number of couplings (MAF paper's comparison: 5 or 10).
        hidden_dims: widths of the hidden layers.
        mask: the dimensions that the first coupling keeps and the second moves: ``"half"``, ``"alternating"``,
            ``"random"`` (redrawn for each pair) or boolean.
        residual: whether conditioners have residual blocks (paper: convolutional ones).
        activation: activation of the conditioners (paper: ReLU).
        max_log_scale: bound of the smooth clip on log-scales (paper: tanh times a learned scale).
        univariate: scalar maps in place of affine ones.

    Example:
        >>> flow = pf.Flow(pf.realnvp(4, num_layers=6, hidden_dims=(32, 32)))
        >>> x = flow.sample((5,))
        >>> flow.log_prob(x).shape
        torch.Size([5])

    References:
        Density estimation using Real NVP (Dinh et al., 2016), arXiv:1605.08803.
    """
    family = Affine(max_log_scale) if univariate is None else univariate
    options: dict[str, Any] = {"context_dim": context_dim, "residual": residual, "activation": activation}
    return Chain(
        _couplings(input_dim, family, num_layers, mask, hidden_dims=default_hidden(input_dim, hidden_dims), **options)
    )


def _autoregressive(
    input_dim: int | Iterable[int], univariate: Univariate, num_layers: int, order: Order, **options: Any
) -> Chain:
    orders: tuple[Order, ...] = (order,)
    if isinstance(order, str) and order == "alternating":
        orders = ("identity", "reverse") if options["adjacency"] is None else ("identity",)
    count = integer("", "num_layers", num_layers)
    each = (orders[k % len(orders)] for k in range(count))
    return Chain([Autoregressive(input_dim, univariate, order=order, **options) for order in each])


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

    Density costs ``num_layers`` passes of a masked network.  Sampling is exact: ``input_dim`` steps per layer, with the
    arithmetic of about one dense pass.

    Args:
        input_dim: number of dimensions, or an event shape.
        context_dim: size of the context, 0 for none.
        num_layers: number of autoregressive layers (paper: 5 and 10).
        hidden_dims: widths of the hidden layers (paper: one or two of 100 to 1024).
        order: ``"alternating"`` (as in the paper, every other layer reversed), ``"identity"``, ``"reverse"``,
            ``"random"`` (drawn for each layer) or a permutation for all layers.
        adjacency: boolean matrix of the inputs that each output may see, in all layers, in place of the order.
        residual: whether networks have residual blocks.
        activation: activation of the networks (paper: ReLU); a bounded first one keeps an outlying input from throwing
            the others far.
        max_log_scale: bound of the smooth clip on log-scales (paper: none); a tight one limits outliers.
        univariate: scalar maps in place of affine ones.

    The paper writes the family from base to data, :math:`y_i = x_i e^{\alpha_i} + \mu_i`, with batch normalization
    between layers.

    Example:
        >>> flow = pf.Flow(pf.maf(3, context_dim=2))
        >>> x, context = torch.randn(5, 3), torch.randn(5, 2)
        >>> flow.log_prob(x, context).shape
        torch.Size([5])
        >>> flow.sample((4,), context).shape  # four draws for each context
        torch.Size([4, 5, 3])

    References:
        Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017), arXiv:1705.07057.
    """
    options: dict[str, Any] = {"context_dim": context_dim, "residual": residual, "activation": activation}
    options |= {"hidden_dims": default_hidden(input_dim, hidden_dims), "adjacency": adjacency}
    family = Affine(max_log_scale) if univariate is None else univariate
    return _autoregressive(input_dim, family, num_layers, order, **options)


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

    Sampling, and scoring own samples, costs ``num_layers`` passes of a masked network.  The density of other points is
    exact and costs as much as sampling in :func:`maf`.

    Args:
        input_dim: number of dimensions, or an event shape.
        context_dim: size of the context, 0 for none.
        num_layers: number of autoregressive layers (paper: up to 8).
        hidden_dims: widths of the hidden layers.
        order: order of the dimensions, as for :func:`maf`.
        adjacency: boolean matrix in place of the order, as for :func:`maf`.
        residual: whether networks have residual blocks (paper: in its ResNets).
        activation: activation of the networks (paper: ELU).
        max_log_scale: bound of the smooth clip on log-scales.
        univariate: scalar maps in place of affine ones.

    The paper's layer is :math:`\sigma x + (1 - \sigma) m` with a sigmoid gate.

    Example:
        >>> flow = pf.Flow(pf.iaf(3))
        >>> z, log_q = flow.rsample_and_log_prob((5,))
        >>> z.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))

    References:
        Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016), arXiv:1606.04934.
    """
    options: dict[str, Any] = {"context_dim": context_dim, "residual": residual, "activation": activation}
    options |= {"hidden_dims": default_hidden(input_dim, hidden_dims), "adjacency": adjacency}
    family = Affine(max_log_scale) if univariate is None else univariate
    return _autoregressive(input_dim, family, num_layers, order, fast="sampling", **options)


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
    r"""Neural spline flow: moves each dimension by a monotone rational-quadratic spline.

    With couplings, both directions cost ``num_layers`` passes of a dense network; autoregressive layers cost as much as
    in :func:`maf`.  Splines learn several modes and sharp edges in few layers.  They act on :math:`[-B, B]`, so
    standardize the data.

    Args:
        input_dim: number of dimensions, or an event shape.
        autoregressive: whether layers are autoregressive rather than couplings.
        context_dim: size of the context, 0 for none.
        num_layers: number of layers (paper: 10); by default 6 couplings or 3 autoregressive layers.
        hidden_dims: widths of the hidden layers (paper: two residual blocks of 128 or 256).
        bins: number of bins of each spline (paper: 8).
        bound: half the side :math:`B` of the square in which a spline bends (paper: 3).
        boundary: the spline beyond the square: ``"linear"``, a line of learned slope, or ``"identity"``, as in the
            paper.
        mask: mask of couplings, as for :func:`realnvp`.
        order: order of autoregressive layers, as for :func:`maf`.
        adjacency: adjacency of autoregressive layers, as for :func:`maf`.
        residual: whether networks have residual blocks (paper: yes).
        activation: activation of the networks (paper: ReLU).

    The paper puts a permutation and an LU-decomposed linear layer before each spline layer; here masks and orders
    alternate.

    Example:
        >>> flow = pf.Flow(pf.nsf(3, bins=16))
        >>> x = flow.sample((5,))
        >>> flow.log_prob(x).shape
        torch.Size([5])

    References:
        Neural Spline Flows (Durkan et al., 2019), arXiv:1906.04032.
    """
    choice("nsf", "boundary", boundary, ("linear", "identity"))
    options: dict[str, Any] = {"context_dim": context_dim, "residual": residual, "activation": activation}
    options["hidden_dims"] = default_hidden(input_dim, hidden_dims)
    family = Spline(bins, bound, boundary)
    if autoregressive:
        layers = 3 if num_layers is None else num_layers
        return _autoregressive(input_dim, family, layers, order, adjacency=adjacency, **options)
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
    r"""Neural circular spline flow: couplings for angles, alone or among other numbers.

    A rational-quadratic spline of :math:`[-\pi, \pi]` onto itself, with one slope at both ends, and a rotation move an
    angle :math:`x` in radians, modulo :math:`2\pi`.  Conditioners see its cosine and sine, so the density is continuous
    and periodic.  Both directions cost ``num_layers`` passes of a dense network, twice as many with angles and other
    dimensions in both halves of the mask.

    The default base of a :class:`~pyro_flows.distributions.Flow` is then uniform in the angles.  As with Pyro's
    ``VonMises``, the support is real and the density integrates to 1 over one turn.

    Args:
        input_dim: number of dimensions, or an event shape.
        periodic: boolean, shape ``event_shape``, true for angles; all by default.
        context_dim: size of the context, 0 for none.
        num_layers: number of steps, each moving half the dimensions.
        hidden_dims: widths of the hidden layers.
        bins: number of bins of each spline (paper: 3 to 32).
        bound: half the side of the square in which other dimensions' splines bend.
        mask: the dimensions that the first step keeps, as for :func:`realnvp`.
        residual: whether conditioners have residual blocks.
        activation: activation of the conditioners.

    Example:
        >>> flow = pf.Flow(pf.ncsf(2))
        >>> angles = torch.tensor([3.0, -1.0])
        >>> bool(flow.log_prob(angles).isclose(flow.log_prob(angles + 2 * torch.pi)))
        True

    References:
        Normalizing Flows on Tori and Spheres (Rezende et al., 2020), arXiv:2002.02428.
    """
    event = event_size(input_dim)
    angle = torch.ones(event, dtype=torch.bool) if periodic is None else torch.as_tensor(periodic).bool()
    angle = angle.to(torch.get_default_device())
    if angle.shape != event:
        raise ValueError(f"ncsf: expected periodic to have shape {tuple(event)}, got {tuple(angle.shape)}")
    options: dict[str, Any] = {"context_dim": context_dim, "residual": residual, "activation": activation}
    options |= {"hidden_dims": default_hidden(input_dim, hidden_dims), "periodic": angle}
    options["save_mask"] = isinstance(mask, str) and mask == "random"
    families = (angle, Spline(bins, boundary="circular")), (~angle, Spline(bins, bound))
    layers = []
    for kept in _kept(event, mask, num_layers):
        for some, family in families:
            if (~kept & some).any():
                layers.append(Coupling(input_dim, family, mask=kept | ~some, **options))
    return Chain(layers)
