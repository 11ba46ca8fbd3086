"""The builder of flows on spheres."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyro_flows.core.chain import Chain
from pyro_flows.core.checks import integer
from pyro_flows.flows.vectors import default_hidden
from pyro_flows.nets.activations import Activation
from pyro_flows.transforms import RecursiveSphere

__all__ = ["sphere"]


def sphere(
    input_dim: int,
    *,
    context_dim: int = 0,
    num_layers: int = 3,
    hidden_dims: Sequence[int] | None = None,
    bins: int = 16,
    residual: bool = False,
    activation: Activation = "silu",
) -> Chain:
    r"""Recursive flow on the unit sphere :math:`S^{n-1}` of :math:`n` coordinates: circle, sphere and beyond.

    Each layer moves the heights above the equator by splines of :math:`[-1, 1]` and the circle below them by a circular
    spline, each given the heights before it and the context (:class:`~pyro_flows.transforms.RecursiveSphere`).  Layers
    take the coordinates in turn as axis, so the poles of one lie on the equators of others.  Densities are with respect
    to the surface measure.  Both directions are exact and cost ``num_layers * (input_dim - 1)`` passes of small
    networks.

    The default base of a :class:`~pyro_flows.distributions.Flow` is then uniform on the sphere; any other distribution
    on Pyro's ``constraints.sphere`` may take its place, such as
    :class:`~pyro_flows.distributions.VonMisesFisher`.

    Args:
        input_dim: the number :math:`n` of coordinates, 2 for the circle and 3 for the sphere :math:`S^2`.
        context_dim: size of the context, 0 for none.
        num_layers: number of layers (paper: 1).
        hidden_dims: widths of the hidden layers.
        bins: number of bins of each spline.
        residual: whether networks have residual blocks.
        activation: activation of the networks.

    Raises:
        ValueError: for fewer than two coordinates.

    Example:
        >>> flow = pf.Flow(pf.sphere(3))
        >>> x = flow.sample((5,))
        >>> torch.allclose(x.norm(dim=-1), torch.ones(5))
        True

    References:
        Normalizing Flows on Tori and Spheres (Rezende et al., 2020), arXiv:2002.02428.
    """
    integer("sphere", "input_dim", input_dim, 2)
    options: dict[str, Any] = {"context_dim": context_dim, "residual": residual, "activation": activation, "bins": bins}
    options["hidden_dims"] = default_hidden(input_dim, hidden_dims)
    count = integer("", "num_layers", num_layers)
    # The last layer has the last coordinate as axis.
    axes = ((k - count) % input_dim for k in range(count))
    return Chain([RecursiveSphere(input_dim, axis=axis, **options) for axis in axes])
